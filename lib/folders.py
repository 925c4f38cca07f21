"""What a folder is, by its content: a run, a checkpoint or another program's model. Everybody asks here.

    identify(Path("log/demo"))           # "run", "checkpoint", "model" or ""
    find_run(Path("log/demo/log.txt"))   # the run that a run's folder, log or checkpoint belongs to
    check_ownership(Path("log/demo"))    # before writing: refuses a folder that no run made

It imports no torch, because plot.py starts quickly.
"""

import json
import os
import re
from pathlib import Path

from lib import cli, files

STATE, OPTIMIZER = "state.json", "optimizer.safetensors"
STEP_NAME = re.compile(r"step_(\d{6,})")
SETTINGS = ("settings.json", "config.json")  # of a run; the second in earlier versions
SETTING = "total_batch_tokens"  # one of many that every run has
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
# What a run writes into its folder beside its settings.
WRITTEN = re.compile(
    rf"{STEP_NAME.pattern}|log\.txt|loss\.png|abandoned|tensorboard|wandb|\.(tmp_step|old_step|log\.txt).*"
)


def holds_settings(path: Path) -> bool | None:
    """Whether a JSON file holds a run's settings; None if it is missing or half-written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return isinstance(content, dict) and SETTING in content


def has_settings(folder: Path) -> bool | None:
    """Whether a folder holds a run's settings; None without a whole file of either name."""
    held = [holds_settings(folder / name) for name in SETTINGS]
    return next((answer for answer in (True, False) if answer in held), None)


def find_settings(run: Path) -> Path:
    """The file of a run's settings, which need not exist."""
    return next((path for name in SETTINGS if (path := run / name).is_file()), run / SETTINGS[0])


def list_steps(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first, not verified. Links do not count."""
    inside = run.iterdir() if run.is_dir() else ()
    found = [p for p in inside if STEP_NAME.fullmatch(p.name) and not p.is_symlink()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def identify(folder: Path) -> str:
    """Returns "checkpoint", "run", "model" (of any program), or "" for anything else. Names and places do not
    matter."""
    if (folder / STATE).is_file() or (folder / OPTIMIZER).is_file():
        return "checkpoint"
    if has_settings(folder):
        return "run"
    if any((folder / name).is_file() for name in WEIGHTS):
        return "model"
    if list_steps(folder) or (folder / "log.txt").is_file():
        return "run"
    return "model" if (folder / "config.json").is_file() else ""


def find_run(path: Path) -> Path:
    """The run of a run's folder, log.txt or checkpoint. Raises FileNotFoundError for anything else."""
    folder = path.resolve().parent if path.is_file() or identify(path) == "checkpoint" else path
    if identify(folder) != "run":
        what = f"{path} is a model" if identify(path) else f"{path / 'log.txt'} is not there"
        raise FileNotFoundError(f"{what}; give a run folder, log/<run>{suggest_folder(folder)}")
    return folder


def suggest_folder(path: Path, log_root: Path = files.LOGS) -> str:
    """A hint for an error about a missing folder: the newest checkpoints of the run that it names, or the
    runs beside it and in log_root whose names are near."""
    if identify(path.parent) == "run":
        steps = [step.name for step in list_steps(path.parent)[-10:]]
        return f"; {path.parent} has {', '.join(steps) or 'no checkpoint'}"
    return cli.suggest(path.name, [run for root in (log_root, path.parent) for run in list_runs(root)])


def list_runs(log_root: Path) -> list[Path]:
    """The runs in a folder. Folders that must not be read do not count: they are another user's."""

    def is_run(folder: Path) -> bool:
        try:
            return identify(folder) == "run"
        except PermissionError:
            return False

    try:
        return [folder for folder in log_root.iterdir() if is_run(folder)] if log_root.is_dir() else []
    except PermissionError:
        return []


def list_times(log_root: Path) -> dict[Path, float]:
    """The runs in a folder, and when each was started the last time."""
    runs = list_runs(log_root)
    # Without settings it was copied here, as from the Hub.
    files_of = {run: (find_settings(run), *list_steps(run)[-1:], run / "log.txt") for run in runs}
    return {
        run: next((p.stat().st_mtime for p in paths if p.exists()), 0.0) for run, paths in files_of.items()
    }


def newest_runs(log_root: Path = files.LOGS, what: str = "checkpoint") -> list[Path]:
    """The runs with a checkpoint, or with a "log", the one that was started last first. Raises
    FileNotFoundError if there is none."""
    times = list_times(log_root)
    has = {
        "checkpoint": list_steps,
        "log": lambda run: (log := run / "log.txt").is_file() and log.stat().st_size,
    }[what]
    times = {run: started for run, started in times.items() if has(run)}
    if not times:
        raise FileNotFoundError(f"{log_root} holds no {what}; train a model: `python train_gpt2.py demo`")
    return sorted(times, key=lambda run: times[run], reverse=True)


def newest_run(log_root: Path = files.LOGS, what: str = "checkpoint") -> Path:
    """The run that was started last; see newest_runs."""
    return newest_runs(log_root, what)[0]


def mark_newest(run: Path):
    """Makes a run the newest beside its like, although the clock may have been set back."""
    path, others = find_settings(run), list_times(run.parent)
    if path.stat().st_mtime < (youngest := max(others.values(), default=0.0)):
        os.utime(path, (youngest + 1, youngest + 1))


def check_ownership(run: Path):
    """Raises ValueError, naming what is there, if something else than a run of ours made the folder. An empty
    folder passes, and one that holds only checkpoints and logs."""
    if not run.is_dir() or (is_run := has_settings(run)):
        return
    ours = SETTINGS[1:] if is_run is None else ()  # a run of earlier days was killed while it wrote this
    shown = [p.name for p in sorted(run.iterdir()) if p.name[0] != "."]  # Finder leaves .DS_Store everywhere
    strange = [name for name in shown if not WRITTEN.fullmatch(name) and name not in ours]
    if strange:
        raise ValueError(
            f"{run} was not made by a run: it holds {', '.join(strange[:4])}. A run writes only into its own "
            "folder; to go on from a checkpoint there, copy it: log/<run>/step_<step>"
        )
