"""Two users on one machine: umask, a shared log folder, a shared data folder, a shared cache of shards.

They are made up, and the tests need root for that. Alice and Bob are in one group, Carol is in none.
"""

import dataclasses
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import faults
import pytest
from corpora import DOCUMENTS, read_files, to_jsonl
from helpers import ROOT, Training, draw_pictures, end_of
from test_faults import steps_of
from test_hub_shards import set_cache

from lib import shards

closed = [path for path in (ROOT, *ROOT.parents) if not path.stat().st_mode & stat.S_IXOTH]
pytestmark = [
    pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="needs root, to be other users"),
    pytest.mark.skipif(bool(closed), reason="needs a repository that other users may read"),
]
GROUP, USERS = 12000, {"alice": 12001, "bob": 12002, "carol": 12003}
MANY = [f"{number} {text}" for number in range(12) for text in DOCUMENTS]


@pytest.fixture
def place(data) -> Iterator[Path]:
    """A folder that the users may enter, with data, a text, and for each a home; its `log` is the group's."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    shutil.copytree(data, folder / "data")
    (folder / "a.jsonl").write_bytes(to_jsonl(MANY))
    for path in (folder / "data", *(folder / "data").iterdir(), folder / "a.jsonl"):
        path.chmod(0o755)
    share(folder / "log")
    for name, user in USERS.items():
        (folder / name).mkdir()
        os.chown(folder / name, user, user)
    yield folder
    shutil.rmtree(folder)


def share(folder: Path, mode: int = 0o2775):
    folder.mkdir()
    os.chown(folder, 0, GROUP)
    folder.chmod(mode)


@pytest.fixture
def act(launch, config, place) -> Callable[..., Training]:
    """`act("alice", "--resume", umask=0o027, run_name="a")` starts train_gpt2.py, or another script."""

    def act(
        name: str, *words: object, umask: int = 0o022, script: str = "train_gpt2.py", patches: tuple = (),
        **changes,
    ) -> Training:  # fmt: skip
        group = GROUP if name != "carol" else USERS["carol"]
        become = partial(faults.become, USERS[name], group, umask, place / name)
        here = dict(dataset_path=str(place / "data"), log_dir=str(place / "log"))
        cfg = dataclasses.replace(config, **{**here, **changes}) if script == "train_gpt2.py" else None
        return launch(cfg, *words, script=script, patches=(*patches, become))

    return act


@pytest.fixture
def tokenize(act, place) -> Callable[..., Training]:
    def tokenize(name: str, out: Path, *words: object, **options) -> Training:
        source = ("--source", place / "a.jsonl", "--out-dir", out, "--name", "toy", "--workers", 1)
        numbers = ("--shard-tokens", 300, "--val-tokens", 100)
        return act(name, *source, *numbers, *words, script="fineweb.py", **options)

    return tokenize


def refusal(training: Training) -> str:
    """The last line of a script that refuses; that nothing stands before it but what was found."""
    assert training.wait() == [2], training.printed()
    assert "Traceback" not in training.printed()
    return training.printed().splitlines()[-1]


def locks(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*.lock")]


def modes_of(folder: Path) -> set[tuple[bool, int]]:
    """The modes of a folder and of all in it, and whether each is a folder."""
    return {(path.is_dir(), path.stat().st_mode & 0o777) for path in (folder, *folder.rglob("*"))}


@pytest.mark.slow
@pytest.mark.fault(37)
def test_all_files_have_the_modes_that_the_umask_says(act, tokenize, place, tally):
    for attempt in tally(1, 4):
        umask, names = (0o027, 0o022, 0o002, 0o077)[attempt.number], (f"run{attempt.number}", "again")
        expected = {(True, 0o777 & ~umask), (False, 0o666 & ~umask)}
        run, data = place / "log" / names[0], place / "alice" / f"data{attempt.number}"
        changes = dict(umask=umask, run_name=run.name, val_every=6)
        act(
            "alice", "--tracker", "tensorboard", "--keep-last", 2, patches=(draw_pictures,), **changes
        ).finish()
        assert (run / "loss.png").is_file() and (run / "tensorboard").is_dir()
        assert modes_of(run) == expected, [oct(mode) for _, mode in modes_of(run)]
        shutil.rmtree(run / "step_000012")
        act("alice", "--resume", **changes).finish()
        assert modes_of(run) == expected and locks(place / "log") == []
        tokenize("alice", data, umask=umask).finish()
        assert modes_of(data) == expected


@pytest.mark.fault(37)
@pytest.mark.slow
def test_another_user_reads_a_run_as_its_umask_says_and_is_refused_to_write_it(act, whole, place, tally):
    for attempt in tally(1, 6):
        umask, reader = ((0o022, "bob"), (0o027, "bob"), (0o077, "bob"))[attempt.number % 3]
        is_named = attempt.number >= 3
        run = place / "log" / "run"
        act("alice", umask=umask).finish()
        before = read_files(run)
        words = ("--resume", run) if is_named else ("--resume",)
        said = refusal(act(reader, *words, run_name="run"))
        if umask == 0o077:
            assert "Permission denied" in said and f"{run} belongs to user 12001 (drwx--S---)" in said, said
        else:
            mode = "drwxr-sr-x" if umask == 0o022 else "drwxr-s---"
            assert f"{run} cannot be written: Permission denied" in said, said
            assert f"{run} belongs to user 12001 ({mode}): have its mode changed, or choose" in said, said
        assert locks(place / "log") == [] and read_files(run) == before
        reads = {
            "train_gpt2.py": ("--resume", run, "--eval-only", "--val-every", 1, "--checkpoint-every", 0),
            "generate.py": ("--model", run, "--prompt", "a", "--max-tokens", 2),
            "perplexity.py": ("--model", run, "--data", place / "data", "--limit", 2),
            "plot.py": (run, "--out", place / reader / "x.png"),
        }
        for script, words in list(reads.items())[: 4 if is_named else 1]:
            read = act(reader, *words, script=script) if script != "train_gpt2.py" else act(reader, *words)
            if umask == 0o077:
                assert f"{run} belongs to user 12001" in refusal(read)
            else:
                assert "error" not in read.finish().lower()
        mine = act(reader, "--init-from", run, run_name="mine", n_layer=None, n_head=None, n_embd=None)
        if umask == 0o077:
            assert f"{run} belongs to user 12001" in refusal(mine)
        else:
            mine.finish()
        act("alice", "--resume", umask=umask, max_steps=14).finish()
        assert steps_of(run)[-1] == 14
        for path in (place / "log").iterdir():
            shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.fault(37)
def test_a_run_of_the_group_is_resumed_by_another(act, whole, place, tally):
    for attempt in tally(1, 2):
        run = place / "log" / f"run{attempt.number}"
        changes = dict(run_name=run.name, umask=0o002, val_every=(0, 6)[attempt.number], keep_last=2)
        act("alice", **changes).finish()
        shutil.rmtree(run / "step_000012")
        printed = act("bob", "--resume", **changes).finish()
        assert "resumed at step 8" in printed and "could not" not in printed
        assert end_of(run) == end_of(whole(val_every=changes["val_every"]))
        shutil.rmtree(run / "step_000012")
        act("alice", "--resume", **changes).finish()
        assert end_of(run) == end_of(whole(val_every=changes["val_every"])) and locks(place / "log") == []


@pytest.mark.slow
@pytest.mark.fault(37)
def test_two_users_share_a_log_folder(act, place, whole, tally):
    """Both start at once; --resume takes the newest run that its user may write."""
    for attempt in tally(1, 4):
        log, umask = place / f"log{attempt.number}", (0o022, 0o077)[attempt.number // 2]
        share(log, (0o2775, 0o1777)[attempt.number % 2])
        both = [act(name, run_name=name, log_dir=str(log), umask=umask) for name in ("alice", "bob")]
        for training in both:
            training.finish()
        assert {path.name for path in log.iterdir()} == {"alice", "bob"}
        started = {name: (log / name / "settings.json").stat().st_mtime for name in ("alice", "bob")}
        other, newest = sorted(started, key=lambda name: started[name])
        assert started[other] < started[newest]
        shutil.rmtree(log / other / "step_000012")
        printed = act(other, "--resume", run_name="", log_dir=str(log), umask=umask).finish()
        passed = f"passed over {log / newest}, which user {USERS[newest]} owns and you may not write"
        assert (passed in printed) == (umask == 0o022) and "resumed at step 8" in printed, printed
        for name in ("alice", "bob"):
            assert end_of(log / name) == end_of(whole())
        said = refusal(act("carol", "--resume", run_name="", log_dir=str(log)))
        assert re.search("cannot be written: Permission denied.* belongs to|holds no checkpoint", said), said
        assert {path.name for path in log.iterdir()} == {"alice", "bob"}


@pytest.mark.fault(37)
def test_a_lock_that_a_killed_run_of_another_left(act, place, tally):
    for attempt in tally(1, 4):
        log, umask = place / f"log{attempt.number}", (0o022, 0o002)[attempt.number % 2]
        share(log, (0o1777, 0o2775)[attempt.number // 2])
        lock = log / ".run.lock"
        lock.touch()
        os.chown(lock, USERS["alice"], GROUP)
        lock.chmod(0o666 & ~umask)
        act("bob", run_name="other", log_dir=str(log)).finish()
        same = act("bob", log_dir=str(log))
        if umask == 0o022 or attempt.number < 2:  # filelock takes no other's lock in a sticky folder
            said = refusal(same)
            assert f"{lock} belongs to user 12001, whose run uses the folder or was killed" in said, said
            assert not (log / "run").exists()
        else:  # the lock is the group's, too
            same.finish()
            act("bob", "--resume", log_dir=str(log)).finish()


@pytest.mark.slow
@pytest.mark.fault(37)
def test_another_user_goes_on_with_a_data_set_or_reads_it(tokenize, act, place, tally):
    whole = place / "alice" / "whole"
    tokenize("alice", whole).finish()
    for attempt in tally(2, 4):
        umask, data = (0o002, 0o022, 0o027, 0o077)[attempt.number], place / "log" / f"data{attempt.number}"
        fails = partial(faults.fail_from_operation, 20, 5, data.name)
        assert tokenize("alice", data, umask=umask, patches=(fails,)).wait() == [2]
        assert list(data.rglob("*.npy")) and not shards.is_complete(data)
        before = read_files(data)
        going_on = tokenize("bob", data, umask=umask)
        if umask == 0o002:
            assert "part 0: resuming after" in going_on.finish()
        else:
            said = refusal(going_on)
            assert "Permission denied" in said and f"{data}" in said and "belongs to user 12001 (" in said, (
                said
            )
            assert read_files(data) == before
            tokenize("alice", data, umask=umask).finish()
        assert read_files(data) == read_files(whole)
        for words in (("--verify",), ("--inspect",), ()):
            reading = tokenize("bob", data, *words)
            if umask == 0o077:
                assert "belongs to user 12001 (drwx" in refusal(reading)
            else:
                reading.finish()
        if umask != 0o077:
            act("bob", dataset_path=str(data), run_name=f"run{attempt.number}").finish()


@pytest.mark.slow
@pytest.mark.fault(37)
def test_another_user_trains_with_a_cache_of_shards_that_is_complete(
    act, config, server, repo, data, place, whole, tally
):
    server.commit(f"datasets/{repo}", read_files(data))
    location = f"hf://datasets/{repo}"
    for attempt in tally(1, 3):
        umask, cache = (0o022, 0o002, 0o077)[attempt.number], place / "log" / f"cache{attempt.number}"

        def train(name: str, umask: int = umask, cache: Path = cache) -> Training:
            env = server.environment(place / name / "huggingface")
            patches = (partial(faults.set_variables, env), partial(set_cache, cache))
            changes = dict(dataset_path=location, run_name=f"{name}{cache.name}", max_steps=90)
            return act(name, umask=umask, patches=patches, val_every=45, checkpoint_every=45, **changes)

        train("alice").finish()
        shown = [path for path in cache.rglob("*") if ".incoming" not in path.parts]
        expected = {(True, 0o777 & ~umask), (False, 0o666 & ~umask)}
        assert {(path.is_dir(), path.stat().st_mode & 0o777) for path in shown} == expected
        folder = next(cache.rglob("manifest.json")).parent
        if umask == 0o077:
            assert f"{cache} belongs to user 12001 (drwx" in refusal(train("bob"))
            continue
        train("bob").finish()
        assert end_of(place / "log" / f"bob{cache.name}") == end_of(place / "log" / f"alice{cache.name}")
        shutil.rmtree(place / "log" / f"bob{cache.name}")
        next(folder.glob("*_train_*")).unlink()
        if umask == 0o002:
            train("bob").finish()
        else:
            said = refusal(train("bob"))
            assert f"{folder / '.incoming'} cannot be written: Permission denied" in said, said
            assert "belongs to user 12001" in said and not (place / "log" / f"bob{cache.name}").exists()
