"""The files behind fineweb.py's --source: on this disk, at a URL, or on the Hugging Face Hub.

    source = sources.Source("tinystories", downloads=Path("data/tinystories/downloads"))
    inputs, origin = sources.find_inputs(source)
    for file in inputs:
        for batch in file.read(file.locate()):  # downloads the file if it is not here
            batch.texts

On disk: the downloaded files, in the given folder.
"""

import fnmatch
import glob
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from lib import cli, documents, files, hub
from lib.documents import Batch, Unit

# Our name: repository, configuration, and the splits to read, by their names on the Hub.
HUB_SOURCES = {
    "fineweb-edu-10BT": ("HuggingFaceFW/fineweb-edu", "sample-10BT", ("train",)),
    "fineweb-edu-100BT": ("HuggingFaceFW/fineweb-edu", "sample-100BT", ("train",)),
    "fineweb-edu-350BT": ("HuggingFaceFW/fineweb-edu", "sample-350BT", ("train",)),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "default", ("train",)),
    "fineweb-10BT": ("HuggingFaceFW/fineweb", "sample-10BT", ("train",)),
    "fineweb-100BT": ("HuggingFaceFW/fineweb", "sample-100BT", ("train",)),
    "fineweb-350BT": ("HuggingFaceFW/fineweb", "sample-350BT", ("train",)),
    "fineweb": ("HuggingFaceFW/fineweb", "default", ("train",)),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1", ("train", "validation", "test")),
    "openwebtext": ("Skylion007/openwebtext", "plain_text", ("train",)),
    "tinystories": ("roneneldan/TinyStories", "default", ("train", "validation")),
}
# Shards by Keller Jordan, for modded-nanogpt.
TOKENIZED_SOURCES = {
    "fineweb-edu-10B-gpt2": "hf://datasets/kjj0/finewebedu10B-gpt2",
    "fineweb-10B-gpt2": "hf://datasets/kjj0/fineweb10B-gpt2",
    "fineweb-100B-gpt2": "hf://datasets/kjj0/fineweb100B-gpt2",
}
NAMES = (*HUB_SOURCES, *TOKENIZED_SOURCES, "tiny-shakespeare", "pydocs")
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
BY_HASH = "sha256 of relative paths"  # the manifest's "order"; without it, the order is by name
OUR_SPLITS = {"train": "train", "validation": "val", "test": "test"}
WIKITEXT_FILE = re.compile(r"wiki\.(train|valid|test)\.(?:raw|tokens)(?:\.|$)")
PANDOC = " (convert them: pandoc -t plain -o FILE.txt FILE{})"
CONVERTERS = {".pdf": " (convert them: pdftotext FILE.pdf FILE.txt)"}
CONVERTERS |= {kind: PANDOC.format(kind) for kind in (".html", ".htm", ".docx", ".epub")}
EDITORS_COPY = re.compile(r".*~|#.*#|~\$.*|.*\.(?:bak|swp|swo|orig|tmp)", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """The value of --source, the folder for downloads, and the flags that select and read the text."""

    name: str
    downloads: Path
    config: str = ""
    split: str = "train"
    text_field: str = "text"
    unit: Unit = "auto"

    def read(self, path: Path) -> Iterator[Batch]:
        return documents.read_file(path, self.unit, self.text_field)


class Input(NamedTuple):
    """A file of the source."""

    name: str
    size: int  # bytes; 0 where unknown
    version: str  # changes with the content
    locate: Callable[[], Path]  # downloads the file if it is not here
    read: Callable[[Path], Iterator[Batch]]
    split: str = ""  # val, train or test; "" leaves it to --val-tokens
    download: Path | None = None  # path of the download; None for the user's own file


def is_local(source: str) -> bool:
    """Tells whether --source is a path, a glob or pydocs, which need no network."""
    is_name = source in NAMES and source != "pydocs"
    return not is_name and not source.startswith(("hf:", hub.HUB_PREFIX))


def find_inputs(source: Source, begun: dict | None = None) -> tuple[list[Input], dict]:
    """Returns the source's files in a fixed order, and the manifest's entries about their origin. `begun` is
    the manifest of a data set that exists: its revision is read, and its order is kept. Otherwise the Hub's
    newest revision is read, and local files are in the order of their hashed names. Raises ValueError or
    OSError for a source that does not exist or cannot be read."""
    if source.name == "pydocs":
        packages = [f"{name}-{metadata.version(name)}" for name in documents.list_pinned_packages()]
        version = " ".join([sys.version.split()[0], *packages])
        read = lambda _: documents.batch_documents(documents.read_pydocs())  # noqa: E731
        return [Input("pydocs", 0, version, Path, read)], {"source": "pydocs", "revision": version}
    if source.name in HUB_SOURCES or source.name.startswith("hf:"):
        return find_hub_inputs(source, begun["revision"] if begun else None)
    read = source.read
    if source.name == "tiny-shakespeare":
        path = source.downloads / "tiny-shakespeare.txt"
        locate = lambda: files.download(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256)  # noqa: E731
        whole = [Input(path.name, 1_115_394, SHAKESPEARE_SHA256, locate, read, download=path)]
        return whole, {"source": SHAKESPEARE_URL, "revision": SHAKESPEARE_SHA256}
    paths = find_local_files(source.name)
    splits = find_wikitext_splits(paths)
    inputs, about = [], {"source": source.name, "revision": f"{len(paths)} files"}
    # An article may begin in one file and end in the next. An earlier version's manifest has no order.
    if len(paths) > 1 and not splits and source.unit != "article" and (begun is None or "order" in begun):
        root = os.path.commonpath(path.parent for path in paths)
        paths.sort(key=lambda path: documents.hash_name(path.relative_to(root).as_posix()))
        about["order"] = BY_HASH
    for path in paths:
        facts, locate = path.stat(), lambda path=path: path
        entry = Input(str(path), facts.st_size, str(facts.st_mtime_ns), locate, read, splits.get(path, ""))
        inputs.append(entry)
    return inputs, about


def find_local_files(source: str) -> list[Path]:
    """Returns the files to read that a path, folder or glob names, sorted; prints how many it takes, and how
    many it leaves out for which reason. A file that links lead to twice is taken once. Raises
    FileNotFoundError if the source names nothing, ValueError if it has no text, and OSError or ValueError if
    a file cannot be read."""
    path = Path(source or "no source")  # "" would be the current folder
    if path.is_dir():
        found = sorted(walk(path, set()))
    elif path.exists():
        found = [path]
    elif path.parts.count("**") == 1:  # glob would follow links in circles
        at = path.parts.index("**")
        names, seen = path.parts[at + 1 :] or ("*",), set()
        roots = map(Path, sorted(glob.glob(str(Path(*path.parts[:at])))))
        inside = [p for root in roots if root.is_dir() for p in walk(root, seen)]
        found = [p for p in inside if all(map(fnmatch.fnmatch, p.parts[-len(names) :], names))]
    else:  # a glob leaves hidden files out by itself, unless its pattern names them
        found = list(map(Path, sorted(glob.glob(str(path)))))
    if not found and not path.is_dir():
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        near = cli.suggest(source, NAMES) or cli.suggest(path.name, beside)
        raise FileNotFoundError(
            f"--source is {source!r}; it must be a file, folder or glob that exists, or a name such as "
            f"fineweb-edu-10BT, tinystories, pydocs, hf:org/name (--help lists all){near}"
        )
    taken: dict[Path, Path] = {}  # by the path that links lead to
    left_out: Counter = Counter()
    for p in found:
        if (path.is_dir() or "**" in path.parts) and p.name.startswith("."):
            left_out["hidden"] += 1
        elif p != path and EDITORS_COPY.fullmatch(p.name):
            left_out["copies of editors"] += 1
        elif p.is_dir():
            left_out["folders"] += 1
        elif not documents.is_readable(p.name):
            left_out[documents.find_kind(p.name) or p.suffix or "without a suffix"] += 1
        elif not p.is_file() and p.exists():
            left_out["neither files nor folders"] += 1
        elif documents.is_empty(p):  # raises an error for a link to nothing, too
            left_out["empty"] += 1
        elif taken.setdefault(p.resolve(), p) is not p:
            left_out["linked twice"] += 1
    others = ", ".join(f"{n:,} {what}{CONVERTERS.get(what, '')}" for what, n in left_out.most_common())
    if not taken:
        raise ValueError(
            f"--source is {source!r}, which has no text for training (found: {others or 'nothing'}). It must "
            f"have files in {', '.join(documents.SUFFIXES)}, or these with "
            f"{' or '.join(documents.COMPRESSED)} appended"
        )
    size = sum(p.stat().st_size for p in taken.values())
    print(f"{source}: {len(taken):,} files, {size:,} bytes{others and f'; left out: {others}'}", flush=True)
    return list(taken.values())


def walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Yields the files below a folder, and the hidden folders in place of their files. It follows links, and
    enters no folder twice. Raises OSError for a folder that cannot be listed."""
    if (real := folder.resolve()) in seen:
        return
    seen.add(real)
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            yield from walk(path, seen)
        else:
            yield path


def find_wikitext_splits(paths: list[Path]) -> dict[Path, str]:
    """Returns the split of each file if WikiText's own files are among them, as it is distributed."""
    ours = {"train": "train", "valid": "val", "test": "test"}
    found = {path: ours[match[1]] for path in paths if (match := WIKITEXT_FILE.match(path.name))}
    has_splits = {"train", "val"} <= set(found.values())
    return {path: found.get(path, "train") for path in paths} if has_splits else {}


def find_hub_inputs(source: Source, revision: str | None) -> tuple[list[Input], dict]:
    """Lists a Hugging Face data set's files; the library `datasets` finds them by configuration and split. If
    a file is not text, JSON lines or parquet, `datasets` reads the whole split as one stream."""
    import datasets

    if source.name in HUB_SOURCES:
        (repo, config, splits), asked = HUB_SOURCES[source.name], None
    else:
        (repo, asked), config, splits = hub.parse_hub(source.name.removeprefix("hf:")), "", (source.split,)
    config = source.config or config

    def ask() -> tuple[str, Any]:
        commit, _ = hub.list_hub(repo, revision or asked, paths=["README.md"])
        try:
            return commit, datasets.load_dataset_builder(repo, config or None, revision=commit)
        except RuntimeError as error:  # `datasets` refuses a repository that has a script
            raise ValueError(f"{error}; try its parquet copy, hf:{repo}@refs/convert/parquet") from error

    commit, builder = hub.retry(repo, ask)
    about = {"source": f"hf:{repo}", "config": config, "revision": commit}
    found: dict[str, list[str]] = builder.config.data_files or {}
    if missing := [name for name in splits if name not in found]:
        raise ValueError(
            f"--split is {missing[0]}, but {repo} has only {', '.join(found)}; choose one of them"
        )
    paths = {name: [url.partition(f"@{commit}/")[2] for url in found[name]] for name in splits}
    wanted = [path for name in splits for path in paths[name]]
    if not all(map(documents.is_readable, wanted)):
        rows = lambda: stream_rows(repo, config, source.split, commit, source.text_field)  # noqa: E731
        return [Input(repo, 0, commit, Path, lambda _: documents.batch_documents(rows()))], about

    _, listed = hub.list_hub(repo, commit, wanted)
    read = documents.read_wikitext if source.name == "wikitext-103" else source.read
    inputs, folder = [], source.downloads / commit[:12]
    for name in splits:
        ours = OUR_SPLITS[name] if len(splits) > 1 else ""
        for path in paths[name]:
            locate = lambda file=listed[path]: hub.fetch(file, folder)  # noqa: E731
            inputs.append(Input(path, listed[path].size, commit, locate, read, ours, folder / path))
    return inputs, about


def stream_rows(repo: str, config: str, split: str, revision: str, text_field: str) -> Iterator[str]:
    """Yields the text of each row of a Hugging Face data set, in any format that `datasets` reads. Raises
    ValueError if there is no such column."""
    import datasets

    with hub.name_repository(repo):
        rows = datasets.load_dataset(repo, config or None, split=split, streaming=True, revision=revision)
        if rows.column_names and text_field not in rows.column_names:
            raise ValueError(f"{repo} has no column {text_field!r}; it has {', '.join(rows.column_names)}")
        for row in rows:
            yield documents.extract_text(row, text_field)  # type: ignore[arg-type]


def describe_inputs(inputs: list[Input]) -> dict:
    """Returns the number of files, their bytes, and a hash that changes when a file does."""
    listing = json.dumps([(file.name, file.size, file.version, file.split) for file in inputs])
    size, digest = sum(file.size for file in inputs), hashlib.sha256(listing.encode()).hexdigest()
    return {"files": len(inputs), "bytes": size, "listing_sha256": digest}
