"""A run: its folder, lock and log; which checkpoint it goes on from; saving in the background; the Hub.

    found = find_checkpoint("newest")                    # or a run, a checkpoint, hf://org/name
    with Run(folder, settings, process, resumed_step=None) as run:
        run.log(0, train=10.9, lr=3e-4)
        run.save(100, model, optimizers, state)          # returns as soon as everything is copied

On disk: log/<run>/config.json (the settings), log.txt (one line per fact: `<step> <stream> <value>`),
step_000100/ (checkpoints, see checkpoint.py), loss.png, abandoned/ (checkpoints newer than the resumed step),
log/.<run>.lock while a process uses it. On the Hub a run is one model repository: its newest checkpoint, its
log, its curves and a model card.
"""

import contextlib
import dataclasses
import importlib
import json
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lib import checkpoint, cli, files, hub, report, tokenizer
from lib.checkpoint import STATE
from lib.optimizers import Optimizers
from lib.processes import Process
from lib.stops import SPIKE_WINDOW, Verdict
from model import GPT, GPTConfig

EVALUATIONS = ("val", "hella")  # streams that a step writes before its checkpoint; the others come after it
Found = tuple[Path, dict[str, Any]]  # a checkpoint and its state, verified


@dataclass
class Progress:
    """What a run remembers from step to step. A checkpoint's state holds it."""

    step: int = 0
    evaluated: bool = False  # this step's evaluations are done
    val_loss: float | None = None  # of this step
    hellaswag: float | None = None
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
        """The entries of a checkpoint's state, as JSON values."""
        return {**vars(self), "recent_losses": list(self.recent_losses)}

    def begin_step(self, step: int):
        self.step, self.val_loss, self.hellaswag = step, None, None

    def note_evaluation(self, val_loss: float | None, acc_norm: float | None) -> dict[str, float]:
        """Keeps what was measured; returns it by the log's streams."""
        self.val_loss, self.hellaswag = val_loss, acc_norm
        losses = [loss for loss in (val_loss, self.best_val_loss) if loss is not None]
        self.best_val_loss = min(losses, default=None)
        measured = {"val": val_loss, "hella": acc_norm}
        return {stream: value for stream, value in measured.items() if value is not None}

    def note_step(self, loss: float, verdict: Verdict, may_be_overflow: bool):
        """Counts bad steps and keeps finite losses. A float16 overflow is no bad step."""
        is_bad = not verdict.is_finite and not (may_be_overflow and verdict.is_loss_finite)
        self.bad_steps = self.bad_steps + 1 if is_bad else 0
        if verdict.is_loss_finite:
            self.recent_losses.append(loss)


