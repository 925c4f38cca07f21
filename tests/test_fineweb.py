"""fineweb.py: text of every kind to shards that hold it exactly, and errors that name file and line."""

import contextlib
import gzip
import io
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fineweb
from lib import shard_writer, shards, tokenizer
from lib.documents import Batch, batch_documents, cut_text, extract_prose, read_pydocs, read_wikitext

SCRIPT = Path(fineweb.__file__)
DOCUMENTS = [
    "The first document.",
    "",
    "naïve 日本語 🙂\n\n  indented\r\n",
    "<|endoftext|> is text here",
    "x " * 500,
]


def jsonl(texts, key: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)).encode()


def parquet(texts, key: str = "text", row_group_size: int = 2) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(
        pa.table({"id": list(range(len(texts))), key: texts}), buffer, row_group_size=row_group_size
    )
    return buffer.getvalue()


def cli(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    env = {**os.environ, "PYTHONIOENCODING": "utf-8", **environment}
    return subprocess.run(command, env=env, capture_output=True, encoding="utf-8", timeout=120)


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs fineweb.py as `cli` does, but in this process, which has imported torch already."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess:
        command = [str(SCRIPT), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
            code = 0
        except SystemExit as end:
            assert isinstance(end.code, int)
            code = end.code
        return subprocess.CompletedProcess(command, code, *capsys.readouterr())

    return run


def read_documents(source: Path | str, text_field: str = "text", documents: Any = "auto") -> list[str]:
    cfg = fineweb.Config(source=str(source), text_field=text_field, documents=documents)
    inputs, _ = cfg.find_inputs()
    return together(batch for file in inputs for batch in file.read(file.locate()))


def together(batches: Iterable[Batch]) -> list[str]:
    """The documents in batches, those that go on from one batch to the next in one piece."""
    found: list[str] = []
    for batch in batches:
        texts = batch.texts if isinstance(batch.texts, list) else batch.texts.to_pylist()
        texts = [text or "" for text in texts]
        if batch.continues and found:
            found[-1] += texts.pop(0)
        found += texts
    return found


def compressed(data: bytes, name: str) -> bytes:
    """As a file of that name should be."""
    if name.endswith(".gz"):
        return gzip.compress(data)
    if not name.endswith(".zst"):
        return data
    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, "zstd") as f:
        f.write(data)
    return buffer.getvalue().to_pybytes()


def stream_of(folder: Path) -> np.ndarray:
    manifest = shards.verify(folder)
    assert manifest["complete"]
    parts = [np.load(folder / shard["file"]) for shard in manifest["shards"]]
    assert [shard["split"] for shard in manifest["shards"]] == sorted(
        (s["split"] for s in manifest["shards"]), reverse=True
    )
    return np.concatenate(parts)


def files_of(folder: Path) -> dict[str, bytes]:
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def decoded(folder: Path) -> list[str]:
    """The documents in a folder of shards, validation first."""
    stream = stream_of(folder)
    assert stream[0] == 50256
    return [tokenizer.decode(part[1:]) for part in np.split(stream, np.flatnonzero(stream == 50256))[1:]]


# -----------------------------------------------------------------------------
# local sources


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", jsonl(DOCUMENTS)),
        ("a.jsonl", jsonl(DOCUMENTS).replace(b"\n", b"\r\n\n")),
        ("a.jsonl", b"\xef\xbb\xbf" + jsonl(DOCUMENTS)),
        ("a.jsonl", jsonl(DOCUMENTS)[:-1]),
        ("a.jsonl.gz", jsonl(DOCUMENTS)),
        ("a.jsonl.zst", jsonl(DOCUMENTS)),
        ("a.parquet", parquet(DOCUMENTS)),
        ("a.parquet.gz", parquet(DOCUMENTS)),
        ("a.parquet.zst", parquet(DOCUMENTS)),
    ],
)
def test_rows_are_documents(tmp_path, name, data):
    (tmp_path / name).write_bytes(compressed(data, name))
    assert read_documents(tmp_path / name) == DOCUMENTS


