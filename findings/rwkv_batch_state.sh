#!/usr/bin/env bash
# A step of RWKV from its state mixes the sequences of a batch: the state of the token shift is [batch, hidden] and meets
# the one token's [batch, 1, hidden] without an axis between them, so both broadcast to [batch, batch, hidden]. The next
# layer takes the second axis for time. generate() takes its last entry: every sequence goes on as another model would.
# A batch of one is right. No warning is given.
#
# Versions: transformers 5.23.0, torch 2.13.0. Output seen:
#   one token and the states of 2 sequences: logits of shape [2, 2, 64]
#   row 0: entry 0 is the forward's over the whole row, the last entry, which generate() takes, is not
#   row 1: the last entry is not the forward's
#   a batch of one: it is
# Exits 1 if that changes. Needs network access to PyPI; installs into a temporary folder (0.3 GB with a CPU build).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers import RwkvConfig, RwkvForCausalLM

torch.manual_seed(0)
config = RwkvConfig(vocab_size=64, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, intermediate_size=64,
                    context_length=64)
model = RwkvForCausalLM(config).eval()
ids = torch.randint(64, (2, 9))
with torch.no_grad():
    forward = model(ids, use_cache=False).logits[:, -1]
    before = model(ids[:, :-1], use_cache=True).state
    step = model(ids[:, -1:], state=before, use_cache=True).logits
    alone = model(ids[1:, :-1], use_cache=True).state
    one = model(ids[1:, -1:], state=alone, use_cache=True).logits[0, -1]

largest = forward.abs().max()
error = (step - forward[:, None]).abs().amax(-1) / largest
print(f"one token and the states of 2 sequences: logits of shape {list(step.shape)}")
assert list(step.shape) == [2, 2, 64], "the behaviour has changed"
assert error[0, 0] < 1e-5 and error[0, 1] > 0.1, "the behaviour has changed"
print("row 0: entry 0 is the forward's over the whole row, the last entry, which generate() takes, is not")
assert error[1, 1] > 0.1, "the behaviour has changed"
print("row 1: the last entry is not the forward's")
assert (one - forward[1]).abs().max() / largest < 1e-5, "the behaviour has changed"
print("a batch of one: it is")
PYTHON
