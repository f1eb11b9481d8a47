"""`kvbench generate`: continues a prompt and prints each token as soon as it is chosen."""

import sys

from torch import Tensor
from transformers import TextStreamer

from bench.study.prompt import Setting, get_ready, refusing
from kvcache.strategies.catalogue import build


class _Stop(Exception):
    """The token that ends the text was chosen, or nobody reads it any more."""


def stream(setting: Setting, prompt: str, *, strategy: str, n_gen: int | None, stop_token_id: int | None) -> None:
    """Print the greedy continuation of `prompt`, token by token, to stdout.

    It ends after `n_gen` tokens, at `stop_token_id`, or at the end of the text. Without an `n_gen` it ends after 128
    tokens, when the model has no position left, or when its reader has gone (`| head`).

    Raises:
        UsageError: as `get_ready`, or `refusing`.
    """
    ready = get_ready(setting, prompt, n_gen=n_gen, stop=stop_token_id, stop_flag="--stop-token-id")
    streamer = TextStreamer(ready.tokenizer, skip_prompt=False, skip_special_tokens=True)

    def show(token: Tensor, _logits: Tensor) -> None:
        streamer.put(token.cpu())
        if token.item() in ready.stops or getattr(sys.stdout, "lost", False):
            raise _Stop

    n_prompt = ready.ids.shape[1]
    with refusing("--strategy", strategy, setting.model):
        chosen = build(strategy, ready.network)
        chosen.prepare(batch_size=1, capacity=n_prompt + ready.room, prompt_length=n_prompt)
        try:
            chosen.generate(ready.ids, ready.room, show)
        except _Stop:
            pass
        finally:
            streamer.end()
