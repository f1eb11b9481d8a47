"""One decode step on the CPU: the kernels of an earlier step recorded, which the next ones run without Python around.

Around a kernel inductor looks up its inputs, unpacks their sizes and allocates each intermediate anew: 125 us for two
layers on a core of Zen 3, and SmolLM2-135M has 30. Recorded, a kernel is called again
with the very tensors it was given, whose contents are new, as a CUDA graph does on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor.output_code import CompiledFxGraph
from torch.utils._python_dispatch import _get_current_dispatch_mode

from kvcache.compiled.cache import Slot
from kvcache.compiled.decoder import Decoder, Rotary
from kvcache.compiled.step import Backend, Step

Recorded = list[functools.partial[None]]
"""Kernels with their arguments, in the order in which they were called."""

KERNELS = "cpp_"
"""How the names of inductor's C++ kernels begin in the module that it writes."""
LIBRARY = "extern_kernels"
"""How that module calls the library whose products it leaves as they are; they are given the tensor to write to."""


class ReplayStep(Step):
    """Replays the kernels of an earlier step until another chunk is in use, which takes a new recording."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._replayable_for: Hashable = None
        self.is_replayable = False
        """Whether recorded kernels are the whole step."""

    @torch.inference_mode()
    def prepare(
        self,
        model: Decoder,
        slots: Sequence[Slot],
        positions: Tensor,
        rotaries: tuple[Rotary, ...],
        length: int,
    ) -> None:
        super().prepare(model, slots, positions, rotaries, length)
        self._recorded: Recorded = []
        if self._replayable_for != self._key():
            self._replayable_for = self._key()
            self.is_replayable = self._replays()

    def release(self) -> None:
        super().release()
        for name in ("_recorded", "_x", "_logits"):
            vars(self).pop(name, None)

    @torch.inference_mode()
    def __call__(self, ids: Tensor, length: int) -> Tensor:
        # A mode that counts operations sees none of a replayed step.
        if not self.is_replayable or _get_current_dispatch_mode() is not None:
            return super().__call__(ids, length)
        self.ids.copy_(ids)
        self.at.fill_(length)
        in_use = self.in_use(length)
        if self._recorded and len(in_use) == self._recorded_chunks:
            self._replay()
        else:
            self._record(in_use)
        return self._logits.clone()

    def _record(self, in_use: Tensor) -> None:
        """Take the step of `ids` at `at`, and keep its kernels: they serve as long as `in_use` is as large."""
        self._recorded = []  # its intermediates are freed before there are others
        self._x, self._recorded_chunks = self.model.embed(self.ids, self.at), len(in_use)
        with recording() as recorded:
            self._logits = self.run_embedded(self._x, self.at, in_use)
        self._recorded = recorded

    def _replay(self) -> None:
        """Take the step of `ids` at `at` by the recorded kernels."""
        self._x.copy_(self.model.embed(self.ids, self.at))
        for kernel in self._recorded:
            kernel()

    def _replays(self) -> bool:
        """Return whether recorded kernels give the logits of a step as it stands, for another token elsewhere.

        They would not where a step did something between them that `recording` does not see; and where torch runs
        compiled code in another way than it knows, there are none.
        """
        in_use = self._in_use_at_first()
        try:
            self._record(in_use)
        except AttributeError:
            return False
        self.ids.fill_(1)
        self.at.copy_((self.at - 1).abs())
        self._replay()
        replayed = self._logits.clone()
        return torch.equal(replayed, self.run(self.ids, self.at, in_use))


@contextmanager
def recording() -> Iterator[Recorded]:
    """Record the kernels that compiled code calls within: inductor's own, and the library's products between them.

    Calls of one compiled function share their intermediates: those of the first one serve all. What a call returns is
    its own, since the next one reads it.

    Raises:
        AttributeError: this version of torch runs compiled code in another way.
    """
    recorded: Recorded = []
    intermediates: dict[tuple[int, int, int | str], Any] = {}
    run = CompiledFxGraph.__call__

    def run_noted(self: CompiledFxGraph, inputs: Sequence[Any]) -> Any:
        scope: dict[str, Any] = self.current_callable.__func__.__globals__  # type: ignore[union-attr]
        outside = _storages(inputs)
        calls: Recorded = []
        with mock.patch.dict(scope, _noted_names(scope, calls)):
            results = run(self, inputs)
        outside |= _storages(results)
        for i, call in enumerate(calls):

            def kept(place: int | str, argument: Any, i: int = i) -> Any:
                own = _storages([argument]) - outside
                return intermediates.setdefault((id(self), i, place), argument) if own else argument

            arguments = [kept(place, argument) for place, argument in enumerate(call.args)]
            named = {name: kept(name, argument) for name, argument in call.keywords.items()}
            recorded.append(functools.partial(call.func, *arguments, **named))
        return results

    with mock.patch.object(CompiledFxGraph, "__call__", run_noted):
        yield recorded


def _noted_names(scope: Mapping[str, Any], calls: Recorded) -> dict[str, Any]:
    """Return stand-ins for the kernels and the library in a module's `scope`, which note what they call."""

    def noted(kernel: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any, **named: Any) -> None:
            calls.append(functools.partial(kernel, *arguments, **named))
            calls[-1]()

        return call

    library = scope[LIBRARY]
    products = {name: noted(product) for name, product in vars(library).items() if callable(product)}
    kernels = {name: noted(kernel) for name, kernel in scope.items() if name.startswith(KERNELS) and callable(kernel)}
    return kernels | {LIBRARY: SimpleNamespace(**products)}


def _storages(values: Iterable[Any]) -> set[int]:
    """Return where the memory of those values is that are tensors."""
    return {value.untyped_storage().data_ptr() for value in values if isinstance(value, Tensor)}
