"""The check of a user's `update` sees the methods that the object has, and every case is checked on its own."""

import gc
import weakref

import pytest
import torch

from kvcache.caches.checked_update import check_updates
from kvcache.caches.contract import UnfitCache
from kvcache.proof.quality import exact_logits, quality, sample_text
from kvcache.proof.tokens import agreement, reference
from kvcache.strategies.cached import Cached, Dynamic
from kvcache.strategies.catalogue import build
from tests.tiny import ARCHITECTURES, token_ids
from tests.unfit_caches import growing


def cached(factory: str) -> Cached:
    strategy = build(f"cache:tests.unfit_caches:{factory}", ARCHITECTURES["llama"](max_position_embeddings=512))
    assert isinstance(strategy, Cached)
    return strategy


def test_an_update_that_the_factory_set_on_the_object_is_the_one_that_is_judged() -> None:
    strategy = cached("rounding_by_a_wrapper")
    text = sample_text(Dynamic(strategy.model), torch.arange(2)[:, None], 60, seed=0)
    exact = exact_logits(strategy.model, text, 30)
    judged = quality(strategy, text, 30, exact)
    assert judged.logit_kl > 1e-3
    strategy.prepare(2, 60, prompt_length=30)
    strategy.generate(text[:, :30], 30)
    strategy.check_length(59)
    assert quality(strategy, text, 30, exact) == judged  # as it is timed, without the check


def test_exactly_the_methods_that_were_there_are_put_back() -> None:
    cache = growing(ARCHITECTURES["llama"]())
    own = cache.update = lambda *args, **named: type(cache).update(cache, *args, **named)  # type: ignore[method-assign]
    put_back = check_updates(cache, "own")
    assert set(vars(cache)) >= {"update", "get_mask_sizes"}
    assert vars(cache)["update"] is not own
    put_back()
    assert vars(cache)["update"] is own
    assert "get_mask_sizes" not in vars(cache)


def test_a_checked_cache_is_in_no_cycle() -> None:
    gc.disable()
    try:
        cache = growing(ARCHITECTURES["llama"]())
        put_back, there = check_updates(cache, "own"), weakref.ref(cache)
        del cache
        assert there() is None
        put_back()
    finally:
        gc.enable()


def test_another_depth_of_the_same_length_is_checked_anew() -> None:
    """Without a context a prompt of eleven is fed, and then one of five after six: the same capacity and length."""
    strategy, context, prompt = cached("with_lists"), token_ids(1, 2, 6), token_ids(2, 2, 5)
    strategy.prepare(2, 16, prompt_length=11)
    whole = torch.cat([context, prompt], dim=1)
    assert agreement(strategy, whole, reference(strategy.model, whole, 6)).tokens_match == "true"
    strategy.check_length(16)
    strategy.prepare(2, 16, context, prompt_length=11)
    with pytest.raises(UnfitCache, match=r"had said 5"):
        strategy.prefill(prompt)


def test_another_batch_size_is_checked_anew() -> None:
    strategy = cached("first_sequence")
    strategy.prepare(1, 10, prompt_length=8)
    strategy.generate(token_ids(1, 1, 8), 3)
    strategy.check_length(10)
    strategy.prepare(2, 10, prompt_length=8)
    with pytest.raises(UnfitCache, match=r"returned shape \[1, 2, 8, 8\]"):
        strategy.prefill(token_ids(1, 2, 8))
