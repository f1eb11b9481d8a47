"""Every strategy emits naive's tokens, for any prompt, batch, depth and length; planted mutants are found out."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from kvcache.proof.tokens import NonFiniteLogits, Reference, agreement, reference
from kvcache.strategies.cached import Dynamic
from kvcache.strategies.catalogue import STRATEGIES, build
from kvcache.strategies.naive import Naive
from kvcache.strategies.strategy import Strategy, last_logits
from kvcache.strategies.tolerance import TOLERANCE
from tests.tiny import ARCHITECTURES, COMPILED, EVERYWHERE, VOCAB_SIZE, build_without_compiler, token_ids

MODELS = sorted(ARCHITECTURES)
TRACED = [
    # Two architectures differ in all that a strategy that compiles distinguishes.
    pytest.param(
        name, architecture, marks=[pytest.mark.compiled] * (STRATEGIES[name].compiles and architecture not in COMPILED)
    )
    for name in EVERYWHERE
    for architecture in MODELS
]


@cache
def model_of(architecture: str) -> PreTrainedModel:
    return ARCHITECTURES[architecture]()


@pytest.mark.parametrize("name", EVERYWHERE)
def test_listed_name_is_the_strategys_own(name: str) -> None:
    assert build_without_compiler(name, model_of("llama")).name == name


@pytest.mark.usefixtures("untraced")  # a strategy that compiles would be traced anew for each example
@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("name", EVERYWHERE)
@settings(max_examples=3)
@given(
    batch_size=st.integers(1, 3),
    n_depth=st.integers(0, 20),
    n_prompt=st.integers(1, 20),
    n_gen=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_tokens_and_logits_equal_naive(
    name: str, architecture: str, batch_size: int, n_depth: int, n_prompt: int, n_gen: int, seed: int
) -> None:
    model = model_of(architecture)
    context = token_ids(seed, batch_size, n_depth) if n_depth else None
    prompt = token_ids(seed + 1, batch_size, n_prompt)
    naive = Naive(model)
    naive.prepare(batch_size, n_depth + n_prompt + n_gen, context)
    expected = naive.generate(prompt, n_gen)

    strategy = build_without_compiler(name, model)
    strategy.prepare(batch_size, n_depth + n_prompt + n_gen, context)
    assert torch.equal(strategy.generate(prompt, n_gen), expected)
    strategy.reset()  # and again from the same state
    found = agreement(strategy, prompt, reference(model, prompt, n_gen, context))
    assert found.tokens_match == "true"
    assert found.logits_error <= TOLERANCE[torch.float32]
    assert found.positions_checked == n_gen


@pytest.mark.parametrize(("name", "architecture"), TRACED)
def test_stepwise_calls_equal_generate(name: str, architecture: str) -> None:
    model, prompt = model_of(architecture), token_ids(3, 2, 11)
    strategy = build_without_compiler(name, model)
    strategy.prepare(2, 20)
    expected = strategy.generate(prompt, 5)
    strategy.reset()
    tokens = [strategy.prefill(prompt).argmax(-1)]
    for _ in range(4):
        tokens.append(strategy.decode(tokens[-1][:, None]).argmax(-1))
    assert torch.equal(torch.stack(tokens, 1), expected)


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("name", [name for name in EVERYWHERE if not STRATEGIES[name].compiles])
def test_left_padding_changes_nothing(name: str, architecture: str) -> None:
    """Two prompts of unequal lengths, the shorter padded on the left, give what each gives alone."""
    model = model_of(architecture)
    short, long = token_ids(1, 1, 5), token_ids(2, 1, 9)
    alone = []
    for prompt in (short, long):
        strategy = build(name, model)
        strategy.prepare(1, 20)
        alone.append(strategy.generate(prompt, 6))
    padded = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1), long])
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    strategy = build(name, model)
    strategy.prepare(2, 20)
    assert torch.equal(strategy.generate(padded, 6, attention_mask=mask), torch.cat(alone))


@settings(max_examples=20)
@given(n_gen=st.integers(2, 12), data=st.data())
def test_naive_skips_steps(n_gen: int, data: st.DataObject) -> None:
    """A naive step depends on its length alone: the computed ones are the same whichever others are skipped."""
    model, prompt = model_of("gpt2"), token_ids(7, 2, 6)
    steps = data.draw(st.sets(st.integers(1, n_gen - 1)))
    expected = reference(model, prompt, n_gen)
    strategy = Naive(model)
    strategy.prepare(2, 6 + n_gen)
    tokens = strategy.generate(prompt, n_gen, forced=expected.tokens, steps=steps)
    assert torch.equal(tokens, expected.tokens[:, [0, *sorted(steps)]])


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("name", EVERYWHERE)
def test_generate_begins_anew_whatever_came_before(name: str) -> None:
    model, context, prompt = model_of("llama"), token_ids(2, 2, 3), token_ids(3, 2, 6)
    strategy = build_without_compiler(name, model)
    strategy.prepare(2, 16, context)
    expected = strategy.generate(prompt, 5)
    assert torch.equal(strategy.generate(prompt, 5), expected)
    strategy.generate(token_ids(4, 2, 9), 3)
    assert torch.equal(strategy.generate(prompt, 5), expected)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("name", EVERYWHERE)
def test_generate_refuses_what_it_was_not_prepared_for(name: str) -> None:
    strategy, prompt = build_without_compiler(name, model_of("llama")), token_ids(3, 2, 6)
    with pytest.raises(ValueError, match=r"call prepare\(batch_size, capacity\) before generate"):
        strategy.generate(prompt, 4)
    strategy.prepare(2, 12, token_ids(2, 2, 3))
    with pytest.raises(ValueError, match="prepared for 2 sequences, the prompt has 1"):
        strategy.generate(prompt[:1], 4)
    with pytest.raises(ValueError, match="n_gen is 0: at least 1 token is emitted"):
        strategy.generate(prompt, 0)
    with pytest.raises(ValueError, match="prepared for 12 tokens, 13 are needed"):
        strategy.generate(prompt, 5)
    assert strategy.generate(prompt, 4).shape == (2, 4)


def test_cached_refuses_to_skip() -> None:
    model, prompt = model_of("gpt2"), token_ids(7, 1, 6)
    strategy = Dynamic(model)
    strategy.prepare(1, 10)
    with pytest.raises(TypeError, match="cannot be skipped"):
        strategy.generate(prompt, 3, forced=token_ids(1, 1, 3), steps=[2])
    with pytest.raises(ValueError, match="forced"):
        strategy.generate(prompt, 3, steps=[2])


@pytest.mark.parametrize("all_logits", [False, True])
def test_naive_logits_of_all_positions_choose_the_same_tokens(all_logits: bool) -> None:
    model, prompt = model_of("llama"), token_ids(5, 2, 6)
    strategy = Naive(model, all_logits=all_logits)
    strategy.prepare(2, 12)
    assert torch.equal(strategy.generate(prompt, 5), reference(model, prompt, 5).tokens)


def test_context_that_does_not_fit_is_refused() -> None:
    strategy = Naive(model_of("gpt2"))
    with pytest.raises(ValueError, match="no room"):
        strategy.prepare(1, 4, token_ids(0, 1, 4))
    with pytest.raises(ValueError, match="batch_size"):
        strategy.prepare(2, 9, token_ids(0, 1, 4))


# The check itself is tested with mutants that must fail.


class OffByOne(Dynamic):
    """Every decode step sits one position too far."""

    def decode(self, ids: Tensor) -> Tensor:
        position = torch.full_like(ids, self.kv.cache.get_seq_length() + 1)
        with torch.inference_mode():
            out = self.model(input_ids=ids, past_key_values=self.kv.cache, use_cache=True, position_ids=position)
        logits: Tensor = out.logits[:, -1]
        return logits


class LostRow(Dynamic):
    """The first cached row is lost after the prefill."""

    def prefill(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits = super().prefill(ids, attention_mask)
        for layer in self.kv.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]
        return logits


class WrongMask(Dynamic):
    """Decode steps do not see the first token."""

    def decode(self, ids: Tensor) -> Tensor:
        length = self.kv.cache.get_seq_length()
        mask = torch.ones(ids.shape[0], length + 1, dtype=torch.long)
        mask[:, 0] = 0
        with torch.inference_mode():
            return last_logits(self.model, ids, cache=self.kv.cache, attention_mask=mask)[:, -1]


class NotANumber(Dynamic):
    """Gives NaN once eleven tokens lie in the cache."""

    def decode(self, ids: Tensor) -> Tensor:
        return super().decode(ids) * (torch.nan if self.kv.cache.get_seq_length() == 11 else 1)


def checked(mutant: Callable[..., Strategy], architecture: str) -> str:
    model, prompt = model_of(architecture), token_ids(11, 2, 8)
    strategy = mutant(model)
    strategy.prepare(2, 16)
    return agreement(strategy, prompt, reference(model, prompt, 8)).tokens_match


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("mutant", [OffByOne, LostRow, WrongMask])
def test_mutant_is_found_out(mutant: Callable[..., Strategy], architecture: str) -> None:
    assert checked(Dynamic, architecture) == "true"
    assert checked(mutant, architecture) == "false"


def test_non_finite_logits_are_found_out() -> None:
    with pytest.raises(NonFiniteLogits, match="token 4"):
        checked(NotANumber, "gpt2")


def test_tie_is_told_from_a_failure() -> None:
    """Two tokens whose logits differ by less than the tolerance may change places; more is a failure."""
    model, prompt = model_of("gpt2"), token_ids(11, 1, 8)
    strategy = Dynamic(model)
    strategy.prepare(1, 12)
    expected = reference(model, prompt, 4)
    other = Reference(expected.tokens.clone(), expected.logits)
    other.tokens[0, -1] = (other.tokens[0, -1] + 1) % VOCAB_SIZE
    assert agreement(strategy, prompt, other).tokens_match == "tie"
    strategy.reset()
    further = Reference(expected.tokens, expected.logits + 1e-3 * expected.logits.abs().max())
    assert agreement(strategy, prompt, further).tokens_match == "false"


def test_reference_survives_a_broken_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft may be anything: the parallel forward settles the tokens, and they are naive's."""
    model, prompt = model_of("llama"), token_ids(13, 2, 8)
    expected = reference(model, prompt, 6)
    monkeypatch.setattr(
        Dynamic, "generate", lambda self, ids, n_gen: torch.zeros(ids.shape[0], n_gen, dtype=torch.long)
    )
    assert torch.equal(reference(model, prompt, 6).tokens, expected.tokens)
