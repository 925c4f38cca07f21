"""lib/shards.py: batches that visit every window once per epoch, and what no reader accepts."""

import io
import json
import math
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import count_up, flip_a_bit, to_bin, to_npy, wait_until
from helpers import write_shards as write
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import shards
from lib.shards import ShardReader


def write_plain(folder: Path, sizes: list[int], split: str = "train", first: int = 0) -> Path:
    """Writes shards without a manifest, whose tokens count up from `first`."""
    folder.mkdir(exist_ok=True)
    for number, size in enumerate(sizes):
        np.save(folder / f"toy_{split}_{number:06d}.npy", count_up(size, first))
        first += size
    return folder


def list_positions(reader: ShardReader, epoch: int = 0) -> list[int]:
    return [reader.find_position(epoch * reader.num_windows + n) for n in range(reader.num_windows)]


# -----------------------------------------------------------------------------
# order

SIZES = [[1000], [100, 100, 100], [3, 1, 500, 2, 2, 2, 90], [17] * 20, [11, 1]]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("seq_len", [1, 10, 11])
def test_every_window_comes_once_an_epoch(tmp_path, sizes, seq_len):
    reader = ShardReader(write_plain(tmp_path, sizes), "train", seq_len, seed=3)
    assert reader.num_windows == (sum(sizes) - 1) // seq_len
    assert sorted(list_positions(reader)) == [n * seq_len for n in range(reader.num_windows)]
    last = sum(sizes) - 1 - seq_len
    shifts = set()
    for epoch in range(1, 30):
        positions = sorted(list_positions(reader, epoch))
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
    positions = list_positions(reader) + list_positions(reader, 3)
    assert len(positions) == 2 * ((sum(sizes) - 1) // seq_len)
    x, y = reader.read(positions)
    for begin, inputs, targets in zip(positions, x.tolist(), y.tolist()):
        assert inputs == list(range(begin, begin + seq_len))
        assert targets == list(range(begin + 1, begin + seq_len + 1))


def test_epochs_and_seeds_differ_in_order_and_equal_seeds_do_not(tmp_path):
    folder = write_plain(tmp_path, [300, 300, 300])
    orders = [
        tuple(list_positions(ShardReader(folder, "train", 10, seed), epoch))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4
    assert tuple(list_positions(ShardReader(folder, "train", 10, 0))) == orders[0]
    assert list(orders[0]) != sorted(orders[0])


def test_shards_are_shuffled_by_seed_and_epoch_and_windows_inside_each_shard(tmp_path):
    folder = write_plain(tmp_path, [*[100] * 7, 101])  # ten windows per shard
    shard_orders = set()
    for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        order = list_positions(ShardReader(folder, "train", 10, seed), epoch)
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
    ids = count_up(100)
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
    wait_until(lambda: not any(thread.is_alive() for thread in threads))


def test_few_shards_are_open_at_a_time(tmp_path):
    reader = ShardReader(write_plain(tmp_path, [20] * 50), "train", 9)
    for step in range(reader.num_windows):
        reader.batch(step, 0, 1, 1)
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert mapped.read_text(encoding="utf-8").count(str(tmp_path)) <= 4


# -----------------------------------------------------------------------------
# what is accepted


def test_shards_are_memory_mapped(tmp_path):
    write_plain(tmp_path / "npy", [50])
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "toy_train_000000.bin").write_bytes(to_bin(count_up(50)))
    for kind in ("npy", "bin"):
        assert type(ShardReader(tmp_path / kind, "train", 4)._open(0)) is np.memmap


def test_a_split_is_read_without_the_other(tmp_path):
    write_plain(tmp_path, [50], "val", first=1000)
    write_plain(tmp_path, [70], "train", first=2000)
    assert ShardReader(tmp_path, "val", 49).batch(0, 0, 1, 1)[0].tolist() == [list(range(1000, 1049))]
    assert ShardReader(tmp_path, "train", 69).batch(0, 0, 1, 1)[0].tolist() == [list(range(2000, 2069))]


def test_a_build_nanogpt_folder_is_read(tmp_path):
    np.save(tmp_path / "edufineweb_val_000000.npy", count_up(40, 5000))
    for number in (1, 2, 10):
        np.save(tmp_path / f"edufineweb_train_{number:06d}.npy", count_up(20, 100 * number))
    (tmp_path / "notes.txt").write_text("not a shard", encoding="utf-8")
    assert ShardReader(tmp_path, "val", 39).read([0])[0].tolist() == [list(range(5000, 5039))]
    train = ShardReader(tmp_path, "train", 19)
    assert train.num_tokens == 60
    assert [train._open(i)[0] for i in range(3)] == [100, 200, 1000]


def test_llm_c_shards_are_read_in_the_order_of_their_numbers(tmp_path):
    for number, first in ((2, 100), (10, 200)):
        (tmp_path / f"fineweb_train_{number}.bin").write_bytes(to_bin(count_up(30, first)))
    (tmp_path / "fineweb_val_000000.bin").write_bytes(to_bin(count_up(21, 50200)))
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
        write(tmp_path / name, count_up(300, first))
    a, b, c = (shards.Folder(tmp_path / name).fingerprint() for name in "abc")
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
    for count, (x, _) in enumerate(reader.batches(range(0, reader.num_windows // 512, 4), 1, 512, 512)):
        assert x.shape == (512, 1024)
        if count % 125 == 0:
            pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
    megabytes = [4096 * count / 1e6 for count in pages]
    assert len(megabytes) == 39
    assert max(megabytes) - megabytes[0] < 4.5 * 200  # four shards are open at a time


# -----------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize(
    ("size", "split", "seq_len"), [(10, "train", 10), (1, "train", 1), (1000, "train", 1024)]
)
def test_a_split_shorter_than_a_window_is_refused_with_both_numbers(tmp_path, size, split, seq_len):
    write_plain(tmp_path, [size])
    with pytest.raises(ValueError, match=rf"{size:,} tokens for {split}.* needs {seq_len + 1:,}"):
        ShardReader(tmp_path, split, seq_len)


def test_a_split_that_is_not_there_is_named_with_those_that_are(tmp_path):
    write_plain(tmp_path, [100])
    with pytest.raises(ValueError, match="has no val shard; the splits in it: train"):
        ShardReader(tmp_path, "val", 4)


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: folder.mkdir()])
def test_a_folder_without_shards_names_the_commands_that_make_them(tmp_path, make):
    make(tmp_path / "data")
    with pytest.raises(
        FileNotFoundError, match=r"data holds no shards; make.*python fineweb\.py.*train_gpt2\.py demo"
    ):
        ShardReader(tmp_path / "data", "train", 4)


def test_a_wrong_name_is_answered_with_the_data_set_beside_it(tmp_path):
    write(tmp_path / "mine", np.arange(200, dtype=np.uint16))
    with pytest.raises(FileNotFoundError, match=r"mien holds no shards; did you mean .*/mine\?; make them"):
        ShardReader(tmp_path / "mien", "train", 4)


def test_a_location_on_the_hub_is_no_folder():
    for location in ("hf://datasets/org/name", Path("hf://datasets/org/name")):
        with pytest.raises(ValueError, match=r"org/name is on the Hugging Face Hub.*HubFolder"):
            ShardReader(location, "train", 4)


def test_a_folder_with_both_kinds_of_shards_is_refused(tmp_path):
    write_plain(tmp_path, [100])
    (tmp_path / "toy_val_000000.bin").write_bytes(to_bin(count_up(50)))
    for open_them in (shards.Folder, shards.list_shards, lambda folder: ShardReader(folder, "train", 4)):
        with pytest.raises(ValueError, match=r"holds both \.npy and \.bin shards"):
            open_them(tmp_path)


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=count_up(100))
    return buffer.getvalue()


