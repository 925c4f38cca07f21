"""A run's log.txt: one line per fact, `<step> <stream> <value>`.

for step, stream, value, line in run_log.read(path): ...
"""

import re
from collections.abc import Iterator
from pathlib import Path

LINE = re.compile(r"(\d{1,15}) (\w+) (-?(?:\d+(?:\.\d+)?(?:e[+-]?\d+)?|inf|nan))", re.ASCII)


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