def test_a_null_in_a_parquet_file_is_an_empty_document(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet(["one", None, "three"]))
    assert read_documents(tmp_path / "a.parquet") == ["one", "", "three"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.md", "a.md.gz", "a.md.zst", "a.raw"])
@pytest.mark.parametrize("text", DOCUMENTS)
def test_a_text_file_is_one_document_exactly_as_it_is(tmp_path, name, text):
    (tmp_path / name).write_bytes(compressed(text.encode(), name))
    assert read_documents(tmp_path / name) == [text]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfHello")
    assert read_documents(tmp_path / "a.txt") == ["Hello"]


@pytest.mark.parametrize(
    ("name", "data"), [("a.jsonl", jsonl(DOCUMENTS, "body")), ("a.parquet", parquet(DOCUMENTS, "body"))]
)
def test_the_text_field_can_be_chosen(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert read_documents(tmp_path / name, "body") == DOCUMENTS


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of every kind of file, and files that are none of our business."""
    files = {
        "a.txt": b"one",
        "b.jsonl": jsonl(["two", "three"]),
        "c/d.parquet": parquet(["four"]),
        "c/e.jsonl.gz": gzip.compress(jsonl(["five"])),
        "c/f.txt.gz": gzip.compress(b"six"),
        "README.md": b"zero",
        "c/g.raw": b"six and a half",
        "c/manifest.json": b"no",
        "c/picture.png": b"\x89PNG",
        "z.txt": b"seven",
    }
    (tmp_path / "texts" / "c").mkdir(parents=True)
    for name in reversed(files):
        (tmp_path / "texts" / name).write_bytes(files[name])
    return tmp_path / "texts"


@pytest.mark.parametrize(
    ("pattern", "documents"),
    [
        ("", ["zero", "one", "two", "three", "four", "five", "six", "six and a half", "seven"]),
        ("*.txt", ["one", "seven"]),
        ("*", ["zero", "one", "two", "three", "seven"]),
        ("**/*.gz", ["five", "six"]),
        ("c", ["four", "five", "six", "six and a half"]),
        ("[ab].*", ["one", "two", "three"]),
    ],
)
def test_folders_and_globs_are_read_in_sorted_order(folder, pattern, documents):
    assert read_documents(folder / pattern) == documents


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("this", encoding="utf-8")
    (tmp_path / "a1.txt").write_text("not this", encoding="utf-8")
    assert read_documents(tmp_path / "a[1].txt") == ["this"]


GOOD = b'{"text": "fine"}\n'
BAD_FILES = {
    "bad JSON": ("a.jsonl", GOOD + b'\n{"text": "cut\n' + GOOD, r"a\.jsonl: line 3"),
    "no text field": (
        "a.jsonl",
        GOOD + b'{"body": "x", "url": "y"}\n',
        r"a\.jsonl: line 2.*'text'.*body, url.*--text-field",
    ),
    "text that is a number": ("a.jsonl", GOOD * 2 + b'{"text": 5}', r"a\.jsonl: line 3"),
    "a row that is a list": ("a.jsonl", GOOD + b"[1]", r"a\.jsonl: line 2"),
    "a row that is a word": ("a.jsonl", b'"text"', r"a\.jsonl: line 1"),
    "a row nested too deep": ("a.jsonl", GOOD + b"[" * 100_000, r"a\.jsonl: line 2"),
    "jsonl that is not UTF-8": ("a.jsonl", GOOD + b'{"text": "\xff"}', r"a\.jsonl: line 2"),
    "bad JSON in gzip": ("a.jsonl.gz", gzip.compress(GOOD + b"{"), r"a\.jsonl\.gz: line 2"),
    "text that is not UTF-8": ("a.txt", "naïve".encode("latin-1"), r"a\.txt: .*utf-8"),
    "no gzip": ("a.jsonl.gz", GOOD, r"a\.jsonl\.gz"),
    "text that is no gzip": ("a.txt.gz", b"plain", r"a\.txt\.gz"),
    "a cut gzip": ("a.txt.gz", gzip.compress(os.urandom(1000))[:500], r"a\.txt\.gz"),
    "a damaged gzip": ("a.txt.gz", gzip.compress(b"x" * 10_000)[:12] + b"\xff" * 40, r"a\.txt\.gz"),
    "no parquet": ("a.parquet", GOOD, r"a\.parquet"),
    "an empty parquet": ("a.parquet", b"", r"a\.parquet"),
    "parquet without the column": (
        "a.parquet",
        parquet(["x"], "body"),
        r"a\.parquet.*'text'.*id, body.*--text-field",
    ),
    "a column of numbers": ("a.parquet", parquet([1, 2]), r"a\.parquet"),
    "a column of lists": ("a.parquet", parquet([["a"], ["b"]]), r"a\.parquet"),
}


@pytest.mark.parametrize(("name", "data", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_file_that_cannot_be_read_is_refused_with_its_name_and_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read_documents(tmp_path / name)


@pytest.mark.parametrize("name", ["missing.txt", "missing/", "*.nothing"])
def test_a_source_that_is_not_there_is_refused_with_the_names_that_exist(tmp_path, name):
    with pytest.raises(
        FileNotFoundError, match=r"is no file, folder or glob.*fineweb-edu-10BT.*pydocs, hf:org/name"
    ):
        read_documents(f"{tmp_path}/{name}")


def test_a_source_of_other_files_only_is_refused_with_the_endings_that_are_read(tmp_path):
    (tmp_path / "a.docx").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"\.txt, \.md, \.raw, \.jsonl, \.parquet.*\.gz or \.zst"):
        read_documents(tmp_path)


# -----------------------------------------------------------------------------
# shards


def prepare(source: Path, out_dir: Path, **options) -> Path:
    return fineweb.prepare(fineweb.Config(source=str(source), out_dir=str(out_dir), **options))


@pytest.mark.parametrize(
    "options", [{}, {"shard_tokens": 64}, {"shard_tokens": 7, "val_tokens": 20}, {"val_tokens": 0}]
)
def test_the_shards_decode_to_the_documents_in_order(tmp_path, options):
    documents = [*DOCUMENTS, *(f"Document {i}. " * (i % 5) for i in range(30))]
    (tmp_path / "a.jsonl").write_bytes(jsonl(documents))
    out = prepare(tmp_path / "a.jsonl", tmp_path / "out", **options)
    assert decoded(out) == documents
    assert sum(shard["documents"] for shard in shards.verify(out)["shards"]) == len(documents)


def test_the_manifest_names_source_and_tokenizer(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS))
    manifest = shards.verify(prepare(tmp_path / "a.jsonl", tmp_path / "out", name="my-set"))
    assert manifest["tokenizer"] == {"name": "gpt2", "sha256": tokenizer.RANKS_SHA256}
    assert manifest["source"] == str(tmp_path / "a.jsonl")
    assert {shard["file"] for shard in manifest["shards"]} == {
        "my-set_val_000000.npy",
        "my-set_train_000000.npy",
    }


@pytest.mark.parametrize("workers", [(0, 0), (1, 2)])
def test_two_runs_are_byte_identical(tmp_path, workers):
    (tmp_path / "a.jsonl").write_bytes(jsonl([*DOCUMENTS] * 50))
    one, two = (
        prepare(tmp_path / "a.jsonl", tmp_path / f"out{i}", shard_tokens=5000, workers=w)
        for i, w in enumerate(workers)
    )
    assert len(files_of(one)) > 3
    assert files_of(one) == files_of(two)


@pytest.mark.parametrize("characters", [1, 30, 10**9])
def test_batches_keep_every_document_in_order(monkeypatch, characters):
    monkeypatch.setattr("lib.documents.BATCH_BYTES", characters)
    batches = list(batch_documents(DOCUMENTS))
    assert [text for batch in batches for text in batch.texts] == DOCUMENTS
    assert all(batch.texts for batch in batches)
    assert not any(batch.continues for batch in batches)
    if characters == 1:
        assert len(batches) >= 4


def test_a_finished_data_set_is_kept_and_another_does_not_replace_it(tmp_path, capsys):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"{name} holds some text. " * 20, encoding="utf-8")
    out = prepare(tmp_path / "a.txt", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    prepare(tmp_path / "a.txt", out)
    assert "already complete" in capsys.readouterr().out
    for change in ({"shard_tokens": 5}, {"val_tokens": 5}, {"text_field": "body"}):
        with pytest.raises(ValueError, match="holds another data set"):
            prepare(tmp_path / "a.txt", out, **change)
    with pytest.raises(ValueError, match="holds another data set"):
        prepare(tmp_path / "b.txt", out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_null_is_an_empty_document_in_every_format(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": null}\n{"text": "one"}')
    (tmp_path / "b.parquet").write_bytes(parquet([None, "two"]))
    assert decoded(prepare(tmp_path, tmp_path / "out")) == ["", "one", "", "two"]


def test_a_run_that_failed_before_it_wrote_anything_does_not_stand_in_the_way(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["Some words. " * 30] * 5) + b"{")
    with pytest.raises(ValueError, match="line 6"):
        prepare(tmp_path / "a.jsonl", tmp_path / "out", shard_tokens=10)
    with pytest.raises(ValueError, match="incomplete"):
        shards.read_manifest(tmp_path / "out")
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS))
    assert decoded(prepare(tmp_path / "a.jsonl", tmp_path / "out", shard_tokens=10)) == DOCUMENTS


def test_what_a_run_has_written_is_not_thrown_away_when_its_text_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.documents.BATCH_BYTES", 300)
    (tmp_path / "a.jsonl").write_bytes(jsonl(["Some words. " * 30] * 5) + b"{")
    with pytest.raises(ValueError, match="line 6"):
        prepare(tmp_path / "a.jsonl", tmp_path / "out", shard_tokens=10, val_tokens=10)
    before = files_of(tmp_path / "out")
    assert sum(name.endswith(".npy") for name in before) > 3
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS))
    with pytest.raises(
        ValueError, match=r"begun with another inputs.*a\.jsonl has changed.*Remove the folder"
    ):
        prepare(tmp_path / "a.jsonl", tmp_path / "out", shard_tokens=10, val_tokens=10)
    assert files_of(tmp_path / "out") == before


def test_a_complete_data_set_is_refused_if_its_text_has_changed_and_kept_if_it_is_gone(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS))
    out = prepare(tmp_path / "a.jsonl", tmp_path / "out")
    before = files_of(out)
    (tmp_path / "a.jsonl").write_bytes(jsonl([*DOCUMENTS, "one more"]))
    with pytest.raises(ValueError, match=r"a\.jsonl has changed since .*out was made from it"):
        prepare(tmp_path / "a.jsonl", out)
    (tmp_path / "a.jsonl").unlink()
    capsys.readouterr()
    prepare(tmp_path / "a.jsonl", out)
    assert "already complete" in capsys.readouterr().out
    assert files_of(out) == before


def test_a_data_set_that_lost_a_shard_is_refused_and_keeps_the_others(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS))
    out = prepare(tmp_path / "a.jsonl", tmp_path / "out", shard_tokens=50)
    next(out.glob("*_train_*.npy")).unlink()
    before = files_of(out)
    with pytest.raises(ValueError, match=r"_train_\d+\.npy is missing.*\(remove .*out first\)"):
        prepare(tmp_path / "a.jsonl", out, shard_tokens=50)
    assert files_of(out) == before


WRONG_FLAGS = [
    dict(max_shards=2),
    dict(split="test"),
    dict(source="fineweb-edu-10BT", config="CC-MAIN-2024-10"),
    dict(source="hf://datasets/org/name", val_tokens=10),
    dict(source="fineweb-edu-10B-gpt2", shard_tokens=10),
    dict(verify=True, inspect=True),
]


@pytest.mark.parametrize("flags", WRONG_FLAGS, ids=str)
def test_flags_that_would_do_nothing_are_refused(tmp_path, flags):
    with pytest.raises(ValueError, match=r"does not apply to --source|different jobs"):
        fineweb.main(fineweb.Config(**{"source": str(tmp_path), "out_dir": str(tmp_path / "out"), **flags}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "variables",
    [{"RANK": "3"}, {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "2"}],
)
def test_a_process_beyond_the_last_is_refused(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"which cannot be.*RANK and WORLD_SIZE"):
        fineweb.read_share()


def test_two_processes_do_not_write_one_part(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS))
    with (
        shard_writer.PartWriter(tmp_path / "out", 0, 100),
        pytest.raises(OSError, match="another process is writing"),
    ):
        prepare(tmp_path / "a.jsonl", tmp_path / "out")
    assert decoded(prepare(tmp_path / "a.jsonl", tmp_path / "out")) == DOCUMENTS


def test_parts_of_another_text_are_not_joined(tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "PART_BYTES", 1)
    for machine in (0, 1):
        (tmp_path / "a.jsonl").write_bytes(jsonl(["one", "two"]))
        (tmp_path / "b.jsonl").write_bytes(jsonl(["three", "four" * (1 + machine)]))
        for name, value in as_process(machine, 2).items():
            monkeypatch.setenv(name, value)
        prepare(tmp_path / "*.jsonl", tmp_path / f"machine{machine}")
    shutil.copytree(tmp_path / "machine1/parts/000001", tmp_path / "machine0/parts/000001")
    with pytest.raises(ValueError, match=r"parts \[1\] are of another source"):
        shard_writer.merge(tmp_path / "machine0")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("fineweb-edu-10BT", "fineweb-edu-10BT"),
        ("texts/My novel (1).txt", "My-novel-1"),
        ("books/*.jsonl.gz", "text"),
        ("hf:org/some_name", "org-some-name"),
        (".", "text"),
    ],
)
def test_a_data_set_is_named_after_its_source(source, name):
    cfg = fineweb.Config(source=source)
    assert cfg.dataset_name == name
    assert cfg.folder == SCRIPT.resolve().parent / "data" / name


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "a b", "-x"])
def test_names_that_are_no_file_names_are_refused(name):
    with pytest.raises(ValueError, match="--name is"):
        _ = fineweb.Config(name=name).dataset_name


# -----------------------------------------------------------------------------
# one document in pieces


def ids_of(batches: Iterable[Batch]) -> list[int]:
    return np.concatenate([tokenizer.encode_corpus(b.texts, b.continues) for b in batches]).tolist()


def pieces_of(text: str, batch_bytes: int) -> list[Batch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.documents.BATCH_BYTES", batch_bytes)
        stream = io.BytesIO(text.encode())
        return list(cut_text(stream, stream))


AWKWARD = st.lists(
    st.one_of(
        st.sampled_from(
            [*" \n\t'.,", "  ", " \n", "'s", "'re", "\r\n", "\u00a0", "\u2003", "\u3000", "\ufeff"]
        ),
        st.sampled_from([*"abcXY019", "é", "日", "本", "🙂", "👩‍👩‍👧", "ب", "e\u0301", "<|endoftext|>"]),
        st.characters(exclude_categories=["Cs", "Cn"]),  # see test_tokenizer.assigned
    ),
    max_size=60,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(AWKWARD, st.integers(1, 50))
def test_a_text_in_pieces_has_the_ids_of_the_whole(text, batch_bytes):
    text = text.lstrip("\ufeff")  # one is taken for a byte order mark
    batches = pieces_of(text, batch_bytes)
    assert "".join(batch.texts[0] for batch in batches) == text
    assert [batch.continues for batch in batches] == [False] + [True] * (len(batches) - 1)
    assert ids_of(batches) == [50256, *tokenizer.load_tiktoken().encode_ordinary(text)]


def test_pieces_are_small_where_there_are_blanks_and_whole_where_there_are_none():
    pieces = pieces_of("Some words, many times. " * 100, 50)
    assert len(pieces) > 40
    assert max(len(batch.texts[0]) for batch in pieces) <= 80
    assert ids_of(pieces_of("あ" * 3000, 50)) == [50256, *tokenizer.encode("あ" * 3000)]
    assert pieces_of("", 50)[0].texts == [""]


# -----------------------------------------------------------------------------
# documents in text files


POEM = "\ufeffOne line\r\n\n \t\nanother line \n  \n\n\u2028third\n a fourth, indented"


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("auto", [POEM[1:]]),
        ("file", [POEM[1:]]),
        ("line", ["One line", "another line ", "\u2028third", " a fourth, indented"]),
        ("block", ["One line", "another line ", "\u2028third\n a fourth, indented"]),
    ],
)
@pytest.mark.parametrize("batch_bytes", [1, 30, 10**6])
def test_a_document_is_a_file_a_line_or_a_block(tmp_path, monkeypatch, documents, expected, batch_bytes):
    (tmp_path / "a.txt").write_bytes(POEM.encode())
    monkeypatch.setattr("lib.documents.BATCH_BYTES", batch_bytes)
    assert read_documents(tmp_path / "a.txt", documents=documents) == expected
    out = prepare(tmp_path / "a.txt", tmp_path / "out", documents=documents)
    assert decoded(out) == expected


@pytest.mark.parametrize("documents", ["line", "block", "article"])
def test_rows_stay_documents_whatever_text_files_hold(tmp_path, documents):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["one\n\ntwo", "three"]))
    (tmp_path / "b.parquet").write_bytes(parquet(["four\nfive"]))
    assert read_documents(tmp_path, documents=documents) == ["one\n\ntwo", "three", "four\nfive"]


def test_lines_that_are_not_utf8_are_refused_with_the_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\nb\xe9d\n")
    for documents in ("line", "block", "article"):
        with pytest.raises(ValueError, match=r"a\.txt: .*utf-8"):
            read_documents(tmp_path / "a.txt", documents=documents)


WIKITEXT = SCRIPT.resolve().parent.parent / "shared" / "data" / "wiki.test.raw"


def wikitext(articles: int = 60) -> str:
    if WIKITEXT.exists():
        return WIKITEXT.read_bytes().decode()
    section = " \n = = Section = = \n \n Text = of the section = \n More text . \n = no heading = \n"
    return "".join(f" \n = Article {i} = \n \n Text . \n{section * (i % 4)}" for i in range(articles)) + " \n"


def is_title(line: str) -> bool:
    return line.startswith(" = ") and not line.startswith(" = =")


@pytest.mark.parametrize("batch_bytes", [1, 100_000, 8_000_000])
def test_wikitexts_articles_are_found_and_are_the_text_to_the_byte(tmp_path, monkeypatch, batch_bytes):
    monkeypatch.setattr("lib.documents.BATCH_BYTES", batch_bytes)
    (tmp_path / "wiki.test.raw").write_bytes(wikitext().encode())
    articles = read_documents(tmp_path / "wiki.test.raw", documents="article")
    assert len(articles) == 60
    assert "".join(articles) == wikitext()
    for article in articles:
        lines = article.split("\n")
        assert lines[0] == " "
        assert is_title(lines[1] + "\n")
    out = prepare(tmp_path / "wiki.test.raw", tmp_path / "out", documents="article", val_tokens=0)
    assert decoded(out) == articles


def wikitext_rows(lines: list[str]) -> bytes:
    """As on the Hub: a row a line, a blank line an empty row."""
    return parquet(["" if line == " \n" else line for line in lines], row_group_size=1000)


@pytest.mark.parametrize("place", [0.21, 0.5, 0.83])
def test_wikitexts_rows_on_the_hub_are_the_same_articles(tmp_path, place):
    text = wikitext()
    lines = text.splitlines(keepends=True)
    cut = int(place * len(lines))
    while is_title(lines[cut - 1]) or is_title(lines[cut]) or is_title(lines[cut + 1]):
        cut += 1  # to the middle of an article
    for number, part in enumerate((lines[:cut], lines[cut:])):
        (tmp_path / f"{number}.parquet").write_bytes(wikitext_rows(part))
    articles = together(
        itertools.chain.from_iterable(read_wikitext(tmp_path / f"{n}.parquet") for n in range(2))
    )
    assert "".join(articles) == text
    assert len(articles) == 60


SECTIONS = " \n = = Part = = \n \n = = = Deeper = = = \n \n More words . \n"
ARTICLES = [f" \n = Article {n} = \n \n Text {n} . \n{SECTIONS}" for n in range(3)]


@pytest.mark.parametrize("part_bytes", [2**30, 1])
@pytest.mark.parametrize("shard_tokens", [7, 10_000])
def test_no_cut_between_files_splits_an_article_or_loses_a_line(
    tmp_path, monkeypatch, part_bytes, shard_tokens
):
    monkeypatch.setattr(fineweb, "PART_BYTES", part_bytes)
    lines = "".join(ARTICLES).splitlines(keepends=True)
    ends = set(itertools.accumulate(map(len, ARTICLES), initial=0))
    for cut in range(1, len(lines)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        for number, part in enumerate((lines[:cut], lines[cut:])):
            (folder / f"{number}.txt").write_bytes("".join(part).encode())
        options: dict[str, Any] = dict(documents="article", val_tokens=0, shard_tokens=shard_tokens)
        articles = decoded(prepare(folder, folder / "out", **options))
        assert "".join(articles) == "".join(ARTICLES), f"cut at line {cut}: {lines[cut]!r}"
        if part_bytes > 1:  # parts may be made by different machines: there an article may be cut
            assert set(itertools.accumulate(map(len, articles))) <= ends | {end + len(" \n") for end in ends}


@pytest.mark.parametrize(
    "text",
    ["A preface .\n \n = Title = \n \n Text .\n", "No heading at all .\n" * 5, "\n = Title = \n\nText .\n"],
)
def test_text_before_the_first_heading_is_not_lost(tmp_path, text):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    out = prepare(tmp_path / "a.txt", tmp_path / "out", documents="article", val_tokens=0)
    assert "".join(decoded(out)) == text


# -----------------------------------------------------------------------------
# compressed files


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize(
    ("name", "data"), [("a.txt", DOCUMENTS[2].encode() * 50), ("a.jsonl", jsonl(DOCUMENTS) * 9)]
)
def test_a_compressed_file_may_be_of_several_members(tmp_path, name, data, suffix):
    (tmp_path / name).write_bytes(data)
    expected = read_documents(tmp_path / name)
    cuts = [0, 5, 6, 7, 8, 9, 10, 100, len(data)]  # some inside a character
    members = [compressed(data[begin:end], suffix) for begin, end in zip(cuts, cuts[1:])]
    (tmp_path / (name + suffix)).write_bytes(b"".join([*members, compressed(b"", suffix)]))
    assert read_documents(tmp_path / (name + suffix)) == expected


@pytest.mark.parametrize(
    "name", ["a.txt.gz", "a.jsonl.gz", "a.parquet.gz", "a.txt.zst", "a.jsonl.zst", "a.parquet.zst"]
)
def test_a_compressed_file_that_was_cut_is_refused_with_its_name(tmp_path, name):
    text = "".join(map(chr, np.random.default_rng(0).integers(32, 127, 3000)))
    data = {"t": text.encode(), "j": jsonl([text]), "p": parquet([text])}[name[2]]
    whole = compressed(data, name)
    for size in (1, 3, 9, 30, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            read_documents(tmp_path / name)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            prepare(tmp_path / name, tmp_path / "out")
        assert not shards.is_complete(tmp_path / "out")


# -----------------------------------------------------------------------------
# parquet


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
@pytest.mark.parametrize("row_group_size", [1, 2, 3, 100])
@pytest.mark.parametrize("batch_bytes", [1, 200, 8_000_000])
def test_parquet_is_read_whatever_its_row_groups_and_kind_of_string(
    tmp_path, monkeypatch, kind, row_group_size, batch_bytes
):
    monkeypatch.setattr("lib.documents.BATCH_BYTES", batch_bytes)
    texts = [*DOCUMENTS, None, "a long row " * 300, None, *DOCUMENTS[::-1]]
    (tmp_path / "a.parquet").write_bytes(parquet(pa.array(texts, kind), row_group_size=row_group_size))
    expected = [text or "" for text in texts]
    assert read_documents(tmp_path / "a.parquet") == expected
    out = prepare(tmp_path / "a.parquet", tmp_path / "out", val_tokens=0)
    ids = [id for text in expected for id in (50256, *tokenizer.encode(text))]
    assert stream_of(out).tolist() == ids


def test_parquet_with_nested_columns_and_without_rows_is_read(tmp_path):
    table = pa.table({"meta": [{"a": 1, "b": [1, 2]}] * 3, "text": ["one", "two", "three"]})
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "b.parquet")
    assert read_documents(tmp_path) == ["one", "two", "three"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_parquet_that_is_not_utf8_is_refused_with_its_name(tmp_path, kind):
    latin = pa.array([b"good", "naïve".encode("latin-1"), b"good"])
    texts = pa.Array.from_buffers(pa.string(), 3, latin.buffers()).cast(kind)
    (tmp_path / "a.parquet").write_bytes(parquet(texts))
    with pytest.raises(ValueError, match=r"a\.parquet: .*UTF8"):
        prepare(tmp_path / "a.parquet", tmp_path / "out")
    assert not shards.is_complete(tmp_path / "out")


# -----------------------------------------------------------------------------
# difficult documents, any number of threads


STRANGE = [
    "",
    "A text that is longer than two shards. " * 40,
    " " * 1_000_000,
    "lone \ud800 surrogate, \udfff another, and a pair \ud83d\ude42",
    "NUL \0 bytes \0\0\0",
    "مرحبا بالعالم, שלום עולם, \u202eright to left\u202c",
    "🙂👩‍👩‍👧‍👦🇩🇪🏳️‍🌈",
    "a literal <|endoftext|> and <|endoftext|>",
    "<|endoftext|>",
    "\n",
    "",
]
WITHOUT_SURROGATES = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in STRANGE]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt", "txt in pieces"])
@pytest.mark.fault(19)
def test_every_difficult_document_is_there_once_with_the_ids_of_its_text(tmp_path, monkeypatch, kind):
    (tmp_path / "in").mkdir()
    if kind == "jsonl":
        (tmp_path / "in" / "a.jsonl").write_bytes(jsonl(STRANGE))
        assert rb"\ud800" in (tmp_path / "in" / "a.jsonl").read_bytes()
    elif kind == "parquet":
        (tmp_path / "in" / "a.parquet").write_bytes(parquet(WITHOUT_SURROGATES))
    else:
        for number, text in enumerate(WITHOUT_SURROGATES):
            (tmp_path / "in" / f"{number:02}.txt").write_bytes(text.encode())
        if kind == "txt in pieces":
            monkeypatch.setattr("lib.documents.BATCH_BYTES", 50)
            (tmp_path / "in" / "02.txt").write_bytes((" " * 10_000).encode())
    out = prepare(tmp_path / "in", tmp_path / "out", shard_tokens=150 if "pieces" in kind else 15_000)
    stream = stream_of(out)
    documents = np.split(stream, np.flatnonzero(stream == 50256))
    assert len(documents.pop(0)) == 0
    assert len(documents) == len(STRANGE)
    for document, text in zip(documents, STRANGE):
        if kind == "txt in pieces" and len(text) == 1_000_000:
            text = text[:10_000]
        assert document[1:].tolist() == tokenizer.encode(text)


@pytest.mark.fault(18)
def test_the_number_of_threads_does_not_change_a_byte(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl([*DOCUMENTS, *STRANGE[3:]] * 100))
    for workers in ("1", "2"):
        run = cli(
            "--source", tmp_path / "a.jsonl", "--out-dir", tmp_path / workers, "--workers", workers,
            "--shard-tokens", "9000",
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
    assert len(files_of(tmp_path / "1")) >= 5
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


# -----------------------------------------------------------------------------
# killed and run again


class Killed(BaseException):
    """No `except Exception` holds it up."""


def kill_at_rename(number: int, patch: pytest.MonkeyPatch):
    calls, replace = itertools.count(), os.replace

    def wrapper(source, target):
        if next(calls) == number:
            raise Killed
        replace(source, target)

    patch.setattr(os, "replace", wrapper)


MANY = [f"Document {i} {'has some words, ' * (i % 7)}and an end." for i in range(40)] + DOCUMENTS
SOME = MANY[-14:]
TWO_RAW = ["".join(ARTICLES)[:-100], "".join(ARTICLES)[-100:] + "".join(ARTICLES)]
KINDS = {
    "jsonl": ({"a.jsonl": jsonl(SOME)}, 2**30, {}),
    "one long text": ({"a.txt": "\n\n".join(SOME).encode()}, 2**30, {}),
    "parquet": ({"a.parquet": parquet(SOME), "b.parquet": parquet(SOME[::-2])}, 2**30, {}),
    "parquet in parts": ({"a.parquet": parquet(SOME), "b.parquet": parquet(SOME[::-2])}, 1, {}),
    "texts in parts": ({f"{i}.md": text.encode() for i, text in enumerate(SOME)}, 300, {"val_tokens": 0}),
    "lines": ({"a.txt": "\n".join(SOME).encode(), "b.txt": b"x y\nz"}, 2**30, {"documents": "line"}),
    "articles over two files": (
        {f"{n}.raw": text.encode() for n, text in enumerate(TWO_RAW)},
        2**30,
        {"documents": "article", "val_tokens": 10, "shard_tokens": 40},
    ),
}


@pytest.mark.parametrize(("files", "part_bytes", "options"), KINDS.values(), ids=KINDS.keys())
@pytest.mark.fault(17)
def test_a_run_that_is_killed_at_any_rename_continues(
    tmp_path, monkeypatch, capsys, files, part_bytes, options
):
    monkeypatch.setattr("lib.documents.BATCH_BYTES", 300)
    monkeypatch.setattr(fineweb, "PART_BYTES", part_bytes)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    (tmp_path / "in").mkdir()
    for name, data in files.items():
        (tmp_path / "in" / name).write_bytes(data)
    options = {"shard_tokens": 150, **options}
    expected = files_of(prepare(tmp_path / "in", tmp_path / "whole", **options))
    for number in itertools.count():
        out = tmp_path / f"out{number}"
        try:
            with monkeypatch.context() as patch:
                kill_at_rename(number, patch)
                prepare(tmp_path / "in", out, **options)
            break
        except Killed:
            assert files_of(prepare(tmp_path / "in", out, **options)) == expected
    assert number >= 15
    assert "going on after" in capsys.readouterr().out


@pytest.mark.fault(17)
def test_a_run_that_is_killed_again_and_again_ends(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(jsonl(MANY))
    expected = files_of(prepare(tmp_path / "a.jsonl", tmp_path / "whole", shard_tokens=100))
    out, renames = tmp_path / "again", itertools.count(2)
    while not shards.is_complete(out):
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            kill_at_rename(next(renames), patch)
            prepare(tmp_path / "a.jsonl", out, shard_tokens=100)
    assert next(renames) >= 7
    assert files_of(out) == expected


def words(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    letters = np.array([*"etaoinshrdlucmfwypvbgkjqxz", "é", "日", "'", "🙂", "7", ","])
    known = ["".join(rng.choice(letters, size)) for size in rng.integers(1, 10, 5000)]
    return [known[i] for i in rng.integers(0, len(known), count)]


def write_corpus(path: Path, megabytes: float) -> Path:
    found = words(int(megabytes * 160_000))
    if path.suffix == ".txt":
        path.write_text(" ".join(found), encoding="utf-8")
    else:
        ends = np.sort(np.random.default_rng(1).integers(0, len(found), len(found) // 300))
        path.write_bytes(jsonl(" ".join(found[a:b]) for a, b in zip(ends, ends[1:])))
    return path


def kill_and_compare(tmp_path: Path, source: Path, kills: int, shard_tokens: int):
    out, rng = tmp_path / "out", np.random.default_rng(kills)
    expected = files_of(prepare(source, tmp_path / "whole", shard_tokens=shard_tokens))
    command = [sys.executable, str(SCRIPT), "--source", str(source), "--out-dir", str(out)]
    command += ["--shard-tokens", str(shard_tokens)]
    landed = 0
    for _ in range(kills):
        done = len(list(out.glob("parts/*/*.npy")))
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline, more = time.monotonic() + 60, rng.integers(0, 6)
        while run.poll() is None and len(list(out.glob("parts/*/*.npy"))) < done + more:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))
        run.kill()
        _, errors = run.communicate()
        assert run.returncode in (0, -signal.SIGKILL), errors.decode()
        if shards.is_complete(out):
            assert published(files_of(out)) == expected
            shutil.rmtree(out)
        else:
            landed += run.returncode != 0 and len(list(out.glob("parts/*/*.npy"))) > 0
    assert landed >= max(1, kills // 2)
    part = shard_writer.read_part(out, 0)  # the last kill may have come too late: the run was complete
    run = cli(*command[2:])
    assert run.returncode == 0, run.stderr
    assert ("going on after" in run.stdout) == bool(part and part["shards"] and not part["complete"])
    assert published(files_of(out)) == expected


def published(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without what a kill in the last instant, when the data set is complete, leaves behind."""
    return {
        name: data for name, data in files.items() if Path(name).name == name and not name.startswith(".")
    }


@pytest.mark.parametrize("name", ["corpus.jsonl", pytest.param("book.txt", marks=pytest.mark.slow)])
@pytest.mark.fault(17)
def test_a_run_that_is_killed_at_random_instants_ends_with_the_same_bytes(tmp_path, name, tally):
    for attempt in tally(4, 4):
        attempt.count = 4
        kill_and_compare(tmp_path, write_corpus(tmp_path / name, 20 if "json" in name else 12), 4, 200_000)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["corpus.jsonl", "book.txt"])
@pytest.mark.fault(17)
def test_a_run_that_is_killed_fifty_times_ends_with_the_same_bytes(tmp_path, name, tally):
    for attempt in tally(50, 50):
        attempt.count = 50
        kill_and_compare(tmp_path, write_corpus(tmp_path / name, 20), 50, 30_000)


# -----------------------------------------------------------------------------
# several processes


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Path:
    """A folder that makes several parts."""
    monkeypatch.setattr(fineweb, "PART_BYTES", 1300)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    (tmp_path / "in").mkdir()
    for number in range(14):
        (tmp_path / "in" / f"{number:02}.jsonl").write_bytes(jsonl(MANY[number * 3 : number * 3 + 8]))
    return tmp_path / "in"


OPTIONS: dict[str, Any] = {"shard_tokens": 100, "val_tokens": 110}


def as_process(rank: int, world_size: int, kind: str = "torchrun") -> dict[str, str]:
    if kind == "torchrun":
        return {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    first = {"slurm": 0, "slurm from 5": 5}[kind]
    return {
        "SLURM_ARRAY_TASK_ID": str(first + rank),
        "SLURM_ARRAY_TASK_MIN": str(first),
        "SLURM_ARRAY_TASK_COUNT": str(world_size),
    }


@pytest.mark.parametrize("kind", ["torchrun", "slurm", "slurm from 5"])
@pytest.mark.parametrize("ranks", [[0], [0, 1], [1, 0], [2, 0, 1], [7, 0, 6, 1, 5, 2, 4, 3, 8]])
@pytest.mark.fault(18)
def test_several_processes_make_the_same_bytes_and_the_last_joins_them(
    tmp_path, texts, monkeypatch, capsys, kind, ranks
):
    expected = files_of(prepare(texts, tmp_path / "one", **OPTIONS))
    manifest = shards.verify(tmp_path / "one")
    assert decoded(tmp_path / "one") == [t for i in range(14) for t in MANY[i * 3 : i * 3 + 8]]
    assert sum(shard["tokens"] for shard in manifest["shards"] if shard["split"] == "val") == 110
    assert manifest["parts"] == 7
    assert len(expected) > 20
    capsys.readouterr()
    done = set()
    for rank in ranks:
        with monkeypatch.context() as patch:
            for name, value in as_process(rank, len(ranks), kind).items():
                patch.setenv(name, value)
            prepare(texts, tmp_path / "many", **OPTIONS)
        said = capsys.readouterr().out
        done |= set(range(rank, 7, len(ranks)))
        if done == set(range(7)):
            assert shards.is_complete(tmp_path / "many")
        else:
            assert set(shard_writer.find_missing_parts(tmp_path / "many", manifest)) == set(range(7)) - done
            assert f"process {rank} of {len(ranks)} is done" in said
            assert "of 7 parts are still missing" in said
            assert "--merge" in said
    assert f"in {tmp_path / 'many'}" in said or "already complete" in said
    assert files_of(tmp_path / "many") == expected


def test_torchruns_variables_count_before_those_of_a_slurm_array(monkeypatch):
    assert fineweb.read_share() == (0, 1)
    for name, value in {**as_process(3, 9, "slurm"), **as_process(1, 2)}.items():
        monkeypatch.setenv(name, value)
    assert fineweb.read_share() == (1, 2)


@pytest.mark.fault(18)
def test_processes_at_the_same_time_make_the_same_bytes(tmp_path, texts):
    expected = files_of(prepare(texts, tmp_path / "one", **OPTIONS))
    code = (
        "import fineweb; fineweb.PART_BYTES = 1300; "
        f"fineweb.prepare(fineweb.Config({str(texts)!r}, out_dir={str(tmp_path / 'many')!r}, **{OPTIONS!r}))"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code], env={**os.environ, **as_process(rank, 3)}, cwd=SCRIPT.parent,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(3)
    ]  # fmt: skip
    for run in runs:
        _, errors = run.communicate(timeout=60)
        assert run.returncode == 0, errors.decode()
    assert files_of(tmp_path / "many") == expected


def test_parts_made_in_separate_folders_are_copied_together_and_merged(tmp_path, texts, monkeypatch, script):
    expected = files_of(prepare(texts, tmp_path / "one", **OPTIONS))
    for rank in range(3):
        with monkeypatch.context() as patch:
            for name, value in as_process(rank, 3).items():
                patch.setenv(name, value)
            prepare(texts, tmp_path / f"machine{rank}", **OPTIONS)
    all_parts = tmp_path / "machine2"
    arguments = ("--source", texts, "--out-dir", all_parts, "--merge")
    run = script(*arguments)
    assert run.returncode == 2 and "of 7 parts, these are missing or incomplete: 0, 1, 3, 4, 6" in run.stderr
    assert not shards.is_complete(all_parts)
    for rank in range(2):
        shutil.copytree(tmp_path / f"machine{rank}" / "parts", all_parts / "parts", dirs_exist_ok=True)
    run = script(*arguments)
    assert (run.returncode, run.stderr) == (0, "")
    assert files_of(all_parts) == expected
    assert script(*arguments).returncode == 0
    assert files_of(all_parts) == expected


@pytest.mark.fault(17)
def test_a_process_that_was_killed_is_run_again_while_the_others_are_done(tmp_path, texts, monkeypatch):
    expected = files_of(prepare(texts, tmp_path / "one", **OPTIONS))
    for rank, renames in [(0, 11), (1, 10**9), (0, 10**9)]:
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            for name, value in as_process(rank, 2).items():
                patch.setenv(name, value)
            kill_at_rename(renames, patch)
            prepare(texts, tmp_path / "many", **OPTIONS)
        assert shards.is_complete(tmp_path / "many") is ((rank, renames) == (0, 10**9))
    assert files_of(tmp_path / "many") == expected


def test_of_several_processes_none_starts_again_when_the_text_has_changed(tmp_path, texts, monkeypatch):
    for name, value in as_process(0, 2).items():
        monkeypatch.setenv(name, value)
    prepare(texts, tmp_path / "many", **OPTIONS)
    before = files_of(tmp_path / "many")
    (texts / "03.jsonl").write_bytes(jsonl(["changed"]))
    with pytest.raises(ValueError, match=r"many was begun with another inputs.*has changed since"):
        prepare(texts, tmp_path / "many", **OPTIONS)
    assert files_of(tmp_path / "many") == before


def test_validation_gets_its_tokens_where_parts_are_small_or_is_refused(tmp_path, texts):
    with contextlib.suppress(ValueError):
        out = prepare(texts, tmp_path / "out", shard_tokens=100, val_tokens=900)
        manifest = shards.verify(out)
        assert sum(shard["tokens"] for shard in manifest["shards"] if shard["split"] == "val") == 900


# -----------------------------------------------------------------------------
# refused, kept, looked at


def test_a_disk_that_is_too_small_is_refused_with_both_numbers_before_the_work(tmp_path, monkeypatch):
    for name, gigabytes in (("a.txt", 10), ("b.jsonl.gz", 2)):
        with open(tmp_path / name, "wb") as f:
            f.truncate(gigabytes * 10**9)  # takes no room
    monkeypatch.setattr("lib.documents.read_file", lambda *args: pytest.fail("has been read"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3_210_000_000))
    with pytest.raises(OSError, match=r"out needs about 5\.9 GB and its disk has 3\.2 GB free.*--out-dir"):
        prepare(tmp_path, tmp_path / "out")
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(DOCUMENTS)))
    monkeypatch.undo()
    assert decoded(prepare(tmp_path, tmp_path / "out")) == DOCUMENTS


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.txt", b""), ("a.jsonl", b""), ("a.jsonl", b"\n\n"), ("a.parquet", parquet([""] * 0))],
)
def test_an_input_with_no_text_at_all_is_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"none is left for training|no text for training|not text"):
        prepare(tmp_path / name, tmp_path / "out", val_tokens=1)
    assert not list(tmp_path.rglob("*.npy"))
    (tmp_path / name).unlink()
    (tmp_path / "b.txt").write_text("Some text at last.", encoding="utf-8")
    assert decoded(prepare(tmp_path / "b.txt", tmp_path / "out", val_tokens=0)) == ["Some text at last."]


