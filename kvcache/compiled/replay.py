"""One decode step on the CPU: the kernels of an earlier step recorded, which the next ones run without Python around.

Around a kernel inductor looks up its inputs, unpacks their sizes and allocates each intermediate anew: 125 us for a
call of two layers on a core of Zen 3, and SmolLM2-135M has 30. Recorded, a kernel is called again with the very tensors
it was given, whose contents are new, as a CUDA graph does on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from kvcache.compiled.step import Backend, Step

Recorded = list[functools.partial[Any]]
"""Kernels with their arguments, in the order in which they were called."""

Place = tuple[int, int, int | str]
"""A graph, the number of a call within it, and the argument: its place or its name."""

KERNELS = "cpp_"
"""How the names of inductor's C++ kernels begin in the module that it writes."""
LIBRARY = "extern_kernels"
"""How that module calls the library whose products it leaves as they are; they are given the tensor to write to."""
ALLOCATE = "empty_strided_cpu"
"""How that module makes an intermediate."""


class NotRecordable(Exception):
    """A step does something that a recording would leave out, or torch runs compiled code in another way."""


class ReplayStep(Step):
    """Replays the kernels of an earlier step until another chunk is in use, which takes a new recording."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.is_replayable = False
        """Whether recorded kernels are the whole step."""
        self._recorded: Recorded = []

    def release(self) -> None:
        super().release()
        self._forget()

    @torch.inference_mode()
    def __call__(self, ids: Tensor, length: int) -> Tensor:
        # A mode that counts operations sees none of a replayed step.
        if not self.is_replayable or ids.shape != self.ids.shape or _get_current_dispatch_mode() is not None:
            return super().__call__(ids, length)
        self.ids.copy_(ids)
        self.at.fill_(length)
        in_use = self.in_use(length)
        if self._recorded and len(in_use) == self._recorded_chunks:
            self._replay()
        else:
            self._record(in_use)
        return self._logits.clone(memory_format=torch.contiguous_format)

    def _forget(self) -> None:
        """Let go of the recorded kernels and of what they hold."""
        self._recorded = []
        for name in ("_x", "_logits"):
            vars(self).pop(name, None)

    def _record(self, in_use: Tensor) -> None:
        """Take the step of `self.ids` at `self.at`, and keep its kernels: they serve while `in_use` is as large.

        Raises:
            NotRecordable: the step is more than its kernels.
        """
        self._forget()  # its intermediates are freed before there are others
        self._x, self._recorded_chunks = self.model.embed(self.ids, self.at), len(in_use)
        with recording() as recorded:
            self._logits = self.run_embedded(self._x, self.at, in_use)
        self._recorded = recorded

    def _replay(self) -> None:
        """Take the step of `self.ids` at `self.at` by the recorded kernels."""
        self._x.copy_(self.model.embed(self.ids, self.at))
        for kernel in self._recorded:
            kernel()

    def _look_at_compiled(self, in_use: Tensor) -> None:
        self.is_replayable = False  # also where the look fails
        self.is_replayable = self._replays(in_use)
        self._forget()

    def _replays(self, in_use: Tensor) -> bool:
        """Return whether the kernels of the step at position 0 are the whole step, for other tokens at position 1.

        They are if they give the same logits and write the same rows as the step that is run as it stands.
        """
        written = [tensor[:, :, : len(in_use)] for slot in self.slots for tensor in slot.rows]
        self.at.fill_(0)
        try:
            self._record(in_use)
        except NotRecordable:
            return False
        self.at.fill_(1)
        self.ids.copy_(torch.arange(1, len(self.ids) + 1).remainder(len(self.model.tokens))[:, None])
        self._replay()
        replayed = [self._logits.clone(), *(tensor.clone() for tensor in written)]
        as_it_stands = [self.run(self.ids, self.at, in_use), *written]
        return all(torch.equal(*pair) for pair in zip(replayed, as_it_stands, strict=True))


@contextmanager
def recording() -> Iterator[Recorded]:
    """Record the kernels that compiled code calls within: inductor's own, and the library's products between them.

    Calls of one compiled function share their intermediates: those of the first one serve all. Each call keeps its own
    result, because the next layer reads it. What other threads call is left out.

    Raises:
        NotRecordable: within, where compiled code calls something else between its kernels; or this version of torch
            runs compiled code in another way.
    """
    try:
        from torch._inductor.output_code import CompiledFxGraph

        run = CompiledFxGraph.__call__
    except (ImportError, AttributeError) as error:
        raise NotRecordable(str(error)) from error
    recorded: Recorded = []
    intermediates: dict[Place, Any] = {}
    thread = get_ident()

    def run_noted(self: Any, inputs: Sequence[Any]) -> Any:
        if get_ident() != thread:
            return run(self, inputs)
        outside = _storages(inputs)  # before the call, which empties the list
        calls: Recorded = []
        own: set[int] = set()
        scope = _scope(self)
        noting = _noted_names(scope, calls, own)
        replaced = {name: scope[name] for name in noting}
        scope.update(noting)
        try:
            results = run(self, inputs)
        finally:
            scope.update(replaced)
        known, shared = outside | own | _storages(scope.values()), own - outside - _storages(results)
        recorded.extend(_kept(calls, id(self), known, shared, intermediates))
        return results

    CompiledFxGraph.__call__ = run_noted  # type: ignore[method-assign]  # put back below
    try:
        yield recorded
    finally:
        CompiledFxGraph.__call__ = run  # type: ignore[method-assign]  # as it was


def _kept(calls: Recorded, graph: int, known: set[int], shared: set[int], intermediates: dict[Place, Any]) -> Recorded:
    """Return the calls of one run of a graph as they are replayed: with the `shared` memory of the graph's first run.

    Raises:
        NotRecordable: one is given memory that is not `known`.
    """

    def kept(place: Place, argument: Any) -> Any:
        where = _storages([argument])
        if where - known:
            raise NotRecordable("a kernel reads what was made between kernels")
        return intermediates.setdefault(place, argument) if where & shared else argument

    return [
        functools.partial(
            call.func,
            *(kept((graph, number, place), argument) for place, argument in enumerate(call.args)),
            **{name: kept((graph, number, name), argument) for name, argument in call.keywords.items()},
        )
        for number, call in enumerate(calls)
    ]


def _scope(graph: Any) -> dict[str, Any]:
    """Return the names of the module that inductor wrote for a compiled graph.

    Raises:
        NotRecordable: there is no such module, or it calls its kernels in another way.
    """
    try:
        scope: dict[str, Any] = graph.current_callable.__func__.__globals__
    except AttributeError as error:
        raise NotRecordable(str(error)) from error
    if not {LIBRARY, ALLOCATE} <= scope.keys():
        raise NotRecordable(f"the module of a compiled graph has no {LIBRARY} or no {ALLOCATE}")
    return scope


def _noted_names(scope: Mapping[str, Any], calls: Recorded, own: set[int]) -> dict[str, Any]:
    """Return stand-ins for what a module's `scope` calls: they note the calls, and where intermediates are made."""

    def noted(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls.append(functools.partial(kernel, *arguments, **named))
            return calls[-1]()

        return call

    def allocate(*arguments: Any, **named: Any) -> Any:
        made = scope_allocate(*arguments, **named)
        own.update(_storages([made]))
        return made

    scope_allocate, library = scope[ALLOCATE], scope[LIBRARY]
    products = {name: noted(product) for name, product in vars(library).items() if callable(product)}
    kernels = {name: noted(kernel) for name, kernel in scope.items() if name.startswith(KERNELS) and callable(kernel)}
    return kernels | {LIBRARY: SimpleNamespace(**products), ALLOCATE: allocate}


def _storages(values: Iterable[Any]) -> set[int]:
    """Return where the memory of those values is that are tensors."""
    return {value.untyped_storage().data_ptr() for value in values if isinstance(value, Tensor)}
