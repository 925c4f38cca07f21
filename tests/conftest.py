"""Fixtures of many tests: data, small runs, scripts, the Hub; and the fault campaign, `pytest -m campaign`.

A test of a fault names its row in the table of docs/reliability.md: `@pytest.mark.fault(7)`. The campaign
runs all of these at full counts and ends with a table. The default run makes a few tries of each, and
`pytest -m marathon` more than the campaign has time for.
"""

import dataclasses
import io
import itertools
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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

# Flushing is slow where a test writes many files, and no test cuts the power. test_checkpoint.py's tests of
# row 5 watch the calls, in a process of its own the real ones.
os.fsync = lambda handle: None

from helpers import Training, flags, really_draw_curves, undisturbed, write_shards  # noqa: E402
from hub_server import TOKEN, Client, HubServer, see_hub  # noqa: E402

from lib import run_folder  # noqa: E402
from train_gpt2 import Config  # noqa: E402

# The table of docs/reliability.md: row -> fault. The campaign prints it anew.
TABLE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").partition("\n #  fault")[2]
FAULTS = {
    int(row): title for row, title in re.findall(r"^ ?(\d+)  (\S.*?)  +(?:\d|not)", TABLE, re.MULTILINE)
}

counts: dict[int, list[int]] = {}  # by fault: tried, survived


@dataclass
class Attempt:
    """A try of a fault; `count` is the number of tries if several pass or fail together."""

    number: int
    count: int = 1


@dataclass
class Tally:
    """`for attempt in tally(2, 200, 1000)` makes 2 tries of a fault, in the campaign 200, and in the marathon
    1,000. A try passes if the loop's body raises nothing."""

    effort: int  # 0, 1 in the campaign, 2 in the marathon
    tried: int = 0
    survived: int = 0

    def pick(self, *counts: int) -> int:
        """The count for this effort; the last one if there are fewer."""
        return counts[: self.effort + 1][-1]

    def __call__(self, *counts: int) -> Iterator[Attempt]:
        wanted, done = self.pick(*counts), 0
        for number in itertools.count():
            if done >= wanted:
                return
            attempt = Attempt(number)
            self.tried += 1
            yield attempt
            self.tried += attempt.count - 1
            self.survived += attempt.count
            done += attempt.count


def find_effort(config: pytest.Config) -> int:
    return {"campaign": 1, "marathon": 2}.get(str(config.getoption("markexpr")), 0)


def rows_of(item: pytest.Item) -> list[int]:
    return [row for mark in item.iter_markers("fault") for row in mark.args]


TALLY = pytest.StashKey[Tally]()


@pytest.fixture
def tally(request) -> Tally:
    request.node.stash[TALLY] = Tally(find_effort(request.config))
    return request.node.stash[TALLY]


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]):
    for item in items:
        rows = rows_of(item)
        assert all(row in FAULTS for row in rows), f"{item.nodeid} names no fault of docs/reliability.md"
        if rows:
            item.add_marker("campaign")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Writes into a test's report its faults, its tries and how many of them passed. A test without `tally`
    is one try, and so is a failure outside of the tries."""
    report = yield
    if report.when == "call" or report.failed:
        tally = item.stash.get(TALLY, Tally(0))
        lost = report.failed and tally.tried == tally.survived
        single = not tally.tried and report.passed
        tries = [tally.tried + lost + single, tally.survived + single]
        report.user_properties.append(("tries", [rows_of(item), tries]))
    return report


def pytest_runtest_logreport(report: pytest.TestReport):
    """Adds the tries up, in the process that xdist's workers report to."""
    value: Any
    for name, value in report.user_properties:
        if name == "tries" and (report.when == "call" or report.failed):
            rows, tries = value
            for row in rows:
                counts[row] = [a + b for a, b in zip(counts.get(row, [0, 0]), tries)]


def pytest_terminal_summary(terminalreporter, config: pytest.Config):
    if not find_effort(config):
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
    """Shards of 6,000 tokens that a model can learn: each depends on the one before, with some noise."""
    folder = tmp_path_factory.mktemp("data") / "toy"
    draw = np.random.default_rng(0)
    ids = np.zeros(6000, dtype=np.uint16)
    for i in range(1, len(ids)):
        ids[i] = (ids[i - 1] * 7 + 3) % 97 if draw.random() < 0.9 else draw.integers(97)
    write_shards(folder, ids, shard_tokens=1500, val_tokens=1000)
    return folder


