"""Reads documents from text files of many formats, in batches.

    for batch in documents.read_file(Path("corpus.parquet")):
        batch.texts                             # list[str], or from parquet an Arrow array
    list(documents.read_pydocs())               # prose that is on every machine

Formats: .txt .md .raw .tokens .jsonl .parquet, each also .gz or .zst, in UTF-8 or with a byte order mark.
Every line end (CRLF, CR) is read as a newline, in rows of .jsonl and .parquet, too. So the same text has the
same tokens in every format. A batch has a few MB of text: memory stays bounded. On disk: nothing.
"""

import codecs
import contextlib
import gzip
import hashlib
import io
import json
import random
import re
import shlex
import shutil
import sysconfig
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from importlib import metadata
from itertools import groupby
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from lib import files

Unit = Literal["auto", "file", "line", "block", "article"]  # one document of a text file

SUFFIXES = (".txt", ".md", ".raw", ".tokens", ".jsonl", ".parquet")
COMPRESSED = {".gz": "gzip -dc", ".zst": "zstd -dc"}  # and the command that unpacks it
BATCH_BYTES = 8_000_000  # of text per batch
# More than this is no text, but would take all memory: a few kB of gzip hold it. The tokenizer takes a run of
# one kind of characters as one word, and 26 bytes of memory for each.
LONGEST_LINE = 256_000_000  # characters
LONGEST_RUN = 16_000_000  # characters of which all are blank, or none is
# UTF-32's little-endian mark begins with UTF-16's.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    **{codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be"},
    **{codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"},
}


class Batch(NamedTuple):
    texts: Any  # list[str] or pyarrow.Array
    continues: bool = False  # the first text continues the previous batch's last document
    position: int = 0  # bytes of the file that have been read


def read_file(path: Path, unit: Unit = "auto", text_field: str = "text") -> Iterator[Batch]:
    """Yields the documents of a local file; a file without text has none. Raises ValueError with the file
    (and the line, if it has lines) if it is not valid text, JSON or parquet, or lacks the text field."""
    kind = find_kind(path.name)
    with open_file(path) as (stream, raw):
        if kind == ".parquet":
            yield from batch_parquet(stream, path.stat().st_size, text_field)
            return
        text = decode_text(stream, path)
        if kind == ".jsonl":
            yield from batch_documents(read_jsonl_rows(split_lines(text), text_field), raw)
        elif unit == "line":
            lines = (line.rstrip("\n") for line in split_lines(text))
            yield from batch_documents((line for line in lines if line.strip()), raw)
        elif unit == "block":
            yield from batch_documents(split_blocks(split_lines(text)), raw)
        elif unit == "article":
            yield from batch_articles(split_lines(text), raw)
        else:
            yield from cut_text(text, raw)


