"""Writes token shards: the parts of a source in parallel, then `merge` joins them.

    plan = shard_writer.hash_plan(shard_writer.begin(folder, about))
    with shard_writer.PartWriter(folder, 0, shard_tokens=100_000_000, plan=plan) as writer:
        writer.write(ids)
        writer.close()
    manifest = shard_writer.merge(folder)

On disk, until `merge`: data/<name>/parts/000000/, one folder per part. lib/shards.py describes the format.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lib import disk, files, shards
from lib.shards import DEFAULT_VAL_TOKENS, END_OF_TEXT, HEAD_TOKENS, MANIFEST, load_manifest, open_shard

PARTS = "parts"


class PartWriter:
    """Cuts the stream of tokens of one part of a source into shards, in folder/parts/<part>.

    The first `val_tokens` go to the validation split, the rest to `split`. If val_tokens is None, validation
    gets DEFAULT_VAL_TOKENS, or a tenth of a stream under ten times that. A thread writes a shard while the
    caller makes the next one's tokens. An interrupted part resumes after its last complete shard: the caller
    continues with document number `documents_done` and skips that document's first `tokens_done` tokens.
    """

    def __init__(
        self, folder: Path, part: int, shard_tokens: int,
        val_tokens: int | None = None, split: str = "train", plan: str = "",
    ):  # fmt: skip
        """`plan` is the data set's `hash_plan`. Raises OSError if another process is writing the part, and
        ValueError if the existing part has another plan."""
        from filelock import FileLock, Timeout

        self.folder, self.shard_tokens, self.split = locate_part(folder, part), shard_tokens, split
        self.pieces: list[np.ndarray] = []
        self.held = 0  # tokens in pieces
        files.make_folder(self.folder)
        self.lock = FileLock(self.folder.with_suffix(".lock"))
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            raise OSError(f"another process is writing part {part} of {folder}; wait for it") from error
        begun = {"plan": plan, "complete": False, "val_tokens": val_tokens, "shards": []}
        self.state = read_part(folder, part) or begun
        if self.state.get("plan", plan) != plan:  # an earlier version wrote none
            raise ValueError(f"{self.folder} is of another source or other flags; remove it")
        self.shards: list[dict] = self.state["shards"]
        self._remove_damaged()
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
        """The number of tokens in the part so far."""
        return self.held + sum(shard["tokens"] for shard in self.shards)

    def write(self, ids: np.ndarray):
        """Appends uint16 tokens (N,) to the stream."""
        self.pieces.append(ids)
        self.held += len(ids)
        if self.val_left is None and self.held >= 10 * DEFAULT_VAL_TOKENS:
            self.state["val_tokens"] = self.val_left = DEFAULT_VAL_TOKENS
        while self.val_left is not None and self.held >= self._next_size():
            self._write_shard(self._next_size())

    def close(self, read_back: bool = False):
        """Writes the remaining tokens and marks the part as complete. read_back: first compares the shards'
        bytes on disk with their hashes. Raises ValueError if validation would take all tokens."""
        if self.val_left is None:
            self.state["val_tokens"] = self.val_left = self.held // 10
        if self.val_left and self.val_left >= self.held:
            raise ValueError(
                f"--val-tokens is {self.state['val_tokens']:,}, but the text or its first part has "
                f"{self.tokens:,} tokens, so none is left for training; give a smaller --val-tokens"
            )
        while self.held:
            self._write_shard(min(self.held, self._next_size()))
        self._wait()
        for shard in self.shards if read_back else []:
            if files.hash_file(self.folder / shard["file"]) != shard["sha256"]:
                raise OSError(f"{self.folder / shard['file']} differs from the bytes written; check the disk")
        self.state["complete"] = True
        files.write_json(self.folder / "part.json", self.state)

    def _next_size(self) -> int:
        return min(self.shard_tokens, self.val_left) if self.val_left else self.shard_tokens

    def _write_shard(self, tokens: int):
        """Removes so many tokens from the stream; a thread writes them."""
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
            shard = f"a shard of {self.folder}"
            disk.wait_for(self.writing, shard, lambda text: print(text, file=sys.stderr, flush=True))
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

        files.write_atomically(path, fill)
        documents = sum(int(np.count_nonzero(piece == END_OF_TEXT)) for piece in pieces)
        head = hashlib.sha256(open_shard(path)[:HEAD_TOKENS].tobytes()).hexdigest()
        facts = dict(documents=documents, sha256=digest.hexdigest(), head_sha256=head)
        self.shards.append(dict(file=path.name, split=split, tokens=tokens, **facts))
        files.write_json(self.folder / "part.json", self.state)

    def _remove_damaged(self):
        """Removes all files except the shards before the first missing or damaged one."""
        for i, shard in enumerate(self.shards):
            path = self.folder / shard["file"]
            if not path.is_file() or files.hash_file(path) != shard["sha256"]:
                del self.shards[i:]
                self.state["complete"] = False
                break
        whole = {"part.json", *(shard["file"] for shard in self.shards)}
        for path in self.folder.iterdir():
            if path.name not in whole:
                path.unlink()

    def _position(self) -> tuple[int, int]:
        """Returns the number of the last document that was begun and the count of its tokens on disk, with
        its 50256."""
        begun, tokens = sum(shard["documents"] for shard in self.shards), 0
        for shard in reversed(self.shards):
            ids = open_shard(self.folder / shard["file"])
            starts = np.flatnonzero(ids == END_OF_TEXT)
            if len(starts):
                return begun - 1, tokens + len(ids) - int(starts[-1])
            tokens += len(ids)
        return 0, 0


def locate_part(folder: Path, part: int) -> Path:
    return folder / PARTS / f"{part:06d}"


def hash_plan(manifest: dict) -> str:
    """Returns a hash of the manifest's description of the data set. All parts must have the same."""
    plan = {key: value for key, value in manifest.items() if key not in ("complete", "shards")}
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def read_part(folder: Path, part: int) -> dict | None:
    """Returns the part's state, or None if its part.json is missing or damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads((locate_part(folder, part) / "part.json").read_text(encoding="utf-8"))
    return None


def begin(folder: Path, about: dict) -> dict:
    """Writes an incomplete manifest with `about` (name, source, parts, ...) unless one exists; returns the
    manifest. If several processes start at once, exactly one writes it. Raises ValueError if the folder
    holds shards of another origin."""
    files.make_folder(folder)
    path = folder / MANIFEST
    if not path.is_file():
        if strangers := [p.name for p in folder.iterdir() if shards.SHARD_NAME.fullmatch(p.name)]:
            found = f"{folder} holds shards without a {MANIFEST}, such as {strangers[0]}"
            raise ValueError(f"{found}; choose another --name or --out-dir")
        first = folder / f".{MANIFEST}.{os.getpid()}.{threading.get_ident()}.begin"
        files.write_json(first, {"format": shards.FORMAT_VERSION, **about, "complete": False, "shards": []})
        try:
            os.link(first, path)  # fails if another process has written the manifest
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(first, path)
        files.flush(folder)
        first.unlink(missing_ok=True)
    return load_manifest(path)


def find_missing_parts(folder: Path, manifest: dict) -> list[int]:
    return [p for p in range(manifest["parts"]) if not (read_part(folder, p) or {}).get("complete")]


def merge(folder: Path) -> dict:
    """Renames the shards of all parts to their final names; completes and returns the manifest. It may be
    interrupted and repeated, and several processes may call it at once. Raises ValueError if a part is
    missing, or if no tokens are left for training; then it also clears the folder."""
    try:
        return _merge(folder)
    except (ValueError, OSError):
        if shards.is_complete(folder):  # another process was faster
            return load_manifest(folder / MANIFEST)
        raise


def _merge(folder: Path) -> dict:
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} has no {MANIFEST}; give the folder of a data set that fineweb.py began")
    manifest = load_manifest(folder / MANIFEST)
    if manifest["complete"]:
        shutil.rmtree(folder / PARTS, ignore_errors=True)
        return manifest
    if "parts" not in manifest:  # the first version wrote final names at once
        raise ValueError(f"{folder} was begun by an earlier version; remove it and start again")
    if missing := find_missing_parts(folder, manifest):
        some = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise ValueError(f"{folder}: of {manifest['parts']} parts, these are missing or incomplete: {some}")
    parts = [part for number in range(manifest["parts"]) if (part := read_part(folder, number))]
    if len(parts) < manifest["parts"]:
        raise ValueError(f"{folder / PARTS} was removed while its parts were joined")
    plan = hash_plan(manifest)
    if strangers := [n for n, part in enumerate(parts) if part.get("plan", plan) != plan]:
        raise ValueError(f"{folder}: parts {strangers} are of another source or other flags than {MANIFEST}")
    found = [shard for part in parts for shard in part["shards"] if shard["split"] == "train"]
    if all(shard["tokens"] == shard["documents"] for shard in found):  # no more than a 50256 per document
        clear(folder)
        raise ValueError(f"{manifest.get('source')} has no text for training")
    entries = []
    for split in shards.SPLITS:
        found = [(n, s) for n, part in enumerate(parts) for s in part["shards"] if s["split"] == split]
        for number, (part, shard) in enumerate(found):
            path = folder / f"{manifest['name']}_{split}_{number:06d}.npy"
            with contextlib.suppress(FileNotFoundError):  # moved by an earlier try, or by another process
                os.replace(locate_part(folder, part) / shard["file"], path)
            open_shard(path, shard["tokens"])
            entries.append({**shard, "file": path.name})
    files.flush(folder)
    manifest |= {"complete": True, "shards": entries}
    files.write_json(folder / MANIFEST, manifest)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    for left in folder.glob(f".*{MANIFEST}.*"):  # of killed processes
        left.unlink(missing_ok=True)
    return manifest


def clear(folder: Path):
    """Removes the data set's parts, shards and manifest from the folder."""
    manifest = load_manifest(folder / MANIFEST)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    ours = re.compile(rf"\.?{re.escape(manifest['name'])}_(train|val|test)_\d+\.(npy|bin)(\..*tmp)?")
    for path in [p for p in folder.iterdir() if ours.fullmatch(p.name)]:
        path.unlink()
    (folder / MANIFEST).unlink()
