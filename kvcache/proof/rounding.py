"""What rounding alone does: the yardstick beside which a lossy cache's `logit_kl` is read.

Axes: `batch` sequences of `n` tokens, of which the first `n_context` are not compared.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from kvcache.proof.copies import copied, copy_bytes
from kvcache.proof.quality import divergence, exact_logits


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
    slow = model.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001  # no public name
    products: AbstractContextManager[object] = WideProducts() if slow else nullcontext()
    try:
        with products:
            wide, narrow = (
                exact if model.dtype == dtype else exact_logits(copied(model, dtype), text, n_context)
                for dtype in (torch.float32, torch.bfloat16)
            )
        by_position = [divergence(*logits).mean() for logits in zip(wide.unbind(1), narrow.unbind(1), strict=True)]
        return torch.stack(by_position).mean().item()
    except torch.AcceleratorError:  # the CUDA context is lost
        raise
    except Exception:  # noqa: BLE001  # the copy is only for this yardstick: without it everything else is judged
        return None


def floor_bytes(model: PreTrainedModel, exact: Tensor) -> int:
    """Estimate what `logit_kl_floor` takes: a copy of the weights for each dtype that the model has not, and logits."""
    others = [dtype for dtype in (torch.float32, torch.bfloat16) if dtype != model.dtype]
    return sum(copy_bytes(model, exact.numel(), dtype) for dtype in others)


class WideProducts(TorchFunctionMode):
    """Computes products with weights in float32 and rounds what comes out, as a CPU with bfloat16 products does.

    oneDNN's own way without them takes four times as long (SmolLM2-135M, 640 tokens, AVX2).
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in (nn.functional.linear, torch.addmm) or args[0].dtype != torch.bfloat16:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs or {}))
        return func(*args, **kwargs).bfloat16()
