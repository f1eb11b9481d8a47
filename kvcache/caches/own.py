"""`cache:module:factory`: the user's own cache, made by a function of the model.

The function gets the model, and `prompt_length` (tokens before the first generated one) and `capacity` (tokens at the
end) if it names them. It returns a new transformers `Cache` at each call. Its attribute `promise` is "exact" or
"lossy"; without it the cache is lossy. A context is fed again at every reset: nothing is assumed of how to copy it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_args

from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from kvcache.caches.contract import KVCache, Promise, UnfitCache
from kvcache.caches.held_bytes import held_bytes
from kvcache.models.own_code import load_own, naming_the_line


class OwnKV(KVCache):
    """A cache that the user's factory makes anew for every repetition."""

    def __init__(self, kind: OwnKind, model: PreTrainedModel, capacity: int, prompt_length: int | None = None) -> None:
        """Make a first cache.

        Raises:
            UnfitCache: the factory returns no Cache, one with layers of other kinds, or the same object again.
            ModelError: the factory raises; the message names the line.
        """
        self.kind, self.model = kind, model
        self._made: Cache | None = None
        super().__init__(model, capacity, prompt_length)

    def _empty(self) -> Cache:
        made = self.kind.make(self.model, {"capacity": self.capacity, "prompt_length": self.prompt_length})
        if not isinstance(made, Cache):
            raise UnfitCache(f"{self.kind.spec} returned a {type(made).__name__}; valid: a transformers.Cache")
        others = {type(layer).__name__ for layer in made.layers if not isinstance(layer, CacheLayerMixin)}
        if others:
            raise UnfitCache(
                f"{self.kind.spec} returned a cache with layers of type {', '.join(sorted(others))}; "
                "valid: subclasses of transformers' CacheLayerMixin, which keep keys and values"
            )
        if made is self._made:
            raise UnfitCache(f"{self.kind.spec} returned the same object twice; valid: a new cache at each call")
        self._made = made
        return made

    @property
    def restores(self) -> bool:
        return False

    def mark(self) -> None:
        """Remember nothing: `restores` is False, so the context is fed again."""

    def restore(self) -> None:
        self.cache = self._empty()

    @property
    def used_bytes(self) -> int:
        return held_bytes(self.cache, leaving_out=self.model)


class OwnKind:
    """The factory that a spec names, with what it promises."""

    def __init__(self, spec: str) -> None:
        """Import the factory of `cache:module:factory`.

        Raises:
            UnfitCache: the spec names no factory, it cannot be imported, or its promise is neither of the two.
        """
        self.spec = spec
        _, module, name = [*spec.split(":", 2), "", ""][:3]
        if not module or not name or ":" in name:
            raise UnfitCache(f"{spec!r} names no factory; valid: cache:module:factory, as in cache:my_cache:make")
        self.factory: Callable[..., object] = load_own(module, name, spec)
        promise: Any = getattr(self.factory, "promise", "lossy")
        if promise not in get_args(Promise):
            raise UnfitCache(f"{spec}: promise is {promise!r}; valid: {', '.join(get_args(Promise))}")
        self.promise: Promise = promise

    def __call__(self, model: PreTrainedModel, capacity: int, prompt_length: int | None = None) -> KVCache:
        """Make an empty cache for `model`."""
        return OwnKV(self, model, capacity, prompt_length)

    def make(self, model: PreTrainedModel, known: dict[str, int | None]) -> object:
        """Call the factory with those of the `known` arguments that it names.

        Raises:
            UnfitCache: it names one that is not known.
        """
        with naming_the_line(self.spec):
            named = {name: known[name] for name in inspect.signature(self.factory).parameters if name in known}
            if None in named.values():
                raise UnfitCache(f"{self.spec} wants prompt_length: pass it to prepare()")
            return self.factory(model, **named)


@functools.cache
def own_kind(spec: str) -> OwnKind:
    """Import a factory once."""
    return OwnKind(spec)
