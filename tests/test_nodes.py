"""Many machines: two torchrun agents with two processes each, that meet over the loopback device.
test_network.py has a wire between them."""

import dataclasses
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from helpers import ROOT, end_of, flags
from torch._C._distributed_c10d import TCPStore

from lib import processes
from train_gpt2 import Config


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def agents(cfg: Config, port: int, *words: str) -> list[subprocess.Popen]:
    """torchrun on two machines, were they two."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--max-restarts=2",
        "--rdzv-backend=c10d", "--local-addr=127.0.0.1", "--rdzv-id=test",
        f"--rdzv-endpoint=127.0.0.1:{port}", str(ROOT / "train_gpt2.py"), *flags(cfg), *words,
    ]  # fmt: skip
    pipes: dict = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", bufsize=1)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return [subprocess.Popen(command, env=env, **pipes) for _ in range(2)]


def finish(processes: list[subprocess.Popen], timeout: float = 200) -> str:
    """Waits for the agents; returns what they printed."""
    outputs = ["", ""]

    def read(number: int):
        outputs[number] = processes[number].communicate(timeout=timeout)[0]

    readers = [threading.Thread(target=read, args=(number,)) for number in (0, 1)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    for process in processes:
        if process.poll() is None:
            process.kill()
    printed = "\n".join(outputs)
    assert [process.returncode for process in processes] == [0, 0], printed
    return printed


def test_with_four_processes_a_resumed_run_ends_bit_identical(launch, whole, tmp_path):
    """A sum of two numbers has no order; one of four has: that in which DDP keeps the gradients."""
    shutil.copytree(whole(4), tmp_path / "whole")
    printed = launch(None, "--resume", str(tmp_path / "whole" / "step_000004"), world_size=4).finish()
    assert "resumed at step 4" in printed
    assert end_of(tmp_path / "whole") == end_of(whole(4))


@pytest.mark.slow
def test_two_machines_end_as_one_machine_with_as_many_processes(config, whole, port, tmp_path):
    printed = finish(agents(config, port))
    assert printed.count(" 0/12 | loss") == 1  # only rank 0 of all prints
    assert "1 sequences x 16 tokens x 4 processes" in printed
    assert end_of(tmp_path / "run") == end_of(whole(4))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("machine", [0, 1])
def test_a_process_killed_on_one_machine_of_two_is_replaced_at_the_first_try(
    config, whole, port, tmp_path, machine
):
    changes = dict(max_steps=60, checkpoint_every=10)
    cfg = dataclasses.replace(config, timeout_seconds=20, **changes)
    processes = agents(cfg, port, "--resume")
    log = tmp_path / "run" / "log.txt"
    end = time.monotonic() + 120
    while not (log.exists() and "\n13 train" in log.read_text(encoding="utf-8")) and time.monotonic() < end:
        time.sleep(0.005)
    found = subprocess.run(
        ["pgrep", "-P", str(processes[machine].pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(found.stdout.split()[0]), signal.SIGKILL)
    printed = finish(processes)
    assert printed.count("resumed at step") == 1, printed
    assert end_of(tmp_path / "run") == end_of(whole(4, **changes))


# -----------------------------------------------------------------------------
# how the processes of one try find each other in a store that has seen others


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def meet(store: TCPStore, ranks: list[int], world_size: int, timeout: float = 10.0) -> list[str]:
    """Returns the names that these ranks agree on, each after a random pause."""
    names = []

    def go(rank: int):
        time.sleep(random.random() / 10)
        client = TCPStore("127.0.0.1", store.port, is_master=False)
        try:
            names.append(processes.rendezvous(client, rank, world_size, timeout)[0])
        except RuntimeError as error:
            names.append(str(error).partition(": ")[2])

    threads = [threading.Thread(target=go, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


def test_the_processes_of_a_try_agree_on_a_name_and_each_try_on_another(store):
    tries = [meet(store, [0, 1, 2, 3], 4) for _ in range(5)]
    assert all(len(names) == 4 and len(set(names)) == 1 for names in tries)
    assert len({names[0] for names in tries}) == 5


def test_nobody_meets_those_of_a_try_before_that_are_gone(store):
    meet(store, [0, 1, 2], 3)
    for missing in range(3):
        names = meet(store, [rank for rank in range(3) if rank != missing], 3, timeout=0.5)
        assert set(names) == {"not all of the 3 processes started within 0.5 s (--timeout-seconds)"}
    assert len(set(meet(store, [0, 1, 2], 3))) == 1
