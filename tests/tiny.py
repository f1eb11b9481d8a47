"""Ten tiny random architectures, one per way that decoder-only models differ; every test of a model runs over them.

They differ in what a cache can get wrong: position embeddings (learned, rotary, partly rotary, ALiBi), grouped or
single key heads, sliding windows (all layers, or alternate ones), offsets of the position ids (OPT).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from kvcache.caches.contract import Unsupported
from kvcache.strategies.catalogue import STRATEGIES, build
from kvcache.strategies.strategy import Strategy

VOCAB_SIZE = 97
MAX_POSITIONS = 128
SLIDING_WINDOW = 8
INIT_STD = 0.25
"""Standard deviation of every matrix: at transformers' 0.02 a tiny model repeats one token for ever."""

_NO_SPECIAL_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
# The architectures' defaults lie outside so small a vocabulary.


def tiny(
    model_type: str,
    geometry: dict[str, Any],
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> PreTrainedModel:
    """A random causal model of `model_type` on the CPU, in eval mode; equal for equal arguments.

    `overrides` replace entries of `geometry`, under the names of the architecture's own config class.
    """
    arguments = {"vocab_size": VOCAB_SIZE, **_NO_SPECIAL_TOKENS, **geometry, **overrides}
    config: PretrainedConfig = AutoConfig.for_model(model_type, **arguments)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        _spread(model)
    model.eval().requires_grad_(False)
    return model


def token_ids(seed: int, *shape: int) -> Tensor:
    """Random token ids of these models; equal for equal arguments."""
    return torch.randint(VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def _spread(model: PreTrainedModel) -> None:
    """Draw every weight anew, wide enough that logits and greedy tokens vary with content and position."""
    for name, weight in model.named_parameters():
        if weight.dim() >= 2:
            torch.nn.init.normal_(weight, std=INIT_STD)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.1)


def llama_like(**extra: Any) -> dict[str, Any]:
    """The names that llama and its descendants share: 4 query heads on 2 key heads, 2 layers."""
    shared = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": False,
    }
    return {**shared, **extra}


_GEOMETRIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": MAX_POSITIONS}),
    "llama": ("llama", llama_like()),
    "qwen3": ("qwen3", llama_like(head_dim=16)),
    "mistral": ("mistral", llama_like(sliding_window=SLIDING_WINDOW)),
    "gemma3": (
        "gemma3_text",
        llama_like(
            head_dim=8,
            query_pre_attn_scalar=8,
            num_hidden_layers=4,
            sliding_window=SLIDING_WINDOW,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
    ),
    "opt": (
        "opt",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": MAX_POSITIONS,
            "tie_word_embeddings": False,
        },
    ),
    "gpt_neox": (
        "gpt_neox",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": MAX_POSITIONS,
        },
    ),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "tie_word_embeddings": False}),
    "falcon": (
        "falcon",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": MAX_POSITIONS,
            "tie_word_embeddings": False,
        },
    ),
    "phi": (
        "phi",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": MAX_POSITIONS,
        },
    ),
}


def _maker(model_type: str, geometry: dict[str, Any]) -> Callable[..., PreTrainedModel]:
    def make(seed: int = 0, **overrides: Any) -> PreTrainedModel:
        return tiny(model_type, geometry, seed, **overrides)

    return make


ARCHITECTURES: dict[str, Callable[..., PreTrainedModel]] = {
    name: _maker(model_type, geometry) for name, (model_type, geometry) in _GEOMETRIES.items()
}
"""Name -> `make(seed=0, **config_overrides)`: a fresh tiny model of that architecture."""


EVERYWHERE = [name for name, entry in STRATEGIES.items() if not entry.cache and not entry.lossy]
"""Strategies that run on any machine and promise naive's tokens; tests/caches has the kinds of cache."""

COMPILED = ("gpt2", "mistral")
"""Architectures that `compiled` is tested on at once: learned positions, one group of heads and biases; rotary
positions, grouped heads, a gate and a sliding window. The others run under `-m compiled`."""


def build_eagerly(name: str, model: PreTrainedModel) -> Strategy:
    """A strategy as the catalogue builds it, but `compiled` without its compiler, which takes seconds each time."""
    return STRATEGIES[name].load()(model, backend="eager") if STRATEGIES[name].compiles else build(name, model)


def build_without_compiler(name: str, model: PreTrainedModel) -> Strategy:
    """A strategy as the catalogue builds it, but `compiled` without its compiler (tests/compiled/ has it with).

    The test is skipped where the strategy does not take the model's architecture.
    """
    try:
        return build_eagerly(name, model)
    except Unsupported as reason:
        pytest.skip(str(reason))
