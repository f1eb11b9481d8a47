"""One decode step over all layers, compiled by inductor: on the CPU it attends to the chunks in use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvcache.compiled.cache import Slot, attend_to_cache
from kvcache.compiled.compiler import headers_ahead, require_compiler
from kvcache.compiled.decoder import Decoder, Layer, Rotary
from kvcache.compiled.kernels import Activation, block, logits
from kvcache.compiled.rows import CHUNK

Backend = Literal["inductor", "eager"]

FEWEST_CHUNKS = 2
"""Chunks in use when a layer is compiled, and the fewest ever: the compiler takes a size of 1 as fixed, and sizes that
are equal as one and the same, which is why a cache has more chunks than that."""

EXPECTED_CHUNKS = 64
"""Chunks in use for which inductor decides what threads share: by the FEWEST that it sees, loops over all scores would
be too short for it to share, and with a long context one thread would run them."""

CPU_OPTIONS: dict[str, Any] = {
    # A row that two sums or more read is stored once, not computed anew for every row of the weight that it meets.
    "realize_reads_threshold": 1,
    # a * b + c in one instruction; it matters from four rows on, where arithmetic and not memory is the limit.
    "cpp.enable_floating_point_contract_flag": "fast",
    # Checks of shapes on every call, which `prepare` has fixed.
    "size_asserts": False,
    "alignment_asserts": False,
}
"""All of inductor's settings on the CPU that differ from its defaults."""


