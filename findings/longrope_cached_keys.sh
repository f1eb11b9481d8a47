#!/usr/bin/env bash
# Longrope takes other rotary angles for all positions once a sequence is longer than the original length. The keys of
# a cache were turned by the old ones, so after that length a cached step gives other logits than the forward over the
# same tokens, without an error or a warning. generate() of Phi-3 knows: at that length it drops the cache, also one
# that its caller gave, computes the whole sequence again and goes on with a cache of its own. The caller's stays
# where it was, and is no longer what the answer was made with. A loop over the forward has to do the same by itself.
#
# Versions: transformers 5.23.0, torch 2.13.0. Output seen:
#   up to the original length of 32: a cached step is as the whole forward within 1e-5
#   token 33, 32 cached: logits differ by more than 0.1 of the largest; 48 tokens, 16 cached: the same
#   48 tokens, 33 cached (all made with the new angles): within 1e-5
#   generate(past_key_values=cache), 28 tokens and 12 new: the tokens of re-feeding; it holds 32, the answer's 39
# Exits 1 if that changes. Needs network access to PyPI; installs into a temporary folder (0.3 GB with a CPU build).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers import DynamicCache, Phi3Config, Phi3ForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()  # that the factor of a rope is taken from the lengths
torch.set_num_threads(1)
SWITCH = 32
rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": SWITCH,
        "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0], "partial_rotary_factor": 1.0}
config = Phi3Config(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, original_max_position_embeddings=SWITCH, rope_parameters=rope,
    initializer_range=0.25, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)
torch.manual_seed(0)
model = Phi3ForCausalLM(config).eval().requires_grad_(False)
ids = torch.randint(97, (1, 48), generator=torch.Generator().manual_seed(1))


def apart(n_tokens, n_cached):
    """How far the logits of single steps after a cache lie from the whole forward's, as a share of the largest."""
    whole = model(ids[:, :n_tokens], use_cache=False).logits[:, -1]
    cache = DynamicCache(config=config)
    model(ids[:, :n_cached], past_key_values=cache)
    for at in range(n_cached, n_tokens):
        logits = model(ids[:, at : at + 1], past_key_values=cache).logits[:, -1]
    return ((logits - whole).abs().max() / whole.abs().max()).item()


assert apart(SWITCH, 16) < 1e-5, "the behaviour has changed"
print("up to the original length of 32: a cached step is as the whole forward within 1e-5")
assert min(apart(SWITCH + 1, SWITCH), apart(48, 16)) > 0.1, "the behaviour has changed"
print("token 33, 32 cached: logits differ by more than 0.1 of the largest; 48 tokens, 16 cached: the same")
assert apart(48, SWITCH + 1) < 1e-5, "the behaviour has changed"
print("48 tokens, 33 cached (all made with the new angles): within 1e-5")

prompt, given = ids[:, :28], DynamicCache(config=config)
answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=given, max_new_tokens=12,
                        do_sample=False, return_dict_in_generate=True)
naive = prompt
for _ in range(12):
    naive = torch.cat([naive, model(naive, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
assert torch.equal(answer.sequences, naive), "the behaviour has changed"
lengths = given.get_seq_length(), answer.past_key_values.get_seq_length()
assert answer.past_key_values is not given and lengths == (32, 39), f"the behaviour has changed: {lengths}"
print("generate(past_key_values=cache), 28 tokens and 12 new: the tokens of re-feeding; it holds 32, the answer's 39")
PYTHON
