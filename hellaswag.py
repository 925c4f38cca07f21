"""Stage 3: HellaSwag, the multiple-choice test that GPT-2-sized models are measured by.

    python hellaswag.py --model gpt2 --device cuda
    python hellaswag.py                                   # the newest checkpoint under log/
    python hellaswag.py --model log/<run>/step_019073 --limit 1000 --json scores.json

Each of the 10,042 validation items is a context with four endings, one of them true (Zellers et al., 2019).
The model chooses the ending to which it gives the highest probability (acc), or the highest for its length
(acc_norm). Two protocols are in use, and their figures differ:

    completion  the raw context and " " + ending; acc_norm is by tokens (build-nanogpt, OpenAI's eval style)
    harness     cleaned text, begun by the activity label; acc_norm is by characters (EleutherAI's lm_eval)

GPT-2 124M reaches 28.59 / 29.55 and 28.92 / 31.14 (acc / acc_norm, percent), XL 38.42 / 48.93 and 40.04 /
50.89: build-nanogpt's and the harness's own figures. Chance is 25. The data (12 MB) come from the author's
repository, into data/hellaswag/, and are checked against their SHA-256.
"""

import itertools
import json
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

from lib import files, tokenizer
from model import GPT

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
SIZE = 12_246_618
DATA = files.DATA / "hellaswag" / "hellaswag_val.jsonl"
PROTOCOLS = ("completion", "harness")
Row = tuple[list[int], list[int]]  # the ids of a context and of one ending


@dataclass(frozen=True)
class Config:
    model: str = ""
    """A checkpoint, a run folder, a size (gpt2, 124M, ...) or a Hub id; by default the newest run's
    checkpoint."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps, ..."""
    data: str = ""
    """Another hellaswag_val.jsonl than the one that is downloaded."""
    limit: int = 0
    """Score only the first so many items; 0 for all."""
    batch_size: int = 64
    """Rows (context and one ending) at a time."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Precision of the network's matrix products, auto for the fastest; logits are float32 in any case."""
    json: str = ""
    """Also write the figures to this file."""
    download: bool = False
    """Only download the data."""


def download(url: str = URL, path: Path = DATA, sha256: str = SHA256, tries: int = 4) -> Path:
    """Fetches the data, unless they are there already. Raises OSError, naming the URL, when they cannot be
    had."""
    try:
        return files.download(url, path, sha256, tries)
    except OSError as error:
        raise OSError(f"{error}. Fetch it by hand and give it as --data FILE") from error


def load_items(path: str | Path = "", limit: int = 0) -> list[dict]:
    """The items of a HellaSwag JSONL file (by default the downloaded one). Raises ValueError for a bad
    file."""
    if limit < 0:
        raise ValueError(f"--limit is {limit}; it must be 0 (all) or more")
    path = Path(path) if path else download()
    try:
        items = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        for item in items:
            if missing := {"ctx", "ctx_a", "ctx_b", "activity_label", "endings", "label"} - item.keys():
                raise ValueError(f"an item without {', '.join(sorted(missing))}")
            if len(item["endings"]) != 4 or not 0 <= int(item["label"]) < 4:
                raise ValueError(f"an item with {len(item['endings'])} endings and label {item['label']}")
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a HellaSwag JSONL file: {error!r}") from error
    if not items:
        raise ValueError(f"{path} is empty; `python hellaswag.py --download` fetches the data")
    return items[:limit] if limit else items