def npy_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


NPY, BIN = to_npy(count_up(100)), to_bin(count_up(100))
HUGE = "{'descr': '<u2', 'fortran_order': False, 'shape': (10000000000000000000000,), }\n"
BAD_NPY = {
    "truncated": NPY[:-1],
    "cut in its header": NPY[:50],
    "empty": b"",
    "without tokens": to_npy(count_up(0)),
    "int64": to_npy(np.arange(100)),
    "big-endian": to_npy(count_up(100).astype(">u2")),
    "two-dimensional": to_npy(count_up(100).reshape(10, 10)),
    "a scalar": to_npy(np.uint16(5)),
    "with a wrong magic": b"X" + NPY[1:],
    "text": b"hello " * 100,
    "an npz archive": npz(),
    "a cut archive": npz()[:40],
    "of impossible length": npy_header(HUGE),
    "with an unclosed header": npy_header("{'descr': ((((\n"),
}
BAD_BIN = {
    "of wrong magic": to_bin(count_up(100), magic=20240521),
    "of wrong version": to_bin(count_up(100), version=2),
    "with fewer tokens than promised": to_bin(count_up(100), count=101),
    "with more tokens than promised": to_bin(count_up(100), count=99),
    "of negative count": to_bin(count_up(100), count=-1),
    "without tokens": to_bin(count_up(0)),
    **{f"cut to {size} bytes": BIN[:size] for size in (0, 100, 1023, 1025, 1223)},
}
BAD_SHARDS = [("npy", *bad) for bad in BAD_NPY.items()] + [("bin", *bad) for bad in BAD_BIN.items()]


