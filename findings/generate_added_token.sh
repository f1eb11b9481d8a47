#!/usr/bin/env bash
# generate() of XLM and XLNet puts a token of its own behind what it was given (XLM the mask's id, XLNet id 0, which
# the others do not see) and takes the logits at that place. A causal model of these classes, asked by its forward,
# predicts the next token at the last place of the prompt. The two are different predictions, so generate()'s first
# token is not the one that the forward over the same prompt gives. No warning is given.
#
# Versions: transformers 5.23.0, torch 2.13.0. Output seen:
#   xlm: generate's first logits are more than 0.1 of the largest from the forward's over the 12 tokens
#   xlnet: generate's first logits are more than 0.1 of the largest from the forward's over the 12 tokens
#   xlm: they are the forward's over 13 tokens, the last one the mask, within 1e-5
#   xlnet: they are the forward's over 13 tokens, the last one 0, hidden from the others and asked for, within 1e-5
# Exits 1 if that changes. Needs network access to PyPI; installs into a temporary folder (0.3 GB with a CPU build).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
torch.set_num_threads(1)
MASK = 5
MODELS = {
    "xlm": dict(emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=64, causal=True, asm=False,
                mask_token_id=MASK),
    "xlnet": dict(d_model=32, n_layer=2, n_head=4, d_inner=64),
}
ids = torch.randint(6, 97, (1, 12), generator=torch.Generator().manual_seed(0))


def with_token(token):
    return torch.cat([ids, torch.tensor([[token]])], dim=1)


hidden, last = torch.zeros(1, 13, 13), torch.zeros(1, 1, 13)
hidden[:, :, -1] = last[:, :, -1] = 1
ASKED = {
    "xlm": dict(input_ids=with_token(MASK)),
    "xlnet": dict(input_ids=with_token(0), perm_mask=hidden, target_mapping=last),
}
WORDS = {"xlm": "the last one the mask", "xlnet": "the last one 0, hidden from the others and asked for"}


@torch.no_grad()
def logits(name):
    """Of generate's first token, of the forward over the prompt, and of that over one token more."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, bos_token_id=None, eos_token_id=None, pad_token_id=0, **MODELS[name])
    config = AutoConfig.for_model(name, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(std=0.25)
    settings = dict(max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return model.generate(ids, **settings).logits[0], model(ids).logits[:, -1], model(**ASKED[name]).logits[:, -1]


found = {name: logits(name) for name in MODELS}
for name, (made, forward, _) in found.items():
    assert (made - forward).abs().max() > 0.1 * forward.abs().max(), "the behaviour has changed"
    print(f"{name}: generate's first logits are more than 0.1 of the largest from the forward's over the 12 tokens")
for name, (made, _, asked) in found.items():
    assert (made - asked).abs().max() < 1e-5 * asked.abs().max(), "the behaviour has changed"
    print(f"{name}: they are the forward's over 13 tokens, {WORDS[name]}, within 1e-5")
PYTHON
