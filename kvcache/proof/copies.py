"""Copies of a model whose weights have another dtype: what rounding does is seen beside them."""

import copy
import gc
from collections.abc import Callable
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


def copy_bytes(model: PreTrainedModel, n_logits: int, dtype: torch.dtype) -> int:
    """Estimate what a copy at `dtype` takes while its logits are compared: its weights, and the logits twice."""
    return (count_parameters(model) + 2 * n_logits) * dtype.itemsize


def holds_in_float32(
    check: Callable[[PreTrainedModel], bool], model: PreTrainedModel, n_logits: int, room_bytes: int | None = None
) -> bool:
    """Return what `check` finds of a copy of a coarser model in float32, where what remains is no rounding.

    False where the model's weights are float32 already, where the copy and its `n_logits` logits would take more than
    `room_bytes` (`copy_bytes`), or where the copy cannot be made or run. It is freed before this returns.
    """
    coarser = any(weight.dtype in (torch.bfloat16, torch.float16) for weight in model.parameters())
    if not coarser or (room_bytes is not None and copy_bytes(model, n_logits, torch.float32) > room_bytes):
        return False
    try:
        return check(copied(model, torch.float32))
    except torch.AcceleratorError:  # the CUDA context is lost
        raise
    except Exception:  # noqa: BLE001  # as of the floor: without it the reason stays open
        return False
    finally:
        gc.collect()  # a model may refer to itself, and a worker collects nothing by itself
