"""`cache:module:factory`: the user's own cache, made by a function of the model.

The function gets the model, and `prompt_length` (tokens before the first generated one) and `capacity` (tokens at the
end) if it names them. It returns a new transformers `Cache` at each call. Its attribute `promise` is "exact" or
"lossy"; without it the cache is lossy. A context is fed again at every reset: nothing is assumed of how to copy it.
"""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

from transformers import Cache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DummyLayer, LinearAttentionCacheLayerMixin

from kvcache.caches.checked_update import check_updates
from kvcache.caches.contract import KVCache, Promise, UnfitCache, counts_tokens, layers_of
from kvcache.caches.defining_modules import kept_by_definition
from kvcache.caches.held_bytes import held_bytes
from kvcache.caches.untouched import Surroundings, kept_in_model
from kvcache.models.own_code import load_own, naming_the_line, users_line


class OwnKV(KVCache):
    """A cache that the user's factory makes anew for every repetition."""

    of_user = True

    def __init__(self, kind: OwnKind, model: PreTrainedModel, capacity: int, prompt_length: int | None = None) -> None:
        """Make a first cache.

        Raises:
            UnfitCache: the factory returns no Cache, one that is not empty or has layers of other kinds, or the same
                object again; or it changes the model.
            ModelError: the factory raises; the message names the line.
        """
        self.kind, self.model = kind, model
        self._made: Callable[[], Cache | None] = lambda: None
        super().__init__(model, capacity, prompt_length)
        kind.refuse_changes(model)

    def _empty(self) -> Cache:
        made = self.kind.make(self.model, {"capacity": self.capacity, "prompt_length": self.prompt_length})
        if made is self._made():
            raise UnfitCache(f"{self.kind.spec} returned the same object twice; valid: a new cache at each call")
        self._made = weakref.ref(made)
        is_checked = self._case in self.kind.checked
        self._put_back = _nothing if is_checked else check_updates(made, self.kind.spec)
        return made

    @property
    def _case(self) -> Fed:
        return self.capacity, self.prompt_length, *self.fed

    @property
    def restores(self) -> bool:
        return False

    def mark(self) -> None:
        """Remember nothing: `restores` is False, so the context is fed again."""

    def restore(self) -> None:
        del self.cache, self._put_back  # before there is another
        if self._made() is not None:
            gc.collect()  # it refers to itself, and a worker collects nothing while it takes times
        self.cache = self._empty()

    def check_length(self, n_tokens: int) -> None:
        """Compare what the cache says that it has seen with the `n_tokens` that it was fed, and look after the model.

        Later caches that are fed alike are not checked any more while they run, since they may be timed.

        Raises:
            UnfitCache: they differ; or the model was changed, or keeps what the cache should.
        """
        super().check_length(n_tokens)
        self.kind.refuse_changes(self.model, self.stored)
        self.kind.checked.add(self._case)
        self._put_back()

    @property
    def stored(self) -> object:
        return [self.cache, *kept_by_definition(self.kind.factory, self.cache)]

    @property
    def used_bytes(self) -> int:
        return held_bytes(self.stored, leaving_out=self.model)

    @property
    def is_empty(self) -> bool:
        return not held_bytes(self.cache, leaving_out=self.model) and not self._counted


def _nothing() -> None:
    """Put nothing back."""


Fed = tuple[int, int | None, int, int]
"""What a case feeds to a cache: capacity, tokens before the first generated one, sequences, tokens of the context."""

KEPT_SHARE = 0.1
"""A model may keep a little, as the angles of longer positions; this share of a cache's bytes is no little any more."""


