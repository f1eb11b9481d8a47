"""One text by which every lossy strategy of a cell is judged, with the exact predictions.

Axes: `batch` sequences of `n` tokens; the last `positions` of them go through decode and are compared.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcache.models.rotary import RotaryTables, is_dynamic, switches
from kvcache.models.skeleton import max_positions
from kvcache.proof.copies import holds_in_float32
from kvcache.proof.quality import (
    RECALLED,
    Quality,
    compare,
    exact_logits,
    summary,
    with_recall,
)
from kvcache.proof.rounding import logit_kl_floor
from kvcache.strategies.strategy import Strategy, last_logits
from kvcache.strategies.tolerance import difference, largest, tolerance

POSITIONS = 128
"""Decode steps that are compared, where the model has positions for so many beyond one token."""


@dataclass(frozen=True, kw_only=True)
class JudgedText:
    """What judging needs, as tensors, so that a file can carry it from one process to another."""

    tokens: Tensor
    """`[batch, n]`; after it a strategy is fed the passage of `with_recall`, where the model has positions for both."""
    exact: Tensor
    """What the parallel forward predicts after each token fed by decode, the passage's too: `[batch, steps, vocab]`."""
    n_recalled: Tensor
    """Tokens of the passage, `[]`: RECALLED, or 0 where there is none."""
    floor: Tensor
    """`logit_kl_floor`, `[1]` in float64; `[0]` where there is none."""
    prefix_stable: Tensor
    """Whether the first of these predictions is the same without the tokens after it, `[]`: where it is not, they are
    no measure of what a cache loses."""


def kept_positions(n_context: int, n_positions: int | None) -> int:
    """Count the positions, the passage's too, whose exact logits are kept for each sequence."""
    n = text_length(n_context, n_positions)
    return _steps(n) + _recalled(n, n_positions)


def text_length(n_context: int, n_positions: int | None) -> int:
    """Count the tokens of a text that judges POSITIONS steps after a context, or as many as the model has room for.

    Of `n_positions` (None: any number) the last ones are for the passage, if POSITIONS steps still fit before it.
    """
    if n_positions is None:
        return n_context + POSITIONS + 1
    room = n_positions - RECALLED if n_positions >= POSITIONS + 2 + RECALLED else n_positions
    return min(n_context + POSITIONS + 1, room)


def predict(model: PreTrainedModel, tokens: Tensor, room_bytes: int | None = None) -> JudgedText:
    """Make what judging needs of a text, `tokens [batch, n]`, whose last POSITIONS steps are compared.

    The context of a shorter text is one token. `room_bytes` is as in `logit_kl_floor`. A text that begins before the
    length at which the model computes positions in another way, and ends beyond it, is cut to that length: one forward
    over all of it is not what a step computes.

    Raises:
        ValueError: the text has fewer than three tokens.
        NonFiniteLogits: the model gave NaN or infinity.
    """
    n = tokens.shape[1]
    positions = _alike_positions(model, n - 1 - _steps(n))
    n = min(n, text_length(n - 1 - _steps(n), positions))
    tokens = tokens[:, :n]
    steps, n_recalled = _steps(n), _recalled(n, positions)
    n_context = n - 1 - steps
    tables = RotaryTables(model)
    tables.make_original()
    exact = exact_logits(model, with_recall(tokens) if n_recalled else tokens, n_context)
    tables.make_original()
    beginning = tokens[:, : n_context + 1]

    def is_stable(wide: PreTrainedModel) -> bool:
        return _is_prefix_stable(wide, beginning, exact_logits(wide, tokens, n_context))

    stable = _is_prefix_stable(model, beginning, exact) or holds_in_float32(is_stable, model, exact.numel(), room_bytes)
    floor = logit_kl_floor(model, tokens, n_context, exact[:, :steps], room_bytes)
    return JudgedText(
        tokens=tokens,
        exact=exact,
        n_recalled=torch.tensor(n_recalled),
        floor=torch.tensor([] if floor is None else [floor], dtype=torch.float64),
        prefix_stable=torch.tensor(stable),
    )


def _alike_positions(model: PreTrainedModel, n_context: int) -> int | None:
    """Return how many positions the model computes as it does those after `n_context` tokens; None: any number."""
    limits = [length for kind, length in switches(model) if is_dynamic(kind) or n_context <= length]
    return min([*limits, *([] if (most := max_positions(model)) is None else [most])], default=None)


@torch.inference_mode()
def _is_prefix_stable(model: PreTrainedModel, beginning: Tensor, exact: Tensor) -> bool:
    """Return whether a forward over `beginning` alone gives the first of the `exact` predictions."""
    alone = last_logits(model, beginning)[:, -1]
    return difference(exact[:, 0], alone, largest(exact)) <= tolerance(model)


def _steps(n: int) -> int:
    """Count the decode steps that are compared in a text of `n` tokens."""
    return min(POSITIONS, n - 2)


def _recalled(n: int, n_positions: int | None) -> int:
    """Count the tokens of the passage that is repeated after a text of `n` tokens: none where there is no room."""
    fits = n_positions is None or n + RECALLED <= n_positions
    return RECALLED if n >= RECALLED and fits else 0


def judge(strategy: Strategy, text: JudgedText) -> tuple[Quality, float | None]:
    """Compare the strategy's predictions over the text; return its quality and its `recall_agreement`, if there is one.

    The strategy must be prepared anew afterwards.

    Raises:
        NonFiniteLogits: the strategy gave NaN or infinity.
    """
    n_recalled = int(text.n_recalled)
    fed = with_recall(text.tokens) if n_recalled else text.tokens
    judged = text.exact.shape[1] - n_recalled
    steps = compare(strategy, fed, text.tokens.shape[1] - 1 - judged, text.exact)
    found = summary(steps[:judged], text.exact[:, :judged])
    # That the passage begins, nobody can foresee.
    return found, steps[judged + 1 :, 0].mean().item() if n_recalled else None
