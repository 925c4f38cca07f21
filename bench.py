"""What this machine reaches, each figure beside a baseline in the same run. Only the ratios travel.

    python bench.py                                   # everything, GPT-2 124M, on the device that is there
    python bench.py --jobs train --batch-size 64      # one job
    python bench.py --model-size 124M --seq-len 1024 --compile --json bench.json
    python bench.py --plan --model-size 350M          # by arithmetic: memory, hours, what fits which GPU

    train      tokens/s of forward, backward and AdamW      beside transformers' GPT-2
    memory     GB at the peak of that step                  the same, each in a process of its own
    hellaswag  items/s, contexts read once for 4 endings    beside build-nanogpt's loop: one item a time, four
                                                            padded rows, all logits
    generate   tokens/s of one sequence and of 64           beside transformers' generate with its cache
    load       seconds from a checkpoint to a model         beside transformers' from_pretrained
    read       batches/s of 64 x 1,024 tokens from shards   beside nanoGPT's get_batch
    tokenize   MB/s of text, parquet to shards on disk      beside build-nanogpt's method, tiktoken's batches,
                                                            gigatoken alone, and reading the parquet alone

Ours and the baseline take turns, and each figure is a median, so that a noisy neighbour disturbs both alike.
The last column is ours as a share of what this machine could do if nothing but the matrix products cost time
(train, hellaswag: their measured speed on large matrices) or nothing but reading the weights (generate: the
measured speed of a product with one row).
"""

import gc
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro

import fineweb
import hellaswag
from lib import checkpoint, documents, plan, shards, tokenizer
from lib.device import cast_linears, pick_device, pick_dtype
from model import GPT, SIZES, GPTConfig, config_to_hf, to_hf

Job = Literal["train", "memory", "hellaswag", "generate", "load", "read", "tokenize"]


@dataclass(frozen=True)
class Config:
    jobs: tuple[Job, ...] = ("train", "memory", "hellaswag", "generate", "load", "read", "tokenize")
    """What to measure."""
    plan: bool = False
    """Measure nothing; print what training would take."""
    model_size: str = "124M"
    """124M, 350M, 774M or 1558M."""
    seq_len: int = 1024
    """Tokens of context in `train` and `memory`."""
    batch_size: int = 4
    """Sequences a step in `train` and `memory`."""
    items: int = 96
    """Items in `hellaswag`."""
    max_tokens: int = 64
    """Tokens to make in `generate`."""
    text: str = ""
    """Text for `tokenize`: a parquet file or a folder of them; by default pydocs, ten times."""
    repeats: int = 3
    """Measurements of each side; the median counts."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the matrix products; `generate` is measured in float32, too."""
    compile: bool = False
    """torch.compile both sides of `train` and `memory`, and ours of `generate`."""
    json: str = ""
    """Also write the table to this file."""


@dataclass(frozen=True)
class Result:
    job: str
    unit: str
    ours: float
    baseline: float
    higher_is_better: bool = True
    share: float | None = None
    """Of what the machine could do."""

    @property
    def ratio(self) -> float:
        return self.ours / self.baseline if self.higher_is_better else self.baseline / self.ours


