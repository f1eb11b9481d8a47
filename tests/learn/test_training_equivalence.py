"""Why the cache is exact: training's one parallel pass, naive re-feed and cached steps give the same logits.

Over every architecture of the list: texts padded on the right for the parallel pass, on the left for generation, the
prompt fed at once or in any pieces.
"""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from kvcache.strategies.catalogue import build
from kvcache.strategies.strategy import Strategy
from kvcache.strategies.tolerance import TOLERANCE
from tests.strategies.test_equivalence import MODELS, model_of, token_ids
from tests.tiny import EVERYWHERE, build_without_compiler

PAD = 0
CAPACITY = 32
"""Of every strategy, above the longest text."""
LENGTHS = st.lists(st.integers(1, 24), min_size=1, max_size=3)


def padded(texts: list[Tensor], *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask `[texts, longest]` of texts `[1, n]`."""
    longest = max(text.shape[1] for text in texts)
    ids, mask = [], []
    for text in texts:
        missing = longest - text.shape[1]
        sides = (missing, 0) if left else (0, missing)
        ids.append(torch.nn.functional.pad(text, sides, value=PAD))
        mask.append(torch.nn.functional.pad(torch.ones_like(text), sides))
    return torch.cat(ids), torch.cat(mask)


@torch.inference_mode()
def parallel(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Training's forward: all positions of all texts at once, `[texts, positions, vocab]`."""
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits


@cache
def strategy_of(name: str, architecture: str) -> Strategy:
    return build_without_compiler(name, model_of(architecture))


def stepwise(strategy: Strategy, text: Tensor, n_prompt: int) -> Tensor:
    """The logits `[1, positions from n_prompt on, vocab]` of a prefill and then one token of the text at a time."""
    strategy.prepare(1, CAPACITY)
    logits = [strategy.prefill(text[:, :n_prompt])]
    logits += [strategy.decode(text[:, place : place + 1]) for place in range(n_prompt, text.shape[1])]
    return torch.stack(logits, dim=1)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE[expected.dtype] * expected.abs().max()


@pytest.mark.usefixtures("untraced")  # what the compiler makes of a step: tests/compiled/test_strategy.py
@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("name", EVERYWHERE)
@settings(max_examples=4)
@given(lengths=LENGTHS, data=st.data(), seed=st.integers(0, 1000))
def test_position_t_of_training_is_step_t_of_generation(
    name: str, architecture: str, lengths: list[int], data: st.DataObject, seed: int
) -> None:
    model = model_of(architecture)
    texts = [token_ids(seed + place, 1, length) for place, length in enumerate(lengths)]
    at_once = parallel(model, *padded(texts, left=False))
    for row, text in enumerate(texts):
        n_prompt = data.draw(st.integers(1, text.shape[1]))
        found = stepwise(strategy_of(name, architecture), text, n_prompt)
        assert_equal(found, at_once[row : row + 1, n_prompt - 1 : text.shape[1]])


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("name", [name for name in EVERYWHERE if name != "compiled"])
@settings(max_examples=3)
@given(lengths=LENGTHS, n_more=st.integers(0, 6), seed=st.integers(0, 1000))
def test_left_padded_generation_equals_right_padded_training(
    name: str, architecture: str, lengths: list[int], n_more: int, seed: int
) -> None:
    """Prompts of unequal lengths in one batch, then the same number of steps for all."""
    model = model_of(architecture)
    texts = [token_ids(seed + place, 1, length + n_more) for place, length in enumerate(lengths)]
    at_once = parallel(model, *padded(texts, left=False))
    prompts, mask = padded([text[:, :length] for text, length in zip(texts, lengths, strict=True)], left=True)
    strategy = build_without_compiler(name, model)
    strategy.prepare(len(texts), prompts.shape[1] + n_more + 1)
    logits = [strategy.prefill(prompts, mask)]
    for step in range(n_more):
        fed = [text[:, length + step : length + step + 1] for text, length in zip(texts, lengths, strict=True)]
        logits.append(strategy.decode(torch.cat(fed)))
    found = torch.stack(logits, dim=1)
    for row, length in enumerate(lengths):
        assert_equal(found[row], at_once[row, length - 1 : length + n_more])


@pytest.mark.usefixtures("untraced")  # what the compiler makes of a step: tests/compiled/test_strategy.py
@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("name", EVERYWHERE)
@settings(max_examples=4)
@given(data=st.data(), length=st.integers(2, 24), seed=st.integers(0, 1000))
def test_prompt_may_be_fed_in_any_pieces(
    name: str, architecture: str, data: st.DataObject, length: int, seed: int
) -> None:
    """The cache does not care in how many forwards it was filled: each piece ends with the logits of its last token."""
    model, text = model_of(architecture), token_ids(seed, 1, length)
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4)))
    strategy = strategy_of(name, architecture)
    strategy.prepare(1, CAPACITY)
    at_once = parallel(model, text)
    for start, end in zip([0, *cuts], [*cuts, length], strict=True):
        assert_equal(strategy.prefill(text[:, start:end]), at_once[:, end - 1])


@pytest.mark.parametrize("architecture", MODELS)
@settings(max_examples=4)
@given(data=st.data(), length=st.integers(2, 24), seed=st.integers(0, 1000))
def test_a_position_depends_on_nothing_after_it(architecture: str, data: st.DataObject, length: int, seed: int) -> None:
    """The causal mask, seen from outside: what follows may change, or be padding, and a position stays what it was."""
    model = model_of(architecture)
    text, other = token_ids(seed, 1, length), token_ids(seed + 1, 1, length)
    kept = data.draw(st.integers(1, length - 1))
    changed = torch.cat([text[:, :kept], other[:, kept:]], dim=1)
    expected = parallel(model, text)[:, :kept]
    assert_equal(parallel(model, changed)[:, :kept], expected)
    assert_equal(parallel(model, text[:, :kept]), expected)


def test_a_model_that_looks_ahead_is_found_out() -> None:
    """The tests above can fail: without the causal mask a position does depend on what follows."""
    model, text = model_of("gpt2"), token_ids(1, 1, 8)
    open_mask = torch.zeros(1, 1, 8, 8)
    with torch.inference_mode():
        looking_ahead = model(input_ids=text, attention_mask=open_mask, use_cache=False).logits
    with pytest.raises(AssertionError):
        assert_equal(stepwise(build("dynamic", model), text, 1), looking_ahead)
