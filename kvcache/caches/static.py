"""transformers' static cache: allocated once for the whole capacity, and written in place."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StaticCache
from transformers.cache_utils import (
    STATIC_LAYER_TYPE_MAPPING,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
    get_layer_types_and_kwargs,
)

from kvcache.caches.contract import KVCache, Unsupported
from kvcache.caches.dynamic import refuse_alibi_of_the_fed
from kvcache.caches.states import State, cloned, row_bytes, write_back


class StaticKV(KVCache):
    """Its tensors stay where they are, so a mark is a copy of them."""

    def _empty(self) -> Cache:
        self._marked: list[State] = []
        self._refuse_unknown_layers()
        self._refuse_masks_of_its_own()
        made = StaticCache(config=self.config, max_cache_len=self.capacity)
        # Linear layers take the end of a mask for that of the tokens fed, and masking_utils pads it for the others.
        linear = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in made.layers)
        self.padded_length = 0 if linear else self.capacity
        return made

    def mark(self) -> None:
        self._marked = [cloned(layer) for layer in self.layers]

    @torch.inference_mode()
    def restore(self) -> None:
        if not self._marked:
            self.cache.reset()
            return
        for layer, state in zip(self.layers, self._marked, strict=True):
            write_back(layer, state)

    @property
    def used_bytes(self) -> int:
        return sum(_used_bytes(layer) for layer in self.layers)

    def _refuse_unknown_layers(self) -> None:
        types, _ = get_layer_types_and_kwargs(self.config.get_text_config(decoder=True))
        unknown = sorted(set(types) - set(STATIC_LAYER_TYPE_MAPPING))
        if unknown:
            raise Unsupported(f"transformers' StaticCache has no layer for {', '.join(unknown)} of {self.model_type}")

    def _refuse_masks_of_its_own(self) -> None:
        """Refuse GPT-Neo, whose local layers count back from the last key (here the end), and Falcon with ALiBi."""
        if "local" in getattr(self.config, "attention_layers", ()):
            raise Unsupported(
                f"{self.model_type} cuts the window of its local layers by the number of keys, which in a static cache "
                "is the whole capacity, not the tokens so far"
            )
        refuse_alibi_of_the_fed(self.config, "static")


def _used_bytes(layer: Any) -> int:
    """Count what belongs to tokens: of tensors with an axis for all of them the filled part, and the others whole."""
    if not isinstance(layer, StaticLayer):
        return row_bytes(layer)
    tensors = [value for value in vars(layer).values() if isinstance(value, Tensor)]
    per_token = row_bytes([each for each in tensors if layer.max_cache_len in each.shape])
    used = min(int(layer.get_seq_length()), layer.max_cache_len)
    return per_token * used // layer.max_cache_len + row_bytes(layer) - per_token
