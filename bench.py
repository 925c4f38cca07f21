"""Measures this machine's speed, and a baseline's in the same run: compare ratios between machines.

    python bench.py                                            # GPT-2 124M: everything, or on CUDA GPU_JOBS
    python bench.py --jobs train --batch-size 64 --compile --json bench.json

    train      tokens/s of forward, backward and AdamW      beside transformers' GPT-2
    memory     GB at the peak of that step                  the same, each in a process of its own
    hellaswag  items/s, contexts read once for 4 endings    beside build-nanogpt's loop: one item at a time,
                                                            four padded rows, all logits
    generate   tokens/s of one sequence and of 64           beside transformers' generate with its cache
    load       seconds from a checkpoint to a model         beside transformers' from_pretrained
    read       batches/s of 64 x 1,024 tokens from shards   beside nanoGPT's get_batch
    tokenize   MB/s of text, parquet to shards on disk      beside build-nanogpt's method, tiktoken's batches,
                                                            gigatoken alone, and reading the parquet alone

Ours and the baseline take turns, and each figure is a median: other load on the machine slows both alike. The
last column is ours as a share of the machine's limit: the measured speed of large matrix products (train,
hellaswag), or of reading the weights, unless their products take longer (generate).

On CUDA the steps are compiled and take no turns: each side has the memory to itself. Its batch size is the
largest power of two that fits or, if faster, half of it, and `memory` is in MB per sequence. `hellaswag`
takes all real items if they were downloaded; its baseline takes the first 200. GPU_JOBS should need
8 minutes on an H100, by estimate: train and memory 4 (5 compilations), hellaswag 2, generate 1.5, others 0.5.
"""

import lib.startup  # noqa: F401

import contextlib
import functools
import gc
import multiprocessing
import os
import platform
import random
import statistics
import tempfile
import time
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

import fineweb
import hellaswag
from lib import checkpoint, cli, documents, plan, shards, sources, tokenizer
from lib.decoding import speed_up
from lib.device import allow_cudnn_attention, autocast, cast_linears, pick_device, pick_dtype
from lib.files import check_target, write_json
from model import GPT, GPTConfig, config_to_hf, to_hf

Job = Literal["train", "memory", "hellaswag", "generate", "load", "read", "tokenize"]
GPU_JOBS: tuple[Job, ...] = ("train", "memory", "hellaswag", "generate", "load")
BASELINE_ITEMS = 200  # on CUDA; one item at a time is slow
Step = tuple[int, float, float]  # batch size, seconds, peak memory in GB


@dataclass(frozen=True)
class Config:
    jobs: tuple[Job, ...] = cli.knob((), "the jobs to measure; by default all, on CUDA GPU_JOBS")
    model_size: str = cli.knob("124M", "124M, 350M, 774M or 1558M")
    seq_len: int = cli.knob(1024, "tokens of context in `train` and `memory`", at_least=1)
    batch_size: int | Literal["auto"] = cli.knob(
        "auto", "sequences per step; auto: 4, on CUDA the best", at_least=1
    )
    items: int = cli.knob(96, "random items in `hellaswag`; on CUDA only without the real ones", at_least=1)
    max_tokens: int = cli.knob(64, "tokens to make in `generate`", at_least=1)
    text: cli.PathName = cli.knob("", "a parquet file or folder for `tokenize`; by default pydocs, ten times")
    repeats: int = cli.knob(3, "measurements of each side; the median counts", at_least=1)
    device: str = cli.knob("auto", "auto, cpu, cuda, mps")
    dtype: cli.Dtype = cli.knob(
        "auto", "precision of the matrix products; `generate` is measured in float32, too"
    )
    compile: bool = cli.knob(False, "torch.compile steps, and speed_up(); on CUDA both always")
    json: cli.PathName = cli.knob("", "also write the table to this file")


@dataclass(frozen=True)
class Result:
    job: str
    unit: str
    ours: float
    baseline: float
    higher_is_better: bool = True
    share: float | None = None  # of the machine's limit

    @property
    def ratio(self) -> float:
        return self.ours / self.baseline if self.higher_is_better else self.baseline / self.ours


