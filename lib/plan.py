"""The cost of a run before it starts: memory by part, the largest batch that fits, hours, money.

    python train_gpt2.py --dry-run                   # memory and time, on this machine, of the run
    python train_gpt2.py --plan-for 8xH100           # the same on GPUs that are not here
    python train_gpt2.py --batch-size auto           # trains with the largest batch that fits this device

Memory is counted tensor by tensor from model.py. Tests compare it with the measured peak of real steps.
"""

import contextlib
import dataclasses
import math
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib import cli, report
from lib.device import GPUS, autocast, peak_flops
from lib.environment import read_number
from lib.processes import Process
from model import GPT, GPTConfig, LinearCrossEntropy

MFU = 0.4  # model FLOPs utilisation that a plan assumes
PRODUCT_SHARE = 0.6  # of the measured speed of large products, where no peak is known (docs/results.md#speed)
PARTS = {"loss": "logits and loss", "gathered": "gathered weights", "optimizer": "optimizer state"}
PLAN_ROOM = 0.9  # share of a GPU's memory that --plan-for fills
HEADROOM = {"tried": 0.1, "computed": 0.2}  # share of free memory that --batch-size auto leaves free


@dataclass(frozen=True)
class Workload:
    """Everything that the memory of a training step depends on."""

    model_config: GPTConfig
    seq_len: int = 1024
    total_batch_tokens: int = 524_288
    optimizer: str = "adamw"
    world_size: int = 1
    dtype: torch.dtype = torch.bfloat16
    device_type: str = "cuda"
    fsdp: bool = False
    recompute: bool = False

    @classmethod
    def from_settings(cls, cfg: Any, model: GPT, dtype: torch.dtype, process: Process) -> "Workload":
        """A step of a run. A dry run does not start --num-gpus, but counts them."""
        world_size = max(process.world_size, cfg.num_gpus) if cfg.dry_run else process.world_size
        return cls(
            model.config, cfg.seq_len, cfg.total_batch_tokens, cfg.optimizer, world_size, dtype,
            "cuda" if cfg.plan_for else process.device.type, cfg.fsdp, cfg.activation_checkpointing,
        )  # fmt: skip

    def finds_gradients(self, batch_size: int) -> bool:
        """Whether a micro-step's backward pass finds gradients: those of an earlier one, or the buckets of
        DistributedDataParallel, in which they always lie."""
        is_copied = self.world_size > 1 and not self.fsdp
        return is_copied or self.total_batch_tokens > batch_size * self.seq_len * self.world_size

    @property
    def share(self) -> float:
        """The share of weights, gradients and optimizer state that one process holds."""
        return 1 / self.world_size if self.fsdp else 1.0

    def step_bytes(self, batch_size: int) -> dict[str, float]:
        """Peak memory of one process in a step without torch.compile, bytes by part. The peak is at the loss
        or, for small batches, when all gradients exist."""
        model_config, width = self.model_config, self.dtype.itemsize
        C, L, P = model_config.n_embd, model_config.n_layer, model_config.num_params
        N, embedding, matrices = batch_size * self.seq_len, model_config.padded_vocab_size * C, 12 * L * C * C
        on_cpu, is_cast = self.device_type == "cpu", width < 4
        is_divided = self.fsdp and self.world_size > 1
        finds_gradients = self.finds_gradients(batch_size)

        # A layer keeps, in bytes per channel: the residual stream twice (CUDA's autocast makes it float32
        # for LayerNorm), both LayerNorms' outputs, q, k, v, the attention's output, and the MLP's inside
        # before and after GELU, four times as wide.
        residual = width if on_cpu and self.dtype == torch.bfloat16 else 4
        layer = 2 * residual + 2 * width + 3 * width + width + 2 * 4 * width
        if model_config.dropout and on_cpu:
            # Two masks; attention keeps T x T numbers three times. All of it is float32.
            layer += 2 * width + 3 * 4 * model_config.n_head * self.seq_len / C + 6 * is_cast
        elif model_config.dropout:  # two masks of bytes
            layer += 2
        is_half = self.dtype == torch.bfloat16
        layers = (2 if is_half else 4) * L + layer if self.recompute else L * layer  # else the inputs only
        cast = matrices / L if self.recompute else matrices  # autocast's copies
        # LinearCrossEntropy holds the embedding's gradient and, if cast, its copy. To them it adds a chunk's
        # logits and log-softmax, or the chunk's share of the gradient (which a CPU casts, too).
        chunk = LinearCrossEntropy.count_rows(N) * model_config.padded_vocab_size
        kept = embedding * (4 + width * is_cast)
        at_logits = kept + chunk * (4 + 4)
        at_gradient = kept + chunk * (4 + width * is_cast) + embedding * (width + 4 * (is_cast and on_cpu))

        # FSDP gathers the embeddings for the step, and two blocks at a time.
        root = 4 * (embedding + model_config.block_size * C)
        always = {
            "weights": 4 * P * self.share,
            "gathered": (root + 2 * 4 * matrices / L) * is_divided,
            "optimizer": (8 * P - 4 * matrices * (self.optimizer == "muon")) * self.share,
        }
        at_loss = always | {
            "weights": 4 * P * self.share + width * cast * is_cast,
            "gradients": 4 * P * self.share * finds_gradients,
            "activations": N * C * (layers + 4 + 3 * width),
            "loss": max(at_logits, at_gradient),
        }
        # The embedding's gradient is the sum of two; FSDP shards it only when it is complete.
        at_end = always | {"gradients": 4 * (P * self.share + (3 if is_divided else 2) * embedding)}
        # Muon's largest batch is a third of all matrices: their updates, and four tensors in bfloat16.
        muon = (4 * self.share + 4 * 2) * matrices / 3 * (self.optimizer == "muon")
        at_muon = always | {"gradients": 4 * P * self.share, "muon": muon}
        parts = max(at_loss, at_end, at_muon, key=lambda parts: sum(parts.values()))
        if on_cpu:  # measured: torch's kernels, and holes in a heap that is never trimmed (pick_device)
            parts |= {"rest": 0.1 * sum(parts.values()) + 0.1e9}
        return {name: float(size) for name, size in parts.items() if size}

    def saving_bytes(self) -> int:
        """Main memory for the copies while a checkpoint is written: weights, optimizer state, and the weights
        in Hugging Face's layout."""
        return (4 + 8 + 4) * self.model_config.num_params

    def largest_batch(self, fits: Callable[[int], bool], below: float = math.inf) -> int:
        """The largest batch size that fits and divides a process's share of a step; 0 if none does."""
        share = self.total_batch_tokens // (self.seq_len * self.world_size)
        return next((n for n in range(share, 0, -1) if share % n == 0 and n < below and fits(n)), 0)

    def fitting_batch(
        self, model: GPT, device: torch.device, below: float = math.inf, has_optimizer_state: bool = False
    ) -> tuple[int, str]:
        """The largest batch (below some size) that fits the device's memory (0: none), and the reason. On
        CUDA, real steps are tried; elsewhere, and for a sharded or meta model, `step_bytes` decides."""
        is_there = not model.wte.weight.is_meta
        is_tried = device.type == "cuda" and is_there and not self.fsdp
        how = "tried" if is_tried else "computed"
        if is_tried:
            # CUDA's libraries take memory in the first step and never return it.
            peak_of_step(model, 1, self.seq_len, self.dtype, 0, False)
        free, source = free_memory(device, self.world_size)
        held = self.step_bytes(1)["optimizer"] if has_optimizer_state else 0.0
        # What the process holds already is part of a step.
        free += 4 * self.model_config.num_params * self.share * is_there + held
        room = free * (1 - HEADROOM[how]) - self.saving_bytes() * (device.type == "cpu")

        def fits(batch_size: int) -> bool:
            parts = self.step_bytes(batch_size)
            if not is_tried:
                return sum(parts.values()) <= room
            if sum(parts.values()) > 1.3 * room:  # far too large to try
                return False
            beside, finds_gradients = parts["optimizer"] - held, self.finds_gradients(batch_size)
            return peak_of_step(model, batch_size, self.seq_len, self.dtype, beside, finds_gradients) <= room

        account = (
            f"{how}: within {room / 1e9:.1f} GB of the {free / 1e9:.1f} GB that are {source}, of which "
            f"{HEADROOM[how]:.0%} are left alone"
        )
        return self.largest_batch(fits), account


