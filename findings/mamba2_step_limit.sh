#!/usr/bin/env bash
# Mamba 2 and the models that copy its mixer (Bamba, Zamba 2, and others) limit the time step of their scan
# (`time_step_limit`, in Zamba 2 and Nemotron-H `time_step_min`, 0.001 as they come), and do not limit it in a single
# step after a cache: mamba2_chunk_scan clamps it, mamba2_selective_state_update has no such argument. Where a token's
# time step is below the limit, a decode step gives other logits than the forward over the whole sequence.
#
# Versions: transformers 5.23.0, torch 2.13.0. Output seen:
#   mamba2: without a limit, single steps are as the whole forward within 1e-5; with a least time step of 0.1: 0.03 of
#   the largest logit apart
#   bamba and zamba2: the same, 0.06 and 0.10 apart
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
SIZES = dict(vocab_size=97, hidden_size=32, initializer_range=0.25, bos_token_id=None, eos_token_id=None,
             pad_token_id=None)
ATTENTION = dict(intermediate_size=64, num_attention_heads=4, num_key_value_heads=4)
HEADS = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8)


def kinds(limit):
    return {
        "mamba2": dict(num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=8,
                       time_step_limit=(limit, float("inf"))),
        "bamba": ATTENTION | HEADS | dict(num_hidden_layers=2, attn_layer_indices=[1],
                                          time_step_limit=(limit, float("inf"))),
        "zamba2": ATTENTION | dict(num_hidden_layers=2, layers_block_type=["linear_attention", "hybrid"],
                                   n_mamba_heads=8, mamba_d_state=8, chunk_size=8, time_step_min=limit),
    }


ids = torch.randint(97, (1, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def apart(name, limit):
    """How far the logits of the last of 8 single steps lie from those of one whole forward, of the largest logit."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES, **kinds(limit)[name])).eval()
    for part in model.modules():
        if hasattr(part, "dt_bias"):
            part.dt_bias.fill_(-4.0)  # softplus of it is 0.018
    whole = model(ids, use_cache=False).logits[:, -1]
    cache = DynamicCache(config=model.config)
    for at in [range(16), *([place] for place in range(16, 24))]:
        fed = {"cache_params": cache} if name == "mamba2" else {
            "past_key_values": cache, "position_ids": torch.tensor([list(at)])  # Bamba begins at 0 again without them
        }
        logits = model(ids[:, list(at)], **fed, use_cache=True).logits[:, -1]
    return ((logits - whole).abs().max() / whole.abs().max()).item()


for name in kinds(0):
    without, limited = apart(name, 1e-9), apart(name, 0.1)
    assert without < 1e-5 and limited > 1e-2, f"the behaviour has changed: {name} {without} {limited}"
    print(f"{name}: without a limit, single steps are as the whole forward within 1e-5; "
          f"with a least time step of 0.1: {limited:.2f} of the largest logit apart")
PYTHON
