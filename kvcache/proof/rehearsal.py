"""What a strategy will count, known before any weights are read: its own code runs on a model without memory.

On the meta device tensors have shapes and types but no numbers. A forward there makes the very tensors that it makes
later, so latents, states, shared and sliding layers need no formula: they are what transformers makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import StaticLayer
from transformers.pytorch_utils import Conv1D

from kvcache.arithmetic.costs import Costs
from kvcache.arithmetic.geometry import Layer, Matrix
from kvcache.arithmetic.kv_bytes import Fed, Held
from kvcache.caches.contract import UnfitCache, Unsupported
from kvcache.caches.held_bytes import reachable_tensors
from kvcache.models import ModelError
from kvcache.models.skeleton import count_parameters
from kvcache.proof.operations import count_operations
from kvcache.proof.unknown_numbers import NotRehearsable, alike_for_any_numbers, naming_the_reason
from kvcache.strategies.catalogue import OWN, PLAIN_CACHE, build
from kvcache.strategies.hf_generate import begins_anew
from kvcache.strategies.strategy import last_logits


@dataclass(frozen=True, kw_only=True)
class _Forward:
    costs: Costs
    kv_moved: int
    """Bytes of what a cache held before and what was written to it; a part of `costs.bytes`."""


class Rehearsal:
    """Runs the strategies of one model in one dtype without its weights; what was asked once is remembered."""

    experts: ClassVar[str] = "batched_mm"
    """How experts are computed; on the meta device others ask which expert a token goes to."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        """Take `model`, which lies on the meta device, for its own."""
        self._model = model
        if model.dtype != dtype:  # one that is as loaded may keep some weights in float32
            model.to(dtype)  # type: ignore[arg-type]  # transformers' decorator hides the signature
        self._model.eval()
        self._model.requires_grad_(requires_grad=False)  # as loaded: torch folds other products otherwise
        with suppress(ValueError):  # no experts
            self._model.set_experts_implementation(self.experts)
        self._forwards: dict[tuple[int, int, int | None, bool, str], _Forward] = {}
        self._held: dict[tuple[str, Fed], Held] = {}

    def held(self, strategy: str, fed: Fed) -> Held:
        """Say what `strategy` holds after what it was `fed`.

        A forward may ask for numbers, if what it keeps is the same whatever they are (`unknown_numbers.py`).

        Raises:
            NotRehearsable: the strategy refuses this model, or what it keeps depends on numbers.
        """
        before, last = (fed.n_tokens - 1, 1) if fed.n_steps else (fed.n_depth, fed.n_prompt)

        def rehearse() -> Held:
            cached = self._fed(strategy, fed.batch_size, before, fed.capacity)
            self._feed(cached, last)
            return Held(used=cached.kv_bytes, allocated=storage_bytes(cached.stored))

        return self._remembered(strategy, fed, rehearse)

    def generated(self, strategy: str, fed: Fed) -> Held:
        """Say what the model's own cache holds, which transformers' `generate` lets it make.

        It is fed all but the last token at once; a context goes with the prompt, since such models take none before it.

        Raises:
            NotRehearsable: the strategy refuses this model, or what is kept depends on numbers.
        """
        n_new = 2 if fed.n_steps else 1

        def rehearse() -> Held:
            made: Any = build(strategy, self._model)
            made.prepare(fed.batch_size, fed.n_tokens + 1)
            goes_on = [True] * n_new + [False]  # whether a sequence has ended is a number
            with mock.patch.object(GenerationMixin, "_has_unfinished_sequences", side_effect=goes_on):
                made.generate(self._ids(fed.batch_size, fed.n_tokens + 1 - n_new), n_new)
            return Held(used=made.kv_bytes, allocated=storage_bytes(made.stored))

        return self._remembered(strategy, fed, rehearse)

    def _remembered(self, strategy: str, fed: Fed, rehearse: Callable[[], Held]) -> Held:
        """Rehearse what was not asked before."""
        if (strategy, fed) not in self._held:
            with naming_the_reason(), without_padding():
                self._held[strategy, fed] = alike_for_any_numbers(rehearse)
        return self._held[strategy, fed]

    def check_generate(self, fed: Fed) -> None:
        """Look whether transformers' `generate` goes on with one cache while it is `fed`.

        Raises:
            NotRehearsable: it begins another on the way.
        """
        limit, first = begins_anew(self._model), fed.n_depth + fed.n_prompt
        if limit is not None and (0 < fed.n_depth <= limit < first or first <= limit < fed.n_tokens):
            raise NotRehearsable(
                f"generate() begins another cache when a sequence grows past {limit} tokens, where this model takes "
                "another rotary table"
            )

    def refusal(self, strategy: str) -> str | None:
        """Return why `strategy` cannot run this model on this machine, or None if it can.

        Raises:
            NotRehearsable: it fails in another way than by refusing, perhaps only for want of the weights.
        """
        with naming_the_reason():
            try:
                made = build(strategy, self._model)
                # `prepare` would compile; a user's factory may read the weights, so it is imported and not called.
                if made.compile_s is None and not strategy.startswith(OWN):
                    made.prepare(1, 2)
            except (Unsupported, UnfitCache, ModelError) as reason:
                return str(reason)
        return None

    def most_sequences(self, strategy: str) -> int | None:
        """Return the largest batch that `strategy` takes of this model, or None for any and for a user's own.

        Raises:
            NotRehearsable: the strategy refuses this model.
        """
        if strategy.startswith(OWN):  # a factory may read the weights
            return None
        with naming_the_reason():
            return build(strategy, self._model).most_sequences

    @property
    def full_windows(self) -> int:
        """A power of two, in tokens, at half of which every sliding window is full."""
        layers = DynamicCache(config=self._model.config).layers
        longest = max((getattr(layer, "sliding_window", 0) for layer in layers), default=0)
        return max(512, 1 << (2 * longest - 1).bit_length())

    @cached_property
    def full_rows(self) -> list[Layer] | None:
        """Return what layers keep of all tokens, for the formulas of kv_bytes.py: an entry for keys, one for values.

        Latents have another size than what is kept beside them. None where any layer keeps something else.
        """
        with naming_the_reason():
            return alike_for_any_numbers(self._full_rows)

    def _full_rows(self) -> list[Layer] | None:
        cached = self._fed(PLAIN_CACHE, 1, 1, 2)
        kept = [layer for layer in cached.kv.layers if list(reachable_tensors(layer))]
        if any(type(layer).__name__ != "DynamicLayer" for layer in kept):
            return None
        shapes = [(rows.shape[1], rows.shape[3]) for layer in kept for rows in (layer.keys, layer.values)]
        return [Layer(heads=heads, kv_heads=heads, head_dim=size, linears=(), vectors=0) for heads, size in shapes]

    def compiled_layers(self, strategy: str) -> list[Layer]:
        """Return what each layer keeps by the fast path's description, for the formulas of kv_bytes.py.

        Raises:
            NotRehearsable: the strategy refuses this model.
        """
        with naming_the_reason():
            made: Any = build(strategy, self._model)
        sizes = ((layer.kv_heads, layer.head_dim, layer.window) for layer in made.decoder.layers)
        return [
            Layer(heads=heads, kv_heads=heads, head_dim=size, window=window, linears=(), vectors=0)
            for heads, size, window in sizes
        ]

    @property
    def linears(self) -> Iterator[Matrix]:
        """The shape of every linear layer but the LM head."""
        head = self._model.get_output_embeddings()
        for module in self._model.modules():
            if isinstance(module, nn.Linear | Conv1D) and module is not head:
                n_in, n_out = module.weight.shape if isinstance(module, Conv1D) else reversed(module.weight.shape)
                yield n_in, n_out

    def forward_costs(
        self,
        *,
        batch_size: int,
        n_query: int,
        n_cached: int,
        reads_cache: bool,
        all_logits: bool = False,
        kv_stored: int | None = None,
        strategy: str = PLAIN_CACHE,
    ) -> Costs:
        """Count the work of a forward, in the terms of `kvcache.arithmetic.costs.forward_costs`; `kv_bytes` is left 0.

        What is expanded again out of stored latents is written and read, beside what the cache holds.

        Raises:
            NotRehearsable: the model asks for numbers, or takes no cache.
        """
        key = (batch_size, n_query, n_cached if reads_cache else None, all_logits, strategy)
        if key not in self._forwards:
            with naming_the_reason(), without_padding(), torch.inference_mode():
                self._forwards[key] = alike_for_any_numbers(lambda: self._forward(*key), "work")
        found = self._forwards[key]
        if kv_stored is None:
            return found.costs
        return replace(found.costs, bytes=found.costs.bytes - found.kv_moved + kv_stored)

    def _fed(self, strategy: str, batch_size: int, n_tokens: int, capacity: int) -> Any:
        """Return a strategy that holds so many tokens; `Any`, since what is asked of it is `Cached`'s own."""
        made: Any = build(strategy, self._model)
        made.prepare(batch_size, max(capacity, n_tokens + 1))
        if n_tokens:
            self._feed(made, n_tokens)
        return made

    def _feed(self, cached: Any, n_tokens: int) -> None:
        for layer in cached.kv.layers:
            if isinstance(layer, StaticLayer):  # it counts its tokens in a tensor, which has no number here
                layer.get_seq_length = partial(int, cached.length + n_tokens)  # type: ignore[method-assign]
        cached.prefill(self._ids(cached.batch_size, n_tokens))

    def _forward(
        self, batch_size: int, n_query: int, n_cached: int | None, all_logits: bool, strategy: str
    ) -> _Forward:
        if n_cached is None:
            with count_operations(self._model) as counted:
                last_logits(self._model, self._ids(batch_size, n_query), keep=0 if all_logits else 1)
            moved = 0
        else:
            cached = self._fed(strategy, batch_size, n_cached, n_cached + n_query + 1)
            moved = cached.kv_bytes
            with _watched(cached.kv.layers) as updates, count_operations(self._model) as counted:
                self._feed(cached, n_query)
            moved += sum(update.written for update in updates) + self._read_by_others(updates)
            moved += _state_bytes(cached.kv.layers)  # written whole in every forward
        tokens, scored = counted.tokens_processed, counted.lm_head_positions
        weights = self._weights_read(tokens, counted.expert_flops)
        vocab_size = self._head.shape[0]
        costs = Costs(
            forward_calls=1,
            tokens_processed=tokens,
            gemm_flops=counted.gemm_flops,
            gemv_flops=counted.gemv_flops,
            bytes=self._model.dtype.itemsize * (weights + scored * vocab_size) + 2 * counted.expanded_bytes + moved,
            kv_bytes=0,
        )
        return _Forward(costs=costs, kv_moved=moved)

    def _weights_read(self, tokens: int, expert_flops: int) -> int:
        """Count the numbers of the weights that `tokens` need: of tables a row each, of experts the most they can."""
        tables = [module for module in self._model.modules() if isinstance(module, nn.Embedding)]
        experts: int = sum(weight.numel() for weight in self._of_experts())
        looked_up = {id(table.weight): table.weight.numel() for table in tables if table.weight is not self._head}
        whole = count_parameters(self._model) - experts - sum(looked_up.values())
        return whole + min(experts, expert_flops // 2) + tokens * sum(table.embedding_dim for table in tables)

    def _of_experts(self) -> Iterator[Tensor]:
        for module in self._model.modules():
            if not isinstance(module, nn.Conv1d):
                yield from (weight for weight in module.parameters(recurse=False) if weight.dim() == 3)

    @property
    def _head(self) -> Tensor:
        weight: Tensor = self._model.get_output_embeddings().weight
        return weight

    def _read_by_others(self, updates: list[_Update]) -> int:
        """Count the bytes that layers without a cache of their own read out of the last layer of their type before."""
        config = self._model.config.get_text_config(decoder=True)
        modes, types = getattr(config, "kv_sharing_modes", None), getattr(config, "layer_types", None)
        if not modes or not types:
            return 0
        returned = [0] * len(types)
        for update in updates:
            returned[update.layer] += update.returned
        own = {kind: number for number, kind in enumerate(types) if modes[number] != "reuse"}
        return sum(returned[own[kind]] for number, kind in enumerate(types) if modes[number] == "reuse")

    def _ids(self, batch_size: int, n_tokens: int) -> Tensor:
        return torch.zeros((batch_size, n_tokens), dtype=torch.long, device=self._model.device)


@dataclass(frozen=True, kw_only=True)
class _Update:
    layer: int
    written: int
    returned: int


@contextmanager
def _watched(layers: list[Any]) -> Iterator[list[_Update]]:
    """List what the model writes to each of a cache's layers, and what it gets back, in bytes."""
    updates: list[_Update] = []

    def watched(number: int, update: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **named: Any) -> Any:
            result = update(*arguments, **named)
            written = _tensor_bytes([*arguments, *named.values()])
            updates.append(_Update(layer=number, written=written, returned=_tensor_bytes(result)))
            return result

        return noted

    for number, layer in enumerate(layers):
        for name in filter(lambda name: name.startswith("update") and name not in _OF_STATES, dir(layer)):
            setattr(layer, name, watched(number, getattr(layer, name)))
    yield updates
    for layer in layers:
        for name in [name for name in vars(layer) if name.startswith("update")]:
            delattr(layer, name)


_OF_STATES = "update_conv_state", "update_recurrent_state"
"""They are given the tokens that a state is made of, or left out: a single token is written into a convolution's."""


def _state_bytes(layers: list[Any]) -> int:
    states = (getattr(layer, name, {}) for layer in layers for name in ("conv_states", "recurrent_states"))
    return sum(_tensor_bytes(list(each.values())) for each in states)


def _tensor_bytes(values: Any) -> int:
    several = values if isinstance(values, list | tuple) else [values]
    return sum(value.nbytes for value in several if isinstance(value, Tensor))


def storage_bytes(root: object) -> int:
    """Sum the storages that `held_bytes` counts, with the sizes that those of the meta device stand for."""
    storages = (tensor.untyped_storage() for tensor in reachable_tensors(root))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())  # noqa: SLF001  # its identity


@contextmanager
def without_padding() -> Iterator[None]:
    """Keep transformers from asking numbers whether a row is padded, or packs several sequences: here none is."""
    unpacked = mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None)
    unpadded = mock.patch("transformers.masking_utils.fast_all", return_value=True)
    with unpacked, unpadded:
        yield
