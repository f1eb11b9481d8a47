"""Steps without arithmetic: the same modules, with nothing to multiply."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.machine.clock import HostClock
from bench.measure import framework
from kvcache.models import describe
from kvcache.models.shrunken import HEAD_DIM, VOCAB_SIZE, shrunken
from kvcache.models.skeleton import count_parameters
from kvcache.strategies.catalogue import build
from kvcache.strategies.strategy import Strategy
from tests.handmade import make_case
from tests.tiny import ARCHITECTURES, build_without_compiler


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_shrinks_module_for_module(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    config, drawn = model.config.to_dict(), torch.random.get_rng_state()
    small = shrunken(model)
    assert small is not None
    assert [name for name, _ in small.named_modules()] == [name for name, _ in model.named_modules()]
    assert small(torch.arange(8).view(2, 4)).logits.shape == (2, 4, VOCAB_SIZE)
    assert model.config.to_dict() == config
    assert torch.equal(torch.random.get_rng_state(), drawn)


@pytest.mark.parametrize("spec", ["random:gpt2", "random:llama-135m", "random:qwen3-0.6b", "random:mistral-7b"])
def test_next_to_nothing_is_left_of_a_real_geometry(spec: str) -> None:
    described = describe(spec)
    heads = described.config.num_attention_heads
    with torch.device("meta"):
        small = shrunken(_on_meta(described.config))
    assert small is not None
    assert (
        max(max(weight.shape) for name, weight in small.named_parameters() if "wpe" not in name) <= 4 * heads * HEAD_DIM
    )
    assert count_parameters(small) < 0.02 * described.n_parameters


def _on_meta(config: Any) -> Any:
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def test_a_model_whose_config_refuses_is_not_told() -> None:
    model = ARCHITECTURES["llama"]()
    model.config = type("Other", (), {"get_text_config": lambda self, decoder: self})()
    assert shrunken(model) is None


def test_a_module_put_in_by_hand_is_not_told() -> None:
    class Linear(torch.nn.Linear):
        """Not what the config makes."""

    model = ARCHITECTURES["llama"]()
    model.model.layers[1].mlp.up_proj = Linear(32, 64, bias=False)
    assert shrunken(model) is None


def test_widths_that_a_model_cannot_have_are_not_told() -> None:
    config = AutoConfig.for_model("gptj", n_embd=128, n_head=2, n_layer=1, rotary_dim=64, vocab_size=97)
    model = AutoModelForCausalLM.from_config(config)
    assert model(torch.zeros((1, 2), dtype=torch.long)).logits.shape == (1, 2, 97)
    assert shrunken(model) is None


def timed(strategy: Strategy, **fields: Any) -> list[int] | None:
    return framework.time_steps(strategy, make_case(strategy.name, **fields), HostClock())


@pytest.mark.parametrize("name", ["dynamic", "static", "hf-generate"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_step_is_timed(name: str, batch_size: int) -> None:
    strategy = build(name, ARCHITECTURES["llama"]())
    times = timed(strategy, batch_size=batch_size)
    assert times is not None
    assert len(times) == framework.N_STEPS
    assert min(times) > 0
    assert strategy.capacity == 0  # the strategy that is measured knows nothing of it


FACTORIES = """
from transformers import DynamicCache

ASKED = []

def with_length(model, prompt_length):
    ASKED.append(prompt_length)
    return DynamicCache(config=model.config)

def of_this_model(model):
    return DynamicCache(config=model.config) if model.config.vocab_size == 97 else None
"""


def test_a_users_own_cache_gets_the_prompts_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "caches_by_length.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    model = ARCHITECTURES["llama"]()
    assert timed(build("cache:caches_by_length:with_length", model)) is not None
    assert set(importlib.import_module("caches_by_length").ASKED) == {framework.N_PROMPT}
    assert timed(build("cache:caches_by_length:of_this_model", model)) is None


def test_what_cannot_be_told_is_left_out() -> None:
    model = ARCHITECTURES["llama"]()
    assert timed(build("naive", model)) is None
    assert timed(build_without_compiler("compiled", model)) is None
    assert timed(build("dynamic", model), device="cuda") is None