def test_a_failed_attempt_does_not_stand_in_the_way_of_another_request(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS, "body"))
    with pytest.raises(ValueError, match="--text-field"):
        prepare(tmp_path / "a.jsonl", tmp_path / "out")
    out = prepare(tmp_path / "a.jsonl", tmp_path / "out", text_field="body")
    assert decoded(out) == DOCUMENTS


def test_an_unfinished_run_is_not_continued_by_a_different_request(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(jsonl(MANY))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at_rename(7, patch)
        prepare(tmp_path / "a.jsonl", tmp_path / "out", shard_tokens=50)
    before = files_of(tmp_path / "out")
    assert len(before) >= 3
    with pytest.raises(ValueError, match=r"holds another data set \(shard_tokens 50, not 60\)"):
        prepare(tmp_path / "a.jsonl", tmp_path / "out", shard_tokens=60)
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize("from_folder", [True, False])
def test_the_users_own_files_are_never_deleted(tmp_path, monkeypatch, from_folder):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "mine.txt").write_text("My only copy. " * 50, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for number, place in enumerate((tmp_path / "in", Path("in"))):
        source = place if from_folder else place / "mine.txt"
        prepare(source, tmp_path / f"out{number}", clear_cache=True)
        assert (tmp_path / "in" / "mine.txt").exists(), source


def test_shards_that_lie_in_the_output_folder_are_not_taken_for_ours(tmp_path):
    (tmp_path / "out").mkdir()
    np.save(tmp_path / "out" / "theirs_train_000000.npy", np.arange(9, dtype=np.uint16))
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS))
    before = files_of(tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"holds shards without a manifest\.json, such as theirs_train_000000"
    ):
        prepare(tmp_path / "a.jsonl", tmp_path / "out")
    assert files_of(tmp_path / "out") == before


