"""The formats of the fast path's cache: what is stored comes back, attention over it is attention, and its bytes."""

from __future__ import annotations

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


@given(seed=st.integers(0, 2**31), exponent=st.integers(-30, 30), head_dim=st.sampled_from([8, 32, 64, 80, 128]))
def test_integers_are_the_nearest_to_what_they_stand_for(seed: int, exponent: int, head_dim: int) -> None:
    rows = random(3, head_dim, seed=seed) * 2.0**exponent
    words, scales = int8_rows.quantise(rows)
    back = int8_rows.PACKING.unpack(words) * scales.float()[:, None]
    assert ((back - rows).abs() <= 0.51 * scales.float()[:, None]).all()
    groups = int4_rows.groups_of(head_dim)
    words, scales, offsets = int4_rows.quantise(rows, groups)
    integers = int4_rows.packing_of(groups).unpack(words)
    by_group = integers.unflatten(-1, (groups, -1)) * scales.float().unsqueeze(-1) + offsets.float().unsqueeze(-1)
    # The offset is rounded to 8 bits: a group far from zero loses that much at its ends.
    allowed = 0.51 * scales.float().abs() + offsets.float().abs() / 256
    assert ((by_group - rows.unflatten(-1, (groups, -1))).abs() <= allowed.unsqueeze(-1)).all()


@pytest.mark.parametrize("rows_of", FORMATS)
def test_a_row_of_zeros_comes_back_as_zeros(rows_of: type[Rows]) -> None:
    zeros = torch.zeros(1, 1, 3, HEAD_DIM)
    for part in filled(rows_of, zeros, zeros).plain(3):
        assert torch.equal(part, zeros)


@pytest.mark.parametrize("head_dim", [HEAD_DIM, 128, 256])  # 2, 4 and 8 groups of int4
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


@pytest.mark.parametrize(("rows_of", "error"), [(ExactRows, 0.0), (Int8Rows, 0.02), (Int4Rows, 0.25)])
def test_a_row_comes_back_near_to_what_was_written(rows_of: type[Rows], error: float) -> None:
    """Rows of a normal distribution: the largest error is half a step, which is what a format is made for."""
    k, v = (random(BATCH, KV_HEADS, LENGTH, HEAD_DIM, seed=seed) for seed in (2, 3))
    for part, written in zip(filled(rows_of, k, v).plain(LENGTH), (k, v), strict=True):
        assert (part - written).abs().max() <= error


@pytest.mark.parametrize("rows_of", FORMATS)
def test_keys_far_from_zero_in_some_features_lose_no_more_than_others(rows_of: type[Rows]) -> None:
    """As rotary keys are. int4's scale is then that of the rest; and scores are those of the whole keys."""
    far = 20 * random(1, KV_HEADS, 1, HEAD_DIM, seed=4)
    k, v = (random(BATCH, KV_HEADS, LENGTH, HEAD_DIM, seed=seed) for seed in (2, 3))
    rows = rows_of.empty(k, BATCH, KV_HEADS, CHUNKS, HEAD_DIM)
    rows.begin((k + far).split(CHUNK, dim=2))
    at = torch.arange(LENGTH)
    rows.write(at // CHUNK, at % CHUNK, k + far, v)
    keys, _ = rows.plain(LENGTH)
    assert (keys - (k + far)).abs().max() <= {ExactRows: 0, Int8Rows: 0.3, Int4Rows: 0.4}[rows_of]
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


@pytest.mark.parametrize("rows_of", FORMATS)
def test_a_prompt_sees_its_own_rows_as_they_were_written(rows_of: type[Rows]) -> None:
    k, v = (random(BATCH, KV_HEADS, LENGTH, HEAD_DIM, seed=seed) for seed in (2, 3))
    rows, start = filled(rows_of, k, v), CHUNK + 7
    for part, plain, written in zip(
        rows.with_own(start, k[:, :, start:], v[:, :, start:]), rows.plain(LENGTH), (k, v), strict=True
    ):
        assert torch.equal(part[:, :, :start], plain[:, :, :start])
        assert torch.equal(part[:, :, start:], written[:, :, start:])


@pytest.mark.parametrize(("rows_of", "share"), [(ExactRows, 1.0), (Int8Rows, 0.258), (Int4Rows, 0.160)])
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
