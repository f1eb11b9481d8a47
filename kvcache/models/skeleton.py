"""A model without its weights: what can be counted, and refused, before any weights are read."""

from __future__ import annotations

import copy
import io
import logging
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import TYPE_CHECKING, Any

from kvcache.models.weight_cache import AttentionError, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

ATTN_IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flex_attention")
"""What may be asked for. transformers takes names of hub repositories too and runs their code: never here."""


def skeleton(config: PreTrainedConfig, attn_implementation: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Make the model that `config` describes on the meta device: every shape and no memory.

    Its weights have the types that from_pretrained gives them where `dtype` (None: float32) is asked for: a few models
    keep some in float32.

    Raises:
        ModelError: `config` describes no model, or one that cannot have `attn_implementation` on this machine.
    """
    with refusing(f"the configuration of model type {config.model_type!r}"):
        try:
            return _on_meta(config, attn_implementation, dtype)
        except (ImportError, ValueError) as error:  # so transformers says that an attention is not available
            usable = usable_attention(config)
            if not usable:
                raise
            raise AttentionError(
                f"attn_implementation {attn_implementation!r} is not available for model type {config.model_type!r} "
                f"here; valid: {', '.join(usable)}"
            ) from error


def usable_attention(config: PreTrainedConfig) -> list[str]:
    """List the attention implementations that the model supports with the packages and devices of this machine."""
    usable = []
    for name in ATTN_IMPLEMENTATIONS:
        try:
            _on_meta(config, name)
        except (ImportError, ValueError):
            continue
        usable.append(name)
    return usable


def check_decoder_only(config: PreTrainedConfig) -> None:
    """Refuse what is no decoder-only language model.

    Raises:
        ModelError: an encoder, an encoder with a decoder, or no language model.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        instead = "an encoder with a decoder"
    # BERT and its kin load as causal models too, but their attention sees the future unless `is_decoder` is set.
    elif kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        instead = "an encoder"
    elif kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    else:
        instead = "no causal language model of transformers"
    raise ModelError(f"model type {kind!r} is {instead}; valid: a decoder-only language model, as gpt2 or llama")


def count_parameters(model: PreTrainedModel) -> int:
    """Count the numbers in the weights, tied ones once."""
    return sum(weight.numel() for weight in model.parameters())


def first_position(model: PreTrainedModel) -> int:
    """Return the first token's position id: RoBERTa and its kin begin after the padding's, all others at 0.

    Left to themselves they give a token whose id is the padding's no position, and count it in a cache all the same.
    """
    parts: list[Any] = list(model.modules())
    paddings = (part.padding_idx for part in parts if hasattr(part, "create_position_ids_from_input_ids"))
    return 1 + next(paddings, -1)


_LIMITS = "max_position_embeddings", "max_seq_len", "max_target_positions"
"""How configs call the length of what a decoder is fed; the last is Whisper's."""


def max_positions(model: PreTrainedModel) -> int | None:
    """Return how many tokens a text model has positions for; None: any number."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "alibi", False):  # Falcon's configuration has positions, and its ALiBi variants ignore them
        return None
    limits = (getattr(config, name, None) for name in _LIMITS)
    limit = next((limit for limit in limits if limit is not None and limit > 0), None)
    return None if limit is None else limit - first_position(model)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' and tqdm's bars and warnings: what matters of them is checked and raised here."""
    from transformers.utils import logging as chatter

    bars, verbosity = chatter.is_progress_bar_enabled(), chatter.get_verbosity()
    chatter.disable_progress_bar()
    chatter.set_verbosity(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):  # a GGUF file's progress bar cannot be switched off
            yield
    finally:
        chatter.set_verbosity(verbosity)
        if bars:
            chatter.enable_progress_bar()


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn whatever goes wrong in reading `what` into a ModelError of one line; out of memory stays what it is."""
    try:
        yield
    except (ModelError, MemoryError):
        raise
    except (Exception, SystemExit) as error:  # what is read is the user's, code too: anything may be raised
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{what} cannot be read ({one_line(error)})") from error


def one_line(error: BaseException) -> str:
    """Put type and message of `error` in a line: what it repeats once, and cut between words to a readable length."""
    lines = dict.fromkeys(line.strip() for line in f"{type(error).__name__}: {error}".splitlines())
    return textwrap.shorten(" ".join(lines), 240, placeholder=" ...")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: Python's own, CUDA's, or the CPU allocator's plain RuntimeError."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _on_meta(config: PreTrainedConfig, attn_implementation: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.import_utils import is_flash_attn_2_available

    if attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
        raise ImportError("flash_attn is not installed")  # transformers would fetch a kernel from the hub instead
    with quiet(), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config),  # from_config writes into it
            attn_implementation=attn_implementation,
            dtype=dtype or torch.float32,
            trust_remote_code=False,
        )
    kept = model._get_dtype_plan(dtype or torch.float32)  # noqa: SLF001  # there is no public way to ask
    patterns = [re.compile(name.replace("*", ".*")) for name in kept]
    for name, weight in model.named_parameters():
        if any(pattern.search(name) for pattern in patterns):
            weight.data = weight.data.float()
    return model
