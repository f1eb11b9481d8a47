"""GPT-NeoX: layer norms, rotary positions over a part of each head, one fused projection, both blocks in parallel."""

from __future__ import annotations

from typing import Any

from kvcache.compiled.architectures import reading
from kvcache.compiled.decoder import Decoder, Head, Layer
from kvcache.compiled.mlp import Mlp


def describe(model: Any) -> Decoder:
    """Describe GPT-NeoX (Pythia)."""
    body = model.gpt_neox
    return Decoder(
        tokens=body.embed_in.weight,
        layers=tuple(_layer(block, model.config) for block in body.layers),
        head=Head(reading.layer_norm(body.final_layer_norm), reading.linear(model.lm_head)),
        activation=reading.activation(body.layers[0].mlp.act),
        rotaries=(reading.rotary_table(body.rotary_emb),),
    )


def _layer(block: Any, config: Any) -> Layer:
    attention, mlp = block.attention, block.mlp
    return Layer(
        attention_norm=reading.layer_norm(block.input_layernorm),
        qkv=(reading.linear(attention.query_key_value),),
        split=reading.interleaved,
        o=reading.linear(attention.dense),
        mlp_norm=reading.layer_norm(block.post_attention_layernorm),
        mlp=Mlp(gate=None, up=reading.linear(mlp.dense_h_to_4h), down=reading.linear(mlp.dense_4h_to_h)),
        kv_heads=config.num_attention_heads,
        head_dim=attention.head_size,
        scale=attention.scaling,
        rotary=0,
        parallel=block.use_parallel_residual,
    )
