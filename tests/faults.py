"""Faults in the processes under test: patches for helpers.Training, given as functools.partial."""

import contextlib
import ctypes
import errno
import hashlib
import os
import posix
import random
import resource
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

import hellaswag
from lib import checkpoint, disk, files, parallel, processes, run_folder, shards
from model import GPT, Block
from train_gpt2 import Config

RANK = "RANK"


def rank() -> int:
    return int(os.environ.get(RANK, "0"))


def step_now() -> int:
    """Returns the training step of this process, from its seed; -1 before the first."""
    seed, rest = divmod(torch.initial_seed(), 2**40)
    return rest >> 12 if seed == Config.seed else -1


def before(owner: Any, name: str, do: Callable[..., None]):
    """Calls `do` with the arguments of owner.name before each call of it."""
    real = getattr(owner, name)

    def wrapped(*args, **kwargs):
        do(*args, **kwargs)
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)


def each_training_forward(do: Callable[[int, int], None]):
    """Calls `do(step, micro_step)` before each forward pass of training in this process."""
    last = [-1, -1]

    def count(model, *args, **kwargs):
        if model.training and step_now() >= 0:
            last[:] = [step_now(), last[1] + 1 if last[0] == step_now() else 0]
            do(*last)

    before(GPT, "forward", count)


def wait_to_go_on(folder: Path):
    """Reports that this place is reached, and waits for the test. So signals find the process here on a slow
    machine, too."""
    (folder / "reached").touch()
    while not (folder / "go").exists():
        time.sleep(0.002)


def hold_in_step(step: int, folder: Path, on_rank: int = 0):
    """The process stays in its second micro-step of a step."""

    def hold(at_step: int, micro_step: int):
        if (at_step, micro_step) == (step, 1) and rank() == on_rank:
            wait_to_go_on(folder)

    each_training_forward(hold)


def hold_before_evaluation(folder: Path, on_rank: int):
    def hold(model: GPT):
        if rank() == on_rank:
            wait_to_go_on(folder)

    before(parallel, "unshard", hold)


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
    """In these steps one element of an exchanged gradient is not finite. If gradients are sharded, it is in
    the shard of this rank alone."""

    def poison(scaler, optimizer):
        if rank() == on_rank and step_now() in steps:
            optimizer.param_groups[0]["params"][0].grad.to_local()[0, 0] = float(kind)

    before(torch.amp.GradScaler, "unscale_", poison)


def note_weights(folder: Path):
    """Writes a hash of the weights at the beginning of each step, to one file per rank."""

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
    """Writes a line per step to one file per rank: the elements of weights, gradients and optimizer state in
    this process, the most blocks whose weights were whole during a forward pass, the gradient exchanges."""
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
    names = ("reduce_scatter_single", "reduce_scatter_tensor")  # the second in torch 2.11
    before(torch.distributed, next(name for name in names if hasattr(torch.distributed, name)), exchanged)
    before(torch.amp.GradScaler, "step", lambda scaler, optimizer: note(optimizer))


def note_gradients(folder: Path):
    """Writes a line per step to one file per rank: parameters, and the addresses of the memory in which their
    gradients lie."""

    def note(scaler, optimizer):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        places = sorted({grad.untyped_storage().data_ptr() for grad in grads})
        with open(folder / f"gradients{rank()}.txt", "a", encoding="utf-8") as f:
            f.write(" ".join(map(str, [len(grads), *places])) + "\n")

    before(torch.amp.GradScaler, "step", note)


def note_saves(folder: Path):
    """Writes how many tensors each rank gathers for a checkpoint, and which rank writes it."""
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


def set_variables(environment: dict[str, str]):
    os.environ.update(environment)


def score_items(file: Path):
    """Reads HellaSwag's items from this file."""
    hellaswag.download.__defaults__ = (hellaswag.URL, file, files.hash_file(file), 1)


def note_sequences(file: Path):
    """Writes each sequence of the training: its step and its tokens."""

    def watch(self, x, y):
        if self.training and step_now() >= 0:
            with open(file, "a", encoding="utf-8") as f:
                f.writelines(f"{step_now()} {row}\n" for row in torch.cat([x, y[:, -1:]], 1).tolist())

    before(GPT, "forward", watch)


def limit_files(size: int, at_save: int):
    """From the save of this number on, writing beyond this file size fails, as on a full disk."""
    saves = iter(range(10**6))

    def limit(*args, **kwargs):
        if next(saves) == at_save:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    before(checkpoint, "save", limit)


def fail_in_save(place: str, at_step: int):
    """The save of a step fails in this call, with an error that is likely there."""
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
    """Sends SIGKILL just before an operation of this number. Operations on paths that contain the word count,
    and all removals, whose events have the name alone."""
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
    """Returns the lines that `note_sequences` must write, from the reader alone, sorted."""
    reader = shards.ShardReader(shards.Folder(data), "train", seq_len, seed)
    lines = []
    for step in steps:
        x, y = reader.batch(step, 0, sequences, sequences)
        lines += [f"{step} {row}" for row in torch.cat([x, y[:, -1:]], 1).tolist()]
    return sorted(lines)


def find_the_oldest_on_rank_1():
    """Rank 1 finds the oldest checkpoint, as on a disk of its own."""

    def oldest(run: Path) -> tuple:
        folder = checkpoint.list_steps(run)[0]
        return checkpoint.Found(folder, checkpoint.verify(folder)), []

    if rank() == 1:
        checkpoint.find_newest_valid = oldest


def draw(number: int) -> random.Random:
    """Returns the random numbers of a try, the same in every test run."""
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
    """From this step on, the clock of one rank is two hours late."""
    clock = time.monotonic

    def turn(at_step: int, micro_step: int):
        if at_step >= step and rank() == on_rank:
            time.monotonic = lambda: clock() + 7200

    each_training_forward(turn)


