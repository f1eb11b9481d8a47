"""Rotary tables that a forward changes: with dynamic NTK scaling a long sequence leaves a grown table behind.

The next, shorter sequence is then computed with that table until one falls below the original length (`transformers`,
modeling_rope_utils.py, dynamic_frequency_update). So that every repetition begins from the same state, each strategy
puts the tables back to what they were when the model was made.
"""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel


class RotaryTables:
    """The rotary embeddings of a model whose tables grow with the sequence; of most models, none."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Find them."""
        self._growing: list[tuple[Any, str]] = []
        """Modules, and what begins the names of a table's attributes: empty, or a type of layer."""
        self._growing.extend((module, prefix) for module, prefix, kind in _tables(model) if is_dynamic(kind))

    def make_original(self) -> None:
        """Put every table back to its original length."""
        for module, prefix in self._growing:
            original = getattr(module, f"{prefix}original_inv_freq").to(getattr(module, f"{prefix}inv_freq").device)
            module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def switches(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    """Yield the kind of each rotary table that changes with the longest sequence, and the tokens beyond which it does.

    The kinds are transformers' `rope_type`.
    """
    for module, prefix, kind in _tables(model):
        if is_dynamic(kind):
            yield kind, module.original_max_seq_len
        elif changes_with_length(kind):
            parameters = module.config.rope_parameters
            parameters = parameters[prefix.removesuffix("_")] if prefix else parameters
            yield kind, parameters["original_max_position_embeddings"]


def changing_tables(model: PreTrainedModel) -> Iterator[Any]:
    """Yield the rotary modules that a forward changes."""
    return (module for module, _, kind in _tables(model) if changes_with_length(kind))


def is_dynamic(rope_type: str) -> bool:
    """Return whether such a table grows with the sequence."""
    return "dynamic" in rope_type


def changes_with_length(rope_type: str) -> bool:
    """Return whether such a table grows, or is another beyond a length: as transformers' dynamic_rope_update asks."""
    return is_dynamic(rope_type) or rope_type == "longrope"


def _tables(model: PreTrainedModel) -> Iterator[tuple[Any, str, str]]:
    """Yield each rotary module with what begins the names of a table's attributes (empty, or a type of layer and _)."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        by_layer_type = kinds if isinstance(kinds, dict) else {"": kinds}
        for layer_type, kind in by_layer_type.items():
            if isinstance(kind, str):
                yield module, f"{layer_type}_" if layer_type else "", kind
