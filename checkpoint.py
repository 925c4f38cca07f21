"""A checkpoint: a Hugging Face model directory, and beside it what training needs to go on.

    log/<run>/step_000250/
        model.safetensors  config.json  generation_config.json  tokenizer.json  tokenizer_config.json
        optimizer.safetensors           # the optimizer's tensors, by parameter name
        state.json                      # step, configuration, ...; SHA-256 of every file and of itself

    transformers.pipeline("text-generation", model="log/<run>/step_000250")      # works as it is

A directory of that name is whole or does not exist: it is written under a temporary name, flushed file by
file, and renamed. Nothing in it can run code when it is loaded.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import platform
import re
import shutil
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import remote
from model import END_OF_TEXT, GPT, HUB_NAMES, SIZES, GPTConfig, config_to_hf, to_hf

STATE, OPTIMIZER = "state.json", "optimizer.safetensors"
PRUNED = ".pruned"  # a file in a checkpoint that is being removed
STEP_NAME = re.compile(r"step_(\d{6,})")
LOG_ROOT = Path(__file__).resolve().parent / "log"


@dataclass(frozen=True)
class Checkpoint:
    """What a resumed run needs: the model, the optimizer's tensors by name, and the state given to `save`."""

    model: GPT
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]


def save(
    run: Path,
    step: int,
    config: GPTConfig,
    weights: dict[str, torch.Tensor],
    optimizer: dict[str, torch.Tensor],
    state: dict[str, Any],
    files: dict[str, str],
) -> Path:
    """Writes run/step_<step> and returns it.

    weights: the unwrapped model's state dict; optimizer: flat tensors by name; state: JSON values; files:
    more text files by name (the tokenizer's). A directory of that name which is already there is replaced.
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
            **files,
        }
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        digests = {path.name: remote.hash_file(path) for path in sorted(temporary.iterdir())}
        body = {"step": step, **state, "files": digests}
        sealed = {**body, "sha256": sha256_json(body)}
        (temporary / STATE).write_text(json.dumps(sealed, indent=2), encoding="utf-8")
        for path in temporary.iterdir():
            remote.flush(path)
        remote.flush(temporary)
        if final.exists():
            old = set_aside(final)
            temporary.rename(final)
            shutil.rmtree(old)
        else:
            temporary.rename(final)
        remote.flush(run)
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
        if left.name.startswith(".old_") and not final.exists() and not (left / PRUNED).exists():
            left.rename(final)
        else:
            shutil.rmtree(left, ignore_errors=True)


def prune(run: Path, keep_last: int, keep_every: int):
    """Removes a run's checkpoints but for the newest `keep_last` (0: all), those of steps that `keep_every`
    divides (0: none), and the one with the lowest validation loss."""
    found = steps(run)
    losses = {}
    for folder in found:
        with contextlib.suppress(OSError, ValueError):
            losses[folder] = json.loads((folder / STATE).read_text(encoding="utf-8")).get("val_loss")
    losses = {folder: loss for folder, loss in losses.items() if loss is not None}
    best = min(losses, key=lambda folder: losses[folder]) if losses else None
    for folder in found[:-keep_last] if keep_last else []:
        step = int(folder.name.removeprefix("step_"))
        if folder != best and not (keep_every and step % keep_every == 0):
            (folder / PRUNED).touch()
            shutil.rmtree(set_aside(folder))


class Saver:
    """Writes a run's checkpoints in a thread, one at a time, while training goes on, and prunes old ones."""

    def __init__(self, run: Path, keep_last: int, keep_every: int):
        self.run, self.keep_last, self.keep_every = run, keep_last, keep_every
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.writing: Future[str] | None = None

    def begin(self, step: int, *what: Any):
        """Starts to write what `save` takes; its tensors must be copies."""
        self.writing = self.thread.submit(self._save, step, *what)

    def _save(self, step: int, *what: Any) -> str:
        begin = time.perf_counter()
        folder = save(self.run, step, *what)
        prune(self.run, self.keep_last, self.keep_every)
        return f"saved {folder.name} in {time.perf_counter() - begin:.1f} s"

    def poll(self, wait: bool = False) -> str:
        """What to say of a checkpoint that has been written since the last call, if one has. Raises OSError
        if it could not be."""
        if self.writing and (wait or self.writing.done()):
            writing, self.writing = self.writing, None
            return writing.result()
        return ""


