"""Naive re-feed: every step feeds the whole sequence again and keeps nothing. The twin of cached.py."""

from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcache.strategies.padding import check_mask, check_model, check_whole, moved_before
from kvcache.strategies.strategy import Strategy, last_logits


class Naive(Strategy):
    """The study note's loop: context, prompt and everything emitted so far go through the model at every step.

    The baseline is fair: the LM head is computed for the last position only. `all_logits=True` is the note's literal
    form, which computes it for every position and throws all but the last away.
    """

    name = "naive"
    reads_cache: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel, *, all_logits: bool = False) -> None:
        super().__init__(model)
        self.keep = 0 if all_logits else 1

    def prepare(
        self, batch_size: int, capacity: int, context: Tensor | None = None, *, prompt_length: int | None = None
    ) -> None:
        super().prepare(batch_size, capacity, context, prompt_length=prompt_length)
        self.sequence = torch.zeros((batch_size, capacity), dtype=torch.long, device=self.model.device)
        self.context = context
        self.reset()

    def reset(self) -> None:
        super().reset()
        if self.context is not None:
            self.sequence[:, : self.n_depth] = self.context
        self.length = self.n_depth
        self.attention_mask: Tensor | None = None

    @torch.inference_mode()
    def prefill(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        check_whole(attention_mask, self.attention_mask, self.length - self.n_depth)
        if attention_mask is not None:
            check_mask(attention_mask, ids)
            ids, attention_mask = moved_before(self.sequence[:, : self.n_depth], ids, attention_mask)
            self.length = 0
            check_model(self.model, ids, attention_mask, self.capacity)
        self.attention_mask = attention_mask
        self._append(ids)
        return self._forward()

    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        self.skip(ids)
        return self._forward()

    def skip(self, ids: Tensor) -> None:
        self._append(ids)
        if self.attention_mask is not None:
            self.attention_mask = torch.cat([self.attention_mask, torch.ones_like(ids)], dim=1)

    @property
    def kv_bytes(self) -> int:
        return 0

    def _append(self, ids: Tensor) -> None:
        self.sequence[:, self.length : self.length + ids.shape[1]] = ids
        self.length += ids.shape[1]

    def _forward(self) -> Tensor:
        ids = self.sequence[:, : self.length]
        return last_logits(self.model, ids, attention_mask=self.attention_mask, keep=self.keep)[:, -1]
