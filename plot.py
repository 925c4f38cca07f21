"""Draws and compares runs: losses, HellaSwag beside the figures of GPT-2 and GPT-3, and your own streams.

    python plot.py                                   # the newest run, into log/<run>/loss.png
    python plot.py log/a log/b --x tokens --log --theme dark --out compare.pdf
    python plot.py log/muon-* log/adamw-* --band     # runs that differ in the seed: their mean and a band
    python plot.py log/a --streams norm toks         # more of the log's streams, each in a panel
    python plot.py --text                            # as characters, in the terminal

Several runs are also printed as a table, the lowest last validation loss first. A stream that train_gpt2.py
does not have, that is, an evaluation of your own, is always drawn, in a panel of its own.

The training loss is drawn twice: faint, as it was logged, and as a centred mean of --smooth steps. Grey lines
are the published figures for the run's size, or for 124M if its shape is not a published one. GPT-2's loss,
which is on FineWeb-Edu, is drawn if a run comes within 1 of it.
"""

import lib.startup  # noqa: F401

import functools
import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from lib import cli, files, run_log, schema
from lib.folders import STATE, check_ownership, find_run, find_settings, list_steps, newest_run

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
POINTS = {"marker": "o", "markersize": 4}
MOST_POINTS = 60  # a stream with more values is drawn as its mean, without points
LOSSES = ("train", "val", "hella")  # they have their places

# Runs with a band may differ in these settings.
SEED_SETTINGS = {"seed", "run_name", "log_dir", "like"}
SEED_SUFFIX = re.compile(r"[-_.](seed|s)?\d+$")  # of their names

# The settings that are read here.
SETTINGS = {
    **dict.fromkeys(("total_batch_tokens", "seed"), int),
    "init_from": str | None,
    "model_size": str | None,
    **dict.fromkeys(("n_layer", "n_head", "n_embd"), int | None),
}


@dataclass(frozen=True)
class Config:
    runs: Runs = cli.knob((), "run folders; by default the newest under log/")
    out: cli.PathName = cli.knob(
        "", "the picture, .png, .svg or .pdf; by default loss.png in the first run's folder"
    )
    x: Literal["step", "tokens", "hours"] = cli.knob(
        "step", "the horizontal axis; hours, from the logged tokens per second, are without evaluation"
    )
    smooth: int | None = cli.knob(
        None, "steps of the training loss's mean; 1 for none; by default a fiftieth of the run's", at_least=1
    )
    band: cli.Switch = cli.knob(
        False,
        "draw runs as one if only the seeds and the numbers at the end of the names differ: the mean, and a "
        "band from the lowest to the highest",
    )
    streams: tuple[str, ...] = cli.knob((), "more streams of the log to draw, such as lr, norm or toks")
    log: cli.Switch = cli.knob(False, "a logarithmic horizontal axis")
    max_loss: float | None = cli.knob(None, "cut off losses above this, to give the lower ones more room")
    theme: Literal["light", "dark"] = cli.knob("light", "colours")
    text: cli.Switch = cli.knob(False, "print the curves as text; draw only with --out")


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

    def last(self, stream: str) -> np.ndarray:
        """A stream's last step and value; nan without values."""
        return self.log[stream][-1] if stream in self.log else np.full(2, np.nan)

    def code(self) -> str:
        """The hash of the model.py with which its newest checkpoint was trained; "" if unknown."""
        path = ([self.folder, *list_steps(self.folder)][-1]) / STATE
        return (path.is_file() and schema.read_json(path, {}).get("model_py")) or ""

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


Group = list[Run]  # drawn as one: runs that differ only in the seed, or a single run


def group_runs(runs: list[Run], cfg: Config) -> list[Group]:
    """The runs, with --band those that differ only in the seed together. The same settings do not suffice:
    the code may have changed between `before-1` and `after-1`. Raises ValueError for two of the same seed."""
    groups: dict[Any, Group] = {}
    for run in runs:
        stem = SEED_SUFFIX.sub("", run.folder.resolve().name)
        settings = {name: value for name, value in run.settings.items() if name not in SEED_SETTINGS}
        key = (stem, run.code(), json.dumps(settings, sort_keys=True)) if cfg.band and settings else id(run)
        group = groups.setdefault(key, [])
        for other in group:
            if "seed" in run.settings and other.settings["seed"] == run.settings["seed"]:
                both = f"{other.folder.name} and {run.folder.name} have the same --seed"
                raise ValueError(f"--band: {both}, {run.settings['seed']}; leave out one of them")
        group.append(run)
    return list(groups.values())


def name_groups(groups: list[Group]) -> list[str]:
    """The folders' names, of several seeds without their numbers; their paths if two have the same."""
    for kind in (lambda run: run.folder.resolve().name, lambda run: str(run.folder)):
        names = [
            f"{SEED_SUFFIX.sub('', kind(group[0]))} ({len(group)} seeds)"
            if len(group) > 1
            else kind(group[0])
            for group in groups
        ]
        if len(set(names)) == len(names):
            break
    return names


