"""Gives the turns: correctness first, warm-up, then rounds in which every case of a cell has one turn.

The direction of the rounds alternates (A B C, C B A), so that a linear drift of the machine cancels in the ratios. Only
the worker that has the turn is active. The machine's ceilings have turns of their own in the rounds. Every record is on
the disk before the next turn starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec

from bench.analysis.rounds import most_rounds, sample_is_disturbed
from bench.case import Case, Group, NaiveLogits
from bench.machine.affinity import usable_cores
from bench.machine.places import temporary_folder
from bench.measure.budget import CEILING_AGE_S, Budget, Cell, turn_seconds, turns_seconds
from bench.measure.ceiling_turns import CEILINGS, ROUND_S, CeilingTurns, setting_of
from bench.measure.plan import Limits
from bench.measure.resume import Past
from bench.measure.worker_process import WorkerFailed, WorkerProcess
from bench.protocol import (
    VERSION,
    CheckCase,
    Checked,
    FrameworkTimed,
    Load,
    Loaded,
    MakeReference,
    MakeText,
    Reply,
    Request,
    TakeTurn,
    TimeFramework,
    TurnTaken,
)
from bench.record import CasePlan, Check, Failure, Record, Run, Sample
from kvcache.strategies.catalogue import COMPILING, is_lossy

WARMUP_TRIALS = 5
"""Most warm-up turns of a case; they end sooner once two agree within WARMUP_AGREEMENT and no trend is left."""
WARMUP_AGREEMENT = 0.05
LOAD_TIMEOUT_S = 1800.0
"""For reading or making a model's weights, which are no case's time."""
WARMUP_S = 1.0
"""No warm-up starts once a case has run this long, its check included: that has been through every shape already, and
turns of seconds showed no trend after it."""

WorkerKey = tuple[str, NaiveLogits]
"""A strategy and its variant: what has a worker of its own within a group."""

REFERENCE: WorkerKey = ("", "last")
"""Key of the worker that runs no strategy: it makes the references that the others are checked against."""

ROOFS: WorkerKey = ("ceilings", "last")
"""Key of the worker that runs the ceilings' kernels; it holds no model."""


class Progress(Protocol):
    """Where the schedule reports while it works: `bench.measure.progress.ProgressBar`. Amounts are rough seconds."""

    def expect(self, total: float) -> None:
        """Set how much work there is in all."""

    def begin(self, title: str, amount: float) -> None:
        """Begin a cell."""

    def advance(self, amount: float, detail: str = "") -> None:
        """Count so much of the cell as done."""

    def say(self, text: str) -> None:
        """Print what a reader should know at once: a case failed, say."""


class Writer(Protocol):
    """Where records go."""

    def append(self, record: Record) -> None:
        """Store one record; it is on the disk when this returns."""


Fork = Callable[[Group, int], WorkerProcess]
"""Makes a worker for a group in one of its sets of processes."""


def measure(
    plans: Sequence[CasePlan],
    limits: Limits,
    writer: Writer,
    progress: Progress,
    fork: Fork,
    previous: Run | None = None,
) -> None:
    """Measure every case of `plans`, or what `previous` (the same run, interrupted) lacks.

    A case that fails is stored as a failure, and the others go on.
    """
    past = Past(previous)
    sets = list(_pending(plans, limits, past))
    rough_s = [
        turns_seconds(cell, limits, past.missing_rounds(cell, process, limits.repetitions))
        for _, process, cells in sets
        for cell in cells
    ]
    progress.expect(sum(rough_s))
    cells_left = [cell for _, _, cells in sets for cell in cells]
    budget = Budget(limits, past, cells_left, writer.append, progress.say)
    for group, process, cells in sets:
        with ProcessSet(group, process, limits, writer, progress, past, fork) as workers:
            workers.start([item.case for cell in cells for item in cell])
            for cell in cells:
                workers.measure_cell(cell, budget)


def pending_cells(plans: Sequence[CasePlan], limits: Limits, previous: Run | None = None) -> list[Cell]:
    """List the cells that `measure` would measure, one per set of processes."""
    return [cell for _, _, cells in _pending(plans, limits, Past(previous)) for cell in cells]


@dataclass
class _Entry:
    """A case of the cell being measured, and what is known of it so far."""

    plan: CasePlan
    spent_s: float = 0.0
    live: bool = True
    compile_s: float | None = None
    check: Check | None = None
    trials: list[TurnTaken] = field(default_factory=list)

    @property
    def case(self) -> Case:
        return self.plan.case


