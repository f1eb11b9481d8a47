"""The memory that a forward takes beyond weights and cache, counted without either: by its own code on fake tensors.

torch's fake tensors have shapes, types and a device, and no memory. On them a model makes and frees the very tensors
that it makes and frees on that device, masks and experts among them, so that no architecture needs a formula.
"""

import copy
import gc
import warnings
import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any
from unittest import mock

import torch
from torch import Tensor, UntypedStorage, nn
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from kvcache.proof.rehearsal import Rehearsal, storage_bytes, without_padding
from kvcache.proof.unknown_numbers import for_any_numbers, naming_the_reason
from kvcache.strategies.strategy import last_logits


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations made, for as long as anything refers to them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = self.operations = 0
        self._live: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` and count what it made; a composite is taken apart, since inference mode hands it over whole."""
        if func.namespace == "prim":  # asks for a device, and makes no tensor
            return func(*args, **(kwargs or {}))
        if func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
            with self:
                return func._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **(kwargs or {}))  # noqa: SLF001
        self.operations += 1
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}  # noqa: SLF001  # its identity
        for storage in _storages(result):
            key, size = storage._cdata, storage.nbytes()  # noqa: SLF001
            if key not in self._live and key not in given:
                self._live.add(key)
                self.now += size
                weakref.finalize(storage, self._free, key, size)
        self.most = max(self.most, self.now)
        return result

    def _free(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size


@dataclass(frozen=True, kw_only=True)
class _Counted:
    bytes: int
    operations: int


MOST_OPERATIONS = 20_000
"""Of a forward that is counted as it is, which takes about two seconds."""

_SHORT = (64, 128, 256)
"""Lengths in tokens, multiples of the pieces that recurrent layers work in."""


class Workspace(Rehearsal):
    """Counts the memory of forwards on the CPU; the length of what is fed costs next to no time."""

    experts = "grouped_mm"  # as loaded: `batched_mm` copies the experts of every token

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        """Take `model`, which lies on the meta device, for its own.

        Raises:
            NotRehearsable: it cannot be copied without its numbers.
        """
        super().__init__(model, dtype)
        _keep_two_layers(self._model)
        self._mode = FakeTensorMode()
        plain = [value for part in model.modules() for value in vars(part).values() if isinstance(value, Tensor)]
        with naming_the_reason(), self._mode:
            faked: dict[int, Any] = {
                id(tensor): torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                for tensor in (*model.parameters(), *model.buffers(), *plain)
            }
            faked |= {id(weight): nn.Parameter(faked[id(weight)], requires_grad=False) for weight in model.parameters()}
            self._model = copy.deepcopy(self._model, faked)
        self._counted: dict[tuple[str | None, int, int], _Counted] = {}

    def forward_bytes(self, strategy: str | None, batch_size: int, n_tokens: int) -> int:
        """Return the most bytes that a forward of `n_tokens` holds at once, less what `strategy` has stored at its end.

        None is a forward without a cache. Recurrent layers that loop over tokens in Python are counted at three short
        lengths, and read off the parabola through them.

        Raises:
            NotRehearsable: the model asks for numbers, or the strategy refuses it.
        """

        def counted(length: int) -> _Counted:
            key = strategy, batch_size, length
            if key not in self._counted:
                self._counted[key] = self._count(*key)
            return self._counted[key]

        short, middle, long = _SHORT
        if n_tokens > long:
            per_token = (counted(long).operations - counted(short).operations) / (long - short)
            if counted(long).operations + per_token * (n_tokens - long) > MOST_OPERATIONS:
                points = [(length, counted(length).bytes) for length in (short, middle, long)]
                return _parabola(points, n_tokens)
        return counted(n_tokens).bytes

    def _count(self, strategy: str | None, batch_size: int, n_tokens: int) -> _Counted:
        def rehearse() -> _Counted:
            with LiveBytes() as live:
                kept = 0
                if strategy is None:
                    last_logits(self._model, self._ids(batch_size, n_tokens))
                else:
                    filled = self._fed(strategy, batch_size, n_tokens, n_tokens)
                    kept = storage_bytes(filled.stored)
                if live.now > kept:  # what refers to itself; to collect it takes longer than a forward
                    gc.collect()
                return _Counted(bytes=live.most - live.now, operations=live.operations)

        with naming_the_reason(), self._mode, _without_values(), torch.inference_mode():
            # Experts that are asked for one by one get a token or all of them: the most is from above.
            found = for_any_numbers(rehearse, "memory")
        return _Counted(bytes=max(each.bytes for each in found), operations=max(each.operations for each in found))


def _keep_two_layers(model: PreTrainedModel) -> None:
    """Drop the layers beyond the second where all are alike: a layer's tensors are gone when the next one begins."""
    config = model.config.get_text_config(decoder=True)
    count, types = getattr(config, "num_hidden_layers", 0), vars(config).get("layer_types")
    if getattr(config, "is_heterogeneous", False):
        return
    of_layers = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    if len(of_layers) != 1 or len(set(types or ())) > 1 or len(set(map(_built, of_layers[0]))) != 1:
        return
    del of_layers[0][2:]
    config.num_hidden_layers = len(of_layers[0])
    if types:
        config.layer_types = types[:2]


def _built(layer: nn.Module) -> Hashable:
    """Return what a layer is made of: its modules' classes, and the shapes of its parameters."""
    modules = [(name, type(part).__name__) for name, part in layer.named_modules()]
    return (*modules, *((name, tuple(weight.shape)) for name, weight in layer.named_parameters()))


def _parabola(points: list[tuple[int, int]], at: int) -> int:
    """Extend the parabola through three `points`, or the line through the last two where that is higher."""
    (a, of_a), (b, of_b), (c, of_c) = points
    before, slope = (of_b - of_a) / (b - a), (of_c - of_b) / (c - b)
    curve = max(0.0, (slope - before) / (c - a))
    return ceil(of_c + slope * (at - c) + curve * (at - c) * (at - b))


@contextmanager
def _without_values() -> Iterator[None]:
    """Leave out what asks for padding, and torch's product of experts, whose fake form takes bfloat16 alone.

    transformers' own product of experts makes the same tensors. A fake tensor's address is looked at, which torch warns
    of: a rehearsal's is 0.
    """
    grouped_mm = mock.patch("transformers.integrations.moe._can_use_grouped_mm", return_value=False)
    # Masks are looked at as those of real tensors are: most are left out then.
    real = mock.patch("transformers.masking_utils.is_tracing", return_value=False)
    with without_padding(), real, grouped_mm, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _storages(values: Any) -> Iterator[UntypedStorage]:
    return (value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor))