def render(item: dict, protocol: str) -> tuple[list[Row], list[int]]:
    """The four rows of an item, and the length that acc_norm divides each ending's score by."""
    if protocol == "completion":
        context, endings = item["ctx"], item["endings"]
        ids = tokenizer.encode(context)
        rows = [(ids, tokenizer.encode(" " + ending)) for ending in endings]
        return rows, [len(ending) for _, ending in rows]
    context = clean(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
    endings = [clean(ending) for ending in item["endings"]]
    # As lm_eval does, the text is tokenized whole and cut where the context's ids end.
    cut = len(tokenizer.encode(context.rstrip()))
    whole = [tokenizer.encode(context + " " + ending) for ending in endings]
    return [(ids[:cut], ids[cut:]) for ids in whole], [len(ending) for ending in endings]


def clean(text: str) -> str:
    """lm_eval's clean-up of WikiHow's mark-up (lm_eval/tasks/hellaswag/utils.py)."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


@torch.inference_mode()
def score(model: GPT, rows: list[Row], batch_size: int, progress: tqdm | None = None) -> list[float]:
    """The log-probability of each row's ending after its context, in nats, computed from float32 logits.

    A row longer than the model's context loses its beginning. The network runs under whatever autocast is on;
    the logits do not.
    """
    longest, cut = model.config.block_size + 1, []
    for context, ending in rows:
        ids = (context + ending)[-longest:]
        start = max(1, len(ids) - len(ending))  # the first token of all has nothing that it could follow from
        cut.append((tuple(ids[:start]), ids[start:]))
    scores = torch.zeros(len(rows), dtype=torch.float64)
    waiting: list[tuple[torch.Tensor, ...]] = []  # for logits: they come a thousand at a time
    for batch, *found in read_endings(model, cut, batch_size):
        waiting.append(tuple(found))
        if sum(len(targets) for _, targets, _ in waiting) >= 1000:
            add_losses(model, waiting, scores)
        if progress is not None:
            progress.update(len(batch))
    if waiting:
        add_losses(model, waiting, scores)
    return scores.tolist()


def add_losses(model: GPT, waiting: list[tuple[torch.Tensor, ...]], scores: torch.Tensor):
    """Takes all that is waiting (vectors, targets, rows) off the scores (rows,)."""
    x, targets, rows = (torch.cat(parts) for parts in zip(*waiting))
    scores.index_add_(0, rows, -model.token_losses(x, targets))
    waiting.clear()


def read_endings(
    model: GPT, rows: list[tuple[tuple[int, ...], list[int]]], batch_size: int
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The network's part of scoring. Yields a batch of rows and of its N tokens in endings: the vectors from
    which they follow (N, C), the tokens (N,), and of which row each is (N,), on the CPU.

    A context is read once, whatever the number of its endings: contexts of equal length together, then their
    endings, those of like length together, on top of the contexts' keys and values.
    """
    device = model.wte.weight.device
    least = 128 if device.type == "cpu" else 1024  # tokens that keep the device busy
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i][0]), rows[i][0]))
    for _, same_length in itertools.groupby(order, key=lambda i: len(rows[i][0])):
        for group in batched(same_length, 4 * batch_size):
            contexts = {context: n for n, context in enumerate(dict.fromkeys(rows[i][0] for i in group))}
            cache = model.new_cache(len(rows[group[0]][0]))
            last = model.hidden(torch.tensor(list(contexts), device=device), cache)[:, -1]  # (contexts, C)
            for batch in alike({i: len(rows[i][1]) for i in group}, batch_size, least):
                width = len(rows[batch[-1]][1])
                tokens = torch.tensor([rows[i][1] + [-1] * (width - len(rows[i][1])) for i in batch])
                which = torch.tensor([contexts[rows[i][0]] for i in batch], device=device)
                x = last[which][:, None]  # (B, 1, C): what the first token of an ending follows from
                if width > 1:
                    more = [layer.select(which, width - 1) for layer in cache]
                    unread = tokens[:, :-1].clamp(min=0).to(device)
                    x = torch.cat([x, model.hidden(unread, more)], dim=1)  # (B, width, C)
                row, place = (tokens >= 0).nonzero(as_tuple=True)
                targets = tokens[row, place].to(device)
                yield batch, x[row.to(device), place.to(device)], targets, torch.tensor(batch)[row]


