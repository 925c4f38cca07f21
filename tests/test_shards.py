"""shards.py: what the writer puts on disk, and batches that every window enters once an epoch."""

import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ABOUT
from helpers import write_shards as write
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lib import files, hub_shards, shard_writer, shards
from lib.shard_writer import PartWriter
from lib.shards import ShardReader


def tokens(count: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.uint16)


def document(length: int, value: int = 7) -> np.ndarray:
    return np.array([50256] + [value] * length, dtype=np.uint16)


def write_plain(folder: Path, sizes: list[int], split: str = "train", first: int = 0) -> Path:
    """A folder without a manifest, whose tokens count up from `first`, so that a token tells its place."""
    folder.mkdir(exist_ok=True)
    for number, size in enumerate(sizes):
        np.save(folder / f"toy_{split}_{number:06d}.npy", tokens(size, first))
        first += size
    return folder


def write_bin(path: Path, ids: np.ndarray, magic: int = 20240520, version: int = 1, count: int | None = None):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + ids.astype("<u2").tobytes())


def epoch_of(reader: ShardReader, epoch: int = 0) -> list[int]:
    return [reader.find_position(epoch * reader.num_windows + n) for n in range(reader.num_windows)]


def stream_of(folder: Path, manifest: dict, split: str) -> list[int]:
    files = [shard["file"] for shard in manifest["shards"] if shard["split"] == split]
    return [int(id) for file in files for id in np.load(folder / file)]


# -----------------------------------------------------------------------------
# the writer


def test_plain_numpy_reads_every_shard_and_the_stream_is_whole(tmp_path):
    stream = tokens(1234)
    manifest = write(tmp_path, stream[:5], stream[5:700], stream[700:], val_tokens=150)
    for shard in manifest["shards"]:
        ids = np.load(tmp_path / shard["file"])
        assert ids.dtype == np.uint16
        assert ids.ndim == 1
    assert stream_of(tmp_path, manifest, "val") == stream[:150].tolist()
    assert stream_of(tmp_path, manifest, "train") == stream[150:].tolist()


def test_the_manifest_tells_the_truth_about_every_shard(tmp_path):
    manifest = write(tmp_path, *[document(n) for n in range(40)], val_tokens=33)
    assert json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8")) == manifest
    assert (manifest["format"], manifest["name"], manifest["complete"]) == (1, "toy", True)
    assert (manifest["source"], manifest["tokenizer"]) == ("tests", {"name": "gpt2"})
    assert {s["file"] for s in manifest["shards"]} == {p.name for p in tmp_path.glob("*.npy")}
    for shard in manifest["shards"]:
        data = (tmp_path / shard["file"]).read_bytes()
        ids = np.load(tmp_path / shard["file"])
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
        assert shard["tokens"] == len(ids)
        assert shard["documents"] == ids.tolist().count(50256)
    assert sum(shard["documents"] for shard in manifest["shards"]) == 40


def test_shard_names_count_up_within_each_split(tmp_path):
    manifest = write(tmp_path, tokens(450), val_tokens=150)
    sizes = [(shard["file"], shard["tokens"]) for shard in manifest["shards"]]
    assert sizes == [
        ("toy_val_000000.npy", 100),
        ("toy_val_000001.npy", 50),
        ("toy_train_000000.npy", 100),
        ("toy_train_000001.npy", 100),
        ("toy_train_000002.npy", 100),
    ]


def test_complete_is_said_only_after_the_parts_are_joined(tmp_path):
    def assert_incomplete():
        assert json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))["complete"] is False
        assert not shards.is_complete(tmp_path)
        with pytest.raises(ValueError, match=r"manifest\.json is incomplete"):
            ShardReader(tmp_path, "train", 4)

    manifest = shard_writer.begin(tmp_path, ABOUT)
    with PartWriter(tmp_path, 0, 100, 10, plan=shard_writer.hash_plan(manifest)) as writer:
        for _ in range(3):
            assert_incomplete()
            assert not writer.state["complete"]
            assert shard_writer.find_missing_parts(tmp_path, manifest) == [0]
            writer.write(tokens(150))
        assert len(list(tmp_path.rglob("train_*.npy"))) >= 2
        writer.close()
    assert writer.state["complete"]
    assert shard_writer.find_missing_parts(tmp_path, manifest) == []
    assert_incomplete()
    shard_writer.merge(tmp_path)
    assert shards.is_complete(tmp_path)
    assert ShardReader(tmp_path, "train", 4).num_tokens == 440