@contextlib.contextmanager
def refuse_too_large_batches(
    cfg: Any, model: GPT, dtype: torch.dtype, process: Process, has_optimizer_state: bool
) -> Iterator[None]:
    """For the trial passes of a run. If the device runs out of memory, raises ValueError with the batch that
    fits. An optimizer's state that does not exist yet is represented by an empty tensor of its size. cfg:
    train_gpt2.py's settings."""
    work, placeholder = Workload.from_settings(cfg, model, dtype, process), None
    try:
        if process.device.type == "cuda" and not has_optimizer_state:
            size = int(work.step_bytes(cfg.batch_size)["optimizer"])
            placeholder = torch.empty(size, dtype=torch.uint8, device=process.device)
        yield
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # they keep tensors alive
        del placeholder
        model.zero_grad(set_to_none=True)
        fitting, why = work.fitting_batch(model, process.device, cfg.batch_size, has_optimizer_state)
        advice = f"{fitting} fits ({why}): give --batch-size {fitting}, or auto"
        if not fitting:
            advice = f"no smaller one fits ({why}): take a smaller --model-size or --seq-len"
        raise ValueError(
            f"--batch-size {cfg.batch_size} runs out of memory on {process.device}; {advice}"
        ) from None


def peak_of_step(
    model: GPT, batch_size: int, seq_len: int, dtype: torch.dtype, beside: float, has_gradients: bool
) -> float:
    """Peak GPU memory of a real forward and backward pass, in bytes; inf if it runs out of memory.

    beside: bytes to occupy meanwhile; has_gradients: whether gradients exist before.
    """
    device, peak = model.wte.weight.device, math.inf
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(torch.OutOfMemoryError):
        others = torch.empty(int(beside), dtype=torch.uint8, device=device)
        for p in model.parameters() if has_gradients else ():
            p.grad = torch.zeros_like(p)
        idx = torch.zeros(batch_size, seq_len, dtype=torch.long, device=device)
        with autocast(device, dtype, cache=not model.recompute):
            loss = model.train()(idx, idx)
        loss.backward()
        peak = torch.cuda.max_memory_reserved(device)
        del others, loss
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return peak


