"""Faults while training: kills, signals, a full disk, gradients that are not finite, two runs in one folder.

"The same end" means the same bytes of the final model and the same training losses. The tests name their rows
of the table in docs/reliability.md. faults.py holds what is done to the processes.
"""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import faults
import pytest
import torch
from helpers import (
    ROOT,
    end_of,
    flags,
    forkserver,
    lines_of,
    links,
    random_model,
    resealed,
    resume,
    save_checkpoint,
    train,
    values,
)
from torch.distributed import HashStore  # type: ignore[attr-defined]

import train_gpt2
from lib import checkpoint, run_folder, stops
from lib.processes import Process
from train_gpt2 import Config


@pytest.fixture(scope="session")
def every_step(whole) -> Path:
    """A run of fifty steps and as many checkpoints. An epoch ends within step 38, a shard every 12 steps."""
    return whole(max_steps=50, total_batch_tokens=128, batch_size=2, checkpoint_every=1)


def steps_of(run: Path) -> list[int]:
    """The steps of a run's checkpoints, each of which is whole."""
    return [checkpoint.verify(folder)["step"] for folder in checkpoint.list_steps(run)]


def left_by_saving(run: Path) -> list[str]:
    return [path.name for path in run.glob(".*")]


# -----------------------------------------------------------------------------
# 1, 2: SIGKILL


@pytest.mark.fault(1)
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "world_size, tries", [(1, (3, 180)), pytest.param(2, (1, 20), marks=pytest.mark.slow)]
)
def test_a_run_that_is_killed_again_and_again_has_the_same_end(
    launch, config, whole, tmp_path, tally, world_size, tries
):
    # A rank that is killed before it has met the other lets that one wait for so long.
    changes = dict(checkpoint_every=1, keep_last=2, timeout_seconds=5.0)
    begin = time.monotonic()
    end = end_of(whole(world_size, **changes))
    seconds = time.monotonic() - begin
    for chain in tally(*tries):
        random, run, kills = faults.draw(chain.number), tmp_path / f"run{chain.number}", 0
        cfg = dataclasses.replace(config, run_name=run.name, **changes)
        codes = None
        while codes != [0] * world_size:
            if random.random() < 0.5:  # between two of its file operations, most of which are saving's
                dies = partial(faults.die_in_file_operation, random.randrange(300), run.name)
                training = launch(cfg, "--resume", world_size=world_size, patches=[dies])
            else:  # at any time
                training = launch(cfg, "--resume", world_size=world_size)
                training.ranks[0].join(random.uniform(0, seconds))
                training.signal(signal.SIGKILL, *random.choice([(), *((r,) for r in range(world_size))]))
            codes = training.wait(timeout=30)
            assert set(codes) == {0} or -signal.SIGKILL in codes, training.printed()
            kills += -signal.SIGKILL in codes
            steps_of(run)  # all are whole
        assert end_of(run) == end
        # One more than --keep-last, if the last kill came between the last checkpoint and its pruning.
        assert len(checkpoint.list_steps(run)) in (2, 3) and left_by_saving(run) == []
        chain.count = kills
        shutil.rmtree(run)


