"""Faults while training: kills, signals, a full disk, gradients that are not finite, two runs in one folder.

"The same end" is: the same bytes of the final model, and the same training losses.
"""

import contextlib
import dataclasses
import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, random_model, save_checkpoint, write_shards

import checkpoint
import train_gpt2
from model import GPT
from train_gpt2 import Config


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "toy"
    ids = np.random.default_rng(0).integers(97, size=6000).astype(np.uint16)
    write_shards(folder, ids, shard_tokens=1500, val_tokens=1000)
    return folder


@pytest.fixture
def config(data, tmp_path) -> Config:
    """A run of twelve steps that takes seconds, in float32, with every job off."""
    return Config(
        dataset_path=str(data), n_layer=1, n_head=1, n_embd=16, seq_len=32, batch_size=2,
        total_batch_tokens=128, learning_rate=3e-3, warmup_steps=3, max_steps=12, device="cpu",
        dtype="float32", compile=False, log_dir=str(tmp_path), run_name="run", dropout=0.1,
        val_every=0, hellaswag_every=0, sample_every=0, checkpoint_every=4,
    )  # fmt: skip


def losses(run: Path) -> list[str]:
    lines = (run / "log.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.split()[1] == "train"]


def end_of(run: Path) -> tuple[bytes, list[str]]:
    return (checkpoint.steps(run)[-1] / "model.safetensors").read_bytes(), losses(run)


def start(
    cfg: Config, *more: str, launcher: Sequence[str] = (), before: Callable[[], None] | None = None
) -> subprocess.Popen:
    """train_gpt2.py as a process of its own, or as torchrun's."""
    words = ["--no-compile"]
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if value != field.default and not isinstance(value, bool):
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "train_gpt2.py"), *words, *more], preexec_fn=before,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", bufsize=1,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


def read_until(process: subprocess.Popen, words: str) -> str:
    assert process.stdout
    printed = ""
    for line in process.stdout:
        printed += line
        if words in line:
            return printed
    raise AssertionError(f"{words!r} was not printed:\n{printed}")


@pytest.fixture(scope="module")
def long_run(data, tmp_path_factory) -> Config:
    return Config(
        dataset_path=str(data), n_layer=1, n_head=1, n_embd=16, seq_len=32, batch_size=2,
        total_batch_tokens=512, learning_rate=3e-3, warmup_steps=3, max_steps=400, device="cpu",
        dtype="float32", compile=False, log_dir=str(tmp_path_factory.mktemp("log")), run_name="undisturbed",
        val_every=0, hellaswag_every=0, sample_every=0, checkpoint_every=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(long_run) -> tuple[bytes, list[str]]:
    process = start(dataclasses.replace(long_run, max_steps=20, checkpoint_every=20))
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed
    return end_of(Path(long_run.log_dir) / "undisturbed")


# -----------------------------------------------------------------------------
# 7: signals


@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGINT", "SIGUSR1"))]
)
def test_a_signal_ends_the_step_saves_and_tells_how_to_go_on(long_run, tmp_path, name):
    cfg = dataclasses.replace(long_run, log_dir=str(tmp_path), run_name="run")
    process = start(cfg)
    read_until(process, "step      5 | loss")
    process.send_signal(getattr(signal, name))
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + getattr(signal, name), printed
    assert f"{name} was received" in printed and "To go on: --resume" in printed
    (folder,) = checkpoint.steps(tmp_path / "run")
    step = checkpoint.verify(folder)["step"]
    assert len(losses(tmp_path / "run")) == step < 400
    # the same end, once it has gone on
    until = step + 5
    train_gpt2.main(
        train_gpt2.parse_args(["--resume", str(tmp_path / "run"), "--max-steps", str(until), "--override"])
    )
    assert len(losses(tmp_path / "run")) == until


def test_a_stopped_run_that_goes_on_has_the_same_end(config, tmp_path, monkeypatch):
    whole = end_of(train_gpt2.main(dataclasses.replace(config, run_name="whole")))

    def interrupt(self, *args, **kwargs):
        if self.training and next(calls) == 13:  # amid the accumulation
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *args, **kwargs)

    forward, calls = GPT.forward, iter(range(10**6))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(GPT, "forward", interrupt)
        train_gpt2.main(config)
    assert stopped.value.code == 143
    run = tmp_path / "run"
    assert [folder.name for folder in checkpoint.steps(run)] == ["step_000004", "step_000007"]
    train_gpt2.main(train_gpt2.parse_args(["--resume", str(run)]))
    assert end_of(run) == whole


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(long_run, tmp_path):
    cfg = dataclasses.replace(long_run, log_dir=str(tmp_path), run_name="run", num_gpus=2)
    process = start(cfg)
    read_until(process, "step      5 | loss")
    assert len(workers_of(process)) == 2
    os.kill(workers_of(process)[-1], signal.SIGUSR1)
    printed = process.communicate(timeout=90)[0]
    assert process.returncode != 0 and "SIGUSR1 was received" in printed, printed
    (folder,) = checkpoint.steps(tmp_path / "run")
    assert len(losses(tmp_path / "run")) == checkpoint.verify(folder)["step"]


