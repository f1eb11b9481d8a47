#!/usr/bin/env bash
# xLSTM with bfloat16 weights cannot run either of its own kernels (chunkwise, the default, and parallel): gates
# computed in float32 are multiplied into the keys, which become float32, and their product with the bfloat16 values
# raises. Under torch.autocast the same forward runs.
#
# Versions: transformers 5.23.0, torch 2.13.0. Output seen:
#   float32: logits of shape [1, 16, 97]
#   bfloat16: expected m1 and m2 to have the same dtype, but got: float != c10::BFloat16
# Exits 1 if that changes. Needs network access to PyPI; installs into a temporary folder (0.3 GB with a CPU build).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers import xLSTMConfig, xLSTMForCausalLM

config = xLSTMConfig(vocab_size=97, hidden_size=128, embedding_dim=128, num_hidden_layers=2, num_blocks=2, num_heads=4,
                     chunk_size=8)
ids = torch.arange(16)[None]
with torch.no_grad():
    model = xLSTMForCausalLM(config).eval()
    print(f"float32: logits of shape {list(model(ids, use_cache=False).logits.shape)}")
    try:
        model.to(torch.bfloat16)(ids, use_cache=False)
    except RuntimeError as error:
        print(f"bfloat16: {error}")
    else:
        raise SystemExit("the behaviour has changed")
PYTHON
