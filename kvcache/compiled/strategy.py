"""The fast path: a static cache, products that read weights at memory speed, one kernel for a layer's decode step."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcache.caches.contract import Unsupported
from kvcache.compiled.architectures.catalogue import describe
from kvcache.compiled.cache import Slot, attend_to_prefix, joined, seen
from kvcache.compiled.candidates import DEFAULT, Kernels
from kvcache.compiled.choice import Choice
from kvcache.compiled.cuda_graph import GraphStep
from kvcache.compiled.kernels import after_attention, heads
from kvcache.compiled.replay import ReplayStep
from kvcache.compiled.rows import CHUNK, ExactRows, Rows
from kvcache.compiled.step import FEWEST_CHUNKS, Backend
from kvcache.strategies.padding import check_mask, check_whole
from kvcache.strategies.strategy import Strategy

QKV = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values of a piece of a prompt, `[batch, heads, q, head_dim]` each."""

Mask = Callable[[int, int, int | None], Tensor | None]
"""First position, end and window -> which positions each one sees, or None for all before it."""

PIECE_ROWS = 512
"""Positions, of all sequences together, that pass through products and norms at a time: the memory of a prefill beyond
its cache grows with the prompt, or a piece times the prompt, not with its square."""


class Compiled(Strategy):
    """Static cache, and a compiled layer that runs as often as the model has layers of its kind.

    Prefill's layers run uncompiled, for any length, by oneDNN's or torch's products and attention. Decode runs layers
    compiled by inductor, which makes of them a single C++ kernel that reads each weight once, from where transformers
    keeps it, and attends to the chunks in use, not to the whole capacity (`step.py`). A step runs what an earlier one
    recorded: the kernels on the CPU (`replay.py`), a graph on CUDA (`cuda_graph.py`).

    The attention is its own: the model's `attn_implementation` plays no part.
    """

    name = "compiled"
    rows: ClassVar[type[Rows]] = ExactRows
    """How keys and values are stored."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        backend: Backend = "inductor",
        prefill_as_stored: bool = False,
        kernels: Kernels | None = None,
    ) -> None:
        """Take `model`, whose weights stay where they are (GPT-2's are laid out anew in place).

        `backend` is torch.compile's; "eager" checks the logic without a compiler, slowly. A prompt attends to its own
        keys and values before they are rounded to the format of the cache; with `prefill_as_stored`, after.

        Raises:
            Unsupported: the architecture, the data type or the device is not one of those written down, or there is
                no C++ compiler.
        """
        super().__init__(model)
        described = describe(model)
        self.step = (GraphStep if model.device.type == "cuda" else ReplayStep)(backend)
        is_timed = model.device.type == "cpu" and backend == "inductor"
        self._choice = Choice(described, kernels if is_timed or kernels is not None else DEFAULT)
        self.decoder = described
        self._slots: list[Slot] = []
        self._compile_ns = 0
        self._kernels: dict[str, str] | None = None
        self._prefill_as_stored = prefill_as_stored

    def prepare(
        self, batch_size: int, capacity: int, context: Tensor | None = None, *, prompt_length: int | None = None
    ) -> None:
        super().prepare(batch_size, capacity, context, prompt_length=prompt_length)
        model = self._choice.model
        if self.most_sequences is not None and batch_size > self.most_sequences:
            raise Unsupported(f"compiled feeds experts at most {self.most_sequences} sequences; this is {batch_size}")
        if model.positions is not None and capacity > len(model.positions):
            raise ValueError(f"the model has {len(model.positions)} positions, a capacity of {capacity} is more")
        self.decoder, self._kernels = self._choice.of_batch(batch_size)
        model = self.decoder
        chunks = max(FEWEST_CHUNKS + 1, -(-capacity // CHUNK))
        shape = (batch_size, model.kv_heads, chunks, model.head_dim)
        self._slots = [Slot(layer, self.rows.empty(model.tokens, *shape)) for layer in model.layers]
        self._positions = torch.arange(chunks * CHUNK, device=model.tokens.device)
        self._rotaries = model.rotary(self._positions)
        start = time.perf_counter_ns()
        self.step.prepare(model, self._slots, self._positions, self._rotaries, self.n_depth)
        self._compile_ns += time.perf_counter_ns() - start
        self.length = 0
        if context is not None:
            self.prefill(context)

    def reset(self) -> None:
        super().reset()
        self.length = self.n_depth

    def release(self) -> None:
        super().release()
        self._slots = []
        self.step.release()

    @torch.inference_mode()
    def prefill(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        check_whole(attention_mask, None, self.length - self.n_depth)
        if attention_mask is not None:
            check_mask(attention_mask, ids)
            if not attention_mask.all():
                raise ValueError("compiled takes prompts of equal length only: it has no left padding")
        if ids.shape[1] == 1:
            return self._decode(ids)
        self._refuse_more_than_capacity(ids.shape[1])
        model, start, end = self.decoder, self.length, self.length + ids.shape[1]
        size = piece_size(*ids.shape) if ids.device.type == "cpu" else ids.shape[1]
        spans = [(first, min(first + size, end)) for first in range(start, end, size)]
        rotaries = [tuple((cos[first:last], sin[first:last]) for cos, sin in self._rotaries) for first, last in spans]
        at = self._positions[start:end].split(size)
        x = [model.embed(*piece) for piece in zip(ids.split(size, dim=1), at, strict=True)]
        # Of one piece, layers share the masks; those of all pieces would together be the square of the prompt.
        mask = functools.lru_cache(maxsize=len({layer.window for layer in model.layers}))(self._mask)
        for slot in self._slots:
            layer = slot.layer
            qkv = [heads(piece, layer, rotary) for piece, rotary in zip(x, rotaries, strict=True)]
            if start == 0:
                slot.rows.begin([q for q, _, _ in qkv], [k for _, k, _ in qkv])
            for where, (_, k, v) in zip(at, qkv, strict=True):
                slot.rows.write(where // CHUNK, where % CHUNK, k, v)
            attended = self._attended(slot, qkv, spans, mask)
            del qkv
            for i, part in enumerate(attended):
                x[i] = after_attention(x[i], part, layer, model.activation)
        self.length = end
        return self.step.logits(x[-1][:, -1:].contiguous(), model.head)

    def _attended(self, slot: Slot, qkv: Sequence[QKV], spans: Sequence[tuple[int, int]], mask: Mask) -> list[Tensor]:
        """Attend with each piece of a prompt: what its positions take from all rows up to them."""
        start, end, layer = spans[0][0], spans[-1][1], slot.layer
        # torch's causal attention over a whole prompt needs no mask, and no memory of the prompt's square.
        at_once = layer.softcap is None and _sees_all(start, end, layer.window)
        attended: list[Tensor] = []
        for pieces in [range(len(spans))] if at_once else [range(i, i + 1) for i in range(len(spans))]:
            visible = mask(spans[pieces[0]][0], spans[pieces[-1]][1], layer.window)
            q, own = joined([qkv[i][0] for i in pieces]), [(k, v) for _, k, v in qkv[: pieces[-1] + 1]]
            found = attend_to_prefix(slot, start, visible, q, own, as_stored=self._prefill_as_stored)
            attended += found.split([last - first for first, last in (spans[i] for i in pieces)], dim=2)
        return attended

    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        return self._decode(ids)

    def _decode(self, ids: Tensor) -> Tensor:
        self._refuse_more_than_capacity(1)
        if self.length == 0:
            for slot in self._slots:
                slot.rows.begin((), ())
        logits = self.step(ids, self.length)
        self.length += 1
        return logits

    @property
    def kv_bytes(self) -> int:
        total = 0
        for slot in self._slots:
            # Behind a window lie rows that no later token sees.
            held = self.length if slot.layer.window is None else min(self.length, slot.layer.window - 1)
            total += sum(tensor.nbytes for tensor in slot.rows) * held
        return round(total / len(self._positions))  # a position's share of what a chunk has once need not be whole

    @property
    def stored(self) -> object:
        return [slot.rows for slot in self._slots]

    @property
    def most_sequences(self) -> int | None:
        return self.decoder.most_sequences

    @property
    def compile_s(self) -> float:
        return self._compile_ns / 1e9

    @property
    def replays(self) -> bool:
        """Return whether decode steps run what was recorded: kernels, as the last `prepare` showed; on CUDA a graph."""
        return getattr(self.step, "is_replayable", True)

    @property
    def kernels(self) -> dict[str, str] | None:
        return self._kernels if self._has_choice else None

    def choose_kernels(self, batch_size: int) -> dict[str, str]:
        return self._choice.of_batch(batch_size)[1] if self._has_choice else {}

    @property
    def _has_choice(self) -> bool:
        """Return whether candidates compute the products: elsewhere than on a CPU `F.linear` computes all of them."""
        return self._choice.model.tokens.device.type == "cpu"

    def _refuse_more_than_capacity(self, q: int) -> None:
        """Raise for `q` tokens too many: the compiled code checks nothing, and would write the row somewhere else."""
        if self.length + q > self.capacity:
            raise ValueError(f"prepared for {self.capacity} tokens: {self.length} are held, {q} more do not fit")

    def _mask(self, start: int, end: int, window: int | None) -> Tensor | None:
        """Return which positions up to `end` each one from `start` on sees, `[q, end]`; None: all up to itself."""
        if _sees_all(start, end, window):
            return None
        return seen(self._positions[:end], self._positions[start:end, None], window)


def _sees_all(start: int, end: int, window: int | None) -> bool:
    """Return whether each position from `start` to `end` sees all those of one forward before it, and no other."""
    return start == 0 and (window is None or end <= window)


def piece_size(batch_size: int, n_prompt: int) -> int:
    """Return how many positions of a prompt pass through a layer at a time: pieces are of about equal size."""
    pieces = -(-batch_size * n_prompt // PIECE_ROWS)
    return -(-n_prompt // min(pieces, n_prompt))
