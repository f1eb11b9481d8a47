"""What is measured: generation with and without a KV cache. Knows no clock.

    model = kvcache.load("random:tiny")
    strategy = kvcache.Dynamic(model)
    strategy.prepare(batch_size=1, capacity=40)
    tokens = strategy.generate(torch.tensor([[1, 2, 3]]), n_gen=8)

Importing this package costs nothing: a name brings its module, and with it torch, when it is first used (PEP 562). So
the arithmetic (`Costs`) works where torch cannot be imported.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcache.arithmetic.costs import Costs
    from kvcache.compiled.strategy import Compiled
    from kvcache.models import load
    from kvcache.strategies.cached import Dynamic, Static
    from kvcache.strategies.hf_generate import HfGenerate
    from kvcache.strategies.naive import Naive
    from kvcache.strategies.strategy import Strategy

__all__ = ["Compiled", "Costs", "Dynamic", "HfGenerate", "Naive", "Static", "Strategy", "load"]

_MODULES = {
    "Compiled": "compiled.strategy",
    "Costs": "arithmetic.costs",
    "Dynamic": "strategies.cached",
    "HfGenerate": "strategies.hf_generate",
    "Naive": "strategies.naive",
    "Static": "strategies.cached",
    "Strategy": "strategies.strategy",
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
