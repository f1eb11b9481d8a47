"""What the worker counts while it checks: whole phases where they are short, and nothing that the check itself does."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.case import naive_steps
from bench.protocol import Checked
from kvcache import models
from kvcache.compiled.strategy import Compiled
from kvcache.proof.counts import COUNTED_STEPS, PhaseCounter
from kvcache.proof.tokens import agreement, reference
from kvcache.strategies.cached import Dynamic
from tests.measure.test_worker import checked, tiny_case

PROMPT = torch.arange(8)[None]


@cache
def tiny() -> PreTrainedModel:
    return models.load("random:tiny")


@pytest.mark.parametrize("strategy", ["naive", "dynamic", "static", "hf-generate"])
@pytest.mark.parametrize("fields", [{}, {"n_depth": 6, "batch_size": 2}])
def test_whole_phases_of_a_short_case(strategy: str, fields: dict[str, int], tmp_path: Path) -> None:
    case = tiny_case(strategy, n_gen=1 + COUNTED_STEPS, **fields)
    _, reply = checked(case, tmp_path)
    assert isinstance(reply, Checked), reply
    assert reply.counters is not None
    prefill, decode = reply.counters["prefill"], reply.counters["decode"]
    length = case.n_depth + case.n_prompt
    assert (prefill.steps, prefill.forward_calls) == (0, 1)
    assert prefill.tokens_processed == case.batch_size * (length if strategy == "naive" else case.n_prompt)
    assert prefill.kv_bytes == reply.kv_bytes_after_prefill
    steps = naive_steps(case) if strategy == "naive" else list(range(1, case.n_gen))
    fed = [length + step if strategy == "naive" else 1 for step in steps]
    assert decode.steps == decode.forward_calls == len(steps)
    assert decode.tokens_processed == case.batch_size * sum(fed)
    assert decode.lm_head_positions == case.batch_size * len(steps)
    assert decode.kv_bytes == reply.kv_bytes_after_decode
    assert (decode.cache_growth_bytes > 0) == (strategy in {"dynamic", "hf-generate"})
    assert (decode.compiled_graphs, decode.recompilations) == (0, 0)


def test_of_a_long_decode_the_first_steps_are_counted(tmp_path: Path) -> None:
    _, reply = checked(tiny_case(n_gen=20), tmp_path)
    assert isinstance(reply, Checked)
    assert reply.counters is not None
    assert reply.counters["decode"].steps == reply.counters["decode"].forward_calls == COUNTED_STEPS
    _, reply = checked(tiny_case(n_gen=1), tmp_path)
    assert isinstance(reply, Checked)
    assert list(reply.counters or {}) == ["prefill"]


class Recorded(Dynamic):
    """Keeps every logit that it gave."""

    def prepare(self, batch_size: int, capacity: int, context: Tensor | None = None) -> None:
        self.given: list[Tensor] = []
        super().prepare(batch_size, capacity, context)

    def _forward(self, ids: Tensor) -> Tensor:
        self.given.append(super()._forward(ids))
        return self.given[-1]


def test_a_counted_check_computes_the_same_bits() -> None:
    expected = reference(tiny(), PROMPT, 6)
    plain, counted = Recorded(tiny()), Recorded(tiny())
    plain.prepare(1, 14)
    agreement(plain, PROMPT, expected)
    counter = PhaseCounter(counted)
    counted.prepare(1, 14)
    with counter.counted():
        agreement(counted, PROMPT, expected, None, counter.apart)
    assert len(counted.given) == 6
    assert all(torch.equal(a, b) for a, b in zip(plain.given, counted.given, strict=True))


class Compiling(Dynamic):
    """Compiles a part of each step, and again for every length in `lengths`."""

    lengths = (8, 8, 8, 8)
    part: Callable[[Tensor], Tensor]

    def prepare(
        self, batch_size: int, capacity: int, context: Tensor | None = None, *, prompt_length: int | None = None
    ) -> None:
        super().prepare(batch_size, capacity, context, prompt_length=prompt_length)
        self.part = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)

    def decode(self, ids: Tensor) -> Tensor:
        self.part(torch.ones(self.lengths[self.kv.used_bytes // self.row_bytes - 8]))
        return super().decode(ids)

    @property
    def row_bytes(self) -> int:
        layers = self.kv.layers
        return sum(layer.keys[:, :, :1].nbytes + layer.values[:, :, :1].nbytes for layer in layers)

    @property
    def compile_s(self) -> float:
        return 0.0


@pytest.mark.usefixtures("untraced")
def test_the_fast_path_does_the_operations_of_a_cached_one() -> None:
    """But for the attention of a step, which sees whole chunks."""
    expected = reference(tiny(), PROMPT, 5)
    found = []
    for strategy in (Compiled(tiny(), backend="eager"), Dynamic(tiny())):
        counter = PhaseCounter(strategy)
        strategy.prepare(1, 13)
        counter.count_eager(PROMPT, expected.tokens)
        found.append(counter.counters)
    for name in ("forward_calls", "tokens_processed", "gemm_flops", "gemv_flops", "lm_head_positions", "kv_bytes"):
        own, dynamic = (getattr(counters["prefill"], name) for counters in found)
        assert own == dynamic, name
        own, dynamic = (getattr(counters["decode"], name) for counters in found)
        assert own > dynamic if name == "gemv_flops" else own == dynamic, name


class Recompiling(Compiling):
    lengths = (8, 9, 9, 9)


@pytest.mark.parametrize(("kind", "graphs", "recompilations"), [(Compiling, 1, 0), (Recompiling, 2, 1)])
def test_graphs_and_recompilations(kind: type[Compiling], graphs: int, recompilations: int) -> None:
    torch.compiler.reset()
    expected = reference(tiny(), PROMPT, 5)
    strategy = kind(tiny())
    counter = PhaseCounter(strategy)
    strategy.prepare(1, 13)
    agreement(strategy, PROMPT, expected, None, counter.apart)
    counter.count_eager(PROMPT, expected.tokens)
    decode = counter.counters["decode"]
    assert (decode.compiled_graphs, decode.recompilations) == (graphs, recompilations)
    assert decode.forward_calls == decode.steps == 4
    assert counter.counters["prefill"].compiled_graphs == 0
