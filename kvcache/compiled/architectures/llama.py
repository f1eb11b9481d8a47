"""Llama and those that differ from it by a window, biases, or norms of queries and keys: Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from typing import Any

from kvcache.compiled.architectures import reading
from kvcache.compiled.decoder import Decoder, Head, Layer
from kvcache.compiled.experts import Experts
from kvcache.compiled.mlp import Mlp


def llama(model: Any) -> Decoder:
    """Describe Llama."""
    layers = tuple(layer(block, model.config) for block in model.model.layers)
    return with_layers(model, layers)


def mistral(model: Any) -> Decoder:
    """Describe Mistral: one window for all layers."""
    window = model.config.sliding_window
    layers = tuple(layer(block, model.config)._replace(window=window) for block in model.model.layers)
    return with_layers(model, layers)


def qwen(model: Any) -> Decoder:
    """Describe Qwen2 (biases) and Qwen3 (norms of each head's queries and keys): a window in some layers."""
    blocks = zip(model.model.layers, reading.windows(model.config), strict=True)
    return with_layers(model, tuple(layer(block, model.config)._replace(window=window) for block, window in blocks))


def layer(block: Any, config: Any, mlp: Mlp | Experts | None = None) -> Layer:
    """Describe one block of Llama; of the others, what they share with it. `mlp` replaces its feed-forward block."""
    attention = block.self_attn
    has_norms = hasattr(attention, "q_norm")
    return Layer(
        attention_norm=reading.rms_norm(block.input_layernorm),
        qkv=reading.projections(attention),
        split=reading.separate,
        q_norm=reading.rms_norm(attention.q_norm) if has_norms else None,
        k_norm=reading.rms_norm(attention.k_norm) if has_norms else None,
        o=reading.linear(attention.o_proj),
        mlp_norm=reading.rms_norm(block.post_attention_layernorm),
        mlp=mlp or reading.gated(block.mlp),
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        rotary=0,
    )


def with_layers(model: Any, layers: tuple[Layer, ...], activation: Any = None) -> Decoder:
    """Describe a model that is Llama outside its layers, whose activation may be in another place."""
    body = model.model
    return Decoder(
        tokens=body.embed_tokens.weight,
        layers=layers,
        head=Head(reading.rms_norm(body.norm), reading.linear(model.lm_head)),
        activation=reading.activation(activation or body.layers[0].mlp.act_fn),
        rotaries=(reading.rotary_table(body.rotary_emb),),
    )