def test_nothing_but_shards_and_manifest_is_left_behind(tmp_path):
    manifest = write(tmp_path / "new" / "folder", tokens(333))
    left = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert left == {"manifest.json", *(shard["file"] for shard in manifest["shards"])}


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(f):
        f.write(b"new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("val_tokens", [1, 99, 100, 101, 250, 999])
@pytest.mark.parametrize("piece", [1, 37, 1000])
def test_validation_gets_exactly_its_tokens_however_they_arrive(tmp_path, val_tokens, piece):
    stream = tokens(1000)
    pieces = [stream[i : i + piece] for i in range(0, len(stream), piece)]
    manifest = write(tmp_path, *pieces, val_tokens=val_tokens)
    assert stream_of(tmp_path, manifest, "val") == stream[:val_tokens].tolist()
    assert stream_of(tmp_path, manifest, "train") == stream[val_tokens:].tolist()


def test_by_default_a_corpus_under_one_shard_gives_a_tenth_to_validation_and_the_rest_to_training(tmp_path):
    manifest = write(tmp_path, tokens(990), tokens(10), shard_tokens=100_000_000, val_tokens=None)
    assert [(s["split"], s["tokens"]) for s in manifest["shards"]] == [("val", 100), ("train", 900)]
    assert ShardReader(tmp_path, "val", 32).num_windows == 3


def test_by_default_a_large_corpus_gives_validation_a_fixed_number_of_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "DEFAULT_VAL_TOKENS", 50)
    for name, size in (("one", 600), ("two", 1700)):
        manifest = write(tmp_path / name, *[tokens(100)] * (size // 100), val_tokens=None)
        assert len(stream_of(tmp_path / name, manifest, "val")) == 50
        assert len(stream_of(tmp_path / name, manifest, "train")) == size - 50


def test_no_validation_tokens_means_no_validation_shard(tmp_path):
    manifest = write(tmp_path, tokens(150), val_tokens=0)
    assert [shard["split"] for shard in manifest["shards"]] == ["train", "train"]


@pytest.mark.parametrize("before", [0, 60])
@pytest.mark.parametrize("length", [100, 250, 1000])
@pytest.mark.fault(19)
def test_a_document_longer_than_a_shard_goes_on_in_the_next(tmp_path, before, length):
    stream = np.concatenate([document(before), document(length), document(3)])
    manifest = write(tmp_path, document(before), document(length), document(3))
    assert stream_of(tmp_path, manifest, "val") + stream_of(tmp_path, manifest, "train") == stream.tolist()
    assert {shard["tokens"] for shard in manifest["shards"][1:-1]} <= {100}
    assert sum(shard["documents"] for shard in manifest["shards"]) == 3


@pytest.mark.parametrize(("size", "val_tokens"), [(0, None), (0, 10), (10, 10), (10, 2000)])
def test_a_corpus_that_leaves_nothing_for_training_is_refused_with_its_size(tmp_path, size, val_tokens):
    with pytest.raises(
        ValueError, match=rf"has {size} tokens.* none is left for training|no text for training"
    ):
        write(tmp_path, tokens(size), val_tokens=val_tokens)
    assert not list(tmp_path.rglob("*.npy"))


def test_shards_of_a_cleared_run_do_not_mix_with_the_next_run(tmp_path):
    shard_writer.begin(tmp_path, ABOUT)
    with PartWriter(tmp_path, 0, 10, 10) as writer:
        writer.write(tokens(200))
    (tmp_path / "toy_train_000009.npy").write_bytes(b"moved here by a merge that was interrupted")
    shard_writer.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []
    manifest = write(tmp_path, tokens(50), shard_tokens=20)
    assert {path.name for path in tmp_path.glob("*.npy")} == {shard["file"] for shard in manifest["shards"]}
    assert shards.verify(tmp_path) == manifest


def files_of(folder: Path) -> dict[str, bytes]:
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.mark.parametrize("count", [1, 63, 64, 100, 9_999, 8192 + 7])
def test_a_shard_has_the_bytes_that_numpy_saves_and_a_hash_of_its_head(tmp_path, count):
    ids = np.random.default_rng(count).integers(0, 50257, count).astype(np.uint16)
    manifest = write(tmp_path, *np.array_split(ids, 7), shard_tokens=20_000, val_tokens=0)
    assert (tmp_path / "toy_train_000000.npy").read_bytes() == save(ids)
    assert manifest["shards"][0]["head_sha256"] == hashlib.sha256(ids[:8192].tobytes()).hexdigest()


# -----------------------------------------------------------------------------
# the writer, interrupted


LENGTHS = [0, 0, 250, 3, 98, 99, 0, 450, 1, 30, 0, 199, 100, 41, 0]
DOCUMENTS = [document(length, value) for value, length in enumerate(LENGTHS)]


def write_documents(
    folder: Path, documents: list[np.ndarray], shard_tokens: int, val_tokens: int | None, close: bool = True
):
    """Goes on with part 0 as fineweb.py does."""
    with PartWriter(folder, 0, shard_tokens, val_tokens) as writer:
        skip = writer.tokens_done
        for ids in documents[writer.documents_done :]:
            writer.write(ids[skip:])
            skip -= min(skip, len(ids))
        if close:
            writer.close()


def keep(folder: Path, copy: Path, count: int) -> Path:
    """A copy of the whole part, as it was when its first `count` shards had been written."""
    part = shard_writer.locate_part(copy, 0)
    shutil.copytree(shard_writer.locate_part(folder, 0), part)
    state = json.loads((part / "part.json").read_text(encoding="utf-8"))
    for shard in state["shards"][count:]:
        (part / shard["file"]).unlink()
    if count:
        state |= {"complete": False, "shards": state["shards"][:count]}
        (part / "part.json").write_text(json.dumps(state), encoding="utf-8")
    else:
        (part / "part.json").unlink()
    return part


@pytest.mark.parametrize("val_tokens", [None, 0, 1, 100, 130, 900])
@pytest.mark.parametrize("shard_tokens", [100, 333])
def test_an_interrupted_part_is_taken_up_after_any_of_its_shards(tmp_path, shard_tokens, val_tokens):
    write_documents(tmp_path / "whole", DOCUMENTS, shard_tokens, val_tokens)
    expected = files_of(tmp_path / "whole")
    count = len(expected) - 1
    assert count >= 4
    for done in range(count + 1):
        part = keep(tmp_path / "whole", tmp_path / str(done), done)
        (part / ".train_000001.npy.tmp").write_bytes(b"half a shard")
        (part / "train_000099.npy").write_bytes(b"renamed, but not yet listed")
        write_documents(tmp_path / str(done), DOCUMENTS, shard_tokens, val_tokens)
        assert files_of(tmp_path / str(done)) == expected, f"after {done} shards"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=12),
    st.integers(1, 40),
    st.one_of(st.none(), st.integers(0, 80)),
    st.lists(st.floats(0, 1), min_size=1, max_size=3),
)
@pytest.mark.fault(17)
def test_a_part_that_is_interrupted_again_and_again_is_the_same(
    tmp_path_factory, lengths, shard_tokens, val_tokens, stops
):
    assume(val_tokens is None or val_tokens < sum(lengths))
    documents = [document(length, value) for value, length in enumerate(lengths)]
    whole, halting = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("halting")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        write_documents(whole, documents, shard_tokens, val_tokens)
        for stop in sorted(stops):
            write_documents(
                halting, documents[: round(stop * len(documents))], shard_tokens, val_tokens, close=False
            )
        write_documents(halting, documents, shard_tokens, val_tokens)
    assert files_of(halting) == files_of(whole)


