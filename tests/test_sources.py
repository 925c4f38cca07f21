"""lib/sources.py: files, folders and globs, and data sets of the Hugging Face Hub, become documents."""

import gzip
import re
from functools import partial
from pathlib import Path

import pytest
from corpora import ARTICLES as CORPUS
from corpora import (
    compress,
    decode_shards,
    prepare,
    read_documents,
    sort_by_hash,
    to_jsonl,
    to_parquet,
    to_wikitext,
    wait_until,
)
from hub_server import COMMIT, list_files

from lib import shards, sources

# -----------------------------------------------------------------------------
# this disk


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with every kind of readable file, and with other files."""
    files = {
        "a.txt": b"one",
        "b.jsonl": to_jsonl(["two", "three"]),
        "c/d.parquet": to_parquet(["four"]),
        "c/e.jsonl.gz": gzip.compress(to_jsonl(["five"])),
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
def test_folders_and_globs_are_read(folder, pattern, documents):
    assert sorted(read_documents(folder / pattern)) == sorted(documents)


def test_files_are_read_in_the_order_of_their_hashed_paths_wherever_they_are(tmp_path, monkeypatch):
    names = [f"{folder}/{number}.txt" for folder in "ab" for number in range(9)]
    for name in names:
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(name, encoding="utf-8")
    expected = sort_by_hash(names)
    assert expected != sorted(names)
    assert read_documents(tmp_path / "texts") == expected
    assert read_documents(tmp_path / "texts" / "**" / "*.txt") == expected
    monkeypatch.chdir(tmp_path / "texts")
    assert read_documents(".") == read_documents("*/*") == read_documents("../texts") == expected
    assert read_documents(".", documents="article") == ["".join(sorted(names))]  # it may reach over files


def test_what_is_taken_and_what_is_left_out_is_said(tmp_path, capsys):
    outside, folder = tmp_path / "outside", tmp_path / "texts"
    for path, data in {
        outside / "a.txt": b"linked folder", outside / "file.txt": b"linked file",
        folder / "B.TXT": b"capitals", folder / "c" / "d.JsonL.GZ": gzip.compress(to_jsonl(["packed"])),
        folder / ".ipynb_checkpoints" / "B-checkpoint.txt": b"no", folder / ".hidden.txt": b"no",
        folder / "B.txt~": b"no", folder / ".#B.txt": b"no", folder / "#B.txt#": b"no",
        folder / "p.pdf": b"%PDF", folder / "q.PDF": b"%PDF", folder / "r.html": b"<p>",
        folder / "README": b"", folder / "empty.txt": b"", folder / "empty.txt.gz": gzip.compress(b""),
    }.items():  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder / "linked").symlink_to(outside)
    (folder / "one.txt").symlink_to(outside / "file.txt")
    (folder / "twice.md").symlink_to(folder / "B.TXT")
    (folder / "loop").symlink_to(folder)
    (outside / "back").symlink_to(folder / "c")
    assert sorted(read_documents(folder)) == ["capitals", "linked file", "linked folder", "packed"]
    said = capsys.readouterr().out
    assert said.startswith(f"{folder}: 4 files, ")
    for part in ("3 hidden", "2 copies of editors", "1 without a suffix", "2 empty", "2 linked twice"):
        assert part in said
    assert "2 .pdf (convert them: pdftotext FILE.pdf FILE.txt), " in said
    assert "1 .html (convert them: pandoc -t plain -o FILE.txt FILE.html)" in said
    assert read_documents(folder / ".hidden.txt") == ["no"]  # it was asked for


@pytest.mark.parametrize("names", [["a.txt"], ["a.txt", "b.jsonl", "c/d.md", "e.txt.gz"]])
@pytest.mark.parametrize("as_folder", [True, False])
def test_a_source_of_empty_files_is_refused(tmp_path, names, as_folder):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    with pytest.raises(
        ValueError, match=rf"no text for training \(found: {len(names) if as_folder else 1} empty"
    ):
        read_documents(tmp_path if as_folder else tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", b"\n\n"),
        ("a.jsonl", b'{"text": ""}'),
        ("a.txt", b"\xef\xbb\xbf"),
        ("a.parquet", to_parquet([""])),
    ],
)
def test_a_source_without_any_text_makes_no_data_set(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match="no text for training"):
        prepare(tmp_path / name, tmp_path / "out")
    assert not shards.is_complete(tmp_path / "out") and not list(tmp_path.rglob("*.npy"))


def test_no_source_and_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="--source is ''"):
        read_documents("")
    (tmp_path / "good.txt").write_text("good", encoding="utf-8")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"gone\.txt"):
        read_documents(tmp_path)


@pytest.mark.parametrize("suffix", ["raw", "tokens", "raw.gz"])
def test_wikitexts_own_files_keep_their_splits(tmp_path, suffix):
    for n, name in enumerate(("test", "train", "valid")):
        data = compress(CORPUS[n].replace("\n", "\r\n").encode(), suffix)
        (tmp_path / f"wiki.{name}.{suffix}").write_bytes(data)
    out = prepare(tmp_path, tmp_path / "out", documents="article")
    assert ["".join(decode_shards(out, split)) for split in ("test", "train", "val")] == CORPUS


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("this", encoding="utf-8")
    (tmp_path / "a1.txt").write_text("not this", encoding="utf-8")
    assert read_documents(tmp_path / "a[1].txt") == ["this"]


@pytest.mark.parametrize("name", ["missing.txt", "missing/", "*.nothing"])
def test_a_source_that_is_not_there_is_refused_with_the_names_that_exist(tmp_path, name):
    with pytest.raises(
        FileNotFoundError, match=r"must be a file, folder or glob.*fineweb-edu-10BT.*pydocs, hf:org/name"
    ):
        read_documents(f"{tmp_path}/{name}")


def test_a_source_that_is_nearly_a_name_or_a_file_is_asked_back(tmp_path):
    (tmp_path / "story.txt").write_text("One.", encoding="utf-8")
    for source, meant in (("tinystorys", "tinystories"), (f"{tmp_path}/sotry.txt", f"{tmp_path}/story.txt")):
        with pytest.raises(FileNotFoundError, match=rf"\(--help lists all\); did you mean {meant}\?"):
            sources.find_local_files(source)


def test_a_source_of_other_files_only_is_refused_with_the_endings_that_are_read(tmp_path):
    (tmp_path / "a.docx").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"found: 1 \.docx \(convert.*\.txt, \.md, \.raw, .*\.gz or \.zst"):
        read_documents(tmp_path)


# -----------------------------------------------------------------------------
# the Hub

DOCUMENTS = [f"Document {i}, {'with some words, ' * (i % 7)}naïve 日本語 and an end." for i in range(90)]
PREPARE = "result = str(fineweb.prepare(fineweb.Config(**cfg)))"


def to_csv(texts) -> bytes:
    return ("id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(texts))).encode()


LAYOUTS = {
    "parquet": {"data/train-00000-of-00002.parquet": to_parquet(DOCUMENTS[:40]),
                "data/train-00001-of-00002.parquet": to_parquet(DOCUMENTS[40:])},
    "jsonl": {"train-0.jsonl": to_jsonl(DOCUMENTS[:40]), "train-1.jsonl": to_jsonl(DOCUMENTS[40:])},
    "json": {"train.json": to_jsonl(DOCUMENTS)},
    "jsonl.gz": {"train.jsonl.gz": gzip.compress(to_jsonl(DOCUMENTS))},
    "csv": {"train.csv": to_csv(DOCUMENTS)},
    "with a card": {
        "README.md": b"---\nconfigs:\n- config_name: default\n  data_files: texts/*.parquet\n---\n",
        "texts/b.parquet": to_parquet(DOCUMENTS[40:]), "texts/a.parquet": to_parquet(DOCUMENTS[:40]),
        "other/c.parquet": to_parquet(["no"]),
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_data_set_of_any_format_becomes_shards(client, server, repo, tmp_path, layout):
    server.commit(f"datasets/{repo}", LAYOUTS[layout])
    cfg = dict(source=f"hf:{repo}", name="it", out_dir=str(tmp_path / "out"), shard_tokens=700)
    client(PREPARE, cfg=cfg)
    assert decode_shards(tmp_path / "out") == DOCUMENTS
    manifest = shards.verify(tmp_path / "out")
    assert manifest["source"] == f"hf:{repo}"
    assert manifest["revision"] == COMMIT
    assert len(manifest["shards"]) > 3
    assert sum(shard["documents"] for shard in manifest["shards"]) == len(DOCUMENTS)
    assert all(COMMIT in path for method, path, _ in server.requests if "/resolve/" in path)


CARD = b"""---
configs:
- config_name: default
  data_files: [{split: train, path: data/*/*}]
- config_name: sample-10BT
  data_files: [{split: train, path: sample/10BT/*}, {split: test, path: sample/test.jsonl}]
---
# A stand-in for FineWeb-Edu
"""
FINEWEB_EDU = {
    "README.md": CARD,
    "data/CC-MAIN-2013-20/000_00000.parquet": to_parquet(["not in the sample, but in the whole"] * 20),
    "sample/10BT/000_00000.parquet": to_parquet(DOCUMENTS[:50]),
    "sample/10BT/001_00000.parquet": to_parquet(DOCUMENTS[50:]),
    "sample/test.jsonl": to_jsonl(DOCUMENTS[10:30], "body"),
}


def test_by_default_the_fineweb_edu_sample_is_fetched_from_the_hub(start, server, tmp_path):
    server.forget("datasets/HuggingFaceFW/fineweb-edu")
    server.commit("datasets/HuggingFaceFW/fineweb-edu", FINEWEB_EDU)
    flags = ["--out-dir", tmp_path / "out", "--shard-tokens", "1000"]
    out = start(None, *flags, script="fineweb.py").finish()
    assert decode_shards(tmp_path / "out") == DOCUMENTS
    manifest = shards.verify(tmp_path / "out")
    origin = ("hf:HuggingFaceFW/fineweb-edu", "sample-10BT", COMMIT)
    assert (manifest["source"], manifest["config"], manifest["revision"]) == origin
    names = {shard["file"].rpartition("_")[0] for shard in manifest["shards"]}
    assert names == {"fineweb-edu-10BT_val", "fineweb-edu-10BT_train"}
    wanted = {path for path in FINEWEB_EDU if path.startswith(("README", "sample/10BT"))}
    assert server.downloads("GET") == wanted  # and nothing of the rest of the data set
    assert not list((tmp_path / "home").rglob("*.parquet"))
    kept = list_files(tmp_path / "out" / "downloads")
    assert kept == {f"{COMMIT[:12]}/{path}" for path in wanted if path != "README.md"}
    assert "downloads" in out and "--clear-cache" in out
    server.requests.clear()
    out = start(None, *flags, script="fineweb.py").finish()
    assert "already complete" in out
    assert not server.requests


def test_configuration_and_split_can_be_chosen(client, server, tmp_path):
    server.commit("datasets/HuggingFaceFW/copy", FINEWEB_EDU)
    cfg = dict(source="hf:HuggingFaceFW/copy", val_tokens=10, text_field="body")
    client(PREPARE, cfg=dict(cfg, config="sample-10BT", split="test", out_dir=str(tmp_path / "a")))
    assert decode_shards(tmp_path / "a") == DOCUMENTS[10:30]
    cfg = dict(source="hf://datasets/HuggingFaceFW/copy", out_dir=str(tmp_path / "b"))
    answer = client.refusal(PREPARE, "Exception", cfg=cfg)  # that is a data set of shards
    assert "holds no shards" in answer["message"]
    cfg = dict(source=f"hf:HuggingFaceFW/copy@{COMMIT}", config="default", out_dir=str(tmp_path / "c"))
    client(PREPARE, cfg=cfg)
    assert set(decode_shards(tmp_path / "c")) == {"not in the sample, but in the whole"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(source="hf:nobody/nothing"), "nobody/nothing"),
        (dict(source="hf:nobody"), "does not name a dataset"),
        (dict(split="validation"), "--split is validation.*train"),
        (dict(config="none"), "'none'.*sample-10BT"),
        (dict(text_field="body"), "no column 'body'.*--text-field"),
        (dict(source="hf:org/without-data"), "org/without-data"),
        (dict(source="hf:org/with-code"), "org/with-code"),
    ],
)
def test_a_data_set_that_is_not_there_is_refused_at_once(client, server, tmp_path, change, message):
    server.commit("datasets/org/edu", FINEWEB_EDU)
    server.commit("datasets/org/without-data", {"README.md": b"nothing"})
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w')"
    server.commit("datasets/org/with-code", {"with-code.py": code.encode(), "README.md": b""})
    cfg = {"source": "hf:org/edu", "config": "sample-10BT", "out_dir": str(tmp_path / "out"), **change}
    if "with" in cfg["source"]:
        cfg["config"] = ""
    answer = client.refusal(PREPARE, "Exception", cfg=cfg)
    assert set(answer["error"]) & {"OSError", "ValueError"}, answer
    assert re.search(message, answer["message"]), answer
    assert answer["slept"] == []
    assert not list(tmp_path.rglob("*.npy"))
    assert not canary.exists()


ARTICLES = [f" \n = Title {i} = \n \n Some text . \n \n = = Section = = \n \n More . \n" for i in range(9)]
OTHERS = "".join(
    f"- config_name: {name}\n  data_files:\n" + "".join(
        f"  - split: {split}\n    path: {name}/{split}-*\n" for split in ("test", "train", "validation")
    )
    for name in ("wikitext-2-raw-v1", "wikitext-103-raw-v1")
)  # fmt: skip
MIDDLE = ARTICLES[4][:40], ARTICLES[4][40:]


def to_rows(*articles: str) -> bytes:
    return to_wikitext("".join(articles).splitlines(keepends=True))


WIKITEXT = {
    "README.md": f"---\nconfigs:\n{OTHERS}---\n".encode(),
    "wikitext-103-raw-v1/test-00000-of-00001.parquet": to_rows(*ARTICLES[:2]),
    "wikitext-103-raw-v1/train-00000-of-00002.parquet": to_rows(ARTICLES[2], ARTICLES[3], MIDDLE[0]),
    "wikitext-103-raw-v1/train-00001-of-00002.parquet": to_rows(MIDDLE[1], ARTICLES[5], ARTICLES[6]),
    "wikitext-103-raw-v1/validation-00000-of-00001.parquet": to_rows(*ARTICLES[7:]),
    "wikitext-2-raw-v1/train-00000-of-00001.parquet": to_rows(" = no = \n"),
    "wikitext-2-raw-v1/test-00000-of-00001.parquet": to_rows(" = no = \n"),
    "wikitext-2-raw-v1/validation-00000-of-00001.parquet": to_rows(" = no = \n"),
}


def test_wikitext_keeps_its_splits_and_its_articles(client, server, tmp_path):
    server.commit("datasets/Salesforce/wikitext", WIKITEXT)
    cfg = dict(source="wikitext-103", out_dir=str(tmp_path), shard_tokens=60)
    client(PREPARE, cfg=cfg)
    assert decode_shards(tmp_path, "test") == ARTICLES[:2]
    assert decode_shards(tmp_path, "train") == ARTICLES[2:7]
    assert decode_shards(tmp_path, "val") == ARTICLES[7:]
    assert {path.split("/")[0] for path in server.downloads()} == {"README.md", "wikitext-103-raw-v1"}
    cfg = dict(source="wikitext-103", out_dir=str(tmp_path / "other"), val_tokens=50)
    assert "its own validation" in client.refusal(PREPARE, "ValueError", cfg=cfg)["message"]


def test_tinystories_keeps_its_validation_split(client, server, tmp_path):
    files = {
        "README.md": b"---\nlicense: cdla-sharing-1.0\n---\n",
        "TinyStories-train.txt": b"no",
        "TinyStories-valid.txt": b"no",
        "data/train-00000-of-00002-2d5a1467fff1081b.parquet": to_parquet(DOCUMENTS[:30]),
        "data/train-00001-of-00002-5852b56a2bd28fd9.parquet": to_parquet(DOCUMENTS[30:70]),
        "data/validation-00000-of-00001-869c898b519ad725.parquet": to_parquet(DOCUMENTS[70:]),
    }
    server.commit("datasets/roneneldan/TinyStories", files)
    client(PREPARE, cfg=dict(source="tinystories", out_dir=str(tmp_path), shard_tokens=500))
    assert decode_shards(tmp_path, "train") == DOCUMENTS[:70]
    assert decode_shards(tmp_path, "val") == DOCUMENTS[70:]


@pytest.mark.slow
@pytest.mark.fault(17)
def test_a_killed_run_goes_on_at_the_revision_it_began_with(start, server, repo, tmp_path):
    server.commit(f"datasets/{repo}", LAYOUTS["parquet"])
    flags = ["--source", f"hf:{repo}", "--name", "it", "--shard-tokens", "300", "--val-tokens", "100"]
    fetch = partial(start, None, *flags, script="fineweb.py")
    fetch("--out-dir", tmp_path / "whole").finish()
    server.fault("stall", "train-00001")
    killed = fetch("--out-dir", tmp_path / "killed")
    wait_until(lambda: len(list((tmp_path / "killed").glob("parts/*/*.npy"))) > 2)
    killed.kill()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("train-00000*.parquet")}
    assert len(kept) == 1
    server.requests.clear()
    moved = {"data/train-00000-of-00001.parquet": to_parquet(["Another text altogether."] * 9)}
    newer = server.commit(f"datasets/{repo}", moved)
    out = fetch("--out-dir", tmp_path / "killed").finish()
    assert "resuming after" in out
    assert list_files(tmp_path / "killed") == list_files(tmp_path / "whole")
    for path in list_files(tmp_path / "whole"):
        assert (tmp_path / "killed" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert server.downloads("GET") - {"README.md"} == {"data/train-00001-of-00002.parquet"}
    assert not any(newer in path for _, path, _ in server.requests)


def test_downloads_can_be_removed_as_soon_as_their_shards_are_written(client, server, repo, tmp_path):
    server.commit(f"datasets/{repo}", LAYOUTS["parquet"])
    client(PREPARE, cfg=dict(source=f"hf:{repo}", name="it", out_dir=str(tmp_path), clear_cache=True))
    assert decode_shards(tmp_path) == DOCUMENTS
    assert all(path.suffix in (".npy", ".json") for path in tmp_path.rglob("*"))


def test_downloads_of_an_older_revision_are_not_taken_for_the_newest(client, server, repo, tmp_path):
    server.commit(f"datasets/{repo}", {"train.jsonl": to_jsonl(["old"] * 50)})
    cfg = dict(source=f"hf:{repo}", name="it", out_dir=str(tmp_path))
    client(PREPARE, cfg=cfg)
    newer = server.commit(f"datasets/{repo}", {"train.jsonl": to_jsonl(["new"] * 50)})
    for path in [*tmp_path.glob("*.npy"), tmp_path / "manifest.json"]:
        path.unlink()  # it is made again, from what there is now
    client(PREPARE, cfg=cfg)
    assert shards.verify(tmp_path)["revision"] == newer
    assert decode_shards(tmp_path) == ["new"] * 50


def test_a_glob_follows_no_link_in_a_circle_and_counts_hidden_files(tmp_path, capsys):
    inner = tmp_path / "src" / "inner"
    inner.mkdir(parents=True)
    (inner / "a.txt").write_text("one", encoding="utf-8")
    (inner / ".b.txt").write_text("two", encoding="utf-8")
    for name in ("loop", "again"):
        (inner / name).symlink_to(tmp_path / "src")
    for pattern in ("**", "**/*.txt", "**/inner/*.txt"):
        assert sources.find_local_files(str(tmp_path / "src" / pattern)) == [inner / "a.txt"]
        assert "1 files, 3 bytes; left out: 1 hidden" in capsys.readouterr().out
