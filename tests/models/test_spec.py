"""A spec names a model, or is refused in one line; arguments are checked."""

from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcache.models import (
    ModelError,
    describe,
    load,
    load_tokenizer,
    random_weights,
    weights_digest,
)
from tests.models.loading import logits, python, refusal


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
