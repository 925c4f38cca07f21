"""lib/documents.py: every format gives its documents exactly, and errors give the file and the line."""

import gzip
import io
import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import (
    ARTICLES,
    DOCUMENTS,
    compress,
    decode_shards,
    join_batches,
    prepare,
    read_documents,
    read_stream,
    to_jsonl,
    to_parquet,
    to_wikitext,
)
from helpers import ROOT
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fineweb
from lib import shards, tokenizer
from lib.documents import (
    Batch,
    batch_documents,
    cut_text,
    decode_text,
    extract_prose,
    read_pydocs,
    read_wikitext,
    unify_line_ends,
)


@pytest.mark.parametrize(
    ("name", "data", "text_field"),
    [
        ("a.jsonl", to_jsonl(DOCUMENTS), "text"),
        ("a.jsonl", to_jsonl(DOCUMENTS).replace(b"\n", b"\r\n\n"), "text"),
        ("a.jsonl", b"\xef\xbb\xbf" + to_jsonl(DOCUMENTS), "text"),
        ("a.jsonl", to_jsonl(DOCUMENTS)[:-1], "text"),
        ("a.jsonl", to_jsonl(DOCUMENTS, "body"), "body"),
        ("a.jsonl.gz", to_jsonl(DOCUMENTS), "text"),
        ("a.jsonl.zst", to_jsonl(DOCUMENTS), "text"),
        ("a.parquet", to_parquet(DOCUMENTS), "text"),
        ("a.parquet", to_parquet(DOCUMENTS, "body"), "body"),
        ("a.parquet.gz", to_parquet(DOCUMENTS), "text"),
        ("a.parquet.zst", to_parquet(DOCUMENTS), "text"),
    ],
)
def test_rows_are_documents(tmp_path, name, data, text_field):
    (tmp_path / name).write_bytes(compress(data, name))
    assert read_documents(tmp_path / name, text_field) == DOCUMENTS


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.md", "a.md.gz", "a.md.zst", "a.raw"])
@pytest.mark.parametrize("text", filter(None, DOCUMENTS))
def test_a_text_file_is_one_document_exactly_as_it_is(tmp_path, name, text):
    (tmp_path / name).write_bytes(compress(text.encode(), name))
    assert read_documents(tmp_path / name) == [text]


def test_a_null_is_an_empty_document_in_every_format(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": null}\n{"text": "one"}')
    (tmp_path / "b.parquet").write_bytes(to_parquet([None, "two"]))
    assert decode_shards(prepare(tmp_path, tmp_path / "out")) == ["", "two", "", "one"]


@pytest.mark.parametrize("characters", [1, 30, 10**9])
def test_batches_keep_every_document_in_order(monkeypatch, characters):
    monkeypatch.setattr("lib.documents.BATCH_BYTES", characters)
    batches = list(batch_documents(DOCUMENTS))
    assert [text for batch in batches for text in batch.texts] == DOCUMENTS
    assert all(batch.texts for batch in batches)
    assert not any(batch.continues for batch in batches)
    if characters == 1:
        assert len(batches) >= 4


def to_columns(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(["x"])] * len(names), names=names), buffer)
    return buffer.getvalue()


