"""What all scripts' command lines share: a setting in one line, --help, bounds, refusals, Ctrl-C.

    @dataclass(frozen=True)
    class Config:
        # items                    (a comment between the fields is a heading of --help)
        limit: int = cli.knob(0, "score only so many first items; 0 for all", at_least=0)

    def main(cfg: Config): ...

    if __name__ == "__main__":
        cli.run(lambda: main(cli.parse(Config, __doc__)))

Exit codes: 0 done, 2 bad input (the reason is on standard error), 130 Ctrl-C.
"""

import contextlib
import dataclasses
import difflib
import errno
import inspect
import io
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from lib import console, disk
from lib.environment import ERROR_FILE, is_local_main, report_to_torchrun

C = TypeVar("C")
PathName = Annotated[str, "a path: ~ is expanded"]
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]  # a flag without its --no-
AutoSwitch = Annotated[bool | None, "on by --name, off by --no-name"]  # None: the script decides
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# What users of nanoGPT, llm.c, torchrun and transformers type, and what to write. Of several flags, a message
# names those that its script has.
NAMES_HERE = {
    "batch": "--batch-size", "bs": "--batch-size", "per-device-train-batch-size": "--batch-size",
    "block-size": "--seq-len", "context": "--seq-len", "context-length": "--seq-len",
    "max-length": "--seq-len | --max-tokens", "max-seq-length": "--seq-len",
    "bf16": "--dtype bfloat16", "fp16": "--dtype float16", "precision": "--dtype",
    "cpu": "--device cpu", "cuda": "--device cuda", "gpu": "--device cuda:0", "gpu-id": "--device cuda:0",
    "gpus": "--num-gpus", "n-gpus": "--num-gpus", "nproc-per-node": "--num-gpus",
    "data": "--dataset-path | --source", "dataset": "--dataset-path data/NAME | --source | --data",
    "data-dir": "--dataset-path | --source", "train-file": "--source", "num-proc": "--workers",
    "input": "--source | --data | --prompt-file", "start": "--prompt", "text": "--prompt | --data",
    "epochs": "--max-steps (--dry-run shows a run's epochs)", "max-iters": "--max-steps",
    "num-epochs": "--max-steps (--dry-run shows a run's epochs)", "steps": "--max-steps",
    "num-train-epochs": "--max-steps (--dry-run shows a run's epochs)", "lr-decay-iters": "--max-steps",
    "warmup": "--warmup-steps", "warmup-iters": "--warmup-steps", "lr-scheduler-type": "--schedule",
    "min-lr": "--min-lr-ratio, a share of the peak", "decay-lr": "--min-lr-ratio 1 for a constant rate",
    "gradient-accumulation-steps": "--total-batch-tokens", "total-batch-size": "--total-batch-tokens",
    "gradient-checkpointing": "--activation-checkpointing", "max-grad-norm": "--grad-clip",
    "eval-interval": "--val-every", "eval-steps": "--val-every", "eval-iters": "--val-tokens",
    "save-steps": "--checkpoint-every", "save-every": "--checkpoint-every",
    "always-save-checkpoint": "--checkpoint-every", "save-total-limit": "--keep-last",
    "resume-from-checkpoint": "--resume", "out-dir": "--run-name", "output-dir": "--run-name | --out-dir",
    "report-to": "--tracker", "wandb": "--tracker wandb", "wandb-log": "--tracker wandb",
    "model": "--model-size | --init-from", "model-name-or-path": "--init-from | --model",
    "length": "--max-tokens", "max-new-tokens": "--max-tokens", "num-return-sequences": "--num-samples",
    "output": "--json | --out", "log-interval": "--print-every", "logging-steps": "--print-every",
}  # fmt: skip


def knob(
    default: Any,
    help: str,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    resume: str = "fixed",
    alias: str = "",
    alone: str = "",
) -> Any:
    """A dataclass field: default, help, bounds, and whether a resumed run may change it (train_gpt2.py).
    Pass dataclasses.MISSING as the default of a flag that must be given. alias: a second flag; alone: the
    value if the flag is given without one."""
    bounds = {"above": above, "at_least": at_least, "at_most": at_most}
    facts = {"help": help, "bounds": bounds, "resume": resume, "alias": alias, "alone": alone}
    return dataclasses.field(default=default, metadata=facts)


def flag(name: str) -> str:
    """Returns the flag that sets a field."""
    return "--" + name.replace("_", "-")


