"""The lines that a training run prints: its header, its steps, its summary and what to do next."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lib import console, run_log
from lib.cli import format_command, format_path
from lib.device import peak_flops
from lib.files import ROOT
from model import GPTConfig


def describe_model(model_config: GPTConfig) -> str:
    return (
        f"GPT-2, {model_config.num_params:,} parameters: {model_config.n_layer} layers, "
        f"{model_config.n_head} heads, {model_config.n_embd} channels, {model_config.block_size} positions"
    )


def describe_batch(total_tokens: int, batch_size: int, seq_len: int, world_size: int, why: str = "") -> str:
    micro_steps = total_tokens // (batch_size * seq_len * world_size)
    return (
        f"batch  {total_tokens:,} tokens = {batch_size} sequences x {seq_len} tokens x "
        f"{world_size} processes x {micro_steps} micro-steps{f' ({why})' if why else ''}"
    )


def describe_setup(setup: Any, why: str) -> str:
    """A run's model, device, precision and data. setup: train_gpt2.py's; why: the reason of the precision."""
    cfg, device, shape = setup.cfg, setup.process.device, setup.model.config
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    lines = [f"model  {describe_model(shape)}; {cfg.optimizer}"]
    dtype = str(setup.dtype).removeprefix("torch.")
    used, planned = f"{device}{gpu}, {dtype} ({why})", f"{cfg.plan_for} (planned, not used), {dtype}"
    lines.append(f"device {planned if cfg.plan_for else used}")
    if reader := setup.train_data:
        epochs = cfg.max_steps * (cfg.total_batch_tokens // cfg.seq_len) / reader.num_windows
        folder = format_path(reader.folder.folder)
        lines.append(f"data   {folder}: {reader.num_tokens:,} training tokens, {epochs:.2f} epochs")
    if math.isfinite(setup.entropy):
        uniform = math.log(shape.vocab_size)
        lines.append(
            f"loss   in nats per token; uniform guessing has {uniform:.2f}, and guessing by each token's "
            f"frequency {setup.entropy:.2f} (the unigram entropy)"
        )
    return "\n".join(lines)


def describe_run(
    cfg: Any, batch_size: int, why: str, world_size: int, folder: Path, resumed_step: int | None
) -> str:
    """The lines before the first step. cfg: train_gpt2.py's settings; why: the batch size's reason."""
    lines = [describe_batch(cfg.total_batch_tokens, batch_size, cfg.seq_len, world_size, why)]
    if cfg.fsdp:
        lines.append(f"fsdp   {1 / world_size:.0%} of weights, gradients and optimizer state per process")
    if cfg.warmup_steps > cfg.max_steps:
        lines.append(f"note   the run ends within its {cfg.warmup_steps} steps of warm-up (--warmup-steps)")
    resumed = "" if resumed_step is None else f", resumed at step {resumed_step}"
    lines.append(f"run    {format_path(folder)}{resumed}")
    lines.append(f"stop   by Ctrl-C, which saves first; --resume {format_path(folder)} goes on")
    return "\n".join(lines)


def format_seconds(seconds: float) -> str:
    if not seconds < 1e9:  # 30 years
        return "years"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{hours}h{minutes % 60:02d}m" if hours else f"{minutes}m{int(seconds % 60):02d}s"


def format_step(step: int, max_steps: int) -> str:
    return f"step {step:>{len(str(max_steps))}}/{max_steps}"


def describe_evaluation(step: int, max_steps: int, stream: str, figure: float, remarks: Sequence[str]) -> str:
    """An evaluation's line, which stands out."""
    fields = [format_step(step, max_steps), run_log.describe_figure(stream, figure), *remarks]
    return console.emphasize(console.fit(fields))


def print_sample(text: str):
    print(console.fold(f"sample | {text!r}", indent="       | "), flush=True)


