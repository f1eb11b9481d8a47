"""How far apart the logits of two correct paths may lie: they add the same numbers in another order."""

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}
"""Largest difference of logits between two correct paths, as a share of the largest logit, by the weights' dtype."""


def tolerance(model: PreTrainedModel) -> float:
    """Return the tolerance of the coarsest of the model's weights: its head, say, may be finer than its layers."""
    coarsest = max(TOLERANCE.values())
    kinds = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    return max((TOLERANCE.get(kind, coarsest) for kind in kinds), default=TOLERANCE[torch.float32])


def largest(logits: Tensor) -> float:
    """Return the largest absolute value."""
    size: float = torch.linalg.vector_norm(logits, math.inf).item()  # no second copy of the logits, as abs() makes
    return size


def difference(expected: Tensor, found: Tensor, scale: float) -> float:
    """Return the largest difference as a share of `scale`; where that is zero, any difference is infinite."""
    apart = (found.float() - expected.float()).abs().max().item()
    return apart / scale if scale else math.inf if apart else 0.0
