"""Standard output and error that do not end the work when they fail, and lines as wide as the terminal.

    console.protect(outlive=True)      # once, before a script begins
    print("28.59 ± 0.45")              # "28.59 +- 0.45" where the encoding has no ±
    print(console.fit(["step 1/9", "loss 6.97", "4m01s left"]))     # the first fields, as many as fit
    print(console.fold("a long line"))                              # broken between words, and indented

A stream that was closed before the start becomes the null device. A write can fail because a pipe's reader or
a terminal is gone, or because a disk is full. It is said on standard error, and later output is dropped.
"""

import codecs
import contextlib
import io
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import Any

BOLD, PLAIN = "\x1b[1m", "\x1b[0m"
SPELLED = {"±": "+-", "°": " deg", **{bar: str(n) for n, bar in enumerate("▁▂▃▄▅▆▇█", 1)}}


class ConsoleError(OSError):
    """Standard output could not be written."""


class ConsoleFile(io.RawIOBase):
    """The file below standard output or error. After a write that failed it drops what it gets.

    outlive: drop it from the first failure on. Otherwise the first failure raises ConsoleError.
    """

    def __init__(self, stream: io.TextIOWrapper, outlive: bool):
        self.stream = stream  # it would close the file if it were collected
        self.raw: Any = getattr(stream.buffer, "raw", stream.buffer)  # unbuffered streams have no raw
        self.outlive, self.failed, self.name = outlive, False, stream.name

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.raw.fileno()

    def isatty(self) -> bool:
        return not self.failed and self.raw.isatty()

    def write(self, data: Any) -> int:
        if not self.failed:
            try:
                while (written := self.raw.write(data)) is None:  # not blocking, and full
                    time.sleep(0.01)
                return written
            except OSError as error:
                self.failed = True
                if not self.outlive:
                    raise ConsoleError(error.errno, f"standard output: {error.strerror}") from error
                if self.raw.fileno() == 1:
                    print(f"standard output is lost ({error.strerror}); the work goes on", file=sys.stderr)
        return len(data)


def spell(error: UnicodeError) -> tuple[str, int]:
    """Replaces characters that an encoding lacks: an error handler for `codecs`."""
    assert isinstance(error, UnicodeEncodeError)
    return "".join(SPELLED.get(c, "?") for c in error.object[error.start : error.end]), error.end


def protect(outlive: bool):
    """Replaces sys.stdout and sys.stderr by streams that survive. outlive: standard output, too, is dropped
    when it fails; otherwise it raises ConsoleError once. A stream that is not Python's own stays."""
    for number in range(3):  # so that no file that is opened later gets the number of a closed stream
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")
    codecs.register_error("spell", spell)
    sys.stdout, sys.stderr = wrap(sys.stdout, outlive), wrap(sys.stderr, True)


def wrap(stream: Any, outlive: bool) -> Any:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if type(stream) is not io.TextIOWrapper:  # a test's, or a notebook's
        return stream
    stream.flush()
    raw = ConsoleFile(stream, outlive)
    is_unbuffered = raw.raw is stream.buffer
    buffer: Any = raw if is_unbuffered else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer, stream.encoding, "spell", line_buffering=stream.line_buffering, write_through=is_unbuffered
    )


def get_width() -> int:
    """Columns of the terminal; a pipe or a file takes lines of any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


def fit(fields: Sequence[str]) -> str:
    """Joins the first fields by bars, as many as fit into a line of the terminal."""
    count = len(fields)
    while count > 1 and len(" | ".join(fields[:count])) > get_width():
        count -= 1
    return " | ".join(fields[:count])


def fold(text: str, indent: str = " " * 7) -> str:
    """Breaks lines wider than the terminal between words. Indented lines, such as commands, stay whole."""
    width, lines = get_width(), []
    for line in text.split("\n"):
        is_whole = len(line.replace(BOLD, "").replace(PLAIN, "")) <= width or line.startswith("  ")
        lines += [line] if is_whole else textwrap.wrap(
            line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )  # fmt: skip
    return "\n".join(lines)


def has_colours() -> bool:
    """Whether standard output is a terminal with colours, and the user allows them (no-color.org)."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def emphasize(text: str) -> str:
    """Bold, on a terminal with colours."""
    return f"{BOLD}{text}{PLAIN}" if has_colours() else text
