"""A run: the state it keeps from step to step, the checkpoint it resumes, and saving in the background.

    found = find_checkpoint(cfg)                         # of --resume, verified
    with Run(folder, about, process, resumed_step=None) as run:
        run.log(0, train=10.9, lr=3e-4)
        run.save(100, model, optimizers, progress)       # returns as soon as everything is copied

On disk: a run's folder (run_folder.py); on the Hub, with --hub-repo, a model repository (hub_runs.py).
"""

import contextlib
import dataclasses
import importlib
import math
import os
import secrets
import sys
import threading
import time
import typing
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lib import checkpoint, cli, console, files, folders, hub, hub_runs, report, run_folder, schema, tokenizer
from lib.checkpoint import STATE, Found
from lib.disk import name_owner, wait_for
from lib.environment import is_local_main
from lib.optimizers import Optimizers
from lib.plan import check_batch
from lib.processes import Process
from lib.shards import Folder, ShardReader
from lib.stops import SPIKE_WINDOW, Verdict
from lib.trackers import Tracker, check_package
from model import GPT, GPTConfig

# The entries of a checkpoint's state that resuming reads.
STATE_FIELDS = {
    **{"config": dict, "world_size": int | None, "data": Any, "dtype": str | None, "scaler": dict | None},
    **{"evaluated": bool | None, "val_loss": float | None, "best_val_loss": float | None},
    **{"bad_steps": int | None, "recent_losses": list[float] | None, "tracker_id": str | None},
    "figures": dict | None,
}


@dataclass
class Progress:
    """The state that a run keeps from step to step. Checkpoints hold it beside weights and optimizers."""

    step: int = 0
    evaluated: bool = False  # this step's evaluations are done
    val_loss: float | None = None  # of this step
    hellaswag: float | None = None
    figures: dict[str, float] = dataclasses.field(default_factory=dict)  # all of this step's evaluations
    best_val_loss: float | None = None
    bad_steps: int = 0  # in a row, whose loss or gradient was not finite
    recent_losses: deque[float] = dataclasses.field(default_factory=lambda: deque(maxlen=SPIKE_WINDOW))
    tracker_id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(4))

    @classmethod
    def from_state(cls, state: dict[str, Any], run_name: str) -> "Progress":
        """Reads a checkpoint's state; {} is a new run. Earlier versions had fewer entries. A copy of a run
        under another name gets tracker curves of its own."""
        names = {field.name for field in dataclasses.fields(cls)}
        known: dict[str, Any] = {"evaluated": True, **state} if state else {}
        if known and known["config"].get("run_name") != run_name:
            known = known | {"tracker_id": None}
        progress = cls(**{name: known[name] for name in names if known.get(name) is not None})
        progress.recent_losses = deque(progress.recent_losses, maxlen=SPIKE_WINDOW)
        return progress

    def to_state(self) -> dict[str, Any]:
        """The entries of a checkpoint's state, as JSON values; None for what is not finite."""
        return files.replace_not_finite({**vars(self), "recent_losses": list(self.recent_losses)})

    def begin_step(self, step: int):
        self.step, self.val_loss, self.hellaswag, self.figures = step, None, None, {}

    def note_evaluation(self, figures: dict[str, float]):
        """Keeps the figures that checkpoints show. figures: by the log's streams."""
        self.figures, self.val_loss, self.hellaswag = figures, figures.get("val"), figures.get("hella")
        losses = [x for x in (self.val_loss, self.best_val_loss) if x is not None and math.isfinite(x)]
        self.best_val_loss = min(losses, default=None)

    def note_step(self, loss: float, verdict: Verdict, may_be_overflow: bool):
        """Counts bad steps and keeps finite losses. A float16 overflow is no bad step."""
        is_bad = not verdict.is_finite and not (may_be_overflow and verdict.is_loss_finite)
        self.bad_steps = self.bad_steps + 1 if is_bad else 0
        if verdict.is_loss_finite:
            self.recent_losses.append(loss)


def find_jobs(cfg: Any) -> set[str]:
    """The periodic jobs that are on: `val` if val_every is not 0, and so on. --keep-every and --print-every
    have no work of their own."""
    names = [field.name for field in dataclasses.fields(cfg) if field.name.endswith("_every")]
    return {name.removesuffix("_every") for name in names if getattr(cfg, name)} - {"keep", "print"}


def find_due(step: int, cfg: Any) -> set[str]:
    """The periodic jobs of a step: those whose interval divides it; at the end, all that are on."""
    is_last = step == cfg.max_steps
    due = {job for job in find_jobs(cfg) if is_last or step % getattr(cfg, f"{job}_every") == 0}
    if cfg.checkpoint_minutes and is_last:
        due.add("checkpoint")
    return due - {"checkpoint"} if step == 0 else due


