"""The contract of a generation strategy: prepare, prefill, decode, reset; `generate` composes them.

Nothing here knows a clock. A measurer passes `on_step` to `generate` and stamps the time when it is called.
Tensor axes: `batch` sequences, `q` query positions of one forward, `vocab` entries of the vocabulary.
"""

import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvcache.caches.contract import CacheNotRead, Promise
from kvcache.caches.held_bytes import held_bytes
from kvcache.models.module_states import ModuleStates
from kvcache.models.rotary import RotaryTables
from kvcache.models.skeleton import first_position

OnStep = Callable[[Tensor, Tensor], None]
"""Called after each token with `token [batch]` (the argmax, on the device) and `logits [batch, vocab]`."""


class Strategy(ABC):
    """Greedy generation, one verb per phase.

    The order of calls is `prepare`, then any number of (`reset`, `prefill`, `decode`, `decode`, ...), or of
    `generate`, which resets where that was not done. Greedy choice is `argmax`; the end-of-sequence token is never
    special here (a caller that wants to stop there stops calling).
    """

    name: str
    promise: Promise = "exact"
    """What its logits are held to: `exact` are compared with the reference's, `lossy` get quality figures."""
    reads_cache: ClassVar[bool] = True
    """False for a strategy whose step depends on the tokens so far alone: only such a one can `skip` a step."""
    capacity = 0
    """Tokens that it is prepared for."""
    _is_fresh = False
    """Whether nothing was generated since the last `reset`."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Take `model` (in eval mode, on its device) and leave it unchanged."""
        self.model = model
        self._growing_tables = RotaryTables(model)
        self._module_states = ModuleStates(model)

    def prepare(
        self, batch_size: int, capacity: int, context: Tensor | None = None, *, prompt_length: int | None = None
    ) -> None:
        """Get ready for `batch_size` sequences of up to `capacity` tokens each; untimed by every measurer.

        `context [batch, n_depth]` are tokens that lie before the prompt. They are processed here, once, and every
        `reset` comes back to the state just after them. `prompt_length` counts the tokens before the first generated
        one, context included, for caches that want to know.

        Raises:
            Unsupported: this model cannot be run by this strategy.
            ValueError: `context` has another batch size, or leaves no room within `capacity`.
        """
        n_depth = 0 if context is None else context.shape[1]
        if context is not None and context.shape[0] != batch_size:
            raise ValueError(f"context has {context.shape[0]} sequences, batch_size is {batch_size}")
        if n_depth >= capacity:
            raise ValueError(f"a context of {n_depth} tokens leaves no room within a capacity of {capacity}")
        self.batch_size, self.capacity, self.n_depth = batch_size, capacity, n_depth
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Take out of the model what earlier forwards left in it."""
        self._growing_tables.make_original()
        self._module_states.clear()

    @abstractmethod
    def prefill(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Feed the prompt `ids [batch, q]`; return the logits of its last position, `[batch, vocab]`.

        `attention_mask [batch, q]` marks left padding with 0; positions then count from the first real token. After a
        context, the padding is moved to before it, and the context is fed again.

        Raises:
            ValueError: the mask marks anything but left padding.
        """

    @abstractmethod
    def decode(self, ids: Tensor) -> Tensor:
        """Feed one token per sequence, `ids [batch, 1]`; return the logits that follow it, `[batch, vocab]`."""

    def skip(self, ids: Tensor) -> None:
        """Take `ids [batch, 1]` as emitted without computing anything (strategies with `reads_cache` False only)."""
        raise TypeError(f"{self.name} reads a cache: a step cannot be skipped")

    @abstractmethod
    def reset(self) -> None:
        """Come back to the state just after `prepare`; overrides call this one too."""
        self._is_fresh = True
        self._begin_anew()

    def release(self) -> None:
        """Let go of all that `prepare` made, so that its memory is free; overrides call this one too.

        Nothing can be generated until `prepare` is called again.
        """
        self.capacity = 0

    @property
    @abstractmethod
    def kv_bytes(self) -> int:
        """Bytes of keys and values held now that belong to tokens (padding of a static cache is not counted)."""

    @property
    def stored(self) -> object:
        """Return what every stored key and value can be reached from; None for a strategy that stores none."""
        return None

    @property
    def kv_bytes_allocated(self) -> int:
        """Count every byte that is reached from `stored`: scales, padding, residual windows; nothing of the model."""
        return held_bytes(self.stored, leaving_out=self.model)

    def check_length(self, n_tokens: int) -> None:  # noqa: B027  # no cache, no count
        """Compare what a cache has counted with the `n_tokens` that it was fed.

        Raises:
            UnfitCache: they differ.
        """

    @property
    def compile_s(self) -> float | None:
        """Seconds spent compiling so far; None for a strategy that compiles nothing."""
        return None

    @property
    def most_sequences(self) -> int | None:
        """The largest batch that it takes of this model; None for any."""
        return None

    @property
    def kernels(self) -> dict[str, str] | None:
        """Return which kernel computes each product since the last `prepare`; None where there is no choice."""
        return None

    @property
    def replays(self) -> bool | None:
        """Return whether decode steps run what was recorded, as the last `prepare` showed; None where nothing is."""
        return None

    def choose_kernels(self, batch_size: int) -> dict[str, str]:
        """Find the fastest kernels for a batch size, as `prepare` does; empty for a strategy without a choice."""
        del batch_size
        return {}

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
        """Emit `n_gen` tokens after `prompt [batch, n_prompt]`: one prefill, then n_gen - 1 decode steps.

        It begins at the state just after `prepare`: what an earlier call left is reset first (a measurer that wants
        that untimed calls `reset` before).

        Args:
            prompt: token ids; the tokens of `prepare`'s context lie before them.
            n_gen: how many tokens to emit, at least 1; the first is the prefill's.
            on_step: called after each emitted token.
            forced: `[batch, n_gen]`; feed these instead of the model's own choices (teacher forcing). The tokens
                returned are still the model's own choices.
            steps: the decode steps (1 to n_gen - 1) to compute, the others are skipped; needs `forced`.
            attention_mask: `[batch, n_prompt]`, 0 at left padding.

        Returns:
            The model's own choices, `[batch, number of computed steps + 1]`.

        Raises:
            ValueError: `prepare` was not called, or for another batch size or fewer tokens; an argument is no good.
        """
        if steps is not None and forced is None:
            raise ValueError("steps can be skipped only where the tokens are given (forced)")
        self._begin(prompt, n_gen)
        emitted = []

        def emit(logits: Tensor) -> Tensor:
            token = logits.argmax(dim=-1)
            emitted.append(token)
            if on_step is not None:
                on_step(token, logits)
            return token[:, None]

        token = emit(self.prefill(prompt, attention_mask))
        for step in range(1, n_gen):
            fed = token if forced is None else forced[:, step - 1 : step]
            if steps is None or step in steps:
                token = emit(self.decode(fed))
            else:
                self.skip(fed)
        return torch.stack(emitted, dim=1)

    def _begin(self, prompt: Tensor, n_gen: int) -> None:
        """Refuse what was not prepared for, and forget what an earlier `generate` left."""
        if not self.capacity:
            raise ValueError("call prepare(batch_size, capacity) before generate")
        if prompt.shape[0] != self.batch_size:
            raise ValueError(f"prepared for {self.batch_size} sequences, the prompt has {prompt.shape[0]}")
        if n_gen < 1:
            raise ValueError(f"n_gen is {n_gen}: at least 1 token is emitted")
        needed = self.n_depth + prompt.shape[1] + n_gen - 1  # the last token is not fed
        if needed > self.capacity:
            raise ValueError(f"prepared for {self.capacity} tokens, {needed} are needed")
        if not self._is_fresh:
            self.reset()
        self._is_fresh = False


