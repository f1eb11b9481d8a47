"""What the tests of models share: a refusal's message, logits, where weights are mapped from, a tiny GGUF file."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from kvcache.models import ModelError
from tests.untraced import untraced_variables

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def refusal(call: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """The message of the ModelError that the call raises; always one line."""
    with pytest.raises(ModelError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert message
    assert len(message.splitlines()) == 1
    return message


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS, use_cache=False).logits
    return found


def mapped_from(model: PreTrainedModel) -> str:
    """The file that the first weight of `model` is mapped from; empty: it lies in memory of its own."""
    place = next(model.parameters()).data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= place < last:
            return line.split()[5] if len(line.split()) > 5 else ""
    return ""


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start another Python process in the repository's root."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=untraced_variables()
    )


def write_gguf(
    path: Path,
    *,
    scaling: gguf.RopeScalingType | None = None,
    factor: float | None = None,
    old_factor: float | None = None,
    tensors: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    description: str = "",
    parts: int | None = None,
) -> None:
    """A tiny Llama with a tokenizer of 8 bytes and 2 merges, its rotary positions scaled or not.

    `scaling` is by 4 unless a `factor` says otherwise; `old_factor` stands under the name of 2023.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_description(description)
    if scaling is not None:
        writer.add_rope_scaling_type(scaling)
        factor = factor or 4.0
    if factor is not None:
        writer.add_rope_scaling_factor(factor)
    if old_factor is not None:
        writer.add_float32("llama.rope.scale_linear", old_factor)
    if parts is not None:
        writer.add_uint16("split.count", parts)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(10)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "a", "b", "c", "d", "e", "f", "ab", "cd"])
    writer.add_token_types([3, 3, *[1] * 8])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "attn_q": (32, 32),
        "attn_k": (16, 32),
        "attn_v": (16, 32),
        "attn_output": (32, 32),
    }
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)}
    of_layer = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    outside = {"token_embd.weight": (10, 32), "output_norm.weight": (32,), "output.weight": (10, 32)}
    for name, shape in {**of_layer, **outside, **tensors}.items():
        writer.add_tensor(name, random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
