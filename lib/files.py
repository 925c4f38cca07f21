"""Atomic writes, verified downloads, and prefetching in a thread.

    files.write_json(path, value)                # the whole file or nothing, flushed to disk
    path = files.download(url, path, sha256)     # a file of known content
    for item in files.prefetch(items, depth=2):  # a thread makes the next two
        ...

On disk: the named files; while they are written, also <name>.<pid>.tmp beside them.
"""

import contextlib
import hashlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
DATA, LOGS, ASSETS = ROOT / "data", ROOT / "log", ROOT / "assets"


def hash_file(path: Path, digest: Any = None) -> str:
    """Returns a file's SHA-256 in hexadecimal. `digest` replaces it, and may already have read a prefix."""
    digest = digest or hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """Returns the SHA-256 of a JSON value; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def flush(path: Path):
    """Flushes a file's bytes, or a folder's renames, to disk, so that they survive a power cut."""
    if os.name == "nt" and path.is_dir():  # Windows flushes folders itself
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]):
    """Lets `write` fill a temporary file, flushes it to disk and renames it to path. Raises OSError with the
    path."""
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
    flush(path.parent)


def write_json(path: Path, value: Any):
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if path.exists() and not path.is_file():  # /dev/stdout must not be replaced by a file
        path.write_text(text, encoding="utf-8")
        return
    write_atomically(path, lambda f: f.write(text.encode("utf-8")))


def prefetch(items: Iterable[T], depth: int) -> Iterator[T]:
    """Yields the items; a thread makes them at most `depth` ahead. Raises the thread's errors here. The
    thread stops when the consumer stops."""
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


def download(url: str, path: Path, sha256: str, tries: int = 4) -> Path:
    """Downloads a file of known content to a temporary name, checks it and renames it to path. Resumes after
    a broken connection. Keeps a file that exists. Raises OSError with the URL if all tries fail."""
    import requests
    from tqdm import tqdm

    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, failure = path.with_name(f"{path.name}.{os.getpid()}.tmp"), ""
    try:
        for attempt in range(tries):
            time.sleep(2**attempt / 2 if attempt else 0)
            have = partial.stat().st_size if partial.exists() else 0
            headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
            try:
                with requests.get(url, headers=headers, stream=True, timeout=10) as response:
                    response.raise_for_status()
                    size = int(response.headers.get("Content-Length", 0)) or None
                    bar = tqdm(desc=path.name, total=size, unit="B", unit_scale=True, disable=None)
                    with bar, open(partial, "ab" if response.status_code == 206 else "wb") as f:
                        for block in response.iter_content(1 << 16):
                            bar.update(f.write(block))
            except requests.RequestException as error:
                failure = f"{type(error).__name__}: {error}"
                continue
            if (found := hash_file(partial)) == sha256:
                flush(partial)
                os.replace(partial, path)
                return path
            failure = f"{partial.stat().st_size:,} bytes with SHA-256 {found}, not {sha256}"
            partial.unlink()
    finally:
        partial.unlink(missing_ok=True)
    raise OSError(f"{url} could not be had in {tries} tries: {failure}")