def parse(
    config: type[C],
    description: str | None,
    argv: Sequence[str] | None = None,
    default: C | None = None,
    presets: Mapping[str, C] | None = None,
    most_used: Sequence[str] = (),
) -> C:
    """Parses argv (by default this process's) into a `config`. A missing flag has the value of `default`, or
    of the preset that is the first word (else of the first preset).

    description: a module's docstring; most_used: the fields that --help shows first. Raises ValueError for an
    unknown word; exits with code 2 for a value of the wrong type, and with code 0 after --help.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if presets:
        preset = argv.pop(0) if argv and argv[0] in presets else next(iter(presets))
        default = default or presets[preset]
    if {"-h", "--help"} & set(argv):
        print(format_help(config, description or "", default, list(presets or ()), most_used))
        sys.exit(0)
    hints, fields = typing.get_type_hints(config, include_extras=True), []
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        facts = field.metadata
        for i, word in enumerate(argv if facts["alone"] else ()):
            if word == flag(field.name) and (i + 1 == len(argv) or argv[i + 1].startswith("-")):
                argv.insert(i + 1, facts["alone"])
        if hints[field.name] == AutoSwitch:
            on, off = flag(field.name), flag(f"no_{field.name}")
            values = {on: [on, "True"], off: [on, "False"]}
            argv = [part for word in argv for part in values.get(word.replace("_", "-"), [word])]
        names = tyro.conf.arg(help=facts["help"], aliases=[facts["alias"]] if facts["alias"] else None)
        value = getattr(default, field.name) if default else field.default
        fields.append((field.name, Annotated[hints[field.name], names], dataclasses.field(default=value)))
    kind = dataclasses.make_dataclass("Flags", fields)
    said = io.StringIO() if ERROR_FILE in os.environ else sys.stderr
    try:
        with contextlib.redirect_stderr(said):
            flags, unknown = tyro.cli(kind, args=argv, return_unknown_args=True)
    except SystemExit as end:
        if end.code and isinstance(said, io.StringIO):  # under torchrun: `run` says it, once
            raise ValueError(said.getvalue().strip()) from None
        raise
    if unknown:
        raise ValueError(explain_unknown(unknown[0], hints, list(presets or ())))
    values = vars(flags)
    for name, hint in hints.items():
        if hint == PathName:
            # A shell leaves --log-dir=~/x as it is. pathlib would change hf://org/name.
            values[name] = os.path.expanduser(values[name])  # noqa: PTH111
    return config(**values)


# -----------------------------------------------------------------------------
# wrong words


def suggest(word: str, names: Iterable[str | Path] | dict[str, str]) -> str:
    """Returns "; did you mean ...?" with the nearest of the names, at most three; "" if none is near. Of a
    path, the last part is compared. A dictionary has the words to show as its values."""
    by_name: dict[Any, Any] = {(n.name if isinstance(n, Path) else n).lower(): n for n in names}
    if isinstance(names, dict):
        by_name |= names
    near = dict.fromkeys(by_name[name] for name in difflib.get_close_matches(word.lower(), by_name))
    shown = [format_path(name) if isinstance(name, Path) else name for name in near]
    return f"; did you mean {' or '.join(shown)}?" if shown else ""


def explain_unknown(word: str, fields: Iterable[str], presets: Sequence[str]) -> str:
    """Says what to write in place of a word of the command line that no flag takes."""
    typed, flags = word.partition("=")[0], [flag(name) for name in fields]
    if word in presets:
        return f"the preset {word} must be the first word, before all flags"
    if word.lower() in ("true", "false", "0", "1", "yes", "no"):
        return f"--NAME turns a switch on and --no-NAME off; no switch takes a value, as {word!r} would be"
    if not word.startswith("-"):
        what = f"is no preset; there are {', '.join(presets)}" if presets else "belongs to no flag"
        return f"{word!r} {what}" + (suggest(word, presets) or "; --help lists the flags")
    if typed in ("--preset", "--config") and presets:
        script = Path(sys.argv[0]).name
        return f"there is no flag {typed}; the preset is the first word: {script} {presets[0]}"
    there = NAMES_HERE.get(typed.strip("-").replace("_", "-").lower(), "").split(" | ")
    if here := [advice for advice in there if re.split("[ ,]", advice)[0] in flags]:
        return f"there is no flag {typed}; write {' or '.join(here)}"
    return f"there is no flag {typed}" + (suggest(typed, flags) or "; --help lists the flags")


# -----------------------------------------------------------------------------
# --help


def format_help(
    config: type, description: str, default: Any, presets: Sequence[str], most_used: Sequence[str]
) -> str:
    """The text of --help, as wide as the terminal: the docstring's first sentence, the flags, the rest of the
    docstring, and at the end its first indented paragraph, which has the commands."""
    width = max(60, min(120, shutil.get_terminal_size().columns))
    first, *rest = description.strip().split("\n\n")
    commands = [part for part in rest if part.startswith(" ")][:1]
    notes = [part for part in rest if part not in commands]
    hints = typing.get_type_hints(config, include_extras=True)
    flags = {f.name: describe_flag(f, hints[f.name], default) for f in dataclasses.fields(config)}
    groups = {"Most used": list(most_used)} if most_used else {}
    for name, heading in read_headings(config).items():
        groups.setdefault(heading, []).extend([name] if name not in most_used else [])
    column = max(len(left) for left, _ in flags.values()) + 4
    words = [f"[{'|'.join(presets)}]"] if presets else []
    usage = " ".join(["usage: python", Path(sys.argv[0]).name, *words, "[--flag VALUE ...]"])
    parts = [usage, wrap(first, width)]
    for heading, names in groups.items():
        rows = [wrap(f"  {flags[name][0]:{column - 4}}  {flags[name][1]}", width, column) for name in names]
        parts += ["\n".join([console.emphasize(heading), *rows])] if rows else []
    parts += [wrap(note, width) for note in notes]
    parts += [f"{console.emphasize('Examples')}\n{wrap(part, width)}" for part in commands]
    return "\n\n".join(parts)


def read_headings(config: type) -> dict[str, str]:
    """For each field, the comment on a line of its own that is nearest above it; "Flags" if there is none."""
    headings, heading = {}, "Flags"
    for line in inspect.getsource(config).splitlines():
        if match := re.fullmatch(r"    # (.*)", line):
            heading = match[1][0].upper() + match[1][1:]
        elif match := re.match(r"    (\w+): .* = ", line):
            headings[match[1]] = heading
    return headings


def flatten(hint: Any) -> list[Any]:
    """The types and literal values in a type hint."""
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    inside = typing.get_args(hint)[: 1 if typing.get_origin(hint) is Annotated else None]
    return [part for arg in inside for part in flatten(arg)] if inside else [hint]


def describe_flag(field: dataclasses.Field, hint: Any, default: Any) -> tuple[str, str]:
    """A flag with its kind of value, and its help with choices and default."""
    parts, value = flatten(hint), getattr(default, field.name) if default else field.default
    choices = [part for part in parts if isinstance(part, str)]
    kinds = {int: "INT", float: "NUMBER", str: "PATH" if hint == PathName else "TEXT"}
    kind = next((kinds[part] for part in parts if part in kinds), "NAME")
    names, notes = ", ".join(filter(None, [flag(field.name), field.metadata["alias"]])), []
    if bool in parts:
        names, kind = names if hint == Switch else names.replace("--", "--[no-]"), ""
    elif tyro.conf.Positional in typing.get_args(hint):
        names, kind = field.name.upper(), ""
    elif kind == "NAME":
        notes.append(" or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]])))
    elif choices or field.metadata["alone"]:
        kind = f"[{kind}]" if field.metadata["alone"] else "|".join([kind, *choices])
    if typing.get_origin(hint) is tuple:
        kind += " ..."
    if value is dataclasses.MISSING:
        notes.append("required")
    elif value not in (None, "", ()) and hint != Switch:
        text = {True: "on", False: "off"}[value] if bool in parts else value
        text = f"{text:.10g}" if isinstance(text, float) else repr(text) if " " in str(text) else text
        notes.append(f"default {text}")
    return f"{names} {kind}".rstrip(), field.metadata["help"] + (f" ({'; '.join(notes)})" if notes else "")


def wrap(text: str, width: int, column: int = 0) -> str:
    """Fits a paragraph into a width. Prose is filled. In an indented line, two spaces begin a second column
    (at `column`, if given). It stays aligned, or gets its own lines if it begins in the right half."""
    if max(map(len, text.splitlines()), default=0) <= width:
        return text
    lines = []
    for line in re.sub(r"\n( {8,}|(?=\S))", " ", text).splitlines():
        indent = (len(line) - len(line.lstrip())) + 4 * line.startswith(" ")
        gap = re.search(r"(?<=\S)  +(?=\S)", line)
        at = column or (gap.end() if gap else indent)
        if gap and at > width / 2 and len(line) > width:
            lines.append(line[: gap.start()])
            line, at = " " * indent + line[gap.end() :], indent
        lines += textwrap.wrap(line, width, subsequent_indent=" " * at, break_on_hyphens=False)
    return "\n".join(lines)


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
        if isinstance(error, OSError) and isinstance(error.filename, str):
            reason += disk.explain(error, Path(error.filename))
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
