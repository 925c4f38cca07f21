"""Token shards: written, checked, and read back as training batches.

    data/<name>/<name>_val_000000.npy       one-dimensional uint16, each document after a 50256
    data/<name>/<name>_train_000000.npy     np.load reads it, and so do nanoGPT's and build-nanogpt's loaders
    data/<name>/manifest.json               tokenizer, source, and each shard's tokens, documents and SHA-256
    data/<name>/parts/000000/               while fineweb.py is at work: its parts of the source

fineweb.py writes a part of its source at a time with `PartWriter` and joins them with `merge`; train_gpt2.py
reads them with `ShardReader`, from a folder or from the Hugging Face Hub. It also takes folders without a
manifest, and llm.c's .bin shards (1,024 bytes of header, then uint16).
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import queue
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np

import remote

if TYPE_CHECKING:  # imported by the reader, when it is asked for tensors: fineweb.py does without
    import torch

T = TypeVar("T")

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PARTS = "parts"
END_OF_TEXT = 50256
DEFAULT_VAL_TOKENS = 10_485_760  # what build-nanogpt evaluates on: 20 batches of 524,288
SHARD_NAME = re.compile(r".+_(train|val|test)_(\d+)\.(npy|bin)")
SPLITS = ("val", "train", "test")
BIN_HEADER_BYTES, BIN_MAGIC, BIN_VERSION = 1024, 20240520, 1  # llm.c, dev/data/data_common.py
NPY_HEADER_BYTES = 128  # of a one-dimensional array, as NumPy pads it
HEAD_TOKENS = 8192  # a shard's first tokens have a hash of their own, so that they can be fetched alone
HUB_CACHE = Path(__file__).resolve().parent / "data" / "hub"


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]):
    """`write` fills a temporary file, which is flushed to disk and then renamed to path: all of it or
    nothing. Raises OSError, naming path."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    remote.flush(path.parent)


def write_json(path: Path, value: Any):
    text = json.dumps(value, indent=2, ensure_ascii=False)
    write_atomically(path, lambda f: f.write(text.encode("utf-8")))


def prepared(items: Iterable[T], depth: int) -> Iterator[T]:
    """The items, each made by a background thread while its forerunners are used, at most `depth` ahead. An
    error in making them is raised here; when the consumer stops, so does the thread."""
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(value: tuple) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(value, timeout=0.1)
                return True
        return False

    def make():
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except BaseException as error:  # raised where the items are used
            put((None, error))

    threading.Thread(target=make, daemon=True).start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stopped.set()


# -----------------------------------------------------------------------------
# writing


