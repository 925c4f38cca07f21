"""Stage 3: perplexity of a model on a text or on a split of token shards.

    python perplexity.py --data data/pydocs             # the validation split, the newest checkpoint
    python perplexity.py --model gpt2 --data book.txt --stride 512 --json book.json
    python perplexity.py --model gpt2 --data data/wikitext-103 --split test --protocol wikitext
    (its shards: python fineweb.py --source wikitext-103)

Prints three figures of the same total, the sum of -log p(token | earlier tokens) in nats:

    token perplexity   exp(total / tokens), with GPT-2's tokens
    word perplexity    exp(total / words), with words split at white space: comparable between tokenizers
    bits per byte      total / ln 2 / bytes of UTF-8: comparable between languages, too

The protocol defines the earlier tokens. Name it with the figure:

    stride     The text is one stream of tokens. Each window is a context long, begins --stride tokens after
               the one before, and scores the tokens that are new. Hugging Face's guide "Perplexity of
               fixed-length models" weighs an overlapping window by one token too few: it differs slightly
    rolling    lm_eval's loglikelihood_rolling: each document by itself, after <|endoftext|>. All its tokens
               are scored, each once. The last window of a long document reaches back to a full context
    wikitext   lm_eval's task of that name: rolling over WikiText's pages, which lm_eval splits and
               detokenizes. Words and bytes are those of the original pages

GPT-2 124M on WikiText-103's test set: 37.50 in the paper; 37.37 per word in lm_eval (protocol wikitext);
29.94 per token in Hugging Face's guide.
"""

import lib.startup  # noqa: F401

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from lib import cli, documents, files, shards, tokenizer
from lib.checkpoint import load_model
from lib.device import autocast, cast_linears, pick_dtype
from model import GPT


@dataclass(frozen=True)
class Config:
    data: cli.PathName = cli.knob(
        dataclasses.MISSING, "a file of text, JSON lines or parquet, or a folder of shards"
    )
    model: cli.PathName = cli.knob(
        "", "a checkpoint, run folder, size (gpt2) or Hub id; by default the newest run"
    )
    device: str = cli.knob("auto", "auto, cpu, cuda, cuda:1, mps")
    split: str = cli.knob("val", "the split of a folder of shards")
    protocol: Literal["stride", "rolling", "wikitext"] = cli.knob(
        "stride", "what counts as the earlier tokens, as described"
    )
    stride: int = cli.knob(0, "tokens from one window to the next; 0 for half the model's context")
    limit: int = cli.knob(0, "score only this many first tokens; 0 for all", at_least=0)
    batch_size: int = cli.knob(8, "windows per batch", at_least=1)
    dtype: cli.Dtype = cli.knob(
        "float32", "precision of the matrix products, auto for the fastest; logits are always float32"
    )
    json: cli.PathName = cli.knob("", "also write the figures to this file")


def load_ids(cfg: Config) -> np.ndarray:
    """The tokens to score, (N,). Raises FileNotFoundError for a missing path, ValueError without text."""
    path = Path(cfg.data)
    if path.is_dir():
        parts = [s for s in shards.list_shards(path) if s["split"] == cfg.split]
        if not parts:
            raise ValueError(f"{path} has no shard of the split {cfg.split!r}")
        opened = [shards.open_entry(path, entry) for entry in parts]
        ids = np.concatenate([shard[: cfg.limit + 1 if cfg.limit else None] for shard in opened])
    elif path.exists():  # the same stream of tokens as its shards have
        batches = (tokenizer.encode_corpus(b.texts, b.continues) for b in documents.read_file(path))
        ids = np.concatenate([np.empty(0, np.uint16), *batches])
    else:
        raise FileNotFoundError(f"--data {cfg.data!r} is neither a text file nor a folder of shards")
    begin = int(len(ids) > 0 and ids[0] == tokenizer.END_OF_TEXT)  # before a text's first token is nothing
    ids = ids[begin : cfg.limit + begin if cfg.limit else None]
    if len(ids) < 2:
        raise ValueError(f"{path} has no text to score: {len(ids)} tokens; at least 2 are needed")
    return ids


# -----------------------------------------------------------------------------
# protocols: windows of tokens, and which of them are scored


class Window(NamedTuple):
    tokens: np.ndarray  # the tokens that are read, and one more
    scored: int  # how many of the last tokens are scored


def make_strided_windows(ids: np.ndarray, context: int, stride: int) -> list[Window]:
    """Windows of ids (N,), each `stride` tokens after the one before. A window scores the tokens that no
    earlier window contains, but never its own first token, which has nothing before it. Raises ValueError
    for an impossible stride."""
    if not 1 <= stride <= context:
        raise ValueError(f"--stride is {stride}; it must be between 1 and the model's context of {context}")
    windows, reached = [], 0
    for begin in range(0, max(1, len(ids) - context + stride), stride):
        tokens = ids[begin : begin + context]
        if len(tokens) > 1:
            windows.append(Window(tokens, min(begin + len(tokens) - reached, len(tokens) - 1)))
        reached = begin + len(tokens)
    return windows


