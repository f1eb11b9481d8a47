"""A prompt made ready for a model: load the model and its tokenizer, encode the text, see that all of it fits."""

from __future__ import annotations

import sys

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench.errors import UsageError
from kvcache import models

DEFAULT_N_GEN = 128


def load(
    model: str, *, dtype: str, device: str, seed: int
) -> tuple[models.ModelDescription, PreTrainedTokenizerBase, PreTrainedModel]:
    """Load the model of a spec together with its tokenizer.

    Raises:
        UsageError: the model cannot be loaded, or has no tokenizer.
    """
    try:
        described = models.describe(model)
        tokenizer = models.load_tokenizer(model)
        network = models.load(
            model, dtype=dtype, device=device, seed=seed, attn_implementation=described.attn_implementation
        )
    except models.ModelError as error:
        raise UsageError(f"--model {model}: {error}") from error
    for caution in described.cautions:
        sys.stderr.write(f"kvbench: {model}: {caution}\n")
    return described, tokenizer, network


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """Return the token ids of `prompt`, `[1, n_prompt]`.

    Raises:
        UsageError: the prompt gives no token, or has a word that the tokenizer has no token for.
    """
    try:
        ids: Tensor = tokenizer(prompt, return_tensors="pt")["input_ids"].long()
    except Exception as error:
        unknown = ", ".join(word for word in prompt.split() if not _knows(tokenizer, word))
        raise UsageError(f"--prompt: the model's tokenizer has no token for {unknown or error}") from error
    if ids.shape[1] == 0:
        raise UsageError("--prompt: gives no token; give at least one word")
    return ids


def fitting(
    ids: Tensor,
    n_gen: int | None,
    stop_token_id: int | None,
    model: models.ModelDescription,
    stop_flag: str = "--stop-token-id",
) -> int:
    """Return how many tokens may follow the prompt `ids` `[1, n_prompt]`.

    That is `n_gen`; without one it is 128, or as many as the model has positions left.

    Raises:
        UsageError: a token id is not one of the model's, or prompt and continuation exceed the model's positions.
    """
    n_prompt = ids.shape[1]
    if ids.max() >= model.vocab_size:
        raise UsageError(
            f"--prompt: its token {int(ids.max())} lies outside the model's embedding of {model.vocab_size} rows; the "
            "tokenizer does not belong to this model"
        )
    if stop_token_id is not None and not 0 <= stop_token_id < model.vocab_size:
        raise UsageError(f"{stop_flag} {stop_token_id}: the model's tokens are 0 to {model.vocab_size - 1}")
    room = DEFAULT_N_GEN if model.max_positions is None else model.max_positions - n_prompt
    wanted = max(1, min(DEFAULT_N_GEN, room)) if n_gen is None else n_gen
    if model.max_positions is not None and wanted > room:
        raise UsageError(
            f"the prompt's {n_prompt} tokens and --n-gen {wanted} are more than the {model.max_positions} positions of "
            f"{model.spec}"
        )
    return wanted


def end_of_sequence(config: object, tokenizer_eos: int | None) -> set[int | None]:
    """Return the ids that end a text: those of the generation config (one or a list), else the tokenizer's."""
    eos = getattr(config, "eos_token_id", None)
    if eos is None:
        eos = tokenizer_eos
    return set(eos) if isinstance(eos, list) else {eos}


def _knows(tokenizer: PreTrainedTokenizerBase, word: str) -> bool:
    try:
        tokenizer(word)
    except Exception:  # noqa: BLE001  # the tokenizers library raises no narrower one
        return False
    return True
