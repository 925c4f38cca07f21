"""Repositories of the Hugging Face Hub: lists, downloads and uploads their files.

    commit, files = list_hub("org/name")                   # the files of a repository at one commit
    path = fetch(files["sample/10BT/000_00000.parquet"], folder)
    push("org/name", folder, ["manifest.json", ...])
    upload("org/name", "model", {"README.md": text, ...}, "what changed")   # one commit

A file gets its final name after its hash is checked. A broken or stalled connection is retried until PATIENCE
seconds (DOWNLOAD_PATIENCE in the environment) are over. If the Hub's name has no address before anything was
read, there is no network: that is not retried. The client is huggingface_hub; it reads HF_TOKEN (or
`hf auth login`), HF_ENDPOINT and HF_HUB_OFFLINE. On disk: the fetched files, and .incoming/ beside them.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lib import files
from lib.environment import read_number

HUB_PREFIX = "hf://datasets/"
PREFIXES = {"dataset": HUB_PREFIX, "model": "hf://"}
PATIENCE = 600  # seconds spent waiting before giving up, unless DOWNLOAD_PATIENCE says otherwise
was_reached = False  # whether this process has had an answer: a name that fails later may come back
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}


class Unavailable(OSError):
    """A request to the Hub failed, and a retry is useless."""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository at one commit, with the hash of its bytes."""

    repo: str
    revision: str
    path: str
    size: int
    sha256: str  # of files in large-file storage; git's own SHA-1 of the others is in blob_id
    blob_id: str
    repo_type: str = "dataset"  # or "model"

    @property
    def url(self) -> str:
        return f"{PREFIXES[self.repo_type]}{self.repo}@{self.revision}/{self.path}"

    def is_whole(self, path: Path) -> bool:
        """Tells whether the file at path has this file's bytes."""
        if path.stat().st_size != self.size:
            return False
        if self.sha256:
            return files.hash_file(path) == self.sha256
        return files.hash_file(path, hashlib.sha1(f"blob {self.size}\0".encode())) == self.blob_id


def parse_hub(location: str, repo_type: str = "dataset") -> tuple[str, str | None]:
    """Returns the repository and revision (None for the newest) of org/name, with or without @revision and
    the prefix hf://datasets/ (for a model: hf://). Raises ValueError for anything else."""
    prefix = PREFIXES[repo_type]
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", location.removeprefix(prefix).strip("/"))
    if not found:
        raise ValueError(f"{location!r} does not name a {repo_type}; give {prefix}org/name[@revision]")
    return found[1], found[2]


def is_final(error: BaseException) -> bool:
    """Tells whether a retry is useless: the file does not exist, access is denied, the request is invalid, or
    the disk is full. The error's cause counts, too."""
    from huggingface_hub import errors

    not_there = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError)
    status = getattr(getattr(error, "response", None), "status_code", 0)
    # JSONDecodeError: a proxy's page of HTML, say. LocalEntryNotFoundError: the cause is the reason.
    if not isinstance(error, (json.JSONDecodeError, errors.LocalEntryNotFoundError)) and (
        isinstance(error, (ValueError, TypeError, errors.OfflineModeIsEnabled, *not_there))
        or (isinstance(error, FileNotFoundError) and type(error) is not FileNotFoundError)  # of `datasets`
        or (isinstance(error, OSError) and error.errno in DISK_ERRORS)
        or (400 <= status < 500 and status not in (408, 409, 412, 429))  # timeout, conflict, rate limit
    ):
        return True
    return error.__cause__ is not None and is_final(error.__cause__)


def format_reason(error: BaseException) -> str:
    """Returns the error's type and the first line of its message."""
    from huggingface_hub import constants, errors

    if files.has_no_address(error):
        return f"no network: the name of {constants.ENDPOINT} has no address"
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        return format_reason(error.__cause__)
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def retry(what: str, attempt: Callable[[], Any], failed: str = "could not be read from") -> Any:
    """Calls attempt() until it succeeds, with growing pauses. Raises Unavailable (an OSError) with `what` and
    the reason if a retry is useless or PATIENCE is over."""
    global was_reached
    waited, pause = 0.0, 1.0
    while True:
        try:
            result = attempt()
            was_reached = True
            return result
        except Unavailable:
            raise
        except Exception as error:  # the Hub's client raises errors of many families
            reason = format_reason(error)
            is_offline = files.has_no_address(error) and not was_reached
            if is_final(error) or is_offline or waited + pause > read_number("DOWNLOAD_PATIENCE", PATIENCE):
                raise Unavailable(f"{what} {failed} the Hugging Face Hub ({reason})") from error
            print(f"{what}: {reason}; trying again in {pause:.0f} s", file=sys.stderr, flush=True)
        time.sleep(pause)
        waited, pause = waited + pause, min(30.0, 2 * pause)


