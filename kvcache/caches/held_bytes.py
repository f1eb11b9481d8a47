"""The bytes that an object really holds: every storage that can be reached from it, each counted once.

It counts what is there, not what a cache reports of itself: scales, zero points, codebooks, residual windows, padding,
and copies kept beside. It cannot see globals, what a class or a library keeps, threads' variables or files.
Memory is a range of addresses on a device; ranges that overlap count once.
"""

import io
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import CellType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class Range(NamedTuple):
    """Memory that is held."""

    memory: str
    """A device; or an object, where its address is not known."""
    start: int
    size: int


def held_bytes(root: object, *, leaving_out: nn.Module | None = None) -> int:
    """Sum the storages reachable from `root` by attributes, slots, containers and closures, without `leaving_out`'s.

    A tensor subclass (as quanto's) and a sparse tensor are taken apart into the tensors that they are made of. A view
    counts as the whole storage that it keeps alive; memory of numpy or Python (bytes, arrays, maps of files) that a
    tensor shares counts once.

    Raises:
        TypeError: a tensor subclass has no storage of its own, and no attribute is a tensor that it is made of.
    """
    visited: dict[int, object] = {}  # holds what it has seen, so that no id is used twice
    if leaving_out is not None:
        for part in leaving_out.modules():
            visited[id(part)] = part
    held = [*map(_storage, _tensors(root, visited)), *_buffers(visited.values())]
    of_model = [] if leaving_out is None else [*map(_storage, _tensors(list(_state(leaving_out)), {}))]
    return _covered([*held, *of_model]) - _covered(of_model)


def _covered(ranges: Iterable[Range]) -> int:
    """Sum the bytes that lie in any of the ranges."""
    total, memory, end = 0, "", 0
    for each in sorted(ranges):
        if each.memory != memory:
            memory, end = each.memory, 0
        total += max(0, each.start + each.size - max(each.start, end))
        end = max(end, each.start + each.size)
    return total


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
        ahead += _parts(part)
        if isinstance(part, Tensor):
            inner = _inner(part)
            if inner is None:
                yield part
            ahead += inner or _beside(part)


def _inner(tensor: Tensor) -> list[Any] | None:
    """Return the tensors that a wrapper subclass or a sparse tensor is made of; None of one with memory of its own."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [getattr(tensor, name) for name in names]
    if tensor.layout in _SPARSE:
        return [getattr(tensor, name)() for name in _SPARSE[tensor.layout]]
    if _has_storage(tensor):
        return None
    inner = [part for part in _attributes(tensor) if isinstance(part, Tensor)]
    if not inner:
        kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
        raise TypeError(f"the bytes of {kind} cannot be counted: it has no storage, and no attribute that is a tensor")
    return inner


def _has_storage(tensor: Tensor) -> bool:
    if type(tensor) in (Tensor, nn.Parameter) or tensor.device.type == "meta" or tensor.layout is not torch.strided:
        return True
    try:
        tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return False
    return True


def _beside(tensor: Tensor) -> list[Tensor]:
    """Return what a tensor quantised per channel has beside its codes."""
    if tensor.is_quantized and tensor.qscheme() in _PER_CHANNEL:
        return [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
    return []


_PER_CHANNEL = torch.per_channel_affine, torch.per_channel_affine_float_qparams, torch.per_channel_symmetric

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
            found += [part.__defaults__, part.__kwdefaults__]
        case MethodType():
            return [part.__self__, part.__func__]
        case partial():
            found += [part.func, *part.args, *part.keywords.values()]
        case Mapping():
            found += [*part.keys(), *part.values()]
        case list() | tuple() | set() | frozenset() | deque():
            found += list(part)
    return found + _attributes(part)


def _attributes(part: object) -> list[Any]:
    """Return the values of an object's attributes and slots."""
    found = list(vars(part).values()) if hasattr(part, "__dict__") else []
    with_slots = (kind for kind in type(part).__mro__ if "__slots__" in vars(kind))
    slots = (slot for kind in with_slots for slot in vars(kind).values() if isinstance(slot, MemberDescriptorType))
    for slot in slots:
        with suppress(AttributeError):  # it is empty
            found.append(slot.__get__(part))
    return found


def _is_filled(cell: CellType) -> bool:
    """Return whether the variable of a closure has a value: one that is assigned later has none yet."""
    try:
        cell.cell_contents  # noqa: B018  # looking is the test
    except ValueError:
        return False
    return True


def _storage(tensor: Tensor) -> Range:
    """Return where a plain tensor's memory is; a tensor on the meta device has none."""
    if tensor.device.type == "meta":
        return Range("meta", 0, 0)
    if tensor.layout is not torch.strided:  # oneDNN's own
        return Range(f"object {id(tensor)}", 0, tensor.numel() * tensor.element_size())
    return _of(tensor.untyped_storage())


def _of(storage: torch.UntypedStorage) -> Range:
    return Range(str(storage.device), storage.data_ptr(), storage.nbytes())


def _buffers(parts: Iterable[object]) -> Iterator[Range]:
    """Yield the same for memory of numpy and of Python; of one that is a view, its owner is among the parts."""
    for part in parts:
        match part:
            case np.ndarray():
                if part.base is None:
                    yield Range("cpu", part.__array_interface__["data"][0], part.nbytes)
            case Tensor() | np.generic() | memoryview():
                pass
            case torch.UntypedStorage():
                yield Range("meta", 0, 0) if part.device.type == "meta" else _of(part)
            case io.BytesIO():
                yield Range(f"object {id(part)}", 0, len(part.getbuffer()))
            case _:
                with suppress(TypeError, ValueError, BufferError):  # it is no buffer, or an empty or a closed one
                    seen = np.frombuffer(part, np.uint8)  # type: ignore[call-overload]  # of any object
                    yield Range("cpu", seen.__array_interface__["data"][0], seen.nbytes)
