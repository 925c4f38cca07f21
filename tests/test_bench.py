"""bench.py measures every job on a small model, and writes what it prints."""

import json

import pytest

import bench
from model import SIZES


def test_every_job_runs_and_is_written_down(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SIZES, "124M", dict(n_layer=1, n_head=2, n_embd=16))
    out = tmp_path / "bench.json"
    cfg = bench.Config(
        jobs=("train", "hellaswag", "generate", "load", "read"), batch_size=1, seq_len=16, items=1,
        max_tokens=2, repeats=1, device="cpu", dtype="float32", json=str(out),
    )  # fmt: skip
    results = bench.main(cfg)
    printed = capsys.readouterr().out
    rows = json.loads(out.read_text())["results"]
    assert [row["job"].split()[0] for row in rows] == list(cfg.jobs)
    for result, row in zip(results, rows):
        assert result.job in printed and result.ours > 0 and result.baseline > 0
        better = result.ours > result.baseline
        assert row["ratio"] == result.ratio and (result.ratio > 1) == (better == result.higher_is_better)


def test_both_models_of_the_bench_are_the_same_network(monkeypatch):
    import torch

    monkeypatch.setitem(SIZES, "124M", dict(n_layer=1, n_head=2, n_embd=16))
    ours, theirs = bench.Bench(bench.Config(device="cpu", dtype="float32")).models()
    idx = torch.arange(10)[None]
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-4, rtol=0)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        bench.main(bench.Config(repeats=0))