class ProcessSet:
    """The workers of one group, one for each strategy and one that makes the references; measures cell by cell."""

    def __init__(
        self,
        group: Group,
        process: int,
        limits: Limits,
        writer: Writer,
        progress: Progress,
        past: Past,
        fork: Fork,
    ) -> None:
        self.group, self.process, self.limits = group, process, limits
        self.writer, self.progress, self.past, self.fork = writer, progress, past, fork
        self.workers: dict[WorkerKey, WorkerProcess] = {}
        self.loaded: set[WorkerKey] = set()
        self.not_loaded: dict[WorkerKey, WorkerFailed] = {}
        """Why a worker could not be forked, or load the model, at the start: the result of its first case."""
        self.framework: dict[tuple[WorkerKey, int], list[int] | None] = {}
        """What steps without arithmetic take, by worker and batch size."""
        self.order = past.turns
        self._disturbed = False
        """Whether the machine disturbed a case's turn in this round."""
        self._since_ceilings_s = 0.0
        """What turns have taken since the ceilings had theirs."""

    def __enter__(self) -> ProcessSet:
        self._stack = ExitStack()
        self._scratch = Path(self._stack.enter_context(temporary_folder()))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, cases: Sequence[Case]) -> None:
        """Fork every worker, and have all of them load the model side by side: no time is taken yet."""
        self.seed = cases[0].seed
        for key in [REFERENCE, *([ROOFS] if self.limits.ceilings else []), *dict.fromkeys(map(_key, cases))]:
            try:
                self._start(key)
            except WorkerFailed as failure:
                self.not_loaded[key] = failure
        loading = [key for key in self.workers if key != ROOFS]
        for key in loading:
            self.workers[key].send(self._load_request(key))
        for key in loading:
            try:
                self._take_loaded(key, self.workers[key].receive(LOAD_TIMEOUT_S))
            except WorkerFailed as failure:
                self.not_loaded[key] = failure
        self.ceilings = CeilingTurns(self.workers[ROOFS], setting_of(self.group)) if ROOFS in self.workers else None
        if ROOFS in self.not_loaded:
            self._end_ceilings(self.not_loaded.pop(ROOFS).error)

    def measure_cell(self, cell: Cell, budget: Budget) -> None:
        """Check, warm up and time every case of a cell, as much of it as `budget` allows."""
        missing = self.past.missing_rounds(cell, self.process, self.limits.repetitions)
        self.progress.begin(f"measuring {cell[0].case.label}", turns_seconds(cell, self.limits, missing))
        plan = budget.plan(cell)
        if plan.left_out is None:
            entries = [_Entry(item) for item in cell if not self.past.failed(item.case, self.process)]
            self._prove(entries, plan.tokens_per_turn)
            for entry in entries:
                self._warm_up(entry)
            for entry in entries:
                self._store_check(entry)
                if entry.trials:
                    budget.learn(entry.plan, turn_ns(entry.trials[-1]) / 1e9, entry.compile_s)
            self._rounds(cell, entries, budget.plan_again(cell).repetitions)
        budget.done(cell)

    def _prove(self, entries: Sequence[_Entry], tokens_per_turn: int) -> None:
        """Check the tokens of every case, before any time is taken."""
        reference = self._reference(entries)
        if reference is None:
            return
        text = self._text([entry for entry in entries if is_lossy(entry.case.strategy)])
        for entry in entries:
            if entry.live:
                self._check(entry, reference, tokens_per_turn, text)

    def _rounds(self, cell: Cell, entries: Sequence[_Entry], repetitions: int) -> None:
        """Measure rounds until so many are whole: one that the machine disturbed is replaced, some times."""
        if not any(entry.live for entry in entries):
            return
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
            self.progress.say(
                f"{cell[0].case.label}: {whole} of {repetitions} rounds are undisturbed although {replaced} were "
                "replaced: the machine is shared (CPU time was stolen) or throttled"
            )

    def _round(self, entries: Sequence[_Entry], number: int) -> None:
        """A turn of every case that still runs and of the ceilings, backwards in odd rounds."""
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

    def _reference(self, entries: Sequence[_Entry]) -> Path | None:
        """Have the cell's expected tokens and logits made; without them nothing of it can be proved, or timed."""
        case = entries[0].case
        path = self._scratch / "reference.safetensors"
        try:
            self._load(REFERENCE)
            self.workers[REFERENCE].ask(MakeReference(case=case, path=str(path)), self.limits.timeout_s)
        except WorkerFailed as failure:
            for entry in entries:
                self._fail(entry, failure, "the reference (one parallel forward) failed: ")
            return None
        return path

    def _text(self, lossy: Sequence[_Entry]) -> str | None:
        """Have the text written by which the lossy cases of a cell are judged; they fail where that does."""
        if not lossy:
            return None
        case, path = lossy[0].case, str(self._scratch / "text.safetensors")
        writer = "compiled" if any(entry.case.strategy in COMPILING for entry in lossy) else "dynamic"
        try:
            self._load(REFERENCE)
            self.workers[REFERENCE].ask(MakeText(case=case, path=path, writer=writer), self.limits.timeout_s)
        except WorkerFailed as failure:
            for entry in lossy:
                self._fail(entry, failure, "writing the text that judges it failed: ")
        return path

    def _check(self, entry: _Entry, reference: Path, tokens_per_turn: int, text: str | None) -> None:
        case = entry.case
        judging = text if is_lossy(case.strategy) else None
        request = CheckCase(case=case, path=str(reference), tokens_per_turn=tokens_per_turn, text=judging)
        found = self._try(entry, request)
        if not isinstance(found, Checked):
            return
        entry.compile_s = found.compile_s
        entry.check = Check(
            case=case.key,
            process=self.process,
            tokens_match=found.tokens_match,
            logits_error=found.logits_error,
            positions_checked=found.positions_checked,
            kv_bytes_after_prefill=found.kv_bytes_after_prefill,
            kv_bytes_after_decode=found.kv_bytes_after_decode,
            peak_memory_bytes=found.peak_memory_bytes,
            compile_s=found.compile_s,
            counters=found.counters,
            exact=found.exact,
            kv_bytes_allocated_after_prefill=found.kv_bytes_allocated_after_prefill,
            kv_bytes_allocated_after_decode=found.kv_bytes_allocated_after_decode,
            quality=found.quality,
        )
        if found.tokens_match == "false" and not is_lossy(case.strategy):
            error = f"logits differ from the parallel forward's by {found.logits_error:.1e} of the largest logit"
            self._fail(entry, WorkerFailed("failed", error, alive=True, tokens_match="false"))

    def _store_check(self, entry: _Entry) -> None:
        """Store the check of a case, with what its framework takes: timed in a worker that has warmed up."""
        if entry.check is not None:
            step_ns = self._framework_step_ns(entry) if entry.live else None
            self.writer.append(msgspec.structs.replace(entry.check, framework_step_ns=step_ns))

    def _framework_step_ns(self, entry: _Entry) -> list[int] | None:
        """What the framework takes of the worker's steps: found once for each batch, since lengths do not matter."""
        case = entry.case
        if case.n_gen == 1:
            return None
        batch = _key(case), case.batch_size
        if batch not in self.framework:
            self.framework[batch] = None
            try:
                found = self._ask(entry, TimeFramework())
            except WorkerFailed as failure:
                if failure.alive:  # the case itself is none the worse
                    self.progress.say(f"no framework_ms for {case.key}: {failure.error}")
                else:
                    self._fail(entry, failure, "timing the framework: ")
            else:
                assert isinstance(found, FrameworkTimed)
                self.framework[batch] = found.step_ns
        return self.framework[batch]

    def _warm_up(self, entry: _Entry) -> None:
        number = 0
        while entry.live and not self._warm(entry):
            self._turn(entry, number, warmup=True)
            number += 1

    def _warm(self, entry: _Entry) -> bool:
        trials = [turn_ns(trial) for trial in entry.trials]
        if len(trials) >= WARMUP_TRIALS or entry.spent_s > WARMUP_S:
            return True
        return len(trials) >= 2 and abs(trials[-1] / trials[-2] - 1) <= WARMUP_AGREEMENT and not _still_falling(trials)

    def _turn(self, entry: _Entry, number: int, *, warmup: bool) -> None:
        others = [worker for key, worker in self.workers.items() if key != _key(entry.case)]
        idle_before = sum(worker.cpu_ns for worker in others)
        taken = self._try(entry, TakeTurn())
        if not isinstance(taken, TurnTaken):
            return
        idle_ns = sum(worker.cpu_ns for worker in others) - idle_before
        self._since_ceilings_s += turn_ns(taken) / 1e9
        entry.trials.append(taken)
        sample = Sample(
            case=entry.case.key,
            process=self.process,
            round=number,
            order=self.order,
            warmup=warmup,
            prefill_ns=taken.prefill_ns,
            steps=taken.steps,
            step_ns=taken.step_ns,
            prefill_event_ns=taken.prefill_event_ns,
            step_event_ns=taken.step_event_ns,
            covariates=msgspec.structs.replace(taken.covariates, idle_arms_ns=max(0, idle_ns)),
        )
        self.writer.append(sample)
        self._disturbed |= sample_is_disturbed(sample, entry.case.n_threads, usable_cores())
        self.order += 1

    def _ceiling_turns(self, case: Case, number: int, *, warmup: bool) -> None:
        """A turn of each ceiling for the cell of `case`, in alternating direction; the first failure ends them."""
        self._since_ceilings_s = 0.0
        if self.ceilings is None:
            return
        for ceiling in CEILINGS if number % 2 == 0 else reversed(CEILINGS):
            taken = self.ceilings.take(
                ceiling, cell=case.cell.key, process=self.process, number=number, order=self.order, warmup=warmup
            )
            if taken is None:
                self._end_ceilings(self.ceilings.failure)
                return
            self.writer.append(taken)
            self.order += 1
        if not warmup:
            self.progress.advance(ROUND_S)

    def _end_ceilings(self, reason: str | None) -> None:
        self.ceilings = None
        self.progress.say(f"no ceilings from here on, so no MFU, MBU or prediction: {reason}")

    def _try(self, entry: _Entry, request: Request) -> object:
        """Ask the entry's worker within the time its case has left; a failure is stored and ends the case."""
        key = _key(entry.case)
        try:
            if not isinstance(request, CheckCase) and not self.workers[key].alive:
                raise self.workers[key].death()  # killed while it slept: a new one would know nothing of the case
            self._load(key)
            reply = self._ask(entry, request)
        except WorkerFailed as failure:
            self._fail(entry, failure)
            return None
        self.progress.advance(turn_seconds(entry.plan), entry.case.strategy)
        return reply

    def _ask(self, entry: _Entry, request: Request) -> Reply:
        """The answer of the entry's worker, within the time that its case has left. Raises as `WorkerProcess.ask`."""
        started = time.monotonic()
        try:
            return self.workers[_key(entry.case)].ask(request, self.limits.timeout_s - entry.spent_s)
        except WorkerFailed as failure:
            if failure.status == "timeout":
                failure.error += " (what --timeout left)"
            raise
        finally:
            entry.spent_s += time.monotonic() - started

    def _fail(self, entry: _Entry, failure: WorkerFailed, prefix: str = "") -> None:
        entry.live = False
        error = prefix + failure.error
        self.writer.append(
            Failure(
                case=entry.case.key,
                process=self.process,
                status=failure.status,
                error=error,
                tokens_match=failure.tokens_match,
                worker_died=not failure.alive and failure.status != "timeout",
            )
        )
        self.progress.say(f"{failure.status}: {entry.case.key}: {error}")

    def _load(self, key: WorkerKey) -> None:
        """See that the worker `key` runs and holds its model; one that is gone is started anew."""
        if key in self.not_loaded:
            raise self.not_loaded.pop(key)
        if key not in self.workers or not self.workers[key].alive:
            self.loaded.discard(key)
            self._start(key)
        if key not in self.loaded:
            self._take_loaded(key, self.workers[key].ask(self._load_request(key), LOAD_TIMEOUT_S))

    def _load_request(self, key: WorkerKey) -> Load:
        strategy, naive_logits = key
        return Load(group=self.group, strategy=strategy, naive_logits=naive_logits, seed=self.seed)

    def _take_loaded(self, key: WorkerKey, reply: Reply) -> None:
        if not isinstance(reply, Loaded) or reply.version != VERSION:
            raise WorkerFailed("failed", f"the worker speaks another protocol than {VERSION}", alive=True)
        self.loaded.add(key)

    def _start(self, key: WorkerKey) -> None:
        self.workers[key] = self._stack.enter_context(self.fork(self.group, self.process))


