"""random:NAME: published sizes, weights that follow the seed alone, and no file of large ones."""

import pytest
import torch
from safetensors.torch import load_file

from kvcache import models
from kvcache.models import (
    GEOMETRIES,
    describe,
    load,
    load_tokenizer,
    random_weights,
    weights_digest,
)
from tests.models.loading import IDS, logits, mapped_from, python, refusal


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
    assert not list(cache.glob("*"))  # the folder was tried, nothing was drawn


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
