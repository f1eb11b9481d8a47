"""Rotary tables that a forward changes: with dynamic NTK scaling a long sequence leaves a grown table behind.

The next, shorter sequence is then computed with that table until one falls below the original length (`transformers`,
modeling_rope_utils.py, dynamic_frequency_update). So that every repetition begins from the same state, each strategy
puts the tables back to what they were when the model was made.
"""

from typing import Any

from transformers import PreTrainedModel


class RotaryTables:
    """The rotary embeddings of a model whose tables grow with the sequence; of most models, none."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Find them."""
        self._growing: list[tuple[Any, str]] = []
        """Modules, and what begins the names of a table's attributes: empty, or a type of layer."""
        for module in model.modules():
            kinds = getattr(module, "rope_type", None)
            by_layer_type = kinds if isinstance(kinds, dict) else {"": kinds}
            for layer_type, kind in by_layer_type.items():
                if isinstance(kind, str) and "dynamic" in kind:
                    self._growing.append((module, f"{layer_type}_" if layer_type else ""))

    def make_original(self) -> None:
        """Put every table back to its original length."""
        for module, prefix in self._growing:
            original = getattr(module, f"{prefix}original_inv_freq").to(getattr(module, f"{prefix}inv_freq").device)
            module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
