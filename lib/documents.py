"""Text in files of many kinds, read as batches of documents.

    for batch in documents.read_file(Path("corpus.parquet")):
        batch.texts                             # list[str], or from parquet an Arrow array
    list(documents.pydocs())                    # prose that is on every machine

.txt .md .raw .jsonl .parquet, each also .gz or .zst. Memory stays bounded: a batch has a few MB of text, and
a text file that is one long document comes in pieces.
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

Unit = Literal["auto", "file", "line", "block", "article"]  # what is one document in a text file

SUFFIXES = (".txt", ".md", ".raw", ".jsonl", ".parquet")
COMPRESSED = (".gz", ".zst")
BATCH_BYTES = 8_000_000  # of text that is tokenized at a time


class Batch(NamedTuple):
    texts: Any  # list[str] or pyarrow.Array
    continues: bool = False  # the first text goes on with the document before it
    position: int = 0  # bytes of the file that have been read


def read_file(path: Path, unit: Unit = "auto", text_field: str = "text") -> Iterator[Batch]:
    """The documents of a local file. Raises ValueError, naming the file (and in .jsonl the line), for what is
    not UTF-8, JSON or parquet, or lacks the text field."""
    try:
        with opened(path) as (stream, raw):
            kind = Path(path.name.removesuffix(".gz").removesuffix(".zst")).suffix
            if kind == ".parquet":
                yield from parquet_batches(stream, path.stat().st_size, text_field)
            elif kind == ".jsonl":
                yield from in_batches(rows_of_jsonl(stream, text_field), raw)
            elif unit == "line":
                lines = (line.rstrip("\r\n") for line in decoded_lines(stream))
                yield from in_batches((line for line in lines if line.strip()), raw)
            elif unit == "block":
                yield from in_batches(blocks(decoded_lines(stream)), raw)
            elif unit == "article":
                yield from article_batches(decoded_lines(stream), raw)
            else:
                yield from pieces(stream, raw)
    except (ValueError, AttributeError, RecursionError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from error


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file's bytes, decompressed, and the file itself, of which the position tells the progress."""
    with open(path, "rb") as raw:
        if path.suffix == ".gz":
            yield gzip.open(raw), raw  # type: ignore[misc]
        elif path.suffix == ".zst":
            import pyarrow as pa

            yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), "zstd")), raw  # type: ignore
        else:
            yield raw, raw


def in_batches(documents: Iterable[str], raw: BinaryIO | None = None) -> Iterator[Batch]:
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


