"""Draws runs: training loss, validation loss and HellaSwag, beside the published figures of GPT-2 and GPT-3.

    python plot.py                                   # the newest run, into log/<run>/loss.png
    python plot.py log/a log/b --x tokens --log --theme dark --out compare.pdf
    python plot.py --text                            # as characters, in the terminal

The training loss is drawn twice: faint, as it was logged, and as a centred mean of --smooth steps. Grey lines
are the published figures for the run's size, or for 124M if its shape is not a published one. GPT-2's loss,
which is on FineWeb-Edu, is drawn if a run comes within 1 of it.
"""

import lib.startup  # noqa: F401

import itertools
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from lib import cli, files, run_log, schema
from lib.folders import check_ownership, find_run, find_settings, newest_run

Runs = Annotated[tuple[str, ...], tyro.conf.Positional]

# On build-nanogpt's validation shard (play.ipynb there).
VAL_LOSS = {"124M": {"GPT-2 124M on FineWeb-Edu (build-nanogpt)": 3.2924}}
# acc_norm, completion style. GPT-2: hellaswag.py of build-nanogpt, dev/vislog.ipynb of llm.c. GPT-3 (125M,
# 350M, 760M, 1.3B): its paper, table H.1, zero-shot.
HELLASWAG = {
    "124M": {"GPT-2 124M (build-nanogpt)": 0.2955, "GPT-3 Small (Brown et al., 2020)": 0.337},
    "350M": {"GPT-2 350M (llm.c)": 0.3752, "GPT-3 Medium (Brown et al., 2020)": 0.436},
    "774M": {"GPT-2 774M (llm.c)": 0.4320, "GPT-3 Large (Brown et al., 2020)": 0.510},
    "1558M": {"GPT-2 1558M (build-nanogpt)": 0.4893, "GPT-3 XL (Brown et al., 2020)": 0.547},
}
# As in model.py, whose import would take a second: it imports torch.
SIZE_NAMES = {
    "124m": "124M", "350m": "350M", "774m": "774M", "1558m": "1558M",
    "gpt2": "124M", "gpt2-medium": "350M", "gpt2-large": "774M", "gpt2-xl": "1558M",
    "117m": "124M", "125m": "124M", "345m": "350M", "355m": "350M", "762m": "774M", "1542m": "1558M",
    "1.5b": "1558M",
}  # fmt: skip

# Paper, ink, grid, and for the runs the colours of Okabe and Ito (2008), which colour-blind people can
# distinguish, without those that are hard to see on this paper.
THEMES = {
    "light": ("#ffffff", "#24292f", "#e3e6ea", "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9"),
    "dark": ("#0d1117", "#d6dde4", "#262c34", "#56b4e9 #e69f00 #009e73 #cc79a7 #f0e442 #d55e00"),
}
GREY = "#808890"

# The settings that are read here.
SETTINGS = {
    "total_batch_tokens": int,
    "init_from": str | None,
    "model_size": str | None,
    **dict.fromkeys(("n_layer", "n_head", "n_embd"), int | None),
}


@dataclass(frozen=True)
class Config:
    runs: Runs = cli.knob((), "Run folders; by default the newest under log/.")
    out: cli.PathName = cli.knob(
        "", "The picture, .png, .svg or .pdf; by default loss.png in the first run's folder."
    )
    x: Literal["step", "tokens", "hours"] = cli.knob(
        "step", "The horizontal axis; hours, from the logged tokens per second, are without evaluation."
    )
    smooth: int | None = cli.knob(
        None, "Steps of the training loss's mean; 1 for none; by default a fiftieth of the run's.", at_least=1
    )
    log: cli.Switch = cli.knob(False, "A logarithmic horizontal axis.")
    max_loss: float | None = cli.knob(None, "Cut off losses above this, to give the lower ones more room.")
    theme: Literal["light", "dark"] = cli.knob("light", "Colours.")
    text: cli.Switch = cli.knob(False, "Print the curves as text; draw only with --out.")


