"""Clocks behind one protocol: start, stamp after every token, stop, which returns the times (CUDA's is in cuda.py).

A measurer does `clock.start()`, `clock.stamp(end_of_phase=True)` when the prefill's token is known, `clock.stamp()`
after each decode step, and `clock.stop()` right after the last one. Nothing is read, converted or printed in between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter_ns
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Times:
    """Intervals of one turn, one per stamp: from the stamp before it (the first: from the start) until its own."""

    host_ns: list[int]
    """By the host's clock. On CUDA a single decode step is only the time to launch it, since nothing waits for the
    device within a phase; the sum over a phase is the true time of the phase."""
    event_ns: list[int] | None
    """By CUDA events: the device's own time, step by step. None on the CPU."""


class Clock(Protocol):
    """Takes the times of a turn; used again for the next one."""

    def start(self) -> None:
        """Wait until the device is idle, forget earlier stamps, and begin."""

    def stamp(self, *, end_of_phase: bool = False) -> None:
        """Mark that a token is done. With `end_of_phase`, wait for the device first, where it works on its own."""

    def stop(self) -> Times:
        """End the last phase at the latest stamp and return the times of all of them."""


class HostClock:
    """Reads `time.perf_counter_ns` and nothing else: a step on the CPU is over when its call returns.

    A stamp costs 0.1 microseconds, against steps of milliseconds; so the list may as well grow.
    """

    def __init__(self) -> None:
        self._marks: list[int] = []

    def start(self) -> None:
        self._marks = [perf_counter_ns()]

    def stamp(self, *, end_of_phase: bool = False) -> None:
        self._marks.append(perf_counter_ns())

    def stop(self) -> Times:
        return Times(host_ns=intervals(self._marks), event_ns=None)


class PausingClock:
    """Pauses after every token. Each interval is timed separately by the host's clock and contains no pause."""

    def __init__(self, pause: Callable[[], None], now_ns: Callable[[], int] = perf_counter_ns) -> None:
        self._pause, self._now_ns = pause, now_ns
        self._intervals: list[int] = []

    def start(self) -> None:
        self._intervals = []
        self._began = self._now_ns()

    def stamp(self, *, end_of_phase: bool = False) -> None:
        self._intervals.append(self._now_ns() - self._began)
        self._pause()
        self._began = self._now_ns()

    def stop(self) -> Times:
        return Times(host_ns=self._intervals, event_ns=None)


def stamping(clock: Clock) -> Callable[[Tensor, Tensor], None]:
    """Make the callback that `Strategy.generate` calls after each token of a turn; the first one ends the prefill."""
    first = True

    def stamp(_token: Tensor, _logits: Tensor) -> None:
        nonlocal first
        clock.stamp(end_of_phase=first)
        first = False

    return stamp


def intervals(marks: list[int]) -> list[int]:
    """Return the time between each mark and the next."""
    return [after - before for before, after in pairwise(marks)]
