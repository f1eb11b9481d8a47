"""The figures of process pairs: the time of each side in a pair, their ratio, and how long head waited for a core."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from bench.ab.record import NAMES, PairTimes, SideName, Turn
from bench.analysis.disturbance import turn_is_disturbed
from kvcache.arithmetic.costs import Phase

WAITING_SHARE = 0.5
"""A slow-down of which head's workers spent more than this share waiting for a core is none of the code."""


def figure(times: PairTimes, phase: Phase, n_threads: int, cores: int) -> float | None:
    """Return the pair's figure: log of head's time / base's, both by `side_ns`; None where every turn was disturbed."""
    found = sides_ns(times, phase, n_threads, cores)
    return math.log(found["head"] / found["base"]) if found else None


def sides_ns(times: PairTimes, phase: Phase, n_threads: int, cores: int) -> dict[SideName, float]:
    """Return the time of each side of a pair; of neither where every turn was disturbed."""
    kept = undisturbed(times, n_threads, cores)
    return {name: side_ns(turns, phase, lockstep=times.lockstep) for name, turns in kept.items() if turns}


def undisturbed(times: PairTimes, n_threads: int, cores: int) -> dict[SideName, list[Turn]]:
    """Return base's and head's turns, without those that are disturbed (by the rule of every run), and their opposites.

    The other side's turn goes too, so that both have as many: of more, the fastest is faster.
    """

    def disturbed(turn: Turn) -> bool:
        counted = {"steal_ns": turn.steal_ns, "throttled_ns": turn.throttled_ns}
        return turn_is_disturbed(turn.wall_ns, n_threads, cores, **counted)

    both = zip(*([turn for turn in times.turns if turn.side == name] for name in NAMES), strict=True)
    kept = [pair for pair in both if not any(map(disturbed, pair))]
    return {name: [pair[at] for pair in kept] for at, name in enumerate(NAMES)}


def side_ns(turns: Sequence[Turn], phase: Phase, *, lockstep: bool) -> float:
    """Return a side's TTFT or TPOT over its `turns`, of which there is one at least.

    The decode has each of its steps as fast as in the fastest turn, and of prefills it is the fastest: other programs
    only ever add to a time, and on a shared machine they add to many, a different share on each side. What a change
    adds to every step, or to the same step of every turn, shows in the fastest; a cost whose place differs from turn to
    turn does not, however regular it is.

    Prefills in lockstep are too few for that, and each saw the same machine as the other side's, so that what it added
    is in both: their geometric mean.
    """
    if phase == "decode":
        return float(np.min([turn.step_ns for turn in turns], axis=0).mean())
    prefills_ns = [turn.prefill_ns for turn in turns]
    return float(np.exp(np.mean(np.log(prefills_ns)))) if lockstep else min(prefills_ns)


def is_waiting(pairs: Iterable[PairTimes], phase: Phase, n_threads: int, cores: int) -> bool:
    """Return whether head waited longer for a core than base by most of what it is slower by (medians over `pairs`).

    What the fastest turn is slower by is in every turn, so the shortest wait of each side's turns is what counts; where
    every turn counts for the time (prefills in lockstep), so does its wait.
    """
    slower, waited = [], []
    for times in pairs:
        base, head = undisturbed(times, n_threads, cores).values()
        if not base:
            continue
        waits = [[wait for turn in turns if (wait := _waited_ns(turn, phase)) is not None] for turns in (base, head)]
        if [len(found) for found in waits] != [len(base), len(head)]:
            return False
        steps = len(base[0].step_ns) if phase == "decode" else 1
        before_ns, now_ns = (steps * side_ns(turns, phase, lockstep=times.lockstep) for turns in (base, head))
        slower.append(now_ns - before_ns)
        shortest = np.mean if times.lockstep and phase == "prefill" else np.min
        waited.append(float(shortest(waits[1]) - shortest(waits[0])))
    return bool(slower) and float(np.median(waited)) > WAITING_SHARE * max(0.0, float(np.median(slower)))


def _waited_ns(turn: Turn, phase: Phase) -> int | None:
    """Return how long a turn waited for a core: in this phase where that is known separately, otherwise in both."""
    if turn.waited_ns is None or turn.prefill_waited_ns is None:
        return turn.waited_ns
    return turn.prefill_waited_ns if phase == "prefill" else turn.waited_ns - turn.prefill_waited_ns
