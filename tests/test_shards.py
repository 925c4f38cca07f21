"""shards.py: what the writer puts on disk, and batches that every window enters once an epoch."""

import hashlib
import io
import json
import math
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shards
from shards import ShardReader, ShardWriter

ABOUT = {"tokenizer": {"name": "gpt2"}, "source": "tests"}


def tokens(count: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.uint16)


def document(length: int, value: int = 7) -> np.ndarray:
    return np.array([50256] + [value] * length, dtype=np.uint16)


def write(folder: Path, *parts: np.ndarray, shard_tokens: int = 100, val_tokens: int | None = 10) -> dict:
    writer = ShardWriter(folder, "toy", shard_tokens, val_tokens, ABOUT)
    for part in parts:
        writer.write(part)
    return writer.close()


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
    return [reader.window(epoch * reader.num_windows + n) for n in range(reader.num_windows)]


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


def test_complete_is_said_only_after_close(tmp_path):
    writer = ShardWriter(tmp_path, "toy", 100, 10, ABOUT)
    for _ in range(3):
        assert json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))["complete"] is False
        with pytest.raises(ValueError, match=r"manifest\.json is incomplete"):
            ShardReader(tmp_path, "train", 4)
        writer.write(tokens(150))
    assert (tmp_path / "toy_train_000001.npy").exists()
    writer.close()
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
        shards.write_atomically(path, fail)
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
    monkeypatch.setattr(shards, "DEFAULT_VAL_TOKENS", 50)
    for name, size in (("one", 600), ("two", 1700)):
        manifest = write(tmp_path / name, *[tokens(100)] * (size // 100), val_tokens=None)
        assert len(stream_of(tmp_path / name, manifest, "val")) == 50
        assert len(stream_of(tmp_path / name, manifest, "train")) == size - 50


def test_no_validation_tokens_means_no_validation_shard(tmp_path):
    manifest = write(tmp_path, tokens(150), val_tokens=0)
    assert [shard["split"] for shard in manifest["shards"]] == ["train", "train"]


@pytest.mark.parametrize("before", [0, 60])
@pytest.mark.parametrize("length", [100, 250, 1000])
def test_a_document_longer_than_a_shard_goes_on_in_the_next(tmp_path, before, length):
    stream = np.concatenate([document(before), document(length), document(3)])
    manifest = write(tmp_path, document(before), document(length), document(3))
    assert stream_of(tmp_path, manifest, "val") + stream_of(tmp_path, manifest, "train") == stream.tolist()
    assert {shard["tokens"] for shard in manifest["shards"][1:-1]} <= {100}
    assert sum(shard["documents"] for shard in manifest["shards"]) == 3


@pytest.mark.parametrize(("size", "val_tokens"), [(0, None), (0, 10), (10, 10), (10, 2000)])
def test_a_corpus_that_leaves_nothing_for_training_is_refused_with_its_size(tmp_path, size, val_tokens):
    with pytest.raises(ValueError, match=rf"has {size} tokens.* none is left for training"):
        write(tmp_path, tokens(size), val_tokens=val_tokens)
    with pytest.raises(ValueError, match="incomplete"):
        shards.read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("shard_tokens", "val_tokens", "message"),
    [(0, 10, "--shard-tokens is 0"), (100, -1, "--val-tokens is -1")],
)
def test_impossible_sizes_are_refused(tmp_path, shard_tokens, val_tokens, message):
    with pytest.raises(ValueError, match=message):
        ShardWriter(tmp_path, "toy", shard_tokens, val_tokens, ABOUT)


def test_shards_of_an_interrupted_run_do_not_mix_with_the_next_run(tmp_path):
    writer = ShardWriter(tmp_path, "toy", 10, 10, ABOUT)
    writer.write(tokens(200))
    manifest = write(tmp_path, tokens(50), shard_tokens=20)
    assert {path.name for path in tmp_path.glob("*.npy")} == {shard["file"] for shard in manifest["shards"]}
    assert shards.verify(tmp_path) == manifest


# -----------------------------------------------------------------------------
# the reader: order


SIZES = [[1000], [100, 100, 100], [3, 1, 500, 2, 2, 2, 90], [17] * 20, [11, 1]]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("seq_len", [1, 10, 11])
def test_every_window_comes_once_an_epoch(tmp_path, sizes, seq_len):
    reader = ShardReader(write_plain(tmp_path, sizes), "train", seq_len, seed=3)
    assert reader.num_windows == (sum(sizes) - 1) // seq_len
    for epoch in (0, 1, 7):
        assert sorted(epoch_of(reader, epoch)) == list(range(reader.num_windows))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 30), st.integers(0, 2**32))
