"""Stage 3: perplexity of a model on a text or on a split of token shards.

    python perplexity.py --model gpt2 --data wiki.test.raw
    python perplexity.py --data data/pydocs             # the validation split, the newest checkpoint
    python perplexity.py --data book.txt --stride 512 --json book.json
    python perplexity.py --model gpt2 --data data/wikitext-103 --split test --protocol wikitext
    (its shards: python fineweb.py --source wikitext-103)

Three figures of the same total, in nats, of -log p(token | what came before):

    token perplexity   exp(total / tokens), tokens being GPT-2's
    word perplexity    exp(total / words), words being what white space parts: comparable between tokenizers
    bits a byte        total / ln 2 / bytes of UTF-8: comparable between languages, too

The protocol says what came before, and is to be named with the figure:

    stride     one stream of tokens. Each window reads a full context and scores what the window before it
               did not hold; with the default stride of half a context a scored token has at least half a
               context before it. So does Hugging Face's guide "Perplexity of fixed-length models", but it
               weighs an overlapping window's mean by one token too few, and so differs slightly
    rolling    lm_eval's loglikelihood_rolling: each document by itself, after <|endoftext|>, all its tokens
               scored. A window begins with the last token of the one before; a long document's last window
               is filled up with what came before. Words are counted as lm_eval does
    wikitext   lm_eval's task of that name: rolling, over WikiText's pages as lm_eval cuts and detokenizes
               them; words and bytes are those of the pages as they were

GPT-2 124M on WikiText-103's test set: 37.50 in the paper, 37.37 by word in lm_eval (protocol wikitext), 29.94
by token as Hugging Face counts.
"""

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro
from tqdm import tqdm

from lib import shards, tokenizer
from lib.checkpoint import load_model
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
    protocol: Literal["stride", "rolling", "wikitext"] = "stride"
    """What a token is scored after: a strided window of the stream, or as lm_eval has it (see above)."""
    stride: int = 0
    """Tokens from one window to the next; 0 for half a context, the model's context for no overlap."""
    limit: int = 0
    """Score only the first so many tokens; 0 for all."""
    batch_size: int = 8
    """Windows at a time."""
    json: str = ""
    """Also write the figures to this file."""


def check(cfg: Config):
    """Raises ValueError for a value that cannot work with any model."""
    for name, value, least in (("limit", cfg.limit, 0), ("batch-size", cfg.batch_size, 1)):
        if value < least:
            raise ValueError(f"--{name} is {value}; it must be at least {least}")
    if cfg.stride and cfg.protocol != "stride":
        raise ValueError(f"--stride is {cfg.stride}; the protocol {cfg.protocol} sets it: leave it out")


def load_ids(cfg: Config) -> np.ndarray:
    """The tokens to score, (N,). Raises FileNotFoundError for a path that is not there, ValueError for one
    that holds no text."""
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


# -----------------------------------------------------------------------------
# protocols: which tokens are scored, after which others


class Window(NamedTuple):
    tokens: np.ndarray  # what is read, and one more
    scored: int  # so many of the last of them


def strided(ids: np.ndarray, context: int, stride: int) -> list[Window]:
    """Windows of ids (N,), each `stride` after the one before, that score what no earlier one held; but for
    the first token of a window, which has nothing before it. Raises ValueError for an impossible stride."""
    if not 1 <= stride <= context:
        raise ValueError(f"--stride is {stride}; it must be between 1 and the model's context of {context}")
    windows, reached = [], 0
    for begin in range(0, len(ids), stride):
        tokens = ids[begin : begin + context]
        if len(tokens) > 1:
            windows.append(Window(tokens, min(begin + len(tokens) - reached, len(tokens) - 1)))
        reached = begin + len(tokens)
        if reached == len(ids):
            break
    return windows


def rolling(ids: np.ndarray, context: int) -> list[Window]:
    """Windows of one document's ids (N,) that score each of them once, the first after an <|endoftext|>.
    Every window but a short document's reads a full context, so the last goes back to what was scored."""
    stream = np.concatenate([[tokenizer.END_OF_TEXT], ids])
    ends = [*range(context, len(ids), context), len(ids)]
    return [
        Window(stream[max(0, end - context) : end + 1], end - begin) for begin, end in zip([0, *ends], ends)
    ]


def documents(ids: np.ndarray) -> list[np.ndarray]:
    """The documents in a stream of tokens, without the <|endoftext|> before each."""
    parts = np.split(ids, np.flatnonzero(ids == tokenizer.END_OF_TEXT))
    parts = [part[part != tokenizer.END_OF_TEXT] for part in parts]
    return [part for part in parts if len(part)]


def wikitext_pages(text: str) -> list[str]:
    """WikiText's text as the pages of EleutherAI/wikitext_document_level, lm_eval's data: each begins with a
    line " = Title = " (62 in the test set)."""
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        joined = line.replace("= = =", "===").replace("= =", "==").strip()
        if joined.startswith("= ") and joined.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    first, *others = ["\n".join(page) for page in pages]
    return [first, *others] if first.strip() or not others else others


