"""Process pairs that were never measured: what the decision procedure of `ab` does is known before it meets a machine.

Noise as seen on shared machines: an effect of each process (address layout) that all its turns share, noise of the
turns, which only ever adds to them, bursts that hit one turn, pairs that are off for no reason, a machine that drifts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bench.ab.pair import turn_order
from bench.ab.record import NAMES, PairFailure, PairTimes, SideName, Turn
from bench.case import Case

N_STEPS = 31


@dataclass(frozen=True)
class Machine:
    """Scatter in shares of a time; `slowdown` is what head's decode really costs more."""

    slowdown: float = 0.0
    process_sd: float = 0.01
    turn_noise: float = 0.03
    """Mean of what a turn takes longer than the fastest that its process could take; each of its steps by as much
    again."""
    burst: float = 0.02
    """Chance of a turn to take up to three times as long."""
    odd_pair: float = 0.01
    """Chance of a pair in which one side is off by 20 % or so, all its turns."""
    drift: float = 0.1
    """By how much the machine slows down over a pair."""
    blocks: int = 4
    lockstep: bool = False
    """Whether turns are of both sides at once: two blocks of long steps, and what a step takes longer is in both."""
    hog_from: int | None = None
    """The pair from which on another process disturbs both sides at random: some turns, and some sides all through."""

    def pairs(self, seed: int) -> Callable[[int, Sequence[Case]], list[PairTimes | PairFailure]]:
        """`measure` for `trial.conduct`."""
        random = np.random.default_rng(seed)
        return lambda number, cases: [self._pair(random, number, case) for case in cases]

    def _pair(self, random: np.random.Generator, number: int, case: Case) -> PairTimes:
        hogged = self.hog_from is not None and number >= self.hog_from
        own = {name: random.normal(0, self.process_sd, 2) for name in NAMES}
        slowed = {name: math.log1p(0.3 * random.random()) * (random.random() < 0.5) for name in NAMES}
        if random.random() < self.odd_pair:
            own[NAMES[random.integers(2)]] += abs(random.normal(0, 0.2))
        own["head"][1] += math.log1p(self.slowdown)
        if self.lockstep:
            return PairTimes(case=case.key, pair=number, turns=self._in_lockstep(random, own), lockstep=True)
        turns: list[Turn] = []
        for block in range(self.blocks):
            for name in turn_order(number, block, self.blocks):
                logs = own[name] + random.exponential(self.turn_noise, 2) + self.drift * len(turns) / 16
                logs += math.log1p(2 * random.random()) * (random.random() < self.burst)
                if hogged:
                    logs += math.log1p(random.random()) * (random.random() < 0.5) + slowed[name]
                prefill_ns, step_ns = 3.6e6 * math.exp(logs[0]), 7e5 * math.exp(logs[1])
                steps_ns = (step_ns * np.exp(random.exponential(self.turn_noise, N_STEPS))).astype("int64")
                turns.append(
                    Turn(
                        side=name,
                        block=block,
                        prefill_ns=round(prefill_ns),
                        step_ns=steps_ns.tolist(),
                        wall_ns=round(prefill_ns + int(steps_ns.sum())),
                        waited_ns=0,
                        steal_ns=0,
                    )
                )
        return PairTimes(case=case.key, pair=number, turns=turns, lockstep=False)

    def _in_lockstep(self, random: np.random.Generator, own: dict[SideName, np.ndarray]) -> list[Turn]:
        turns = []
        for block in range(2):
            common = random.exponential(3 * self.turn_noise, N_STEPS + 1) + self.drift * block / 2
            for name in NAMES:
                logs = common + own[name][[0] + [1] * N_STEPS] + random.exponential(self.turn_noise, N_STEPS + 1)
                logs += np.log1p(2 * random.random(N_STEPS + 1)) * (random.random(N_STEPS + 1) < self.burst)
                prefill_ns, *step_ns = (np.exp(logs) * 4e7).astype("int64").tolist()
                wall_ns = prefill_ns + sum(step_ns)
                turns.append(
                    Turn(
                        side=name,
                        block=block,
                        prefill_ns=prefill_ns,
                        step_ns=step_ns,
                        wall_ns=wall_ns,
                        waited_ns=0,
                        steal_ns=0,
                    )
                )
        return turns
