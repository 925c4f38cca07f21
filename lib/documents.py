"""Reads documents from text files of many formats, in batches.

    for batch in documents.read_file(Path("corpus.parquet")):
        batch.texts                             # list[str], or from parquet an Arrow array
    list(documents.read_pydocs())               # prose that is on every machine

Formats: .txt .md .raw .jsonl .parquet, each also .gz or .zst. A batch has a few MB of text, so memory stays
bounded; a long text file spans several batches. On disk: nothing.
"""

import codecs
import contextlib
import gzip
import io
import json
import random
import re
import shutil
import sysconfig
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from lib import files

Unit = Literal["auto", "file", "line", "block", "article"]  # one document of a text file

SUFFIXES = (".txt", ".md", ".raw", ".jsonl", ".parquet")
COMPRESSED = (".gz", ".zst")
BATCH_BYTES = 8_000_000  # of text per batch


class Batch(NamedTuple):
    texts: Any  # list[str] or pyarrow.Array
    continues: bool = False  # the first text continues the previous batch's last document
    position: int = 0  # bytes of the file that have been read


def read_file(path: Path, unit: Unit = "auto", text_field: str = "text") -> Iterator[Batch]:
    """Yields the documents of a local file. Raises ValueError with the file (and in .jsonl the line) if it is
    not valid UTF-8, JSON or parquet, or lacks the text field."""
    try:
        with open_text(path) as (stream, raw):
            kind = Path(path.name.removesuffix(".gz").removesuffix(".zst")).suffix
            if kind == ".parquet":
                yield from batch_parquet(stream, path.stat().st_size, text_field)
            elif kind == ".jsonl":
                yield from batch_documents(read_jsonl_rows(stream, text_field), raw)
            elif unit == "line":
                lines = (line.rstrip("\r\n") for line in decode_lines(stream))
                yield from batch_documents((line for line in lines if line.strip()), raw)
            elif unit == "block":
                yield from batch_documents(split_blocks(decode_lines(stream)), raw)
            elif unit == "article":
                yield from batch_articles(decode_lines(stream), raw)
            else:
                yield from cut_text(stream, raw)
    except (ValueError, AttributeError, RecursionError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from error


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Yields the file's decompressed stream, and the file itself, whose position is the progress."""
    with open(path, "rb") as raw:
        if path.suffix == ".gz":
            yield gzip.open(raw), raw  # type: ignore[misc]
        elif path.suffix == ".zst":
            import pyarrow as pa

            yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), "zstd")), raw  # type: ignore
        else:
            yield raw, raw


def batch_documents(documents: Iterable[str], raw: BinaryIO | None = None) -> Iterator[Batch]:
    """Groups documents into batches of about BATCH_BYTES characters."""
    texts, size = [], 0
    for document in documents:
        texts.append(document)
        size += len(document)
        if size >= BATCH_BYTES:
            yield Batch(texts, False, raw.tell() if raw else 0)
            texts, size = [], 0
    if texts:
        yield Batch(texts, False, raw.tell() if raw else 0)