@pytest.mark.parametrize(
    ("suffix", "data"), [pytest.param(suffix, data, id=f"{suffix} {how}") for suffix, how, data in BAD_SHARDS]
)
@pytest.mark.fault(15)
def test_what_is_no_shard_is_refused_by_name(tmp_path, suffix, data):
    good = {"npy": NPY, "bin": BIN}
    for number, content in enumerate((good[suffix], data)):
        (tmp_path / f"toy_train_{number:06d}.{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"toy_train_000001\.{suffix}"):
        ShardReader(tmp_path, "train", 4)


@pytest.mark.parametrize("how", ["missing", "renamed", "shorter"])
@pytest.mark.fault(15)
def test_a_shard_that_is_not_as_the_manifest_says_is_refused_by_name(tmp_path, how):
    write(tmp_path, count_up(450))
    path = tmp_path / "toy_train_000001.npy"
    if how == "missing":
        path.unlink()
    elif how == "renamed":
        path.rename(tmp_path / "toy_train_000009.npy")
    else:
        np.save(path, count_up(99))
    for check in (shards.verify, lambda folder: ShardReader(folder, "train", 4)):
        with pytest.raises((ValueError, FileNotFoundError), match=r"toy_train_000001\.npy"):
            check(tmp_path)


@pytest.mark.fault(16)
def test_a_token_outside_the_vocabulary_is_refused_with_file_and_offset(tmp_path):
    write_plain(tmp_path, [50, 50])
    ids = count_up(50, 50)
    ids[23] = 50257
    np.save(tmp_path / "toy_train_000001.npy", ids)
    reader = ShardReader(tmp_path, "train", 10)
    reader.read([0, 10, 20, 30, 40, 50, 60])
    with pytest.raises(ValueError, match=r"toy_train_000001\.npy: token 50257 at offset 23 .*0 to 50256"):
        reader.read([0, 70])


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
    "two columns": lambda m: json.dumps(m | {"shards": [m["shards"][0]] * 2}),
    "of another split": lambda m: json.dumps(m | {"shards": [m["shards"][0] | {"split": "test"}]}),
    "of negative length": lambda m: json.dumps(m | {"shards": [m["shards"][0] | {"tokens": -1}]}),
    "a source that is a number": lambda m: json.dumps(m | {"source": 5}),
    "of another tokenizer": lambda m: json.dumps(m | {"tokenizer": {"name": "llama"}}),
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
    manifest = write(tmp_path, count_up(300))
    (tmp_path / "manifest.json").write_text(damage(manifest), encoding="utf-8")
    for check in (shards.verify, lambda folder: ShardReader(folder, "train", 4), shards.Folder):
        with pytest.raises(ValueError, match=r"manifest\.json"):
            check(tmp_path)


def test_a_manifest_that_does_not_name_its_tokenizer_is_taken(tmp_path):
    manifest = write(tmp_path, count_up(300)) | {"tokenizer": None}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert ShardReader(tmp_path, "train", 4).num_tokens > 0


def test_a_manifests_fault_is_named_by_its_field(tmp_path):
    manifest = write(tmp_path, count_up(300))
    del manifest["shards"][1]["tokens"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"manifest\.json cannot be read: shards\[1\]: the field tokens is missing"
    ):
        shards.Folder(tmp_path)


# -----------------------------------------------------------------------------
# from a peer


def write_datatrove(
    folder: Path, name: str, ids: np.ndarray, metadata: str | None = None, dtype: str = "<u2"
):
    """A file as datatrove's DocumentTokenizer writes it."""
    ids.astype(dtype).tofile(folder / name)
    np.array([len(ids)], dtype="<u8").tofile(folder / f"{name}.index")
    if metadata != "":
        text = metadata or f"gpt2|2\n{len(ids)}\n0.3 kT"
        (folder / f"{name}.metadata").write_text(text, encoding="utf-8")


def test_nanogpts_files_are_read(tmp_path):
    count_up(300, 7).tofile(tmp_path / "train.bin")
    count_up(50, 400).tofile(tmp_path / "val.bin")
    reader = ShardReader(tmp_path, "train", 299)
    x, y = reader.batch(0, 0, 1, 1)
    assert x.tolist() == [[*range(7, 306)]] and y.tolist() == [[*range(8, 307)]]
    assert ShardReader(tmp_path, "val", 49).num_tokens == 50
    assert isinstance(shards.open_entry(tmp_path, reader.entries[0]), np.memmap)


@pytest.mark.parametrize(
    ("suffix", "content", "reason"),
    [
        (".index", b"", "has 0 bytes; it must have 8 for each document"),
        (".index", b"123", "has 3 bytes"),
        (".metadata", b"gpt2|2\nabc", "metadata, line 2 is 'abc'; it must be the number of tokens"),
        (".metadata", b"gpt2\xe9", "metadata, line 2 is ''"),
    ],
)
def test_a_file_beside_datatroves_tokens_that_makes_no_sense_is_named(tmp_path, suffix, content, reason):
    write_datatrove(tmp_path, "0.ds", count_up(300), metadata="")
    (tmp_path / f"0.ds{suffix}").write_bytes(content)
    with pytest.raises(ValueError) as refused:
        ShardReader(tmp_path, "train", 16)
    assert reason in str(refused.value)


def test_llmcs_small_files_are_read(tmp_path):
    (tmp_path / "tiny_train.bin").write_bytes(to_bin(count_up(300)))
    assert ShardReader(tmp_path, "train", 299).batch(0, 0, 1, 1)[1].tolist() == [[*range(1, 300)]]


@pytest.mark.parametrize("sizes", [[1000], [30, 500, 470], [100, 900], [999, 1]])
@pytest.mark.parametrize("metadata", ["", None])
def test_datatroves_files_are_read_and_the_first_tokens_are_for_validation(tmp_path, sizes, metadata):
    first = 0
    for number, size in enumerate(sizes):
        write_datatrove(tmp_path, f"{number:05d}_00000_shuffled.ds", count_up(size, first), metadata)
        first += size
    for split, begin, end in (("val", 0, 100), ("train", 100, 1000)):
        reader = ShardReader(tmp_path, split, end - begin - 1)
        assert reader.read([0])[0].tolist() == [[*range(begin, end - 1)]]
    assert shards.Folder(tmp_path).fingerprint() == shards.Folder(tmp_path).fingerprint()


@pytest.mark.parametrize(
    ("write_files", "message"),
    [
        (lambda p: (p / "train.bin").write_bytes(b"\1\0\2"), r"train\.bin has 3 bytes; .* 2 for each"),
        (lambda p: (p / "train.bin").write_bytes(b""), r"train\.bin has 0 bytes"),
        (lambda p: count_up(300, 50100).tofile(p / "train.bin"), r"train\.bin holds token 50399 at"),
        (lambda p: np.arange(300, dtype="<u4").tofile(p / "train.bin"), r"train\.bin has tokens of 4 bytes"),
        (
            lambda p: (count_up(300).tofile(p / "train.bin"), (p / "meta.pkl").write_bytes(b"")),
            r"meta\.pkl of nanoGPT: its tokens are characters",
        ),
        (lambda p: write_datatrove(p, "a.ds", count_up(99), "llama-3|2\n99"), r"the tokenizer 'llama-3'"),
        (lambda p: write_datatrove(p, "a.ds", count_up(99), "gpt2|4\n99", "<u4"), r"a\.ds has tokens of 4"),
        (lambda p: write_datatrove(p, "a.ds", count_up(99), "", "<u4"), r"a\.ds has tokens of 4 bytes"),
        (lambda p: write_datatrove(p, "a.ds", count_up(99), "gpt2|2\n100"), r"has 99 tokens; .* it has 100"),
        (
            lambda p: (write_datatrove(p, "a.ds", count_up(99)), (p / "a.ds.loss").write_bytes(b"\1" * 99)),
            r"a\.ds\.loss masks losses",
        ),
    ],
)  # fmt: skip
def test_peers_files_that_cannot_be_gpt2s_are_refused(tmp_path, write_files, message):
    write_files(tmp_path)
    with pytest.raises(ValueError, match=message):
        shards.Folder(tmp_path)


def test_a_file_in_place_of_its_folder_is_refused(tmp_path):
    count_up(300).tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match=r"train\.bin is a file; give the folder"):
        shards.Folder(tmp_path / "train.bin")


