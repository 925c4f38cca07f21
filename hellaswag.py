"""Stage 3: HellaSwag, the multiple-choice test by which models of GPT-2's size are compared.

    python hellaswag.py                                   # the newest checkpoint under log/
    python hellaswag.py --model gpt2 --limit 1000 --json scores.json

Each of the 10,042 validation items is a context with four endings, one of them true (Zellers et al., 2019).
The model chooses the ending of the highest probability (acc), or of the highest for its length (acc_norm).
Two protocols are in use, and their figures differ:

    completion  the raw context and " " + ending; acc_norm is by tokens (build-nanogpt, OpenAI's eval style)
    harness     cleaned text after the activity label; acc_norm is by characters (EleutherAI's lm_eval)

GPT-2 124M reaches 28.59 / 29.55 and 28.92 / 31.14 (acc / acc_norm, percent), XL 38.42 / 48.93 and 40.04 /
50.89: the figures of build-nanogpt and of lm_eval themselves. Chance is 25.

On disk: data/hellaswag/hellaswag_val.jsonl (12 MB), downloaded from its author's repository and checked
against its SHA-256.
"""

import lib.startup  # noqa: F401

import functools
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from lib import cli, documents, files, schema, tokenizer
from lib.checkpoint import load_model
from lib.device import autocast, cast_linears, pick_dtype, to_device
from lib.processes import Process
from model import GPT

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
DATA = files.DATA / "hellaswag" / "hellaswag_val.jsonl"
PROTOCOLS = ("completion", "harness")
Row = tuple[list[int], list[int]]  # the ids of a context and of one ending


@dataclass(frozen=True)
class Config:
    model: cli.PathName = cli.knob(
        "", "a checkpoint, run folder, size (gpt2) or Hub id; by default the newest run"
    )
    device: str = cli.knob("auto", "auto, cpu, cuda, cuda:1, mps")
    data: cli.PathName = cli.knob("", "a hellaswag_val.jsonl; by default the downloaded one")
    limit: int = cli.knob(0, "score only this many first items; 0 for all", at_least=0)
    batch_size: int | Literal["auto"] = cli.knob(
        "auto", "rows (a context and one ending) per batch; auto: 64, on CUDA up to 512", at_least=1
    )
    dtype: cli.Dtype = cli.knob(
        "float32", "precision of the matrix products, auto for the fastest; logits are always float32"
    )
    json: cli.PathName = cli.knob("", "also write the figures to this file")
    download: bool = cli.knob(False, "only download the data")


# -----------------------------------------------------------------------------
# items


def download(url: str = URL, path: Path = DATA, sha256: str = SHA256, tries: int = 4) -> Path:
    """Downloads the data unless they are there already. Raises OSError, naming the URL, if that fails."""
    try:
        return files.download(url, path, sha256, tries)
    except OSError as error:
        raise OSError(f"{error}. Fetch it by hand and give it as --data FILE") from error


def load_items(path: str | Path = "", limit: int = 0) -> list[dict]:
    """The first `limit` items (0: all) of a HellaSwag JSONL file, by default the downloaded one. Raises
    ValueError for any other file."""
    path = Path(path) if path else download()
    items = []
    for number, line in enumerate(documents.read_lines(path), 1):
        if line.strip():
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} is not a HellaSwag JSONL file: line {number}: {error}") from error
            check_item(item, f"{path}, line {number}")
            items.append(item)
    if not items:
        raise ValueError(f"{path} is empty; `python hellaswag.py --download` fetches the data")
    return items[:limit] if limit else items


def check_item(item: Any, where: str):
    """Raises ValueError, naming the field, if an item lacks what the two protocols read."""
    texts = dict.fromkeys(("ctx", "ctx_a", "ctx_b", "activity_label"), str)
    labels = Literal[0, 1, 2, 3, "0", "1", "2", "3"]
    schema.check_fields(item, {**texts, "endings": list[str], "label": labels}, where)
    if len(item["endings"]) != 4:
        raise ValueError(f"{where}: the field endings has {len(item['endings'])} texts; it must have 4")
    if not all(text.strip() for text in (item["ctx"], *item["endings"])):
        raise ValueError(
            f"{where}: the field {'endings' if item['ctx'].strip() else 'ctx'} has an empty text"
        )


def load_for_training(process: Process, limit: int, is_needed: bool) -> list[dict]:
    """The items, which rank 0 downloads. If that fails, raises ValueError if they are needed, else prints a
    note and returns none."""
    problem = ""
    if process.rank == 0:
        try:
            download()
        except (OSError, ValueError) as error:
            problem = str(error)
    if not (problem := process.broadcast(problem)):
        return load_items(limit=limit)
    if is_needed:
        raise ValueError(f"--eval-only has nothing to do without HellaSwag: {problem}")
    process.print(f"note   HellaSwag is left out: {problem}")
    return []


