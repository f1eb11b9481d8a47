"""GPT-2: learned positions, layer norms, no gate, `Conv1D` instead of linear layers."""

from __future__ import annotations

from typing import Any

from transformers.pytorch_utils import Conv1D

from kvcache.caches.contract import Unsupported
from kvcache.compiled.architectures import reading
from kvcache.compiled.decoder import Decoder, Head, Layer
from kvcache.compiled.mlp import Mlp
from kvcache.compiled.pages import leave_pages
from kvcache.compiled.products import Linear


def describe(model: Any) -> Decoder:
    """Describe GPT-2."""
    config, body = model.config, model.transformer
    if config.add_cross_attention:
        raise Unsupported("compiled has no cross-attention; this GPT-2 is configured with it")
    return Decoder(
        tokens=body.wte.weight,
        positions=body.wpe.weight,
        layers=tuple(_layer(block) for block in body.h),
        head=Head(reading.layer_norm(body.ln_f), reading.linear(model.lm_head)),
        activation=reading.activation(body.h[0].mlp.act),
    )


def _layer(block: Any) -> Layer:
    attention = block.attn
    return Layer(
        attention_norm=reading.layer_norm(block.ln_1),
        qkv=reading.rows(_conv(attention.c_attn), *[attention.split_size] * 3),
        split=reading.separate,
        o=_conv(attention.c_proj),
        mlp_norm=reading.layer_norm(block.ln_2),
        mlp=Mlp(gate=None, up=_conv(block.mlp.c_fc), down=_conv(block.mlp.c_proj)),
        kv_heads=attention.num_heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
    )


def _conv(module: Conv1D) -> Linear:
    """GPT-2 keeps `[in, out]`: its parameter is laid out anew so that a row of `[out, in]` is contiguous.

    A sum over the outer axis reads at 13 GB/s where one over the inner axis reads at 48. The model keeps its values and
    stays usable.
    """
    if type(module) is not Conv1D:
        raise Unsupported(f"compiled reads plain linear layers; this model has a {type(module).__name__}")
    original = module.weight.data
    transposed = original.t().contiguous()
    module.weight.data = transposed.t()
    leave_pages(original)
    return Linear(transposed, module.bias)
