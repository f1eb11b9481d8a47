"""Text in, text out: `kvbench generate`."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from bench.errors import UsageError
from kvcache import models
from kvcache.strategies.catalogue import build
from kvcache.strategies.strategy import Unsupported

DEFAULT_N_GEN = 128


class _Stop(Exception):
    """The token that ends the text has come."""


def stream(
    model: str,
    prompt: str,
    *,
    strategy: str,
    n_gen: int | None,
    stop_token_id: int | None,
    dtype: str,
    n_threads: int,
    device: str,
    seed: int,
) -> None:
    """Print the greedy continuation of `prompt` token by token: at most `n_gen`, up to a token that stops it.

    Without an `n_gen` it is 128 tokens, or what the model's positions leave room for.

    Raises:
        UsageError: the model cannot be had, the prompt gives no token or one outside the embedding, or all of it is
            longer than the model's positions.
    """
    torch.set_num_threads(n_threads)
    described, tokenizer, network = load(model, dtype=dtype, device=device, seed=seed)
    ids = encode(tokenizer, prompt).to(device)
    n_gen = fitting(ids, n_gen, stop_token_id, described)
    stops = {stop_token_id, *end_of_sequence(network.generation_config, tokenizer.eos_token_id)}
    streamer = TextStreamer(tokenizer, skip_prompt=False, skip_special_tokens=True)

    def show(token: Tensor, _logits: Tensor) -> None:
        streamer.put(token.cpu())
        if token.item() in stops:
            raise _Stop

    try:
        chosen = build(strategy, network)
        chosen.prepare(batch_size=1, capacity=ids.shape[1] + n_gen)
    except Unsupported as error:
        raise UsageError(f"--strategy {strategy}: cannot run {model}: {error}") from error
    try:
        chosen.generate(ids, n_gen, show)
    except _Stop:
        pass
    finally:
        streamer.end()


def load(
    model: str, *, dtype: str, device: str, seed: int
) -> tuple[models.ModelDescription, PreTrainedTokenizerBase, PreTrainedModel]:
    """A model with its tokenizer.

    Raises:
        UsageError: it cannot be had, or has no tokenizer.
    """
    try:
        described = models.describe(model)
        tokenizer = models.load_tokenizer(model)
        network = models.load(
            model, dtype=dtype, device=device, seed=seed, attn_implementation=described.attn_implementation
        )
    except models.ModelError as error:
        raise UsageError(f"--model {model}: {error}") from error
    return described, tokenizer, network


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """The token ids of `prompt`, `[1, n_prompt]`.

    Raises:
        UsageError: it gives no token, or has a word that the tokenizer has no token for.
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
    """How many tokens may follow the prompt `ids`: `n_gen`, or by default what the model has positions for.

    Raises:
        UsageError: a token is not one of the model's, or all of it is longer than the model's positions.
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


def _knows(tokenizer: PreTrainedTokenizerBase, word: str) -> bool:
    try:
        tokenizer(word)
    except Exception:  # noqa: BLE001  # the tokenizers library raises no narrower one
        return False
    return True


def end_of_sequence(config: object, tokenizer_eos: int | None) -> set[int | None]:
    """The ids that end a text: the generation config's (one or a list), else the tokenizer's."""
    eos = getattr(config, "eos_token_id", None)
    if eos is None:
        eos = tokenizer_eos
    return set(eos) if isinstance(eos, list) else {eos}
