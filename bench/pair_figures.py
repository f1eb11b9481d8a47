"""What a process pair counts for: one figure a phase."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bench.case import Phase
from bench.pairs import NAMES, PairTimes, Turn
from bench.rounds import CLOCK_TICK_NS, STEAL_SHARE
from bench.sides import SideName


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

    Of turns that followed one another it is the fastest prefill, and the decode with each of its steps as fast as in
    the fastest turn: other programs only ever add to a time, and on a shared machine they add to many, a different
    share on each side. What a change adds to every step, or to the same step of every turn, shows in the fastest; a
    cost whose place differs from turn to turn does not, however regular it is.

    Turns in lockstep saw the same machine, a step apart, so that what it added is in both, and all of it counts: the
    geometric mean over the turns.
    """
    if not turns:
        return None
    if lockstep:
        return float(np.exp(np.mean(np.log([_of_one_ns(turn, phase) for turn in turns]))))
    if phase == "prefill":
        return min(turn.prefill_ns for turn in turns)
    return float(np.min([turn.step_ns for turn in turns], axis=0).mean())


def _of_one_ns(turn: Turn, phase: Phase) -> float:
    return turn.prefill_ns if phase == "prefill" else float(np.mean(turn.step_ns))


def _was_stolen_from(turn: Turn, n_threads: int) -> bool:
    return turn.steal_ns is not None and turn.steal_ns > max(CLOCK_TICK_NS, STEAL_SHARE * turn.wall_ns * n_threads)