class Step:
    """Compiled layers, one at a time; those of one kind share the compiled code.

    Compiling takes as long as for one layer of each kind and serves any capacity; inductor keeps its results on disk.
    """

    options: ClassVar[dict[str, Any]] = CPU_OPTIONS

    def __init__(self, backend: Backend) -> None:
        """Compile nothing yet.

        Raises:
            Unsupported: there is nothing to compile with on this machine.
        """
        self.backend = backend
        if backend == "inductor":
            self._require_compiler()
        self._compiled_for: Hashable = None

    model: Decoder
    slots: Sequence[Slot]

    @torch.inference_mode()
    def prepare(
        self,
        model: Decoder,
        slots: Sequence[Slot],
        positions: Tensor,
        rotaries: tuple[Rotary, ...],
        length: int,
    ) -> None:
        """Compile what the shapes of `slots` need, by taking one step at position `length`, whose row is written again.

        `slots` are the layers of `model` with their caches, `positions [chunks * CHUNK]` those of the caches, and
        `rotaries` the model's tables of their cosines and sines.
        """
        self.release()
        self.model, self.slots, self.positions, self.rotaries = model, slots, positions, rotaries
        # 32 bits: a vector compares as many as it holds scores.
        self.chunks = positions.view(-1, CHUNK).int()
        self.at = positions[length : length + 1].clone()
        self.ids = positions.new_zeros((self.batch_size, 1))
        in_use = self._in_use_at_first()
        is_new = self._compiled_for != self._key()
        if is_new:
            self._compiled_for = self._key()
            made = functools.partial(compiled, backend=self.backend, options=self.options)
            self._of_kind = functools.cache(lambda _kind: made(_layer))
            self.logits = made(logits)
            self._mark_what_varies(in_use)
        self._calls = [(self._of_kind(_kind(slot.layer)), slot) for slot in slots]
        with self._ahead() if is_new else nullcontext():
            self.run(self.ids, self.at, in_use)
        if is_new:
            self._look_at_compiled(in_use)

    def release(self) -> None:
        """Let go of the slots; what is compiled stays."""
        self.slots, self._calls = (), []

    def __call__(self, ids: Tensor, length: int) -> Tensor:
        """Feed `ids [batch, 1]` at position `length`; return the logits that follow, `[batch, vocab]`."""
        return self.run(ids, self.positions[length : length + 1], self.in_use(length))

    def run(self, ids: Tensor, at: Tensor, in_use: Tensor) -> Tensor:
        """As a call, with the position as a tensor, `at [1]`; `in_use [chunks, CHUNK]`: positions to attend to."""
        return self.run_embedded(self.model.embed(ids, at), at, in_use)

    def run_embedded(self, x: Tensor, at: Tensor, in_use: Tensor) -> Tensor:
        """As `run`, from the embedded tokens `x [batch, 1, hidden]` on: all that is compiled."""
        model = self.model
        for layer, slot in self._calls:
            x = layer(x, slot, at, in_use, self.rotaries, model.activation)
        return self.logits(x, model.head)

    def in_use(self, length: int) -> Tensor:
        """Return the positions of the chunks that hold a token when `length` tokens are held: `[chunks, CHUNK]`."""
        return self.chunks[: max(FEWEST_CHUNKS, length // CHUNK + 1)]

    @property
    def batch_size(self) -> int:
        """Sequences that the slots hold."""
        return self.slots[0].rows.keys.shape[0]

    def _require_compiler(self) -> None:
        """Refuse where inductor could not compile on this CPU, before it tries."""
        require_compiler()

    def _ahead(self) -> AbstractContextManager[None]:
        """Return what goes on beside the step that compiles."""
        return headers_ahead(self.options) if self.backend == "inductor" else nullcontext()

    def _look_at_compiled(self, in_use: Tensor) -> None:
        """Find out what later steps may do with newly compiled code, which has taken a step over `in_use`."""

    def _key(self) -> Hashable:
        """Return what the compiled code is made for; another key compiles anew."""
        return self.batch_size

    def _in_use_at_first(self) -> Tensor:
        """Return the positions that the compiling step attends to: the fewest, whatever the capacity."""
        return self.chunks[:FEWEST_CHUNKS]

    def _mark_what_varies(self, in_use: Tensor) -> None:
        """Name to the compiler the sizes that differ between steps and between capacities."""
        caches = [tensor for slot in self.slots for tensor in slot.rows]
        # A cache has more chunks than are in use, or the compiler would take the two sizes for one and the same.
        for axis, expected, tensors in (
            (0, EXPECTED_CHUNKS, [in_use]),
            (0, 2 * EXPECTED_CHUNKS * CHUNK, [part for rotary in self.rotaries for part in rotary]),
            (2, 2 * EXPECTED_CHUNKS, caches),
        ):
            for tensor in tensors:  # SLF001: documented, if not by its name
                torch._dynamo.mark_dynamic(tensor, axis, hint_override=expected)  # noqa: SLF001


def compiled(
    function: Callable[..., Tensor], backend: Backend = "inductor", options: Mapping[str, Any] = CPU_OPTIONS
) -> Callable[..., Tensor]:
    """Put `function` under torch.compile without guards: whoever calls it with other shapes compiles anew.

    Looking guards up for 30 layers would take a millisecond.
    """
    settings: dict[str, Any] = {
        "backend": backend,
        "fullgraph": True,
        "dynamic": False,  # but for what is marked
        "isolate_recompiles": True,  # or the shapes of all instances together count against one limit
        "options": {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        | (dict(options) if backend == "inductor" else {}),
    }
    result: Callable[..., Tensor] = torch.compile(function, **settings)
    return result


def _layer(
    x: Tensor, slot: Slot, at: Tensor, in_use: Tensor, rotaries: tuple[Rotary, ...], activation: Activation
) -> Tensor:
    """Take a layer's step over `x [batch, 1, hidden]`; writes row `at [1]` of its cache."""
    here = tuple((cos[at], sin[at]) for cos, sin in rotaries)
    return block(x, slot.layer, here, functools.partial(attend_to_cache, slot, at, in_use), activation)


def _kind(part: Layer | object) -> Hashable:
    """Return what layers are compiled for: everything but the values of their weights."""
    if isinstance(part, Tensor):
        return tuple(part.shape)
    return tuple(map(_kind, part)) if isinstance(part, (tuple, list)) else part
