"""Gives the turns: correctness first, warm-up, then rounds in which every case of a cell has one turn.

The direction of the rounds alternates (A B C, C B A), so that a linear drift of the machine cancels in the ratios. Only
the worker that has the turn is active. The machine's ceilings have turns of their own in the rounds. Every record is on
the disk before the next turn starts.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import msgspec

from bench.analysis.disturbance import COUNTED, turn_is_disturbed
from bench.analysis.rounds import most_rounds
from bench.case import Case
from bench.machine.affinity import usable_cores
from bench.manifest import CasePlan, TextFile
from bench.measure.budget import CEILING_AGE_S, Budget, Cell, turns_seconds
from bench.measure.ceiling_turns import CEILINGS, CHOOSE_S, ROUND_S, CeilingTurns, setting_of
from bench.measure.checks import Checks
from bench.measure.plan import Limits
from bench.measure.progress import ProgressBar
from bench.measure.resume import Past
from bench.measure.texts import Texts
from bench.measure.worker_process import WorkerFailed, WorkerProcess
from bench.measure.workers import REFERENCE, ROOFS, Entry, Workers, worker_key
from bench.naming import namer
from bench.protocol import TakeTurn, TurnTaken
from bench.record import CeilingSample, Run, Sample
from bench.store.checked_lines import Appender

WARMUP_TRIALS = 5
"""Most warm-up turns of a case; they end sooner once two agree within WARMUP_AGREEMENT and no trend is left."""
WARMUP_AGREEMENT = 0.05
WARMUP_S = 1.0
"""No warm-up starts once a case has run this long, its check included: that has been through every shape already, and
turns of seconds showed no trend after it."""

Fork = Callable[[str, int, int], WorkerProcess]
"""Makes a worker for a model, with a number of threads, in one of its sets of processes."""


def measure(
    plans: Sequence[CasePlan],
    limits: Limits,
    writer: Appender,
    progress: ProgressBar,
    fork: Fork,
    previous: Run | None = None,
    text: TextFile | None = None,
    kernels: dict[str, str] | None = None,
) -> None:
    """Measure every case of `plans`, or what `previous` (the same run, interrupted) lacks.

    Lossy strategies are judged over the user's `text`, or over one that the model writes. `kernels` are those that the
    run is pinned to. A case that fails is stored as a failure, and the others go on.
    """
    past = Past(previous)
    sets = list(past.pending(plans, limits))
    rough_s = [
        turns_seconds(cell, limits, past.missing_rounds(cell, process, limits.repetitions))
        for _, process, cells in sets
        for cell in cells
    ]
    progress.expect(sum(rough_s))
    cells_left = [cell for _, _, cells in sets for cell in cells]
    name = namer(item.case for item in plans)
    budget = Budget(limits, past, cells_left, writer.append, progress.say, name)
    sole_model = previous is None and len({item.case.model for item in plans}) == 1
    for number, (group, process, cells) in enumerate(sets):
        fork_one = functools.partial(fork, group.model, group.n_threads, process)
        seed = cells[0][0].case.seed
        with Workers(group, process, seed, limits.timeout_s, fork_one, writer, progress, name, kernels) as workers:
            texts = Texts(plans, past, writer, text)
            checks = Checks(workers, writer, progress, texts, sole_model=sole_model and number == 0)
            measurer = ProcessSet(workers, limits, writer, progress, past, checks)
            measurer.start([item.case for cell in cells for item in cell])
            for cell in cells:
                measurer.measure_cell(cell, budget)


class ProcessSet:
    """Measures cell by cell with one set of workers, those of one group."""

    def __init__(
        self,
        workers: Workers,
        limits: Limits,
        writer: Appender,
        progress: ProgressBar,
        past: Past,
        checks: Checks,
    ) -> None:
        self.workers, self.process, self.limits = workers, workers.process, limits
        self.writer, self.progress, self.past = writer, progress, past
        self.checks = checks
        self.order = past.turns
        self._disturbed = False
        """Whether the machine disturbed a case's turn in this round."""
        self._since_ceilings_s = 0.0
        """What turns have taken since the ceilings had theirs."""

    def start(self, cases: Sequence[Case]) -> None:
        """Start a worker for each strategy of `cases`, one that makes the references, and the ceilings'."""
        keys = [REFERENCE, *([ROOFS] if self.limits.ceilings else []), *map(worker_key, cases)]
        self.workers.start(dict.fromkeys(keys))
        self.ceilings: CeilingTurns | None = None
        if self.limits.ceilings:
            try:
                self.ceilings = CeilingTurns(self.workers.forked(ROOFS))
            except WorkerFailed as failure:
                self._end_ceilings(failure.error)

    def measure_cell(self, cell: Cell, budget: Budget) -> None:
        """Check, warm up and time every case of a cell, as much of it as `budget` allows."""
        missing = self.past.missing_rounds(cell, self.process, self.limits.repetitions)
        self.progress.begin(
            f"measuring {self.workers.name(cell[0].case.cell)}", turns_seconds(cell, self.limits, missing)
        )
        plan = budget.plan(cell)
        if plan.left_out is None:
            entries = [Entry(item) for item in cell if not self.past.failed(item.case, self.process)]
            self.checks.prove(entries, plan.tokens_per_turn)
            for entry in entries:
                self._warm_up(entry)
            for entry in entries:
                self.checks.store(entry)
            _show_speed(entries, budget)
            self._rounds(cell, entries, budget.plan_again(cell).repetitions)
            _show_speed(entries, budget)  # a check of more than WARMUP_S leaves no warm-up that could
        budget.done(cell)

    def _rounds(self, cell: Cell, entries: Sequence[Entry], repetitions: int) -> None:
        """Measure rounds until so many are whole: one that the machine disturbed is replaced, some times."""
        if not any(entry.live for entry in entries):
            return
        self._roofs = setting_of(cell)
        self._ceiling_turns(cell[0].case, 0, warmup=True)
        complete, whole = self.past.rounds(cell, self.process)
        number, replaced = self.past.next_round(cell, self.process), complete - whole
        while whole < repetitions and complete < most_rounds(repetitions) and any(entry.live for entry in entries):
            self._disturbed = False
            self._round(entries, number)
            number, complete = number + 1, complete + 1
            whole += not self._disturbed
            replaced += self._disturbed
        if whole < repetitions and any(entry.live for entry in entries):
            name = self.workers.name(cell[0].case.cell)
            self.progress.say(
                f"{name}: {whole} of {repetitions} rounds are undisturbed although {replaced} were "
                "replaced: the machine is shared (CPU time was stolen) or throttled"
            )

    def _round(self, entries: Sequence[Entry], number: int) -> None:
        """Take a turn of every case that still runs and of the ceilings, backwards in odd rounds."""
        forwards, case = number % 2 == 0, entries[0].case
        if forwards:
            self._ceiling_turns(case, number, warmup=False)
        for entry in entries if forwards else reversed(entries):
            if entry.live:
                self._turn(entry, number, warmup=False)
            if self._since_ceilings_s > CEILING_AGE_S:
                self._ceiling_turns(case, number, warmup=False)
        if not forwards and self._since_ceilings_s:
            self._ceiling_turns(case, number, warmup=False)

    def _warm_up(self, entry: Entry) -> None:
        number = 0
        while entry.live and not self._warm(entry):
            self._turn(entry, number, warmup=True)
            number += 1

    def _warm(self, entry: Entry) -> bool:
        trials = [trial.total_ns for trial in entry.trials]
        if len(trials) >= WARMUP_TRIALS or entry.spent_s > WARMUP_S:
            return True
        return len(trials) >= 2 and abs(trials[-1] / trials[-2] - 1) <= WARMUP_AGREEMENT and not _still_falling(trials)

    def _turn(self, entry: Entry, number: int, *, warmup: bool) -> None:
        idle_before_ns = self.workers.cpu_ns_besides(entry.key)
        taken = self.workers.attempt(entry, TakeTurn())
        if not isinstance(taken, TurnTaken):
            return
        idle_ns = max(0, self.workers.cpu_ns_besides(entry.key) - idle_before_ns)
        self._since_ceilings_s += taken.total_ns / 1e9
        entry.trials.append(taken)
        times = msgspec.structs.replace(
            taken, covariates=msgspec.structs.replace(taken.covariates, idle_arms_ns=idle_ns)
        )
        sample = Sample(
            case=entry.case.key,
            process=self.process,
            round=number,
            order=self.order,
            warmup=warmup,
            **msgspec.structs.asdict(times),
        )
        self.writer.append(sample)
        counted = {name: getattr(taken.covariates, name) for name in COUNTED}
        self._disturbed |= turn_is_disturbed(taken.total_ns, entry.case.n_threads, usable_cores(), **counted)
        self.order += 1

    def _ceiling_turns(self, case: Case, number: int, *, warmup: bool) -> None:
        """Take a turn of each ceiling for the cell of `case`, in alternating direction; the first failure ends them."""
        self._since_ceilings_s = 0.0
        if self.ceilings is None:
            return
        for ceiling in CEILINGS if number % 2 == 0 else reversed(CEILINGS):
            try:
                taken = self.ceilings.take(ceiling, self._roofs)
            except WorkerFailed as failure:
                self._end_ceilings(failure.error)
                return
            self.writer.append(
                CeilingSample(
                    cell=case.cell.key,
                    ceiling=ceiling,
                    process=self.process,
                    round=number,
                    order=self.order,
                    warmup=warmup,
                    **msgspec.structs.asdict(taken),
                )
            )
            self.order += 1
        self.progress.advance(CHOOSE_S if warmup else ROUND_S)

    def _end_ceilings(self, reason: str) -> None:
        self.ceilings = None
        self.progress.say(f"no ceilings from here on, so no MFU, MBU or prediction: {reason}")


def _show_speed(entries: Iterable[Entry], budget: Budget) -> None:
    for entry in entries:
        if entry.check is not None and entry.trials:
            budget.learn(entry.plan, entry.trials[-1].total_ns / 1e9, entry.check.compile_s)


def _still_falling(trials: Sequence[int]) -> bool:
    """Return whether three turns in a row were each a percent faster than the one before: the machine is warming up."""
    last = trials[-3:]
    return len(last) == 3 and last[1] < 0.99 * last[0] and last[2] < 0.99 * last[1]