@pytest.mark.slow
@pytest.mark.fault(2)
@pytest.mark.timeout(600)
def test_pruning_that_is_killed_leaves_what_is_to_stay_and_the_run_goes_on(
    launch, config, every_step, tmp_path, tally
):
    cfg = dataclasses.replace(
        config, max_steps=50, total_batch_tokens=128, batch_size=2, keep_last=2, keep_every=20,
        checkpoint_every=1,
    )  # fmt: skip
    for attempt in tally(3, 50):
        run = links(every_step, tmp_path / f"run{attempt.number}", *range(39, 49))
        # What killed runs have left: half a checkpoint; one set aside for another, which did not come; one
        # set aside, its successor being there; one that was being pruned; one that was half removed.
        for name in (".tmp_step_000049", ".old_step_000020", ".old_step_000041", "step_000049"):
            source = every_step / f"step_{name[-6:]}"
            shutil.copytree(source, run / name, copy_function=os.link)
        (run / ".tmp_step_000049" / "state.json").unlink()
        (run / "step_000049" / "model.safetensors").unlink()
        shutil.copytree(every_step / "step_000030", run / ".tmp_step_000030", copy_function=os.link)

        # It reads eleven states, then has eight checkpoints to remove, in twelve operations each.
        number = faults.draw(attempt.number).randrange(8, 107)
        dies = partial(faults.die_in_file_operation, number, run.name)
        process = forkserver.Process(target=faults.prune, args=(run, 2, 20, dies))
        process.start()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        attempt.count = int(process.exitcode != 0)  # there were fewer operations
        assert {40, 48} <= {checkpoint.verify(folder)["step"] for folder in checkpoint.list_steps(run)[:-1]}
        found, passed_over = checkpoint.find_newest_valid(run)
        assert (
            found
            and found[0] == run / "step_000048"
            and "step_000049/model.safetensors is missing" in passed_over[0]
        )
        run_folder.remove_leftovers(run)  # puts back what was set aside, but nothing that is no longer whole
        for folder in checkpoint.list_steps(run)[:-1]:
            checkpoint.verify(folder)
        assert (run / "step_000020").is_dir() and left_by_saving(run) == []

        cfg = dataclasses.replace(cfg, run_name=run.name)
        assert "resumed at step 48" in launch(cfg, "--resume").finish()
        assert end_of(run) == end_of(every_step)
        assert steps_of(run) == [20, 40, 49, 50] and left_by_saving(run) == []
        shutil.rmtree(run)


@pytest.mark.fault(2)
def test_old_checkpoints_are_removed_but_for_the_best_and_the_marked(tmp_path):
    model = random_model()
    for step, loss in enumerate([5.0, 3.0, 4.0, None, 3.5, 3.2, None, 3.1]):
        save_checkpoint(tmp_path, model, step=step, val_loss=loss)
    run_folder.prune(tmp_path, 0, 3)
    assert len(checkpoint.list_steps(tmp_path)) == 8
    run_folder.prune(tmp_path, 2, 3)
    assert [int(p.name[5:]) for p in checkpoint.list_steps(tmp_path)] == [0, 1, 3, 6, 7]
    run_folder.prune(tmp_path, 1, 0)
    assert [int(p.name[5:]) for p in checkpoint.list_steps(tmp_path)] == [1, 7]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.fault(2)
def test_what_a_killed_process_left_is_cleaned_and_nothing_whole_is_lost(tmp_path):
    model = random_model()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, model, step=step)
    (tmp_path / "step_000003").rename(tmp_path / ".old_step_000003")  # killed before its successor's rename
    (tmp_path / "step_000001").rename(tmp_path / ".tmp_step_000001")  # killed while it was pruned
    (tmp_path / ".tmp_step_000004").mkdir()
    for name in ("settings.json", "log.txt", "loss.png"):  # killed while it wrote one of these
        (tmp_path / f".{name}.123.tmp").touch()
    run_folder.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000003"]
    checkpoint.verify(tmp_path / "step_000003")


# -----------------------------------------------------------------------------
# 4: damaged checkpoints


@pytest.mark.fault(4)
def test_a_damaged_checkpoint_is_passed_over_and_it_is_said(launch, config, whole, tmp_path):
    run = links(whole(), tmp_path / "run", 4, 8, 12)
    for step, name in ((12, "model.safetensors"), (8, "optimizer.safetensors")):
        path = run / f"step_{step:06d}" / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.unlink()  # the file of this name is a link
        path.write_bytes(data)
    printed = launch(config, "--resume").finish()
    for name in ("step_000012/model.safetensors", "step_000008/optimizer.safetensors"):
        assert f"passed over a checkpoint: {run / name} is damaged" in printed
    assert "resumed at step 4" in printed
    assert end_of(run) == end_of(whole()) and steps_of(run) == [4, 8, 12]


@pytest.mark.fault(4)
def test_a_damaged_checkpoint_does_not_count_as_one_of_those_to_keep(launch, config, whole, tmp_path):
    run = links(whole(), tmp_path / "run", 4, 8, 12)
    (run / "step_000012" / "model.safetensors").unlink()
    printed = launch(config, "--resume", "--max-steps", "10", "--keep-last", "1").finish()
    assert steps_of(run) == [10]
    assert f"a newer checkpoint is now {run / 'abandoned' / 'step_000012'}" in printed
    assert sorted(path.name for path in (run / "abandoned").iterdir()) == ["step_000012"]


