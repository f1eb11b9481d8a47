"""A cell of the matrix of architectures: one strategy by one way of feeding; and which cells make a type whole."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from tests.tiny import EVERYWHERE

BATCH_SIZES = (1, 3)
BATCH_PADDED = 2
CHUNKED = ("dynamic", "static")
"""Strategies that are also fed the prompt in three pieces."""

Scenario = Literal["whole", "context", "chunks", "padding"]
Outcome = Literal["right", "tie", "false", "refused", "failed", "silent"]
"""`false`: other tokens or logits, and the proof says so. `silent`: other tokens without a word, which must not be."""
GENERATED: tuple[Scenario, ...] = ("whole", "context")
"""What `kvbench run` measures too."""


@dataclass(frozen=True)
class Cell:
    """What one strategy did with one model, fed in one way; `scenario` is empty where no model came about."""

    model_type: str
    dtype: str
    batch_size: int
    strategy: str
    scenario: Scenario | Literal[""]
    outcome: Outcome
    logits_error: float | None = None
    """Largest difference from the reference, as a share of its largest logit."""
    prefix_stable: bool | None = None
    reason: str = ""
    rounding_error: float | None = None
    """For a `false` in bfloat16: how far rounding alone moves naive re-feed, as such a share (`rounding`)."""
    kv_bytes_measured: int | None = None
    """After the last step, as the three below."""
    kv_bytes_predicted: int | None = None
    """As `kvbench run` predicts it before any weights are read; empty where it cannot, and `unpredicted` says why."""
    kv_bytes_allocated: int | None = None
    kv_bytes_allocated_predicted: int | None = None
    unpredicted: str = ""


def is_whole(found: Collection[tuple[int, str, str, str]]) -> bool:
    """Return whether `found` has every cell of a type and dtype: batch size, strategy, scenario and reason of each.

    Where there is no reference, one cell without a strategy stands for all; chunks follow where the whole prompt was
    measured, which needs no reason.
    """
    measured = {each[:3] for each in found if not each[3]}
    have = {each[:3] for each in found}
    for batch_size in BATCH_SIZES:
        for scenario in GENERATED:
            if (batch_size, "", scenario) in have:
                continue
            wanted = {(batch_size, name, scenario) for name in EVERYWHERE}
            if scenario == "whole":
                fed_in_chunks = [name for name in CHUNKED if (batch_size, name, scenario) in measured]
                wanted |= {(batch_size, name, "chunks") for name in fed_in_chunks}
            if not wanted <= have:
                return False
    return {(BATCH_PADDED, name, "padding") for name in EVERYWHERE} <= have
