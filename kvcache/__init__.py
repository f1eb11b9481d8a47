"""What is measured: generation with and without a KV cache. Knows no clock.

    model = kvcache.load("random:tiny")
    strategy = kvcache.Dynamic(model)
    strategy.prepare(batch_size=1, capacity=40)
    tokens = strategy.generate(torch.tensor([[1, 2, 3]]), n_gen=8)

Importing this package costs nothing: a name brings its module, and with it torch, when it is first used (PEP 562). So
the arithmetic (`Costs`) works where torch cannot be imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcache.cached import Dynamic, Static
    from kvcache.compiled import Compiled
    from kvcache.costs import Costs
    from kvcache.models import load
    from kvcache.naive import Naive
    from kvcache.reference import HfGenerate
    from kvcache.strategy import Strategy

__all__ = ["Compiled", "Costs", "Dynamic", "HfGenerate", "Naive", "Static", "Strategy", "load"]

_MODULES = {
    "Compiled": "compiled",
    "Costs": "costs",
    "Dynamic": "cached",
    "HfGenerate": "reference",
    "Naive": "naive",
    "Static": "cached",
    "Strategy": "strategy",
    "load": "models",
}


if not TYPE_CHECKING:  # a type checker that sees this would take any name for a public one

    def __getattr__(name: str) -> object:
        """Import the module of a public name at its first use."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