class Bench:
    """The machine and a fresh model of ours with its twin in transformers."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.device = pick_device(cfg.device)
        self.dtype, self.why = pick_dtype(cfg.dtype, self.device)
        self.config = GPTConfig.named(cfg.model_size, block_size=max(1024, cfg.seq_len))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def models(self) -> tuple[GPT, Any]:
        """The same random network twice: ours, and transformers' GPT2LMHeadModel."""
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        ours = GPT(self.config)
        names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "embd_pdrop", "attn_pdrop")
        hf_config = config_to_hf(self.config)
        theirs = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, **{name: hf_config[name] for name in names}))
        theirs.load_state_dict(to_hf(ours.state_dict(), self.config), strict=False)  # lm_head is tied
        return ours.to(self.device), theirs.to(self.device)  # type: ignore[arg-type]

    def seconds(self, *sides: Callable[[], Any]) -> list[float]:
        """The median time of each side after one round that does not count; they take turns."""
        times: list[list[float]] = [[] for _ in sides]
        for round in range(self.cfg.repeats + 1):
            for side, measured in zip(sides, times):
                gc.collect()
                self.wait()
                begin = time.perf_counter()
                side()
                self.wait()
                if round:
                    measured.append(time.perf_counter() - begin)
        return [statistics.median(measured) for measured in times]

    def as_shipped(self, side: Callable[[], Any]) -> Callable[[], Any]:
        """A baseline, without the setting of float32 products that pick_device makes for all."""

        def run():
            matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
            ours, matmul.fp32_precision = matmul.fp32_precision, "ieee"
            side()
            matmul.fp32_precision = ours

        return run

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def flops_per_second(self) -> float:
        """Of a large matrix product: 4,096 tokens through a layer of 768 by 3,072, or larger on a GPU."""
        scale = 1 if self.device.type == "cpu" else 4
        a, b = (
            torch.randn(shape, dtype=self.dtype, device=self.device)
            for shape in ((4096 * scale, 768 * scale), (768 * scale, 3072 * scale))
        )
        out, count = a @ b, 10
        (seconds,) = self.seconds(lambda: [torch.mm(a, b, out=out) for _ in range(count)])
        return 2 * a.numel() * b.size(1) * count / seconds

    def bytes_per_second(self, dtype: torch.dtype) -> float:
        """Of reading 250 MB of weights, again and again, for a product with one row."""
        weight = torch.ones(250_000_000 // 768 // dtype.itemsize, 768, dtype=dtype, device=self.device)
        x = torch.ones(1, 768, dtype=dtype, device=self.device)
        count = 4 if self.device.type == "cpu" else 100
        (seconds,) = self.seconds(lambda: [F.linear(x, weight) for _ in range(count)])
        return count * weight.nbytes / seconds

    def stepper(self, model: GPT | Any) -> Callable[[], None]:
        """Forward, backward and AdamW, once."""
        cfg = self.cfg
        idx = torch.randint(50257, (cfg.batch_size, cfg.seq_len), device=self.device)
        fast = torch.compile(model) if cfg.compile else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step():
            with self.autocast():
                if isinstance(model, GPT):
                    loss = fast(idx, idx)
                else:
                    loss = F.cross_entropy(fast(idx).logits.flatten(0, 1).float(), idx.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def train(self) -> Result:
        cfg = self.cfg
        ours, theirs = self.models()
        times = self.seconds(self.stepper(ours), self.as_shipped(self.stepper(theirs)))
        tokens = cfg.batch_size * cfg.seq_len
        speed = tokens / times[0]
        share = speed * self.config.flops_per_token(cfg.seq_len) / self.flops_per_second()
        return Result(
            f"train B={cfg.batch_size} T={cfg.seq_len}", "tok/s", speed, tokens / times[1], share=share
        )

    def memory(self) -> list[Result]:
        """The first two steps: the second has the optimizer's state from the beginning."""
        if self.device.type != "cuda" and not Path("/proc/self/status").exists():
            print("memory is left out: it can be read on CUDA and on Linux only")
            return []
        sides = []
        for is_ours in (True, False):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                try:
                    sides.append(fresh.submit(peak_memory, self.cfg, is_ours).result())
                except BrokenProcessPool as error:
                    raise ValueError("memory: a process was killed; try a smaller --batch-size") from error
        name = f"memory B={self.cfg.batch_size} T={self.cfg.seq_len}"
        return [Result(name, "GB", *sides, higher_is_better=False)]

    def hellaswag(self) -> Result:
        ours, theirs = self.models()
        ours.eval()
        theirs.eval()
        cast_linears(ours, self.dtype)
        # Lengths like HellaSwag's: endings of 5 to 45 tokens, and contexts of 20 to 110. Few different ones:
        # among all 10,042 items about a hundred share each.
        draw = random.Random(0)
        items = []
        for _ in range(self.cfg.items):
            context = [draw.randrange(50257) for _ in range(draw.choice((30, 50, 80)))]
            items.append(
                [(context, [draw.randrange(50257) for _ in range(draw.randint(5, 45))]) for _ in range(4)]
            )

        @torch.inference_mode()
        def one_item_at_a_time():
            for rows in items:
                width = max(len(context) + len(ending) for context, ending in rows)
                ids = torch.tensor([(c + e + [0] * width)[:width] for c, e in rows], device=self.device)
                logits = theirs(ids).logits[:, :-1]
                losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
                losses.view(4, -1).sum(dim=1).argmin().item()

        rows = [row for item in items for row in item]
        with self.autocast():
            times = self.seconds(lambda: hellaswag.score(ours, rows, 64), self.as_shipped(one_item_at_a_time))
        speed = len(items) / times[0]
        flops = 0.0
        C, head = self.config.n_embd, self.config.vocab_size * self.config.n_embd
        for item in items:
            logits = sum(len(ending) for _, ending in item)
            tokens = len(item[0][0]) + logits - len(item)  # the last of an ending is not read
            flops += 2 * (12 * self.config.n_layer * C * C * tokens + head * logits)
        share = speed * flops / len(items) / self.flops_per_second()
        return Result(f"hellaswag {len(items)} items", "items/s", speed, len(items) / times[1], share=share)

    def generate(self) -> list[Result]:
        return [
            self.generate_rows(rows, dtype)
            for dtype in dict.fromkeys([torch.float32, self.dtype])
            for rows in (1, 64)
        ]

    def generate_rows(self, rows: int, dtype: torch.dtype) -> Result:
        ours, theirs = self.models()
        ours.eval()
        theirs.eval().to(dtype)
        cast_linears(ours, dtype)
        if self.cfg.compile:
            torch._dynamo.reset()  # of what it knows from the rows before
            ours.hidden = torch.compile(ours.hidden)
        count = self.cfg.max_tokens
        prompt = torch.tensor([tokenizer.encode("Hello, I'm a language model,")] * rows, device=self.device)
        options = dict(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=50256)

        def our_side():
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                ours.generate(prompt, count, temperature=0.0, stop_token=None)

        def their_side():
            theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)

        times = self.seconds(our_side, self.as_shipped(their_side))
        share = None
        if rows == 1:
            linear = [part for part in ours.modules() if isinstance(part, torch.nn.Linear)]
            read = sum(part.weight.nbytes for part in linear) / self.bytes_per_second(dtype)
            read += ours.wte.weight.nbytes / self.bytes_per_second(torch.float32)
            share = read * count / times[0]
        speed, baseline = (rows * count / seconds for seconds in times)
        name = f"generate {rows} x {count}, {str(dtype)[6:]}{', compiled' if self.cfg.compile else ''}"
        return Result(name, "tok/s", speed, baseline, share=share)

    def load(self) -> Result:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        config = GPTConfig.named(self.cfg.model_size)
        with tempfile.TemporaryDirectory() as folder:
            path = checkpoint.save(Path(folder), 0, config, GPT(config).state_dict(), {}, {}, {})
            times = self.seconds(
                lambda: GPT.from_pretrained(path).to(self.device),
                lambda: AutoModelForCausalLM.from_pretrained(path).to(self.device),  # type: ignore[arg-type]
            )
        return Result("load a checkpoint", "s", times[0], times[1], higher_is_better=False)

    def read(self) -> Result:
        """What a training step may have to wait for, if no thread prepared it."""
        rows, seq_len, count = 64, 1024, 50
        ids = np.random.default_rng(0).integers(50257, size=10_000_000, dtype=np.uint16)
        with tempfile.TemporaryDirectory() as folder:
            np.save(Path(folder, "random_train_000000.npy"), ids)
            ids.tofile(Path(folder, "train.bin"))
            reader = shards.ShardReader(folder, "train", seq_len)

            def get_batch():  # nanoGPT maps the file anew each time, and draws windows with replacement
                data = np.memmap(Path(folder, "train.bin"), dtype=np.uint16, mode="r")
                starts = torch.randint(len(data) - seq_len, (rows,))
                x, y = (
                    torch.stack(
                        [torch.from_numpy(data[i + d : i + d + seq_len].astype(np.int64)) for i in starts]
                    )
                    for d in (0, 1)
                )
                return x, y

            times = self.seconds(
                lambda: [reader.batch(step, 0, rows, rows) for step in range(count)],
                lambda: [get_batch() for _ in range(count)],
            )
        return Result(f"read {rows} x {seq_len}", "batches/s", count / times[0], count / times[1])

    def tokenize(self) -> list[Result]:
        """Each way reads the same parquet files; only ours also writes shards. All have all cores."""
        import gigatoken
        import pyarrow as pa
        import pyarrow.parquet as pq

        with tempfile.TemporaryDirectory() as folder:
            text = Path(self.cfg.text or folder)
            if not self.cfg.text:
                pq.write_table(pa.table({"text": list(documents.pydocs()) * 10}), text / "pydocs.parquet")
            files = fineweb.local_files(str(text))
            if strangers := [path for path in files if path.suffix != ".parquet"]:
                raise ValueError(
                    f"--text {text} holds {strangers[0].name}; this compares readers of parquet only"
                )

            def batches() -> Iterator[documents.Batch]:
                return (batch for path in files for batch in documents.read_file(path))

            def rows() -> Iterator[str]:
                return (text for batch in batches() for text in batch.texts.to_pylist())

            def ours():
                with tempfile.TemporaryDirectory() as out:
                    fineweb.main(fineweb.Config(source=str(text), out_dir=out))

            encoding = tokenizer.tiktoken_encoding()
            cores = os.cpu_count() or 1
            parquet = gigatoken.ParquetFileSource([str(path) for path in files])
            with multiprocessing.get_context("spawn").Pool(cores) as pool:
                pool.map(tokenize_document, ["warm up"] * 100)
                sides = {
                    "build-nanogpt's pool": lambda: sum(map(len, pool.imap(tokenize_document, rows(), 16))),
                    "tiktoken, batches": lambda: [
                        encoding.encode_ordinary_batch(batch.texts.to_pylist(), num_threads=cores)
                        for batch in batches()
                    ],
                    "gigatoken alone": lambda: tokenizer.gigatoken_tokenizer().encode_files(parquet),
                    "reading alone": lambda: sum(len(batch.texts) for batch in batches()),
                }
                times = self.seconds(ours, *sides.values())
            megabytes = sum(batch.texts.nbytes for batch in batches()) / 1e6
            tokens = sum(len(tokenizer.encode_corpus(batch.texts)) for batch in batches())
        print(f"{megabytes:,.0f} MB of text, {tokens:,} tokens: a MB is {tokens / megabytes:,.0f} tokens")
        return [
            Result(f"tokenize: {side}", "MB/s", megabytes / times[0], megabytes / seconds)
            for side, seconds in zip(sides, times[1:])
        ]


def peak_memory(cfg: Config, is_ours: bool) -> float:
    """In a process of its own: the GB that two steps of our model, or of transformers', have had at once."""
    bench = Bench(cfg)
    model = bench.models()[0 if is_ours else 1]
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = bench.stepper(model) if is_ours else bench.as_shipped(bench.stepper(model))
    step()
    step()
    if bench.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    # Not getrusage: there a process begins with the peak of the one that started it.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


def print_plan(cfg: Config):
    """The memory of training by batch size, hours by GPU, and what fits which GPU, from the shapes alone."""

    def work(size: str) -> plan.Workload:
        return plan.Workload(GPTConfig.named(size, block_size=max(1024, cfg.seq_len)), cfg.seq_len)

    config = work(cfg.model_size).config
    flops = config.flops_per_token(cfg.seq_len)
    print(f"GPT-2 {cfg.model_size}: {config.num_params:,} parameters, {flops / 1e9:.2f} GFLOP a token at "
          f"T={cfg.seq_len} (forward and backward)")  # fmt: skip
    print("memory of a step in bfloat16, GB, about:")
    for batch_size in (1, 4, 16, 64):
        print(f"  B={batch_size:<3} {work(cfg.model_size).need(batch_size) / 1e9:8.1f}")
    print(f"hours for 10 billion tokens on one GPU, at {plan.MFU:.0%} of its peak:")
    print(plan.describe_hours(10e9 * flops))
    share = 1 - plan.HEADROOM["tried"]
    print(f"the largest --batch-size in {share:.0%} of a GPU's memory (T={cfg.seq_len}, AdamW, bfloat16, not "
          "compiled):\n")  # fmt: skip
    memories = (8, 12, 16, 24, 40, 80, 141)  # GB
    print("| | " + " | ".join(f"{memory} GB" for memory in memories) + " |")
    print("|---|" + "---|" * len(memories))
    for size in SIZES:
        rows = [
            work(size).largest_batch(lambda n: work(size).need(n) <= share * 1e9 * memory)  # noqa: B023
            for memory in memories
        ]
        print(f"| {size} | " + " | ".join(str(n or "-") for n in rows) + " |")
    for tokens in (2**19, 2**22):
        print(
            f"\non paper, a step of {tokens:,} tokens: H100s, 8 a machine by NVLink, 400 Gbit/s each beyond;"
            f"\nms of products at {plan.MFU:.0%} of the peak, of exchanging gradients, and products' share"
        )
        print(plan.describe_scaling(config, cfg.seq_len, tokens))


def tokenize_document(text: str) -> np.ndarray:
    """What build-nanogpt's fineweb.py does in each process of its pool."""
    ids = np.array([tokenizer.END_OF_TEXT, *tokenizer.tiktoken_encoding().encode_ordinary(text)])
    assert (ids >= 0).all() and (ids < 2**16).all()
    return ids.astype(np.uint16)


def main(cfg: Config) -> list[Result]:
    if cfg.repeats < 1 or cfg.items < 1 or cfg.batch_size < 1 or cfg.max_tokens < 1:
        raise ValueError("--repeats, --items, --batch-size and --max-tokens must be at least 1")
    if cfg.plan:
        print_plan(cfg)
        return []
    bench = Bench(cfg)
    name = (
        torch.cuda.get_device_name()
        if bench.device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    machine = f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    precision = f"{str(bench.dtype).removeprefix('torch.')} ({bench.why})"
    print(f"{machine}; GPT-2 {cfg.model_size}; {precision}{', compiled' if cfg.compile else ''}")
    print(f"{'work':30} {'ours':>12} {'baseline':>12}  {'':9} {'ratio':>7}  of the limit")
    results = []
    for job in cfg.jobs:
        found = getattr(bench, job)()
        gc.collect()
        torch.cuda.empty_cache()  # the next job may be another process
        for result in found if isinstance(found, list) else [found]:
            results.append(result)
            digits = 2 if result.unit in ("s", "GB") else 1
            share = "" if result.share is None else f"{result.share:6.0%}"
            print(
                f"{result.job:30} {result.ours:12,.{digits}f} {result.baseline:12,.{digits}f}  "
                f"{result.unit:9} {result.ratio:5.2f} x  {share}",
                flush=True,
            )
    if cfg.json:
        rows = [{**vars(result), "ratio": result.ratio} for result in results]
        report = {"machine": machine, "dtype": str(bench.dtype), "compile": cfg.compile, "results": rows}
        Path(cfg.json).write_text(json.dumps(report, indent=2), encoding="utf-8")
    return results


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)
