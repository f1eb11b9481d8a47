"""The text that judges the lossy strategies of a cell."""

from __future__ import annotations

import pytest
import torch

from kvcache.proof.judging import kept_positions, write_text
from kvcache.strategies.cached import Dynamic
from tests.tiny import ARCHITECTURES


@pytest.mark.parametrize(("n_context", "max_positions"), [(3, None), (3, 100), (200, 140), (1, 3)])
def test_the_kept_logits_are_as_many_as_are_counted(n_context: int, max_positions: int | None) -> None:
    model = ARCHITECTURES["llama"](max_position_embeddings=512)
    start = torch.zeros(1, 1, dtype=torch.long)
    text = write_text(model, Dynamic(model), start, n_context, max_positions, seed=0)
    kept = text.exact.shape[1] + text.recalled.shape[1]
    assert kept == kept_positions(n_context, max_positions)
