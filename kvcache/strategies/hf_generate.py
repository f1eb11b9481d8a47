"""transformers' own `generate()`, untouched, as the yardstick `hf-generate`; its steps are seen through callbacks."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from kvcache.caches.contract import Unsupported
from kvcache.caches.dynamic import DynamicKV
from kvcache.strategies.cached import Cached
from kvcache.strategies.strategy import OnStep


class HfGenerate(Cached):
    """What a user of transformers gets from `model.generate(...)` with greedy choice and nothing else set.

    The generation config is blank: a model's own may stop at the end-of-sequence token or change the logits, and
    masking that token would change the tokens emitted. A context lies in a DynamicCache handed to `generate`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, "hf-generate", DynamicKV)

    def prepare(
        self, batch_size: int, capacity: int, context: Tensor | None = None, *, prompt_length: int | None = None
    ) -> None:
        if not hasattr(self.model, "generate"):
            raise Unsupported(f"{type(self.model).__name__} has no generate(); transformers' GenerationMixin gives it")
        super().prepare(batch_size, capacity, context, prompt_length=prompt_length)

    def reset(self) -> None:
        super().reset()
        before = self.context if self.context is not None else torch.empty((self.batch_size, 0), dtype=torch.long)
        self.sequence = before.to(self.model.device)

    @torch.inference_mode()
    def generate(
        self,
        prompt: Tensor,
        n_gen: int,
        on_step: OnStep | None = None,
        *,
        forced: Tensor | None = None,
        steps: Collection[int] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """As `Strategy.generate`, in one call of transformers' `generate`."""
        if steps is not None:
            raise TypeError(f"{self.name} reads a cache: a step cannot be skipped")
        self._begin(prompt, n_gen)
        self.attention_mask = attention_mask
        self.sequence = torch.cat([self.sequence, prompt], dim=1)
        steps_seen = self._generate(n_gen, on_step, forced)
        return torch.stack(steps_seen.tokens, dim=1)

    def _forward(self, ids: Tensor) -> Tensor:
        self.sequence = torch.cat([self.sequence, ids], dim=1)
        return self._generate(1, None, None).logits

    def _generate(self, n_gen: int, on_step: OnStep | None, forced: Tensor | None) -> _Steps:
        steps = _Steps(on_step, forced)
        mask = self.attention_mask if self.attention_mask is not None else torch.ones_like(self.sequence)
        with _blank_generation_config(self.model):
            self.model.generate(  # type: ignore[operator]  # GenerationMixin types it as a Tensor or a Module
                self.sequence,
                attention_mask=mask,
                past_key_values=self.kv.cache,
                max_new_tokens=n_gen,
                do_sample=False,
                logits_processor=LogitsProcessorList([steps]),
                stopping_criteria=StoppingCriteriaList([steps.after_each]),
            )
        return steps


class _Steps(LogitsProcessor):
    """Sees every step of one `generate` call: first its logits, then the token that was chosen."""

    def __init__(self, on_step: OnStep | None, forced: Tensor | None) -> None:
        self.on_step, self.forced = on_step, forced
        self.tokens: list[Tensor] = []
        self.after_each = _AfterEach(self)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits = scores
        if self.forced is None:
            return scores
        given = self.forced[:, len(self.tokens)]
        return torch.full_like(scores, -torch.inf).scatter_(1, given[:, None], 0.0)

    def emitted(self, input_ids: Tensor) -> None:
        token = input_ids[:, -1] if self.forced is None else self.logits.argmax(dim=-1)
        self.tokens.append(token)
        if self.on_step is not None:
            self.on_step(token, self.logits)


class _AfterEach(StoppingCriteria):
    """Called by `generate` when a token has been chosen; never stops it."""

    def __init__(self, steps: _Steps) -> None:
        self.steps = steps

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        self.steps.emitted(input_ids)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@contextmanager
def _blank_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Blank the model's own generation config, from which `generate` fills whatever a caller leaves open."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
