"""What fits into `--budget`: first fewer positions of naive decode, then fewer rounds, then no longest prompts.

Times are rough at first (a middling machine), and then scaled by the speed that checks and warm-ups show.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from bench.case import TOKENS_PER_TURN, Case, naive_steps
from bench.machine.devices import DEVICES
from bench.manifest import CasePlan
from bench.measure.ceiling_turns import CHOOSE_S, ROUND_S
from bench.measure.plan import Limits
from bench.measure.resume import Past
from bench.naming import Name
from bench.record import CellPlan
from kvcache.arithmetic.costs import Costs
from kvcache.strategies.catalogue import COMPILING, REFEEDING, is_lossy

Cell = Sequence[CasePlan]

LEAST_ROUNDS = 6
"""With fewer there is no interval, so a budget never goes below."""

OTHER_TURNS = 4
"""A case's check and its warm-ups, in turns of it."""

CHECK_S = 1.0
"""What a check takes besides: counting, and steps without arithmetic."""

CONTEXTS, JUDGED_CONTEXTS, JUDGED_STEPS = 3, 1, 192
"""How often a check feeds the context, how often judging does, and its decode steps."""

COMPILE_S = 20.0
"""A compilation, until one was seen."""

START_S = 20.0
"""Importing the libraries, measuring the ceilings of no cell, drawing the plots."""

CEILING_AGE_S = 1.0
"""Seconds of the cases' turns after which the ceilings have theirs again: the read bandwidth of a shared machine was
seen to change between 33 and 57 GB/s within seconds."""


class Reduction(NamedTuple):
    """How much of some cells is measured."""

    repetitions: int
    tokens_per_turn: int = TOKENS_PER_TURN
    """As in `naive_steps`."""
    most_tokens: int | None = None
    """Cells with more tokens in context and prompt are left out; None: none are."""

    def leaves_out(self, cell: Cell) -> bool:
        """Return whether this cell is not measured."""
        return self.most_tokens is not None and length(cell) > self.most_tokens


class Budget:
    """Decides how much of each cell is measured: all that was asked for, or what fits into the time that is left."""

    def __init__(
        self,
        limits: Limits,
        past: Past,
        cells: Sequence[Cell],
        store: Callable[[CellPlan], None],
        say: Callable[[str], None],
        name: Name,
    ) -> None:
        """Start the clock. `cells` are all that will be measured, in that order; what is decided is stored and said."""
        self._name = name
        self._limits, self._past, self._left, self._store, self._say = limits, past, list(cells), store, say
        self._started = time.monotonic() - START_S - past.spent_s
        self._paces: dict[str, float] = {}
        self._compile_s = COMPILE_S

    def plan(self, cell: Cell) -> CellPlan:
        """Return what was decided for a cell, in an earlier process or run too; decide it if nothing was."""
        key = cell[0].case.cell.key
        if self._limits.budget_min is None:
            return CellPlan(
                cell=key, repetitions=self._limits.repetitions, tokens_per_turn=TOKENS_PER_TURN, spent_s=0.0
            )
        if key not in self._past.cell_plans:
            # The first cell, the shortest as a rule, shows the speed; before it there is no ground to reduce anything.
            measured = any(plan.left_out is None for plan in self._past.cell_plans.values())
            self._keep(cell, self._fit(may_end=measured) if self._paces else Reduction(self._limits.repetitions))
        return self._past.cell_plans[key]

    def plan_again(self, cell: Cell) -> CellPlan:
        """Return the same once the cell's warm-ups have shown the speed: the rounds may be fewer now."""
        plan = self.plan(cell)
        if self._limits.budget_min is not None:
            reduction = self._fit(may_end=False)
            repetitions = LEAST_ROUNDS if reduction.leaves_out(cell) else reduction.repetitions
            if repetitions < plan.repetitions:
                self._keep(cell, Reduction(repetitions, plan.tokens_per_turn))
        return self.plan(cell)

    def learn(self, item: CasePlan, turn_s: float, compile_s: float | None) -> None:
        """Take the speed of a strategy from a warm-up, and the time of a compilation."""
        plan = self._past.cell_plans.get(item.case.cell.key)
        tokens_per_turn = TOKENS_PER_TURN if plan is None else plan.tokens_per_turn
        self._paces[item.case.strategy] = turn_s / turn_seconds(item, tokens_per_turn)
        if compile_s is not None:
            self._compile_s = compile_s

    def done(self, cell: Cell) -> None:
        """Count a cell as measured, or left out."""
        self._left.remove(cell)

    def _fit(self, *, may_end: bool) -> Reduction:
        assert self._limits.budget_min is not None
        left_s = 60 * self._limits.budget_min - (time.monotonic() - self._started)
        return fit(self._left, self._limits, left_s, self._paces, self._compile_s, may_end=may_end)

    def _keep(self, cell: Cell, reduction: Reduction) -> None:
        within = f"--budget {self._limits.budget_min:g}"
        plan = CellPlan(
            cell=cell[0].case.cell.key,
            repetitions=reduction.repetitions,
            tokens_per_turn=reduction.tokens_per_turn,
            left_out=f"left out to end within {within} (minutes)" if reduction.leaves_out(cell) else None,
            spent_s=time.monotonic() - self._started,
        )
        self._past.cell_plans[plan.cell] = plan
        self._store(plan)
        if change := reduced(cell, self._limits, reduction, self._name):
            self._say(f"{within}: {change}")


