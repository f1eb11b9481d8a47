"""The one list of strategies: adding one is its file and one line here. Names are known without importing torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from kvcache.arithmetic import kv_bytes

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
    formula: kv_bytes.Formula
    """What its cache holds where the model has plain keys and values."""
    _: KW_ONLY
    refeeds: bool = False
    """Every step feeds the whole sequence again: no cache is read, and the others are measured against it."""
    yardstick: bool = False
    """What a user of transformers runs without this suite."""
    compiles: bool = False
    """It needs a compiler, and its first case takes the time to compile."""
    plain: bool = False
    """What the others are compared with that compile as it does, or do not."""
    rehearsed_by: str = ""
    """The strategy that makes its cache on the meta device; others compute with the numbers that they store."""

    cache: bool = False
    """The class is a kind of cache, which the strategy `Cached` runs."""
    lossy: bool = False
    """It may change tokens: it is timed, and gets quality figures instead of a pass."""
    prefills_as_stored: bool = False
    """Its class takes `prefill_as_stored`: a prompt attends to its own keys and values as the cache will hold them."""
    off_device: bool = False
    """Its cache does not lie in the memory of the device that computes."""

    def load(self) -> Any:
        """Import the class: a Strategy, or a KVCache if `cache`."""
        return getattr(importlib.import_module(self.module), self.class_name)


def _lossy(module: str, class_name: str, summary: str, formula: kv_bytes.Formula, **facts: Any) -> Entry:
    """Describe a lossy kind of cache in `kvcache/caches/`."""
    return Entry(f"kvcache.caches.{module}", class_name, summary, formula, cache=True, lossy=True, **facts)


def _grouped(module: str, class_name: str, summary: str, bytes_of_codes: int, packed: int = 1) -> Entry:
    """Describe a kind that quantises groups of 64 numbers: `packed` groups share `bytes_of_codes`."""
    formula = kv_bytes.grouped(bytes_of_codes, packed)
    return _lossy(module, class_name, f"{summary}, 128 recent tokens exact", formula)


def _compiled(class_name: str, summary: str, formula: kv_bytes.Formula) -> Entry:
    """Describe a lossy kind of cache of the fast path."""
    module = "kvcache.compiled.quantized"
    return Entry(module, class_name, summary, formula, compiles=True, lossy=True, prefills_as_stored=True)


STRATEGIES: dict[str, Entry] = {
    "naive": Entry(
        "kvcache.strategies.naive", "Naive", "feeds the whole sequence at every step", kv_bytes.NOTHING, refeeds=True
    ),
    "dynamic": Entry(
        *("kvcache.strategies.cached", "Dynamic", "a cache that grows by concatenation", kv_bytes.GROWING),
        plain=True,
        rehearsed_by="dynamic",
    ),
    "static": Entry(
        *("kvcache.strategies.cached", "Static", "a cache allocated once and written in place", kv_bytes.STATIC),
        rehearsed_by="static",
    ),
    "compiled": Entry(
        *("kvcache.compiled.strategy", "Compiled", "a static cache, a layer's step compiled to one kernel"),
        kv_bytes.CHUNKS,
        compiles=True,
        plain=True,
    ),
    "hf-generate": Entry(
        *("kvcache.strategies.hf_generate", "HfGenerate", "transformers' own generate(), the yardstick"),
        kv_bytes.GROWING,
        yardstick=True,
        rehearsed_by="dynamic",
    ),
    "compiled-int8": _compiled("CompiledInt8", "compiled, its cache in 8-bit integers", kv_bytes.INT8_CHUNKS),
    "compiled-int4": _compiled("CompiledInt4", "compiled, its cache in 4-bit integers", kv_bytes.INT4_CHUNKS),
    "quanto-int4": _grouped("quanto", "QuantoInt4", "optimum-quanto's 4-bit integers", 64, packed=2),
    "quanto-int2": _grouped("quanto", "QuantoInt2", "optimum-quanto's 2-bit integers", 64, packed=4),
    "hqq-int8": _grouped("hqq", "HqqInt8", "HQQ's 8-bit integers", 64),
    "hqq-int4": _grouped("hqq", "HqqInt4", "HQQ's 4-bit integers", 32),
    "hqq-int3": _grouped("hqq", "HqqInt3", "HQQ's 3-bit integers", 4 * 7),  # ten to an int32
    "hqq-int2": _grouped("hqq", "HqqInt2", "HQQ's 2-bit integers", 16),
    "hqq-int1": _grouped("hqq", "HqqInt1", "HQQ's single bits", 8),
    "fp8": _lossy("fp8", "Fp8KV", "8-bit floating point (e4m3), a scale per token and head", kv_bytes.FP8),
    "sink-window": _lossy(
        *("sink_window", "SinkWindowKV", "the first four tokens and the last 252", kv_bytes.evicting(256)),
        rehearsed_by="sink-window",
    ),
    "offloaded": Entry(
        *("kvcache.caches.offloaded", "OffloadedKV", "a dynamic cache that waits in main memory (CUDA)"),
        kv_bytes.GROWING,
        cache=True,
        off_device=True,
        rehearsed_by="dynamic",
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
OFF_DEVICE = frozenset(name for name, entry in STRATEGIES.items() if entry.off_device)
EVICTING = frozenset(name for name, entry in STRATEGIES.items() if entry.formula.kept_tokens is not None)
"""Names by what their entries say, for columns of names; a name that only a newer version knows is in none of them."""

PLAIN = {entry.compiles: name for name, entry in STRATEGIES.items() if entry.plain}
"""Whether a strategy compiles -> the exact one that it is compared with."""
PLAIN_CACHE = PLAIN[False]
"""The cache that transformers makes by itself."""


def exact_of(name: str) -> str:
    """Name the exact strategy that one is compared with."""
    return PLAIN[name in COMPILING]


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
