"""transformers' own `generate()`, untouched, as the yardstick `hf-generate`; its steps are seen through callbacks."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from kvcache.caches.contract import CacheNotRead, Unsupported
from kvcache.caches.dynamic import DynamicKV
from kvcache.caches.states import row_bytes
from kvcache.strategies.cached import Dynamic
from kvcache.strategies.failing_forward import naming_transformers
from kvcache.strategies.padding import check_mask, check_model, check_whole, moved_before
from kvcache.strategies.strategy import OnStep, Strategy, cache_argument


class HfGenerate(Strategy):
    """What a user of transformers gets from `model.generate(...)` with greedy choice and nothing else set.

    The generation config is blank: a model's own may stop at the end-of-sequence token or change the logits, and
    masking that token would change the tokens emitted. `generate` makes its own cache, or the model does; a context
    lies in a DynamicCache handed to it, or is fed with the prompt where the model takes none. What is stored is what
    the model's last forward returned.
    """

    name = "hf-generate"

    def prepare(
        self, batch_size: int, capacity: int, context: Tensor | None = None, *, prompt_length: int | None = None
    ) -> None:
        if not hasattr(self.model, "generate"):
            raise Unsupported(f"{type(self.model).__name__} has no generate(); transformers' GenerationMixin gives it")
        super().prepare(batch_size, capacity, context, prompt_length=prompt_length)
        self.context, self.prompt_length = context, prompt_length
        self._before = None if context is None else self._fed(context, capacity, prompt_length)
        self.reset()

    def reset(self) -> None:
        super().reset()
        self.attention_mask: Tensor | None = None
        empty = torch.empty((self.batch_size, 0), dtype=torch.long, device=self.model.device)
        self.sequence = self.context if self.context is not None else empty
        if self._before is not None:
            self._before.reset()
        self.cache: Any = None if self._before is None else self._before.kv.cache
        self.held = 0 if self._before is None else self.n_depth
        """Tokens that lie in the cache."""

    def _fed(self, context: Tensor, capacity: int, prompt_length: int | None) -> Dynamic | None:
        """Feed `context` to a DynamicCache; None where the model takes none."""
        before = Dynamic(self.model)
        try:
            before.prepare(self.batch_size, capacity, context, prompt_length=prompt_length)
        except CacheNotRead:
            return None
        return before

    def release(self) -> None:
        super().release()
        self.cache = self._before = None

    @torch.inference_mode()
    def prefill(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self._append_prompt(ids, attention_mask)
        return self._generate(1, None, None).logits

    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        self.sequence = torch.cat([self.sequence, ids], dim=1)
        if self.attention_mask is not None:
            self.attention_mask = torch.cat([self.attention_mask, torch.ones_like(ids)], dim=1)
        return self._generate(1, None, None).logits

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
        self._append_prompt(prompt, attention_mask)
        return torch.stack(self._generate(n_gen, on_step, forced).tokens, dim=1)

    @property
    def kv_bytes(self) -> int:
        return row_bytes(self.stored)

    @property
    def stored(self) -> object:
        return [self.cache, *self._module_states.tensors]

    def _append_prompt(self, ids: Tensor, attention_mask: Tensor | None) -> None:
        check_whole(attention_mask, self.attention_mask, self.sequence.shape[1] - self.n_depth)
        if attention_mask is None:
            self.sequence = torch.cat([self.sequence, ids], dim=1)
            return
        check_mask(attention_mask, ids)
        if not attention_mask.all():
            self.cache = None  # the padding goes before the context, which is fed again
        self.sequence, self.attention_mask = moved_before(self.sequence, ids, attention_mask)
        try:
            check_model(self.model, self.sequence, self.attention_mask, self.capacity, DynamicKV)
        except Unsupported as reason:
            raise ValueError(f"padding in a cache of its own cannot be checked: {reason}") from None

    def _generate(self, n_gen: int, on_step: OnStep | None, forced: Tensor | None) -> _Steps:
        steps = _Steps(on_step, forced)
        mask = self.attention_mask if self.attention_mask is not None else torch.ones_like(self.sequence)
        ids, cache, handed = self.sequence, None, {}
        if isinstance(self.cache, Cache):
            argument, cache = cache_argument(self.model), self.cache
            handed = {argument: cache}
            if argument != "past_key_values":  # `generate` leaves out what lies in past_key_values, and in no other
                ids, mask = ids[:, self.held :], mask[:, self.held :]
        is_padded = self.attention_mask is not None
        with (
            nullcontext() if is_padded else naming_transformers(self.model, "generate()", cache),
            _blank_generation_config(self.model),
            self._watching_the_cache(),
        ):
            self.model.generate(  # type: ignore[operator]  # GenerationMixin types it as a Tensor or a Module
                ids,
                attention_mask=mask,
                max_new_tokens=n_gen,
                do_sample=False,
                logits_processor=LogitsProcessorList([steps]),
                stopping_criteria=StoppingCriteriaList([steps.after_each]),
                **handed,
            )
        self.held = self.sequence.shape[1] + n_gen - 1
        return steps

    @contextmanager
    def _watching_the_cache(self) -> Iterator[None]:
        """Keep what each forward returns as its cache: `generate` may begin a new one (Phi-3's switching rope)."""

        def watch(_model: object, _positional: object, named: dict[str, Any], output: Any) -> None:
            found = [getattr(output, name, None) for name in CACHES] + [named.get(name) for name in CACHES]
            self.cache = next((cache for cache in found if cache is not None), None)

        hook = self.model.register_forward_hook(watch, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")
"""What a model calls its cache: nearly all, Mamba's kin, RWKV, XLNet, Reformer. RecurrentGemma does not return it."""


def begins_anew(model: PreTrainedModel) -> int | None:
    """Return the tokens beyond which the model's own part of `generate` begins another cache; None: never.

    Phi-3 and its kin do, for the sake of their other rotary table. Phi-3 feeds it the whole sequence again, Phi-4
    multimodal the last token alone, and of a window more is left allocated than step by step.
    """
    prepares = getattr(type(model), "prepare_inputs_for_generation", None)
    if prepares in (None, GenerationMixin.prepare_inputs_for_generation):
        return None
    limit: int | None = getattr(model.config, "original_max_position_embeddings", None)
    return limit


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