class PartWriter:
    """Cuts the stream of tokens of one part of a source into shards, in folder/parts/<part>.

    The first `val_tokens` go to the validation split, the rest to `split`. With val_tokens None, validation
    gets DEFAULT_VAL_TOKENS, or a tenth of a stream too short for that. A thread writes a shard while the
    tokens of the next are made. An interrupted part is taken up where its last whole shard ended: the caller
    goes on with document number `documents_done`, and leaves out that document's first `tokens_done` tokens.
    """

    def __init__(
        self,
        folder: Path,
        part: int,
        shard_tokens: int,
        val_tokens: int | None = None,
        split: str = "train",
        plan: str = "",
    ):
        """`plan` is the `plan_of` the data set. Raises OSError if another process is writing the part, and
        ValueError if what is there is of another plan."""
        from filelock import FileLock, Timeout

        self.folder, self.shard_tokens, self.split = part_folder(folder, part), shard_tokens, split
        self.pieces: list[np.ndarray] = []
        self.held = 0  # tokens in pieces
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder.with_suffix(".lock"))
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            raise OSError(f"another process is writing part {part} of {folder}; wait for it") from error
        begun = {"plan": plan, "complete": False, "val_tokens": val_tokens, "shards": []}
        self.state = read_part(folder, part) or begun
        if self.state["plan"] != plan:
            raise ValueError(
                f"{self.folder} belongs to another source, or was begun with other flags; remove it"
            )
        self.shards: list[dict] = self.state["shards"]
        self._drop_what_is_not_whole()
        if not self.shards:
            self.state["val_tokens"] = val_tokens
        self.val_left: int | None = self.state["val_tokens"]
        if self.val_left is not None:
            self.val_left -= sum(shard["tokens"] for shard in self.shards if shard["split"] == "val")
        self.documents_done, self.tokens_done = self._position()
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.writing: Future | None = None

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *exc):
        self.thread.shutdown(wait=True)
        self.lock.release()

    @property
    def tokens(self) -> int:
        """Tokens in the part so far."""
        return self.held + sum(shard["tokens"] for shard in self.shards)

    def write(self, ids: np.ndarray):
        """Appends uint16 tokens (N,) to the stream."""
        self.pieces.append(ids)
        self.held += len(ids)
        if self.val_left is None and self.held >= 10 * DEFAULT_VAL_TOKENS:
            self._set_val_tokens(DEFAULT_VAL_TOKENS)
        while self.val_left is not None and self.held >= self._next_size():
            self._write_shard(self._next_size())

    def close(self, read_back: bool = False):
        """Writes what is left and marks the part as complete; with read_back, after comparing the shards'
        bytes on disk with those that were written. Raises ValueError if validation takes all the part has."""
        if self.val_left is None:
            self._set_val_tokens(self.held // 10)
        if self.val_left and self.val_left >= self.held:
            raise ValueError(
                f"the text, or the first part of it, has {self.tokens:,} tokens, of which --val-tokens takes "
                f"{self.state['val_tokens']:,}: none is left for training; give a smaller --val-tokens"
            )
        while self.held:
            self._write_shard(min(self.held, self._next_size()))
        self._wait()
        for shard in self.shards if read_back else []:
            if remote.hash_file(self.folder / shard["file"]) != shard["sha256"]:
                raise OSError(
                    f"{self.folder / shard['file']} does not hold what was written: is the disk sound?"
                )
        self.state["complete"] = True
        write_json(self.folder / "part.json", self.state)

    def _set_val_tokens(self, val_tokens: int):
        self.state["val_tokens"] = self.val_left = val_tokens

    def _next_size(self) -> int:
        return min(self.shard_tokens, self.val_left) if self.val_left else self.shard_tokens

    def _write_shard(self, tokens: int):
        """Takes so many tokens off the stream and has them written in the background."""
        split = "val" if self.val_left else self.split
        if self.val_left:
            self.val_left -= tokens
        self.held -= tokens
        stream, self.pieces = self.pieces, []
        for i, piece in enumerate(stream):
            if len(piece) > tokens:  # the shard ends inside this piece
                self.pieces = [piece[tokens:], *stream[i + 1 :]]
                stream = [*stream[:i], piece[:tokens]]
                break
            tokens -= len(piece)
        self._wait()
        self.writing = self.thread.submit(self._store, split, stream)

    def _wait(self):
        if self.writing:
            self.writing.result()

    def _store(self, split: str, pieces: list[np.ndarray]):
        number = sum(shard["split"] == split for shard in self.shards)
        path = self.folder / f"{split}_{number:06d}.npy"
        tokens, digest = sum(map(len, pieces)), hashlib.sha256()
        header = io.BytesIO()
        layout = {"descr": "<u2", "fortran_order": False, "shape": (tokens,)}
        np.lib.format.write_array_header_1_0(header, layout)  # as np.save does

        def fill(f: BinaryIO):
            for block in (header.getbuffer(), *(piece.data for piece in pieces)):
                f.write(block)
                digest.update(block)

        write_atomically(path, fill)
        self.shards.append(
            dict(
                file=path.name,
                split=split,
                tokens=tokens,
                documents=sum(int(np.count_nonzero(piece == END_OF_TEXT)) for piece in pieces),
                sha256=digest.hexdigest(),
                head_sha256=hashlib.sha256(open_shard(path)[:HEAD_TOKENS].tobytes()).hexdigest(),
            )
        )
        write_json(self.folder / "part.json", self.state)

    def _drop_what_is_not_whole(self):
        """Keeps the shards before the first that is missing or damaged, and removes all other files."""
        for i, shard in enumerate(self.shards):
            path = self.folder / shard["file"]
            if not path.is_file() or remote.hash_file(path) != shard["sha256"]:
                del self.shards[i:]
                self.state["complete"] = False
                break
        whole = {"part.json", *(shard["file"] for shard in self.shards)}
        for path in self.folder.iterdir():
            if path.name not in whole:
                path.unlink()

    def _position(self) -> tuple[int, int]:
        """The number of the last document that was begun, and how many of its tokens are written, its 50256
        included."""
        begun, tokens = sum(shard["documents"] for shard in self.shards), 0
        for shard in reversed(self.shards):
            ids = open_shard(self.folder / shard["file"])
            starts = np.flatnonzero(ids == END_OF_TEXT)
            if len(starts):
                return begun - 1, tokens + len(ids) - int(starts[-1])
            tokens += len(ids)
        return 0, 0


def part_folder(folder: Path, part: int) -> Path:
    return folder / PARTS / f"{part:06d}"


def plan_of(manifest: dict) -> str:
    """A hash of what a data set is to be made of, which all its parts must agree on."""
    plan = {key: value for key, value in manifest.items() if key not in ("complete", "shards")}
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def read_part(folder: Path, part: int) -> dict | None:
    """What a PartWriter has said of its part, if anything; a damaged part.json says nothing."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads((part_folder(folder, part) / "part.json").read_text(encoding="utf-8"))
    return None


def begin(folder: Path, about: dict) -> dict:
    """Starts a data set: its manifest, incomplete, with `about` (name, source, number of parts, ...) in it.
    Where several processes begin at once, one does; returns the manifest that is there. Raises ValueError
    for a folder that holds shards of other origin."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST
    if not path.is_file():
        if strangers := [p.name for p in folder.iterdir() if SHARD_NAME.fullmatch(p.name)]:
            raise ValueError(
                f"{folder} holds shards without a {MANIFEST}, such as {strangers[0]}; "
                "choose another --name or --out-dir"
            )
        first = folder / f".{MANIFEST}.{os.getpid()}.{threading.get_ident()}.begin"
        write_json(first, {"format": FORMAT_VERSION, **about, "complete": False, "shards": []})
        try:
            os.link(first, path)  # fails where the name exists: whoever was first has written the manifest
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(first, path)
        first.unlink(missing_ok=True)
    return load_manifest(path)


def missing_parts(folder: Path, manifest: dict) -> list[int]:
    return [p for p in range(manifest["parts"]) if not (read_part(folder, p) or {}).get("complete")]


def merge(folder: Path) -> dict:
    """Gives the shards of all parts their final names and completes the manifest, which is returned. May be
    interrupted and repeated, and called by several processes at once. Raises ValueError where a part is
    missing; or where nothing is left for training, and then clears the folder for another try."""
    try:
        return _merge(folder)
    except (ValueError, OSError):
        if is_complete(folder):  # another process was faster
            return load_manifest(folder / MANIFEST)
        raise


def _merge(folder: Path) -> dict:
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} has no {MANIFEST}; fineweb.py makes it when it begins a data set")
    manifest = load_manifest(folder / MANIFEST)
    if manifest["complete"]:
        shutil.rmtree(folder / PARTS, ignore_errors=True)
        return manifest
    if missing := missing_parts(folder, manifest):
        some = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise ValueError(f"{folder}: of {manifest['parts']} parts, these are missing or incomplete: {some}")
    parts = [part for number in range(manifest["parts"]) if (part := read_part(folder, number))]
    if len(parts) < manifest["parts"]:
        raise ValueError(f"{folder / PARTS} was removed while its parts were joined")
    if strangers := [n for n, part in enumerate(parts) if part["plan"] != plan_of(manifest)]:
        raise ValueError(
            f"{folder}: parts {strangers} are of another source, revision or flags than {MANIFEST}"
        )
    if not any(shard["split"] == "train" for part in parts for shard in part["shards"]):
        clear(folder)
        raise ValueError(f"{manifest.get('source')} has no text for training")
    entries = []
    for split in SPLITS:
        found = [
            (n, shard) for n, part in enumerate(parts) for shard in part["shards"] if shard["split"] == split
        ]
        for number, (part, shard) in enumerate(found):
            path = folder / f"{manifest['name']}_{split}_{number:06d}.npy"
            with contextlib.suppress(FileNotFoundError):  # moved by an earlier try, or by another process
                os.replace(part_folder(folder, part) / shard["file"], path)
            open_shard(path, shard["tokens"])
            entries.append({**shard, "file": path.name})
    remote.flush(folder)
    manifest |= {"complete": True, "shards": entries}
    write_json(folder / MANIFEST, manifest)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    for left in folder.glob(f".{MANIFEST}.*"):  # of killed processes
        left.unlink(missing_ok=True)
    return manifest


