#!/usr/bin/env bash
# With rope_type "dynamic" the rotary table grows with the longest sequence seen, and only a sequence shorter than the
# original length puts it back (modeling_rope_utils.py, dynamic_frequency_update). So a model's answer to one input
# depends on what it was given before: after one longer sequence the same 40 tokens get other logits, until a short one
# comes. dynamic_frequency_update's own words are "recompute when growing"; nothing makes the table smaller in between.
#
# Versions: transformers 5.23.0, torch 2.13.0. Output seen:
#   40 tokens, twice: the same logits
#   40 tokens, after 64 tokens were fed: differ by more than 0.01 of the largest logit
#   40 tokens, after 8 tokens were fed: the first logits again
# Exits 1 if that changes. Needs network access to PyPI; installs into a temporary folder (0.3 GB with a CPU build).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.25, bos_token_id=None, eos_token_id=None,
    rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(97, (1, 64), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(n_tokens):
    return model(ids[:, :n_tokens], use_cache=False).logits


first, second = logits(40), logits(40)
logits(64)
after_long = logits(40)
logits(8)
after_short = logits(40)
apart = ((after_long - first).abs().max() / first.abs().max()).item()
assert torch.equal(first, second) and torch.equal(first, after_short) and apart > 0.01, f"the behaviour has changed: {apart}"
print("40 tokens, twice: the same logits")
print("40 tokens, after 64 tokens were fed: differ by more than 0.01 of the largest logit")
print("40 tokens, after 8 tokens were fed: the first logits again")
PYTHON
