"""A run's folder: its name, its lock, its log and its checkpoints.

log/<run>/settings.json        # the settings; config.json in runs of earlier versions
log/<run>/log.txt              # one line per fact: `<step> <stream> <value>`
log/<run>/step_000100/         # checkpoints, see checkpoint.py
log/<run>/abandoned/           # checkpoints newer than the step from which the run was resumed
log/<run>/loss.png
log/.<run>.lock                # while a process uses the folder
"""

import contextlib
import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from lib import disk, files, run_log
from lib.folders import SETTINGS, STATE, check_ownership, holds_settings, list_steps, mark_newest
from lib.processes import Process
from model import GPTConfig


def build_path(log_root: Path, name: str, origin: str = "--run-name") -> Path:
    """log_root/name. Raises ValueError, naming its origin, for a name that could lead out of log_root, or has
    links in it."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        rule = "letters, digits, '.', '_' and '-', beginning with a letter"
        choose = "use" if origin == "--run-name" else "choose a --run-name of"
        raise ValueError(f"{origin} is {name!r}; {choose} {rule}")
    run = log_root / name
    if run.is_symlink():
        raise ValueError(f"{run} is a link to another place; choose that with --log-dir")
    return run


def choose_folder(cfg: Any, model_config: GPTConfig, process: Process) -> Path:
    """The run's folder, the same on all processes; with --eval-only, the model's. Raises ValueError if a new
    run's exists already, if no run made it, or if a link in it leads elsewhere."""
    if cfg.eval_only:
        return Path(cfg.init_from if cfg.resume in ("", "newest") else cfg.resume)
    size, now = f"{model_config.num_params / 1e6:.0f}M", time.strftime("%Y-%m-%d_%H-%M-%S")
    name = process.broadcast(cfg.run_name or f"gpt2-{size}_{now}")
    if cfg.resume in ("", "newest"):  # a new run
        run = build_path(Path(cfg.log_dir) if cfg.log_dir else files.LOGS, name)
    else:
        run = Path(cfg.resume).parent  # whatever its name is
    check_ownership(run)
    is_new = process.rank == 0 and not cfg.resume
    if is_new and run.exists() and any(run.iterdir()):
        raise ValueError(
            f"{run} exists: go on with it (--run-name {run.name} --resume) or choose another --run-name"
        )
    if process.rank == 0:  # before this process takes memory
        disk.check_writable(run)
        if run.exists():
            unlock(lock(run))  # raises if another process has it
    if links := [path for path in run.iterdir() if path.is_symlink()] if run.is_dir() else []:
        raise ValueError(f"{links[0]} is a link; a run writes only into its own folder: remove the link")
    return run


def lock(run: Path) -> FileLock:
    """Takes the lock on a run's folder. Raises ValueError if another process has it, or no run made it."""
    check_ownership(run)
    files.make_folder(run.parent)
    taken = FileLock(run.with_name(f".{run.name}.lock"))
    try:
        taken.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"{run} is in use by another process; choose another --run-name") from error
    except PermissionError as error:
        path = Path(taken.lock_file)
        if not path.exists():
            raise
        reason = f"{path} belongs to {disk.name_owner(path)}, whose run uses the folder or was killed"
        raise PermissionError(f"{reason}; choose another --run-name, or have the file removed") from error
    return taken


def unlock(taken: FileLock):
    """Releases a lock and removes its file."""
    with contextlib.suppress(OSError):  # Windows keeps a file that is open
        Path(taken.lock_file).unlink()
    taken.release()


def remove_leftovers(run: Path):
    """Removes what a killed process left. A checkpoint that was set aside for a successor comes back if the
    successor is missing."""
    for left in [*run.glob(".tmp_step_*"), *run.glob(".old_step_*")]:
        final = run / left.name.removeprefix(".old_")
        if left.name.startswith(".old_") and not final.exists():
            left.rename(final)
        else:
            shutil.rmtree(left, ignore_errors=True)
    for left in run.glob(".*.tmp"):  # of files.write_atomically
        left.unlink()


def move_newer(run: Path, step: int) -> list[Path]:
    """Moves checkpoints newer than the resumed step into run/abandoned; returns their new places. They are
    damaged, or of steps that are trained again."""
    moved = []
    for folder in list_steps(run):
        if int(folder.name.removeprefix("step_")) > step:
            (run / "abandoned").mkdir(exist_ok=True)
            moved.append(run / "abandoned" / folder.name)
            shutil.rmtree(moved[-1], ignore_errors=True)
            folder.rename(moved[-1])
    return moved


def prune(run: Path, keep_last: int, keep_every: int, in_use: Path | None = None):
    """Removes checkpoints. The newest `keep_last` (0: all) stay, those whose step `keep_every` divides (0:
    none), the one with the lowest validation loss, and the one in use."""
    found = list_steps(run)
    losses = {}
    for folder in found:
        with contextlib.suppress(OSError, ValueError):
            losses[folder] = json.loads((folder / STATE).read_text(encoding="utf-8")).get("val_loss")
    losses = {folder: loss for folder, loss in losses.items() if loss is not None and math.isfinite(loss)}
    best = min(losses, key=lambda folder: losses[folder]) if losses else None
    for folder in found[:-keep_last] if keep_last else []:
        step = int(folder.name.removeprefix("step_"))
        if folder not in (best, in_use) and not (keep_every and step % keep_every == 0):
            doomed = run / f".tmp_{folder.name}"  # a name that is never put back
            shutil.rmtree(doomed, ignore_errors=True)
            folder.rename(doomed)
            files.flush(run)  # before its files go: after a power cut no half of it has its name
            shutil.rmtree(doomed)


def open_log(path: Path, resumed_step: int | None) -> BinaryIO:
    """Opens a log to append to: empty for a new run, cut back to the resumed checkpoint for an old one.
    Raises ValueError, with file and line, if it is damaged before that."""
    if resumed_step is None:
        with disk.name_failure(path):
            log = open(path, "wb", buffering=0)
        files.flush(path.parent)
        return log
    if path.exists():
        facts = []
        try:
            for fact in run_log.read(path):
                facts.append(fact)
        except ValueError:  # a power cut leaves such an end, of lines after the checkpoint
            if not facts or facts[-1][0] < resumed_step - 1:
                raise
        # The resumed step's evaluations stay: they were written before the checkpoint, `train` after it.
        trained = (i for i, fact in enumerate(facts) if fact[:2] == (resumed_step, "train"))
        end = next(trained, len(facts))
        kept = [
            f"{line}\n"
            for i, (step, _, _, line) in enumerate(facts)
            if step < resumed_step or (step == resumed_step and i < end)
        ]
        files.write_atomically(path, lambda f: f.write("".join(kept).encode("utf-8")))
    with disk.name_failure(path):
        return open(path, "ab", buffering=0)


def write_settings(run: Path, settings: dict[str, Any]):
    """Writes settings.json. Removes an earlier version's config.json: Hugging Face has another file of that
    name."""
    files.write_json(run / SETTINGS[0], settings)
    if holds_settings(run / SETTINGS[1]):
        (run / SETTINGS[1]).unlink()
    mark_newest(run)


def draw_curves(run: Path, out: Path) -> str:
    """Draws a run's curves with plot.py. Returns what went wrong, "" if nothing did."""
    command = [sys.executable, str(files.ROOT / "plot.py"), str(run), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""
