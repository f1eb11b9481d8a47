"""What a strategy takes beyond the weights: its cache, its workspace, and what it hides."""

from unittest.mock import Mock

import pytest
import torch
from transformers import DynamicCache

from bench.machine.devices import DEVICES
from bench.measure.memory import Weight, weigh
from bench.record import GROWTH_NOISE_BYTES
from kvcache import models
from kvcache.caches.dynamic import DynamicKV
from kvcache.strategies.cached import Cached
from kvcache.strategies.catalogue import build
from kvcache.strategies.strategy import Strategy

CPU = DEVICES["cpu"]
BATCH, N_IDS, N_GEN = 16, 500, 4


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    if CPU.held_memory_bytes() is None or not CPU.reset_peak_memory():
        pytest.skip("this system does not say what a process holds")
    return models.load("random:tiny", dtype="float32", device="cpu", attn_implementation="sdpa", seed=0)


def weighed(strategy: Strategy) -> Weight:
    ids = torch.zeros(BATCH, N_IDS, dtype=torch.long)
    forced = torch.zeros(BATCH, N_GEN, dtype=torch.long)
    steps = None if strategy.reads_cache else [2]
    for _ in range(2):  # the first pass allocates what is not the strategy's
        found = weigh(strategy, CPU, ids, forced, steps)
    return found


@pytest.mark.parametrize("name", ["naive", "dynamic", "static", "fp8", "hf-generate"])
def test_a_process_grows_by_its_cache_and_its_peak_holds_the_workspace_too(name: str, model: torch.nn.Module) -> None:
    strategy = build(name, model)  # type: ignore[arg-type]
    found = weighed(strategy)
    allocated = strategy.kv_bytes_allocated
    assert (allocated > 1 << 20) == (name != "naive")
    assert found.growth is not None
    assert found.beyond_weights is not None
    assert found.peak is not None
    assert found.growth == pytest.approx(allocated, abs=GROWTH_NOISE_BYTES)
    assert allocated < found.beyond_weights < found.peak
    logits = BATCH * model.config.vocab_size * 4  # type: ignore[union-attr,operator]
    assert found.beyond_weights > allocated + logits


@pytest.mark.parametrize(("held", "growth"), [([0, 9, 1, 3], 2), ([0, 9, 0, 12], 9), ([0, 1], 1)])
def test_what_only_a_first_pass_left_is_not_weighed(held: list[int], growth: int, model: torch.nn.Module) -> None:
    """In MB, before and after each pass: a second one only where the first held more than it can explain."""
    device = Mock(held_memory_bytes=Mock(side_effect=[1_000_000 * size for size in held]))
    device.peak_memory_bytes.return_value = device.peak_held_bytes.return_value = 20_000_000
    ids, forced = torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)
    found = weigh(build("dynamic", model), device, ids, forced, None)  # type: ignore[arg-type]
    assert found.growth == 1_000_000 * growth
    assert device.held_memory_bytes.call_count == len(held)


class HidingKV(DynamicKV):
    """Keeps every row a second time where no walk from the cache comes."""

    def _empty(self) -> DynamicCache:
        hidden: list[object] = []
        cache = super()._empty()
        for layer in cache.layers:
            update = layer.update

            def keep(keys: torch.Tensor, values: torch.Tensor, *rest: object, _update: object = update) -> object:
                hidden.append((keys.numpy().copy(), values.numpy().copy()))
                return _update(keys, values, *rest)  # type: ignore[operator]

            layer.update = keep  # type: ignore[method-assign]
        return cache  # type: ignore[return-value]


def test_what_a_cache_hides_shows_in_the_growth(model: torch.nn.Module) -> None:
    strategy = Cached(model, "hiding", HidingKV)  # type: ignore[arg-type]
    found = weighed(strategy)
    assert found.growth is not None
    assert found.growth > 1.9 * strategy.kv_bytes  # whether or not the walk over its storages finds the copies
