"""Token shards: their format, checks, and the reader that makes training batches of them.

    data/<name>/<name>_val_000000.npy       one-dimensional uint16; 50256 precedes each document
    data/<name>/<name>_train_000000.npy     np.load reads it, and so do nanoGPT's and build-nanogpt's loaders
    data/<name>/manifest.json               tokenizer, source, and each shard's tokens, documents and SHA-256
    data/<name>/parts/000000/               while fineweb.py runs: the parts of the source

    reader = shards.ShardReader("data/pydocs", "train", seq_len=1024)
    x, y = reader.batch(step=0, micro_step=0, batch_size=4, sequences=64)    # each (4, 1024) int64

lib/shard_writer.py writes shards; lib/hub_shards.py reads them from the Hugging Face Hub. Folders without a
manifest work too, and so do llm.c's .bin shards (1,024 bytes of header, then uint16), and the bare uint16 of
nanoGPT's train.bin and val.bin and of datatrove's .ds.
"""

import contextlib
import functools
import hashlib
import json
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib import cli, files, schema

if TYPE_CHECKING:  # fineweb.py does not need torch, so only `read` imports it
    import torch

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
END_OF_TEXT = 50256
DEFAULT_VAL_TOKENS = 10_485_760  # as in build-nanogpt's evaluation: 20 batches of 524,288
SHARD_NAME = re.compile(r".+_(train|val|test)_(\d+)\.(npy|bin)")
PEERS_NAME = re.compile(r"(.+_)?(train|val|test)\.bin")  # nanoGPT's; with a prefix llm.c's
SPLITS = ("val", "train", "test")
BIN_HEADER_BYTES, BIN_MAGIC, BIN_VERSION = 1024, 20240520, 1  # llm.c, dev/data/data_common.py
NPY_HEADER_BYTES = 128  # of a one-dimensional array, as NumPy pads it
HEAD_TOKENS = 8192  # a shard's first tokens have their own hash: they can be downloaded alone


REMAKE = "remove its folder and make the shards again with fineweb.py"

# Earlier versions wrote fewer fields.
MANIFEST_FIELDS: dict[str, Any] = {
    "format": int, "complete": bool, "shards": list, "tokenizer": dict | None, "request": dict | None,
    **dict.fromkeys(("name", "source", "revision"), str | None),
}  # fmt: skip
SHARD_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("file", "split", "sha256"), str), "tokens": int, "documents": int | None,
    "head_sha256": str | None,
}  # fmt: skip


def load_manifest(path: Path) -> dict:
    """Reads a manifest, complete or not. Raises ValueError if it is damaged or of a later version."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        schema.check_fields(manifest, {"format": int}, "manifest")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}. If it is damaged, {REMAKE}") from error
    schema.check_format(manifest, FORMAT_VERSION, path)
    try:
        schema.check_fields(manifest, MANIFEST_FIELDS, "manifest")
        if (vocabulary := (manifest.get("tokenizer") or {}).get("name", "gpt2")) != "gpt2":
            raise ValueError(f"tokenizer.name is {vocabulary!r}; this code reads GPT-2's tokens")
        seen = set()
        for number, entry in enumerate(manifest["shards"]):
            where = f"shards[{number}]"
            schema.check_fields(entry, SHARD_FIELDS, where)
            file, name = entry["file"], SHARD_NAME.fullmatch(entry["file"])
            if not name or Path(file).name != file or file in seen:
                raise ValueError(f"{where}.file is {file!r}, not the name of a shard here, or there twice")
            if entry["split"] != name[1] or entry["tokens"] < 1:
                raise ValueError(f"{where}: {file} with split {entry['split']!r}, {entry['tokens']} tokens")
            seen.add(file)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}. If it is damaged, {REMAKE}") from error
    return manifest


def read_manifest(folder: Path) -> dict | None:
    """Returns the folder's manifest, or None if it has none. Raises ValueError for a damaged or incomplete
    manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = load_manifest(path)
    if manifest["complete"] is not True:
        raise ValueError(f"{path} is incomplete: its fineweb.py run did not end; run the same command again")
    return manifest


