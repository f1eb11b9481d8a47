#!/usr/bin/env bash
# transformers' sliding-window cache holds the whole prompt after prefill, not its window: each layer keeps a view of the
# last tokens, and a view keeps the storage of all of them. So at the end of prefill, where memory is short, a model whose
# layers all slide holds as much as one without a window. The first decode step lets go of it.
#
# Versions: transformers 5.23.0, torch 2.13.0. Output seen:
#   window of 64 tokens, prompt of 4096: 63 tokens in sight, 4096 held; after one step 63 in sight, 64 held
# Exits 1 if that changes. Needs network access to PyPI; installs into a temporary folder (0.3 GB with a CPU build).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - <<'PYTHON'
from collections import namedtuple

import torch
from transformers import DynamicCache, MistralConfig

WINDOW, PROMPT, HEAD_DIM = 64, 4096, 8
config = MistralConfig(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, hidden_size=HEAD_DIM,
                       sliding_window=WINDOW)
cache = DynamicCache(config=config)
Tokens = namedtuple("Tokens", "in_sight held")


def feed(n_tokens):
    states = torch.zeros(1, 1, n_tokens, HEAD_DIM)
    cache.update(states.clone(), states.clone(), 0)
    keys = cache.layers[0].keys
    return Tokens(keys.shape[2], keys.untyped_storage().nbytes() // (HEAD_DIM * keys.element_size()))


prefill, step = feed(PROMPT), feed(1)
print(f"window of {WINDOW} tokens, prompt of {PROMPT}: {prefill.in_sight} tokens in sight, {prefill.held} held; "
      f"after one step {step.in_sight} in sight, {step.held} held")
assert (prefill.held, step.held) == (PROMPT, WINDOW), "the behaviour has changed"
PYTHON