def free_memory(device: torch.device, processes: int) -> tuple[float, str]:
    """Bytes that this process, one of several, may still take on its device, and the source of the figure.
    Raises ValueError if the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached, "free on the GPU"
    if device.type == "mps":
        taken = torch.mps.driver_allocated_memory()
        return torch.mps.recommended_max_memory() - taken, "what Metal recommends"
    if Path("/proc/meminfo").exists():
        lines = Path("/proc/meminfo").read_text(encoding="utf-8")
        available = 1024 * int(lines.partition("MemAvailable:")[2].split()[0])
        free, source = min((available, "MemAvailable"), (cgroup_room(), "within the limit of its cgroup"))
    else:
        try:
            free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
        except (AttributeError, ValueError, OSError) as error:  # Windows
            raise ValueError("this system does not say how much memory is free: give --batch-size") from error
        source = "half of this machine's memory"
    local = read_number("LOCAL_WORLD_SIZE", processes, at_least=1)
    return free / local, f"{source} for each of {local} processes" if local > 1 else source


def cgroup_room(root: Path = Path("/")) -> float:
    """Bytes left by this process's memory limits (a container's, SLURM's); inf if there is no limit."""
    room, groups = math.inf, root / "proc/self/cgroup"
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.exists() else ():
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, limit, used = {
            "": ("sys/fs/cgroup", "memory.max", "memory.current"),
            "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        }[controllers]
        inside = root / top / group.lstrip("/")
        for folder in (inside, *inside.parents):
            # Without a limit the file is missing or holds no number. The page cache counts as free.
            with contextlib.suppress(OSError, ValueError, IndexError):
                stat = (folder / "memory.stat").read_text(encoding="utf-8")
                taken = int((folder / used).read_text(encoding="utf-8"))
                taken -= int(stat.partition("\ninactive_file ")[2].split()[0])
                room = min(room, int((folder / limit).read_text(encoding="utf-8")) - taken)
    return room


def check_batch(cfg: Any, world_size: int):
    """Raises ValueError, with the nearest settings that work, if a step is no whole number of micro-steps.
    cfg: train_gpt2.py's settings."""
    rows, total = 1 if cfg.batch_size == "auto" else cfg.batch_size, cfg.total_batch_tokens
    micro_step = rows * cfg.seq_len * world_size
    if total % micro_step:
        below = total // micro_step * micro_step
        near = f"--total-batch-tokens {' or '.join(f'{n}' for n in (below, below + micro_step) if n)}"
        share, rest = divmod(total, cfg.seq_len * world_size)
        if not rest:
            fitting = [n for n in range(1, share + 1) if share % n == 0]
            smaller, larger = [n for n in fitting if n < rows][-1:], [n for n in fitting if n > rows][:1]
            near += f", or --batch-size {' or '.join(map(str, smaller + larger))}"
        raise ValueError(
            f"--total-batch-tokens {total} is no multiple of the {micro_step} tokens of a micro-step "
            f"(--batch-size {rows} x --seq-len {cfg.seq_len} x {world_size} processes); the nearest that "
            f"work: {near}"
        )


def check_memory(cfg: Any, model: GPT, dtype: torch.dtype, process: Process):
    """Raises ValueError if a step takes more memory than a CPU process may use: Linux would kill it there."""
    if process.device.type != "cpu" or cfg.dry_run or not Path("/proc/meminfo").exists():
        return
    process.barrier()  # now every process has its weights, and nothing else
    work = Workload.from_settings(cfg, model, dtype, process)
    need = sum(work.step_bytes(cfg.batch_size).values())
    free, source = free_memory(process.device, process.world_size)
    free += 4 * model.config.num_params * work.share  # the weights are part of a step
    if process.all_reduce(need > free)[0]:
        raise ValueError(
            f"a step with --batch-size {cfg.batch_size} takes about {need / 1e9:.1f} GB in each process; "
            f"{free / 1e9:.1f} GB are {source}: take a smaller --batch-size, or auto"
        )


def choose_batch_size(cfg: Any, model: GPT, dtype: torch.dtype, process: Process) -> tuple[int, str]:
    """--batch-size as a number, the same on all processes, and the reason if it is auto. Raises ValueError if
    not even one sequence fits. cfg: train_gpt2.py's settings."""
    if cfg.batch_size != "auto":
        check_memory(cfg, model, dtype, process)
        return cfg.batch_size, ""
    process.barrier()  # now every process has its weights, and nothing else
    mine, why = Workload.from_settings(cfg, model, dtype, process).fitting_batch(model, process.device)
    ranks = range(process.world_size)
    chosen = int(min(process.all_reduce(*(mine * (rank == process.rank) for rank in ranks))))
    if not chosen:
        raise ValueError(
            f"--batch-size auto: not even one sequence of {cfg.seq_len} tokens fits ({why}); a smaller "
            "--model-size or --seq-len would"
        )
    return chosen, f"auto, {why}"


def find_gpu(text: str) -> tuple[int, str]:
    """The number (0: not given) and the name in GPUS that --plan-for means: 8xH100, a100-40gb, 4090. Raises
    ValueError with the nearest names for others."""

    def simplify(name: str) -> str:
        return re.sub(r"nvidia|geforce|tesla|rtx|sxm\d?|gb|[^a-z0-9]", "", name.lower())

    known = {f"{simplify(name)}{gpu.memory / 1e9:.0f}": name for name, gpu in GPUS.items()}
    known |= {simplify(name): name for name in GPUS}
    count, name = re.fullmatch(r"(?:\s*(\d+)\s*[xX×])?(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    if simplify(name) in known and count != "0":
        return int(count or 0), known[simplify(name)]
    hint = cli.suggest(simplify(name), known)
    raise ValueError(f"--plan-for is {text!r}{hint}; give 8xH100, or one of {', '.join(GPUS)}")


def apply_plan_for(cfg: Any) -> Any:
    """cfg with what --plan-for implies: a dry run, without this machine's GPUs, of so many processes. Raises
    ValueError for GPUs that are not listed. cfg: train_gpt2.py's settings."""
    if not cfg.plan_for:
        return cfg
    count, name = find_gpu(cfg.plan_for)
    if count and cfg.num_gpus not in (1, count):
        raise ValueError(f"--plan-for is {cfg.plan_for}, but --num-gpus is {cfg.num_gpus}: leave it out")
    dtype = cfg.dtype
    if dtype == "auto" and not cfg.resume:
        dtype = "bfloat16" if GPUS[name].has_bfloat16 else "float16"
    return dataclasses.replace(cfg, dry_run=True, device="cpu", dtype=dtype, num_gpus=count or cfg.num_gpus)


def fit_gpu(cfg: Any, work: Workload, name: str) -> tuple[int, str]:
    """The batch size of a plan for a GPU, and what fits into its memory. cfg: train_gpt2.py's settings."""
    room = PLAN_ROOM * GPUS[name].memory

    def find_largest(**changes) -> int:
        other = dataclasses.replace(work, **changes)
        return other.largest_batch(lambda n: sum(other.step_bytes(n).values()) <= room)

    largest = find_largest()
    batch_size = (largest or 1) if cfg.batch_size == "auto" else cfg.batch_size
    within = f"within {PLAN_ROOM:.0%} of the {GPUS[name].memory / 1e9:g} GB of {name}"
    if largest:
        note = "" if sum(work.step_bytes(batch_size).values()) <= room else "this does not fit; "
        return batch_size, f"{note}the largest batch {within} is --batch-size {largest}"
    note = f"not even one sequence fits {within}; "
    for flags, changes in (
        ("--activation-checkpointing", dict(recompute=True)),
        ("--fsdp", dict(fsdp=True)),
        ("--fsdp --activation-checkpointing", dict(fsdp=True, recompute=True)),
    ):
        if fitting := find_largest(**changes):
            return batch_size, f"{note}--batch-size {fitting} does with {flags}"
    return batch_size, f"{note}take a smaller --model-size or --seq-len, or more GPUs and --fsdp"


def measure_products(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """The speed in FLOP/s of an MLP's first matrix product, for many tokens. Takes about half a second."""
    tokens = 4096 if device.type == "cpu" else 65536
    x, weight = (torch.randn(n, width, dtype=dtype, device=device) for n in (tokens, 4 * width))
    count, begin = -1, time.perf_counter()
    while count < 1 or time.perf_counter() - begin < 0.5:
        torch.mm(x, weight.t())
        if device.type != "cpu":
            torch.accelerator.synchronize()
        count += 1
        if not count:  # the first one warms up
            begin = time.perf_counter()
    return count * 2 * weight.numel() * len(x) / (time.perf_counter() - begin)


def describe_time(cfg: Any, work: Workload, process: Process, flops: float) -> list[str]:
    """The time that so many operations take on --plan-for's GPUs or on this machine, and given a price the
    cost. cfg: train_gpt2.py's settings."""
    gpus, name = work.world_size, find_gpu(cfg.plan_for)[1] if cfg.plan_for else ""
    peak = peak_flops(process.device, work.dtype)
    if name:
        peak = GPUS[name].peak * (work.dtype != torch.float32)
    elif process.device.type == "cuda":
        name = torch.cuda.get_device_name(process.device)
    if peak:
        seconds = flops / (MFU * peak * gpus)
        where = f"on {gpus} x {name} at {MFU:.0%} of {peak / 1e12:g} TFLOP/s, without evaluation"
    elif cfg.plan_for:
        return ["time   unknown for float32, and so is the cost: the listed peaks are of 16 bits"]
    else:
        speed = process.all_reduce(measure_products(process.device, work.dtype, work.model_config.n_embd))[0]
        if process.device.type != "cpu":  # whose processes share the cores
            speed *= gpus / process.world_size
        seconds = flops / (PRODUCT_SHARE * speed)
        where = (
            f"on this machine, without evaluation: an estimate, {PRODUCT_SHARE:.0%} of the "
            f"{speed / 1e12:.2g} TFLOP/s that its matrix products reach now. For GPUs: --plan-for 8xH100"
        )
    lines = [f"time   {report.format_seconds(seconds)} {where}"]
    if price := cfg.dollars_per_gpu_hour:
        dollars = seconds / 3600 * gpus * price
        lines.append(f"cost   {dollars:,.2f} dollars at {price:,.2f} per GPU and hour")
    return lines


def describe(cfg: Any, model: GPT, dtype: torch.dtype, process: Process, steps: int, epoch: int) -> str:
    """The plan of a run of so many steps: batch, memory by part beside what the device has, FLOPs, time and,
    given a price, the cost. cfg: train_gpt2.py's settings; epoch: its tokens, 0 if they are not known."""
    work, why = Workload.from_settings(cfg, model, dtype, process), ""
    saving = work.saving_bytes()
    if cfg.plan_for:
        batch_size, note = fit_gpu(cfg, work, find_gpu(cfg.plan_for)[1])
        parts = work.step_bytes(batch_size)
    else:
        batch_size, why = choose_batch_size(cfg, model, dtype, process)
        parts, (free, source) = work.step_bytes(batch_size), free_memory(process.device, work.world_size)
        fits = sum(parts.values()) + saving * (work.device_type == "cpu") <= free
        note = f"{free / 1e9:.2f} GB are {source}"
        note += "" if fits else "; this does not fit: take a smaller --batch-size, or auto"
    tokens, flops = steps * cfg.total_batch_tokens, work.model_config.flops_per_token(cfg.seq_len)
    lines = [
        report.describe_batch(cfg.total_batch_tokens, batch_size, cfg.seq_len, work.world_size, why),
        f"steps  {steps:,}, {tokens:,} tokens" + (f", {tokens / epoch:.2f} epochs" if epoch else ""),
        f"memory {sum(parts.values()) / 1e9:.2f} GB per process at a step's peak, about:",
        *(f"       {size / 1e9:7.2f} {PARTS.get(name, name)}" for name, size in parts.items()),
        f"       {note}",
        f"       while a checkpoint is written, its copies take {saving / 1e9:.2f} GB of main memory",
        f"flops  {flops / 1e9:.2f} GFLOP per token (forward and backward), {tokens * flops:.2e} in all",
        *describe_time(cfg, work, process, tokens * flops),
    ]
    return "\n".join(lines)
