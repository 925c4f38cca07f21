"""Stage 1: text of any origin to GPT-2 token shards.

    python fineweb.py                              # FineWeb-Edu, the 10-billion-token sample
    python fineweb.py --source pydocs              # prose of the installed Python packages; no network
    python fineweb.py --source book.txt            # your .txt, .jsonl or .parquet; also a folder or a glob
    python fineweb.py --source hf:org/name --text-field text
    python fineweb.py --source pydocs --verify     # read every byte back; --inspect to look inside

On disk: data/<name>/<name>_{val,train}_000000.npy and manifest.json (format: shards.py). The FineWeb-Edu
sample makes 10 billion tokens (huggingface.co/datasets/HuggingFaceFW/fineweb-edu), 100 shards of 200 MB.
"""

import contextlib
import glob
import gzip
import json
import random
import re
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

import shards
import tokenizer

HUB_SOURCES = {"fineweb-edu-10BT": ("HuggingFaceFW/fineweb-edu", "sample-10BT")}
SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Config:
    source: str = "fineweb-edu-10BT"
    """What to tokenize: fineweb-edu-10BT, pydocs, hf:org/name, or a .txt (one document), .jsonl or .parquet
    file (one document a row; text files also .gz), a folder or a glob of these."""
    name: str = ""
    """Name of the data set; by default the source's."""
    out_dir: str = ""
    """Where the shards go; by default data/<name> beside this script."""
    shard_tokens: int = 100_000_000
    """Tokens a shard."""
    val_tokens: int | None = None
    """Tokens set aside for validation, from the start; by default 10,485,760, or a tenth of a smaller
    corpus."""
    text_field: str = "text"
    """Column (parquet, hf:) or key (jsonl) that holds the text."""
    config: str = ""
    """hf: sources only: the data set's configuration."""
    split: str = "train"
    """hf: sources only: the split to read."""
    workers: int = 0
    """Tokenizing threads; 0 for all cores. The shards do not depend on it."""
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = field(default=False)
    """Write nothing: read the shards back and compare every byte with the manifest."""
    inspect: Annotated[bool, tyro.conf.FlagCreatePairsOff] = field(default=False)
    """Write nothing: print what is in the shards."""

    @property
    def dataset_name(self) -> str:
        stem = Path(self.source).name.split(".")[0] if not self.source.startswith("hf:") else self.source[3:]
        name = self.name or re.sub(r"[^A-Za-z0-9.-]+", "-", stem).strip("-.") or "text"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(
                f"--name is {name!r}; use letters, digits, '.', '_' and '-', beginning with a letter"
            )
        return name

    @property
    def folder(self) -> Path:
        return (
            Path(self.out_dir)
            if self.out_dir
            else Path(__file__).resolve().parent / "data" / self.dataset_name
        )


def documents(cfg: Config) -> tuple[Iterable[str], dict]:
    """The source's documents, in a fixed order, and what the manifest says of their origin."""
    if cfg.source == "pydocs":
        return pydocs(), {"source": "pydocs", "revision": f"Python {sys.version.split()[0]}"}
    if cfg.source in HUB_SOURCES or cfg.source.startswith("hf:"):
        repo, config = HUB_SOURCES.get(cfg.source, (cfg.source.removeprefix("hf:"), cfg.config))
        return hub_documents(repo, config, cfg.split, cfg.text_field)
    files = local_files(cfg.source)
    return local_documents(files, cfg.text_field), {"source": cfg.source, "revision": f"{len(files)} files"}


