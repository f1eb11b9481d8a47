#!/usr/bin/env bash
# Mamba, Falcon-Mamba and Jamba read the recurrent state of their cache only where one token is fed. Several tokens after
# those in the cache (a prompt in chunks, a chat's second turn, a draft to verify) go through the scan of a whole sequence,
# which begins from an empty state and then overwrites the cached one: other logits, without an error or a warning.
#
# Versions: transformers 5.23.0, torch 2.13.0. Output seen:
#   mamba: 16 tokens, then 8 one by one: as the whole forward within 1e-5; then 8 at once: 0.27 of the largest logit apart
#   falcon_mamba and jamba: the same, 0.31 and 0.11 apart
# Exits 1 if that changes. Needs network access to PyPI; installs into a temporary folder (0.3 GB with a CPU build).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

logging.set_verbosity_error()  # that there are no fast kernels
torch.set_num_threads(1)
SIZES = dict(vocab_size=97, hidden_size=32, num_hidden_layers=4, bos_token_id=None, eos_token_id=None,
             pad_token_id=None, initializer_range=0.25)
MODELS = {
    "mamba": dict(state_size=8, time_step_rank=4),
    "falcon_mamba": dict(state_size=8, time_step_rank=4),
    "jamba": dict(
        intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1,
        num_experts=4, mamba_d_state=8, mamba_dt_rank=4,
    ),
}
ids = torch.randint(97, (1, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def apart(model, *parts):
    """How far the last logits lie from those of one whole forward, as a share of the largest."""
    whole = model(ids, use_cache=False).logits[:, -1]
    cache = DynamicCache(config=model.config)
    named = {"cache_params" if "mamba" in model.config.model_type else "past_key_values": cache}
    for part in ids.split(list(parts), dim=1):
        logits = model(part, **named, use_cache=True).logits[:, -1]
    return ((logits - whole).abs().max() / whole.abs().max()).item()


for name, sizes in MODELS.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES, **sizes)).eval()
    single, several = apart(model, 16, *[1] * 8), apart(model, 16, 8)
    assert single < 1e-5 and several > 1e-2, f"the behaviour has changed: {name} {single} {several}"
    print(f"{name}: 16 tokens, then 8 one by one: as the whole forward within 1e-5; "
          f"then 8 at once: {several:.2f} of the largest logit apart")
PYTHON