def test_inspect_tells_how_long_documents_are_and_how_many_bytes_a_token_is(tmp_path, script):
    texts = ["", "one", "one two", *["one two three"] * 5, "word " * 40, "end"]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    flags = ("--source", tmp_path / "a.jsonl", "--out-dir", tmp_path / "out")
    assert script(*flags, "--val-tokens", "0").returncode == 0
    run = script(*flags, "--inspect")
    assert (run.returncode, run.stderr) == (0, "")
    lengths = [len(tokenizer.encode(text)) for text in texts[:-1]]  # the last ends where the data ends
    assert f"median {np.median(lengths):,.0f}, longest {max(lengths)}" in run.stdout
    rows = dict(re.findall(r"^ +(\d+ to +\d+)  #* +(\d+)$", run.stdout, flags=re.MULTILINE))
    assert {tuple(map(int, row.split(" to "))): int(count) for row, count in rows.items()} == {
        (low, high): sum(low <= length <= high for length in lengths)
        for low, high in [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63)]
    }
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    assert f"{sum(map(len, texts)) / tokens:.2f} bytes per token (from 1 shards)" in run.stdout
    assert re.search(rf"train +{tokens + len(texts)} tokens +{len(texts)} documents  1 shards", run.stdout)
    assert "'one two three'" in run.stdout