class Run:
    """A run's folder while a process trains: locked, its log and checkpoints written by rank 0.

    Other ranks have an object too, because copying a sharded model takes all of them; they write nothing.
    Raises ValueError if another process uses the folder.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        process: Process,
        resumed_step: int | None = None,
        keep_last: int = 0,
        keep_every: int = 0,
        hub_repo: str = "",
    ):
        self.folder, self.process, self.tracker = folder, process, None
        self.saver = Saver(folder, keep_last, keep_every, hub_repo)
        self.stack = contextlib.ExitStack()
        self.log_file = None
        if process.rank == 0:
            self.stack.callback(unlock, lock(folder))
            folder.mkdir(exist_ok=True)
            clean(folder)
            (folder / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
            self.log_file = open_log(folder / "log.txt", resumed_step)
            for moved in move_newer(folder, resumed_step) if resumed_step is not None else ():
                process.print(f"note   a newer checkpoint is now {cli.format_path(moved)}")
            if resumed_step is not None:
                self.saver.send(folder / f"step_{resumed_step:06d}")  # the Hub may not have it

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exc):
        self.stack.close()

    def log(self, step: int, **values: float):
        """Writes a line per value to log.txt, and the values to the tracker."""
        if self.log_file:
            self.log_file.writelines(f"{step} {stream} {value:.6g}\n" for stream, value in values.items())
            self.log_file.flush()
        if self.tracker:
            self.tracker.write(step, values)

    def save(self, step: int, model: GPT, optimizers: Optimizers, state: dict[str, Any]):
        """Copies weights and optimizer state (all ranks take part) and writes them in the background."""
        begin = time.perf_counter()
        self.report(step, wait=True)
        weights, tensors = checkpoint.gather_state(model, list(optimizers))
        if self.process.rank == 0:
            texts = tokenizer.build_hf_files(model.config.block_size)
            self.saver.begin(step, model.config, weights, tensors, state, texts)
        milliseconds = 1000 * (time.perf_counter() - begin)
        folder = cli.format_path(self.folder / f"step_{step:06d}")
        self.process.print(f"step {step:>6} | saving {folder}; training paused for {milliseconds:.0f} ms")

    def report(self, step: int, wait: bool = False):
        """Prints what was saved and sent since the last call. Raises OSError if saving failed."""
        for news in self.saver.poll(wait):
            self.process.print(f"step {step:>6} | {news}")

    def finish(self, cfg: Any, last_checkpoint: Path | None, exit_code: int):
        """Ends a run on rank 0. Waits for the uploads, unless the run was stopped; draws the curves and says
        what to do next."""
        for news in self.saver.finish(wait=not exit_code):
            print(news, flush=True)
        if exit_code:
            return
        here = cli.format_path(self.folder)
        print("\n" + report.summarize(self.folder / "log.txt", cfg.max_steps, cfg.total_batch_tokens))
        print(f"Done. The log is in {here}/log.txt.")
        if cfg.val_every and draw_curves(self.folder, self.folder / "loss.png"):
            print(f"The curves are in {here}/loss.png.")
        if last_checkpoint:
            print(report.suggest_next(self.folder, last_checkpoint, cfg.sample_prompt))

    def track(self, tracker: Any):
        """Sends log lines to a tracker (trackers.py), too."""
        self.tracker = self.stack.enter_context(tracker)
        if tracker.tool:
            self.process.print(f"track  {tracker.name}, into {cli.format_path(tracker.tool.where)}")

    def close_tracker(self, exit_code: int):
        if self.tracker:
            self.tracker.close(exit_code)


def open_log(path: Path, resumed_step: int | None) -> Any:
    """Opens a log to append to: empty for a new run, cut back to the resumed checkpoint for an old one."""
    if resumed_step is None:
        return open(path, "w", encoding="utf-8")

    def is_before(line: str) -> bool:
        step, stream, _ = line.split()
        return int(step) < resumed_step or (int(step) == resumed_step and stream in EVALUATIONS)

    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if len(line.split()) == 3]
        kept = "".join(f"{line}\n" for line in lines if is_before(line))
        files.write_atomically(path, lambda f: f.write(kept.encode("utf-8")))
    return open(path, "a", encoding="utf-8")


def draw_curves(run: Path, out: Path) -> bool:
    """Draws a run's curves with plot.py; whether that succeeded."""
    command = [sys.executable, str(files.ROOT / "plot.py"), str(run), "--out", str(out)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# -----------------------------------------------------------------------------
# where a run goes on


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
        resume = str(pull(resume, log_root, run_name))
    if resume != "newest":
        run = Path(resume)
        if not run.is_dir():
            raise FileNotFoundError(
                f"--resume {resume!r} is no folder; give a run (log/<run>) or a checkpoint in it"
            )
        is_checkpoint = (run / STATE).is_file()
        name = (run.parent if is_checkpoint else run).resolve().name
        if run_name not in ("", name):
            raise ValueError(f"--run-name is {run_name!r}, but --resume {run} is of the run {name!r}")
        if is_checkpoint:
            return run.resolve(), checkpoint.verify(run)
    else:
        run = run_folder(log_root, run_name) if run_name else checkpoint.newest_run(log_root)
        if not checkpoint.steps(run):
            return None
    found, passed_over = checkpoint.find_newest_valid(run)
    for reason in passed_over:
        print(f"resume: passed over a checkpoint: {reason}", file=sys.stderr)
    if found is None:
        raise ValueError(f"{run} has no valid checkpoint to resume from")
    return found[0].resolve(), found[1]


def compare_settings(cfg: Any, found: Found, data: str, world_size: int) -> list[str]:
    """Raises ValueError if a resumed run would not be the run that was saved, with each difference; returns
    the differences that are allowed.

    cfg: a dataclass of `cli.knob`s, which say whether they may differ; data: the data's fingerprint.
    """
    folder, state = found
    allowed, refused, misfits = [], [], []
    for field in dataclasses.fields(cfg):
        old, new = state["config"].get(field.name, field.default), getattr(cfg, field.name)
        change = f"{cli.flag(field.name)} was {old!r}, is {new!r}"
        if old != new and field.metadata["resume"] != "start":
            {"fixed": refused, "free": allowed, "shape": misfits}[field.metadata["resume"]].append(change)
    if world_size != state["world_size"]:
        allowed.append(f"the processes were {state['world_size']}, are {world_size}")
    if cfg.max_steps < state["step"]:
        raise ValueError(f"--max-steps is {cfg.max_steps}; {folder} already is at step {state['step']}")
    if data != state["data"]:
        refused.append(f"the shards in {cfg.dataset_path} are not those of the checkpoint")
    if misfits:
        raise ValueError(f"{folder} has another shape: {'; '.join(misfits)}; start a new run for that")
    if refused and not cfg.override:
        raise ValueError(
            f"{folder} is of another run: {'; '.join(refused)}. To go on all the same: --override"
        )
    return refused + allowed


# -----------------------------------------------------------------------------
# the run's folder


def run_folder(log_root: Path, name: str) -> Path:
    """log_root/name. Raises ValueError for a name that could lead out of log_root, or has links in it."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(
            f"--run-name is {name!r}; use letters, digits, '.', '_' and '-', beginning with a letter"
        )
    run = log_root / name
    if run.is_symlink():
        raise ValueError(f"{run} is a link to another place; choose that with --log-dir")
    return run


def find_folder(cfg: Any, model_config: GPTConfig, process: Process) -> Path:
    """The run's folder, the same on all processes. Raises ValueError if a new run's exists already, or if a
    link in it leads elsewhere."""
    size, now = f"{model_config.num_params / 1e6:.0f}M", time.strftime("%Y-%m-%d_%H-%M-%S")
    name = process.broadcast(cfg.run_name or f"gpt2-{size}_{now}")
    run = run_folder(Path(cfg.log_dir) if cfg.log_dir else files.LOGS, name)
    is_new = process.rank == 0 and not cfg.resume
    if is_new and run.exists() and any(run.iterdir()):
        raise ValueError(
            f"{run} exists: go on with it (--run-name {run.name} --resume) or choose another --run-name"
        )
    if links := [path for path in run.iterdir() if path.is_symlink()] if run.is_dir() else []:
        raise ValueError(f"{links[0]} is a link; a run writes only into its own folder: remove the link")
    return run


def lock(run: Path) -> FileLock:
    """Takes the lock on a run's folder. Raises ValueError if another process has it."""
    run.parent.mkdir(parents=True, exist_ok=True)
    taken = FileLock(run.with_name(f".{run.name}.lock"))
    try:
        taken.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"{run} is in use by another process; choose another --run-name") from error
    return taken


