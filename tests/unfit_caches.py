"""Factories that do what a user's own cache must not, and some that look odd and are right."""

import functools
import queue
import random
import tempfile
import threading
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from transformers import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache, PreTrainedModel, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def growing(model: PreTrainedModel) -> Cache:
    return DynamicCache(config=model.config)


def of_layers(model: PreTrainedModel, layer: type[DynamicLayer]) -> Cache:
    return Cache(layers=[layer() for _ in range(model.config.num_hidden_layers)])


number = 42
a_class = DynamicCache
by_name = functools.partial(growing)


class Mistaken(DynamicCache):
    """Takes a model, and fails at a line of its own."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(config=model.config.no_such_part)


filled_class = functools.partial(StaticCache, max_cache_len=20)


class Promising(DynamicCache):
    """A class is a factory too, if it takes a model."""

    promise = "exact"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(config=model.config)


def keywords_only(model: PreTrainedModel, *, capacity: int) -> Cache:
    return StaticCache(config=model.config, max_cache_len=capacity)


def positional_only(model: PreTrainedModel, capacity: int, /) -> Cache:
    return StaticCache(config=model.config, max_cache_len=capacity)


async def awaited(model: PreTrainedModel) -> Cache:
    return growing(model)


def class_itself(model: PreTrainedModel) -> type[Cache]:
    return DynamicCache


def legacy(model: PreTrainedModel) -> tuple[tuple[Tensor, Tensor], ...]:
    return ((torch.empty(0), torch.empty(0)),)


def nothing(model: PreTrainedModel) -> None:
    pass


def no_model() -> Cache:
    return DynamicCache()


def flavoured(model: PreTrainedModel, flavour: str) -> Cache:
    return growing(model)


def lists_promise(model: PreTrainedModel) -> Cache:
    return growing(model)


def promised(model: PreTrainedModel) -> Cache:
    return growing(model)


promised.promise = "exact"  # type: ignore[attr-defined]  # of a function
promised_partial = functools.partial(promised)


class Maker:
    promise = "exact"

    @classmethod
    def make(cls, model: PreTrainedModel) -> Cache:
        return growing(model)


promised_method = Maker.make
promised_bound = Maker().make
lists_promise.promise = ["exact"]  # type: ignore[attr-defined]


def for_encoders(model: PreTrainedModel) -> Cache:
    return EncoderDecoderCache(growing(model), growing(model))


# State that outlives the cache.

turns: list[Cache] = []


def taking_turns(model: PreTrainedModel) -> Cache:
    if len(turns) < 2:
        turns.append(growing(model))
    turns.reverse()
    return turns[0]


made_once: list[Cache] = []


def same_object(model: PreTrainedModel) -> Cache:
    made_once.extend([] if made_once else [growing(model)])
    return made_once[0]


layers: list[Any] = []


def shared_layers(model: PreTrainedModel) -> Cache:
    layers.extend([] if layers else growing(model).layers)
    return Cache(layers=layers)


class InModel(DynamicCache):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(config=model.config)
        self.model = model
        model.remembered = []  # type: ignore[assignment]  # a module takes any attribute

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.model.remembered.append((key_states, value_states))  # type: ignore[union-attr, operator]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class GlobalLayer(DynamicLayer):
    """Its tokens are in a dictionary of this module, which no attribute refers to."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        inner: DynamicLayer = globals_of_layers.setdefault(id(self), DynamicLayer())
        return inner.update(key_states, value_states)

    def get_seq_length(self) -> int:
        return globals_of_layers[id(self)].get_seq_length() if id(self) in globals_of_layers else 0


globals_of_layers: dict[int, DynamicLayer] = {}


def in_globals(model: PreTrainedModel) -> Cache:
    globals_of_layers.clear()
    return of_layers(model, GlobalLayer)