def average(group: Group, stream: str, unit: str, window: int = 1) -> tuple[np.ndarray, ...]:
    """x, mean, lowest and highest of a stream's smoothed values, at the steps that all runs have."""
    curves = [run.curve(stream, "step", window) for run in group]
    steps, values = curves[0][0], np.array([y for _, y in curves[:1]])
    if len(group) > 1:
        steps = functools.reduce(np.intersect1d, [x for x, _ in curves])
        values = np.array([y[np.searchsorted(x, steps)] for x, y in curves])
    x = np.mean([run.x(steps, unit) for run in group], axis=0)
    return x, values.mean(axis=0), values.min(axis=0), values.max(axis=0)


def format_mean(group: Group, stream: str) -> str:
    """A stream's last value; of several runs, the mean ± the standard deviation (of a sample, n - 1)."""
    form = run_log.find_stream(stream).form
    values = [run.last(stream)[1] for run in group if stream in run.log]
    if not values:
        return "-"
    spread = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{spread}"


def format_table(groups: list[Group]) -> str:
    """Each group's last evaluations, the lowest validation loss (without one, the training loss) first."""
    streams = [stream for stream in list_streams(groups) if run_log.find_stream(stream).is_evaluation]
    streams = streams if "val" in streams else ["train", *streams]
    rows = []
    for group, name in zip(groups, name_groups(groups)):
        steps = np.array([max(values[-1, 0] for values in run.log.values()) for run in group])
        losses = np.array([run.last(streams[0])[1] for run in group])
        until = " to ".join(f"{step:.0f}" for step in dict.fromkeys([steps.min(), steps.max()]))
        cells = [format_mean(group, stream) for stream in streams]
        rows.append((np.nan_to_num(losses.mean(), nan=np.inf), [name, until, *cells]))
    head = ["run", "last step", *(run_log.find_stream(stream).label for stream in streams)]
    table = [head, *(row for _, row in sorted(rows))]
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in table)


def list_streams(groups: list[Group]) -> list[str]:
    """The streams of all runs: those that train_gpt2.py has, in its order, then the others."""
    found = dict.fromkeys(stream for group in groups for run in group for stream in run.log)
    return sorted(found, key=lambda name: [*run_log.STREAMS, name].index(name))


def format_short(number: float, _: int | None = None) -> str:
    """1500000 as 1.5M."""
    size, letter = next(((s, c) for s, c in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if number >= s), (1, ""))
    return f"{number / size:g}{letter}"


def format_percent(share: float, _: int | None = None) -> str:
    return f"{100 * share:.4g}%"


