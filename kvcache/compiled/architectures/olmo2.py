"""OLMo 2: norms behind both blocks and none before them, and over all heads of queries and of keys."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvcache.compiled.architectures import llama, reading
from kvcache.compiled.decoder import Decoder, Layer, Norm


def describe(model: Any) -> Decoder:
    """Describe OLMo 2."""
    plain = llama.with_layers(model, tuple(_layer(block, model.config) for block in model.model.layers))
    return dataclasses.replace(plain, head=plain.head._replace(norm=_norm(model.model.norm)))


def _layer(block: Any, config: Any) -> Layer:
    attention = block.self_attn
    return Layer(
        qkv=reading.projections(attention),
        split=reading.separate,
        q_norm=_over_heads(attention.q_norm, attention.head_dim),
        k_norm=_over_heads(attention.k_norm, attention.head_dim),
        o=reading.linear(attention.o_proj),
        attention_output_norm=_norm(block.post_attention_layernorm),
        mlp=reading.gated(block.mlp),
        mlp_output_norm=_norm(block.post_feedforward_layernorm),
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        rotary=0,
    )


def _norm(module: Any) -> Norm:
    return reading.rms_norm(module)._replace(rounds_first=False)


def _over_heads(module: Any, head_dim: int) -> Norm:
    return _norm(module)._replace(weight=module.weight.view(-1, 1, head_dim), over=(-3, -1))
