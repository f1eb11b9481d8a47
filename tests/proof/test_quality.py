"""Quality of a lossy cache: nothing lost reads as nothing, and planted mutants show."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcache.caches import fp8, sink_window
from kvcache.proof.judging import judge, predict
from kvcache.proof.quality import (
    RECALLED,
    Quality,
    equal_tokens,
    exact_logits,
    quality,
    sample_text,
    with_recall,
)
from kvcache.proof.rounding import WideProducts, logit_kl_floor
from kvcache.proof.tokens import NonFiniteLogits
from kvcache.strategies.cached import Dynamic
from kvcache.strategies.catalogue import build
from tests.tiny import ARCHITECTURES, VOCAB_SIZE

N_CONTEXT = 30


def model_of() -> PreTrainedModel:
    return ARCHITECTURES["llama"](max_position_embeddings=512)


def text_of(model: PreTrainedModel, n: int = 60, batch_size: int = 2) -> Tensor:
    return sample_text(Dynamic(model), torch.arange(batch_size)[:, None], n, seed=0)


def found(name: str, text: Tensor | None = None, n_context: int = N_CONTEXT) -> Quality:
    model = model_of()
    text = text_of(model) if text is None else text
    return quality(build(name, model), text, n_context, exact_logits(model, text, n_context))


def test_text_is_the_models_own_and_follows_the_seed() -> None:
    model = model_of()
    text = text_of(model, 200, 1)
    assert torch.equal(text, text_of(model, 200, 1))
    assert not torch.equal(text, sample_text(Dynamic(model), torch.zeros(1, 1, dtype=torch.long), 200, seed=1))
    # Drawn from the model: its mean surprise is the mean entropy, within a few standard errors.
    logits = exact_logits(model, text, 1).log_softmax(-1)
    entropy = -(logits.exp() * logits).sum(-1).mean()
    surprise = -logits.gather(-1, text[:, 2:, None]).mean()
    assert abs(surprise - entropy) < 0.5
    with pytest.raises(ValueError, match="leaves nothing to write"):
        sample_text(Dynamic(model), text, 200, seed=0)


@pytest.mark.parametrize("name", ["dynamic", "static", "naive", "hf-generate"])
def test_what_loses_nothing_reads_as_nothing(name: str) -> None:
    lost = found(name)
    assert lost.top1_agreement == 1
    assert lost.logit_kl == pytest.approx(0, abs=1e-8)
    assert lost.logit_kl_p99 == pytest.approx(0, abs=1e-8)
    assert lost.perplexity_ratio == pytest.approx(1, abs=1e-5)
    assert lost.agreement_by_position == (1.0,) * (60 - N_CONTEXT - 1)
    assert lost.commonest_share < 1


def test_figures_are_those_of_their_definitions() -> None:
    """Against sums written out for one sequence."""
    model, text = model_of(), text_of(model_of(), batch_size=1)
    exact = exact_logits(model, text, N_CONTEXT)
    strategy = build("fp8", model)
    strategy.prepare(1, 60)
    logits: list[Tensor] = [strategy.prefill(text[:, :N_CONTEXT])]
    logits += [strategy.decode(text[:, at : at + 1]) for at in range(N_CONTEXT, 59)]
    p, q = exact[0].double().softmax(-1), torch.stack(logits[1:], dim=1)[0].double().softmax(-1)
    lost = quality(strategy, text, N_CONTEXT, exact)
    rows = list(zip(p.tolist(), q.tolist(), text[0, N_CONTEXT + 1 :].tolist(), strict=True))
    divergence = [sum(a * math.log(a / b) for a, b in zip(of_p, of_q, strict=True)) for of_p, of_q, _ in rows]
    assert lost.logit_kl == pytest.approx(sum(divergence) / len(divergence))
    assert sorted(divergence)[-2] < lost.logit_kl_p99 < max(divergence)
    ratio = sum(math.log(of_p[token] / of_q[token]) for of_p, of_q, token in rows)
    assert lost.perplexity_ratio == pytest.approx(math.exp(ratio / len(rows)))
    assert lost.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())


# The proof of the proof: each of these loses more than fp8 itself does.


def shifted(rows: fp8.Rows) -> fp8.Rows:
    """Every token has the scale of the one before."""
    return rows._replace(scales=rows.scales.roll(1, dims=2))


class Mutant(fp8.Fp8Layer):
    damage: Any

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        whole = super().update(key_states, value_states)
        if key_states.shape[2] > 1:
            assert self.stored is not None
            self.stored = type(self).damage(*self.stored)
        return whole


DAMAGE = {
    "a scale off by one group": lambda keys, values: (shifted(keys), shifted(values)),
    "values with the keys' scale": lambda keys, values: (keys, values._replace(scales=keys.scales)),
    "a dropped window": lambda keys, values: (
        keys._replace(codes=torch.cat([keys.codes[:, :, :-8], torch.zeros_like(keys.codes[:, :, -8:])], dim=2)),
        values,
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_mutant_shows(damage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = found("fp8")
    monkeypatch.setattr(fp8, "Fp8Layer", type("Broken", (Mutant,), {"damage": staticmethod(damage)}))
    assert found("fp8").logit_kl > 10 * whole.logit_kl


def test_evicting_more_than_the_window_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found("sink-window").logit_kl == pytest.approx(0, abs=1e-8)
    monkeypatch.setattr(sink_window, "WINDOW", 10)
    assert found("sink-window").logit_kl > 1e-3


def test_recall_repeats_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    text = text_of(model, 220)
    probe = with_recall(text)
    assert torch.equal(probe[:, -RECALLED:], text[:, :RECALLED])
    assert torch.equal(probe[:, :-RECALLED], text)
    judged = predict(model, text)
    assert judge(Dynamic(model), judged)[1] == 1
    monkeypatch.setattr(sink_window, "WINDOW", 20)
    recall = judge(build("sink-window", model), judged)[1]
    assert recall is not None
    assert recall < 1
    with pytest.raises(ValueError, match="no passage of 64"):
        with_recall(text[:, :50])


def test_matching_tokens_are_counted_to_the_first_difference() -> None:
    expected = torch.arange(24).view(2, 12)
    emitted = expected.clone()
    assert equal_tokens(emitted, expected) == 12
    emitted[0, 9] += 1
    emitted[1, 7] += 1
    assert equal_tokens(emitted, expected) == 7


def test_floor_is_what_bfloat16_does() -> None:
    model = model_of()
    text = text_of(model)
    floor = logit_kl_floor(model, text, N_CONTEXT, exact_logits(model, text, N_CONTEXT))
    assert floor is not None
    assert 1e-7 < floor < 0.1
    assert model.dtype == torch.float32  # the model itself is not rounded
    wide, narrow = (
        exact_logits(model_of().to(dtype), text, N_CONTEXT).double().log_softmax(-1)
        for dtype in (torch.float32, torch.bfloat16)
    )
    # Up to the rotary frequencies, which stay float32 in a model that is loaded in bfloat16.
    assert floor == pytest.approx((wide.exp() * (wide - narrow)).sum(-1).mean().item(), rel=0.5)


def test_wide_products_round_what_comes_out() -> None:
    x, weight = torch.randn(3, 8, dtype=torch.bfloat16), torch.randn(5, 8, dtype=torch.bfloat16)
    bias = torch.randn(5, dtype=torch.bfloat16)
    expected = (x.float() @ weight.float().T + bias.float()).bfloat16()
    with WideProducts():
        products = [
            torch.nn.functional.linear(x, weight, bias),
            torch.nn.functional.linear(x, weight, bias=bias),
            torch.addmm(bias, x, weight.T),
        ]
        assert torch.nn.functional.linear(x.double(), weight.double()).dtype == torch.float64
    for found in products:
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected)


def test_a_model_that_cannot_be_copied_has_no_floor_and_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("no room for a copy")

    model = model_of()
    monkeypatch.setattr(type(model), "__deepcopy__", refuse, raising=False)
    text = predict(model, text_of(model, 138))
    assert text.floor.shape == (0,)
    assert judge(build("fp8", model), text)[0].logit_kl > 0


def test_non_finite_logits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    text, strategy = text_of(model), Dynamic(model_of())
    monkeypatch.setattr(strategy, "decode", lambda ids: torch.full((2, VOCAB_SIZE), torch.nan))
    with pytest.raises(NonFiniteLogits, match="token 31"):
        quality(strategy, text, N_CONTEXT, exact_logits(model, text, N_CONTEXT))


def test_texts_without_a_step_are_refused() -> None:
    with pytest.raises(ValueError, match="leaves no step"):
        exact_logits(model_of(), text_of(model_of()), 59)