GOOD = b'{"text": "fine"}\n'
BAD_FILES = {
    "bad JSON": ("a.jsonl", GOOD + b'\n{"text": "cut\n' + GOOD, r"a\.jsonl: line 3"),
    "no text field": (
        "a.jsonl",
        GOOD + b'{"body": "x", "url": "y"}\n',
        r"a\.jsonl: line 2.*'text'.*body, url.*--text-field",
    ),
    "text that is a number": (
        "a.jsonl",
        GOOD * 2 + b'{"text": 5}',
        r"line 3: the field 'text' is 5, not text",
    ),
    "a row that is a list": ("a.jsonl", GOOD + b"[1]", r"a\.jsonl: line 2: the row is \[1\]; .* an object"),
    "a row that is a word": ("a.jsonl", b'"text"', r"a\.jsonl: line 1"),
    "a row nested too deep": ("a.jsonl", GOOD + b"[" * 100_000, r"a\.jsonl: line 2"),
    "jsonl that is not UTF-8": ("a.jsonl", GOOD + b'{"text": "\xff"}', r"a\.jsonl: line 2"),
    "bad JSON in gzip": ("a.jsonl.gz", gzip.compress(GOOD + b"{"), r"a\.jsonl\.gz: line 2"),
    "text in latin-1": (
        "a.txt",
        "\nnaïve".encode("latin-1"),
        r"a\.txt: line 2: .*0xef .*a\.txt \| iconv .*latin1",
    ),
    "text of Windows": (
        "a.txt",
        b"\x93so\x94",
        r"a\.txt: line 1: .*iconv -t utf-8 -f windows-1252 > utf8\.txt",
    ),
    "packed latin-1": ("a.txt.gz", gzip.compress(b"na\xefve"), r"gzip -dc .*a\.txt\.gz \| iconv .*latin1"),
    "UTF-16 without a mark": ("a.txt", "One text".encode("utf-16-le"), r"a\.txt: .*iconv .*-f utf-16le"),
    "big-endian UTF-16": ("a.txt", "One text".encode("utf-16-be"), r"a\.txt: .*iconv .*-f utf-16be"),
    "UTF-32 without a mark": ("a.txt", "One text".encode("utf-32-le"), r"a\.txt: .*iconv .*-f utf-32le"),
    "bytes of all kinds": ("a.txt", bytes(range(256)), r"a\.txt: line 2: byte 0x80.*it is no text"),
    "half a character": ("a.txt", "text é".encode()[:-1], r"a\.txt: line 1: .*utf-8"),
    "no gzip": ("a.jsonl.gz", GOOD, r"a\.jsonl\.gz"),
    "text that is no gzip": ("a.txt.gz", b"plain", r"a\.txt\.gz"),
    "a cut gzip": ("a.txt.gz", gzip.compress(os.urandom(1000))[:500], r"a\.txt\.gz"),
    "a damaged gzip": ("a.txt.gz", gzip.compress(b"x" * 10_000)[:12] + b"\xff" * 40, r"a\.txt\.gz"),
    "no parquet": ("a.parquet", GOOD, r"a\.parquet"),
    "an empty parquet": ("a.parquet", b"", r"a\.parquet"),
    "parquet without the column": (
        "a.parquet",
        to_parquet(["x"], "body"),
        r"a\.parquet.*'text'.*id, body.*--text-field",
    ),
    "parquet with two columns of one name": (
        "a.parquet",
        to_columns(["text", "id", "text"]),
        r"a\.parquet: several columns 'text'; it has text, id, text",
    ),
    "a column of numbers": ("a.parquet", to_parquet([1, 2]), r"a\.parquet"),
    "a column of lists": ("a.parquet", to_parquet([["a"], ["b"]]), r"a\.parquet"),
}