def describe(
    cfg: Any, model_config: GPTConfig, reader: ShardReader, dtype: torch.dtype, world_size: int
) -> dict[str, Any]:
    """The part of a checkpoint's state that is constant during a run."""
    return {
        "model": report.describe_model(model_config),
        "trained_on": f"{reader.folder.describe_source()} ({reader.num_tokens:,} tokens)",
        "config": dataclasses.asdict(cfg) | {"resume": "", "override": False},
        "world_size": world_size,
        "data": reader.folder.fingerprint(),
        "dtype": str(dtype).removeprefix("torch."),
        "model_py": checkpoint.hash_model_py(),
        "versions": {name: metadata.version(name) for name in ("torch", "numpy", "safetensors")},
    }


class Run(contextlib.ExitStack):
    """A run's folder while a process trains: locked, its log and checkpoints written by rank 0.

    about: see `describe`. Other ranks have an object too, because copying a sharded model takes all of them;
    they write nothing. Raises ValueError if another process uses the folder.
    """

    def __init__(
        self, folder: Path, about: dict[str, Any], process: Process, resumed_step: int | None = None
    ):
        super().__init__()
        self.folder, self.about, self.process, self.resumed_step = folder, about, process, resumed_step
        self.settings = cfg = about["config"]
        self.saver = Saver(folder, cfg["keep_last"], cfg["keep_every"], cfg["hub_repo"])
        self.tracker = self.log_file = self.last_checkpoint = None
        if process.rank == 0:
            self.callback(run_folder.unlock, run_folder.lock(folder))
            self.callback(self.saver.thread.shutdown)  # the folder stays locked while a checkpoint is written
            try:
                self.open()
            except BaseException:
                self.close()
                raise

    def open(self):
        """Writes the settings and opens the log, cut back to the resumed step."""
        files.make_folder(self.folder)
        run_folder.remove_leftovers(self.folder)
        run_folder.write_settings(self.folder, self.settings)
        self.log_file = self.enter_context(run_folder.open_log(self.folder / "log.txt", self.resumed_step))
        if self.resumed_step is not None:
            for moved in run_folder.move_newer(self.folder, self.resumed_step):
                self.process.print(f"note   a newer checkpoint is now {cli.format_path(moved)}")
            self.last_checkpoint = self.folder / f"step_{self.resumed_step:06d}"
            self.saver.send(self.last_checkpoint)  # the Hub may not have it

    def log(self, step: int, **values: float):
        """Writes a line per value to log.txt, and the values to the tracker."""
        if self.log_file:
            lines = [f"{step} {stream} {value:.6g}\n" for stream, value in values.items()]
            files.append(self.log_file, "".join(lines))
        if self.tracker:
            self.tracker.write(step, values)

    def save(self, step: int, model: GPT, optimizers: Optimizers, progress: Progress):
        """Copies weights and optimizer state (all ranks take part) and writes them in the background."""
        begin = time.perf_counter()
        self.print_news(step, wait=True)
        weights, tensors = checkpoint.gather_state(model, optimizers.members)
        self.last_checkpoint = self.folder / f"step_{step:06d}"
        if self.process.rank == 0:
            texts = tokenizer.build_hf_files(model.config.block_size, model.tokenizer_files)
            state = self.about | progress.to_state() | optimizers.to_state()
            self.saver.begin(step, model.config, weights, tensors, state, texts)
        milliseconds = 1000 * (time.perf_counter() - begin)
        fields = [self.format_step(step), f"saving {cli.format_path(self.last_checkpoint)}"]
        self.process.print(console.fit([*fields, f"training paused for {milliseconds:.0f} ms"]))

    def format_step(self, step: int) -> str:
        return report.format_step(step, self.settings["max_steps"])

    def print_news(self, step: int, wait: bool = False):
        """Prints what was saved and sent since the last call. Raises OSError if saving failed."""

        def say(news: str):
            self.process.print(f"{self.format_step(step)} | {news}")

        def say_wait(text: str):
            bound = f"; the other processes wait for --timeout-seconds {self.settings['timeout_seconds']:g}"
            say(text + bound * (self.process.world_size > 1))

        for news in self.saver.poll(say_wait if wait else None):
            say(news)

    def finish(self, exit_code: int):
        """Ends a run on rank 0. Waits for the uploads, unless the run was stopped; draws the curves and says
        what to do next."""
        for news in self.saver.finish(wait=not exit_code):
            print(news, flush=True)
        if exit_code:
            return
        here, cfg = cli.format_path(self.folder), self.settings
        summary = report.summarize(self.folder / "log.txt", cfg["max_steps"], cfg["total_batch_tokens"])
        print("\n" + console.fold(summary))
        print(f"Done. The log is in {here}/log.txt.")
        if cfg["val_every"]:
            failure = run_folder.draw_curves(self.folder, self.folder / "loss.png")
            print(f"plot.py failed: {failure}" if failure else f"The curves are in {here}/loss.png.")
        if self.last_checkpoint:
            print(report.suggest_next(self.last_checkpoint, cfg["sample_prompt"]))

    def start_tracker(self, tracker_id: str):
        """Sends the log's lines to --tracker's tool, too."""
        name = self.settings["tracker"]
        if name != "none" and self.process.rank == 0:
            tracker = Tracker(name, self.folder, tracker_id, self.settings, self.resumed_step)
            self.tracker = self.enter_context(tracker)
            if tracker.tool:
                self.process.print(f"track  {name}, into {cli.format_path(tracker.tool.where)}")

    def close_tracker(self, exit_code: int):
        if self.tracker:
            self.tracker.close(exit_code)


