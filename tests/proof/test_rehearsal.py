"""What is rehearsed on the meta device is what runs: products and bytes of caches, for families of every mechanism."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from kvcache.arithmetic.architectures import geometry
from kvcache.arithmetic.costs import forward_costs
from kvcache.arithmetic.kv_bytes import Fed, Held
from kvcache.compiled.architectures.catalogue import describe
from kvcache.models.skeleton import skeleton
from kvcache.proof.operations import count_operations
from kvcache.proof.rehearsal import Rehearsal
from kvcache.proof.unknown_numbers import NotRehearsable
from kvcache.strategies.catalogue import STRATEGIES, build
from tests.families import WHOLE, family
from tests.studies.architecture_configs import shrunken
from tests.tiny import ARCHITECTURES, tiny, token_ids

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
SLIDING = {"sliding_window": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DELTA = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 16,
}


@cache
def rehearsal(model: PreTrainedModel) -> Rehearsal:
    return Rehearsal(skeleton(model.config, model.config._attn_implementation), model.dtype)


@cache
def odd(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model of a type without a family here; of 256 experts without weights 4 tell as much."""
    return shrunken(name, dtype, **({"zero_expert_num": 4} if name == "longcat_flash" else {}))


def ids(batch_size: int, n_tokens: int) -> torch.Tensor:
    return token_ids(1, batch_size, n_tokens)


def measured(model: PreTrainedModel, strategy: str, fed: Fed) -> Held:
    cached = build(strategy, model)
    context = ids(fed.batch_size, fed.n_depth) if fed.n_depth else None
    cached.prepare(fed.batch_size, fed.capacity, context, prompt_length=fed.n_depth + fed.n_prompt)
    cached.prefill(ids(fed.batch_size, fed.n_prompt))
    for _ in range(fed.n_steps):
        cached.decode(ids(fed.batch_size, 1))
    return Held(used=cached.kv_bytes, allocated=cached.kv_bytes_allocated)


DYNAMIC = [*WHOLE, "deepseek_v32", "deepseek_v4", "gpt_neo", "roberta", "phi3"]
STATIC = [name for name in DYNAMIC if name not in {"deepseek_v4", "gpt_neo"}]


@pytest.mark.parametrize(
    ("strategy", "name"), [("dynamic", name) for name in DYNAMIC] + [("static", name) for name in STATIC]
)
@settings(max_examples=2, deadline=None)
@given(
    batch_size=st.integers(1, 2),
    n_depth=st.sampled_from([0, 3, 8]),
    n_prompt=st.integers(1, 12),
    n_steps=st.integers(0, 3),
)
def test_bytes_are_those_measured(strategy: str, name: str, **lengths: int) -> None:
    model = family(name)
    fed = Fed(**lengths, capacity=sum(lengths.values()) - lengths["batch_size"] + 1, dtype_bytes=4)
    held, expected = rehearsal(model).held(strategy, fed), measured(model, strategy, fed)
    assert held.used == expected.used
    assert held.allocated == pytest.approx(expected.allocated, rel=0.01)


@pytest.mark.parametrize("name", [*DYNAMIC, "rwkv", "openai-gpt", "minimax"])
@settings(max_examples=2, deadline=None)
@given(batch_size=st.integers(1, 2), n_query=st.integers(1, 12), n_cached=st.sampled_from([None, 0, 1, 3, 10]))
def test_products_are_those_counted(name: str, batch_size: int, n_query: int, n_cached: int | None) -> None:
    model = family(name)
    reads_cache = n_cached is not None and name in DYNAMIC
    before = n_cached or 0
    strategy = build("dynamic" if reads_cache else "naive", model)
    strategy.prepare(batch_size, before + n_query + 1, ids(batch_size, before) if before and reads_cache else None)
    with count_operations(model) as counted:
        strategy.prefill(ids(batch_size, n_query))
    costs = rehearsal(model).forward_costs(
        batch_size=batch_size, n_query=n_query, n_cached=before if reads_cache else 0, reads_cache=reads_cache
    )
    assert (costs.gemm_flops, costs.gemv_flops) == (counted.gemm_flops, counted.gemv_flops)


