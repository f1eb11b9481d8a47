"""Costs and bytes of a case whose architecture no formula describes."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bench.case import Case
from bench.measure.case_costs import with_costs
from bench.measure.plan import describe
from kvcache.arithmetic.architectures import UnknownGeometry, geometry
from kvcache.caches.contract import Unsupported
from kvcache.compiled.architectures.catalogue import describe as describe_compiled
from kvcache.strategies.strategy import Strategy
from tests.compiled.families import FAMILIES, family
from tests.families import family as family_of
from tests.families import hybrid
from tests.handmade import make_case
from tests.studies.architecture_configs import shrunken
from tests.tiny import ARCHITECTURES, build_eagerly, llama_like, tiny

SPEC = "py:tests.families:hybrid"


def after(case: Case, model: PreTrainedModel) -> Strategy:
    """Generate a case's tokens; return the strategy with what it then holds."""
    strategy = build_eagerly(case.strategy, model)
    context = torch.ones((case.batch_size, case.n_depth), dtype=torch.long) if case.n_depth else None
    strategy.prepare(case.batch_size, case.capacity, context, prompt_length=case.n_depth + case.n_prompt)
    strategy.generate(torch.ones((case.batch_size, case.n_prompt), dtype=torch.long), case.n_gen)
    return strategy


@pytest.mark.parametrize("strategy", ["dynamic", "static"])
def test_states_are_predicted_as_they_are_measured(strategy: str) -> None:
    case = make_case(strategy, 12, model=SPEC, batch_size=2, n_gen=4)
    planned = with_costs(case, describe(SPEC, ""))
    measured = after(case, hybrid())
    assert planned.decode is not None
    assert planned.kv_bytes_allocated is not None
    assert planned.decode.kv_bytes == measured.kv_bytes
    assert planned.kv_bytes_allocated["decode"] == measured.kv_bytes_allocated
    assert (planned.decode.forward_calls, planned.decode.tokens_processed) == (3, 6)


def test_naive_multiplies_the_whole_sequence_again() -> None:
    plans = [with_costs(make_case(name, 12, model=SPEC, n_gen=4), describe(SPEC, "")) for name in ("naive", "dynamic")]
    naive, cached = (plan.decode for plan in plans)
    assert naive is not None
    assert cached is not None
    assert naive.kv_bytes == 0
    assert naive.tokens_processed == 13 + 14 + 15
    assert naive.flops > 2 * cached.flops


def test_a_kind_that_nothing_is_known_of_says_so() -> None:
    planned = with_costs(make_case("fp8", 12, model=SPEC, n_gen=4), describe(SPEC, ""))
    assert (planned.prefill, planned.decode, planned.kv_bytes_allocated) == (None, None, None)
    assert planned.unpredicted == "nothing is known of the bytes of fp8 on this model"


def config_of(model_type: str, overrides: dict[str, Any]) -> Any:
    """A config of which layer 1 differs, by transformers' own means."""
    small = llama_like(num_hidden_layers=4, head_dim=16, vocab_size=97, pad_token_id=None)
    return AutoConfig.for_model(model_type, **small, per_layer_config={1: overrides})


def layer_without_effect() -> PreTrainedModel:
    """The model of a `py:` spec: a Qwen3 of which a layer with full attention has a window in the config, unused."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of("qwen3", {"sliding_window": 8}))
    return model


def failing_forward() -> PreTrainedModel:
    """The model of a `py:` spec: a Mistral whose window differs by layer, which its forward asks for as one number."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of("mistral", {"sliding_window": None}))
    return model


@pytest.mark.parametrize("overrides", [{"sliding_window": 6}, {"num_key_value_heads": 4}, {"head_dim": 8}])
@pytest.mark.parametrize("model_type", ["mistral", "phi3", "mixtral", "qwen3", "gemma2", "gemma3_text", "qwen3_moe"])
def test_no_formula_takes_layers_that_differ(model_type: str, overrides: dict[str, Any]) -> None:
    with pytest.raises(UnknownGeometry, match=rf"{model_type}: its layers differ \(per_layer_config\)"):
        geometry(config_of(model_type, overrides))