class Run:
    """A run's folder, its log by stream, and its settings ({} without their file)."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, read_log(folder)
        path = find_settings(folder)
        self.settings = schema.read_json(path, SETTINGS, optional=True) if path.exists() else {}

    def curve(self, stream: str, unit: str, window: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The x of a stream, in the unit, and its smoothed values, without those that are not finite."""
        steps, values = self.log[stream].T
        finite = np.abs(values) < 1e30  # more cannot be drawn
        return self.x(steps[finite], unit), smooth(values[finite], window)

    def x(self, steps: np.ndarray, unit: str) -> np.ndarray:
        """The steps, tokens or hours of training before these steps. Raises ValueError if unknown."""
        if unit == "step":
            return steps
        batch_tokens = self.settings.get("total_batch_tokens")
        if not batch_tokens:
            raise ValueError(f"--x {unit} needs total_batch_tokens in {find_settings(self.folder)}")
        if unit == "tokens":
            return steps * batch_tokens
        if "toks" not in self.log:
            raise ValueError(f"--x hours needs the stream toks in {self.folder / 'log.txt'}")
        logged, toks = self.log["toks"][self.log["toks"][:, 1] > 0].T
        hours = np.cumsum(batch_tokens / toks) / 3600  # when each of the logged steps ended
        return np.interp(steps, [logged[0], *(logged + 1)], [0, *hours])

    def window(self, cfg: Config) -> int:
        """The number of steps in a mean: --smooth, made odd."""
        return (cfg.smooth or len(self.log.get("train", ())) // 50) // 2 * 2 + 1

    def best(self, stream: str) -> float:
        """A stream's lowest value, HellaSwag's highest; nan without values."""
        extreme = np.fmax if stream == "hella" else np.fmin  # both ignore nan
        return extreme.reduce(self.log[stream][:, 1]) if stream in self.log else np.nan

    def size(self) -> str:
        """The model's published size; 124M if it has none."""
        name = str(self.settings.get("init_from") or self.settings.get("model_size"))
        is_published = all(self.settings.get(key) is None for key in ("n_layer", "n_head", "n_embd"))
        return SIZE_NAMES.get(name.lower(), "124M") if is_published else "124M"


def read_log(run: Path) -> dict[str, np.ndarray]:
    """A run's log.txt by stream: arrays (n, 2) of step and value. Raises FileNotFoundError or ValueError."""
    path = run / "log.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; give a run folder, log/<run>")
    streams: dict[str, list[tuple[int, float]]] = {}
    for step, stream, value, _ in run_log.read(path):
        streams.setdefault(stream, []).append((step, value))
    if not streams:
        raise ValueError(f"{path} has no lines yet")
    return {name: np.array(points) for name, points in streams.items()}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred means of `window` (odd) values, (n,) to (n,). Near the beginning, where losses fall steeply,
    the mean around value i reaches only i // 4 values back and ahead; at the end, ahead only to the last."""
    place = np.arange(len(values))
    before = np.minimum(window // 2, place // 4)
    after = np.minimum(before, place[::-1])
    sums = np.append(0, np.cumsum(values))
    return (sums[place + after + 1] - sums[place - before]) / (before + after + 1)


def name_runs(runs: list[Run]) -> list[str]:
    """The folders' names, or their paths if two have the same name."""
    names = [run.folder.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def format_short(number: float, _: int | None = None) -> str:
    """1500000 as 1.5M."""
    size, letter = next(((s, c) for s, c in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if number >= s), (1, ""))
    return f"{number / size:g}{letter}"


def format_percent(share: float, _: int | None = None) -> str:
    return f"{100 * share:.4g}%"


def draw_text(run: Run, name: str, width: int) -> str:
    """The run's curves as lines of bars, one line per stream."""
    streams = [stream for stream in ("train", "val", "hella") if stream in run.log]
    last = max((run.log[stream][-1, 0] for stream in streams), default=0)
    lines = [f"{name}, steps 0 to {last:,.0f}"]
    for stream in streams:
        steps, values = run.curve(stream, "step")
        if len(values):
            best = "" if stream == "train" else f", best {run.best(stream):.4g}"
            bars = draw_bars(steps / (last or 1), values, width)
            lines.append(f"{stream:5} {values[0]:7.4g} {bars} {values[-1]:.4g}{best}")
    return "\n".join(lines)


def draw_bars(x: np.ndarray, y: np.ndarray, width: int) -> str:
    """`width` bars for x from 0 to 1, each as high as the mean of its values; blanks without values."""
    place = np.rint(x * (width - 1)).astype(int)
    counts = np.bincount(place, minlength=width)
    means = np.bincount(place, y, width) / np.where(counts, counts, np.nan)
    levels = 7 * (means - np.nanmin(means)) / (np.nanmax(means) - np.nanmin(means) or 1)
    return "".join("▁▂▃▄▅▆▇█"[round(level)] if level >= 0 else " " for level in levels)


def style(theme: str) -> dict[Any, Any]:
    """matplotlib's settings for a theme. Text in SVG and PDF stays text that can be searched."""
    from cycler import cycler

    paper, ink, grid, colours = THEMES[theme]
    return {
        **dict.fromkeys(["figure.facecolor", "axes.facecolor"], paper),
        **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor"], ink),
        **dict.fromkeys(["xtick.color", "ytick.color"], ink),
        "axes.prop_cycle": cycler(linestyle=["-", "--", "-.", ":"]) * cycler(color=colours.split()),
        "axes.grid": True, "grid.color": grid, "axes.spines.top": False, "axes.spines.right": False,
        "legend.edgecolor": "none", "legend.fontsize": 9, "legend.title_fontsize": 9,
        "legend.handlelength": 3, "savefig.dpi": 200, "svg.fonttype": "none", "pdf.fonttype": 42,
    }  # fmt: skip


def draw(runs: list[Run], cfg: Config) -> Any:
    """Draws the losses and, if a run has it, HellaSwag to their right. Returns a matplotlib figure."""
    import matplotlib
    from matplotlib.figure import Figure

    names, windows = name_runs(runs), sorted({run.window(cfg) for run in runs if "train" in run.log})
    has_hella = any("hella" in run.log for run in runs)
    with matplotlib.rc_context(style(cfg.theme)):
        figure = Figure(figsize=(12.8 if has_hella else 6.4, 4), layout="constrained")
        panels = figure.subplots(1, 1 + has_hella, squeeze=False)[0]
        loss, hella = panels[0], panels[-1]
        for run, name, look in zip(runs, names, itertools.cycle(matplotlib.rcParams["axes.prop_cycle"])):
            points = {"marker": "o", "markersize": 4}
            forms = {"val": "{:.3f}".format, "hella": format_percent}
            bests = [form(run.best(stream)) for stream, form in forms.items() if stream in run.log]
            label = f"{name}: {', '.join(bests)}" if bests else name
            loss.plot([], [], **look, **points, label=label)
            if "train" in run.log:
                raw = {"color": look["color"], "linestyle": "-", "linewidth": 0.7, "alpha": 0.3}
                loss.plot(*run.curve("train", cfg.x), **raw)
                loss.plot(*run.curve("train", cfg.x, run.window(cfg)), **look)
            if "val" in run.log:
                loss.plot(*run.curve("val", cfg.x), **{**look, **points, "linestyle": ""})
            if "hella" in run.log:
                hella.plot(*run.curve("hella", cfg.x), **look, **points)
        reached = np.fmin.reduce([run.best("val") for run in runs])
        draw_references(loss, VAL_LOSS, runs, "{:.2f}".format, lowest=reached - 1)
        if has_hella:
            draw_references(hella, HELLASWAG, runs, format_percent)
            hella.set_title("acc_norm, completion style", fontsize=9, loc="left")
            hella.set_ylabel("HellaSwag")
            hella.yaxis.set_major_formatter(format_percent)
        steps = " to ".join(str(window) for window in dict.fromkeys([*windows[:1], *windows[-1:]]))
        mean = f", mean of {steps} steps (faint: each step)" if windows[-1:] > [1] else ""
        loss.set_title(f"lines: training loss{mean}; points: validation loss", fontsize=9, loc="left")
        loss.set_ylabel("loss (nats per token)")
        if cfg.max_loss is not None:
            lowest, top = loss.dataLim.y0, cfg.max_loss
            if not np.isfinite(lowest):
                raise ValueError(f"--max-loss is {top}, but no loss is finite: leave it out")
            if not top > lowest:
                raise ValueError(f"--max-loss is {top}; it must be above the lowest loss, {lowest:.3f}")
            loss.set_ylim(lowest - 0.05 * (top - lowest), top)
        finish_axes(figure, panels, cfg, are_many=len(runs) > 1)
    return figure


def draw_references(axes: Any, table: dict, runs: list[Run], form: Callable, lowest: float = -np.inf):
    """Draws the grey lines for the runs' sizes, labelled with their sources, but none below `lowest`."""
    sizes = dict.fromkeys(run.size() for run in runs)
    lines = [line for size in sizes for line in table.get(size, {}).items()]
    dashes = itertools.cycle([(0, (6, 3)), (0, (1.5, 2)), (0, (6, 2, 1.5, 2))])
    for (name, value), dash in zip(lines, dashes):
        if value >= lowest:
            axes.axhline(value, color=GREY, ls=dash, lw=1.2, label=f"{name}: {form(value)}")


def finish_axes(figure: Any, panels: list, cfg: Config, are_many: bool):
    """Sets up the horizontal axes and the legends. The legend of several runs stands beside the panels, and
    the figure grows by its width."""
    labels = {"step": "step", "tokens": "tokens of training", "hours": "hours of training (no evaluation)"}
    for axes in panels:
        if cfg.log:
            axes.set_xscale("log", nonpositive="mask")
        axes.set_xlabel(labels[cfg.x])
        axes.xaxis.set_major_formatter(format_short)
    title = "best validation loss" + (", HellaSwag" if len(panels) > 1 else "")
    for axes in panels[are_many:]:
        axes.legend(title=title if axes is panels[0] else None, alignment="left")
    if are_many:
        handles, names = panels[0].get_legend_handles_labels()
        width, height = figure.get_size_inches()
        width += 0.6 + 0.07 * max(map(len, names))
        figure.set_size_inches(width, max(height, 0.6 + 0.21 * len(names)))
        figure.legend(handles, names, title=title, alignment="left", loc="outside right upper")


def main(cfg: Config) -> Path | None:
    """Prints the curves, or writes the picture and prints its path."""
    cli.check_bounds(cfg)
    folders = [find_run(Path(run).expanduser()) for run in cfg.runs] or [newest_run(files.LOGS, "log")]
    if not cfg.out and not cfg.text:
        check_ownership(folders[0])
    out = Path(cfg.out) if cfg.out else folders[0] / "loss.png"
    out = out if out.suffix else out.with_suffix(".png")
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--out {out} ends in {out.suffix}; it must be one of .png, .svg, .pdf")
    runs = [Run(folder) for folder in folders]
    for run in runs:
        for stream, points in run.log.items():
            if count := np.count_nonzero(~np.isfinite(points[:, 1])):
                print(
                    f"{run.folder}: {count} of {len(points)} values of {stream} are not finite",
                    file=sys.stderr,
                )
    if cfg.text:
        width = max(10, shutil.get_terminal_size().columns - 40)
        for run, name in zip(runs, name_runs(runs)):
            print(draw_text(run, name, width))
        if not cfg.out:
            return None
    import matplotlib

    figure = draw(runs, cfg)
    with matplotlib.rc_context(style(cfg.theme)):
        figure.savefig(out)
    print(out)
    return out


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(Config, __doc__)))