def draw_text(run: Run, name: str, width: int) -> str:
    """The run's curves as lines of bars, one line per stream."""
    streams = [name for name in list_streams([[run]]) if name in LOSSES or name not in run_log.STREAMS]
    last = max((run.log[stream][-1, 0] for stream in streams), default=0)
    lines = [f"{name}, steps 0 to {last:,.0f}"]
    for stream in streams:
        steps, values = run.curve(stream, "step")
        if len(values):
            best = f", best {run.best(stream):.4g}" if stream in ("val", "hella") else ""
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
    """Draws the losses and, if a run has them, HellaSwag and other streams, each in a panel. Returns a
    matplotlib figure. Raises ValueError for --streams that no run has."""
    import matplotlib
    from matplotlib.figure import Figure

    groups = group_runs(runs, cfg)
    streams = list_streams(groups)
    if missing := [name for name in cfg.streams if name not in streams]:
        raise ValueError(f"--streams {missing[0]} is in no log; the runs have {', '.join(streams)}")
    wanted = [name for name in streams if name in cfg.streams or name not in run_log.STREAMS]
    shown = ["loss", *(["hella"] if "hella" in streams else []), *(n for n in wanted if n not in LOSSES)]
    columns, rows = min(2, len(shown)), -(-len(shown) // 2)
    with matplotlib.rc_context(style(cfg.theme)):
        figure = Figure(figsize=(6.4 * columns, 4 * rows), layout="constrained")
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes in grid[len(shown) :]:
            axes.remove()
        panels = dict(zip(shown, grid))
        looks = itertools.cycle(matplotlib.rcParams["axes.prop_cycle"])
        for group, name, look in zip(groups, name_groups(groups), looks):
            draw_losses(panels["loss"], group, name, cfg, look)
            for stream in shown[1:]:
                draw_curve(panels[stream], group, stream, cfg, look)
        finish_losses(panels["loss"], groups, cfg)
        for stream in shown[1:]:
            label = run_log.find_stream(stream).label
            panels[stream].set_title(label[:1].upper() + label[1:], fontsize=9, loc="left")
        if "hella" in panels:
            draw_references(panels["hella"], HELLASWAG, runs, format_percent)
            panels["hella"].set_title("acc_norm, completion style", fontsize=9, loc="left")
            panels["hella"].set_ylabel("HellaSwag")
            panels["hella"].yaxis.set_major_formatter(format_percent)
        title = "best validation loss" + (", HellaSwag" if "hella" in panels else "")
        title += "\nband: lowest to highest seed" if len(groups) < len(runs) else ""
        finish_axes(figure, list(panels.values()), cfg, title, are_many=len(groups) > 1)
    return figure


def draw_losses(axes: Any, group: Group, name: str, cfg: Config, look: dict[str, Any]):
    """Draws the training losses of a group as a line and its validation losses as points."""
    forms = {"val": "{:.3f}".format, "hella": format_percent}
    bests = {stream: [run.best(stream) for run in group if stream in run.log] for stream in forms}
    texts = [forms[stream](np.mean(values)) for stream, values in bests.items() if values]
    axes.plot([], [], **look, **POINTS, label=f"{name}: {', '.join(texts)}" if texts else name)
    if len(group) == 1 and "train" in group[0].log:
        raw = {"color": look["color"], "linestyle": "-", "linewidth": 0.7, "alpha": 0.3}
        axes.plot(*group[0].curve("train", cfg.x), **raw)
    draw_curve(axes, group, "train", cfg, look)
    draw_curve(axes, group, "val", cfg, {**look, "linestyle": ""})


def draw_curve(axes: Any, group: Group, stream: str, cfg: Config, look: dict[str, Any]):
    """Draws a stream of a group: as a mean over steps if most steps have a value, else with points; and the
    range of the group's values."""
    group = [run for run in group if stream in run.log]
    if not group:
        return
    window = max(run.window(cfg) for run in group)
    is_dense = stream == "train" or len(group[0].log[stream]) > MOST_POINTS
    x, mean, lowest, highest = average(group, stream, cfg.x, window if is_dense else 1)
    axes.plot(x, mean, **look, **({} if is_dense else POINTS))
    if len(group) > 1 and look["linestyle"]:
        axes.fill_between(x, lowest, highest, color=look["color"], alpha=0.25, linewidth=0)
    elif len(group) > 1:
        axes.vlines(x, lowest, highest, color=look["color"], linewidth=1)


def finish_losses(axes: Any, groups: list[Group], cfg: Config):
    """Adds GPT-2's loss, the title and the limits of the losses' panel. Raises ValueError for a --max-loss
    below all losses."""
    runs = [run for group in groups for run in group]
    reached = np.fmin.reduce([run.best("val") for run in runs])
    draw_references(axes, VAL_LOSS, runs, "{:.2f}".format, lowest=reached - 1)
    windows = sorted({run.window(cfg) for run in runs if "train" in run.log})
    steps = " to ".join(str(window) for window in dict.fromkeys([*windows[:1], *windows[-1:]]))
    faint = " (faint: each step)" if any(len(group) == 1 for group in groups) else ""
    mean = f", mean of {steps} steps{faint}" if windows[-1:] > [1] else ""
    axes.set_title(f"lines: training loss{mean}; points: validation loss", fontsize=9, loc="left")
    axes.set_ylabel("loss (nats per token)")
    if cfg.max_loss is not None:
        lowest, top = axes.dataLim.y0, cfg.max_loss
        if not np.isfinite(lowest):
            raise ValueError(f"--max-loss is {top}, but no loss is finite: leave it out")
        if not top > lowest:
            raise ValueError(f"--max-loss is {top}; it must be above the lowest loss, {lowest:.3f}")
        axes.set_ylim(lowest - 0.05 * (top - lowest), top)


def draw_references(axes: Any, table: dict, runs: list[Run], form: Callable, lowest: float = -np.inf):
    """Draws the grey lines for the runs' sizes, labelled with their sources, but none below `lowest`."""
    sizes = dict.fromkeys(run.size() for run in runs)
    lines = [line for size in sizes for line in table.get(size, {}).items()]
    dashes = itertools.cycle([(0, (6, 3)), (0, (1.5, 2)), (0, (6, 2, 1.5, 2))])
    for (name, value), dash in zip(lines, dashes):
        if value >= lowest:
            axes.axhline(value, color=GREY, ls=dash, lw=1.2, label=f"{name}: {form(value)}")


def finish_axes(figure: Any, panels: list, cfg: Config, title: str, are_many: bool):
    """Sets up the horizontal axes and the legends. The legend of several runs stands beside the panels, and
    the figure grows by its width."""
    labels = {"step": "step", "tokens": "tokens of training", "hours": "hours of training (no evaluation)"}
    for axes in panels:
        if cfg.log:
            axes.set_xscale("log", nonpositive="mask")
        axes.set_xlabel(labels[cfg.x])
        axes.xaxis.set_major_formatter(format_short)
    for axes in panels[are_many:]:
        if axes.get_legend_handles_labels()[0]:
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
    if len(runs) > 1:
        print(format_table(group_runs(runs, cfg)))
    if cfg.text:
        width = max(10, shutil.get_terminal_size().columns - 40)
        for run, name in zip(runs, name_groups([[run] for run in runs])):
            print(draw_text(run, name, width))
        if not cfg.out:
            return None
    import matplotlib

    figure = draw(runs, cfg)
    with matplotlib.rc_context(style(cfg.theme)):
        files.write_atomically(out, lambda f: figure.savefig(f, format=out.suffix[1:].lower()))
    print(out)
    return out


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(Config, __doc__)))
