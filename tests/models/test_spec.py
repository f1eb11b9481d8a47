"""A spec names a model, or is refused in one line; arguments are checked."""

from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcache.caches.contract import Unsupported
from kvcache.models import (
    ModelError,
    describe,
    load,
    load_tokenizer,
    random_weights,
    weights_digest,
)
from kvcache.models.skeleton import max_positions
from kvcache.strategies.catalogue import build
from kvcache.strategies.strategy import last_logits
from tests.models.loading import logits, python, refusal
from tests.studies.architecture_configs import shrunken
from tests.tiny import token_ids


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


@pytest.mark.parametrize(
    "model_type",
    [
        "camembert",
        "data2vec-text",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
        "gpt2",
        "whisper",
    ],
)
def test_as_many_positions_as_a_forward_takes(model_type):
    """RoBERTa and its kin have none for their padding's id, which is 1, and for those before it."""
    model = shrunken(model_type)
    limit = max_positions(model)
    if model_type == "whisper":
        assert limit == model.config.max_target_positions
    else:
        assert limit == model.config.max_position_embeddings - (0 if model_type == "gpt2" else 2)
    last_logits(model, token_ids(1, 1, limit))
    with pytest.raises((RuntimeError, IndexError)):
        last_logits(model, token_ids(1, 1, limit + 1))


def test_a_model_of_several_configs_is_described(tmp_path):
    shrunken("blt").save_pretrained(tmp_path / "blt")
    assert describe(str(tmp_path / "blt")).n_layers == 0
    with pytest.raises(Unsupported, match="blt has no num_hidden_layers"):
        build("dynamic", shrunken("blt")).prepare(1, 8)
