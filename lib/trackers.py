"""Sends a run's curves to TensorBoard, Weights & Biases or Trackio, in addition to its log.txt.

    python train_gpt2.py --tracker tensorboard     # to look: tensorboard --logdir log
    python train_gpt2.py --tracker wandb           # after `wandb login`; or with WANDB_MODE=offline
    python train_gpt2.py --tracker trackio         # to look: trackio show --project gpt2

On disk: log/<run>/tensorboard, log/<run>/wandb, or Trackio's own folder (TRACKIO_DIR).

Each tool is a package of its own, which only its own class imports. Curves have the same names in all tools,
against the step; wandb and Trackio also know the tokens seen before it. The project is gpt2, for wandb
WANDB_PROJECT if that is set. The tools' own environment variables (WANDB_ENTITY, ...) work as usual.

A resumed run continues its curves, and first sends what the tool lacks of its log. It repeats the steps after
its checkpoint: TensorBoard replaces their old values, wandb keeps the old values, Trackio shows both.
"""

import contextlib
import importlib.util
import itertools
import os
import re
from pathlib import Path
from typing import Any, Literal

from lib import run_log

Name = Literal["none", "tensorboard", "wandb", "trackio"]

PROJECT = "gpt2"
FINISH_SECONDS = 20  # a run that must stop has little time to wait for a network


def check_package(name: Name):
    """Raises ValueError if the tracker's package is missing."""
    spec = importlib.util.find_spec(name) if name != "none" else None
    if name != "none" and (spec is None or spec.origin is None):  # no origin: only a folder of that name
        raise ValueError(f"--tracker {name} needs a package that is not installed: pip install {name}")


def check_login(name: Name):
    """Raises ValueError if the tracker needs a login that fails."""
    if name == "wandb":
        import wandb

        try:
            if wandb.setup().settings.mode == "online":
                wandb.login()
        except wandb.Error as error:
            advice = "`wandb login`, or WANDB_MODE=offline and later `wandb sync`"
            raise ValueError(f"--tracker wandb: {error} ({advice})") from error


class TensorBoard:
    """Writes events into the run's folder, against the step: TensorBoard has no other x."""

    def __init__(self, run: Path, run_id: str, settings: dict[str, Any], first_step: int, is_new: bool):
        from torch.utils.tensorboard.summary import hparams
        from torch.utils.tensorboard.writer import SummaryWriter

        self.where = run / "tensorboard"
        self.first_missing = first_step if self.where.exists() else 0
        self.writer = SummaryWriter(str(self.where), purge_step=first_step)
        plain = {key: "" if value is None else value for key, value in settings.items()}
        for summary in hparams(plain, {"train/loss": 0, "val/loss": 0}):
            self.writer._get_file_writer().add_summary(summary)

    def write(self, step: int, tokens: int, values: dict[str, float]):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, exit_code: int):
        self.writer.close()


class Wandb:
    """Sends to a run whose id stays the same when training resumes. Without a network wandb itself retries,
    and keeps a copy of everything in the run's folder. Offline, each start makes a folder with the whole
    curves: `wandb sync` the newest."""

    def __init__(self, run: Path, run_id: str, settings: dict[str, Any], first_step: int, is_new: bool):
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run_id,
            resume="allow",
            dir=str(run),
            config=settings,
            allow_val_change=True,
            settings=wandb.Settings(finish_timeout=FINISH_SECONDS),
        )
        self.where = Path(self.run.dir).parent
        self.first_missing = self.run.starting_step
        if self.first_missing > first_step:
            steps = f"{first_step} to {self.first_missing - 1}"
            print(f"note   wandb keeps its values of steps {steps}", flush=True)

    def write(self, step: int, tokens: int, values: dict[str, float]):
        if step >= self.run.starting_step:
            self.run.log({**values, "tokens": tokens}, step=step)

    def close(self, exit_code: int):
        self.run.finish(exit_code)


class Trackio:
    """Sends to a run of the same name. Trackio itself reports, once, what it could not send."""

    def __init__(self, run: Path, run_id: str, settings: dict[str, Any], first_step: int, is_new: bool):
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        resume = "never" if is_new else "allow"
        self.run = trackio.init(PROJECT, run.name, config=settings, resume=resume, embed=False)
        # A killed run may not have written all values of its last step.
        self.first_missing = max(0, min(first_step, self.run._next_step - 1))
        self.where = SQLiteStorage.get_project_db_path(PROJECT)

    def write(self, step: int, tokens: int, values: dict[str, float]):
        self.run.log({**values, "tokens": tokens}, step=step)

    def close(self, exit_code: int):
        import trackio

        trackio.finish()


def hide_secrets(error: Exception) -> str:
    """The error's message, without the values of tokens and keys in the addresses that it quotes."""
    return re.sub(r"((?:token|key)=)[^&\s'\"]+", r"\1...", str(error))


class Tracker(contextlib.AbstractContextManager):
    """One of these tools. Its failures do not stop training.

    run: the folder, whose log.txt is cut back to resumed_step, the step of the checkpoint from which the run
    resumes (None: a new run). run_id stays the same when it resumes. settings are sent as hyperparameters.

    Raises ValueError if a new run cannot be tracked. A resumed run prints the reason and continues without.
    """

    def __init__(
        self, name: Name, run: Path, run_id: str, settings: dict[str, Any], resumed_step: int | None
    ):
        self.name, self.tokens_per_step = name, settings["total_batch_tokens"]
        self.tool: TensorBoard | Wandb | Trackio | None = None
        tools = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
        try:
            tool = self.tool = tools[name](run, run_id, settings, resumed_step or 0, resumed_step is None)
        except Exception as error:  # whatever a network or a library raises
            if resumed_step is None:
                raise ValueError(f"--tracker {name}: {hide_secrets(error)}") from error
            self.give_up(error)
            return
        lines = [line.split() for line in (run / "log.txt").read_text(encoding="utf-8").splitlines()]
        for step, facts in itertools.groupby(lines, key=lambda words: int(words[0])):
            if step >= tool.first_missing:
                self.write(step, {stream: float(value) for _, stream, value in facts})

    def write(self, step: int, values: dict[str, float]):
        """Sends the values of a step, by the streams of log.txt."""
        try:
            if self.tool:
                named = {run_log.find_stream(stream).curve: value for stream, value in values.items()}
                self.tool.write(step, step * self.tokens_per_step, named)
        except Exception as error:
            self.give_up(error)

    def give_up(self, error: Exception):
        self.tool = None
        failure = f"--tracker {self.name} failed ({type(error).__name__}: {hide_secrets(error)})"
        print(f"note   {failure}; training continues, and log.txt has all values", flush=True)

    def close(self, exit_code: int):
        """Sends what is left, the first time that it is called."""
        tool, self.tool = self.tool, None
        try:
            if tool:
                tool.close(exit_code)
        except Exception as error:
            self.give_up(error)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any):
        self.close(0 if error is None else 1)
