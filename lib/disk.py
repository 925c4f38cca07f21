"""A disk that is slow, or that refuses to write, and why: its owner, its inodes.

    with disk.name_failure(path): ...                    # an OSError names the path and the reason
    disk.check_writable(folder)                          # before hours of work
    disk.wait_for(writing, "step_000250", print)         # says so if it takes long

Windows says neither the owner nor the inodes.
"""

import concurrent.futures
import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SLOW_SECONDS = 10.0  # a wait that is said


def wait_for(writing: concurrent.futures.Future, name: str, say: Callable[[str], Any]):
    """Waits for a thread that writes a file or folder of this name; says so again and again if it is slow."""
    begin, pause = time.monotonic(), SLOW_SECONDS
    while concurrent.futures.wait([writing], pause).not_done:
        waited = time.monotonic() - begin
        say(f"waiting for {name} to be written, for {waited:.0f} s so far: its disk is slow or stuck")
        pause = min(60.0, 2 * pause)


def find_existing(path: Path) -> Path | None:
    """The path, or the nearest of the folders above it that exists and may be looked at, if any."""
    path = path.absolute()
    return next((place for place in (path, *path.parents) if os.access(place, os.F_OK)), None)


def name_owner(path: Path) -> str:
    """The user who owns a path, or the user's number if it has no name."""
    try:
        return path.owner()
    except KeyError:
        return f"user {path.stat().st_uid}"
    except NotImplementedError:  # pathlib knows no owners on Windows
        return "another user"


def explain(error: OSError, path: Path) -> str:
    """What the text of an error lacks: whose the path is, if access was denied; and that inodes are what the
    disk lacks, not bytes. Returns "" for any other error."""
    place = find_existing(path)
    if not place or os.name == "nt":
        return ""
    if error.errno in (errno.EACCES, errno.EPERM):
        if os.access(place, os.W_OK):  # so it is the folder that refuses
            place = place.parent
        mode = stat.filemode(place.stat().st_mode)
        owner = f"; {place} belongs to {name_owner(place)} ({mode})"
        return f"{owner}: have its mode changed, or choose another place"
    disk = os.statvfs(place)
    # EIO is what checkpoint.save makes of an error of safetensors.
    if error.errno in (errno.ENOSPC, errno.EIO) and disk.f_files and not disk.f_favail and disk.f_bavail:
        free = disk.f_bavail * disk.f_frsize
        return f"; its disk has {free / 1e6:,.0f} MB free, but no inode for another file: remove some files"
    return ""


@contextlib.contextmanager
def name_failure(path: Path) -> Iterator[None]:
    """Adds the path and what the error lacks, while the disk is as it was at the error."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror}{explain(error, path)}"
        raise OSError(error.errno, f"{path} could not be written: {reason}") from error


def check_writable(folder: Path):
    """Raises OSError, with the path and the reason, if no file can be made in a folder, or in the nearest
    folder above it that exists."""
    place = find_existing(folder) or folder
    probe = place / f".{secrets.token_hex(8)}.tmp"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        probe.unlink()
    except OSError as error:
        reason = f"{error.strerror}{explain(error, place)}"
        raise OSError(error.errno, f"{folder} cannot be written: {reason}") from error
