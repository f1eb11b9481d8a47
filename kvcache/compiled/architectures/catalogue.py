"""The architectures that `compiled` takes: a class of transformers and the function that describes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from kvcache.caches.contract import Unsupported
from kvcache.compiled.architectures import (
    gemma,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mixtures,
    olmo2,
    phi3,
    smollm3,
    stablelm,
)
from kvcache.compiled.decoder import Decoder

DESCRIBERS: dict[str, Callable[[PreTrainedModel], Decoder]] = {
    "GPT2LMHeadModel": gpt2.describe,
    "LlamaForCausalLM": llama.llama,
    "MistralForCausalLM": llama.mistral,
    "Qwen2ForCausalLM": llama.qwen,
    "Qwen3ForCausalLM": llama.qwen,
    "Phi3ForCausalLM": phi3.describe,
    "Gemma2ForCausalLM": gemma.gemma2,
    "Gemma3ForCausalLM": gemma.gemma3,
    "Olmo2ForCausalLM": olmo2.describe,
    "GraniteForCausalLM": granite.describe,
    "SmolLM3ForCausalLM": smollm3.describe,
    "StableLmForCausalLM": stablelm.describe,
    "GPTNeoXForCausalLM": gpt_neox.describe,
    "MixtralForCausalLM": mixtures.mixtral,
    "Qwen3MoeForCausalLM": mixtures.qwen3_moe,
}


def describe(model: PreTrainedModel) -> Decoder:
    """Describe `model`, whose weights stay where they are.

    Raises:
        Unsupported: the architecture, or something in its config, is not one of those written down here.
    """
    name = type(model).__name__
    if name not in DESCRIBERS or not type(model).__module__.startswith("transformers."):
        raise Unsupported(
            f"compiled runs transformers' {', '.join(DESCRIBERS)}; this model is a {type(model).__module__}.{name}"
        )
    if model.dtype not in (torch.float32, torch.bfloat16) and model.device.type != "cuda":
        raise Unsupported(f"compiled runs float32 and bfloat16 on the CPU; this model is {model.dtype}")
    if getattr(model.config, "is_heterogeneous", False):
        attributes = ", ".join(sorted(model.config.per_layer_attributes or ()))
        raise Unsupported(
            f"compiled reads one config for all layers; this model's layers differ in {attributes} (per_layer_config)"
        )
    own = DESCRIBERS[name](model)
    if not all(getattr(part, "is_causal", True) for part in (model.config, *model.modules())):
        raise Unsupported("compiled has causal attention only; this model has layers that attend both ways")
    return own