def test_a_forward_that_makes_tensors_elsewhere_has_no_costs_and_the_reason() -> None:
    with pytest.raises(NotRehearsable, match="device"):
        rehearsal(family("xlnet")).forward_costs(batch_size=1, n_query=2, n_cached=0, reads_cache=False)


@pytest.mark.parametrize("reads_cache", [True, False])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "mixtral"])
def test_a_rehearsal_and_the_formulas_agree(name: str, reads_cache: bool) -> None:
    sizes = {**SIZES, "num_local_experts": 5, "num_experts_per_tok": 2}
    model = tiny("mixtral", sizes) if name == "mixtral" else ARCHITECTURES[name]()
    for batch_size, n_query, n_cached in ((2, 5, 0), (1, 1, 11), (2, 3, 9)):
        lengths = {"batch_size": batch_size, "n_query": n_query, "n_cached": n_cached if reads_cache else 0}
        rehearsed = rehearsal(model).forward_costs(**lengths, reads_cache=reads_cache)
        formula = forward_costs(geometry(model.config), **lengths, reads_cache=reads_cache)
        assert (rehearsed.gemm_flops, rehearsed.gemv_flops) == (formula.gemm_flops, formula.gemv_flops)
        assert rehearsed.bytes == formula.bytes


ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
LINEAR = {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}
PER_LAYER = {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8}

AFTER_39_TOKENS: dict[str, tuple[dict[str, Any], int, int]] = {
    "llama": ({}, 79_872, 79_872),
    "mistral": (SLIDING, 14_336, 16_384),
    "gemma3_text": (SLIDING | ALTERNATING, 47_104, 48_128),
    "gemma4_text": (
        SLIDING | ALTERNATING | PER_LAYER | {"global_head_dim": 32, "num_kv_shared_layers": 2},
        43_520,
        44_032,
    ),
    "gpt_oss": (SLIDING | ALTERNATING | {"num_local_experts": 4, "num_experts_per_tok": 2}, 47_104, 48_128),
    "deepseek_v3": (LATENT | {"num_key_value_heads": 4, "head_dim": 8, "first_k_dense_replace": 4}, 29_952, 29_952),
    "qwen3_next": (LINEAR | DELTA | EXPERTS, *[19_968 + 24_576 + 12_288] * 2),
    "jamba": ({"attn_layer_period": 2, "attn_layer_offset": 1}, *[39_936 + 32_768 + 8_192] * 2),
}
"""Model type -> its config beside `SIZES`, bytes used and allocated after 39 tokens of a batch of 2."""


@pytest.mark.parametrize("name", AFTER_39_TOKENS)
def test_bytes_after_39_tokens(name: str) -> None:
    config, used, allocated = AFTER_39_TOKENS[name]
    model = tiny(name, SIZES | config)
    fed = Fed(batch_size=2, n_depth=0, n_prompt=24, n_steps=15, capacity=40, dtype_bytes=4)
    for strategy in ("dynamic", "static"):
        assert rehearsal(model).held(strategy, fed) == measured(model, strategy, fed)
    held = rehearsal(model).held("dynamic", fed)
    assert held.used == used
    assert held.allocated == pytest.approx(allocated, rel=0.01)


BY_FORMULA = {
    ("llama", "dynamic"): (79_872, 79_872),
    ("mistral", "dynamic"): (14_336, 16_384 + 4 * 8),  # a window's length is a tensor
    ("gemma3_text", "dynamic"): (47_104, 48_128 + 2 * 8),
    ("llama", "static"): (79_872, 81_920 + 4 * 8),  # and in each layer a count of tokens
    ("mistral", "static"): (16_384, 16_384 + 4 * 8),
    ("gemma3_text", "static"): (48_128, 49_152 + 4 * 8),
}
"""Model type and kind -> bytes used and allocated after 39 tokens of a batch of 2, of a capacity of 40."""


