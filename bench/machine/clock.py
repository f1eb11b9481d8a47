"""The host's clock and CUDA events behind one face: start, stamp after every token, stop, and the times are there.

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
    import torch
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
    """What takes the times of one turn; it is used again for the next one."""

    def start(self) -> None:
        """Wait until the device is idle, forget earlier stamps, and begin."""

    def stamp(self, *, end_of_phase: bool = False) -> None:
        """Mark that a token is done. With `end_of_phase`, wait for the device first, where it works on its own."""

    def stop(self) -> Times:
        """End the last phase at the latest stamp and give the times of all of them."""


class HostClock:
    """`time.perf_counter_ns` and nothing else: a step on the CPU is over when its call returns.

    A stamp costs 0.1 microseconds, against steps of milliseconds; so the list may as well grow.
    """

    def __init__(self) -> None:
        self._marks: list[int] = []

    def start(self) -> None:
        """Forget earlier stamps and begin."""
        self._marks = [perf_counter_ns()]

    def stamp(self, *, end_of_phase: bool = False) -> None:
        """Mark that a token is done; the CPU leaves nothing to wait for."""
        self._marks.append(perf_counter_ns())

    def stop(self) -> Times:
        """Give the times of all stamps."""
        return Times(host_ns=_intervals(self._marks), event_ns=None)


class CudaClock:
    """Host time and a CUDA event per stamp; the host waits for the device at the ends of phases only.

    Events are made before the first turn and used again in each, so that none is created in a timed region.
    """

    def __init__(self, device: str | torch.device = "cuda", n_stamps: int = 256) -> None:
        """Make events for `n_stamps` stamps a turn; a longer turn makes more on its way, once."""
        # Not at the top: the driver and the report side read `Times` where torch cannot be imported.
        import torch

        self._cuda = torch.cuda
        self._device = torch.device(device)
        self._stream = torch.cuda.current_stream(self._device)
        self._events = [self._new_event() for _ in range(n_stamps + 1)]
        self._marks: list[int] = []
        self._phase_open = False

    def start(self) -> None:
        """Wait until the device is idle, forget earlier stamps, and begin."""
        self._stream = self._cuda.current_stream(self._device)
        self._marks = []
        self._cuda.synchronize(self._device)
        self._record()
        self._marks.append(perf_counter_ns())
        self._phase_open = False

    def stamp(self, *, end_of_phase: bool = False) -> None:
        """Mark that a token is done, in the device's order of work; with `end_of_phase`, wait until it is."""
        self._record()
        if end_of_phase:
            self._cuda.synchronize(self._device)
        self._marks.append(perf_counter_ns())
        self._phase_open = not end_of_phase

    def stop(self) -> Times:
        """Wait for the device, let the latest stamp end now if its phase is still open, and read the events."""
        self._cuda.synchronize(self._device)
        if self._phase_open:
            self._marks[-1] = perf_counter_ns()
            self._phase_open = False
        used = self._events[: len(self._marks)]
        # elapsed_time is in milliseconds, to half a microsecond.
        event_ns = [round(before.elapsed_time(after) * 1e6) for before, after in pairwise(used)]
        return Times(host_ns=_intervals(self._marks), event_ns=event_ns)

    def _record(self) -> None:
        n_used = len(self._marks)
        if n_used == len(self._events):
            self._events.append(self._new_event())
        self._events[n_used].record(self._stream)

    def _new_event(self) -> torch.cuda.Event:
        event = self._cuda.Event(enable_timing=True)
        event.record(self._stream)  # torch makes the CUDA event at its first record
        return event


class PausingClock:
    """The host's clock with a pause after every token. Each interval is timed by itself: none has the pauses."""

    def __init__(self, pause: Callable[[], None], now_ns: Callable[[], int] = perf_counter_ns) -> None:
        self._pause, self._now_ns = pause, now_ns
        self._intervals: list[int] = []

    def start(self) -> None:
        """Forget earlier stamps and begin."""
        self._intervals = []
        self._began = self._now_ns()

    def stamp(self, *, end_of_phase: bool = False) -> None:
        """Mark that a token is done, pause, and begin anew."""
        self._intervals.append(self._now_ns() - self._began)
        self._pause()
        self._began = self._now_ns()

    def stop(self) -> Times:
        """Give the times of all stamps."""
        return Times(host_ns=self._intervals, event_ns=None)


def make_clock(device: str | torch.device) -> Clock:
    """The clock for `device`: `cpu`, or `cuda` with an optional index."""
    kind = str(device).partition(":")[0]
    if kind == "cpu":
        return HostClock()
    if kind == "cuda":
        return CudaClock(device)
    raise ValueError(f"device is {kind!r}; there are clocks for cpu and cuda")


def stamping(clock: Clock) -> Callable[[Tensor, Tensor], None]:
    """What `Strategy.generate` is to call after each token of a turn: the first one ends the prefill."""
    first = True

    def stamp(_token: Tensor, _logits: Tensor) -> None:
        nonlocal first
        clock.stamp(end_of_phase=first)
        first = False

    return stamp


def _intervals(marks: list[int]) -> list[int]:
    return [after - before for before, after in pairwise(marks)]