def alike(lengths: dict[int, int], batch_size: int, least: int) -> Iterator[list[int]]:
    """Rows by rising length, at most batch_size at a time; a batch that has `least` tokens takes no row that
    would make more than a tenth of it padding."""
    batch, tokens = [], 0
    for row, length in sorted(lengths.items(), key=lambda item: item[1]):
        padded = length * (len(batch) + 1)
        if len(batch) == batch_size or (tokens >= least and tokens + length < 0.9 * padded):
            yield batch
            batch, tokens = [], 0
        batch.append(row)
        tokens += length
    if batch:
        yield batch


def batched(items: Iterable[int], size: int) -> Iterator[list[int]]:
    """itertools.batched of Python 3.12, as lists."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def evaluate(
    model: GPT,
    items: list[dict],
    batch_size: int = 64,
    protocols: tuple[str, ...] = PROTOCOLS,
    show: bool = True,
) -> dict:
    """{"n": ..., protocol: {"acc", "acc_norm", "acc_stderr", "acc_norm_stderr"}, ...}, accuracies in 0 to 1.

    Under torch.distributed the items are dealt out to the processes, each item to one.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size is {batch_size}; it must be at least 1")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    result: dict = {"n": len(items)}
    for protocol in protocols:
        mine = [(render(item, protocol), int(item["label"])) for item in items[rank::world_size]]
        rows = [row for (item_rows, _), _ in mine for row in item_rows]
        hidden_bar = None if show and rank == 0 else True  # None: shown on a terminal only
        with tqdm(total=len(rows), desc=f"HellaSwag, {protocol}", unit="row", disable=hidden_bar) as progress:
            scores = score(model, rows, batch_size, progress)
        right = [0, 0]
        for n, ((_, lengths), label) in enumerate(mine):
            four = np.array(scores[4 * n : 4 * n + 4])
            right[0] += int(four.argmax() == label)
            right[1] += int((four / lengths).argmax() == label)
        if world_size > 1:
            total = torch.tensor(right, device=model.wte.weight.device)
            dist.all_reduce(total)
            right = total.tolist()
        acc, acc_norm = (count / len(items) for count in right)
        result[protocol] = {
            "acc": acc,
            "acc_norm": acc_norm,
            "acc_stderr": standard_error(acc, len(items)),
            "acc_norm_stderr": standard_error(acc_norm, len(items)),
        }
    return result


def standard_error(accuracy: float, n: int) -> float:
    """Of the mean of n yes-or-no outcomes, with the n - 1 of lm_eval."""
    return math.sqrt(accuracy * (1 - accuracy) / max(1, n - 1))


def main(cfg: Config) -> dict:
    from lib.checkpoint import load_model
    from lib.device import cast_linears, pick_dtype

    if cfg.download:
        print(download())
        return {}
    model, source = load_model(cfg.model, cfg.device)
    device = model.wte.weight.device
    dtype, _ = pick_dtype(cfg.dtype, device)
    cast_linears(model, dtype)
    items = load_items(cfg.data, cfg.limit)
    begin = time.perf_counter()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        result = {"model": source, **evaluate(model, items, cfg.batch_size)}
    seconds = time.perf_counter() - begin
    print(f"HellaSwag, {result['n']:,} items, {source}, {str(dtype)[6:]}, {seconds:.0f} s")
    for protocol in PROTOCOLS:
        s = {key: 100 * value for key, value in result[protocol].items()}
        print(
            f"{protocol:10}  acc {s['acc']:.2f} ± {s['acc_stderr']:.2f}   "
            f"acc_norm {s['acc_norm']:.2f} ± {s['acc_norm_stderr']:.2f}"
        )
    if cfg.json:
        Path(cfg.json).write_text(json.dumps(result, indent=2), encoding="utf-8")
    return result


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"hellaswag.py: {error}", file=sys.stderr)
        sys.exit(2)
