"""Exact counts of a case's two phases, taken while it is checked: what the gate compares first. No clock."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from kvcache.arithmetic.costs import Phase
from kvcache.proof.counters import Counters
from kvcache.proof.operations import OperationCounter
from kvcache.strategies.strategy import Strategy

COUNTED_STEPS = 7
"""Decode steps that are counted (watching every operation costs about 40 ms a step on a model of 30 layers)."""


class Compilations(NamedTuple):
    """What torch.compile has done in this process so far."""

    graphs: int
    recompilations: int


class PhaseCounter:
    """Counts what a strategy does from its prefill (it is prepared) to its first `COUNTED_STEPS` decode steps.

    What is compiled in `prepare` is no part of it: how much that is depends on the cases before this one.

    Operations run through the very kernels that run uncounted, so a check can be counted while it proves the tokens.
    A compiled graph hides its operations: a strategy that compiles is checked first and then counted once more, eager.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._operations = OperationCounter(strategy.model)
        self._counting = False
        self._marks: list[dict[str, int]] = []
        self._compiled = [compilations()]

    @contextmanager
    def counted(self, *, forwards: bool = True) -> Iterator[None]:
        """Count operations inside the block, but for those in `apart` (`forwards`: see `OperationCounter.watch`)."""
        self._counting = True
        with ExitStack() as hooks:
            self._operations.watch(self._strategy.model, hooks, forwards=forwards)
            with self._operations:
                yield

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Close a step once its token is known: what runs inside the block is not the strategy's."""
        self._operations.paused = True
        self._compiled.append(compilations())
        if self._counting and len(self._marks) <= COUNTED_STEPS:
            held = {"kv_bytes": self._strategy.kv_bytes}
            self._marks.append({name: getattr(self._operations, name) for name in _OPERATIONS} | held)
        yield
        self._operations.paused = len(self._marks) > COUNTED_STEPS

    def count_eager(self, prompt: Tensor, forced: Tensor) -> None:
        """Count a strategy that compiles: its prefill and first decode steps once more, nothing compiled.

        `prompt [batch, n_prompt]`, `forced [batch, n_gen]` the tokens to feed.
        """
        n_gen = min(forced.shape[1], 1 + COUNTED_STEPS)

        def closed(_token: Tensor, _logits: Tensor) -> None:
            with self.apart():
                return

        self._strategy.reset()
        with torch.compiler.set_stance("force_eager"), self._fed_by_calls(), self.counted(forwards=False):
            self._strategy.generate(prompt, n_gen, closed, forced=forced[:, :n_gen])

    @contextmanager
    def _fed_by_calls(self) -> Iterator[None]:
        """Take what the strategy's own phases are given for what is fed: the model itself may never be called."""

        def feeding(phase: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def run(ids: Tensor, *rest: Tensor | None) -> Tensor:
                self._operations.feed(ids)
                return phase(ids, *rest)

            return run

        with mock.patch.multiple(
            self._strategy, prefill=feeding(self._strategy.prefill), decode=feeding(self._strategy.decode)
        ):
            yield

    @property
    def counters(self) -> dict[Phase, Counters]:
        """The counts of each phase; a case with n_gen = 1 has no decode."""
        before, first, last = self._compiled[0], self._compiled[1], self._compiled[-1]
        prefill, end = self._marks[0], self._marks[-1]
        found: dict[Phase, Counters] = {"prefill": Counters(steps=0, **prefill, **_since(first, before))}
        if len(self._marks) > 1:
            operations = {name: end[name] - prefill[name] for name in _OPERATIONS}
            found["decode"] = Counters(
                steps=len(self._marks) - 1, kv_bytes=end["kv_bytes"], **operations, **_since(last, first)
            )
        return found


def compilations() -> Compilations:
    """Count graphs that dynamo has captured so far, and guards of compiled ones that failed; importing nothing."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        return Compilations(0, 0)
    return Compilations(
        graphs=dynamo.counters["stats"]["unique_graphs"],
        recompilations=sum(map(len, dynamo.guard_failures.values())),
    )


def _since(now: Compilations, before: Compilations) -> dict[str, int]:
    return {
        "compiled_graphs": now.graphs - before.graphs,
        "recompilations": now.recompilations - before.recompilations,
    }


_OPERATIONS = (
    "forward_calls",
    "tokens_processed",
    "gemm_flops",
    "gemv_flops",
    "cache_growth_bytes",
    "copied_bytes",
    "lm_head_positions",
)
"""Counts that the operation counter keeps, by name."""