def test_inspect_looks_into_folders_without_a_manifest(tmp_path, script):
    np.save(tmp_path / "x_train_000000.npy", np.array([50256, 15496, 11, 995, 50256, 0], dtype=np.uint16))
    run = script("--out-dir", tmp_path, "--inspect")
    assert (run.returncode, run.stderr) == (0, "")
    assert re.search(r"train +6 tokens  1 shards", run.stdout)
    assert "median 3, longest 3" in run.stdout
    assert "'Hello, world'" in run.stdout


def test_inspect_refuses_what_is_unfinished_or_of_two_kinds(tmp_path, script):
    np.save(tmp_path / "x_train_000000.npy", np.arange(9, dtype=np.uint16))
    (tmp_path / "x_train_000000.bin").write_bytes(b"")
    run = script("--out-dir", tmp_path, "--inspect")
    assert run.returncode == 2
    assert "both .npy and .bin" in run.stderr
    shard_writer.begin(tmp_path / "new", {"name": "x", "parts": 1})
    run = script("--out-dir", tmp_path / "new", "--inspect")
    assert run.returncode == 2
    assert "incomplete" in run.stderr


# -----------------------------------------------------------------------------
# pydocs


def test_pydocs_is_prose_without_duplicates_and_the_same_each_time():
    documents = list(read_pydocs())
    paragraphs = [paragraph for document in documents for paragraph in document.split("\n\n")]
    assert len(paragraphs) > 5_000
    assert len(set(paragraphs)) == len(paragraphs)
    for paragraph in paragraphs:
        assert ">>>" not in paragraph
        assert "\n" not in paragraph
        assert "  " not in paragraph
        assert paragraph[0].isupper()
        assert paragraph[-1] in ".?!"
        assert len(paragraph) >= 60
        assert sum(c.isalpha() or c == " " for c in paragraph) >= 0.9 * len(paragraph)
    assert list(itertools.islice(read_pydocs(), 200)) == documents[:200]