def test_every_window_is_the_stream_at_its_place_across_shard_edges(tmp_path_factory, sizes, seq_len, seed):
    folder = write_plain(tmp_path_factory.mktemp("shards"), sizes)
    if sum(sizes) <= seq_len:
        with pytest.raises(ValueError, match=f"needs {seq_len + 1}"):
            ShardReader(folder, "train", seq_len, seed)
        return
    reader = ShardReader(folder, "train", seq_len, seed)
    windows = epoch_of(reader)
    assert sorted(windows) == list(range((sum(sizes) - 1) // seq_len))
    x, y = reader.read(windows)
    for window, inputs, targets in zip(windows, x.tolist(), y.tolist()):
        begin = window * seq_len
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
        shard_order = [visit[0] // 10 for visit in visits]
        assert [{window // 10 for window in visit} for visit in visits] == [{shard} for shard in shard_order]
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
def test_a_step_takes_the_same_sequences_for_any_number_of_processes_and_any_batch_size(tmp_path, step):
    reader = ShardReader(write_plain(tmp_path, [333, 50, 333]), "train", 7, seed=5)
    first = step * 24
    expected = Counter(tuple(reader.read([reader.window(first + n)])[0][0].tolist()) for n in range(24))
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
    assert sorted(firsts[:7]) == sorted(firsts[7:]) == [0, 10, 20, 30, 40, 50, 60]


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


# -----------------------------------------------------------------------------
# the reader: what it accepts


def test_shards_are_memory_mapped(tmp_path):
    write_plain(tmp_path, [50])
    write_bin(tmp_path / "toy_val_000000.bin", tokens(50))
    for split in ("train", "val"):
        assert [type(shard) for shard in ShardReader(tmp_path, split, 4).shards] == [np.memmap]


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
    assert [shard[0] for shard in train.shards] == [100, 200, 1000]


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
    a, b, c = (shards.fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c
    plain = [
        shards.fingerprint(write_plain(tmp_path / f"plain{i}", [size])) for i, size in enumerate((50, 50, 51))
    ]
    assert plain[0] == plain[1] != plain[2]


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
def test_what_is_no_llm_c_shard_is_refused_by_name(tmp_path, change):
    write_bin(tmp_path / "toy_train_000000.bin", **{"ids": tokens(100), **change})
    with pytest.raises(ValueError, match=r"toy_train_000000\.bin"):
        ShardReader(tmp_path, "train", 4)


@pytest.mark.parametrize("size", [0, 100, 1023, 1025, 1223])
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


def test_a_token_outside_the_vocabulary_is_refused_with_file_and_offset(tmp_path):
    write_plain(tmp_path, [50, 50])
    ids = tokens(50, 50)
    ids[23] = 50257
    np.save(tmp_path / "toy_train_000001.npy", ids)
    reader = ShardReader(tmp_path, "train", 10)
    reader.read([0, 1, 2, 3, 4, 5, 6])
    with pytest.raises(ValueError, match=r"toy_train_000001\.npy: token 50257 at offset 23 .*0 to 50256"):
        reader.read([0, 7])
    with pytest.raises(ValueError, match="token 40 at offset 40"):
        ShardReader(tmp_path, "train", 10, vocab_size=40).read([4])


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
def test_a_damaged_manifest_is_refused_by_name(tmp_path, damage):
    manifest = write(tmp_path, tokens(300))
    (tmp_path / "manifest.json").write_text(damage(manifest), encoding="utf-8")
    for check in (shards.verify, lambda folder: ShardReader(folder, "train", 4), shards.fingerprint):
        with pytest.raises(ValueError, match=r"manifest\.json"):
            check(tmp_path)


def test_verify_passes_what_was_written_and_needs_a_manifest(tmp_path):
    manifest = write(tmp_path, tokens(300))
    assert shards.verify(tmp_path) == manifest
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json"):
        shards.verify(tmp_path)


@pytest.mark.parametrize("position", [60, 127, 128, -1])
def test_verify_finds_one_flipped_bit(tmp_path, position):
    write(tmp_path, tokens(300))
    path = tmp_path / "toy_train_000001.npy"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"toy_train_000001\.npy"):
        shards.verify(tmp_path)


def test_verify_finds_swapped_shards(tmp_path):
    write(tmp_path, tokens(310))
    one, two = tmp_path / "toy_train_000000.npy", tmp_path / "toy_train_000001.npy"
    held = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(held)
    with pytest.raises(ValueError, match=r"toy_train_000000\.npy .*SHA-256"):
        shards.verify(tmp_path)


def test_verify_finds_a_token_outside_the_vocabulary(tmp_path):
    write(tmp_path, tokens(300), np.array([50257], dtype=np.uint16))
    with pytest.raises(ValueError, match=r"toy_train_000002\.npy holds token 50257"):
        shards.verify(tmp_path)


# -----------------------------------------------------------------------------
# the writer among other people's files


def test_the_writer_does_not_delete_what_it_did_not_write(tmp_path):
    others = ["mine.tmp", "edufineweb_train_000001.npy", "other_val_000000.bin"]
    for name in others:
        (tmp_path / name).write_bytes(b"precious")
    (tmp_path / "folder.tmp").mkdir()
    try:
        write(tmp_path, tokens(300))
    except ValueError as error:  # to refuse is as good
        assert str(tmp_path) in str(error)
    assert [(tmp_path / name).read_bytes() for name in others] == [b"precious"] * 3
    assert (tmp_path / "folder.tmp").is_dir()
