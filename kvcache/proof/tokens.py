"""The proof that a strategy emits the same tokens as naive re-feed, taken before any of its times.

One parallel forward over a sequence gives the logits at every position at once. If the argmax at each position is the
token that follows, then by induction the sequence is exactly what naive greedy re-feed emits. Every strategy is then
fed that sequence (teacher forcing) and its logits are compared at every position.

The induction holds where the logits of a position do not depend on the tokens after it. Models for which they do
(bidirectional layers, a long rope that switches, sparse attention that selects anew) are found out by a few forwards
over the beginning alone; for them the reference is naive re-feed itself, step by step.
"""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcache.models.rotary import RotaryTables
from kvcache.models.skeleton import is_out_of_memory
from kvcache.proof.copies import holds_in_float32
from kvcache.strategies.cached import Dynamic
from kvcache.strategies.failing_forward import naming_transformers
from kvcache.strategies.naive import Naive
from kvcache.strategies.strategy import Strategy, last_logits
from kvcache.strategies.tolerance import difference, tolerance
from kvcache.strategies.tolerance import largest as greatest

COMPARED_TOKENS = 2048
"""Naive steps are compared with the parallel forward up to so many tokens fed; the first and two more in any case."""


class NonFiniteLogits(Exception):
    """The model gave NaN or infinite logits."""


class WrongShape(Exception):
    """The model gave logits of another shape than one row of the vocabulary for each sequence."""


class NotRepeatable(Exception):
    """The model gave other logits when it was fed the same tokens again, so that nothing can be proved about it."""


@dataclass(frozen=True)
class Reference:
    """What naive re-feed emits: `tokens [batch, n_gen]`, and the `logits [batch, n_gen, vocab]` that chose them."""

    tokens: Tensor
    logits: Tensor
    prefix_stable: bool = True
    """Whether a position's logits are the same whatever follows it; if not, the logits are naive's own."""
    by_naive: bool = False
    """Whether the logits are naive's own, step by step; else they are those of one parallel forward."""
    rounding: float = 0.0
    """How far the parallel forward's logits are from naive's by rounding alone, as a share of the largest; 0 where
    the logits are the parallel forward's own, or where more than rounding makes them differ."""


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
    tokens: Tensor
    """What it chose at the computed positions, `[batch, positions_checked]`."""


@torch.inference_mode()
def reference(
    model: PreTrainedModel,
    prompt: Tensor,
    n_gen: int,
    context: Tensor | None = None,
    room_bytes: int | None = None,
) -> Reference:
    """Find what naive greedy re-feed emits after `context` and `prompt [batch, n_prompt]`, without n_gen re-feeds.

    A cached run drafts the tokens (where the model has no cache, anything does), one parallel forward verifies them.
    Where they differ (a tie, or a broken cache), the forward's own choices are the next draft; each pass settles at
    least one more position of every sequence, so n_gen passes are enough. Where they are not, or a forward over a
    part of the sequence gives other logits, naive re-feed is run whole, and once more. A copy in float32 then shows
    whether coarser weights only round, unless it takes more than `room_bytes`.

    Raises:
        ForwardFails: a forward fails in transformers' own code.
        NonFiniteLogits: the forward gave NaN or infinity.
        NotRepeatable: naive re-feed gave other logits the second time.
    """
    before = prompt if context is None else torch.cat([context, prompt], dim=1)
    with naming_transformers(model):
        return _found(model, before, n_gen, room_bytes)


def _found(model: PreTrainedModel, before: Tensor, n_gen: int, room_bytes: int | None) -> Reference:
    found = _verified(model, before, _draft(model, before, n_gen))
    if found is not None and _is_naives(model, before, found):
        return found
    found = _step_by_step(model, before, n_gen)
    again = _step_by_step(model, before, n_gen, found.tokens)
    if not difference(found.logits, again.logits, greatest(found.logits)) <= tolerance(model):
        raise NotRepeatable(
            f"{model.config.model_type} gives other logits when it is fed the same tokens again: nothing can be proved "
            "about any strategy"
        )

    def is_stable(wide: PreTrainedModel) -> bool:
        verified = _verified(wide, before, found.tokens)
        return verified is not None and _is_naives(wide, before, verified)

    if not holds_in_float32(is_stable, model, found.logits.numel(), room_bytes):
        return found
    parallel = last_logits(model, torch.cat([before, found.tokens[:, :-1]], dim=1), keep=n_gen)
    rounding = difference(found.logits, parallel, greatest(found.logits))
    return replace(found, prefix_stable=True, rounding=rounding)


def _draft(model: PreTrainedModel, before: Tensor, n_gen: int) -> Tensor:
    """Guess the tokens `[batch, n_gen]` that follow `before`, with a cache if the model can be run with one."""
    try:
        drafting = Dynamic(model)
        drafting.prepare(before.shape[0], before.shape[1] + n_gen)
        return drafting.generate(before, n_gen)
    except torch.AcceleratorError:  # the CUDA context is lost
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return before.new_zeros((before.shape[0], n_gen))  # the cached strategies will say for themselves what is wrong


