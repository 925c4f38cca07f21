"""A wire between two machines that can be cut: two network namespaces, whose packets this process forwards.

    with Wire() as wire:
        subprocess.Popen([*wire.inside(0), "python", ...])      # as on a machine-0 of its own, 10.77.0.1
        wire.cut({0, 1})                                        # nothing arrives on either side
        wire.cut(set())                                         # all arrives again

It needs Linux, iproute2, /dev/net/tun and the right to make namespaces. (tc's netem would need a kernel
module that many machines lack.)
"""

import contextlib
import fcntl
import heapq
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Collection

ADDRESSES = ("10.77.0.1", "10.77.0.2")
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h


def why_not() -> str:
    """What this machine lacks for a wire; "" if nothing."""
    if missing := [name for name in ("ip", "unshare", "hostname", "ps") if not shutil.which(name)]:
        return f"needs the programs {', '.join(missing)}"
    if subprocess.run(["unshare", "--net", "--uts", "true"], check=False, capture_output=True).returncode:
        return "needs the right to make network namespaces"
    return "" if os.access("/dev/net/tun", os.R_OK | os.W_OK) else "there is no /dev/net/tun"


class Wire:
    """Two namespaces and the packets between them. loss: the share of packets that is dropped; delay: what
    each takes, in seconds."""

    def __init__(self):
        self.names = [f"gpt2-{os.getpid()}-{number}" for number in (0, 1)]
        self.deaf: Collection[int] = set()  # the machines at which nothing arrives
        self.loss, self.delay, self.lost = 0.0, 0.0, 0
        self.random, self.ends, self.is_over = random.Random(0), [], threading.Event()
        self.forwarder = threading.Thread(target=self.forward, daemon=True)

    def __enter__(self) -> "Wire":
        try:
            for number in (0, 1):
                self.add_end(number)
        except BaseException:
            self.__exit__()
            raise
        self.forwarder.start()
        return self

    def add_end(self, number: int):
        """Makes a machine, and its end of the wire: a device whose packets this process reads and writes."""
        name, device = self.names[number], f"w{os.getpid()}-{number}"
        self.ends.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
        wanted = struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI)
        fcntl.ioctl(self.ends[-1], TUNSETIFF, wanted)
        ip(f"netns add {name}")
        ip(f"link set {device} netns {name} name wire mtu 9000")
        ip(f"-n {name} addr add {ADDRESSES[number]}/24 dev wire")
        ip(f"-n {name} link set wire up")
        ip(f"-n {name} link set lo up")

    def __exit__(self, *error):
        self.is_over.set()
        if self.forwarder.is_alive():
            self.forwarder.join()
        for end in self.ends:
            os.close(end)
        for number, name in enumerate(self.names):
            with contextlib.suppress(subprocess.CalledProcessError):  # it was not made
                self.kill(number)
                ip(f"netns del {name}")

    def inside(self, number: int) -> list[str]:
        """The words before a command that runs on one of the machines, whose name is machine-<number>."""
        name = f'hostname machine-{number} && exec "$@"'
        return ["ip", "netns", "exec", self.names[number], "unshare", "--uts", "sh", "-c", name, "sh"]

    def cut(self, deaf: Collection[int]):
        """From now on nothing arrives at these machines."""
        self.deaf = deaf

    def kill(self, number: int):
        """Kills all that runs on a machine."""
        for pid in ip(f"netns pids {self.names[number]}").split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def forward(self):
        """Passes packets on until the end, in the order of their arrival."""
        waiting, number = [], 0
        while not self.is_over.is_set():
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                _, _, to, packet = heapq.heappop(waiting)
                if to not in self.deaf:
                    with contextlib.suppress(OSError):  # a full queue drops packets, as a wire does
                        os.write(self.ends[to], packet)
                else:
                    self.lost += 1
            patience = min(0.05, waiting[0][0] - now) if waiting else 0.05
            for end in select.select(self.ends, [], [], max(0.0, patience))[0]:
                with contextlib.suppress(BlockingIOError):
                    packet = os.read(end, 65536)
                    if self.random.random() < self.loss:
                        self.lost += 1
                    else:
                        number += 1
                        to = 1 - self.ends.index(end)
                        heapq.heappush(waiting, (time.monotonic() + self.delay, number, to, packet))


def ip(words: str) -> str:
    return subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True).stdout