def test_the_bytes_of_layers_that_differ_are_rehearsed() -> None:
    spec = f"py:{__name__}:layer_without_effect"
    planned = with_costs(make_case("dynamic", 12, model=spec, n_gen=4), describe(spec, ""))
    assert planned.kv_bytes_allocated == {"prefill": 12 * 4 * 2 * 2 * 16 * 4, "decode": 15 * 4 * 2 * 2 * 16 * 4}
    with pytest.raises(Unsupported, match=r"this model's layers differ in sliding_window \(per_layer_config\)"):
        describe_compiled(layer_without_effect())


def test_a_forward_that_takes_no_differing_layers_is_named() -> None:
    spec = f"py:{__name__}:failing_forward"
    planned = with_costs(make_case("dynamic", 12, model=spec, n_gen=4), describe(spec, ""))
    assert planned.unpredicted is not None
    assert "'sliding_window' is a per-layer attribute" in planned.unpredicted


def latents() -> PreTrainedModel:
    """The model of `py:tests.measure.test_case_costs:latents`: 16 numbers of a latent beside 8 of a rotary key."""
    return shrunken("deepseek_v3")


def asking() -> PreTrainedModel:
    """The model of `py:tests.measure.test_case_costs:asking`, whose experts ask which of them are chosen."""
    return shrunken("longcat_flash", zero_expert_num=4)


@pytest.mark.parametrize("strategy", ["fp8", "sink-window"])
def test_lossy_kinds_of_latents_are_predicted_as_they_are_measured(strategy: str) -> None:
    spec = "py:tests.measure.test_case_costs:latents"
    case = make_case(strategy, 12, model=spec, batch_size=2, n_gen=4)
    planned = with_costs(case, describe(spec, ""))
    measured = after(case, latents())
    assert planned.kv_bytes is not None
    assert planned.kv_bytes["decode"] == measured.kv_bytes
    assert planned.kv_bytes_allocated is not None
    assert planned.kv_bytes_allocated["decode"] == measured.kv_bytes_allocated


def test_bytes_are_predicted_where_costs_are_not() -> None:
    spec = "py:tests.measure.test_case_costs:asking"
    case = make_case("dynamic", 12, model=spec, n_gen=4)
    planned = with_costs(case, describe(spec, ""))
    measured = after(case, asking())
    assert (planned.prefill, planned.decode) == (None, None)
    assert planned.unpredicted is not None
    assert planned.kv_bytes is not None
    assert planned.kv_bytes["decode"] == measured.kv_bytes


def stray_window() -> PreTrainedModel:
    """The model of a `py:` spec: a Llama with a window in its config, which caches follow and it does not."""
    return ARCHITECTURES["llama"](sliding_window=8)


def window_of_one() -> PreTrainedModel:
    """The model of a `py:` spec: a Mistral that attends to itself alone; its dynamic cache keeps all rows."""
    return ARCHITECTURES["mistral"](sliding_window=1)


def windows_without_a_formula() -> PreTrainedModel:
    """The model of a `py:` spec: a SmolLM3, of which half of the layers slide."""
    return family("smollm3")


def one_head() -> PreTrainedModel:
    """The model of a `py:` spec: a StableLM, whose five rows of 4-bit integers are no whole number of bytes."""
    model_type, config = FAMILIES["stablelm"]
    return tiny(model_type, {**config, "num_key_value_heads": 1})


