"""The cache kinds, one small class each. All that this project knows of transformers' Cache API stands here.

A cache kind can be marked (after the context has been fed, once and untimed) and restored to that mark before each
repetition; without a mark it is restored to empty.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import CacheLayerMixin

from kvcache.strategies.strategy import Unsupported


class KVCache(ABC):
    """Keys and values of every layer, `[batch, kv_heads, tokens, head_dim]` each, for up to `capacity` tokens."""

    cache: Cache
    padded_length = 0
    """Tokens that attention sees whatever is filled; 0 where it sees the filled ones alone."""

    def __init__(self, config: PreTrainedConfig, capacity: int) -> None:
        """Make an empty cache.

        Raises:
            Unsupported: the model keeps other states than keys and values (linear attention, state spaces).
        """
        self.config, self.capacity = config, capacity
        self.cache = self._empty()
        if not all(isinstance(layer, CacheLayerMixin) for layer in self.cache.layers):
            raise Unsupported(f"{config.model_type} keeps other states than keys and values")

    @property
    def layers(self) -> list[Any]:
        """The cache's layers; their attributes differ by kind, and transformers gives them no common type."""
        return list(self.cache.layers)

    @abstractmethod
    def _empty(self) -> Cache:
        """A new cache without tokens."""

    @abstractmethod
    def mark(self) -> None:
        """Remember the present state as the one that `restore` comes back to."""

    @abstractmethod
    def restore(self) -> None:
        """Come back to the mark, or to empty where nothing was marked."""

    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """Bytes of keys and values that belong to tokens, padding left out."""


class DynamicKV(KVCache):
    """Grows by concatenation, so that the tensors of a mark are never written again: a mark costs nothing."""

    def _empty(self) -> Cache:
        self._marked: list[tuple[Tensor, Tensor, int]] = []
        return DynamicCache(config=self.config)

    def mark(self) -> None:
        self._marked = [(layer.keys, layer.values, layer.get_seq_length()) for layer in self.layers]

    def restore(self) -> None:
        if not self._marked:
            self.cache = self._empty()
            return
        for layer, (keys, values, length) in zip(self.layers, self._marked, strict=True):
            layer.keys, layer.values = keys, values
            if hasattr(layer, "cumulative_length"):  # a sliding window counts the tokens that it has let go
                layer.cumulative_length = length

    @property
    def used_bytes(self) -> int:
        return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in self.layers if layer.is_initialized)


class StaticKV(KVCache):
    """Allocated once and written in place: a mark is a copy, and its addresses never change (CUDA graphs need that)."""

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
    """Tokens that a static layer has seen (transformers keeps them as a tensor, in sliding layers also as an int)."""
    return int(layer.get_seq_length())


def _set_length(layer: Any, length: int) -> None:
    if hasattr(layer, "cumulative_length_int"):
        layer.cumulative_length_int = length
        # The tensor beside it counts only as far as the window, where the layer stops reading it.
        length = min(length, layer.max_cache_len)
    layer.cumulative_length.fill_(length)