def clear(folder: Path):
    """Removes the parts, shards and manifest that `begin` and its followers made in folder."""
    manifest = load_manifest(folder / MANIFEST)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    ours = re.compile(rf"\.?{re.escape(manifest['name'])}_(train|val|test)_\d+\.(npy|bin)(\..*tmp)?")
    for path in [p for p in folder.iterdir() if ours.fullmatch(p.name)]:
        path.unlink()
    (folder / MANIFEST).unlink()


# -----------------------------------------------------------------------------
# reading


def load_manifest(path: Path) -> dict:
    """A manifest, complete or not. Raises ValueError if it is damaged or of another format."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        entries = [(s["file"], s["split"], s["tokens"], s["sha256"]) for s in manifest["shards"]]
        version, _ = manifest["format"], manifest["complete"]
        if not all(list(map(type, entry)) == [str, str, int, str] for entry in entries):
            raise ValueError("a shard's file, split, tokens or sha256 has the wrong type")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}); remove its folder and make the shards again with fineweb.py"
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format {version}; this code reads format {FORMAT_VERSION}")
    for file, *_ in entries:
        if Path(file).name != file or not SHARD_NAME.fullmatch(file):
            raise ValueError(f"{path} lists {file!r}, which is not the name of a shard in its folder")
    return manifest


def read_manifest(folder: Path) -> dict | None:
    """The folder's manifest, or None where there is none. Raises ValueError if it is damaged or
    incomplete."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = load_manifest(path)
    if manifest["complete"] is not True:
        raise ValueError(f"{path} is incomplete: its fineweb.py run did not end; run the same command again")
    return manifest


