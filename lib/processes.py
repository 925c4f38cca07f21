"""The processes that torchrun started: they connect, sum and broadcast values, and name a lost rank.

    with processes.connect("auto", timeout_seconds=600) as process:
        process.print("on rank 0 only")
        total, = process.all_reduce(loss)
    processes.launch(__file__, 8, sys.argv[1:])                      # instead of torchrun

Without torchrun there is one process, and all of this works, too.
"""

import contextlib
import datetime
import hashlib
import math
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from lib import console
from lib.device import pick_device
from lib.environment import read_group, report_to_torchrun


@dataclass(eq=False)
class Process:
    """This process among the world_size that train together."""

    rank: int
    world_size: int
    device: torch.device
    store: Store | None = None  # torchrun's key-value store, for messages outside of training
    timeout_seconds: float = math.inf
    machines: list[str] = field(default_factory=list)  # by rank
    store_address: str = ""
    all_reduces: int = 0  # begun so far
    is_orphan: threading.Event = field(default_factory=threading.Event)  # set when torchrun is gone
    is_over: threading.Event = field(default_factory=threading.Event)  # set at the end
    start_time: float = field(default_factory=time.monotonic)

    def print(self, text: str):
        """Prints on rank 0, at once; lines wider than the terminal are folded."""
        if self.rank == 0:
            print(console.fold(text), flush=True)

    def all_reduce(self, *values: float | torch.Tensor) -> list[float]:
        """Each value summed over all processes. Scalar tensors may lie on the device, which is read once."""
        self.all_reduces += 1
        if self.world_size == 1:
            return [float(value) for value in values]
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        totals = torch.zeros(len(values), dtype=kind, device=self.device)
        for total, value in zip(totals, values):  # without a copy, for which the CPU would wait
            total += value
        dist.all_reduce(totals)
        return totals.tolist()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every process."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def agree(self, value: Any) -> bool:
        """Whether all processes have the same value; the answer is the same on all."""
        return not self.all_reduce(value != self.broadcast(value))[0]

    def barrier(self):
        """Waits until all processes have called it."""
        # No process gets a sum before all have sent. dist.barrier would need a device under NCCL.
        self.all_reduce(0.0)

    def name_rank(self, rank: int) -> str:
        """A rank, with its machine if there are several."""
        return f"rank {rank} (on {self.machines[rank]})" if len(set(self.machines)) > 1 else f"rank {rank}"

    def disconnect(self):
        """Leaves the process group, if it has not yet. Delete DistributedDataParallel before: its destructor
        joins gloo's threads while it holds the interpreter's lock, which can deadlock (torch 2.13)."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def send_heartbeats(self):
        """Counts seconds and all-reduces in the store until the end. A store that is gone means that torchrun
        was killed. Names a rank that hangs: under NCCL the others end without an exception."""
        sent, seen, named = 0, {}, set()
        with contextlib.suppress(RuntimeError):
            while self.store:
                begun = self.all_reduces
                self.store.add(f"seconds of rank {self.rank}", 1)
                self.store.add(f"all-reduces of rank {self.rank}", begun - sent)
                for rank in set(self.find_late(seen)) - named:
                    late = f"{self.name_rank(rank)} has not come to the all-reduce"
                    bound = f"the run ends after --timeout-seconds {self.timeout_seconds:g}"
                    print(f"{late} for which rank {self.rank} waits; {bound}", file=sys.stderr, flush=True)
                    named.add(rank)
                sent = begun
                if self.is_over.wait(1):
                    return
        self.is_orphan.set()

    def find_late(self, seen: dict[int, tuple[int, float]]) -> list[int]:
        """The ranks for which this one has waited for half of the timeout. Rank 0 watches all, rank 1 watches
        rank 0. seen: each watched rank's all-reduces, and when their number was not yet late."""
        watched = range(1, self.world_size) if self.rank == 0 else range(self.rank == 1)
        now = time.monotonic()
        for rank in watched:
            assert self.store
            count = self.store.add(f"all-reduces of rank {rank}", 0)
            if rank not in seen or count != seen[rank][0] or count >= self.all_reduces:
                seen[rank] = count, now
        return [rank for rank, (_, since) in seen.items() if now - since > self.timeout_seconds / 2]

    def find_silent(self) -> str:
        """Names the ranks whose heartbeats have stopped. Takes 2.5 to 4 seconds."""
        if not self.store:
            return "there is no other"
        names, before, after = [f"seconds of rank {rank}" for rank in range(self.world_size)], [], []

        def listen(store: Store):
            with contextlib.suppress(RuntimeError):
                before.extend(store.add(name, 0) for name in names)
                time.sleep(2.5)
                after.extend(store.add(name, 0) for name in names)

        listener = threading.Thread(target=listen, args=(self.store,), daemon=True)
        listener.start()
        listener.join(4.0)
        if len(after) < len(names):
            return f"{self.store_address} does not answer: the host of torchrun, or of rank 0, is lost"
        silent = [self.name_rank(rank) for rank in range(self.world_size) if before[rank] == after[rank]]
        return f"no sign of life from {', '.join(silent)}" if silent else "all ranks are alive"