def flip_a_bit(path: Path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "missing": Path.unlink,
    "flipped": flip_a_bit,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("is_complete", [True, False])
@pytest.mark.parametrize("number", [0, 1, 6, -1])
def test_a_shard_that_was_damaged_meanwhile_is_written_again(tmp_path, damage, is_complete, number):
    write_documents(tmp_path / "whole", DOCUMENTS, 100, 130)
    expected = files_of(tmp_path / "whole")
    part = keep(tmp_path / "whole", tmp_path / "damaged", len(expected) - 1)
    if is_complete:
        shutil.copy(shard_writer.locate_part(tmp_path / "whole", 0) / "part.json", part)
    state = shard_writer.read_part(tmp_path / "damaged", 0)
    assert state is not None
    assert state["complete"] is is_complete
    damage(part / state["shards"][number]["file"])
    write_documents(tmp_path / "damaged", DOCUMENTS, 100, 130)
    assert files_of(tmp_path / "damaged") == expected


def test_the_writer_tells_where_to_go_on(tmp_path):
    with PartWriter(tmp_path, 0, 10, 0) as writer:
        assert (writer.documents_done, writer.tokens_done) == (0, 0)
        writer.write(np.concatenate([document(2), document(0), document(23)]))  # 3 + 1 + 24 tokens
    with PartWriter(tmp_path, 0, 10, 0) as writer:
        assert len(writer.shards) == 2
        assert (writer.documents_done, writer.tokens_done) == (2, 16)


def test_an_error_of_the_writing_thread_is_raised_and_what_was_whole_stays(tmp_path, monkeypatch):
    replace = os.replace

    def fail_on_the_third_shard(source, target):
        if Path(target).name == "train_000002.npy":
            raise OSError("disk full")
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(os, "replace", fail_on_the_third_shard)
        write_documents(tmp_path / "one", DOCUMENTS, 100, 0)
    assert set(files_of(tmp_path / "one")) == {
        f"parts/000000/{name}" for name in ("part.json", "train_000000.npy", "train_000001.npy")
    }
    for name in ("one", "two"):
        write_documents(tmp_path / name, DOCUMENTS, 100, 0)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


# -----------------------------------------------------------------------------
# parts joined


class Killed(BaseException):
    """No `except Exception` holds it up."""


def write_parts(folder: Path, parts: list[tuple[str, int]]) -> dict:
    """Parts of so many tokens, which count up from part to part; the first has 3 tokens of validation."""
    manifest = shard_writer.begin(folder, {**ABOUT, "parts": len(parts)})
    first = 0
    for number, (split, size) in enumerate(parts):
        val_tokens = 3 if (number, split) == (0, "train") and size else 0
        with PartWriter(folder, number, 20, val_tokens, split, shard_writer.hash_plan(manifest)) as writer:
            writer.write(tokens(size, first))
            writer.close()
        first += size
    return manifest


PARTS = [
    [("train", 200)],
    [("train", 75), ("train", 1), ("train", 0), ("train", 60)],
    [("train", 5), ("val", 45), ("train", 41), ("test", 21), ("val", 3)],
    [("val", 45), ("train", 41)],
]


@pytest.mark.parametrize("parts", PARTS, ids=len)
def test_parts_are_joined_in_their_order(tmp_path, parts):
    write_parts(tmp_path, parts)
    manifest = shard_writer.merge(tmp_path)
    assert shards.verify(tmp_path) == manifest
    assert not (tmp_path / "parts").exists()
    assert manifest["parts"] == len(parts)
    names = [shard["file"] for shard in manifest["shards"]]
    for split in ("val", "train", "test"):
        ours = [name for name in names if f"_{split}_" in name]
        assert ours == [f"toy_{split}_{n:06d}.npy" for n in range(len(ours))]
    assert set(files_of(tmp_path)) == {*names, "manifest.json"}
    wanted: dict[str, list[int]] = {"val": [], "train": [], "test": []}
    first = 0
    for number, (split, size) in enumerate(parts):
        ids = list(range(first, first + size))
        val = 3 if (number, split) == (0, "train") else 0
        wanted["val"] += ids[:val]
        wanted[split] += ids[val:]
        first += size
    assert {split: stream_of(tmp_path, manifest, split) for split in wanted} == wanted
    assert shard_writer.merge(tmp_path) == manifest


def at_call(number: int, function, do):
    """The function, but at its call of that number `do` comes first."""
    calls = itertools.count()

    def wrapper(*args, **kwargs):
        if next(calls) == number:
            do()
        return function(*args, **kwargs)

    return wrapper


def kill():
    raise Killed


@pytest.mark.parametrize("parts", PARTS, ids=len)
@pytest.mark.fault(17)
def test_joining_can_be_interrupted_at_any_rename_and_repeated(tmp_path, monkeypatch, parts):
    write_parts(tmp_path / "parts", parts)
    shutil.copytree(tmp_path / "parts", tmp_path / "whole")
    manifest = shard_writer.merge(tmp_path / "whole")
    expected = files_of(tmp_path / "whole")
    for number in itertools.count():
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "parts", folder)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", at_call(number, os.replace, kill))
                shard_writer.merge(folder)
        except Killed:
            assert not shards.is_complete(folder)
            assert shard_writer.merge(folder) == manifest
        else:
            break
        assert files_of(folder) == expected
    assert number == len(manifest["shards"]) + 1  # one rename a shard, and the manifest's


