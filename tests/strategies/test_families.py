"""Architectures beyond keys and values: measured right, or refused with the true reason, one strategy at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer
from transformers.models.llama import modeling_llama

from kvcache.caches.contract import CacheNotRead, Unsupported
from kvcache.caches.sink_window import SinkWindowLayer
from kvcache.proof.judging import predict
from kvcache.proof.tokens import NotRepeatable, Reference, agreement, reference
from kvcache.strategies.cached import Dynamic, Static
from kvcache.strategies.catalogue import build
from kvcache.strategies.failing_forward import ForwardFails, naming_transformers
from kvcache.strategies.hf_generate import HfGenerate
from kvcache.strategies.naive import Naive
from kvcache.strategies.strategy import Strategy
from kvcache.strategies.tolerance import tolerance
from tests.families import (
    CONFIGS,
    WHOLE,
    dynamic_ntk,
    family,
    rounding_by_length,
    seeing_the_future,
    unrepeatable,
)
from tests.studies.architecture_configs import shrunken
from tests.tiny import ARCHITECTURES, tiny, token_ids

STRATEGIES = ["naive", "dynamic", "static", "hf-generate"]


def context_of(n_depth: int, batch_size: int = 2) -> Tensor | None:
    return token_ids(1, batch_size, n_depth) if n_depth else None


@pytest.mark.parametrize("n_depth", [0, 8])
def test_states_in_modules_end_with_a_sequence_and_are_counted(n_depth: int) -> None:
    """A single token is added to the state that lies in RecurrentGemma's modules, whoever's it is."""
    model, context, prompt = shrunken("recurrent_gemma"), context_of(n_depth), token_ids(2, 2, 1)
    expected = reference(model, prompt, 4, context)
    for strategy in [build(each, model) for each in STRATEGIES]:
        strategy.prepare(2, n_depth + 5, context, prompt_length=n_depth + 1)
        build("dynamic", model).prepare(2, 13, token_ids(3, 2, 8))  # another's sequence
        for _ in range(2):
            strategy.reset()
            assert agreement(strategy, prompt, expected).tokens_match == "true", strategy.name
        if isinstance(strategy, Dynamic | Static):
            states = 2 * 3 * (32 * 3 + 32) * 4  # convolution and recurrent state of three layers
            assert strategy.kv_bytes == strategy.kv.used_bytes + states
            assert strategy.kv_bytes_allocated >= strategy.kv_bytes


FORGETFUL = ["jamba", "mamba"]
"""Families that transformers itself computes wrongly where several tokens follow those in a cache."""

ROUNDS = [(name, n_depth, 5) for name in WHOLE for n_depth in (0, 8) if not (n_depth and name in FORGETFUL)]
ROUNDS.append(("gemma4_text", 0, 12))  # its windows and the shared layers pass through a whole window of new tokens


@pytest.mark.parametrize(("name", "n_depth", "n_gen"), ROUNDS)
def test_every_round_gives_naives_tokens(name: str, n_depth: int, n_gen: int) -> None:
    model, context, prompt = family(name), context_of(n_depth), token_ids(2, 2, 12)
    expected = reference(model, prompt, n_gen, context)
    assert expected.prefix_stable
    for strategy in [build(each, model) for each in STRATEGIES]:
        strategy.prepare(2, n_depth + 12 + n_gen, context, prompt_length=n_depth + 12)
        assert agreement(strategy, prompt, expected).tokens_match == "true", strategy.name
        strategy.check_length(n_depth + 11 + n_gen)
        for _ in range(2):
            strategy.reset()
            assert torch.equal(strategy.generate(prompt, n_gen), expected.tokens), strategy.name
        assert (strategy.kv_bytes > 0) == (strategy.name != "naive")


@pytest.mark.parametrize("n_depth", [0, 8])
def test_positions_that_begin_after_the_paddings(n_depth: int) -> None:
    model, context, prompt = family("roberta"), context_of(n_depth), token_ids(2, 2, 12)
    prompt[0, 3] = 1  # the padding's id is a token like others here
    expected = reference(model, prompt, 5, context)
    assert expected.prefix_stable
    for strategy in (Naive(model), Dynamic(model), Static(model)):
        assert compared(strategy, prompt, expected, context) == "true", strategy.name
        strategy.check_length(n_depth + 16)
    if context is None:
        whole = torch.cat([prompt[1:], expected.tokens[1:]], dim=1)
        assert not (whole == 1).any()
        assert torch.equal(model(whole).logits.argmax(dim=-1)[0, 11:-1], expected.tokens[1])


@pytest.mark.parametrize("name", FORGETFUL)
def test_a_forgetful_model_is_false_after_a_context_in_every_round(name: str) -> None:
    model, context, prompt = family(name), context_of(8), token_ids(2, 2, 12)
    expected = reference(model, prompt, 5, context)
    assert compared(Naive(model), prompt, expected, context) == "true"
    for strategy in (Dynamic(model), Static(model), HfGenerate(model)):
        assert compared(strategy, prompt, expected, context) == "false"
        first = strategy.generate(prompt, 5)
        assert torch.equal(strategy.generate(prompt, 5), first)


def compared(strategy: Strategy, prompt: Tensor, expected: Reference, context: Tensor | None = None) -> str:
    """Prepare `strategy` and say how its tokens compare."""
    n_depth = 0 if context is None else context.shape[1]
    n_prompt, n_gen = prompt.shape[1], expected.tokens.shape[1]
    strategy.prepare(prompt.shape[0], n_depth + n_prompt + n_gen, context, prompt_length=n_depth + n_prompt)
    return agreement(strategy, prompt, expected).tokens_match


@pytest.mark.parametrize("n_depth", [0, 8])
def test_compressed_entries_come_back_to_the_mark(n_depth: int) -> None:
    model, context, prompt = family("deepseek_v4"), context_of(n_depth), token_ids(2, 2, 12)
    expected = reference(model, prompt, 5, context)
    for strategy in (Naive(model), Dynamic(model), HfGenerate(model)):
        assert compared(strategy, prompt, expected, context) == "true"
        for _ in range(2):
            assert torch.equal(strategy.generate(prompt, 5), expected.tokens)


def test_keys_of_an_indexer_come_back_to_the_mark() -> None:
    """Past its top-k transformers' forward selects anew for the whole sequence, so the reference is naive itself."""
    model, context, prompt = family("deepseek_v32"), context_of(8), token_ids(2, 2, 12)
    expected = reference(model, prompt, 5, context)
    assert not expected.prefix_stable
    assert compared(Naive(model), prompt, expected, context) == "true"
    for strategy in (Dynamic(model), Static(model), HfGenerate(model)):
        strategy.prepare(2, 25, context)
        first = strategy.generate(prompt, 5)
        assert torch.equal(strategy.generate(prompt, 5), first)


