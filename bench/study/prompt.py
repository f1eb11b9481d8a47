"""A prompt made ready for a model: load the model and its tokenizer, encode the text, see that all of it fits."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench.errors import UsageError, blaming
from bench.measure.own_text import encode
from kvcache import models
from kvcache.caches.contract import UnfitCache, Unsupported

DEFAULT_N_GEN = 128


class Setting(NamedTuple):
    """What a text is generated with."""

    model: str
    dtype: str
    n_threads: int
    device: str
    seed: int


class Ready(NamedTuple):
    """A model with a prompt that it can continue."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ids: Tensor
    """Of the prompt, `[1, n_prompt]`, on the device."""
    room: int
    """Tokens that may follow."""
    stops: set[int | None]
    """Ids that end the text."""


def get_ready(setting: Setting, prompt: str, *, n_gen: int | None, stop: int | None, stop_flag: str) -> Ready:
    """Load the model, set torch's threads, and encode the prompt; the text ends at `stop`, too (flag `stop_flag`).

    Raises:
        UsageError: the model cannot be loaded or has no tokenizer; the prompt gives no token, gives one outside the
            embedding, or does not fit the model's positions.
    """
    torch.set_num_threads(setting.n_threads)
    try:
        described = models.describe(setting.model)
        tokenizer = models.load_tokenizer(setting.model)
        network = models.load(
            setting.model,
            dtype=setting.dtype,
            device=setting.device,
            seed=setting.seed,
            attn_implementation=described.attn_implementation,
        )
    except models.ModelError as error:
        raise UsageError(blaming("--model", setting.model, error)) from error
    for caution in described.cautions:
        sys.stderr.write(f"kvbench: {setting.model}: {caution}\n")
    tokens = encode(prompt, tokenizer, described.vocab_size, "--prompt")
    if not tokens:
        raise UsageError("--prompt: gives no token; give at least one word")
    ids = torch.tensor([tokens], device=setting.device)
    room = _fitting(ids, n_gen, stop, described, stop_flag)
    return Ready(network, tokenizer, ids, room, {stop, *_ends(network.generation_config, tokenizer.eos_token_id)})


@contextmanager
def refusing(flag: str, name: str, model: str) -> Iterator[None]:
    """Refuse in one line, under `flag`, a strategy that turns out inside the block to be unable to run.

    Raises:
        UsageError: the strategy `name` cannot run `model`, or it is a user's cache that does not do what a cache must.
    """
    try:
        yield
    except Unsupported as error:
        raise UsageError(f"{flag} {name}: cannot run {model}: {error}") from error
    except (UnfitCache, models.ModelError) as error:
        raise UsageError(f"{flag} {name}: {str(error).removeprefix(f'{name} ')}") from error


def _fitting(ids: Tensor, n_gen: int | None, stop: int | None, model: models.ModelDescription, stop_flag: str) -> int:
    """Return how many tokens may follow: `n_gen`; without one 128, or as many as the model has positions left."""
    n_prompt = ids.shape[1]
    if stop is not None and not 0 <= stop < model.vocab_size:
        raise UsageError(f"{stop_flag} {stop}: the model's tokens are 0 to {model.vocab_size - 1}")
    room = DEFAULT_N_GEN if model.max_positions is None else model.max_positions - n_prompt
    wanted = max(1, min(DEFAULT_N_GEN, room)) if n_gen is None else n_gen
    if n_gen is None and room < 1:
        raise UsageError(
            f"--prompt: its {n_prompt} tokens leave no position of the model's {model.max_positions}; "
            "give a shorter one"
        )
    if model.max_positions is not None and wanted > room:
        raise UsageError(
            f"the prompt's {n_prompt} tokens and --n-gen {wanted} are more than the {model.max_positions} positions of "
            f"{model.spec}"
        )
    return wanted


def _ends(config: object, tokenizer_eos: int | None) -> set[int | None]:
    """Return the ids that end a text: those of the generation config (one or a list), else the tokenizer's."""
    eos = getattr(config, "eos_token_id", None)
    if eos is None:
        eos = tokenizer_eos
    return set(eos) if isinstance(eos, list) else {eos}
