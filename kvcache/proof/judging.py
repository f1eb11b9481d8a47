"""One text by which every lossy strategy of a cell is judged: written once by an exact one, with the exact predictions.

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
    sample_text,
    with_recall,
)
from kvcache.strategies.strategy import Strategy

POSITIONS = 128
"""Decode steps that are compared, where the model has positions for so many beyond one token."""


@dataclass(frozen=True, kw_only=True)
class JudgedText:
    """What judging needs, as tensors, so that a file can carry it from the process that wrote the text."""

    tokens: Tensor
    """`[batch, n]`"""
    exact: Tensor
    """What the parallel forward predicts after each token fed by decode, `[batch, positions, vocab]`."""
    recalled: Tensor
    """The same for the repeated passage of `with_recall(tokens)`; no position where the text is too short for one."""
    floor: Tensor
    """`logit_kl_floor`, `[1]` in float64; `[0]` where there is none."""


def kept_positions(n_context: int, max_positions: int | None) -> int:
    """Count the positions, judged and recalled, whose exact logits `write_text` keeps for each sequence."""
    n, n_context = _lengths(n_context, max_positions)
    return n - 1 - n_context + (RECALLED - 1 if n >= 2 * RECALLED else 0)


def write_text(
    model: PreTrainedModel, writer: Strategy, start: Tensor, n_context: int, max_positions: int | None, seed: int
) -> JudgedText:
    """Have the exact `writer` go on from `start [batch, s]` until POSITIONS steps follow a context of `n_context`.

    Where `max_positions` are fewer than that, the context is shorter, and then there are fewer steps.

    Raises:
        ValueError: the model has no positions for a context and two tokens after it.
        NonFiniteLogits: the model gave NaN or infinity.
    """
    n, n_context = _lengths(n_context, max_positions)
    tokens = sample_text(writer, start, n, seed)
    exact = exact_logits(model, tokens, n_context)
    recalled = exact[:, :0]
    if n >= 2 * RECALLED:
        recalled = exact_logits(model, with_recall(tokens), n - RECALLED)
    floor = logit_kl_floor(model, tokens, n_context, exact)
    floors = torch.tensor([] if floor is None else [floor], dtype=torch.float64)
    return JudgedText(tokens=tokens, exact=exact, recalled=recalled, floor=floors)


def _lengths(n_context: int, max_positions: int | None) -> tuple[int, int]:
    """Return the tokens of a text and those of them that are its context, within the model's positions."""
    n = n_context + POSITIONS + 1
    if max_positions is not None:
        n = min(n, max_positions)
    return n, n - 1 - min(POSITIONS, n - 2)


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
