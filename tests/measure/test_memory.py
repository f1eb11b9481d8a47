"""What a strategy takes beyond the weights: its cache, its workspace, and what it hides."""

import pytest
import torch
from transformers import DynamicCache

from bench.analysis.cautions import GROWTH_NOISE_BYTES
from bench.machine.devices import DEVICES
from bench.measure.memory import Weight, weigh
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
    assert found.growth == pytest.approx(allocated, abs=GROWTH_NOISE_BYTES / 2)
    assert allocated < found.beyond_weights < found.peak
    logits = BATCH * model.config.vocab_size * 4  # type: ignore[union-attr,operator]
    assert found.beyond_weights > allocated + logits


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
