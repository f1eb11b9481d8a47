"""transformers' default cache: it grows by concatenation, one row a step."""

from __future__ import annotations

from typing import Any

from transformers import Cache, DynamicCache

from kvcache.caches.contract import KVCache


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
