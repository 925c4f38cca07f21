"""Hostile text: every block of Unicode, broken bytes, archives that unpack to far more, deep nesting."""

import gzip
import json
import random
import resource

import numpy as np
import pytest
from corpora import compress, read_documents, to_parquet

from lib import documents, tokenizer

SURROGATES = range(0xD800, 0xE000)


@pytest.mark.fault(38)
def test_every_block_of_unicode_comes_back(tally):
    blocks = [start for start in range(0, 0x110000, 256) if start not in SURROGATES]
    random.Random(0).shuffle(blocks)
    unequal = 0
    for attempt in tally(400, len(blocks)):
        start = blocks[attempt.number]
        characters = [chr(code) for code in range(start, start + 256)]
        texts = ["".join(characters), " ".join(characters), "a".join(characters)]
        ids = tokenizer.encode_corpus(texts)
        ends = [*np.flatnonzero(ids == tokenizer.END_OF_TEXT), len(ids)]
        assert [tokenizer.decode(ids[a + 1 : b]) for a, b in zip(ends, ends[1:])] == texts, hex(start)
        unequal += any(tokenizer.encode(t) != [*ids[a + 1 : b]] for t, a, b in zip(texts, ends, ends[1:]))
    assert unequal <= 40  # blocks with letters of Unicode 17, which tiktoken does not know


@pytest.mark.fault(38)
def test_bytes_are_read_right_or_refused_by_name(tmp_path, tally):
    for attempt in tally(200, 2000):
        draw = random.Random(attempt.number)
        text = "".join(chr(draw.choice([10, 32, 65, 233, 8238, 0x65E5, 0x1F642])) for _ in range(50))
        data = bytearray(text.encode())
        for _ in range(draw.randrange(4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path = tmp_path / "text.txt"
        path.write_bytes(data)
        try:
            expected = data.decode().replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError:
            with pytest.raises(ValueError, match=rf"{path}: line \d+: byte 0x"):
                read_documents(path)
        else:
            assert "".join(read_documents(path)).strip() == expected.strip()


BOMBS = {
    "zeros.txt.gz": b"\0" * 100_000_000,
    "blanks.txt.zst": b" " * 100_000_000,
    "newlines.txt": b"\n" * 100_000_000,
    "word.jsonl.gz": b'{"text": "' + b"a" * 100_000_000 + b'"}\n',
    "word.parquet": to_parquet(["", None, "a" * 100_000_000]),
}


@pytest.mark.slow
@pytest.mark.fault(38)
@pytest.mark.parametrize("name", BOMBS)
def test_a_text_that_would_take_all_memory_is_refused_by_name(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(compress(BOMBS[name], name))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=rf"{path}: a document has 16,000,000 characters without a change"):
        for batch in documents.read_file(path):
            tokenizer.encode_corpus(batch.texts, batch.continues)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700_000  # kB


@pytest.mark.fault(38)
def test_an_endless_line_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_LINE", 1000)
    monkeypatch.setattr(documents, "BATCH_BYTES", 300)
    path = tmp_path / "line.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"text": "a b " * 1000}).encode()))
    with pytest.raises(ValueError, match=rf"{path}: a line has more than 1,000 characters"):
        read_documents(path)


@pytest.mark.fault(38)
def test_deep_nesting_is_refused_by_name(tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_text('{"text": "a"}\n{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{path}: line 2: .*recursion"):
        read_documents(path)
