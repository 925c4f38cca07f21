"""lib/shard_writer.py: what is on disk, after interruptions too, and how parts are joined."""

import functools
import hashlib
import itertools
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from corpora import Killed, count_up, flip_a_bit, read_files, read_stream, to_npy
from helpers import ABOUT
from helpers import write_shards as write
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lib import files, shard_writer, shards
from lib.shard_writer import PartWriter
from lib.shards import ShardReader


def document(length: int, value: int = 7) -> np.ndarray:
    return np.array([50256] + [value] * length, dtype=np.uint16)


# -----------------------------------------------------------------------------
# a part


def test_plain_numpy_reads_every_shard_and_the_stream_is_whole(tmp_path):
    stream = count_up(1234)
    manifest = write(tmp_path, stream[:5], stream[5:700], stream[700:], val_tokens=150)
    for shard in manifest["shards"]:
        ids = np.load(tmp_path / shard["file"])
        assert ids.dtype == np.uint16
        assert ids.ndim == 1
    assert read_stream(tmp_path, "val").tolist() == stream[:150].tolist()
    assert read_stream(tmp_path, "train").tolist() == stream[150:].tolist()


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
    manifest = write(tmp_path, count_up(450), val_tokens=150)
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
            writer.write(count_up(150))
        assert len(list(tmp_path.rglob("train_*.npy"))) >= 2
        writer.close()
    assert writer.state["complete"]
    assert shard_writer.find_missing_parts(tmp_path, manifest) == []
    assert_incomplete()
    shard_writer.merge(tmp_path)
    assert shards.is_complete(tmp_path)
    assert ShardReader(tmp_path, "train", 4).num_tokens == 440


def test_nothing_but_shards_and_manifest_is_left_behind(tmp_path):
    manifest = write(tmp_path / "new" / "folder", count_up(333))
    left = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert left == {"manifest.json", *(shard["file"] for shard in manifest["shards"])}


@pytest.mark.parametrize("val_tokens", [1, 99, 100, 101, 250, 999])
@pytest.mark.parametrize("piece", [1, 37, 1000])
def test_validation_gets_exactly_its_tokens_however_they_arrive(tmp_path, val_tokens, piece):
    stream = count_up(1000)
    pieces = [stream[i : i + piece] for i in range(0, len(stream), piece)]
    write(tmp_path, *pieces, val_tokens=val_tokens)
    assert read_stream(tmp_path, "val").tolist() == stream[:val_tokens].tolist()
    assert read_stream(tmp_path, "train").tolist() == stream[val_tokens:].tolist()


