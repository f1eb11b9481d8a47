"""The first four tokens and a window of recent ones: the simplest cache that evicts (StreamingLLM, arXiv:2309.17453).

Rows keep the position that they were computed at. ALiBi (Bloom, MPT) has none in its rows: it counts distances between
the rows that are held, as the paper does. A prompt attends to all of its own tokens; eviction comes after it.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from kvcache.caches.contract import Promise
from kvcache.caches.dynamic import DynamicKV, refuse_alibi_of_the_fed, replaced_layers

SINKS = 4
"""First tokens that stay: attention that has nothing to look at looks at them."""
WINDOW = 252
"""Last tokens that stay."""


class SinkWindowKV(DynamicKV):
    """Holds at most SINKS + WINDOW tokens, however long the text is. Left padding would be kept as its sinks."""

    promise: ClassVar[Promise] = "lossy"
    takes_padding: ClassVar[bool] = False

    def _empty(self) -> Cache:
        self._marked = []
        refuse_alibi_of_the_fed(self.config, "sink-window")
        return Cache(layers=replaced_layers(self.config, SinkWindowLayer, "sink-window"))


class SinkWindowLayer(DynamicLayer):
    """The cache of one layer."""

    seen = 0
    """Tokens that were stored, evicted ones included: the next token's position."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add rows `[batch, kv_heads, q, head_dim]`; return all that these queries see, then evict."""
        keys, values = super().update(key_states, value_states)
        self.seen += key_states.shape[2]
        if keys.shape[2] > SINKS + WINDOW:
            self.keys, self.values = _kept(keys), _kept(values)
        return keys, values

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys the next forward sees, and the position of the first: as if all were the latest ones."""
        held = 0 if self.keys is None or self.keys.dim() < 4 else self.keys.shape[2]
        return held + query_length, self.seen - held


def _kept(rows: Tensor) -> Tensor:
    return torch.cat([rows[:, :, :SINKS], rows[:, :, -WINDOW:]], dim=2)