def test_a_second_signal_ends_the_process_at_once(config, tmp_path, monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    signals = train_gpt2.Signals()
    try:
        signals.remember(signal.SIGINT, None)
        signals.remember(signal.SIGINT, None)  # torchrun's echo of the first
        assert codes == [] and signals.caught == signal.SIGINT
        signals.when -= 2
        signals.remember(signal.SIGTERM, None)
        assert codes == [143]
    finally:
        signals.restore()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# -----------------------------------------------------------------------------
# 3: a full disk


def test_a_full_disk_leaves_the_old_checkpoints_and_says_what_is_needed(config, tmp_path, monkeypatch):
    whole = end_of(train_gpt2.main(dataclasses.replace(config, run_name="whole")))
    usage, asked = shutil.disk_usage(tmp_path), iter(range(100))

    def fuller(path):
        return usage._replace(free=0 if next(asked) >= 1 else usage.free)

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"step_000008 needs \d+ MB .* has 0 MB"),
    ):
        patch.setattr(shutil, "disk_usage", fuller)
        train_gpt2.main(config)
    run = tmp_path / "run"
    assert sorted(path.name for path in run.glob("*step*")) == ["step_000004"]
    train_gpt2.main(train_gpt2.parse_args(["--resume", str(run)]))
    assert end_of(run) == whole


def test_when_rank_0_cannot_save_all_processes_end(long_run, tmp_path):
    cfg = dataclasses.replace(long_run, log_dir=str(tmp_path), run_name="run", num_gpus=2, checkpoint_every=5)

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    process = start(cfg, before=limit_files)
    begin = time.monotonic()
    printed = process.communicate(timeout=90)[0]
    assert process.returncode != 0 and time.monotonic() - begin < 45
    assert re.search(r"step_000005 \(\d+ MB\) could not be written: .*File too large", printed), printed
    assert not [path.name for path in (tmp_path / "run").glob("*step*")]


# -----------------------------------------------------------------------------
# 8, 9: a process that is killed, or hangs