def test_states_are_counted_beside_keys_and_values() -> None:
    strategy = Dynamic(family("falcon_h1"))
    strategy.prepare(2, 24)
    sizes = []
    for length in (12, 20):
        strategy.reset()
        strategy.prefill(token_ids(2, 2, length))
        sizes.append(strategy.kv_bytes)
    layers, heads, head_dim, batch, float32 = 4, 2, 8, 2, 4
    per_token = 2 * layers * heads * head_dim * batch * float32
    recurrent, convolution = layers * batch * 4 * 16 * 8 * float32, layers * batch * (64 + 2 * 8) * 4 * float32
    assert sizes == [12 * per_token + recurrent + convolution, 20 * per_token + recurrent + convolution]
    assert strategy.kv_bytes_allocated >= strategy.kv_bytes


@pytest.mark.parametrize("n_depth", [0, 8])
@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        (Static, "deepseek_v4", "no layer for compressed_sparse_attention, heavily_compressed_attention"),
        (Static, "gpt_neo", "cuts the window of its local layers by the number of keys"),
        (Dynamic, "minimax", "keeps its states in a form of its own"),
        (Static, "xlstm", "keeps its states in a form of its own"),
        (Static, "rwkv", "takes no past_key_values"),
        (Dynamic, "openai-gpt", "takes no past_key_values"),
    ],
)
def test_one_strategy_is_refused_and_naive_is_measured(
    kind: Callable[[PreTrainedModel], Strategy], name: str, reason: str, n_depth: int
) -> None:
    model, context, prompt = family(name), context_of(n_depth), token_ids(2, 2, 12)
    with pytest.raises(Unsupported, match=reason):
        kind(model).prepare(2, n_depth + 17, context)
    expected = reference(model, prompt, 5, context)
    assert expected.prefix_stable
    assert compared(Naive(model), prompt, expected, context) == "true"


