"""Padded prompts: each row gives what it gives alone, or the mask is refused."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcache.proof.operations import count_operations
from kvcache.strategies.catalogue import STRATEGIES, build
from kvcache.strategies.padding import check_model, check_rotary_tables, check_scales, check_selection, moved_before
from tests.families import dynamic_ntk, family
from tests.studies.architecture_configs import shrunken
from tests.tiny import ARCHITECTURES, EVERYWHERE, build_eagerly, token_ids

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


@pytest.mark.parametrize("name", ["dynamic", "static", "hf-generate"])
def test_a_model_whose_own_code_fails_on_padding_says_so(name: str) -> None:
    strategy = build(name, shrunken("cpmant"))
    strategy.prepare(2, 12)
    with pytest.raises(ValueError, match=r"padded prompt of cpmant fails in transformers \(.*: feed prompts of equal"):
        strategy.generate(token_ids(1, 2, 6), 3, attention_mask=padding([0, 0, 1, 1, 1, 1], [1] * 6))


@pytest.mark.parametrize("name", EVERYWHERE)
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
    strategy = build_eagerly(name, ARCHITECTURES["gpt2"]())
    with torch.compiler.set_stance("force_eager"):
        strategy.prepare(2, 12, token_ids(1, 2, n_depth) if n_depth else None)
        with pytest.raises(ValueError, match=reason):
            strategy.generate(token_ids(2, 2, 4), 3, attention_mask=mask)


@pytest.mark.parametrize("name", ["compiled", "compiled-int8", "sink-window"])
def test_a_kind_that_takes_no_padding_says_so(name: str) -> None:
    strategy = build_eagerly(name, ARCHITECTURES["llama"]())
    prompt = token_ids(2, 2, 4)
    with torch.compiler.set_stance("force_eager"):
        strategy.prepare(2, 12)
        plain = strategy.generate(prompt, 3)
        with pytest.raises(ValueError, match="prompts of equal length"):
            strategy.generate(prompt, 3, attention_mask=padding([0, 1, 1, 1], [1, 1, 1, 1]))
        assert torch.equal(strategy.generate(prompt, 3, attention_mask=torch.ones_like(prompt)), plain)


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("n_depth", [0, 3])
def test_a_masked_prompt_in_parts_is_refused(name: str, n_depth: int) -> None:
    """The second part's padding would lie behind tokens of the first, whose mask it knows nothing of."""
    strategy, ids = build_eagerly(name, ARCHITECTURES["llama"]()), token_ids(2, 2, 6)
    mask = padding([0, 0, 1, 1, 1, 1], [1] * 6)
    with torch.compiler.set_stance("force_eager"):
        strategy.prepare(2, 12, token_ids(1, 2, n_depth) if n_depth else None)
        strategy.prefill(ids[:, :3])
        with pytest.raises(ValueError, match="must be fed in one prefill: 3 tokens were fed before"):
            strategy.prefill(ids[:, 3:], mask[:, 3:])
        if name in PADDED:
            strategy.reset()
            strategy.prefill(ids[:, :3], mask[:, :3])
            with pytest.raises(ValueError, match="must be fed in one prefill"):
                strategy.prefill(ids[:, 3:])


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize(("make", "kind"), [(functools.partial(family, "phi3"), "longrope"), (dynamic_ntk, "dynamic")])
def test_padding_is_refused_where_a_longer_row_will_change_the_rotary_table(
    name: str, make: Callable[[], PreTrainedModel], kind: str
) -> None:
    """Both tables change beyond 16 tokens."""
    model, prompts, mask = make(), token_ids(2, 2, 9), padding([0] * 4 + [1] * 5, [1] * 9)
    strategy = build(name, model)
    strategy.prepare(2, 17)
    with pytest.raises(ValueError, match=rf"more than 16 tokens \({kind}\)"):
        strategy.generate(prompts, 3, attention_mask=mask)
    strategy.prepare(2, 16)
    emitted = strategy.generate(prompts, 7, attention_mask=mask)
    strategy.prepare(1, 16)
    assert torch.equal(emitted[:1], strategy.generate(prompts[:1, 4:], 7))


@pytest.mark.parametrize("name", PADDED)
def test_padding_is_refused_where_sparse_attention_selects(name: str) -> None:
    model, mask = family("deepseek_v32"), padding([0] * 2 + [1] * 3, [1] * 5)
    strategy = build(name, model)
    strategy.prepare(2, 9)
    with pytest.raises(ValueError, match="attends to 8 selected tokens, fewer than the 9 there will be"):
        strategy.generate(token_ids(2, 2, 5), 3, attention_mask=mask)
    check_selection(model, mask, 8)
    check_selection(model, torch.ones_like(mask), 9)
    check_selection(ARCHITECTURES["llama"](), mask, 9)