class Bench:
    """The jobs, as methods, on one device in one precision."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.device = pick_device(cfg.device)
        self.dtype, self.why = pick_dtype(cfg.dtype, self.device)
        self.model_config = GPTConfig.named(cfg.model_size, block_size=max(1024, cfg.seq_len))
        self.on_gpu = self.device.type == "cuda"
        self.jobs = cfg.jobs or (GPU_JOBS if self.on_gpu else typing.get_args(Job))
        # 0: the best, which is not known yet
        self.batch_size = (0 if self.on_gpu else 4) if cfg.batch_size == "auto" else cfg.batch_size
        self.compiles_steps = self.on_gpu or cfg.compile
        self.limits: dict[str, float] = {}

    def make_models(self) -> tuple[GPT, Any]:
        """The same random network twice, without dropout, in evaluation mode: ours, and transformers'
        GPT2LMHeadModel."""
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        ours = GPT(self.model_config)
        names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "embd_pdrop", "attn_pdrop")
        hf_config = config_to_hf(self.model_config)
        theirs = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, **{name: hf_config[name] for name in names}))
        theirs.load_state_dict(to_hf(ours.state_dict(), self.model_config), strict=False)  # lm_head is tied
        return ours.to(self.device).eval(), theirs.to(self.device).eval()  # type: ignore[arg-type]

    def time_sides(self, *sides: Callable[[], Any]) -> list[float]:
        """The median seconds of each side, ours first. They take turns; the first round does not count.
        The others have torch's own float32 products, without the setting of pick_device."""
        matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        precisions = [matmul.fp32_precision, *["ieee"] * (len(sides) - 1)]
        times: list[list[float]] = [[] for _ in sides]
        for _ in range(self.cfg.repeats + 1):
            for side, precision, measured in zip(sides, precisions, times):
                gc.collect()
                matmul.fp32_precision = precision
                self.wait()
                begin = time.perf_counter()
                side()
                self.wait()
                measured.append(time.perf_counter() - begin)
        matmul.fp32_precision = precisions[0]
        return [statistics.median(measured[1:]) for measured in times]

    def wait(self):
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def measure_limit(self, unit: Literal["TFLOP/s", "GB/s"], dtype: torch.dtype) -> float:
        """The limit, measured once: TFLOP/s of a large product, 4,096 tokens through a layer of 768 by 3,072,
        or GB/s of reading 250 MB of weights for one row. A GPU needs more, and has a larger cache."""
        name, small = f"{str(dtype)[6:]} {unit}", self.device.type == "cpu"
        if name not in self.limits:
            scale, count = (1, 10) if small else (4, 30)
            rows, width, out = 4096 * scale, 768 * scale, 3072 * scale
            if unit == "GB/s":
                rows, out = 1, (250_000_000 if small else 2_000_000_000) // width // dtype.itemsize
            x, weight = (torch.randn(n, width, dtype=dtype, device=self.device) for n in (rows, out))
            product = F.linear(x, weight)

            def multiply(x=x, weight=weight, product=product):
                for _ in range(count):
                    torch.mm(x, weight.t(), out=product)

            (seconds,) = self.time_sides(multiply)
            work = weight.nbytes / 1e9 if unit == "GB/s" else 2 * rows * weight.numel() / 1e12
            self.limits[name] = count * work / seconds
        return self.limits[name]

    def make_step(self, model: GPT | Any, batch_size: int) -> Callable[[], None]:
        """A function that does a training step: forward, backward, AdamW."""
        idx = torch.randint(50257, (batch_size, self.cfg.seq_len), device=self.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        optimizer.zero_grad(set_to_none=True)  # of a step that ran out of memory
        model.train()

        def compute_loss(idx: torch.Tensor) -> torch.Tensor:
            if isinstance(model, GPT):
                return model(idx, idx)
            return F.cross_entropy(model(idx).logits.flatten(0, 1).float(), idx.flatten())

        fast = torch.compile(compute_loss, dynamic=False) if self.compiles_steps else compute_loss

        def step():
            with autocast(self.device, self.dtype), allow_cudnn_attention(True):
                loss = fast(idx)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    @functools.cached_property
    def steps(self) -> list[Step]:
        """Our training step and the baseline's."""
        if self.on_gpu:
            return [self.measure_alone(is_ours) for is_ours in (True, False)]
        times = self.time_sides(*[self.make_step(model, self.batch_size) for model in self.make_models()])
        return [(self.batch_size, seconds, 0.0) for seconds in times]

    def measure_alone(self, is_ours: bool) -> Step:
        """A side's step, alone on the GPU, with the batch size asked for or the best."""
        model = self.make_models()[0 if is_ours else 1]

        def measure(batch_size: int) -> Step:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            torch._dynamo.reset()  # of what it knows from the batch before
            (seconds,) = self.time_sides(self.make_step(model, batch_size))
            return batch_size, seconds, torch.cuda.max_memory_allocated(self.device) / 1e9

        if self.batch_size:
            return measure(self.batch_size)
        work, start = plan.Workload(self.model_config, self.cfg.seq_len, dtype=self.dtype), 1
        while sum(work.step_bytes(start).values()) < plan.free_memory(self.device, 1)[0]:
            start *= 2  # the first that does not fit uncompiled
        return find_best_step(measure, start)

    def name_shape(self, *batch_sizes: int) -> str:
        return f"B={'/'.join(map(str, dict.fromkeys(batch_sizes)))} T={self.cfg.seq_len}"

    def train(self) -> Iterator[Result]:
        batch_sizes, times, _ = zip(*self.steps)
        T = self.cfg.seq_len
        speed, baseline = (n * T / seconds for n, seconds in zip(batch_sizes, times))
        flops = speed * self.model_config.flops_per_token(T)
        share = flops / 1e12 / self.measure_limit("TFLOP/s", self.dtype)
        yield Result(f"train {self.name_shape(*batch_sizes)}", "tok/s", speed, baseline, share=share)

    def memory(self) -> Iterator[Result]:
        """The peak of two steps or more: from its beginning the second has the optimizer's state."""
        if self.on_gpu:  # the batch sizes may differ
            batch_sizes, _, peaks = zip(*self.steps)
            sides = [1000 * peak / n for n, peak in zip(batch_sizes, peaks)]
            yield Result(f"memory {self.name_shape(*batch_sizes)}", "MB/seq", *sides, higher_is_better=False)
            return
        if not Path("/proc/self/status").exists():
            print("memory is left out: it can be read on CUDA and on Linux only")
            return
        sides = []
        for is_ours in (True, False):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                try:
                    sides.append(fresh.submit(measure_peak, self.cfg, is_ours).result())
                except BrokenProcessPool as error:
                    raise ValueError("memory: a process was killed; try a smaller --batch-size") from error
        yield Result(f"memory {self.name_shape(self.batch_size)}", "GB", *sides, higher_is_better=False)

    def make_items(self) -> list[list[hellaswag.Row]]:
        """The rows of all real items on a GPU, if they are there, or of random ones."""
        if self.on_gpu and hellaswag.DATA.exists():
            return [hellaswag.render(item, "completion")[0] for item in hellaswag.load_items(hellaswag.DATA)]
        # Lengths like HellaSwag's: endings of 5 to 45 tokens, contexts of 20 to 110. Only three lengths of
        # contexts, because about a hundred of the 10,042 items share each length.
        draw, items = random.Random(0), []
        for _ in range(self.cfg.items):
            context = [draw.randrange(50257) for _ in range(draw.choice((30, 50, 80)))]
            endings = [[draw.randrange(50257) for _ in range(draw.randint(5, 45))] for _ in range(4)]
            items.append([(context, ending) for ending in endings])
        return items

    def hellaswag(self) -> Iterator[Result]:
        ours, theirs = self.make_models()
        cast_linears(ours, self.dtype)
        items = self.make_items()
        few = items[:BASELINE_ITEMS] if self.on_gpu else items
        batch_size = hellaswag.pick_batch_size(ours)

        @torch.inference_mode()
        def score_item_by_item():
            for rows in few:
                width = max(len(context) + len(ending) for context, ending in rows)
                ids = torch.tensor([(c + e + [0] * width)[:width] for c, e in rows], device=self.device)
                logits = theirs(ids).logits[:, :-1]
                losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
                losses.view(4, -1).sum(dim=1).argmin().item()

        rows = [row for item in items for row in item]
        with autocast(self.device, self.dtype):
            times = self.time_sides(lambda: hellaswag.score(ours, rows, batch_size), score_item_by_item)
        C, scored = self.model_config.n_embd, sum(len(ending) for _, ending in rows)
        # A context is read once per item; an ending's last token is not read.
        read = scored - len(rows) + sum(len(item[0][0]) for item in items)
        flops = 2 * C * (12 * self.model_config.n_layer * C * read + self.model_config.vocab_size * scored)
        share = flops / times[0] / 1e12 / self.measure_limit("TFLOP/s", self.dtype)
        speed, baseline = len(items) / times[0], len(few) / times[1]
        yield Result(f"hellaswag {len(items)} items", "items/s", speed, baseline, share=share)

    def generate(self) -> Iterator[Result]:
        for dtype in dict.fromkeys([torch.float32, self.dtype]):
            yield from (self.generate_rows(rows, dtype) for rows in (1, 64))

    def generate_rows(self, rows: int, dtype: torch.dtype) -> Result:
        ours, theirs = self.make_models()
        theirs.to(dtype)
        cast_linears(ours, dtype)
        if is_faster := self.cfg.compile or self.on_gpu:
            torch._dynamo.reset()  # of what it knows from the rows before
            speed_up(ours)
        count = self.cfg.max_tokens
        prompt = torch.tensor([tokenizer.encode("Hello, I'm a language model,")] * rows, device=self.device)
        options = dict(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=50256)

        def our_side():
            with autocast(self.device, dtype):
                ours.generate(prompt, count, temperature=0.0, stop_token=None)

        def their_side():
            theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)

        times = self.time_sides(our_side, their_side)
        weights = [part.weight for part in ours.modules() if isinstance(part, torch.nn.Linear)]
        weights.append(ours.wte.weight)
        read = sum(w.nbytes / self.measure_limit("GB/s", w.dtype) for w in weights) / 1e9
        multiply = sum(2 * rows * w.numel() / self.measure_limit("TFLOP/s", w.dtype) for w in weights) / 1e12
        share = max(read, multiply) * count / times[0]
        speed, baseline = (rows * count / seconds for seconds in times)
        name = f"generate {rows} x {count}, {str(dtype)[6:]}{', sped up' if is_faster else ''}"
        return Result(name, "tok/s", speed, baseline, share=share)

    def load(self) -> Iterator[Result]:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        config = GPTConfig.named(self.cfg.model_size)
        with tempfile.TemporaryDirectory() as folder:
            path = checkpoint.save(Path(folder), 0, config, GPT(config).state_dict(), {}, {}, {})
            times = self.time_sides(
                lambda: GPT.from_pretrained(path).to(self.device),
                lambda: AutoModelForCausalLM.from_pretrained(path).to(self.device),  # type: ignore[arg-type]
            )
        yield Result("load a checkpoint", "s", times[0], times[1], higher_is_better=False)

    def read(self) -> Iterator[Result]:
        """The time for which a training step would wait if no thread prepared its batch."""
        rows, seq_len, count = 64, 1024, 50
        ids = np.random.default_rng(0).integers(50257, size=10_000_000, dtype=np.uint16)
        with tempfile.TemporaryDirectory() as folder:
            np.save(Path(folder, "random_train_000000.npy"), ids)
            ids.tofile(Path(folder, "train.bin"))
            reader = shards.ShardReader(folder, "train", seq_len)

            def get_batch():  # nanoGPT maps the file anew each time, and draws windows with replacement
                data = np.memmap(Path(folder, "train.bin"), dtype=np.uint16, mode="r")
                starts = torch.randint(len(data) - seq_len, (rows,))
                for first in (starts, starts + 1):
                    windows = [data[i : i + seq_len].astype(np.int64) for i in first]
                    torch.stack([torch.from_numpy(window) for window in windows])

            times = self.time_sides(
                lambda: [reader.batch(step, 0, rows, rows) for step in range(count)],
                lambda: [get_batch() for _ in range(count)],
            )
        yield Result(f"read {rows} x {seq_len}", "batches/s", count / times[0], count / times[1])

    def tokenize(self) -> Iterator[Result]:
        """All sides read the same parquet files on all cores. Only ours also writes shards."""
        import gigatoken
        import pyarrow as pa
        import pyarrow.parquet as pq

        with tempfile.TemporaryDirectory() as folder:
            source = self.cfg.text or folder
            if not self.cfg.text:
                table = pa.table({"text": list(documents.read_pydocs()) * 10})
                pq.write_table(table, Path(folder, "pydocs.parquet"))
            files = sources.find_local_files(source)
            if others := [path.name for path in files if path.suffix != ".parquet"]:
                raise ValueError(f"--text {source} holds {others[0]}; this compares readers of parquet only")

            def batches() -> Iterator[Any]:
                return (batch.texts for path in files for batch in documents.read_file(path))

            def ours():
                with tempfile.TemporaryDirectory() as out:
                    fineweb.main(fineweb.Config(source=source, out_dir=out))

            encoding = tokenizer.load_tiktoken()
            cores = os.cpu_count() or 1
            parquet = gigatoken.ParquetFileSource([str(path) for path in files])
            with multiprocessing.get_context("spawn").Pool(cores) as pool:
                pool.map(tokenize_document, ["warm up"] * 100)

                def run_pool():
                    rows = (text for texts in batches() for text in texts.to_pylist())
                    sum(map(len, pool.imap(tokenize_document, rows, 16)))

                sides = {
                    "build-nanogpt's pool": run_pool,
                    "tiktoken, batches": lambda: [
                        encoding.encode_ordinary_batch(texts.to_pylist(), num_threads=cores)
                        for texts in batches()
                    ],
                    "gigatoken alone": lambda: tokenizer.load_gigatoken().encode_files(parquet),
                    "reading alone": lambda: sum(map(len, batches())),
                }
                times = self.time_sides(ours, *sides.values())
            megabytes = sum(texts.nbytes for texts in batches()) / 1e6
            tokens = sum(len(tokenizer.encode_corpus(texts)) for texts in batches())
        print(f"{megabytes:,.0f} MB of text, {tokens:,} tokens: a MB is {tokens / megabytes:,.0f} tokens")
        for side, seconds in zip(sides, times[1:]):
            yield Result(f"tokenize: {side}", "MB/s", megabytes / times[0], megabytes / seconds)


