"""One decode step on CUDA: the compiled layers recorded as one graph, which each step replays."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from kvcache.compiled.cache import Slot
from kvcache.compiled.decoder import Decoder, Rotary
from kvcache.compiled.step import Step


class GraphStep(Step):
    """Replays one graph. A graph has one shape, so every step attends to the whole capacity."""

    options: ClassVar[dict[str, Any]] = {}

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
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self.run(self.ids, self.at, self.in_use(length))

    def release(self) -> None:
        super().release()
        for name in ("_graph", "_logits"):  # the graph's memory goes with the last of them
            vars(self).pop(name, None)

    def __call__(self, ids: Tensor, length: int) -> Tensor:
        if _get_current_dispatch_mode() is not None:  # a mode that counts operations sees none of a replayed graph's
            return super().__call__(ids, length)
        self.ids.copy_(ids)
        self.at.fill_(length)
        self._graph.replay()
        return self._logits.clone()

    def in_use(self, length: int) -> Tensor:  # the whole capacity, whatever is held
        return self.chunks

    def _require_compiler(self) -> None:
        """Refuse nothing: inductor's CUDA code needs no C++ compiler to be found beforehand."""

    def _ahead(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _key(self) -> Hashable:
        return self.batch_size, len(self.positions)

    def _in_use_at_first(self) -> Tensor:
        return self.in_use(0)

    def _mark_what_varies(self, in_use: Tensor) -> None:
        """Mark nothing: a graph has one shape."""
