"""transformers' default cache: it grows by concatenation, one row a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from kvcache.caches.contract import KVCache, Unsupported


class DynamicKV(KVCache):
    """Grows by making new tensors, so that those of a mark are never written again: a mark copies nothing."""

    def _empty(self) -> Cache:
        self._marked: list[dict[str, Any]] = []
        return DynamicCache(config=self.config)

    def mark(self) -> None:
        self._marked = [dict(vars(layer)) for layer in self.layers]

    def restore(self) -> None:
        if not self._marked:
            self.cache = self._empty()
            return
        for layer, attributes in zip(self.layers, self._marked, strict=True):
            vars(layer).update(attributes)

    @property
    def used_bytes(self) -> int:
        return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in self.layers if layer.is_initialized)


def refuse_other_layers(config: PreTrainedConfig, kind: str) -> None:
    """Refuse a model of which a layer keeps anything else than the keys and values of all tokens.

    Raises:
        Unsupported: a layer slides, or keeps other states.
    """
    others = {type(layer).__name__ for layer in DynamicCache(config=config).layers if type(layer) is not DynamicLayer}
    if others:
        raise Unsupported(f"{kind} holds layers with full attention only; this model has {', '.join(sorted(others))}")


def replaced_layers(config: PreTrainedConfig, layer: Callable[[], DynamicLayer], kind: str) -> list[Any]:
    """Make a `layer` for each of the model's, all of which must be with full attention (see `refuse_other_layers`)."""
    refuse_other_layers(config, kind)
    return [layer() for _ in DynamicCache(config=config).layers]
