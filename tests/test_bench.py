"""bench.py measures every job on a small model, and writes what it prints."""

import json

import pytest
import torch

import bench
from model import SIZES


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(SIZES, "124M", dict(n_layer=1, n_head=2, n_embd=16))


@pytest.mark.slow
def test_every_job_runs_and_is_written_down(small, tmp_path, capsys):
    out = tmp_path / "bench.json"
    cfg = bench.Config(
        jobs=("train", "hellaswag", "generate", "load", "read"), batch_size=1, seq_len=16, items=1,
        max_tokens=2, repeats=1, device="cpu", dtype="float32", json=str(out),
    )  # fmt: skip
    results = bench.main(cfg)
    printed = capsys.readouterr().out
    rows = json.loads(out.read_text())["results"]
    assert list(dict.fromkeys(row["job"].split()[0] for row in rows)) == list(cfg.jobs)
    for result, row in zip(results, rows):
        assert result.job in printed and result.ours > 0 and result.baseline > 0
        better = result.ours > result.baseline
        assert row["ratio"] == result.ratio and (result.ratio > 1) == (better == result.higher_is_better)
        assert row["share"] == result.share
    assert [result.job for result in results if result.share] == [
        "train B=1 T=16", "hellaswag 1 items", "generate 1 x 2, float32",
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
