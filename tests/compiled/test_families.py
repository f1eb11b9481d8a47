"""Every architecture that the fast path takes, without its compiler: logits, tokens, and that every term counts."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcache.caches.contract import Unsupported
from kvcache.compiled.architectures.catalogue import DESCRIBERS, describe
from kvcache.compiled.decoder import Decoder, Layer, Norm
from kvcache.compiled.quantized import CompiledInt4, CompiledInt8
from kvcache.compiled.rows import CHUNK
from kvcache.compiled.step import Step
from kvcache.compiled.strategy import Compiled
from kvcache.proof.tokens import reference
from kvcache.strategies.strategy import last_logits
from kvcache.strategies.tolerance import TOLERANCE
from tests.compiled.families import CHOOSING, FAMILIES, MARGIN, family
from tests.tiny import SLIDING_WINDOW, tiny, token_ids

N_PROMPT, N_GEN = 20, 6
N_DEPTH = CHUNK - N_PROMPT - N_GEN // 2
"""A context up to which a prompt and half of the steps fill the first chunk of the cache."""

pytestmark = pytest.mark.usefixtures("untraced")


def forced_logits(strategy: Compiled, prompt: Tensor, tokens: Tensor) -> Tensor:
    """Logits `[batch, n_gen, vocab]` of a strategy that is fed these tokens."""
    logits: list[Tensor] = []
    strategy.generate(prompt, tokens.shape[1], lambda _, step: logits.append(step.clone()), forced=tokens)
    return torch.stack(logits, dim=1)


def distance(logits: Tensor, exact: Tensor) -> float:
    """The largest difference as a share of the largest exact logit."""
    return float((logits.float() - exact).abs().max() / exact.abs().max())


@pytest.fixture
def as_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a step take the path that is compiled, though nothing compiles it."""
    run = Step.run

    def compiling(*arguments: Any) -> Tensor:
        with monkeypatch.context() as inside:
            inside.setattr(torch.compiler, "is_compiling", lambda: True)
            return run(*arguments)

    monkeypatch.setattr(Step, "run", compiling)


def test_every_architecture_of_the_catalogue_is_among_the_families() -> None:
    assert {type(family(name)).__name__ for name in FAMILIES} == set(DESCRIBERS)


@pytest.mark.parametrize(
    ("name", "dtype", "path"),
    [
        *itertools.product(FAMILIES, [torch.float32], ["eager", "as_compiled"]),
        *((name, torch.bfloat16, "as_compiled") for name in FAMILIES),
    ],
)
def test_logits_and_tokens_are_those_of_transformers(
    name: str, dtype: torch.dtype, path: str, request: pytest.FixtureRequest
) -> None:
    """From a context, past the window and a chunk's end, in three rows.

    In bfloat16 two correct paths may be further apart than the tolerance on so small a model. Where they are, the fast
    path must be about as near to the float32 forward of the same weights as transformers is.
    """
    if path == "as_compiled":
        request.getfixturevalue(path)
    model, context, prompt = family(name, dtype), token_ids(1, 3, N_DEPTH), token_ids(2, 3, N_PROMPT)
    expected = reference(model, prompt, N_GEN, context)
    strategy = Compiled(model, backend="eager")
    strategy.prepare(3, N_DEPTH + N_PROMPT + N_GEN, context)
    logits = forced_logits(strategy, prompt, expected.tokens)
    if dtype == torch.float32:
        assert distance(logits, expected.logits) <= TOLERANCE[dtype]
        assert torch.equal(logits.argmax(-1), expected.tokens)
        return
    fed = torch.cat([context, prompt, expected.tokens[:, :-1]], dim=1)
    exact = last_logits(copy.deepcopy(model).float(), fed, keep=N_GEN)
    assert distance(logits, exact) <= max(TOLERANCE[dtype], 1.5 * distance(expected.logits, exact))


@pytest.mark.parametrize("name", CHOOSING)
def test_in_bfloat16_every_choice_of_experts_is_clear(name: str) -> None:
    """So that a bit's difference is no other expert, and both halves of the tokens have experts of their own."""
    model = copy.deepcopy(family(name, torch.bfloat16))  # the hooks stay
    seen: list[Tensor] = []
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(lambda _module, _fed, returned: seen.append(returned[0].detach().float()))
    model(torch.cat([token_ids(1, 3, N_DEPTH), token_ids(2, 3, N_PROMPT)], dim=1))
    assert seen
    for logits in seen:
        best, chosen = logits.topk(model.config.num_experts_per_tok + 1)
        assert (best[:, -2] - best[:, -1]).min() > MARGIN
        assert len(set(chosen[:, 0].tolist())) > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_bytes_of_tokens_are_those_of_the_geometry(name: str) -> None:
    """A layer with a window counts the rows that a later token still sees."""
    model = family(name)
    config = model.config.get_text_config()
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    strategy = Compiled(model, backend="eager")
    strategy.prepare(3, 40)
    strategy.prefill(token_ids(0, 3, N_PROMPT))
    rows = sum(N_PROMPT if layer.window is None else SLIDING_WINDOW - 1 for layer in strategy.decoder.layers)
    assert strategy.kv_bytes == 3 * rows * kv_heads * head_dim * 2 * 4


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_in_parts_is_the_whole_prompt(name: str) -> None:
    prompt = token_ids(4, 2, CHUNK + SLIDING_WINDOW)
    strategy = Compiled(family(name), backend="eager")
    strategy.prepare(2, 2 * CHUNK)
    whole = strategy.prefill(prompt)
    strategy.reset()
    for part in prompt.split([3, 1, 40, prompt.shape[1] - 44], dim=1):
        last = strategy.prefill(part)
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy_of", [CompiledInt8, CompiledInt4])
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "smollm3", "phi3", "gpt_neox", "stablelm, parallel"])
def test_quantised_rows_keep_windows_soft_caps_and_positions(
    strategy_of: type[Compiled], name: str, request: pytest.FixtureRequest
) -> None:
    """The compiled path and torch's attention over rounded rows give the same; and that is near to exact.

    Not to the last digit: a value that lies between two integers may be rounded to either.
    """
    model, prompt, forced = family(name), token_ids(2, 2, CHUNK - 3), token_ids(3, 2, N_GEN)
    expected = last_logits(model, torch.cat([prompt, forced[:, :-1]], dim=1), keep=N_GEN)
    found = []
    for path in ("eager", "as_compiled"):
        if path == "as_compiled":
            request.getfixturevalue(path)
        strategy = strategy_of(model, backend="eager")
        strategy.prepare(2, CHUNK + N_GEN)
        found.append(forced_logits(strategy, prompt, forced))
    assert distance(*found) <= 0.01
    assert distance(found[0], expected) <= (0.05 if strategy_of is CompiledInt8 else 0.55)


