"""Every causal language model of transformers, shrunken so that a dozen tokens cross what decides.

Windows, chunks and top-k are 8, convolutions 4, the longrope switch is at 14. Most types follow from one list of sizes
under the names that configs use; the others have a row of their own here or in tests/families.py.
"""

import re
from dataclasses import fields
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.families import CONFIGS
from tests.tiny import INIT_STD, VOCAB_SIZE, tiny

TYPES: list[str] = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Model types that AutoModelForCausalLM knows."""

LARGEST = 20_000_000
"""Parameters that a model may have; larger ones take minutes to make and to run."""
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LAYERS, _HEADS, _WIDTH, _HEAD_DIM, _STATE, _WINDOW, _POSITIONS = 4, 4, 32, 8, 8, 8, 256
_SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"], _LAYERS
    ),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"], _HEADS),
    **dict.fromkeys(["num_key_value_heads", "num_global_key_value_heads", "swa_num_key_value_heads"], 2),
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "dim", "embedding_dim", "embedding_size"], _WIDTH),
    **dict.fromkeys(["word_embed_proj_dim", "lru_width", "attention_hidden_size"], _WIDTH),
    **dict.fromkeys(["head_dim", "d_head", "d_kv", "kv_channels", "swa_head_dim", "rotary_dim"], _HEAD_DIM),
    **dict.fromkeys(["intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "d_ff"], 64),
    **dict.fromkeys(["d_inner", "feed_forward_size", "ffn_intermediate_size"], 64),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"], _POSITIONS),
    "original_max_position_embeddings": _POSITIONS,
    **dict.fromkeys(["sliding_window", "window_size", "attention_window_size", "attention_chunk_size"], _WINDOW),
    **dict.fromkeys(["local_attention_window_len", "floor_scale"], _WINDOW),
    **dict.fromkeys(["chunk_size", "mamba_chunk_size", "block_size", "index_topk"], _WINDOW),
    # Mixtures of experts.
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"], 16),
    **dict.fromkeys(["expert_intermediate_size", "moe_shared_expert_intermediate_size", "router_hidden_size"], 16),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    "router_num_experts": 4,
    **dict.fromkeys(["num_experts_per_tok", "moe_topk"], 2),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "n_group", "topk_group", "moe_layer_freq"], 1),
    "first_k_dense_replace": 1,
    "moe_latent_size": None,
    # Latents and indexers.
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "index_head_dim"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "o_lora_rank"], _HEAD_DIM),
    **dict.fromkeys(["index_n_heads", "o_groups"], 2),
    # Recurrent states and convolutions.
    **dict.fromkeys(["mamba_d_state", "state_size", "ssm_state_size"], _STATE),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "linear_num_value_heads", "linear_num_heads"], 4),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim"], 16),
    "mamba_d_ssm": 64,
    **dict.fromkeys(["mamba_n_groups", "n_groups"], 1),
    "mamba_expand": 2,
    **dict.fromkeys(["mamba_dt_rank", "time_step_rank", "laurel_rank"], 4),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"], _HEAD_DIM),
    "linear_num_key_heads": 2,
    **dict.fromkeys(["conv_kernel", "conv_kernel_size", "mamba_d_conv"], 4),
    # Which layer is what.
    **dict.fromkeys(["attn_layer_period", "expert_layer_period", "layer_group_size"], 2),
    **dict.fromkeys(["attn_layer_offset", "expert_layer_offset"], 1),
    "max_window_layers": 0,
    "use_sliding_window": True,
    "num_kv_shared_layers": 2,
    "num_nextn_predict_layers": 0,
    # The rest.
    "is_decoder": True,
    "hidden_size_global": _WIDTH,
    "encoder_hash_byte_group_vocab": 97,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": _HEAD_DIM,
    "global_head_dim": 16,
    "swa_num_attention_heads": 4,
    "query_pre_attn_scalar": _HEAD_DIM,
    "tie_word_embeddings": False,
}
_SWITCH = 14
"""Tokens beyond which longrope takes its other table: more than a prompt, fewer than a prompt and its steps."""
_KIN = {"gemma4_unified_text": "gemma4_text"}
"""Types that take another one's row in tests/families.py."""


def _longrope(**more: float) -> dict[str, Any]:
    """Return a rotary table that switches, for heads of `_HEAD_DIM`."""
    n_frequencies = _HEAD_DIM // 2
    return {
        "original_max_position_embeddings": _SWITCH,
        "partial_rotary_factor": 1.0,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "long_factor": [1.0 + number for number in range(n_frequencies)],
            "short_factor": [1.0] * n_frequencies,
            "original_max_position_embeddings": _SWITCH,
            "partial_rotary_factor": 1.0,
            **more,
        },
    }