def is_complete(folder: Path) -> bool:
    """Tells whether the folder has a complete manifest."""
    try:
        return read_manifest(folder) is not None
    except ValueError:
        return False


def verify(folder: Path) -> dict:
    """Compares every byte of the shards with the manifest, and returns it. Raises ValueError with the first
    shard that differs, and FileNotFoundError if there is no manifest."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise FileNotFoundError(f"{folder} has no {MANIFEST}; without it, no shard can be verified")
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        ids = open_shard(path, shard["tokens"])
        if files.hash_file(path) != shard["sha256"]:
            raise ValueError(f"{path} does not have the SHA-256 in the manifest: its bytes have changed")
        count_documents(path, ids)
    return manifest


def count_documents(path: Path, ids: np.ndarray) -> int:
    """Counts the documents that begin in a shard. Raises ValueError for a token outside the vocabulary."""
    if (token := int(ids.max())) > END_OF_TEXT:
        raise ValueError(f"{path} holds token {token} at offset {ids.argmax()}; the maximum is {END_OF_TEXT}")
    return int(np.count_nonzero(ids == END_OF_TEXT))


def open_shard(path: Path, tokens: int | None = None) -> np.ndarray:
    """Memory-maps a .npy or .bin shard, (N,) uint16. Raises ValueError if the file is not a shard or N is not
    `tokens`, and FileNotFoundError if it is missing."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; make the data set again with fineweb.py")
    size = path.stat().st_size
    if path.suffix == ".bin":
        header = np.fromfile(path, dtype="<i4", count=256)
        if len(header) < 256 or tuple(header[:2]) != (BIN_MAGIC, BIN_VERSION):
            raise ValueError(
                f"{path} is not a llm.c shard: it does not begin with {BIN_MAGIC}, {BIN_VERSION}"
            )
        if size != BIN_HEADER_BYTES + 2 * (count := int(header[2])):
            raise ValueError(f"{path} has {size} bytes; by its header it has {count} tokens of 2 bytes")
        ids = np.memmap(path, dtype="<u2", mode="r", offset=BIN_HEADER_BYTES, shape=(count,))
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


def open_entry(folder: Path, entry: dict) -> np.ndarray:
    """Memory-maps a shard of `list_shards`, (N,) uint16. Raises the errors of `open_shard`."""
    path = folder / entry["file"]
    if "begin" not in entry:
        return open_shard(path, entry.get("tokens"))
    if path.stat().st_size < 2 * (end := entry["begin"] + entry["tokens"]):
        raise ValueError(f"{path} has become shorter than {end:,} tokens")
    return np.memmap(path, dtype="<u2", mode="r", shape=(end,))[entry["begin"] :]