def without(layer: Layer, field: str) -> Layer:
    """The layer without what a field adds to a plain one."""
    plain: dict[str, Any] = {"residual": 1.0, "scale": layer.head_dim**-0.5, "parallel": not layer.parallel}
    return layer._replace(**{field: plain.get(field)})


TERMS = [
    ("qwen2", "window"),
    ("qwen3", "q_norm"),
    ("qwen3", "k_norm"),
    ("phi3", "window"),
    ("gemma2", "softcap"),
    ("gemma2", "window"),
    ("gemma2", "scale"),
    ("gemma2", "attention_output_norm"),
    ("gemma2", "mlp_norm"),
    ("gemma2", "mlp_output_norm"),
    ("gemma3", "q_norm"),
    ("gemma3", "rotary"),
    ("olmo2", "q_norm"),
    ("olmo2", "k_norm"),
    ("olmo2", "mlp_output_norm"),
    ("granite", "residual"),
    ("granite", "scale"),
    ("smollm3", "rotary"),
    ("smollm3", "window"),
    ("stablelm, parallel", "q_norm"),
    ("stablelm, parallel", "parallel"),
    ("stablelm", "parallel"),
    ("gpt_neox", "parallel"),
    ("gpt_neox", "rotary"),
]
CHANGES: dict[str, Callable[[Decoder], Decoder]] = {
    "gemma2": lambda own: dataclasses.replace(own, head=own.head._replace(softcap=None)),
    "gemma3": lambda own: dataclasses.replace(own, rotaries=own.rotaries[::-1]),
    "granite": lambda own: dataclasses.replace(own, head=own.head._replace(divisor=1.0)),
    "granite, embeddings": lambda own: dataclasses.replace(own, embedding=1.0),
    "olmo2": lambda own: with_norms(own, over=(-1,)),
    "gemma3, norms": lambda own: with_norms(own, plus_one=False),
    "stablelm, parallel": lambda own: with_norms(own, centred=False),
}


def with_norms(own: Decoder, **changed: Any) -> Decoder:
    """The description with other norms of queries."""
    layers = tuple(
        layer._replace(q_norm=layer.q_norm and Norm(**{**layer.q_norm._asdict(), **changed})) for layer in own.layers
    )
    return dataclasses.replace(own, layers=layers)


def logits_by(own: Decoder | None, name: str) -> Tensor:
    """Logits after a prompt of the family's model by another description of it; None: by its own."""
    strategy = Compiled(family(name), backend="eager")
    strategy._choice = dataclasses.replace(strategy._choice, model=own or strategy.decoder)
    strategy.prepare(1, 40)
    return strategy.prefill(token_ids(7, 1, 30))


@pytest.mark.parametrize(("name", "field"), TERMS)
def test_every_term_of_a_layer_changes_the_logits(name: str, field: str) -> None:
    """Or the tests above would not see that it is missing."""
    own = describe(family(name))
    changed = dataclasses.replace(own, layers=tuple(without(layer, field) for layer in own.layers))
    assert distance(logits_by(changed, name), logits_by(None, name)) > 0.01


@pytest.mark.parametrize("change", CHANGES)
def test_every_term_outside_the_layers_changes_the_logits(change: str) -> None:
    name = change if change in FAMILIES else change.partition(",")[0]
    changed = CHANGES[change](describe(family(name)))
    assert distance(logits_by(changed, name), logits_by(None, name)) > 0.01


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "short_factor": [1.0] * 4,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("name", "overrides", "reason"),
    [
        ("phi3", {"original_max_position_embeddings": 16, "rope_parameters": LONGROPE}, "type longrope, which change"),
        ("olmo2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "type dynamic"),
        (
            "gemma3",
            {
                "rope_parameters": {
                    kind: {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
                    for kind in ("full_attention", "sliding_attention")
                }
            },
            "type dynamic",
        ),
        ("gemma2", {"use_bidirectional_attention": True}, "attend both ways"),
        ("gemma3", {"use_bidirectional_attention": True}, "attend both ways"),
        ("llama", {"is_causal": False}, "attend both ways"),
    ],
)
def test_what_no_description_expresses_is_refused(name: str, overrides: dict[str, Any], reason: str) -> None:
    model_type, geometry = FAMILIES[name]
    with pytest.raises(Unsupported, match=reason):
        Compiled(tiny(model_type, geometry, **overrides))


def test_attention_set_to_both_ways_by_hand_is_refused() -> None:
    model = tiny(*FAMILIES["llama"])
    model.model.layers[2].self_attn.is_causal = False
    with pytest.raises(Unsupported, match="attend both ways"):
        Compiled(model)
