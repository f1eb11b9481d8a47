"""The text that judges the lossy strategies of a cell."""

import weakref
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvcache.proof import copies, judging, rounding
from kvcache.proof.judging import JudgedText, judge, kept_positions, predict, text_length
from kvcache.proof.quality import RECALLED, divergence, sample_text
from kvcache.proof.rounding import floor_bytes, logit_kl_floor
from kvcache.strategies.cached import Dynamic
from tests.families import CONFIGS, rounding_by_length, seeing_the_future
from tests.tiny import ARCHITECTURES, tiny


@pytest.mark.parametrize(("n_context", "max_positions"), [(3, None), (3, 100), (200, 140), (1, 3)])
def test_the_kept_logits_are_as_many_as_are_counted(n_context: int, max_positions: int | None) -> None:
    model = ARCHITECTURES["llama"](max_position_embeddings=max_positions or 512)
    start = torch.zeros(1, 1, dtype=torch.long)
    text = predict(model, sample_text(Dynamic(model), start, text_length(n_context, max_positions), seed=0))
    assert text.exact.shape[1] == kept_positions(n_context, max_positions)
    assert text.tokens.shape[1] + int(text.n_recalled) <= (max_positions or 512)
    assert text.exact.shape[1]


def test_a_copy_that_would_not_fit_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ARCHITECTURES["llama"](max_position_embeddings=512)
    tokens = torch.zeros(1, 20, dtype=torch.long)
    exact = predict(model, tokens).exact
    room = floor_bytes(model, exact)
    weights = sum(weight.numel() for weight in model.parameters())
    assert room == 2 * (weights + 2 * exact.numel())  # bfloat16 beside the model's own float32
    assert len(predict(model, tokens, room).floor) == 1
    monkeypatch.setattr(rounding, "copied", None)
    assert len(predict(model, tokens, room - 1).floor) == 0


def test_the_beginning_of_a_longer_text_is_the_text_of_a_shorter_context() -> None:
    model = ARCHITECTURES["llama"](max_position_embeddings=512)
    longer, shorter = (sample_text(Dynamic(model), torch.zeros(2, 1, dtype=torch.long), n, seed=3) for n in (60, 30))
    assert torch.equal(longer[:, :30], shorter)


@pytest.mark.parametrize(("n", "kept"), [(60, 16), (143, 16), (200, 200)])
def test_a_text_is_cut_where_positions_are_computed_in_another_way(n: int, kept: int) -> None:
    """Longrope switches at 16: beyond it one forward over all is what no step computes, unless all steps lie there."""
    model = tiny("phi3", {**CONFIGS["phi3"], "max_position_embeddings": 512})
    assert model.config.rope_parameters["original_max_position_embeddings"] == 16
    text = predict(model, sample_text(Dynamic(model), torch.zeros(1, 1, dtype=torch.long), n, seed=0))
    assert text.prefix_stable
    assert text.tokens.shape[1] == kept
    found, _ = judge(Dynamic(model), text)
    assert found.logit_kl == pytest.approx(0, abs=1e-8)


def test_a_text_of_which_earlier_positions_depend_on_later_ones_is_said_to_be_no_measure() -> None:
    for model in seeing_the_future():
        tokens = torch.arange(20)[None] % model.config.vocab_size
        assert not predict(model, tokens).prefix_stable
    assert predict(ARCHITECTURES["llama"](), torch.arange(20)[None]).prefix_stable


def test_one_copy_is_freed_before_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made, floor = [], judging.logit_kl_floor

    def copied(*arguments: Any) -> PreTrainedModel:
        wide = whole(*arguments)
        wide.itself = [wide]  # as a model that refers to itself
        made.append(weakref.ref(wide))
        return wide

    def floor_alone(*arguments: Any) -> float | None:
        assert [each() for each in made] == [None]
        return floor(*arguments)

    whole = copies.copied
    monkeypatch.setattr(copies, "copied", copied)
    monkeypatch.setattr(judging, "logit_kl_floor", floor_alone)
    text = predict(rounding_by_length(), torch.arange(20)[None])
    assert text.prefix_stable
    assert len(text.floor) == 1


def test_a_copy_needs_room_for_its_logits_too() -> None:
    model = rounding_by_length()
    weights = sum(weight.numel() for weight in model.parameters())
    room = 4 * (weights + 2 * 100)
    assert copies.holds_in_float32(lambda wide: wide.dtype == torch.float32, model, 100, room)
    assert not copies.holds_in_float32(lambda _: True, model, 100, room - 1)
    assert not copies.holds_in_float32(lambda _: True, ARCHITECTURES["llama"](), 100)


def test_the_floor_is_the_divergence_of_float32_from_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ARCHITECTURES["llama"]()
    wide, narrow = torch.tensor([[[0.0, 3.0, 1.0]]]), torch.tensor([[[0.0, 0.5, -4.0]]])
    monkeypatch.setattr(rounding, "exact_logits", lambda *_: narrow)
    floor = logit_kl_floor(model, torch.zeros(1, 3, dtype=torch.long), 1, wide)
    there, back = divergence(wide, narrow).item(), divergence(narrow, wide).item()
    assert abs(there - back) > 0.1
    assert floor == pytest.approx(there)


@pytest.mark.parametrize(("foreseen", "recall"), [("the first", 0.0), ("the others", 1.0)])
def test_recall_leaves_out_that_the_passage_begins(
    foreseen: str, recall: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eight steps over the text, and 64 over the passage, the first of which is after the text's last token."""
    judged, model = 8, ARCHITECTURES["llama"]()
    steps = torch.zeros(judged + RECALLED, 3, 1, dtype=torch.float64)
    steps[judged] = foreseen == "the first"
    steps[judged + 1 :] = foreseen == "the others"
    monkeypatch.setattr(judging, "compare", lambda *_: steps)
    text = JudgedText(
        tokens=torch.zeros(1, 100, dtype=torch.long),
        exact=torch.zeros(1, judged + RECALLED, 5),
        n_recalled=torch.tensor(RECALLED),
        floor=torch.empty(0),
        prefix_stable=torch.tensor(True),
    )
    assert judge(Dynamic(model), text)[1] == recall
