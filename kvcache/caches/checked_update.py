"""What `update` of a user's cache returns, held against what it said of it: a mask of another length goes unnoticed."""

import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor
from transformers import Cache

from kvcache.caches.contract import UnfitCache, layers_of


def check_updates(cache: Cache, spec: str) -> Callable[[], None]:
    """Check from now on the keys and values that `cache.update` returns: dtype, shape, and number of tokens.

    What is checked are the methods that the object has, which need not be its class's: a factory may have set others on
    it. Returns a function that puts them back.

    A model makes its masks before it calls `update`, as long as `get_mask_sizes` says. Where that is another length,
    torch attends to the first keys as if the others were not there, or fails at some shape. Where it places the keys
    too early (an evicting cache that says no offset), a token attends to tokens after it. One token needs no mask.

    Raises (from `update`):
        UnfitCache: they are no two tensors, of another dtype or shape than what was fed, or as many as no mask; or the
            cache has too few layers.
    """
    sizes, update = _unbound(cache, "get_mask_sizes"), _unbound(cache, "update")
    itself = weakref.ref(cache)  # a cycle would outlive the cache: a worker collects none while it takes times
    places: set[tuple[int, int]] = set()  # how many keys, and the position of the first
    n_fed: dict[int, int] = {}  # tokens, by layer
    has_begun = False  # whether a layer was updated since `places` were asked for

    def asked(*args: Any, **named: Any) -> Any:
        nonlocal has_begun
        if has_begun:
            places.clear()
            has_begun = False
        found = sizes(itself(), *args, **named)
        if isinstance(found, tuple):
            places.add((int(found[0]), int(found[1])))
        return found

    def checked(key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **named: Any) -> Any:
        nonlocal has_begun
        has_begun, fed = True, itself()
        assert fed is not None  # whoever calls holds it
        try:
            returned = update(fed, key_states, value_states, layer_idx, *args, **named)
        except IndexError as error:
            n_layers = len(layers_of(fed))
            if layer_idx < n_layers or not n_layers:  # an error of its own
                raise
            raise UnfitCache(f"{spec} has {n_layers} layers, fewer than the model") from error
        _refuse_other_kinds(returned, (key_states, value_states), spec)
        n_new, n_keys = key_states.shape[-2], returned[0].shape[-2]
        n_fed[layer_idx] = n_fed.get(layer_idx, 0) + n_new
        if n_new > 1 and places:
            _refuse_other_places(places, n_new, n_keys, n_fed[layer_idx], spec)
        return returned

    replaced = {"get_mask_sizes": asked, "update": checked}
    before = {name: vars(cache)[name] for name in replaced if name in vars(cache)}

    def put_back() -> None:
        fed = itself()
        attributes = {} if fed is None else vars(fed)
        for name in [name for name, checking in replaced.items() if attributes.get(name) is checking]:
            del attributes[name]
            attributes |= {name: before[name]} if name in before else {}

    vars(cache).update(replaced)
    return put_back


def _refuse_other_places(places: set[tuple[int, int]], n_new: int, n_keys: int, n_fed: int, spec: str) -> None:
    said = f"{spec}: update() returned keys of {n_keys} tokens when {n_new} were fed, and get_mask_sizes() had said"
    offsets = [offset for length, offset in places if length == n_keys]
    if not offsets:
        lengths = sorted({length for length, _ in places})
        raise UnfitCache(f"{said} {', '.join(map(str, lengths))}: attention would see the wrong ones")
    first = max(offsets)
    if n_keys > n_new and first + n_keys < n_fed:  # as many keys as queries need no mask, and no position
        begin = f"{said} that they begin at position {first}"
        raise UnfitCache(f"{begin}: {n_fed} tokens were fed, so that a token would see later ones")


def _unbound(cache: Cache, name: str) -> Callable[..., Any]:
    """Return a method of the object as a function of it, which does not keep it alive unless the method itself does."""
    method = getattr(cache, name)
    if isinstance(method, MethodType) and method.__self__ is cache:
        function: Callable[..., Any] = method.__func__
        return function
    return lambda _cache, *args, **named: method(*args, **named)


def _refuse_other_kinds(returned: object, fed: tuple[Tensor, Tensor], spec: str) -> None:
    parts = list(returned) if isinstance(returned, tuple | list) else []
    if len(parts) != 2 or not all(isinstance(part, Tensor) for part in parts):
        raise UnfitCache(f"{spec}: update() returned {type(returned).__name__}; valid: two tensors, keys and values")
    for part, new in zip(parts, fed, strict=True):
        if part.dtype != new.dtype:
            raise UnfitCache(f"{spec}: update() returned {part.dtype} for {new.dtype}; valid: the dtype that it is fed")
        n_keys = parts[0].shape[-2]
        if part.shape != (*new.shape[:-2], n_keys, new.shape[-1]):
            raise UnfitCache(
                f"{spec}: update() returned shape {list(part.shape)} for {list(new.shape)}, and {n_keys} keys; valid: "
                "the shape that it is fed, with as many tokens in keys as in values"
            )