def unlock(taken: FileLock):
    """Releases a lock and removes its file."""
    with contextlib.suppress(OSError):  # Windows keeps a file that is open
        Path(taken.lock_file).unlink()
    taken.release()


def clean(run: Path):
    """Removes what a killed process left. A checkpoint that was set aside for a successor comes back if the
    successor is missing."""
    for left in [*run.glob(".tmp_step_*"), *run.glob(".old_step_*")]:
        final = run / left.name.removeprefix(".old_")
        if left.name.startswith(".old_") and not final.exists():
            left.rename(final)
        else:
            shutil.rmtree(left, ignore_errors=True)
    for left in run.glob(".log.txt.*.tmp"):
        left.unlink()


def move_newer(run: Path, step: int) -> list[Path]:
    """Moves checkpoints newer than the resumed step into run/abandoned; returns their new places. They are
    damaged, or of a history that will not happen."""
    moved = []
    for folder in checkpoint.steps(run):
        if int(folder.name.removeprefix("step_")) > step:
            (run / "abandoned").mkdir(exist_ok=True)
            moved.append(run / "abandoned" / folder.name)
            shutil.rmtree(moved[-1], ignore_errors=True)
            folder.rename(moved[-1])
    return moved


def prune(run: Path, keep_last: int, keep_every: int, in_use: Path | None = None):
    """Removes checkpoints. The newest `keep_last` (0: all) stay, those whose step `keep_every` divides (0:
    none), the one with the lowest validation loss, and the one in use."""
    found = checkpoint.steps(run)
    losses = {}
    for folder in found:
        with contextlib.suppress(OSError, ValueError):
            losses[folder] = json.loads((folder / STATE).read_text(encoding="utf-8")).get("val_loss")
    losses = {folder: loss for folder, loss in losses.items() if loss is not None}
    best = min(losses, key=lambda folder: losses[folder]) if losses else None
    for folder in found[:-keep_last] if keep_last else []:
        step = int(folder.name.removeprefix("step_"))
        if folder not in (best, in_use) and not (keep_every and step % keep_every == 0):
            doomed = run / f".tmp_{folder.name}"  # `clean` never puts this name back, however much is left
            shutil.rmtree(doomed, ignore_errors=True)
            shutil.rmtree(folder.rename(doomed))


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
            push(self.repo, self.folder)
        except Exception as error:  # training goes on whatever it is
            self.failure = str(error) or type(error).__name__


