"""Where the scripts are found, what many tests train on, and the fault campaign: `pytest -m campaign`.

A test of a fault in FAULTS.md says which: `@pytest.mark.fault(7)`. The campaign runs all of these at full
counts and ends with a table; the default run has the same tests at a few tries each.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# The processes of helpers.Training inherit these: the paths because Python 3.11's fork server does not know
# sys.path when it imports preload.py, one thread each because many run at a time.
paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
os.environ["OMP_NUM_THREADS"] = "1"

from helpers import Training, flags, undisturbed, write_shards  # noqa: E402

from train_gpt2 import Config  # noqa: E402

FAULTS = {
    1: "SIGKILL at random instants of a run, then resume",
    2: "SIGKILL while pruning; leftovers of killed runs",
    3: "disk full while saving",
    4: "a checkpoint's file cut, flipped, missing, swapped",
    5: "order on disk: flush, rename, flush, then said",
    6: "saving raises on rank 0 of two",
    7: "SIGTERM, SIGINT, SIGUSR1: mid-step, one rank, saving, twice",
    8: "torchrun --max-restarts, a rank SIGKILLed",
    9: "a rank SIGSTOPped",
    10: "resume at each of 50 steps, and twice in a row",
    11: "world size 2, 1, 2 and half the micro-batch at resume",
    12: "impossible and nonsense settings",
    13: "configuration, data or vocabulary changed at resume",
    14: "evaluation, HellaSwag, sampling on or off",
    15: "damaged shards and manifests",
    16: "a token id outside the vocabulary",
    17: "the tokenizing run SIGKILLed",
    18: "one or many tokenizing workers",
    19: "strange documents",
    20: "downloads cut, wrong, stalled",
    21: "NaN or infinite loss or gradient on one rank of two",
    22: "a loss spike",
    23: "fp16 overflow across a resume",
    24: "malicious pickles, code in settings, remote code",
    25: "names that lead out of the run's folder",
    26: "secrets in the environment",
    27: "Hub: login, permission, interruption, offline",
    28: "CUDA out of memory",
    29: "torch.compile unavailable",
    30: "two runs started in one folder",
}


counts: dict[int, list[int]] = {}  # by fault: tried, survived


@dataclass
class Attempt:
    """A try of a fault; `count` is more than 1 where several were made that stand or fall together."""

    number: int
    count: int = 1


@dataclass
class Tally:
    """`for attempt in tally(default=2, full=200)`: tries of a fault, 200 in the campaign. One whose loop body
    raises nothing is survived."""

    is_campaign: bool
    tried: int = 0
    survived: int = 0

    def __call__(self, default: int, full: int) -> Iterator[Attempt]:
        wanted, done = full if self.is_campaign else default, 0
        for number in itertools.count():
            if done >= wanted:
                return
            attempt = Attempt(number)
            self.tried += 1
            yield attempt
            self.tried += attempt.count - 1
            self.survived += attempt.count
            done += attempt.count


def is_campaign(config: pytest.Config) -> bool:
    return config.getoption("markexpr") == "campaign"


def rows_of(item: pytest.Item) -> list[int]:
    return [row for mark in item.iter_markers("fault") for row in mark.args]


TALLY = pytest.StashKey[Tally]()


@pytest.fixture
def tally(request) -> Tally:
    request.node.stash[TALLY] = Tally(is_campaign(request.config))
    return request.node.stash[TALLY]


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]):
    for item in items:
        rows = rows_of(item)
        assert all(row in FAULTS for row in rows), f"{item.nodeid} is of no fault in FAULTS.md"
        if rows:
            item.add_marker("campaign")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Writes into a test's report how many tries it made of which faults, and how many were survived: a test
    without `tally` is one try, as is a failure outside of the tries."""
    report = yield
    if report.when == "call" or report.failed:
        tally = item.stash.get(TALLY, Tally(True))
        lost = report.failed and tally.tried == tally.survived
        single = not tally.tried and report.passed
        tries = [tally.tried + lost + single, tally.survived + single]
        report.user_properties.append(("tries", [rows_of(item), tries]))
    return report