def read_jsonl_rows(stream: BinaryIO, text_field: str) -> Iterator[str]:
    """Yields the text of each row. Raises ValueError with the line's number."""
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                yield extract_text(json.loads(line), text_field)
            except (ValueError, AttributeError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from error


def extract_text(row: dict, text_field: str) -> str:
    """Returns the row's text. Raises ValueError if the field is missing or is not a string."""
    if row.get(text_field, "") is None:  # a null is an empty document, as in parquet
        return ""
    if not isinstance(row.get(text_field), str):
        raise ValueError(
            f"no text under {text_field!r}; the fields are {', '.join(row)} (choose with --text-field)"
        )
    return row[text_field]


def batch_parquet(stream: BinaryIO, size: int, text_field: str) -> Iterator[Batch]:
    """Yields the text column as Arrow arrays of a few MB, without one Python object per document."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not isinstance(stream, io.BufferedReader) or not stream.seekable():  # compressed: parquet must seek
        unpacked = tempfile.TemporaryFile()
        shutil.copyfileobj(stream, unpacked)
        stream = unpacked  # type: ignore[assignment]
    file = pq.ParquetFile(stream, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True)
    columns = file.schema_arrow.names
    if text_field not in columns:
        raise ValueError(f"no column {text_field!r}; it has {', '.join(columns)} (choose with --text-field)")
    kind = file.schema_arrow.field(text_field).type
    text_types = (pa.string(), pa.large_string(), pa.string_view())
    if (kind.value_type if pa.types.is_dictionary(kind) else kind) not in text_types:
        raise ValueError(f"column {text_field!r} is {kind}, not text (choose with --text-field)")
    leaf = columns.index(text_field) if file.metadata.num_columns == len(columns) else None
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    sizes = [g.total_byte_size if leaf is None else g.column(leaf).total_uncompressed_size for g in groups]
    rows = file.metadata.num_rows
    # At most 2,000 rows, because a file with repeated texts unpacks to more than it says.
    at_once, done = max(1, min(2000, BATCH_BYTES * rows // max(1, sum(sizes)))), 0
    for batch in file.iter_batches(batch_size=at_once, columns=[text_field]):
        texts = batch.column(0)
        texts.validate(full=True)  # UTF-8
        done += len(texts)
        yield Batch(texts, False, size * done // rows)


def decode_lines(stream: BinaryIO) -> Iterator[str]:
    """Yields the lines with their ends. Only a newline ends a line."""
    for number, line in enumerate(stream):
        yield line.decode("utf-8-sig" if number == 0 else "utf-8")


def split_blocks(lines: Iterable[str]) -> Iterator[str]:
    """Yields the blocks that blank lines separate."""
    for blank, block in groupby(lines, lambda line: not line.strip()):
        if not blank:
            yield "".join(block).rstrip("\r\n")


def batch_articles(lines: Iterable[str], raw: BinaryIO | None = None) -> Iterator[Batch]:
    """Batches WikiText's articles. An article begins with the blank line before its first-level heading,
    " = Title = ". The articles concatenate to the text, byte for byte. A file may begin inside an article."""
    title = re.compile(r" = [^=].* = \n")

    def articles() -> Iterator[str]:
        article: list[str] = []
        for line in lines:
            between_blanks = len(article) > 2 and not article[-2].strip() and not line.strip()
            if between_blanks and title.fullmatch(article[-1]):
                yield "".join(article[:-2])
                article = article[-2:]
            article.append(line)
        yield "".join(article)

    begins = True
    for batch in batch_documents(articles(), raw):
        if begins:
            begins = title.match(batch.texts[0].removeprefix(" \n")) is not None
        yield batch._replace(continues=not begins)
        begins = True


def cut_text(stream: BinaryIO, raw: BinaryIO) -> Iterator[Batch]:
    """Cuts a text file, which is one document, into batches of a few MB. A cut lies before a blank that
    follows a non-blank: there GPT-2's tokenizer always begins a new word (tokenizer.SPLIT_PATTERN). A text
    without blanks stays whole."""
    decoder, rest, continues = codecs.getincrementaldecoder("utf-8-sig")(), "", False
    while data := stream.read(BATCH_BYTES):
        text = rest + decoder.decode(data)
        found = re.match(r"(?s).*\S(?=[ \n])", text)
        cut = found.end() if found else 0
        if cut:
            yield Batch([text[:cut]], continues, raw.tell())
            continues = True
        rest = text[cut:]
    yield Batch([rest + decoder.decode(b"", final=True)], continues, raw.tell())


def read_wikitext(path: Path) -> Iterator[Batch]:
    """Yields the articles of one of WikiText's parquet files. A row there is a line; an empty row stands for
    the original's blank line, " "."""
    rows = (text for batch in read_file(path) for text in batch.texts.to_pylist())
    yield from batch_articles(row or " \n" for row in rows)


def is_readable(name: str) -> bool:
    return name.removesuffix(".gz").removesuffix(".zst").endswith(SUFFIXES)


# -----------------------------------------------------------------------------
# pydocs: English prose that every installation of this project already has


def list_pinned_packages() -> list[str]:
    """Returns the names of the packages in requirements.txt."""
    requirements = (files.ROOT / "requirements.txt").read_text(encoding="utf-8")
    return sorted(set(re.findall(r"^([A-Za-z0-9_-]+)==", requirements, flags=re.MULTILINE)))


def read_pydocs() -> Iterator[str]:
    """Yields the prose in docstrings of Python and of requirements.txt's packages, one document per file.

    Code, tables, examples and lists are left out. GPT-2's tokenizer spends a token on each blank of an
    indentation, so a small model would learn mostly blanks. A fixed seed shuffles the files: the validation
    split, the first tenth, then samples all packages.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = [(str(p.relative_to(stdlib)), p) for p in stdlib.rglob("*.py") if "site-packages" not in p.parts]
    for package in list_pinned_packages():
        distribution = metadata.distribution(package)
        files += [(str(p), Path(str(distribution.locate_file(p)))) for p in distribution.files or []]
    files = [(name, path) for name, path in sorted(files) if name.endswith(".py") and "test" not in name]
    random.Random(0).shuffle(files)
    seen: set[str] = set()
    for _, path in files:
        source = path.read_text(encoding="utf-8", errors="ignore")
        docstrings = re.findall(r'"""(.*?)"""', source, flags=re.DOTALL)
        prose = [text for doc in docstrings for text in extract_prose(doc) if text not in seen]
        seen.update(prose)
        if prose:
            yield "\n\n".join(dict.fromkeys(prose))


def extract_prose(docstring: str) -> Iterator[str]:
    """Yields a docstring's paragraphs of prose, each as one line. Prose is whole sentences, evenly indented,
    nine tenths letters, without markup or code."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        lines = paragraph.strip("\n").split("\n")
        indents = {len(line) - len(line.lstrip()) for line in lines[1:]}
        text = " ".join(line.strip() for line in lines).strip()
        letters = sum(c.isalpha() or c == " " for c in text)
        if (
            len(indents) <= 1
            and len(text) >= 60
            and text[0].isupper()
            and text.endswith((".", "?", "!"))
            and letters >= 0.9 * len(text)
            and not re.search(r">>>|::|\\|  |=|[{}|<>_`]{2}|\.\. ", text)
        ):
            yield text