class Saver:
    """Writes checkpoints in a thread, one at a time, while training goes on, and prunes old ones. Uploads the
    newest to the Hub in another thread, if there is a repository."""

    def __init__(self, run: Path, keep_last: int, keep_every: int, hub_repo: str = ""):
        self.run, self.keep_last, self.keep_every, self.hub_repo = run, keep_last, keep_every, hub_repo
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.writing: Future[tuple[Path, str]] | None = None
        self.upload: Upload | None = None
        self.unsent: Path | None = None  # the newest checkpoint, until the Hub has it
        # This import takes half a second, for which the first checkpoint would pause training.
        importlib.import_module("torch.distributed.checkpoint.state_dict")

    def begin(self, step: int, *content: Any):
        """Starts to write; step and content are the arguments of `checkpoint.save`, whose tensors must be
        copies."""
        in_use = self.upload.folder if self.upload else None
        self.writing = self.thread.submit(self._save, in_use, step, *content)

    def _save(self, in_use: Path | None, step: int, *content: Any) -> tuple[Path, str]:
        begin = time.perf_counter()
        folder = checkpoint.save(self.run, step, *content)
        return folder, f"saved {folder.name} in {time.perf_counter() - begin:.1f} s{self._prune(in_use)}"

    def _prune(self, in_use: Path | None = None) -> str:
        try:
            prune(self.run, self.keep_last, self.keep_every, in_use)
        except OSError as error:  # no reason to stop training
            return f"; an old checkpoint could not be removed: {error}"
        return ""

    def poll(self, wait: bool = False) -> list[str]:
        """Lines about what was written and sent since the last call; `wait` waits for the writing. Raises
        OSError if a checkpoint could not be written."""
        lines = []
        if self.writing and (wait or self.writing.done()):
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
            yield f"{self.unsent.name} is not on the Hub; to send it: --resume {self.run}"


# -----------------------------------------------------------------------------
# a run on the Hub


def check_repository(repo: str, is_new: bool):
    """Raises OSError or ValueError if checkpoints cannot be sent to the repository, or if a new run would
    replace another's. A resumed run goes on when the Hub cannot be reached."""
    try:
        hub.check_push(repo, "model")
        _, found = hub.list_hub(repo, None, [STATE], "model")
    except OSError as error:
        if is_new or hub.is_final(error):
            raise
        print(f"note   checkpoints wait for the Hub: {error}", flush=True)
        return
    if found and is_new:
        raise ValueError(
            f"--hub-repo {repo} holds a checkpoint: go on with it (--resume hf://{repo}) or choose another"
        )


