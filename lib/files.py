"""Atomic writes, verified downloads, and prefetching in a thread.

    files.write_json(path, value)                # the whole file or nothing, flushed to disk
    path = files.download(url, path, sha256)     # a file of known content
    for item in files.prefetch(items, depth=2):  # a thread makes the next two
        ...

On disk: the named files; while they are written, also <name>.<pid>.tmp beside them.
"""

import ast
import hashlib
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from lib import disk

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


def hash_code(path: Path) -> str:
    """Returns the SHA-256 of a Python file's syntax tree, without comments, docstrings and layout."""

    def describe(node: Any) -> Any:
        if isinstance(node, list):
            is_doc = [isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant) for x in node]
            return [describe(x) for x, doc in zip(node, is_doc) if not doc]
        if not isinstance(node, ast.AST):
            return repr(node)
        # Later versions of Python have more fields, which are empty here.
        fields = {name: describe(value) for name, value in ast.iter_fields(node) if value not in (None, [])}
        return [type(node).__name__, fields]

    return hash_json(describe(ast.parse(path.read_bytes())))


def flush(path: Path):
    """Flushes a file's bytes, or a folder's renames, to disk, so that they survive a power cut."""
    if os.name == "nt" and path.is_dir():  # Windows flushes folders itself
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path):
    """Makes a folder and its parents, if they are missing. Their names survive a power cut."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with disk.name_failure(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        flush(path.parent)


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
        if error.errno is None:  # of `write` itself, not of the file system
            raise
        raise OSError(f"{path} could not be written: {error}{disk.explain(error, path)}") from error
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def replace_not_finite(value: Any) -> Any:
    """A JSON value with null for infinities and nan, which JSON does not have."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def append(log: BinaryIO, text: str):
    """Appends text to a file that is not buffered: after an error nothing is left to be written at its end.
    Raises OSError with the path."""
    data = memoryview(text.encode("utf-8"))
    with disk.name_failure(Path(log.name)):
        while data:
            data = data[log.write(data) :]


def check_target(path: str | Path):
    """Raises OSError if a file cannot be written at this path: before hours of work, whose result it is."""
    if path and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise OSError(f"{path} is a folder, or its folder does not exist: nothing can be written there")


def write_json(path: Path, value: Any):
    """Writes a JSON value, with null for what is not finite."""
    text = json.dumps(replace_not_finite(value), indent=2, ensure_ascii=False)
    if path.exists() and not path.is_file():  # /dev/stdout must not be replaced by a file
        path.write_text(text, encoding="utf-8")
        return
    write_atomically(path, lambda f: f.write(text.encode("utf-8")))


def prefetch(items: Iterable[T], depth: int) -> Iterator[T]:
    """Yields the items; a thread makes them at most `depth` ahead. Raises the thread's errors here. The
    thread stops when the consumer stops."""
    ready: queue.SimpleQueue = queue.SimpleQueue()  # of (item,); at the end an error or None
    places, stopped = threading.Semaphore(depth), threading.Event()

    def make():
        try:
            for item in items:
                ready.put((item,))
                places.acquire()
                if stopped.is_set():
                    return
            ready.put(None)
        except BaseException as error:  # raised where the items are used
            ready.put(error)

    threading.Thread(target=make, daemon=True).start()
    try:
        while (made := ready.get()) is not None:
            if isinstance(made, BaseException):
                raise made
            places.release()
            yield made[0]
    finally:
        stopped.set()
        places.release()


def has_no_address(error: BaseException | None) -> bool:
    """Tells whether the error comes from a host name that does not resolve, as without a network."""
    while error is not None and not isinstance(error, socket.gaierror):
        error = error.__cause__ or error.__context__
    return error is not None


def download(url: str, path: Path, sha256: str, tries: int = 4) -> Path:
    """Downloads a file of known content to path, unless it exists. Resumes after a broken connection. Raises
    OSError with the URL if all tries fail, ValueError if another file is at the path."""
    import requests
    from tqdm import tqdm

    def fill(f: BinaryIO):
        failure = ""
        for attempt in range(tries):
            time.sleep(2**attempt / 2 if attempt else 0)
            headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={f.tell()}-"} if f.tell() else {})}
            try:
                with requests.get(url, headers=headers, stream=True, timeout=10) as response:
                    response.raise_for_status()
                    if response.status_code != 206:  # the server sends the whole file
                        f.truncate(f.seek(0))
                    size = float(response.headers.get("Content-Length", "inf"))
                    with tqdm(desc=path.name, total=size, unit="B", unit_scale=True, disable=None) as bar:
                        for block in response.iter_content(1 << 16):
                            bar.update(f.write(block))
            except requests.RequestException as error:
                if not f.tell() and has_no_address(error):
                    raise OSError(
                        f"{url} was not read: the name of its server has no address (no network?)"
                    ) from error
                failure = f"{type(error).__name__}: {error}"
                continue
            f.flush()
            if (found := hash_file(Path(f.name))) == sha256:
                return
            failure = f"{f.tell():,} bytes with SHA-256 {found}, not {sha256}"
            f.seek(0)
        raise OSError(f"{url} failed in all {tries} tries; the last error is {failure}")

    if path.is_file():
        if (found := hash_file(path)) != sha256:
            raise ValueError(
                f"{path} is not the file of {url}: its SHA-256 is {found}, not {sha256}; remove it"
            )
    else:
        make_folder(path.parent)
        write_atomically(path, fill)
    return path
