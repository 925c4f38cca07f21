"""Token shards on the Hugging Face Hub; a shard is downloaded when training needs it.

    folder = hub_shards.HubFolder("hf://datasets/org/name")
    reader = shards.ShardReader(folder, "train", seq_len=1024)

On disk: data/hub/, a cache of bounded size.
"""

import contextlib
import hashlib
import math
import queue
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np

from lib import disk, files, hub, shards
from lib.processes import Process
from lib.shards import BIN_HEADER_BYTES, HEAD_TOKENS, MANIFEST, NPY_HEADER_BYTES, Folder

HUB_CACHE = files.DATA / "hub"


class HubFolder(Folder):
    """The shards of a data set on the Hugging Face Hub, hf://datasets/org/name[@revision].

    A shard is downloaded when it is needed (the next one in the background), checked against its SHA-256 and
    kept under data/hub/. Above `cache_bytes`, the least recently used shards are deleted.
    """

    def __init__(self, location: str, cache_bytes: float = 20e9):
        """Raises ValueError for an invalid location or a cache too small for three shards, and OSError if the
        Hub does not answer."""
        repo, revision = hub.parse_hub(location)
        commit, self.files = hub.list_hub(repo, revision)
        self.name, self.commit, self.cache_bytes = f"{hub.HUB_PREFIX}{repo}@{commit}", commit, cache_bytes
        self.folder = HUB_CACHE / repo.replace("/", "--") / commit[:12]
        if MANIFEST in self.files:
            hub.fetch(self.files[MANIFEST], self.folder)
            self.entries = shards.list_shards(self.folder)
        else:
            self.entries = shards.find_shards((path for path in self.files if "/" not in path), location)
        for entry in self.entries:
            self._compare(entry)
        largest = max(self.files[entry["file"]].size for entry in self.entries)
        if cache_bytes < 3 * largest:
            least = f"at least {math.ceil(3 * largest / 1e8) / 10}, three shards of {location}"
            raise ValueError(f"--cache-gb is {cache_bytes / 1e9:g}; it must be {least}")
        here = [path for entry in self.entries if (path := self.folder / entry["file"]).is_file()]
        if len(here) < len(self.entries):
            disk.check_writable(self.folder / ".incoming")
        here.sort(key=lambda path: path.stat().st_mtime)
        self.recent = dict.fromkeys(path.name for path in here)  # the last is the most recently used
        self.heads: dict[str, np.ndarray] = {}
        self.lock = threading.Lock()
        self.announced: queue.SimpleQueue[dict] = queue.SimpleQueue()
        # The thread is a daemon: unlike an executor's threads, it does not delay the end of the run.
        threading.Thread(target=self._fetch_announced, daemon=True).start()

    def _compare(self, entry: dict):
        """Raises ValueError if the repository and the manifest disagree about the shard. Without a manifest,
        the repository's list is taken."""
        file = self.files.get(entry["file"])
        header = BIN_HEADER_BYTES if entry["file"].endswith(".bin") else NPY_HEADER_BYTES
        if file is None:
            raise ValueError(f"{self.name} lacks {entry['file']}, which its {MANIFEST} lists")
        entry.setdefault("tokens", (file.size - header) // 2)
        entry.setdefault("sha256", file.sha256)
        if file.size != header + 2 * entry["tokens"] or (file.sha256 and file.sha256 != entry["sha256"]):
            raise ValueError(f"{file.url} does not have the size or SHA-256 that its {MANIFEST} says")

    def path(self, entry: dict) -> Path:
        path = hub.fetch(self.files[entry["file"]], self.folder)
        with self.lock:
            self.recent.pop(path.name, None)
            self.recent[path.name] = None
            while sum(self.files[name].size for name in self.recent) > self.cache_bytes:
                oldest = next(iter(self.recent))
                del self.recent[oldest]
                with contextlib.suppress(OSError):  # another process was faster, or Windows has it open
                    (self.folder / oldest).unlink()
        return path

    def read_head(self, entry: dict, tokens: int) -> np.ndarray | None:
        if tokens > HEAD_TOKENS or "head_sha256" not in entry or entry["file"] in self.recent:
            return None
        if entry["file"] in self.heads:
            return self.heads[entry["file"]][:tokens]
        data = hub.read_start(self.files[entry["file"]], NPY_HEADER_BYTES + 2 * HEAD_TOKENS)
        ids = np.frombuffer(data, dtype="<u2", offset=NPY_HEADER_BYTES)
        if hashlib.sha256(ids.tobytes()).hexdigest() != entry["head_sha256"]:
            raise ValueError(f"{self.files[entry['file']].url} does not begin as its {MANIFEST} says")
        self.heads[entry["file"]] = ids
        return ids[:tokens]

    def announce(self, entry: dict):
        if entry["file"] not in self.recent:
            self.announced.put(entry)

    def _fetch_announced(self):
        while True:
            with contextlib.suppress(Exception):  # `path` fetches it again and raises
                self.path(self.announced.get())

    def check(self, entry: dict):
        """Does nothing: a shard is checked when it is downloaded."""


def open_data(path: str, cache_bytes: float, process: Process, may_make: bool) -> Folder:
    """Opens the shards of --dataset-path: on the Hub (all processes get one commit), or in a folder relative
    to here or to the project. With may_make, writes the demo's shards (pydocs) if they are missing."""
    if path.startswith(hub.HUB_PREFIX):
        first = HubFolder(path, cache_bytes) if process.rank == 0 else None
        location = process.broadcast(first and first.name)
        return first or HubFolder(location, cache_bytes)
    data = Path(path)
    data = data if data.exists() or data.is_absolute() else files.ROOT / data
    if may_make and process.rank == 0 and data.name == "pydocs" and not shards.is_complete(data):
        process.print("Making shards of the installed packages' documentation (fineweb.py --source pydocs)")
        script = str(files.ROOT / "fineweb.py")
        command = [sys.executable, script, "--source", "pydocs", "--out-dir", str(data)]
        if subprocess.run(command, check=False).returncode:
            raise ValueError(f"fineweb.py failed to write {data}; its message is above")
    process.barrier()
    return Folder(data)