@pytest.mark.parametrize("n_depth", [0, 8])
@pytest.mark.parametrize("name", ["openai-gpt", "gpt_neo", "xlstm"])
def test_generate_is_measured_where_a_cache_is_not(name: str, n_depth: int) -> None:
    model, context, prompt = family(name), context_of(n_depth), token_ids(2, 2, 12)
    expected = reference(model, prompt, 5, context)
    assert compared(HfGenerate(model), prompt, expected, context) == "true"


def test_the_bytes_of_a_cache_that_the_model_brings_are_its_own() -> None:
    """xLSTM keeps a matrix, a vector and a number for each head, whatever the length, and a count of tokens."""
    strategy, sizes = HfGenerate(family("xlstm")), []
    strategy.prepare(2, 24)
    for length in (12, 20):
        strategy.generate(token_ids(2, 2, length), 2)
        sizes.append((strategy.kv_bytes, strategy.kv_bytes_allocated))
    layers, batch, heads, key, value, float32, count = 2, 2, 4, 16, 32, 4, 8
    assert sizes == [(layers * batch * heads * (key * value + key + 1) * float32 + count,) * 2] * 2


@pytest.mark.parametrize(
    ("kind", "name", "dtype", "n_depth", "reason"),
    [
        (Dynamic, "cpmant", torch.float32, 0, "a forward with a cache of cpmant fails in transformers"),
        (Static, "cpmant", torch.float32, 0, "a forward with a cache of cpmant fails in transformers"),
        (Static, "prophetnet", torch.float32, 0, "a forward with a cache of prophetnet fails in transformers"),
        (Dynamic, "prophetnet", torch.float32, 8, r"of prophetnet fails in transformers .*AssertionError"),
        (HfGenerate, "blt", torch.float32, 0, r"generate\(\) of blt fails in transformers .*num_hidden_layers"),
        (HfGenerate, "xlnet", torch.bfloat16, 0, "its weights are bfloat16 and float32: take float32"),
    ],
)
def test_what_fails_in_transformers_is_refused_with_its_reason(
    kind: Callable[[PreTrainedModel], Strategy], name: str, dtype: torch.dtype, n_depth: int, reason: str
) -> None:
    model, prompt = shrunken(name, dtype), token_ids(2, 2, 12)
    with pytest.raises(Unsupported, match=reason):
        run(kind(model), prompt, context_of(n_depth))


def run(strategy: Strategy, prompt: Tensor, context: Tensor | None) -> None:
    strategy.prepare(2, 25, context)
    strategy.generate(prompt, 5)


def test_a_model_whose_forward_fails_is_refused_as_such() -> None:
    model = tiny("xlstm", CONFIGS["xlstm"], dtype=torch.bfloat16)
    with pytest.raises(ForwardFails, match=r"^a forward of xlstm fails in transformers .*bfloat16: take float32$"):
        reference(model, token_ids(2, 2, 12), 5)


def test_an_error_of_others_code_is_not_transformers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ARCHITECTURES["llama"]()
    strategy = Dynamic(model)
    strategy.prepare(2, 17)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("mine")

    monkeypatch.setattr(model.model.layers[1], "forward", fail)
    with pytest.raises(RuntimeError, match=r"^mine$"):
        strategy.generate(token_ids(2, 2, 12), 5)