class OwnKind:
    """The factory that a spec names, with what it promises; for one model."""

    def __init__(self, spec: str) -> None:
        """Import the factory of `cache:module:factory`.

        Raises:
            UnfitCache: the spec names no factory, it cannot be called, or its promise is neither of the two.
            ModelError: it cannot be imported.
        """
        self.spec = spec
        self.takes_padding = True
        self.checked: set[Fed] = set()
        """The cases of which a whole run was checked."""
        self._before: Surroundings | None = None
        _, module, name = [*spec.split(":", 2), "", ""][:3]
        if not module or not name or ":" in name or module.startswith("."):
            raise UnfitCache(f"{spec!r} names no factory; valid: cache:module:factory, as in cache:my_cache:make")
        self.factory: Callable[..., object] = load_own(module, name, spec)
        if not callable(self.factory):
            raise UnfitCache(f"{spec} is {_described(self.factory)}; valid: a function of the model")
        owners: list[Any] = [self.factory, *(getattr(self.factory, name, None) for name in ("func", "__self__"))]
        promise: Any = next((owner.promise for owner in owners if hasattr(owner, "promise")), "lossy")
        if promise not in get_args(Promise):
            raise UnfitCache(f"{spec}: promise is {promise!r}; valid: {', '.join(get_args(Promise))}")
        self.promise: Promise = promise

    def __call__(self, model: PreTrainedModel, capacity: int, prompt_length: int | None = None) -> KVCache:
        """Make an empty cache for `model`."""
        if self._before is None:
            self._before = Surroundings.of(model)
        return OwnKV(self, model, capacity, prompt_length)

    def make(self, model: PreTrainedModel, known: dict[str, int | None]) -> Cache:
        """Call the factory with those of the `known` arguments that it names.

        Raises:
            UnfitCache: it names one that is not known, or returns anything but an empty Cache.
            ModelError: it raises.
        """
        with naming_the_line(self.spec):
            signature = inspect.signature(self.factory)
            wanted = [parameter for name, parameter in signature.parameters.items() if name in known]
            if any(known[parameter.name] is None for parameter in wanted):
                raise UnfitCache(f"{self.spec} wants prompt_length: pass it to prepare()")
            args = [known[each.name] for each in wanted if each.kind is each.POSITIONAL_ONLY]
            named = {each.name: known[each.name] for each in wanted if each.kind is not each.POSITIONAL_ONLY}
            try:
                signature.bind(model, *args, **named)
            except TypeError as error:
                valid = "valid: a function of the model, and of prompt_length and capacity if it names them"
                raise UnfitCache(f"{self.spec}{signature}: {error}; {valid}") from error
            return self._fit(self._called(model, *args, **named))

    def _called(self, *args: object, **named: object) -> object:
        try:
            return self.factory(*args, **named)
        except (TypeError, AttributeError) as error:
            kind = self.factory.func if isinstance(self.factory, partial) else self.factory
            if inspect.isclass(kind) and not users_line(error):
                raise UnfitCache(f"{self.spec} is a class whose first argument is no model ({error})") from error
            raise

    def _fit(self, made: object) -> Cache:
        if not isinstance(made, Cache):
            raise UnfitCache(f"{self.spec} returned {_described(made)}; valid: a transformers.Cache")
        if isinstance(made, EncoderDecoderCache):
            raise UnfitCache(f"{self.spec} returned an EncoderDecoderCache, which is for models with an encoder")
        others = {type(layer).__name__ for layer in layers_of(made) if not isinstance(layer, _LAYERS)}
        if others:
            raise UnfitCache(
                f"{self.spec} returned a cache with layers of type {', '.join(sorted(others))}; "
                "valid: subclasses of transformers' CacheLayerMixin, which keep keys and values"
            )
        length = made.get_seq_length() if counts_tokens(made) else 0
        if not hasattr(length, "__index__"):  # an integer of Python, numpy or torch has it; a position is made of it
            valid = "valid: how many tokens the cache has seen"
            raise UnfitCache(f"{self.spec}: get_seq_length() returned {_described(length)}; {valid}")
        if length:
            raise UnfitCache(f"{self.spec} returned a cache that holds {length} tokens; valid: an empty one each time")
        return made

    def refuse_changes(self, model: PreTrainedModel, stored: object = None) -> None:
        """Refuse what the factory, or the cache that it made, has done to the model.

        `stored` is all that is known to be kept of the tokens; None before any was fed.

        Raises:
            UnfitCache: the model or torch's settings are others than before, or tokens are kept elsewhere.
        """
        assert self._before is not None
        if changed := self._before.changed(Surroundings.of(model)):
            raise UnfitCache(f"{self.spec} changed {changed}; it must leave them as they are")
        if stored is None:
            return
        held, kept = held_bytes(stored, leaving_out=model), kept_in_model(model, stored, self._before)
        if kept > KEPT_SHARE * held:
            raise UnfitCache(f"{self.spec} keeps {kept} bytes in the model; valid: all that it keeps in the cache")
        if not held:
            raise UnfitCache(
                f"{self.spec} holds its tokens in no tensor, array or bytes that can be reached from its cache, so "
                "their bytes are not known"
            )


_LAYERS = (CacheLayerMixin, LinearAttentionCacheLayerMixin, DummyLayer)


def _described(thing: object) -> str:
    if thing is None:
        return "None"
    if isinstance(thing, type):
        return f"the class {thing.__name__}"
    name = type(thing).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


own_kind = OwnKind
"""How the catalogue imports a factory."""
