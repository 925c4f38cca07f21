"""bench.py measures every job on a small model, and writes what it prints."""

import dataclasses
import json
import typing

import pytest
import torch

import bench
import hellaswag
from lib import plan
from model import GPT, SIZES


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(SIZES, "124M", dict(n_layer=1, n_head=2, n_embd=16))


@pytest.fixture
def pretend_gpu(small, monkeypatch):
    """Makes a Bench with the defaults of a GPU, whose tensors are on the CPU."""
    monkeypatch.setattr(bench, "pick_device", lambda name: torch.device("cpu" if name == "cpu" else "cuda"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 6e9)

    def make(**cfg) -> bench.Bench:
        runner = bench.Bench(bench.Config(dtype="float32", repeats=1, **cfg))
        runner.device = torch.device("cpu")
        runner.limits = {"float32 TFLOP/s": 0.5, "float32 GB/s": 20.0}  # not to be measured
        return runner

    return make


@pytest.mark.parametrize("jobs, is_training", [(("hellaswag",), False), (("train",), True)])
def test_our_network_is_measured_in_the_mode_of_the_job(small, monkeypatch, jobs, is_training):
    """In training mode the residual stream is bfloat16."""
    modes, hidden = set(), GPT.hidden

    def look(model: GPT, *args):
        modes.add(model.training)
        return hidden(model, *args)

    monkeypatch.setattr(GPT, "hidden", look)
    cfg = bench.Config(
        batch_size=1, seq_len=16, items=1, max_tokens=2, repeats=1, device="cpu", dtype="float32"
    )
    bench.main(dataclasses.replace(cfg, jobs=jobs))
    assert modes == {is_training}


@pytest.mark.slow
def test_every_job_runs_and_is_written_down(small, tmp_path, capsys):
    out = tmp_path / "bench.json"
    cfg = bench.Config(
        jobs=("train", "hellaswag", "generate", "load", "read"), batch_size=1, seq_len=16, items=1,
        max_tokens=2, repeats=1, device="cpu", dtype="float32", json=str(out),
    )  # fmt: skip
    results = bench.main(cfg)
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    rows = report["results"]
    assert list(report["limits"]) == ["float32 TFLOP/s", "float32 GB/s"]
    assert list(dict.fromkeys(row["job"].split()[0] for row in rows)) == list(cfg.jobs)
    for result, row in zip(results, rows):
        assert result.job in printed and result.ours > 0 and result.baseline > 0
        better = result.ours > result.baseline
        assert row["ratio"] == result.ratio and (result.ratio > 1) == (better == result.higher_is_better)
        assert row["share"] == result.share
    assert [result.job for result in results if result.share] == [
        "train B=1 T=16", "hellaswag 1 items", "generate 1 x 2, float32", "generate 64 x 2, float32",
    ]  # fmt: skip
    assert all(0 < result.share < 1.5 for result in results if result.share)


@pytest.mark.slow
def test_generation_is_measured_in_float32_and_in_the_fast_precision(small):
    cfg = bench.Config(jobs=("generate",), max_tokens=2, repeats=1, device="cpu", dtype="bfloat16")
    assert [result.job for result in bench.main(cfg)] == [
        "generate 1 x 2, float32", "generate 64 x 2, float32",
        "generate 1 x 2, bfloat16", "generate 64 x 2, bfloat16",
    ]  # fmt: skip


@pytest.mark.slow
def test_memory_is_that_of_a_step_and_not_of_the_process_that_measures():
    ballast = torch.ones(2_000_000_000 // 4)  # 2 GB that the two processes do not have
    cfg = bench.Config(jobs=("memory",), seq_len=64, batch_size=1, device="cpu", dtype="float32")
    (result,) = bench.main(cfg)
    assert ballast.nbytes == 2e9
    # Weights, gradients and AdamW's two moments of 124M are 2.0 GB, and torch and transformers some tenths.
    assert 2.0 < result.ours < 3.5 and 2.0 < result.baseline < 3.5
    assert not result.higher_is_better


def test_both_models_of_the_bench_are_the_same_network(small):
    ours, theirs = bench.Bench(bench.Config(device="cpu", dtype="float32")).make_models()
    idx = torch.arange(10)[None]
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-4, rtol=0)


def test_nothing_of_a_baseline_is_left_with_our_setting_of_float32_products():
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    runner = bench.Bench(bench.Config(device="cpu", dtype="float32", repeats=1))
    before, seen = matmul.fp32_precision, []
    runner.time_sides(*[lambda side=side: seen.append((side, matmul.fp32_precision)) for side in range(3)])
    assert seen == [(0, before), (1, "ieee"), (2, "ieee")] * 2 and matmul.fp32_precision == before != "ieee"


@pytest.mark.parametrize("name", ["repeats", "items", "batch_size", "seq_len", "max_tokens"])
def test_nonsense_is_refused(name):
    cfg: dict = {name: 0}
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is 0; it must be at least 1"):
        bench.main(bench.Config(**cfg))


def test_defaults_go_by_the_device(pretend_gpu):
    gpu, cpu = pretend_gpu(), bench.Bench(bench.Config(device="cpu"))
    assert (gpu.jobs, gpu.batch_size, gpu.compiles_steps) == (bench.GPU_JOBS, 0, True)
    assert (cpu.jobs, cpu.batch_size, cpu.compiles_steps) == (typing.get_args(bench.Job), 4, False)
    asked: dict = dict(jobs=("read",), batch_size=2)
    for runner, compile in [
        (pretend_gpu(**asked), True),
        (bench.Bench(bench.Config(device="cpu", compile=True, **asked)), True),
    ]:
        assert (runner.jobs, runner.batch_size, runner.compiles_steps) == (("read",), 2, compile)


@pytest.mark.parametrize("seconds_of_16, best", [(1.9, 16), (2.1, 8)])
def test_the_faster_of_the_largest_batch_that_fits_and_half_of_it_is_taken(seconds_of_16, best):
    tried, seconds = [], {16: seconds_of_16, 8: 1.0}

    def measure(batch_size):
        tried.append(batch_size)
        if batch_size > 16:
            raise torch.OutOfMemoryError
        return batch_size, seconds[batch_size], 0.0

    assert bench.find_best_step(measure, 64)[0] == best and tried == [64, 32, 16, 8]


def test_a_model_of_which_nothing_fits_is_refused():
    def measure(batch_size):
        raise torch.OutOfMemoryError

    with pytest.raises(ValueError, match="not even one sequence fits"):
        bench.find_best_step(measure, 4)


def test_each_side_is_compiled_and_has_its_own_batch_size_on_a_gpu(pretend_gpu, monkeypatch):
    runner, compiled, tried = pretend_gpu(seq_len=16), [], []
    monkeypatch.setattr(torch, "compile", lambda call, **options: compiled.append(options) or call)
    work = plan.Workload(runner.model_config, 16, dtype=torch.float32)
    free = sum(work.step_bytes(3).values())  # so 4 may fit, compiled
    monkeypatch.setattr(plan, "free_memory", lambda device, processes: (free, ""))
    make_step = runner.make_step

    def run_out(model, batch_size):
        ours = isinstance(model, bench.GPT)
        tried.append((ours, batch_size))
        step = make_step(model, batch_size)
        if not ours and batch_size > 1:
            raise torch.OutOfMemoryError
        return step

    monkeypatch.setattr(runner, "make_step", run_out)
    monkeypatch.setattr(runner, "time_sides", lambda step: [step() or 1.0])  # so the largest is the fastest
    (train,), (memory,) = runner.train(), runner.memory()
    assert tried == [(True, 4), (True, 2), (False, 4), (False, 2), (False, 1)]
    assert compiled == [{"dynamic": False}] * 5
    assert (train.job, train.ours, train.baseline) == ("train B=4/1 T=16", 64, 16)
    assert train.share == pytest.approx(64 * runner.model_config.flops_per_token(16) / 0.5e12)
    assert (memory.job, memory.unit, memory.ours, memory.baseline) == (
        "memory B=4/1 T=16",
        "MB/seq",
        1500,
        6000,
    )
    assert memory.share is None and memory.ratio == 4


def test_hellaswag_takes_all_real_items_on_a_gpu_and_few_for_the_baseline(pretend_gpu, tmp_path, monkeypatch):
    item = {"ctx_a": "A cat", "ctx_b": "", "ctx": "A cat", "activity_label": "Cats", "label": 0}
    data = tmp_path / "hellaswag_val.jsonl"
    monkeypatch.setattr(hellaswag, "DATA", data)
    monkeypatch.setattr(bench, "BASELINE_ITEMS", 2)
    runner, seen = pretend_gpu(items=3), []
    assert len(runner.make_items()) == 3
    lines = [json.dumps({**item, "endings": [f"ends {n}.", "runs.", "sleeps.", "eats."]}) for n in range(5)]
    data.write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(runner, "time_sides", lambda *sides: [1.0 for side in sides if not side()])
    monkeypatch.setattr(hellaswag, "score", lambda model, rows, size: seen.append((len(rows), size)))
    (result,) = runner.hellaswag()
    assert seen == [(20, 64)] and result.share
    assert (result.job, result.ours, result.baseline) == ("hellaswag 5 items", 5, 2)
    runner.on_gpu = False
    assert len(runner.make_items()) == 3


def test_a_limit_is_measured_once_per_precision():
    runner, calls = bench.Bench(bench.Config(device="cpu", dtype="float32")), []
    runner.time_sides = lambda *sides: calls.append(sides) or [2.0]
    dtypes = [torch.float32, torch.bfloat16, torch.float32]
    assert [runner.measure_limit("GB/s", dtype) for dtype in dtypes] == pytest.approx([1.25] * 3, rel=1e-4)
    flops = 10 * 2 * 4096 * 768 * 3072 / 2
    assert runner.measure_limit("TFLOP/s", torch.float32) == pytest.approx(flops / 1e12)
    assert len(calls) == 3 and list(runner.limits) == ["float32 GB/s", "bfloat16 GB/s", "float32 TFLOP/s"]


def test_versions_and_limits_are_written_down(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)

    def work(runner):
        runner.limits["float32 GB/s"] = 2.5
        yield bench.Result("work", "s", 1, 2, share=0.5)

    monkeypatch.setattr(bench.Bench, "load", work)
    out = tmp_path / "bench.json"
    bench.main(bench.Config(jobs=("load",), device="cpu", dtype="float32", json=str(out)))
    report, printed = json.loads(out.read_text(encoding="utf-8")), capsys.readouterr().out
    versions = f"torch {torch.__version__}, CUDA 13.0, cuDNN 91002"
    assert versions in printed and versions in report["machine"] and report["device"] in report["machine"]
    assert (report["torch"], report["CUDA"], report["cuDNN"]) == (torch.__version__, "13.0", 91002)
    assert report["limits"] == {"float32 GB/s": 2.5} and "limits: float32 GB/s 2.50\n" in printed
    assert report["results"][0]["share"] == 0.5 and "50%" in printed