@pytest.mark.parametrize(("name", "kind"), BY_FORMULA)
def test_formulas_after_39_tokens(name: str, kind: str) -> None:
    layers = geometry(tiny(name, SIZES | AFTER_39_TOKENS[name][0]).config).layers
    fed = Fed(batch_size=2, n_depth=0, n_prompt=24, n_steps=15, capacity=40, dtype_bytes=4)
    used, allocated = BY_FORMULA[name, kind]
    assert STRATEGIES[kind].formula.held(layers, fed) == Held(used=used, allocated=allocated)


BY_HAND: dict[str, tuple[dict[str, Any], dict[str, int], dict[str, int]]] = {
    # Queries by way of 16 numbers, to 4 heads of 8 and 8 rotary ones. Kept are 16 and a rotary key of 8, of which each
    # step makes keys and values of 4 heads anew. All feed-forward parts are dense.
    "deepseek_v3": (
        LATENT | {"num_key_value_heads": 4, "head_dim": 8, "first_k_dense_replace": 4},
        {
            "token": 4 * (64 * 16 + 16 * 64 + 64 * 24 + 32 * 64 + 3 * 64 * 64) + 64 * 97,
            "expanded": 4 * 16 * 64,
            "attended": 4 * 4 * (16 + 8),
        },
        {
            "read": 4 * (64 * 16 + 16 * 64 + 64 * 24 + 16 * 64 + 32 * 64 + 3 * 64 * 64) + 64 * 97,
            "vectors": 4 * (2 * 64 + 2 * 16) + 64,
            "rows": 4 * 24,
            "states": 0,
            "made": 4 * 64,
        },
    ),
    # Three layers of a delta rule (2 key and 4 value heads of 16, a convolution over 4 tokens of 128 features), whose
    # state 4 x 16 x 16 no product touches; one of attention with a gate as wide as the queries. Experts in all, 2 of 8
    # for each of two tokens, and a shared one with its gate.
    "qwen3_next": (
        LINEAR | DELTA | EXPERTS | {"num_experts": 8},
        {
            "token": 3 * (64 * 192 + 64 * 8 + 64 * 64)
            + (64 * 128 + 2 * 64 * 32 + 64 * 64)
            + 4 * (64 * 8 + (2 + 1) * 3 * 64 * 16 + 64)
            + 64 * 97,
            "expanded": 0,
            "attended": 1 * 4 * (16 + 16),
        },
        {
            "read": 3 * (64 * 192 + 64 * 8 + 64 * 64)
            + (64 * 128 + 2 * 64 * 32 + 64 * 64)
            + 4 * (64 * 8 + (4 + 1) * 3 * 64 * 16 + 64)
            + 64 * 97,
            "vectors": 3 * (128 * 4 + 4 + 4 + 16) + 2 * 16 + 4 * 2 * 64 + 64,
            "rows": 1 * 2 * 2 * 16,
            "states": 3 * (4 * 16 * 16 + 128 * 4),
            "made": 0,
        },
    ),
    # Layer 1 is dense; in the others each of two tokens goes to 2 of 8 experts.
    "qwen3_moe": (
        EXPERTS | {"num_experts": 8, "decoder_sparse_step": 1, "mlp_only_layers": [1]},
        {
            "token": 4 * (2 * 64 * 64 + 2 * 64 * 32) + 3 * 64 * 64 + 3 * (64 * 8 + 2 * 3 * 64 * 16) + 64 * 97,
            "expanded": 0,
            "attended": 4 * 4 * (16 + 16),
        },
        {
            "read": 4 * (2 * 64 * 64 + 2 * 64 * 32) + 3 * 64 * 64 + 3 * (64 * 8 + 4 * 3 * 64 * 16) + 64 * 97,
            "vectors": 4 * (2 * 64 + 2 * 16) + 64,
            "rows": 4 * 2 * 2 * 16,
            "states": 0,
            "made": 0,
        },
    ),
}
"""Model type -> its config beside `SIZES`; multiply-adds of a token, of a row that is made of a latent, and of a query
with a key and its value; and numbers read of matrices and of vectors, kept of a token, kept as states, and made anew of
each row."""


