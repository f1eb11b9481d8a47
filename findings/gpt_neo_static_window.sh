#!/usr/bin/env bash
# GPT-Neo's local layers cut their own causal mask: of a buffer [positions, positions] they take the last rows before the
# number of keys (modeling_gpt_neo.py, GPTNeoSelfAttention._attn). In a StaticCache the number of keys is its capacity, so
# every step gets the row of the last position that the cache has room for: its window lies over keys that are not
# written yet. The logits are others, without an error, and generate(cache_implementation="static") emits other tokens.
# DynamicCache is right at every step.
#
# Versions: transformers 5.23.0, torch 2.13.0. Output seen:
#   DynamicCache: every step equals the whole forward within 1e-5 of the largest logit
#   StaticCache for 32 tokens, 16 fed: steps differ from the whole forward by more than 0.05 of the largest logit
#   generate(cache_implementation="static") emits other tokens than generate()
#   without local layers: StaticCache equals the whole forward within 1e-5, and so do generate's tokens
# Exits 1 if that changes. Needs network access to PyPI; installs into a temporary folder (0.3 GB with a CPU build).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers import DynamicCache, GPTNeoConfig, GPTNeoForCausalLM, StaticCache
from transformers.utils import logging

logging.set_verbosity_error()
torch.set_num_threads(1)
ids = torch.randint(97, (1, 16), generator=torch.Generator().manual_seed(1))


def model_with(*kinds):
    config = GPTNeoConfig(
        vocab_size=97, hidden_size=32, num_layers=4, num_heads=4, intermediate_size=64, window_size=8,
        attention_types=[[list(kinds), 2]], max_position_embeddings=128, initializer_range=0.25,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )
    torch.manual_seed(0)
    return GPTNeoForCausalLM(config).eval()


@torch.no_grad()
def apart(model, cache):
    """Largest difference between single steps and a whole forward, as a share of the largest logit."""
    whole = model(ids, use_cache=False).logits
    steps = [model(ids[:, at : at + 1], past_key_values=cache).logits[:, -1] for at in range(ids.shape[1])]
    return ((torch.stack(steps, dim=1) - whole).abs().max() / whole.abs().max()).item()


def generated(model, **named):
    return model.generate(ids[:, :12], attention_mask=torch.ones_like(ids[:, :12]), max_new_tokens=12,
                          do_sample=False, disable_compile=True, **named)[0, 12:].tolist()


local, plain = model_with("global", "local"), model_with("global", "global")
dynamic = apart(local, DynamicCache(config=local.config))
assert dynamic < 1e-5, f"the behaviour has changed: {dynamic}"
print("DynamicCache: every step equals the whole forward within 1e-5 of the largest logit")
static = apart(local, StaticCache(config=local.config, max_cache_len=32))
assert static > 0.05, f"the behaviour has changed: {static}"
print("StaticCache for 32 tokens, 16 fed: steps differ from the whole forward by more than 0.05 of the largest logit")
assert generated(local) != generated(local, cache_implementation="static"), "the behaviour has changed"
print('generate(cache_implementation="static") emits other tokens than generate()')
without = apart(plain, StaticCache(config=plain.config, max_cache_len=32))
assert without < 1e-5 and generated(plain) == generated(plain, cache_implementation="static"), without
print("without local layers: StaticCache equals the whole forward within 1e-5, and so do generate's tokens")
PYTHON
