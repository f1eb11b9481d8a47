"""Checkpoints that lack their large files, or that compute something else than their author meant."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

import kvcache
from kvcache.models import describe, load
from kvcache.models.gguf_header import rotary_scaling
from tests.models.loading import refusal, write_gguf
from tests.tiny import ARCHITECTURES

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1234567\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pointer_in_place_of_a_file_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_text(POINTER)
    message = refusal(describe, str(checkpoint))
    assert message.endswith(f"holds Git LFS pointers in place of {name}; run `git lfs pull` in it")
    assert refusal(load, str(checkpoint)) == message


def test_a_pointer_in_place_of_a_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text(POINTER)
    assert "model.gguf; run `git lfs pull`" in refusal(describe, str(tmp_path))


@pytest.mark.parametrize("parts", [[1, 2, 3], [2]])
def test_a_gguf_model_in_parts_is_refused_by_its_parts(tmp_path: Path, parts: list[int]) -> None:
    names = [f"big-Q4_K_M-{part:05}-of-00003.gguf" for part in parts]
    for name in names:
        (tmp_path / name).write_bytes(b"GGUF")
    message = refusal(describe, str(tmp_path))
    assert f"in parts ({', '.join(names)})" in message
    assert "llama-gguf-split --merge" in message
    assert "keep one of them" not in message


def test_scaled_positions_of_a_gguf_file_are_a_caution(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", scaling=gguf.RopeScalingType.YARN)
    (caution,) = describe(str(tmp_path)).cautions
    assert caution.startswith("tiny.gguf scales its rotary positions (yarn), which transformers ignores")


def write_long(path: Path) -> None:
    write_gguf(path, tensors={"rope_factors_long.weight": (4,), "rope_factors_short.weight": (4,)})


@pytest.mark.parametrize(
    ("write", "kind"),
    [
        (functools.partial(write_gguf, factor=4.0), "linear"),
        (functools.partial(write_gguf, factor=1.0), None),
        (functools.partial(write_gguf, old_factor=4.0), "linear"),
        (functools.partial(write_gguf, old_factor=1.0), None),
        (functools.partial(write_gguf, tensors={"rope_freqs.weight": (4,)}), "llama3"),
        (write_long, "longrope"),
        (functools.partial(write_gguf, description="rope_freqs.weight llama.rope.scaling.type"), None),
    ],
)
def test_scaling_is_found_as_llama_cpp_reads_it(
    tmp_path: Path, write: Callable[[Path], None], kind: str | None
) -> None:
    write(tmp_path / "tiny.gguf")
    assert rotary_scaling(tmp_path / "tiny.gguf") == kind


def test_a_part_of_a_gguf_model_under_another_name_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "renamed.gguf", parts=3)
    assert "renamed.gguf is one of 3 parts of a GGUF model" in refusal(describe, str(tmp_path))


def test_a_gguf_model_in_one_part_is_whole(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny-00001-of-00001.gguf", parts=1)
    assert describe(str(tmp_path)).cautions == ()


@pytest.mark.parametrize("scaling", [None, gguf.RopeScalingType.NONE])
def test_unscaled_positions_are_none(tmp_path: Path, scaling: gguf.RopeScalingType | None) -> None:
    write_gguf(tmp_path / "tiny.gguf", scaling=scaling)
    assert describe(str(tmp_path)).cautions == ()


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_two_matrices_under_a_tied_config_are_a_caution(checkpoint: Path) -> None:
    assert describe(str(checkpoint)).cautions == ()
    edit(checkpoint, tie_word_embeddings=True)
    (caution,) = describe(str(checkpoint)).cautions
    assert caution.startswith("config.json ties lm_head.weight to model.embed_tokens.weight, and the file holds two")


def test_equal_matrices_under_a_tied_config_are_none(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    save_file(
        weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, checkpoint / "model.safetensors"
    )
    edit(checkpoint, tie_word_embeddings=True)
    assert describe(str(checkpoint)).cautions == ()


def test_two_matrices_are_found_in_a_file_of_the_inner_models_names(tmp_path: Path) -> None:
    """GPT-2's own files on the hub say `wte.weight` where transformers writes `transformer.wte.weight`."""
    ARCHITECTURES["gpt2"]().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {name.removeprefix("transformer."): weight for name, weight in load_file(file).items()}
    save_file(weights | {"lm_head.weight": torch.ones_like(weights["wte.weight"])}, file, metadata={"format": "pt"})
    (caution,) = describe(str(tmp_path)).cautions
    assert caution.startswith("config.json ties lm_head.weight to transformer.wte.weight, and the file holds two")


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.int8, "8-bit integers without scales"),
        (torch.uint8, "8-bit integers without scales"),
        (torch.float8_e4m3fnuz, "8-bit floating point without scales"),
    ],
)
def test_any_narrow_type_is_a_caution(checkpoint: Path, dtype: torch.dtype, words: str) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    narrow = {name: weights[name].to(dtype)}
    save_file(weights | narrow, checkpoint / "model.safetensors")
    (caution,) = describe(str(checkpoint)).cautions
    assert words in caution
    assert "config.json has no quantization_config" in caution


def test_a_quantization_that_transformers_skips_is_a_caution(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(weights | {name: weights[name].to(torch.float8_e4m3fn)}, checkpoint / "model.safetensors")
    edit(checkpoint, quantization_config={"quant_method": "mine"})
    (caution,) = describe(str(checkpoint)).cautions
    assert "transformers knows no quantization method 'mine'" in caution


def test_bare_float8_is_a_caution(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(weights | {name: weights[name].to(torch.float8_e4m3fn)}, checkpoint / "model.safetensors")
    (caution,) = describe(str(checkpoint)).cautions
    assert caution.startswith("1 tensors are stored in 8-bit floating point without scales")
    assert name in caution
    assert {weight.dtype for weight in load(str(checkpoint)).parameters()} == {torch.float32}


BLOCK = 16


@pytest.fixture
def float8_folder(checkpoint: Path) -> Path:
    """The tiny Llama with its linear layers in float8, a scale for each block of 16 x 16, the rest in bfloat16."""
    weights = {}
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        if ".layers." in name and name.endswith("proj.weight"):
            blocks = weight.unfold(0, BLOCK, BLOCK).unfold(1, BLOCK, BLOCK)
            scales = blocks.abs().amax((-1, -2)) / torch.finfo(torch.float8_e4m3fn).max
            spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            weights |= {name: (weight / spread).to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
        else:
            weights[name] = weight.bfloat16()
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    edit(
        checkpoint,
        quantization_config={
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["lm_head"],
        },
    )
    return checkpoint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there transformers computes in float8")
def test_a_float8_folder_is_unpacked_to_the_type_asked_for(float8_folder: Path, dtype: str) -> None:
    plain = load(str(float8_folder), dtype=dtype)
    assert {weight.dtype for weight in plain.parameters()} == {getattr(torch, dtype)}
    strategy = kvcache.Dynamic(plain)
    strategy.prepare(1, 12)
    assert strategy.generate(torch.tensor([[1, 2, 3]]), 4).shape == (1, 4)
    assert describe(str(float8_folder)).cautions == ()


def test_a_model_without_sdpa_is_loaded_at_an_attention_it_has(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gpt_oss",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        vocab_size=97,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "oss")
    assert (
        load(str(tmp_path / "oss")).config._attn_implementation == describe(str(tmp_path / "oss")).attn_implementation
    )