def is_complete(folder: Path) -> bool:
    """Whether the folder has a manifest that says so."""
    try:
        return read_manifest(folder) is not None
    except ValueError:
        return False


def verify(folder: Path) -> dict:
    """Reads every shard and compares it with the manifest; returns the manifest, or raises ValueError naming
    the first shard that differs. FileNotFoundError where there is no manifest to compare with."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST}, so there is nothing to verify its shards against"
        )
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        ids = open_shard(path, shard["tokens"])
        if remote.hash_file(path) != shard["sha256"]:
            raise ValueError(f"{path} does not have the SHA-256 in the manifest: its bytes have changed")
        count_documents(path, ids)
    return manifest


def count_documents(path: Path, ids: np.ndarray) -> int:
    """How many documents begin in a shard. Raises ValueError for a token outside the vocabulary."""
    if int(ids.max()) > END_OF_TEXT:
        raise ValueError(
            f"{path} holds token {int(ids.max())} at offset {int(ids.argmax())}; "
            f"the vocabulary ends at {END_OF_TEXT}"
        )
    return int(np.count_nonzero(ids == END_OF_TEXT))


def open_shard(path: Path, tokens: int | None = None) -> np.ndarray:
    """Memory-maps a .npy or .bin shard, (N,) uint16. Raises ValueError if it is not one, or not of `tokens`
    tokens, and FileNotFoundError if it is missing."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; it belongs to the data set, make it again with fineweb.py"
        )
    size = path.stat().st_size
    if path.suffix == ".bin":
        header = np.fromfile(path, dtype="<i4", count=256)
        if len(header) < 256 or tuple(header[:2]) != (BIN_MAGIC, BIN_VERSION):
            raise ValueError(
                f"{path} is not a llm.c shard: its header must begin with {BIN_MAGIC}, {BIN_VERSION}"
            )
        if size != BIN_HEADER_BYTES + 2 * int(header[2]):
            raise ValueError(
                f"{path} has {size} bytes; its header promises {int(header[2])} tokens of 2 bytes"
            )
        ids = np.memmap(path, dtype="<u2", mode="r", offset=BIN_HEADER_BYTES, shape=(int(header[2]),))
    else:
        try:
            ids = np.lib.format.open_memmap(path, mode="r")  # np.load would also open archives and pickles
        except FileNotFoundError:
            raise
        except Exception as error:  # NumPy's header parser raises SyntaxError, TokenError, OverflowError, ...
            raise ValueError(f"{path} is not a whole .npy file of numbers: {error}") from error
        if ids.ndim != 1 or ids.dtype != np.uint16:
            raise ValueError(
                f"{path} holds {ids.dtype} of shape {ids.shape}; a shard is one-dimensional uint16"
            )
    if tokens is not None and len(ids) != tokens:
        raise ValueError(f"{path} has {len(ids):,} tokens; the manifest says {tokens:,}")
    if not len(ids):
        raise ValueError(f"{path} is empty")
    return ids