@pytest.mark.parametrize(("name", "data", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_file_that_cannot_be_read_is_refused_with_its_name_and_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read_documents(tmp_path / name)


# -----------------------------------------------------------------------------
# one document in several batches


def encode_batches(batches: Iterable[Batch]) -> list[int]:
    return np.concatenate([tokenizer.encode_corpus(b.texts, b.continues) for b in batches]).tolist()


def cut(text: str, batch_bytes: int) -> list[Batch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.documents.BATCH_BYTES", batch_bytes)
        stream = io.BytesIO(text.encode())
        return list(cut_text(decode_text(stream, Path("a.txt")), stream))


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
    text = unify_line_ends(text.lstrip("\ufeff"))  # one is taken for a byte order mark
    assume(text and "\0" not in text)
    batches = cut(text, batch_bytes)
    assert "".join(batch.texts[0] for batch in batches) == text
    assert [batch.continues for batch in batches] == [False] + [True] * (len(batches) - 1)
    assert encode_batches(batches) == [50256, *tokenizer.load_tiktoken().encode_ordinary(text)]


def test_pieces_are_small_where_there_are_blanks_and_whole_where_there_are_none():
    pieces = cut("Some words, many times. " * 100, 50)
    assert len(pieces) > 40
    assert max(len(batch.texts[0]) for batch in pieces) <= 80
    assert encode_batches(cut("あ" * 3000, 50)) == [50256, *tokenizer.encode("あ" * 3000)]
    assert cut("", 50) == []


# -----------------------------------------------------------------------------
# lines, blocks and articles of text files

POEM = "\ufeffOne line\r\n\n \t\nanother line \n  \n\n\u2028third\n a fourth, indented"


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("auto", [POEM[1:].replace("\r\n", "\n")]),
        ("file", [POEM[1:].replace("\r\n", "\n")]),
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
    assert decode_shards(out) == expected


@pytest.mark.parametrize("documents", ["line", "block", "article"])
def test_rows_stay_documents_whatever_text_files_hold(tmp_path, documents):
    (tmp_path / "a.jsonl").write_bytes(to_jsonl(["one\n\ntwo", "three"]))
    (tmp_path / "b.parquet").write_bytes(to_parquet(["four\nfive"]))
    assert sorted(read_documents(tmp_path, documents=documents)) == ["four\nfive", "one\n\ntwo", "three"]


def test_lines_that_are_not_utf8_are_refused_with_the_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\nb\xe9d\n")
    for documents in ("line", "block", "article"):
        with pytest.raises(ValueError, match=r"a\.txt: .*utf-8"):
            read_documents(tmp_path / "a.txt", documents=documents)


WIKITEXT = ROOT.parent / "shared" / "data" / "wiki.test.raw"


def make_wikitext(articles: int = 60) -> str:
    if WIKITEXT.exists():
        return WIKITEXT.read_bytes().decode()
    section = " \n = = Section = = \n \n Text = of the section = \n More text . \n = no heading = \n"
    return "".join(f" \n = Article {i} = \n \n Text . \n{section * (i % 4)}" for i in range(articles)) + " \n"


def is_title(line: str) -> bool:
    return line.startswith(" = ") and not line.startswith(" = =")


@pytest.mark.parametrize("batch_bytes", [100, 100_000, 8_000_000])
def test_wikitexts_articles_are_found_and_are_the_text_to_the_byte(tmp_path, monkeypatch, batch_bytes):
    monkeypatch.setattr("lib.documents.BATCH_BYTES", batch_bytes)
    (tmp_path / "wiki.test.raw").write_bytes(make_wikitext().encode())
    articles = read_documents(tmp_path / "wiki.test.raw", documents="article")
    assert len(articles) == 60
    assert "".join(articles) == make_wikitext()
    for article in articles:
        lines = article.split("\n")
        assert lines[0] == " "
        assert is_title(lines[1] + "\n")
    out = prepare(tmp_path / "wiki.test.raw", tmp_path / "out", documents="article", val_tokens=0)
    assert decode_shards(out) == articles


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["wiki.test.raw", "wiki.test.tokens"])
def test_wikitexts_articles_do_not_depend_on_the_line_ends(tmp_path, name, newline):
    (tmp_path / name).write_bytes("".join(ARTICLES).replace("\n", newline).encode())
    assert read_documents(tmp_path / name, documents="article") == ARTICLES


@pytest.mark.parametrize("batch_bytes", [1, 2, 3, 10**6])
def test_every_line_end_is_a_newline_in_every_format_and_batch(tmp_path, monkeypatch, batch_bytes):
    monkeypatch.setattr("lib.documents.BATCH_BYTES", batch_bytes)
    text = "\ufeff" + "a\r\nb\rc\nd\r\r\n\n\re\r"
    for name, data in {
        "a.txt": text.encode(), "b.txt": text.encode("utf-16-le"), "c.txt": text.encode("utf-32-be"),
        "d.jsonl": to_jsonl([text[1:]]).replace(b"\n", b"\r"), "e.parquet": to_parquet([text[1:], None]),
        "f.parquet": to_parquet(pa.array([text[1:]]).dictionary_encode()),
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(data)
    expected = "a\nb\nc\nd\n\n\n\ne\n"
    assert read_documents(tmp_path) == [expected] * 5 + ["", expected]
    lines = ["a", "b", "c", "d", "e"]
    assert read_documents(tmp_path / "b.txt", documents="line") == lines
    assert read_documents(tmp_path / "a.txt", documents="block") == ["a\nb\nc\nd", "e"]


@pytest.mark.parametrize("place", [0.21, 0.5, 0.83])
def test_wikitexts_rows_on_the_hub_are_the_same_articles(tmp_path, place):
    text = make_wikitext()
    lines = text.splitlines(keepends=True)
    cut = int(place * len(lines))
    while is_title(lines[cut - 1]) or is_title(lines[cut]) or is_title(lines[cut + 1]):
        cut += 1  # to the middle of an article
    for number, part in enumerate((lines[:cut], lines[cut:])):
        (tmp_path / f"{number}.parquet").write_bytes(to_wikitext(part))
    articles = join_batches(
        itertools.chain.from_iterable(read_wikitext(tmp_path / f"{n}.parquet") for n in range(2))
    )
    assert "".join(articles) == text
    assert len(articles) == 60


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
        articles = decode_shards(prepare(folder, folder / "out", **options))
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
    assert "".join(decode_shards(out)) == text


# -----------------------------------------------------------------------------
# compressed files


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize(
    ("name", "data"), [("a.txt", DOCUMENTS[2].encode() * 50), ("a.jsonl", to_jsonl(DOCUMENTS) * 9)]
)
def test_a_compressed_file_may_be_of_several_members(tmp_path, name, data, suffix):
    (tmp_path / name).write_bytes(data)
    expected = read_documents(tmp_path / name)
    cuts = [0, 5, 6, 7, 8, 9, 10, 100, len(data)]  # some inside a character
    members = [compress(data[begin:end], suffix) for begin, end in zip(cuts, cuts[1:])]
    (tmp_path / (name + suffix)).write_bytes(b"".join([*members, compress(b"", suffix)]))
    assert read_documents(tmp_path / (name + suffix)) == expected


@pytest.mark.parametrize(
    "name", ["a.txt.gz", "a.jsonl.gz", "a.parquet.gz", "a.txt.zst", "a.jsonl.zst", "a.parquet.zst"]
)
def test_a_compressed_file_that_was_cut_is_refused_with_its_name(tmp_path, name):
    text = "".join(map(chr, np.random.default_rng(0).integers(32, 127, 3000)))
    data = {"t": text.encode(), "j": to_jsonl([text]), "p": to_parquet([text])}[name[2]]
    whole = compress(data, name)
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
    (tmp_path / "a.parquet").write_bytes(to_parquet(pa.array(texts, kind), row_group_size=row_group_size))
    expected = [text or "" for text in texts]
    assert read_documents(tmp_path / "a.parquet") == expected
    out = prepare(tmp_path / "a.parquet", tmp_path / "out", val_tokens=0)
    ids = [id for text in expected for id in (50256, *tokenizer.encode(text))]
    assert read_stream(out).tolist() == ids


def test_parquet_with_nested_columns_and_without_rows_is_read(tmp_path):
    table = pa.table({"meta": [{"a": 1, "b": [1, 2]}] * 3, "text": ["one", "two", "three"]})
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "b.parquet")
    assert read_documents(tmp_path) == ["one", "two", "three"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_parquet_that_is_not_utf8_is_refused_with_its_name(tmp_path, kind):
    latin = pa.array([b"good", "naïve".encode("latin-1"), b"good"])
    texts = pa.Array.from_buffers(pa.string(), 3, latin.buffers()).cast(kind)
    (tmp_path / "a.parquet").write_bytes(to_parquet(texts))
    with pytest.raises(ValueError, match=r"a\.parquet: .*UTF8"):
        prepare(tmp_path / "a.parquet", tmp_path / "out")
    assert not shards.is_complete(tmp_path / "out")


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
