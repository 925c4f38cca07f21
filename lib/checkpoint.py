"""A checkpoint: a Hugging Face model directory, and beside it what training needs to go on.

    log/<run>/step_000250/
        model.safetensors  config.json  generation_config.json  tokenizer.json  tokenizer_config.json
        optimizer.safetensors           # the optimizer's tensors, by parameter name
        state.json                      # step, configuration, ...; SHA-256 of every file and of itself

    transformers.pipeline("text-generation", model="log/<run>/step_000250")      # works as it is

A directory of that name is whole or does not exist: it is written under a temporary name, flushed file by
file, and renamed. Nothing in it can run code when it is loaded. On the Hugging Face Hub a run is one
repository: its newest checkpoint, and beside it the log, the curves and a model card.
"""

import contextlib
import errno
import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib import files, hub
from lib.device import pick_device
from model import END_OF_TEXT, GPT, HUB_NAMES, SIZES, GPTConfig, config_to_hf, to_hf

STATE, OPTIMIZER = "state.json", "optimizer.safetensors"
STEP_NAME = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """What a resumed run needs: the model, the optimizer's tensors by name, and the state given to `save`."""

    model: GPT
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]


def gather_state(model: GPT, optimizers: list[torch.optim.Optimizer]) -> tuple[dict, dict]:
    """Copies, on the CPU, of the weights and of the optimizers' tensors by name. All ranks take part."""
    from torch.distributed.checkpoint import state_dict as dcp

    weights: Any
    optimizer: Any
    whole = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)  # whatever wraps or shards it
    weights, optimizer = dcp.get_state_dict(model, optimizers, options=whole)
    rows = model.config.vocab_size  # the padding of the vocabulary stays out of checkpoints
    tensors = {
        f"{name}/{key}": value[:rows] if "wte" in name and value.dim() == 2 else value
        for name, values in optimizer.get("state", {}).items()  # only rank 0 is given them
        for key, value in values.items()
    }
    # What was on the CPU already is not a copy yet, and training goes on while it is written.
    copies = [{name: t.clone() for name, t in group.items()} for group in (weights, tensors)]
    return copies[0], copies[1]


def load_optimizers(model: GPT, optimizers: list[torch.optim.Optimizer], tensors: dict[str, torch.Tensor]):
    """Puts the tensors of `gather_state` back; all else about the optimizers comes from the flags."""
    from torch.distributed.checkpoint import state_dict as dcp

    state_dict: Any = dcp.get_optimizer_state_dict(model, optimizers)
    padding = (0, 0, 0, model.config.padded_vocab_size - model.config.vocab_size)
    for name, values in state_dict["state"].items():
        saved = {key: tensors[f"{name}/{key}"] for key in values}
        # A new dictionary: `values` is the optimizer's own, from which torch sees what is sharded, and how.
        state_dict["state"][name] = {
            key: torch.nn.functional.pad(tensor, padding) if "wte" in name and tensor.dim() == 2 else tensor
            for key, tensor in saved.items()
        }
    whole = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    dcp.set_optimizer_state_dict(model, optimizers, state_dict, options=whole)


