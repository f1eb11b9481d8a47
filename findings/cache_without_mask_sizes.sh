#!/usr/bin/env bash
# Drop-in caches that override update() and get_seq_length(), but not get_mask_sizes(): turboquant-serve 0.1.2 and tqai
# 0.6.1, beside transformers 5. One prompt and then single tokens are right. A prompt that follows tokens in the cache
# (a chat's second turn, a prefill in chunks) attends to the wrong keys, without an error: DynamicCache.get_mask_sizes
# counts the rows of its own layers, which are empty, so transformers leaves the mask to torch's is_causal, which begins
# at the first key. Both caches store each token by itself, so fed in two parts they must give what they give fed whole;
# with get_mask_sizes they do.
#
# Versions: transformers 5.23.0, torch 2.13.0, turboquant-serve 0.1.2, tqai 0.6.1. Output seen:
#   turboquant-serve: in two parts, logits differ by more than 0.1 of the largest; with get_mask_sizes, by less than 1e-3
#   tqai: in two parts, logits differ by more than 0.1 of the largest; with get_mask_sizes, by less than 1e-3
# Exits 1 if that changes. Needs network access to PyPI; installs into a temporary folder (0.3 GB with a CPU build).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 numpy==2.4.3
for package in turboquant-serve==0.1.2 tqai==0.6.1; do
    "$folder/env/bin/python" -m pip install --quiet --no-deps --target "$folder/${package%%==*}" "$package"
done
cat > "$folder/two_parts.py" <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

name = sys.argv[1]
if name == "turboquant-serve":
    from turboquant import TurboQuantCache

    def plain():
        return TurboQuantCache(key_bits=4, value_bits=4, dtype=torch.float32)
else:
    from tqai.cache.hf import TurboQuantDynamicCache
    from tqai.config import TurboQuantConfig

    def plain():
        return TurboQuantDynamicCache(TurboQuantConfig(backend="torch"))


torch.set_num_threads(1)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=97, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, head_dim=64, initializer_range=0.1,
)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(97, (1, 48))


def masked():
    cache = plain()
    cache.get_mask_sizes = lambda n_new, layer_idx: (cache.get_seq_length(layer_idx) + n_new, 0)
    return cache


@torch.no_grad()
def last_logits(make, *parts):
    cache = make()
    for part in ids.split(parts, dim=1):
        logits = model(part, past_key_values=cache).logits[:, -1]
    return logits


def apart(make):
    whole, in_parts = last_logits(make, 48), last_logits(make, 32, 16)
    return ((whole - in_parts).abs().max() / whole.abs().max()).item()


wrong, right = apart(plain), apart(masked)
assert wrong > 0.1 and right < 1e-3, f"the behaviour has changed: {wrong}, {right}"
print(
    f"{name}: in two parts, logits differ by more than 0.1 of the largest; "
    "with get_mask_sizes, by less than 1e-3"
)
PYTHON
for name in turboquant-serve tqai; do
    PYTHONPATH="$folder/$name" "$folder/env/bin/python" "$folder/two_parts.py" "$name" | grep differ
done
