"""fineweb.py: text to shards that hold it exactly, interrupted or shared among machines, and its refusals."""

import contextlib
import gzip
import itertools
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import (
    ARTICLES,
    DOCUMENTS,
    Killed,
    assert_refused,
    decode_shards,
    flip_a_bit,
    kill_at_rename,
    prepare,
    read_files,
    read_stream,
    sort_by_hash,
    to_jsonl,
    to_parquet,
)
from helpers import ROOT, forkserver, run_script

import fineweb
from lib import documents, shard_writer, shards, sources, tokenizer


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_bytes(to_jsonl(DOCUMENTS))
    return path


# -----------------------------------------------------------------------------
# shards


@pytest.mark.parametrize(
    "options", [{}, {"shard_tokens": 64}, {"shard_tokens": 7, "val_tokens": 20}, {"val_tokens": 0}]
)
def test_the_shards_decode_to_the_documents_in_order(tmp_path, options):
    documents = [*DOCUMENTS, *(f"Document {i}. " * (i % 5) for i in range(30))]
    (tmp_path / "a.jsonl").write_bytes(to_jsonl(documents))
    out = prepare(tmp_path / "a.jsonl", tmp_path / "out", **options)
    assert decode_shards(out) == documents
    assert sum(shard["documents"] for shard in shards.verify(out)["shards"]) == len(documents)


def test_the_manifest_names_source_and_tokenizer(tmp_path, source):
    manifest = shards.verify(prepare(source, tmp_path / "out", name="my-set"))
    assert manifest["tokenizer"] == {"name": "gpt2", "sha256": tokenizer.RANKS_SHA256}
    assert manifest["source"] == str(source)
    names = {shard["file"] for shard in manifest["shards"]}
    assert names == {"my-set_val_000000.npy", "my-set_train_000000.npy"}


@pytest.mark.parametrize("workers", [(0, 0), (1, 2)])
def test_two_runs_are_byte_identical(tmp_path, workers):
    (tmp_path / "a.jsonl").write_bytes(to_jsonl([*DOCUMENTS] * 50))
    one, two = (
        prepare(tmp_path / "a.jsonl", tmp_path / f"out{i}", shard_tokens=5000, workers=w)
        for i, w in enumerate(workers)
    )
    assert len(read_files(one)) > 3
    assert read_files(one) == read_files(two)


def test_a_finished_data_set_is_kept_and_another_does_not_replace_it(tmp_path, capsys):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"{name} holds some text. " * 20, encoding="utf-8")
    out = prepare(tmp_path / "a.txt", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    prepare(tmp_path / "a.txt", out)
    assert "already complete" in capsys.readouterr().out
    changes: list[dict] = [{"shard_tokens": 5}, {"val_tokens": 5}, {"text_field": "body"}]
    for name, change in [*(("a.txt", change) for change in changes), ("b.txt", {})]:
        with pytest.raises(ValueError, match="holds another data set"):
            prepare(tmp_path / name, out, **change)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (to_jsonl(["Some words. " * 30] * 5) + b"{", {"shard_tokens": 10}, "line 6"),
        (to_jsonl(DOCUMENTS, "body"), {}, "--text-field"),
    ],
    ids=["same request", "another request"],
)
def test_a_run_that_failed_before_it_wrote_anything_does_not_stand_in_the_way(
    tmp_path, data, options, message
):
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "a.jsonl", tmp_path / "out", **options)
    with pytest.raises(ValueError, match="incomplete"):
        shards.read_manifest(tmp_path / "out")
    if options:
        (tmp_path / "a.jsonl").write_bytes(to_jsonl(DOCUMENTS))
    out = prepare(tmp_path / "a.jsonl", tmp_path / "out", **(options or {"text_field": "body"}))
    assert decode_shards(out) == DOCUMENTS


