"""What `update` of a user's cache returns, held against what it said of it: a mask of another length goes unnoticed."""

import weakref
from typing import Any

from torch import Tensor
from transformers import Cache

from kvcache.caches.contract import UnfitCache


def check_updates(cache: Cache, spec: str) -> None:
    """Check from now on the keys and values that `cache.update` returns: their dtype, and their number of tokens.

    A model makes its masks before it calls `update`, as long as `get_mask_sizes` says. Where that is another length,
    torch attends to the first keys as if the others were not there, or fails at some shape. One token needs no mask.

    Raises (from `update`):
        UnfitCache: they are no two tensors, of another dtype than the model's, or as many as no mask.
    """
    sizes, update = type(cache).get_mask_sizes, type(cache).update
    itself = weakref.ref(cache)  # a cycle would outlive the cache: a worker collects none while it takes times
    lengths: set[int] = set()
    has_begun = False  # whether a layer was updated since `lengths` were asked for

    def asked(*args: Any, **named: Any) -> Any:
        nonlocal has_begun
        if has_begun:
            lengths.clear()
            has_begun = False
        found = sizes(itself(), *args, **named)  # type: ignore[arg-type]  # whoever calls holds it
        if isinstance(found, tuple):
            lengths.add(int(found[0]))
        return found

    def checked(key_states: Tensor, value_states: Tensor, *args: Any, **named: Any) -> Any:
        nonlocal has_begun
        has_begun = True
        returned = update(itself(), key_states, value_states, *args, **named)  # type: ignore[arg-type]
        _refuse_other_kinds(returned, key_states, spec)
        n_new, n_keys = key_states.shape[-2], returned[0].shape[-2]
        if n_new > 1 and lengths and n_keys not in lengths:
            raise UnfitCache(
                f"{spec}: update() returned keys of {n_keys} tokens when {n_new} were fed, and get_mask_sizes() had "
                f"said {', '.join(map(str, sorted(lengths)))}: attention would see the wrong ones"
            )
        return returned

    object.__setattr__(cache, "get_mask_sizes", asked)
    object.__setattr__(cache, "update", checked)


def _refuse_other_kinds(returned: object, fed: Tensor, spec: str) -> None:
    parts = list(returned) if isinstance(returned, tuple | list) else []
    if len(parts) != 2 or not all(isinstance(part, Tensor) for part in parts):
        raise UnfitCache(f"{spec}: update() returned {type(returned).__name__}; valid: two tensors, keys and values")
    for part in parts:
        if part.dtype != fed.dtype:
            raise UnfitCache(f"{spec}: update() returned {part.dtype} for {fed.dtype}; valid: the dtype that it is fed")
