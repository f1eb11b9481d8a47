"""The fast path by the real compiler, on every architecture that it takes; and what it refuses."""

from __future__ import annotations

import copy
import itertools
import os

import pytest
import torch
from torch import Tensor

from kvcache.caches.contract import Unsupported
from kvcache.compiled.architectures.catalogue import describe
from kvcache.compiled.products import FEW_ROWS
from kvcache.compiled.rows import CHUNK
from kvcache.compiled.strategy import Compiled
from kvcache.proof.tokens import agreement, reference
from kvcache.strategies.strategy import last_logits
from kvcache.strategies.tolerance import TOLERANCE
from tests.compiled.families import CHOOSING, FAMILIES, family
from tests.tiny import ARCHITECTURES, COMPILED, MAX_POSITIONS, SLIDING_WINDOW, token_ids

SUPPORTED = ["gpt2", "llama", "qwen3", "mistral", "gemma3", "gpt_neox"]
AT_ONCE = [(architecture, 1, torch.float32) for architecture in COMPILED]
"""What is compiled whenever tests run; all other variants only with `-m compiled`."""
VARIANTS = [
    pytest.param(*variant, marks=[] if variant in AT_ONCE else pytest.mark.compiled)
    for variant in [
        *itertools.product(FAMILIES, (1, 2, 3, 4), [torch.float32, torch.bfloat16]),
        *itertools.product(("gpt2", "llama"), [FEW_ROWS], (torch.float32, torch.bfloat16)),
    ]
]


@pytest.mark.parametrize(("name", "batch_size", "dtype"), VARIANTS)
def test_tokens_and_logits_by_inductor(name: str, batch_size: int, dtype: torch.dtype) -> None:
    """Across a chunk's end and past the sliding window, from a context, twice from the same state.

    In bfloat16 two correct paths may be further apart than the tolerance on so small a model, whose parallel forward is
    itself some 3 % off. Where they are, `compiled` must be nearer to the float32 forward of the same weights.
    """
    model = family(name, dtype)
    n_prompt, n_gen = 20, 10
    n_depth = CHUNK - n_prompt - n_gen // 2
    context, prompt = token_ids(1, batch_size, n_depth), token_ids(2, batch_size, n_prompt)
    expected = reference(model, prompt, n_gen, context)
    strategy = Compiled(model)
    strategy.prepare(batch_size, n_depth + n_prompt + n_gen, context)
    assert strategy.compile_s > 0
    assert strategy.replays == (name not in CHOOSING)  # torch finds a router's experts between two kernels
    fed = torch.cat([context, prompt, expected.tokens[:, :-1]], dim=1)
    exact = last_logits(copy.deepcopy(model).float(), fed, keep=n_gen)
    for _ in range(2):
        found = agreement(strategy, prompt, expected)
        strategy.reset()
        if dtype == torch.float32:
            assert found.tokens_match == "true"
        elif found.tokens_match == "false":
            assert distance(forced_logits(strategy, prompt, expected.tokens), exact) < distance(expected.logits, exact)
            strategy.reset()
        else:
            assert found.logits_error <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=[] if name == "llama" else pytest.mark.compiled) for name in SUPPORTED]
)
def test_more_rows_than_a_multiply_and_sum_is_for_are_compiled_too(architecture: str) -> None:
    model, prompt = ARCHITECTURES[architecture](), token_ids(2, FEW_ROWS + 1, 20)
    strategy = Compiled(model)
    strategy.prepare(FEW_ROWS + 1, 24)
    assert strategy.replays  # with the library's products between its kernels
    assert agreement(strategy, prompt, reference(model, prompt, 4)).tokens_match == "true"


def forced_logits(strategy: Compiled, prompt: Tensor, tokens: Tensor) -> Tensor:
    """Logits `[batch, n_gen, vocab]` of a strategy that is fed these tokens."""
    logits: list[Tensor] = []
    strategy.generate(prompt, tokens.shape[1], lambda _, step: logits.append(step.clone()), forced=tokens)
    return torch.stack(logits, dim=1)


def distance(logits: Tensor, exact: Tensor) -> float:
    """The largest difference as a share of the largest exact logit."""
    return float((logits.float() - exact).abs().max() / exact.abs().max())


def test_other_capacity_needs_no_second_compilation() -> None:
    model = ARCHITECTURES["llama"](max_position_embeddings=8 * CHUNK)
    strategy = Compiled(model, backend="eager")
    strategy.prepare(1, 20)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for capacity in (CHUNK, 2 * CHUNK, 5 * CHUNK):
        prompt = token_ids(3, 1, capacity - 4)
        strategy.prepare(1, capacity)
        assert agreement(strategy, prompt, reference(model, prompt, 4)).tokens_match == "true"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("split", [1, 2, 5, CHUNK])