def detokenize(page: str) -> str:
    """WikiText's spaced-out signs as they stand in prose: lm_eval's wikitext_detokenizer, rule by rule, but
    for the one about slashes, which no page meets."""
    page = page.replace("s '", "s'")
    for sign in "-,.":
        page = page.replace(f" @{sign}@ ", sign)
    for sign in ":;.!?,":
        page = page.replace(f" {sign} ", f"{sign} ")
    for left, right in ("()", "[]", "{}", '""', "''"):
        page = re.sub(rf"\{left}\s*([^\{right}]*?)\s*\{right}", rf"{left}\1{right}", page)
    for equals in ("= = = =", "= = =", "= ="):
        page = page.replace(equals, equals.replace(" ", ""))
    for spaced, closed in ((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")):
        page = page.replace(spaced, closed)
    return page


@torch.inference_mode()
def total_nll(model: GPT, windows: list[Window], batch_size: int = 8) -> tuple[float, int]:
    """The sum of -log p(token | the tokens before it in its window), in nats, and the number of tokens
    scored."""
    device = model.wte.weight.device
    windows = sorted(windows, key=lambda window: len(window.tokens))  # little padding
    total, count = 0.0, 0
    for first in tqdm(range(0, len(windows), batch_size), desc="perplexity", unit="batch", disable=None):
        batch = windows[first : first + batch_size]
        padded = np.zeros((len(batch), len(batch[-1].tokens)), dtype=np.int64)
        is_scored = np.zeros(padded.shape, dtype=bool)
        for r, (row, scored) in enumerate(batch):
            padded[r, : len(row)] = row
            is_scored[r, len(row) - scored : len(row)] = True
        tokens, mask = torch.from_numpy(padded).to(device), torch.from_numpy(is_scored[:, 1:]).to(device)
        losses = model.token_losses(model.hidden(tokens[:, :-1])[mask], tokens[:, 1:][mask])
        total += losses.sum().item()
        count += losses.numel()
    return total, count


# -----------------------------------------------------------------------------


def count_words(text: bytes, cfg: Config) -> int:
    """What white space parts; for lm_eval also the nothing before a blank at a text's begin or after one at
    its end."""
    words = text.decode("utf-8", errors="replace")
    return len(words.split() if cfg.protocol == "stride" else re.split(r"\s+", words))


def measure(model: GPT, ids: np.ndarray, cfg: Config) -> dict:
    """The figures of a stream of tokens (N,) under cfg's protocol."""
    context = model.config.block_size
    stride = cfg.stride or (max(1, context // 2) if cfg.protocol == "stride" else context)
    parts = documents(ids)
    if not parts:
        raise ValueError(f"{cfg.data} holds no text")
    texts = [tokenizer.decode_bytes(part) for part in parts]
    if cfg.protocol == "wikitext":
        pages = wikitext_pages(b"".join(texts).decode("utf-8", errors="replace"))
        texts = [page.encode() for page in pages]
        parts = [np.array(tokenizer.encode(detokenize(page))) for page in pages]
    if cfg.protocol == "stride":
        total, count = total_nll(model, strided(ids, context, stride), cfg.batch_size)
        whole = total / count * (len(ids) - 1)  # the unscored first tokens of windows count as the average
    else:
        windows = [window for part in parts for window in rolling(part, context)]
        total, count = total_nll(model, windows, cfg.batch_size)
        whole = total
    size, words = sum(map(len, texts)), sum(count_words(text, cfg) for text in texts)
    return {
        "protocol": cfg.protocol,
        "context": context,
        "stride": stride,
        "documents": len(texts),
        "tokens": count,
        "words": words,
        "bytes": size,
        "token_perplexity": math.exp(total / count),
        "word_perplexity": math.exp(min(700.0, whole / max(1, words))),
        "bits_per_byte": whole / math.log(2) / size,
    }


def main(cfg: Config) -> dict:
    check(cfg)
    ids = load_ids(cfg)
    model, source = load_model(cfg.model, cfg.device)
    result = {"model": source, "data": cfg.data, **measure(model, ids, cfg)}
    how = f"{result['protocol']}, context {result['context']}, stride {result['stride']}"
    print(f"{cfg.data}, {source}: protocol {how}")
    print(f"token perplexity {result['token_perplexity']:10.2f}   over {result['tokens']:,} tokens")
    print(f"word perplexity  {result['word_perplexity']:10.2f}   over {result['words']:,} words")
    print(f"bits a byte      {result['bits_per_byte']:10.4f}   over {result['bytes']:,} bytes")
    if cfg.json:
        Path(cfg.json).write_text(json.dumps(result, indent=2), encoding="utf-8")
    return result


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"perplexity.py: {error}", file=sys.stderr)
        sys.exit(2)