PROSE = "This function returns the number of words in a text, which may well be zero."


@pytest.mark.parametrize(
    "other",
    [
        ">>> f('This is a doctest that is long enough to count as a paragraph of prose.')\n3.",
        "    >>> This is a doctest that is long enough to count as a paragraph of prose.",
        "Name      Meaning of the name in the table that follows here and goes on.",
        "Example of it, with code below that a reader of this text should see::",
        "Too short to count.",
        "this begins with a small letter and so is most likely half of something else.",
        "A paragraph that does not end as a sentence does because it is a title of one",
        "Some text that has an indented line in its middle, which is code or so:\n    x\ny and z.",
        "Set x=1, y=2 and z=3 for the parameters of this function that has several of them.",
        "The numbers 1234567890 and 1234567890 and 1234567890 and 1234567890 and so on.",
        ".. note:: This is a directive of a markup language and not a sentence at all.",
    ],
)
def test_only_prose_paragraphs_are_kept(other):
    assert list(extract_prose(f"{PROSE}\n\n{other}\n\n{PROSE[::-1]}")) == [PROSE]


def test_the_lines_of_a_paragraph_are_joined():
    docstring = "This function returns the number of words\n    in a text, which may well\n    be zero.\n    "
    assert list(extract_prose(docstring)) == [PROSE]


