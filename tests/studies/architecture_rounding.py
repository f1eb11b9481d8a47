"""How far rounding alone moves a model's logits: the yardstick for a `false` in bfloat16."""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcache.strategies.strategy import Strategy
from kvcache.strategies.tolerance import difference, largest
from tests.tiny import build_eagerly, token_ids

ROUNDINGS = 12


def rounding(model: PreTrainedModel, prompt: Tensor, n_gen: int, *, free: bool) -> float:
    """Return the farthest of `ROUNDINGS` distances between logits of naive re-feed after `prompt [batch, n_prompt]`.

    The model's own, against the same weights in float32, and those in float32 with each weight moved by up to a step of
    the dtype: where two experts score almost the same, one rounding changes the choice and the next does not. If
    `free`, all are fed the tokens that the model chooses.
    """
    wide = copy.deepcopy(model).float()
    moved = [_moved(wide, seed, torch.finfo(model.dtype).eps) for seed in range(ROUNDINGS - 1)]
    naives = [build_eagerly("naive", each) for each in (wide, model, *moved)]
    for naive in naives:
        naive.prepare(prompt.shape[0], prompt.shape[1] + n_gen, prompt_length=prompt.shape[1])
    forced = naives[1].generate(prompt, n_gen) if free else token_ids(5, 1, n_gen).expand(prompt.shape[0], -1)
    expected, *found = (logits_of(naive, prompt, forced) for naive in naives)
    return max(difference(expected, each, largest(expected)) for each in found)


def logits_of(strategy: Strategy, prompt: Tensor, forced: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the logits `[batch, n_gen, vocab]` where the tokens `forced [batch, n_gen]` are fed."""
    steps: list[Tensor] = []
    n_gen = forced.shape[1]
    strategy.generate(prompt, n_gen, lambda _, logits: steps.append(logits), forced=forced, attention_mask=mask)
    return torch.stack(steps, dim=1)


def _moved(model: PreTrainedModel, seed: int, share: float) -> PreTrainedModel:
    """Copy `model` with every weight moved by up to this share of itself."""
    found, draws = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for weight in found.parameters():
        weight.mul_(1 + share * (2 * torch.rand(weight.shape, generator=draws) - 1))
    return found