def read_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a text file, with a newline at their ends."""
    with open_file(path) as (stream, _):
        yield from split_lines(decode_text(stream, path))


def read_text(path: Path) -> str:
    """Returns the text of a file. Raises ValueError if it holds several documents."""
    batches = list(read_file(path))
    found = sum(len(batch.texts) - batch.continues for batch in batches)
    if found > 1:
        raise ValueError(f"{path} holds {found:,} documents; it must hold one")
    texts = [batch.texts if isinstance(batch.texts, list) else batch.texts.to_pylist() for batch in batches]
    return "".join(text or "" for some in texts for text in some)


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Yields the file's decompressed stream, and the file itself, whose position is the progress. Names the
    file in the block's errors."""
    with open(path, "rb") as raw:
        try:
            if path.suffix.lower() == ".gz":
                yield gzip.open(raw), raw  # type: ignore[misc]
            elif path.suffix.lower() == ".zst":
                import pyarrow as pa

                unpacked = pa.CompressedInputStream(pa.PythonFile(raw), "zstd")
                yield io.BufferedReader(unpacked), raw  # type: ignore[misc]
            else:
                yield raw, raw
        except (ValueError, RecursionError, OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: {error}") from error


def decode_text(stream: BinaryIO, path: Path) -> Iterator[str]:
    """Yields a text in pieces. UTF-8 is assumed unless a byte order mark says UTF-16 or UTF-32. Every line
    end, CRLF and CR too, becomes a newline. Raises ValueError, with the line and the fix, for other bytes."""
    data, line = stream.read(max(4, BATCH_BYTES)), 1
    mark = next((mark for mark in BYTE_ORDER_MARKS if data.startswith(mark)), b"")
    decoder = codecs.getincrementaldecoder(BYTE_ORDER_MARKS.get(mark, "utf-8"))()
    decoder = io.IncrementalNewlineDecoder(decoder, translate=True)
    unpack = COMPRESSED.get(path.suffix.lower(), "cat")
    fix = f"convert it, for example: {unpack} {shlex.quote(str(path))} | iconv -t utf-8 -f {{}} > utf8.txt"
    few, many = sorted((data[::2].count(0), data[1::2].count(0)))  # UTF-16 of English has zeros at one side
    if not mark and 4 * many > len(data) and 2 * few <= many:
        origin = f"utf-{32 if 2 * data.count(0) > len(data) else 16}"
        origin += "le" if data[1::2].count(0) == many else "be"
        raise ValueError(f"it looks like {origin} without a byte order mark; {fix.format(origin)}")
    while True:
        try:
            text = decoder.decode(data[len(mark) :], final=not data)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            origin = "windows-1252" if re.search(rb"[\x80-\x9f]", error.object) else "latin1"
            reason = f"line {line}: byte 0x{error.object[error.start]:02x} is not {error.encoding}"
            is_text = not re.search(rb"[\x00-\x08\x0e-\x1f]", error.object)
            advice = fix.format(origin) if is_text else "it is no text, or in an encoding of two bytes"
            raise ValueError(f"{reason} ({error.reason}); {advice}") from error
        yield text
        line += text.count("\n")
        if not data:
            return
        data, mark = stream.read(BATCH_BYTES), b""


def split_lines(pieces: Iterable[str]) -> Iterator[str]:
    """Yields the lines with their ends. Only a newline ends a line. Raises ValueError for endless lines."""
    begun: list[str] = []
    for piece in pieces:
        if sum(map(len, begun)) > LONGEST_LINE:
            raise ValueError(f"a line has more than {LONGEST_LINE:,} characters; it is no text, or break it")
        *lines, rest = piece.split("\n")
        for line in lines:
            yield "".join([*begun, line, "\n"])
            begun.clear()
        begun.append(rest)
    if last := "".join(begun):
        yield last


def unify_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def batch_documents(documents: Iterable[str], raw: BinaryIO | None = None) -> Iterator[Batch]:
    """Groups documents into batches of about BATCH_BYTES characters."""
    texts, size = [], 0
    for document in documents:
        check_runs(document)
        texts.append(document)
        size += len(document)
        if size >= BATCH_BYTES:
            yield Batch(texts, False, raw.tell() if raw else 0)
            texts, size = [], 0
    if texts:
        yield Batch(texts, False, raw.tell() if raw else 0)


def check_runs(text: str):
    """Raises ValueError if a run of blanks, or of others, is too long for the tokenizer's memory."""
    if len(text) > LONGEST_RUN and (run := re.search(rf"\S{{{LONGEST_RUN}}}|\s{{{LONGEST_RUN}}}", text)):
        what = f"{LONGEST_RUN:,} characters without a change between blanks and others, {run[0][:20]!r} ..."
        raise ValueError(f"a document has {what}; it is no text: leave it out, or break it")


def read_jsonl_rows(lines: Iterable[str], text_field: str) -> Iterator[str]:
    """Yields the text of each row. Raises ValueError with the line's number."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield extract_text(json.loads(line), text_field)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from error


def extract_text(row: Any, text_field: str) -> str:
    """Returns the row's text. Raises ValueError if the field is missing or is not a string."""
    if not isinstance(row, dict):
        raise ValueError(f"the row is {row!r:.60}; it must be an object, such as {{{text_field!r}: ...}}")
    if text_field not in row:
        fields = ", ".join(map(str, row))
        raise ValueError(f"no field {text_field!r}; it has {fields} (fineweb.py --text-field chooses one)")
    if (text := row[text_field]) is None:  # a null is an empty document, as in parquet
        return ""
    if not isinstance(text, str):
        raise ValueError(
            f"the field {text_field!r} is {text!r:.60}, not text (fineweb.py --text-field chooses another)"
        )
    return unify_line_ends(text)


def batch_parquet(stream: BinaryIO, size: int, text_field: str) -> Iterator[Batch]:
    """Yields the text column as Arrow arrays of a few MB, without one Python object per document."""
    import pyarrow as pa
    import pyarrow.compute
    import pyarrow.parquet as pq

    pc: Any = pyarrow.compute

    if not isinstance(stream, io.BufferedReader) or not stream.seekable():  # compressed: parquet must seek
        unpacked = tempfile.TemporaryFile()
        shutil.copyfileobj(stream, unpacked)
        stream = unpacked  # type: ignore[assignment]
    file = pq.ParquetFile(stream, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True)
    columns = file.schema_arrow.names
    if columns.count(text_field) != 1:
        how_many = "several columns" if text_field in columns else "no column"
        raise ValueError(
            f"{how_many} {text_field!r}; it has {', '.join(columns)} (fineweb.py --text-field chooses one)"
        )
    kind = file.schema_arrow.field(text_field).type
    text_types = (pa.string(), pa.large_string(), pa.string_view())
    if (kind.value_type if pa.types.is_dictionary(kind) else kind) not in text_types:
        raise ValueError(
            f"column {text_field!r} is {kind}, not text (fineweb.py --text-field chooses another)"
        )
    leaf = columns.index(text_field) if file.metadata.num_columns == len(columns) else None
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    sizes = [g.total_byte_size if leaf is None else g.column(leaf).total_uncompressed_size for g in groups]
    rows = file.metadata.num_rows
    # At most 2,000 rows, because a file with repeated texts unpacks to more than it says.
    at_once, done = max(1, min(2000, BATCH_BYTES * rows // max(1, sum(sizes)))), 0
    for batch in file.iter_batches(batch_size=at_once, columns=[text_field]):
        texts = batch.column(0)
        texts.validate(full=True)  # UTF-8
        texts = texts.cast(pa.large_string())
        for text in texts.filter(pc.greater(pc.binary_length(texts), LONGEST_RUN)).to_pylist():
            check_runs(text)
        characters = np.frombuffer(texts.buffers()[2] or b"", dtype=np.uint8)
        if (characters == ord("\r")).any():  # a look at the bytes costs a fifth of match_substring
            texts = pc.replace_substring(pc.replace_substring(texts, "\r\n", "\n"), "\r", "\n")
        done += len(texts)
        yield Batch(texts, False, size * done // rows)


def split_blocks(lines: Iterable[str]) -> Iterator[str]:
    """Yields the blocks that blank lines separate."""
    for blank, block in groupby(lines, lambda line: not line.strip()):
        if not blank:
            yield "".join(block).rstrip("\n")


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


def cut_text(pieces: Iterable[str], raw: BinaryIO) -> Iterator[Batch]:
    """Batches the pieces of a text file, which is one document. A cut lies before a blank that follows a
    non-blank: there GPT-2's tokenizer always begins a new word (tokenizer.SPLIT_PATTERN). A text without
    blanks stays whole."""
    rest, continues = "", False
    for piece in pieces:
        text = rest + piece
        found = re.match(r"(?s).*\S(?=[ \n])", text)
        cut = found.end() if found else 0
        if cut:
            yield Batch([text[:cut]], continues, raw.tell())
            continues = True
        rest = text[cut:]
        check_runs(rest)
    if rest:
        yield Batch([rest], continues, raw.tell())


def read_wikitext(path: Path) -> Iterator[Batch]:
    """Yields the articles of one of WikiText's parquet files. A row there is a line; an empty row stands for
    the original's blank line, " "."""
    rows = (text for batch in read_file(path) for text in batch.texts.to_pylist())
    yield from batch_articles(row or " \n" for row in rows)


def find_kind(name: str) -> str:
    """Returns the file's suffix in lower case, without a suffix of compression."""
    path = PurePath(name.lower())
    return PurePath(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def is_readable(name: str) -> bool:
    return find_kind(name) in SUFFIXES


def is_empty(path: Path) -> bool:
    """Tells whether a file holds no bytes once it is unpacked. Raises ValueError or OSError if it cannot be
    read."""
    with open_file(path) as (stream, _):
        return not stream.read(1)


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
    split, the first tenth, then samples all packages. A repeated paragraph stays in its first file. So all
    repeated ones are for validation, which is easier than training (5.2 and 5.5 nats for a bigram model).
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


def hash_name(name: str) -> str:
    """Returns a hash of a file's name or relative path. Files in the order of their hashes are in a random
    order that is the same on every machine."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


def extract_prose(docstring: str) -> Iterator[str]:
    """Yields a docstring's paragraphs of prose, each as one line. Prose is whole sentences, evenly indented,
    nine tenths letters, without markup or code."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        lines = paragraph.strip("\n").split("\n")
        indents = {len(line) - len(line.lstrip()) for line in lines[1:]}
        text = " ".join(line.strip() for line in lines).strip()
        if (
            len(indents) <= 1
            and len(text) >= 60
            and text[0].isupper()
            and text.endswith((".", "?", "!"))
            and not re.search(r">>>|::|\\|  |=|[{}|<>_`]{2}|\.\. ", text)
            and sum(c.isalpha() or c == " " for c in text) >= 0.9 * len(text)  # last, because it is slow
        ):
            yield text
