"""The terminal of a conversation: lines with an editor and a history, and colours for probabilities.

    for line in read_lines():                    # until Ctrl-D or the end of a pipe; Ctrl-C discards a line
        print(colour("word", probability=0.3) if has_colours() else "word")

On disk: ~/.cache/gpt2_generate_history (or under XDG_CACHE_HOME), which only its owner can read.
"""

import atexit
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Probabilities below the first number have the second as their colour, of a terminal's 256.
SHADES = ((0.01, 196), (0.05, 208), (0.2, 220), (0.5, 112), (2.0, 34))


def has_colours() -> bool:
    """Whether standard output is a terminal with colours, and the user allows them (no-color.org)."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


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
    if is_typed:
        keep_history()
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8")  # like every file, whatever the terminal's encoding is
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


def keep_history():
    """Enables line editing, with a history that the next conversation finds again."""
    try:
        import readline
    except ImportError:  # Windows, whose console has both
        return
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2_generate_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        if path.stat().st_size:  # macOS's editline refuses an empty file
            readline.read_history_file(path)
    except OSError as error:
        print(f"the history is not kept: {error}", file=sys.stderr)
        return
    readline.set_history_length(1000)
    atexit.register(readline.write_history_file, path)
