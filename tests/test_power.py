"""Power cuts while training, pruning, tokenizing and joining: power.py draws what the disk then holds."""

import dataclasses
import shutil
import sys
from typing import Any

import faults
import power
import pytest
from corpora import DOCUMENTS, read_files, to_jsonl
from helpers import ROOT, end_of, flags, lines_of

import fineweb
from lib import checkpoint, shards

pytestmark = pytest.mark.skipif(not shutil.which("strace"), reason="needs strace (apt install strace)")
PART_BYTES = 1500
MANY = [f"{number} {text}" for number in range(12) for text in DOCUMENTS]
STREAMS = ("train", "val", "lr", "norm")


@pytest.mark.slow
@pytest.mark.fault(31)
@pytest.mark.timeout(3000)
def test_after_a_power_cut_a_run_has_what_was_said_to_be_saved_and_the_same_end(
    launch, config, tmp_path, tally
):
    recorded, root = tmp_path / "recorded", tmp_path / "cut"
    cfg = dataclasses.replace(
        config, log_dir=str(recorded), max_steps=6, checkpoint_every=1, val_every=3, keep_last=2
    )
    recorded.mkdir()
    command = [sys.executable, str(ROOT / "train_gpt2.py"), *flags(cfg), "--resume"]
    calls = power.record(recorded, [*command, "--max-steps", "3"], command, trace=tmp_path / "trace")
    whole = recorded / "run"
    cfg = dataclasses.replace(cfg, log_dir=str(root))
    for attempt in tally(2, 25):
        cut = power.cut(calls, faults.draw(attempt.number))
        cut.write(root)
        saved = [int(line.split()[-4][-6:]) for line in cut.said.splitlines() if "| saved step_" in line]
        run = root / "run"
        found = checkpoint.find_newest_valid(run)[0] if run.is_dir() else None
        assert (found.state["step"] if found else 0) >= max(saved, default=0), (attempt, cut.said)
        launch(cfg, "--resume").finish()
        assert end_of(run) == end_of(whole), attempt
        assert lines_of(run, *STREAMS) == lines_of(whole, *STREAMS), attempt
        shutil.rmtree(root)


@pytest.mark.fault(31)
@pytest.mark.slow
def test_after_a_power_cut_tokenizing_ends_with_the_same_bytes(tmp_path, monkeypatch, tally):
    recorded, root = tmp_path / "recorded", tmp_path / "cut"
    (tmp_path / "in").mkdir()
    for number in range(6):
        (tmp_path / "in" / f"{number}.jsonl").write_bytes(to_jsonl(MANY[number::6]))
    options: Any = dict(source=str(tmp_path / "in"), shard_tokens=300, val_tokens=100)
    recorded.mkdir()
    settings = {"out_dir": str(recorded / "deep" / "toy"), **options}
    code = f"import fineweb; fineweb.PART_BYTES = {PART_BYTES}; fineweb.prepare(fineweb.Config(**{settings}))"
    calls = power.record(recorded, [sys.executable, "-c", code], trace=tmp_path / "trace")
    monkeypatch.setattr(fineweb, "PART_BYTES", PART_BYTES)
    cfg = fineweb.Config(out_dir=str(root / "deep" / "toy"), **options)
    for attempt in tally(30, 1000):
        cut = power.cut(calls, faults.draw(attempt.number))
        cut.write(root)
        if "train" in cut.said:  # the summary
            shards.verify(cfg.folder)
        fineweb.prepare(cfg)
        assert read_files(root) == read_files(recorded), attempt
        shutil.rmtree(root)
