"""What goes wrong in the processes under test: patches for helpers.Training, given as functools.partial."""

import errno
import hashlib
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

import hellaswag
from lib import checkpoint, files, run_folder, shards
from model import GPT, Block
from train_gpt2 import Config

RANK = "RANK"


def rank() -> int:
    return int(os.environ.get(RANK, "0"))


def step_now() -> int:
    """The training step this process is in: train_gpt2.py seeds each with its number; -1 before the first."""
    seed, rest = divmod(torch.initial_seed(), 2**40)
    return rest >> 12 if seed == Config.seed else -1


def before(owner: Any, name: str, do: Callable[..., None]):
    """Has `do` called with the arguments of owner.name, before each call of it."""
    real = getattr(owner, name)

    def wrapped(*args, **kwargs):
        do(*args, **kwargs)
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)


def each_training_forward(do: Callable[[int, int], None]):
    """Has `do(step, micro_step)` called before each forward pass of training, on this process."""
    last = [-1, -1]

    def count(model, *args, **kwargs):
        if model.training and step_now() >= 0:
            last[:] = [step_now(), last[1] + 1 if last[0] == step_now() else 0]
            do(*last)

    before(GPT, "forward", count)


def wait_to_go_on(folder: Path):
    """Says that this place is reached, and stays there until the test lets it go on: signals find the process
    here, however slow the machine is."""
    (folder / "reached").touch()
    while not (folder / "go").exists():
        time.sleep(0.002)


def hold_in_step(step: int, folder: Path, on_rank: int = 0):
    """The process stays in its second micro-step of a step."""

    def hold(at_step: int, micro_step: int):
        if (at_step, micro_step) == (step, 1) and rank() == on_rank:
            wait_to_go_on(folder)

    each_training_forward(hold)


def hold_in_save(step: int, folder: Path):
    """The thread that saves stays amid the files of a checkpoint."""

    def hold(path: Path):
        if path.name == "model.safetensors" and path.parent.name == f".tmp_step_{step:06d}":
            wait_to_go_on(folder)

    before(files, "flush", hold)


def poison(kind: str, on_rank: int, *steps: int):
    """On one rank, the first micro-step of these steps gives a loss or gradients that are not finite."""
    forward = GPT.forward
    done = set()

    def poisoned(self, *args, **kwargs):
        loss = forward(self, *args, **kwargs)
        if not self.training or rank() != on_rank or step_now() not in steps or step_now() in done:
            return loss
        done.add(step_now())
        if kind == "gradient":
            loss.register_hook(lambda grad: grad * float("nan"))
            return loss
        return loss * float({"overflow": "1e36"}.get(kind, kind))

    GPT.forward = poisoned


def poison_an_element(kind: str, on_rank: int, *steps: int):
    """In these steps one element of a gradient is not finite, once gradients have been exchanged: of sharded
    ones it is in the shard of that rank, the others' are fine."""

    def poison(scaler, optimizer):
        if rank() == on_rank and step_now() in steps:
            optimizer.param_groups[0]["params"][0].grad.to_local()[0, 0] = float(kind)

    before(torch.amp.GradScaler, "unscale_", poison)


def note_weights(folder: Path):
    """Writes down a hash of the weights at the beginning of each step, a file a rank."""

    def watch(self, *args, **kwargs):
        if self.training and step_now() >= 0 and step_now() not in seen:
            seen.add(step_now())
            digest = hashlib.sha256()
            for p in self.parameters():
                digest.update(p.detach().numpy().tobytes())
            with open(folder / f"weights{rank()}.txt", "a", encoding="utf-8") as f:
                f.write(f"{step_now()} {digest.hexdigest()}\n")

    seen = set()
    before(GPT, "forward", watch)


def note_shards(folder: Path):
    """Writes down for each step, a file a rank: how many elements of the weights, of their gradients and of
    the optimizer's state this process has, how many blocks at most had all their weights here while one
    computed, and how many times gradients were exchanged."""
    from torch.distributed.tensor import DTensor

    def local(tensor: torch.Tensor) -> int:
        return tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel()

    def begin(model, *args, **kwargs):
        models[:] = [model]

    def look(block, *args, **kwargs):
        if block.training:
            gathered = sum(not isinstance(one.ln_1.weight, DTensor) for one in models[0].blocks)
            counts["blocks"] = max(counts["blocks"], gathered)

    def exchanged(*args, **kwargs):
        counts["exchanges"] += 1

    def note(optimizer):
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        state = [t for values in optimizer.state.values() for t in values.values() if t.dim()]
        sizes = [sum(map(local, group)) for group in (weights, [p.grad for p in weights], state)]
        with open(folder / f"shards{rank()}.txt", "a", encoding="utf-8") as f:
            f.write(" ".join(map(str, [*sizes, *counts.values()])) + "\n")
        counts.update(blocks=0, exchanges=0)

    models: list[GPT] = []
    counts = dict(blocks=0, exchanges=0)
    before(GPT, "forward", begin)
    before(Block, "forward", look)
    before(torch.distributed, "reduce_scatter_single", exchanged)
    before(torch.amp.GradScaler, "step", lambda scaler, optimizer: note(optimizer))