def sha256_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def verify(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint whose every byte is as written. Raises ValueError naming the first file that
    is not."""
    path = folder / STATE
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        seal, digests = body.pop("sha256"), body["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is missing or damaged ({type(error).__name__})") from error
    if sha256_json(body) != seal:
        raise ValueError(f"{path} is damaged: its own SHA-256 does not fit")
    step = STEP_NAME.fullmatch(folder.resolve().name)
    if step and int(step[1]) != body["step"]:
        raise ValueError(f"{path} is of step {body['step']}, not of {folder.name}")
    for name, digest in digests.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing")
        if remote.hash_file(folder / name) != digest:
            raise ValueError(f"{folder / name} is damaged: its SHA-256 is not the one in {STATE}")
    return body


def load(folder: Path, dropout: float = 0.0) -> Checkpoint:
    """Verifies and reads a checkpoint. Raises ValueError if it is not whole."""
    state = verify(folder)
    return Checkpoint(GPT.from_pretrained(folder, dropout), load_file(folder / OPTIMIZER), state)


def steps(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first, unverified."""
    found = [p for p in run.iterdir() if STEP_NAME.fullmatch(p.name)] if run.is_dir() else []
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


def newest_run(log_root: Path = LOG_ROOT) -> Path:
    """The run folder with the youngest checkpoint. Raises FileNotFoundError where there is none."""
    runs = [p for p in log_root.iterdir() if p.is_dir() and steps(p)] if log_root.is_dir() else []
    if not runs:
        raise FileNotFoundError(f"{log_root} holds no checkpoint; train one: `python train_gpt2.py demo`")
    return max(runs, key=lambda run: steps(run)[-1].stat().st_mtime)


def pick_device(name: str) -> torch.device:
    """The device a --device flag means, made ready; "auto" is CUDA, else Apple's MPS, else the CPU. Raises
    ValueError for a name that is no device, or one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by backend
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"--device {name!r} cannot be used ({reason}); try cpu, cuda, cuda:1, mps or auto"
        ) from error
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        # By default glibc hands large freed buffers back to the system and then fetches them again, page by
        # page: more than half of the time of a training step on two cores (0.4 of it remained; measured on
        # the demo).
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
        libc.mallopt(-4, 0)  # M_MMAP_MAX: take no buffer from outside the heap
    return device


def pick_dtype(name: str, device: torch.device, before: str | None = None) -> tuple[torch.dtype, str]:
    """The precision of matrix products that --dtype means, and why; `before` is what a resumed run had."""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if before:
        return getattr(torch, before), "as before"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU has it"
        return torch.float16, "this GPU has no bfloat16; gradients are scaled"
    if device.type != "cpu":
        return torch.float32, f"the safe choice on {device.type}"

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(512, 768, dtype=dtype), torch.ones(768, 3072, dtype=dtype)
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - begin)
        return min(times)

    ratio = seconds(torch.float32) / seconds(torch.bfloat16)
    chosen = torch.bfloat16 if ratio > 1.5 else torch.float32
    return chosen, f"bfloat16 products run at {ratio:.1f} times float32's speed on this CPU"


def load_model(name: str, device: str = "auto", dropout: float = 0.0) -> tuple[GPT, str]:
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
    elif path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} is neither a model directory nor a run with checkpoints in it")
    elif (
        not path.is_dir()
        and name not in SIZES
        and name not in HUB_NAMES
        and (name.count("/") != 1 or path.exists())
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
    return model.to(pick_device(device)).eval(), source