def _key(case: Case) -> WorkerKey:
    return case.strategy, case.naive_logits


def turn_ns(taken: TurnTaken) -> int:
    """What a turn took: its prefill and its decode steps."""
    return taken.prefill_ns + sum(taken.step_ns)


def _still_falling(trials: Sequence[int]) -> bool:
    """Three turns in a row, each at least one percent faster than the one before: the machine is still warming up."""
    last = trials[-3:]
    return len(last) == 3 and last[1] < 0.99 * last[0] and last[2] < 0.99 * last[1]


def _pending(
    plans: Sequence[CasePlan], limits: Limits, past: Past
) -> Iterator[tuple[Group, int, list[list[CasePlan]]]]:
    """The sets of workers still to be started, in order: a group, a process number, and the cells it has to measure."""
    for group in dict.fromkeys(item.case.group for item in plans):
        cells = _by_cell([item for item in plans if item.case.group == group])
        for process in range(limits.processes):
            todo = [cell for cell in cells if past.missing_rounds(cell, process, limits.repetitions)]
            if todo:
                yield group, process, todo


def _by_cell(members: Sequence[CasePlan]) -> list[list[CasePlan]]:
    cells = dict.fromkeys(item.case.cell for item in members)
    return [[item for item in members if item.case.cell == cell] for cell in cells]
