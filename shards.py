"""Token shards: written, checked, and read back as training batches.

    data/<name>/<name>_val_000000.npy       one-dimensional uint16, each document after a 50256
    data/<name>/<name>_train_000000.npy     np.load reads it, and so do nanoGPT's and build-nanogpt's loaders
    data/<name>/manifest.json               tokenizer, source, and each shard's tokens, documents and SHA-256

fineweb.py writes them with `ShardWriter`; train_gpt2.py reads them with `ShardReader`, which also takes
folders without a manifest and llm.c's .bin shards (1,024 bytes of header, then uint16).
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
END_OF_TEXT = 50256
DEFAULT_VAL_TOKENS = 10_485_760  # what build-nanogpt evaluates on: 20 batches of 524,288
SHARD_NAME = re.compile(r".+_(train|val)_(\d+)\.(npy|bin)")
BIN_HEADER_BYTES, BIN_MAGIC, BIN_VERSION = 1024, 20240520, 1  # llm.c, dev/data/data_common.py


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]):
    """`write` fills a temporary file, which is flushed to disk and then renamed to path: all of it or
    nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name != "nt":  # Windows keeps its directories itself
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class ShardWriter:
    """Cuts a stream of tokens into shards: the first `val_tokens` for validation, the rest for training.

    With val_tokens None, validation gets DEFAULT_VAL_TOKENS, or a tenth of a corpus too small for that. The
    manifest grows with each shard and says "complete" only after `close`.
    """

    def __init__(self, folder: Path, name: str, shard_tokens: int, val_tokens: int | None, about: dict):
        """`about` (tokenizer, source, ...) goes into the manifest as it is. Raises ValueError for sizes under
        1."""
        if shard_tokens < 1:
            raise ValueError(
                f"--shard-tokens is {shard_tokens}; it must be at least 1 (100,000,000 is usual)"
            )
        if val_tokens is not None and val_tokens < 0:
            raise ValueError(f"--val-tokens is {val_tokens}; it must be 0 or more")
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.val_tokens, self.val_left = val_tokens, val_tokens
        self.chunks: list[np.ndarray] = []
        self.held = 0  # tokens in chunks
        self.manifest: dict = {
            "format": FORMAT_VERSION,
            "name": name,
            **about,
            "complete": False,
            "shards": [],
        }
        folder.mkdir(parents=True, exist_ok=True)
        ours = re.compile(rf"\.?{re.escape(name)}_(train|val)_\d+\.npy(\.tmp)?")
        left = [old for old in folder.iterdir() if ours.fullmatch(old.name)]
        if left and not (folder / MANIFEST).is_file():  # ours is written before the first shard
            raise ValueError(
                f"{folder} holds shards without a {MANIFEST}, such as {left[0].name}; "
                "choose another --name or --out-dir"
            )
        for old in left:  # what an interrupted run left
            old.unlink()
        self._write_manifest()

    @property
    def tokens(self) -> int:
        """Tokens taken so far."""
        return self.held + sum(shard["tokens"] for shard in self.manifest["shards"])

    def write(self, ids: np.ndarray):
        """Appends uint16 tokens (N,) to the stream."""
        self.chunks.append(ids)
        self.held += len(ids)
        if self.val_left is None and self.held >= 10 * DEFAULT_VAL_TOKENS:
            self.val_left = DEFAULT_VAL_TOKENS
        if self.val_left is not None and self.held >= self.shard_tokens:
            self._write_shards(last=False)

    def close(self) -> dict:
        """Writes what is left and returns the manifest. Raises ValueError where nothing is left for
        training."""
        if self.val_left is None:
            self.val_left = self.held // 10
        self._write_shards(last=True)
        if not any(shard["split"] == "train" for shard in self.manifest["shards"]):
            raise ValueError(
                f"the text has {self.tokens:,} tokens, of which --val-tokens takes {self.val_tokens or 0:,}: "
                "none is left for training; give more text or a smaller --val-tokens"
            )
        self.manifest["complete"] = True
        self._write_manifest()
        return self.manifest

    def _write_shards(self, last: bool):
        stream = np.concatenate(self.chunks) if self.chunks else np.empty(0, dtype=np.uint16)
        while len(stream):
            split = "val" if self.val_left else "train"
            size = min(self.shard_tokens, self.val_left) if self.val_left else self.shard_tokens
            if len(stream) < size and not last:
                break
            part, stream = stream[:size], stream[size:]
            if self.val_left:
                self.val_left -= len(part)
            self._write_shard(split, part)
        self.chunks, self.held = [stream.copy()], len(stream)

    def _write_shard(self, split: str, ids: np.ndarray):
        shards = self.manifest["shards"]
        number = sum(shard["split"] == split for shard in shards)
        path = self.folder / f"{self.name}_{split}_{number:06d}.npy"
        write_atomically(path, lambda f: np.save(f, ids))
        documents = int(np.count_nonzero(ids == END_OF_TEXT))
        digest = sha256_file(path)
        shards.append(dict(file=path.name, split=split, tokens=len(ids), documents=documents, sha256=digest))
        self._write_manifest()

    def _write_manifest(self):
        text = json.dumps(self.manifest, indent=2, ensure_ascii=False)
        write_atomically(self.folder / MANIFEST, lambda f: f.write(text.encode("utf-8")))


