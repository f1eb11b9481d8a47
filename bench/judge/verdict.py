"""Defines a verdict, what `gate` or `ab` decides about one quantity, and the exit code of several."""

from collections.abc import Iterable
from typing import Literal, get_args

import msgspec

from bench.case import Case
from kvcache.arithmetic.costs import Phase

VerdictKind = Literal["failed", "regression", "missing", "inconclusive", "not-comparable", "new", "faster", "same"]
"""Worst first. "failed": head's case crashed or emitted other tokens; "missing": only base has it, "new": only head."""

_KINDS: tuple[VerdictKind, ...] = get_args(VerdictKind)
COMPARED = frozenset({"regression", "inconclusive", "faster", "same"})
"""Kinds of which a figure of both sides was compared."""
TIMES = frozenset({"time", "mfu", "mbu"})
"""Quantities that a clock gave; all others are exact."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What `gate` or `ab` says of one quantity of a case and phase: `base` is compared with, `head` is judged."""

    case: Case
    phase: Phase
    kind: VerdictKind
    quantity: str
    """"time" (in ms), "mfu" or "mbu" (a time as a share of the roof), "tokens_match", or an exact counter's name."""
    base: float | None = None
    head: float | None = None
    effect: float | None = None
    """Change of a time as a share of base's: 0.05 is five percent slower. None for counters."""
    low: float | None = None
    high: float | None = None
    """Interval of `effect`."""
    detectable: float | None = None
    """The smallest slow-down, as a share, that this comparison could have found."""
    detail: str = ""
    """What a reader must know besides, in one line: why it is not comparable, what was left undecided."""


def exit_code(verdicts: Iterable[Verdict], *, require_time: bool = False) -> int:
    """Return 5 a case failed, 1 regression, 3 a case is missing or nothing was compared, 4 inconclusive, 0 passed.

    The first that holds, in this order. `require_time`: also 3 where a time could not be compared.
    """
    verdicts = list(verdicts)
    kinds = {verdict.kind for verdict in verdicts}
    compared = any(map(is_compared, verdicts))
    if "failed" in kinds:
        return 5
    if "regression" in kinds:
        return 1
    if "missing" in kinds or not compared or (require_time and _lacks_time(verdicts)):
        return 3
    return 4 if "inconclusive" in kinds else 0


def worst_first(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Sort by kind as `VerdictKind` lists them; among times of a kind the largest slow-down leads."""
    return sorted(verdicts, key=lambda verdict: (_KINDS.index(verdict.kind), -(verdict.effect or 0.0)))


def is_compared(verdict: Verdict) -> bool:
    """Return whether a figure of both sides was held against the other; right tokens alone compare nothing."""
    return verdict.kind in COMPARED and verdict.quantity != "tokens_match"


def _lacks_time(verdicts: Iterable[Verdict]) -> bool:
    times = [verdict for verdict in verdicts if verdict.quantity in TIMES]
    return not times or any(verdict.kind == "not-comparable" for verdict in times)