@pytest.fixture(scope="session")
def toy(data, tmp_path_factory) -> Config:
    """A run of twelve steps that takes half a second, with dropout and accumulation, in float32."""
    return Config(
        dataset_path=str(data), n_layer=1, n_head=1, n_embd=4, seq_len=16, batch_size=1,
        total_batch_tokens=64, learning_rate=3e-3, warmup_steps=3, max_steps=12, device="cpu",
        dtype="float32", compile=False, log_dir=str(tmp_path_factory.mktemp("log")), run_name="whole",
        dropout=0.1, val_every=0, val_tokens=500, hellaswag_every=0, sample_every=0, checkpoint_every=4,
    )  # fmt: skip


@pytest.fixture
def config(toy, tmp_path) -> Config:
    """The run `toy` in a folder of the test's own: tmp_path / "run"."""
    return dataclasses.replace(toy, log_dir=str(tmp_path), run_name="run")


@pytest.fixture(scope="session")
def whole(toy, tmp_path_factory) -> Callable[..., Path]:
    """`whole(world_size, change=...)` is the folder of an undisturbed run, made once."""
    return undisturbed(toy, tmp_path_factory)


@pytest.fixture
def pictures(monkeypatch):
    """Runs in this process draw their curves."""
    monkeypatch.setattr(run_folder, "draw_curves", really_draw_curves)


@pytest.fixture
def launch(tmp_path_factory) -> Iterator[Callable[..., Training]]:
    """`launch(cfg, "--resume", world_size=2)` starts train_gpt2.py, and kills it if it outlives the test.
    `cfg` may be None if the words say it all, as with script="fineweb.py"."""
    started = []

    def launch(cfg: Config | None, *words: object, **options) -> Training:
        words = (*(flags(cfg) if cfg else ()), *words)
        started.append(Training(tmp_path_factory.mktemp("output"), words, **options))
        return started[-1]

    yield launch
    for training in started:
        training.kill()


@pytest.fixture
def script(monkeypatch, capsys) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`script("plot.py", "--out", path)` does what a shell would, in this process: exit code and output."""

    def run(name: str, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        words = [str(ROOT / name), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        try:
            runpy.run_path(words[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            assert isinstance(end.code, int)
            code = end.code
        return subprocess.CompletedProcess(words, code, *capsys.readouterr())

    return run


# -----------------------------------------------------------------------------
# the Hugging Face Hub on this machine


@pytest.fixture(scope="session")
def shared_hub() -> Iterator[HubServer]:
    with HubServer({}) as server:
        yield server


@pytest.fixture
def server(shared_hub) -> HubServer:
    shared_hub.requests.clear()
    return shared_hub


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """The HF_HOME of `client`, alone in its folder."""
    return tmp_path_factory.mktemp("homes") / "home"


@pytest.fixture(scope="session")
def shared_client(shared_hub, home) -> Iterator[Client]:
    client = Client(shared_hub, home, TOKEN)
    yield client
    client.close()
    assert TOKEN not in client.stderr


@pytest.fixture
def client(shared_client, shared_hub) -> Iterator[Client]:
    """A process that sees shared_hub as the Hub, for the tests that start no script."""
    shared_hub.faults.clear()
    shared_hub.requests.clear()
    yield shared_client
    shared_hub.faults.clear()


@pytest.fixture
def repo(request) -> str:
    """Names a repository for this test alone: clients cache what they know of a repository."""
    return f"org/{abs(hash(request.node.nodeid)):x}"


@pytest.fixture
def start(launch, server, tmp_path) -> Callable[..., Training]:
    """`start(cfg, "--resume", token=...)` launches a script on a machine that sees `server` as the Hub."""

    def start(
        cfg: Config | None, *words: object, token: str = TOKEN, patience: float = 600, patches: tuple = (),
        environment: dict[str, str] | None = None, **options,
    ) -> Training:  # fmt: skip
        env = server.environment(tmp_path / "home", token) | (environment or {})
        return launch(cfg, *words, patches=[partial(see_hub, env, patience), *patches], **options)

    return start
