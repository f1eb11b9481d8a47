"""Defines a verdict: what `gate` or `ab` decides about one quantity."""

from __future__ import annotations

from typing import Literal

import msgspec

from kvcache.arithmetic.costs import Phase

VerdictKind = Literal["failed", "regression", "missing", "inconclusive", "not-comparable", "new", "faster", "same"]
"""Worst first. "failed": head's case crashed or emitted other tokens; "missing": only base has it, "new": only head."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What `gate` or `ab` says of one quantity of a case and phase: `base` is compared with, `head` is judged."""

    case: str
    """`Case.key`."""
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
