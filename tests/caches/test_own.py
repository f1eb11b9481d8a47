"""The user's own cache: made as its factory wants, made anew for every round, and refused with the true reason."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from kvcache.caches.contract import UnfitCache
from kvcache.models import ModelError
from kvcache.proof.tokens import agreement, reference
from kvcache.strategies.cached import Cached
from kvcache.strategies.catalogue import build
from tests.tiny import ARCHITECTURES, token_ids

FACTORIES = """
from transformers import Cache, DynamicCache, StaticCache

def growing(model):
    return DynamicCache(config=model.config)

growing.promise = "exact"

ASKED = []

def fixed(model, prompt_length, capacity):
    ASKED.append((prompt_length, capacity))
    return StaticCache(config=model.config, max_cache_len=capacity)

ONE = []

def same(model):
    ONE[:] = ONE or [DynamicCache(config=model.config)]
    return ONE[0]

def nothing(model):
    return {}

def raising(model):
    raise RuntimeError("no room for it")

def perfect(model):
    return DynamicCache(config=model.config)

perfect.promise = "perfect"

class Deaf(DynamicCache):
    def get_seq_length(self, layer_idx=0):
        return 0

def deaf(model):
    return Deaf(config=model.config)

class Layer:
    keys = None

def layered(model):
    return Cache(layers=[Layer(), Layer()])
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the working directory, under a name of its own for every test."""
    name = f"own_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    importlib.invalidate_caches()
    return name


def cached(module: str, factory: str) -> Cached:
    strategy = build(f"cache:{module}:{factory}", ARCHITECTURES["llama"]())
    assert isinstance(strategy, Cached)
    return strategy


@pytest.mark.parametrize("factory", ["growing", "fixed"])
@pytest.mark.parametrize("n_depth", [0, 6])
def test_rounds_are_equal_and_exact(module: str, factory: str, n_depth: int) -> None:
    strategy = cached(module, factory)
    context, prompt = (token_ids(1, 2, n_depth) if n_depth else None), token_ids(2, 2, 5)
    expected = reference(strategy.model, prompt, 6, context)
    strategy.prepare(2, n_depth + 11, context, prompt_length=n_depth + 5)
    for _ in range(2):
        strategy.reset()
        assert agreement(strategy, prompt, expected).tokens_match == "true"
        strategy.kv.check_length(n_depth + 10)


def test_it_gets_what_it_names(module: str) -> None:
    strategy = cached(module, "fixed")
    with pytest.raises(UnfitCache, match="wants prompt_length"):
        strategy.prepare(1, 20)
    strategy.prepare(1, 20, prompt_length=12)
    assert set(importlib.import_module(module).ASKED) == {(12, 20)}


def test_bytes_are_those_held_and_not_the_models(module: str) -> None:
    strategy = cached(module, "growing")
    strategy.prepare(1, 20)
    strategy.kv.cache.model = strategy.model  # type: ignore[attr-defined]  # a cache may keep a reference to it
    strategy.prefill(token_ids(1, 1, 8))
    layers, heads, head_dim = 2, 2, 8
    assert strategy.kv_bytes == 2 * layers * heads * head_dim * 8 * 4


def test_promise(module: str) -> None:
    assert cached(module, "growing").promise == "exact"
    assert cached(module, "fixed").promise == "lossy"
    with pytest.raises(UnfitCache, match="promise is 'perfect'; valid: exact, lossy"):
        cached(module, "perfect")


@pytest.mark.parametrize(
    ("factory", "error", "reason"),
    [
        ("nothing", UnfitCache, "returned a dict; valid: a transformers.Cache"),
        ("layered", UnfitCache, "returned a cache with layers of type Layer; valid: subclasses"),
        ("same", UnfitCache, "returned the same object twice"),
        ("raising", ModelError, r"raised RuntimeError: no room for it \(.*own_.*line 25\)"),
        ("missing", ModelError, "has no missing"),
        ("a:b", UnfitCache, "names no factory; valid: cache:module:factory"),
    ],
)
def test_bad_factory_is_refused_in_one_line(module: str, factory: str, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason) as caught:
        cached(module, factory).prepare(1, 20)
    assert len(str(caught.value).splitlines()) == 1


def test_missing_module_is_refused() -> None:
    with pytest.raises(ModelError, match="No module named 'not_here'"):
        build("cache:not_here:make", ARCHITECTURES["llama"]())


def test_wrong_length_is_found_out(module: str) -> None:
    strategy = cached(module, "deaf")
    strategy.prepare(1, 20)
    strategy.prefill(token_ids(1, 1, 8))
    with pytest.raises(UnfitCache, match="is 0 after 8 tokens"):
        strategy.kv.check_length(8)


def test_the_example_of_the_documentation_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "caches.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len([line for line in example.splitlines() if line]) <= 10
    name = f"example_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(example)
    strategy, prompt = cached(name, "make"), token_ids(2, 1, 30)
    assert strategy.promise == "lossy"
    strategy.prepare(1, 40)
    found = agreement(strategy, prompt, reference(strategy.model, prompt, 8))
    assert 0 < found.logits_error < 0.1
    assert found.kv_bytes_allocated_after_decode == 2 * 2 * 2 * 8 * 37 * 2
    strategy.check_length(37)
