"""transformers' QuantizedCache: integers in groups that share a scale, beside a window of exact recent tokens.

A first prompt attends to its exact keys and is quantised whole. Later tokens stay exact until 128 have gathered; then
everything is unpacked, joined and quantised anew (KIVI, arXiv:2402.02750, with groups of 64 along the flattened axis).
"""

from typing import ClassVar

from transformers import Cache, QuantizedCache

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

    def _empty(self) -> Cache:
        self._marked = []
        kind = f"{self.backend}-int{self.nbits}"
        refuse_other_layers(self.config, kind)
        text = self.config.get_text_config(decoder=True)
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        if heads * head_dim % GROUP_SIZE:
            raise Unsupported(
                f"{kind} stores groups of {GROUP_SIZE} numbers, which a token's {heads} heads of {head_dim} do not fill"
            )
        try:
            return QuantizedCache(self.backend, self.config, nbits=self.nbits, q_group_size=GROUP_SIZE)
        except ImportError as error:
            raise Unsupported(f"{kind} needs {self.package}: run pip install 'kvbench[quantized]'") from error

    @property
    def used_bytes(self) -> int:
        return held_bytes(self.layers)
