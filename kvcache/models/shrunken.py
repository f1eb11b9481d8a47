"""The same model with next to no arithmetic: what is left of a step's time is the framework's."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvcache.models.skeleton import quiet

HEAD_DIM = 8
VOCAB_SIZE = 64

_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "n_inner", "ffn_dim")
"""What transformers' configs call the width of an MLP; GPT-2's n_inner is None for four times hidden."""


def shrunken(model: PreTrainedModel) -> PreTrainedModel | None:
    """Make `model` again, layer for layer, with heads, MLPs and a vocabulary too narrow to matter and random weights.

    A step of it takes the same way through Python, transformers and torch's dispatcher, and reads and multiplies next
    to nothing. None where its config cannot be shrunk so, or says less than the model has (modules put in by hand).
    """
    config = copy.deepcopy(model.config)
    try:
        _shrink(config.get_text_config(decoder=True))
        with quiet(), torch.random.fork_rng(devices=[]):
            found: PreTrainedModel = type(model)._from_config(  # noqa: SLF001  # what AutoModel.from_config calls
                config,
                attn_implementation=model.config._attn_implementation,  # noqa: SLF001  # there is no public way to ask
                dtype=model.dtype,
            )
        found.to(model.device)  # type: ignore[arg-type]  # transformers' decorator hides the signature
        found.eval()
        found.requires_grad_(requires_grad=False)
        found(torch.zeros((1, 2), dtype=torch.long, device=model.device))
    except Exception:  # noqa: BLE001  # a config may refuse in any way, or its model fail with such widths
        return None
    return found if _modules(found) == _modules(model) else None


def _modules(model: PreTrainedModel) -> list[tuple[str, type[nn.Module]]]:
    return [(name, type(module)) for name, module in model.named_modules()]


def _shrink(config: Any) -> None:
    """Narrow `config` in place; numbers of layers, heads and experts stay."""
    heads = config.num_attention_heads
    config.hidden_size = heads * HEAD_DIM
    if vars(config).get("head_dim") is not None:  # elsewhere it follows from the other two
        config.head_dim = HEAD_DIM
    if hasattr(config, "word_embed_proj_dim"):
        config.word_embed_proj_dim = config.hidden_size
    for width in _WIDTHS:
        if getattr(config, width, None) is not None:
            setattr(config, width, HEAD_DIM)
    config.vocab_size = VOCAB_SIZE
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, token, None)
