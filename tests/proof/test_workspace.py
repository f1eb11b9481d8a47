"""The memory of a forward is counted before there are weights: what torch's allocator then hands out is as much."""

import copy
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bench.measure.case_costs import forward_bytes
from bench.measure.plan import describe
from kvcache.models import without_weights
from kvcache.models.skeleton import skeleton
from kvcache.proof import workspace as module
from kvcache.proof.workspace import Workspace
from kvcache.strategies.catalogue import build
from kvcache.strategies.strategy import Strategy
from tests.families import family
from tests.studies.architecture_configs import shrunken
from tests.tiny import ARCHITECTURES, token_ids

BATCH_SIZE, N_TOKENS = 2, 100
MODELS = {
    "plain": ARCHITECTURES["llama"],
    "windows, so a mask": ARCHITECTURES["mistral"],
    "ALiBi": ARCHITECTURES["bloom"],
    "experts": lambda: family("qwen3_next"),
    "a mask that is looked at": lambda: shrunken("biogpt"),
    "experts that ask how many tokens each has": lambda: shrunken("jetmoe"),
    "experts that ask for their tokens one by one": lambda: shrunken("longcat_flash", zero_expert_num=4),
}


@pytest.mark.parametrize("strategy", ["dynamic", "static", "naive"])
@pytest.mark.parametrize("name", MODELS)
def test_fake_tensors_take_what_real_ones_take(name: str, strategy: str) -> None:
    model = MODELS[name]()
    kind = None if strategy == "naive" else "dynamic"
    workspace = Workspace(skeleton(model.config, model.config._attn_implementation), torch.float32)
    counted = workspace.forward_bytes(kind, BATCH_SIZE, N_TOKENS)
    assert counted == pytest.approx(allocated(build(strategy, model), N_TOKENS), rel=0.25)


def allocated(strategy: Strategy, n_tokens: int) -> int:
    """Return the most that torch's allocator has handed out at a time of a prefill, less the cache that is left."""
    ids = token_ids(1, BATCH_SIZE, n_tokens)
    for _ in range(2):  # the first call of all fills tables
        strategy.prepare(BATCH_SIZE, n_tokens)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            strategy.prefill(ids)
    events: Any = profiled.profiler.kineto_results.events()
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most - strategy.kv_bytes_allocated


@pytest.mark.parametrize("strategy", ["dynamic", "naive"])
def test_between_lengths_it_is_read_off_from_above(strategy: str) -> None:
    described = describe("random:tiny", "")
    kind = None if strategy == "naive" else "dynamic"
    counted = Workspace(without_weights(described.spec, described.attn_implementation, "float32"), torch.float32)
    for n_tokens in (1, 2, 9, 1025, 4095, 4096):
        exact = counted.forward_bytes(kind, 1, n_tokens)
        assert exact <= forward_bytes(described, strategy, "float32", 1, n_tokens) <= 1.3 * exact


def test_a_loop_over_tokens_is_not_run_at_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("mamba")
    monkeypatch.setattr(module, "_SHORT", (16, 32, 64))
    workspace = Workspace(skeleton(model.config, model.config._attn_implementation), torch.float32)
    exact = workspace.forward_bytes(None, 1, 80)
    monkeypatch.setattr(module, "MOST_OPERATIONS", workspace._counted[None, 1, 64].operations)
    assert workspace.forward_bytes(None, 1, 80) == pytest.approx(exact, rel=0.05)
    assert workspace.forward_bytes(None, 1, 1 << 20) > 3000 * exact  # at once


@pytest.mark.parametrize(("name", "kept"), [("llama", 2), ("bloom", 2), ("gemma3", 6)])
@pytest.mark.parametrize("strategy", [None, "dynamic"])
def test_of_equal_layers_two_are_run_and_the_others_change_nothing(
    name: str, kept: int, strategy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy.deepcopy(ARCHITECTURES[name]().config)
    config.num_hidden_layers = 6
    if name == "gemma3":
        config.layer_types = ["sliding_attention", "full_attention"] * 3
    attention = "eager" if name == "bloom" else "sdpa"
    made = Workspace(skeleton(config, attention), torch.float32)
    assert made._model.config.num_hidden_layers == kept
    monkeypatch.setattr(module, "_keep_two_layers", lambda _: None)
    whole = Workspace(skeleton(config, attention), torch.float32)
    assert made.forward_bytes(strategy, 1, 200) == whole.forward_bytes(strategy, 1, 200)
    assert config.num_hidden_layers == 6


def test_a_plain_tensor_of_the_users_is_no_obstacle() -> None:
    model = skeleton(ARCHITECTURES["llama"]().config, "sdpa")
    model.model.scale = torch.ones(3)
    assert Workspace(model, torch.float32).forward_bytes(None, 1, 20) > 0
