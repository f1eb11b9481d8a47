"""Tiny random models that keep more than keys and values, share layers, or change with the length: one per mechanism.

A prompt of a dozen tokens crosses what decides: windows and top-k of 8, chunks of 8, convolutions of 4.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny import llama_like, tiny

_SMALL = llama_like(num_hidden_layers=4)
_LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
_SHARED = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "sliding_window": 8,
    "head_dim": 8,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
}
_MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_DELTA = {
    **_LINEAR,
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

CONFIGS: dict[str, dict[str, Any]] = {
    # Recurrent states and convolutions beside keys and values, in one layer.
    "falcon_h1": {**_SMALL, **_MAMBA, "mamba_d_ssm": 64},
    "zaya": {
        **_SMALL,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "router_hidden_size": 16,
    },
    # In layers of their own.
    "qwen3_next": {**_SMALL, **_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": {**_SMALL, **_DELTA},
    "bamba": {**_SMALL, **_MAMBA, "attn_layer_indices": [1, 3]},
    "jamba": {
        **_SMALL,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "granitemoehybrid": {
        **_SMALL,
        **_MAMBA,
        "layer_types": ["mamba", "attention"] * 2,
        "num_local_experts": 4,
        "shared_intermediate_size": 16,
    },
    "lfm2": {**_SMALL, "layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8},
    "kimi_linear": {
        **_SMALL,
        **_LINEAR,
        **_LATENT,
        "q_lora_rank": None,
        "num_key_value_heads": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "nemotron_h": {
        **{name: value for name, value in _SMALL.items() if name != "num_hidden_layers"},
        "layers_block_type": ["mamba", "attention", "moe", "mlp"],
        "head_dim": 8,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "use_mamba_kernels": False,
    },
    # No keys and values at all.
    "falcon_mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4},
    # Layers that read what others keep.
    "gemma4_text": {**_SMALL, **_SHARED, "global_head_dim": 16},
    "gemma3n_text": {**_SMALL, **_SHARED, "laurel_rank": 4, "activation_sparsity_pattern": None},
    # An indexer's keys, which select what is attended to; compressed entries of several tokens.
    "deepseek_v32": {
        **_SMALL,
        **_LATENT,
        **_ROUTED,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "index_topk": 8,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "mlp_layer_types": ["dense"] + ["sparse"] * 3,
    },
    "deepseek_v4": {
        **_SMALL,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "sliding_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "sliding_window": 8,
        "q_lora_rank": 16,
        "o_lora_rank": 8,
        "o_groups": 2,
        "index_topk": 8,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_nextn_predict_layers": 0,
    },
    # Caches of another form, or none.
    "minimax": {**_SMALL, **_LINEAR, "num_local_experts": 4, "block_size": 8},
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "xlstm": {  # its cache rounds widths up to 64, its layers do not
        "hidden_size": 128,
        "embedding_dim": 128,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "qk_dim_factor": 0.5,
        "chunk_size": 8,
    },
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    # Masks of its own.
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "intermediate_size": 64,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 8,
        "max_position_embeddings": 128,
    },
    # Positions that begin after the padding's.
    "roberta": {**_SMALL, "num_key_value_heads": None, "is_decoder": True, "pad_token_id": 1},
    # Positions that change with the length.
    "phi3": {
        **_SMALL,
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "long_factor": [1.0, 2.0, 3.0, 4.0],
            "short_factor": [1.0] * 4,
            "original_max_position_embeddings": 16,
        },
    },
}


WHOLE = [
    "falcon_h1",
    "zaya",
    "qwen3_next",
    "qwen3_5_text",
    "bamba",
    "jamba",
    "granitemoehybrid",
    "lfm2",
    "kimi_linear",
    "nemotron_h",
    "mamba",
    "gemma4_text",
    "gemma3n_text",
]
"""Families that all four strategies measure, token for token."""


@functools.cache
def family(name: str) -> PreTrainedModel:
    """The tiny model of a family; the same object for equal names."""
    return tiny(name, CONFIGS[name])


def hybrid() -> PreTrainedModel:
    """The model of `py:tests.families:hybrid`: recurrent states beside keys and values."""
    return family("falcon_h1")


def dynamic_ntk() -> PreTrainedModel:
    """A Llama whose rotary table grows beyond 16 positions."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    return tiny("llama", {**_SMALL, "max_position_embeddings": 16, "rope_parameters": rope})


def seeing_the_future() -> list[PreTrainedModel]:
    """Decoders with attention in both directions: a Llama set so by hand, and what its config makes of a Gemma 3."""
    llama = tiny("llama", _SMALL)
    for layer in llama.model.layers:
        layer.self_attn.is_causal = False
    window = {"sliding_window": 8, "head_dim": 8, "query_pre_attn_scalar": 8, "use_bidirectional_attention": True}
    return [llama, tiny("gemma3_text", {**_SMALL, **window})]


def rounding_by_length(at_float32: Callable[[Tensor], object] | None = None) -> PreTrainedModel:
    """A Llama in bfloat16 whose logits are a fifth larger after an odd number of tokens, as products of other shapes
    round in another way; in float32 they are not, and `at_float32` is called with them.
    """
    model = tiny("llama", _SMALL, dtype=torch.bfloat16)

    def disturb(_model: object, _arguments: object, named: dict[str, Any], output: Any) -> None:
        if output.logits.dtype == torch.bfloat16:
            output.logits.mul_(1 + 0.2 * (named["input_ids"].shape[1] % 2))
        elif at_float32 is not None:
            at_float32(output.logits)

    model.register_forward_hook(disturb, with_kwargs=True)
    return model


def unrepeatable() -> PreTrainedModel:
    """A Llama that adds noise to its logits, other noise at each forward."""
    model = tiny("llama", _SMALL)

    def disturb(_model: object, _arguments: object, output: Any) -> None:
        output.logits.add_(torch.rand_like(output.logits))

    model.register_forward_hook(disturb)
    return model
