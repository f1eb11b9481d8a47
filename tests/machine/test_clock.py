import time
from collections.abc import Iterator
from itertools import count

import pytest
import torch

from bench.machine import clock as clock_module
from bench.machine.clock import Clock, HostClock, PausingClock, Times, stamping
from tests.fake_clock import FakeClock


@pytest.fixture
def host_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The host's clock moves by 1000 ns at each look."""
    ticks = count(0, 1000)
    monkeypatch.setattr(clock_module, "perf_counter_ns", lambda: next(ticks))
    return ticks


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
    outer_ns = time.perf_counter_ns()
    clock.start()
    inner_ns = time.perf_counter_ns()
    time.sleep(0.01)
    inner_ns = time.perf_counter_ns() - inner_ns
    clock.stamp()
    outer_ns = time.perf_counter_ns() - outer_ns
    (interval_ns,) = clock.stop().host_ns
    assert 10_000_000 <= inner_ns <= interval_ns <= outer_ns


def test_host_clock_forgets_the_turn_before():
    clock = HostClock()
    first = turn(clock, n_decode=5)
    second = turn(clock, n_decode=1)
    assert len(first.host_ns) == 6
    assert len(second.host_ns) == 2


def test_fake_clock_is_a_clock():
    clock: Clock = FakeClock([7, 5, 6], calls := [])
    assert turn(clock, n_decode=2) == Times(host_ns=[7, 5, 6], event_ns=None)
    assert calls == ["start", "stamp end of phase", "stamp", "stamp", "stop"]


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
