"""`kvbench generate`: continues a prompt and prints each token as soon as it is chosen."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import TextStreamer

from bench.errors import UsageError
from bench.study.prompt import encode, end_of_sequence, fitting, load
from kvcache.caches.contract import Unsupported
from kvcache.strategies.catalogue import build


class _Stop(Exception):
    """The token that ends the text was chosen."""


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
    """Print the greedy continuation of `prompt`, token by token, to stdout.

    It ends after `n_gen` tokens, at `stop_token_id`, or at the end of the text. Without an `n_gen` it ends after 128
    tokens, or when the model has no position left.

    Raises:
        UsageError: the model cannot be loaded or the strategy cannot run it; the prompt gives no token, gives one
            outside the embedding, or does not fit the model's positions.
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
        try:
            chosen.generate(ids, n_gen, show)
        except _Stop:
            pass
        finally:
            streamer.end()
    except Unsupported as error:
        raise UsageError(f"--strategy {strategy}: cannot run {model}: {error}") from error