@pytest.mark.parametrize("n_depth", [0, 8])
def test_a_cache_of_ours_that_returns_a_wrong_shape_is_no_fault_of_transformers(
    n_depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = SinkWindowLayer.update

    def one_head(self: SinkWindowLayer, *rows: Any, **named: Any) -> tuple[Tensor, Tensor]:
        keys, values = whole(self, *rows, **named)
        return keys[:, :1], values[..., :3]

    monkeypatch.setattr(SinkWindowLayer, "update", one_head)
    with pytest.raises(RuntimeError, match="size"):
        run(build("sink-window", ARCHITECTURES["llama"]()), token_ids(2, 2, 12), context_of(n_depth))


def test_with_a_mask_the_fault_may_be_the_masks() -> None:
    """One that has lost a sequence fails within transformers."""
    model, prompt = ARCHITECTURES["llama"](), token_ids(2, 2, 12)
    strategy, mask = Dynamic(model), torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    strategy.prepare(2, 17)
    strategy.prefill(prompt, mask)
    strategy.attention_mask = mask[:1]
    with pytest.raises((RuntimeError, IndexError)):
        strategy._forward(prompt[:, :1])


class FloatIds(LlamaForCausalLM):
    """A user's model, which hands on what transformers does not take."""

    def forward(self, input_ids: Tensor, **named: Any) -> Any:
        return super().forward(input_ids=input_ids.float(), **named)


class NarrowMLP(nn.Module):
    """A user's module within a model of transformers, which returns a wrong shape."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[..., :3]


@pytest.mark.parametrize("place", ["model", "module", "forward"])
@pytest.mark.parametrize("kind", [Naive, Dynamic, HfGenerate])
def test_a_users_own_model_code_is_no_fault_of_transformers(
    kind: Callable[[PreTrainedModel], Strategy], place: str
) -> None:
    model = users_model(place)
    with pytest.raises(RuntimeError, match=r"must match|shapes cannot|Expected tensor"):
        run(kind(model), token_ids(2, 2, 12), None)
    with pytest.raises(RuntimeError, match=r"must match|shapes cannot|Expected tensor"):
        reference(model, token_ids(2, 2, 12), 5)


def users_model(place: str) -> PreTrainedModel:
    """A Llama with an error of the user's, which shows within transformers."""
    model = ARCHITECTURES["llama"]()
    if place == "model":
        return FloatIds(model.config).eval()
    if place == "module":
        model.model.layers[1].mlp = NarrowMLP()
    else:
        model.model.layers[1].mlp.forward = NarrowMLP().forward
    return model


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
        "could not create a primitive",
    ],
)
def test_what_a_device_fails_at_is_no_fault_of_transformers(message: str) -> None:
    model = ARCHITECTURES["llama"]()
    with pytest.raises(RuntimeError, match=r"CUDA|CUDNN|primitive"), naming_transformers(model):
        raise_in_transformers(message)
    with pytest.raises(ForwardFails, match="shapes do not fit"), naming_transformers(model):
        raise_in_transformers("shapes do not fit")


def raise_in_transformers(message: str) -> None:
    """Raise a RuntimeError from what traces back to a file of transformers."""
    exec(compile(f"raise RuntimeError({message!r})", str(modeling_llama.__file__), "exec"))  # noqa: S102  # what we wrote


def test_a_cache_that_is_swallowed_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ARCHITECTURES["llama"]()
    inner = type(model.model).forward

    def deaf(self: nn.Module, *arguments: object, past_key_values: object = None, **named: object) -> object:
        return inner(self, *arguments, **named)

    monkeypatch.setattr(type(model.model), "forward", deaf)
    strategy = Dynamic(model)
    strategy.prepare(2, 17)
    with pytest.raises(CacheNotRead, match="llama leaves the cache empty that it is given"):
        strategy.generate(token_ids(2, 2, 12), 5)


