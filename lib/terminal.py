"""The terminal of a conversation, or the pipe in its place; colours for probabilities.

    text = read_pipe() if is_piped() else None   # all of standard input
    for line in read_lines():                    # until Ctrl-D or the end of a pipe; Ctrl-C discards a line
        print(colour("word", probability=0.3))

On disk: nothing.
"""

import contextlib
import io
import os
import stat
import sys
import threading
from collections.abc import Iterator
from typing import BinaryIO

# Probabilities below the first number have the second as their colour, of a terminal's 256.
SHADES = ((0.01, 196), (0.05, 208), (0.2, 220), (0.5, 112), (2.0, 34))


def colour(text: str, probability: float) -> str:
    """Wraps the text in the escape codes of its probability's colour."""
    return f"\x1b[38;5;{next(shade for bound, shade in SHADES if probability < bound)}m{text}\x1b[0m"


def format_legend() -> str:
    """The least probability of each colour, in that colour."""
    least = [0.0, *(bound for bound, _ in SHADES[:-1])]
    return " ".join(colour(f"from {probability:.0%}", probability) for probability in least)


def read_lines() -> Iterator[str]:
    """Yields lines, typed on a terminal with line editing and a history, or piped, until the input ends."""
    is_typed = sys.stdin.isatty() and sys.stdout.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper) and not is_typed:
        sys.stdin.reconfigure(encoding="utf-8")  # like every file, whatever the terminal's encoding is
    with contextlib.suppress(ImportError):  # Windows, whose console edits lines itself
        import readline  # noqa: F401
    while True:
        try:
            yield input("> " if is_typed else "")
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if not is_typed:
                raise
            print(file=sys.stderr)


def is_piped() -> bool:
    """Whether standard input is a pipe, a socket or a file: no terminal, no null device, and not closed."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def read_pipe() -> BinaryIO:
    """Reads standard input to its end. If that takes over a second, says on standard error what it waits for:
    a script that runs without a terminal may have inherited a pipe that never ends."""
    note = "reading the prompt from standard input, to its end; to use none: --prompt TEXT, or < /dev/null"
    timer = threading.Timer(1.0, print, [note], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        with open(0, "rb", closefd=False) as stdin:
            return io.BytesIO(stdin.read())  # once: a terminal has an end per Ctrl-D
    finally:
        timer.cancel()
