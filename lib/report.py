"""The lines that a training run prints: its header, its steps, its summary and what to do next."""

import math
import shlex
import sys
from pathlib import Path

from lib.cli import format_path
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


def describe_losses(vocab_size: int, entropy: float) -> str:
    return (
        f"loss   {math.log(vocab_size):.2f} if all tokens were alike, {entropy:.2f} if a model knows only "
        "how frequent each is (the validation split's unigram entropy)"
    )


def format_seconds(seconds: float) -> str:
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{hours}h{minutes % 60:02d}m" if hours else f"{minutes}m{int(seconds % 60):02d}s"


def describe_step(
    step: int, loss: float, lr: float, norm: float, seconds: float, toks: float, mfu: float, left: float
) -> str:
    """seconds: of this step; toks: tokens per second; mfu: share of the device's peak, 0 if that is unknown;
    left: seconds to the end of the run."""
    share = f" | mfu {mfu:5.1%}" if mfu else ""
    return (
        f"step {step:>6} | loss {loss:7.4f} | lr {lr:.2e} | norm {norm:7.3f} | {1000 * seconds:8.1f} ms | "
        f"{toks:9,.0f} tok/s{share} | {format_seconds(left)} left"
    )


def summarize(log: Path, max_steps: int, total_batch_tokens: int) -> str:
    """One line about the whole run, however often it was resumed, from its log.txt."""
    streams: dict[str, list[tuple[float, int]]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        step, stream, value = line.split()
        streams.setdefault(stream, []).append((float(value), int(step)))
    seconds = sum(total_batch_tokens / toks for toks, _ in streams.get("toks", []))
    text = f"{max_steps:,} steps of {total_batch_tokens:,} tokens, {format_seconds(seconds)} of training"
    if "val" in streams:
        text += "; best validation loss {:.4f} at step {}".format(*min(streams["val"]))
    if "hella" in streams:
        text += "; HellaSwag acc_norm {:.2%} at step {}".format(*streams["hella"][-1])
    return text


def suggest_next(run: Path, last_checkpoint: Path, prompt: str) -> str:
    """Commands to go on with, as one would type them here."""
    model, python = format_path(last_checkpoint), format_path(sys.executable)
    python = "python" if Path(python).is_absolute() else python  # .venv/bin/python, if it is not activated
    prompt = shlex.quote(prompt) if set(prompt) & set('"$`\\!') else f'"{prompt}"'
    return (
        f"What next:\n"
        f"  {python} generate.py --model {model} --prompt {prompt}\n"
        f"  {python} hellaswag.py --model {model} --limit 1000   # fetches 12 MB, once\n"
        f"  {python} plot.py {format_path(run)} --out loss.png"
    )
