"""Folders that are refused: damaged, pickled, with code of their own, with any configuration."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import BertConfig, T5Config

from kvcache.models import (
    ModelError,
    describe,
    load,
)
from tests.models.loading import logits, refusal
from tests.tiny import ARCHITECTURES, VOCAB_SIZE


def save_config(folder: Path, **content: object) -> None:
    (folder / "config.json").write_text(json.dumps(content))


def break_json(folder):
    (folder / "config.json").write_text('{"model_type": "llama",')


def drop(name):
    return lambda folder: (folder / name).unlink()


def pickle_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def own_code(folder):
    save_config(folder, model_type="my-own", auto_map={"AutoConfig": "code.MyConfig"})
    (folder / "code.py").write_text("raise SystemExit('code of the checkpoint was run')")


def own_weights_file(folder):
    save_config(folder, **json.loads((folder / "config.json").read_text()), transformers_weights="adapter_model.bin")


def index_of(*shards):
    def write(folder):
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {str(place): shard for place, shard in enumerate(shards)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return write


def lose_a_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def reshape(folder):
    save_config(folder, **{**json.loads((folder / "config.json").read_text()), "vocab_size": VOCAB_SIZE + 1})


def truncate(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)


def two_ggufs(folder):
    (folder / "model.safetensors").unlink()
    for name in ("a.gguf", "b.gguf"):
        (folder / name).touch()


AT_ONCE = {
    "a truncated file": (truncate, "the weights in"),
    "no config": (drop("config.json"), "holds no config.json"),
    "broken JSON": (break_json, "is not readable JSON"),
    "no object": (lambda folder: (folder / "config.json").write_text("[]"), "names no model_type"),
    "no model type": (lambda folder: save_config(folder, hidden_size=8), "names no model_type"),
    "another model type": (lambda folder: save_config(folder, model_type="gpt7"), "'gpt7' is not known"),
    "its own code": (own_code, "auto_map) is never run"),
    "its own weights file": (own_weights_file, "transformers_weights"),
    "an encoder": (lambda folder: BertConfig().save_pretrained(folder), "model type 'bert' is an encoder"),
    "an encoder with a decoder": (lambda folder: T5Config().save_pretrained(folder), "'t5' is an encoder with a dec"),
    "no language model": (lambda folder: save_config(folder, model_type="vit"), "'vit' is no causal language model"),
    "bad value": (lambda folder: save_config(folder, model_type="llama", hidden_size="wide"), "the configuration in"),
    "bad shape": (lambda folder: save_config(folder, model_type="llama", hidden_size=-4), "hidden size (-4)"),
    "bad name": (
        lambda folder: save_config(folder, model_type="llama", hidden_act="no"),
        "type 'llama' cannot be read",
    ),
    "pickled": (pickle_weights, "holds pickled weights only (pytorch_model.bin), which are never read"),
    "no weights": (drop("model.safetensors"), "holds no weights"),
    "an adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
    "index of pickles": (index_of("pytorch_model.bin"), "names 'pytorch_model.bin'; valid: safetensors"),
    "index of files elsewhere": (index_of("../x.safetensors"), "names '../x.safetensors'; valid: safetensors"),
    "index of missing files": (index_of("x.safetensors"), "lacks x.safetensors"),
    "index of nothing": (index_of(), "names no weights"),
    "two GGUF files": (two_ggufs, "holds 2 GGUF files (a.gguf, b.gguf)"),
}
WHEN_LOADED = {
    "a lost tensor": (lose_a_tensor, "lack 1 tensors of the model that config.json describes, model.layers.1.mlp.up"),
    "another shape": (reshape, "the weights in"),
}


@pytest.mark.parametrize(("damage", "expected"), AT_ONCE.values(), ids=AT_ONCE)
def test_bad_folder_is_refused_before_anything_runs(checkpoint, damage, expected):
    damage(checkpoint)
    for call in (describe, load):
        message = refusal(call, str(checkpoint))
        assert expected in message


@pytest.mark.parametrize(("damage", "expected"), WHEN_LOADED.values(), ids=WHEN_LOADED)
def test_bad_weights_are_refused_when_loaded(checkpoint, damage, expected):
    damage(checkpoint)
    describe(str(checkpoint))
    for dtype in ("float32", "bfloat16"):
        message = refusal(load, str(checkpoint), dtype=dtype)
        assert expected in message
        assert str(checkpoint) in message


def test_native_model_type_with_code_beside_it_runs_without_the_code(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    save_config(checkpoint, **config, auto_map=dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "code.Mine"))
    (checkpoint / "code.py").write_text("raise SystemExit('code of the checkpoint was run')")
    assert torch.equal(logits(load(str(checkpoint))), logits(ARCHITECTURES["llama"]()))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 8) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
KEYS = st.sampled_from(["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rope_parameters"])
TYPES = st.sampled_from(["llama", "gpt2", "gemma3", "bart", 3, None])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.builds(lambda kind, rest: {**rest, "model_type": kind}, TYPES, st.dictionaries(KEYS, JSON)) | JSON)
def test_any_config_is_a_model_or_refused(content, checkpoint):
    (checkpoint / "config.json").write_text(json.dumps(content))
    with suppress(ModelError):
        describe(str(checkpoint))