# -----------------------------------------------------------------------------
# the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense", "1"], "--nonsense"),
        (["--shard-tokens", "many"], "--shard-tokens"),
        (["--source", "no/such/file.txt"], "'no/such/file.txt' is no file, folder or glob"),
        (["--source", "{file}", "--shard-tokens", "0"], "--shard-tokens is 0; it must be at least 1"),
        (["--source", "{file}", "--val-tokens", "-1"], "--val-tokens is -1; it must be at least 0"),
        (["--source", "{file}", "--workers", "-1"], "--workers is -1; it must be at least 0"),
        (["--source", "{file}", "--max-shards", "-1"], "--max-shards is -1; it must be at least 0"),
        (["--source", "{file}", "--documents", "page"], "page"),
        (["--merge"], "manifest.json"),
        (["--source", "{file}", "--text-field", "body"], "good.jsonl: line 1"),
        (["--verify"], "manifest.json"),
        (["--inspect"], "holds no shards"),
    ],
)
def test_the_command_line_refuses_with_exit_code_2_and_the_reason(tmp_path, script, arguments, message):
    (tmp_path / "good.jsonl").write_bytes(GOOD * 20)
    arguments = [argument.format(file=tmp_path / "good.jsonl") for argument in arguments]
    run = script(*arguments, "--out-dir", tmp_path / "out")
    assert run.returncode == 2
    assert message in run.stderr


