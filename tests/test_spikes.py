"""Loss spikes, row 22 of docs/reliability.md: found, logged, skipped if asked, the same after a resume."""

import dataclasses
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from faults import note_weights, poison
from helpers import Training, end_of, flags, lines_of, links, values

from lib import checkpoint, stops
from train_gpt2 import Config

pytestmark = pytest.mark.fault(22)
SPIKE, LAST = 70, 74  # steps; the first in which a spike can be known is 64


@pytest.mark.parametrize("count", [64, 65, 127, 128])
def test_the_z_score_is_that_of_numpy(count):
    losses = np.random.default_rng(count).normal(3.0, 0.2, count)
    for loss in (3.0, 2.0, 4.5, 300.0):
        expected = (loss - losses.mean()) / losses.std()
        assert stops.z_score(loss, losses.tolist()) == pytest.approx(expected, rel=1e-9)


def test_without_many_losses_before_it_nothing_is_a_spike():
    assert stops.z_score(1e9, [1.0, 2.0] * 31) == 0.0
    assert stops.z_score(1e9, []) == 0.0
    assert stops.z_score(2.0, [1.0] * 64) > 1e6  # of equal losses the deviation is 0
    assert math.isnan(stops.z_score(math.nan, [1.0, 2.0] * 32))


@pytest.fixture(scope="module")
def toy(data, tmp_path_factory) -> Config:
    """A run with enough steps for a spike, in two seconds."""
    return Config(
        dataset_path=str(data), n_layer=1, n_head=1, n_embd=4, seq_len=16, batch_size=1,
        total_batch_tokens=32, learning_rate=1e-3, warmup_steps=3, max_steps=LAST, device="cpu",
        dtype="float32", compile=False, log_dir=str(tmp_path_factory.mktemp("log")), run_name="whole",
        val_every=0, hellaswag_every=0, sample_every=0, checkpoint_every=SPIKE,
    )  # fmt: skip


@dataclasses.dataclass
class Outcome:
    folder: Path
    printed: str
    weights: list[str]  # a hash for the beginning of each step, of each rank

    @property
    def unchanged(self) -> list[int]:
        """The steps that left the weights as they were."""
        return [step for step, (a, b) in enumerate(zip(self.weights, self.weights[1:])) if a == b]


@pytest.fixture(scope="module")
def train(toy, tmp_path_factory) -> Callable[..., Outcome]:
    """`train(kind, step, world_size, setting=...)`: a run with a loss of that kind (a factor, nan or inf) in
    the first micro-step of a step, on the last rank."""

    @cache
    def train(kind: str = "", step: int = SPIKE, world_size: int = 1, **settings) -> Outcome:
        folder = tmp_path_factory.mktemp("spikes")
        cfg = dataclasses.replace(toy, log_dir=str(folder / "log"), **settings)
        patches = [partial(note_weights, folder)]
        if kind:
            patches.append(partial(poison, kind, world_size - 1, step))
        printed = Training(folder, flags(cfg), world_size, patches).finish()
        noted = [(folder / f"weights{rank}.txt").read_text(encoding="utf-8") for rank in range(world_size)]
        assert len(set(noted)) == 1
        return Outcome(folder / "log" / "whole", printed, [line.split()[1] for line in noted[0].splitlines()])

    return train


def all_lines(run: Path) -> list[str]:
    """The log, but for the speed."""
    return lines_of(run, "train", "lr", "norm", "skip", "spike")


def recent(run: Path, step: int) -> list[float]:
    return checkpoint.verify(run / f"step_{step:06d}")["recent_losses"]