def reduced(cell: Cell, limits: Limits, reduction: Reduction, name: Name) -> str:
    """Describe what a reduction takes from a cell; empty if nothing."""
    if reduction.leaves_out(cell):
        return f"{name(cell[0].case.cell)} is left out"
    parts = []
    for case in (item.case for item in cell if item.case.strategy in REFEEDING):
        steps, all_steps = (len(naive_steps(case, tokens)) for tokens in (reduction.tokens_per_turn, TOKENS_PER_TURN))
        if steps < all_steps:
            parts.append(f"{case.strategy} is timed at {steps} of {case.n_gen - 1} positions, not {all_steps}")
    if reduction.repetitions < limits.repetitions:
        parts.append(f"{reduction.repetitions} rounds, not {limits.repetitions}")
    return f"{name(cell[0].case.cell)}: {', '.join(parts)}" if parts else ""


ANY_PACE: Mapping[str, float] = MappingProxyType({})
"""Nothing was measured yet: every strategy takes its rough time."""


def fit(
    cells: Sequence[Cell],
    limits: Limits,
    seconds: float,
    paces: Mapping[str, float] = ANY_PACE,
    compile_s: float = COMPILE_S,
    *,
    may_end: bool = False,
) -> Reduction:
    """Return the first reduction with which `cells` take at most `seconds`; the last one where none does.

    `paces` are the times of strategies as multiples of the rough ones. Only with `may_end` may all be left out.
    """
    reduction = Reduction(limits.repetitions)
    for reduction in _reductions(cells, limits, may_end=may_end):  # the last one stays
        if seconds_of(cells, limits, reduction, paces, compile_s) <= seconds:
            break
    return reduction


def seconds_of(
    cells: Sequence[Cell],
    limits: Limits,
    reduction: Reduction,
    paces: Mapping[str, float] = ANY_PACE,
    compile_s: float = COMPILE_S,
) -> float:
    """Estimate the time of `cells` under a reduction."""
    typical = sum(paces.values()) / len(paces) if paces else 1.0
    total = 0.0
    for cell in cells:
        if not reduction.leaves_out(cell):
            for item in cell:
                pace = paces.get(item.case.strategy, typical)
                turn_s = pace * turn_seconds(item, reduction.tokens_per_turn)
                total += turn_s * (reduction.repetitions + OTHER_TURNS) + CHECK_S + pace * untimed_seconds(item)
                total += compile_s * (item.case.strategy in COMPILING)
            total += _roofs_seconds(cell, limits, reduction.repetitions)
    judged = [item for cell in cells if not reduction.leaves_out(cell) for item in cell if is_lossy(item.case.strategy)]
    texts = {item.case.text: _text_seconds(item) for item in sorted(judged, key=_text_seconds)}
    return total + typical * sum(texts.values())