def save(
    run: Path,
    step: int,
    config: GPTConfig,
    weights: dict[str, torch.Tensor],
    optimizer: dict[str, torch.Tensor],
    state: dict[str, Any],
    tokenizer_files: dict[str, str],
) -> Path:
    """Writes run/step_<step> and returns it.

    weights: the unwrapped model's state dict; optimizer: flat tensors by name; state: JSON values;
    tokenizer_files: text by file name. A directory of that name which is already there is replaced.
    Raises OSError, naming the directory (and, if the disk is full, the space that is needed).
    """
    final, temporary = run / f"step_{step:06d}", run / f".tmp_step_{step:06d}"
    shutil.rmtree(temporary, ignore_errors=True)
    run.mkdir(parents=True, exist_ok=True)
    need = sum(tensor.nbytes for tensor in (*weights.values(), *optimizer.values()))
    free = shutil.disk_usage(run).free
    if free < need:
        raise OSError(
            errno.ENOSPC,
            f"{final} needs {need / 1e6:,.0f} MB and its disk has {free / 1e6:,.0f} MB free: make room and "
            "go on with --resume, or keep fewer checkpoints (--keep-last)",
        )
    try:
        temporary.mkdir()
        save_file(to_hf(weights, config), temporary / "model.safetensors", metadata={"format": "pt"})
        save_file(optimizer, temporary / OPTIMIZER)
        hf_config = config_to_hf(config)
        special = {key: hf_config[key] for key in ("bos_token_id", "eos_token_id")}
        texts = {
            "config.json": json.dumps(hf_config, indent=2),
            "generation_config.json": json.dumps(
                {**special, "pad_token_id": special["eos_token_id"]}, indent=2
            ),
            **tokenizer_files,
        }
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        digests = {path.name: files.hash_file(path) for path in sorted(temporary.iterdir())}
        body = {"step": step, **state, "files": digests}
        sealed = {**body, "sha256": files.hash_json(body)}
        (temporary / STATE).write_text(json.dumps(sealed, indent=2), encoding="utf-8")
        for path in temporary.iterdir():
            files.flush(path)
        files.flush(temporary)
        if final.exists():
            old = set_aside(final)
            temporary.rename(final)
            shutil.rmtree(old)
        else:
            temporary.rename(final)
        files.flush(run)
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None) or errno.EIO
        raise OSError(number, f"{final} ({need / 1e6:,.0f} MB) could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def set_aside(folder: Path) -> Path:
    """Renames a checkpoint so that nothing takes it for one; returns its new place."""
    aside = folder.with_name(f".old_{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    return aside


def clean(run: Path):
    """Removes what a killed process left in a run folder. A checkpoint that was set aside for another of its
    step, which then did not come, is put back."""
    for left in [*run.glob(".tmp_step_*"), *run.glob(".old_step_*")]:
        final = run / left.name.removeprefix(".old_")
        if left.name.startswith(".old_") and not final.exists():
            left.rename(final)
        else:
            shutil.rmtree(left, ignore_errors=True)
    for left in run.glob(".log.txt.*.tmp"):
        left.unlink()


def abandon(run: Path, step: int) -> list[Path]:
    """Moves checkpoints that are newer than the step a run goes on from into run/abandoned: they are damaged,
    or of a history that will not come about. Returns where they are."""
    moved = []
    for folder in steps(run):
        if int(folder.name.removeprefix("step_")) > step:
            (run / "abandoned").mkdir(exist_ok=True)
            moved.append(run / "abandoned" / folder.name)
            shutil.rmtree(moved[-1], ignore_errors=True)
            folder.rename(moved[-1])
    return moved


def prune(run: Path, keep_last: int, keep_every: int, in_use: Path | None = None):
    """Removes a run's checkpoints but for the newest `keep_last` (0: all), those of steps that `keep_every`
    divides (0: none), the one with the lowest validation loss, and the one in use."""
    found = steps(run)
    losses = {}
    for folder in found:
        with contextlib.suppress(OSError, ValueError):
            losses[folder] = json.loads((folder / STATE).read_text(encoding="utf-8")).get("val_loss")
    losses = {folder: loss for folder, loss in losses.items() if loss is not None}
    best = min(losses, key=lambda folder: losses[folder]) if losses else None
    for folder in found[:-keep_last] if keep_last else []:
        step = int(folder.name.removeprefix("step_"))
        if folder not in (best, in_use) and not (keep_every and step % keep_every == 0):
            doomed = run / f".tmp_{folder.name}"  # which is never put back, however much of it is left
            shutil.rmtree(doomed, ignore_errors=True)
            shutil.rmtree(folder.rename(doomed))


class Upload(threading.Thread):
    """A checkpoint on its way to the Hub. As a daemon: a run that is told to stop does not wait for it."""

    def __init__(self, repo: str, folder: Path):
        super().__init__(daemon=True)
        self.repo, self.folder, self.failure = repo, folder, ""
        self.start()

    def run(self):
        try:
            push(self.repo, self.folder)
        except Exception as error:  # whatever it is, training goes on
            self.failure = str(error) or type(error).__name__


class Saver:
    """Writes a run's checkpoints in a thread, one at a time, while training goes on; prunes old ones; sends
    the newest to the Hub, if it has a repository there, in a thread of its own."""

    def __init__(self, run: Path, keep_last: int, keep_every: int, hub_repo: str = ""):
        self.run, self.keep_last, self.keep_every, self.hub_repo = run, keep_last, keep_every, hub_repo
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.writing: Future[tuple[Path, str]] | None = None
        self.upload: Upload | None = None
        self.unsent: Path | None = None  # the newest checkpoint, while the Hub has not got it
        # Half a second now, or the first checkpoint would pause training for it.
        importlib.import_module("torch.distributed.checkpoint.state_dict")

    def begin(self, step: int, *what: Any):
        """Starts to write what `save` takes; its tensors must be copies."""
        in_use = self.upload.folder if self.upload else None
        self.writing = self.thread.submit(self._save, in_use, step, *what)

    def _save(self, in_use: Path | None, step: int, *what: Any) -> tuple[Path, str]:
        begin = time.perf_counter()
        folder = save(self.run, step, *what)
        return folder, f"saved {folder.name} in {time.perf_counter() - begin:.1f} s{self._prune(in_use)}"

    def _prune(self, in_use: Path | None = None) -> str:
        try:
            prune(self.run, self.keep_last, self.keep_every, in_use)
        except OSError as error:  # no reason to stop training
            return f"; an old checkpoint could not be removed: {error}"
        return ""

    def poll(self, wait: bool = False) -> list[str]:
        """What to say of what has been written and sent since the last call; `wait`s for the writing. Raises
        OSError if a checkpoint could not be written."""
        said = []
        if self.writing and (wait or self.writing.done()):
            writing, self.writing = self.writing, None
            folder, text = writing.result()
            said.append(text)
            self.send(folder)
        if self.upload and not self.upload.is_alive():
            sent, self.upload = self.upload, None
            if sent.failure:
                said.append(f"{sent.folder.name} is not on the Hub yet: {sent.failure}")
            else:
                said.append(f"{sent.folder.name} is on the Hub: {self.hub_repo}")
            if self.unsent != sent.folder:  # a newer one has come meanwhile
                self.send(self.unsent)
            elif not sent.failure:
                self.unsent = None
        return said

    def send(self, folder: Path | None):
        """Sends a checkpoint to the Hub as soon as none is on its way; only the newest that waits is sent.
        None begins while a newer one is written, after which it may be pruned."""
        self.unsent = folder if self.hub_repo else None
        if self.unsent and not self.upload and not self.writing:
            self.upload = Upload(self.hub_repo, self.unsent)

    def finish(self, wait: bool) -> Iterator[str]:
        """The same at the end of the run, and what the Hub still has not got; `wait`s for the uploads."""
        while wait and self.upload:
            yield f"waiting for {self.upload.folder.name} to reach {self.hub_repo}"
            self.upload.join()
            yield from self.poll()
        self._prune()  # what was in use before
        if self.unsent:
            yield f"{self.unsent.name} is not on the Hub; to send it: --resume {self.run}"


# -----------------------------------------------------------------------------
# the run's folder, here and on the Hub


def run_folder(log_root: Path, name: str) -> Path:
    """log_root/name. Raises ValueError for a name that could lead out of log_root."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(
            f"--run-name is {name!r}; use letters, digits, '.', '_' and '-', beginning with a letter"
        )
    if (log_root / name).is_symlink():
        raise ValueError(f"{log_root / name} is a link to another place; choose that with --log-dir")
    return log_root / name


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
    with contextlib.suppress(OSError):  # Windows keeps a file that is open
        Path(taken.lock_file).unlink()
    taken.release()


def push(repo: str, folder: Path):
    """Sends a checkpoint, its run's log and curves, and a model card to the Hub, in one commit. Raises
    OSError naming the repository."""
    run, state = folder.parent, json.loads((folder / STATE).read_text(encoding="utf-8"))
    content: dict[str, Path | bytes] = {name: folder / name for name in (*state["files"], STATE)}
    with tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch) / "loss.png"
        command = [sys.executable, str(files.ROOT / "plot.py"), str(run), "--out", str(picture)]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            content["loss.png"] = picture.read_bytes()
    content["log.txt"] = (run / "log.txt").read_bytes()
    content["README.md"] = model_card(repo, state, "loss.png" in content).encode()
    hub.send(repo, "model", content, f"step {state['step']}")


def model_card(repo: str, state: dict[str, Any], has_picture: bool) -> str:
    """A README for the Hub: what the model was trained on, the figures, how to use it and how to go on."""
    run, seen = state["config"], state["step"] * state["config"]["total_batch_tokens"]
    start = f"the weights of {run['init_from']}" if run["init_from"] else "random weights"
    val_loss, hella = state["val_loss"], state["hellaswag"]
    rows = {
        "trained on": f"{state['trained_on']}, from {start}",
        "step": f"{state['step']:,} of {run['max_steps']:,}; {seen:,} tokens seen",
        "validation loss": "not measured" if val_loss is None else f"{val_loss:.4f} nats a token",
        "HellaSwag": "not measured" if hella is None else f"{hella:.2%} (acc_norm, completion style)",
        "optimizer": f"{run['optimizer']}, learning rate {run['learning_rate']:g}, "
        f"{run['total_batch_tokens']:,} tokens a step, seed {run['seed']}",
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
        "With its optimizer and the state of its training, it goes on exactly where it was:", "",
        "```sh", f"python train_gpt2.py --resume hf://{repo}", "```", "",
    ])  # fmt: skip


def pull(location: str, log_root: Path, run_name: str = "") -> Path:
    """The checkpoint in a repository of the Hub, hf://org/name[@revision], as log_root/<run>/step_<step> with
    the run's log beside it; <run> is run_name, or else the run's own name. Several processes may ask for it.
    Raises ValueError for a repository without a checkpoint, OSError if the Hub does not answer."""
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
        state = verify_state(incoming)
        run = run_folder(log_root, run_name or state.get("config", {}).get("run_name", ""))
        final = run / f"step_{state['step']:06d}"
        with contextlib.suppress(ValueError):
            if verify(final) == state:  # another process has fetched it, or it was made here
                shutil.rmtree(incoming)
                return final
        for name in state["files"]:
            if name not in found:
                raise ValueError(f"{location} is not whole: {name} is missing")
            hub.fetch(found[name], incoming)
        shutil.rmtree(incoming / ".incoming")
        verify(incoming)
        run_lock = lock(run)
        run.mkdir(exist_ok=True)
        if "log.txt" in found:
            hub.fetch(found["log.txt"], incoming)
            (incoming / "log.txt").replace(run / "log.txt")
            shutil.rmtree(incoming / ".incoming")
        if final.exists():
            shutil.rmtree(set_aside(final))
        incoming.rename(final)
        files.flush(run)
        unlock(run_lock)
    return final


# -----------------------------------------------------------------------------
# reading


def verify(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint whose every byte is as written. Raises ValueError naming the first file that
    is not."""
    body = verify_state(folder)
    for name, digest in body["files"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing")
        if files.hash_file(folder / name) != digest:
            raise ValueError(f"{folder / name} is damaged: its SHA-256 is not the one in {STATE}")
    return body


def verify_state(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's state.json. Raises ValueError if it is not as written, or lists a file
    that is not in the folder itself."""
    path = folder / STATE
    try:
        text = path.read_text(encoding="utf-8")
        body = json.loads(text)
        seal, names = body.pop("sha256"), list(body["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is missing or damaged ({type(error).__name__})") from error
    if files.hash_json(body) != seal or text != json.dumps({**body, "sha256": seal}, indent=2):
        raise ValueError(f"{path} is damaged: its own SHA-256 does not fit")
    step = STEP_NAME.fullmatch(folder.resolve().name)
    if step and int(step[1]) != body["step"]:
        raise ValueError(f"{path} is of step {body['step']}, not of {folder.name}")
    for name in names:
        if Path(name).name != name or (folder / name).is_symlink():
            raise ValueError(f"{path} lists {name!r}, which is not a file in its folder")
    return body


def load(folder: Path, dropout: float = 0.0) -> Checkpoint:
    """Verifies and reads a checkpoint. Raises ValueError if it is not whole."""
    state = verify(folder)
    try:
        optimizer = load_file(folder / OPTIMIZER)
    except SafetensorError as error:  # its hash is right: it was made like this
        raise ValueError(f"{folder / OPTIMIZER} is not a safetensors file: {error}") from error
    return Checkpoint(GPT.from_pretrained(folder, dropout), optimizer, state)


def steps(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first, unverified. Links are none of them."""
    inside = run.iterdir() if run.is_dir() else ()
    found = [p for p in inside if STEP_NAME.fullmatch(p.name) and not p.is_symlink()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def newest_valid(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run folder that verifies, and why each newer one was passed over."""
    passed_over = []
    for folder in reversed(steps(run)):
        try:
            verify(folder)
            return folder, passed_over
        except ValueError as error:
            passed_over.append(str(error))
    return None, passed_over


def newest_run(log_root: Path = files.LOGS) -> Path:
    """The run folder with the youngest checkpoint. Raises FileNotFoundError where there is none."""
    runs = [p for p in log_root.iterdir() if p.is_dir() and steps(p)] if log_root.is_dir() else []
    if not runs:
        raise FileNotFoundError(f"{log_root} holds no checkpoint; train one: `python train_gpt2.py demo`")
    return max(runs, key=lambda run: steps(run)[-1].stat().st_mtime)


def load_model(
    name: str, device: str = "auto", dropout: float = 0.0, spare_memory: bool = False
) -> tuple[GPT, str]:
    """The model that a --model flag means, in evaluation mode, and what it turned out to be: a checkpoint or
    other Hugging Face directory, a run folder (its newest valid checkpoint), a size name, a Hub id, or "" for
    the newest run. Raises ValueError or FileNotFoundError for what is none of these."""
    path = Path(name) if name else newest_run()
    if path.is_dir() and steps(path):
        found, passed_over = newest_valid(path)
        if found is None:
            raise ValueError(f"{path} has no valid checkpoint: {'; '.join(passed_over)}")
        for reason in passed_over:
            print(f"passed over a checkpoint: {reason}", file=sys.stderr)
        path = found
    elif path.is_dir() and ((path / STATE).is_file() or STEP_NAME.fullmatch(path.name)):
        verify(path)
    elif path.is_dir() and ((path / "log.txt").is_file() or not (path / "config.json").is_file()):
        raise FileNotFoundError(f"{path} is neither a model directory nor a run with checkpoints in it")
    elif (
        not path.is_dir()
        and name not in SIZES
        and name not in HUB_NAMES
        and (name.count("/") != 1 or path.exists() or path.parent.is_dir())
    ):
        raise FileNotFoundError(
            f"--model {name!r} is no directory here, no size ({', '.join([*SIZES, *HUB_NAMES])}) "
            "and no Hub id (org/name)"
        )
    source = str(path) if path.is_dir() else name
    model = GPT.from_pretrained(source, dropout)
    if model.config.vocab_size <= END_OF_TEXT:
        raise ValueError(
            f"{source} has {model.config.vocab_size} tokens; GPT-2's tokenizer has {END_OF_TEXT + 1}"
        )
    return model.to(pick_device(device, spare_memory)).eval(), source
