"""Extra work planted into the dynamic strategy, and the gate's decision on what was counted of it."""

from functools import cache

import msgspec
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.judge.gate import gate
from bench.judge.verdict import Verdict
from bench.record import Run
from bench.store.sessions import Session
from kvcache import models
from kvcache.proof.counts import PhaseCounter
from kvcache.proof.tokens import Reference, agreement, reference
from kvcache.strategies.cached import Dynamic
from kvcache.strategies.strategy import last_logits
from tests.handmade import make_case, make_run

CASE = make_case("dynamic", 8, model="random:tiny", n_gen=5, n_threads=1)


class ExtraForward(Dynamic):
    """One forward more per step."""

    def decode(self, ids: Tensor) -> Tensor:
        last_logits(self.model, ids)
        return super().decode(ids)


class ExtraLogits(Dynamic):
    """The LM head of one position more, in the prefill."""

    def _forward(self, ids: Tensor) -> Tensor:
        return last_logits(self.model, ids, cache=self.kv.cache, keep=2)[:, -1]


class ExtraCopy(Dynamic):
    """The keys of one layer are copied once more per step."""

    def decode(self, ids: Tensor) -> Tensor:
        layer = self.kv.layers[0]
        layer.keys = layer.keys.clone()
        return super().decode(ids)


class Compiled(Dynamic):
    """A part of each step is compiled, once."""

    lengths = (8, 8, 8, 8)

    def prepare(
        self, batch_size: int, capacity: int, context: Tensor | None = None, *, prompt_length: int | None = None
    ) -> None:
        super().prepare(batch_size, capacity, context, prompt_length=prompt_length)
        self.part = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)

    def reset(self) -> None:
        super().reset()
        self.steps = iter(self.lengths)

    def decode(self, ids: Tensor) -> Tensor:
        self.part(torch.ones(next(self.steps)))
        return super().decode(ids)

    @property
    def compile_s(self) -> float:
        return 0.0


class Recompiled(Compiled):
    """The same for another length in the third step, which is another graph."""

    lengths = (8, 8, 9, 9)


@cache
def made() -> tuple[PreTrainedModel, Tensor, Reference]:
    """The model, the prompt, and the tokens it is checked against."""
    torch.set_num_threads(1)
    model, prompt = models.load("random:tiny"), torch.arange(8)[None]
    return model, prompt, reference(model, prompt, CASE.n_gen)


def counted(kind: type[Dynamic]) -> Run:
    """A run whose check holds what `kind` did, counted as the worker counts it."""
    if issubclass(kind, Compiled):
        torch.compiler.reset()
    model, prompt, expected = made()
    strategy = kind(model)
    phases = PhaseCounter(strategy)
    strategy.prepare(1, CASE.capacity)
    if strategy.compile_s is None:
        with phases.counted():
            agreement(strategy, prompt, expected, None, phases.apart)
    else:
        agreement(strategy, prompt, expected, None, phases.apart)
        phases.count_eager(prompt, expected.tokens)
    return with_counters(phases)


def with_counters(phases: PhaseCounter) -> Run:
    """A hand-made run with counters that were really counted."""
    run = make_run([CASE], rounds=1, warmups=0)
    return msgspec.structs.replace(run, checks=[msgspec.structs.replace(run.checks[0], counters=phases.counters)])


def alarms(head: Run, base: Session) -> list[Verdict]:
    """The regressions that the gate finds."""
    return [verdict for verdict in gate(head, [base]) if verdict.kind == "regression"]


PLANTED: dict[str, tuple[type[Dynamic], type[Dynamic], str]] = {
    "extra forward": (Dynamic, ExtraForward, "forward_calls"),
    "extra logits position": (Dynamic, ExtraLogits, "lm_head_positions"),
    "extra KV copy": (Dynamic, ExtraCopy, "copied_bytes"),
    "recompilation": (Compiled, Recompiled, "recompilations"),
}
"""What is planted: the proper strategy, the one with the extra, and the counter that must show it."""
