"""The bytes that an object really holds: every storage that can be reached from it, each counted once.

It counts what is there, not what a cache reports of itself: scales, zero points, codebooks, residual windows, padding,
and copies kept beside. It cannot see globals, what a class or a library keeps, threads' variables or files.
"""

import io
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def held_bytes(root: object, *, leaving_out: nn.Module | None = None) -> int:
    """Sum the storages reachable from `root` by attributes, slots, containers and closures, without `leaving_out`'s.

    A tensor subclass (as quanto's) and a sparse tensor are taken apart into the tensors that they are made of. A view
    counts as the whole storage that it keeps alive; memory of numpy or Python (bytes, arrays, maps of files) that a
    tensor shares counts once.
    """
    visited: dict[int, object] = {}  # holds what it has seen, so that no id is used twice
    if leaving_out is not None:
        for part in leaving_out.modules():
            visited[id(part)] = part
    storages = dict(map(_storage, _tensors(root, visited))) | dict(_buffers(visited.values()))
    of_model = set() if leaving_out is None else {_storage(t)[0] for t in _tensors(list(_state(leaving_out)), {})}
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
    """Return the tensors that a wrapper subclass or a sparse tensor is made of; none of a plain tensor."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [getattr(tensor, name) for name in names]
    return [getattr(tensor, name)() for name in _SPARSE.get(tensor.layout, ())]


_ROWS, _COLUMNS = ("crow_indices", "col_indices", "values"), ("ccol_indices", "row_indices", "values")
_SPARSE: dict[torch.layout, tuple[str, ...]] = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: _ROWS,
    torch.sparse_bsr: _ROWS,
    torch.sparse_csc: _COLUMNS,
    torch.sparse_bsc: _COLUMNS,
}
"""What a sparse tensor, which has no storage of its own, is made of."""


def _parts(part: object) -> list[Any]:
    """Return what an object refers to: items of Python's own containers, and attributes and slots of any object.

    Other collections are not iterated: an array of numbers would become an object for each.
    """
    found: list[Any] = []
    match part:
        case ModuleType():
            return []
        case np.ndarray():
            found += [] if part.base is None else [part.base]
            return [*found, *(part.flat if part.dtype.hasobject else ())]
        case memoryview():
            return [part.obj]
        case FunctionType():
            found += [cell.cell_contents for cell in part.__closure__ or () if _is_filled(cell)]
        case MethodType():
            return [part.__self__, part.__func__]
        case partial():
            found += [part.func, *part.args, *part.keywords.values()]
        case Mapping():
            found += [*part.keys(), *part.values()]
        case list() | tuple() | set() | frozenset() | deque():
            found += list(part)
    found += vars(part).values() if hasattr(part, "__dict__") else []
    slots = (name for kind in type(part).__mro__ for name in getattr(kind, "__slots__", ()))
    return found + [getattr(part, name) for name in slots if hasattr(part, name)]


def _is_filled(cell: CellType) -> bool:
    """Return whether the variable of a closure has a value: one that is assigned later has none yet."""
    try:
        cell.cell_contents  # noqa: B018  # looking is the test
    except ValueError:
        return False
    return True


def _storage(tensor: Tensor) -> tuple[tuple[str, int], int]:
    """Return where a plain tensor's memory is, and its bytes; a tensor on the meta device has none."""
    if tensor.device.type == "meta":
        return ("meta", 0), 0
    if tensor.layout is not torch.strided:  # oneDNN's own
        return (str(tensor.device), id(tensor)), tensor.numel() * tensor.element_size()
    storage = tensor.untyped_storage()
    return (str(tensor.device), storage.data_ptr() or id(storage)), storage.nbytes()


def _buffers(parts: Iterable[object]) -> Iterator[tuple[tuple[str, int], int]]:
    """Yield the same for memory of numpy and of Python; of one that is a view, its owner is among the parts."""
    for part in parts:
        match part:
            case np.ndarray():
                if part.base is None:
                    yield ("cpu", part.__array_interface__["data"][0]), part.nbytes
            case Tensor() | np.generic() | memoryview():
                pass
            case io.BytesIO():
                yield ("python", id(part)), len(part.getbuffer())
            case _:
                with suppress(TypeError, ValueError, BufferError):  # it is no buffer, or an empty or a closed one
                    seen = np.frombuffer(part, np.uint8)  # type: ignore[call-overload]  # of any object
                    yield ("cpu", seen.__array_interface__["data"][0]), seen.nbytes
