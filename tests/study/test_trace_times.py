"""The times of a trace: strategies take turns, a step keeps its median, and a slow trace is not repeated for long."""

from __future__ import annotations

import pytest
import torch

from bench.machine.clock import Times
from bench.study import trace_times

PROMPT = torch.zeros(1, 2, dtype=torch.long)


class Clock:
    """Every round takes `step_ns` a stamp, and the prefill ten times as long."""

    def __init__(self, step_ns: int) -> None:
        self.step_ns = step_ns

    def start(self) -> None:
        self.stamps: list[bool] = []

    def stamp(self, *, end_of_phase: bool = False) -> None:
        self.stamps.append(end_of_phase)

    def stop(self) -> Times:
        assert self.stamps[0]
        assert not any(self.stamps[1:])
        return Times(host_ns=[(10 if first else 1) * self.step_ns for first in self.stamps], event_ns=None)


class Strategy:
    """Notes its turns."""

    def __init__(self, name: str, turns: list[str]) -> None:
        self.name, self.turns = name, turns

    def reset(self) -> None:
        self.turns.append(self.name)

    def generate(self, prompt, n_gen, on_step):
        for _ in range(n_gen):
            on_step(prompt[:, 0], prompt)


@pytest.mark.parametrize(("step_ns", "rounds"), [(1000, 25), (10**9, 3), (10**7, 9)])
def test_strategies_take_turns_until_time_is_up(monkeypatch, step_ns: int, rounds: int) -> None:
    monkeypatch.setattr(trace_times, "make_clock", lambda _: Clock(step_ns))
    turns: list[str] = []
    strategies = {name: Strategy(name, turns) for name in ("naive", "dynamic")}
    found = trace_times.step_times_ns(strategies, {"naive": 3, "dynamic": 2}, PROMPT)
    assert turns == ["naive", "dynamic"] * rounds
    assert found == {"naive": [10 * step_ns, step_ns, step_ns], "dynamic": [10 * step_ns, step_ns]}
