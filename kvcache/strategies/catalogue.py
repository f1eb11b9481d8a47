"""The one list of strategies: adding one is its file and one line here. Names are known without importing torch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvcache.strategies.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known of a strategy without importing it; code asks for these properties, never for a name."""

    module: str
    class_name: str
    summary: str
    refeeds: bool = False
    """Every step feeds the whole sequence again: no cache is read, and the others are measured against it."""
    yardstick: bool = False
    """What a user of transformers runs without this suite."""
    compiles: bool = False
    """It needs a compiler, and its first case takes the time to compile."""

    def load(self) -> type[Strategy]:
        """Import the strategy's class."""
        loaded: type[Strategy] = getattr(importlib.import_module(self.module), self.class_name)
        return loaded


STRATEGIES: dict[str, Entry] = {
    "naive": Entry(
        module="kvcache.strategies.naive",
        class_name="Naive",
        summary="feeds the whole sequence at every step",
        refeeds=True,
    ),
    "dynamic": Entry(
        module="kvcache.strategies.cached",
        class_name="Dynamic",
        summary="a cache that grows by concatenation",
    ),
    "static": Entry(
        module="kvcache.strategies.cached",
        class_name="Static",
        summary="a cache allocated once and written in place",
    ),
    "compiled": Entry(
        module="kvcache.compiled.strategy",
        class_name="Compiled",
        summary="a static cache, a layer's step compiled to one kernel",
        compiles=True,
    ),
    "hf-generate": Entry(
        module="kvcache.strategies.hf_generate",
        class_name="HfGenerate",
        summary="transformers' own generate(), the yardstick",
        yardstick=True,
    ),
}
"""Name -> entry, in the order of tables and plots."""

REFEEDING = frozenset(name for name, entry in STRATEGIES.items() if entry.refeeds)
YARDSTICKS = frozenset(name for name, entry in STRATEGIES.items() if entry.yardstick)
COMPILING = frozenset(name for name, entry in STRATEGIES.items() if entry.compiles)
"""Names by what their entries say, for columns of names; a name that only a newer version knows is in none of them."""


def build(name: str, model: PreTrainedModel, *, naive_logits: str = "last") -> Strategy:
    """Build the strategy called `name` on `model`; `naive_logits` ("last" or "all") is for those that refeed.

    Raises:
        KeyError: there is no such strategy.
        Unsupported: the strategy cannot run this model on this machine.
    """
    entry = STRATEGIES[name]
    if entry.refeeds:
        return entry.load()(model, all_logits=naive_logits == "all")  # type: ignore[call-arg]  # only these take it
    return entry.load()(model)
