"""The contract of a kind of cache: make an empty one, mark a state, come back to it, say what its tokens take.

Marking happens once, untimed, after the context has been fed; `restore` comes before each repetition. Without a mark
it comes back to an empty cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

Promise = Literal["exact", "lossy"]
"""`exact`: logits equal those without a cache, within the tolerance of the dtype; `lossy`: tokens may change."""


class Unsupported(Exception):
    """This model cannot be run in this way on this machine; the message is the reason, in one line."""


class UnfitCache(Exception):
    """A cache that others wrote does not do what a cache must; the message is the reason, in one line."""


class KVCache(ABC):
    """Keys and values of every layer, `[batch, kv_heads, tokens, head_dim]` each, for up to `capacity` tokens."""

    cache: Cache
    promise: ClassVar[Promise] = "exact"
    restores: ClassVar[bool] = True
    """Whether `restore` comes back to the mark; False: it comes back to empty, and the context is fed again."""
    padded_length = 0
    """Tokens that attention sees whatever is filled; 0 where it sees the filled ones alone."""

    def __init__(self, model: PreTrainedModel, capacity: int, prompt_length: int | None = None) -> None:
        """Make an empty cache for `model`; `prompt_length` tokens come before the first generated one.

        Raises:
            Unsupported: the model keeps other states than keys and values (linear attention, state spaces), or this
                kind cannot hold those of its layers.
        """
        self.config, self.device, self.capacity = model.config, model.device, capacity
        self.prompt_length = prompt_length
        self.cache = self._empty()
        if not all(isinstance(layer, CacheLayerMixin) for layer in self.cache.layers):
            raise Unsupported(f"{self.config.model_type} keeps other states than keys and values")

    @property
    def layers(self) -> list[Any]:
        """The cache's layers; their attributes differ by kind, and transformers gives them no common type."""
        return list(self.cache.layers)

    @abstractmethod
    def _empty(self) -> Cache:
        """Make a new cache without tokens."""

    @abstractmethod
    def mark(self) -> None:
        """Remember the present state as the one that `restore` comes back to."""

    @abstractmethod
    def restore(self) -> None:
        """Come back to the mark, or to empty where nothing was marked."""

    def check_length(self, n_tokens: int) -> None:
        """Compare what the cache says that it has seen with the `n_tokens` that it was fed.

        Raises:
            UnfitCache: they differ, so that positions are wrong from here on.
        """
        found = int(self.cache.get_seq_length())
        if found != n_tokens:
            raise UnfitCache(f"get_seq_length() is {found} after {n_tokens} tokens; positions are counted from it")

    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """Bytes of keys and values that belong to tokens, padding left out."""