def last_logits(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    cache: Cache | None = None,
    attention_mask: Tensor | None = None,
    mask_length: int = 0,
    n_past: int = 0,
    keep: int = 1,
) -> Tensor:
    """Feed `ids [batch, q]`; return the logits of the last `keep` positions (0: of all), `[batch, keep, vocab]`.

    `attention_mask [batch, tokens in the cache + q]` marks left padding with 0; position ids are counted from it
    where the architecture takes them, without a mask from the `n_past` tokens in the cache (as `generate` does; left
    to themselves, Bamba and others would begin at 0 again). `mask_length` is the length of a cache that attention sees
    whole: the mask is padded to it. A model whose forward cannot keep fewer logits computes them all, and the rest is
    cut off here.

    Raises:
        CacheNotRead: the model's forward has no argument for a cache.
    """
    accepted, first = _forward_arguments(type(model)), _first_position(model)
    arguments: dict[str, Any] = {"input_ids": ids, "use_cache": cache is not None}
    if cache is not None:
        arguments[cache_argument(model)] = cache
    if attention_mask is not None:
        unseen = max(0, mask_length - attention_mask.shape[1])
        arguments["attention_mask"] = torch.nn.functional.pad(attention_mask, (0, unseen))
        if "position_ids" in accepted:
            positions = attention_mask.long().cumsum(dim=-1) - 1
            arguments["position_ids"] = first + positions.clamp(min=0)[:, -ids.shape[1] :]
    elif first + n_past and "position_ids" in accepted:
        positions = torch.arange(first + n_past, first + n_past + ids.shape[1], device=ids.device)
        arguments["position_ids"] = positions.expand(ids.shape)
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = keep
    logits: Tensor = model(**arguments).logits
    return logits[:, -keep:]


def cache_argument(model: PreTrainedModel) -> str:
    """Return what the model's forward calls its cache.

    Raises:
        CacheNotRead: it has no argument for one.
    """
    accepted = _forward_arguments(type(model))
    for name in ("past_key_values", "cache_params"):  # the second is Mamba's
        if name in accepted:
            return name
    if ANY_KEYWORD in accepted and not type(model).__module__.startswith("transformers."):
        return "past_key_values"  # a user's own forward passes it on to the one of transformers
    raise CacheNotRead(f"{model.config.model_type} takes no past_key_values: a step would see its own token alone")


def _forward_arguments(model_class: type[PreTrainedModel]) -> frozenset[str]:
    """List the names of the arguments of a model's forward, once per class (a signature costs 50 microseconds)."""
    if model_class not in _FORWARD_ARGUMENTS:
        parameters = inspect.signature(model_class.forward).parameters.values()
        _FORWARD_ARGUMENTS[model_class] = frozenset(
            ANY_KEYWORD if parameter.kind is parameter.VAR_KEYWORD else parameter.name for parameter in parameters
        )
    return _FORWARD_ARGUMENTS[model_class]


ANY_KEYWORD = "**"
"""Stands for `**kwargs` among the arguments of a forward."""
_FORWARD_ARGUMENTS: dict[type, frozenset[str]] = {}


def _first_position(model: PreTrainedModel) -> int:
    """Return the first token's position id, looked up once per model."""
    if model not in _FIRST_POSITIONS:
        _FIRST_POSITIONS[model] = first_position(model)
    return _FIRST_POSITIONS[model]


_FIRST_POSITIONS: weakref.WeakKeyDictionary[PreTrainedModel, int] = weakref.WeakKeyDictionary()
