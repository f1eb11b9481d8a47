"""SmolLM3: Llama with layers whose positions are not rotated, and a window in some."""

from __future__ import annotations

from typing import Any

from kvcache.compiled.architectures import llama, reading
from kvcache.compiled.decoder import Decoder


def describe(model: Any) -> Decoder:
    """Describe SmolLM3."""
    layers = []
    for block, window in zip(model.model.layers, reading.windows(model.config), strict=True):
        rotary = 0 if block.self_attn.use_rope else None
        layers.append(llama.layer(block, model.config)._replace(rotary=rotary, window=window))
    return llama.with_layers(model, tuple(layers))
