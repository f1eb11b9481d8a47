#!/usr/bin/env bash
# generate() of RoBERTa and its kin as decoders emits what another model would: it numbers positions from 0 and hands
# them to the forward, while these models, left to themselves, begin after the padding's id (2 with pad_token_id 1), as
# they were trained. The first token's logits already differ from those of the plain forward over the same prompt; they
# equal a forward whose positions are shifted by hand. No warning is given.
#
# Versions: transformers 5.23.0, torch 2.13.0. Output seen:
#   roberta: generate's first logits are not the forward's, and equal those of positions from 0
#   camembert: generate's first logits are not the forward's, and equal those of positions from 0
#   xlm-roberta: generate's first logits are not the forward's, and equal those of positions from 0
# Exits 1 if that changes. Needs network access to PyPI; installs into a temporary folder (0.3 GB with a CPU build).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, CamembertConfig, RobertaConfig, XLMRobertaConfig

SMALL = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2, is_decoder=True,
             initializer_range=0.5)
ids = torch.randint(5, 50, (1, 12), generator=torch.Generator().manual_seed(0))
for config_of in (RobertaConfig, CamembertConfig, XLMRobertaConfig):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(**SMALL)).eval()
    with torch.no_grad():
        forward = model(ids).logits[:, -1]
        from_zero = model(ids, position_ids=torch.arange(12)[None]).logits[:, -1]
    settings = dict(max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
    made = model.generate(ids, **settings).logits[0]
    scale = forward.abs().max()
    assert (made - forward).abs().max() > 0.1 * scale, "the behaviour has changed"
    assert (made - from_zero).abs().max() < 1e-5 * scale, "the behaviour has changed"
    name = model.config.model_type
    print(f"{name}: generate's first logits are not the forward's, and equal those of positions from 0")
PYTHON
