"""The proof that a strategy emits the same tokens as naive re-feed, taken before any of its times.

One parallel forward over a sequence gives the logits at every position at once. If the argmax at each position is the
token that follows, then by induction the sequence is exactly what naive greedy re-feed emits. Every strategy is then
fed that sequence (teacher forcing) and its logits are compared at every position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcache.strategies.cached import Dynamic
from kvcache.strategies.strategy import Strategy, last_logits

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}
"""Largest difference of logits between two correct paths, as a share of the largest logit, by dtype."""


class NonFiniteLogits(Exception):
    """The model gave NaN or infinite logits."""


class WrongShape(Exception):
    """The model gave logits of another shape than one row of the vocabulary for each sequence."""


@dataclass(frozen=True)
class Reference:
    """What naive re-feed emits: `tokens [batch, n_gen]`, and the `logits [batch, n_gen, vocab]` that chose them."""

    tokens: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Agreement:
    """How a strategy's logits and tokens compare with a reference, over `positions_checked` positions."""

    tokens_match: Literal["true", "tie", "false"]
    logits_error: float
    """Largest difference, as a share of the reference's largest logit."""
    positions_checked: int
    kv_bytes_after_prefill: int
    kv_bytes_after_decode: int
    """Bytes of keys and values that the strategy held when the first and the last token had been chosen."""
    kv_bytes_allocated_after_prefill: int
    kv_bytes_allocated_after_decode: int
    """Bytes of every storage of its cache at the same moments."""


@torch.inference_mode()
def reference(model: PreTrainedModel, prompt: Tensor, n_gen: int, context: Tensor | None = None) -> Reference:
    """Find what naive greedy re-feed emits after `context` and `prompt [batch, n_prompt]`, without n_gen re-feeds.

    A cached run drafts the tokens, one parallel forward verifies them. Where they differ (a tie, or a broken cache),
    the forward's own choices are the next draft; each pass settles at least one more position of every sequence,
    so this ends after at most n_gen passes, whatever the draft.

    Raises:
        NonFiniteLogits: the forward gave NaN or infinity.
    """
    before = prompt if context is None else torch.cat([context, prompt], dim=1)
    draft = Dynamic(model)
    draft.prepare(prompt.shape[0], before.shape[1] + n_gen)
    tokens = draft.generate(before, n_gen)
    draft.reset()
    while True:
        logits = last_logits(model, torch.cat([before, tokens[:, :-1]], dim=1), keep=n_gen)
        if not logits.isfinite().all():
            raise NonFiniteLogits("the parallel forward gave NaN or infinite logits")
        chosen = logits.argmax(dim=-1)
        if torch.equal(chosen, tokens):
            return Reference(tokens, logits)
        tokens = chosen


def agreement(
    strategy: Strategy,
    prompt: Tensor,
    expected: Reference,
    steps: Collection[int] | None = None,
    apart: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Agreement:
    """Feed `strategy` (prepared, reset) the expected tokens and compare its logits at every computed position.

    A difference in tokens within the dtype's tolerance is a tie; logits further apart than it make the match false,
    whether or not a token changed. `steps` limits the decode steps, for a strategy that can skip some. `apart` is
    entered around each comparison, so that whoever watches the strategy can leave it out.

    Raises:
        NonFiniteLogits: the strategy gave NaN or infinity.
        WrongShape: its logits are of another shape than the expected ones.
    """
    n_gen = expected.tokens.shape[1]
    computed = [0, *sorted(steps)] if steps is not None else list(range(n_gen))
    scale = torch.linalg.vector_norm(expected.logits, math.inf).item()  # no second copy of the logits, as abs() makes
    largest = 0.0
    same = True
    remaining = iter(computed)
    kv_bytes: list[int] = []
    allocated: list[int] = []

    def compare(token: Tensor, logits: Tensor) -> None:
        nonlocal largest, same
        position = next(remaining)
        with apart():
            if logits.shape != expected.logits[:, position].shape:
                raise WrongShape(f"{strategy.name} gave logits of shape {list(logits.shape)}")
            if not logits.isfinite().all():
                raise NonFiniteLogits(f"{strategy.name} gave NaN or infinite logits for generated token {position + 1}")
            difference = (logits.float() - expected.logits[:, position].float()).abs().max().item()
            largest = max(largest, difference / scale)
            same = same and torch.equal(token, expected.tokens[:, position])
            kv_bytes.append(strategy.kv_bytes)
            if position in (0, computed[-1]):
                allocated.append(strategy.kv_bytes_allocated)

    strategy.generate(prompt, n_gen, compare, forced=expected.tokens, steps=steps)
    within = largest <= TOLERANCE[expected.logits.dtype]
    return Agreement(
        tokens_match="false" if not within else "true" if same else "tie",
        logits_error=largest,
        positions_checked=len(computed),
        kv_bytes_after_prefill=kv_bytes[0],
        kv_bytes_after_decode=kv_bytes[-1],
        kv_bytes_allocated_after_prefill=allocated[0],
        kv_bytes_allocated_after_decode=allocated[-1],
    )
