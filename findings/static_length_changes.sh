#!/usr/bin/env bash
# StaticCache.get_seq_length() returns the tensor in which its layer counts, and update() adds to it in place: a
# length that was read before an update is, after it, the length after. Inkling's full layers read it before (a
# comment there says that this is important) and use it after, so each step's query is placed one token too far: its
# relative bias and its scale are those of the next position. Other logits, without an error or a warning;
# DynamicCache is right.
#
# Versions: transformers 5.23.0, torch 2.13.0. Output seen:
#   DynamicCache: 12 tokens fed, length read, one more fed: it says 12; a step is as the whole forward within 1e-5
#   StaticCache: 12 tokens fed, length read, one more fed: it says 13; a step differs by more than 0.1 of the largest
# Exits 1 if that changes. Needs network access to PyPI; installs into a temporary folder (0.3 GB with a CPU build).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, DynamicCache, InklingTextConfig, StaticCache
from transformers.utils import logging

logging.set_verbosity_error()
torch.set_num_threads(1)
config = InklingTextConfig(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    rel_extent=32, intermediate_size=64, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
    n_shared_experts=1, layer_types=["hybrid", "hybrid"], bos_token_id=None, eos_token_id=None,
)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
for weight in model.parameters():
    if weight.dim() > 1:
        weight.normal_(std=0.25)
ids = torch.randint(97, (1, 13), generator=torch.Generator().manual_seed(0))
whole = model(ids, use_cache=False).logits[:, -1]


def stepped(cache):
    # The length that was read before a step, and how far the step's logits lie from the whole forward's.
    model(ids[:, :12], past_key_values=cache)
    length = cache.get_seq_length()
    step = model(ids[:, 12:], past_key_values=cache).logits[:, -1]
    return int(length), ((step - whole).abs().max() / whole.abs().max()).item()


length, apart = stepped(DynamicCache(config=config))
assert length == 12 and apart < 1e-5, f"the behaviour has changed: {length} {apart}"
fed = "12 tokens fed, length read, one more fed: it says"
print(f"DynamicCache: {fed} 12; a step is as the whole forward within 1e-5")
length, apart = stepped(StaticCache(config=config, max_cache_len=32))
assert length == 13 and apart > 0.1, f"the behaviour has changed: {length} {apart}"
print(f"StaticCache: {fed} 13; a step differs by more than 0.1 of the largest")
PYTHON