def _verified(model: PreTrainedModel, before: Tensor, tokens: Tensor) -> Reference | None:
    """Return the tokens that parallel forwards settle on, from the draft `tokens`.

    None if they do not settle, or if the first token's logits are others than a forward over `before` alone gives.
    """
    n_gen, tables = tokens.shape[1], RotaryTables(model)
    tables.make_original()  # each forward begins as the model was made, whatever was fed before
    alone = last_logits(model, before)[:, -1]
    for _ in range(n_gen + 1):
        tables.make_original()
        logits = last_logits(model, torch.cat([before, tokens[:, :-1]], dim=1), keep=n_gen)
        if not logits.isfinite().all():
            raise NonFiniteLogits("the parallel forward gave NaN or infinite logits")
        if not difference(logits[:, 0], alone, greatest(logits)) <= tolerance(model):  # NaN is no agreement
            return None
        chosen = logits.argmax(dim=-1)
        if torch.equal(chosen, tokens):
            return Reference(tokens, logits)
        tokens = chosen
    return None


def _is_naives(model: PreTrainedModel, before: Tensor, found: Reference) -> bool:
    """Return whether naive steps, each fed the beginning alone, give the logits of the parallel forward."""
    n_gen, scale = found.tokens.shape[1], greatest(found.logits)
    whole, tables = torch.cat([before, found.tokens], dim=1), RotaryTables(model)
    for step in _compared_steps(before.shape, n_gen):
        tables.make_original()
        alone = last_logits(model, whole[:, : before.shape[1] + step])[:, -1]
        if not difference(found.logits[:, step], alone, scale) <= tolerance(model):
            return False
    return True


def _compared_steps(shape: tuple[int, ...], n_gen: int) -> list[int]:
    """Choose the generated tokens whose naive step is compared, from 1: of the first it was, and the last is fed whole.

    `shape` is that of the tokens before them, `[batch, n]`.
    """
    batch_size, length = shape
    affordable = COMPARED_TOKENS // (batch_size * (length + n_gen))
    count = max(0, min(n_gen - 2, max(2, affordable)))
    return sorted({round(step) for step in torch.linspace(1, max(n_gen - 2, 1), count).tolist()})


def _step_by_step(model: PreTrainedModel, before: Tensor, n_gen: int, forced: Tensor | None = None) -> Reference:
    """Run naive re-feed whole, after `before [batch, n]`."""
    naive = Naive(model)
    naive.prepare(before.shape[0], before.shape[1] + n_gen)
    logits: list[Tensor] = []

    def keep(_token: Tensor, step: Tensor) -> None:
        if not step.isfinite().all():
            raise NonFiniteLogits(f"naive gave NaN or infinite logits for generated token {len(logits) + 1}")
        logits.append(step)

    tokens = naive.generate(before, n_gen, keep, forced=forced)
    return Reference(tokens, torch.stack(logits, dim=1), prefix_stable=False, by_naive=True)


def agreement(
    strategy: Strategy,
    prompt: Tensor,
    expected: Reference,
    steps: Collection[int] | None = None,
    apart: Callable[[], AbstractContextManager[None]] = nullcontext,
    *,
    forced: bool = True,
) -> Agreement:
    """Feed `strategy` (prepared, reset) the expected tokens and compare its logits at every computed position.

    A difference in tokens within the dtype's tolerance is a tie; logits further apart than it make the match false,
    whether or not a token changed. `steps` limits the decode steps, for a strategy that can skip some. `apart` is
    entered around each comparison, so that whoever watches the strategy can leave it out. Unless `forced`, it is fed
    its own choices, and its logits are compared as long as these are the expected ones.

    Raises:
        NonFiniteLogits: the strategy gave NaN or infinity.
        WrongShape: its logits are of another shape than the expected ones.
    """
    n_gen = expected.tokens.shape[1]
    computed = [0, *sorted(steps)] if steps is not None else list(range(n_gen))
    scale = greatest(expected.logits)
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
            if same or forced:  # after other tokens there are other logits
                largest = max(largest, difference(expected.logits[:, position], logits, scale))
            same = same and torch.equal(token, expected.tokens[:, position])
            kv_bytes.append(strategy.kv_bytes)
            if position in (0, computed[-1]):
                allocated.append(strategy.kv_bytes_allocated)

    tokens = strategy.generate(prompt, n_gen, compare, forced=expected.tokens if forced else None, steps=steps)
    within = largest <= tolerance(strategy.model)
    return Agreement(
        tokens_match="false" if not within else "true" if same else "tie",
        logits_error=largest,
        positions_checked=len(computed),
        kv_bytes_after_prefill=kv_bytes[0],
        kv_bytes_after_decode=kv_bytes[-1],
        kv_bytes_allocated_after_prefill=allocated[0],
        kv_bytes_allocated_after_decode=allocated[-1],
        tokens=tokens,
    )
