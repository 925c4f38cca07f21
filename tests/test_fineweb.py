"""fineweb.py: text of every kind to shards that hold it exactly, and errors that name file and line."""

import gzip
import io
import itertools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import COMMIT, HubServer

import fineweb
import shards
import tokenizer

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


def parquet(texts, key: str = "text") -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(len(texts))), key: texts}), buffer, row_group_size=2)
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


def read_documents(source: Path | str, text_field: str = "text") -> list[str]:
    documents, _ = fineweb.documents(fineweb.Config(source=str(source), text_field=text_field))
    return list(documents)


def stream_of(folder: Path) -> np.ndarray:
    manifest = shards.verify(folder)
    assert manifest["complete"]
    parts = [np.load(folder / shard["file"]) for shard in manifest["shards"]]
    assert [shard["split"] for shard in manifest["shards"]] == sorted(
        (s["split"] for s in manifest["shards"]), reverse=True
    )
    return np.concatenate(parts)


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
        ("a.jsonl.gz", gzip.compress(jsonl(DOCUMENTS))),
        ("a.parquet", parquet(DOCUMENTS)),
    ],
)
def test_rows_are_documents(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert read_documents(tmp_path / name) == DOCUMENTS


def test_a_null_in_a_parquet_file_is_an_empty_document(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet(["one", None, "three"]))
    assert read_documents(tmp_path / "a.parquet") == ["one", "", "three"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("text", DOCUMENTS)
def test_a_text_file_is_one_document_exactly_as_it_is(tmp_path, name, text):
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
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
        "README.md": b"no",
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
        ("", ["one", "two", "three", "four", "five", "six", "seven"]),
        ("*.txt", ["one", "seven"]),
        ("*", ["one", "two", "three", "seven"]),
        ("**/*.gz", ["five", "six"]),
        ("c", ["four", "five", "six"]),
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
    "bad JSON": ("a.jsonl", GOOD + b'\n{"text": "cut\n' + GOOD, r"a\.jsonl, line 3"),
    "no text field": (
        "a.jsonl",
        GOOD + b'{"body": "x", "url": "y"}\n',
        r"a\.jsonl, line 2.*'text'.*body, url.*--text-field",
    ),
    "text that is null": ("a.jsonl", b'{"text": null}', r"a\.jsonl, line 1"),
    "text that is a number": ("a.jsonl", GOOD * 2 + b'{"text": 5}', r"a\.jsonl, line 3"),
    "a row that is a list": ("a.jsonl", GOOD + b"[1]", r"a\.jsonl, line 2"),
    "a row that is a word": ("a.jsonl", b'"text"', r"a\.jsonl, line 1"),
    "a row nested too deep": ("a.jsonl", GOOD + b"[" * 100_000, r"a\.jsonl, line 2"),
    "jsonl that is not UTF-8": ("a.jsonl", GOOD + b'{"text": "\xff"}', r"a\.jsonl, line 2"),
    "bad JSON in gzip": ("a.jsonl.gz", gzip.compress(GOOD + b"{"), r"a\.jsonl\.gz, line 2"),
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
        FileNotFoundError, match=r"is no file, folder or glob.*fineweb-edu-10BT, pydocs, hf:org/name"
    ):
        read_documents(f"{tmp_path}/{name}")


def test_a_source_of_other_files_only_is_refused_with_the_endings_that_are_read(tmp_path):
    (tmp_path / "a.docx").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"\.txt, \.jsonl, \.parquet"):
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
    names = sorted(path.name for path in one.iterdir())
    assert len(names) > 3
    assert names == sorted(path.name for path in two.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes()


@pytest.mark.parametrize("characters", [1, 30, 10**9])
def test_batches_keep_every_document_in_order(characters):
    batches = list(fineweb.in_batches(DOCUMENTS, characters))
    assert list(itertools.chain.from_iterable(batches)) == DOCUMENTS
    assert all(batches)
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


def test_an_interrupted_run_starts_again(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["Some words. " * 30] * 5) + b"{")
    with pytest.raises(ValueError, match="line 6"):
        prepare(tmp_path / "a.jsonl", tmp_path / "out", shard_tokens=10)
    with pytest.raises(ValueError, match="incomplete"):
        shards.read_manifest(tmp_path / "out")
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS))
    assert decoded(prepare(tmp_path / "a.jsonl", tmp_path / "out", shard_tokens=10)) == DOCUMENTS
    assert "starting again" in capsys.readouterr().out