def workers_of(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return sorted(map(int, found.stdout.split()))


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_process_was_killed(long_run, tmp_path):
    cfg = dataclasses.replace(long_run, run_name="whole", num_gpus=2, max_steps=40, checkpoint_every=10)
    whole = start(cfg)
    whole.communicate(timeout=120)
    cfg = dataclasses.replace(cfg, log_dir=str(tmp_path), run_name="run", num_gpus=1)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    process = start(cfg, "--resume", launcher=torchrun)
    read_until(process, "step     23 | loss")
    os.kill(workers_of(process)[-1], signal.SIGKILL)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "resumed at step" in printed, printed
    assert end_of(tmp_path / "run") == end_of(Path(long_run.log_dir) / "whole")


@pytest.mark.slow
def test_a_process_that_hangs_is_named(long_run, tmp_path):
    cfg = dataclasses.replace(
        long_run, log_dir=str(tmp_path), run_name="run", num_gpus=2, max_steps=100_000, timeout_seconds=5.0
    )
    process = start(cfg)
    read_until(process, "step      5 | loss")
    stopped = workers_of(process)[-1]
    os.kill(stopped, signal.SIGSTOP)
    begin = time.monotonic()
    try:
        read_until(process, "rank 0 failed; no sign of life from rank 1")
        assert time.monotonic() - begin < 5 + 5
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0


def test_an_error_amid_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    model = random_model()
    save_checkpoint(tmp_path, model, step=1)

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"step_000002 .*could not be written.*space"),
    ):
        patch.setattr("remote.flush", fail)
        save_checkpoint(tmp_path, model, step=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    checkpoint.verify(tmp_path / "step_000001")


# -----------------------------------------------------------------------------
# 21: gradients that are not finite


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the loss of chosen steps (of two micro-steps each) NaN."""

    def poison(*steps: int):
        forward, calls = GPT.forward, iter(range(10**6))

        def wrapped(self, *args, **kwargs):
            loss = forward(self, *args, **kwargs)
            return loss * float("nan") if self.training and next(calls) // 2 in steps else loss

        monkeypatch.setattr(GPT, "forward", wrapped)

    return poison


def test_a_step_that_is_not_finite_leaves_the_weights_as_they_are_and_is_logged(config, poisoned, tmp_path):
    poisoned(4)
    run = train_gpt2.main(dataclasses.replace(config, max_steps=5, checkpoint_every=1))
    before, after = (checkpoint.load(run / f"step_00000{n}") for n in (4, 5))
    assert all(torch.equal(a, b) for a, b in zip(before.model.parameters(), after.model.parameters()))
    assert {k: v.tolist() for k, v in before.optimizer.items()} == {
        k: v.tolist() for k, v in after.optimizer.items()
    }
    assert "4 skip 1" in (run / "log.txt").read_text(encoding="utf-8").splitlines()
    assert after.state["bad_steps"] == 1


def test_after_some_in_a_row_the_run_stops_with_a_checkpoint(config, poisoned, tmp_path):
    poisoned(2, 5, 6, 7)
    with pytest.raises(SystemExit) as stopped:
        train_gpt2.main(dataclasses.replace(config, checkpoint_every=0, max_bad_steps=3))
    assert stopped.value.code == 3
    (folder,) = checkpoint.steps(tmp_path / "run")
    assert checkpoint.verify(folder)["step"] == 8
    model = checkpoint.load(folder).model
    assert all(p.isfinite().all() for p in model.parameters())


# -----------------------------------------------------------------------------
# 30: two runs in one folder; 2: pruning, and what a killed process leaves


def test_a_second_run_in_a_folder_is_refused(config, tmp_path, monkeypatch):
    train_gpt2.main(config)
    forward, refused = GPT.forward, []

    def meanwhile(self, *args, **kwargs):
        if not refused:
            refused.append(None)
            with pytest.raises(ValueError, match="run is in use by another process"):
                train_gpt2.main(
                    train_gpt2.parse_args(["--resume", str(tmp_path / "run"), "--max-steps", "16"])
                )
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GPT, "forward", meanwhile)
    train_gpt2.main(train_gpt2.parse_args(["--resume", str(tmp_path / "run"), "--max-steps", "14"]))
    assert len(losses(tmp_path / "run")) == 14
    assert [p.name for p in tmp_path.iterdir() if "lock" in p.name] == []


def test_old_checkpoints_are_removed_but_for_the_best_and_the_marked(tmp_path):
    model = random_model()
    for step, loss in enumerate([5.0, 3.0, 4.0, None, 3.5, 3.2, None, 3.1]):
        save_checkpoint(tmp_path, model, step=step, val_loss=loss)
    checkpoint.prune(tmp_path, 0, 3)
    assert len(checkpoint.steps(tmp_path)) == 8
    checkpoint.prune(tmp_path, 2, 3)
    assert [int(p.name[5:]) for p in checkpoint.steps(tmp_path)] == [0, 1, 3, 6, 7]
    checkpoint.prune(tmp_path, 1, 0)
    assert [int(p.name[5:]) for p in checkpoint.steps(tmp_path)] == [1, 7]
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_killed_process_left_is_cleaned_and_nothing_whole_is_lost(tmp_path):
    model = random_model()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, model, step=step)
    (tmp_path / "step_000003").rename(tmp_path / ".old_step_000003")  # killed before its successor's rename
    (tmp_path / "step_000001" / checkpoint.PRUNED).touch()
    (tmp_path / "step_000001").rename(tmp_path / ".old_step_000001")  # killed while it was pruned
    (tmp_path / ".tmp_step_000004").mkdir()
    checkpoint.clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000003"]
    checkpoint.verify(tmp_path / "step_000003")


def test_checkpoints_by_the_clock(config, tmp_path):
    run = train_gpt2.main(dataclasses.replace(config, checkpoint_every=0, checkpoint_minutes=1e-6))
    assert len(checkpoint.steps(run)) >= 11


def test_a_run_that_is_killed_again_and_again_has_the_same_end(long_run, undisturbed, tmp_path):
    cfg = dataclasses.replace(
        long_run, log_dir=str(tmp_path), run_name="run", max_steps=20, checkpoint_every=2
    )
    draw, kills = np.random.default_rng(0), 0
    while True:
        process = start(cfg, "--resume", "--keep-last", "2")
        try:
            read_until(process, "| loss")
            time.sleep(float(draw.uniform(0, 0.3)))
            if process.poll() is None and kills < 3:
                process.kill()
                kills += 1
        except AssertionError:
            assert checkpoint.steps(tmp_path / "run")[-1].name == "step_000020"
        process.communicate(timeout=60)
        if process.returncode == 0:
            break
    assert kills >= 2
    assert end_of(tmp_path / "run") == undisturbed