class PooledLayer(DynamicLayer):
    """Holds its last rows; the tokens are in a pool of its class."""

    pool: ClassVar[dict[int, DynamicLayer]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.last = key_states, value_states
        return self.pool.setdefault(id(self), DynamicLayer()).update(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.pool[id(self)].get_seq_length() if id(self) in self.pool else 0


def in_pool(model: PreTrainedModel) -> Cache:
    PooledLayer.pool.clear()
    return of_layers(model, PooledLayer)


class ThreadLayer(DynamicLayer):
    """Its tokens are in a variable of a thread."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of transformers
        self.length, self.asked, self.answered = 0, queue.Queue[Any](), queue.Queue[Any]()
        threading.Thread(target=serve, args=(self.asked, self.answered), daemon=True).start()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.asked.put((key_states, value_states))
        self.length += key_states.shape[2]
        states: tuple[Tensor, Tensor] = self.answered.get()
        return states

    def get_seq_length(self) -> int:
        return self.length


def serve(asked: queue.Queue[Any], answered: queue.Queue[Any]) -> None:
    inner = DynamicLayer()
    while True:
        answered.put(inner.update(*asked.get()))


def in_thread(model: PreTrainedModel) -> Cache:
    return of_layers(model, ThreadLayer)


# What a cache must leave as it is.


def scales_weights(model: PreTrainedModel) -> Cache:
    next(model.parameters()).data.mul_(1.01)  # by .data, torch counts no version
    return growing(model)


def casts(model: PreTrainedModel) -> Cache:
    model.half()
    return growing(model)


def sets_attention(model: PreTrainedModel) -> Cache:
    model.set_attn_implementation("eager")
    return growing(model)


def sets_config(model: PreTrainedModel) -> Cache:
    model.config.rms_norm_eps = 0.1
    return growing(model)


def scales_buffers(model: PreTrainedModel) -> Cache:
    model.model.rotary_emb.inv_freq.mul_(0.5)
    return growing(model)


def hooks_the_head(model: PreTrainedModel) -> Cache:
    model.lm_head.register_forward_hook(lambda _module, _arguments, logits: logits * 1.5)
    return growing(model)


def hooks_what_goes_in(model: PreTrainedModel) -> Cache:
    model.lm_head.register_forward_pre_hook(lambda _module, arguments: (arguments[0] * 1.5,))
    return growing(model)


def rounding_by_a_wrapper(model: PreTrainedModel) -> Cache:
    """Wraps `update` on the object, as libraries do."""
    cache = growing(model)
    inner = cache.update

    def update(key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return inner((key_states * 2).round() / 2, (value_states * 2).round() / 2, *args, **kwargs)

    cache.update = update  # type: ignore[method-assign]
    return cache


def of_a_local_class(model: PreTrainedModel) -> Cache:
    """Keeps a second copy of its rows in the dictionary of a class that no module knows."""

    class Copying(DynamicLayer):
        rows: ClassVar[dict[tuple[int, int], tuple[Tensor, Tensor]]] = {}

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.rows[id(self), self.get_seq_length()] = key_states.clone(), value_states.clone()
            return super().update(key_states, value_states, *args, **kwargs)

    return of_layers(model, Copying)


def swaps_rows(model: PreTrainedModel) -> Cache:
    weight = model.model.layers[0].self_attn.o_proj.weight
    weight.data[[0, 1]] = weight.data[[1, 0]]
    return growing(model)


def replaces_attention(model: PreTrainedModel) -> Cache:
    ALL_ATTENTION_FUNCTIONS["sdpa"] = functools.partial(ALL_ATTENTION_FUNCTIONS["sdpa"])
    return growing(model)


def hooks_every_module(model: PreTrainedModel) -> Cache:
    register_module_forward_hook(lambda _module, _arguments, result: result)
    return growing(model)


def patches_a_forward(model: PreTrainedModel) -> Cache:
    attention = model.model.layers[0].self_attn
    attention.forward = functools.partial(attention.forward)
    return growing(model)


class Fractional(DynamicCache):
    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return super().get_seq_length(layer_idx) / 1


def fractional(model: PreTrainedModel) -> Cache:
    return Fractional(config=model.config)


class Uncounted(DynamicCache):
    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return None


def sets_precision(model: PreTrainedModel) -> Cache:
    torch.set_float32_matmul_precision("medium")
    return growing(model)


def sets_device(model: PreTrainedModel) -> Cache:
    torch.set_default_device("meta")
    return growing(model)


def uncounted(model: PreTrainedModel) -> Cache:
    return Uncounted(config=model.config)


class Forgetful(DynamicCache):
    """It stores every row, and lets attention see the new ones alone."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return key_states, value_states


def forgetful(model: PreTrainedModel) -> Cache:
    return Forgetful(config=model.config)


def only_promised(model: PreTrainedModel) -> Cache:
    return forgetful(model)


only_promised.promise = "exact"  # type: ignore[attr-defined]


class Miscounting(DynamicCache):
    """Counts the tokens of a prompt twice once it was fed, so that positions of the steps are wrong."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(config=model.config)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 2 * int(super().get_seq_length(layer_idx))


class Legacy(DynamicCache):
    """Keeps lists as transformers 4 did, so that the masks of transformers 5 know of no earlier token."""

    def __init__(self) -> None:
        super().__init__()
        self.key_cache: list[Tensor] = []
        self.value_cache: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        if layer_idx == len(self.key_cache):
            self.key_cache.append(key_states)
            self.value_cache.append(value_states)
        else:
            self.key_cache[layer_idx] = torch.cat([self.key_cache[layer_idx], key_states], 2)
            self.value_cache[layer_idx] = torch.cat([self.value_cache[layer_idx], value_states], 2)
        return self.key_cache[layer_idx], self.value_cache[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.key_cache[layer_idx].shape[2] if layer_idx < len(self.key_cache) else 0


def with_lists(model: PreTrainedModel) -> Cache:
    return Legacy()


class Evicting(DynamicCache):
    """Returns the last rows alone, and does not say so."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys[:, :, -4:], values[:, :, -4:]


def evicting(model: PreTrainedModel) -> Cache:
    return Evicting(config=model.config)


class Counting(DynamicCache):
    """Counts tokens once for all layers, so that it is right when a model asks, before any layer was fed."""

    seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.seen += key_states.shape[2] if layer_idx == 0 else 0
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.seen + query_length, 0


def counting(model: PreTrainedModel) -> Cache:
    return Counting(config=model.config)


class Windowed(DynamicLayer):
    """Keeps the last four rows once attention has seen them, and says where they begin."""

    seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.seen += key_states.shape[2]
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = keys[:, :, -4:], values[:, :, -4:]
        return keys, values

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = self.keys.shape[2] if self.is_initialized else 0  # type: ignore[union-attr]  # there by then
        return held + query_length, self.seen - held


def windowed(model: PreTrainedModel) -> Cache:
    return of_layers(model, Windowed)


class WithoutOffset(Windowed):
    """Does the same, and says that its rows begin at the first position."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length)[0], 0


def without_offset(model: PreTrainedModel) -> Cache:
    return of_layers(model, WithoutOffset)


class Narrow(DynamicCache):
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values.half()


def narrow(model: PreTrainedModel) -> Cache:
    return Narrow(config=model.config)


class FirstSequence(DynamicCache):
    """Keeps the first sequence of a batch, to which torch would broadcast the others."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return super().update(key_states[:1], value_states[:1], layer_idx, *args, **kwargs)


def first_sequence(model: PreTrainedModel) -> Cache:
    return FirstSequence(config=model.config)


def one_layer(model: PreTrainedModel) -> Cache:
    return Cache(layers=[DynamicLayer()])


class Silent(DynamicCache):
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        super().update(key_states, value_states, layer_idx, *args, **kwargs)


def silent(model: PreTrainedModel) -> Cache:
    return Silent(config=model.config)


def trains(model: PreTrainedModel) -> Cache:
    model.train()
    return growing(model)


def sets_threads(model: PreTrainedModel) -> Cache:
    torch.set_num_threads(torch.get_num_threads() + 1)
    return growing(model)


class SetsThreads(DynamicCache):
    threads = torch.get_num_threads() + 1

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        torch.set_num_threads(self.threads)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def sets_threads_later(model: PreTrainedModel) -> Cache:
    return SetsThreads(config=model.config)


# Caches that hold their tokens in another way than transformers' own.


class ByChance(DynamicLayer):
    """Lets attention see values to which it adds noise, from every generator that has a global seed."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        chances = torch.randn(values.shape[2:]) * random.gauss(0, 1) * np.random.randn()  # noqa: NPY002  # global
        return keys, values + 10 * chances


def by_chance(model: PreTrainedModel) -> Cache:
    torch.rand(1)  # draws when it is made, too
    return of_layers(model, ByChance)


own_chances = torch.Generator().manual_seed(0)


class ByOwnChance(DynamicLayer):
    """Does the same from a generator of its own, which goes on from round to round."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values + 10 * torch.randn(values.shape[2:], generator=own_chances)


def by_own_chance(model: PreTrainedModel) -> Cache:
    return of_layers(model, ByOwnChance)


class Unlayered(Cache):
    """Overrides whatever a model calls, and has no layers."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx in self.held:
            keys, values = self.held[layer_idx]
            key_states, value_states = torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)
        self.held[layer_idx] = key_states, value_states
        return self.held[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.held[layer_idx][0].shape[2] if layer_idx in self.held else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + query_length, 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [False]

    is_linear = is_dummy = is_sliding


def unlayered(model: PreTrainedModel) -> Cache:
    return Unlayered()


class NumpyLayer(DynamicLayer):
    held: tuple[Any, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        new = key_states.numpy(), value_states.numpy()
        self.held = tuple(map(np.copy, new)) if not self.held else tuple(map(_joined, self.held, new))
        return torch.from_numpy(self.held[0]), torch.from_numpy(self.held[1])

    def get_seq_length(self) -> int:
        return int(self.held[0].shape[2]) if self.held else 0


def _joined(before: Any, new: Any) -> Any:
    return np.concatenate([before, new], axis=2)


def in_numpy(model: PreTrainedModel) -> Cache:
    return of_layers(model, NumpyLayer)


class MappedLayer(DynamicLayer):
    """Its tokens are in a map of a file, with room for `n_mapped` of each head."""

    n_mapped = 16
    pair: Any = None
    length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        batch_size, heads, n_new, size = key_states.shape
        if self.pair is None:
            shape = 2, batch_size, heads, self.n_mapped, size
            with tempfile.TemporaryFile() as file:
                self.pair = np.memmap(file, np.float32, "w+", shape=shape)
        self.pair[..., self.length : self.length + n_new, :] = torch.stack([key_states, value_states]).numpy()
        self.length += n_new
        keys, values = torch.from_numpy(self.pair[..., : self.length, :].copy())
        return keys, values

    def get_seq_length(self) -> int:
        return self.length


def in_map(model: PreTrainedModel) -> Cache:
    return of_layers(model, MappedLayer)


class ClosedLayer(DynamicLayer):
    """Its tokens are in a closure."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of transformers
        inner = DynamicLayer()

        def update(*states: Tensor) -> tuple[Tensor, Tensor]:
            return inner.update(*states)

        self.inner = update
        self.length = inner.get_seq_length

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.inner(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.length()


def in_closure(model: PreTrainedModel) -> Cache:
    return of_layers(model, ClosedLayer)


class SlottedLayer(DynamicLayer):
    __slots__ = ("pair",)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        new = key_states, value_states
        old = getattr(self, "pair", None)
        self.pair = new if old is None else tuple(torch.cat(both, 2) for both in zip(old, new, strict=True))
        return self.pair  # type: ignore[return-value]

    def get_seq_length(self) -> int:
        return int(self.pair[0].shape[2]) if hasattr(self, "pair") else 0


def in_slots(model: PreTrainedModel) -> Cache:
    return of_layers(model, SlottedLayer)


class CyclicCache(DynamicCache):
    """Refers to itself, as one does whose layers know it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(config=model.config)
        self.itself = self
