"""Left padding: which masks are taken, and where the padding of a prompt goes that follows a context."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcache.strategies.strategy import last_logits
from kvcache.strategies.tolerance import difference, largest, tolerance


def check_mask(mask: Tensor, ids: Tensor) -> None:
    """Refuse a mask that is not left padding of `ids [batch, q]`.

    Raises:
        ValueError: the mask has another shape than `ids`, other values than 0 and 1, a row without tokens, or a 0
            after a 1 (padding on the right, or a hole).
    """
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}, the prompt {list(ids.shape)}: they must be equal"
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("attention_mask has values other than 0 (padding) and 1 (token)")
    for row, marks in enumerate(mask.long().tolist()):
        if 1 not in marks:
            raise ValueError(f"attention_mask leaves no token in row {row}: valid: at least one 1 in every row")
        if 0 in marks[marks.index(1) :]:
            raise ValueError(
                f"attention_mask has a 0 after a 1 in row {row}: only left padding is taken; put the padding before "
                "the tokens"
            )


@torch.inference_mode()
def check_model(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> None:
    """Compare the row of `ids [batch, q]` that has the most padding with what it gives alone.

    Some models of transformers do not leave out what a mask marks: it runs through a recurrent state, or is counted.

    Raises:
        ValueError: its logits are others.
    """
    row = int(mask.sum(dim=1).argmin())
    start = int(mask.shape[1] - mask[row].sum())
    if not start:
        return
    padded = last_logits(model, ids, attention_mask=mask)[row, -1]
    alone = last_logits(model, ids[row : row + 1, start:])[0, -1]
    if not difference(alone, padded, largest(alone)) <= tolerance(model):
        raise ValueError(
            f"{model.config.model_type} gives other logits for a prompt that is padded than for the prompt alone "
            "(transformers): feed prompts of equal length, without an attention_mask"
        )


def moved_before(context: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the left padding of a prompt to before its context.

    `context [batch, n_depth]`, `ids [batch, q]`, `mask [batch, q]`; returns ids and mask `[batch, n_depth + q]`. Left
    where it was, the padding would be a hole: a sliding window would count it, and recurrent states would run over it.
    """
    tokens = torch.cat([context, ids], dim=1)
    whole = torch.cat([torch.ones_like(context), mask.long()], dim=1)
    order = whole.argsort(dim=1, stable=True)  # zeros first, everything else in its order
    return tokens.gather(1, order), whole.gather(1, order)
