"""Phi-3: Llama with fused projections, rotary positions over a part of each head, and a window for all layers."""

from __future__ import annotations

from typing import Any

from kvcache.compiled.architectures import llama, reading
from kvcache.compiled.decoder import Decoder, Layer
from kvcache.compiled.mlp import Mlp


def describe(model: Any) -> Decoder:
    """Describe Phi-3."""
    layers = tuple(_layer(block, model.config) for block in model.model.layers)
    return llama.with_layers(model, layers, model.model.layers[0].mlp.activation_fn)


def _layer(block: Any, config: Any) -> Layer:
    attention, kv_heads = block.self_attn, config.num_key_value_heads
    heads = (config.num_attention_heads, kv_heads, kv_heads)
    gate, up = reading.rows(reading.linear(block.mlp.gate_up_proj), *[config.intermediate_size] * 2)
    return Layer(
        attention_norm=reading.rms_norm(block.input_layernorm),
        qkv=reading.rows(reading.linear(attention.qkv_proj), *(n * attention.head_dim for n in heads)),
        split=reading.separate,
        o=reading.linear(attention.o_proj),
        mlp_norm=reading.rms_norm(block.post_attention_layernorm),
        mlp=Mlp(gate=gate, up=up, down=reading.linear(block.mlp.down_proj)),
        kv_heads=kv_heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        rotary=0,
        window=config.sliding_window,
    )
