"""What a user's cache may keep outside of itself: in its factory, and in the modules and classes that define it."""

import sys
from collections.abc import Callable, Iterator

from transformers import Cache

from kvcache.caches.contract import layers_of


def kept_by_definition(factory: Callable[..., object], cache: Cache) -> Iterator[object]:
    """Yield the factory, all globals of the modules that define it, `cache` and its layers, and their classes' own."""
    yield factory
    classes = {kind for part in (cache, *layers_of(cache)) for kind in type(part).__mro__}
    for name in {str(getattr(factory, "__module__", None)), *(kind.__module__ for kind in classes)}:
        if name.partition(".")[0] in _OTHERS or name not in sys.modules:
            continue
        for thing in list(vars(sys.modules[name]).values()):
            yield thing
            if isinstance(thing, type) and thing.__module__ == name:
                yield from list(vars(thing).values())
    for kind in classes:  # one that a function makes is no global
        if kind.__module__.partition(".")[0] not in _OTHERS:
            yield from list(vars(kind).values())


_OTHERS = sys.stdlib_module_names | {"kvcache", "numpy", "torch", "transformers"}
"""Packages whose globals are no cache's."""
