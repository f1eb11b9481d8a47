"""The arithmetic: against models' own counts, hand-made examples, and itself."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.arithmetic.architectures import UnknownGeometry, geometry
from kvcache.arithmetic.costs import Costs, Phase, forward_costs, parameters, phase_costs
from kvcache.arithmetic.geometry import Experts, Geometry, Layer
from tests.tiny import ARCHITECTURES, tiny

LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama with biases": ("llama", {**LLAMA_LIKE, "attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "qwen2": ("qwen2", LLAMA_LIKE),
    "phi3": ("phi3", LLAMA_LIKE),
    "gemma2": ("gemma2", {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 4}),
    "mixtral": ("mixtral", {**LLAMA_LIKE, "num_local_experts": 3}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **LLAMA_LIKE,
            "head_dim": 8,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "mlp_only_layers": [1],
        },
    ),
    "gpt2 tied": ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "tie_word_embeddings": True}),
    "opt projected": ("opt", {"hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 16}),
    "opt bare": (
        "opt",
        {
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_attention_heads": 4,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "do_layer_norm_before": False,
        },
    ),
    "gpt_neox": ("gpt_neox", {**LLAMA_LIKE, "attention_bias": False}),
    "falcon grouped": (
        "falcon",
        {"hidden_size": 32, "num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True},
    ),
    "falcon serial": (
        "falcon",
        {"hidden_size": 32, "num_attention_heads": 4, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "falcon alibi": ("falcon", {"hidden_size": 32, "num_attention_heads": 4, "alibi": True}),
    "phi": ("phi", {**LLAMA_LIKE, "qk_layernorm": True}),
    "smollm3 (not known by name)": ("smollm3", LLAMA_LIKE),
}

ONE_LAYER = Geometry(
    vocab_size=10,
    hidden_size=4,
    embedding_size=4,
    layers=(Layer(heads=2, kv_heads=1, head_dim=2, linears=((4, 8), (4, 4)), vectors=5),),
    vectors=3,
    tied=True,
    max_positions=None,
)
"""Small enough to count by hand: 48 weights and 5 others in its layer, 3 others, and a 10 x 4 table."""


def test_needs_no_torch() -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers']))"
    subprocess.run(
        [sys.executable, "-c", f"{blocked}; import kvcache.arithmetic.architectures, kvcache.arithmetic.costs"],
        check=True,
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_equal_the_models_own(name: str) -> None:
    model = ARCHITECTURES[name]()
    assert parameters(geometry(model.config)) == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_of_variants(name: str) -> None:
    model_type, sizes = VARIANTS[name]
    model = tiny(model_type, sizes)
    described = geometry(model.config)
    assert parameters(described) == sum(weight.numel() for weight in model.parameters())


def test_layers_of_one_kind_are_counted_together() -> None:
    config = ARCHITECTURES["gemma3"]().config
    assert [(layer.count, layer.window) for layer in geometry(config).layers] == [(2, 8), (2, None)]


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"model_type": "nemotron", "hidden_act": "relu2"}, "hidden_act is not silu"),
        ({"model_type": "deepseek_v3", "hidden_act": "silu", "n_routed_experts": 8}, "with n_routed_experts"),
        ({"model_type": "gpt2", "vocab_size": 10}, "gpt2: its config has no hidden_size"),
        ({"model_type": "llama", **LLAMA_LIKE, "layer_types": ["linear_attention"]}, "layers of type linear_attention"),
    ],
)
def test_unknown_architectures_are_refused_in_one_line(attributes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnknownGeometry, match=reason) as refusal:
        geometry(SimpleNamespace(**attributes))
    assert "\n" not in str(refusal.value)


def test_a_decode_step_by_hand() -> None:
    step = forward_costs(ONE_LAYER, batch_size=1, n_query=1, n_cached=6, dtype_bytes=1)
    # 48 weights, 7 keys and values of 2 heads x 2 numbers, and the head's 10 x 4; each a multiply-add
    assert step.gemv_flops == 2 * (48 + 7 * 2 * (2 + 2) + 40)
    assert step.gemm_flops == 0
    # all weights, one row of the table, 7 rows of keys and values in one head, 10 logits
    assert step.bytes == (48 + 5 + 3 + 40) + 4 + 7 * 2 * 2 + 10
    assert step.kv_bytes == 7 * 2 * 2


def test_a_batched_step_is_gemm_but_for_attention() -> None:
    step = forward_costs(ONE_LAYER, batch_size=3, n_query=1, n_cached=6, dtype_bytes=2)
    assert step.gemm_flops == 3 * 2 * (48 + 40)
    assert step.gemv_flops == 3 * 2 * 7 * 2 * (2 + 2)
    assert step.bytes == 2 * ((48 + 5 + 3 + 40) + 3 * (4 + 7 * 2 * 2 + 10))


def test_without_a_cache_nothing_is_read_from_one_and_nothing_kept() -> None:
    fed = forward_costs(ONE_LAYER, batch_size=1, n_query=7, n_cached=0, dtype_bytes=1, reads_cache=False)
    assert (fed.gemm_flops, fed.gemv_flops) == (2 * (7 * 48 + 7 * 7 * 2 * (2 + 2)), 2 * 40)
    assert fed.bytes == (48 + 5 + 3 + 40) + 7 * 4 + 10
    assert fed.kv_bytes == 0


def test_untied_and_learned_positions_by_hand() -> None:
    model = replace(ONE_LAYER, tied=False, position_rows=20)
    step = forward_costs(model, batch_size=1, n_query=1, n_cached=0, dtype_bytes=1)
    tied = forward_costs(ONE_LAYER, batch_size=1, n_query=1, n_cached=0, dtype_bytes=1)
    assert step.bytes == tied.bytes + 4, "a row of each table is looked up, neither table is read"
    assert parameters(model) == parameters(ONE_LAYER) + 40 + 20 * 4


def test_experts_are_read_as_far_as_tokens_can_touch_them() -> None:
    experts = Experts(count=8, per_token=2, linears=((4, 6), (6, 4)))
    model = replace(ONE_LAYER, layers=(replace(ONE_LAYER.layers[0], experts=experts),))
    for tokens, touched in ((1, 2), (3, 6), (4, 8), (50, 8)):
        args: dict[str, Any] = {"batch_size": tokens, "n_query": 1, "n_cached": 0, "dtype_bytes": 1}
        with_experts, without = forward_costs(model, **args), forward_costs(ONE_LAYER, **args)
        assert with_experts.bytes - without.bytes == touched * 48
        assert with_experts.flops - without.flops == 2 * tokens * 2 * 48


def test_a_window_bounds_keys_and_bytes() -> None:
    model = replace(ONE_LAYER, layers=(replace(ONE_LAYER.layers[0], window=4),))
    near, far = (forward_costs(model, batch_size=1, n_query=1, n_cached=n, dtype_bytes=1) for n in (3, 1000))
    assert near == far
    assert far.kv_bytes == 3 * 2 * 2
    chunk = forward_costs(model, batch_size=1, n_query=5, n_cached=1000, dtype_bytes=1)
    assert chunk.gemm_flops == 2 * (5 * 48 + 5 * (3 + 5) * 2 * (2 + 2))


@given(
    refeeds=st.booleans(),
    batch_size=st.integers(1, 3),
    n_prompt=st.integers(1, 9),
    n_gen=st.integers(1, 9),
    n_depth=st.integers(0, 9),
)
def test_tokens_and_calls_follow_the_contract(
    refeeds: bool, batch_size: int, n_prompt: int, n_gen: int, n_depth: int
) -> None:
    def phase(name: Phase) -> Costs | None:
        return phase_costs(
            ONE_LAYER,
            name,
            refeeds=refeeds,
            batch_size=batch_size,
            n_prompt=n_prompt,
            n_gen=n_gen,
            n_depth=n_depth,
            dtype_bytes=4,
        )

    prefill, decode = phase("prefill"), phase("decode")
    assert prefill is not None
    assert prefill.forward_calls == 1
    assert prefill.tokens_processed == batch_size * (n_prompt + (n_depth if refeeds else 0))
    if n_gen == 1:
        assert decode is None
        return
    assert decode is not None
    lengths = [n_depth + n_prompt + step for step in range(1, n_gen)] if refeeds else [1] * (n_gen - 1)
    assert (decode.forward_calls, decode.tokens_processed) == (n_gen - 1, batch_size * sum(lengths))
    assert decode.kv_bytes == (0 if refeeds else batch_size * (n_depth + n_prompt + n_gen - 1) * 2 * 2 * 4)


def test_all_logits_cost_the_head_at_every_position() -> None:
    args: dict[str, Any] = {
        "refeeds": True,
        "batch_size": 2,
        "n_prompt": 5,
        "n_gen": 3,
        "n_depth": 1,
        "dtype_bytes": 1,
    }
    last, every = (phase_costs(ONE_LAYER, "decode", **args, all_logits=which) for which in (False, True))
    assert last is not None
    assert every is not None
    more_positions = 2 * (6 + 7)  # steps feed 7 and 8 tokens
    assert every.flops - last.flops == more_positions * 2 * 40
    assert every.bytes - last.bytes == more_positions * 10
