"""A run of many steps, and one of many lives: memory, threads, open files and folder must not grow.

`pytest -m marathon` takes 20,000 steps, and a thousand kills in 7,500 steps. Without xdist and with -s, each
test prints what it fitted, and the folder whose log plot.py draws.
"""

import dataclasses
import json
import signal
import time
from functools import partial
from pathlib import Path

import faults
import numpy as np
import pytest
from helpers import Training, end_of, lines_of
from hub_server import HubServer

pytestmark = [pytest.mark.slow, pytest.mark.fault(32), pytest.mark.marathon, pytest.mark.timeout(14400)]

REPO = "org/soak"


def check_level(seen: Path, streams: tuple[str, ...] = faults.RESOURCES):
    """Fails if a line fitted to a stream of a log grows by more than 3% and by more than three of its
    standard errors."""
    print(f"\n{seen}")
    for stream in streams:
        facts = np.array([line.split()[::2] for line in lines_of(seen, stream)], dtype=float)
        steps, found = facts[facts[:, 0] > facts[-1, 0] / 2].T  # caches fill in the first half
        (slope, _), covariance = np.polyfit(steps, found, 1, cov=True)
        growth, error = slope * facts[-1, 0], covariance[0, 0] ** 0.5 * facts[-1, 0]
        print(
            f"{stream:12}{found.mean():9.2f}, grows by {growth:.3f} ± {error:.3f} in {facts[-1, 0]:.0f} steps"
        )
        assert growth < max(0.03 * found.mean(), 3 * error), stream


def last_step(run: Path) -> int:
    """The last step that a run has logged."""
    return int(lines_of(run)[-1].split()[0]) if (run / "log.txt").exists() and lines_of(run) else 0


def forget_old_uploads(server: HubServer):
    """Otherwise the server keeps all that a long run sends."""
    server.heard.clear()
    server.requests.clear()
    for old in list(server.commits.get(REPO, {}))[1:-2]:
        server.commits[REPO][old] = {}
    for old in list(server.uploads)[:-20]:
        server.uploads.pop(old)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_long_run_grows_in_nothing(start, server, config, tmp_path, tally, world_size):
    """With evaluations, samples, checkpoints, pruning and uploads."""
    steps, seen = tally.pick(400, 400, 20_000), tmp_path / "seen"
    jobs: dict = dict(val_every=50, sample_every=200, checkpoint_every=25, keep_last=2)
    cfg = dataclasses.replace(config, max_steps=steps, hub_repo=REPO, print_every=100, **jobs)
    server.forget(REPO)
    notes = partial(faults.note_resources, seen, tmp_path / "run", 25)
    training: Training = start(cfg, world_size=world_size, patches=(notes,))
    while training.is_running():
        time.sleep(1)
        forget_old_uploads(server)
    training.finish()
    for rank in range(world_size):
        check_level(seen / f"rank{rank}")
    assert json.loads(server.repos[REPO]["state.json"])["step"] == steps
    server.forget(REPO)


def test_a_run_of_many_lives_grows_in_nothing_and_has_the_same_end(launch, config, tmp_path, tally):
    cfg = dataclasses.replace(config, max_steps=tally.pick(30, 90, 7500), val_every=20, print_every=100)
    undisturbed = launch(dataclasses.replace(cfg, run_name="whole", checkpoint_every=1000))
    assert undisturbed.wait(timeout=7200) == [0]
    whole = tmp_path / "whole"
    for chain in tally(2, 10, 1000):
        random, run, seen = (
            faults.draw(chain.number),
            tmp_path / f"run{chain.number}",
            tmp_path / f"seen{chain.number}",
        )
        cfg = dataclasses.replace(cfg, run_name=run.name, checkpoint_every=5, keep_last=2)
        notes, kills, codes = partial(faults.note_resources, seen, run, 10), 0, None
        while codes != [0]:
            until = last_step(run) + random.randrange(19)
            training = launch(cfg, "--resume", patches=[notes])
            while training.is_running() and last_step(run) < until:
                time.sleep(0.005)
            time.sleep(random.uniform(0, 0.05))
            training.signal(signal.SIGKILL)
            codes = training.wait()
            assert codes in ([0], [-signal.SIGKILL]), training.printed()
            kills += codes != [0]
        assert end_of(run) == end_of(whole) and lines_of(run, "val") == lines_of(whole, "val")
        if cfg.max_steps > 1000:
            check_level(seen / "rank0", ("folder_MB",))  # the others begin anew with each life
        chain.count = kills