def test_a_rope_that_switches_is_measured_by_naive_and_generate() -> None:
    model, prompt = family("phi3"), token_ids(2, 1, 14)  # it switches at 16
    expected = reference(model, prompt, 4)
    assert not expected.prefix_stable
    assert [compared(strategy, prompt, expected) for strategy in (Naive(model), HfGenerate(model), Dynamic(model))] == [
        "true",
        "true",
        "false",
    ]


def test_bytes_are_those_of_the_cache_that_generate_began() -> None:
    model, prompt = family("phi3"), token_ids(2, 1, 17)
    strategy = HfGenerate(model)
    strategy.prepare(1, 21)
    found = agreement(strategy, prompt, reference(model, prompt, 4))
    assert found.tokens_match == "true"
    assert (found.kv_bytes_after_prefill, found.kv_bytes_after_decode) == (8704, 10240)


@pytest.mark.parametrize("model", seeing_the_future(), ids=["llama", "gemma3"])
def test_where_positions_depend_on_later_ones_naive_is_its_own_reference(model: PreTrainedModel) -> None:
    prompt = token_ids(2, 2, 6)
    expected = reference(model, prompt, 8)
    assert not expected.prefix_stable
    naive = Naive(model)
    assert compared(naive, prompt, expected) == "true"
    assert torch.equal(naive.generate(prompt, 8), expected.tokens)
    assert compared(Dynamic(model), prompt, expected) == compared(Static(model), prompt, expected) == "false"


def test_rounding_is_not_taken_for_a_dependence_on_later_tokens() -> None:
    assert reference(shrunken("gemma4_text", torch.bfloat16), token_ids(2, 2, 12), 5).prefix_stable
    model, prompt = rounding_by_length(), token_ids(2, 2, 12)
    expected = reference(model, prompt, 5)
    assert (expected.prefix_stable, expected.by_naive) == (True, True)
    assert expected.rounding > tolerance(model)
    without_room = reference(model, prompt, 5, room_bytes=0)
    assert (without_room.prefix_stable, without_room.by_naive, without_room.rounding) == (False, True, 0)
    assert not reference(seeing_the_future()[0].bfloat16(), token_ids(2, 2, 6), 8).prefix_stable


@pytest.mark.parametrize("error", [RuntimeError("only half precision"), torch.OutOfMemoryError("no memory"), None])
def test_a_copy_that_cannot_be_run_leaves_the_reason_open(error: Exception | None) -> None:
    """It raises, or gives NaN (None)."""
    model = rounding_by_length(failing_with(error))
    expected = reference(model, token_ids(2, 2, 12), 5)
    assert (expected.prefix_stable, expected.by_naive) == (False, True)
    assert not predict(model, token_ids(2, 1, 20)).prefix_stable


def test_a_lost_device_is_no_open_reason() -> None:
    model = rounding_by_length(failing_with(torch.AcceleratorError("CUDA error: an illegal memory access")))
    with pytest.raises(torch.AcceleratorError):
        reference(model, token_ids(2, 2, 12), 5)
    with pytest.raises(torch.AcceleratorError):
        predict(model, token_ids(2, 1, 20))


def failing_with(error: Exception | None) -> Callable[[Tensor], object]:
    """Raise `error`, or where it is None make NaN of logits."""

    def fail(logits: Tensor) -> None:
        if error is not None:
            raise error
        logits.fill_(torch.nan)

    return fail


def test_xlnet_ends_and_is_its_own_reference() -> None:
    model, prompt = family("xlnet"), token_ids(2, 2, 6)
    expected = reference(model, prompt, 8)
    assert not expected.prefix_stable
    assert compared(Naive(model), prompt, expected) == "true"
    with pytest.raises(CacheNotRead, match="xlnet takes no past_key_values"):
        compared(Dynamic(model), prompt, expected)


