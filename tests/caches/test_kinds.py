"""Every kind of cache: it comes back to its mark, holds the bytes predicted, and loses what it must."""

import functools
import importlib.metadata
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcache.arithmetic.architectures import geometry
from kvcache.arithmetic.kv_bytes import Fed
from kvcache.caches.contract import Unsupported
from kvcache.caches.held_bytes import held_bytes
from kvcache.proof.tokens import agreement, reference
from kvcache.strategies.cached import Cached
from kvcache.strategies.catalogue import STRATEGIES, build
from tests.studies.architecture_configs import shrunken
from tests.tiny import ARCHITECTURES, tiny, token_ids

PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}


def installed(name: str) -> bool:
    package = PACKAGES.get(name.partition("-")[0])
    return package is None or any(importlib.metadata.distributions(name=package))


def kind(name: str) -> Any:
    """A kind as a parameter: skipped without its package; with the compiler's tests where it compiles at first use."""
    marks = [pytest.mark.skipif(not installed(name), reason=f"{name}: its package is not installed")]
    if name.startswith("quanto"):
        marks.append(pytest.mark.compiled)  # its extension takes a minute and a half of one core, once per installation
    return pytest.param(name, marks=marks)


LOSSY = [kind(name) for name, entry in STRATEGIES.items() if entry.lossy and entry.cache]
KINDS = [*LOSSY, "dynamic", "static"]


@functools.cache
def model_of(dtype: torch.dtype = torch.float32, **overrides: object) -> PreTrainedModel:
    """A Llama whose heads fill the groups of 64 of the quantised kinds; the same object for equal arguments."""
    return ARCHITECTURES["llama"](head_dim=64, max_position_embeddings=1024, **overrides).to(dtype)


def prepared(name: str, model: PreTrainedModel, capacity: int, context: Tensor | None = None, batch: int = 1) -> Cached:
    strategy = build(name, model)
    assert isinstance(strategy, Cached)
    strategy.prepare(batch, capacity, context)
    return strategy


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("n_depth", "n_prompt", "n_gen"), [(0, 9, 140), (5, 120, 20), (300, 120, 20)])
def test_second_round_equals_the_first(name: str, n_depth: int, n_prompt: int, n_gen: int) -> None:
    """Each generates past the 128 recent tokens that the quantised kinds keep exact."""
    model, prompt, forced = model_of(), token_ids(2, 2, n_prompt), token_ids(3, 2, n_gen)
    context = token_ids(1, 2, n_depth) if n_depth else None
    strategy = prepared(name, model, n_depth + n_prompt + n_gen, context, batch=2)
    rounds = []
    for _ in range(2):
        logits: list[Tensor] = []
        strategy.reset()
        strategy.generate(prompt, n_gen, lambda _, step, to=logits: to.append(step.clone()), forced=forced)
        rounds.append(torch.stack(logits))
    assert rounds[0].isfinite().all()
    assert torch.equal(*rounds)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("n_depth", "n_prompt", "n_steps", "dtype"),
    [
        (0, 300, 5, torch.float32),
        (70, 120, 20, torch.float32),
        (0, 9, 260, torch.float32),
        (200, 150, 0, torch.float32),
        (70, 120, 20, torch.bfloat16),
    ],
)
def test_allocated_bytes_are_those_predicted(
    name: str, n_depth: int, n_prompt: int, n_steps: int, dtype: torch.dtype
) -> None:
    model = model_of(dtype=dtype)
    capacity = n_depth + n_prompt + n_steps + 1
    strategy = prepared(name, model, capacity, token_ids(1, 2, n_depth) if n_depth else None, batch=2)
    strategy.generate(token_ids(2, 2, n_prompt), n_steps + 1, forced=token_ids(3, 2, n_steps + 1))
    fed = Fed(
        batch_size=2, n_depth=n_depth, n_prompt=n_prompt, n_steps=n_steps, capacity=capacity, dtype_bytes=dtype.itemsize
    )
    predicted = STRATEGIES[name].formula.held(geometry(model.config).layers, fed).allocated
    assert held_bytes(strategy.kv.layers) == pytest.approx(predicted, rel=0.01)
    assert strategy.kv.cache.get_seq_length() == n_depth + n_prompt + n_steps


@pytest.mark.parametrize("name", [name for name, entry in STRATEGIES.items() if entry.compiles])
@pytest.mark.parametrize("capacity", [20, 300, 1000])
@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_allocated_bytes_of_compiled_kinds_are_those_predicted(
    name: str, capacity: int, head_dim: int, dtype: torch.dtype
) -> None:
    model = ARCHITECTURES["llama"](head_dim=head_dim, max_position_embeddings=1024).to(dtype)
    strategy = STRATEGIES[name].load()(model, backend="eager")
    with torch.compiler.set_stance("force_eager"):
        strategy.prepare(2, capacity)
    fed = Fed(batch_size=2, n_depth=0, n_prompt=1, n_steps=0, capacity=capacity, dtype_bytes=dtype.itemsize)
    held = held_bytes([slot.rows for slot in strategy._slots])
    assert held == pytest.approx(STRATEGIES[name].formula.held(geometry(model.config).layers, fed).allocated, rel=0.01)