def render(item: dict, protocol: str) -> tuple[list[Row], list[int]]:
    """The four rows of an item, and the lengths by which acc_norm divides their scores."""
    if protocol == "completion":
        context = tokenizer.encode(item["ctx"])
        rows = [(context, tokenizer.encode(" " + ending)) for ending in item["endings"]]
        return rows, [len(ending) for _, ending in rows]
    text = clean(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
    endings = [clean(ending) for ending in item["endings"]]
    # Like lm_eval: tokenize context and ending together, and cut them where the context's ids end.
    cut = len(tokenizer.encode(text.rstrip()))
    whole = [tokenizer.encode(text + " " + ending) for ending in endings]
    return [(ids[:cut], ids[cut:]) for ids in whole], [max(1, len(ending)) for ending in endings]


def clean(text: str) -> str:
    """Removes WikiHow's mark-up as lm_eval does (lm_eval/tasks/hellaswag/utils.py)."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


# -----------------------------------------------------------------------------
# scores


def pick_batch_size(model: GPT) -> int:
    """Rows per batch: 64, or on a GPU, which waits for launches if a batch is small, 512 for GPT-2 124M. The
    key-value cache of a larger model takes as much memory with fewer rows."""
    if model.wte.weight.device.type != "cuda":
        return 64
    return max(64, min(512, 512 * 12 * 768 // (model.config.n_layer * model.config.n_embd)))


@torch.inference_mode()
def score(
    model: GPT, rows: list[Row], batch_size: int, report: Callable[[torch.Tensor], None] | None = None
) -> list[float]:
    """The log-probability of each row's ending after its context, in nats, from float32 logits.

    The network runs under the caller's autocast. A row longer than the model's context loses its beginning.
    Calls `report` with the scores so far, (rows,), nan for the rows still to come.
    """
    longest, cut = model.config.block_size + 1, []
    for context, ending in rows:
        ids = (context + ending)[-longest:]
        start = max(1, len(ids) - len(ending))  # nothing precedes the very first token: it is not scored
        cut.append((tuple(ids[:start]), ids[start:]))
    scores = torch.full((len(rows),), math.nan, dtype=torch.float64)
    endings = read_endings(model, cut, batch_size)
    while batches := list(itertools.islice(endings, 8)):  # small batches together, for large logit products
        x, targets, which = (torch.cat(parts) for parts in zip(*batches))
        scores[which] = 0
        scores.index_add_(0, which, -model.token_losses(x, targets))
        if report:
            report(scores)
    return scores.tolist()


def read_endings(
    model: GPT, rows: list[tuple[tuple[int, ...], list[int]]], batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Runs the network over the rows. Yields, for the N tokens of a batch of endings, the vectors (N, C) that
    predict them, the tokens (N,), and the row of each (N,), on the CPU.

    A context is read once, however many endings it has: contexts of equal length are read as one batch, then
    endings of similar length as batches that continue the contexts' key-value cache.
    """
    device = model.wte.weight.device
    least = 128 if device.type == "cpu" else 1024  # tokens that keep the device busy
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i][0]), rows[i][0]))
    for _, same_length in itertools.groupby(order, key=lambda i: len(rows[i][0])):
        group = iter(same_length)
        while part := list(itertools.islice(group, 4 * batch_size)):
            contexts = {context: n for n, context in enumerate(dict.fromkeys(rows[i][0] for i in part))}
            cache = model.new_cache(len(rows[part[0]][0]))
            read = to_device(torch.tensor(list(contexts)), device)
            last = model.hidden(read, cache)[:, -1]  # (contexts, C)
            for batch in batch_by_length({i: len(rows[i][1]) for i in part}, batch_size, least):
                width = len(rows[batch[-1]][1])
                tokens = torch.tensor([rows[i][1] + [-1] * (width - len(rows[i][1])) for i in batch])
                which = to_device(torch.tensor([contexts[rows[i][0]] for i in batch]), device)
                x = last[which][:, None]  # (B, 1, C): they predict the first token of each ending
                if width > 1:
                    longer = [layer.select(which, width - 1) for layer in cache]
                    unread = to_device(tokens[:, :-1].clamp(min=0), device)
                    x = torch.cat([x, model.hidden(unread, longer)], dim=1)  # (B, width, C)
                row, place = (tokens >= 0).nonzero(as_tuple=True)
                targets, on_row, on_place = (to_device(t, device) for t in (tokens[row, place], row, place))
                yield x[on_row, on_place], targets, torch.tensor(batch)[row]


