"""Operations counted while models run equal the formulas of costs.py, and each kind of extra work shows."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, PreTrainedModel

from kvcache.arithmetic.architectures import geometry
from kvcache.arithmetic.costs import Costs, Phase, phase_costs
from kvcache.proof.operations import OperationCounter, count_operations
from kvcache.strategies.cached import Cached, Dynamic, Static
from kvcache.strategies.hf_generate import HfGenerate
from kvcache.strategies.naive import Naive
from kvcache.strategies.strategy import Strategy, last_logits
from tests.arithmetic.test_costs import VARIANTS
from tests.tiny import ARCHITECTURES, VOCAB_SIZE, tiny

EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}
SIZES = {"batch_size": st.integers(1, 3), "n_prompt": st.integers(1, 12), "n_gen": st.integers(1, 5)}
DEPTHS = st.sampled_from([0, 0, 1, 3, 10])


@cache
def model_of(name: str, attn_implementation: str | None = None) -> PreTrainedModel:
    model = ARCHITECTURES[name]()
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    return model


@cache
def experts_model(name: str) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tiny(name, {**sizes, "num_key_value_heads": 2, **EXPERTS[name]})


def tokens(batch_size: int, n: int) -> Tensor:
    return torch.arange(batch_size * n).reshape(batch_size, n) * 7 % VOCAB_SIZE


def check(
    model: PreTrainedModel, kind: type[Strategy], batch_size: int, n_prompt: int, n_gen: int, n_depth: int
) -> None:
    """Run both phases of a strategy; every counter must equal its formula."""
    described = geometry(model.config)
    capacity = n_depth + n_prompt + n_gen
    strategy = kind(model)
    context, prompt, token = (tokens(batch_size, n).to(model.device) for n in (n_depth, n_prompt, 1))
    strategy.prepare(batch_size, capacity, context if n_depth else None)
    phases: dict[Phase, list[Callable[[], Tensor]]] = {
        "prefill": [lambda: strategy.prefill(prompt)],
        "decode": [lambda: strategy.decode(token)] * (n_gen - 1),
    }
    for phase, forwards in phases.items():
        held = []  # before each forward
        with count_operations(model) as counted:
            for forward in forwards:
                held.append(strategy.kv_bytes)
                forward()
        expected = phase_costs(
            described,
            phase,
            refeeds=not kind.reads_cache,
            batch_size=batch_size,
            n_prompt=n_prompt,
            n_gen=n_gen,
            n_depth=n_depth,
            dtype_bytes=model.dtype.itemsize,
        )
        if expected is None:
            assert counted.forward_calls == 0
            continue
        assert as_costs(counted, expected.bytes, strategy.kv_bytes) == expected
        assert counted.lm_head_positions == batch_size * len(forwards)
        if kind is Dynamic:
            assert counted.cache_growth_bytes == sum(held)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and lose much where other tests run beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def as_costs(counted: OperationCounter, unseen_bytes: int, kv_bytes: int) -> Costs:
    """What was counted, in the formulas' form; bytes moved are not counted and taken over."""
    return Costs(
        forward_calls=counted.forward_calls,
        tokens_processed=counted.tokens_processed,
        gemm_flops=counted.gemm_flops,
        gemv_flops=counted.gemv_flops,
        bytes=unseen_bytes,
        kv_bytes=kv_bytes,
    )


@pytest.mark.parametrize("kind", [Naive, Dynamic, HfGenerate])
@pytest.mark.parametrize("name", ARCHITECTURES)
@settings(max_examples=6, deadline=None)
@given(n_depth=DEPTHS, **SIZES)
def test_counted_equals_formula(name: str, kind: type[Strategy], **sizes: int) -> None:
    check(model_of(name), kind, **sizes)


@pytest.mark.parametrize("kind", [Naive, Dynamic])
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma3", "falcon"])
@settings(max_examples=3, deadline=None)
@given(n_depth=DEPTHS, **SIZES)
def test_eager_attention_counts_the_same(name: str, kind: type[Strategy], **sizes: int) -> None:
    check(model_of(name, "eager"), kind, **sizes)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str) -> None:
    model = tiny(*VARIANTS[name])
    for kind in (Naive, Dynamic):
        check(model, kind, batch_size=2, n_prompt=4, n_gen=4, n_depth=0)
        check(model, kind, batch_size=1, n_prompt=1, n_gen=4, n_depth=6)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", EXPERTS)
@settings(max_examples=3, deadline=None)
@given(n_depth=DEPTHS, **SIZES)
def test_experts(name: str, implementation: str, **sizes: int) -> None:
    model = experts_model(name)
    model.set_experts_implementation(implementation)
    for kind in (Naive, Dynamic):
        check(model, kind, **sizes)


@pytest.mark.parametrize("kind", [Naive, Dynamic])
def test_unfused_attention_is_seen_as_its_products(kind: type[Strategy]) -> None:
    with sdpa_kernel(SDPBackend.MATH):
        check(model_of("llama"), kind, batch_size=2, n_prompt=5, n_gen=4, n_depth=3)
        check(model_of("gpt2"), kind, batch_size=1, n_prompt=1, n_gen=4, n_depth=0)


def test_counts_with_gradients_on() -> None:
    model, ids = model_of("gpt2"), tokens(2, 5)
    counts = []
    for grad in (False, True):
        with torch.inference_mode(not grad), count_operations(model) as counted:
            last_logits(model, ids)
        counts.append((counted.gemm_flops, counted.gemv_flops))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", [Naive, Dynamic])
