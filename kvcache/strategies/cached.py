"""KV-cached: the prompt is fed once, then every step feeds one token. The twin of naive.py."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcache.caches.contract import CacheNotRead, Kind
from kvcache.caches.dynamic import DynamicKV
from kvcache.caches.states import row_bytes
from kvcache.caches.static import StaticKV
from kvcache.strategies.failing_forward import refuse_transformers_error
from kvcache.strategies.padding import check_mask, check_model, check_whole, moved_before
from kvcache.strategies.strategy import Strategy, cache_argument, last_logits


class Cached(Strategy):
    """Keys and values of every token are kept by a `KVCache`, so that a step computes its own row only."""

    def __init__(self, model: PreTrainedModel, name: str, kind: Kind) -> None:
        """Generate on `model` with caches of `kind`, under the catalogue's `name`."""
        super().__init__(model)
        self.name, self.kind, self.promise = name, kind, kind.promise

    def prepare(
        self, batch_size: int, capacity: int, context: Tensor | None = None, *, prompt_length: int | None = None
    ) -> None:
        super().prepare(batch_size, capacity, context, prompt_length=prompt_length)
        self.prompt_length = prompt_length
        self.context = context
        cache_argument(self.model)
        self._read = False
        self._kept = self.kv = self.kind(self.model, capacity, prompt_length)
        self.kv.fed = batch_size, self.n_depth
        if context is not None and self.kv.restores:
            self._feed(context)
            self.kv.mark()
        self._after_context = self._module_states.copied()
        self.reset()

    def reset(self) -> None:
        super().reset()
        self.attention_mask: Tensor | None = None
        self.kv, self.length = self._kept, self.n_depth
        self.kv.restore()
        self._module_states.put_back(self._after_context)
        if self.context is not None and not self.kv.restores:
            self._feed(self.context)

    def release(self) -> None:
        super().release()
        for name in ("kv", "_kept"):
            vars(self).pop(name, None)  # there is none before `prepare`

    @torch.inference_mode()
    def prefill(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        check_whole(attention_mask, self.attention_mask, self.length - self.n_depth)
        if attention_mask is not None:
            ids, attention_mask = self._padded(ids, attention_mask)
            check_model(self.model, ids, attention_mask, self.capacity, self.kind)
        self.attention_mask = attention_mask
        logits = self._forward(ids)
        self._check_read()
        return logits

    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        if self.attention_mask is not None:
            self.attention_mask = torch.cat([self.attention_mask, torch.ones_like(ids)], dim=1)
        return self._forward(ids)

    @property
    def kv_bytes(self) -> int:
        return self.kv.used_bytes + row_bytes(self._module_states.tensors)

    @property
    def stored(self) -> object:
        return [self.kv.stored, *self._module_states.tensors]

    def check_length(self, n_tokens: int) -> None:
        self.kv.check_length(n_tokens)

    def _padded(self, ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is fed for a padded prompt; after a context, all of it from an empty cache, padding first."""
        check_mask(attention_mask, ids)
        if not (self.kind.takes_padding or attention_mask.all()):
            raise ValueError(
                f"{self.name} would hold padding in place of tokens: feed prompts of equal length, without an "
                "attention_mask"
            )
        if self.context is None or attention_mask.all():
            context = ids[:, :0] if self.context is None else self.context
            return ids, torch.cat([torch.ones_like(context), attention_mask], dim=1)
        self.kv, self.length = self.kind(self.model, self.capacity, self.prompt_length), 0
        return moved_before(self.context, ids, attention_mask)

    def _forward(self, ids: Tensor) -> Tensor:
        """Feed `ids [batch, q]`; return the logits of the last position, `[batch, vocab]`."""
        try:  # a context manager would cost a timed step its microseconds
            logits = last_logits(
                self.model,
                ids,
                cache=self.kv.cache,
                attention_mask=self.attention_mask,
                mask_length=self.kv.padded_length,
                n_past=self.length,
            )
        except Exception as error:
            if self.attention_mask is None:  # a mask, or the positions counted from it, may be wrong
                self._refuse(error)
            raise
        self.length += ids.shape[1]
        return logits[:, -1]

    @torch.inference_mode()
    def _feed(self, context: Tensor) -> None:
        try:
            last_logits(self.model, context, cache=self.kv.cache)
        except Exception as error:
            self._refuse(error)
            raise

    def _refuse(self, error: Exception) -> None:
        """Refuse what fails in transformers' code; with a user's cache the fault may be the cache's."""
        if not self.kv.of_user:
            refuse_transformers_error(error, self.model, "a forward with a cache", self.kv.cache)

    def _check_read(self) -> None:
        """Raise CacheNotRead if the cache is still empty after it was fed; looked at once after each `prepare`."""
        # One that counts tokens and holds none was read, and keeps them elsewhere: `OwnKV.check_length` says so.
        if not self._read and self.kv.is_empty:
            raise CacheNotRead(
                f"{self.model.config.model_type} leaves the cache empty that it is given: a step would see its own "
                "token alone"
            )
        self._read = True


class Dynamic(Cached):
    """The cache of transformers' default: it grows by one row a step, by concatenation (a copy of itself)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, "dynamic", DynamicKV)


class Static(Cached):
    """The cache is allocated once, for `capacity` tokens, and written in place; attention sees its whole length."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, "static", StaticKV)