def pytest_runtest_logreport(report: pytest.TestReport):
    """Adds them up, in the process that the workers of xdist report to."""
    value: Any
    for name, value in report.user_properties:
        if name == "tries" and (report.when == "call" or report.failed):
            rows, tries = value
            for row in rows:
                counts[row] = [a + b for a, b in zip(counts.get(row, [0, 0]), tries)]


def pytest_terminal_summary(terminalreporter, config: pytest.Config):
    if not is_campaign(config):
        return
    terminalreporter.section("the fault campaign")
    terminalreporter.write_line(f"{'#':>2}  {'fault':<60}  {'tries':>6}  {'survived':>8}  {'%':>6}")
    for row, title in FAULTS.items():
        (tried, survived), line = counts.get(row, [0, 0]), f"{row:>2}  {title:<60}  "
        if tried:
            line += f"{tried:>6}  {survived:>8}  {100 * survived / tried:>6.1f}"
        else:
            line += "not run: needs a GPU" if row == 28 else "not run"
        terminalreporter.write_line(line)


# -----------------------------------------------------------------------------
# small data, a small run, and processes


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Shards of 6,000 tokens that can be learnt: each follows from the one before it, with some noise."""
    folder = tmp_path_factory.mktemp("data") / "toy"
    draw = np.random.default_rng(0)
    ids = np.zeros(6000, dtype=np.uint16)
    for i in range(1, len(ids)):
        ids[i] = (ids[i - 1] * 7 + 3) % 97 if draw.random() < 0.9 else draw.integers(97)
    write_shards(folder, ids, shard_tokens=1500, val_tokens=1000)
    return folder


@pytest.fixture
def config(data, tmp_path) -> Config:
    """A run of ten steps on the toy data that takes seconds, in float32, with every job off."""
    return Config(
        dataset_path=str(data), n_layer=2, n_head=2, n_embd=16, seq_len=32, batch_size=2,
        total_batch_tokens=256, learning_rate=3e-3, warmup_steps=3, max_steps=10, device="cpu",
        dtype="float32", compile=False, log_dir=str(tmp_path), run_name="run",
        val_every=0, hellaswag_every=0, sample_every=0, checkpoint_every=0,
    )  # fmt: skip


@pytest.fixture(scope="session")
def toy(data, tmp_path_factory) -> Config:
    """A run of twelve steps that takes half a second, with dropout and accumulation, in float32."""
    return Config(
        dataset_path=str(data), n_layer=1, n_head=1, n_embd=4, seq_len=16, batch_size=1,
        total_batch_tokens=64, learning_rate=3e-3, warmup_steps=3, max_steps=12, device="cpu",
        dtype="float32", compile=False, log_dir=str(tmp_path_factory.mktemp("log")), run_name="whole",
        dropout=0.1, val_every=0, val_tokens=500, hellaswag_every=0, sample_every=0, checkpoint_every=4,
    )  # fmt: skip


@pytest.fixture(scope="session")
def whole(toy, tmp_path_factory) -> Callable[..., Path]:
    """`whole(world_size, change=...)` is an undisturbed run, made once."""
    return undisturbed(toy, tmp_path_factory)


@pytest.fixture
def launch(tmp_path_factory) -> Iterator[Callable[..., Training]]:
    """`launch(cfg, "--resume", world_size=2)` starts train_gpt2.py; what still runs when the test ends is
    killed. `cfg` may be None, if the words say it all."""
    started = []

    def launch(cfg: Config | None, *words: str, **options) -> Training:
        words = (*(flags(cfg) if cfg else ()), *words)
        started.append(Training(tmp_path_factory.mktemp("output"), words, **options))
        return started[-1]

    yield launch
    for training in started:
        training.kill()
