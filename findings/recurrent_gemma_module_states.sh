#!/usr/bin/env bash
# RecurrentGemma keeps the recurrent and the convolution states of a sequence in its modules (rg_lru.recurrent_states,
# conv1d_state), not in the cache that the caller gives and gets back. So one model can go on with one sequence only:
# a second sequence with a cache of its own, or a second step from a copy of a cache, goes on from the states of
# whatever was fed last. Other logits, without an error or a warning.
#
# Versions: transformers 5.23.0, torch 2.13.0. Output seen:
#   16 tokens, then one: as the whole forward within 1e-5
#   16 tokens, 16 of another in another cache, then one of the first: differs by more than 0.1 of the largest logit
#   one more from a copy of the cache, made before the step: differs by more than 0.1
# Exits 1 if that changes. Needs network access to PyPI; installs into a temporary folder (0.3 GB with a CPU build).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - <<'PYTHON'
import copy

import torch
from transformers import DynamicCache, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

torch.set_num_threads(1)
config = RecurrentGemmaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=1, head_dim=8, lru_width=32, attention_window_size=64, bos_token_id=None, eos_token_id=None,
    pad_token_id=None,
)
torch.manual_seed(0)
model = RecurrentGemmaForCausalLM(config).eval().requires_grad_(False)
for weight in model.parameters():
    if weight.dim() > 1:
        weight.normal_(std=0.25)
one, other = torch.randint(97, (2, 1, 17), generator=torch.Generator().manual_seed(1))
whole = model(one, use_cache=False).logits[:, -1]


def fed(ids):
    """A cache of its own after 16 tokens."""
    cache = DynamicCache(config=config)
    model(ids[:, :16], past_key_values=cache, use_cache=True)
    return cache


def apart(cache):
    """How far the logits of the last token after `cache` lie from the whole forward's, as a share of the largest."""
    step = model(one[:, 16:], past_key_values=cache, use_cache=True).logits[:, -1]
    return ((step - whole).abs().max() / whole.abs().max()).item()


first = fed(one)
copied = copy.deepcopy(first)
single = apart(first)
assert single < 1e-5, f"the behaviour has changed: {single}"
print("16 tokens, then one: as the whole forward within 1e-5")
again = apart(copied)
first = fed(one)
fed(other)
between = apart(first)
assert between > 0.1 and again > 0.1, f"the behaviour has changed: {between} {again}"
print("16 tokens, 16 of another in another cache, then one of the first: differs by more than 0.1 of the largest logit")
print("one more from a copy of the cache, made before the step: differs by more than 0.1")
PYTHON
