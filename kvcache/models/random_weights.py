"""`random:NAME`: seeded random weights at a named geometry; they cost what real ones cost, and need no download."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kvcache.models.checkpoint import COPY_LIMIT_BYTES, Checkpoint
from kvcache.models.skeleton import count_parameters, quiet, skeleton
from kvcache.models.weight_cache import ModelError, made_once

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

GEOMETRIES: dict[str, tuple[str, dict[str, Any]]] = {
    # Small enough for steps of a millisecond. Its wide initialisation makes the greedy tokens vary.
    "tiny": (
        "gpt2",
        {
            "n_embd": 128,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 512,
            "n_positions": 4096,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
    "gpt2": ("gpt2", {}),
    "gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": ("gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    # Grouped queries: 9 on 3, 16 on 8 and 32 on 8 heads. SmolLM2-135M, Qwen3-0.6B, Mistral-7B-v0.3.
    "llama-135m": (
        "llama",
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-0.6b": (
        "qwen3",
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "max_position_embeddings": 40960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "tie_word_embeddings": True,
        },
    ),
    "mistral-7b": (
        "mistral",
        {
            "vocab_size": 32768,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
    ),
}
"""Name -> (model type, what differs from the defaults of its config class)."""


@dataclass(frozen=True, kw_only=True)
class RandomWeights:
    """Random weights at the geometry `name`, equal for equal seeds and versions of torch and transformers.

    Methods as `Checkpoint`'s.
    """

    name: str
    seed: int

    def config(self) -> PreTrainedConfig:
        """Make the configuration of this geometry."""
        from transformers import AutoConfig

        model_type, overrides = GEOMETRIES[self.name]
        config: PreTrainedConfig = AutoConfig.for_model(model_type, **overrides)
        return config

    def skeleton(self, attn_implementation: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return skeleton(self.config(), attn_implementation, dtype)

    def model(self, dtype: torch.dtype, device: str, attn_implementation: str) -> PreTrainedModel:
        """Load the model: drawn once in float32 on the CPU, then kept in the cache and mapped.

        Above `COPY_LIMIT_BYTES` it is drawn on `device` and in `dtype` at every load: a GPU draws 7 billion numbers in
        less time than 14 GB take to be read. Those weights are equal on equal devices only.
        """
        import torch

        if 4 * count_parameters(self.skeleton(attn_implementation)) > COPY_LIMIT_BYTES:
            return self._draw(dtype, device, attn_implementation)

        def make(target: Path) -> None:
            model = cast_parameters(self._draw(torch.float32, "cpu", "eager"), dtype)
            with quiet():
                model.save_pretrained(target)

        dtype_name = str(dtype).removeprefix("torch.")
        versions = "-".join(f"{name}{importlib.metadata.version(name)}" for name in ("torch", "transformers"))
        folder = made_once(
            f"random-{self.name}-seed{self.seed}-{dtype_name}-{versions}",
            make,
            note=f"drawing random:{self.name} once into the cache",
        )
        return Checkpoint.of(folder).model(dtype, device, attn_implementation)

    def cautions(self, bare: PreTrainedModel) -> list[str]:
        """Return nothing: the weights are made for their configuration."""
        return []

    def kept_as(self, bare: PreTrainedModel) -> str | None:
        return f"random-{self.name}-" if 4 * count_parameters(bare) <= COPY_LIMIT_BYTES else None

    def tokenizer(self) -> NoReturn:
        raise ModelError(
            f"random:{self.name} has no tokenizer: random weights know no text; valid: smollm2-135m, "
            "a checkpoint folder with a tokenizer, or a hub id"
        )

    def digest(self) -> str:
        """Say what makes the weights."""
        return f"random:{self.name} seed {self.seed}"

    def _draw(self, dtype: torch.dtype, device: str, attn_implementation: str) -> PreTrainedModel:
        """Initialise the model as transformers does it, straight on `device`."""
        import torch
        from transformers import AutoModelForCausalLM

        with quiet(), seeded(self.seed, device), torch.device(device):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                self.config(), dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=False
            )
        return model


@contextmanager
def seeded(seed: int, device: str = "cpu") -> Iterator[None]:
    """Start torch's generators at `seed` inside; outside they go on as if nothing had been drawn."""
    import torch

    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Bring the weights of `model` to `dtype` in place.

    Buffers stay as they are, as in from_pretrained: rotary frequencies lose positions in bfloat16.
    """
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)
    return model
