"""Stage 3: perplexity of a model on a text or on a split of token shards.

    python perplexity.py --model gpt2 --data wiki.test.raw
    python perplexity.py --data data/pydocs             # the validation split, the newest checkpoint
    python perplexity.py --data book.txt --stride 512 --json book.json

Three figures of the same total, in nats, of -log p(token | what came before):

    token perplexity   exp(total / tokens), tokens being GPT-2's
    word perplexity    exp(total / words), words being what white space parts: comparable between tokenizers
    bits a byte        total / ln 2 / bytes of UTF-8: comparable between languages, too

Each window reads a full context and scores what the window before it did not hold; with the default stride
of half a context a scored token has at least half a context before it. The stride is the protocol: name it
with the figure. GPT-2 124M on WikiText-103's test set: 37.50 in the paper, 37.37 by word in lm_eval, 29.94 by
token as Hugging Face counts, three protocols.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

import shards
import tokenizer
from checkpoint import load_model
from model import GPT


@dataclass(frozen=True)
class Config:
    data: str
    """A text file, or a folder of token shards."""
    model: str = ""
    """A checkpoint, a run folder, a size (gpt2, 124M, ...) or a Hub id; by default the newest run's
    checkpoint."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps, ..."""
    split: str = "val"
    """Which split of a folder of shards."""
    stride: int = 0
    """Tokens from one window to the next; 0 for half a context, the model's context for no overlap."""
    limit: int = 0
    """Score only the first so many tokens; 0 for all."""
    batch_size: int = 8
    """Windows at a time."""
    json: str = ""
    """Also write the figures to this file."""


def load_ids(cfg: Config) -> np.ndarray:
    """The tokens to score, (N,). Raises FileNotFoundError for a path that is not there, ValueError for one
    that holds no text."""
    for name, value, least in (("limit", cfg.limit, 0), ("batch-size", cfg.batch_size, 1)):
        if value < least:
            raise ValueError(f"--{name} is {value}; it must be at least {least}")
    path = Path(cfg.data)
    if path.is_dir():
        parts = [s for s in shards.list_shards(path) if s["split"] == cfg.split]
        if not parts:
            raise ValueError(f"{path} has no shard of the split {cfg.split!r}")
        opened = [shards.open_shard(path / s["file"], s.get("tokens")) for s in parts]
        ids = np.concatenate([shard[: cfg.limit or None] for shard in opened])
    elif path.is_file():
        ids = np.array(tokenizer.encode(path.read_text(encoding="utf-8")), dtype=np.uint16)
    else:
        raise FileNotFoundError(f"--data {cfg.data!r} is neither a text file nor a folder of shards")
    ids = ids[: cfg.limit] if cfg.limit else ids
    if len(ids) < 2:
        raise ValueError(f"{path} has {len(ids)} tokens; at least 2 are needed")
    return ids


@torch.inference_mode()
def total_nll(model: GPT, ids: np.ndarray, stride: int, batch_size: int = 8) -> tuple[float, int]:
    """The sum of -log p(token | the tokens before it in its window), in nats, and the number of tokens
    scored.

    Window w covers block_size tokens from w * stride on and scores those that no earlier window held, but for
    the first token of a window, which has nothing before it: the strided recipe of Hugging Face's guide
    "Perplexity of fixed-length models".
    """
    device, context = model.wte.weight.device, model.config.block_size
    if not 1 <= stride <= context:
        raise ValueError(f"--stride is {stride}; it must be between 1 and the model's context of {context}")
    begins = [0]
    while begins[-1] + context < len(ids):
        begins.append(begins[-1] + stride)
    total, count = 0.0, 0
    for first in tqdm(range(0, len(begins), batch_size), desc="perplexity", unit="batch", disable=None):
        batch = begins[first : first + batch_size]
        rows = [ids[begin : begin + context].astype(np.int64) for begin in batch]
        padded = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
        scored = np.zeros((len(rows), padded.shape[1] - 1), dtype=bool)  # by position of the target, less one
        for r, (row, begin) in enumerate(zip(rows, batch)):
            padded[r, : len(row)] = row
            seen = 0 if begin == 0 else context - stride  # tokens that the window before held
            scored[r, max(0, seen - 1) : len(row) - 1] = True
        tokens, mask = torch.from_numpy(padded).to(device), torch.from_numpy(scored).to(device)
        losses = model.token_losses(model.hidden(tokens[:, :-1])[mask], tokens[:, 1:][mask])
        total += losses.sum().item()
        count += losses.numel()
    return total, count


def main(cfg: Config) -> dict:
    ids = load_ids(cfg)
    model, source = load_model(cfg.model, cfg.device)
    stride = cfg.stride or max(1, model.config.block_size // 2)
    total, count = total_nll(model, ids, stride, cfg.batch_size)
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.END_OF_TEXT))
    texts = [tokenizer.decode_bytes(document[document != tokenizer.END_OF_TEXT]) for document in documents]
    words = sum(len(text.decode("utf-8", errors="replace").split()) for text in texts)
    size = sum(map(len, texts))
    per_token = total / count
    total = per_token * (len(ids) - 1)  # what the unscored first tokens of windows would have cost on average
    result = {
        "model": source,
        "data": cfg.data,
        "context": model.config.block_size,
        "stride": stride,
        "tokens": count,
        "words": words,
        "bytes": size,
        "token_perplexity": math.exp(per_token),
        "word_perplexity": math.exp(min(700.0, total / max(1, words))),
        "bits_per_byte": total / math.log(2) / max(1, size),
    }
    print(f"{cfg.data}, {source}: context {result['context']}, stride {stride}")
    print(f"token perplexity {result['token_perplexity']:10.2f}   over {result['tokens']:,} tokens")
    print(f"word perplexity  {result['word_perplexity']:10.2f}   over {words:,} words")
    print(f"bits a byte      {result['bits_per_byte']:10.4f}   over {size:,} bytes")
    if cfg.json:
        Path(cfg.json).write_text(json.dumps(result, indent=2), encoding="utf-8")
    return result


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"perplexity.py: {error}", file=sys.stderr)
        sys.exit(2)
