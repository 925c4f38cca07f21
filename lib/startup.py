"""Ctrl-C while a script still imports torch: exit code 130 and a line, as later. Scripts import this first.

It does nothing unless the running program is a script beside lib/, so a notebook keeps its own Ctrl-C.
"""

import os
import sys
from pathlib import Path
from typing import Any

MAIN = Path(getattr(sys.modules["__main__"], "__file__", None) or "")


def end(kind: type[BaseException], error: BaseException, traceback: Any):
    """Ends the process after Ctrl-C; prints the traceback of any other error."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    print(f"\n{MAIN.name}: interrupted", file=sys.stderr, flush=True)
    os._exit(130)


if MAIN.resolve().parent == Path(__file__).resolve().parent.parent:
    sys.excepthook = end
