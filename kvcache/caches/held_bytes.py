"""The bytes that an object really holds: every storage that can be reached from it, each counted once.

It counts what is there, not what a cache reports of itself: scales, zero points, codebooks, residual windows, padding,
and copies kept beside. It cannot see numpy arrays, closures or globals.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn


def held_bytes(root: object, *, leaving_out: nn.Module | None = None) -> int:
    """Sum the storages reachable from `root` by attributes, slots and containers, without those of `leaving_out`.

    A tensor subclass (as quanto's) is taken apart into the tensors that it is made of. A view counts as the whole
    storage that it keeps alive.
    """
    visited: dict[int, object] = {}  # holds what it has seen, so that no id is used twice
    if leaving_out is not None:
        for part in leaving_out.modules():
            visited[id(part)] = part
    storages = {_place(tensor): tensor.untyped_storage().nbytes() for tensor in _tensors(root, visited)}
    of_model = set() if leaving_out is None else {_place(t) for t in _tensors(list(_state(leaving_out)), {})}
    return sum(size for place, size in storages.items() if place not in of_model)


def reachable_tensors(root: object) -> Iterator[Tensor]:
    """Yield every plain tensor reachable from `root`, each once."""
    return _tensors(root, {})


def _state(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _tensors(root: object, visited: dict[int, object]) -> Iterator[Tensor]:
    """Yield every plain tensor reachable from `root`, in no particular order; without recursion, however deep it is."""
    ahead = [root]
    while ahead:
        part = ahead.pop()
        if id(part) in visited or isinstance(part, type):
            continue
        visited[id(part)] = part
        if isinstance(part, Tensor):
            inner = _inner(part)
            if not inner:
                yield part
            ahead += inner
        else:
            ahead += _parts(part)


def _inner(tensor: Tensor) -> list[Any]:
    """Return the tensors that a wrapper subclass is made of; none of a plain tensor."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return []
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def _parts(part: object) -> list[Any]:
    """Return what an object refers to: items of Python's own containers, and attributes and slots of any object.

    Other collections are not iterated: an array of numbers would become an object for each.
    """
    if isinstance(part, ModuleType):
        return []
    found: list[Any] = []
    if isinstance(part, Mapping):
        found += [*part.keys(), *part.values()]
    elif isinstance(part, (list, tuple, set, frozenset, deque)):
        found += list(part)
    found += vars(part).values() if hasattr(part, "__dict__") else []
    slots = (name for kind in type(part).__mro__ for name in getattr(kind, "__slots__", ()))
    return found + [getattr(part, name) for name in slots if hasattr(part, name)]


def _place(tensor: Tensor) -> tuple[str, int]:
    storage = tensor.untyped_storage()
    return str(tensor.device), storage.data_ptr() or id(storage)
