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
import math
import os
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

C = TypeVar("C")
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
    flags = tyro.cli(dataclasses.make_dataclass("Flags", fields), args=argv, description=description)
    return config(**vars(flags))


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
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def run(main: Callable[[], Any], interrupted: str = "", outlives_console: bool = False):
    """Calls a script's main. Bad input ends it with exit code 2 and the reason (of several processes on a
    machine, the first says it), Ctrl-C with 130 and the line `interrupted`, a closed pipe with 0."""
    script = Path(sys.argv[0]).name
    try:
        main()
    except KeyboardInterrupt:
        print(f"\n{script}: {interrupted}" if interrupted else "", file=sys.stderr)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(130)  # without waiting for threads: a download may be under way
    except BrokenPipeError as error:  # the reader, say `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if outlives_console:
            print(f"{script}: {error}", file=sys.stderr)
            sys.exit(2)
    except (ValueError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            rank = os.environ.get("RANK", "0")
            print(f"{script}{f' (rank {rank})' if rank != '0' else ''}: {error}", file=sys.stderr)
        sys.exit(2)