def find_peers_shards(folder: Path) -> list[dict]:
    """Lists nanoGPT's train.bin and val.bin, llm.c's <name>_train.bin, or datatrove's .ds, if the folder has
    them. Of .ds files, the first tokens are for validation, as with fineweb.py."""
    names = sorted(path.name for path in folder.iterdir())
    if matches := [match for name in names if (match := PEERS_NAME.fullmatch(name))]:
        entries = [{"file": m[0], "split": m[2]} for m in matches]
        bare = [{"tokens": count_bare_tokens(folder / m[0]), "begin": 0} if not m[1] else {} for m in matches]
        return sorted(map(operator.or_, entries, bare), key=lambda entry: SPLITS.index(entry["split"]))
    names = [name for name in names if name.endswith(".ds")]
    if len({name.endswith("_unshuffled.ds") for name in names}) > 1:
        raise ValueError(f"{folder} holds datatrove's files before and after its shuffling; keep one kind")
    sizes = {name: count_bare_tokens(folder / name) for name in names}
    left, val, train = min(DEFAULT_VAL_TOKENS, sum(sizes.values()) // 10), [], []
    for name, size in sizes.items():
        cut = min(left, size)
        left -= cut
        val += [{"file": name, "split": "val", "tokens": cut, "begin": 0}] if cut else []
        train += [{"file": name, "split": "train", "tokens": size - cut, "begin": cut}] if cut < size else []
    return val + train


def count_bare_tokens(path: Path) -> int:
    """Returns the number of tokens in a file of uint16 without a header: nanoGPT's train.bin, or datatrove's
    .ds. Raises ValueError if they are not GPT-2's, as far as the first 100 million and the files beside it
    tell; `ShardReader.read` checks the others."""
    metadata, index = path.with_name(path.name + ".metadata"), path.with_name(path.name + ".index")
    name, said = "gpt2", ""
    if metadata.is_file():  # tokenizer|bytes per token, number of tokens, the same in words
        name, said, *_ = [*metadata.read_text(encoding="utf-8", errors="replace").splitlines(), "", ""]
        if not said.isdecimal():
            raise ValueError(f"{metadata}, line 2 is {said!r}; it must be the number of tokens")
    elif index.is_file():  # where each document ends, in tokens
        ends = np.fromfile(index, dtype="<u8")
        if not len(ends) or 8 * len(ends) != index.stat().st_size:
            raise ValueError(f"{index} has {index.stat().st_size} bytes; it must have 8 for each document")
        said = str(ends[-1])
    needed, size = "GPT-2's shards are uint16, by its own tokenizer", path.stat().st_size
    if path.with_name("meta.pkl").exists():
        raise ValueError(f"{path} lies beside a meta.pkl of nanoGPT: its tokens are characters; {needed}")
    if not re.search("gpt-?2|unknown", name, re.IGNORECASE):
        raise ValueError(f"{metadata} names the tokenizer {name.partition('|')[0]!r}; {needed}")
    if path.with_name(path.name + ".loss").exists():
        raise ValueError(f"{path}.loss masks losses, which training here does not; move it away to ignore it")
    if size % 2 or not size:
        raise ValueError(f"{path} has {size:,} bytes; it must have 2 for each of its tokens, and some tokens")
    ids = np.memmap(path, dtype="<u2", mode="r")
    if 4 * int(said or 0) == size or (len(ids) % 2 == 0 and not ids[1:100_000:2].any()):
        fix = f"np.fromfile({str(path)!r}, 'uint32').astype('uint16').tofile(...)"
        raise ValueError(f"{path} has tokens of 4 bytes; {needed}. If they are GPT-2's, convert them: {fix}")
    if said and int(said) != len(ids):
        raise ValueError(f"{path} has {len(ids):,} tokens; by the file beside it, it has {int(said):,}")
    count_documents(path, ids[:100_000_000])
    return len(ids)


def list_shards(folder: Path) -> list[dict]:
    """Lists a data set's shards in order: dicts with file and split and, from a manifest, tokens and sha256.
    Raises FileNotFoundError, with the command that makes shards, if there are none, and ValueError for shards
    of two formats."""
    if str(folder).startswith("hf:"):
        raise ValueError(f"{folder} is on the Hugging Face Hub; lib.hub_shards.HubFolder opens it")
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is not None:
        return manifest["shards"]
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if names and not any(map(SHARD_NAME.fullmatch, names)) and (entries := find_peers_shards(folder)):
        return entries
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give the folder that holds it")
    return find_shards(names, folder)


def find_shards(names: Iterable[str], where: Any) -> list[dict]:
    """Finds the shards among file names and sorts them: validation first, then by number."""
    matches = [match for name in names if (match := SHARD_NAME.fullmatch(name))]
    if not matches:
        beside = list(Path(where).parent.glob("*/manifest.json")) if isinstance(where, Path) else []
        near = cli.suggest(Path(where).name, [path.parent for path in beside])
        raise FileNotFoundError(
            f"{where} holds no shards{near}; make them: `python fineweb.py --source FILE_OR_FOLDER` of text, "
            "`python fineweb.py` for 10 billion tokens of FineWeb-Edu; or try `python train_gpt2.py demo`"
        )
    if len({match[3] for match in matches}) > 1:
        raise ValueError(
            f"{where} holds both .npy and .bin shards; move the shards of one format to another folder"
        )
    matches.sort(key=lambda match: (SPLITS.index(match[1]), int(match[2]), match[0]))
    return [dict(file=match[0], split=match[1]) for match in matches]


class Folder:
    """The shards of a data set on disk. `entries` is the result of `list_shards`."""

    def __init__(self, folder: Path):
        self.name, self.folder, self.entries = str(folder), folder, list_shards(folder)

    def path(self, entry: dict) -> Path:
        """Returns the shard's path."""
        return self.folder / entry["file"]

    def read_head(self, entry: dict, tokens: int) -> np.ndarray | None:
        """Returns the shard's first tokens if they cost less than the whole shard, else None."""
        return None

    def announce(self, entry: dict):
        """Announces that the shard will be needed soon."""

    def check(self, entry: dict):
        """Raises ValueError or FileNotFoundError, with the file, if the shard is damaged or missing."""
        entry["tokens"] = len(open_entry(self.path(entry).parent, entry))

    def describe_source(self) -> str:
        """Returns the text's source: a Hub name, or a local file's name without its folder, which may be
        private."""
        source = (read_manifest(self.folder) or {}).get("source", self.name)
        return source if ":" in source else Path(source).name

    def fingerprint(self, with_tokenizer: bool = True) -> str:
        """Returns a hash of every shard's name and length and, if known, of content hashes and tokenizer.
        Earlier versions left the tokenizer out."""
        for entry in self.entries:
            if "tokens" not in entry:
                self.check(entry)
        facts = [(entry["file"], entry["tokens"], entry.get("sha256")) for entry in self.entries]
        vocabulary = (read_manifest(self.folder) or {}).get("tokenizer")
        hashed = [vocabulary, facts] if with_tokenizer else facts
        return hashlib.sha256(json.dumps(hashed).encode()).hexdigest()


class ShardReader:
    """Training batches from one split of a data set, as a pure function of the step.

    The split is one stream of tokens, cut into windows of seq_len + 1. The last token of a window is the
    first of the next: a target here, an input there. An epoch visits every window once. The order of the
    shards depends on (seed, epoch), the order of a shard's windows on (seed, epoch, shard). From the second
    epoch on, the cuts are shifted by an amount that depends on (seed, epoch), so that a token's context
    changes. Over ten epochs of 160,000 tokens, the shift lowered the validation loss from 5.53 to 5.37.

    The reader keeps no state between calls except caches. So ranks cannot diverge, and a resumed run needs
    only the step number. It opens at most four shards at a time: memory does not grow with the data.
    """

    def __init__(self, folder: str | Path | Folder, split: str, seq_len: int, seed: int = 0):
        """Checks all shards of the split. Raises ValueError or FileNotFoundError, with the file, if one is
        damaged or missing, and ValueError if the split is shorter than one window."""
        self.folder = folder if isinstance(folder, Folder) else Folder(Path(folder))
        self.seq_len, self.seed = seq_len, seed
        self.entries = [shard for shard in self.folder.entries if shard["split"] == split]
        for entry in self.entries:
            self.folder.check(entry)
        self.sizes = [entry["tokens"] for entry in self.entries]
        self.ends = np.cumsum(self.sizes, dtype=np.int64)  # in the stream of tokens
        self.num_tokens = sum(self.sizes)
        self.num_windows = max(0, (self.num_tokens - 1) // seq_len)
        if not self.entries:
            found = ", ".join(sorted({shard["split"] for shard in self.folder.entries})) or "none"
            raise ValueError(f"{self.folder.name} has no {split} shard; the splits in it: {found}")
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
        self, steps: Iterable[int], micro_steps: int, *batch_args: int, pin_memory: bool = False
    ) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
        """Yields `batch(step, micro_step, *batch_args)` for all steps, in order; a thread makes four ahead.
        pin_memory: in page-locked memory, so that a GPU copies while it computes."""

        def make() -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
            for step in steps:
                for micro_step in range(micro_steps):
                    x, y = self.batch(step, micro_step, *batch_args)
                    yield (x.contiguous().pin_memory(), y.contiguous().pin_memory()) if pin_memory else (x, y)

        return files.prefetch(make(), depth=4)

    def batch(
        self, step: int, micro_step: int, batch_size: int, sequences: int, rank: int = 0, world_size: int = 1
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """Returns inputs and targets, each (batch_size, seq_len) int64, of one micro-step of one rank.

        A step takes the run's sequences step * sequences to (step + 1) * sequences. They are divided by
        micro-step, then by rank, so batch_size and world_size do not change a step's data.
        """
        first = step * sequences + (micro_step * world_size + rank) * batch_size
        return self.read([self.find_position(n) for n in range(first, first + batch_size)])

    def find_position(self, sequence: int) -> int:
        """Returns the offset of the run's sequence number `sequence` in the split's stream of tokens."""
        epoch, number = divmod(sequence, self.num_windows)
        order, ends, firsts, shift = self._epoch(epoch)
        i = int(np.searchsorted(ends, number, side="right"))
        if self.announced != (epoch, i):
            self.announced = epoch, i
            following = order[i + 1] if i + 1 < len(order) else self._epoch(epoch + 1)[0][0]
            self.folder.announce(self.entries[int(following)])
            if order[i] + 1 < len(order) and "head_sha256" not in self.entries[order[i] + 1]:
                self.folder.announce(self.entries[order[i] + 1])  # one window reaches into it
        shard, begin = int(order[i]), int(ends[i - 1]) if i else 0
        windows = self._window_order(epoch, shard, int(firsts[shard + 1] - firsts[shard]))
        window = int(firsts[shard] + windows[number - begin])
        # The shift may leave no room for the last window: then it takes the last tokens that there are.
        return min(shift + window * self.seq_len, self.num_tokens - self.seq_len - 1)

    def read(self, positions: Sequence[int]) -> "tuple[torch.Tensor, torch.Tensor]":
        """Returns inputs and targets, each (len(positions), seq_len) int64, at these offsets in the stream of
        tokens. Raises ValueError, with file and offset, for a token outside the vocabulary."""
        import torch

        rows = np.empty((len(positions), self.seq_len + 1), dtype=np.int64)
        for row, begin in zip(rows, positions):
            filled = 0
            while filled < len(row):  # a window may reach over the end of a shard
                i = int(np.searchsorted(self.ends, begin + filled, side="right"))
                offset, wanted = begin + filled - int(self.ends[i]) + self.sizes[i], len(row) - filled
                part = self.folder.read_head(self.entries[i], min(wanted, self.sizes[i])) if filled else None
                if part is None:
                    part = self._open(i)[offset : offset + wanted]
                if int(part.max()) > END_OF_TEXT:
                    bad, name = int(np.argmax(part > END_OF_TEXT)), self.entries[i]["file"]
                    raise ValueError(
                        f"{self.folder.name}/{name}: token {part[bad]} at offset {offset + bad} is outside "
                        f"the vocabulary, 0 to {END_OF_TEXT}"
                    )
                row[filled : filled + len(part)] = part
                filled += len(part)
        tokens = torch.from_numpy(rows)
        return tokens[:, :-1], tokens[:, 1:]

    def unigram_entropy(self, max_tokens: int = DEFAULT_VAL_TOKENS) -> float:
        """Returns the entropy of the split's token frequencies in nats per token. A model that knows only
        these frequencies has this loss."""
        counts = np.zeros(2**16, dtype=np.int64)
        for i, left in enumerate(max_tokens - self.ends + self.sizes):  # before the shard
            if left > 0:
                counts += np.bincount(self._open(i)[:left], minlength=2**16)
        p = counts[counts > 0] / counts.sum()
        return float(-(p * np.log(p)).sum())

    def _open_shard(self, i: int) -> np.ndarray:
        entry = self.entries[i]
        with contextlib.suppress(FileNotFoundError):  # another run with the same cache removed it just now
            return open_entry(self.folder.path(entry).parent, entry)
        return open_entry(self.folder.path(entry).parent, entry)

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Returns the order of the shards, the cumulative number of windows in that order, each shard's first
        window, and the shift in tokens. A window belongs to the shard in which it begins."""
        draw = np.random.default_rng([self.seed, epoch])
        order = draw.permutation(len(self.sizes))
        shift = int(draw.integers(self.seq_len)) if epoch else 0
        begins = np.maximum(np.concatenate([[0], self.ends]) - shift, 0)
        firsts = np.minimum(-(-begins // self.seq_len), self.num_windows)
        firsts[-1] = self.num_windows
        return order, np.cumsum(np.diff(firsts)[order]), firsts, shift

    def _draw_window_order(self, epoch: int, shard: int, count: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch, shard]).permutation(count)