def find_best_step(measure: Callable[[int], Step], start: int) -> Step:
    """Halves the batch size from `start` until `measure` raises no torch.OutOfMemoryError, and once more.
    Returns the step with more sequences per second. Raises ValueError if not even one sequence fits."""
    steps: list[Step] = []
    while start and len(steps) < 2:
        with contextlib.suppress(torch.OutOfMemoryError):
            steps.append(measure(start))
        start //= 2
    if not steps:
        raise ValueError("not even one sequence fits this GPU; a smaller --model-size or --seq-len would")
    return max(steps, key=lambda step: step[0] / step[1])


def measure_peak(cfg: Config, is_ours: bool) -> float:
    """The peak memory, in GB, of two steps of our model or of transformers'. Needs a process of its own."""
    bench = Bench(cfg)
    model = bench.make_models()[0 if is_ours else 1]
    gc.collect()
    if not is_ours:
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"  # type: ignore[attr-defined]
    step = bench.make_step(model, bench.batch_size)
    step()
    step()
    # Not getrusage: its peak of a new process is at first that of the parent.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


def tokenize_document(text: str) -> np.ndarray:
    """The work of each process in the pool of build-nanogpt's fineweb.py."""
    ids = np.array([tokenizer.END_OF_TEXT, *tokenizer.load_tiktoken().encode_ordinary(text)])
    assert (ids >= 0).all() and (ids < 2**16).all()
    return ids.astype(np.uint16)


