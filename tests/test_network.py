"""Two machines at the ends of a wire, which is cut or loses packets, and whose host dies."""

import dataclasses
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import faults
import pytest
from helpers import ROOT, end_of, flags
from wire import ADDRESSES, Wire, why_not

from train_gpt2 import Config

pytestmark = [pytest.mark.slow, pytest.mark.fault(33), pytest.mark.timeout(900)]

STEPS = dict(max_steps=120, checkpoint_every=20)
DEAF = ((0, 1), (0,), (1,))  # the machines at which nothing arrives


class Machines:
    """`torchrun train_gpt2.py --resume` with one process on each machine of a wire."""

    def __init__(self, wire: Wire, cfg: Config, folder: Path):
        self.wire, self.log = wire, Path(cfg.log_dir) / cfg.run_name / "log.txt"
        self.outputs = [folder / f"machine-{number}.txt" for number in (0, 1)]
        # The name of this machine is nobody's address there: who is the host must be said.
        torchrun = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
            "--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29400", "--rdzv-id=test",
        ]  # fmt: skip
        script = [str(ROOT / "train_gpt2.py"), *flags(cfg), "--resume"]
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "wire"}
        self.agents = []
        for number, output in enumerate(self.outputs):
            its = [f"--local-addr={ADDRESSES[number]}", f"--rdzv-conf=is_host={number == 0}"]
            command = [*wire.inside(number), *torchrun, *its, *script]
            with open(output, "w", encoding="utf-8") as file:
                self.agents.append(subprocess.Popen(command, env=env, stdout=file, stderr=file))

    def wait(self, is_so, what: str, timeout: float = 120):
        end = time.monotonic() + timeout
        while not is_so():
            if time.monotonic() > end:
                raise AssertionError(f"{what} did not come:\n" + "\n".join(map(self.printed, (0, 1))))
            time.sleep(0.01)

    def wait_for_step(self, step: int):
        def is_there() -> bool:
            return self.log.exists() and f"\n{step} train" in self.log.read_text(encoding="utf-8")

        self.wait(is_there, f"step {step}")

    def wait_for(self, number: int, said: str):
        """Waits until a machine says this; a pattern."""
        self.wait(lambda: re.search(said, self.printed(number)), said)

    def finish(self):
        self.wait(lambda: all(agent.poll() is not None for agent in self.agents), "the end")
        assert [agent.returncode for agent in self.agents] == [0, 0], self.printed(0) + self.printed(1)

    def wait_for_failure(self, number: int):
        """Waits until the run's process has ended on a machine. torchrun may still wait for the network, and
        does not notice."""
        agent = str(self.agents[number].pid)

        def is_over() -> bool:
            states = ["ps", "--no-headers", "-o", "state", "--ppid", agent]
            return set(
                subprocess.run(states, capture_output=True, text=True, check=False).stdout.split()
            ) <= {"Z"}

        self.wait(is_over, f"the end of machine-{number}'s process")

    def printed(self, number: int) -> str:
        return self.outputs[number].read_text(encoding="utf-8")


@pytest.fixture
def wire() -> Iterator[Wire]:
    if reason := why_not():
        pytest.skip(reason)
    with Wire() as wire:
        yield wire


def test_a_cut_shorter_than_the_timeout_is_waited_out(config, whole, wire, tmp_path, tally):
    for attempt in tally(2, 2):
        draw, run_name = faults.draw(attempt.number), f"run{attempt.number}"
        cfg = dataclasses.replace(config, **STEPS, run_name=run_name, timeout_seconds=40)
        machines = Machines(wire, cfg, tmp_path)
        machines.wait_for_step(draw.randrange(1, 100))
        wire.cut(draw.choice(DEAF))
        time.sleep(draw.uniform(0.5, 6))
        assert wire.lost and all(agent.poll() is None for agent in machines.agents)
        wire.cut(())
        machines.finish()
        assert end_of(tmp_path / run_name) == end_of(whole(2, **STEPS))


def test_a_longer_cut_ends_both_sides_which_name_the_machine(config, whole, wire, tmp_path, tally):
    for attempt in tally(2, 2):
        draw, run_name = faults.draw(100 + attempt.number), f"run{attempt.number}"
        cfg = dataclasses.replace(config, **STEPS, run_name=run_name, timeout_seconds=15)
        machines = Machines(wire, cfg, tmp_path)
        machines.wait_for_step(draw.randrange(1, 100))
        wire.cut(draw.choice(DEAF))
        machines.wait_for(0, r"rank 0 \(on machine-0\) failed; no sign of life from rank 1 \(on machine-1\)")
        machines.wait_for(1, r"rank 1 \(on machine-1\) failed; 10\.77\.0\.1 does not answer")
        machines.wait_for(0, "traceback : rank 0 .* failed; no sign of life from rank 1")  # torchrun's end
        for number in (0, 1):
            machines.wait_for_failure(number)
            wire.kill(number)
        wire.cut(())
        Machines(wire, cfg, tmp_path).finish()
        assert end_of(tmp_path / run_name) == end_of(whole(2, **STEPS))


@pytest.mark.parametrize(("loss", "delay"), [(0.05, 0.005)])
def test_packets_that_are_lost_or_late_change_nothing(config, whole, wire, tmp_path, loss, delay):
    wire.loss, wire.delay = loss, delay
    Machines(wire, dataclasses.replace(config, **STEPS, timeout_seconds=100), tmp_path).finish()
    assert bool(wire.lost) == bool(loss)
    assert end_of(tmp_path / "run") == end_of(whole(2, **STEPS))


@pytest.mark.parametrize("says_goodbye", [True, False], ids=["its processes die", "its power fails"])
def test_the_host_of_the_rendezvous_is_gone_and_back(config, whole, wire, tmp_path, says_goodbye):
    """A machine whose processes die closes its connections; one whose power fails does not."""
    cfg = dataclasses.replace(config, **STEPS, timeout_seconds=15)
    machines = Machines(wire, cfg, tmp_path)
    machines.wait_for_step(50)
    wire.cut(() if says_goodbye else (0, 1))
    wire.kill(0)
    machines.wait_for(1, r"10\.77\.0\.1 does not answer")
    machines.wait_for_failure(1)
    wire.kill(1)
    wire.cut(())
    Machines(wire, cfg, tmp_path).finish()
    assert end_of(tmp_path / "run") == end_of(whole(2, **STEPS))
