"""A step's recorded kernels give what the step itself gives, wherever it stands."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import output_code
from torch.utils._python_dispatch import TorchDispatchMode

from kvcache.compiled import replay
from kvcache.compiled.quantized import CompiledInt4, CompiledInt8
from kvcache.compiled.rows import CHUNK
from kvcache.compiled.strategy import Compiled
from tests.compiled.families import family
from tests.tiny import token_ids

CAPACITY = CHUNK + 8


class Operations(TorchDispatchMode):
    """Notes what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[object] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def strategy() -> Compiled:
    """Return a strategy whose steps the real compiler has compiled."""
    return Compiled(family("llama", torch.float32))


def logits(strategy: Compiled, prompt: Tensor, n_gen: int, keep: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the logits of every step of a generation, `[n_gen, batch, vocab]`."""
    found: list[Tensor] = []
    strategy.generate(prompt, n_gen, lambda _, step: found.append(keep(step)))
    return torch.stack(found)


def plain(strategy: Compiled, prompt: Tensor, n_gen: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Return the same of steps that are not replayed."""
    with monkeypatch.context() as patch:
        patch.setattr(strategy.step, "is_replayable", False)
        return logits(strategy, prompt, n_gen, Tensor.clone)


def test_replayed_steps_are_equal_to_the_bit_across_the_end_of_a_chunk(
    strategy: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = token_ids(5, 1, CHUNK - 4)
    strategy.prepare(1, CAPACITY)
    assert strategy.replays
    # Kept as they are: the logits of a step are not those of the next one's memory.
    replayed = logits(strategy, prompt, 12, lambda step: step)
    assert torch.equal(replayed, plain(strategy, prompt, 12, monkeypatch))


def test_another_capacity_and_a_context_are_recorded_anew(strategy: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    for capacity, n_depth in ((CAPACITY, 0), (3 * CHUNK, 2 * CHUNK - 10), (CHUNK, 7)):
        strategy.release()
        strategy.prepare(1, capacity, token_ids(6, 1, n_depth) if n_depth else None)
        prompt = token_ids(7, 1, 5)
        replayed = logits(strategy, prompt, 12, Tensor.clone)
        assert torch.equal(replayed, plain(strategy, prompt, 12, monkeypatch))


def test_what_counts_operations_sees_a_step(strategy: Compiled) -> None:
    strategy.prepare(1, CAPACITY)
    strategy.prefill(token_ids(8, 1, 4))
    strategy.decode(token_ids(8, 1, 1))
    with torch.compiler.set_stance("force_eager"), Operations() as operations:
        strategy.decode(token_ids(8, 1, 1))
    assert torch.ops.aten.scaled_dot_product_attention.default in operations.seen


class OtherGraph:
    """A compiled graph of a torch that runs it in another way."""

    def __call__(self, inputs: list[Any]) -> list[Any]:
        return inputs


@pytest.mark.parametrize("scope", [None, {}, {"extern_kernels": None}])
def test_a_torch_that_runs_compiled_code_in_another_way_records_nothing(
    scope: dict[str, object] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if scope is not None:
        run = SimpleNamespace(__func__=SimpleNamespace(__globals__=scope))
        monkeypatch.setattr(OtherGraph, "current_callable", run, raising=False)
    monkeypatch.setattr(output_code, "CompiledFxGraph", OtherGraph)
    with replay.recording() as recorded, pytest.raises(replay.NotRecordable):
        OtherGraph()([])
    assert not recorded
    assert OtherGraph()([1]) == [1]


def test_what_is_made_between_kernels_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router's choice of experts, say, which no kernel computes: a replay would go on with the recorded one."""
    scope: dict[str, Any] = {
        "extern_kernels": SimpleNamespace(),
        "empty_strided_cpu": torch.empty,
        "cpp_add": torch.add,
    }

    def run(x: Tensor) -> Tensor:
        made: Tensor = scope["empty_strided_cpu"](2)
        scope["cpp_add"](x, x.topk(1).values, out=made)
        return made

    def call(_graph: OtherGraph, inputs: list[Tensor]) -> list[Tensor]:
        return [run(*inputs)]

    monkeypatch.setattr(
        OtherGraph, "current_callable", SimpleNamespace(__func__=SimpleNamespace(__globals__=scope)), raising=False
    )
    monkeypatch.setattr(OtherGraph, "__call__", call)
    monkeypatch.setattr(output_code, "CompiledFxGraph", OtherGraph)
    with replay.recording(), pytest.raises(replay.NotRecordable, match="made between kernels"):
        OtherGraph()([torch.ones(2)])
    assert scope["cpp_add"] is torch.add


def test_a_strategy_that_fails_to_record_runs_its_steps_as_they_stand(
    strategy: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "LIBRARY", "another name")
    other = Compiled(strategy.model)
    other.prepare(1, CAPACITY)
    assert not other.replays
    strategy.prepare(1, CAPACITY)
    prompt = token_ids(9, 1, 5)
    assert torch.equal(logits(other, prompt, 4, Tensor.clone), plain(strategy, prompt, 4, monkeypatch))


@pytest.mark.parametrize(
    "kind", [Compiled, *(pytest.param(kind, marks=pytest.mark.compiled) for kind in (CompiledInt8, CompiledInt4))]
)
def test_a_step_holds_no_copy_of_the_cache(kind: type[Compiled], strategy: Compiled) -> None:
    """Nothing that its kernels write to beside the cache holds even one head's keys in full width."""
    own = strategy if kind is Compiled else kind(strategy.model)
    n = 2 * CHUNK
    own.prepare(1, n)
    own.prefill(token_ids(8, 1, n - 2))
    own.decode(token_ids(8, 1, 1))
    assert own.replays
    slots = own.step.slots
    known = [*strategy.model.parameters(), own.step.positions, own.step.chunks, own.step.at]
    known += [part for slot in slots for part in slot.rows] + [part for rotary in own.step.rotaries for part in rotary]
    left_out = {tensor.untyped_storage().data_ptr() for tensor in known}
    used = [value for call in own.step._recorded for value in [*call.args, *call.keywords.values()]]
    beside = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in used
        if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in left_out
    }
    assert beside
    assert max(beside.values()) < 4 * n * own.step.model.head_dim


def test_what_a_recording_holds_is_let_go(strategy: Compiled) -> None:
    strategy.prepare(1, CAPACITY)
    strategy.prefill(token_ids(8, 1, 4))
    strategy.decode(token_ids(8, 1, 1))
    held = weakref.ref(strategy.step.slots[0].rows.keys)
    strategy.release()
    assert held() is None


def test_nothing_is_replayed_of_a_step_that_runs_eagerly() -> None:
    eager = Compiled(family("llama", torch.float32), backend="eager")
    eager.prepare(1, CAPACITY)
    assert not eager.replays
