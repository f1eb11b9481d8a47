"""Tiny random models of every architecture that `compiled` takes, in which every term of its formula matters.

Norms' weights are away from 1 (Gemma's: from 0), biases from 0, multipliers from 1; soft-caps are of the scores' and
logits' own size; windows are shorter than any prompt.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import PreTrainedModel

from kvcache.models.random_weights import cast_parameters
from tests.tiny import MAX_POSITIONS, SLIDING_WINDOW, llama_like, tiny

_SMALL = llama_like(num_hidden_layers=4)
_HALF_WINDOWED = {"sliding_window": SLIDING_WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
_GEMMA = {**_SMALL, **_HALF_WINDOWED, "head_dim": 16, "query_pre_attn_scalar": 4, "final_logit_softcapping": 3.0}
_STABLELM = {**_SMALL, "use_qkv_bias": True}
_NEOX = {name: value for name, value in _SMALL.items() if name != "num_key_value_heads"}


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1_000.0, **parameters}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": MAX_POSITIONS}),
    "llama": ("llama", _SMALL),
    "llama, biases and scaled positions": (
        "llama",
        {
            **_SMALL,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
        },
    ),
    "mistral": ("mistral", {**_SMALL, "sliding_window": SLIDING_WINDOW}),
    "qwen2": (
        "qwen2",
        {**_SMALL, "use_sliding_window": True, "sliding_window": SLIDING_WINDOW, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {**_SMALL, "head_dim": 16, "use_sliding_window": True, **_HALF_WINDOWED}),
    "phi3": (
        "phi3",
        {**_SMALL, "sliding_window": SLIDING_WINDOW, "rope_parameters": _rope(partial_rotary_factor=0.5)},
    ),
    "gemma2": ("gemma2", {**_GEMMA, "attn_logit_softcapping": 2.0, "attention_bias": True}),
    "gemma3": (
        "gemma3_text",
        {
            **_GEMMA,
            "attn_logit_softcapping": 2.0,  # not applied by transformers
            "rope_parameters": {
                "full_attention": _rope(rope_type="linear", factor=8.0),
                "sliding_attention": _rope(rope_theta=50.0),
            },
        },
    ),
    "olmo2": ("olmo2", {**_SMALL, "attention_bias": True}),
    "granite": (
        "granite",
        {
            **_SMALL,
            "mlp_bias": True,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.5,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
        },
    ),
    "smollm3": (
        "smollm3",
        {**_SMALL, "no_rope_layers": [1, 1, 0, 0], "use_sliding_window": True, **_HALF_WINDOWED},
    ),
    "stablelm": ("stablelm", {**_STABLELM, "partial_rotary_factor": 0.5}),
    "stablelm, parallel": ("stablelm", {**_STABLELM, "use_parallel_residual": True, "qk_layernorm": True}),
    "gpt_neox": ("gpt_neox", {**_NEOX, "rope_parameters": _rope(partial_rotary_factor=0.25)}),
    "mixtral": (
        "mixtral",
        {**_SMALL, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": SLIDING_WINDOW},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **_SMALL,
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 16,
            "decoder_sparse_step": 2,
            "norm_topk_prob": False,
        },
    ),
    "qwen3_moe, all experts": (
        "qwen3_moe",
        {
            **_SMALL,
            "head_dim": 16,
            "num_experts": 3,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 16,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
        },
    ),
    "gpt_neox, sequential": ("gpt_neox", {**_NEOX, "use_parallel_residual": False, "hidden_act": "relu"}),
}
"""Name -> (model type, config)."""

CHOOSING = ("mixtral", "qwen3_moe")
"""Families that choose among experts: in bfloat16 another last bit is another expert, in correct paths too."""
MARGIN = 0.2
"""Between the router's logits of the last expert chosen and of the next one, at every position, in bfloat16's models.

Rounding moves such a logit by some 0.02.
"""


@functools.cache
def family(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a family; the same object for equal arguments."""
    model = tiny(*FAMILIES[name])
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    if name in CHOOSING and dtype == torch.bfloat16:
        _decide(model)
    return cast_parameters(model, dtype)


def _decide(model: PreTrainedModel) -> None:
    """Make every choice of experts a clear one, of which a token's parity decides the order.

    The first feature is large in the embeddings, with the parity's sign, and no block adds to it. Routers see it, and
    little of the others.
    """
    weights = dict(model.named_parameters())
    table = weights["model.embed_tokens.weight"]
    table[:, 0] = 12.0
    table[1::2, 0] = -12.0
    weights["lm_head.weight"][:, 0] = 0
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0
        elif name.endswith("experts.down_proj"):
            weight[:, 0] = 0
        elif name.endswith("post_attention_layernorm.weight"):
            weight[0] = 1
        elif name.endswith("mlp.gate.weight"):
            n_experts = weight.shape[0]
            order = torch.randperm(n_experts, generator=torch.Generator().manual_seed(n_experts))
            weight.mul_(0.05)
            weight[:, 0] = 0.5 * (order - (n_experts - 1) / 2)
