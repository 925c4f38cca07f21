"""What several test files share: small models with lively weights, checkpoints of them, the scripts run."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import checkpoint
import shards
import tokenizer
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 50257
ABOUT = {"name": "toy", "tokenizer": {"name": "gpt2"}, "source": "tests", "parts": 1}


def random_model(seed: int = 0, **shape) -> GPT:
    """A small GPT in evaluation mode. GPT-2's own initialisation is so quiet that every token is about as
    likely as the next, and biases and gains do nothing: here they are random and large."""
    small = dict(block_size=32, vocab_size=300, n_layer=2, n_head=2, n_embd=16)
    model = GPT(GPTConfig(**{**small, **shape})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if ".ln_" in name else 0.0, 0.3, generator=generator)
        model.wte.weight[model.config.vocab_size :] = 0.0
    return model


def scripted_model(ids: list[int], block_size: int = 64) -> GPT:
    """A model with GPT-2's vocabulary that answers every position p with ids[p], whatever it reads."""
    model = GPT(GPTConfig(block_size=block_size, n_layer=1, n_head=1, n_embd=block_size)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.zero_()
        model.transformer["wpe"].weight.fill_diagonal_(1.0)  # type: ignore[union-attr]
        for position, token in enumerate(ids):
            model.wte.weight[token, position] = 0.001
    return model


def save_checkpoint(run: Path, model: GPT, step: int = 1, **state) -> Path:
    """A checkpoint as train_gpt2.py writes it, with AdamW's tensors for two parameters."""
    optimizer = {
        f"state.transformer.{name}.exp_avg": torch.full((3, 2), float(step)) for name in ("wte", "wpe")
    }
    files = tokenizer.hf_files() if model.config.vocab_size == VOCAB_SIZE else {"tokenizer.json": "{}"}
    return checkpoint.save(run, step, model.config, model.state_dict(), optimizer, state, files)


def write_shards(
    folder: Path, *pieces: np.ndarray, shard_tokens: int = 100, val_tokens: int | None = 10
) -> dict:
    """A data set of one part; returns its manifest."""
    plan = shards.plan_of(shards.begin(folder, ABOUT))
    with shards.PartWriter(folder, 0, shard_tokens, val_tokens, plan=plan) as writer:
        for piece in pieces:
            writer.write(piece)
        writer.close()
    return shards.merge(folder)


def run_script(name: str, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Runs one of the scripts as a user does, on one thread."""
    command = [sys.executable, str(ROOT / name), *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, input=stdin, capture_output=True, encoding="utf-8", env=env, timeout=120)