@pytest.mark.parametrize("name", BY_HAND)
def test_a_decode_step_by_hand(name: str) -> None:
    """Two sequences, of which 10 tokens are in the cache, and one is fed."""
    config, products, numbers = BY_HAND[name]
    model, batch_size, rows = tiny(name, SIZES | config), 2, 10 + 1
    costs = [rehearsal(model).forward_costs(batch_size=2, n_query=1, n_cached=10, reads_cache=True)]
    if name == "qwen3_moe":
        costs.append(forward_costs(geometry(model.config), batch_size=2, n_query=1, n_cached=10))
    beside_weights = batch_size * (
        64 + 97 + rows * numbers["rows"] + 2 * numbers["states"] + 2 * rows * numbers["made"]
    )
    for found in costs:
        assert found.gemm_flops == 2 * batch_size * (products["token"] + rows * products["expanded"])
        assert found.gemv_flops == 2 * batch_size * rows * products["attended"]
        assert found.bytes == 4 * (numbers["read"] + numbers["vectors"] + beside_weights)


def test_a_window_right_after_the_prompt_keeps_the_storage_of_all_of_it() -> None:
    fed = Fed(batch_size=2, n_depth=0, n_prompt=24, n_steps=0, capacity=40, dtype_bytes=4)
    row = 2 * 4 * 2 * 2 * 16 * 4  # batch, layers, keys and values, heads, head_dim, float32
    model = tiny("mistral", SIZES | SLIDING)
    held = rehearsal(model).held("dynamic", fed)
    assert held == measured(model, "dynamic", fed)
    assert (held.used, held.allocated) == (7 * row, pytest.approx(24 * row, rel=0.01))
    assert rehearsal(model).held("static", fed).used == 8 * row


def test_what_asks_for_numbers_or_refuses_is_named() -> None:
    fed = Fed(batch_size=1, n_depth=0, n_prompt=4, n_steps=0, capacity=8, dtype_bytes=4)
    with pytest.raises(NotRehearsable, match="minimax keeps its states in a form of its own"):
        rehearsal(family("minimax")).held("dynamic", fed)
    with pytest.raises(NotRehearsable, match="StaticCache has no layer for"):
        rehearsal(family("deepseek_v4")).held("static", fed)
    for reads_cache in (True, False):  # of its experts some have no weights: to multiply depends on who is chosen
        with pytest.raises(NotRehearsable, match=r"^its work depends on numbers that a rehearsal does not have$"):
            rehearsal(odd("longcat_flash")).forward_costs(
                batch_size=1, n_query=4, n_cached=2 * reads_cache, reads_cache=reads_cache
            )


ODD: list[tuple[str, str, torch.dtype]] = [
    ("static", "biogpt", torch.float32),  # asks for numbers
    ("dynamic", "longcat_flash", torch.bfloat16),
    ("static", "qwen4_exp_text", torch.bfloat16),
    ("dynamic", "qwen4_exp_text", torch.bfloat16),  # keeps positions in a view that shows each several times
    ("dynamic", "deepseek_v4", torch.bfloat16),  # keeps the bias of its compressor in float32
    ("dynamic", "dots3_note_text", torch.bfloat16),  # latents of another size where a layer slides
    ("dynamic", "jetmoe", torch.float32),  # splits rows by how many of them each expert gets
    ("static", "jetmoe", torch.bfloat16),
]


@pytest.mark.parametrize(("strategy", "name", "dtype"), ODD)
def test_bytes_of_odd_models_are_those_measured(strategy: str, name: str, dtype: torch.dtype) -> None:
    model = odd(name, dtype)
    rehearsed = Rehearsal(skeleton(model.config, model.config._attn_implementation, dtype), dtype)
    for n_steps in (0, 2):
        fed = Fed(batch_size=2, n_depth=5, n_prompt=9, n_steps=n_steps, capacity=17, dtype_bytes=dtype.itemsize)
        held, expected = rehearsed.held(strategy, fed), measured(model, strategy, fed)
        assert held.used == expected.used <= expected.allocated
        assert held.allocated == pytest.approx(expected.allocated, rel=0.01)