@pytest.mark.fault(2)
def test_an_old_checkpoint_that_cannot_be_removed_is_no_reason_to_stop(config, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise OSError("Device or resource busy")

    monkeypatch.setattr(run_folder, "prune", fail)
    run = train(config, keep_last=1)
    assert steps_of(run) == [4, 8, 12]
    assert "an old checkpoint could not be removed: Device or resource busy" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# 3, 6: saving fails

LIMITS = {"model.safetensors": 300_000, "optimizer.safetensors": 1_000_000, "tokenizer.json": 1_700_000}


@pytest.mark.slow
@pytest.mark.fault(3)
@pytest.mark.parametrize("world_size, tries", [(1, (1, 9)), (2, (1, 3))])
def test_a_disk_that_fills_up_amid_a_file_leaves_the_old_checkpoints(
    launch, config, whole, tmp_path, tally, world_size, tries
):
    for attempt in tally(*tries):
        saves, limit = (attempt.number + 1) % 3, list(LIMITS.values())[attempt.number // 3]
        cfg = dataclasses.replace(config, run_name=f"run{attempt.number}")
        run, failed = tmp_path / cfg.run_name, f"step_{4 * (saves + 1):06d}"
        training = launch(cfg, world_size=world_size, patches=[partial(faults.limit_files, limit, saves)])
        assert all(training.wait(timeout=30)), training.printed()
        said = rf"{re.escape(str(run / failed))} \(2 MB\) could not be written: .*File too large"
        assert re.search(said, training.printed()), training.printed()
        assert steps_of(run) == [4, 8, 12][:saves] and left_by_saving(run) == []
        launch(cfg, "--resume", world_size=world_size).finish()
        assert end_of(run) == end_of(whole(world_size))


@pytest.mark.fault(3)
def test_a_full_disk_leaves_the_old_checkpoints_and_says_what_is_needed(config, whole, tmp_path, monkeypatch):
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
    resume(run)
    assert end_of(run) == end_of(whole())


@pytest.mark.fault(3)
def test_an_error_amid_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    model = random_model()
    save_checkpoint(tmp_path, model, step=1)

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"step_000002 .*could not be written.*space"),
    ):
        patch.setattr("lib.files.flush", fail)
        save_checkpoint(tmp_path, model, step=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    checkpoint.verify(tmp_path / "step_000001")


@pytest.mark.fault(6)
@pytest.mark.slow
def test_when_rank_0_cannot_save_both_ranks_end(launch, config, whole, tmp_path, tally):
    places = ["flush", "save_file", "write_text", "hash_file", "mkdir", "rename"]
    for attempt in tally(1, len(places)):
        cfg = dataclasses.replace(config, run_name=f"run{attempt.number}")
        run = tmp_path / cfg.run_name
        fails = partial(faults.fail_in_save, places[attempt.number], 8)
        training = launch(cfg, world_size=2, patches=[fails])
        assert all(training.wait(timeout=30)), training.printed()
        assert re.search(r"step_000008 .*could not be written: .*I/O|Input", training.printed(0))
        assert steps_of(run) == [4] and left_by_saving(run) == []
        launch(cfg, "--resume", world_size=2).finish()
        assert end_of(run) == end_of(whole(2))


# -----------------------------------------------------------------------------
# 7: signals

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
SITUATIONS = [  # the number of processes, those that the signal is sent to, what they are doing
    (2, (1,), "step"),
    (1, (0,), "save"),
    (1, (0,), "save, twice"),
    (1, (0,), "step"),
    (2, (0,), "step"),
    (2, (0, 1), "step"),
    (2, (1,), "save"),
    (2, (0, 1), "save, twice"),
]


@pytest.mark.fault(7)
def test_a_signal_stops_the_run_with_a_checkpoint_and_it_goes_on_to_the_same_end(
    launch, config, whole, tmp_path, tally
):
    changes = dict(max_steps=32, checkpoint_every=8)
    for attempt in tally(2, len(SIGNALS) * len(SITUATIONS)):
        world_size, ranks, place = SITUATIONS[attempt.number % 8]
        number = SIGNALS[(attempt.number + attempt.number // 8) % 3]
        run = tmp_path / f"run{attempt.number}"
        cfg = dataclasses.replace(config, run_name=run.name, **changes)
        gate = tmp_path / f"gate{attempt.number}"
        gate.mkdir()
        if place == "step":
            hold = partial(faults.hold_in_step, 6, gate, ranks[0])
        else:
            hold = partial(faults.hold_in_save, 16, gate)
        training = launch(cfg, world_size=world_size, patches=[hold])
        training.wait_for(gate / "reached", rank=ranks[0])
        training.signal(number, *ranks)
        if place == "save, twice":
            training.signal(number, *ranks)  # as from torchrun, which passes on what the terminal sent to all
            time.sleep(1.5)
            assert training.is_running()
            begin = time.monotonic()
            training.signal(number, *ranks)
        else:
            (gate / "go").touch()
        codes = training.wait()
        if place == "save, twice":
            assert time.monotonic() - begin < 5  # at once, although the save does not go on
            # Rank 1 may have been waiting for rank 0 where it hears no signal, and then fails for its loss.
            assert codes[0] == 128 + number and all(codes), training.printed()
            assert steps_of(run) == [8]
        else:
            assert codes == [128 + number] * world_size, training.printed()
            assert f"{number.name} was received" in training.printed(0)
            assert "train_gpt2.py --resume" in training.printed(0)
            saved = steps_of(run)
            assert saved[-1] == len(lines_of(run)) < 32
            assert saved == [7] if place == "step" else set(saved[:-1]) in ({8, 16}, {8, 16, 24})
        launch(cfg, "--resume", world_size=world_size).finish()
        assert end_of(run) == end_of(whole(world_size, **changes))


@pytest.mark.fault(7)
def test_two_ranks_with_different_signals_stop_with_one_code(launch, config, whole, tmp_path):
    hold = partial(faults.hold_in_step, 6, tmp_path)
    training = launch(config, world_size=2, patches=[hold])
    training.wait_for(tmp_path / "reached")
    training.signal(signal.SIGINT, 0)
    training.signal(signal.SIGUSR1, 1)
    (tmp_path / "go").touch()
    codes = training.wait()
    assert codes[0] == codes[1] and codes[0] in (128 + signal.SIGINT, 128 + signal.SIGUSR1)
    launch(config, "--resume", world_size=2).finish()
    assert end_of(tmp_path / "run") == end_of(whole(2))


@pytest.mark.fault(7)
@pytest.mark.slow
def test_a_signal_to_the_command_that_started_several_processes_has_its_code(config, tmp_path):
    words = flags(dataclasses.replace(config, max_steps=10_000, checkpoint_every=0, num_gpus=2))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_gpt2.py"), *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", bufsize=1,
    )  # fmt: skip
    read_until(process, " 5/10000 | loss")
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=90)[0]
    assert process.returncode == 143 and "Traceback" not in printed, printed
    assert len(steps_of(tmp_path / "run")) == 1


@pytest.mark.fault(8)
@pytest.mark.slow
def test_processes_whose_torchrun_was_killed_save_and_stop(config, tmp_path):
    process = start_torchrun(dataclasses.replace(config, max_steps=10_000, checkpoint_every=0))
    read_until(process, " 5/10000 | loss")
    process.kill()
    printed = process.communicate(timeout=60)[0]  # which ends when no process is left that writes there
    assert "stopping: torchrun is gone" in printed
    (step,) = steps_of(tmp_path / "run")
    assert len(lines_of(tmp_path / "run")) == step


@pytest.mark.fault(7)
def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    codes, before = [], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(os, "_exit", codes.append)
    signals = stops.Signals()
    try:
        signals.remember(signal.SIGINT, None)
        signals.remember(signal.SIGINT, None)  # torchrun's echo of the first
        assert codes == [] and signals.caught == signal.SIGINT
        signals.when -= 2
        signals.remember(signal.SIGTERM, None)
        assert codes == [143]
    finally:
        signals.restore()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.fault(7)
def test_a_run_that_fails_leaves_the_signals_and_the_folder_to_its_caller(config, monkeypatch):
    """A notebook's cell needs this: the next Ctrl-C is the notebook's, and the run can go on."""
    before = signal.getsignal(signal.SIGINT)

    def fail(*args):
        raise OSError("no space left")

    try:
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left") as error:
            patch.setattr(checkpoint, "save", fail)
            train_gpt2.main(config)
        assert signal.getsignal(signal.SIGINT) is before
        # While the error is held, as a notebook does, so is what its frames hold.
        train(config, resume="newest")
        assert error.value
    finally:
        signal.signal(signal.SIGINT, before)


# -----------------------------------------------------------------------------
# 8, 9: a process that is killed under torchrun, or hangs


def start_torchrun(cfg: Config, *words: str) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "train_gpt2.py"), *flags(cfg), *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", bufsize=1,
    )  # fmt: skip