# -----------------------------------------------------------------------------
# before a run, and resuming


def check_settings(cfg: Any, world_size: int, device_type: str = "cpu"):
    """Raises ValueError or FileNotFoundError for settings that cannot work, with the value, the bound and the
    fix. cfg: train_gpt2.py's settings."""
    cli.check_bounds(cfg)
    is_new = cfg.resume in ("", "newest")
    if cfg.init_from and is_new:
        checkpoint.check_init_from(cfg)
    if not cfg.eval_only:
        check_package(cfg.tracker)
    if cfg.eval_only and is_new and not cfg.init_from:
        raise ValueError("--eval-only needs a model: give --resume or --init-from")
    if cfg.eval_only and not find_jobs(cfg) - {"checkpoint"}:
        raise ValueError("--eval-only needs --val-every, --hellaswag-every or --sample-every above 0")
    if cfg.activation_checkpointing and cfg.dropout and device_type == "mps":
        raise ValueError(
            f"--dropout is {cfg.dropout}; on mps --activation-checkpointing cannot repeat it: leave one out"
        )
    if cfg.dry_run and device_type == "cuda" and cfg.num_gpus > torch.cuda.device_count():
        raise ValueError(f"--num-gpus is {cfg.num_gpus}; this machine has {torch.cuda.device_count()}")
    if not cfg.eval_only:
        check_batch(cfg, world_size)


def find_checkpoint(cfg: Any) -> Found | None:
    """The checkpoint that --resume means, verified; None without --resume, or if --run-name names a run that
    has no checkpoint yet.

    cfg.resume: "newest" (of --run-name, if given), a run folder, a checkpoint or hf://org/name. Raises
    FileNotFoundError or ValueError if there is none, OSError if the Hub does not answer.
    """
    resume, run_name, log_dir = cfg.resume, cfg.run_name, cfg.log_dir
    if not resume:
        return None
    log_root = Path(log_dir) if log_dir else files.LOGS
    if resume.startswith(hub.PREFIXES["model"]):
        if cfg.dry_run or cfg.eval_only:
            raise ValueError(
                f"--resume {resume} writes the run here, which --dry-run and --eval-only must not do; to "
                f"evaluate its model: --init-from {resume.removeprefix(hub.PREFIXES['model'])} --eval-only"
            )
        resume = str(hub_runs.pull(resume, log_root, run_name))
    if resume != "newest":
        path = Path(resume).resolve()
        kind = folders.identify(path)
        if kind not in ("run", "checkpoint"):
            if kind == "model":
                reason = f"has no training state; to begin from its weights: --init-from {resume}"
            else:
                is_what = "run" if path.is_dir() else "folder"
                hint = folders.suggest_folder(path, log_root)
                reason = f"is no {is_what}; give a run (log/<run>) or a checkpoint in it{hint}"
            raise FileNotFoundError(f"--resume {resume!r} {reason}")
        run = path if kind == "run" else path.parent
        if run_name not in ("", run.name):
            raise ValueError(f"--run-name is {run_name!r}, but --resume {resume} is of the run {run.name!r}")
        if kind == "checkpoint":
            return Found(path, checkpoint.verify(path))
    else:
        newest = find_newest(log_root, writes=not cfg.eval_only) if not run_name else None
        run = newest or run_folder.build_path(log_root, run_name)
        if not folders.list_steps(run):
            return None
    found, passed_over = checkpoint.find_newest_valid(run)
    for reason in passed_over:
        print(f"resume: passed over a checkpoint: {reason}", file=sys.stderr)
    if found is None:
        raise ValueError(f"{run} has no valid checkpoint to resume from")
    return found._replace(folder=found.folder.resolve())