def list_hub(
    repo: str, revision: str | None = None, paths: list[str] | None = None, repo_type: str = "dataset"
) -> tuple[str, dict[str, HubFile]]:
    """Returns the commit of a revision and its files (or those of `paths`), by path."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    def ask() -> tuple[str, dict[str, HubFile]]:
        api = HfApi()
        commit = api.repo_info(repo, revision=revision, repo_type=repo_type).sha or ""
        where: Any = dict(revision=commit, repo_type=repo_type)
        if paths is None:
            entries: Iterable = api.list_repo_tree(repo, recursive=True, **where)
        else:
            groups = [paths[i : i + 500] for i in range(0, len(paths), 500)]
            entries = [entry for group in groups for entry in api.get_paths_info(repo, group, **where)]
        files = {}
        for entry in (entry for entry in entries if isinstance(entry, RepoFile)):
            if entry.path.startswith("/") or "\\" in entry.path or ".." in PurePosixPath(entry.path).parts:
                raise ValueError(f"the repository lists {entry.path!r}, which leads out of its folder")
            facts = (entry.size, entry.lfs.sha256 if entry.lfs else "", entry.blob_id, repo_type)
            files[entry.path] = HubFile(repo, commit, entry.path, *facts)
        return commit, files

    return retry(f"{PREFIXES[repo_type]}{repo}", ask)


def fetch(file: HubFile, folder: Path) -> Path:
    """Returns the file's path in folder, which is its path in the repository. A missing file is downloaded,
    checked and then moved there. Several processes may fetch one file. Raises OSError with its URL."""
    from filelock import FileLock
    from huggingface_hub import hf_hub_download

    path, incoming = folder / file.path, folder / ".incoming"
    if path.is_file():  # another user's cache need not be writable
        return path
    incoming.mkdir(parents=True, exist_ok=True)

    def attempt() -> Path:
        options = dict(repo_type=file.repo_type, revision=file.revision, local_dir=incoming)
        arrived = Path(hf_hub_download(file.repo, file.path, **options))  # type: ignore[call-overload]
        if not file.is_whole(arrived):
            size = arrived.stat().st_size
            arrived.unlink()
            raise OSError(f"{size:,} bytes arrived; they do not have the listed hash or size, {file.size:,}")
        path.parent.mkdir(parents=True, exist_ok=True)
        files.flush(arrived)
        os.replace(arrived, path)
        files.flush(path.parent)
        return path

    with FileLock(incoming / (hashlib.sha256(file.path.encode()).hexdigest()[:16] + ".lock")):
        if path.is_file():
            return path
        for partial in incoming.rglob(f"*.{file.sha256 or file.blob_id}.*incomplete"):  # of killed processes
            partial.unlink(missing_ok=True)
        return retry(file.url, attempt)


def read_start(file: HubFile, count: int) -> bytes:
    """Returns the first `count` bytes of a file without downloading the rest."""
    from huggingface_hub import HfFileSystem

    where = f"datasets/{file.repo}@{file.revision}/{file.path}"
    options = dict(start=0, end=min(count, file.size), cache_type="none")  # its caches read 5 MB ahead
    return retry(file.url, lambda: HfFileSystem().cat_file(where, **options))


def check_push(repo: str, repo_type: str = "dataset"):
    """Creates the repository if it does not exist. Raises OSError without write access to it, and ValueError
    for an invalid name."""
    from huggingface_hub import HfApi

    if parse_hub(repo, repo_type) != (repo, None):
        raise ValueError(f"{repo!r} is not the name of a repository; give org/name")
    with name_repository(f"{repo} (run `hf auth login`, or set HF_TOKEN, with write access)"):
        HfApi().whoami()
        HfApi().create_repo(repo, repo_type=repo_type, exist_ok=True)  # silent if it is another's
        HfApi().auth_check(repo, repo_type=repo_type, write=True)


def push(repo: str, folder: Path, files: list[str]):
    """Uploads files of folder to the data-set repository, except those that it has with the same bytes. The
    last file goes last: it tells readers that the others are complete."""
    first, last = files[:-1], files[-1:]
    for group in [*(first[i : i + 50] for i in range(0, len(first), 50)), last]:
        message = f"{group[0]} to {group[-1]}" if len(group) > 1 else group[0]
        upload(repo, "dataset", {name: folder / name for name in group}, message)


def upload(repo: str, repo_type: str, files: dict[str, Path | bytes], message: str):
    """Uploads files in one commit, so that readers see all of them or none. The keys of `files` are paths in
    the repository. Raises Unavailable (an OSError)."""
    from huggingface_hub import CommitOperationAdd, HfApi

    def attempt():
        additions = [CommitOperationAdd(path, content) for path, content in files.items()]
        for addition in additions:  # together they would take threads, for which Python waits at its exit
            HfApi().preupload_lfs_files(repo, [addition], repo_type=repo_type)
        HfApi().create_commit(repo, additions, commit_message=message, repo_type=repo_type)

    retry(f"{PREFIXES[repo_type]}{repo}", attempt, "could not be uploaded to")


@contextlib.contextmanager
def name_repository(repo: str) -> Iterator[None]:
    """Turns the errors of the Hub's clients, which have no common base, into an OSError with the name."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):  # a page of HTML
            raise
        reason = format_reason(error)
        raise OSError(f"{repo}: the request to the Hugging Face Hub failed ({reason})") from error
