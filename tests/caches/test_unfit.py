"""Caches that do what they must not are refused with the true reason; odd ones that are right are measured."""

import functools
import gc
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch.nn.modules import module as every_module
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcache.caches.contract import UnfitCache, layers_of
from kvcache.caches.untouched import COLUMNS, Surroundings
from kvcache.models import ModelError
from kvcache.proof.tokens import agreement, reference
from kvcache.strategies.cached import Cached
from kvcache.strategies.catalogue import build
from tests import inline, unfit_caches
from tests.commandline import kvbench
from tests.families import dynamic_ntk, family
from tests.tiny import ARCHITECTURES, token_ids
from tests.unfit_caches import growing

PER_TOKEN = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head_dim, bytes of a float32


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Put back torch's settings and the globals of the factories, whose tensors count as their caches'."""
    threads, attention = torch.get_num_threads(), ALL_ATTENTION_FUNCTIONS["sdpa"]
    yield
    torch.set_num_threads(threads)
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    every_module._global_forward_hooks.clear()
    torch.set_float32_matmul_precision("highest")
    torch.set_default_device(None)
    unfit_caches.turns.clear()
    unfit_caches.made_once.clear()
    unfit_caches.layers.clear()
    unfit_caches.globals_of_layers.clear()
    unfit_caches.PooledLayer.pool.clear()


def cached(factory: str) -> Cached:
    strategy = build(f"cache:tests.unfit_caches:{factory}", ARCHITECTURES["llama"]())
    assert isinstance(strategy, Cached)
    return strategy


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("number", "is an int; valid: a function of the model"),
        ("a_class", "is a class whose first argument is no model"),
        ("filled_class", "is a class whose first argument is no model"),
        ("awaited", "returned a coroutine; valid: a transformers.Cache"),
        ("class_itself", "returned the class DynamicCache; valid: a transformers.Cache"),
        ("legacy", "returned a tuple; valid: a transformers.Cache"),
        ("nothing", "returned None; valid: a transformers.Cache"),
        ("no_model", r"no_model\(\).*: too many positional arguments; valid: a function of the model"),
        ("flavoured", r"flavoured\(model.*missing a required argument: 'flavour'; valid: a function of the model, and"),
        ("lists_promise", r"promise is \['exact'\]; valid: exact, lossy"),
        ("for_encoders", "is for models with an encoder"),
        ("scales_weights", "changed the model's weights; it must leave them as they are"),
        ("casts", "changed the model's weights"),
        ("sets_attention", "changed the model's attention from sdpa to eager"),
        ("sets_config", "changed the model's config"),
        ("scales_buffers", "changed the model's buffers"),
        ("hooks_the_head", "changed the hooks of the model's modules"),
        ("hooks_what_goes_in", "changed the hooks of the model's modules"),
        ("patches_a_forward", "changed the forward of a module of the model"),
        ("swaps_rows", "changed the model's weights"),
        ("replaces_attention", "changed the functions that compute attention"),
        ("hooks_every_module", "changed torch's hooks of all modules"),
        ("uncounted", r"unfit_caches:uncounted: get_seq_length\(\) returned None; valid: how many tokens"),
        ("fractional", r"get_seq_length\(\) returned a float; valid: how many tokens"),
        ("trains", "changed the model's mode from evaluation to training"),
        ("sets_threads", r"changed torch's threads from \d+ to \d+"),
        ("sets_precision", "changed torch's precision of float32 products from highest to medium"),
        ("sets_device", "changed torch's default device from cpu to meta"),
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine")
def test_it_is_refused_before_it_runs(factory: str, reason: str) -> None:
    with pytest.raises(UnfitCache, match=reason) as caught:
        cached(factory).prepare(1, 20)
    assert len(str(caught.value).splitlines()) == 1


FAILING = {
    "nothing": "cache:tests.unfit_caches:nothing returned None; valid: a transformers.Cache",
    "Mistaken": r"cache:tests.unfit_caches:Mistaken raised AttributeError: .*no_such_part.*unfit_caches.py, line \d+\)",
    "taking_turns": r".*:taking_turns returned a cache that holds \d+ tokens; valid: an empty one each time",
    "same_object": ".*:same_object returned the same object twice; valid: a new cache at each call",
    "hooks_the_head": ".*:hooks_the_head changed the hooks of the model's modules; it must leave them as they are",
    "evicting": r".*:evicting: update\(\) returned keys of 4 tokens when .*: attention would see the wrong ones",
    "Miscounting": r"get_seq_length\(\) is \d+ after \d+ tokens; positions are counted from it",
    "only_promised": r".*:only_promised promises to be exact, and its logits differ from the parallel forward's by .*",
}


def test_a_run_measures_the_others_and_stores_why_each_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inline.use(monkeypatch)
    monkeypatch.setattr("bench.tell.report.write_plots", lambda report, derived: {})
    strategies = ["dynamic", *(f"cache:tests.unfit_caches:{factory}" for factory in [*FAILING, "growing"])]
    grid = ["-m", "random:tiny", "-p", "8", "-n", "5", "-t", "1", "-r", "1", "--no-ceilings", "--out", str(tmp_path)]
    done = kvbench("run", *grid, "--strategies", ",".join(strategies), code=5)
    rows = pd.read_csv(Path(done.stdout.strip().splitlines()[-1]) / "summary.csv", dtype={"tokens_match": str})
    decode = rows[rows["phase"] == "decode"].assign(name=rows["strategy"].str.rpartition(":")[2]).set_index("name")
    assert list(decode.index) == ["dynamic", *FAILING, "growing"]
    for factory, reason in FAILING.items():
        assert re.fullmatch(reason, decode.loc[factory, "error"]), decode.loc[factory, "error"]
    assert (decode.loc[list(FAILING), "status"] == "failed").all()
    assert decode.loc[list(FAILING), "latency_ms"].isna().all()
    assert (decode.loc[["dynamic", "growing"], "status"] == "ok").all()
    assert decode.loc[["dynamic", "growing"], "latency_ms"].notna().all()


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("cache:", "names no factory"),
        ("cache:module", "names no factory"),
        ("cache:.module:make", "names no factory"),
        ("cache:tests/unfit_caches:growing", "No module named 'tests/unfit_caches'"),
        (
            "cache:tests.unfit_caches.py:growing",
            "tests.unfit_caches.py is a file; give its module, tests.unfit_caches$",
        ),
    ],
)
def test_a_spec_that_names_nothing_is_refused(spec: str, reason: str) -> None:
    with pytest.raises((UnfitCache, ModelError), match=reason):
        build(spec, ARCHITECTURES["llama"]())


@pytest.mark.parametrize("factory", ["taking_turns", "shared_layers"])
def test_a_cache_that_is_not_empty_is_refused(factory: str) -> None:
    strategy = cached(factory)
    strategy.prepare(1, 20)
    strategy.prefill(token_ids(1, 1, 8))
    with pytest.raises(UnfitCache, match="returned a cache that holds 8 tokens; valid: an empty one each time"):
        strategy.prepare(1, 20)


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("InModel", r"keeps \d+ bytes in the model"),
        ("sets_threads_later", "changed torch's threads"),
        ("in_thread", "holds its tokens in no tensor, array or bytes that can be reached from its cache"),
    ],
)
def test_what_it_does_while_it_runs_is_found_out(factory: str, reason: str) -> None:
    strategy = cached(factory)
    strategy.prepare(1, 20)
    strategy.prefill(token_ids(1, 1, 8))
    with pytest.raises(UnfitCache, match=reason):
        strategy.check_length(8)


@pytest.mark.parametrize(
    "factory",
    [
        *("growing", "by_name", "Promising", "keywords_only", "positional_only", "unlayered", "counting"),
        *("in_numpy", "in_map", "in_closure", "in_slots", "in_globals", "in_pool"),
    ],
)
def test_an_odd_one_that_is_right_is_measured(factory: str) -> None:
    strategy, context, prompt = cached(factory), token_ids(1, 2, 6), token_ids(2, 2, 5)
    expected = reference(strategy.model, prompt, 6, context)
    strategy.prepare(2, 16, context, prompt_length=11)
    for _ in range(2):
        strategy.reset()
        found = agreement(strategy, prompt, expected)
        assert found.tokens_match == "true"
        after_prefill = (
            16 if factory in {"keywords_only", "positional_only", "in_map"} else 11
        )  # these are allocated at once
        last = (5, 1) if factory == "in_pool" else (0, 0)  # what it holds beside the pool
        expected_rows = after_prefill + last[0], 16 + last[1]
        assert found.kv_bytes_allocated_after_prefill == pytest.approx(2 * expected_rows[0] * PER_TOKEN, rel=0.01)
        assert found.kv_bytes_allocated_after_decode == pytest.approx(2 * expected_rows[1] * PER_TOKEN, rel=0.01)
        strategy.check_length(16)


def test_what_a_class_made_by_the_factory_keeps_counts() -> None:
    strategy = cached("of_a_local_class")
    strategy.prepare(1, 12, prompt_length=8)
    strategy.generate(token_ids(1, 1, 8), 3)
    assert strategy.kv_bytes_allocated == 2 * 10 * PER_TOKEN


def test_a_class_that_fails_at_a_line_of_its_own_names_it() -> None:
    with pytest.raises(ModelError, match=r"raised AttributeError: .*no_such_part.*unfit_caches.py, line \d+"):
        cached("Mistaken").prepare(1, 20)


def test_layers_that_store_nothing_are_no_others() -> None:
    model, prompt = family("gemma4_text"), token_ids(2, 2, 5)
    strategy = build("cache:tests.unfit_caches:growing", model)
    strategy.prepare(2, 11, prompt_length=5)
    assert agreement(strategy, prompt, reference(model, prompt, 6)).tokens_match == "true"


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("evicting", r"evicting: update\(\) returned keys of 4 tokens when 8 were fed, and .* had said 8: attention"),
        ("narrow", r"narrow: update\(\) returned torch.float16 for torch.float32; valid: the dtype"),
        (
            "first_sequence",
            r"update\(\) returned shape \[1, 2, 8, 8\] for \[2, 2, 8, 8\], and 8 keys; valid: the shape",
        ),
        ("one_layer", "one_layer has 1 layers, fewer than the model"),
        ("silent", r"silent: update\(\) returned NoneType; valid: two tensors"),
    ],
)
def test_what_update_returns_is_checked_while_it_runs(factory: str, reason: str) -> None:
    strategy = cached(factory)
    strategy.prepare(2, 20)
    with pytest.raises(UnfitCache, match=reason):
        strategy.prefill(token_ids(1, 2, 8))


def test_a_mask_that_forgets_the_context_is_refused_where_a_prompt_follows_one() -> None:
    """Without a context the same cache is right: a prompt sees itself, and a step needs no mask."""
    strategy, context, prompt = cached("with_lists"), token_ids(1, 2, 6), token_ids(2, 2, 5)
    strategy.prepare(2, 10, prompt_length=5)
    assert agreement(strategy, prompt, reference(strategy.model, prompt, 6)).tokens_match == "true"
    strategy.prepare(2, 16, context, prompt_length=11)
    with pytest.raises(UnfitCache, match=r"keys of 11 tokens when 5 were fed, and get_mask_sizes\(\) had said 5"):
        strategy.prefill(prompt)


def test_an_offset_that_lets_a_token_see_later_ones_is_refused_where_a_prompt_follows_evicted_tokens() -> None:
    context, prompt = token_ids(1, 2, 6), token_ids(2, 2, 5)
    for factory in ("windowed", "without_offset"):
        strategy = cached(factory)
        strategy.prepare(2, 10, prompt_length=5)
        strategy.prefill(prompt)  # no mask is needed
        strategy.prepare(2, 16, context, prompt_length=11)
        if factory == "windowed":
            strategy.generate(prompt, 6)
            strategy.check_length(16)
            continue
        with pytest.raises(UnfitCache, match=r"keys of 9 tokens when 5 .* begin at position 0: 11 tokens were fed"):
            strategy.prefill(prompt)


@pytest.mark.parametrize("factory", ["promised", "promised_partial", "promised_method", "promised_bound"])
def test_a_partial_keeps_the_promise_of_its_function_and_a_method_that_of_its_class(factory: str) -> None:
    assert cached(factory).promise == "exact"
    assert cached("by_name").promise == "lossy"


def test_update_is_left_alone_once_a_run_was_checked() -> None:
    strategy = cached("growing")
    strategy.prepare(1, 20, prompt_length=8)
    assert "update" in vars(strategy.kv.cache)
    strategy.generate(token_ids(1, 1, 8), 3)
    strategy.check_length(10)
    strategy.reset()
    assert "update" not in vars(strategy.kv.cache)  # rounds are timed
    strategy.prepare(1, 30, prompt_length=8)
    assert "update" in vars(strategy.kv.cache)


def test_layers_may_have_names() -> None:
    layers = growing(ARCHITECTURES["llama"]()).layers
    assert layers_of(SimpleNamespace(layers=dict(enumerate(layers)))) == layers  # type: ignore[arg-type]


def test_recurrent_states_alone_are_measured() -> None:
    model, prompt = family("mamba"), token_ids(2, 2, 5)
    strategy = build("cache:tests.unfit_caches:growing", model)
    strategy.prepare(2, 11, prompt_length=5)
    assert agreement(strategy, prompt, reference(model, prompt, 6)).tokens_match == "true"
    strategy.check_length(10)


@pytest.mark.parametrize("size", [9, 4 * COLUMNS + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_elements_that_change_places_are_found(dtype: torch.dtype, size: int) -> None:
    model = ARCHITECTURES["llama"]()
    weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]).repeat(size)[1 : size + 1].to(dtype))
    model.register_parameter("swapped", weight)
    before = Surroundings.of(model)
    for far in (1, size - 1 - size % 2):
        weight.data[[0, far]] = weight.data[[far, 0]]
        assert before.changed(Surroundings.of(model)) == "the model's weights"
        weight.data[[0, far]] = weight.data[[far, 0]]
        assert before.changed(Surroundings.of(model)) is None


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bfloat16])
def test_a_changed_weight_is_found_in_any_dtype(dtype: torch.dtype) -> None:
    model = ARCHITECTURES["llama"]()
    weight = torch.nn.Parameter(torch.ones(4).to(dtype), requires_grad=dtype.is_floating_point)
    model.register_parameter("narrow", weight)
    before = Surroundings.of(model)
    assert before.changed(Surroundings.of(model)) is None
    weight.data[1:] = torch.zeros(3).to(dtype)
    assert before.changed(Surroundings.of(model)) == "the model's weights"


def test_a_cache_in_a_cycle_is_freed_at_the_next_reset() -> None:
    strategy = cached("CyclicCache")
    gc.disable()  # as a worker does
    try:
        strategy.prepare(1, 20)
        before = weakref.ref(strategy.kv.cache)
        strategy.reset()
        assert before() is None
    finally:
        gc.enable()


def test_one_whose_attention_sees_the_new_rows_alone_gives_other_tokens() -> None:
    """With the promise "exact" a worker fails it for that (tests/measure/test_worker.py)."""
    strategy, prompt = cached("forgetful"), token_ids(2, 2, 5)
    strategy.prepare(2, 16, prompt_length=5)
    found = agreement(strategy, prompt, reference(strategy.model, prompt, 12))
    assert found.tokens_match == "false"
    assert found.logits_error > 0.05
    strategy.check_length(16)  # it counts right


@pytest.mark.parametrize("make", [functools.partial(family, "phi3"), dynamic_ntk])
def test_a_rotary_table_that_a_forward_changes_is_no_change(make: Callable[[], PreTrainedModel]) -> None:
    strategy = build("cache:tests.unfit_caches:growing", make())
    strategy.prepare(1, 30, prompt_length=20)
    strategy.generate(token_ids(1, 1, 20), 3)
    strategy.check_length(22)