def find_newest(log_root: Path, writes: bool) -> Path:
    """The newest run; if the caller writes, the newest that may be written, if any. Says what it passes over.
    Raises FileNotFoundError if there is no run."""
    newest, *others = folders.newest_runs(log_root)
    mine = [run for run in (newest, *others) if os.access(run, os.W_OK | os.X_OK)]
    if not writes or not mine or mine[0] == newest:
        return newest
    if is_local_main():
        owner = name_owner(newest)
        print(f"resume: passed over {newest}, which {owner} owns and you may not write", file=sys.stderr)
    return mine[0]


def read_settings(cfg: Any, found: Found) -> Any:
    """The settings that a checkpoint was saved with, as an object like cfg. Raises ValueError for settings of
    a later version."""
    schema.check_fields(found.state, STATE_FIELDS, found.folder / STATE)
    saved = found.state["config"]
    if cfg.resume.startswith(hub.PREFIXES["model"]):  # may be somebody else's run: its targets are not ours
        saved = saved | {"hub_repo": "", "tracker": "none"}
    return build_config(cfg, saved, f"{found.folder / STATE}, config")


def read_like(cfg: Any, preset: str) -> Any:
    """The settings of the run that --like names, without those that belong to one start or, as hub_repo, to
    one run. Raises FileNotFoundError if it has none, ValueError for a preset or --resume beside it."""
    if preset:
        raise ValueError(f"--like replaces the preset's settings: leave out {preset}")
    if cfg.resume:
        raise ValueError("--like begins a new run and --resume goes on with one: leave one of them out")
    path = folders.find_settings(folders.find_run(Path(cfg.like)))
    if not path.is_file():
        raise FileNotFoundError(f"--like {cfg.like!r} is no run: {path} is missing; give log/<run>")
    saved = schema.read_json(path, {})
    left_out = {f.name for f in dataclasses.fields(cfg) if f.metadata["resume"] == "start"} | {"hub_repo"}
    return build_config(cfg, {name: saved[name] for name in saved.keys() - left_out}, path)


def build_config(cfg: Any, saved: dict[str, Any], where: Path | str) -> Any:
    """Saved settings as an object like cfg. Raises ValueError for settings of a later version."""
    try:
        if unknown := saved.keys() - {field.name for field in dataclasses.fields(cfg)}:
            raise ValueError(f"{where}: no setting here has the name {' or '.join(sorted(unknown))}")
        schema.check_fields(saved, typing.get_type_hints(type(cfg)), where, optional=True)
    except ValueError as error:
        raise ValueError(f"{error}. If a later version wrote it, {schema.UPDATE}") from error
    return type(cfg)(**saved)


def set_location(cfg: Any, found: Found | None) -> Any:
    """cfg with resume, run_name and log_dir set to the checkpoint that was found."""
    if not found:
        return cfg
    run = found.folder.parent
    return dataclasses.replace(cfg, resume=str(found.folder), run_name=run.name, log_dir=str(run.parent))


def compare_settings(
    cfg: Any, found: Found | None, data: Folder | None, process: Process, world_size: int
) -> list[str]:
    """Raises ValueError if a resumed run would not be the run that was saved, with each difference, or if the
    processes have different checkpoints; returns the differences that are allowed.

    cfg: a dataclass of `cli.knob`s, which say whether they may differ; data: None where unknown.
    """
    folder, state = found or ("a new run", {})
    if not process.agree(files.hash_json(state)):
        raise ValueError(
            f"the processes do not begin alike: this one with {folder}; all must see one --log-dir"
        )
    if not found:
        return []
    allowed, refused, misfits = [], [], []
    for field in dataclasses.fields(cfg):
        old, new = state["config"].get(field.name, field.default), getattr(cfg, field.name)
        change = f"{cli.flag(field.name)} was {old!r}, is {new!r}"
        if old != new and field.metadata["resume"] != "start":
            {"fixed": refused, "free": allowed, "shape": misfits}[field.metadata["resume"]].append(change)
    if world_size != state.get("world_size", world_size):
        allowed.append(f"the processes were {state['world_size']}, are {world_size}")
    if cfg.max_steps < state["step"]:
        raise ValueError(f"--max-steps is {cfg.max_steps}; {folder} already is at step {state['step']}")
    if data and state["data"] not in (data.fingerprint(), data.fingerprint(with_tokenizer=False)):
        refused.append(f"the shards in {cfg.dataset_path} are not those of the checkpoint")
    if misfits:
        raise ValueError(f"{folder} cannot change: {'; '.join(misfits)}; start a new run for that")
    if refused and not cfg.override:
        raise ValueError(
            f"{folder} is of another run: {'; '.join(refused)}. To go on all the same: --override"
        )
    return refused + allowed


