"""The variables that torchrun, SLURM, Kubernetes and users set. A wrong value is refused by its name.

    group = read_group()                     # of torchrun or SLURM, None for a single process
    rank, world_size = read_share()          # of fineweb.py's work; also of a SLURM array or a Job
    report_to_torchrun("bad input")          # which prints it last
    seconds = read_number("DOWNLOAD_PATIENCE", 600)

An empty variable counts as missing.
"""

import contextlib
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun's variable


@dataclass(frozen=True)
class Group:
    """This process's place among those that train together, and where they meet."""

    rank: int
    world_size: int
    local_rank: int  # on this machine
    address: str
    port: int


def read_number(name: str, default: int | None = None, at_least: int = 0, at_most: int = 2**31) -> int:
    """A whole number. Raises ValueError if it is none, out of bounds, or missing without a default."""
    text = os.environ.get(name, "")
    if not text and default is not None:
        return default
    if not re.fullmatch(r"\s*[0-9]{1,10}\s*", text) or not at_least <= int(text) <= at_most:
        bounds = f"at least {at_least}" if at_most == 2**31 else f"{at_least} to {at_most}"
        raise ValueError(f"the variable {name} is {text!r}; it must be a whole number, {bounds}")
    return int(text)


def read_rank(name: str, count: str) -> tuple[int, int]:
    """A rank and the number of ranks. Raises ValueError for a rank beyond the last."""
    rank, world_size = read_number(name), read_number(count, at_least=1)
    if rank >= world_size:
        raise ValueError(f"the variable {name} is {rank}; {count} is {world_size}: it must be smaller")
    return rank, world_size


def read_group() -> Group | None:
    """The place that torchrun or SLURM (train.sbatch) gave this process; None without them. Raises ValueError
    if only some of the variables are there."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    if "RANK" in missing and os.environ.get("WORLD_SIZE", "") in ("", "1"):
        return None
    if missing:
        there = ", ".join(name for name in names if name not in missing)
        raise ValueError(
            f"{there} in the environment, but not {', '.join(missing)}: start with torchrun, which sets all; "
            f"for a single process: unset {there.replace(',', '')}"
        )
    rank, world_size = read_rank("RANK", "WORLD_SIZE")
    # torchrun names this machine as its address; the name may not resolve.
    is_one_machine = world_size in (1, read_number("LOCAL_WORLD_SIZE", 0))
    address = "127.0.0.1" if is_one_machine else os.environ["MASTER_ADDR"]
    port = read_number("MASTER_PORT", at_least=1, at_most=65535)
    return Group(rank, world_size, read_number("LOCAL_RANK", 0), address, port)


def is_local_main() -> bool:
    """Whether this process prints for those of its group on this machine; one without a group does."""
    in_group = os.environ.get("RANK") and os.environ.get("WORLD_SIZE")
    return not in_group or os.environ.get("LOCAL_RANK", "") in ("", "0")


def read_share() -> tuple[int, int]:
    """This process's rank and their number, of a SLURM array, of an indexed Job of Kubernetes, of torchrun or
    set by hand; (0, 1) without. Kubernetes says a Job's index, but not the number of its completions."""
    env = os.environ
    if env.get("SLURM_ARRAY_TASK_ID") and not env.get("RANK"):
        first = read_number("SLURM_ARRAY_TASK_MIN", 0)
        step = read_number("SLURM_ARRAY_TASK_STEP", 1, at_least=1)
        count = read_number("SLURM_ARRAY_TASK_COUNT", at_least=1)
        rank = (read_number("SLURM_ARRAY_TASK_ID") - first) // step
        if not 0 <= rank < count:
            raise ValueError(f"the SLURM array has {count} tasks; this is number {rank}: give it 0 to n - 1")
        return rank, count
    if env.get("JOB_COMPLETION_INDEX") and not env.get("RANK"):
        if not env.get("WORLD_SIZE"):
            raise ValueError(
                f"JOB_COMPLETION_INDEX is {env['JOB_COMPLETION_INDEX']}, but there is no WORLD_SIZE: "
                "set it to the Job's completions (docs/scaling.md)"
            )
        return read_rank("JOB_COMPLETION_INDEX", "WORLD_SIZE")
    if not env.get("RANK") and env.get("WORLD_SIZE", "") in ("", "1"):
        return 0, 1
    return read_rank("RANK", "WORLD_SIZE")


def report_to_torchrun(reason: str):
    """Writes why this process ends where torchrun looks for it. torchrun prints it last."""
    if path := os.environ.get(ERROR_FILE):
        extra = {"py_callstack": reason, "timestamp": str(int(time.time()))}
        content = {"message": {"message": reason, "extraInfo": extra}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(content), encoding="utf-8")