def workers_of(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return sorted(map(int, found.stdout.split()))


def read_until(process: subprocess.Popen, words: str) -> str:
    assert process.stdout
    printed = ""
    for line in process.stdout:
        printed += line
        if words in line:
            return printed
    raise AssertionError(f"{words!r} was not printed:\n{printed}")


@pytest.mark.fault(7)
@pytest.mark.slow
def test_torchrun_passes_a_signal_to_one_process_on_to_the_run(config, tmp_path):
    process = start_torchrun(dataclasses.replace(config, max_steps=10_000, checkpoint_every=0))
    read_until(process, " 5/10000 | loss")
    workers = workers_of(process)
    assert len(workers) == 2
    os.kill(workers[-1], signal.SIGTERM)
    printed = process.communicate(timeout=90)[0]
    assert process.returncode != 0 and "SIGTERM was received" in printed, printed
    (step,) = steps_of(tmp_path / "run")
    assert len(lines_of(tmp_path / "run")) == step


@pytest.mark.fault(8)
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_restarts_a_run_whose_process_was_killed(config, whole, tmp_path, tally):
    changes = dict(max_steps=40, checkpoint_every=10)
    for attempt in tally(1, 3):
        cfg = dataclasses.replace(config, run_name=f"run{attempt.number}", **changes)
        process = start_torchrun(cfg, "--resume")
        read_until(process, f"step {13 + 9 * attempt.number}/40 | loss")
        os.kill(workers_of(process)[attempt.number % 2], signal.SIGKILL)
        printed = process.communicate(timeout=120)[0]
        assert process.returncode == 0 and "resumed at step" in printed, printed
        assert end_of(tmp_path / cfg.run_name) == end_of(whole(2, **changes))


@pytest.mark.fault(9)
def test_a_process_that_hangs_is_named(launch, config, tally):
    for attempt in tally(1, 4):
        hung, timeout = (1 + attempt.number) % 2, (2.0, 5.0)[attempt.number // 2]
        cfg = dataclasses.replace(
            config, run_name=f"run{attempt.number}", max_steps=100_000, timeout_seconds=timeout
        )
        training = launch(cfg, world_size=2)
        training.wait_for(" 5/100000 | loss")
        training.signal(signal.SIGSTOP, hung)
        begin = time.monotonic()
        training.ranks[1 - hung].join(60)
        assert time.monotonic() - begin < timeout + 5
        assert training.ranks[1 - hung].exitcode, training.printed()
        said = f"rank {1 - hung} failed; no sign of life from rank {hung}"
        assert said in training.printed(1 - hung), training.printed()
        training.kill()


@pytest.mark.slow
@pytest.mark.fault(9)
def test_a_process_that_is_late_is_named_before_the_timeout(launch, config, tmp_path):
    """Under NCCL the others would be ended at the timeout, without an exception that could name it."""
    cfg = dataclasses.replace(config, timeout_seconds=20.0, val_every=10)
    training = launch(cfg, world_size=2, patches=[partial(faults.hold_before_evaluation, tmp_path, 1)])
    said = "rank 1 has not come to the all-reduce for which rank 0 waits"
    training.wait_for(f"{said}; the run ends after --timeout-seconds 20")
    (tmp_path / "go").touch()
    assert training.finish().count("has not come") == 1


def test_only_a_process_that_others_wait_for_is_late(monkeypatch):
    """Rank 0 begins its second all-reduce; rank 1 stays at its first, rank 2 comes, rank 3 comes too late."""
    store, clock, seen = HashStore(), [100.0], {}
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    process = Process(0, 4, torch.device("cpu"), store, timeout_seconds=60.0)

    def find_late(at: float, *all_reduces: int) -> list[int]:
        clock[0], process.all_reduces = at, all_reduces[0]
        for rank, count in enumerate(all_reduces):
            name = f"all-reduces of rank {rank}"
            store.add(name, count - store.add(name, 0))
        return process.find_late(seen)

    assert find_late(100, 1, 1, 1, 1) == []
    assert find_late(500, 1, 1, 1, 1) == []  # a long evaluation, in which none waits
    assert find_late(501, 2, 1, 1, 1) == find_late(529, 2, 1, 2, 1) == []
    assert find_late(540, 2, 1, 2, 1) == [1, 3]
    assert find_late(541, 2, 1, 2, 2) == [1]
    assert Process(2, 4, torch.device("cpu"), store, timeout_seconds=60.0).find_late({}) == []


# -----------------------------------------------------------------------------
# 10, 11: resuming


@pytest.mark.slow
@pytest.mark.fault(10)
@pytest.mark.timeout(900)
def test_a_run_that_is_resumed_at_any_step_and_then_again_has_the_same_end(every_step, tmp_path, tally):
    last = checkpoint.load(every_step / "step_000050").optimizer
    first = [37, 38, 47]  # before the end of the epoch, within it, near the end; then all others
    order = [*first, *(step for step in range(1, 51) if step not in first)]
    for attempt in tally(3, 50):
        step = order[attempt.number]
        run = links(every_step, tmp_path / f"run{step}", step)
        resume(run, "--checkpoint-every", "3")
        assert end_of(run) == end_of(every_step)
        if earlier := checkpoint.list_steps(run)[1:-1]:  # the second resume, from a checkpoint of the first
            shutil.rmtree(run / "step_000050")
            for folder in earlier[2:]:
                shutil.rmtree(folder)
            resume(run)
            assert end_of(run) == end_of(every_step)
        optimizer = checkpoint.load(run / "step_000050").optimizer
        assert all(torch.equal(optimizer[name], tensor) for name, tensor in last.items())
        shutil.rmtree(run)


@pytest.mark.fault(11)
@pytest.mark.slow
def test_another_number_of_processes_and_another_micro_batch_take_the_same_sequences(
    launch, config, whole, data, tmp_path, tally
):
    changes = dict(dropout=0.0, batch_size=2)  # what dropout draws depends on how the batch is divided
    plans = [
        [(2, 2), (1, 1), (2, 2)],  # processes, sequences of a micro-step
        [(2, 1), (1, 2), (2, 1)],
        [(1, 2), (2, 2), (1, 4)],
        [(2, 2), (2, 1), (1, 2)],
    ]
    losses = values(whole(1, **changes))
    for attempt in tally(1, len(plans)):
        run = tmp_path / f"run{attempt.number}"
        cfg = dataclasses.replace(config, run_name=run.name, **changes)
        for i, (world_size, batch_size) in enumerate(plans[attempt.number]):
            if i:
                for step in (8, 12) if i == 1 else (12,):
                    shutil.rmtree(run / f"step_{step:06d}")
            notes = tmp_path / f"sequences{attempt.number}_{i}"
            launch(
                dataclasses.replace(cfg, batch_size=batch_size), "--resume", world_size=world_size,
                patches=[partial(faults.note_sequences, notes)],
            ).finish()  # fmt: skip
            trained = sorted(notes.read_text(encoding="utf-8").splitlines())
            assert trained == faults.batches_of(data, cfg.seq_len, cfg.seed, 4, range(4 * i, 12))
            assert values(run) == pytest.approx(losses, abs=1e-4)


@pytest.mark.fault(11)
def test_ranks_that_found_different_checkpoints_do_not_go_on(launch, config, whole, tmp_path):
    run = links(whole(2), tmp_path / "run", 4, 8)
    training = launch(config, "--resume", world_size=2, patches=[faults.find_the_oldest_on_rank_1])
    assert training.wait() == [2, 2]
    assert "the processes do not begin alike: this one with" in training.printed(0)
    assert steps_of(run) == [4, 8]


# -----------------------------------------------------------------------------
# 21, 23: losses and gradients that are not finite


@pytest.mark.fault(21)
@pytest.mark.slow
def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_both_and_k_of_them_stop_the_run(
    launch, config, tmp_path, tally
):
    kinds = [(kind, rank) for kind in ("nan", "inf", "gradient") for rank in (1, 0)]
    for attempt in tally(2, len(kinds)):
        kind, rank = kinds[(0, 5, 2, 3, 4, 1)[attempt.number]]  # first the most different
        run = tmp_path / f"run{attempt.number}"
        cfg = dataclasses.replace(config, run_name=run.name, checkpoint_every=1, max_bad_steps=3)
        notes = tmp_path / f"notes{attempt.number}"
        notes.mkdir()
        poisoned = partial(faults.poison, kind, rank, 2, 5, 6, 7)
        training = launch(cfg, world_size=2, patches=[poisoned, partial(faults.note_weights, notes)])
        assert training.wait() == [3, 3], training.printed()
        weights = [(notes / f"weights{rank}.txt").read_text(encoding="utf-8") for rank in (0, 1)]
        assert weights[0] == weights[1]
        hashes = [line.split()[1] for line in weights[0].splitlines()]
        unchanged = [step for step, (a, b) in enumerate(zip(hashes, hashes[1:])) if a == b]
        assert len(hashes) == 8 and unchanged == [2, 5, 6]
        assert lines_of(run, "skip") == ["2 skip 1", "5 skip 1", "6 skip 1", "7 skip 1"]
        assert "3 steps in a row were not finite" in training.printed(0)
        assert steps_of(run) == list(range(1, 9))
        loaded = [checkpoint.load(run / f"step_{step:06d}") for step in (5, 8)]
        assert [one.state["bad_steps"] for one in loaded] == [0, 3]
        for one, other in zip(*(one.model.state_dict().values() for one in loaded)):
            assert torch.equal(one, other) and one.isfinite().all()
        assert all(torch.equal(t, loaded[1].optimizer[name]) for name, t in loaded[0].optimizer.items())


def test_a_model_that_overflows_is_said_by_each_evaluation_and_the_run_is_saved(config, capsys):
    cfg = dataclasses.replace(
        config, learning_rate=1e38, grad_clip=0.0, val_every=2, sample_every=2, max_steps=4
    )
    run = train_gpt2.main(cfg)
    printed = capsys.readouterr().out
    assert "validation loss is not finite (nan)" in printed
    assert "sample | none: the logits are not finite" in printed and "best validation loss 10." in printed
    assert math.isnan(values(run, "val")[-1])
    state = checkpoint.verify(run / "step_000004")
    assert state["val_loss"] is None and state["best_val_loss"] > 10
    json.loads((run / "step_000004" / "state.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: prepend(run, "9 train\n"), r"log\.txt, line \d+: '9 train' is not"),
        (
            lambda run: resealed(run / "step_000012", dtype=16),
            r"state\.json: the field dtype is 16; it must be a string",
        ),
        (
            lambda run: resealed(run / "step_000012", config={"n_layer": "1"}),
            r"config: the field n_layer is \"1\"",
        ),
        (
            lambda run: resealed(run / "step_000012", config=[]),
            r"state\.json: the field config is \[\]; it must be an",
        ),
        (lambda run: resealed(run / "step_000012", step="12"), "no valid checkpoint"),
    ],
)
def test_a_run_whose_files_have_another_shape_is_refused_with_file_and_field(
    launch, config, whole, tmp_path, damage, message
):
    run = tmp_path / "run"
    shutil.copytree(whole(), run)
    for folder in checkpoint.list_steps(run)[:-1]:
        shutil.rmtree(folder)
    damage(run)
    training = launch(None, "--resume", str(run), "--max-steps", "14")
    assert training.wait() == [2]
    assert re.search(message, training.printed()) and "Traceback" not in training.printed()


def prepend(run: Path, line: str):
    log = run / "log.txt"
    log.write_text(line + log.read_text(encoding="utf-8"), encoding="utf-8")


@pytest.mark.fault(31)
def test_lines_that_were_damaged_after_the_checkpoint_are_left_out(config, whole, tmp_path):
    run = links(whole(), tmp_path / "run", 4, 8)
    log = run / "log.txt"
    kept = log.read_bytes().partition(b"8 train")[0]
    for damage in (bytes(100) + b"\n9 train 1.0\n", b"8 tr\xff\n", b"8 train 1"):
        log.write_bytes(kept + damage)
        run_folder.open_log(log, 8).close()
        assert log.read_bytes() == kept
    resume(run)
    assert end_of(run) == end_of(whole())


@pytest.mark.fault(23)
def test_an_overflow_in_float16_halves_the_scale_also_across_a_resume(launch, config, whole, tmp_path, tally):
    for attempt in tally(1, 3):
        overflow = (3, 4, 5)[attempt.number]  # before the resume, in its first step, after it
        patches = (partial(faults.poison, "overflow", 0, overflow),)
        changes = dict(dtype="float16", max_steps=8)
        undisturbed = whole(1, patches, **changes)
        run = links(undisturbed, tmp_path / f"run{attempt.number}", 4)
        launch(None, "--resume", str(run), patches=patches).finish()
        assert end_of(run) == end_of(undisturbed)
        ends = [checkpoint.load(folder / "step_000008") for folder in (undisturbed, run)]
        assert ends[0].state["scaler"] == ends[1].state["scaler"]
        assert ends[0].state["scaler"]["scale"] == 2.0**15 and ends[0].state["bad_steps"] == 0
        assert all(torch.equal(t, ends[1].optimizer[name]) for name, t in ends[0].optimizer.items())
        assert lines_of(run, "skip") == lines_of(undisturbed, "skip") == [f"{overflow} skip 1"]


@pytest.mark.fault(21, 23)
def test_gradients_that_stay_nan_in_float16_stop_the_run_once_the_scale_is_used_up(launch, config, tmp_path):
    cfg = dataclasses.replace(config, dtype="float16", max_steps=60, checkpoint_every=0, max_bad_steps=3)
    training = launch(cfg, patches=[partial(faults.poison, "gradient", 0, *range(60))])
    assert training.wait() == [3], training.printed()
    assert steps_of(tmp_path / "run")[-1] < 30  # the scale begins at 2**16


# -----------------------------------------------------------------------------
# 30: two runs in one folder


@pytest.mark.fault(30)
def test_a_second_run_in_a_folder_is_refused_and_the_first_is_unharmed(
    launch, config, whole, tmp_path, tally
):
    for attempt in tally(1, 5):
        run, gate = tmp_path / f"run{attempt.number}", tmp_path / f"gate{attempt.number}"
        gate.mkdir()
        cfg = dataclasses.replace(config, run_name=run.name)
        hold = partial(*((faults.hold_in_save, 4), (faults.hold_in_step, 6))[attempt.number % 2], gate)
        first = launch(cfg, "--resume", patches=[hold])
        if attempt.number == 4:  # both at once: either may be the first
            second = launch(cfg, "--resume", patches=[hold])
            while first.is_running() and second.is_running():
                time.sleep(0.01)
            first, second = (first, second) if first.is_running() else (second, first)
        else:
            first.wait_for(gate / "reached")
            words = [] if attempt.number == 2 else ["--resume"]
            second = launch(cfg, *words, world_size=2 if attempt.number == 3 else 1)
        assert all(second.wait(timeout=30)), second.printed()
        said = "exists: go on with it" if attempt.number == 2 else "is in use by another process"
        assert f"{run} {said}" in second.printed()
        (gate / "go").touch()
        first.finish()
        assert end_of(run) == end_of(whole()) and steps_of(run) == [4, 8, 12]
        assert [path.name for path in tmp_path.iterdir() if "lock" in path.name] == []


def test_checkpoints_by_the_clock(config):
    run = train(config, checkpoint_every=0, checkpoint_minutes=1e-6)
    assert len(checkpoint.list_steps(run)) >= 11
    hourly = dataclasses.replace(config, checkpoint_every=0, checkpoint_minutes=60, max_steps=3, run_name="h")
    assert steps_of(train_gpt2.main(hourly)) == [3]  # the end is saved anyhow
