"""Copies of a model whose weights have another dtype: what rounding does is seen beside them."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvcache.models.skeleton import count_parameters


def copied(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Copy a model to `dtype`, weight by weight: there is never a second one at its own dtype."""
    cast: dict[int, Any] = {
        id(weight): nn.Parameter(weight.to(dtype), requires_grad=False)
        for weight in model.parameters()
        if weight.is_floating_point()
    }
    return copy.deepcopy(model, cast)


def float32_copy(model: PreTrainedModel, room_bytes: int | None = None) -> PreTrainedModel | None:
    """Copy a model with coarser weights to float32, in which what remains of a difference is no rounding.

    None where its weights are float32 already, where the copy would take more than `room_bytes`, or cannot be made.
    """
    coarser = any(weight.dtype in (torch.bfloat16, torch.float16) for weight in model.parameters())
    if not coarser or (room_bytes is not None and torch.float32.itemsize * count_parameters(model) > room_bytes):
        return None
    try:
        return copied(model, torch.float32)
    except torch.AcceleratorError:  # the CUDA context is lost
        raise
    except Exception:  # noqa: BLE001  # as of the floor: without it the reason stays open
        return None