def make_rolling_windows(ids: np.ndarray, context: int) -> list[Window]:
    """Windows of one document's ids (N,) that score each token once, the first after an <|endoftext|>.
    Each reads a full context, and so the last overlaps the one before, unless the document is shorter."""
    stream = np.concatenate([[tokenizer.END_OF_TEXT], ids])
    ends = [*range(context, len(ids), context), len(ids)]
    starts = [0, *ends]
    return [Window(stream[max(0, end - context) : end + 1], end - start) for start, end in zip(starts, ends)]


def split_documents(ids: np.ndarray) -> list[np.ndarray]:
    """The documents in a stream of tokens, without the <|endoftext|> before each."""
    parts = np.split(ids, np.flatnonzero(ids == tokenizer.END_OF_TEXT))
    parts = [part[part != tokenizer.END_OF_TEXT] for part in parts]
    return [part for part in parts if len(part)]


def split_wikitext(text: str) -> list[str]:
    """WikiText as the pages of lm_eval's data, EleutherAI/wikitext_document_level. A page begins at a line
    " = Title = "; the test set has 62."""
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        joined = line.replace("= = =", "===").replace("= =", "==").strip()
        if joined.startswith("= ") and joined.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    first, *others = ["\n".join(page) for page in pages]
    return [first, *others] if first.strip() or not others else others


def detokenize(page: str) -> str:
    """Removes WikiText's spaces around punctuation: lm_eval's wikitext_detokenizer, rule by rule, except for
    its rule for slashes, which matches no page."""
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
def sum_losses(model: GPT, windows: list[Window], batch_size: int = 8) -> tuple[float, int]:
    """The sum of -log p(token | its window's earlier tokens) in nats over the scored tokens; their number."""
    device = model.wte.weight.device
    windows = sorted(windows, key=lambda window: len(window.tokens))  # for little padding
    total, count = 0.0, 0
    bar = tqdm(range(0, len(windows), batch_size), desc="perplexity", unit="batch", disable=None)
    for first in bar:
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
        bar.set_postfix_str(f"{exponentiate(total / max(1, count)):.2f} so far", refresh=False)
    return total, count


# -----------------------------------------------------------------------------


def exponentiate(x: float) -> float:
    """exp(x), infinite from where float64 ends (x near 709.8)."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def measure(model: GPT, ids: np.ndarray, cfg: Config) -> dict:
    """The figures of a stream of tokens (N,), by cfg's protocol."""
    context = model.config.block_size
    stride = cfg.stride or (max(1, context // 2) if cfg.protocol == "stride" else context)
    parts = split_documents(ids)
    if not parts:
        raise ValueError(f"{cfg.data} holds no text")
    texts = [tokenizer.decode_bytes(part) for part in parts]
    if cfg.protocol == "wikitext":
        pages = split_wikitext(b"".join(texts).decode("utf-8", errors="replace"))
        texts = [page.encode() for page in pages]
        parts = [np.array(tokenizer.encode(detokenize(page))) for page in pages]
    if cfg.protocol == "stride":
        windows = make_strided_windows(ids, context, stride)
    else:
        windows = [window for part in parts for window in make_rolling_windows(part, context)]
    total, count = sum_losses(model, windows, cfg.batch_size)
    if not count:
        raise ValueError(f"{cfg.data} holds no token that has one before it")
    if not math.isfinite(total):
        raise ValueError(f"the model's losses are not finite (their sum is {total}): its products overflow")
    # With `stride`, a window's unscored first token counts as the average.
    whole = total / count * (len(ids) - 1) if cfg.protocol == "stride" else total
    size = sum(map(len, texts))
    # Like lm_eval, the other protocols count an empty word beside white space at either end of a text.
    split = str.split if cfg.protocol == "stride" else re.compile(r"\s+").split
    words = sum(len(split(text.decode("utf-8", errors="replace"))) for text in texts)
    return {
        "protocol": cfg.protocol,
        "context": context,
        "stride": stride,
        "documents": len(texts),
        "tokens": count,
        "words": words,
        "bytes": size,
        "token_perplexity": exponentiate(total / count),
        "word_perplexity": exponentiate(whole / words) if words else math.nan,
        "bits_per_byte": whole / math.log(2) / size,
    }


def main(cfg: Config) -> dict:
    cli.check_bounds(cfg)
    files.check_target(cfg.json)
    if cfg.stride and cfg.protocol != "stride":
        raise ValueError(f"--stride is {cfg.stride}; the protocol {cfg.protocol} sets it: leave it out")
    ids = load_ids(cfg)
    model, source = load_model(cfg.model, cfg.device)
    device = model.wte.weight.device
    dtype, _ = pick_dtype(cfg.dtype, device)
    cast_linears(model, dtype)
    with autocast(device, dtype):
        figures = measure(model, ids, cfg)
    result = {"model": source, "data": cfg.data, "dtype": str(dtype)[6:], **figures}
    if cfg.json:  # first: a figure is not to be lost because it cannot be printed
        files.write_json(Path(cfg.json), result)
    how = f"{result['protocol']}, context {result['context']}, stride {result['stride']}, {result['dtype']}"
    print(f"{cfg.data}, {source}: protocol {how}")
    print(f"token perplexity {result['token_perplexity']:10.2f}   over {result['tokens']:,} tokens")
    print(f"word perplexity  {result['word_perplexity']:10.2f}   over {result['words']:,} words")
    print(f"bits per byte    {result['bits_per_byte']:10.4f}   over {result['bytes']:,} bytes")
    return result


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(Config, __doc__)))