def test_verify_passes_what_was_written_and_needs_a_manifest(tmp_path):
    manifest = write(tmp_path, count_up(300))
    assert shards.verify(tmp_path) == manifest
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json"):
        shards.verify(tmp_path)


@pytest.mark.parametrize("position", [60, 127, 128, -1])
@pytest.mark.fault(15)
def test_verify_finds_one_flipped_bit(tmp_path, position):
    write(tmp_path, count_up(300))
    flip_a_bit(tmp_path / "toy_train_000001.npy", position)
    with pytest.raises(ValueError, match=r"toy_train_000001\.npy"):
        shards.verify(tmp_path)


@pytest.mark.fault(15)
def test_verify_finds_swapped_shards(tmp_path):
    write(tmp_path, count_up(310))
    one, two = tmp_path / "toy_train_000000.npy", tmp_path / "toy_train_000001.npy"
    held = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(held)
    with pytest.raises(ValueError, match=r"toy_train_000000\.npy .*SHA-256"):
        shards.verify(tmp_path)


@pytest.mark.fault(16)
def test_verify_finds_a_token_outside_the_vocabulary(tmp_path):
    write(tmp_path, count_up(300), np.array([50257], dtype=np.uint16))
    with pytest.raises(ValueError, match=r"toy_train_000002\.npy holds token 50257"):
        shards.verify(tmp_path)
