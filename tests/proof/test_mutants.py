"""The proof of the proof: a quantised cache broken in one place shows in `logit_kl`; what loses nothing reads 0."""

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import QuantizedLayer

from kvcache.compiled.quantized import CompiledInt4, CompiledInt8
from kvcache.compiled.strategy import Compiled
from kvcache.proof.quality import Quality, equal_tokens, exact_logits, quality, sample_text
from kvcache.proof.tokens import reference
from kvcache.strategies.cached import Cached, Dynamic
from kvcache.strategies.catalogue import build
from kvcache.strategies.strategy import Strategy
from tests.tiny import ARCHITECTURES

N_CONTEXT, N = 30, 60


@functools.cache
def judged() -> tuple[PreTrainedModel, Tensor, Tensor]:
    """A model whose heads fill a group of HQQ, a text of its own, and the exact logits."""
    model = ARCHITECTURES["llama"](head_dim=64, max_position_embeddings=512)
    text = sample_text(Dynamic(model), torch.arange(2)[:, None], N, seed=0)
    return model, text, exact_logits(model, text, N_CONTEXT)


def found(strategy: Strategy) -> Quality:
    _, text, exact = judged()
    return quality(strategy, text, N_CONTEXT, exact)


def _named(rows: Any, ending: str) -> list[Tensor]:
    return [tensor for name, tensor in rows._asdict().items() if name.endswith(ending)]


def off_by_a_group(rows: Any) -> None:
    """A group is a row, so the scale is another token's."""
    for tensor in _named(rows, "scales"):
        tensor.copy_(tensor.roll(1, dims=3))


def scales_of_keys(rows: Any) -> None:
    rows.value_scales.copy_(rows.key_scales)


def evicted(rows: Any) -> None:
    """The last eight tokens of the prompt are gone, which a window must keep."""
    for tensor in [*_named(rows, "scales"), *_named(rows, "shares")]:
        tensor[..., N_CONTEXT - 8 : N_CONTEXT] = 0


def of_another_head(ending: str) -> Callable[[Any], None]:
    """Damage what all keys of a head have in common: it is that of the neighbour."""

    def damage(rows: Any) -> None:
        for tensor in _named(rows, ending):
            tensor.copy_(tensor.roll(1, dims=1))

    damage.__name__ = ending
    return damage


@pytest.mark.parametrize(
    ("kind", "damage", "times"),
    [
        (CompiledInt8, off_by_a_group, 5),
        (CompiledInt8, scales_of_keys, 5),
        (CompiledInt8, evicted, 5),
        (CompiledInt4, off_by_a_group, 5),
        # Its integers lie on both sides of 0, so a wrong scale is half as wrong as where they begin at the smallest.
        (CompiledInt4, scales_of_keys, 2),
        (CompiledInt4, evicted, 5),
        (CompiledInt4, of_another_head("means"), 2),
        (CompiledInt4, of_another_head("factors"), 2),
        (CompiledInt4, of_another_head("firsts"), 2),
    ],
)
def test_damaged_rows_show(kind: type[Compiled], damage: Callable[[Any], None], times: int) -> None:
    class Damaged(kind):  # type: ignore[misc, valid-type]  # a class that is an argument
        def prefill(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            logits: Tensor = super().prefill(ids, attention_mask)
            for slot in self._slots:
                damage(slot.rows)
            return logits

    model = judged()[0]
    with torch.compiler.set_stance("force_eager"):
        whole, broken = found(kind(model, backend="eager")), found(Damaged(model, backend="eager"))
    assert broken.logit_kl > times * whole.logit_kl
    assert broken.logit_kl > {CompiledInt8: 1e-3, CompiledInt4: 2e-2}[kind]  # what the whole one may lose


def quantised(name: str, package: str, *marks: pytest.MarkDecorator) -> Any:
    missing = not any(importlib.metadata.distributions(name=package))
    return pytest.param(name, marks=[pytest.mark.skipif(missing, reason=f"{package} is not installed"), *marks])


@pytest.mark.parametrize(
    "name",
    [
        quantised("hqq-int8", "hqq"),
        quantised("hqq-int4", "hqq"),
        quantised("quanto-int4", "optimum-quanto", pytest.mark.compiled),
    ],
)
def test_a_dropped_residual_window_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, update = judged()[0], QuantizedLayer.update
    whole = found(build(name, model))

    def dropping(self: QuantizedLayer, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        seen = update(self, keys, values)
        self.keys, self.values = self.keys.new_empty(0), self.values.new_empty(0)
        return seen

    monkeypatch.setattr(QuantizedLayer, "update", dropping)
    assert found(build(name, model)).logit_kl > 10 * whole.logit_kl


def test_a_lossless_lossy_kind_reads_nothing_in_every_column() -> None:
    model, text, _ = judged()
    strategy = build("cache:tests.unfit_caches:growing", model)
    assert isinstance(strategy, Cached)
    assert strategy.promise == "lossy"
    lost = found(strategy)
    assert lost.top1_agreement == 1
    assert set(lost.agreement_by_position) == {1.0}
    assert lost.logit_kl == pytest.approx(0, abs=1e-8)
    assert lost.logit_kl_p99 == pytest.approx(0, abs=1e-8)
    assert lost.perplexity_ratio == pytest.approx(1, abs=1e-5)
    prompt = text[:, :N_CONTEXT]
    strategy.prepare(2, N, prompt_length=N_CONTEXT)
    assert equal_tokens(strategy.generate(prompt, 12), reference(model, prompt, 12).tokens) == 12
