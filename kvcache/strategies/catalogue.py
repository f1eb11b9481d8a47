"""The one list of strategies: adding one is its file and one line here. Names are known without importing torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvcache.caches.contract import Kind
    from kvcache.strategies.strategy import Strategy


@dataclass(frozen=True)
class Entry:
    """What is known of a strategy without importing it; code asks for these properties, never for a name."""

    module: str
    class_name: str
    summary: str
    _: KW_ONLY
    refeeds: bool = False
    """Every step feeds the whole sequence again: no cache is read, and the others are measured against it."""
    yardstick: bool = False
    """What a user of transformers runs without this suite."""
    compiles: bool = False
    """It needs a compiler, and its first case takes the time to compile."""

    cache: bool = False
    """The class is a kind of cache, which the strategy `Cached` runs."""
    lossy: bool = False
    """It may change tokens: it is timed, and gets quality figures instead of a pass."""
    prefills_as_stored: bool = False
    """Its class takes `prefill_as_stored`: a prompt attends to its own keys and values as the cache will hold them."""

    def load(self) -> Any:
        """Import the class: a Strategy, or a KVCache if `cache`."""
        return getattr(importlib.import_module(self.module), self.class_name)


def _lossy(module: str, class_name: str, summary: str) -> Entry:
    """Describe a lossy kind of cache in `kvcache/caches/`."""
    return Entry(f"kvcache.caches.{module}", class_name, summary, cache=True, lossy=True)


STRATEGIES: dict[str, Entry] = {
    "naive": Entry("kvcache.strategies.naive", "Naive", "feeds the whole sequence at every step", refeeds=True),
    "dynamic": Entry("kvcache.strategies.cached", "Dynamic", "a cache that grows by concatenation"),
    "static": Entry("kvcache.strategies.cached", "Static", "a cache allocated once and written in place"),
    "compiled": Entry(
        "kvcache.compiled.strategy", "Compiled", "a static cache, a layer's step compiled to one kernel", compiles=True
    ),
    "hf-generate": Entry(
        "kvcache.strategies.hf_generate", "HfGenerate", "transformers' own generate(), the yardstick", yardstick=True
    ),
    "compiled-int8": Entry(
        "kvcache.compiled.quantized",
        "CompiledInt8",
        "compiled, its cache in 8-bit integers",
        compiles=True,
        lossy=True,
        prefills_as_stored=True,
    ),
    "compiled-int4": Entry(
        "kvcache.compiled.quantized",
        "CompiledInt4",
        "compiled, its cache in 4-bit integers",
        compiles=True,
        lossy=True,
        prefills_as_stored=True,
    ),
    "quanto-int4": _lossy("quanto", "QuantoInt4", "optimum-quanto's 4-bit integers, 128 recent tokens exact"),
    "quanto-int2": _lossy("quanto", "QuantoInt2", "optimum-quanto's 2-bit integers, 128 recent tokens exact"),
    "hqq-int8": _lossy("hqq", "HqqInt8", "HQQ's 8-bit integers, 128 recent tokens exact"),
    "hqq-int4": _lossy("hqq", "HqqInt4", "HQQ's 4-bit integers, 128 recent tokens exact"),
    "hqq-int3": _lossy("hqq", "HqqInt3", "HQQ's 3-bit integers, 128 recent tokens exact"),
    "hqq-int2": _lossy("hqq", "HqqInt2", "HQQ's 2-bit integers, 128 recent tokens exact"),
    "hqq-int1": _lossy("hqq", "HqqInt1", "HQQ's single bits, 128 recent tokens exact"),
    "fp8": _lossy("fp8", "Fp8KV", "8-bit floating point (e4m3), a scale per token and head"),
    "sink-window": _lossy("sink_window", "SinkWindowKV", "the first four tokens and the last 252"),
    "offloaded": Entry(
        "kvcache.caches.offloaded", "OffloadedKV", "a dynamic cache that waits in main memory (CUDA)", cache=True
    ),
}
"""Name -> entry, in the order of tables and plots. `cache:module:factory`, the user's own, is not in it."""

OWN = "cache:"
"""How the name of a user's own cache begins."""

REFEEDING = frozenset(name for name, entry in STRATEGIES.items() if entry.refeeds)
YARDSTICKS = frozenset(name for name, entry in STRATEGIES.items() if entry.yardstick)
COMPILING = frozenset(name for name, entry in STRATEGIES.items() if entry.compiles)
LOSSY = frozenset(name for name, entry in STRATEGIES.items() if entry.lossy)
PREFILLING_AS_STORED = frozenset(name for name, entry in STRATEGIES.items() if entry.prefills_as_stored)
"""Names by what their entries say, for columns of names; a name that only a newer version knows is in none of them."""


def is_lossy(name: str) -> bool:
    """Return whether a strategy may change tokens; a user's own cache may, until its worker knows what it promises."""
    return name in LOSSY or name.startswith(OWN)


def build(
    name: str,
    model: PreTrainedModel,
    *,
    naive_logits: str = "last",
    prefill_as_stored: bool = False,
    kernels: Mapping[str, str] | None = None,
) -> Strategy:
    """Build the strategy called `name` on `model`.

    `naive_logits` ("last" or "all") is for those that refeed, `prefill_as_stored` for PREFILLING_AS_STORED, `kernels`
    for COMPILING.

    Raises:
        KeyError: there is no such strategy.
        Unsupported: the strategy cannot run this model on this machine.
    """
    if name.startswith(OWN):
        return _cached(model, name, importlib.import_module("kvcache.caches.own").own_kind(name))
    entry = STRATEGIES[name]
    if entry.cache:
        return _cached(model, name, entry.load())
    options: dict[str, Any] = {"all_logits": naive_logits == "all"} if entry.refeeds else {}
    options |= {"prefill_as_stored": prefill_as_stored} if entry.prefills_as_stored else {}
    options |= {"kernels": kernels} if entry.compiles else {}
    strategy: Strategy = entry.load()(model, **options)
    return strategy


def _cached(model: PreTrainedModel, name: str, kind: Kind) -> Strategy:
    strategy: Strategy = importlib.import_module("kvcache.strategies.cached").Cached(model, name, kind)
    return strategy