def note_saves(folder: Path):
    """Writes down how many tensors each rank gathers for a checkpoint, and which rank writes it."""
    gather = checkpoint.gather_state

    def gather_and_note(*args):
        found = gather(*args)
        with open(folder / f"saves{rank()}.txt", "a", encoding="utf-8") as f:
            f.write(f"gathered {sum(map(len, found))}\n")
        return found

    def note(*args):
        with open(folder / f"saves{rank()}.txt", "a", encoding="utf-8") as f:
            f.write("wrote\n")

    checkpoint.gather_state = gather_and_note
    before(checkpoint, "save", note)


def score_items(file: Path):
    """HellaSwag's items come from this file."""
    hellaswag.download.__defaults__ = (hellaswag.URL, file, files.hash_file(file), 1)


def note_sequences(file: Path):
    """Writes down each sequence that is trained on: its step and its tokens."""

    def watch(self, x, y):
        if self.training and step_now() >= 0:
            with open(file, "a", encoding="utf-8") as f:
                f.writelines(f"{step_now()} {row}\n" for row in torch.cat([x, y[:, -1:]], 1).tolist())

    before(GPT, "forward", watch)


def limit_files(size: int, at_save: int):
    """From a save on, no file may be longer than this: as on a disk that is full, writing fails."""
    saves = iter(range(10**6))

    def limit(*args, **kwargs):
        if next(saves) == at_save:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    before(checkpoint, "save", limit)


def fail_in_save(place: str, at_step: int):
    """A save fails at a place, with the error that is likely there."""
    temporary = f".tmp_step_{at_step:06d}"

    def fail(path, *args, **kwargs):
        if temporary in str(path):
            raise OSError(errno.EIO, "Input/output error", str(path))

    if place == "save_file":

        def fail_safetensors(tensors, path, **kwargs):
            if temporary in str(path):
                raise SafetensorError("Error while serializing: I/O error")

        before(checkpoint, place, fail_safetensors)
    else:
        before(files if place in ("flush", "hash_file") else Path, place, fail)


def die_in_file_operation(number: int, word: str):
    """SIGKILL just before the so-many-th operation on a file or folder whose path has this word in it, or
    that removes one (of these only the name is given)."""
    left = [number]

    def count(event: str, args: tuple):
        if event in ("os.remove", "os.rmdir") or (
            event in ("open", "os.rename", "os.mkdir") and word in str(args[:2])
        ):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def batches_of(data: Path, seq_len: int, seed: int, sequences: int, steps: range) -> list[str]:
    """What `note_sequences` is to write, from the reader alone, in sorted order."""
    reader = shards.ShardReader(shards.Folder(data), "train", seq_len, seed)
    lines = []
    for step in steps:
        x, y = reader.batch(step, 0, sequences, sequences)
        lines += [f"{step} {row}" for row in torch.cat([x, y[:, -1:]], 1).tolist()]
    return sorted(lines)


def find_the_oldest_on_rank_1():
    """As if this process saw another disk."""

    def oldest(run: Path) -> tuple:
        folder = checkpoint.list_steps(run)[0]
        return (folder, checkpoint.verify(folder)), []

    if rank() == 1:
        checkpoint.find_newest_valid = oldest


def draw(number: int) -> random.Random:
    """Random numbers of a try, the same in every test run."""
    return random.Random(number)


def prune(run: Path, keep_last: int, keep_every: int, patch: Callable[[], None]):
    """run_folder.prune in a process of its own."""
    patch()
    run_folder.prune(run, keep_last, keep_every)


def hide_compiler(*on_ranks: int):
    """torch.compile finds no C++ compiler; on these ranks, or on all."""
    if on_ranks and rank() not in on_ranks:
        return
    os.environ["CXX"] = "/nonexistent"
    if "torch._inductor.config" in sys.modules:  # it has read the variable
        sys.modules["torch._inductor.config"].cpp.cxx = (None, "/nonexistent")


def two_hours_pass(step: int, on_rank: int):
    """From a step on, one rank's clock says that it is two hours later."""
    clock = time.monotonic

    def turn(at_step: int, micro_step: int):
        if at_step >= step and rank() == on_rank:
            time.monotonic = lambda: clock() + 7200

    each_training_forward(turn)


def take_hellaswag_from(file: Path):
    """Items of a test's own in place of HellaSwag's."""
    hellaswag.download.__defaults__ = (hellaswag.URL, file, files.hash_file(file), 1)


def pretend_memory(*available: float):
    """A machine on which so many bytes are available, to each rank another number, and that sets no limit."""
    read = Path.read_text

    def pretend(self: Path, *args, **kwargs) -> str:
        if str(self) == "/proc/self/cgroup":
            return ""
        if str(self) == "/proc/meminfo":
            return f"MemTotal: 1 kB\nMemAvailable:  {available[rank()] / 1024:.0f} kB\n"
        return read(self, *args, **kwargs)

    Path.read_text = pretend


def note_memory(file: Path):
    """Writes down the bytes of memory that the process has had at once, before the model is made and before
    each step."""

    def note(*args):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        with open(file, "a", encoding="utf-8") as f:
            f.write(f"{int(status.partition('VmHWM:')[2].split()[0]) * 1024}\n")

    before(GPT, "__init__", note)
    each_training_forward(lambda step, micro_step: note() if micro_step == 0 else None)
