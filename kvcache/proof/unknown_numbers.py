"""What becomes of a rehearsal whose model asks for numbers: tensors of the meta device have none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvcache.caches.contract import UnfitCache, Unsupported
from kvcache.models import ModelError
from kvcache.models.skeleton import one_line

_Found = TypeVar("_Found")


class NotRehearsable(Exception):
    """The model or the cache asks for numbers, or refuses; the message is the reason, in one line."""


def alike_for_any_numbers(rehearse: Callable[[], _Found], what: str = "cache") -> _Found:
    """Return what `rehearse` finds; where it asks for numbers, it must find the same for two very different answers.

    Indexers ask which tokens are visible, experts which of them are chosen: neither changes what a cache keeps. `what`
    is found, for the message.

    Raises:
        NotRehearsable: it finds something else, or fails, as soon as the numbers are others.
    """
    found = for_any_numbers(rehearse, what)
    if any(other != found[0] for other in found):
        raise NotRehearsable(_depends(what))
    return found[0]


def for_any_numbers(rehearse: Callable[[], _Found], what: str) -> list[_Found]:
    """Return what `rehearse` finds, once; where it asks for numbers, twice, for two very different answers.

    Raises:
        NotRehearsable: it fails as soon as the numbers are others; `what` depends on them.
    """
    with _Numbers(0) as numbers:
        found = rehearse()
    if not numbers.asked:
        return [found]
    with _Numbers(1):
        try:
            return [found, rehearse()]
        except Exception as error:
            raise NotRehearsable(_depends(what)) from error


def _depends(what: str) -> str:
    return f"its {what} depends on numbers that a rehearsal does not have"


_MOST_ASKED = 100_000


class _Numbers(TorchDispatchMode):
    """Answers whoever asks for numbers of the meta device or of fake tensors: each is 0, or each is 1.

    Of the places that are not 0 it names the first alone, or all of them. Where rows are split by such answers (each
    expert its own), the first part is given what they leave.
    """

    def __init__(self, number: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._number = number
        self.asked = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` or answer; a composite is taken apart, since inference mode hands it over whole."""
        if func.namespace == "prim":  # asks for a device
            return func(*args, **(kwargs or {}))
        if func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
            with self:
                return func._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **(kwargs or {}))  # noqa: SLF001
        if func is _SPLIT and self.asked:
            rows = args[0].shape[args[2] if len(args) > 2 else 0]  # the axis
            return func(args[0], _parts_of(rows, args[1]), *args[2:])
        as_list = func is _COPY and args[0].is_meta and (kwargs or {}).get("device") == torch.device("cpu")
        if not as_list and (func not in (_ITEM, _NONZERO) or not _lacks_numbers(args[0])):
            return func(*args, **(kwargs or {}))
        self.asked += args[0].numel() if as_list else 1
        if self.asked > _MOST_ASKED:
            raise NotRehearsable("its forward goes on until a number is another, which no rehearsal gives it")
        if as_list:
            return torch.full(args[0].shape, self._number, dtype=args[0].dtype)
        if func is _ITEM:
            kind = bool if args[0].dtype == torch.bool else float if args[0].is_floating_point() else int
            return kind(self._number)
        places = args[0].numel() if self._number else min(1, args[0].numel())
        return args[0].new_empty((places, args[0].dim()), dtype=torch.long)


_ITEM, _NONZERO = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default  # noqa: SLF001
_COPY, _SPLIT = torch.ops.aten._to_copy.default, torch.ops.aten.split_with_sizes.default  # noqa: SLF001


def _lacks_numbers(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _parts_of(rows: int, sizes: Sequence[int]) -> list[int]:
    """Return sizes that add up to `rows`: what the others leave goes to the first."""
    parts, left = [], rows
    for size in reversed(sizes[1:]):
        parts.append(min(size, left))
        left -= parts[-1]
    return [left, *reversed(parts)]


@contextmanager
def naming_the_reason() -> Iterator[None]:
    """Raise NotRehearsable, with the reason, for whatever fails."""
    try:
        yield
    except NotRehearsable:
        raise
    except Exception as error:
        if any(word in str(error) for word in _ON_META):
            raise NotRehearsable(
                "its forward reads the values of tensors, which a rehearsal without weights does not have"
            ) from error
        if isinstance(error, Unsupported | UnfitCache | ModelError):
            raise NotRehearsable(str(error)) from error
        raise NotRehearsable(f"its forward fails without weights ({one_line(error)})") from error


_ON_META = ("meta tensor", "register_meta")
"""Words of torch's errors where a tensor of the meta device is asked for a number."""
