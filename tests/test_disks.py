"""Disks: slow, stuck, read-only, without inodes, with a quota; training and tokenizing go on, or say why not.

Real file systems where this user may mount them: tmpfs, and ext4 in a file.
"""

import contextlib
import dataclasses
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import faults
import pytest
from corpora import DOCUMENTS, read_files, to_jsonl
from helpers import ROOT, end_of, flags, lines_of
from test_faults import left_by_saving, steps_of

from lib import shards

MANY = [f"{number} {text}" for number in range(12) for text in DOCUMENTS]
ERRORS = (errno.EROFS, errno.EDQUOT, errno.EIO, errno.ENOSPC, errno.ESTALE, errno.EACCES)


def sh(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{words[0]}: {done.stderr.strip()}")
    return done.stdout


def can_write(folder: Path) -> bool:
    """Tries it: of a disk with errors, os.access says yes."""
    try:
        (folder / "probe").touch()
        (folder / "probe").unlink()
    except OSError:
        return False
    return True


def can_trace() -> bool:
    words = ("strace", "-qq", "-o", os.devnull, "true")
    return bool(shutil.which("strace")) and not subprocess.run(words, check=False).returncode


@pytest.fixture
def mount(tmp_path) -> Iterator[Callable[..., Path]]:
    """`mount("-t", "tmpfs", "none")` mounts a file system for this test, or skips it where that fails."""
    mounted = []

    def mount(*words: object) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        try:
            sh("mount", *words, place)
        except OSError as error:
            pytest.skip(f"a file system cannot be mounted here ({error})")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        with contextlib.suppress(OSError):
            sh("umount", "--lazy", place)


@pytest.fixture
def tokenize(launch, tmp_path) -> Callable[..., list]:
    """The command line of a small corpus, of which several shards are made."""
    (tmp_path / "a.jsonl").write_bytes(to_jsonl(MANY))

    def tokenize(out: Path, *patches: Callable):
        words = ("--source", tmp_path / "a.jsonl", "--out-dir", out, "--name", "toy")
        numbers = ("--shard-tokens", 300, "--val-tokens", 100, "--workers", 1)
        return launch(None, *words, *numbers, script="fineweb.py", patches=patches)

    return tokenize


# -----------------------------------------------------------------------------
# slow and stuck


@pytest.mark.fault(36)
def test_a_run_goes_on_while_its_disk_is_stuck_and_says_what_it_waits_for(
    launch, config, whole, tmp_path, tally
):
    names = ("model.safetensors", "log.txt", ".tmp_step_000004", "state.json", "tokenizer.json", "run")
    for attempt in tally(1, len(names)):
        world_size, gate = 1 + attempt.number % 2, tmp_path / f"gate{attempt.number}"
        run = tmp_path / f"log{attempt.number}" / "run"
        gate.mkdir()
        cfg = dataclasses.replace(config, log_dir=str(run.parent))
        hold = partial(faults.hold_flush, f"/{names[attempt.number % len(names)]}", gate)
        training = launch(cfg, world_size=world_size, patches=[hold])
        printed = training.wait_for("waiting for step_000004 to be written, for ")
        assert "step  7/12 | loss" in printed and "saved" not in printed, printed
        assert lines_of(run)[-1].startswith("7 ") and training.is_running()
        (gate / "go").touch()
        printed = training.finish()
        assert printed.index("| saved step_000004") < printed.index("/step_000008 |"), printed
        assert end_of(run) == end_of(whole(world_size))


@pytest.mark.slow
@pytest.mark.fault(36)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_signal_while_the_disk_is_stuck(launch, config, whole, tmp_path, tally, world_size):
    """The run stops and saves as soon as the disk is back; a second signal ends it at once."""
    for attempt in tally(1, 2):
        is_second, gate = bool(attempt.number % 2), tmp_path / f"gate{attempt.number}"
        run = tmp_path / f"run{attempt.number}"
        gate.mkdir()
        cfg = dataclasses.replace(config, run_name=run.name)
        hold = partial(faults.hold_flush, "/model.safetensors", gate)
        training = launch(cfg, world_size=world_size, patches=[hold])
        training.wait_for("waiting for step_000004")
        training.signal(signal.SIGTERM)
        training.wait_for("SIGTERM: stopping after this step, then saving; a second signal discards it")
        if is_second:
            time.sleep(1.2)
            training.signal(signal.SIGTERM)
        else:
            (gate / "go").touch()
        codes = training.wait(timeout=30)
        assert codes[0] == 143 and all(codes), training.printed()
        assert steps_of(run) == ([] if is_second else [4, 8, 9])
        launch(cfg, "--resume", world_size=world_size).finish()
        assert end_of(run) == end_of(whole(world_size))


@pytest.mark.slow
@pytest.mark.fault(36)
def test_processes_whose_rank_0_waits_for_its_disk_longer_than_the_timeout_say_so(
    launch, config, whole, tmp_path
):
    hold = partial(faults.hold_flush, "/model.safetensors", tmp_path)
    training = launch(dataclasses.replace(config, timeout_seconds=6.0), world_size=2, patches=[hold])
    printed = training.wait_for("waiting for step_000004 to be written, for ")
    assert "its disk is slow or stuck; the other processes wait for --timeout-seconds 6" in printed
    training.ranks[1].join(60)
    assert training.ranks[1].exitcode, training.printed(1)
    (tmp_path / "go").touch()
    assert all(training.wait(timeout=30)), training.printed()
    assert steps_of(tmp_path / "run")[:1] == [4]
    launch(config, "--resume", world_size=2).finish()
    assert end_of(tmp_path / "run") == end_of(whole(2))


@pytest.mark.slow
@pytest.mark.fault(36)
def test_nothing_is_lost_on_a_slow_disk(launch, tokenize, config, whole, tmp_path, tally):
    for attempt in tally(1, 2):
        seconds = (0.05, 0.1, 0.2)[attempt.number]
        slow, run = partial(faults.slow_down, seconds), tmp_path / f"run{attempt.number}"
        training = launch(dataclasses.replace(config, run_name=run.name, keep_last=1), patches=[slow])
        printed = training.finish()
        assert printed.index("| saved step_000004") < printed.index("/step_000008 |"), printed
        assert end_of(run) == end_of(whole()) and steps_of(run) == [12]
        data = [tmp_path / f"{kind}{attempt.number}" for kind in ("slow", "fast")]
        tokenize(data[0], slow).finish()
        tokenize(data[1]).finish()
        assert read_files(data[0]) == read_files(data[1])


@pytest.mark.slow
@pytest.mark.fault(36)
def test_tokenizing_says_that_it_waits_for_its_disk(tokenize, tmp_path):
    out = tmp_path / "out"
    process = tokenize(out, partial(faults.hold_flush, ".tmp", tmp_path))  # of a shard
    process.wait_for(f"waiting for a shard of {out}/parts/000000 to be written, for ")
    (tmp_path / "go").touch()
    process.finish()
    shards.verify(out)


# -----------------------------------------------------------------------------
# read-only


@pytest.mark.fault(36)
def test_a_disk_that_turns_read_only_ends_the_run_with_the_reason(
    launch, config, whole, tmp_path, tally, mount
):
    """ext4 does so itself after an error of the disk."""
    image = tmp_path / "image"
    for attempt in tally(1, 6):
        with open(image, "wb") as f:
            f.truncate(30_000_000)
        gate = tmp_path / f"gate{attempt.number}"
        gate.mkdir()
        try:
            sh("mkfs.ext4", "-q", "-F", image)
        except OSError as error:
            pytest.skip(f"no ext4 can be made here ({error})")
        disk = mount("-o", "loop,errors=remount-ro", image)
        device = Path(sh("findmnt", "-no", "SOURCE", disk).strip()).name
        fault = Path("/sys/fs/ext4") / device / "trigger_fs_error"
        if not fault.exists():
            pytest.skip(f"{fault} is missing: an error of the disk cannot be provoked")
        hold = (partial(faults.hold_in_step, 9), partial(faults.hold_in_save, 8))[attempt.number % 2]
        cfg = dataclasses.replace(config, log_dir=str(disk), val_every=(0, 0, 4)[attempt.number % 3])
        world_size = 1 + attempt.number // 3
        patches = [faults.flush_for_real, partial(hold.func, *hold.args, gate)]
        training = launch(cfg, world_size=world_size, patches=patches)
        training.wait_for(gate / "reached")
        training.wait_for("| saved step_000004")
        fault.write_text("1", encoding="utf-8")
        (gate / "go").touch()
        codes = training.wait(timeout=30)
        assert codes[0] == 2 and all(codes), training.printed()
        said = training.printed(0).splitlines()[-1]
        assert re.search(rf"train_gpt2.py: .*{disk / 'run'}/.* could not be written: .*Read-only", said), said
        assert steps_of(disk / "run") in ([4], [4, 8])

        again = launch(cfg, "--resume")
        assert again.wait() == [2]
        said = again.printed().splitlines()[-1]
        assert f"{disk / 'run'} cannot be written: Read-only file system" in said, said
        while not can_write(disk):  # the kernel may keep the old mount for a moment
            sh("umount", disk)
            subprocess.run(["fsck.ext4", "-fy", image], capture_output=True, check=False)
            sh("mount", "-o", "loop", image, disk)
        assert steps_of(disk / "run") in ([4], [4, 8])
        launch(cfg, "--resume", world_size=world_size).finish()
        assert end_of(disk / "run") == end_of(whole(world_size, val_every=cfg.val_every))
        sh("umount", disk)


# -----------------------------------------------------------------------------
# no inodes, a quota, and other errors at any time


@pytest.mark.slow
@pytest.mark.fault(36)
@pytest.mark.timeout(900)
def test_a_disk_without_inodes_is_said_to_lack_inodes(launch, tokenize, config, whole, tally, mount):
    disk = mount("-t", "tmpfs", "-o", "size=60m", "none")
    for attempt in tally(1, 5):
        inodes = (18, 3, 10, 17, 5)[attempt.number]
        sh("mount", "-o", f"remount,nr_inodes={inodes}", disk)
        training = launch(dataclasses.replace(config, log_dir=str(disk)))
        assert training.wait(timeout=30) == [2], (inodes, training.printed())
        said = training.printed().splitlines()[-1]
        assert re.search(rf"{disk}.* MB free, but no inode for another file", said), (inodes, said)
        process = tokenize(disk / "data")
        if process.wait(timeout=30) == [2]:
            said = process.printed().splitlines()[-1]
            assert re.search(rf"{disk}.* MB free, but no inode for another file", said), (inodes, said)
        sh("mount", "-o", "remount,nr_inodes=1000", disk)
        run = disk / "run"
        assert set(steps_of(run)) <= {4, 8} and left_by_saving(run) == []
        launch(dataclasses.replace(config, log_dir=str(disk), run_name="run"), "--resume").finish()
        assert end_of(run) == end_of(whole())
        tokenize(disk / "data").finish()
        shards.verify(disk / "data")
        for path in disk.iterdir():
            shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.fault(36)
@pytest.mark.timeout(900)
def test_an_error_of_the_disk_at_any_time_is_said_and_nothing_is_lost(
    launch, tokenize, config, whole, tmp_path, tally
):
    expected, refused = None, 0
    for attempt in tally(6, 20):
        random, run = faults.draw(attempt.number), tmp_path / f"run{attempt.number}"
        error, reason = (number := ERRORS[attempt.number % len(ERRORS)]), os.strerror(number)
        if attempt.number % 3:
            fails = partial(faults.fail_from_operation, random.randrange(130), error, run.name)
            cfg = dataclasses.replace(config, run_name=run.name)
            failing, again = launch(cfg, "--resume", patches=[fails]), partial(launch, cfg, "--resume")
        else:
            fails = partial(faults.fail_from_operation, random.randrange(90), error, run.name)
            failing, again = tokenize(run, fails), partial(tokenize, run)
        code, printed = failing.wait()[0], failing.printed()
        assert code in (0, 2) and "Traceback" not in printed, printed
        refused += code == 2
        if code:
            said = printed.splitlines()[-1]
            assert reason in said and str(tmp_path) in said, printed
        again().finish()
        if attempt.number % 3:
            assert end_of(run) == end_of(whole()) and left_by_saving(run) == []
        else:
            expected = expected or read_files(run)
            assert read_files(run) == expected
        shutil.rmtree(run)
    assert refused >= 3


@pytest.mark.slow
@pytest.mark.fault(36)
@pytest.mark.skipif(not can_trace(), reason="needs strace (apt install strace), and the right to trace")
def test_what_the_kernel_answers(config, whole, tmp_path, tally):
    """strace gives the answers: a late fsync, and a quota amid the weights."""
    cases = {
        "fsync:delay_enter=300000": (0, "saved step_000012"),
        "write:error=EDQUOT": (2, "Disk quota exceeded"),
        "openat:error=EMFILE": (2, "Too many open files"),
    }
    for attempt in tally(1, len(cases)):
        fault = list(cases)[(1, 0, 2)[attempt.number]]
        code, said = cases[fault]
        cfg = dataclasses.replace(config, run_name=f"run{attempt.number}")
        run, call = tmp_path / cfg.run_name, fault.partition(":")[0]
        paths = [run / ".tmp_step_000008" / name for name in ("model.safetensors", "state.json")]
        options = ["-f", "-qq", "-o", os.devnull, "-e", f"trace={call}", "-e", f"inject={fault}"]
        strace = ["strace", *options, *(word for path in paths for word in ("-P", str(path)))]
        words = [sys.executable, str(ROOT / "train_gpt2.py"), *flags(cfg)]
        done = subprocess.run([*strace, *words], capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == code and said in done.stdout + done.stderr, (fault, done.stderr)
        assert code == 0 or f"{run / 'step_000008'} (2 MB) could not be written" in done.stderr, done.stderr
        assert steps_of(run) == ([4] if code else [4, 8, 12]) and left_by_saving(run) == []
        if code:
            subprocess.run([*words, "--resume"], capture_output=True, timeout=200, check=True)
        assert end_of(run) == end_of(whole())
