#!/usr/bin/env bash
# Gemma 3's config in transformers has attn_logit_softcapping, documents it and keeps its value, but no attention applies
# it: the model stores the number and does not pass it on. Gemma 2, from which the attribute comes, does pass it on. Who
# sets it for Gemma 3 (a checkpoint trained with it, a port) gets other logits than those asked for, without a word.
#
# Versions: transformers 5.23.0, torch 2.13.0. Output seen:
#   gemma2: a soft-cap of 0.01 changes the logits
#   gemma3: a soft-cap of 0.01 leaves the logits as they are
# Exits 1 if that changes. Needs network access to PyPI; installs into a temporary folder (0.3 GB with a CPU build).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig

SMALL = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, initializer_range=0.5)
ids = torch.arange(20)[None]
changes = {}
for name, config_of in (("gemma2", Gemma2Config), ("gemma3", Gemma3TextConfig)):
    logits = []
    for softcap in (None, 0.01):
        torch.manual_seed(0)
        config = config_of(**SMALL, attn_logit_softcapping=softcap)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        assert model.config.attn_logit_softcapping == softcap
        with torch.no_grad():
            logits.append(model(ids).logits)
    changes[name] = not torch.equal(*logits)
    print(f"{name}: a soft-cap of 0.01 {'changes the logits' if changes[name] else 'leaves the logits as they are'}")
assert changes == {"gemma2": True, "gemma3": False}, "the behaviour has changed"
PYTHON
