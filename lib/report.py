"""The lines that a training run prints: its header, its steps, its summary and what to do next."""

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lib import run_log
from lib.cli import format_command, format_path
from lib.device import peak_flops
from lib.files import ROOT
from model import GPTConfig


def wrap(text: str, width: int = 80) -> str:
    """Breaks lines of a header to the width; further lines are indented by its 7 columns. Commands in
    backticks and single words are not broken."""
    lines = []
    for line in text.split("\n"):
        lines.append("")
        for word in re.findall(r"^\w*\s+\S+|`[^`]*`\S*|\S+", line):
            if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
                lines.append(" " * 6)
            lines[-1] += (" " if lines[-1] else "") + word
    return "\n".join(lines)


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
    where = f"{device}{gpu}" if not cfg.plan_for else f"{cfg.plan_for} (planned, not used)"
    lines.append(f"device {where}, {str(setup.dtype).removeprefix('torch.')} ({why})")
    if reader := setup.train_data:
        epochs = cfg.max_steps * (cfg.total_batch_tokens // cfg.seq_len) / reader.num_windows
        folder = format_path(reader.folder.folder)
        lines.append(f"data   {folder}: {reader.num_tokens:,} training tokens, {epochs:.2f} epochs")
    if math.isfinite(setup.entropy):
        uniform = math.log(shape.vocab_size)
        lines.append(
            f"loss   {uniform:.2f} if all tokens were alike, {setup.entropy:.2f} (unigram entropy of the"
        )
        lines.append("       validation split) if a model knows only how frequent each token is")
    return wrap("\n".join(lines))


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
    return "\n".join([*lines, f"run    {format_path(folder)}{resumed}"])


@contextlib.contextmanager
def note_not_finite() -> Iterator[None]:
    """Prints why no sample can be drawn, and lets training go on."""
    try:
        yield
    except ValueError as error:
        print(f"  sample | none: {error}", flush=True)


def format_finite(figure: float, form: str) -> str:
    return format(figure, form) if math.isfinite(figure) else f"is not finite ({figure})"


def format_seconds(seconds: float) -> str:
    if not seconds < 1e9:  # 30 years
        return "years"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{hours}h{minutes % 60:02d}m" if hours else f"{minutes}m{int(seconds % 60):02d}s"


class Console:
    """Makes the line of each step. Knows the time to the end and, if the device's peak is known, MFU: model
    FLOP/s as a share of the peak (Chowdhery et al., 2022, arXiv:2204.02311, appendix B)."""

    def __init__(
        self, cfg: Any, flops_per_token: float, device: torch.device, dtype: torch.dtype, world_size: int
    ):
        self.max_steps, self.batch_tokens = cfg.max_steps, cfg.total_batch_tokens
        self.flops, self.peak = flops_per_token, peak_flops(device, dtype) * world_size
        self.seconds = self.steps = 0.0

    def describe_step(self, step: int, loss: float, lr: float, norm: float, seconds: float) -> str:
        self.seconds, self.steps = self.seconds + seconds, self.steps + 1
        toks, left = self.batch_tokens / seconds, self.seconds / self.steps * (self.max_steps - step - 1)
        mfu = f" | mfu {toks * self.flops / self.peak:5.1%}" if self.peak else ""
        return (
            f"step {step:>6} | loss {loss:7.4f} | lr {lr:.2e} | norm {norm:7.3f} | "
            f"{1000 * seconds:8.1f} ms | {toks:9,.0f} tok/s{mfu} | {format_seconds(left)} left"
        )


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
    if "hella" in streams:
        text += "; HellaSwag acc_norm {:.2%} at step {}".format(*streams["hella"][-1])
    return text


def suggest_resume(run: Path) -> str:
    return format_command(ROOT / "train_gpt2.py", "--resume", run)


def suggest_next(run: Path, last_checkpoint: Path, prompt: str) -> str:
    """Commands to go on with, as one would type them here."""
    generate, hellaswag, plot = (ROOT / f"{name}.py" for name in ("generate", "hellaswag", "plot"))
    model = ("--model", last_checkpoint)
    return (
        f"What next:\n"
        f"  {format_command(generate, *model, '--prompt', prompt)}\n"
        f"  {format_command(hellaswag, *model, '--limit', '1000')}   # fetches 12 MB, once\n"
        f"  {format_command(plot, run, '--out', 'loss.png')}"
    )
