"""The fast path: a static cache, products that read weights at memory speed, one kernel for a layer's decode step."""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import PreTrainedModel

from kvcache.compiled.decoder import Activation, Layer, Rotary, decoder
from kvcache.compiled.kernels import CHUNK, FEW_ROWS, attend_to_chunks, block, head
from kvcache.strategies.strategy import Strategy, Unsupported

Backend = Literal["inductor", "eager"]

LAYERS_PER_CALL = 2
"""Layers compiled as one, where the model's number of them is a multiple. A call costs 25 microseconds of Python, one
more layer five seconds of compiling."""

_CHUNKS_TO_COMPILE = 2
"""Chunks in use when a layer is compiled, and the fewest ever: the compiler takes a size of 1 as fixed, and sizes that
are equal as one and the same, which is why a cache has more chunks than that."""

_INDUCTOR_ON_CPU: dict[str, Any] = {
    # A normalised row is stored once, not computed anew for every row of the weight that it meets.
    "realize_reads_threshold": 1,
    # a * b + c in one instruction; it matters from four rows on, where arithmetic and not memory is the limit.
    "cpp.enable_floating_point_contract_flag": "fast",
    # Checks of shapes on every call, which `prepare` has fixed.
    "size_asserts": False,
    "alignment_asserts": False,
}
"""All of inductor's settings that differ from its defaults."""


