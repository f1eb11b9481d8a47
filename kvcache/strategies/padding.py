"""Left padding: which masks are taken of which models, and where padding goes that follows a context."""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from kvcache.caches.contract import Kind
from kvcache.caches.dynamic import DynamicKV
from kvcache.models.rotary import switches
from kvcache.strategies.failing_forward import ForwardFails, naming_transformers
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


def check_whole(mask: Tensor | None, earlier: Tensor | None, n_fed: int) -> None:
    """Refuse a prompt in parts if any part has a mask: `n_fed` tokens of it were fed already, `earlier` is their mask.

    Raises:
        ValueError: a part was fed before, and it or this one has a mask.
    """
    if n_fed and (mask is not None or earlier is not None):
        raise ValueError(
            f"a prompt with an attention_mask must be fed in one prefill: {n_fed} tokens were fed before; reset first"
        )


COMPARED_POSITIONS = 32
"""Of each row so many positions are compared, its last ones."""
_PADDED = "a forward of a padded prompt"


@torch.inference_mode()
def check_model(model: PreTrainedModel, ids: Tensor, mask: Tensor, capacity: int, kind: Kind | None = None) -> None:
    """Compare each row of `ids [batch, q]`, if any of them has padding, with what it gives without.

    Rows of one length are fed together, so that this costs a forward for each length. Where layers keep blocks of
    tokens, the first that padding moves may end behind the prompt: the rows are then compared with `capacity` tokens.

    Some models of transformers do not leave out what a mask marks: it runs through a recurrent state, or is counted.
    Others do, and lose it where a cache holds the padding: with `kind`, the last token is fed to such a cache (to a
    dynamic one if the kind is lossy, since its own logits are others anyway). One that takes a row's padding for
    another's is wrong in the others alone, so that no row stands for all.

    Raises:
        ValueError: its logits are others, or will be before `capacity` tokens are fed, or its own code fails.
    """
    check_rotary_tables(model, mask, capacity)
    check_selection(model, mask, capacity)
    check_scales(model, mask, capacity)
    if mask.all():
        return
    if _keeps_blocks(model):
        ids, mask = _until(capacity, ids, mask)
    lengths = mask.sum(dim=1).tolist()
    try:
        with naming_transformers(model, _PADDED):
            found = [last_logits(model, ids, attention_mask=mask, keep=min(max(lengths), COMPARED_POSITIONS))]
        if kind is not None:
            found.append(_stepped(model, ids, mask, kind if kind.promise == "exact" else DynamicKV))
    except ForwardFails as reason:
        raise ValueError(f"{reason}: feed prompts of equal length, without an attention_mask") from reason
    for length in sorted(set(lengths)):
        rows = [row for row, own in enumerate(lengths) if own == length]
        together = last_logits(model, ids[rows, -length:], keep=min(length, COMPARED_POSITIONS))
        for alone, row, logits in ((together[n], row, logits) for n, row in enumerate(rows) for logits in found):
            both = min(len(alone), logits.shape[1])
            if not difference(alone[-both:], logits[row, -both:], largest(alone)) <= tolerance(model):
                raise ValueError(
                    f"{model.config.model_type} gives other logits for a prompt that is padded than for the prompt "
                    "alone (transformers): feed prompts of equal length, without an attention_mask"
                )


def _keeps_blocks(model: PreTrainedModel) -> bool:
    """Return whether any layer keeps something else than rows and states: an indexer's keys, compressed entries."""
    config = model.config.get_text_config(decoder=True)
    plain = {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}
    kinds = (
        {type(layer) for layer in DynamicCache(config=config).layers} if hasattr(config, "num_hidden_layers") else ()
    )
    return any(kind not in plain and not issubclass(kind, LinearAttentionCacheLayerMixin) for kind in kinds)


