"""What a lossy cache loses: its predictions against the exact ones, over a text that is fed token by token.

A prompt attends to its own exact keys, so a cache is exercised by decode steps only: a text's beginning is prefilled,
the rest goes through decode, and the logits after each step are compared with those of one parallel forward at the same
dtype. Axes: `batch` sequences of `n` tokens, of which `n_context` are prefilled.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcache.proof.tokens import NonFiniteLogits
from kvcache.strategies.strategy import Strategy, last_logits

RECALLED = 64
"""Tokens of the passage that the recall probe repeats."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How near the predictions over a text are to the exact ones; means over all positions and sequences."""

    top1_agreement: float
    """Share of positions with the same most likely token."""
    commonest_share: float
    """What always naming the exact run's commonest token would score: agreement no better than this says nothing."""
    logit_kl: float
    """Kullback-Leibler divergence of the exact distribution from the kind's, in nats."""
    logit_kl_p99: float
    """Its 99th percentile over positions."""
    perplexity_ratio: float
    """Perplexity of the text under the kind, over that under the exact run."""
    agreement_by_position: tuple[float, ...]
    """Share of sequences that agree, at each decode step."""


@torch.inference_mode()
def sample_text(strategy: Strategy, start: Tensor, n: int, seed: int) -> Tensor:
    """Write a text at temperature 1 with an exact `strategy`: `start [batch, s]` and then drawn tokens, `[batch, n]`.

    The draws come from a generator of their own on the CPU, so a text is equal on every device that gives equal logits.

    Raises:
        ValueError: `n` leaves nothing to write.
    """
    if n <= start.shape[1]:
        raise ValueError(f"a text of {n} tokens leaves nothing to write after {start.shape[1]}")
    generator = torch.Generator().manual_seed(seed)
    strategy.prepare(start.shape[0], n)
    tokens, logits = [start], strategy.prefill(start)
    while True:
        drawn = torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator).to(start.device)
        tokens.append(drawn)
        if start.shape[1] + len(tokens) - 1 == n:
            return torch.cat(tokens, dim=1)
        logits = strategy.decode(drawn)


def with_recall(text: Tensor) -> Tensor:
    """Replace the last tokens of `text [batch, n]` by its first ones: whoever kept the beginning can foresee them.

    Raises:
        ValueError: the text is too short for a passage at both ends.
    """
    if text.shape[1] < 2 * RECALLED:
        raise ValueError(f"a text of {text.shape[1]} tokens has no room for a passage of {RECALLED} at both ends")
    return torch.cat([text[:, :-RECALLED], text[:, :RECALLED]], dim=1)


@torch.inference_mode()
def exact_logits(model: PreTrainedModel, text: Tensor, n_context: int) -> Tensor:
    """Predict all tokens of `text [batch, n]` after the first decode step's by one parallel forward.

    Returns:
        `[batch, n - n_context - 1, vocab]`: the logits that follow each token fed by decode.

    Raises:
        ValueError: fewer than two tokens follow the context.
        NonFiniteLogits: the forward gave NaN or infinity.
    """
    steps = text.shape[1] - n_context - 1
    if n_context < 1 or steps < 1:
        raise ValueError(f"a text of {text.shape[1]} tokens with {n_context} prefilled leaves no step to compare")
    logits = last_logits(model, text[:, :-1], keep=steps)
    if not logits.isfinite().all():
        raise NonFiniteLogits("the parallel forward gave NaN or infinite logits")
    return logits


def quality(strategy: Strategy, text: Tensor, n_context: int, exact: Tensor) -> Quality:
    """Feed `text [batch, n]` to `strategy`, all but the context by decode, and compare with `exact_logits` of it.

    Raises:
        NonFiniteLogits: the strategy gave NaN or infinity.
    """
    batch_size, n = text.shape
    strategy.prepare(batch_size, n, prompt_length=n_context)
    compared: list[Tensor] = []
    step = 0

    def compare(_token: Tensor, logits: Tensor) -> None:
        nonlocal step
        if not logits.isfinite().all():
            raise NonFiniteLogits(f"{strategy.name} gave NaN or infinite logits for token {n_context + step}")
        if step:  # the first logits are the prefill's
            compared.append(_compared(exact[:, step - 1], logits, text[:, n_context + step]))
        step += 1

    strategy.generate(text[:, :n_context], n - n_context, compare, forced=text[:, n_context:])
    return _summary(torch.stack(compared), exact)


