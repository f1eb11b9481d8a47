"""Times of a trace's steps: the traced strategies take turns, and each step keeps the median of its times."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from torch import Tensor

from bench.machine.clock import make_clock, stamping
from kvcache.strategies.strategy import Strategy

FEWEST_ROUNDS, MOST_ROUNDS = 3, 25
BUDGET_NS = 2_000_000_000
"""A short trace takes more rounds, up to about so much time: other work on the machine hides a few milliseconds."""


def step_times_ns(
    strategies: Mapping[str, Strategy], n_steps: Mapping[str, int], prompt: Tensor
) -> dict[str, list[float]]:
    """Median time in ns of each step over a few rounds, the first step being the prefill.

    A trace shows where the time goes and is no benchmark: it has no intervals and one process for all. The strategies
    have run before (the trace itself was their warm-up) and go by turns, so that a drift meets all of them.
    """
    clock = make_clock(prompt.device)
    rounds_ns: dict[str, list[list[int]]] = {name: [] for name in strategies}
    n_rounds = spent_ns = 0
    while n_rounds < FEWEST_ROUNDS or (n_rounds < MOST_ROUNDS and spent_ns < BUDGET_NS):
        n_rounds += 1
        for name, strategy in strategies.items():
            strategy.reset()
            clock.start()
            strategy.generate(prompt, n_steps[name], stamping(clock))
            times = clock.stop()
            rounds_ns[name].append(times.event_ns or times.host_ns)
            spent_ns += sum(times.host_ns)
    return {name: [median(step) for step in zip(*rows, strict=True)] for name, rows in rounds_ns.items()}
