"""The text that judges the lossy strategies of a cell."""

import pytest
import torch

from kvcache.proof import rounding
from kvcache.proof.judging import kept_positions, predict, text_length
from kvcache.proof.quality import sample_text
from kvcache.proof.rounding import floor_bytes
from kvcache.strategies.cached import Dynamic
from tests.tiny import ARCHITECTURES


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
    monkeypatch.setattr(rounding, "_copy", None)
    assert len(predict(model, tokens, room - 1).floor) == 0


def test_the_beginning_of_a_longer_text_is_the_text_of_a_shorter_context() -> None:
    model = ARCHITECTURES["llama"](max_position_embeddings=512)
    longer, shorter = (sample_text(Dynamic(model), torch.zeros(2, 1, dtype=torch.long), n, seed=3) for n in (60, 30))
    assert torch.equal(longer[:, :30], shorter)
