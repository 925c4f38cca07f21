"""Power cuts: what a disk may hold after one, drawn from the system calls of programs under strace.

    calls = power.record(root, command, command)   # runs them; what they do below root
    for _ in range(100):
        cut = power.cut(calls, random)             # at a random instant
        cut.write(folder)                          # the disk at that instant
        assert cut.said                            # what had been printed by then

The rules are those of POSIX, as in Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014). fsync
of a file keeps its bytes, fsync of a folder its names. Of everything else any part may be lost: each name on
its own, each block of bytes, which then is missing or zero. A rename is whole or did not happen.
"""

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

BLOCK = 4096
KNOWN = (
    "openat mkdir rmdir unlink unlinkat rename renameat renameat2 link linkat "
    "write fsync fdatasync ftruncate lseek"
)
# Calls that change a file in ways that are not followed here: a trace that has one is refused.
OTHERS = (
    "open creat mknod symlink symlinkat mkdirat pwrite64 writev pwritev pwritev2 truncate fallocate sendfile "
    "copy_file_range splice sync_file_range"
)
CALL = re.compile(r"(\w+)\((.*)\) += (-?\d+)", re.DOTALL)
STRING = re.compile(r'"([^"\\]*(?:\\.[^"\\]*)*)"')
PATH = re.compile(r"(?:AT_FDCWD|\d+)<([^>]*)>")


@dataclass(frozen=True)
class Call:
    """A change. Files and folders are numbers; 0 is the root.

    kind: "name" (folder[name] is file), "unname" (folder[name] is gone), "rename" (both), "write", "resize",
    "flush", or "say".
    """

    kind: str
    folder: int = 0
    name: str = ""
    file: int = 0
    old_folder: int = 0
    old_name: str = ""
    offset: int = 0
    data: bytes = b""


@dataclass
class Cut:
    """A disk after a power cut: names by folder, bytes by file; and what had been printed before it."""

    names: dict[int, dict[str, int]] = field(default_factory=dict)
    content: dict[int, bytearray] = field(default_factory=dict)
    folders: set[int] = field(default_factory=set)
    said: str = ""

    def write(self, folder: Path, number: int = 0):
        folder.mkdir()
        for name, file in self.names.get(number, {}).items():
            if file in self.folders:
                self.write(folder / name, file)
            else:
                (folder / name).write_bytes(self.content.get(file, b""))


