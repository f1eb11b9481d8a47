"""Padded prompts: each row gives what it gives alone, or the mask is refused."""

import pytest
import torch
from torch import Tensor, nn

from kvcache.strategies.catalogue import STRATEGIES, build
from kvcache.strategies.padding import moved_before
from tests.families import family
from tests.tiny import ARCHITECTURES, EVERYWHERE, token_ids

PADDED = [name for name in EVERYWHERE if not STRATEGIES[name].compiles]


def padding(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "bloom"])
def test_padding_after_a_context_changes_nothing(name: str, architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    context, prompts = token_ids(1, 2, 4), token_ids(2, 2, 9)
    mask = padding([0] * 4 + [1] * 5, [1] * 9)
    alone = []
    for row, prompt in enumerate((prompts[:1, 4:], prompts[1:])):
        strategy = build(name, model)
        strategy.prepare(1, 18, context[row : row + 1])
        alone.append(strategy.generate(prompt, 5))
    strategy = build(name, model)
    strategy.prepare(2, 18, context)
    unpadded = strategy.generate(prompts, 5)
    assert torch.equal(strategy.generate(prompts, 5, attention_mask=mask), torch.cat(alone))
    assert torch.equal(strategy.generate(prompts, 5), unpadded)  # back at the state after the context
    assert torch.equal(strategy.generate(prompts, 5, attention_mask=torch.ones_like(mask)), unpadded)


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("n_depth", [0, 3])
@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (padding([1, 1, 1, 0], [1, 1, 1, 1]), "a 0 after a 1 in row 0: only left padding is taken"),
        (padding([1, 1, 1, 1], [0, 1, 0, 1]), "a 0 after a 1 in row 1"),
        (padding([1, 1, 1, 1], [0, 0, 0, 0]), "no token in row 1"),
        (padding([1, 1, 1], [1, 1, 1]), r"shape \[2, 3\], the prompt \[2, 4\]"),
        (padding([1, 1, 1, 1]), r"shape \[1, 4\]"),
        (padding([2, 1, 1, 1], [1, 1, 1, 1]), "values other than 0 .* and 1"),
    ],
)
def test_any_other_mask_is_refused(name: str, n_depth: int, mask: Tensor, reason: str) -> None:
    strategy = build(name, ARCHITECTURES["gpt2"]())
    strategy.prepare(2, 12, token_ids(1, 2, n_depth) if n_depth else None)
    with pytest.raises(ValueError, match=reason):
        strategy.generate(token_ids(2, 2, 4), 3, attention_mask=mask)


def test_padding_is_moved_before_the_context() -> None:
    context, ids = torch.tensor([[7, 8], [7, 8]]), torch.tensor([[0, 0, 1], [4, 5, 6]])
    moved, mask = moved_before(context, ids, padding([0, 0, 1], [1, 1, 1]))
    assert moved.tolist() == [[0, 0, 7, 8, 1], [7, 8, 4, 5, 6]]
    assert mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("name", PADDED)
def test_a_model_that_does_not_leave_padding_out_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ARCHITECTURES["llama"]()
    inner = type(model.model).forward

    def blind(self: nn.Module, input_ids: Tensor, **named: object) -> object:
        return inner(self, input_ids, past_key_values=named.get("past_key_values"), use_cache=named.get("use_cache"))

    monkeypatch.setattr(type(model.model), "forward", blind)
    strategy = build(name, model)
    strategy.prepare(2, 14)
    with pytest.raises(
        ValueError, match="llama gives other logits for a prompt that is padded than for the prompt alone"
    ):
        strategy.generate(token_ids(2, 2, 9), 5, attention_mask=padding([0] * 4 + [1] * 5, [1] * 9))


@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_padding_that_a_cache_does_not_leave_out_is_refused(name: str) -> None:
    strategy = build(name, family("falcon_mamba"))
    strategy.prepare(2, 14)
    mask = padding([0] * 4 + [1] * 5, [1] * 9)
    with pytest.raises(ValueError, match="falcon_mamba gives other logits for a prompt that is padded"):
        strategy.generate(token_ids(2, 2, 9), 3, attention_mask=mask)
