"""One text by which every lossy strategy of a cell is judged, with the exact predictions.

Axes: `batch` sequences of `n` tokens; the last `positions` of them go through decode and are compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcache.proof.quality import (
    RECALLED,
    Quality,
    exact_logits,
    logit_kl_floor,
    quality,
    with_recall,
)
from kvcache.strategies.strategy import Strategy

POSITIONS = 128
"""Decode steps that are compared, where the model has positions for so many beyond one token."""


@dataclass(frozen=True, kw_only=True)
class JudgedText:
    """What judging needs, as tensors, so that a file can carry it from one process to another."""

    tokens: Tensor
    """`[batch, n]`"""
    exact: Tensor
    """What the parallel forward predicts after each token fed by decode, `[batch, positions, vocab]`."""
    recalled: Tensor
    """The same for the repeated passage of `with_recall(tokens)`; no position where the text is too short for one."""
    floor: Tensor
    """`logit_kl_floor`, `[1]` in float64; `[0]` where there is none."""


def kept_positions(n_context: int, max_positions: int | None) -> int:
    """Count the positions, judged and recalled, whose exact logits are kept for each sequence."""
    n = text_length(n_context, max_positions)
    return _steps(n) + (RECALLED - 1 if n >= 2 * RECALLED else 0)


def text_length(n_context: int, max_positions: int | None) -> int:
    """Count the tokens of a text that judges POSITIONS steps after a context, or as many as the model has room for."""
    n = n_context + POSITIONS + 1
    return n if max_positions is None else min(n, max_positions)


def predict(model: PreTrainedModel, tokens: Tensor, room_bytes: int | None = None) -> JudgedText:
    """Make what judging needs of a text, `tokens [batch, n]`, whose last POSITIONS steps are compared.

    The context of a shorter text is one token. `room_bytes` is as in `logit_kl_floor`.

    Raises:
        ValueError: the text has fewer than three tokens.
        NonFiniteLogits: the model gave NaN or infinity.
    """
    n = tokens.shape[1]
    n_context = n - 1 - _steps(n)
    exact = exact_logits(model, tokens, n_context)
    recalled = exact[:, :0]
    if n >= 2 * RECALLED:
        recalled = exact_logits(model, with_recall(tokens), n - RECALLED)
    floor = logit_kl_floor(model, tokens, n_context, exact, room_bytes)
    floors = torch.tensor([] if floor is None else [floor], dtype=torch.float64)
    return JudgedText(tokens=tokens, exact=exact, recalled=recalled, floor=floors)


def _steps(n: int) -> int:
    """Count the decode steps that are compared in a text of `n` tokens."""
    return min(POSITIONS, n - 2)


def judge(strategy: Strategy, text: JudgedText) -> tuple[Quality, float | None]:
    """Compare the strategy's predictions over the text; return its quality and its `recall_agreement`, if there is one.

    The strategy must be prepared anew afterwards.

    Raises:
        NonFiniteLogits: the strategy gave NaN or infinity.
    """
    n, steps = text.tokens.shape[1], text.exact.shape[1]
    found = quality(strategy, text.tokens, n - 1 - steps, text.exact)
    if not text.recalled.shape[1]:
        return found, None
    recalled = quality(strategy, with_recall(text.tokens), n - RECALLED, text.recalled)
    return found, recalled.top1_agreement