def test_a_grown_rotary_table_is_put_back() -> None:
    model, long, short = dynamic_ntk(), token_ids(2, 2, 30), token_ids(3, 2, 18)
    first = reference(model, short, 4)
    assert not first.prefix_stable
    naive = Naive(model)
    for prompt in (long, short, long):
        naive.prepare(2, 40)
        naive.generate(prompt, 4)
    assert compared(naive, short, first) == "true"
    assert torch.equal(reference(model, short, 4).logits, first.logits)
    assert compared(Dynamic(model), short, first) == "false"  # its keys were turned by a smaller table
    dynamic = Dynamic(model)
    dynamic.prepare(2, 42, token_ids(4, 2, 20))
    tokens = dynamic.generate(short, 4)
    model(long)
    assert torch.equal(dynamic.generate(short, 4), tokens)


def test_a_model_that_does_not_repeat_itself_is_refused() -> None:
    model = unrepeatable()
    with pytest.raises(NotRepeatable, match="llama gives other logits when it is fed the same tokens again"):
        reference(model, token_ids(2, 2, 6), 4)


def test_logits_that_are_all_zero_agree() -> None:
    model, prompt = ARCHITECTURES["llama"](), token_ids(2, 2, 6)
    model.lm_head.weight.zero_()
    expected = reference(model, prompt, 4)
    found = agreement(prepared(Dynamic(model)), prompt, expected)
    assert (found.tokens_match, found.logits_error) == ("true", 0.0)
    model.lm_head.weight[5] = 1.0
    assert agreement(prepared(Dynamic(model)), prompt, expected).tokens_match == "false"


def prepared(strategy: Strategy) -> Strategy:
    strategy.prepare(2, 12)
    return strategy


def test_the_tolerance_is_that_of_the_coarsest_weights() -> None:
    model = ARCHITECTURES["llama"]()
    assert tolerance(model) == 1e-4
    model.model.bfloat16()
    model.lm_head.register_forward_pre_hook(lambda _head, inputs: (inputs[0].double(),))
    model.lm_head.double()
    assert tolerance(model) == 3e-2
    prompt = token_ids(2, 2, 6)
    expected = reference(model, prompt, 4)
    assert expected.logits.dtype == torch.float64
    assert agreement(prepared(Dynamic(model)), prompt, expected).tokens_match in {"true", "tie"}


class Buffered(DynamicLayer):
    """A layer of a user's own model, which writes its rows in place."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.rows = torch.zeros(2, *key_states.shape[:2], 64, key_states.shape[3])
            self.length = 0
        end = self.length + key_states.shape[2]
        self.rows[0, :, :, self.length : end], self.rows[1, :, :, self.length : end] = key_states, value_states
        self.length = end
        self.keys, self.values = self.rows[:, :, :, :end]
        return self.keys, self.values


def test_of_a_layer_that_cannot_be_copied_the_context_is_fed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DYNAMIC_LAYER_TYPE_MAPPING, "full_attention", Buffered)
    model, context, prompt = ARCHITECTURES["llama"](), context_of(8), token_ids(2, 2, 6)
    strategy = Dynamic(model)
    strategy.prepare(2, 20, context)
    assert not strategy.kv.restores
    expected = reference(model, prompt, 4, context)
    for _ in range(3):
        assert torch.equal(strategy.generate(prompt, 4), expected.tokens)


@pytest.mark.parametrize("kind", [Dynamic, Static, HfGenerate, Naive])
@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1", "lfm2", "gemma4_text"])
def test_left_padding_of_a_hybrid_changes_nothing(kind: Callable[[PreTrainedModel], Strategy], name: str) -> None:
    model, prompts = family(name), token_ids(2, 2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    alone = []
    for prompt in (prompts[:1, 4:], prompts[1:]):
        strategy = kind(model)
        strategy.prepare(1, 14)
        alone.append(strategy.generate(prompt, 5))
    strategy = kind(model)
    strategy.prepare(2, 14)
    assert torch.equal(strategy.generate(prompts, 5, attention_mask=mask), torch.cat(alone))