def pretend_memory(*available: float):
    """This number of bytes is available to each rank, and no cgroup sets a limit."""
    read = Path.read_text

    def pretend(self: Path, *args, **kwargs) -> str:
        if str(self) == "/proc/self/cgroup":
            return ""
        if str(self) == "/proc/meminfo":
            return f"MemTotal: 1 kB\nMemAvailable:  {available[rank()] / 1024:.0f} kB\n"
        return read(self, *args, **kwargs)

    Path.read_text = pretend


def spare_workspaces():
    """float32 products leave no memory in use. On CPUs with AMX or without AVX512_BF16, MKL makes them. Its
    workspaces stay and leave holes in a heap that never shrinks: 0.1 to 0.5 GB that are not planned.
    So AMX is hidden, which gives the products to oneDNN. Without AVX512_BF16, the heap may shrink."""
    if not torch.cpu._is_avx512_bf16_supported():
        pick_device = processes.pick_device
        processes.pick_device = lambda name, _=False: pick_device(name, spare_memory=True)
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
    torch.cpu._is_amx_tile_supported = lambda: False


def note_memory(file: Path):
    """Writes the process's peak memory in bytes before the model is made and before each step."""

    def note(*args):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        with open(file, "a", encoding="utf-8") as f:
            f.write(f"{int(status.partition('VmHWM:')[2].split()[0]) * 1024}\n")

    before(GPT, "__init__", note)
    each_training_forward(lambda step, micro_step: note() if micro_step == 0 else None)


def jump_clock(step: int, seconds: float):
    """From this step on, the clock of the day is wrong by so much."""
    now, now_ns = time.time, time.time_ns

    def jump(at_step: int, micro_step: int):
        if at_step >= step:
            time.time = lambda: now() + seconds
            time.time_ns = lambda: now_ns() + int(seconds * 1e9)

    each_training_forward(jump)


RESOURCES = ("memory_MB", "threads", "open_files", "folder_MB")


def note_resources(folder: Path, run: Path, every: int):
    """Writes what the process holds, every so many steps, to a log per rank: memory, threads, open files, and
    its run's folder but for log.txt, which grows by some lines a step."""

    def note(step: int, micro_step: int):
        if micro_step or step % every != every - 1:
            return
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        memory, threads = (
            float(status.partition(f"{name}:")[2].split()[0]) for name in ("VmRSS", "\nThreads")
        )
        open_files, size = len(list(Path("/proc/self/fd").iterdir())), 0
        for place, _, names in os.walk(run):
            for name in set(names) - {"log.txt"}:
                with contextlib.suppress(FileNotFoundError):  # pruned just now
                    size += (Path(place) / name).stat().st_size
        held = (memory / 1000, threads, open_files, size / 1e6)
        with open(log, "a", encoding="utf-8") as f:
            f.writelines(f"{step} {stream} {value:.6g}\n" for stream, value in zip(RESOURCES, held))

    log = folder / f"rank{rank()}" / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    each_training_forward(note)


# -----------------------------------------------------------------------------
# disks and users


def hold_flush(end: str, folder: Path):
    """The disk is stuck when the thread that saves flushes a path with this end. A wait of 0.3 s is said."""
    disk.SLOW_SECONDS = 0.3

    def hold(handle: int):
        is_saver = threading.current_thread() is not threading.main_thread()
        if is_saver and str(Path(f"/proc/self/fd/{handle}").readlink()).endswith(end):
            wait_to_go_on(folder)

    os.fsync = hold


def slow_down(seconds: float):
    """The disk takes so long for each flush and rename."""
    os.fsync = lambda handle: time.sleep(seconds)
    before(Path, "rename", lambda *args: time.sleep(seconds))
    before(os, "replace", lambda *args: time.sleep(seconds))
    disk.SLOW_SECONDS = 4 * seconds


def flush_for_real():
    """preload.py replaced the call."""
    os.fsync = posix.fsync


def fail_from_operation(number: int, error: int, word: str):
    """From an operation of this number on, all that write fail with this error. Those on paths with the word
    count. Files that are open, and those that safetensors writes, can still be written."""
    left = [number]

    def count(event: str, args: tuple):
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
            event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes and word in str(args[:2]):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(error, os.strerror(error), str(args[0]))

    sys.addaudithook(count)


def become(user: int, group: int, umask: int, home: Path):
    """The process belongs to another user, who may run this Python wherever it lies."""
    show_python()
    os.environ["HOME"] = str(home)
    os.umask(umask)
    os.setgroups([])
    os.setgid(group)
    os.setuid(user)


def show_python():
    """If this Python lies in a folder that others must not enter, such as /root, this process alone sees
    another one in its place, with nothing but Python in it."""
    python = Path(sys.base_prefix)
    folders = reversed(python.parents)
    closed = next((folder for folder in folders if not folder.stat().st_mode & stat.S_IXOTH), None)
    if not closed:
        return
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *args: Any):
        if getattr(libc, name)(*args):
            raise OSError(ctypes.get_errno(), f"{name}{args}")

    new_namespace, is_bind, is_private = 0x20000, 4096, 0x4000 | 0x40000  # of all mounts
    call("unshare", new_namespace)
    handle = os.open(python, os.O_PATH)
    call("mount", b"none", b"/", None, is_private, None)
    call("mount", b"none", bytes(closed), b"tmpfs", 0, b"mode=755")
    python.mkdir(parents=True)
    call("mount", f"/proc/self/fd/{handle}".encode(), bytes(python), None, is_bind, None)
    os.close(handle)