@contextlib.contextmanager
def connect(device: str, timeout_seconds: float, spare_memory: bool = False) -> Iterator[Process]:
    """This process, connected to the others if torchrun started it, with one GPU per process.

    device and spare_memory are those of `pick_device`. If a collective operation fails in the body, the ranks
    that are silent are named on standard error.
    """
    process = join_group(device, timeout_seconds, spare_memory)
    heart = threading.Thread(target=process.send_heartbeats, daemon=True)
    if process.store:
        heart.start()
    try:
        yield process
        process.disconnect()
    except RuntimeError as error:  # if a process is lost, the others fail in their next collective operation
        if process.world_size > 1:
            reason = f"{process.name_rank(process.rank)} failed; {process.find_silent()}"
            print(reason, file=sys.stderr, flush=True)
            report_to_torchrun(f"{reason} ({str(error).partition(chr(10))[0]})")
        raise
    finally:
        process.is_over.set()
        if process.store:  # Python would abort if it ended while the thread is inside the store
            heart.join(2.0)


def join_group(device_name: str, timeout_seconds: float, spare_memory: bool) -> Process:
    """Joins torchrun's process group, if there is one. Raises ValueError for several processes on MPS."""
    group = read_group()
    if not group:
        return Process(0, 1, pick_device(device_name))
    if device_name == "cuda" or (device_name == "auto" and torch.cuda.is_available()):
        device_name = f"cuda:{group.local_rank}"
    device = pick_device(device_name, spare_memory)
    if device.type == "mps":
        raise ValueError("mps has one GPU, which takes one process; several processes need --device cpu")
    rank, world_size = group.rank, group.world_size
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # else rank 0 holds the store
    timeout, is_master = datetime.timedelta(seconds=timeout_seconds), rank == 0 and not has_agent
    try:
        store = TCPStore(group.address, group.port, None, is_master, timeout, wait_for_workers=False)
    except dist.DistError as error:
        where = f"MASTER_ADDR {group.address}, MASTER_PORT {group.port}"
        raise ValueError(f"rank {rank} cannot meet the others ({where}): {error}") from error
    # torchrun's store still has the addresses of the processes before a restart. gloo sometimes connected to
    # those (torch 2.13), so each start has a prefix of its own.
    name, machines = rendezvous(store, rank, world_size, timeout_seconds)
    store = PrefixStore(name, store)
    options: dict[str, Any] = dict(store=store, rank=rank, world_size=world_size, timeout=timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options["device_id"] = device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **options)
    return Process(rank, world_size, device, store, timeout_seconds, machines, group.address)


def rendezvous(store: Store, rank: int, world_size: int, timeout_seconds: float) -> tuple[str, list[str]]:
    """Waits until all processes have started; returns a name for this start, which no earlier start had, and
    the ranks' machines.

    Each rank stores a random number (nonce) and its machine. Rank 0 publishes the list of all. A rank that
    finds its own nonce in the list counts itself under the list's hash. A count of world_size means that all
    have seen the same list. (torchrun's number of restarts would not do: each machine counts its own.) Raises
    RuntimeError if some processes do not start in time.
    """
    mine = f"{secrets.token_hex(8)}@{socket.gethostname()}"
    name, end, machines = "", time.monotonic() + timeout_seconds, []
    everyone = [f"nonce of rank {number}" for number in range(world_size)]
    for key in ("nonces", *everyone) if rank == 0 else ("nonces",):
        store.compare_set(key, "", "none")  # so that reading does not block
    store.set(everyone[rank], mine)
    while time.monotonic() < end:
        if rank == 0:  # the nonce of a rank that has not started yet may be an earlier start's
            store.set("nonces", " ".join(nonce.decode() for nonce in store.multi_get(everyone)))
        nonces = store.get("nonces").decode()
        seen = hashlib.sha256(nonces.encode()).hexdigest()
        if seen != name and mine in nonces:
            name, machines = seen, [nonce.partition("@")[2] for nonce in nonces.split()]
            store.add(name, 1)
        if name and store.add(name, 0) == world_size:
            return name, machines
        time.sleep(max(0.02, world_size / 1000))
    late = f"not all of the {world_size} processes started within {timeout_seconds:g} s (--timeout-seconds)"
    raise RuntimeError(f"rank {rank}: {late}")


def launch(script: str, count: int, argv: list[str]):
    """Runs a script in `count` processes on this machine; exits with their exit code. The reason of the first
    that failed is printed last."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    flags = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={count}"]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup
        flags.append("--signals-to-handle=SIGTERM,SIGINT,SIGQUIT")
    try:
        run.main([*flags, script, *argv])
    except ChildFailedError as error:
        failure = error.get_first_failure()[1]
        if isinstance(failure.error_file_data["message"], dict):  # as report_to_torchrun writes it
            print(failure.error_file_data["message"]["message"], file=sys.stderr)
        sys.exit(max(1, failure.exitcode))
    except SignalException as error:  # it was passed on to the processes, and they have stopped
        sys.exit(128 + error.sigval)