# -----------------------------------------------------------------------------
# saving in the background


class Upload(threading.Thread):
    """Sends a checkpoint to the Hub. A daemon thread: a run that is told to stop does not wait for it."""

    def __init__(self, repo: str, folder: Path):
        super().__init__(daemon=True)
        self.repo, self.folder, self.failure = repo, folder, ""
        self.start()

    def run(self):
        try:
            hub_runs.push(self.repo, self.folder)
        except Exception as error:  # training goes on whatever it is
            self.failure = str(error) or type(error).__name__


class Saver:
    """Writes checkpoints in a thread, one at a time, while training goes on, and prunes old ones. Uploads the
    newest to the Hub in another thread, if there is a repository."""

    def __init__(self, run: Path, keep_last: int, keep_every: int, hub_repo: str = ""):
        self.run, self.keep_last, self.keep_every, self.hub_repo = run, keep_last, keep_every, hub_repo
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.writing: Future[tuple[Path, str]] | None = None
        self.name = ""  # of the checkpoint that is being written
        self.upload: Upload | None = None
        self.unsent: Path | None = None  # the newest checkpoint, until the Hub has it
        # This import takes half a second, for which the first checkpoint would pause training.
        importlib.import_module("torch.distributed.checkpoint.state_dict")

    def begin(self, step: int, *content: Any):
        """Starts to write; step and content are the arguments of `checkpoint.save`, whose tensors must be
        copies."""
        in_use, self.name = self.upload.folder if self.upload else None, f"step_{step:06d}"
        self.writing = self.thread.submit(self._save, in_use, step, *content)

    def _save(self, in_use: Path | None, step: int, *content: Any) -> tuple[Path, str]:
        begin = time.perf_counter()
        files.flush(self.run / "log.txt")  # the checkpoint's step needs the lines before it
        folder = checkpoint.save(self.run, step, *content)
        return folder, f"saved {folder.name} in {time.perf_counter() - begin:.1f} s{self._prune(in_use)}"

    def _prune(self, in_use: Path | None = None) -> str:
        try:
            run_folder.prune(self.run, self.keep_last, self.keep_every, in_use)
        except OSError as error:  # no reason to stop training
            return f"; an old checkpoint could not be removed: {error}"
        return ""

    def poll(self, say: Callable[[str], None] | None = None) -> list[str]:
        """Lines about what was written and sent since the last call. With `say` it waits for the writing, and
        says so if that is slow. Raises OSError if a checkpoint could not be written."""
        lines = []
        if self.writing and say:
            wait_for(self.writing, self.name, say)
        if self.writing and self.writing.done():
            writing, self.writing = self.writing, None
            folder, text = writing.result()
            lines.append(text)
            self.send(folder)
        if self.upload and not self.upload.is_alive():
            sent, self.upload = self.upload, None
            if sent.failure:
                lines.append(f"{sent.folder.name} is not on the Hub yet: {sent.failure}")
            else:
                lines.append(f"{sent.folder.name} is on the Hub: {self.hub_repo}")
            if self.unsent != sent.folder:  # a newer checkpoint has come meanwhile
                self.send(self.unsent)
            elif not sent.failure:
                self.unsent = None
        return lines

    def send(self, folder: Path | None):
        """Uploads a checkpoint as soon as no other upload runs; of several that wait, only the newest. No
        upload starts while a checkpoint is written, because pruning may follow."""
        self.unsent = folder if self.hub_repo else None
        if self.unsent and not self.upload and not self.writing:
            self.upload = Upload(self.hub_repo, self.unsent)

    def finish(self, wait: bool) -> Iterator[str]:
        """Lines about the uploads at the end of a run, and what the Hub lacks; `wait` waits for them."""
        while wait and self.upload:
            yield f"waiting for {self.upload.folder.name} to reach {self.hub_repo}"
            self.upload.join()
            yield from self.poll()
        self._prune()  # an upload may have held an old checkpoint
        if self.unsent:
            yield f"{self.unsent.name} is not on the Hub; to send it: {report.suggest_resume(self.run)}"