def main(cfg: Config) -> list[Result]:
    cli.check_bounds(cfg)
    check_target(cfg.json)
    bench = Bench(cfg)
    card = torch.cuda.get_device_name(bench.device) if bench.on_gpu else ""
    name = card or platform.processor() or platform.machine()
    facts = {"torch": torch.__version__, "CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
    versions = ", ".join(f"{package} {version}" for package, version in facts.items() if version)
    machine = f"{name}, {torch.get_num_threads()} threads, {versions}"
    precision = f"{str(bench.dtype).removeprefix('torch.')} ({bench.why})"
    print(f"{machine}; GPT-2 {cfg.model_size}; {precision}{', compiled' if bench.compiles_steps else ''}")
    print(f"{'work':30} {'ours':>12} {'baseline':>12}  {'':9} {'ratio':>7}  of the limit")
    results = []
    for job in bench.jobs:
        for result in getattr(bench, job)():
            results.append(result)
            digits = 2 if result.unit in ("s", "GB") else 1
            share = "" if result.share is None else f"{result.share:6.0%}"
            figures = f"{result.job:30} {result.ours:12,.{digits}f} {result.baseline:12,.{digits}f}"
            print(figures, f" {result.unit:9} {result.ratio:5.2f} x  {share}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()  # the next job may be another process
    if bench.limits:
        print("limits:", ", ".join(f"{name} {limit:,.2f}" for name, limit in bench.limits.items()))
    if cfg.json:
        rows = [{**vars(result), "ratio": result.ratio} for result in results]
        facts |= {"machine": machine, "device": name, "dtype": str(bench.dtype)}
        report = {**facts, "compile": bench.compiles_steps, "limits": bench.limits, "results": rows}
        write_json(Path(cfg.json), report)
    return results


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(Config, __doc__)), outlives_console=True)