@pytest.mark.parametrize("name", ["fp8", "static", "compiled-int8"])
def test_released_it_holds_nothing(name: str) -> None:
    model = model_of()
    strategy = STRATEGIES[name].load()(model, backend="eager") if STRATEGIES[name].compiles else build(name, model)
    with torch.compiler.set_stance("force_eager"):
        strategy.prepare(1, 20)
        emitted = strategy.generate(token_ids(2, 1, 9), 5)
        cache, whole = strategy.kv_bytes_allocated, held_bytes(strategy, leaving_out=model)
        assert cache > 0
        strategy.release()
        assert held_bytes(strategy, leaving_out=model) <= whole - cache
        with pytest.raises(ValueError, match="call prepare"):
            strategy.generate(token_ids(2, 1, 9), 5)
        strategy.prepare(1, 20)
        assert torch.equal(strategy.generate(token_ids(2, 1, 9), 5), emitted)


@pytest.mark.parametrize("name", LOSSY)
def test_first_prompt_attends_to_its_exact_keys(name: str) -> None:
    model, prompt = model_of(), token_ids(2, 1, 40)
    expected = reference(model, prompt, 1)
    strategy = prepared(name, model, 60)
    torch.testing.assert_close(strategy.prefill(prompt), expected.logits[:, 0])


def test_fp8_is_near_and_its_error_is_seen() -> None:
    model, prompt = model_of(), token_ids(2, 1, 40)
    found = agreement(prepared("fp8", model, 60), prompt, reference(model, prompt, 20))
    assert 1e-4 < found.logits_error < 0.2


def test_fp8_keeps_numbers_far_beyond_those_of_the_prompt() -> None:
    from kvcache.caches.fp8 import Fp8Layer

    layer = Fp8Layer()
    layer.update(torch.full((1, 1, 3, 4), 1e-3), torch.full((1, 1, 3, 4), 1e-3))
    layer.update(torch.full((1, 1, 1, 4), 1e4), torch.zeros(1, 1, 1, 4))
    keys, values = layer.update(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))
    torch.testing.assert_close(keys[0, 0, :, 0], torch.tensor([1e-3, 1e-3, 1e-3, 1e4, 1.0]), rtol=0.07, atol=0)
    assert (values[0, 0, 3] == 0).all()


def test_sink_window_is_exact_until_it_evicts_and_then_forgets() -> None:
    model = model_of()
    short, long = token_ids(2, 1, 40), token_ids(2, 1, 280)
    found = agreement(prepared("sink-window", model, 60), short, reference(model, short, 20))
    assert found.tokens_match == "true"
    strategy = prepared("sink-window", model, 300)
    found = agreement(strategy, long, reference(model, long, 20))
    assert found.tokens_match == "false"
    assert strategy.kv.layers[0].keys.shape[2] == 256


@pytest.mark.parametrize("name", ["fp8", "sink-window"])
def test_layers_that_slide_are_refused(name: str) -> None:
    with pytest.raises(Unsupported, match=r"full attention only.*DynamicSlidingWindowLayer"):
        prepared(name, ARCHITECTURES["mistral"](), 20)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name.partition("-")[0] in PACKAGES])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("not here")

    monkeypatch.setattr("kvcache.caches.quantized.QuantizedCache", missing)
    with pytest.raises(Unsupported, match=rf"{name} needs .*pip install 'kvbench\[quantized\]'"):
        prepared(name, model_of(), 20)


@pytest.mark.parametrize("name", ["quanto-int4", "hqq-int8"])
def test_heads_that_fill_no_group_are_refused(name: str) -> None:
    with pytest.raises(Unsupported, match=r"groups of 64 numbers.*2 heads of 8"):
        prepared(name, ARCHITECTURES["llama"](), 20)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_offloading_without_a_gpu_is_refused() -> None:
    with pytest.raises(Unsupported, match="not on a GPU"):
        prepared("offloaded", model_of(), 20)


def test_a_static_cache_comes_back_to_a_mark_with_an_expanded_view() -> None:
    """The positions that Qwen4's indexer keeps are one row, seen once for each sequence."""
    model, context, prompt = shrunken("qwen4_exp_text"), token_ids(1, 1, 8), token_ids(2, 1, 4)
    strategy = prepared("static", model, 20, context)
    first = strategy.generate(prompt, 3)
    assert torch.equal(strategy.generate(prompt, 3), first)


ONE_HEAD = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True}
LATENT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    **dict.fromkeys(["num_attention_heads", "num_key_value_heads", "head_dim"], 8),
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"], 8),
    "first_k_dense_replace": 2,
}


@pytest.mark.parametrize("name", [kind("hqq-int8"), kind("quanto-int4")])
@pytest.mark.parametrize(
    ("model_type", "geometry", "reason"),
    [("falcon", ONE_HEAD, "1 head of 16 do not fill"), ("deepseek_v3", LATENT, "1 head of (8|16) do not fill")],
)
def test_groups_are_counted_in_what_is_stored(
    name: str, model_type: str, geometry: dict[str, Any], reason: str
) -> None:
    """By their configs each token has 64 numbers."""
    with pytest.raises(Unsupported, match=reason):
        prepared(name, tiny(model_type, geometry), 20)


@pytest.mark.parametrize("name", ["static", "sink-window"])
def test_a_bias_as_long_as_the_tokens_fed_is_refused(name: str) -> None:
    model = ARCHITECTURES["falcon"](alibi=True)
    with pytest.raises(Unsupported, match="falcon makes its ALiBi bias as long as the tokens so far"):
        prepared(name, model, 20)
    prompt = token_ids(2, 1, 9)
    assert agreement(prepared("dynamic", model, 20), prompt, reference(model, prompt, 9)).tokens_match == "true"
