"""The formats of the fast path's cache: what is stored comes back, attention over it is attention, and its bytes."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from kvcache.caches.contract import Unsupported
from kvcache.compiled import int4_rows, int8_rows
from kvcache.compiled.int4_rows import Int4Rows
from kvcache.compiled.int8_rows import Int8Rows
from kvcache.compiled.kernels import attend_to_rows
from kvcache.compiled.quantized import CompiledInt4, CompiledInt8
from kvcache.compiled.rows import CHUNK, ExactRows, Rows
from kvcache.compiled.strategy import Compiled
from kvcache.strategies.tolerance import TOLERANCE
from tests.tiny import ARCHITECTURES, VOCAB_SIZE

FORMATS: list[type[Rows]] = [ExactRows, Int8Rows, Int4Rows]
STRATEGIES = [Compiled, CompiledInt8, CompiledInt4]
BATCH, KV_HEADS, GROUP, CHUNKS, HEAD_DIM = 2, 3, 2, 3, 64
LENGTH = 2 * CHUNK + 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(rows_of: type[Rows], k: Tensor, v: Tensor) -> Rows:
    rows = rows_of.empty(k, k.shape[0], k.shape[1], CHUNKS, k.shape[3])
    at = torch.arange(k.shape[2])
    rows.write(at // CHUNK, at % CHUNK, k, v)
    return rows


@pytest.mark.parametrize("module", [int8_rows, int4_rows])
@given(seed=st.integers(0, 2**31), exponent=st.integers(-30, 30), head_dim=st.sampled_from([8, 32, 64, 80, 128]))
def test_integers_are_the_nearest_to_what_they_stand_for(
    module: ModuleType, seed: int, exponent: int, head_dim: int
) -> None:
    rows = random(3, head_dim, seed=seed) * 2.0**exponent
    words, scales = module.quantise(rows)
    steps = scales.float()[:, None]
    nearest = (rows / steps).round().clamp(-module.LEVELS, module.LEVELS)
    assert torch.equal(module.PACKING.unpack(words), nearest)
    # int4 may cut the largest, where all others gain by it.
    assert rows.abs().amax(-1).div(steps[:, 0]).le(module.LEVELS / min(int4_rows.SHARES) + 0.1).all()


@given(seed=st.integers(0, 2**31), head_dim=st.sampled_from([8, 64, 80]))
def test_mixed_rows_have_the_products_of_the_rows_and_come_back(seed: int, head_dim: int) -> None:
    rows, others = random(2, 3, head_dim, seed=seed)
    torch.testing.assert_close(int4_rows.mixed(int4_rows.mixed(rows)), rows)
    torch.testing.assert_close(
        int4_rows.mixed(rows) @ int4_rows.mixed(others).mT, rows @ others.mT, rtol=1e-4, atol=1e-4
    )
    one = torch.zeros(head_dim).index_fill(0, torch.tensor(seed % head_dim), 1.0)
    assert int4_rows.mixed(one).abs().max() == pytest.approx(8**-0.5)


@given(seed=st.integers(0, 2**31))
def test_balanced_features_lose_least_for_their_queries(seed: int) -> None:
    """The loss that `balance` states, against that of other factors; features that are zero have a finite one."""
    queries, keys = random(2, 1, 1, 1, HEAD_DIM, seed=seed).exp()

    def loss(factors: Tensor) -> Tensor:
        return (queries / factors**2).sum() * (keys * factors**2).sum()

    factors = int4_rows.balance(queries, keys)
    assert loss(factors) <= loss(torch.ones_like(factors))
    assert loss(factors) <= loss(factors * random(HEAD_DIM, seed=seed + 1).mul(0.1).exp())
    for asked in (torch.zeros_like(queries), 100 * queries):
        assert int4_rows.balance(asked, torch.zeros_like(keys)).isfinite().all()
    assert int4_rows.balance(torch.zeros_like(queries), keys).isfinite().all()


@pytest.mark.parametrize("n_prompt", [1, 2, 3, 7])
def test_a_few_tokens_of_a_prompt_balance_nothing(n_prompt: int) -> None:
    """Of two keys, mean and first one leave rounding alone; factors made of that would be those of all keys to come."""
    keys = random(BATCH, KV_HEADS, n_prompt, HEAD_DIM, seed=2)
    queries = random(BATCH, KV_HEADS * GROUP, n_prompt, HEAD_DIM, seed=1)
    rows = Int4Rows.empty(keys, BATCH, KV_HEADS, CHUNKS, HEAD_DIM)
    rows.begin([queries], [keys])
    assert torch.equal(rows.key_factors, torch.ones_like(rows.key_factors))
    assert rows.key_means.any()


@pytest.mark.parametrize("rows_of", FORMATS)
def test_a_row_of_zeros_comes_back_as_zeros(rows_of: type[Rows]) -> None:
    zeros = torch.zeros(1, 1, 3, HEAD_DIM)
    for part in filled(rows_of, zeros, zeros).plain(3):
        assert torch.equal(part, zeros)


@pytest.mark.parametrize("head_dim", [HEAD_DIM, 80, 256])
@pytest.mark.parametrize("rows_of", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_over_rows_is_attention_to_what_they_hold(
    rows_of: type[Rows], dtype: torch.dtype, head_dim: int
) -> None:
    q = random(BATCH, KV_HEADS * GROUP, 1, head_dim, seed=1).to(dtype) * (HEAD_DIM / head_dim) ** 0.5
    k, v = (random(BATCH, KV_HEADS, LENGTH, head_dim, seed=seed).to(dtype) for seed in (2, 3))
    rows = filled(rows_of, k, v)
    held = [part.to(dtype) for part in rows.plain(LENGTH)]
    seen = (torch.arange(CHUNKS * CHUNK) < LENGTH).view(CHUNKS, CHUNK)
    expected = functional.scaled_dot_product_attention(q, *held, scale=1.0, enable_gqa=True)
    error = (attend_to_rows(q, rows, seen, scale=1.0) - expected).abs().max()
    assert error <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize(
    ("rows_of", "head_dim", "largest", "typical"),
    [
        *((ExactRows, head_dim, 0.0, 0.0) for head_dim in (HEAD_DIM, 128)),
        *((Int8Rows, head_dim, 0.02, 0.01) for head_dim in (HEAD_DIM, 128)),
        (Int4Rows, HEAD_DIM, 0.6, 0.12),
        (Int4Rows, 128, 0.7, 0.12),
    ],
)
def test_a_row_comes_back_near_to_what_was_written(
    rows_of: type[Rows], head_dim: int, largest: float, typical: float
) -> None:
    """Rows of a normal distribution. int4 may cut a row's largest number, where all others gain by it."""
    k, v = (random(BATCH, KV_HEADS, LENGTH, head_dim, seed=seed) for seed in (2, 3))
    for part, written in zip(filled(rows_of, k, v).plain(LENGTH), (k, v), strict=True):
        assert (part - written).abs().max() <= largest
        assert (part - written).square().mean().sqrt() <= typical