def list_shards(folder: Path) -> list[dict]:
    """Every shard of a data set, in order: dicts with file and split and, where a manifest tells, tokens and
    sha256.

    Raises FileNotFoundError, naming the command that makes them, where there are none, and ValueError where
    they are of two formats.
    """
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is not None:
        return manifest["shards"]
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return shards_among(names, folder)


def shards_among(names: Iterable[str], where: Any) -> list[dict]:
    """The shards among file names, validation first, by their numbers."""
    matches = [match for name in names if (match := SHARD_NAME.fullmatch(name))]
    if not matches:
        raise FileNotFoundError(
            f"{where} holds no shards. Make them: `python fineweb.py` for 10 billion tokens of FineWeb-Edu, "
            "`python fineweb.py --source FILE_OR_FOLDER` for your own; or try `python train_gpt2.py demo`"
        )
    if len({match[3] for match in matches}) > 1:
        raise ValueError(
            f"{where} holds both .npy and .bin shards: they are two data sets, or one twice; "
            "keep one kind and move the other elsewhere"
        )
    matches.sort(key=lambda match: (SPLITS.index(match[1]), int(match[2]), match[0]))
    return [dict(file=match[0], split=match[1]) for match in matches]


class Folder:
    """The shards of a data set on disk. `entries` are those of `list_shards`."""

    def __init__(self, folder: Path):
        self.name, self.folder, self.entries = str(folder), folder, list_shards(folder)

    def path(self, entry: dict) -> Path:
        """Where the shard is."""
        return self.folder / entry["file"]

    def head(self, entry: dict, tokens: int) -> np.ndarray | None:
        """The shard's first tokens, if they can be had for less than the whole shard."""
        return None

    def expect(self, entry: dict):
        """Says that the shard will be wanted soon."""

    def check(self, entry: dict):
        """Raises ValueError or FileNotFoundError, naming the file, if the shard is not whole."""
        entry["tokens"] = len(open_shard(self.path(entry), entry.get("tokens")))

    def fingerprint(self) -> str:
        """A hash of what the data set is: every shard's name, length and, where they are known, content hash
        and tokenizer."""
        for entry in self.entries:
            if "tokens" not in entry:
                self.check(entry)
        facts = [(entry["file"], entry["tokens"], entry.get("sha256")) for entry in self.entries]
        vocabulary = (read_manifest(self.folder) or {}).get("tokenizer")
        return hashlib.sha256(json.dumps([vocabulary, facts]).encode()).hexdigest()


