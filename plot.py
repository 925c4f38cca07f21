"""Draws runs: training and validation loss, and HellaSwag, beside GPT-2's and GPT-3's own figures.

python plot.py                           # the newest run, into log/<run>/loss.png
python plot.py log/a log/b --out compare.png
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

LOG_ROOT = Path(__file__).resolve().parent / "log"

# Validation loss: OpenAI's GPT-2 124M on FineWeb's validation shard, measured by build-nanogpt (play.ipynb
# there).
GPT2_VAL_LOSS = 3.2924
# HellaSwag acc_norm, completion style: GPT-2 124M (build-nanogpt, hellaswag.py) and GPT-3 Small (GPT-3 paper,
# table H.1).
HELLASWAG = {"GPT-2 124M": 0.2955, "GPT-3 124M": 0.337}


@dataclass(frozen=True)
class Config:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Run folders; by default the newest under log/."""
    out: str = ""
    """The picture; by default loss.png in the first run's folder."""


def read_log(run: Path) -> dict[str, np.ndarray]:
    """A run's log.txt by stream: arrays (n, 2) of step and value. Raises FileNotFoundError or ValueError."""
    path = run / "log.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; give a run folder, log/<run>")
    streams: dict[str, list[tuple[int, float]]] = {}
    *lines, _ = path.read_text(encoding="utf-8").split(
        "\n"
    )  # a last line that is only half there is left out
    for number, line in enumerate(lines, 1):
        match = re.fullmatch(r"(\d+) (\w+) (-?(?:\d+(?:\.\d+)?(?:e[+-]?\d+)?|inf|nan))", line)
        if not match:
            raise ValueError(f"{path}, line {number}: {line!r} is not `<step> <stream> <value>`")
        streams.setdefault(match[2], []).append((int(match[1]), float(match[3])))
    if not streams:
        raise ValueError(f"{path} has no lines yet")
    return {name: np.array(points) for name, points in streams.items()}


def draw(runs: list[Path], out: Path):
    """Writes the picture: losses on the left and, where a run has it, HellaSwag on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    logs = [read_log(run) for run in runs]
    panels = 2 if any("hella" in log for log in logs) else 1
    figure, axes = plt.subplots(1, panels, figsize=(8 * panels, 5), squeeze=False, layout="constrained")
    loss, hella = axes[0][0], axes[0][-1]
    for i, (run, log) in enumerate(zip(runs, logs)):
        label = f"{run.name}: " if len(runs) > 1 else ""
        if "train" in log:
            loss.plot(*log["train"].T, color=f"C{i}", alpha=0.35, linewidth=1, label=f"{label}training loss")
        if "val" in log:
            best = log["val"][:, 1].min()
            name = f"{label}validation loss (best {best:.3f})"
            loss.plot(*log["val"].T, color=f"C{i}", linewidth=2, marker="o", markersize=3, label=name)
        if panels == 2 and "hella" in log:
            best = log["hella"][:, 1].max()
            name = f"{label}acc_norm (best {100 * best:.1f}%)"
            hella.plot(
                log["hella"][:, 0],
                100 * log["hella"][:, 1],
                color=f"C{i}",
                label=name,
                marker="o",
                markersize=3,
            )
    reached = min((log["val"][:, 1].min() for log in logs if "val" in log), default=np.inf)
    if reached < GPT2_VAL_LOSS + 1:  # a run far from it would only be squeezed by the line
        loss.axhline(GPT2_VAL_LOSS, color="gray", linestyle="--", linewidth=1, label="GPT-2 124M on FineWeb")
    loss.set(xlabel="step", ylabel="loss (nats a token)", title=runs[0].name if len(runs) == 1 else "loss")
    if panels == 2:
        for (name, value), style in zip(HELLASWAG.items(), ("--", ":")):
            hella.axhline(
                100 * value, color="gray", linestyle=style, linewidth=1, label=f"{name} ({100 * value:.1f}%)"
            )
        hella.set(xlabel="step", ylabel="HellaSwag (%)", title="HellaSwag")
    for axis in {loss, hella}:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.has_data():
            axis.legend(frameon=False)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def main(cfg: Config) -> Path:
    runs = [Path(run) for run in cfg.runs]
    if not runs:
        found = [path.parent for path in LOG_ROOT.glob("*/log.txt")]
        if not found:
            raise FileNotFoundError(f"{LOG_ROOT} holds no run; train one: `python train_gpt2.py demo`")
        runs = [max(found, key=lambda run: (run / "log.txt").stat().st_mtime)]
    out = Path(cfg.out) if cfg.out else runs[0] / "loss.png"
    out = out if out.suffix else out.with_suffix(".png")
    draw(runs, out)
    print(out)
    return out


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        sys.exit(2)
