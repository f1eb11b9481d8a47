"""What a lossy cache loses: its predictions against the exact ones, over a text that is fed token by token.

A prompt attends to its own exact keys, so a cache is exercised by decode steps only: a text's beginning is prefilled,
the rest goes through decode, and the logits after each step are compared with those of one parallel forward at the same
dtype. Axes: `batch` sequences of `n` tokens, of which `n_context` are prefilled.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
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
    """Repeat the first tokens of `text [batch, n]` after it: whoever kept the beginning can foresee them.

    Raises:
        ValueError: the text is shorter than the passage.
    """
    if text.shape[1] < RECALLED:
        raise ValueError(f"a text of {text.shape[1]} tokens has no passage of {RECALLED} to repeat")
    return torch.cat([text, text[:, :RECALLED]], dim=1)


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
    return summary(compare(strategy, text, n_context, exact), exact)


def compare(strategy: Strategy, text: Tensor, n_context: int, exact: Tensor) -> Tensor:
    """Do the same, and return what each step lost: `[positions, 3, batch]` in float64.

    The three are agreement (0 or 1), KL, and the difference in negative log-likelihood of the token that follows.

    Raises:
        NonFiniteLogits: the strategy gave NaN or infinity.
    """
    batch_size, n = text.shape
    strategy.prepare(batch_size, n, prompt_length=n_context)
    compared: list[Tensor] = []
    step = 0

    def add(_token: Tensor, logits: Tensor) -> None:
        nonlocal step
        if not logits.isfinite().all():
            raise NonFiniteLogits(f"{strategy.name} gave NaN or infinite logits for token {n_context + step}")
        if step:  # the first logits are the prefill's
            compared.append(_compared(exact[:, step - 1], logits, text[:, n_context + step]))
        step += 1

    strategy.generate(text[:, :n_context], n - n_context, add, forced=text[:, n_context:])
    return torch.stack(compared)


def summary(steps: Tensor, exact: Tensor) -> Quality:
    """Average what `compare` returned for the steps after which `exact [batch, positions, vocab]` holds."""
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


def equal_tokens(emitted: Tensor, expected: Tensor) -> int:
    """Count the first tokens of `emitted [batch, n_gen]` that equal the expected ones; the fewest over the batch."""
    return int((emitted == expected).long().cumprod(dim=1).sum(dim=1).min())


def _compared(exact: Tensor, found: Tensor, following: Tensor) -> Tensor:
    """Compare logits `[batch, vocab]` of one step: `[3, batch]`."""
    same = exact.argmax(-1) == found.argmax(-1)
    wide, narrow = _log_softmax(exact), _log_softmax(found)
    return torch.stack([same.double(), _divergence(wide, narrow), (wide - narrow).gather(-1, following[:, None])[:, 0]])


def divergence(exact: Tensor, found: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of the logits `exact [..., vocab]` from `found`, `[...]`, in nats."""
    return _divergence(_log_softmax(exact), _log_softmax(found))


def _divergence(wide: Tensor, narrow: Tensor) -> Tensor:
    return (wide.exp() * (wide - narrow)).sum(-1)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)
