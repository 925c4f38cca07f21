"""When a run stops, saves early or skips a step; every process decides the same.

    watch = Watch(process, max_hours=8, checkpoint_minutes=0, max_bad_steps=5)
    total, *votes = process.all_reduce(loss, *watch.votes())     # the one all-reduce of a step
    verdict = judge(total / world_size, norm, recent_losses, spike_zscore=6, skip_spikes=False)
    if verdict.is_healthy: ...                                   # step
    watch.tally(votes, bad_steps)
    if watch.exit_code: ...                                      # stop; watch.reason says why

Exit codes of a stopped run: 3 too many steps that were not finite, 4 --max-hours, 128 + n signal n.
"""

import contextlib
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from lib.processes import Process

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
STOP_SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]  # Windows has two
NOT_FINITE, OUT_OF_TIME = 3, 4  # exit codes
SPIKE_WINDOW = 128  # steps, as in OLMo 2 (OLMo team, 2025, arXiv:2501.00656)


class Watch:
    """Decides when a run stops or saves early: signals, time, an orphaned process, non-finite steps."""

    def __init__(self, process: Process, max_hours: float, checkpoint_minutes: float, max_bad_steps: int):
        self.process, self.max_bad_steps = process, max_bad_steps
        self.max_hours, self.checkpoint_minutes = max_hours, checkpoint_minutes
        self.signals = Signals(announces=process.rank == 0)
        self.exit_code, self.reason = 0, ""
        self.note_checkpoint()

    def note_checkpoint(self):
        """A checkpoint has just been made."""
        self.saved_at, self.wants_checkpoint = time.monotonic(), False

    def votes(self) -> list[float]:
        """This process's votes. One process's vote is enough."""
        now, minutes, hours = time.monotonic(), self.checkpoint_minutes, self.max_hours
        is_old = minutes > 0 and now - self.saved_at > 60 * minutes and self.process.rank == 0
        is_late = hours > 0 and now - self.process.start_time > 3600 * hours
        caught = [self.signals.caught == number for number in STOP_SIGNALS]
        return [is_old, is_late, self.process.is_orphan.is_set(), *caught]

    def tally(self, votes: list[float], bad_steps: int):
        """Decides by the sums of all processes' votes and by the bad steps in a row. The last `if` that
        holds wins."""
        old, late, orphans, *signaled = votes
        self.wants_checkpoint = bool(old)
        if late:
            self.exit_code, self.reason = OUT_OF_TIME, f"it has run for --max-hours {self.max_hours:g}"
        if bad_steps >= self.max_bad_steps:
            advice = "try a lower --learning-rate, or --dtype float32"
            self.exit_code, self.reason = NOT_FINITE, f"{bad_steps} steps in a row were not finite; {advice}"
        if orphans:
            self.exit_code, self.reason = 128 + signal.SIGTERM, "torchrun is gone"
        for number, count in zip(STOP_SIGNALS, signaled):
            if count:
                self.exit_code, self.reason = 128 + number, f"{signal.Signals(number).name} was received"


class Signals:
    """Remembers the first signal of STOP_SIGNALS. A second one ends the process at once, unless it comes
    within a second: torchrun passes on the signal that the terminal has sent to all processes. A SIGHUP that
    is ignored at the start, as under nohup, stays ignored."""

    def __init__(self, announces: bool = True):
        self.caught, self.when, self.announces, self.before = 0, 0.0, announces, {}
        handled = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ()
        for number in handled:
            if signal.Signals(number).name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self.remember)

    def restore(self):
        """Puts the earlier handlers back: a notebook goes on after its run."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def remember(self, number: int, frame: Any):
        name = signal.Signals(number).name
        if self.caught and time.monotonic() - self.when > 1:
            self.announce(f"a second signal ({name}): ended at once, without saving")
            os._exit(128 + number)
        if not self.caught:
            self.caught, self.when = number, time.monotonic()
            again = "Ctrl-C again" if name == "SIGINT" else "a second signal"
            self.announce(f"{name}: stopping after this step, then saving; {again} discards it")

    def announce(self, text: str):
        """Prints on standard error. print() must not be used here: it may be what the signal interrupted."""
        if self.announces:
            with contextlib.suppress(OSError):
                os.write(2, f"\n{text}\n".encode())


def z_score(loss: float, recent: Collection[float]) -> float:
    """Standard deviations that a loss is above the mean of recent ones; 0 while those are few."""
    if len(recent) < SPIKE_WINDOW // 2:
        return 0.0
    return (loss - statistics.fmean(recent)) / max(statistics.pstdev(recent), 1e-9)


@dataclass(frozen=True)
class Verdict:
    """Whether a step's loss and gradient are finite and ordinary, and whether to apply it."""

    is_loss_finite: bool
    is_finite: bool  # loss and gradient
    is_spike: bool
    z_score: float
    is_healthy: bool

    @property
    def streams(self) -> dict[str, float]:
        """Lines for the log."""
        skip = {} if self.is_finite else {"skip": 1.0}
        return skip | ({"spike": self.z_score} if self.is_spike else {})

    def explain(self) -> list[str]:
        """Lines for the console."""
        left = "the weights are left as they are"
        lines = [] if self.is_finite else [f"loss or gradient is not finite: {left}"]
        if self.is_spike:
            skipped = "" if self.is_healthy else f"; {left}"
            lines.append(f"a spike, {self.z_score:.1f} standard deviations above the mean{skipped}")
        return lines


def judge(
    loss: float, norm: float, recent: Collection[float], spike_zscore: float, skip_spikes: bool
) -> Verdict:
    """Judges a step by its loss and gradient norm, which are the same on all processes. A loss spike_zscore
    standard deviations above the recent ones' mean is a spike (0: none is)."""
    is_loss_finite, z = math.isfinite(loss), z_score(loss, recent)
    is_finite, is_spike = is_loss_finite and math.isfinite(norm), z > spike_zscore > 0
    return Verdict(is_loss_finite, is_finite, is_spike, z, is_finite and not (is_spike and skip_spikes))