def equal_tokens(emitted: Tensor, expected: Tensor) -> int:
    """Count the first tokens of `emitted [batch, n_gen]` that equal the expected ones; the fewest over the batch."""
    return int((emitted == expected).long().cumprod(dim=1).sum(dim=1).min())


@torch.inference_mode()
def logit_kl_floor(
    model: PreTrainedModel, text: Tensor, n_context: int, exact: Tensor, room_bytes: int | None = None
) -> float | None:
    """Return what rounding alone does: the mean KL of `model` in float32 against its bfloat16 copy, in nats.

    Both are parallel forwards of the same weights, rounded to bfloat16 for the second; `exact` are the logits of
    the one at the model's own dtype. None where there is no copy (it would take more than `room_bytes`, a model that
    cannot be copied) or the copy gives NaN.
    """
    if room_bytes is not None and floor_bytes(model, exact) > room_bytes:
        return None  # a system without memory kills the process instead of raising an error
    try:
        wide, narrow = (
            exact if model.dtype == dtype else exact_logits(_copy(model, dtype), text, n_context)
            for dtype in (torch.float32, torch.bfloat16)
        )
        by_position = [_kl(*logits).mean() for logits in zip(wide.unbind(1), narrow.unbind(1), strict=True)]
        return torch.stack(by_position).mean().item()
    except torch.AcceleratorError:  # the CUDA context is lost
        raise
    except Exception:  # noqa: BLE001  # the copy is only for this yardstick: without it everything else is judged
        return None


def floor_bytes(model: PreTrainedModel, exact: Tensor) -> int:
    """Estimate what `logit_kl_floor` takes: a copy of the weights for each dtype that the model has not, and logits."""
    parameters = sum(weight.numel() for weight in model.parameters())
    others = [dtype for dtype in (torch.float32, torch.bfloat16) if dtype != model.dtype]
    return sum((parameters + 2 * exact.numel()) * dtype.itemsize for dtype in others)


def _copy(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Copy a model to `dtype`, weight by weight: there is never a second one at its own dtype."""
    cast: dict[int, Any] = {
        id(weight): nn.Parameter(weight.to(dtype), requires_grad=False)
        for weight in model.parameters()
        if weight.is_floating_point()
    }
    return copy.deepcopy(model, cast)


def _compared(exact: Tensor, found: Tensor, following: Tensor) -> Tensor:
    """Return agreement, KL and difference in negative log-likelihood of each sequence, `[3, batch]` in float64."""
    same = exact.argmax(-1) == found.argmax(-1)
    nll = [-_log_softmax(logits).gather(-1, following[:, None])[:, 0] for logits in (exact, found)]
    return torch.stack([same.double(), _kl(exact, found), nll[1] - nll[0]])


def _summary(steps: Tensor, exact: Tensor) -> Quality:
    """Average `steps [positions, 3, batch]`."""
    same, kl, nll = steps.unbind(1)
    chosen = exact.argmax(-1).flatten()
    return Quality(
        top1_agreement=same.mean().item(),
        commonest_share=chosen.bincount().max().item() / chosen.numel(),
        logit_kl=kl.mean().item(),
        logit_kl_p99=kl.flatten().quantile(0.99).item(),
        perplexity_ratio=nll.mean().exp().item(),
        agreement_by_position=tuple(same.mean(dim=1).tolist()),
    )


def _kl(exact: Tensor, found: Tensor) -> Tensor:
    """Return the divergence of `exact [..., vocab]` from `found`, `[...]`."""
    wide, narrow = _log_softmax(exact), _log_softmax(found)
    return (wide.exp() * (wide - narrow)).sum(-1)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)