def local_files(source: str) -> list[Path]:
    """The files that a path or glob names, sorted. Raises FileNotFoundError or ValueError if none can be
    read."""
    path = Path(source).expanduser()
    found = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    found = found or [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
    if not found:
        raise FileNotFoundError(
            f"--source {source!r} is no file, folder or glob here, "
            f"nor one of {', '.join(HUB_SOURCES)}, pydocs, hf:org/name"
        )
    files = [p for p in found if p.is_file() and p.name.removesuffix(".gz").endswith(SUFFIXES)]
    if not files:
        raise ValueError(
            f"--source {source!r} has no file that ends in {', '.join(SUFFIXES)} (or .txt.gz, .jsonl.gz)"
        )
    return files


def local_documents(files: list[Path], text_field: str) -> Iterator[str]:
    """The documents of local files: a .txt is one; a .jsonl line or a .parquet row is one each.

    Raises ValueError naming file and line for what is not UTF-8, JSON, or lacks the text field.
    """
    for path in files:
        if path.suffix == ".parquet":
            yield from parquet_documents(path, text_field)
            continue
        where = str(path)
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as f:
            try:
                if path.name.removesuffix(".gz").endswith(".txt"):
                    yield f.read().decode("utf-8-sig")
                    continue
                for number, line in enumerate(f, 1):
                    where = f"{path}, line {number}"
                    if line.strip():
                        yield text_of(json.loads(line), text_field)
            except (ValueError, AttributeError, RecursionError, OSError, EOFError, zlib.error) as error:
                raise ValueError(f"{where}: {error}") from error


def text_of(row: dict, text_field: str) -> str:
    if not isinstance(row.get(text_field), str):
        raise ValueError(
            f"no text under {text_field!r}; the fields are {', '.join(row)} (choose with --text-field)"
        )
    return row[text_field]


def parquet_documents(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error
    if text_field not in file.schema_arrow.names:
        raise ValueError(
            f"{path} has no column {text_field!r}; it has {', '.join(file.schema_arrow.names)} "
            "(choose with --text-field)"
        )
    kind = file.schema_arrow.field(text_field).type
    if kind not in (pa.string(), pa.large_string(), pa.string_view()):
        raise ValueError(f"{path}: column {text_field!r} is {kind}, not text (choose with --text-field)")
    for batch in file.iter_batches(batch_size=1000, columns=[text_field]):
        yield from (text or "" for text in batch.column(0).to_pylist())


@contextlib.contextmanager
def naming_the_repository(repo: str):
    """Turns what the Hub's client raises (its errors have no common base) into an OSError with the name."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise OSError(f"{repo} could not be read from the Hugging Face Hub ({reason})") from error


def hub_documents(repo: str, config: str, split: str, text_field: str) -> tuple[Iterator[str], dict]:
    """A Hugging Face data set, streamed: documents arrive while later files are still on the Hub."""
    import datasets
    from huggingface_hub import HfApi

    with naming_the_repository(repo):
        revision = HfApi().dataset_info(repo).sha  # read exactly what the manifest will name
        stream = datasets.load_dataset(repo, config or None, split=split, streaming=True, revision=revision)
    if stream.column_names and text_field not in stream.column_names:
        raise ValueError(f"{repo} has no column {text_field!r}; it has {', '.join(stream.column_names)}")

    def rows() -> Iterator[str]:
        with naming_the_repository(repo):
            for row in stream:
                yield text_of(row, text_field)

    return rows(), {"source": f"hf:{repo}", "config": config, "split": split, "revision": revision}


# -----------------------------------------------------------------------------
# pydocs: English prose that every installation of this project already has


def pydocs() -> Iterator[str]:
    """The prose of the docstrings of Python and of the packages in requirements.txt: a document a source
    file.

    Code, tables, examples and lists are left out: GPT-2's tokenizer spends a token on each blank of an
    indentation, and a small model would learn little but blanks. Files come in an order shuffled by a fixed
    seed, so that the validation split, the first tenth, is a sample of all packages.
    """
    requirements = (Path(__file__).resolve().parent / "requirements.txt").read_text(encoding="utf-8")
    packages = sorted(set(re.findall(r"^([A-Za-z0-9_-]+)==", requirements, flags=re.MULTILINE)))
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = [(str(p.relative_to(stdlib)), p) for p in stdlib.rglob("*.py") if "site-packages" not in p.parts]
    for package in packages:
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


# -----------------------------------------------------------------------------


def in_batches(docs: Iterable[str], characters: int = 8_000_000) -> Iterator[list[str]]:
    """Groups documents into lists of about so many characters."""
    batch, size = [], 0
    for document in docs:
        batch.append(document)
        size += len(document)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def inspect(folder: Path):
    """Prints the manifest's figures and the first lines of a few documents from random places."""
    import numpy as np

    manifest = shards.read_manifest(folder) or {"shards": shards.list_shards(folder)}
    print(
        json.dumps(
            {key: value for key, value in manifest.items() if key != "shards"}, indent=2, ensure_ascii=False
        )
    )
    for shard in manifest["shards"]:
        ids = shards.open_shard(folder / shard["file"], shard.get("tokens"))
        starts = np.flatnonzero(ids == tokenizer.END_OF_TEXT)
        print(f"\n{shard['file']}: {len(ids):,} tokens, {len(starts):,} documents")
        for start in sorted(random.Random(0).sample(starts.tolist(), min(2, len(starts)))):
            document = ids[start + 1 : start + 61]
            end = np.flatnonzero(document == tokenizer.END_OF_TEXT)
            print(f"  at {start:,}: {tokenizer.decode(document[: end[0]] if len(end) else document)!r}")


def is_there(cfg: Config, request: dict) -> bool:
    """Whether the data set was already made, whole, by the same request. Raises ValueError if by another."""
    try:
        manifest = shards.read_manifest(cfg.folder)
    except ValueError as error:
        print(f"starting again: {error}")
        return False
    if manifest is None:
        return False
    if manifest.get("request") != request:
        raise ValueError(
            f"{cfg.folder} holds another data set; remove it, or give another --name or --out-dir"
        )
    try:
        for shard in manifest["shards"]:
            shards.open_shard(cfg.folder / shard["file"], shard["tokens"])
    except (ValueError, FileNotFoundError) as error:
        print(f"starting again: {error}")
        return False
    print(f"{cfg.folder} is already complete ({sum(s['tokens'] for s in manifest['shards']):,} tokens)")
    return True


def prepare(cfg: Config) -> Path:
    """Writes the data set that cfg describes, unless it is already there; returns its folder."""
    if cfg.workers < 0:
        raise ValueError(f"--workers is {cfg.workers}; it must be 0 (all cores) or more")
    fields = ("source", "config", "split", "text_field", "shard_tokens", "val_tokens")
    request = {name: getattr(cfg, name) for name in fields}
    if is_there(cfg, request):
        return cfg.folder
    docs, about = documents(cfg)
    about |= {"request": request, "tokenizer": {"name": "gpt2", "sha256": tokenizer.RANKS_SHA256}}
    writer = shards.ShardWriter(cfg.folder, cfg.dataset_name, cfg.shard_tokens, cfg.val_tokens, about)
    with tqdm(desc="tokenizing", unit=" tokens", unit_scale=True, disable=None) as progress:
        for batch in in_batches(docs):
            ids = tokenizer.encode_corpus(batch, cfg.workers)
            writer.write(ids)
            progress.update(len(ids))
    manifest = writer.close()
    for split in ("train", "val"):
        parts = [s for s in manifest["shards"] if s["split"] == split]
        tokens, count = sum(s["tokens"] for s in parts), sum(s["documents"] for s in parts)
        print(f"{split:5} {tokens:>14,} tokens  {count:>10,} documents  {len(parts)} shards  in {cfg.folder}")
    return cfg.folder


def main(cfg: Config):
    if cfg.verify:
        manifest = shards.verify(cfg.folder)
        print(f"{cfg.folder}: all {len(manifest['shards'])} shards are as written")
    elif cfg.inspect:
        inspect(cfg.folder)
    else:
        prepare(cfg)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"fineweb.py: {error}", file=sys.stderr)
        sys.exit(2)
