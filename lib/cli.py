"""What all scripts' command lines share: a setting in one line, bounds, refusals, Ctrl-C.

    @dataclass(frozen=True)
    class Config:
        limit: int = cli.knob(0, "Score only the first so many items; 0 for all.", at_least=0)

    def main(cfg: Config): ...

    if __name__ == "__main__":
        cli.run(lambda: main(cli.parse(Config, __doc__)))

Exit codes: 0 done, 2 bad input (the reason is on standard error), 130 Ctrl-C.
"""

import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from lib import console
from lib.environment import is_local_main

C = TypeVar("C")
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
PathName = Annotated[str, "a path: ~ is expanded"]
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]  # a flag without its --no-


def knob(
    default: Any,
    help: str,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    resume: str = "fixed",
) -> Any:
    """A dataclass field: default, help, bounds, and whether a resumed run may change it (train_gpt2.py).
    Pass dataclasses.MISSING as the default of a flag that must be given."""
    bounds = {"above": above, "at_least": at_least, "at_most": at_most}
    return dataclasses.field(default=default, metadata={"help": help, "bounds": bounds, "resume": resume})


def flag(name: str) -> str:
    """Returns the flag that sets a field."""
    return "--" + name.replace("_", "-")


def parse(
    config: type[C], description: str | None, argv: Sequence[str] | None = None, default: C | None = None
) -> C:
    """Parses argv (by default this process's) into a `config`; a missing flag has `default`'s value. Exits
    with code 2 for an unknown flag or a value of the wrong type, and with code 0 for --help."""
    hints, fields = typing.get_type_hints(config, include_extras=True), []
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        kind = Annotated[hints[field.name], tyro.conf.arg(help=field.metadata["help"])]
        value = getattr(default, field.name) if default else field.default
        fields.append((field.name, kind, dataclasses.field(default=value)))
    kind = dataclasses.make_dataclass("Flags", fields)
    said = io.StringIO() if ERROR_FILE in os.environ else sys.stderr
    try:
        with contextlib.redirect_stderr(said):
            flags = tyro.cli(kind, args=argv, description=description)
    except SystemExit as end:
        if end.code and isinstance(said, io.StringIO):  # under torchrun: `run` says it, once
            raise ValueError(said.getvalue().strip()) from None
        raise
    values = vars(flags)
    for name, hint in hints.items():
        if hint == PathName:
            # A shell leaves --log-dir=~/x as it is. pathlib would change hf://org/name.
            values[name] = os.path.expanduser(values[name])  # noqa: PTH111
    return config(**values)


def check_bounds(cfg: Any):
    """Raises ValueError for the first number outside its field's bounds, with the flag, value and bound."""
    for field in dataclasses.fields(cfg):
        value, bounds = getattr(cfg, field.name), field.metadata["bounds"]
        above, least, most = bounds["above"], bounds["at_least"], bounds["at_most"]
        if isinstance(value, str) or value is None:
            continue
        wanted = ""
        if above is not None and not above < value < math.inf:
            wanted = f"a number above {above:g}"
        elif least is not None and most is not None and not least <= value <= most:
            wanted = f"between {least:g} and {most:g}"
        elif least is not None and not least <= value < math.inf:
            wanted = f"at least {least:g}"
        if wanted:
            raise ValueError(f"{flag(field.name)} is {value}; it must be {wanted}")


def format_path(path: str | Path) -> str:
    """Returns the path as one would type it here."""
    path = Path(path).absolute()
    text = str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    return f".{os.sep}{text}" if text[0] in "-~" else text


def format_command(*words: str | Path) -> str:
    """Returns words, quoted, to be pasted into a shell here. A path is written as one would type it here; a
    script (.py) follows the name of this Python."""
    texts = [format_path(word) if isinstance(word, Path) else word for word in words]
    if texts[0].endswith(".py"):
        found = shutil.which("python")
        is_this = found and Path(found).parent == Path(sys.executable).parent
        texts.insert(0, "python" if is_this else format_path(sys.executable))
    if os.name == "nt":
        return subprocess.list2cmdline(texts)
    quoted = [shlex.quote(text) for text in texts]
    # Double quotes are easier to read if the text has an apostrophe, and if they suffice.
    return " ".join(q if q == t or set(t) & set('"$`\\!') else f'"{t}"' for q, t in zip(quoted, texts))


def run(main: Callable[[], Any], interrupted: str = "interrupted", outlives_console: bool = False):
    """Calls a script's main. Bad input ends it with exit code 2 and the reason (of several processes on a
    machine, the first says it), Ctrl-C with 130 and the line `interrupted`.

    outlives_console: the script's work is on disk, so it goes on if standard output is lost. Otherwise it
    ends there: with 0 if the reader of a pipe, say `head`, has enough, else with 2.
    """
    script = Path(sys.argv[0]).name
    console.protect(outlives_console)
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        if is_local_main():
            print(f"\n{script}: {interrupted}", file=sys.stderr, flush=True)
        os._exit(130)  # without waiting for threads: a download may be under way
    except (ValueError, OSError) as error:
        if isinstance(error, console.ConsoleError) and error.errno in (errno.EPIPE, errno.EINVAL):
            return  # EINVAL: Windows
        rank, reason = os.environ.get("RANK", "0"), str(error)
        if len(reason) > 2000:  # a message of a library may hold a file's content
            reason = f"{reason[:1500]} ... {reason[-400:]}"
        reason = f"{script}{f' (rank {rank})' if rank != '0' else ''}: {reason}"
        if is_local_main():
            print(reason, file=sys.stderr)
        report_to_torchrun(reason)
        sys.exit(2)
    except SystemExit as end:
        if end.code:
            report_to_torchrun(f"{script}: exit code {end.code}; the reason is above")
        raise


def report_to_torchrun(reason: str):
    """Writes why this process ends where torchrun looks for it. torchrun prints it last."""
    if path := os.environ.get(ERROR_FILE):
        extra = {"py_callstack": reason, "timestamp": str(int(time.time()))}
        content = {"message": {"message": reason, "extraInfo": extra}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(content), encoding="utf-8")