class Console:
    """Makes the line of each step. Knows the time to the end, evaluations included, and, if the device's peak
    is known, MFU: model FLOP/s as a share of the peak (Chowdhery et al., 2022, arXiv:2204.02311, app. B).

    cfg: train_gpt2.py's settings; evaluations: the names of its periodic ones.
    """

    def __init__(
        self,
        cfg: Any,
        flops_per_token: float,
        device: torch.device,
        dtype: torch.dtype,
        world_size: int,
        evaluations: set[str],
    ):
        self.cfg, self.flops = cfg, flops_per_token
        self.peak = peak_flops(device, dtype) * world_size
        intervals = [getattr(cfg, f"{name}_every") for name in evaluations]
        self.evaluate_every = min(intervals, default=cfg.max_steps + 1)
        self.seconds = self.pauses = 0.0  # in steps, and between them
        self.steps = self.evaluations = 0
        self.last = time.perf_counter()

    def seconds_left(self, step: int, seconds: float) -> float:
        """Estimates the time to the end from the steps and evaluations so far. Call it once per step."""
        now, cfg = time.perf_counter(), self.cfg
        self.seconds, self.steps = self.seconds + seconds, self.steps + 1
        self.pauses, self.last = self.pauses + now - self.last - seconds, now
        self.evaluations += step % self.evaluate_every == 0
        pause = self.pauses / max(1, self.evaluations)
        evaluations = math.ceil((cfg.max_steps - step) / self.evaluate_every)
        return self.seconds / self.steps * (cfg.max_steps - step - 1) + pause * evaluations

    def describe_step(self, step: int, loss: float, lr: float, norm: float, seconds: float) -> str:
        """The line of a step: what matters most comes first, because a narrow terminal cuts the end. Returns
        "" for steps that --print-every leaves out."""
        cfg, toks, left = self.cfg, self.cfg.total_batch_tokens / seconds, self.seconds_left(step, seconds)
        if not cfg.print_every or (step % cfg.print_every and step < cfg.max_steps - 1):
            return ""
        fields = [f"{format_step(step, cfg.max_steps)} | loss {loss:7.4f}", f"{format_seconds(left):>6} left"]
        fields += [f"{toks:7,.0f} tok/s", f"lr {lr:.2e}", f"norm {norm:6.3f}", f"{1000 * seconds:6.0f} ms"]
        if self.peak:
            fields.append(f"mfu {toks * self.flops / self.peak:5.1%}")
        return console.fit(fields)


def summarize(log: Path, max_steps: int, total_batch_tokens: int) -> str:
    """One line about the whole run, however often it was resumed, from its log.txt."""
    streams: dict[str, list[tuple[float, int]]] = {}
    for step, stream, value, _ in run_log.read(log):
        if math.isfinite(value):
            streams.setdefault(stream, []).append((value, step))
    seconds = sum(total_batch_tokens / toks for toks, _ in streams.get("toks", []) if toks > 0)
    text = f"{max_steps:,} steps of {total_batch_tokens:,} tokens, {format_seconds(seconds)} of training"
    if "val" in streams:
        text += "; best validation loss {:.4f} at step {}".format(*min(streams["val"]))
    for name, figures in streams.items():
        if name != "val" and run_log.find_stream(name).is_evaluation:
            text += f"; {run_log.describe_figure(name, figures[-1][0])} at step {figures[-1][1]}"
    return text


def suggest_resume(run: Path) -> str:
    return format_command(ROOT / "train_gpt2.py", "--resume", run)


def suggest_next(last_checkpoint: Path, prompt: str) -> str:
    """Commands to go on with, as one would type them here."""
    generate = (ROOT / "generate.py", "--model", last_checkpoint)
    return (
        f"What next:\n"
        f"  {format_command(*generate, '--prompt', prompt)}\n"
        f"  {format_command(*generate, '--interactive')}\n"
        f"  {format_command('jupyter', 'lab', ROOT / 'play.ipynb')}   # after pip install jupyterlab"
    )