@pytest.mark.parametrize("n_prompt", [5, 39])
@pytest.mark.parametrize(
    ("make", "strategies"),
    [
        (stray_window, ["compiled", "compiled-int8", "dynamic", "static"]),
        (window_of_one, ["compiled", "dynamic", "static"]),
        (windows_without_a_formula, ["compiled", "compiled-int4"]),
        (one_head, ["compiled-int4"]),
    ],
)
def test_each_kind_has_the_windows_that_it_is_measured_with(
    make: Callable[[], PreTrainedModel], strategies: list[str], n_prompt: int
) -> None:
    spec = f"py:{__name__}:{make.__name__}"
    described, model = describe(spec, ""), make()
    for name in strategies:
        case = make_case(name, n_prompt, model=spec, batch_size=1, n_gen=3)
        planned, measured = with_costs(case, described), after(case, model)
        assert planned.kv_bytes is not None
        assert planned.kv_bytes_allocated is not None
        sizes = planned.kv_bytes["decode"], planned.kv_bytes_allocated["decode"]
        assert (name, *sizes) == (name, measured.kv_bytes, measured.kv_bytes_allocated)


def states_of_its_own() -> PreTrainedModel:
    """The model of a `py:` spec: RWKV, whose states do not grow."""
    return family_of("rwkv")


def matrices_of_its_own() -> PreTrainedModel:
    """The model of a `py:` spec: xLSTM, whose states do not grow."""
    return family_of("xlstm")


def cache_of_its_own() -> PreTrainedModel:
    """The model of a `py:` spec: MiniMax, of which half of the layers grow."""
    return family_of("minimax")


@pytest.mark.parametrize("n_gen", [1, 4])
@pytest.mark.parametrize("make", [states_of_its_own, matrices_of_its_own, cache_of_its_own])
def test_a_cache_that_the_model_brings_is_predicted_for_generate(
    make: Callable[[], PreTrainedModel], n_gen: int
) -> None:
    spec = f"py:{__name__}:{make.__name__}"
    case = make_case("hf-generate", 12, model=spec, batch_size=2, n_gen=n_gen, attn_implementation="eager")
    planned, measured = with_costs(case, describe(spec, "eager")), after(case, make())
    assert planned.kv_bytes is not None
    assert planned.kv_bytes_allocated is not None
    sizes = [held["decode" if n_gen > 1 else "prefill"] for held in (planned.kv_bytes, planned.kv_bytes_allocated)]
    assert sizes == [measured.kv_bytes, measured.kv_bytes_allocated]


def dropping() -> PreTrainedModel:
    """The model of a `py:` spec: a Phi-4 multimodal with another rotary table beyond 14 tokens."""
    return shrunken("phi4_multimodal")


@pytest.mark.parametrize(("n_prompt", "is_kept"), [(10, True), (11, False), (14, False), (15, True)])
def test_a_cache_that_generate_drops_is_not_predicted(n_prompt: int, is_kept: bool) -> None:
    spec = f"py:{__name__}:dropping"
    case = make_case("hf-generate", n_prompt, model=spec, n_gen=5)
    planned = with_costs(case, describe(spec, ""))
    dynamic = with_costs(msgspec.structs.replace(case, strategy="dynamic"), describe(spec, "")).kv_bytes
    assert dynamic is not None
    assert (after(case, dropping()).kv_bytes == dynamic["decode"]) == is_kept
    if is_kept:
        assert planned.kv_bytes == dynamic
    else:
        assert planned.kv_bytes is None
        assert "begins another cache when a sequence grows past 14 tokens" in str(planned.unpredicted)


def test_the_length_of_a_window_is_a_tensor_too() -> None:
    spec = "py:tests.measure.test_case_costs:narrow"
    case = make_case("dynamic", 3, model=spec, n_gen=2)
    planned, measured = with_costs(case, describe(spec, "")), after(case, narrow())
    assert planned.kv_bytes_allocated is not None
    assert planned.kv_bytes_allocated["decode"] == measured.kv_bytes_allocated


def narrow() -> PreTrainedModel:
    """The model of `py:tests.measure.test_case_costs:narrow`."""
    return ARCHITECTURES["mistral"](sliding_window=4, num_key_value_heads=1)