def rows_of_jsonl(stream: BinaryIO, text_field: str) -> Iterator[str]:
    """The text of each line. Raises ValueError, naming the line."""
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                yield text_of(json.loads(line), text_field)
            except (ValueError, AttributeError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from error


def text_of(row: dict, text_field: str) -> str:
    if row.get(text_field, "") is None:  # a null is an empty document, as in parquet
        return ""
    if not isinstance(row.get(text_field), str):
        raise ValueError(
            f"no text under {text_field!r}; the fields are {', '.join(row)} (choose with --text-field)"
        )
    return row[text_field]


def parquet_batches(stream: BinaryIO, size: int, text_field: str) -> Iterator[Batch]:
    """Arrow arrays of the text column, a few MB at a time, without a Python object a document."""
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
    if (kind.value_type if pa.types.is_dictionary(kind) else kind) not in (
        pa.string(),
        pa.large_string(),
        pa.string_view(),
    ):
        raise ValueError(f"column {text_field!r} is {kind}, not text (choose with --text-field)")
    leaf = columns.index(text_field) if file.metadata.num_columns == len(columns) else None
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    text_bytes = sum(
        g.total_byte_size if leaf is None else g.column(leaf).total_uncompressed_size for g in groups
    )
    rows = file.metadata.num_rows
    # At most 2,000 rows, because a file with repeated texts unpacks to more than it says.
    at_once, done = max(1, min(2000, BATCH_BYTES * rows // max(1, text_bytes))), 0
    for batch in file.iter_batches(batch_size=at_once, columns=[text_field]):
        texts = batch.column(0)
        texts.validate(full=True)  # UTF-8
        done += len(texts)
        yield Batch(texts, False, size * done // rows)


def decoded_lines(stream: BinaryIO) -> Iterator[str]:
    """Lines with their ends; only a newline ends one."""
    for number, line in enumerate(stream):
        yield line.decode("utf-8-sig" if number == 0 else "utf-8")


def blocks(lines: Iterable[str]) -> Iterator[str]:
    """What stands between blank lines."""
    for blank, block in groupby(lines, lambda line: not line.strip()):
        if not blank:
            yield "".join(block).rstrip("\r\n")


def article_batches(lines: Iterable[str], raw: BinaryIO | None = None) -> Iterator[Batch]:
    """WikiText's articles: from a heading of the first level, " = Title = ", and the blank line before it, up
    to the next. Together they are the text, to the byte. A file may begin inside an article."""
    title = re.compile(r" = [^=].* = \n")

    def articles() -> Iterator[str]:
        article: list[str] = []
        for line in lines:
            if (
                not line.strip()
                and len(article) > 2
                and not article[-2].strip()
                and title.fullmatch(article[-1])
            ):
                yield "".join(article[:-2])
                article = article[-2:]
            article.append(line)
        yield "".join(article)

    begins = True
    for batch in in_batches(articles(), raw):
        if begins:
            begins = title.match(batch.texts[0].removeprefix(" \n")) is not None
        yield batch._replace(continues=not begins)
        begins = True


def pieces(stream: BinaryIO, raw: BinaryIO) -> Iterator[Batch]:
    """A text file as one document, a few MB at a time, cut before a blank that follows something else: there
    GPT-2's tokenizer begins a new word whatever comes before and after (tokenizer.SPLIT_PATTERN). A text
    without blanks stays in one piece."""
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
    """The articles of one of WikiText's parquet files, in which a row is a line, and an empty one stands for
    the blank line " " of the original text."""
    rows = (text for batch in read_file(path) for text in batch.texts.to_pylist())
    yield from article_batches(row or " \n" for row in rows)


def is_readable(name: str) -> bool:
    return name.removesuffix(".gz").removesuffix(".zst").endswith(SUFFIXES)


# -----------------------------------------------------------------------------
# pydocs: English prose that every installation of this project already has


def pinned_packages() -> list[str]:
    """The packages in requirements.txt."""
    requirements = (files.ROOT / "requirements.txt").read_text(encoding="utf-8")
    return sorted(set(re.findall(r"^([A-Za-z0-9_-]+)==", requirements, flags=re.MULTILINE)))


def pydocs() -> Iterator[str]:
    """The prose of the docstrings of Python and of the packages in requirements.txt: a document a source
    file.

    Code, tables, examples and lists are left out: GPT-2's tokenizer spends a token on each blank of an
    indentation, and a small model would learn little but blanks. Files come in an order shuffled by a fixed
    seed, so that the validation split, the first tenth, is a sample of all packages.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = [(str(p.relative_to(stdlib)), p) for p in stdlib.rglob("*.py") if "site-packages" not in p.parts]
    for package in pinned_packages():
        distribution = metadata.distribution(package)
        files += [(str(p), Path(str(distribution.locate_file(p)))) for p in distribution.files or []]
    files = [(name, path) for name, path in sorted(files) if name.endswith(".py") and "test" not in name]
    random.Random(0).shuffle(files)
    seen: set[str] = set()
    for _, path in files:
        source = path.read_text(encoding="utf-8", errors="ignore")
        docstrings = re.findall(r'"""(.*?)"""', source, flags=re.DOTALL)
        prose = [text for doc in docstrings for text in prose_paragraphs(doc) if text not in seen]
        seen.update(prose)
        if prose:
            yield "\n\n".join(dict.fromkeys(prose))


def prose_paragraphs(docstring: str) -> Iterator[str]:
    """The paragraphs of a docstring that are prose, each as one line: whole sentences, evenly indented, nine
    tenths letters, without markup or code."""
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
