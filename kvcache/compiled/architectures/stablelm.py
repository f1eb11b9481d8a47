"""StableLM: layer norms, rotary positions over a part of each head, and optionally both blocks in parallel."""

from __future__ import annotations

from typing import Any

import torch

from kvcache.compiled.architectures import reading
from kvcache.compiled.decoder import Decoder, Head, Layer, Norm


def describe(model: Any) -> Decoder:
    """Describe StableLM."""
    body = model.model
    return Decoder(
        tokens=body.embed_tokens.weight,
        layers=tuple(_layer(block) for block in body.layers),
        head=Head(reading.layer_norm(body.norm), reading.linear(model.lm_head)),
        activation=reading.activation(body.layers[0].mlp.act_fn),
        rotaries=(reading.rotary_table(body.rotary_emb),),
    )


def _layer(block: Any) -> Layer:
    attention, parallel = block.self_attn, block.use_parallel_residual
    attention_norm = reading.layer_norm(block.input_layernorm)
    has_norms = attention.qk_layernorm
    return Layer(
        attention_norm=attention_norm,
        qkv=reading.projections(attention),
        split=reading.separate,
        q_norm=_by_head(attention.q_layernorm) if has_norms else None,
        k_norm=_by_head(attention.k_layernorm) if has_norms else None,
        o=reading.linear(attention.o_proj),
        mlp_norm=attention_norm if parallel else reading.layer_norm(block.post_attention_layernorm),
        mlp=reading.gated(block.mlp),
        kv_heads=attention.num_key_value_heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        rotary=0,
        parallel=parallel,
    )


def _by_head(module: Any) -> Norm:
    """Read a layer norm for each head. Their weights are copied side by side: one head's worth of numbers each."""
    norms = module.norms
    weights = torch.stack([norm.weight for norm in norms]).unsqueeze(1)
    return Norm(weights, norms[0].eps, centred=True, rounds_first=False)
