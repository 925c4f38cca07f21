"""A run's log.txt: one line per fact, `<step> <stream> <value>`; and what its streams mean.

    for step, stream, value, line in run_log.read(path): ...
    run_log.describe_figure("val", 3.25)                        # "validation loss 3.2500"

A step writes its evaluations, then its checkpoint, then `train` and the other streams of the training step.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Stream(NamedTuple):
    """How the console, the pictures and the trackers show a stream."""

    label: str
    form: str  # for format()
    curve: str  # its name in a tracker
    is_evaluation: bool = False


# A stream without a line here is an evaluation that has its own name everywhere.
STREAMS = {
    "train": Stream("training loss", ".4f", "train/loss"),
    "val": Stream("validation loss", ".4f", "val/loss", is_evaluation=True),
    "hella": Stream("HellaSwag acc_norm", ".2%", "hellaswag/acc_norm", is_evaluation=True),
    "lr": Stream("learning rate", ".2e", "train/lr"),
    "norm": Stream("gradient norm before clipping", ".3f", "train/norm"),
    "toks": Stream("tokens per second of training", ",.0f", "train/tokens_per_second"),
    "skip": Stream("steps that did not change the weights", ".0f", "train/skipped"),
    "spike": Stream("standard deviations of a spike", ".1f", "train/spike"),
}

LINE = re.compile(r"(\d{1,15}) ([\w.-]+) (-?(?:\d+(?:\.\d+)?(?:e[+-]?\d+)?|inf|nan))", re.ASCII)


def find_stream(name: str) -> Stream:
    """How to show a stream, known or not."""
    return STREAMS.get(name) or Stream(name, ".4g", name, is_evaluation=True)


def format_value(stream: str, value: float | None) -> str:
    """A value in its stream's form. None, as JSON has it, is nan."""
    value = math.nan if value is None else value
    return format(value, find_stream(stream).form) if math.isfinite(value) else f"is not finite ({value})"


def describe_figure(stream: str, value: float | None) -> str:
    return f"{find_stream(stream).label} {format_value(stream, value)}"


def read(path: Path) -> Iterator[tuple[int, str, float, str]]:
    """Yields the facts and their lines. A killed run leaves its last line without an end: it is left out.
    Raises ValueError, with file and line, for any other line."""
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        match = LINE.fullmatch(line)
        if not match and line.strip():
            reason = f"{line[:60]!r} is not `<step> <stream> <value>`; correct or remove the line"
            raise ValueError(f"{path}, line {number}: {reason}")
        if match:
            yield int(match[1]), match[2], float(match[3]), line
