#!/usr/bin/env bash
# transformers' fp8 cache takes one scale per layer from the first tokens it is given and keeps it. Keys and values that
# come later and are larger are cut to the largest number of those first tokens, without a word: a first call of one
# token (chunked prefill, or a prompt that is a start token alone) sets the range for the whole generation.
#
# Versions: transformers 5.23.0, torch 2.13.0. Output seen:
#   fed 8.0 after a first token of at most 1.0: 1.0 comes back
#   fed 8.0 after a first token of at most 8.0: 8.0 comes back
# Exits 1 if that changes. Needs network access to PyPI; installs into a temporary folder (0.3 GB with a CPU build).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers import LlamaConfig, QuantizedCache

config = LlamaConfig(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, hidden_size=8)
back = {}
for first in (1.0, 8.0):
    cache = QuantizedCache(backend="fp8", config=config)
    begin, later = torch.full((1, 1, 1, 8), first), torch.full((1, 1, 1, 8), 8.0)
    cache.update(begin, begin, 0)
    keys, _ = cache.update(later, later, 0)
    back[first] = keys[0, 0, 1, 0].item()
    print(f"fed 8.0 after a first token of at most {first}: {back[first]} comes back")
assert back == {1.0: 1.0, 8.0: 8.0}, "the behaviour has changed"
PYTHON
