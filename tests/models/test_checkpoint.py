"""Checkpoint folders and GGUF files: read as they are, or converted once and mapped."""

import hashlib
import importlib.util

import gguf
import numpy as np
import pytest
import torch

from kvcache.models import (
    describe,
    load,
    load_tokenizer,
    weights_digest,
)
from tests.models.loading import logits, mapped_from, refusal
from tests.tiny import ARCHITECTURES, MAX_POSITIONS, VOCAB_SIZE


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_survives_the_folder(name, tmp_path, cache):
    attention = "eager" if name == "bloom" else "sdpa"
    model = ARCHITECTURES[name](attn_implementation=attention)
    model.save_pretrained(tmp_path / name)
    described = describe(str(tmp_path / name), attn_implementation=attention)
    assert described.n_parameters == sum(weight.numel() for weight in model.parameters())
    assert described.vocab_size == VOCAB_SIZE
    assert described.max_positions == (None if name == "bloom" else MAX_POSITIONS)
    loaded = load(str(tmp_path / name), attn_implementation=attention)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))
    assert mapped_from(loaded) == str(tmp_path / name / "model.safetensors")
    assert not cache.exists()


def test_attention_that_a_model_lacks(tmp_path):
    ARCHITECTURES["bloom"]().save_pretrained(tmp_path / "bloom")
    assert describe(str(tmp_path / "bloom")).attn_implementation == "eager"  # where none is asked for
    assert describe("random:tiny").attn_implementation == "sdpa"
    for call in (describe, load):
        message = refusal(call, str(tmp_path / "bloom"), attn_implementation="sdpa")
        assert "attn_implementation 'sdpa' is not available for model type 'bloom' here; valid: eager" in message


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_attention_that_is_not_installed():
    assert "valid: eager, sdpa" in refusal(describe, "random:tiny", attn_implementation="flash_attention_2")


def test_converted_copy_is_made_once_and_mapped(checkpoint, cache, capsys):
    first = load(str(checkpoint), dtype="bfloat16")
    assert f"kvbench: converting {checkpoint} to bfloat16 once" in capsys.readouterr().err
    second = load(str(checkpoint), dtype="bfloat16")
    assert capsys.readouterr().err == ""
    for model in (first, second):
        assert mapped_from(model).startswith(str(cache))
        assert torch.equal(next(model.parameters()), next(ARCHITECTURES["llama"]().parameters()).bfloat16())
    ARCHITECTURES["llama"](seed=1).save_pretrained(checkpoint)
    changed = load(str(checkpoint), dtype="bfloat16")
    assert torch.equal(next(changed.parameters()), next(ARCHITECTURES["llama"](seed=1).parameters()).bfloat16())


def test_shards(tmp_path):
    model = ARCHITECTURES["qwen3"]()
    model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(str(tmp_path / "model"))), logits(model))
    assert len(weights_digest(str(tmp_path / "model"))) == 64


def test_digest_is_that_of_the_file(checkpoint):
    content = (checkpoint / "model.safetensors").read_bytes()
    assert weights_digest(str(checkpoint)) == hashlib.sha256(content).hexdigest()


def test_folder_without_tokenizer(checkpoint):
    assert "holds no tokenizer" in refusal(load_tokenizer, str(checkpoint))


def test_gguf_is_converted_once_and_mapped(gguf_folder, cache, capsys):
    described = describe(str(gguf_folder))
    assert (described.vocab_size, described.max_positions) == (10, 64)
    assert not list(cache.glob("*"))  # the folder was tried, nothing was converted
    first = load(str(gguf_folder))
    assert capsys.readouterr().err.splitlines() == [
        "kvbench: converting tiny.gguf once (about 15 s per 100 MB) into the cache"
    ]
    second = load(str(gguf_folder))
    assert load_tokenizer(str(gguf_folder))("abcd").input_ids == [8, 9]
    assert capsys.readouterr().err == ""
    assert torch.equal(logits(first), logits(second))
    reader = gguf.GGUFReader(gguf_folder / "tiny.gguf")
    [embedding] = [tensor.data for tensor in reader.tensors if tensor.name == "token_embd.weight"]
    assert np.array_equal(second.get_input_embeddings().weight.numpy(), embedding)
    for model in (first, second, load(str(gguf_folder), dtype="bfloat16")):
        assert mapped_from(model).startswith(str(cache))


def test_damaged_gguf(gguf_folder):
    (gguf_folder / "tiny.gguf").write_bytes(b"GGUF, or something of the kind")
    for call in (describe, load, load_tokenizer):
        assert str(gguf_folder) in refusal(call, str(gguf_folder))