def record(root: Path, *commands: Sequence[str], trace: Path) -> tuple[list[Call], set[int]]:
    """Runs the commands, one after the other, under strace; returns their changes below root, which is empty,
    and the numbers of its folders."""
    lines = []
    for command in commands:
        watched = f"trace={','.join([*KNOWN.split(), *OTHERS.split()])}"
        strace = ["strace", "-f", "--seccomp-bpf", "-y", "-s", "100000000", "-e", watched, "-o", str(trace)]
        done = subprocess.run([*strace, *command], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        lines += trace.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
        trace.unlink()
    return Recorder(root).read(lines)


class Recorder:
    """Follows the files below a root through the lines of a trace."""

    def __init__(self, root: Path):
        self.root, self.calls, self.folders, self.last = str(root), [], {0}, 0
        self.tree: dict[int, dict[str, int]] = {0: {}}
        self.sizes: dict[int, int] = {}
        self.places: dict[tuple[str, int], int] = {}  # by descriptor and file: where the next write goes

    def read(self, lines: list[str]) -> tuple[list[Call], set[int]]:
        unfinished: dict[str, str] = {}
        for line in lines:
            thread, _, call = line.partition(" ")
            if call.endswith("<unfinished ...>"):
                unfinished[thread] = call.removesuffix("<unfinished ...>")
                continue
            if "resumed>" in call[:60]:
                call = unfinished.pop(thread) + call.partition("resumed>")[2]
            if (match := CALL.match(call.strip())) and int(match[3]) >= 0:
                self.follow(match[1], match[2], int(match[3]))
        return self.calls, self.folders

    def locate(self, path: str) -> tuple[int, str] | None:
        """The folder's number and the name of a path below the root, None for another path."""
        path = os.path.normpath(path)
        if not path.startswith(self.root + "/"):
            return None
        *parents, name = path.removeprefix(self.root + "/").split("/")
        folder = 0
        for parent in parents:
            folder = self.tree[folder].get(parent, -1)
            if folder not in self.tree:
                return None
        return folder, name

    def find(self, path: str) -> int | None:
        if path == self.root:
            return 0
        place = self.locate(path)
        return self.tree[place[0]].get(place[1]) if place else None

    def paths(self, arguments: str) -> list[str]:
        """The paths of a call: "<folder>, name" pairs, or a name alone."""
        found = []
        for match in re.finditer(rf"(?:{PATH.pattern}, )?{STRING.pattern}", arguments):
            found.append(str(Path(match[1] or "/", unescape(match[2]).decode())))
        return found

    def new(self, folder: int, name: str, is_folder: bool = False) -> int:
        self.last += 1
        if is_folder:
            self.tree[self.last] = {}
            self.folders.add(self.last)
        self.tree[folder][name] = self.last
        self.calls.append(Call("name", folder, name, self.last))
        return self.last

    def follow(self, call: str, arguments: str, result: int):
        if call in OTHERS.split():
            if f"{self.root}/" in arguments:
                raise ValueError(f"{call}({arguments[:200]}) is not followed here; the disk would be wrong")
        elif call == "write" and arguments.startswith("1<"):
            text = STRING.search(arguments)
            assert text
            self.calls.append(Call("say", data=unescape(text[1])))
        elif call in ("write", "fsync", "fdatasync", "ftruncate", "lseek"):
            match = PATH.match(arguments)
            file = self.find(match[1]) if match else None
            if file is not None:
                self.follow_file(call, arguments, file, result)
        elif call == "openat":
            path = self.paths(arguments)[0]
            place = self.locate(path)
            if place and re.search(r"O_(WRONLY|RDWR)", arguments):
                file = self.find(path)
                if file is None:
                    file = self.new(*place)
                elif "O_TRUNC" in arguments:
                    self.sizes[file] = 0
                    self.calls.append(Call("resize", file=file))
                self.places[str(result), file] = self.sizes.get(file, 0) if "O_APPEND" in arguments else 0
        elif places := [place for path in self.paths(arguments) if (place := self.locate(path))]:
            self.follow_names(call, places)

    def follow_file(self, call: str, arguments: str, file: int, result: int):
        opened = arguments.partition("<")[0], file
        if call == "write":
            text = STRING.search(arguments)
            assert text
            place = self.places[opened]
            self.calls.append(Call("write", file=file, offset=place, data=unescape(text[1])[:result]))
            self.places[opened] = place + result
            self.sizes[file] = max(self.sizes.get(file, 0), place + result)
        elif call == "lseek":
            self.places[opened] = result
        elif call == "ftruncate":
            self.sizes[file] = int(arguments.rpartition(",")[2])
            self.calls.append(Call("resize", file=file, offset=self.sizes[file]))
        else:
            self.calls.append(Call("flush", file=file))

    def follow_names(self, call: str, places: list[tuple[int, str]]):
        folder, name = places[-1]
        if call == "mkdir":
            self.new(folder, name, is_folder=True)
        elif call in ("unlink", "unlinkat", "rmdir"):
            del self.tree[folder][name]
            self.calls.append(Call("unname", folder, name))
        elif call in ("link", "linkat"):
            file = self.tree[folder][name] = self.tree[places[0][0]][places[0][1]]
            self.calls.append(Call("name", folder, name, file))
        else:  # rename, renameat, renameat2
            file = self.tree[folder][name] = self.tree[places[0][0]].pop(places[0][1])
            self.calls.append(Call("rename", folder, name, file, *places[0]))


def unescape(text: str) -> bytes:
    return text.encode("latin-1").decode("unicode_escape").encode("latin-1")


def cut(recorded: tuple[list[Call], set[int]], random: Random) -> Cut:
    """A disk after a power cut at a random instant."""
    calls, folders = recorded
    end = random.randrange(len(calls) + 1)
    calls = calls[:end]
    keeps_order = random.random() < 0.5  # a journal keeps the order of names; POSIX does not ask for it
    lost_from = random.randrange(end + 1)
    chance = random.choice([0, 0.2, 0.5, 0.8, 1])
    disk = Cut(folders=folders)
    flushed: set[int] = set()
    fates = []
    for number in range(end - 1, -1, -1):  # backwards: is there a flush after it?
        call = calls[number]
        if call.kind == "flush":
            flushed.add(call.file)
        is_name = call.kind in ("name", "unname", "rename")
        owners = (
            {call.folder, call.old_folder}
            if call.kind == "rename"
            else {call.folder if is_name else call.file}
        )
        is_kept = bool(owners & flushed)
        if not is_kept:
            is_kept = number < lost_from if is_name and keeps_order else random.random() < chance
        fates.append((call, is_kept, not owners & flushed))
    for call, is_kept, is_open in reversed(fates):
        if call.kind == "say":
            disk.said += call.data.decode(errors="replace")
        elif not is_kept:
            if (
                call.kind == "write" and random.random() < 0.5
            ):  # the file's size is kept and its bytes are not
                store(disk, call, bytes(len(call.data)))
        elif call.kind in ("name", "rename"):
            if call.kind == "rename":
                disk.names.get(call.old_folder, {}).pop(call.old_name, None)
            disk.names.setdefault(call.folder, {})[call.name] = call.file
        elif call.kind == "unname":
            disk.names.get(call.folder, {}).pop(call.name, None)
        elif call.kind == "resize":
            content = disk.content.setdefault(call.file, bytearray())
            del content[call.offset :]
            content.extend(bytes(call.offset - len(content)))
        elif call.kind == "write":
            store(disk, call, tear(call.data, random) if is_open and random.random() < 0.5 else call.data)
    return disk


def store(disk: Cut, call: Call, data: bytes):
    content = disk.content.setdefault(call.file, bytearray())
    content.extend(bytes(max(0, call.offset - len(content))))
    content[call.offset : call.offset + len(data)] = data


def tear(data: bytes, random: Random) -> bytes:
    """Bytes of which an end is missing, or blocks are zero."""
    if random.random() < 0.5:
        return data[: random.randrange(len(data) + 1)]
    blocks = [data[i : i + BLOCK] for i in range(0, len(data), BLOCK)]
    return b"".join(block if random.random() < 0.5 else bytes(len(block)) for block in blocks)
