"""8-bit floating-point numbers (e4m3) with a scale per token and head: plain torch, nothing to install.

A scale per token never has to be changed: rows are appended as they come. transformers' own fp8 layer fixes one scale
for all by the first prompt, and cuts later numbers beyond it.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from kvcache.caches.contract import Promise
from kvcache.caches.dynamic import DynamicKV, replaced_layers
from kvcache.caches.held_bytes import held_bytes

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max


class Fp8KV(DynamicKV):
    """A prompt attends to its own exact keys and to the stored ones before it; a step to stored ones and its own."""

    promise: ClassVar[Promise] = "lossy"

    def _empty(self) -> Cache:
        self._marked = []
        return Cache(layers=replaced_layers(self.config, Fp8Layer, "fp8"))

    @property
    def used_bytes(self) -> int:
        return held_bytes(self.layers)


class Rows(NamedTuple):
    """Stored rows: `codes [batch, kv_heads, tokens, head_dim]` in fp8, `scales [batch, kv_heads, tokens, 1]`."""

    codes: Tensor
    scales: Tensor

    @classmethod
    def of(cls, exact: Tensor) -> Rows:
        """Store `exact [batch, kv_heads, tokens, head_dim]`; the largest number of each row becomes fp8's largest."""
        # A bfloat16 scale has float32's range; it is rounded before it divides, so that its rounding costs nothing.
        scales = (exact.abs().amax(-1, keepdim=True).float() / LARGEST).clamp(min=1e-30).bfloat16()
        codes = (exact.float() / scales.float()).clamp(-LARGEST, LARGEST).to(DTYPE)
        return cls(codes, scales)

    def append(self, later: Rows) -> Rows:
        """Return these rows and then `later`, along the tokens."""
        return Rows(torch.cat([self.codes, later.codes], dim=2), torch.cat([self.scales, later.scales], dim=2))

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Return the numbers that the codes stand for, in `dtype`."""
        return (self.codes.float() * self.scales.float()).to(dtype)


class Fp8Layer(DynamicLayer):
    """The cache of one layer; `keys` and `values`, which transformers expects, stay empty."""

    stored: tuple[Rows, Rows] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store new rows `[batch, kv_heads, q, head_dim]`; return the stored ones before them, and they themselves."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = Rows.of(key_states), Rows.of(value_states)
        if self.stored is None:
            self.stored = new
            return key_states, value_states
        before = [rows.unpacked(key_states.dtype) for rows in self.stored]
        self.stored = self.stored[0].append(new[0]), self.stored[1].append(new[1])
        keys, values = (torch.cat(pair, dim=2) for pair in zip(before, (key_states, value_states), strict=True))
        return keys, values

    def get_seq_length(self) -> int:
        return 0 if self.stored is None else self.stored[0].codes.shape[2]
