#!/usr/bin/env bash
# DeepSeek-V3.2 in transformers: the logits of a position change with the tokens that come after it, once more tokens are
# visible than the indexer selects. Its scores pass a ReLU, so several are exactly 0, and topk takes others of these
# equals when the score matrix has more columns. A cached step, which scores one row, then attends to other tokens than
# the parallel forward did: neither equals the other, and no cache can be proved exact against a whole forward. Models
# with the same indexer (GLM-MoE-DSA) do the same.
#
# Versions: transformers 5.23.0, torch 2.13.0. Output seen:
#   positions 0 to 7 (no more tokens than are selected): equal within 1e-6
#   positions 8 to 13: differ by more than 0.01 of the largest logit
#   where the selections differ first, the scores of the tokens in question are [0.0] in both
# Exits 1 if that changes. Needs network access to PyPI; installs into a temporary folder (0.3 GB with a CPU build).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, DeepseekV32Config

torch.set_num_threads(1)
K, SHORT, LONG = 8, 14, 20
config = DeepseekV32Config(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    head_dim=8, index_topk=K, index_head_dim=16, index_n_heads=2, n_routed_experts=4, n_shared_experts=1, n_group=1,
    topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16, mlp_layer_types=["dense"] * 4,
    max_position_embeddings=128, bos_token_id=None, eos_token_id=None, pad_token_id=None, initializer_range=0.25,
)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config).eval()
ids = torch.randint(97, (1, LONG), generator=torch.Generator().manual_seed(2))

scores: dict[int, list[torch.Tensor]] = {SHORT: [], LONG: []}
plain = torch.Tensor.topk


def watched(self, k, *arguments, **named):
    if self.dim() == 3 and self.shape[-2] == self.shape[-1] and self.shape[-1] in scores:
        scores[self.shape[-1]].append(self[0].clone())
    return plain(self, k, *arguments, **named)


torch.Tensor.topk = watched
with torch.no_grad():
    long, short = (model(ids[:, :n], use_cache=False).logits for n in (LONG, SHORT))
torch.Tensor.topk = plain
apart = ((long[:, :SHORT] - short).abs().amax(-1)[0] / long.abs().max()).tolist()
assert max(apart[:K]) < 1e-6 and max(apart[K:]) > 1e-2, f"the behaviour has changed: {apart}"
print(f"positions 0 to {K - 1} (no more tokens than are selected): equal within 1e-6")
print(f"positions {K} to {SHORT - 1}: differ by more than 0.01 of the largest logit")


def first_difference():
    for one, other in zip(scores[LONG], scores[SHORT]):
        for row in range(K, SHORT):
            chosen = [set(plain(each[row], K).indices.tolist()) for each in (one, other)]
            if chosen[0] != chosen[1]:
                return sorted({each[row, token].item() for each in (one, other) for token in chosen[0] ^ chosen[1]})
    return None


tied = first_difference()
print(f"where the selections differ first, the scores of the tokens in question are {tied} in both")
assert tied == [0.0], "the behaviour has changed"
PYTHON