class HubFolder(Folder):
    """The shards of a data set on the Hugging Face Hub, hf://datasets/org/name[@revision].

    A shard is fetched when it is wanted (the next one in the background), checked against its SHA-256 and
    kept under data/hub/; those not wanted for longest make room when all take more than `cache_bytes`.
    """

    def __init__(self, location: str, cache_bytes: float = 20e9):
        """Raises ValueError for another location or a cache too small for three shards, OSError if the Hub
        does not answer."""
        repo, revision = remote.parse_hub(location)
        commit, self.files = remote.list_hub(repo, revision)
        self.name, self.commit, self.cache_bytes = f"{remote.HUB_PREFIX}{repo}@{commit}", commit, cache_bytes
        self.folder = HUB_CACHE / repo.replace("/", "--") / commit[:12]
        if MANIFEST in self.files:
            remote.fetch(self.files[MANIFEST], self.folder)
            self.entries = list_shards(self.folder)
        else:
            self.entries = shards_among((path for path in self.files if "/" not in path), location)
        for entry in self.entries:
            self._compare(entry)
        largest = max(self.files[entry["file"]].size for entry in self.entries)
        if cache_bytes < 3 * largest:
            raise ValueError(
                f"--cache-gb is {cache_bytes / 1e9:g}; {location} needs room for three shards of "
                f"{largest / 1e9:.2g} GB: at least {math.ceil(3 * largest / 1e8) / 10}"
            )
        here = [path for entry in self.entries if (path := self.folder / entry["file"]).is_file()]
        here.sort(key=lambda path: path.stat().st_mtime)
        self.recent = dict.fromkeys(path.name for path in here)  # the last is the one wanted last
        self.heads: dict[str, np.ndarray] = {}
        self.lock = threading.Lock()
        self.expected: queue.Queue[dict] = queue.Queue()
        # A daemon: a run that is over does not wait for it, as it would for an executor's threads.
        threading.Thread(target=self._fetch_expected, daemon=True).start()

    def _compare(self, entry: dict):
        """Raises ValueError unless the repository lists the shard as the manifest does; without a manifest,
        believes the list."""
        file = self.files.get(entry["file"])
        header = BIN_HEADER_BYTES if entry["file"].endswith(".bin") else NPY_HEADER_BYTES
        if file is None:
            raise ValueError(f"{self.name} has a {MANIFEST} that lists {entry['file']}, but not the file")
        entry.setdefault("tokens", (file.size - header) // 2)
        entry.setdefault("sha256", file.sha256)
        if file.size != header + 2 * entry["tokens"] or (file.sha256 and file.sha256 != entry["sha256"]):
            raise ValueError(f"{file.url} does not have the size or SHA-256 that its {MANIFEST} says")

    def path(self, entry: dict) -> Path:
        path = remote.fetch(self.files[entry["file"]], self.folder)
        with self.lock:
            self.recent.pop(path.name, None)
            self.recent[path.name] = None
            while sum(self.files[name].size for name in self.recent) > self.cache_bytes:
                oldest = next(iter(self.recent))
                del self.recent[oldest]
                with contextlib.suppress(OSError):  # another process was faster, or Windows has it open
                    (self.folder / oldest).unlink()
        return path

    def head(self, entry: dict, tokens: int) -> np.ndarray | None:
        if tokens > HEAD_TOKENS or "head_sha256" not in entry or entry["file"] in self.recent:
            return None
        if entry["file"] in self.heads:
            return self.heads[entry["file"]][:tokens]
        data = remote.read_start(self.files[entry["file"]], NPY_HEADER_BYTES + 2 * HEAD_TOKENS)
        ids = np.frombuffer(data, dtype="<u2", offset=NPY_HEADER_BYTES)
        if hashlib.sha256(ids.tobytes()).hexdigest() != entry["head_sha256"]:
            raise ValueError(f"{self.files[entry['file']].url} does not begin as its {MANIFEST} says")
        self.heads[entry["file"]] = ids
        return ids[:tokens]

    def expect(self, entry: dict):
        if entry["file"] not in self.recent:
            self.expected.put(entry)

    def _fetch_expected(self):
        while True:
            with contextlib.suppress(Exception):  # it is asked for again, loudly, when it is needed
                self.path(self.expected.get())

    def check(self, entry: dict):
        """A shard is checked when it is fetched."""


def open_folder(location: str | Path, cache_bytes: float = 20e9) -> Folder:
    """The shards in a folder, or in a repository hf://datasets/org/name of the Hub."""
    if str(location).startswith(remote.HUB_PREFIX):
        return HubFolder(str(location), cache_bytes)
    return Folder(Path(location))


class ShardReader:
    """Training batches from one split of a data set, as a pure function of the step.

    The split is one long stream of tokens, cut into windows of seq_len + 1 (the last token of a window is the
    first of the next: it is a target here and an input there). An epoch visits every window once: shards in
    an order drawn from (seed, epoch), and inside each shard its windows in an order drawn from (seed, epoch,
    shard). Sequence number n of the run is number n % num_windows of epoch n // num_windows. From the second
    epoch on, the cuts are shifted by a number of tokens drawn from (seed, epoch), so that no token always has
    the same context: over ten epochs of 160,000 tokens that lowered the validation loss from 5.53 to 5.37.

    Nothing that matters is remembered between calls, so processes cannot drift apart and a resumed run needs
    only the step number. Few shards are open at a time: memory does not grow with the data.
    """

    def __init__(
        self,
        folder: str | Path | Folder,
        split: str,
        seq_len: int,
        seed: int = 0,
        vocab_size: int = END_OF_TEXT + 1,
    ):
        """Checks all shards of the split. Raises ValueError or FileNotFoundError, naming the file, if one is
        not whole, and ValueError if the split is shorter than one window."""
        self.folder = folder if isinstance(folder, Folder) else open_folder(folder)
        self.seq_len, self.seed, self.vocab_size = seq_len, seed, vocab_size
        self.entries = [shard for shard in self.folder.entries if shard["split"] == split]
        for entry in self.entries:
            self.folder.check(entry)
        self.sizes = [entry["tokens"] for entry in self.entries]
        self.ends = np.cumsum(self.sizes, dtype=np.int64)  # in the stream of tokens
        self.num_tokens = sum(self.sizes)
        self.num_windows = max(0, (self.num_tokens - 1) // seq_len)
        if not self.num_windows:
            raise ValueError(
                f"{self.folder.name} has {self.num_tokens:,} tokens for {split}; a sequence needs "
                f"{seq_len + 1:,}: use more text or a smaller --seq-len"
            )
        self.announced = (-1, -1)  # epoch and place in its order of the shard that was last announced
        self._open = functools.lru_cache(maxsize=4)(self._open_shard)
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)
        self._window_order = functools.lru_cache(maxsize=4)(self._draw_window_order)

    def batches(
        self,
        steps: range,
        micro_steps: int,
        batch_size: int,
        sequences: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
        """`batch` for every micro-step of the steps, in order, made in the background a few ahead; with
        pin_memory in page-locked memory, from where a GPU can copy while it computes."""

        def make() -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
            for step in steps:
                for micro_step in range(micro_steps):
                    x, y = self.batch(step, micro_step, batch_size, sequences, rank, world_size)
                    yield (x.contiguous().pin_memory(), y.contiguous().pin_memory()) if pin_memory else (x, y)

        return prepared(make(), depth=4)

    def batch(
        self, step: int, micro_step: int, batch_size: int, sequences: int, rank: int = 0, world_size: int = 1
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """Inputs and targets, each (batch_size, seq_len) int64, of one micro-step of one process.

        A step takes the run's sequences step * sequences to (step + 1) * sequences, whatever batch_size and
        world_size; they are dealt out micro-step by micro-step, rank by rank.
        """
        first = step * sequences + (micro_step * world_size + rank) * batch_size
        return self.read([self.position(n) for n in range(first, first + batch_size)])

    def position(self, sequence: int) -> int:
        """Where in the split's stream of tokens sequence number `sequence` of the run begins."""
        epoch, number = divmod(sequence, self.num_windows)
        order, ends, firsts, shift = self._epoch(epoch)
        i = int(np.searchsorted(ends, number, side="right"))
        if self.announced != (epoch, i):
            self.announced = epoch, i
            following = order[i + 1] if i + 1 < len(order) else self._epoch(epoch + 1)[0][0]
            self.folder.expect(self.entries[int(following)])
            if order[i] + 1 < len(order) and "head_sha256" not in self.entries[order[i] + 1]:
                self.folder.expect(self.entries[order[i] + 1])  # one window reaches into it
        shard, begin = int(order[i]), int(ends[i - 1]) if i else 0
        windows = self._window_order(epoch, shard, int(firsts[shard + 1] - firsts[shard]))
        window = int(firsts[shard] + windows[number - begin])
        # The shift may leave no room for the last window: then it takes the last tokens that there are.
        return min(shift + window * self.seq_len, self.num_tokens - self.seq_len - 1)

    def read(self, positions: Sequence[int]) -> "tuple[torch.Tensor, torch.Tensor]":
        """Inputs and targets, each (len(positions), seq_len) int64, that begin there in the stream of tokens.
        Raises ValueError, naming file and offset, for a token outside the vocabulary."""
        import torch

        rows = np.empty((len(positions), self.seq_len + 1), dtype=np.int64)
        for row, begin in zip(rows, positions):
            filled = 0
            while filled < len(row):  # a window may reach over the end of a shard
                i = int(np.searchsorted(self.ends, begin + filled, side="right"))
                offset, wanted = begin + filled - int(self.ends[i]) + self.sizes[i], len(row) - filled
                part = self.folder.head(self.entries[i], min(wanted, self.sizes[i])) if filled else None
                if part is None:
                    part = self._open(i)[offset : offset + wanted]
                if int(part.max()) >= self.vocab_size:
                    bad = int(np.argmax(part >= self.vocab_size))
                    raise ValueError(
                        f"{self.folder.name}/{self.entries[i]['file']}: token {int(part[bad])} at offset "
                        f"{offset + bad} is outside the vocabulary (0 to {self.vocab_size - 1})"
                    )
                row[filled : filled + len(part)] = part
                filled += len(part)
        tokens = torch.from_numpy(rows)
        return tokens[:, :-1], tokens[:, 1:]

    def unigram_entropy(self, max_tokens: int = DEFAULT_VAL_TOKENS) -> float:
        """Nats a token of the split's own token frequencies: the loss of a model that knows these and no
        more."""
        counts, left = np.zeros(2**16, dtype=np.int64), max_tokens
        for i in range(len(self.sizes)):
            counts += np.bincount(self._open(i)[:left], minlength=2**16)
            left -= min(left, self.sizes[i])
            if not left:
                break
        p = counts[counts > 0] / counts.sum()
        return float(-(p * np.log(p)).sum())

    def _open_shard(self, i: int) -> np.ndarray:
        try:
            return open_shard(self.folder.path(self.entries[i]), self.sizes[i])
        except FileNotFoundError:  # another run with the same cache has made room, just now
            return open_shard(self.folder.path(self.entries[i]), self.sizes[i])

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """The order of the shards, how many windows have passed after each of them in that order, the first
        window of each shard (it belongs to the shard it begins in), and the shift of all windows."""
        draw = np.random.default_rng([self.seed, epoch])
        order = draw.permutation(len(self.sizes))
        shift = int(draw.integers(self.seq_len)) if epoch else 0
        begins = np.maximum(np.concatenate([[0], self.ends]) - shift, 0)
        firsts = np.minimum(-(-begins // self.seq_len), self.num_windows)
        firsts[-1] = self.num_windows
        return order, np.cumsum(np.diff(firsts)[order]), firsts, shift

    def _draw_window_order(self, epoch: int, shard: int, count: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch, shard]).permutation(count)