def batch_by_length(lengths: dict[int, int], batch_size: int, least: int) -> Iterator[list[int]]:
    """Yields batches of at most batch_size rows, by rising length. A batch of `least` tokens or more takes no
    row that would make over a tenth of it padding."""
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


def judge(scores: torch.Tensor, lengths: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Which items are right by acc and by acc_norm, given the rows' scores (4 * items,), the endings' lengths
    (items, 4) and the labels (items,): (items, 2), float32. Both are nan if a score is not finite."""
    four = scores.view(lengths.shape)
    right = torch.stack([four.argmax(1), (four / lengths).argmax(1)], dim=1) == labels[:, None]
    return torch.where(four.isfinite().all(1, keepdim=True), right.float(), math.nan)


def standard_error(share: float, n: int) -> float:
    """The standard error of a share of n items, with n - 1 as in lm_eval."""
    return math.sqrt(share * (1 - share) / max(1, n - 1))


def show_accuracy(bar: tqdm, lengths: torch.Tensor, labels: torch.Tensor, scores: torch.Tensor):
    """Moves the bar to the rows that have scores, and writes their items' acc_norm beside it."""
    right = judge(scores, lengths, labels)[:, 1]
    if n := int(right.isfinite().sum()):
        share = right.nansum().item() / n
        error = standard_error(share, n)
        bar.set_postfix_str(f"acc_norm {100 * share:.2f} ± {100 * error:.2f}", refresh=False)
    bar.update(int(scores.isfinite().sum()) - bar.n)


def evaluate(
    model: GPT,
    items: list[dict],
    process: Process | None = None,
    batch_size: int | Literal["auto"] = "auto",
    protocols: Sequence[str] = PROTOCOLS,
    show: bool = True,
) -> dict:
    """{"n": ..., protocol: {"acc", "acc_norm", "acc_stderr", "acc_norm_stderr"}, ...}, accuracies in 0 to 1,
    or nan if a score is not finite.

    Given its process, each of several scores its share of the items, and all return the sum.
    """
    process = process or Process(0, 1, model.wte.weight.device)
    batch_size = pick_batch_size(model) if batch_size == "auto" else batch_size
    result: dict = {"n": len(items)}
    for protocol in protocols:
        mine = items[process.rank :: process.world_size]
        rendered = [render(item, protocol) for item in mine]
        rows = [row for item_rows, _ in rendered for row in item_rows]
        lengths = torch.tensor([lengths for _, lengths in rendered]).view(len(mine), 4)
        labels = torch.tensor([int(item["label"]) for item in mine])
        hide = None if show and process.rank == 0 else True  # None: show the bar on a terminal only
        with tqdm(total=len(rows), desc=f"HellaSwag, {protocol}", unit="row", disable=hide) as progress:
            report = functools.partial(show_accuracy, progress, lengths, labels)
            scores = score(model, rows, batch_size, None if progress.disable else report)
        right = judge(torch.tensor(scores, dtype=torch.float64), lengths, labels).sum(0)
        accuracies = [count / len(items) for count in process.all_reduce(*right.tolist())]
        errors = [standard_error(share, len(items)) for share in accuracies]
        result[protocol] = dict(
            zip(("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"), accuracies + errors)
        )
    return result


def main(cfg: Config) -> dict:
    cli.check_bounds(cfg)
    files.check_target(cfg.json)
    if cfg.download:
        print(download())
        return {}
    model, source = load_model(cfg.model, cfg.device)
    device = model.wte.weight.device
    dtype, _ = pick_dtype(cfg.dtype, device)
    cast_linears(model, dtype)
    items = load_items(cfg.data, cfg.limit)
    begin = time.perf_counter()
    with autocast(device, dtype):
        result = {"model": source, **evaluate(model, items, batch_size=cfg.batch_size)}
    if not math.isfinite(sum(result[protocol]["acc"] for protocol in PROTOCOLS)):
        raise ValueError(f"{source}: the scores are not finite: its products overflow in {str(dtype)[6:]}")
    seconds = time.perf_counter() - begin
    if cfg.json:  # first: a figure is not to be lost because it cannot be printed
        files.write_json(Path(cfg.json), result)
    print(f"HellaSwag, {result['n']:,} items, {source}, {str(dtype)[6:]}, {seconds:.0f} s")
    for protocol in PROTOCOLS:
        s = {key: f"{100 * value:.2f}" for key, value in result[protocol].items()}
        figures = [f"{key} {s[key]} ± {s[f'{key}_stderr']}" for key in ("acc", "acc_norm")]
        print(f"{protocol:10}  {'   '.join(figures)}")
    return result


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(Config, __doc__)))