@pytest.mark.parametrize("name", ["biogpt", "bart", "jetmoe"])  # two ask whether a row is padded, one for its experts
def test_products_of_models_that_ask_for_numbers_are_those_counted(name: str) -> None:
    model = odd(name)
    for strategy, batch_size, n_query, n_cached in (("naive", 2, 5, 0), ("dynamic", 1, 4, 0), ("dynamic", 2, 1, 3)):
        made = build(strategy, model)
        made.prepare(batch_size, n_cached + n_query + 1, ids(batch_size, n_cached) if n_cached else None)
        with count_operations(model) as counted:
            made.prefill(ids(batch_size, n_query))
        costs = rehearsal(model).forward_costs(
            batch_size=batch_size, n_query=n_query, n_cached=n_cached, reads_cache=strategy == "dynamic"
        )
        assert (costs.gemm_flops, costs.gemv_flops) == (counted.gemm_flops, counted.gemv_flops)


def test_the_cache_of_jetmoe_by_hand() -> None:
    model = odd("jetmoe")
    config, fed = model.config, Fed(batch_size=2, n_depth=0, n_prompt=9, n_steps=3, capacity=13, dtype_bytes=4)
    row = config.num_hidden_layers * 2 * config.num_key_value_heads * config.kv_channels * 4
    assert rehearsal(model).held("dynamic", fed) == Held(used=2 * 12 * row, allocated=2 * 12 * row)


def _keeping(rows: Callable[[torch.Tensor], Any]) -> PreTrainedModel:
    """Make a model whose first layer keeps the rows that its numbers name."""
    model = skeleton(ARCHITECTURES["llama"]().config, "eager")

    def crop(_: object, args: object, named: dict[str, Any], result: object) -> None:
        layer = named["past_key_values"].layers[0]
        layer.keys = layer.keys[:, :, rows(named["input_ids"][0])]

    model.register_forward_hook(crop, with_kwargs=True)
    return model


@pytest.mark.parametrize(
    "rows",
    [
        lambda ids: slice(int(ids.argmax())),
        lambda ids: torch.nonzero(ids > 3)[:, 0],
    ],
    ids=["a number", "places"],
)
def test_a_cache_that_depends_on_numbers_is_not_rehearsed(rows: Callable[[torch.Tensor], Any]) -> None:
    fed = Fed(batch_size=1, n_depth=0, n_prompt=4, n_steps=0, capacity=8, dtype_bytes=4)
    with pytest.raises(NotRehearsable, match=r"^its cache depends on numbers that a rehearsal does not have$"):
        Rehearsal(_keeping(rows), torch.float32).held("dynamic", fed)
    assert Rehearsal(_keeping(lambda ids: slice(None)), torch.float32).held("dynamic", fed).used


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_a_scaled_embedding_needs_no_weights(model_type: str) -> None:
    bare = skeleton(shrunken(model_type).config, "eager")
    assert Rehearsal(bare, torch.bfloat16).refusal("compiled-int8") is None
    assert describe(bare).embedding == float(torch.tensor(32**0.5).bfloat16())


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("cache:tests.unfit_caches:scales_weights", None),  # it is not called: its weights have no values here
        ("cache:tests.unfit_caches:number", "is an int; valid: a function of the model"),
        ("cache:nowhere:make", "No module named 'nowhere'"),
    ],
)
def test_a_factory_is_imported_and_not_called(spec: str, reason: str | None) -> None:
    refusal = rehearsal(ARCHITECTURES["llama"]()).refusal(spec)
    assert refusal is None if reason is None else reason in str(refusal)


def test_any_other_failure_of_a_strategy_is_not_rehearsable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AttributeError("no such size")

    monkeypatch.setattr("kvcache.caches.dynamic.DynamicKV._empty", fail)
    with pytest.raises(NotRehearsable, match=r"AttributeError: no such size"):
        rehearsal(ARCHITECTURES["llama"]()).refusal("dynamic")
