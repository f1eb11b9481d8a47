#!/usr/bin/env bash
# CPM-Ant puts tokens of its own before the input at every forward, and its cache holds them too: after 12 tokens it
# says that it has seen 16 (with prompt_length 4). A step needs the whole input again, of which the forward drops as
# many as the cache has; one new token alone, as every other model takes it, raises. And every token sees every other
# one (the forward sets `context` to ones), so the keys in the cache are not those of the longer input: generate()
# chooses by other logits with use_cache=True, its default, than without.
#
# Versions: transformers 5.23.0, torch 2.13.0. Output seen:
#   12 tokens fed: the cache has 16
#   one more token alone: RuntimeError; all 13 again: logits for 1
#   those logits are more than 0.01 of the largest from the forward's without a cache
#   the first 12 tokens' logits, with a 13th behind them: more than 0.01 of the largest from those without
#   generate's second token, after the same first: its logits with a cache are more than 0.01 from those without
# Exits 1 if that changes. Needs network access to PyPI; installs into a temporary folder (0.3 GB with a CPU build).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers import CpmAntConfig, CpmAntForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
torch.set_num_threads(1)
config = CpmAntConfig(vocab_size=97, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=64, num_hidden_layers=2,
                      prompt_length=4)
torch.manual_seed(0)
model = CpmAntForCausalLM(config).eval().requires_grad_(False)
for weight in model.parameters():
    if weight.dim() > 1:
        weight.normal_(std=0.25)
ids = torch.randint(1, 97, (1, 13), generator=torch.Generator().manual_seed(0))


def share(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


short = model(ids[:, :12], use_cache=True)
cache = short.past_key_values
assert cache.get_seq_length() == 16, "the behaviour has changed"
print("12 tokens fed: the cache has 16")
try:
    model(ids[:, 12:], past_key_values=cache, use_cache=True)
except RuntimeError:
    pass
else:
    raise SystemExit("the behaviour has changed: a step takes one token")
cache = model(ids[:, :12], use_cache=True).past_key_values
step, whole = model(ids, past_key_values=cache, use_cache=True).logits, model(ids, use_cache=False).logits
assert step.shape[1] == 1, "the behaviour has changed"
print("one more token alone: RuntimeError; all 13 again: logits for 1")
assert share(step[:, -1], whole[:, -1]) > 0.01, "the behaviour has changed"
print("those logits are more than 0.01 of the largest from the forward's without a cache")
assert share(whole[:, :12], short.logits) > 0.01, "the behaviour has changed"
print("the first 12 tokens' logits, with a 13th behind them: more than 0.01 of the largest from those without")
settings = dict(max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True,
                return_dict_in_generate=True)
with_cache, without = (model.generate(ids[:, :12], use_cache=used, **settings) for used in (True, False))
assert torch.equal(with_cache.sequences[:, :13], without.sequences[:, :13]), "the behaviour has changed"
assert share(with_cache.logits[1], without.logits[1]) > 0.01, "the behaviour has changed"
print("generate's second token, after the same first: its logits with a cache are more than 0.01 from those without")
PYTHON