@pytest.mark.parametrize(
    ("size", "shard_tokens", "default", "val_tokens", "expected"),
    [
        (1000, 100_000_000, 10_485_760, None, 100),
        (600, 100, 50, None, 50),
        (1700, 100, 50, None, 50),
        (150, 100, 50, 0, 0),
    ],
)
def test_by_default_validation_gets_a_fixed_number_of_tokens_or_a_tenth_of_a_small_corpus(
    tmp_path, monkeypatch, size, shard_tokens, default, val_tokens, expected
):
    assert shard_writer.DEFAULT_VAL_TOKENS == 10_485_760
    monkeypatch.setattr(shard_writer, "DEFAULT_VAL_TOKENS", default)
    pieces = [count_up(50)] * (size // 50)
    manifest = write(tmp_path, *pieces, shard_tokens=shard_tokens, val_tokens=val_tokens)
    assert len(read_stream(tmp_path, "val")) == expected
    assert len(read_stream(tmp_path, "train")) == size - expected
    assert [s["split"] for s in manifest["shards"]].count("val") == bool(expected)
    assert not expected or ShardReader(tmp_path, "val", 32).num_windows == (expected - 1) // 32


@pytest.mark.parametrize("before", [0, 60])
@pytest.mark.parametrize("length", [100, 250, 1000])
@pytest.mark.fault(19)
def test_a_document_longer_than_a_shard_goes_on_in_the_next(tmp_path, before, length):
    stream = np.concatenate([document(before), document(length), document(3)])
    manifest = write(tmp_path, document(before), document(length), document(3))
    assert read_stream(tmp_path, "val").tolist() + read_stream(tmp_path, "train").tolist() == stream.tolist()
    assert {shard["tokens"] for shard in manifest["shards"][1:-1]} <= {100}
    assert sum(shard["documents"] for shard in manifest["shards"]) == 3


@pytest.mark.parametrize(("size", "val_tokens"), [(0, None), (0, 10), (10, 10), (10, 2000)])
def test_a_corpus_that_leaves_nothing_for_training_is_refused_with_its_size(tmp_path, size, val_tokens):
    with pytest.raises(ValueError, match=rf"{size} tokens.* none is left for training|no text for training"):
        write(tmp_path, count_up(size), val_tokens=val_tokens)
    assert not list(tmp_path.rglob("*.npy"))


def test_shards_of_a_cleared_run_do_not_mix_with_the_next_run(tmp_path):
    shard_writer.begin(tmp_path, ABOUT)
    with PartWriter(tmp_path, 0, 10, 10) as writer:
        writer.write(count_up(200))
    (tmp_path / "toy_train_000009.npy").write_bytes(b"moved here by a merge that was interrupted")
    shard_writer.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []
    manifest = write(tmp_path, count_up(50), shard_tokens=20)
    assert {path.name for path in tmp_path.glob("*.npy")} == {shard["file"] for shard in manifest["shards"]}
    assert shards.verify(tmp_path) == manifest


@pytest.mark.parametrize("count", [1, 63, 64, 100, 9_999, 8192 + 7])
def test_a_shard_has_the_bytes_that_numpy_saves_and_a_hash_of_its_head(tmp_path, count):
    ids = np.random.default_rng(count).integers(0, 50257, count).astype(np.uint16)
    manifest = write(tmp_path, *np.array_split(ids, 7), shard_tokens=20_000, val_tokens=0)
    assert (tmp_path / "toy_train_000000.npy").read_bytes() == to_npy(ids)
    assert manifest["shards"][0]["head_sha256"] == hashlib.sha256(ids[:8192].tobytes()).hexdigest()


# -----------------------------------------------------------------------------
# interrupted

LENGTHS = [0, 0, 250, 3, 98, 99, 0, 450, 1, 30, 0, 199, 100, 41, 0]
DOCUMENTS = [document(length, value) for value, length in enumerate(LENGTHS)]


def write_documents(
    folder: Path, documents: list[np.ndarray], shard_tokens: int, val_tokens: int | None, close: bool = True
):
    """Writes part 0, or what is missing of it, as fineweb.py does."""
    with PartWriter(folder, 0, shard_tokens, val_tokens) as writer:
        skip = writer.tokens_done
        for ids in documents[writer.documents_done :]:
            writer.write(ids[skip:])
            skip -= min(skip, len(ids))
        if close:
            writer.close()


def keep(folder: Path, copy: Path, count: int) -> Path:
    """Copies the complete part as it was when only its first `count` shards were written."""
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
    expected = read_files(tmp_path / "whole")
    count = len(expected) - 1
    assert count >= 4
    for done in range(count + 1):
        part = keep(tmp_path / "whole", tmp_path / str(done), done)
        (part / ".train_000001.npy.tmp").write_bytes(b"half a shard")
        (part / "train_000099.npy").write_bytes(b"renamed, but not yet listed")
        write_documents(tmp_path / str(done), DOCUMENTS, shard_tokens, val_tokens)
        assert read_files(tmp_path / str(done)) == expected, f"after {done} shards"


@pytest.mark.slow
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
    write_documents(whole, documents, shard_tokens, val_tokens)
    for stop in sorted(stops):
        some = documents[: round(stop * len(documents))]
        write_documents(halting, some, shard_tokens, val_tokens, close=False)
    write_documents(halting, documents, shard_tokens, val_tokens)
    assert read_files(halting) == read_files(whole)


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
    expected = read_files(tmp_path / "whole")
    part = keep(tmp_path / "whole", tmp_path / "damaged", len(expected) - 1)
    if is_complete:
        shutil.copy(shard_writer.locate_part(tmp_path / "whole", 0) / "part.json", part)
    state = shard_writer.read_part(tmp_path / "damaged", 0)
    assert state is not None
    assert state["complete"] is is_complete
    damage(part / state["shards"][number]["file"])
    write_documents(tmp_path / "damaged", DOCUMENTS, 100, 130)
    assert read_files(tmp_path / "damaged") == expected


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
    assert set(read_files(tmp_path / "one")) == {
        f"parts/000000/{name}" for name in ("part.json", "train_000000.npy", "train_000001.npy")
    }
    for name in ("one", "two"):
        write_documents(tmp_path / name, DOCUMENTS, 100, 0)
    assert read_files(tmp_path / "one") == read_files(tmp_path / "two")


# -----------------------------------------------------------------------------
# parts joined


def write_parts(folder: Path, parts: list[tuple[str, int]]) -> dict:
    """Writes parts of so many tokens, which count up. The first part has 3 validation tokens."""
    manifest = shard_writer.begin(folder, {**ABOUT, "parts": len(parts)})
    first = 0
    for number, (split, size) in enumerate(parts):
        val_tokens = 3 if (number, split) == (0, "train") and size else 0
        with PartWriter(folder, number, 20, val_tokens, split, shard_writer.hash_plan(manifest)) as writer:
            writer.write(count_up(size, first))
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
    assert set(read_files(tmp_path)) == {*names, "manifest.json"}
    wanted: dict[str, list[int]] = {"val": [], "train": [], "test": []}
    first = 0
    for number, (split, size) in enumerate(parts):
        ids = list(range(first, first + size))
        val = 3 if (number, split) == (0, "train") else 0
        wanted["val"] += ids[:val]
        wanted[split] += ids[val:]
        first += size
    assert {split: read_stream(tmp_path, split).tolist() for split in wanted} == wanted
    assert shard_writer.merge(tmp_path) == manifest


def call_at(number: int, function, do):
    """Wraps the function: its call of that number, counted from 0, calls `do` first."""
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
    expected = read_files(tmp_path / "whole")
    for number in itertools.count():
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "parts", folder)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", call_at(number, os.replace, kill))
                shard_writer.merge(folder)
        except Killed:
            assert not shards.is_complete(folder)
            assert shard_writer.merge(folder) == manifest
        else:
            break
        assert read_files(folder) == expected
    assert number == len(manifest["shards"]) + 1  # one rename per shard, and the manifest's


