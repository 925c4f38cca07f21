"""Ctrl-C, or a package that is missing, while a script still imports: a line. Scripts import this first.

It does nothing unless the running program is a script beside lib/, so a notebook keeps its own Ctrl-C.
"""

import os
import sys
from pathlib import Path
from typing import Any

REQUIRED = ("torch", "numpy", "tyro", "tqdm", "tiktoken", "requests", "safetensors", "matplotlib")
MAIN = Path(getattr(sys.modules["__main__"], "__file__", None) or "")


def end(kind: type[BaseException], error: BaseException, traceback: Any):
    """Ends the process after Ctrl-C with 130, without a required package with 2; prints the traceback of any
    other error."""
    if isinstance(error, ModuleNotFoundError) and error.name in REQUIRED:
        how = "activate the environment (. .venv/bin/activate), or: pip install -r requirements.txt"
        print(f"{MAIN.name}: this Python has no {error.name}: {how}", file=sys.stderr)
        os._exit(2)
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    print(f"\n{MAIN.name}: interrupted", file=sys.stderr, flush=True)
    os._exit(130)


if MAIN.resolve().parent == Path(__file__).resolve().parent.parent:
    sys.excepthook = end