@pytest.mark.parametrize("arguments", [["--nonsense"], ["--source", "no/such/file.txt"]])
def test_a_shell_sees_exit_code_2_and_no_traceback(arguments):
    run = cli(*arguments)
    assert run.returncode == 2
    assert arguments[-1] in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""


def test_the_command_line_writes_verifies_and_inspects(tmp_path, script):
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS))
    flags = ["--source", tmp_path / "a.jsonl", "--name", "toy", "--out-dir", tmp_path / "out"]
    run = cli(*flags, "--val-tokens", "20", "--workers", "1")
    assert (run.returncode, run.stderr) == (0, "")
    manifest = shards.read_manifest(tmp_path / "out")
    assert manifest is not None
    assert [s["tokens"] for s in manifest["shards"] if s["split"] == "val"] == [20]
    assert f"{manifest['shards'][1]['tokens']:,} tokens" in run.stdout
    assert decoded(tmp_path / "out") == DOCUMENTS

    run = script(*flags, "--inspect")
    assert (run.returncode, run.stderr) == (0, "")
    assert re.search(r"val +20 tokens ", run.stdout)
    assert tokenizer.RANKS_SHA256 in run.stdout
    assert "'<|endoftext|> is text here'" in run.stdout

    run = script(*flags, "--verify")
    assert (run.returncode, run.stderr) == (0, "")
    assert "all 2 shards" in run.stdout

    path = tmp_path / "out" / "toy_train_000000.npy"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    run = script(*flags, "--verify")
    assert run.returncode == 2
    assert "toy_train_000000.npy" in run.stderr