def test_what_a_run_has_written_is_not_thrown_away_when_its_text_has_changed(tmp_path, source, monkeypatch):
    monkeypatch.setattr("lib.documents.BATCH_BYTES", 300)
    source.write_bytes(to_jsonl(["Some words. " * 30] * 5) + b"{")
    with pytest.raises(ValueError, match="line 6"):
        prepare(source, tmp_path / "out", shard_tokens=10, val_tokens=10)
    assert len(list(tmp_path.rglob("*.npy"))) > 3
    source.write_bytes(to_jsonl(DOCUMENTS))
    message = r"begun with another inputs.*a\.jsonl has changed.*Remove the folder"
    with assert_refused(tmp_path / "out", message):
        prepare(source, tmp_path / "out", shard_tokens=10, val_tokens=10)


def test_a_complete_data_set_is_refused_if_its_text_has_changed_and_kept_if_it_is_gone(
    tmp_path, source, capsys
):
    out = prepare(source, tmp_path / "out")
    before = read_files(out)
    source.write_bytes(to_jsonl([*DOCUMENTS, "one more"]))
    with assert_refused(out, r"a\.jsonl has changed since .*out was written"):
        prepare(source, out)
    source.unlink()
    capsys.readouterr()
    prepare(source, out)
    assert "already complete" in capsys.readouterr().out
    assert read_files(out) == before


def test_a_data_set_that_lost_a_shard_is_refused_and_keeps_the_others(tmp_path, source):
    out = prepare(source, tmp_path / "out", shard_tokens=50)
    next(out.glob("*_train_*.npy")).unlink()
    with assert_refused(out, r"_train_\d+\.npy is missing.*\(remove .*out first\)"):
        prepare(source, out, shard_tokens=50)


def test_a_data_set_that_an_earlier_version_began_keeps_its_order(tmp_path, texts, capsys):
    new, out = prepare(texts, tmp_path / "new", **OPTIONS), tmp_path / "out"
    cfg = fineweb.Config(source=str(texts), out_dir=str(out), **OPTIONS)
    inputs = sources.describe_inputs(cfg.find_inputs(begun={})[0])
    manifest = {**json.loads((new / "manifest.json").read_text()), "inputs": inputs, "name": "in"}
    manifest |= {"complete": False, "shards": []}
    assert manifest.pop("order") == sources.BY_HASH
    out.mkdir()
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at_rename(9, patch)
        fineweb.prepare(cfg)
    assert len(read_files(out)) > 5
    fineweb.prepare(cfg)
    assert decode_shards(out) == [t for number in range(14) for t in MANY[number * 3 : number * 3 + 8]]
    assert "order" not in shards.verify(out)
    fineweb.prepare(cfg)
    assert "already complete" in capsys.readouterr().out


def test_an_unfinished_run_is_not_continued_by_a_different_request(tmp_path, source, monkeypatch):
    source.write_bytes(to_jsonl(MANY))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at_rename(7, patch)
        prepare(source, tmp_path / "out", shard_tokens=50)
    assert len(read_files(tmp_path / "out")) >= 3
    with assert_refused(tmp_path / "out", r"holds another data set \(shard_tokens 50, not 60\)"):
        prepare(source, tmp_path / "out", shard_tokens=60)


def test_shards_that_lie_in_the_output_folder_are_not_taken_for_ours(tmp_path, source):
    (tmp_path / "out").mkdir()
    np.save(tmp_path / "out" / "theirs_train_000000.npy", np.arange(9, dtype=np.uint16))
    with assert_refused(tmp_path / "out", r"shards without a manifest\.json, such as theirs_train_000000"):
        prepare(source, tmp_path / "out")


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
    assert cfg.folder == ROOT / "data" / name


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
        (tmp_path / "in" / "a.jsonl").write_bytes(to_jsonl(STRANGE))
        assert rb"\ud800" in (tmp_path / "in" / "a.jsonl").read_bytes()
    elif kind == "parquet":
        (tmp_path / "in" / "a.parquet").write_bytes(to_parquet(WITHOUT_SURROGATES))
    else:
        for number, text in enumerate(WITHOUT_SURROGATES):
            (tmp_path / "in" / f"{number:02}.txt").write_bytes(text.encode())  # an empty one is left out
        if kind == "txt in pieces":
            monkeypatch.setattr("lib.documents.BATCH_BYTES", 50)
            (tmp_path / "in" / "02.txt").write_bytes((" " * 10_000).encode())
    out = prepare(tmp_path / "in", tmp_path / "out", shard_tokens=150 if "pieces" in kind else 15_000)
    stream = read_stream(out)
    documents = np.split(stream, np.flatnonzero(stream == 50256))
    assert len(documents.pop(0)) == 0
    texts = STRANGE
    if "txt" in kind:
        names = sort_by_hash(f"{number:02}.txt" for number, text in enumerate(STRANGE) if text)
        texts = [STRANGE[int(name[:2])] for name in names]
    assert len(documents) == len(texts)
    for document, text in zip(documents, texts):
        if kind == "txt in pieces" and len(text) == 1_000_000:
            text = text[:10_000]
        assert document[1:].tolist() == tokenizer.encode(text)


