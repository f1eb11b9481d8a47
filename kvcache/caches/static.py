"""transformers' static cache: allocated once for the whole capacity, and written in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StaticCache

from kvcache.caches.contract import KVCache


class StaticKV(KVCache):
    """Its tensors stay where they are, so a mark is a copy of them."""

    def _empty(self) -> Cache:
        self._marked: list[tuple[Tensor, Tensor, int]] = []
        self.padded_length = self.capacity
        return StaticCache(config=self.config, max_cache_len=self.capacity)

    @torch.inference_mode()
    def mark(self) -> None:
        self._marked = [(layer.keys.clone(), layer.values.clone(), _length(layer)) for layer in self.layers]

    @torch.inference_mode()
    def restore(self) -> None:
        if not self._marked:
            self.cache.reset()
            return
        for layer, (keys, values, length) in zip(self.layers, self._marked, strict=True):
            layer.keys.copy_(keys)
            layer.values.copy_(values)
            _set_length(layer, length)

    @property
    def used_bytes(self) -> int:
        total = 0
        for layer in self.layers:
            if layer.is_initialized:
                used = min(_length(layer), layer.max_cache_len)
                total += (layer.keys.nbytes + layer.values.nbytes) * used // layer.max_cache_len
        return total


def _length(layer: Any) -> int:
    """Count the tokens that a static layer has seen (transformers keeps a tensor, in sliding layers also an int)."""
    return int(layer.get_seq_length())


def _set_length(layer: Any, length: int) -> None:
    if hasattr(layer, "cumulative_length_int"):
        layer.cumulative_length_int = length
        # The tensor beside it counts only as far as the window, where the layer stops reading it.
        length = min(length, layer.max_cache_len)
    layer.cumulative_length.fill_(length)