def test_prompt_in_two_parts(split: int) -> None:
    model, prompt = ARCHITECTURES["mistral"](), token_ids(4, 2, CHUNK + SLIDING_WINDOW)
    strategy = Compiled(model, backend="eager")
    strategy.prepare(2, 2 * CHUNK)
    whole = strategy.prefill(prompt)
    strategy.reset()
    strategy.prefill(prompt[:, :split])
    torch.testing.assert_close(strategy.prefill(prompt[:, split:]), whole)


@pytest.mark.usefixtures("untraced")
def test_kv_bytes_are_those_of_the_tokens() -> None:
    strategy = Compiled(ARCHITECTURES["llama"](), backend="eager")
    strategy.prepare(3, 50)
    assert strategy.kv_bytes == 0
    strategy.prefill(token_ids(0, 3, 7))
    layers, heads, head_dim, keys_and_values = 2, 2, 8, 2
    assert strategy.kv_bytes == 3 * 7 * layers * heads * head_dim * keys_and_values * 4


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_weights_are_not_held_twice(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    prompt = token_ids(5, 1, 6)
    before = model(prompt).logits
    own = describe(model)
    held = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    for part in (own.layers[0].qkv[0], own.layers[-1].mlp.down, own.head.linear):
        assert part.weight.untyped_storage().data_ptr() in held
    assert torch.equal(model(prompt).logits, before)  # and the model stays usable


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - set(SUPPORTED)))
def test_other_architectures_are_refused_by_name(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    with pytest.raises(Unsupported, match=type(model).__name__):
        Compiled(model)


def test_what_a_config_changes_is_refused() -> None:
    with pytest.raises(Unsupported, match="rotary positions of type dynamic"):
        Compiled(ARCHITECTURES["llama"](rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}))
    with pytest.raises(Unsupported, match="cross-attention"):
        Compiled(ARCHITECTURES["gpt2"](add_cross_attention=True))
    with pytest.raises(Unsupported, match="float16"):
        Compiled(ARCHITECTURES["llama"]().half())


def test_own_classes_are_refused() -> None:
    """A subclass may compute something else, which the fast path would pass over in silence."""
    model = ARCHITECTURES["llama"]()
    model.__class__ = type("LlamaForCausalLM", (type(model),), {"__module__": "theirs"})
    with pytest.raises(Unsupported, match=r"theirs\.LlamaForCausalLM"):
        Compiled(model)


def test_changed_layers_are_refused() -> None:
    model = ARCHITECTURES["llama"]()
    down = model.model.layers[1].mlp.down_proj
    down.__class__ = type("Quantised", (torch.nn.Linear,), {})
    with pytest.raises(Unsupported, match="Quantised"):
        Compiled(model)


def test_changed_layers_of_gpt2_are_refused() -> None:
    model = ARCHITECTURES["gpt2"]()
    attention = model.transformer.h[1].attn.c_attn
    attention.__class__ = type("Adapted", (type(attention),), {})
    with pytest.raises(Unsupported, match="Adapted"):
        Compiled(model)


@pytest.mark.usefixtures("untraced")
def test_more_tokens_than_prepared_for_are_refused() -> None:
    strategy = Compiled(ARCHITECTURES["llama"](), backend="eager")
    strategy.prepare(1, 6)
    with pytest.raises(ValueError, match="prepared for 6 tokens"):
        strategy.prefill(token_ids(0, 1, 7))
    strategy.prefill(token_ids(0, 1, 6))
    with pytest.raises(ValueError, match="6 are held, 1 more"):
        strategy.decode(token_ids(0, 1, 1))


@pytest.mark.usefixtures("untraced")
def test_a_context_of_one_token_lies_in_the_new_cache() -> None:
    model = ARCHITECTURES["llama"]()
    strategy = Compiled(model, backend="eager")
    for seed in (1, 2):
        context, prompt = token_ids(seed, 1, 1), token_ids(seed + 5, 1, 3)
        strategy.prepare(1, 8, context)
        assert agreement(strategy, prompt, reference(model, prompt, 4, context)).tokens_match == "true"


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(Unsupported, match="C\\+\\+ compiler"):
        Compiled(ARCHITECTURES["llama"]())


@pytest.mark.usefixtures("untraced")
def test_left_padding_is_refused() -> None:
    strategy = Compiled(ARCHITECTURES["llama"](), backend="eager")
    strategy.prepare(2, 20)
    with pytest.raises(ValueError, match="left padding"):
        strategy.prefill(token_ids(0, 2, 4), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))


@pytest.mark.cuda
@pytest.mark.parametrize("architecture", SUPPORTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_graph(architecture: str, dtype: torch.dtype) -> None:
    model = ARCHITECTURES[architecture]().to("cuda", dtype)
    prompt = token_ids(2, 2, 20).cuda()
    strategy = Compiled(model)
    for capacity in (40, 40 + 4 * CHUNK):
        strategy.prepare(2, min(capacity, MAX_POSITIONS))
        assert strategy.kernels is None
        for _ in range(2):
            assert agreement(strategy, prompt, reference(model, prompt, 10)).tokens_match != "false"
            strategy.reset()