class Compiled(Strategy):
    """Static cache, and a compiled pair of layers that runs as often as the model has pairs.

    Prefill's layers run uncompiled, for any length: products are oneDNN's, attention is torch's. Decode runs layers
    compiled by inductor, which makes of them a single C++ kernel that reads each weight once, from where transformers
    keeps it, and attends to the chunks in use, not to the whole capacity. Layers share the compiled code, so compiling
    takes as long as for one pair, and serves any capacity (on CUDA one); inductor keeps its results on disk. On CUDA
    the compiled layers of a step are recorded as one CUDA graph.

    The attention is its own: the model's `attn_implementation` plays no part.
    """

    name: ClassVar[str] = "compiled"

    def __init__(self, model: PreTrainedModel, *, backend: Backend = "inductor") -> None:
        """Take `model`, whose weights stay where they are (GPT-2's are laid out anew in place).

        `backend` is torch.compile's; "eager" checks the logic without a compiler, slowly.

        Raises:
            Unsupported: the architecture, the data type or the device is not one of those written down, or there is
                no C++ compiler.
        """
        super().__init__(model)
        self.decoder = decoder(model)
        self.backend = backend
        self._on_cuda = model.device.type == "cuda"
        if backend == "inductor" and not self._on_cuda:
            _require_compiler()
        self._compiled_for: tuple[int, int | None] | None = None
        self._compile_ns = 0

    def prepare(self, batch_size: int, capacity: int, context: Tensor | None = None) -> None:
        super().prepare(batch_size, capacity, context)
        model = self.decoder
        if model.positions is not None and capacity > len(model.positions):
            raise ValueError(f"the model has {len(model.positions)} positions, a capacity of {capacity} is more")
        chunks = max(_CHUNKS_TO_COMPILE + 1, -(-capacity // CHUNK))
        keys = (batch_size, model.kv_heads, chunks, model.head_dim, CHUNK)
        values = (batch_size, model.kv_heads, chunks, CHUNK, model.head_dim)
        # Zeroes come from the kernel untouched: memory is taken as tokens arrive.
        zeros = model.tokens.new_zeros
        self._slots = [_Slot(layer, zeros(keys), zeros(values)) for layer in model.layers]
        self._positions = torch.arange(chunks * CHUNK, device=model.tokens.device)
        self._rotary = model.rotary(self._positions)
        self.length = self.n_depth  # a row that the first step will write again
        self._compile()
        self.length = 0
        if context is not None:
            self.prefill(context)

    def reset(self) -> None:
        super().reset()
        self.length = self.n_depth

    @torch.inference_mode()
    def prefill(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None and not attention_mask.all():
            raise Unsupported("compiled takes prompts of equal length only: it has no left padding")
        if ids.shape[1] == 1:
            return self._decode(ids)
        self._refuse_more_than_capacity(ids.shape[1])
        model, start, end = self.decoder, self.length, self.length + ids.shape[1]
        rotary = None if self._rotary is None else (self._rotary[0][start:end], self._rotary[1][start:end])
        masks = {layer.window: self._mask(start, end, layer.window) for layer in model.layers}
        at = self._positions[start:end]
        x = model.embed(ids, at)
        rows = at // CHUNK, at % CHUNK
        for slot in self._slots:
            attend = functools.partial(_attend_to_prefix, slot, rows, start, masks[slot.layer.window])
            x = block(x, slot.layer, rotary, attend, model.activation)
        self.length = end
        last = x[:, -1:].contiguous()
        # Compiled it reads a weight at memory speed; for more rows it is the GEMM that oneDNN is better at.
        return (self._head if len(last) <= FEW_ROWS else head)(last, model.norm, model.head)

    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        return self._decode(ids)

    def _decode(self, ids: Tensor) -> Tensor:
        self._refuse_more_than_capacity(1)
        # A graph that is replayed shows none of its operations to a mode that counts them.
        if self._on_cuda and _get_current_dispatch_mode() is None:
            self._ids.copy_(ids)
            self._at.fill_(self.length)
            self._graph.replay()
            logits = self._logits.clone()
        else:
            logits = self._step(ids, self._positions[self.length : self.length + 1], self._in_use())
        self.length += 1
        return logits

    def _refuse_more_than_capacity(self, q: int) -> None:
        """The compiled code checks nothing: a row too far would be written somewhere else."""
        if self.length + q > self.capacity:
            raise ValueError(f"prepared for {self.capacity} tokens: {self.length} are held, {q} more do not fit")

    @property
    def kv_bytes(self) -> int:
        row = self._slots[0].values[:, :, 0, 0]
        return 2 * len(self._slots) * self.length * row.numel() * row.element_size()

    @property
    def compile_s(self) -> float:
        return self._compile_ns / 1e9

    @torch.inference_mode()
    def _compile(self) -> None:
        """Compile what the shapes now prepared need, by taking one step."""
        start = time.perf_counter_ns()
        self._at = self._positions[self.length : self.length + 1].clone()
        self._ids = torch.zeros_like(self._at).expand(self.batch_size, 1).contiguous()
        in_use = self._positions.view(-1, CHUNK)
        compiled_for = self.batch_size, len(in_use) if self._on_cuda else None
        if not self._on_cuda:
            in_use = in_use[:_CHUNKS_TO_COMPILE]
        if self._compiled_for != compiled_for:
            self._compiled_for = compiled_for
            self._of_kind = functools.cache(lambda _kind: self._compiled(_several))
            self._head = self._compiled(head)
            if not self._on_cuda:
                self._mark_what_varies(in_use)
        size = LAYERS_PER_CALL if len(self._slots) % LAYERS_PER_CALL == 0 else 1
        groups = [tuple(self._slots[first : first + size]) for first in range(0, len(self._slots), size)]
        self._calls = [(self._of_kind(_kind([slot.layer for slot in group])), group) for group in groups]
        self._step(self._ids, self._at, in_use)
        if self._on_cuda:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = self._step(self._ids, self._at, in_use)
        self._compile_ns += time.perf_counter_ns() - start

    def _mark_what_varies(self, in_use: Tensor) -> None:
        """Tell the compiler which sizes differ between steps and between capacities."""
        caches = [cache for slot in self._slots for cache in (slot.keys, slot.values)]
        by_axis = {0: [in_use, *(self._rotary or ())], 2: caches}
        for axis, tensors in by_axis.items():
            for tensor in tensors:
                torch._dynamo.mark_dynamic(tensor, axis)  # noqa: SLF001  # documented, if not by its name

    def _compiled(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`function` under torch.compile, without guards: `prepare` fixes the shapes and compiles anew for others.

        Looking guards up for 30 layers would take a millisecond.
        """
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        if self.backend == "inductor" and not self._on_cuda:
            options |= _INDUCTOR_ON_CPU
        settings: dict[str, Any] = {
            "backend": self.backend,
            "fullgraph": True,
            "dynamic": False,  # but for what is marked
            "isolate_recompiles": True,  # or the shapes of all instances together count against one limit
            "options": options,
        }
        compiled: Callable[..., Tensor] = torch.compile(function, **settings)
        return compiled

    def _step(self, ids: Tensor, at: Tensor, in_use: Tensor) -> Tensor:
        """Logits `[batch, vocab]` after `ids [batch, 1]` at position `at [1]`; `in_use [chunks, CHUNK]`: positions."""
        model = self.decoder
        x = model.embed(ids, at)
        for run, slots in self._calls:
            x = run(x, slots, at, in_use, self._rotary, model.activation)
        return self._head(x, model.norm, model.head)

    def _in_use(self) -> Tensor:
        """Positions of the chunks that hold a token. A CUDA graph has one shape: there it is the whole capacity."""
        chunks = self._positions.view(-1, CHUNK)
        return chunks if self._on_cuda else chunks[: max(_CHUNKS_TO_COMPILE, self.length // CHUNK + 1)]

    def _mask(self, start: int, end: int, window: int | None) -> Tensor | None:
        """Which of the positions up to `end` each one from `start` on sees, `[q, end]`; None: all up to itself."""
        if start == 0 and (window is None or end <= window):
            return None
        return _seen(self._positions[:end], self._positions[start:end, None], window)


class _Slot(NamedTuple):
    """A layer and its cache: keys `[batch, kv_heads, chunks, head_dim, CHUNK]`, values `[..., CHUNK, head_dim]`."""

    layer: Layer
    keys: Tensor
    values: Tensor


def _require_compiler() -> None:
    """Refuse where inductor could not compile on this CPU, before it tries.

    Raises:
        Unsupported: there is no C++ compiler where inductor looks for one, or no header of Python.
    """
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        raise Unsupported(f"compiled needs a C++ compiler: {compiler} is not on the PATH (CXX names another)")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        raise Unsupported(f"compiled needs Python's headers, as in the package python3-dev: there is no {header}")


def _several(
    x: Tensor, slots: tuple[_Slot, ...], at: Tensor, in_use: Tensor, rotary: Rotary | None, activation: Activation
) -> Tensor:
    """The step of some layers over `x [batch, 1, hidden]`; writes row `at [1]` of their caches."""
    here = None if rotary is None else (rotary[0][at], rotary[1][at])
    for slot in slots:
        x = block(x, slot.layer, here, functools.partial(_attend_to_cache, slot, at, in_use), activation)
    return x


def _attend_to_cache(slot: _Slot, at: Tensor, in_use: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Write `k` and `v` to the row `at [1]` and attend to the chunks `in_use [chunks, CHUNK]`."""
    _write(slot, (at // CHUNK, at % CHUNK), k, v)
    keys, values = (cache[:, :, : in_use.shape[0]] for cache in (slot.keys, slot.values))
    seen = _seen(in_use, at, slot.layer.window)
    if torch.compiler.is_compiling():
        return attend_to_chunks(q * slot.layer.scale, keys, values, seen)
    # Run eagerly (to count its operations, say) it is the product that it stands for.
    return functional.scaled_dot_product_attention(
        q,
        keys.transpose(-1, -2).flatten(2, 3),
        values.flatten(2, 3),
        seen.flatten()[None],
        scale=slot.layer.scale,
        enable_gqa=True,
    )


def _attend_to_prefix(
    slot: _Slot, rows: tuple[Tensor, Tensor], start: int, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Write `k` and `v` to `rows`, those from `start` on; attend to all rows so far, by torch's own kernel."""
    _write(slot, rows, k, v)
    if start:
        end = start + k.shape[2]
        k, v = (cache.flatten(2, 3)[:, :, :end] for cache in (slot.keys.transpose(-1, -2), slot.values))
    return functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=slot.layer.scale, enable_gqa=True
    )


def _write(slot: _Slot, rows: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> None:
    """Store `k` and `v [batch, kv_heads, q, head_dim]` in the cache; `rows`: chunk and place in it, `[q]` each."""
    chunk, place = rows
    slot.keys[:, :, chunk, :, place] = k.permute(2, 0, 1, 3)  # indices apart from each other come first
    slot.values[:, :, chunk, place] = v


def _seen(positions: Tensor, at: Tensor, window: int | None) -> Tensor:
    """Whether the query at `at` sees each of `positions`; the two broadcast."""
    seen = positions <= at
    return seen if window is None else seen & (positions > at - window)


def _kind(part: object) -> Hashable:
    """What layers are compiled for: everything but the values of their weights."""
    if isinstance(part, Tensor):
        return tuple(part.shape)
    return tuple(map(_kind, part)) if isinstance(part, (tuple, list)) else part