@pytest.mark.fault(18)
def test_the_number_of_threads_does_not_change_a_byte(launch, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(to_jsonl([*DOCUMENTS, *STRANGE[3:]] * 100))
    words = ("--source", tmp_path / "a.jsonl", "--shard-tokens", "9000")
    for workers in ("1", "2"):
        more = ("--out-dir", tmp_path / workers, "--workers", workers)
        launch(None, *words, *more, script="fineweb.py").finish()
    assert len(read_files(tmp_path / "1")) >= 5
    assert read_files(tmp_path / "1") == read_files(tmp_path / "2")


# -----------------------------------------------------------------------------
# killed and run again

MANY = [f"Document {i} {'has some words, ' * (i % 7)}and an end." for i in range(40)] + DOCUMENTS
SOME = MANY[-14:]
TWO_RAW = ["".join(ARTICLES)[:-100], "".join(ARTICLES)[-100:] + "".join(ARTICLES)]
KINDS = {
    "jsonl": ({"a.jsonl": to_jsonl(SOME)}, 2**30, {}),
    "one long text": ({"a.txt": "\n\n".join(SOME).encode()}, 2**30, {}),
    "parquet": ({"a.parquet": to_parquet(SOME), "b.parquet": to_parquet(SOME[::-2])}, 2**30, {}),
    "parquet in parts": ({"a.parquet": to_parquet(SOME), "b.parquet": to_parquet(SOME[::-2])}, 1, {}),
    "texts in parts": ({f"{i}.md": text.encode() for i, text in enumerate(SOME)}, 300, {"val_tokens": 0}),
    "lines": ({"a.txt": "\n".join(SOME).encode(), "b.txt": b"x y\nz"}, 2**30, {"documents": "line"}),
    "articles over two files": (
        {f"{n}.raw": text.encode() for n, text in enumerate(TWO_RAW)},
        2**30,
        {"documents": "article", "val_tokens": 10, "shard_tokens": 40},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("files", "part_bytes", "options"), KINDS.values(), ids=KINDS.keys())
@pytest.mark.fault(17)
def test_a_run_that_is_killed_at_any_rename_continues(
    tmp_path, monkeypatch, capsys, files, part_bytes, options
):
    monkeypatch.setattr("lib.documents.BATCH_BYTES", 300)
    monkeypatch.setattr(fineweb, "PART_BYTES", part_bytes)
    (tmp_path / "in").mkdir()
    for name, data in files.items():
        (tmp_path / "in" / name).write_bytes(data)
    options = {"shard_tokens": 150, **options}
    expected = read_files(prepare(tmp_path / "in", tmp_path / "whole", **options))
    for number in itertools.count():
        out = tmp_path / f"out{number}"
        try:
            with monkeypatch.context() as patch:
                kill_at_rename(number, patch)
                prepare(tmp_path / "in", out, **options)
            break
        except Killed:
            assert read_files(prepare(tmp_path / "in", out, **options)) == expected
    assert number >= 15
    assert "resuming after" in capsys.readouterr().out


@pytest.mark.fault(17)
def test_a_run_that_is_killed_again_and_again_ends(tmp_path, source, monkeypatch):
    source.write_bytes(to_jsonl(MANY))
    expected = read_files(prepare(source, tmp_path / "whole", shard_tokens=100))
    out, renames = tmp_path / "again", itertools.count(2)
    while not shards.is_complete(out):
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            kill_at_rename(next(renames), patch)
            prepare(source, out, shard_tokens=100)
    assert next(renames) >= 7
    assert read_files(out) == expected


def draw_words(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    letters = np.array([*"etaoinshrdlucmfwypvbgkjqxz", "é", "日", "'", "🙂", "7", ","])
    known = ["".join(rng.choice(letters, size)) for size in rng.integers(1, 10, 5000)]
    return [known[i] for i in rng.integers(0, len(known), count)]


def write_corpus(path: Path, megabytes: float) -> Path:
    found = draw_words(int(megabytes * 160_000))
    if path.suffix == ".txt":
        path.write_text(" ".join(found), encoding="utf-8")
    else:
        ends = np.sort(np.random.default_rng(1).integers(0, len(found), len(found) // 300))
        path.write_bytes(to_jsonl(" ".join(found[a:b]) for a, b in zip(ends, ends[1:])))
    return path


def shrink_batches():
    """A patch: ten batches of the small corpus, as of 80 MB without it."""
    documents.BATCH_BYTES = 500_000


def kill_and_compare(launch, tmp_path: Path, source: Path, kills: int, shard_tokens: int, patches=()):
    out, rng = tmp_path / "out", np.random.default_rng(kills)
    expected = read_files(prepare(source, tmp_path / "whole", shard_tokens=shard_tokens))
    start = partial(
        launch, None, "--source", source, "--out-dir", out, "--shard-tokens", shard_tokens,
        script="fineweb.py", patches=patches,
    )  # fmt: skip
    landed = 0
    for _ in range(kills):
        done = len(list(out.glob("parts/*/*.npy")))
        run = start()
        deadline, more = time.monotonic() + 60, rng.integers(0, 6)
        while run.is_running() and len(list(out.glob("parts/*/*.npy"))) < done + more:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))
        run.kill()
        (code,) = run.wait()
        assert code in (0, -signal.SIGKILL), run.printed()
        if shards.is_complete(out):
            assert drop_leftovers(read_files(out)) == expected
            shutil.rmtree(out)
        else:
            landed += code != 0 and len(list(out.glob("parts/*/*.npy"))) > 0
    assert landed >= max(1, kills // 2)
    part = shard_writer.read_part(out, 0)  # the last kill may have come too late: the run was complete
    printed = start().finish()
    assert ("resuming after" in printed) == bool(part and part["shards"] and not part["complete"])
    assert drop_leftovers(read_files(out)) == expected


def drop_leftovers(files: dict[str, bytes]) -> dict[str, bytes]:
    """Drops the leftovers of a kill after the data set was complete."""
    return {
        name: data for name, data in files.items() if Path(name).name == name and not name.startswith(".")
    }


@pytest.mark.parametrize("name", ["corpus.jsonl", pytest.param("book.txt", marks=pytest.mark.slow)])
@pytest.mark.fault(17)
def test_a_run_that_is_killed_at_random_instants_ends_with_the_same_bytes(launch, tmp_path, name, tally):
    for attempt in tally(4, 4):
        attempt.count = 4
        corpus = write_corpus(tmp_path / name, 20 if "json" in name else 12)
        kill_and_compare(launch, tmp_path, corpus, 4, 200_000)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["corpus.jsonl", "book.txt"])
@pytest.mark.fault(17)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(launch, tmp_path, name, tally):
    for attempt in tally(25, 25):
        attempt.count = 25
        kill_and_compare(launch, tmp_path, write_corpus(tmp_path / name, 5), 25, 7_500, [shrink_batches])


# -----------------------------------------------------------------------------
# several processes


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Path:
    """A folder that makes several parts."""
    monkeypatch.setattr(fineweb, "PART_BYTES", 1300)
    (tmp_path / "in").mkdir()
    for number in range(14):
        (tmp_path / "in" / f"{number:02}.jsonl").write_bytes(to_jsonl(MANY[number * 3 : number * 3 + 8]))
    return tmp_path / "in"


OPTIONS: dict[str, Any] = {"shard_tokens": 100, "val_tokens": 110}


def describe_process(rank: int, world_size: int, kind: str = "torchrun") -> dict[str, str]:
    if kind == "torchrun":
        return {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    first = {"slurm": 0, "slurm from 5": 5}[kind]
    facts = {"ID": first + rank, "MIN": first, "COUNT": world_size}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in facts.items()}


@contextlib.contextmanager
def run_as(variables: dict[str, str]) -> Iterator[pytest.MonkeyPatch]:
    """The block runs with these environment variables."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield patch


@pytest.mark.parametrize("kind", ["torchrun", "slurm", "slurm from 5"])
@pytest.mark.parametrize("ranks", [[0], [0, 1], [1, 0], [2, 0, 1], [7, 0, 6, 1, 5, 2, 4, 3, 8]])
@pytest.mark.fault(18)
def test_several_processes_make_the_same_bytes_and_the_last_joins_them(tmp_path, texts, capsys, kind, ranks):
    expected = read_files(prepare(texts, tmp_path / "one", **OPTIONS))
    manifest = shards.verify(tmp_path / "one")
    names = sort_by_hash(f"{number:02}.jsonl" for number in range(14))
    assert decode_shards(tmp_path / "one") == [t for name in names for t in MANY[int(name[:2]) * 3 :][:8]]
    assert sum(shard["tokens"] for shard in manifest["shards"] if shard["split"] == "val") == 110
    assert manifest["parts"] == 7
    assert len(expected) > 20
    capsys.readouterr()
    done = set()
    for rank in ranks:
        with run_as(describe_process(rank, len(ranks), kind)):
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
    assert read_files(tmp_path / "many") == expected


def prepare_share(rank: int, texts: Path, out: Path):
    """One of three processes, forked for it."""
    os.environ.update(describe_process(rank, 3))
    fineweb.PART_BYTES = 1300
    prepare(texts, out, **OPTIONS)


@pytest.mark.fault(18)
def test_processes_at_the_same_time_make_the_same_bytes(tmp_path, texts):
    expected = read_files(prepare(texts, tmp_path / "one", **OPTIONS))
    places = (texts, tmp_path / "many")
    runs = [forkserver.Process(target=prepare_share, args=(rank, *places)) for rank in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert read_files(tmp_path / "many") == expected


def test_parts_made_in_separate_folders_are_copied_together_and_merged(tmp_path, texts, script):
    expected = read_files(prepare(texts, tmp_path / "one", **OPTIONS))
    for rank in range(3):
        with run_as(describe_process(rank, 3)):
            prepare(texts, tmp_path / f"machine{rank}", **OPTIONS)
    all_parts = tmp_path / "machine2"
    arguments = ("--source", texts, "--out-dir", all_parts, "--merge")
    run = script("fineweb.py", *arguments)
    assert run.returncode == 2 and "of 7 parts, these are missing or incomplete: 0, 1, 3, 4, 6" in run.stderr
    assert not shards.is_complete(all_parts)
    for rank in range(2):
        shutil.copytree(tmp_path / f"machine{rank}" / "parts", all_parts / "parts", dirs_exist_ok=True)
    run = script("fineweb.py", *arguments)
    assert (run.returncode, run.stderr) == (0, "")
    assert read_files(all_parts) == expected
    assert script("fineweb.py", *arguments).returncode == 0
    assert read_files(all_parts) == expected


@pytest.mark.fault(17)
def test_a_process_that_was_killed_is_run_again_while_the_others_are_done(tmp_path, texts):
    expected = read_files(prepare(texts, tmp_path / "one", **OPTIONS))
    for rank, renames in [(0, 11), (1, 10**9), (0, 10**9)]:
        with run_as(describe_process(rank, 2)) as patch, contextlib.suppress(Killed):
            kill_at_rename(renames, patch)
            prepare(texts, tmp_path / "many", **OPTIONS)
        assert shards.is_complete(tmp_path / "many") is ((rank, renames) == (0, 10**9))
    assert read_files(tmp_path / "many") == expected


def test_of_several_processes_none_starts_again_when_the_text_has_changed(tmp_path, texts):
    with run_as(describe_process(0, 2)):
        out = prepare(texts, tmp_path / "many", **OPTIONS)
        (texts / "03.jsonl").write_bytes(to_jsonl(["changed"]))
        with assert_refused(out, r"many was begun with another inputs.*has changed"):
            prepare(texts, out, **OPTIONS)


def test_two_processes_do_not_write_one_part(tmp_path, source):
    with shard_writer.PartWriter(tmp_path / "out", 0, 100), pytest.raises(OSError, match="another process"):
        prepare(source, tmp_path / "out")
    assert decode_shards(prepare(source, tmp_path / "out")) == DOCUMENTS


def test_parts_of_another_text_are_not_joined(tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "PART_BYTES", 1)
    for machine in (0, 1):
        (tmp_path / "a.jsonl").write_bytes(to_jsonl(["one", "two"]))
        (tmp_path / "b.jsonl").write_bytes(to_jsonl(["three", "four" * (1 + machine)]))
        with run_as(describe_process(machine, 2)):
            prepare(tmp_path / "*.jsonl", tmp_path / f"machine{machine}")
    shutil.copytree(tmp_path / "machine1/parts/000001", tmp_path / "machine0/parts/000001")
    with pytest.raises(ValueError, match=r"parts \[1\] are of another source"):
        shard_writer.merge(tmp_path / "machine0")


def test_validation_gets_its_tokens_where_parts_are_small_or_is_refused(tmp_path, texts):
    with contextlib.suppress(ValueError):
        out = prepare(texts, tmp_path / "out", shard_tokens=100, val_tokens=900)
        manifest = shards.verify(out)
        assert sum(shard["tokens"] for shard in manifest["shards"] if shard["split"] == "val") == 900


# -----------------------------------------------------------------------------
# refusals

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


def test_a_disk_that_is_too_small_is_refused_with_both_numbers_before_the_work(tmp_path, monkeypatch):
    for name, gigabytes in (("a.txt", 10), ("b.jsonl.gz", 2)):
        with open(tmp_path / name, "wb") as f:
            f.write(gzip.compress(b"x"))
            f.truncate(gigabytes * 10**9)  # takes no room
    monkeypatch.setattr("lib.documents.read_file", lambda *args: pytest.fail("has been read"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3_210_000_000))
    with pytest.raises(OSError, match=r"out needs about 5,900 MB and its disk has 3,210 MB free.*--out-dir$"):
        prepare(tmp_path, tmp_path / "out")
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(to_jsonl(DOCUMENTS)))
    monkeypatch.undo()
    assert decode_shards(prepare(tmp_path, tmp_path / "out")) == DOCUMENTS


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.txt", b""), ("a.jsonl", b""), ("a.jsonl", b"\n\n"), ("a.parquet", to_parquet([""] * 0))],
)
def test_an_input_with_no_text_at_all_is_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"none is left for training|no text for training|not text"):
        prepare(tmp_path / name, tmp_path / "out", val_tokens=1)
    assert not list(tmp_path.rglob("*.npy"))
    (tmp_path / name).unlink()
    (tmp_path / "b.txt").write_text("Some text at last.", encoding="utf-8")
    out = prepare(tmp_path / "b.txt", tmp_path / "out", val_tokens=0)
    assert decode_shards(out) == ["Some text at last."]


@pytest.mark.parametrize("from_folder", [True, False])
def test_the_users_own_files_are_never_deleted(tmp_path, monkeypatch, from_folder):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "mine.txt").write_text("My only copy. " * 50, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for number, place in enumerate((tmp_path / "in", Path("in"))):
        source = place if from_folder else place / "mine.txt"
        prepare(source, tmp_path / f"out{number}", clear_cache=True)
        assert (tmp_path / "in" / "mine.txt").exists(), source


# -----------------------------------------------------------------------------
# the command line


def test_inspect_tells_how_long_documents_are_and_how_many_bytes_a_token_is(tmp_path, script):
    texts = ["", "one", "one two", *["one two three"] * 5, "word " * 40, "end"]
    (tmp_path / "a.jsonl").write_bytes(to_jsonl(texts))
    flags = ("--source", tmp_path / "a.jsonl", "--out-dir", tmp_path / "out")
    assert script("fineweb.py", *flags, "--val-tokens", "0").returncode == 0
    run = script("fineweb.py", *flags, "--inspect")
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
    run = script("fineweb.py", "--out-dir", tmp_path, "--inspect")
    assert (run.returncode, run.stderr) == (0, "")
    assert re.search(r"train +6 tokens  1 shards", run.stdout)
    assert "median 3, longest 3" in run.stdout
    assert "'Hello, world'" in run.stdout


def test_inspect_refuses_what_is_unfinished_or_of_two_kinds(tmp_path, script):
    np.save(tmp_path / "x_train_000000.npy", np.arange(9, dtype=np.uint16))
    (tmp_path / "x_train_000000.bin").write_bytes(b"")
    shard_writer.begin(tmp_path / "new", {"name": "x", "parts": 1})
    for folder, message in ((tmp_path, "both .npy and .bin"), (tmp_path / "new", "incomplete")):
        run = script("fineweb.py", "--out-dir", folder, "--inspect")
        assert run.returncode == 2 and message in run.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense", "1"], "--nonsense"),
        (["--shard-tokens", "many"], "--shard-tokens"),
        (["--source", "no/such/file.txt"], "'no/such/file.txt'; it must be a file, folder or glob"),
        (["--source", "{file}", "--shard-tokens", "0"], "--shard-tokens is 0; it must be at least 1"),
        (["--source", "{file}", "--val-tokens", "-1"], "--val-tokens is -1; it must be at least 0"),
        (["--source", "{file}", "--workers", "-1"], "--workers is -1; it must be at least 0"),
        (["--source", "{file}", "--max-shards", "-1"], "--max-shards is -1; it must be at least 0"),
        (["--source", "{file}", "--documents", "page"], "page"),
        (["--merge"], "manifest.json"),
        (["--source", "{file}", "--text-field", "body"], "a.jsonl: line 1"),
        (["--verify"], "manifest.json"),
        (["--inspect"], "holds no shards"),
    ],
)
def test_the_command_line_refuses_with_exit_code_2_and_the_reason(
    tmp_path, source, script, arguments, message
):
    arguments = [argument.format(file=source) for argument in arguments]
    run = script("fineweb.py", *arguments, "--out-dir", tmp_path / "out")
    assert run.returncode == 2
    assert message in run.stderr


def test_a_shell_sees_exit_code_2_and_no_traceback():
    run = run_script("fineweb.py", "--source", "no/such/file.txt")
    assert (run.returncode, run.stdout) == (2, "")
    assert "no/such/file.txt" in run.stderr and "Traceback" not in run.stderr


def test_the_command_line_writes_verifies_and_inspects(tmp_path, source, script):
    flags = ["--source", source, "--name", "toy", "--out-dir", tmp_path / "out"]
    run = script("fineweb.py", *flags, "--val-tokens", "20", "--workers", "1")
    assert (run.returncode, run.stderr) == (0, "")
    manifest = shards.read_manifest(tmp_path / "out")
    assert manifest is not None
    assert [s["tokens"] for s in manifest["shards"] if s["split"] == "val"] == [20]
    assert f"{manifest['shards'][1]['tokens']:,} tokens" in run.stdout
    assert decode_shards(tmp_path / "out") == DOCUMENTS

    run = script("fineweb.py", *flags, "--inspect")
    assert (run.returncode, run.stderr) == (0, "")
    assert re.search(r"val +20 tokens ", run.stdout)
    assert tokenizer.RANKS_SHA256 in run.stdout
    assert "'<|endoftext|> is text here'" in run.stdout

    run = script("fineweb.py", *flags, "--verify")
    assert (run.returncode, run.stderr) == (0, "")
    assert "all 2 shards" in run.stdout

    flip_a_bit(tmp_path / "out" / "toy_train_000000.npy", 200)
    run = script("fineweb.py", *flags, "--verify")
    assert run.returncode == 2
    assert "toy_train_000000.npy" in run.stderr