def push(repo: str, folder: Path):
    """Sends a checkpoint, its run's log and curves and a model card to the Hub in one commit. Raises OSError
    naming the repository."""
    run, state = folder.parent, json.loads((folder / STATE).read_text(encoding="utf-8"))
    content: dict[str, Path | bytes] = {name: folder / name for name in (*state["files"], STATE)}
    with tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch) / "loss.png"
        if draw_curves(run, picture):
            content["loss.png"] = picture.read_bytes()
    content["log.txt"] = (run / "log.txt").read_bytes()
    content["README.md"] = model_card(repo, state, "loss.png" in content).encode()
    hub.send(repo, "model", content, f"step {state['step']}")


def model_card(repo: str, state: dict[str, Any], has_picture: bool) -> str:
    """The README on the Hub: data, figures, how to use the model and how to resume its training."""
    run, seen = state["config"], state["step"] * state["config"]["total_batch_tokens"]
    start = f"the weights of {run['init_from']}" if run["init_from"] else "random weights"
    val_loss, hella = state["val_loss"], state["hellaswag"]
    rows = {
        "trained on": f"{state['trained_on']}, from {start}",
        "step": f"{state['step']:,} of {run['max_steps']:,}; {seen:,} tokens seen",
        "validation loss": "not measured" if val_loss is None else f"{val_loss:.4f} nats per token",
        "HellaSwag": "not measured" if hella is None else f"{hella:.2%} (acc_norm, completion style)",
        "optimizer": f"{run['optimizer']}, learning rate {run['learning_rate']:g}, "
        f"{run['total_batch_tokens']:,} tokens per step, seed {run['seed']}",
    }
    dataset = run["dataset_path"].removeprefix(hub.HUB_PREFIX).partition("@")[0]
    is_hub = dataset != run["dataset_path"]
    return "\n".join([
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [gpt2]",
        *([f"datasets: [{dataset}]"] if is_hub else []), "---", "",
        f"# {repo.partition('/')[2]}", "", state["model"] + ".", "",
        *(["![training and validation loss](loss.png)", ""] if has_picture else []),
        "| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items()), "",
        "```python", "from transformers import pipeline", "",
        f'pipeline("text-generation", model="{repo}")({json.dumps(run["sample_prompt"])})', "```", "",
        "The repository holds the optimizer's state, too. Training resumes exactly where it stopped:", "",
        "```sh", f"python train_gpt2.py --resume hf://{repo}", "```", "",
    ])  # fmt: skip


def pull(location: str, log_root: Path, run_name: str = "") -> Path:
    """Downloads the checkpoint of hf://org/name[@revision] to log_root/<run>/step_<step> and the run's log
    beside it; <run> is run_name or the run's own name. Several processes may call it at once.

    Raises ValueError for a repository without a checkpoint, OSError if the Hub does not answer.
    """
    repo, revision = hub.parse_hub(location, "model")
    commit, found = hub.list_hub(repo, revision, repo_type="model")
    if STATE not in found:
        raise ValueError(
            f"{location} holds no training state ({STATE}); to begin from its weights: --init-from {repo}"
        )
    incoming = log_root / ".hub" / repo.replace("/", "--") / commit
    incoming.mkdir(parents=True, exist_ok=True)
    with FileLock(incoming.with_suffix(".lock")):
        hub.fetch(found[STATE], incoming)
        state = checkpoint.verify_state(incoming)
        run = run_folder(log_root, run_name or state.get("config", {}).get("run_name", ""))
        final = run / f"step_{state['step']:06d}"
        with contextlib.suppress(ValueError):
            if checkpoint.verify(final) == state:  # another process has fetched it, or it was made here
                shutil.rmtree(incoming)
                return final
        for name in state["files"]:
            if name not in found:
                raise ValueError(f"{location} is not whole: {name} is missing")
            hub.fetch(found[name], incoming)
        shutil.rmtree(incoming / ".incoming")
        checkpoint.verify(incoming)
        run_lock = lock(run)
        run.mkdir(exist_ok=True)
        if "log.txt" in found:
            hub.fetch(found["log.txt"], incoming)
            (incoming / "log.txt").replace(run / "log.txt")
            shutil.rmtree(incoming / ".incoming")
        if final.exists():
            shutil.rmtree(checkpoint.set_aside(final))
        incoming.rename(final)
        files.flush(run)
        unlock(run_lock)
    return final