@pytest.mark.parametrize("rows_of", FORMATS)
def test_keys_far_from_zero_in_some_features_lose_no_more_than_others(rows_of: type[Rows]) -> None:
    """As rotary keys are, and as the first one is. int4's scale is that of the rest; scores are of the whole keys."""
    far = 20 * random(1, KV_HEADS, 1, HEAD_DIM, seed=4)
    k, v = (random(BATCH, KV_HEADS, LENGTH, HEAD_DIM, seed=seed) for seed in (2, 3))
    k[:, :, 0] *= 30
    queries = random(BATCH, KV_HEADS * GROUP, LENGTH, HEAD_DIM, seed=5)
    rows = rows_of.empty(k, BATCH, KV_HEADS, CHUNKS, HEAD_DIM)
    rows.begin(queries.split(CHUNK, dim=2), (k + far).split(CHUNK, dim=2))
    at = torch.arange(LENGTH)
    rows.write(at // CHUNK, at % CHUNK, k + far, v)
    keys, _ = rows.plain(LENGTH)
    error = (keys - (k + far)).square().mean(-1).sqrt()
    assert error[:, :, 1:].mean() <= {ExactRows: 0, Int8Rows: 0.2, Int4Rows: 0.15}[rows_of]
    assert error[:, :, 0].max() <= {ExactRows: 0, Int8Rows: 0.6, Int4Rows: 0.25}[rows_of]
    queries = random(BATCH, KV_HEADS, GROUP, HEAD_DIM, seed=1)
    scores = rows.scores(queries).flatten(-2)[..., :LENGTH]
    torch.testing.assert_close(scores, queries @ keys.mT, rtol=1e-4, atol=1e-2)


def test_a_prompt_of_one_token_knows_nothing_of_keys_before() -> None:
    model = ARCHITECTURES["llama"]()
    strategy = CompiledInt4(model, backend="eager")
    strategy.prepare(1, 40)
    one = torch.tensor([[3]])
    with torch.compiler.set_stance("force_eager"):
        fresh = strategy.generate(one, 6)
        strategy.reset()
        strategy.generate(torch.arange(1, 31)[None], 3)
        assert strategy.stored[0].key_means.any()  # type: ignore[index]
        strategy.reset()
        assert torch.equal(strategy.generate(one, 6), fresh)
        assert not strategy.stored[0].key_means.any()  # type: ignore[index]
        assert not strategy.stored[0].key_firsts.any()  # type: ignore[index]
        assert (strategy.stored[0].key_factors == 1).all()  # type: ignore[index]


@pytest.mark.parametrize("rows_of", FORMATS)
def test_a_prompt_sees_its_own_rows_as_they_were_written(rows_of: type[Rows]) -> None:
    k, v = (random(BATCH, KV_HEADS, LENGTH, HEAD_DIM, seed=seed) for seed in (2, 3))
    rows, start = filled(rows_of, k, v), CHUNK + 7
    for part, plain, written in zip(
        rows.with_own(start, k[:, :, start:], v[:, :, start:]), rows.plain(LENGTH), (k, v), strict=True
    ):
        assert torch.equal(part[:, :, :start], plain[:, :, :start])
        assert torch.equal(part[:, :, start:], written[:, :, start:])


@pytest.mark.parametrize(("rows_of", "share"), [(ExactRows, 1.0), (Int8Rows, 0.258), (Int4Rows, 0.148)])
def test_bytes_of_a_head_of_64_features_in_float32(rows_of: type[Rows], share: float) -> None:
    like = torch.zeros(1)
    allocated = sum(part.nbytes for part in rows_of.empty(like, 1, KV_HEADS, CHUNKS, HEAD_DIM))
    assert allocated / (2 * KV_HEADS * CHUNKS * CHUNK * HEAD_DIM * 4) == pytest.approx(share, abs=0.001)


@pytest.mark.parametrize("rows_of", [Int8Rows, Int4Rows])
def test_a_head_that_does_not_fill_words_is_refused(rows_of: type[Rows]) -> None:
    with pytest.raises(Unsupported, match="heads have 6"):
        rows_of.empty(torch.zeros(1), 1, 1, CHUNKS, 6)


@pytest.mark.parametrize("strategy_of", STRATEGIES)
def test_a_second_round_emits_what_the_first_did(strategy_of: type[Compiled]) -> None:
    """Traced for the format that has most parts; test_strategy.py goes twice through the exact rows, compiled."""
    model = ARCHITECTURES["mistral"]()
    generator = torch.Generator().manual_seed(0)
    context, prompt = (torch.randint(VOCAB_SIZE, (2, n), generator=generator) for n in (CHUNK - 3, 9))
    strategy = strategy_of(model, backend="eager")
    logits: list[list[Tensor]] = []
    with torch.compiler.set_stance("default" if strategy_of is CompiledInt4 else "force_eager"):
        strategy.prepare(2, CHUNK + 20, context)
        for _ in range(2):
            strategy.reset()
            seen: list[Tensor] = []
            strategy.generate(prompt, 8, lambda _, step, seen=seen: seen.append(step.clone()))
            logits.append(seen)
    assert all(map(torch.equal, *logits))


@pytest.mark.usefixtures("untraced")  # its prefill is not compiled
def test_a_prompt_that_attends_to_rows_as_stored_sees_their_rounding() -> None:
    model = ARCHITECTURES["llama"]()
    prompt = torch.randint(VOCAB_SIZE, (1, 30), generator=torch.Generator().manual_seed(0))
    first = []
    for as_stored in (False, True):
        for strategy_of in (Compiled, CompiledInt4):
            strategy = strategy_of(model, backend="eager", prefill_as_stored=as_stored)
            strategy.prepare(1, 40)
            first.append(strategy.prefill(prompt))
    exact, own, exact_as_stored, rounded = first
    torch.testing.assert_close(own, exact)
    torch.testing.assert_close(exact_as_stored, exact)
    assert not torch.allclose(rounded, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.compiled
@pytest.mark.parametrize("strategy_of", [CompiledInt8, CompiledInt4])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_step_computes_what_the_eager_one_does(
    strategy_of: type[Compiled], architecture: str, dtype: torch.dtype
) -> None:
    model = ARCHITECTURES[architecture]().to(dtype)
    prompt = torch.randint(VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(0))
    forced = torch.randint(VOCAB_SIZE, (2, 8), generator=torch.Generator().manual_seed(1))
    logits: list[Tensor] = []
    for backend in ("eager", "inductor"):
        strategy = strategy_of(model, backend=backend)
        strategy.prepare(2, 40)
        seen: list[Tensor] = []
        strategy.generate(prompt, 8, lambda _, step, seen=seen: seen.append(step.float()), forced=forced)
        logits.append(torch.stack(seen))
    assert (logits[0] - logits[1]).abs().max() <= TOLERANCE[dtype] * logits[0].abs().max()