_EVERY_OTHER_FULL = ["sliding_attention", "full_attention"] * 2
_INKLING: dict[str, Any] = {
    "layer_types": ["hybrid_sliding", "hybrid"] * 2,
    **dict.fromkeys(["rel_extent", "log_scaling_n_floor"], _WINDOW),
}
_ROBERTA = ("camembert", "data2vec-text", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl")
_ROWS: dict[str, dict[str, Any]] = {
    **{name: {"pad_token_id": 1} for name in _ROBERTA},  # positions are counted from it
    "xmod": {"pad_token_id": 1, "default_language": "en_XX"},
    "blt": {
        "patcher_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    },
    "cohere_compass_text": {
        "layer_types": _EVERY_OTHER_FULL,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        },
    },
    "cpmant": {"dim_head": 8, "dim_ff": 64, "prompt_length": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "doge": {"keep_window_size": _WINDOW // 2},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "head_dim": 16,
        "shared_experts_intermediate_size": 16,
        "sliding_window": 8,
        **dict.fromkeys(["swa_num_attention_heads", "swa_num_key_value_heads"], 4),
        **dict.fromkeys(["swa_q_lora_rank", "swa_kv_lora_rank", "swa_head_dim"], 16),
        **dict.fromkeys(["swa_qk_nope_head_dim", "swa_v_head_dim"], 8),
    },
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["dense"] * _LAYERS,
        "adapter_in_dim": _WIDTH,
        "adapter_out_dim": _WIDTH,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": _WIDTH, "adapter_out_dim": _WIDTH},
    "gemma3": {
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": _WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": _HEADS,
        }
    },
    "gemma3_text": {"layer_types": _EVERY_OTHER_FULL},
    "gemma4_unified": {"vision_config": dict.fromkeys(["mm_embed_dim", "output_proj_dims"], _WIDTH)},
    "inkling_text": {**_INKLING, "swa_num_key_value_heads": 4},
    "inkling2_text": {**_INKLING, "n_layers_per_attn_res_block": 2},
    "laguna": {"layer_types": _EVERY_OTHER_FULL, "num_attention_heads_per_layer": [8, 4] * 2},
    "mamba2": {"head_dim": 16},  # 4 heads of 16 are twice the hidden size
    "mellum": {"layer_types": _EVERY_OTHER_FULL},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "modernbert-decoder": {"local_attention": 2 * _WINDOW},  # its layers take half
    "phi3": _longrope(),
    "phi4_multimodal": _longrope(),
    "phimoe": _longrope(short_mscale=1.0, long_mscale=1.2),
    # Its attention sees the embeddings again, beside what the layer before made of them.
    "zamba": {"attention_hidden_size": 2 * _WIDTH, "head_dim": 2 * _WIDTH // _HEADS},
    "prophetnet": {"pad_token_id": 0},
    "qwen2_moe": {"max_window_layers": _LAYERS},  # here the first so many layers have one
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "hc_count": 2,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 97,
        "split_ngram_parts": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "use_mamba_kernels": False, "num_key_value_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "llama4_text": {"intermediate_size_mlp": 64},
    "xlm": {"pad_token_id": 0},  # rows are measured by counting what is not padding
    # Its cache rounds widths up to 64, its layers do not.
    "xlstm": {"qk_dim_factor": 0.5, "hidden_size": 128, "embedding_dim": 128},
}


def shrunken(model_type: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A tiny random model of any type in `TYPES`; raises whatever transformers raises where it cannot be made.

    `overrides` replace entries of its config.

    Raises:
        ValueError: it would not be tiny: no row shrinks its vision or audio.
    """
    geometry = _geometry(CONFIG_MAPPING[model_type]) | overrides
    with torch.device("meta"):
        size = tiny(model_type, geometry).num_parameters()
    if size > LARGEST:
        raise ValueError(f"the study has no shrunken config for it: {size:,} parameters")
    model = tiny(model_type, geometry, dtype=dtype)
    _draw_scores(model)
    return _as_loaded(model, dtype)


def _draw_scores(model: PreTrainedModel) -> None:
    """Draw what begins at zero and multiplies the scores of a selection: all keys would have the same one."""
    draws = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if model.config.model_type == "doge" and name.endswith("self_attn.A"):
            torch.nn.init.normal_(weight, std=INIT_STD, generator=draws)


def _as_loaded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Bring to float32 what from_pretrained keeps in it (routers, mostly); from_config makes all in `dtype`."""
    kept = model._get_dtype_plan(dtype)  # there is no public way to ask
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and any(re.search(each.replace("*", ".*"), name) for each in kept):
            tensor.data = tensor.data.float()
    return model


def _geometry(config: type[PretrainedConfig]) -> dict[str, Any]:
    """What the type's row says, or the sizes that its config has a name for, each once; the same for its parts."""
    if given := CONFIGS.get(_KIN.get(config.model_type, config.model_type)):
        return {**given, **_ROWS.get(config.model_type, {})}
    other_names: dict[str, str] = getattr(config, "attribute_map", {})
    types = {field.name: str(field.type) for field in fields(config)}
    named = {name: size for name, size in _SIZES.items() if name in types or name in other_names}
    sizes = {name: size for name, size in named.items() if other_names.get(name) not in named}
    if "kv_lora_rank" in sizes and "num_key_value_heads" in sizes:  # latents are expanded to one head per query head
        sizes["num_key_value_heads"] = _HEADS
    for token in _SPECIAL_TOKENS:
        if token in types:
            sizes[token] = 0 if types[token] in {"int", "<class 'int'>"} else None
    parts = {name: part for name, part in config.sub_configs.items() if part is not AutoConfig}
    for name, part in parts.items():
        sizes[name] = {**_geometry(part), "vocab_size": VOCAB_SIZE}
    return {**sizes, **_ROWS.get(config.model_type, {})}