def read_manifest(folder: Path) -> dict | None:
    """The folder's manifest, or None where there is none. Raises ValueError if it is damaged or
    incomplete."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        entries = [(s["file"], s["split"], s["tokens"], s["sha256"]) for s in manifest["shards"]]
        complete, version = manifest["complete"], manifest["format"]
        if not all(list(map(type, entry)) == [str, str, int, str] for entry in entries):
            raise ValueError("a shard's file, split, tokens or sha256 has the wrong type")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); make the shards again with fineweb.py") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format {version}; this code reads format {FORMAT_VERSION}")
    if complete is not True:
        raise ValueError(f"{path} is incomplete: its fineweb.py run did not end; run the same command again")
    for file, *_ in entries:
        if Path(file).name != file or not SHARD_NAME.fullmatch(file):
            raise ValueError(f"{path} lists {file!r}, which is not the name of a shard in its folder")
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
        if sha256_file(path) != shard["sha256"]:
            raise ValueError(f"{path} does not have the SHA-256 in the manifest: its bytes have changed")
        if len(ids) and int(ids.max()) > END_OF_TEXT:
            raise ValueError(f"{path} holds token {int(ids.max())}; the vocabulary ends at {END_OF_TEXT}")
    return manifest


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

    Raises FileNotFoundError, naming the command that makes them, where there are none.
    """
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is not None:
        return manifest["shards"]
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    matches = [match for name in names if (match := SHARD_NAME.fullmatch(name))]
    if not matches:
        raise FileNotFoundError(
            f"{folder} holds no shards. Make them: `python fineweb.py` for 10 billion tokens of FineWeb-Edu, "
            "`python fineweb.py --source FILE_OR_FOLDER` for your own; or try `python train_gpt2.py demo`"
        )
    matches.sort(key=lambda match: (match[1], int(match[2])))
    return [dict(file=match[0], split=match[1]) for match in matches]


