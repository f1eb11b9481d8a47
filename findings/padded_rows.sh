#!/usr/bin/env bash
# generate() with left padding and its attention_mask, as a batch of prompts of unequal length needs it, gives other
# logits than the prompt alone in these decoders, without an error or a warning. Two ways lead there: a number is
# taken from the column in the batch, padding included, and position_ids (which generate() makes from the mask) are
# not asked for it: BART's positions, RoFormer's rotary ones, Llama 4's scale of the queries. Or the padding runs
# through a recurrent state that no mask reaches: RWKV, RecurrentGemma. Llama is right.
#
# Versions: transformers 5.23.0, torch 2.13.0. Output seen:
#   12 tokens after 4 of padding, first logits of generate() against the same without padding
#   llama: equal within 1e-5 of the largest logit
#   bart, roformer, rwkv, recurrent_gemma: differ by more than 0.05
#   llama4_text, beyond its floor_scale: by more than 0.001
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
SIZES = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4)
MODELS = {
    "llama": dict(**SIZES, num_hidden_layers=2),
    "bart": dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64, is_decoder=True,
                 is_encoder_decoder=False, max_position_embeddings=64),
    "roformer": dict(**SIZES, num_hidden_layers=2, embedding_size=32, is_decoder=True, max_position_embeddings=64),
    "rwkv": dict(hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, intermediate_size=64),
    "recurrent_gemma": dict(**SIZES, num_hidden_layers=3, num_key_value_heads=1, head_dim=8, lru_width=32,
                            attention_window_size=64),
    "llama4_text": dict(**SIZES, num_hidden_layers=4, num_key_value_heads=2, head_dim=8, intermediate_size_mlp=64,
                        num_local_experts=2, floor_scale=8),
}
ids = torch.randint(1, 97, (1, 12), generator=torch.Generator().manual_seed(0))
padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)


@torch.no_grad()
def apart(name, sizes):
    """How far the logits of a padded prompt lie from its own, as a share of the largest."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=97, bos_token_id=None, eos_token_id=None, pad_token_id=0, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(std=0.25)
    settings = dict(max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), **settings).logits[0]
    row = model.generate(padded, attention_mask=(padded != 0).long(), **settings).logits[0]
    return ((row - alone).abs().max() / alone.abs().max()).item()


found = {name: apart(name, sizes) for name, sizes in MODELS.items()}
print("12 tokens after 4 of padding, first logits of generate() against the same without padding")
assert found["llama"] < 1e-5, f"the behaviour has changed: {found}"
print("llama: equal within 1e-5 of the largest logit")
four = ["bart", "roformer", "rwkv", "recurrent_gemma"]
assert all(found[name] > 0.05 for name in four), f"the behaviour has changed: {found}"
print(f"{', '.join(four)}: differ by more than 0.05")
assert found["llama4_text"] > 0.001, f"the behaviour has changed: {found}"
print("llama4_text, beyond its floor_scale: by more than 0.001")
PYTHON
