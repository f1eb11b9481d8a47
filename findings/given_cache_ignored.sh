#!/usr/bin/env bash
# The forwards of six decoders take `past_key_values` among other keyword arguments and do nothing with it. So a loop
# that works for every other model (feed the prompt with a cache, then one token at a time) runs here without an
# error, and each step sees its own token alone: the cache stays empty, and the logits are those of that one token.
#
# Versions: transformers 5.23.0, torch 2.13.0. Output seen:
#   openai-gpt, xlm, xlnet, reformer, rwkv, xlstm: 12 tokens with a cache, then one: the cache has 0 tokens, the logits
#   are those of the last token alone within 1e-5, and more than 0.1 of the largest from the forward over all 13
#   llama: the cache has 13 tokens, the logits are the forward's over all 13 within 1e-5
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

logging.set_verbosity_error()
torch.set_num_threads(1)
IGNORING = {
    "openai-gpt": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "xlm": dict(emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=64, causal=True, asm=False),
    "xlnet": dict(d_model=32, n_layer=2, n_head=4, d_inner=64),
    "reformer": dict(hidden_size=32, num_attention_heads=4, attention_head_size=8, feed_forward_size=64,
                     is_decoder=True, axial_pos_shape=[8, 8], axial_pos_embds_dim=[16, 16]),
    "rwkv": dict(hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, intermediate_size=64),
    "xlstm": dict(hidden_size=128, embedding_dim=128, num_heads=4, num_blocks=2, qk_dim_factor=0.5),
}
LLAMA = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
ids = torch.randint(97, (1, 13), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def stepped(name, sizes):
    """The length of the cache after 12 tokens and one; how far that one's logits lie from two forwards' without it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=97, bos_token_id=None, eos_token_id=None, pad_token_id=0, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(std=0.25)
    whole, alone = model(ids).logits[:, -1], model(ids[:, -1:]).logits[:, -1]
    cache = DynamicCache()
    model(ids[:, :-1], past_key_values=cache, use_cache=True)
    step = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    apart = [((step - other).abs().max() / whole.abs().max()).item() for other in (whole, alone)]
    return cache.get_seq_length(), *apart


for name, sizes in IGNORING.items():
    length, from_whole, from_alone = stepped(name, sizes)
    assert length == 0 and from_whole > 0.1 and from_alone < 1e-5, f"the behaviour has changed: {name} {from_whole}"
print(f"{', '.join(IGNORING)}: 12 tokens with a cache, then one: the cache has 0 tokens, the logits\n"
      "are those of the last token alone within 1e-5, and more than 0.1 of the largest from the forward over all 13")
length, from_whole, from_alone = stepped("llama", LLAMA)
assert length == 13 and from_whole < 1e-5, f"the behaviour has changed: {from_whole}"
print("llama: the cache has 13 tokens, the logits are the forward's over all 13 within 1e-5")
PYTHON