def fingerprint(folder: Path) -> str:
    """A hash of what the data set is: every shard's name, length and, where there is a manifest, content
    hash."""
    facts = [
        (s["file"], s["tokens"] if "tokens" in s else len(open_shard(folder / s["file"])), s.get("sha256"))
        for s in list_shards(folder)
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class ShardReader:
    """Training batches from one split of a data set, as a pure function of the step.

    The split is one long stream of tokens, cut into windows of seq_len + 1 (the last token of a window is the
    first of the next: it is a target here and an input there). An epoch visits every window once: shards in
    an order drawn from (seed, epoch), and inside each shard its windows in an order drawn from (seed, epoch,
    shard). Sequence number n of the run is position n % num_windows of epoch n // num_windows. Nothing is
    remembered between calls, so processes cannot drift apart and a resumed run needs only the step number.
    """

    def __init__(
        self, folder: str | Path, split: str, seq_len: int, seed: int = 0, vocab_size: int = END_OF_TEXT + 1
    ):
        """Opens (memory-maps) and checks all shards of the split. Raises ValueError or FileNotFoundError,
        naming the file, if one is not whole, and ValueError if the split is shorter than one window."""
        self.folder, self.seq_len, self.seed, self.vocab_size = Path(folder), seq_len, seed, vocab_size
        entries = [shard for shard in list_shards(self.folder) if shard["split"] == split]
        self.paths = [self.folder / shard["file"] for shard in entries]
        self.shards = [open_shard(path, shard.get("tokens")) for path, shard in zip(self.paths, entries)]
        self.ends = np.cumsum(
            [len(shard) for shard in self.shards], dtype=np.int64
        )  # in the stream of tokens
        self.num_tokens = int(self.ends[-1]) if len(self.ends) else 0
        self.num_windows = max(0, (self.num_tokens - 1) // seq_len)
        if not self.num_windows:
            raise ValueError(
                f"{self.folder} has {self.num_tokens:,} tokens for {split}; a sequence needs "
                f"{seq_len + 1:,}: use more text or a smaller --seq-len"
            )
        # Windows belong to the shard they begin in: shard i holds windows firsts[i] up to firsts[i + 1].
        begins = np.concatenate([[0], self.ends])
        self.firsts = np.minimum(-(-begins // seq_len), self.num_windows)
        self._shard_order = functools.lru_cache(maxsize=2)(self._draw_shard_order)
        self._window_order = functools.lru_cache(maxsize=4)(self._draw_window_order)

    def batch(
        self, step: int, micro_step: int, batch_size: int, sequences: int, rank: int = 0, world_size: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, each (batch_size, seq_len) int64, of one micro-step of one process.

        A step takes the run's sequences step * sequences to (step + 1) * sequences, whatever batch_size and
        world_size; they are dealt out micro-step by micro-step, rank by rank.
        """
        first = step * sequences + (micro_step * world_size + rank) * batch_size
        return self.read([self.window(n) for n in range(first, first + batch_size)])

    def window(self, sequence: int) -> int:
        """The window that is sequence number `sequence` of the run."""
        epoch, position = divmod(sequence, self.num_windows)
        order, ends = self._shard_order(epoch)
        i = int(np.searchsorted(ends, position, side="right"))
        shard, begin = int(order[i]), int(ends[i - 1]) if i else 0
        return int(self.firsts[shard] + self._window_order(epoch, shard)[position - begin])

    def read(self, windows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, each (len(windows), seq_len) int64. Raises ValueError, naming file and offset,
        for a token outside the vocabulary."""
        rows = np.empty((len(windows), self.seq_len + 1), dtype=np.int64)
        for row, window in zip(rows, windows):
            begin, filled = window * self.seq_len, 0
            while filled < len(row):  # a window may reach over the end of a shard
                i = int(np.searchsorted(self.ends, begin + filled, side="right"))
                shard, offset = self.shards[i], begin + filled - int(self.ends[i]) + len(self.shards[i])
                part = shard[offset : offset + len(row) - filled]
                if int(part.max()) >= self.vocab_size:
                    bad = offset + int(np.argmax(part >= self.vocab_size))
                    raise ValueError(
                        f"{self.paths[i]}: token {int(shard[bad])} at offset {bad} is outside the vocabulary "
                        f"(0 to {self.vocab_size - 1})"
                    )
                row[filled : filled + len(part)] = part
                filled += len(part)
        tokens = torch.from_numpy(rows)
        return tokens[:, :-1], tokens[:, 1:]

    def unigram_entropy(self, max_tokens: int = DEFAULT_VAL_TOKENS) -> float:
        """Nats a token of the split's own token frequencies: the loss of a model that knows these and no
        more."""
        counts, left = np.zeros(2**16, dtype=np.int64), max_tokens
        for shard in self.shards:
            counts += np.bincount(shard[:left], minlength=2**16)
            left -= min(left, len(shard))
        p = counts[counts > 0] / counts.sum()
        return float(-(p * np.log(p)).sum())

    def _draw_shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shards))
        return order, np.cumsum(np.diff(self.firsts)[order])

    def _draw_window_order(self, epoch: int, shard: int) -> np.ndarray:
        count = int(self.firsts[shard + 1] - self.firsts[shard])
        return np.random.default_rng([self.seed, epoch, shard]).permutation(count)
