"""transformers' QuantizedCache: integers in groups that share a scale, beside a window of exact recent tokens.

A first prompt attends to its exact keys and is quantised whole. Later tokens stay exact until 128 have gathered; then
everything is unpacked, joined and quantised anew (KIVI, arXiv:2402.02750, with groups of 64 along the flattened axis).
"""

import weakref
from typing import Any, ClassVar

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache

from kvcache.caches.contract import Promise, Unsupported
from kvcache.caches.dynamic import DynamicKV, refuse_other_layers
from kvcache.caches.held_bytes import held_bytes

GROUP_SIZE = 64
"""Numbers that share a scale."""


class QuantizedKV(DynamicKV):
    """Stores `nbits` a number by the code of `package`, an optional dependency."""

    promise: ClassVar[Promise] = "lossy"
    package: ClassVar[str]
    backend: ClassVar[str]
    nbits: ClassVar[int]

    def __init__(self, model: PreTrainedModel, capacity: int, prompt_length: int | None = None) -> None:
        self._model = model
        super().__init__(model, capacity, prompt_length)

    def _empty(self) -> Cache:
        self._marked = []
        kind = f"{self.backend}-int{self.nbits}"
        refuse_other_layers(self.config, kind)
        for heads, size in stored_heads(self._model):
            if heads * size % GROUP_SIZE:
                words = f"{heads} head{'' if heads == 1 else 's'} of {size}"
                raise Unsupported(f"{kind} stores groups of {GROUP_SIZE} numbers, which a token's {words} do not fill")
        try:
            return QuantizedCache(self.backend, self.config, nbits=self.nbits, q_group_size=GROUP_SIZE)
        except ImportError as error:
            raise Unsupported(f"{kind} needs {self.package}: run pip install 'kvbench[quantized]'") from error

    @property
    def used_bytes(self) -> int:
        return held_bytes(self.layers)


@torch.inference_mode()
def stored_heads(model: PreTrainedModel) -> frozenset[tuple[int, int]]:
    """Return the heads and their size that a model with full attention stores of a token: keys, values, latents.

    One token is fed, once for each model: configs name several numbers of heads, and not each is the one stored.
    """
    if model not in _STORED_HEADS:
        cache = DynamicCache(config=model.config)
        model(torch.zeros((1, 1), dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
        layers: list[Any] = cache.layers  # DynamicLayer, since others are refused
        stored = (rows for layer in layers for rows in (layer.keys, layer.values))
        _STORED_HEADS[model] = frozenset((rows.shape[1], rows.shape[3]) for rows in stored if rows is not None)
    return _STORED_HEADS[model]


_STORED_HEADS: weakref.WeakKeyDictionary[PreTrainedModel, frozenset[tuple[int, int]]] = weakref.WeakKeyDictionary()