def untimed_seconds(item: CasePlan) -> float:
    """Return a rough time of feeding the context, and of judging a lossy strategy; nothing that a turn repeats."""
    case, costs = item.case, item.prefill
    if costs is None or case.strategy in REFEEDING:
        return 0.0
    rates = DEVICES[case.device].typical_rates(case.n_threads)
    context_s = costs.flops / rates.flops_per_s * case.n_depth / case.n_prompt
    judged = is_lossy(case.strategy)
    return context_s * (CONTEXTS + JUDGED_CONTEXTS * judged) + JUDGED_STEPS * _step_seconds(item) * judged


def _step_seconds(item: CasePlan) -> float:
    return 0.0 if item.decode is None else _seconds(item.decode, item.case) / item.decode.forward_calls


def _text_seconds(item: CasePlan) -> float:
    """Return a rough time of writing the text that judges a case."""
    return (item.case.n_depth + item.case.n_prompt + JUDGED_STEPS) * _step_seconds(item)


def turns_seconds(cell: Cell, limits: Limits, n_rounds: int) -> float:
    """Return rough seconds of so many rounds of a cell, its checks and its warm-ups."""
    return sum(map(turn_seconds, cell)) * (n_rounds + OTHER_TURNS) + _roofs_seconds(cell, limits, n_rounds)


def turn_seconds(item: CasePlan, tokens_per_turn: int = TOKENS_PER_TURN) -> float:
    """Return a rough time of one turn, before anything is measured."""
    if item.prefill is None:
        return 1.0
    seconds = _seconds(item.prefill, item.case)
    if item.decode is not None:
        share = 1.0
        if item.case.strategy in REFEEDING:
            share = len(naive_steps(item.case, tokens_per_turn)) / (item.case.n_gen - 1)
        seconds += share * _seconds(item.decode, item.case)
    return seconds


def _roofs_seconds(cell: Cell, limits: Limits, n_rounds: int) -> float:
    roofs = 1 + sum(turn_seconds(item) > CEILING_AGE_S for item in cell)
    return CHOOSE_S + ROUND_S * roofs * n_rounds if limits.ceilings else 0.0


def length(cell: Cell) -> int:
    """Return the tokens of one sequence of a cell before the first is generated."""
    return cell[0].case.n_depth + cell[0].case.n_prompt


def _seconds(costs: Costs, case: Case) -> float:
    """Estimate a phase on a middling machine, where a forward's own overhead is 15 ms."""
    rates = DEVICES[case.device].typical_rates(case.n_threads)
    return max(costs.flops / rates.flops_per_s, costs.bytes / rates.bytes_per_s) + 15e-3 * costs.forward_calls


def _reductions(cells: Sequence[Cell], limits: Limits, *, may_end: bool) -> Iterator[Reduction]:
    """Yield them from none to the most. What a later kind of step saves is first spent on taking back earlier ones."""
    refeeding = [item.case for cell in cells for item in cell if item.case.strategy in REFEEDING]
    fewer_tokens = [TOKENS_PER_TURN]
    while any(len(naive_steps(case, fewer_tokens[-1])) > 1 for case in refeeding):
        fewer_tokens.append(fewer_tokens[-1] // 2)
    lengths: list[int | None] = [None, *sorted({length(cell) for cell in cells}, reverse=True)[1:]]
    for most_tokens in [*lengths, 0] if may_end else lengths:
        for repetitions in range(limits.repetitions, min(limits.repetitions, LEAST_ROUNDS) - 1, -1):
            for tokens_per_turn in fewer_tokens:
                yield Reduction(repetitions, tokens_per_turn, most_tokens)
