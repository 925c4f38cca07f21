"""Converts texts to files of many formats and to shards, and shards back to texts."""

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fineweb
from lib import shards, tokenizer
from lib.documents import Batch

DOCUMENTS = [
    "The first document.",
    "",
    "naïve 日本語 🙂\n\n  indented\n",
    "<|endoftext|> is text here",
    "x " * 500,
]
SECTIONS = " \n = = Part = = \n \n = = = Deeper = = = \n \n More words . \n"
ARTICLES = [f" \n = Article {n} = \n \n Text {n} . \n{SECTIONS}" for n in range(3)]


def to_jsonl(texts: Iterable, key: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)).encode()


def to_parquet(texts: Any, key: str = "text", row_group_size: int = 2) -> bytes:
    table, buffer = pa.table({"id": list(range(len(texts))), key: texts}), io.BytesIO()
    pq.write_table(table, buffer, row_group_size=row_group_size)
    return buffer.getvalue()


def to_wikitext(lines: Iterable[str]) -> bytes:
    """WikiText as the Hub has it: one row per line, and an empty row for a blank line."""
    return to_parquet(["" if line == " \n" else line for line in lines], row_group_size=1000)


def compress(data: bytes, name: str) -> bytes:
    """Compresses data as a file of that name should be."""
    if name.endswith(".gz"):
        return gzip.compress(data)
    if not name.endswith(".zst"):
        return data
    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, "zstd") as f:
        f.write(data)
    return buffer.getvalue().to_pybytes()


def join_batches(batches: Iterable[Batch]) -> list[str]:
    """Returns the documents; one that spans several batches becomes one string."""
    found: list[str] = []
    for batch in batches:
        texts = batch.texts if isinstance(batch.texts, list) else batch.texts.to_pylist()
        texts = [text or "" for text in texts]
        if batch.continues and found:
            found[-1] += texts.pop(0)
        found += texts
    return found


def read_documents(source: Path | str, text_field: str = "text", documents: Any = "auto") -> list[str]:
    cfg = fineweb.Config(source=str(source), text_field=text_field, documents=documents)
    inputs, _ = cfg.find_inputs()
    return join_batches(batch for file in inputs for batch in file.read(file.locate()))


def sort_by_hash(names: Iterable[str]) -> list[str]:
    """Sorts relative paths as fineweb.py reads them."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def prepare(source: Path, out_dir: Path, **options) -> Path:
    return fineweb.prepare(fineweb.Config(source=str(source), out_dir=str(out_dir), **options))


def read_files(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of every file below the folder by path; locks are left out."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def read_stream(folder: Path, *splits: str) -> np.ndarray:
    """Verifies a data set and returns these splits' tokens, by default all, validation first."""
    manifest = shards.verify(folder)
    order = [shard["split"] for shard in manifest["shards"]]
    assert order == sorted(order, key=["val", "train", "test"].index)
    wanted = [shard["file"] for shard in manifest["shards"] if shard["split"] in (splits or order)]
    return np.concatenate([np.empty(0, np.uint16), *(np.load(folder / file) for file in wanted)])


def decode_shards(folder: Path, *splits: str) -> list[str]:
    """Returns the documents in these splits, by default in all."""
    stream = read_stream(folder, *splits)
    assert stream[0] == 50256
    return [tokenizer.decode(part[1:]) for part in np.split(stream, np.flatnonzero(stream == 50256))[1:]]


def count_up(count: int, first: int = 0) -> np.ndarray:
    """Returns tokens that count up from `first`, so that a token tells its place."""
    return np.arange(first, first + count, dtype=np.uint16)


def to_bin(ids: np.ndarray, magic: int = 20240520, version: int = 1, count: int | None = None) -> bytes:
    """A shard as llm.c writes it."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    return header.tobytes() + ids.astype("<u2").tobytes()


def to_npy(array, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


@contextlib.contextmanager
def assert_refused(folder: Path, match: str) -> Iterator[None]:
    """The block must raise ValueError with this message and leave the folder as it was."""
    before = read_files(folder)
    with pytest.raises(ValueError, match=match):
        yield
    assert read_files(folder) == before


# -----------------------------------------------------------------------------
# interruptions


class Killed(BaseException):
    """No `except Exception` catches it."""


def kill_at_rename(number: int, patch: pytest.MonkeyPatch):
    """The rename of this number, counted from 0, raises Killed."""
    calls, replace = itertools.count(), os.replace

    def wrapper(source, target):
        if next(calls) == number:
            raise Killed
        replace(source, target)

    patch.setattr(os, "replace", wrapper)


def flip_a_bit(path: Path, position: int = -1):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen | None = None, seconds: float = 60):
    """Fails if the process ends, or so many seconds pass, before the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)