def _until(capacity: int, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Lengthen every row by the same tokens, those of the longest row again, to `capacity` in all."""
    longest = ids[mask.sum(dim=1).argmax()]
    more = longest.repeat(-(-capacity // len(longest)))[: max(0, capacity - ids.shape[1])].expand(len(ids), -1)
    return torch.cat([ids, more], dim=1), torch.cat([mask, torch.ones_like(more)], dim=1)


def check_rotary_tables(model: PreTrainedModel, mask: Tensor, capacity: int) -> None:
    """Refuse rows of unequal length where the longest one will change the rotary table of them all.

    Raises:
        ValueError: a row reaches the model's switch before `capacity` tokens are fed, another does so later.
    """
    lengths = mask.sum(dim=1)
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest == longest:
        return
    longest += capacity - mask.shape[1]
    for kind, switch in switches(model):
        # Longrope has two tables; a dynamic one is made for the longest row at each length beyond.
        if longest > switch and (kind != "longrope" or shortest <= switch):
            raise ValueError(
                f"{model.config.model_type} takes its rotary table from the longest row once that has more than "
                f"{switch} tokens ({kind}), and shorter rows would get it too: feed prompts of equal length, without "
                "an attention_mask"
            )


def check_selection(model: PreTrainedModel, mask: Tensor, capacity: int) -> None:
    """Refuse padding where sparse attention will select fewer tokens than there are.

    transformers' indexers score the padding too, and count it among what they select: whether that shows depends on
    the tokens, so that comparing a few rows proves nothing.

    Raises:
        ValueError: the mask has padding, and more than the model's selection will be fed.
    """
    selected = _selected_tokens(model)
    if selected is not None and selected < capacity and not mask.all():
        raise ValueError(
            f"{model.config.model_type} attends to {selected} selected tokens, fewer than the {capacity} there will "
            "be, and transformers selects among the padding too: feed prompts of equal length, without an "
            "attention_mask"
        )


_SCALED_BY_COLUMN = {"llama4_text": ("floor_scale", 0), "inkling_text": ("log_scaling_n_floor", 1)}
"""Types that scale queries by a token's column in the batch, not by its position; what says from how many tokens on,
and how many more it takes."""


def check_scales(model: PreTrainedModel, mask: Tensor, capacity: int) -> None:
    """Refuse padding where queries will be scaled by their columns, the padding's included.

    A prompt that ends before that would show nothing.

    Raises:
        ValueError: the mask has padding, and the scale begins before `capacity` tokens are fed.
    """
    config = model.config.get_text_config(decoder=True)
    name, more = _SCALED_BY_COLUMN.get(config.model_type, ("", 0))
    floor = getattr(config, name, None)
    if floor is None or mask.all() or not getattr(config, "attn_temperature_tuning", True):
        return
    begin = floor + more
    if begin > capacity:
        return
    raise ValueError(
        f"{config.model_type} scales its queries by their number in the batch from {begin} on, and transformers counts "
        "the padding too: feed prompts of equal length, without an attention_mask"
    )


def _selected_tokens(model: PreTrainedModel) -> int | None:
    """Return how many tokens sparse attention selects at most, by the names that configs have for it; None: all."""
    config = vars(model.config.get_text_config(decoder=True))
    if blocks := config.get("index_topk_blocks"):
        return int(blocks * config.get("index_block_size", 1))
    return config.get("index_topk") or config.get("indexer_budget")


def _stepped(model: PreTrainedModel, ids: Tensor, mask: Tensor, kind: Kind) -> Tensor:
    """Feed all tokens but the last to a cache, then the last one; its logits, `[batch, 1, vocab]`."""
    n = ids.shape[1]
    kv = kind(model, n, n)
    with naming_transformers(model, _PADDED, kv.cache):
        last_logits(model, ids[:, :-1], cache=kv.cache, attention_mask=mask[:, :-1], mask_length=kv.padded_length)
        return last_logits(
            model, ids[:, -1:], cache=kv.cache, attention_mask=mask, mask_length=kv.padded_length, n_past=n - 1
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
