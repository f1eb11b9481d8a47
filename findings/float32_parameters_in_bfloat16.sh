#!/usr/bin/env bash
# XLNet's attention and Reformer's axial positions make their parameters as float32 whatever dtype is asked for
# (torch.FloatTensor, dtype=torch.float32), so from_pretrained(dtype=torch.bfloat16) gives a model of two dtypes, although
# every tensor in the file is bfloat16. Its first forward raises. model.to(torch.bfloat16) after loading repairs it.
#
# Versions: transformers 5.23.0, torch 2.13.0. Output seen:
#   xlnet: a file of bfloat16 tensors alone, loaded with dtype=torch.bfloat16: 19 of 37 parameters are float32
#   xlnet: forward raises: expected scalar type Float but found BFloat16
#   xlnet: after .to(torch.bfloat16) it gives logits of 97 tokens
#   reformer: a file of bfloat16 tensors alone, loaded with dtype=torch.bfloat16: 2 of 31 parameters are float32
#   reformer: forward raises: mixed dtype (CPU): expect parameter to have scalar type of Float
#   reformer: after .to(torch.bfloat16) it gives logits of 97 tokens
# Exits 1 if that changes. Needs network access to PyPI; installs into a temporary folder (0.3 GB with a CPU build).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - "$folder/models" <<'PYTHON'
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, ReformerConfig, XLNetConfig
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
CONFIGS = [
    XLNetConfig(vocab_size=97, d_model=32, n_layer=2, n_head=4, d_inner=64),
    ReformerConfig(vocab_size=97, is_decoder=True, hidden_size=32, num_attention_heads=4, attention_head_size=8,
                   feed_forward_size=64, attn_layers=["local", "local"], axial_pos_shape=[16, 16],
                   axial_pos_embds_dim=[16, 16], local_attn_chunk_length=8),
]
ids = torch.arange(16)[None]
for config in CONFIGS:
    name, saved = config.model_type, Path(sys.argv[1], config.model_type)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(saved)
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16).eval()
    parameters = list(model.parameters())
    wide = sum(weight.dtype == torch.float32 for weight in parameters)
    print(f"{name}: a file of bfloat16 tensors alone, loaded with dtype=torch.bfloat16: "
          f"{wide} of {len(parameters)} parameters are float32")
    assert wide, "the behaviour has changed"
    with torch.no_grad():
        try:
            model(ids)
        except RuntimeError as error:
            print(f"{name}: forward raises: {error}")
        else:
            raise SystemExit("the behaviour has changed")
        print(f"{name}: after .to(torch.bfloat16) it gives logits of {model.to(torch.bfloat16)(ids).logits.shape[-1]} tokens")
PYTHON