@pytest.mark.parametrize("name", PADDED)
def test_padding_is_refused_where_a_scale_of_the_queries_would_count_it_later(name: str) -> None:
    model, mask = shrunken("llama4_text", floor_scale=12), padding([0, 0, 1, 1, 1], [1] * 5)
    assert model.config.no_rope_layers[3] == 0  # the layers that it scales
    strategy = build_eagerly(name, model)
    strategy.prepare(2, 12)
    with pytest.raises(ValueError, match="scales its queries by their number in the batch from 12 on"):
        strategy.generate(token_ids(2, 2, 5), 5, attention_mask=mask)
    check_scales(model, mask, 11)
    check_scales(model, torch.ones_like(mask), 12)
    check_scales(shrunken("llama4_text", floor_scale=12, attn_temperature_tuning=False), mask, 12)
    check_scales(shrunken("inkling2_text"), mask, 12)  # by positions
    inkling = shrunken("inkling_text", log_scaling_n_floor=11)
    check_scales(inkling, mask, 11)  # the logarithm of one scales nothing
    with pytest.raises(ValueError, match="scales its queries by their number in the batch from 12 on"):
        check_scales(inkling, mask, 12)
    check_scales(ARCHITECTURES["llama"](), mask, 12)


def test_rows_that_are_all_beyond_the_switch_may_differ() -> None:
    mask = padding([0] * 2 + [1] * 18, [1] * 20)
    check_rotary_tables(family("phi3"), mask, 30)
    with pytest.raises(ValueError, match="more than 16 tokens"):
        check_rotary_tables(dynamic_ntk(), mask, 30)  # its table is another at each length


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


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("in_steps", [False, True])
def test_a_model_that_is_wrong_in_another_row_is_refused(
    name: str, in_steps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 1 gets the mask of row 0, which has the most padding: in the prompt, or in single tokens after it alone."""
    model = ARCHITECTURES["llama"]()
    inner = type(model.model).forward

    def of_row_0(self: nn.Module, **named: Any) -> object:
        mask = named["attention_mask"]
        if mask is not None and (named["input_ids"].shape[1] == 1) is in_steps:
            named["attention_mask"] = mask[:1].expand_as(mask)
        return inner(self, **named)

    monkeypatch.setattr(type(model.model), "forward", of_row_0)
    strategy = build(name, model)
    strategy.prepare(2, 14)
    prompts, mask = token_ids(2, 2, 9), padding([0] * 4 + [1] * 5, [1] * 9)
    if name == "naive" and in_steps:
        strategy.generate(prompts, 5, attention_mask=mask)
        return
    with pytest.raises(ValueError, match="llama gives other logits for a prompt that is padded"):
        strategy.generate(prompts, 5, attention_mask=mask)


def test_a_padded_prompt_is_proved_by_a_forward_for_each_length() -> None:
    model = ARCHITECTURES["llama"]()
    mask = padding(*([0] * (9 - length) + [1] * length for length in (5, 9, 5, 7, 5)))
    with count_operations(model) as counted:
        check_model(model, token_ids(2, 5, 9), mask, 14)
    assert counted.forward_calls == 1 + 3  # of the padded prompt, and of 5, 7 and 9 tokens


@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_padding_that_a_cache_does_not_leave_out_is_refused(name: str) -> None:
    strategy = build(name, family("falcon_mamba"))
    strategy.prepare(2, 14)
    mask = padding([0] * 4 + [1] * 5, [1] * 9)
    with pytest.raises(ValueError, match="falcon_mamba gives other logits for a prompt that is padded"):
        strategy.generate(token_ids(2, 2, 9), 3, attention_mask=mask)


def sparse_blocks() -> PreTrainedModel:
    """Blocks of 16 tokens are chosen, counted from a prompt's first column: the second one begins to differ."""
    return shrunken(
        "minimax_m3_vl_text", layer_types=["minimax_m3_sparse"] * 4, index_block_size=16, index_topk_blocks=16
    )


@pytest.mark.parametrize("name", ["dynamic", "naive"])
@pytest.mark.parametrize(
    ("make", "length", "capacity"), [(sparse_blocks, 9, 25), (functools.partial(family, "deepseek_v4"), 3, 8)]
)
def test_padding_that_shows_only_behind_the_prompt_is_refused(
    name: str, make: Callable[[], PreTrainedModel], length: int, capacity: int
) -> None:
    strategy = build(name, make())
    strategy.prepare(2, capacity)
    mask = padding([0] * (length // 2) + [1] * (length - length // 2), [1] * length)
    with pytest.raises(ValueError, match="gives other logits for a prompt that is padded"):
        strategy.generate(token_ids(2, 2, length), 5, attention_mask=mask)