def test_joining_that_was_killed_before_the_parts_are_removed_removes_them_the_next_time(
    tmp_path, monkeypatch
):
    write_parts(tmp_path, PARTS[1])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: kill())
        shard_writer.merge(tmp_path)
    manifest = shard_writer.merge(tmp_path)
    assert set(files_of(tmp_path)) == {"manifest.json", *(shard["file"] for shard in manifest["shards"])}


@pytest.mark.parametrize(
    ("module", "name"),
    [(os, "replace"), (os, "open"), (shard_writer, "read_part"), (shard_writer, "find_missing_parts")],
)
def test_another_process_may_join_the_parts_at_the_same_time(tmp_path, monkeypatch, module, name):
    write_parts(tmp_path / "parts", PARTS[1])
    shutil.copytree(tmp_path / "parts", tmp_path / "whole")
    manifest = shard_writer.merge(tmp_path / "whole")
    expected = files_of(tmp_path / "whole")
    for number in itertools.count():
        folder, others = tmp_path / str(number), []
        shutil.copytree(tmp_path / "parts", folder)
        join = functools.partial(shard_writer.merge, folder)
        with monkeypatch.context() as patch:
            wrapped = at_call(number, getattr(module, name), lambda: others.append(join()))  # noqa: B023
            patch.setattr(module, name, wrapped)
            assert join() == manifest, f"the other came at call {number}"
        assert files_of(folder) == expected
        if not others:
            break
        assert others == [manifest]
    assert number >= 1


def test_parts_that_are_missing_or_incomplete_are_named(tmp_path):
    manifest = write_parts(tmp_path, [("train", 30)] * 15)
    assert shard_writer.find_missing_parts(tmp_path, manifest) == []
    shutil.rmtree(shard_writer.locate_part(tmp_path, 0))
    with PartWriter(tmp_path, 7, 20, 0, plan=shard_writer.hash_plan(manifest)) as writer:
        writer.state["complete"] = False
        files.write_json(writer.folder / "part.json", writer.state)
    before = files_of(tmp_path)
    assert shard_writer.find_missing_parts(tmp_path, manifest) == [0, 7]
    with pytest.raises(ValueError, match=r"of 15 parts, these are missing or incomplete: 0, 7$"):
        shard_writer.merge(tmp_path)
    for number in range(1, 12):
        shutil.rmtree(shard_writer.locate_part(tmp_path, number))
        before = {path: data for path, data in before.items() if f"parts/{number:06d}/" not in path}
    with pytest.raises(ValueError, match=r"incomplete: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.$"):
        shard_writer.merge(tmp_path)
    assert files_of(tmp_path) == before


def test_several_parts_that_leave_nothing_for_training_are_refused(tmp_path):
    write_parts(tmp_path, [("train", 0), ("train", 0), ("val", 50)])
    with pytest.raises(ValueError, match="tests has no text for training"):
        shard_writer.merge(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_of_several_that_begin_one_writes_the_manifest(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda n: shard_writer.begin(tmp_path / "a", {**ABOUT, "source": n}), range(40))
        )
    assert all(manifest == found[0] for manifest in found)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["manifest.json"]
    assert shards.load_manifest(tmp_path / "a" / "manifest.json") == found[0]
    assert found[0]["complete"] is False


# -----------------------------------------------------------------------------
# work in the background


def wait_for(condition: Callable[[], bool], seconds: float = 5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("depth", [1, 2, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 100])
def test_prepared_items_come_in_order_and_at_most_so_many_ahead(depth, count):
    made: list[int] = []
    used = 0
    for item in files.prefetch((made.append(n) or n for n in range(count)), depth):
        assert item == used
        assert len(made) <= used + 2 + depth  # this one, those that wait, and one that waits to wait
        used += 1
    assert used == count


def test_items_are_prepared_while_the_first_is_used():
    made: list[int] = []
    items = files.prefetch((made.append(n) or n for n in range(100)), depth=3)
    assert next(items) == 0
    wait_for(lambda: len(made) >= 4)
    time.sleep(0.05)
    assert len(made) <= 5
    del items


@pytest.mark.parametrize(
    "error", [ValueError("bad"), StopIteration("early"), KeyboardInterrupt("stop"), OSError(5)]
)
@pytest.mark.parametrize("before", [0, 3])
def test_an_error_in_preparing_is_raised_where_the_items_are_used(error, before):
    class Failing:
        def __init__(self):
            self.left = before

        def __iter__(self):
            return self

        def __next__(self):
            if not self.left:
                raise error
            self.left -= 1
            return self.left

    seen = []
    if isinstance(error, StopIteration):
        seen += files.prefetch(Failing(), depth=2)
    else:
        with pytest.raises(type(error)) as caught:
            for item in files.prefetch(Failing(), depth=2):
                seen.append(item)
        assert caught.value is error
    assert seen == list(range(before))[::-1]


@pytest.mark.parametrize("taken", [1, 10])
def test_the_thread_stops_and_lets_go_when_its_consumer_does(taken):
    closed: list[bool] = []

    def endless():
        try:
            yield from itertools.count()
        finally:
            closed.append(True)

    before = set(threading.enumerate())
    items = files.prefetch(files.prefetch(endless(), depth=1), depth=3)
    assert list(itertools.islice(items, taken)) == list(range(taken))
    threads = set(threading.enumerate()) - before
    assert len(threads) == 2
    del items
    wait_for(lambda: not any(thread.is_alive() for thread in threads))
    wait_for(lambda: bool(closed))


# -----------------------------------------------------------------------------
# the reader: order


SIZES = [[1000], [100, 100, 100], [3, 1, 500, 2, 2, 2, 90], [17] * 20, [11, 1]]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("seq_len", [1, 10, 11])
def test_every_window_comes_once_an_epoch(tmp_path, sizes, seq_len):
    reader = ShardReader(write_plain(tmp_path, sizes), "train", seq_len, seed=3)
    assert reader.num_windows == (sum(sizes) - 1) // seq_len
    assert sorted(epoch_of(reader)) == [n * seq_len for n in range(reader.num_windows)]
    last = sum(sizes) - 1 - seq_len
    shifts = set()
    for epoch in range(1, 30):
        positions = sorted(epoch_of(reader, epoch))
        shifts.add(positions[0])
        assert positions == [min(positions[0] + n * seq_len, last) for n in range(reader.num_windows)]
    assert shifts <= set(range(seq_len)) and len(shifts) >= min(seq_len, last + 1) / 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 30), st.integers(0, 2**32))
