"""Mixtures of experts in Llama's or Qwen3's place of the feed-forward block: Mixtral, Qwen3-MoE."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvcache.caches.contract import Unsupported
from kvcache.compiled.architectures import llama, reading
from kvcache.compiled.decoder import Decoder
from kvcache.compiled.experts import Experts
from kvcache.compiled.mlp import Mlp
from kvcache.compiled.products import FEW_ROWS, Linear


def mixtral(model: Any) -> Decoder:
    """Describe Mixtral: every layer has experts."""
    return _with_blocks(model, [_experts(block.mlp, normalised=True, rounded=False) for block in model.model.layers])


def qwen3_moe(model: Any) -> Decoder:
    """Describe Qwen3-MoE: its config says which layers have experts."""
    return _with_blocks(
        model,
        [
            _experts(block.mlp, normalised=block.mlp.gate.norm_topk_prob, rounded=True)
            if hasattr(block.mlp, "experts")
            else reading.gated(block.mlp)
            for block in model.model.layers
        ],
    )


def _with_blocks(model: Any, blocks: list[Mlp | Experts]) -> Decoder:
    window = model.config.sliding_window
    layers = tuple(
        llama.layer(block, model.config, mlp)._replace(window=window)
        for block, mlp in zip(model.model.layers, blocks, strict=True)
    )
    mlp = model.model.layers[0].mlp
    activation = getattr(mlp, "experts", mlp).act_fn
    return dataclasses.replace(llama.with_layers(model, layers, activation), most_sequences=FEW_ROWS)


def _experts(module: Any, *, normalised: bool, rounded: bool) -> Experts:
    experts, router = module.experts, module.gate
    if type(experts).__module__ != type(module).__module__:
        raise Unsupported(
            f"compiled reads experts as transformers keeps them; this model has a {type(experts).__name__}"
        )
    return Experts(
        router=Linear(router.weight),
        gate_up=experts.gate_up_proj,
        down=experts.down_proj,
        per_token=router.top_k,
        normalised=normalised,
        rounded=rounded,
    )