def test_a_spike_is_logged_and_left_out_only_if_asked(train, tally):
    cases = [(1, False), (2, True), (1, True), (2, False)]
    for attempt in tally(2, len(cases)):
        world_size, skip = cases[attempt.number]
        run = train("9", world_size=world_size, skip_spikes=skip)
        assert len(lines_of(run.folder, "spike")) == 1 and lines_of(run.folder, "skip") == []
        step, _, surprise = lines_of(run.folder, "spike")[0].split()
        losses = values(run.folder)
        expected = (losses[SPIKE] - np.mean(losses[:SPIKE])) / np.std(losses[:SPIKE])
        assert int(step) == SPIKE and expected > 6
        assert float(surprise) == pytest.approx(expected, rel=1e-2)
        assert f"step {SPIKE}/{LAST} | a spike, {float(surprise):.1f} standard" in run.printed
        assert ("the weights are left as they are" in run.printed) == skip
        assert len(run.weights) == LAST and run.unchanged == ([SPIKE] if skip else [])
        assert recent(run.folder, LAST) == pytest.approx(losses, rel=1e-5)
        if world_size == 1:  # what spikes are looked for in is as it would be otherwise
            assert run.weights[: SPIKE + 1] == train().weights[: SPIKE + 1]
            assert lines_of(train().folder, "spike") == [] == train().unchanged


@pytest.mark.slow
def test_without_skipping_the_trace_is_that_of_a_run_that_looks_for_no_spikes(train):
    # A setting that is given to skip them skips none where none is looked for.
    looks, does_not = train("9", skip_spikes=False), train("9", skip_spikes=True, spike_zscore=0.0)
    assert lines_of(does_not.folder, "spike") == [] and "a spike" not in does_not.printed
    assert end_of(looks.folder) == end_of(does_not.folder) and looks.weights == does_not.weights


def test_a_loss_before_the_window_is_full_enough_is_no_spike(train, tally):
    for _ in tally(0, 1):
        early = train("9", step=60, skip_spikes=True)
        assert lines_of(early.folder, "spike") == [] and early.unchanged == []


@pytest.mark.slow
def test_a_resume_around_a_spike_has_the_same_end(train, launch, tmp_path, tally):
    cases = [  # the spike's step, where the run goes on from step 70; processes; whether it is left out
        (SPIKE, 1, True), (SPIKE - 1, 1, True), (SPIKE, 2, True), (SPIKE - 1, 2, True), (SPIKE + 2, 1, True),
        (SPIKE, 1, False), (SPIKE - 1, 1, False),
    ]  # fmt: skip
    for attempt in tally(2, len(cases)):
        spike, world_size, skip = cases[attempt.number]
        undisturbed = train("9", spike, world_size, skip_spikes=skip).folder
        run = links(undisturbed, tmp_path / f"run{attempt.number}", SPIKE)
        patches = [partial(poison, "9", world_size - 1, spike)]
        launch(None, "--resume", str(run), world_size=world_size, patches=patches).finish()
        assert end_of(run) == end_of(undisturbed)
        assert all_lines(run) == all_lines(undisturbed)
        assert lines_of(run, "spike")[0].startswith(f"{spike} spike")
        assert recent(run, LAST) == recent(undisturbed, LAST)


def test_a_loss_that_is_not_finite_is_no_spike_and_not_in_the_window(train, tally):
    kinds = [(kind, skip) for skip in (False, True) for kind in ("inf", "nan")]
    for attempt in tally(1, len(kinds)):
        kind, skip = kinds[attempt.number]
        bad = train(kind, skip_spikes=skip)
        assert bad.unchanged == [SPIKE]
        assert lines_of(bad.folder, "skip") == [f"{SPIKE} skip 1"]
        window = recent(bad.folder, LAST)
        assert len(window) == LAST - 1 and all(map(math.isfinite, window))
        assert not math.isfinite(values(bad.folder)[SPIKE])


def test_the_window_is_the_last_128_losses(train, tally):
    """In the campaign, because it takes twice the steps."""
    for _ in tally(0, 1):
        long = train("9", step=150, max_steps=153)
        window = recent(long.folder, 153)
        assert len(window) == 128
        assert window == pytest.approx(values(long.folder)[-128:], rel=1e-5)
        assert lines_of(long.folder, "spike")[0].startswith("150 spike")
