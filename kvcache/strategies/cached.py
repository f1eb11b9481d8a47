"""KV-cached: the prompt is fed once, then every step feeds one token. The twin of naive.py."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kvcache.caches.contract import KVCache
from kvcache.caches.dynamic import DynamicKV
from kvcache.caches.static import StaticKV
from kvcache.strategies.strategy import Strategy, last_logits


class Cached(Strategy):
    """Keys and values of every token are kept by a `KVCache`, so that a step computes its own row only."""

    cache_kind: ClassVar[type[KVCache]]

    def prepare(self, batch_size: int, capacity: int, context: Tensor | None = None) -> None:
        super().prepare(batch_size, capacity, context)
        self.kv = self.cache_kind(self.model, capacity)
        if context is not None:
            with torch.inference_mode():
                last_logits(self.model, context, cache=self.kv.cache)
            self.kv.mark()
        self.reset()

    def reset(self) -> None:
        super().reset()
        self.kv.restore()
        self.attention_mask: Tensor | None = None

    @torch.inference_mode()
    def prefill(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.attention_mask = attention_mask
        return self._forward(ids)

    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        if self.attention_mask is not None:
            self.attention_mask = torch.cat([self.attention_mask, torch.ones_like(ids)], dim=1)
        return self._forward(ids)

    @property
    def kv_bytes(self) -> int:
        return self.kv.used_bytes

    def _forward(self, ids: Tensor) -> Tensor:
        """Feed `ids [batch, q]`; return the logits of the last position, `[batch, vocab]`."""
        mask_length = self.kv.padded_length
        return last_logits(
            self.model, ids, cache=self.kv.cache, attention_mask=self.attention_mask, mask_length=mask_length
        )[:, -1]


class Dynamic(Cached):
    """The cache of transformers' default: it grows by one row a step, by concatenation (a copy of itself)."""

    name: ClassVar[str] = "dynamic"
    cache_kind = DynamicKV


class Static(Cached):
    """The cache is allocated once, for `capacity` tokens, and written in place; attention sees its whole length."""

    name: ClassVar[str] = "static"
    cache_kind = StaticKV
