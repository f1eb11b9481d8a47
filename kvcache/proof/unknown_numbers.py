"""What becomes of a rehearsal whose model asks for numbers: tensors of the meta device have none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode

from kvcache.caches.contract import UnfitCache, Unsupported
from kvcache.models import ModelError
from kvcache.models.skeleton import one_line

_Found = TypeVar("_Found")


class NotRehearsable(Exception):
    """The model or the cache asks for numbers, or refuses; the message is the reason, in one line."""


def alike_for_any_numbers(rehearse: Callable[[], _Found]) -> _Found:
    """Return what `rehearse` finds; where it asks for numbers, it must find the same for two very different answers.

    Indexers ask which tokens are visible, experts which of them are chosen: neither changes what a cache keeps.

    Raises:
        NotRehearsable: it finds something else, or fails, as soon as the numbers are others.
    """
    with _Numbers(0) as numbers:
        found = rehearse()
    if not numbers.asked:
        return found
    with _Numbers(1):
        try:
            again = rehearse()
        except Exception as error:
            raise NotRehearsable(_DEPENDS) from error
    if again != found:
        raise NotRehearsable(_DEPENDS)
    return found


_DEPENDS = "its cache depends on numbers that a rehearsal does not have"
_MOST_ASKED = 100_000


class _Numbers(TorchDispatchMode):
    """Answers whoever asks for numbers of the meta device: each is 0, or each is 1.

    Of the places that are not 0 it names the first alone, or all of them.
    """

    def __init__(self, number: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._number = number
        self.asked = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` or answer; a composite is taken apart, since inference mode hands it over whole."""
        if func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
            with self:
                return func._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **(kwargs or {}))  # noqa: SLF001
        asks_for_one = func is torch.ops.aten._local_scalar_dense.default  # noqa: SLF001
        if not (asks_for_one or func is torch.ops.aten.nonzero.default) or not args[0].is_meta:
            return func(*args, **(kwargs or {}))
        self.asked += 1
        if self.asked > _MOST_ASKED:
            raise NotRehearsable("its forward goes on until a number is another, which no rehearsal gives it")
        if asks_for_one:
            return torch.full((), self._number, dtype=args[0].dtype).item()
        places = args[0].numel() if self._number else min(1, args[0].numel())
        return args[0].new_empty((places, args[0].dim()), dtype=torch.long)


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