def test_every_window_is_the_stream_at_its_place_across_shard_edges(tmp_path_factory, sizes, seq_len, seed):
    folder = write_plain(tmp_path_factory.mktemp("shards"), sizes)
    if sum(sizes) <= seq_len:
        with pytest.raises(ValueError, match=f"needs {seq_len + 1}"):
            ShardReader(folder, "train", seq_len, seed)
        return
    reader = ShardReader(folder, "train", seq_len, seed)
    positions = epoch_of(reader) + epoch_of(reader, 3)
    assert len(positions) == 2 * ((sum(sizes) - 1) // seq_len)
    x, y = reader.read(positions)
    for begin, inputs, targets in zip(positions, x.tolist(), y.tolist()):
        assert inputs == list(range(begin, begin + seq_len))
        assert targets == list(range(begin + 1, begin + seq_len + 1))


def test_epochs_and_seeds_differ_in_order_and_equal_seeds_do_not(tmp_path):
    folder = write_plain(tmp_path, [300, 300, 300])
    orders = [
        tuple(epoch_of(ShardReader(folder, "train", 10, seed), epoch)) for seed in (0, 1) for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4
    assert tuple(epoch_of(ShardReader(folder, "train", 10, 0))) == orders[0]
    assert list(orders[0]) != sorted(orders[0])


def test_shards_are_shuffled_by_seed_and_epoch_and_windows_inside_each_shard(tmp_path):
    folder = write_plain(tmp_path, [*[100] * 7, 101])  # ten windows a shard
    shard_orders = set()
    for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        order = epoch_of(ShardReader(folder, "train", 10, seed), epoch)
        visits = [order[i : i + 10] for i in range(0, 80, 10)]
        shift = min(order)  # leaves the last window no room in its shard
        shard_order = [max(visit) // 100 for visit in visits]
        inside = [{position // 100 for position in visit if position < 790 - shift} for visit in visits]
        assert inside == [{shard} for shard in shard_order]
        assert shard_order != sorted(shard_order)
        assert all(visit != sorted(visit) for visit in visits)
        shard_orders.add(tuple(shard_order))
    assert len(shard_orders) == 4


def sequences_of_step(
    reader: ShardReader, step: int, sequences: int, world_size: int, batch_size: int
) -> Counter:
    seen = Counter()
    for micro_step in range(sequences // (world_size * batch_size)):
        for rank in range(world_size):
            x, _ = reader.batch(step, micro_step, batch_size, sequences, rank, world_size)
            assert x.shape == (batch_size, reader.seq_len)
            seen.update(tuple(row) for row in x.tolist())
    return seen


@pytest.mark.parametrize("step", [0, 2, 9])
@pytest.mark.fault(11)
def test_a_step_takes_the_same_sequences_for_any_number_of_processes_and_any_batch_size(tmp_path, step):
    reader = ShardReader(write_plain(tmp_path, [333, 50, 333]), "train", 7, seed=5)
    first = step * 24
    expected = Counter(
        tuple(reader.read([reader.find_position(first + n)])[0][0].tolist()) for n in range(24)
    )
    for world_size, batch_size in [(1, 24), (1, 1), (2, 12), (2, 3), (3, 8), (4, 2), (8, 3), (24, 1)]:
        assert sequences_of_step(reader, step, 24, world_size, batch_size) == expected


def test_steps_that_cross_an_epoch_still_visit_every_window_once_in_each(tmp_path):
    reader = ShardReader(write_plain(tmp_path, [71]), "train", 10)
    assert reader.num_windows == 7
    firsts = [
        int(x[0, 0])
        for step in range(7)
        for x, _ in [reader.batch(step, 0, 1, 2), reader.batch(step, 1, 1, 2)]
    ]
    assert sorted(firsts[:7]) == [0, 10, 20, 30, 40, 50, 60]
    assert sorted(firsts[7:]) == [min(min(firsts[7:]) + n, 60) for n in (0, 10, 20, 30, 40, 50, 60)]


def test_batches_depend_on_nothing_that_was_asked_before(tmp_path):
    folder = write_plain(tmp_path, [400, 30, 400])
    calls = [(step, micro, rank) for step in range(30) for micro in range(2) for rank in range(2)]
    reader = ShardReader(folder, "train", 9, seed=2)
    forward = {call: reader.batch(call[0], call[1], 2, 8, call[2], 2) for call in calls}
    for step, micro, rank in reversed(calls):
        x, y = reader.batch(step, micro, 2, 8, rank, 2)
        assert torch.equal(x, forward[step, micro, rank][0])
        assert torch.equal(y, forward[step, micro, rank][1])
    x, y = ShardReader(folder, "train", 9, seed=2).batch(29, 1, 2, 8, 1, 2)
    assert torch.equal(x, forward[29, 1, 1][0])
    assert torch.equal(y, forward[29, 1, 1][1])


def test_targets_are_the_inputs_shifted_by_one(tmp_path):
    x, y = ShardReader(write_plain(tmp_path, [100]), "train", 8).batch(0, 0, 4, 4)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(y, x + 1)


@pytest.mark.parametrize(
    ("steps", "micro_steps", "batch_size", "sequences", "rank", "world_size"),
    [
        (range(0, 6), 1, 4, 4, 0, 1),
        (range(5, 40), 2, 2, 8, 1, 2),
        (range(3, 3), 2, 2, 8, 1, 2),
        (range(7, 8), 3, 1, 9, 2, 3),
    ],
)
def test_batches_in_the_background_are_those_that_batch_gives(
    tmp_path, steps, micro_steps, batch_size, sequences, rank, world_size
):
    reader = ShardReader(write_plain(tmp_path, [400, 30, 400]), "train", 9, seed=2)
    expected = [
        reader.batch(step, micro_step, batch_size, sequences, rank, world_size)
        for step in steps
        for micro_step in range(micro_steps)
    ]
    again = ShardReader(tmp_path, "train", 9, seed=2)
    found = list(again.batches(steps, micro_steps, batch_size, sequences, rank, world_size))
    assert len(found) == len(expected)
    for (x, y), (inputs, targets) in zip(found, expected):
        assert torch.equal(x, inputs)
        assert torch.equal(y, targets)


@pytest.mark.fault(16)
def test_batches_stop_their_thread_and_report_a_bad_token(tmp_path):
    ids = tokens(100)
    ids[57] = 50300
    np.save(tmp_path / "toy_train_000000.npy", ids)
    before = set(threading.enumerate())
    batches = ShardReader(tmp_path, "train", 9).batches(range(10**9), 1, 1, 1)
    with pytest.raises(ValueError, match=r"toy_train_000000\.npy: token 50300 at offset 57"):
        for _ in batches:
            pass
    batches = ShardReader(write_plain(tmp_path / "good", [100]), "train", 9).batches(range(10**9), 1, 1, 1)
    next(batches)
    threads = set(threading.enumerate()) - before
    assert len(threads) >= 1
    del batches
    wait_for(lambda: not any(thread.is_alive() for thread in threads))


def test_few_shards_are_open_at_a_time(tmp_path):
    reader = ShardReader(write_plain(tmp_path, [20] * 50), "train", 9)
    for step in range(reader.num_windows):
        reader.batch(step, 0, 1, 1)
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert mapped.read_text(encoding="utf-8").count(str(tmp_path)) <= 4


# -----------------------------------------------------------------------------
# the reader: what it accepts


def test_shards_are_memory_mapped(tmp_path):
    write_plain(tmp_path / "npy", [50])
    (tmp_path / "bin").mkdir()
    write_bin(tmp_path / "bin" / "toy_train_000000.bin", tokens(50))
    for kind in ("npy", "bin"):
        assert type(ShardReader(tmp_path / kind, "train", 4)._open(0)) is np.memmap


def test_a_split_is_read_without_the_other(tmp_path):
    write_plain(tmp_path, [50], "val", first=1000)
    write_plain(tmp_path, [70], "train", first=2000)
    assert ShardReader(tmp_path, "val", 49).batch(0, 0, 1, 1)[0].tolist() == [list(range(1000, 1049))]
    assert ShardReader(tmp_path, "train", 69).batch(0, 0, 1, 1)[0].tolist() == [list(range(2000, 2069))]


def test_a_build_nanogpt_folder_is_read(tmp_path):
    np.save(tmp_path / "edufineweb_val_000000.npy", tokens(40, 5000))
    for number in (1, 2, 10):
        np.save(tmp_path / f"edufineweb_train_{number:06d}.npy", tokens(20, 100 * number))
    (tmp_path / "notes.txt").write_text("not a shard", encoding="utf-8")
    assert ShardReader(tmp_path, "val", 39).read([0])[0].tolist() == [list(range(5000, 5039))]
    train = ShardReader(tmp_path, "train", 19)
    assert train.num_tokens == 60
    assert [train._open(i)[0] for i in range(3)] == [100, 200, 1000]


def test_llm_c_shards_are_read_in_the_order_of_their_numbers(tmp_path):
    for number, first in ((2, 100), (10, 200)):
        write_bin(tmp_path / f"fineweb_train_{number}.bin", tokens(30, first))
    write_bin(tmp_path / "fineweb_val_000000.bin", tokens(21, 50200))
    reader = ShardReader(tmp_path, "train", 59)
    expected = [*range(100, 130), *range(200, 230)]
    assert reader.read([0])[0].tolist() == [expected[:-1]]
    assert ShardReader(tmp_path, "val", 20).read([0])[1].tolist() == [list(range(50201, 50221))]


def test_unigram_entropy_is_that_of_the_splits_frequencies(tmp_path):
    folder = tmp_path
    np.save(folder / "toy_val_000000.npy", np.array([5, 5, 9, 50256], dtype=np.uint16))
    np.save(folder / "toy_val_000001.npy", np.array([5, 5, 9, 7], dtype=np.uint16))
    expected = 1 / 2 * math.log(2) + 1 / 4 * math.log(4) + 2 / 8 * math.log(8)
    assert ShardReader(folder, "val", 2).unigram_entropy() == pytest.approx(expected, abs=1e-12)
    of_first_five = 3 / 5 * math.log(5 / 3) + 2 / 5 * math.log(5)
    assert ShardReader(folder, "val", 2).unigram_entropy(max_tokens=5) == pytest.approx(
        of_first_five, abs=1e-12
    )


def test_the_fingerprint_changes_with_the_data_and_only_with_it(tmp_path):
    for name, first in (("a", 0), ("b", 0), ("c", 1)):
        write(tmp_path / name, tokens(300, first))
    a, b, c = (hub_shards.open_folder(tmp_path / name).fingerprint() for name in "abc")
    assert a == b != c
    plain = [write_plain(tmp_path / f"plain{i}", [size]) for i, size in enumerate((50, 50, 51))]
    one, same, longer = (shards.Folder(folder).fingerprint() for folder in plain)
    assert one == same != longer
    opened = shards.Folder(plain[0])
    ShardReader(opened, "train", 4)
    assert opened.fingerprint() == one


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and needs sparse files")
def test_memory_stays_constant_over_an_epoch_of_ten_billion_tokens(tmp_path):
    size = 100_000_000
    for number in range(100):
        with open(tmp_path / f"sparse_train_{number:06d}.npy", "wb") as f:
            np.lib.format.write_array_header_1_0(
                f, {"descr": "<u2", "fortran_order": False, "shape": (size,)}
            )
            f.truncate(f.tell() + 2 * size)
    reader = ShardReader(tmp_path, "train", 1024)
    assert reader.num_windows == (100 * size - 1) // 1024
    pages = []
    for step, (x, _) in enumerate(reader.batches(range(reader.num_windows // 512), 1, 512, 512)):
        assert x.shape == (512, 1024)
        if step % 500 == 0:
            pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
    megabytes = [4096 * count / 1e6 for count in pages]
    assert len(megabytes) == 39
    assert max(megabytes) - megabytes[0] < 4.5 * 200  # four shards are open at a time


# -----------------------------------------------------------------------------
# the reader: what it refuses


@pytest.mark.parametrize(("size", "seq_len"), [(10, 10), (1, 1), (1000, 1024)])
def test_a_split_shorter_than_a_window_is_refused_with_both_numbers(tmp_path, size, seq_len):
    write_plain(tmp_path, [size])
    with pytest.raises(ValueError, match=rf"{size:,} tokens for train.* needs {seq_len + 1:,}"):
        ShardReader(tmp_path, "train", seq_len)


def test_a_missing_split_is_refused(tmp_path):
    write_plain(tmp_path, [100])
    with pytest.raises(ValueError, match="has 0 tokens for val"):
        ShardReader(tmp_path, "val", 4)


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: folder.mkdir()])
def test_a_folder_without_shards_names_the_commands_that_make_them(tmp_path, make):
    make(tmp_path / "data")
    with pytest.raises(
        FileNotFoundError, match=r"data holds no shards.*python fineweb\.py.*train_gpt2\.py demo"
    ):
        ShardReader(tmp_path / "data", "train", 4)


def save(array, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=tokens(100))
    return buffer.getvalue()


def npy_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


HUGE = "{'descr': '<u2', 'fortran_order': False, 'shape': (10000000000000000000000,), }\n"
BAD_NPY = {
    "truncated": save(tokens(100))[:-1],
    "cut in its header": save(tokens(100))[:50],
    "empty": b"",
    "without tokens": save(tokens(0)),
    "int64": save(np.arange(100)),
    "big-endian": save(tokens(100).astype(">u2")),
    "two-dimensional": save(tokens(100).reshape(10, 10)),
    "a scalar": save(np.uint16(5)),
    "with a wrong magic": b"X" + save(tokens(100))[1:],
    "text": b"hello " * 100,
    "an npz archive": npz(),
    "a cut archive": npz()[:40],
    "of impossible length": npy_header(HUGE),
    "with an unclosed header": npy_header("{'descr': ((((\n"),
}


@pytest.mark.parametrize("data", BAD_NPY.values(), ids=BAD_NPY.keys())
@pytest.mark.fault(15)
def test_what_is_no_npy_shard_is_refused_by_name(tmp_path, data):
    write_plain(tmp_path, [50, 50])
    (tmp_path / "toy_train_000001.npy").write_bytes(data)
    with pytest.raises(ValueError, match=r"toy_train_000001\.npy"):
        ShardReader(tmp_path, "train", 4)


BAD_BIN = {
    "wrong magic": {"magic": 20240521},
    "wrong version": {"version": 2},
    "fewer tokens than promised": {"count": 101},
    "more tokens than promised": {"count": 99},
    "negative count": {"count": -1},
    "no tokens": {"ids": tokens(0)},
}


@pytest.mark.parametrize("change", BAD_BIN.values(), ids=BAD_BIN.keys())
@pytest.mark.fault(15)
def test_what_is_no_llm_c_shard_is_refused_by_name(tmp_path, change):
    write_bin(tmp_path / "toy_train_000000.bin", **{"ids": tokens(100), **change})
    with pytest.raises(ValueError, match=r"toy_train_000000\.bin"):
        ShardReader(tmp_path, "train", 4)


@pytest.mark.parametrize("size", [0, 100, 1023, 1025, 1223])
@pytest.mark.fault(15)
def test_a_cut_llm_c_shard_is_refused_by_name(tmp_path, size):
    path = tmp_path / "toy_train_000000.bin"
    write_bin(path, tokens(100))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"toy_train_000000\.bin"):
        ShardReader(tmp_path, "train", 4)


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("as_array", [True, False])
def test_a_pickle_is_refused_and_never_run(tmp_path, as_array):
    canary = tmp_path / "canary"
    bomb = Canary(canary)
    data = save(np.array([bomb], dtype=object), allow_pickle=True) if as_array else pickle.dumps(bomb)
    (tmp_path / "toy_train_000000.npy").write_bytes(data)
    with pytest.raises(ValueError, match=r"toy_train_000000\.npy"):
        ShardReader(tmp_path, "train", 4)
    assert not canary.exists()
    np.load(tmp_path / "toy_train_000000.npy", allow_pickle=True)
    assert canary.exists()  # the bomb was real


@pytest.mark.parametrize("how", ["missing", "renamed", "shorter"])
@pytest.mark.fault(15)
def test_a_shard_that_is_not_as_the_manifest_says_is_refused_by_name(tmp_path, how):
    write(tmp_path, tokens(450))
    path = tmp_path / "toy_train_000001.npy"
    if how == "missing":
        path.unlink()
    elif how == "renamed":
        path.rename(tmp_path / "toy_train_000009.npy")
    else:
        np.save(path, tokens(99))
    for check in (shards.verify, lambda folder: ShardReader(folder, "train", 4)):
        with pytest.raises((ValueError, FileNotFoundError), match=r"toy_train_000001\.npy"):
            check(tmp_path)


@pytest.mark.fault(16)
def test_a_token_outside_the_vocabulary_is_refused_with_file_and_offset(tmp_path):
    write_plain(tmp_path, [50, 50])
    ids = tokens(50, 50)
    ids[23] = 50257
    np.save(tmp_path / "toy_train_000001.npy", ids)
    reader = ShardReader(tmp_path, "train", 10)
    reader.read([0, 10, 20, 30, 40, 50, 60])
    with pytest.raises(ValueError, match=r"toy_train_000001\.npy: token 50257 at offset 23 .*0 to 50256"):
        reader.read([0, 70])
    with pytest.raises(ValueError, match="token 40 at offset 40"):
        ShardReader(tmp_path, "train", 10, vocab_size=40).read([40])


BAD_MANIFESTS = {
    "cut": lambda m: json.dumps(m)[:-20],
    "empty": lambda m: "",
    "a list": lambda m: "[]",
    "binary": lambda m: "\0\1\2",
    "without shards": lambda m: json.dumps({k: v for k, v in m.items() if k != "shards"}),
    "shards a number": lambda m: json.dumps(m | {"shards": 5}),
    "a shard without hash": lambda m: json.dumps(
        m | {"shards": [{"file": "a", "split": "val", "tokens": 1}]}
    ),
    "a file name that is a number": lambda m: json.dumps(m | {"shards": [m["shards"][0] | {"file": 5}]}),
    "a length that is a word": lambda m: json.dumps(m | {"shards": [m["shards"][0] | {"tokens": "x"}]}),
    "incomplete": lambda m: json.dumps(m | {"complete": False}),
    "complete is a word": lambda m: json.dumps(m | {"complete": "no"}),
    "of another format": lambda m: json.dumps(m | {"format": 2}),
    "pointing outside": lambda m: json.dumps(
        m | {"shards": [m["shards"][0] | {"file": "../toy_val_000000.npy"}]}
    ),
    "pointing elsewhere": lambda m: json.dumps(m | {"shards": [m["shards"][0] | {"file": "/etc/passwd"}]}),
}


@pytest.mark.parametrize("damage", BAD_MANIFESTS.values(), ids=BAD_MANIFESTS.keys())
@pytest.mark.fault(15)
def test_a_damaged_manifest_is_refused_by_name(tmp_path, damage):
    manifest = write(tmp_path, tokens(300))
    (tmp_path / "manifest.json").write_text(damage(manifest), encoding="utf-8")
    for check in (shards.verify, lambda folder: ShardReader(folder, "train", 4), hub_shards.open_folder):
        with pytest.raises(ValueError, match=r"manifest\.json"):
            check(tmp_path)


def test_verify_passes_what_was_written_and_needs_a_manifest(tmp_path):
    manifest = write(tmp_path, tokens(300))
    assert shards.verify(tmp_path) == manifest
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json"):
        shards.verify(tmp_path)


@pytest.mark.parametrize("position", [60, 127, 128, -1])
@pytest.mark.fault(15)
def test_verify_finds_one_flipped_bit(tmp_path, position):
    write(tmp_path, tokens(300))
    path = tmp_path / "toy_train_000001.npy"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"toy_train_000001\.npy"):
        shards.verify(tmp_path)


@pytest.mark.fault(15)
def test_verify_finds_swapped_shards(tmp_path):
    write(tmp_path, tokens(310))
    one, two = tmp_path / "toy_train_000000.npy", tmp_path / "toy_train_000001.npy"
    held = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(held)
    with pytest.raises(ValueError, match=r"toy_train_000000\.npy .*SHA-256"):
        shards.verify(tmp_path)


@pytest.mark.fault(16)
def test_verify_finds_a_token_outside_the_vocabulary(tmp_path):
    write(tmp_path, tokens(300), np.array([50257], dtype=np.uint16))
    with pytest.raises(ValueError, match=r"toy_train_000002\.npy holds token 50257"):
        shards.verify(tmp_path)


# -----------------------------------------------------------------------------
# the writer among other people's files


def test_a_folder_with_shards_of_unknown_origin_is_refused_and_left_as_it_is(tmp_path):
    others = {"mine.tmp": b"precious", "edufineweb_train_000001.npy": b"precious", "a_val_1.bin": b"precious"}
    for name, data in others.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(
        ValueError, match=r"holds shards without a manifest\.json.*--name or --out-dir"
    ) as error:
        write(tmp_path, tokens(300))
    assert str(tmp_path) in str(error.value)
    assert files_of(tmp_path) == others


def test_neither_the_writer_nor_clear_deletes_what_they_did_not_write(tmp_path):
    others = {
        "mine.tmp": b"precious",
        "other_val_000000.bin": b"precious",
        "not_toy_train_000000.npy": b"precious",
        "toy_train_000000.npy.txt": b"precious",
        "toy.npy": b"precious",
        "folder.tmp/file": b"precious",
    }
    shard_writer.begin(tmp_path, ABOUT)
    (tmp_path / "folder.tmp").mkdir()
    for name, data in others.items():
        (tmp_path / name).write_bytes(data)
    manifest = write(tmp_path, tokens(300))
    ours = {"manifest.json", *(shard["file"] for shard in manifest["shards"])}
    assert set(files_of(tmp_path)) == ours | set(others)
    shard_writer.clear(tmp_path)
    assert files_of(tmp_path) == others


def test_a_folder_with_both_kinds_of_shards_is_refused(tmp_path):
    write_plain(tmp_path, [100])
    write_bin(tmp_path / "toy_val_000000.bin", tokens(50))
    for open_them in (shards.Folder, shards.list_shards, lambda folder: ShardReader(folder, "train", 4)):
        with pytest.raises(ValueError, match=r"holds both \.npy and \.bin shards"):
            open_them(tmp_path)