def test_joining_that_was_killed_before_the_parts_are_removed_removes_them_the_next_time(
    tmp_path, monkeypatch
):
    write_parts(tmp_path, PARTS[1])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: kill())
        shard_writer.merge(tmp_path)
    manifest = shard_writer.merge(tmp_path)
    assert set(read_files(tmp_path)) == {"manifest.json", *(shard["file"] for shard in manifest["shards"])}


@pytest.mark.parametrize(
    ("module", "name"),
    [(os, "replace"), (os, "open"), (shard_writer, "read_part"), (shard_writer, "find_missing_parts")],
)
def test_another_process_may_join_the_parts_at_the_same_time(tmp_path, monkeypatch, module, name):
    write_parts(tmp_path / "parts", PARTS[1])
    shutil.copytree(tmp_path / "parts", tmp_path / "whole")
    manifest = shard_writer.merge(tmp_path / "whole")
    expected = read_files(tmp_path / "whole")
    for number in itertools.count():
        folder, others = tmp_path / str(number), []
        shutil.copytree(tmp_path / "parts", folder)
        join = functools.partial(shard_writer.merge, folder)
        with monkeypatch.context() as patch:
            wrapped = call_at(number, getattr(module, name), lambda: others.append(join()))  # noqa: B023
            patch.setattr(module, name, wrapped)
            assert join() == manifest, f"the other came at call {number}"
        assert read_files(folder) == expected
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
    before = read_files(tmp_path)
    assert shard_writer.find_missing_parts(tmp_path, manifest) == [0, 7]
    with pytest.raises(ValueError, match=r"of 15 parts, these are missing or incomplete: 0, 7$"):
        shard_writer.merge(tmp_path)
    for number in range(1, 12):
        shutil.rmtree(shard_writer.locate_part(tmp_path, number))
        before = {path: data for path, data in before.items() if f"parts/{number:06d}/" not in path}
    with pytest.raises(ValueError, match=r"incomplete: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.$"):
        shard_writer.merge(tmp_path)
    assert read_files(tmp_path) == before


def test_several_parts_that_leave_nothing_for_training_are_refused(tmp_path):
    write_parts(tmp_path, [("train", 0), ("train", 0), ("val", 50)])
    with pytest.raises(ValueError, match="tests has no text for training"):
        shard_writer.merge(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_of_several_that_begin_one_writes_the_manifest(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda n: shard_writer.begin(tmp_path / "a", {**ABOUT, "source": str(n)}), range(40))
        )
    assert all(manifest == found[0] for manifest in found)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["manifest.json"]
    assert shards.load_manifest(tmp_path / "a" / "manifest.json") == found[0]
    assert found[0]["complete"] is False


# -----------------------------------------------------------------------------
# among other people's files


def test_a_folder_with_shards_of_unknown_origin_is_refused_and_left_as_it_is(tmp_path):
    others = {"mine.tmp": b"precious", "edufineweb_train_000001.npy": b"precious", "a_val_1.bin": b"precious"}
    for name, data in others.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(
        ValueError, match=r"holds shards without a manifest\.json.*--name or --out-dir"
    ) as error:
        write(tmp_path, count_up(300))
    assert str(tmp_path) in str(error.value)
    assert read_files(tmp_path) == others


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
    manifest = write(tmp_path, count_up(300))
    ours = {"manifest.json", *(shard["file"] for shard in manifest["shards"])}
    assert set(read_files(tmp_path)) == ours | set(others)
    shard_writer.clear(tmp_path)
    assert read_files(tmp_path) == others
