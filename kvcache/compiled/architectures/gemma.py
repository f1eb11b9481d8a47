"""Gemma 2 and 3: norms before and behind both blocks, scaled embeddings, soft-caps, windows in some layers."""

from __future__ import annotations

from typing import Any

import torch

from kvcache.compiled.architectures import reading
from kvcache.compiled.decoder import Decoder, Head, Layer, Norm, RotaryTable


def gemma2(model: Any) -> Decoder:
    """Describe Gemma 2: attention scores have a soft-cap."""
    softcap = model.config.attn_logit_softcapping
    layers = tuple(layer._replace(softcap=softcap) for layer in _layers(model))
    return _decoder(model, layers, (reading.rotary_table(model.model.rotary_emb),))


def gemma3(model: Any) -> Decoder:
    """Describe Gemma 3: norms of queries and keys, a rotary table for each type of layer.

    Its config has a soft-cap of attention scores too, which transformers does not apply.
    """
    types = sorted(set(model.config.layer_types))
    layers = []
    for layer, block, kind in zip(_layers(model), model.model.layers, model.config.layer_types, strict=True):
        q_norm, k_norm = (_norm(norm) for norm in (block.self_attn.q_norm, block.self_attn.k_norm))
        layers.append(layer._replace(q_norm=q_norm, k_norm=k_norm, rotary=types.index(kind)))
    rotary = model.model.rotary_emb
    return _decoder(model, tuple(layers), tuple(reading.rotary_table(rotary, kind) for kind in types))


def _layers(model: Any) -> list[Layer]:
    config = model.config
    layers = []
    for block, window in zip(model.model.layers, reading.windows(config), strict=True):
        attention = block.self_attn
        layers.append(
            Layer(
                attention_norm=_norm(block.input_layernorm),
                qkv=reading.projections(attention),
                split=reading.separate,
                o=reading.linear(attention.o_proj),
                attention_output_norm=_norm(block.post_attention_layernorm),
                mlp_norm=_norm(block.pre_feedforward_layernorm),
                mlp=reading.gated(block.mlp),
                mlp_output_norm=_norm(block.post_feedforward_layernorm),
                kv_heads=config.num_key_value_heads,
                head_dim=attention.head_dim,
                scale=attention.scaling,
                rotary=0,
                window=window,
            )
        )
    return layers


def _decoder(model: Any, layers: tuple[Layer, ...], rotaries: tuple[RotaryTable, ...]) -> Decoder:
    body = model.model
    tokens = body.embed_tokens
    return Decoder(
        tokens=tokens.weight,
        layers=layers,
        head=Head(_norm(body.norm), reading.linear(model.lm_head), softcap=model.config.final_logit_softcapping),
        activation=reading.activation(body.layers[0].mlp.act_fn),
        rotaries=rotaries,
        # As transformers rounds it: the root of 3,072 is 55.5 in bfloat16.
        embedding=float(torch.tensor(tokens.scalar_embed_scale, device="cpu").to(tokens.weight.dtype)),
    )


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.eps, plus_one=True, rounds_first=False)
