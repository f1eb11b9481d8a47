from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count

import pytest
import torch

from bench.machine import clock as clock_module
from bench.machine.clock import Clock, CudaClock, HostClock, PausingClock, Times, make_clock, stamping
from tests.fake_clock import FakeClock


class FakeCuda:
    """A device that works through its queue only when it is waited for: each piece of work takes 3 ms.

    Stands in for torch.cuda: what CudaClock may not do (wait inside a phase, make events in a timed region) shows up in
    `log`.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.work_done_ns = 0

    def current_stream(self, device: torch.device) -> str:
        return "stream"

    def synchronize(self, device: torch.device) -> None:
        self.log.append("synchronize")

    def Event(self, *, enable_timing: bool) -> FakeEvent:  # noqa: N802  the name is torch's
        assert enable_timing
        self.log.append("new event")
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.at_ns = 0

    def record(self, stream: str) -> None:
        assert stream == "stream"
        self.cuda.log.append("record")
        self.cuda.work_done_ns += 3_000_000
        self.at_ns = self.cuda.work_done_ns

    def elapsed_time(self, later: FakeEvent) -> float:
        return (later.at_ns - self.at_ns) / 1e6


@pytest.fixture
def host_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The host's clock moves by 1000 ns at each look."""
    ticks = count(0, 1000)
    monkeypatch.setattr(clock_module, "perf_counter_ns", lambda: next(ticks))
    return ticks


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    return fake


def turn(clock: Clock, n_decode: int = 3) -> Times:
    clock.start()
    clock.stamp(end_of_phase=True)
    for _ in range(n_decode):
        clock.stamp()
    return clock.stop()


@pytest.mark.usefixtures("host_time")
def test_host_clock_gives_one_interval_per_stamp():
    assert turn(HostClock()) == Times(host_ns=[1000] * 4, event_ns=None)


def test_host_clock_measures_real_time():
    clock = HostClock()
    clock.start()
    before = time.perf_counter_ns()
    time.sleep(0.02)
    clock.stamp()
    elapsed_ns = time.perf_counter_ns() - before
    (interval_ns,) = clock.stop().host_ns
    assert interval_ns >= 20_000_000
    assert interval_ns == pytest.approx(elapsed_ns, abs=5_000_000)


def test_host_clock_forgets_the_turn_before():
    clock = HostClock()
    first = turn(clock, n_decode=5)
    second = turn(clock, n_decode=1)
    assert len(first.host_ns) == 6
    assert len(second.host_ns) == 2


@pytest.mark.usefixtures("host_time")
def test_cuda_clock_waits_at_phase_ends_only(cuda):
    clock = CudaClock(n_stamps=4)
    cuda.log.clear()
    turn(clock)
    assert cuda.log == [
        *["synchronize", "record"],  # start: the device is idle
        *["record", "synchronize"],  # end of the prefill
        *["record", "record", "record"],  # decode steps run on without a look at the device
        "synchronize",  # stop
    ]


@pytest.mark.usefixtures("host_time")
def test_cuda_clock_keeps_host_and_event_times(cuda):
    times = turn(CudaClock(n_stamps=4))
    assert times.event_ns == [3_000_000] * 4
    # The last stamp is taken again after the wait: the sum over decode is until the device is done.
    assert times.host_ns == [1000, 1000, 1000, 2000]


@pytest.mark.usefixtures("host_time")
def test_cuda_clock_leaves_the_last_stamp_of_a_closed_phase(cuda):
    clock = CudaClock(n_stamps=4)
    clock.start()
    clock.stamp(end_of_phase=True)
    assert clock.stop().host_ns == [1000]


def test_cuda_clock_makes_its_events_before_the_turns(cuda):
    clock = CudaClock(n_stamps=4)
    cuda.log.clear()
    turn(clock)
    turn(clock)
    assert "new event" not in cuda.log


def test_cuda_clock_grows_once_for_a_longer_turn(cuda):
    clock = CudaClock(n_stamps=2)
    assert len(turn(clock, n_decode=5).event_ns or []) == 6
    cuda.log.clear()
    assert turn(clock, n_decode=5).event_ns == [3_000_000] * 6
    assert "new event" not in cuda.log


def test_make_clock_knows_the_devices(cuda):
    assert isinstance(make_clock("cpu"), HostClock)
    assert isinstance(make_clock(torch.device("cpu")), HostClock)
    assert isinstance(make_clock("cuda"), CudaClock)
    assert isinstance(make_clock("cuda:0"), CudaClock)
    with pytest.raises(ValueError, match=r"'mps'.*cpu and cuda"):
        make_clock("mps")


def test_fake_clock_is_a_clock():
    clock: Clock = FakeClock([7, 5, 6], calls := [])
    assert turn(clock, n_decode=2) == Times(host_ns=[7, 5, 6], event_ns=None)
    assert calls == ["start", "stamp end of phase", "stamp", "stamp", "stop"]


@pytest.mark.cuda
def test_cuda_clock_on_a_gpu():
    """Event and host times agree over a phase, and a step's launch is shorter than its run."""
    clock = CudaClock()
    matrix = torch.rand(4096, 4096, device="cuda")
    for _ in range(2):  # the first turn warms up
        clock.start()
        product = matrix @ matrix
        clock.stamp(end_of_phase=True)
        for _ in range(8):
            product = product @ matrix
            clock.stamp()
        times = clock.stop()
    assert times.event_ns is not None
    assert sum(times.host_ns[1:]) == pytest.approx(sum(times.event_ns[1:]), rel=0.2)
    assert min(times.event_ns[1:]) > times.host_ns[1]


def test_no_pause_lies_within_an_interval() -> None:
    now_ns, calls = 0, list[int]()

    def after(ns: int) -> None:
        nonlocal now_ns
        now_ns += ns

    def pause() -> None:
        calls.append(now_ns)
        after(1000)

    clock = PausingClock(pause, lambda: now_ns)
    stamp, nothing = stamping(clock), torch.empty(0)
    for _ in range(2):
        clock.start()
        for ns in (30, 5, 7):
            after(ns)
            stamp(nothing, nothing)
        assert clock.stop() == Times(host_ns=[30, 5, 7], event_ns=None)
    assert calls[:3] == [30, 1035, 2042]
