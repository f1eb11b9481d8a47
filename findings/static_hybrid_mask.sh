#!/usr/bin/env bash
# A StaticCache says of each of its layers that keep a convolution's state beside keys and values that it is linear
# (Cache.is_linear leaves out the dynamic class of such layers, not its static twin). So masking_utils finds no layer
# with full attention and makes the mask of those layers as wide as the first layer's. Where that one has a sliding
# window (Inkling, whose layers are "hybrid_sliding" and "hybrid"), a step fails.
#
# Versions: transformers 5.23.0, torch 2.13.0. Output seen:
#   DynamicCache of hybrid_sliding, hybrid: is_linear [True, False], first full layer 1; a step is right within 1e-5
#   StaticCache of hybrid_sliding, hybrid: is_linear [True, True], first full layer 0; a step raises RuntimeError
#   StaticCache of hybrid_sliding alone: is_linear [True, True], first full layer 0; a step is right within 1e-5
# Exits 1 if that changes. Needs network access to PyPI; installs into a temporary folder (0.3 GB with a CPU build).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, DynamicCache, InklingTextConfig, StaticCache
from transformers.masking_utils import find_first_full_attention_index
from transformers.utils import logging

logging.set_verbosity_error()
torch.set_num_threads(1)
ids = torch.randint(97, (1, 13), generator=torch.Generator().manual_seed(0))


def model_of(kinds):
    config = InklingTextConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, sliding_window_size=8, rel_extent=32,
        intermediate_size=64, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        layer_types=kinds, bos_token_id=None, eos_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(std=0.25)
    return model


def stepped(model, cache):
    # What a step after 12 tokens in `cache` does.
    whole = model(ids, use_cache=False).logits[:, -1]
    model(ids[:, :12], past_key_values=cache)
    try:
        step = model(ids[:, 12:], past_key_values=cache).logits[:, -1]
    except RuntimeError:
        return "raises RuntimeError"
    apart = ((step - whole).abs().max() / whole.abs().max()).item()
    return "is right within 1e-5" if apart < 1e-5 else f"is {apart:.2g} of the largest logit apart"


SLIDING, FULL = "hybrid_sliding", "hybrid"
CASES = [
    (DynamicCache, "hybrid_sliding, hybrid", [SLIDING, FULL], [True, False], 1, "is right within 1e-5"),
    (StaticCache, "hybrid_sliding, hybrid", [SLIDING, FULL], [True, True], 0, "raises RuntimeError"),
    (StaticCache, "hybrid_sliding alone", [SLIDING, SLIDING], [True, True], 0, "is right within 1e-5"),
]
for kind, words, layers, *expected in CASES:
    model = model_of(layers)
    cache = kind(config=model.config, **({"max_cache_len": 32} if kind is StaticCache else {}))
    linear, first = cache.is_linear, find_first_full_attention_index(cache)
    found = [linear, first, stepped(model, cache)]
    assert found == expected, f"the behaviour has changed: {found}"
    print(f"{kind.__name__} of {words}: is_linear {linear}, first full layer {first}; a step {found[2]}")
PYTHON