def test_a_data_set_that_lost_a_shard_is_made_again(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS))
    out = prepare(tmp_path / "a.jsonl", tmp_path / "out")
    next(out.glob("*_train_*.npy")).unlink()
    assert decoded(prepare(tmp_path / "a.jsonl", out)) == DOCUMENTS


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
# pydocs


def test_pydocs_is_prose_without_duplicates_and_the_same_each_time():
    documents = list(fineweb.pydocs())
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
    assert list(itertools.islice(fineweb.pydocs(), 200)) == documents[:200]


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
    assert list(fineweb.prose_paragraphs(f"{PROSE}\n\n{other}\n\n{PROSE[::-1]}")) == [PROSE]


def test_the_lines_of_a_paragraph_are_joined():
    docstring = "This function returns the number of words\n    in a text, which may well\n    be zero.\n    "
    assert list(fineweb.prose_paragraphs(docstring)) == [PROSE]


# -----------------------------------------------------------------------------
# the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense", "1"], "--nonsense"),
        (["--shard-tokens", "many"], "--shard-tokens"),
        (["--source", "no/such/file.txt"], "'no/such/file.txt' is no file, folder or glob"),
        (["--source", "{file}", "--shard-tokens", "0"], "--shard-tokens is 0"),
        (["--source", "{file}", "--text-field", "body"], "good.jsonl, line 1"),
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
    assert "toy_val_000000.npy: 20 tokens" in run.stdout
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


# -----------------------------------------------------------------------------
# the Hub

CARD = b"""---
configs:
- config_name: default
  data_files: [{split: train, path: data/*/*}]
- config_name: sample-10BT
  data_files: [{split: train, path: sample/10BT/*}]
---
# A stand-in for FineWeb-Edu
"""
ON_THE_HUB = [f"Document {i} of the sample, {'with some words, ' * (i % 6)}and an end." for i in range(90)]
FINEWEB_EDU = {
    "README.md": CARD,
    "data/CC-MAIN-2013-20/000_00000.parquet": parquet(["not in the sample"]),
    "sample/10BT/000_00000.parquet": parquet(ON_THE_HUB[:50]),
    "sample/10BT/001_00000.parquet": parquet(ON_THE_HUB[50:]),
}


@pytest.fixture(scope="module")
def hub():
    with HubServer({"datasets/HuggingFaceFW/fineweb-edu": FINEWEB_EDU}) as server:
        yield server


def test_by_default_the_fineweb_edu_sample_is_streamed_from_the_hub(tmp_path, hub):
    hub.requests.clear()
    run = cli("--out-dir", tmp_path / "out", "--shard-tokens", "1000", **hub.environment(tmp_path / "home"))
    assert run.returncode == 0, run.stderr
    assert decoded(tmp_path / "out") == ON_THE_HUB
    manifest = shards.verify(tmp_path / "out")
    assert manifest["source"] == "hf:HuggingFaceFW/fineweb-edu"
    assert manifest["config"] == "sample-10BT"
    assert manifest["revision"] == COMMIT
    assert {shard["file"][:22] for shard in manifest["shards"]} == {
        "fineweb-edu-10BT_val_0",
        "fineweb-edu-10BT_train",
    }
    wanted = {path for path in FINEWEB_EDU if not path.startswith("data/")}
    assert hub.downloads("GET") == wanted  # and nothing of the rest of the data set
    assert all(COMMIT in path for _, path, _ in hub.requests if "/resolve/" in path)
    assert not list((tmp_path / "home").rglob("*.parquet"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "hf:nobody/nothing"], "nobody/nothing"),
        (["--source", "hf:HuggingFaceFW/fineweb-edu", "--text-field", "body"], "no column 'body'"),
    ],
)
def test_a_hub_source_that_is_not_there_is_refused(tmp_path, hub, arguments, message):
    run = cli(*arguments, "--out-dir", tmp_path / "out", **hub.environment(tmp_path / "home"))
    assert run.returncode == 2, run.stderr
    assert message in run.stderr
    assert "Traceback" not in run.stderr
