"""What a cache must leave as it is, since the columns of its row say so: the model, and the settings of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcache.caches.held_bytes import held_bytes, reachable_tensors
from kvcache.models.rotary import changing_tables


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """The model and the settings around a cache; equal as long as nobody changes them."""

    weights: tuple[tuple[object, ...], ...]
    buffers: tuple[tuple[object, ...], ...]
    """All but those of rotary tables that a forward changes by itself."""
    hooks: tuple[object, ...]
    global_hooks: tuple[object, ...]
    forwards: tuple[object, ...]
    config: str
    attention: str
    attention_functions: tuple[object, ...]
    mode: str
    threads: int
    default_dtype: torch.dtype
    default_device: torch.device
    precision: str
    kept_bytes: int
    """What is held by the model, its weights included."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Surroundings:
        """Look at `model` (reads every weight once) and at torch."""
        weights = ((weight.data_ptr(), weight.dtype, _digest(weight)) for weight in model.parameters())
        attention = model.config._attn_implementation  # noqa: SLF001  # transformers has no other name for it
        return cls(
            weights=tuple(weights),
            buffers=tuple(_buffers(model)),
            hooks=tuple(hook for part in model.modules() for hook in _hooks(part)),
            global_hooks=(
                *every_module._global_forward_pre_hooks.values(),  # noqa: SLF001  # torch has no other name for them
                *every_module._global_forward_hooks.values(),  # noqa: SLF001
            ),
            forwards=tuple(part.forward for part in model.modules()),
            config=repr(model.config.to_dict()),
            attention=attention,
            attention_functions=tuple(_attention_functions(attention)),
            mode="training" if model.training else "evaluation",
            threads=torch.get_num_threads(),
            default_dtype=torch.get_default_dtype(),
            default_device=torch.get_default_device(),
            precision=torch.get_float32_matmul_precision(),
            kept_bytes=held_bytes(model),
        )

    def changed(self, later: Surroundings) -> str | None:
        """Name the first thing that differs later, `kept_bytes` left aside; None where nothing does."""
        for name in (field.name for field in fields(self) if field.name != "kept_bytes"):
            before, after = getattr(self, name), getattr(later, name)
            if before != after:
                what = _WORDS[name]
                return f"{what} from {before} to {after}" if name in _SHORT else what
        return None


def _buffers(model: PreTrainedModel) -> Iterator[tuple[object, ...]]:
    changing = {id(part) for part in changing_tables(model)}
    for path, part in model.named_modules():
        if id(part) not in changing:
            for name, buffer in part.named_buffers(recurse=False):
                yield path, name, buffer.dtype, _digest(buffer)


def _hooks(part: nn.Module) -> Iterator[object]:
    yield from part._forward_pre_hooks.values()  # noqa: SLF001  # torch has no other name for them
    yield from part._forward_hooks.values()  # noqa: SLF001


def _attention_functions(name: str) -> Iterator[object]:
    """Yield what the models of transformers look up at each forward, and what `sdpa` calls."""
    registries: tuple[Any, ...] = ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS
    yield from (registry.get(name) for registry in registries)
    yield nn.functional.scaled_dot_product_attention


COLUMNS = 32749
"""A prime: elements that a row of a matrix lies apart from another are added up in different columns."""


def _digest(weight: Tensor) -> int:
    """Hash a weight's bits, of a large one the sums of each COLUMNS-th 8 bytes: one pass, as fast as adding all up.

    The order counts: no two different elements change places unseen, unless they lie COLUMNS or a multiple apart.
    """
    parts: list[Tensor] = []
    for tensor in reachable_tensors(weight):
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        flat = flat.clone() if flat.storage_offset() % 8 else flat
        whole = len(flat) // (8 * COLUMNS) * 8 * COLUMNS
        parts += [flat[:whole].view(torch.int64).view(-1, COLUMNS).sum(dim=0)] if whole else []
        parts += [flat[whole:]]
    return hash(tuple(part.cpu().numpy().tobytes() for part in parts))


_WORDS = {
    "weights": "the model's weights",
    "buffers": "the model's buffers",
    "hooks": "the hooks of the model's modules",
    "global_hooks": "torch's hooks of all modules",
    "forwards": "the forward of a module of the model",
    "config": "the model's config",
    "attention": "the model's attention",
    "attention_functions": "the functions that compute attention",
    "mode": "the model's mode",
    "threads": "torch's threads",
    "default_dtype": "torch's default dtype",
    "default_device": "torch's default device",
    "precision": "torch's precision of float32 products",
}
_SHORT = {"attention", "mode", "threads", "default_dtype", "default_device", "precision"}
"""Of which the values fit a line."""


def kept_in_model(model: PreTrainedModel, cache: object, before: Surroundings) -> int:
    """Count the bytes that the model holds now beyond `before`, without those that `cache` holds too."""
    return held_bytes([model, cache]) - held_bytes(cache, leaving_out=model) - before.kept_bytes