def test_bfloat16(kind: type[Strategy]) -> None:
    model = ARCHITECTURES["llama"]().to(torch.bfloat16)
    check(model, kind, batch_size=2, n_prompt=5, n_gen=4, n_depth=3)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_kernels_of_cuda_are_seen(name: str, dtype: torch.dtype) -> None:
    model = ARCHITECTURES[name]().to("cuda", dtype)
    for kind in (Naive, Dynamic):
        check(model, kind, batch_size=2, n_prompt=5, n_gen=4, n_depth=3)
        check(model, kind, batch_size=1, n_prompt=1, n_gen=12, n_depth=0)


def test_products_of_tables_are_not_counted() -> None:
    class Tables(torch.nn.Module):
        """As rotary embeddings were computed up to transformers 5.0: a matrix product of positions and frequencies."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("frequencies", torch.ones(1, 4, 1))

        def forward(self, positions: Tensor) -> Tensor:
            return self.frequencies @ positions

    def compute_tables(*_: Any) -> None:
        model.model.tables(torch.ones(1, 1, 3))

    model = ARCHITECTURES["llama"]()
    with torch.inference_mode(), count_operations(model) as without:
        last_logits(model, tokens(1, 3))
    model.model.add_module("tables", Tables())
    model.model.register_forward_pre_hook(compute_tables)
    with torch.inference_mode(), count_operations(model) as counted:
        last_logits(model, tokens(1, 3))
    assert (counted.gemm_flops, counted.gemv_flops) == (without.gemm_flops, without.gemv_flops)


def test_static_multiplies_its_padding() -> None:
    """Beyond what `Dynamic` computes: each query with every row of 20 that no token has filled yet."""
    one_row = 2 * 2 * 8 * 4 * 2  # multiply and add, of scores and of values, 8 features, 4 heads, 2 layers
    flops: dict[type[Cached], list[tuple[int, int]]] = {Static: [], Dynamic: []}
    for kind, of_phases in flops.items():
        strategy = kind(model_of("llama"))
        strategy.prepare(2, 20, tokens(2, 3))
        for forward, n_query in ((strategy.prefill, 5), (strategy.decode, 1), (strategy.decode, 1)):
            with count_operations(strategy.model) as counted:
                forward(tokens(2, n_query))
            of_phases.append((counted.gemm_flops, counted.gemv_flops))
    for static, dynamic, padding in zip(flops[Static], flops[Dynamic], ((5 * 12, 0), (0, 11), (0, 10)), strict=True):
        assert static == tuple(own + 2 * one_row * rows for own, rows in zip(dynamic, padding, strict=True))


def test_static_cache_does_not_grow() -> None:
    strategy = Static(model_of("gpt2"))
    strategy.prepare(2, 12)
    with count_operations(strategy.model) as counted:
        strategy.generate(tokens(2, 5), 5)
    assert counted.cache_growth_bytes == 0


def counts_of(kind: type[Cached]) -> dict[str, int]:
    strategy = kind(model_of("llama"))
    strategy.prepare(2, 12)
    with count_operations(strategy.model) as counted:
        strategy.generate(tokens(2, 4), 4)
    return {name: count for name, count in vars(counted).items() if type(count) is int and not name.startswith("_")}


class ExtraForward(Dynamic):
    def decode(self, ids: Tensor) -> Tensor:
        last_logits(self.model, ids)
        return super().decode(ids)


class ExtraLogits(Dynamic):
    def _forward(self, ids: Tensor) -> Tensor:
        logits = last_logits(self.model, ids, cache=self.kv.cache, n_past=self.length, keep=2)
        self.length += ids.shape[1]
        return logits[:, -1]


class TwiceGrown(Dynamic):
    def decode(self, ids: Tensor) -> Tensor:
        layer = self.kv.cache.layers[0]
        torch.cat([layer.keys, layer.keys[:, :, :1]], dim=-2)
        return super().decode(ids)


class Cloned(Dynamic):
    def decode(self, ids: Tensor) -> Tensor:
        cache = self.kv.cache
        assert isinstance(cache, DynamicCache)
        cache.layers[0].keys = cache.layers[0].keys.clone()
        return super().decode(ids)


@pytest.mark.parametrize(
    ("mutant", "raised"),
    [
        (
            ExtraForward,
            {"forward_calls", "tokens_processed", "gemm_flops", "gemv_flops", "lm_head_positions", "copied_bytes"},
        ),
        (ExtraLogits, {"gemm_flops", "lm_head_positions"}),
        (TwiceGrown, {"cache_growth_bytes", "copied_bytes"}),
        (Cloned, {"copied_bytes"}),
    ],
)
def test_each_kind_of_extra_work_shows(mutant: type[Cached], raised: set[str]) -> None:
    proper, more = counts_of(Dynamic), counts_of(mutant)
    assert {name for name in proper if more[name] != proper[name]} == raised
    assert all(more[name] > proper[name] for name in raised)


def test_nothing_is_counted_after_the_block() -> None:
    model = model_of("gpt2")
    with count_operations(model) as counted:
        pass
    last_logits(model, tokens(1, 3))
    assert (counted.forward_calls, counted.gemm_flops, counted.gemv_flops) == (0, 0, 0)
