"""The fast path: a static cache, products that read weights at memory speed, one kernel for a layer's decode step."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from kvcache.decoder import Activation, Layer, Rotary, decoder
from kvcache.kernels import CHUNK, attend_to_chunks, block, head
from kvcache.strategy import Strategy, Unsupported

Backend = Literal["inductor", "eager"]

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
    """Static cache, and one compiled layer that runs as often as the model has layers.

    Prefill runs uncompiled, for any length: its products are oneDNN's, its attention is torch's. Decode runs a layer
    compiled by inductor, which makes of it a single C++ kernel that reads each weight once, from where transformers
    keeps it, and attends to the chunks in use, not to the whole capacity. Layers share the compiled code, so compiling
    takes as long as for one, and serves any capacity; inductor keeps its results on disk. On CUDA the compiled layers
    of a step are recorded as one CUDA graph.

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
        if backend == "inductor" and not self._on_cuda and not any(map(shutil.which, ("g++", "c++", "clang++"))):
            raise Unsupported("compiled needs a C++ compiler, and none (g++, c++, clang++) is on the PATH")
        self._compiled_for: int | None = None
        self._compile_ns = 0

    def prepare(self, batch_size: int, capacity: int, context: Tensor | None = None) -> None:
        super().prepare(batch_size, capacity, context)
        model = self.decoder
        if model.positions is not None and capacity > len(model.positions):
            raise ValueError(f"the model has {len(model.positions)} positions, a capacity of {capacity} is more")
        chunks = max(_CHUNKS_TO_COMPILE + 1, -(-capacity // CHUNK))
        shape = (batch_size, model.kv_heads, chunks)
        # Zeroes come from the kernel untouched: memory is taken as tokens arrive.
        self._keys = [model.tokens.new_zeros(*shape, model.head_dim, CHUNK) for _ in model.layers]
        self._values = [model.tokens.new_zeros(*shape, CHUNK, model.head_dim) for _ in model.layers]
        self._positions = torch.arange(chunks * CHUNK, device=model.tokens.device)
        self._rotary = model.rotary(self._positions)
        self.length = 0
        if context is not None:
            self.prefill(context)
        self.length = min(self.n_depth, capacity - 1)
        self._compile()
        self.reset()

    def reset(self) -> None:
        self.length = self.n_depth

    @torch.inference_mode()
    def prefill(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None and not attention_mask.all():
            raise Unsupported("compiled takes prompts of equal length only: it has no left padding")
        if ids.shape[1] == 1:
            return self.decode(ids)
        model, start, end = self.decoder, self.length, self.length + ids.shape[1]
        rotary = None if self._rotary is None else (self._rotary[0][start:end], self._rotary[1][start:end])
        masks = {layer.window: self._mask(start, end, layer.window) for layer in model.layers}
        at = self._positions[start:end]
        x = model.embed(ids, at)
        for layer, keys, values in zip(model.layers, self._keys, self._values, strict=True):
            attend = functools.partial(_attend_to_prefix, keys, values, at, start, masks[layer.window], layer.scale)
            x = block(x, layer, rotary, attend, model.activation)
        self.length = end
        return head(x, model.norm, model.head)

    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        if self._on_cuda:
            self._ids.copy_(ids)
            self._at.fill_(self.length)
            self._graph.replay()
            logits = self._logits.clone()
        else:
            logits = self._step(ids, self._positions[self.length : self.length + 1], self._in_use())
        self.length += 1
        return logits

    @property
    def kv_bytes(self) -> int:
        row = self._values[0][:, :, 0, 0]
        return 2 * len(self._keys) * self.length * row.numel() * row.element_size()

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
        if self._compiled_for != self.batch_size:
            self._compiled_for = self.batch_size
            make = functools.cache(lambda _kind: self._compiled(_layer))  # one for layers that differ in values alone
            self._layers = [make(_kind(layer)) for layer in self.decoder.layers]
            self._head = self._compiled(head)
            if not self._on_cuda:
                in_use = in_use[:_CHUNKS_TO_COMPILE]
                self._mark_what_varies(in_use)
        self._step(self._ids, self._at, in_use)
        if self._on_cuda:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = self._step(self._ids, self._at, in_use)
        self._compile_ns += time.perf_counter_ns() - start

    def _mark_what_varies(self, in_use: Tensor) -> None:
        """Tell the compiler which sizes differ between steps and between capacities."""
        by_axis = {0: [in_use, *(self._rotary or ())], 2: [*self._keys, *self._values]}
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
        for run, layer, keys, values in zip(self._layers, model.layers, self._keys, self._values, strict=True):
            x = run(x, layer, keys, values, at, in_use, self._rotary, model.activation)
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


def _layer(
    x: Tensor,
    layer: Layer,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
    in_use: Tensor,
    rotary: Rotary | None,
    activation: Activation,
) -> Tensor:
    """One layer's step over `x [batch, 1, hidden]`; writes row `at [1]` of its `keys` and `values`."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _write(keys, values, at, k, v)
        used = slice(in_use.shape[0])
        return attend_to_chunks(q * layer.scale, keys[:, :, used], values[:, :, used], _seen(in_use, at, layer.window))

    return block(x, layer, None if rotary is None else (rotary[0][at], rotary[1][at]), attend, activation)


def _attend_to_prefix(
    keys: Tensor,
    values: Tensor,
    at: Tensor,
    start: int,
    mask: Tensor | None,
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> Tensor:
    """Write `k` and `v` to the rows `at [q]`, `start` and on; attend to all rows so far, by torch's own kernel."""
    _write(keys, values, at, k, v)
    if start:
        end = start + len(at)
        k, v = (rows.flatten(2, 3)[:, :, :end] for rows in (keys.transpose(-1, -2), values))
    return functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)


def _write(keys: Tensor, values: Tensor, at: Tensor, k: Tensor, v: Tensor) -> None:
    """Store the rows `k` and `v [batch, kv_heads, q, head_dim]` of the positions `at [q]` in the cache's chunks."""
    keys[:, :, at // CHUNK, :, at % CHUNK] = k.permute(2, 0, 1, 3)  # indices apart from each other come first
    values[:, :, at // CHUNK, at % CHUNK] = v


def _seen(positions: Tensor, at: Tensor, window: int | None) -> Tensor:
    """Whether the query at `at` sees each of `positions`; the two broadcast."""
    seen = positions <= at
    return seen if window is None else seen & (positions > at - window)


def _kind(part: object) -> Hashable:
    """What a layer is compiled for: everything but the values of its weights."""
    if isinstance(part, Tensor):
        return tuple(part.shape)
    return tuple(map(_kind, part)) if isinstance(part, tuple) else part
