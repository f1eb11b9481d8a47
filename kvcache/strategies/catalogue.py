"""The one list of strategies: adding one is its file and one line here. Names are known without importing torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvcache.strategies.strategy import Strategy

STRATEGIES: dict[str, tuple[str, str, str]] = {
    "naive": ("kvcache.strategies.naive", "Naive", "feeds the whole sequence at every step"),
    "dynamic": ("kvcache.strategies.cached", "Dynamic", "a cache that grows by concatenation"),
    "static": ("kvcache.strategies.cached", "Static", "a cache allocated once and written in place"),
    "compiled": ("kvcache.compiled.strategy", "Compiled", "a static cache, a layer's step compiled to one kernel"),
    "hf-generate": ("kvcache.strategies.hf_generate", "HfGenerate", "transformers' own generate(), the yardstick"),
}
"""Name -> (module, class, what it is), in the order of tables and plots."""


def strategy_class(name: str) -> type[Strategy]:
    """The class of the strategy called `name`.

    Raises:
        KeyError: no such strategy.
    """
    module, class_name, _ = STRATEGIES[name]
    found: type[Strategy] = getattr(importlib.import_module(module), class_name)
    return found


def build(name: str, model: PreTrainedModel, *, naive_logits: str = "last") -> Strategy:
    """The strategy called `name` on `model`; `naive_logits` ("last" or "all") is for naive alone."""
    if name == "naive":
        return strategy_class(name)(model, all_logits=naive_logits == "all")  # type: ignore[call-arg]  # Naive's own
    return strategy_class(name)(model)
