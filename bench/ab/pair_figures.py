"""What a process pair counts for: one figure a phase."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bench.ab.pair import NAMES, PairTimes, Turn
from bench.ab.workers import SideName
from bench.analysis.rounds import CLOCK_TICK_NS, STEAL_SHARE
from kvcache.arithmetic.costs import Phase


def figure(times: PairTimes, phase: Phase, n_threads: int) -> float | None:
    """The pair's one figure: log of head's time / base's, both by `side_ns`; None where the machine let none count."""
    base, head = (side_ns(turns, phase, lockstep=times.lockstep) for turns in undisturbed(times, n_threads).values())
    return math.log(head / base) if base and head else None


def undisturbed(times: PairTimes, n_threads: int) -> dict[SideName, list[Turn]]:
    """Base's and head's turns, but for those in which the hypervisor took a share of the CPU time, and their opposites.

    That share is the one of `rounds.measured_turns`. The other side's turn goes too, so that both have as many: of
    more, the fastest is faster.
    """
    both = zip(*([turn for turn in times.turns if turn.side == name] for name in NAMES), strict=True)
    kept = [pair for pair in both if not any(_was_stolen_from(turn, n_threads) for turn in pair)]
    return {name: [pair[at] for pair in kept] for at, name in enumerate(NAMES)}


def side_ns(turns: Sequence[Turn], phase: Phase, *, lockstep: bool) -> float | None:
    """A side's TTFT or TPOT over its `turns`; None without any.

    The decode has each of its steps as fast as in the fastest turn, and of prefills it is the fastest: other programs
    only ever add to a time, and on a shared machine they add to many, a different share on each side. What a change
    adds to every step, or to the same step of every turn, shows in the fastest; a cost whose place differs from turn to
    turn does not, however regular it is.

    Prefills in lockstep are too few for that, and each saw the same machine as the other side's, so that what it added
    is in both: their geometric mean.
    """
    if not turns:
        return None
    if phase == "decode":
        return float(np.min([turn.step_ns for turn in turns], axis=0).mean())
    prefills_ns = [turn.prefill_ns for turn in turns]
    return float(np.exp(np.mean(np.log(prefills_ns)))) if averages(phase, lockstep=lockstep) else min(prefills_ns)


def averages(phase: Phase, *, lockstep: bool) -> bool:
    """Whether every turn counts for a side's time, not the fastest alone."""
    return lockstep and phase == "prefill"


def _was_stolen_from(turn: Turn, n_threads: int) -> bool:
    return turn.steal_ns is not None and turn.steal_ns > max(CLOCK_TICK_NS, STEAL_SHARE * turn.wall_ns * n_threads)
