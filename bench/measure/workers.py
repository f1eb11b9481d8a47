"""The workers of one group: forks them, has them load the model, and asks them on behalf of a case."""

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field

from bench.case import Case, Group, NaiveLogits
from bench.manifest import CasePlan
from bench.measure.budget import turn_seconds
from bench.measure.progress import ProgressBar
from bench.measure.worker_process import WorkerFailed, WorkerProcess
from bench.naming import Name
from bench.protocol import VERSION, CheckCase, Judge, Judged, Load, Loaded, Reply, Request, TakeTurn, TurnTaken
from bench.record import Check, Failure
from bench.store.checked_lines import Appender

LOAD_TIMEOUT_S = 1800.0
"""For reading or making a model's weights, which are no case's time."""

WorkerKey = tuple[str, NaiveLogits, bool]
"""A strategy and its variant (`Case.naive_logits`, `Case.prefill_quantized`): what has a worker of its own."""

REFERENCE: WorkerKey = ("", "last", False)
"""Key of the worker that runs no strategy: it makes the references that the others are checked against."""

ROOFS: WorkerKey = ("ceilings", "last", False)
"""Key of the worker that runs the ceilings' kernels; it holds no model."""


@dataclass
class Entry:
    """A case of the cell being measured, and what is known of it so far."""

    plan: CasePlan
    spent_s: float = 0.0
    """What its requests have taken, of the time that it may take."""
    live: bool = True
    """Whether it has not failed."""
    check: Check | None = None
    trials: list[TurnTaken] = field(default_factory=list)

    @property
    def case(self) -> Case:
        """The case itself."""
        return self.plan.case

    @property
    def key(self) -> WorkerKey:
        """Which worker it runs in."""
        return worker_key(self.case)


def worker_key(case: Case) -> WorkerKey:
    """Return which worker of its group a case runs in."""
    return case.strategy, case.naive_logits, case.prefill_quantized


class Workers(AbstractContextManager["Workers"]):
    """The workers of one group in one set of processes. Use as a context manager: leaving it ends them."""

    def __init__(
        self,
        group: Group,
        process: int,
        seed: int,
        timeout_s: float,
        fork: Callable[[], WorkerProcess],
        writer: Appender,
        progress: ProgressBar,
        name: Name,
        kernels: dict[str, str] | None = None,
    ) -> None:
        """Start nothing yet.

        `seed` is of the weights, `timeout_s` what a case may take in all; `writer` stores the failures, and `name` says
        of which case they are. `kernels` are those that strategies are pinned to (`Manifest.kernels`).
        """
        self.group, self.process, self.seed, self.timeout_s = group, process, seed, timeout_s
        self.kernels, self.name = kernels, name
        self._fork, self._writer, self._progress = fork, writer, progress
        self._workers: dict[WorkerKey, WorkerProcess] = {}
        self._loaded: set[WorkerKey] = set()
        self.exact: set[WorkerKey] = set()
        """Those whose strategy promises to be exact, as far as they were loaded."""
        self._failed: dict[WorkerKey, WorkerFailed] = {}
        """Why a worker could not be forked, or load the model, at the start: the result of its first case."""
        self._stack = ExitStack()

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, keys: Iterable[WorkerKey]) -> None:
        """Fork these workers, and have all of them load the model side by side: no time is taken yet."""
        for key in keys:
            try:
                self._start(key)
            except WorkerFailed as failure:
                self._failed[key] = failure
        loading = [key for key in self._workers if key != ROOFS]
        for key in loading:
            self._workers[key].send(self._load_request(key))
        for key in loading:
            try:
                self._take_loaded(key, self._workers[key].receive(LOAD_TIMEOUT_S))
            except WorkerFailed as failure:
                self._failed[key] = failure

    def forked(self, key: WorkerKey) -> WorkerProcess:
        """Return a worker that was started, with or without a model. Raises WorkerFailed with why it was not."""
        if key in self._failed:
            raise self._failed.pop(key)
        return self._workers[key]

    def loaded(self, key: WorkerKey) -> WorkerProcess:
        """Return a worker that holds its model: one that is gone is started anew. Raises WorkerFailed."""
        if key in self._failed:
            raise self._failed.pop(key)
        if key not in self._workers or not self._workers[key].alive:
            self._loaded.discard(key)
            self._start(key)
        if key not in self._loaded:
            self._take_loaded(key, self._workers[key].ask(self._load_request(key), LOAD_TIMEOUT_S))
        return self._workers[key]

    def cpu_ns_besides(self, key: WorkerKey) -> int:
        """Return the CPU time that all workers but one have used, which should sleep in its turn."""
        return sum(worker.cpu_ns for other, worker in self._workers.items() if other != key)

    def ask_reference(self, request: Request) -> Reply:
        """Have the worker without a strategy make a file. Raises WorkerFailed."""
        return self.loaded(REFERENCE).ask(request, self.timeout_s)

    def ask(self, entry: Entry, request: Request) -> Reply:
        """Ask the entry's worker, within the time that its case has left. Raises WorkerFailed."""
        worker = self.loaded(entry.key) if isinstance(request, CheckCase) else self._workers[entry.key]
        if not worker.alive:
            raise worker.death()  # killed while it slept: a new one would know nothing of the case
        started = time.monotonic()
        try:
            return worker.ask(request, self.timeout_s - entry.spent_s)
        except WorkerFailed as failure:
            if failure.status == "timeout":
                failure.error += " (what --timeout left)"
            raise
        finally:
            entry.spent_s += time.monotonic() - started

    def attempt(self, entry: Entry, request: CheckCase | TakeTurn) -> Reply | None:
        """Do the same, counted as a turn of progress; a failure is stored and ends the case: None."""
        try:
            reply = self.ask(entry, request)
        except WorkerFailed as failure:
            self.fail(entry, failure)
            return None
        self._progress.advance(turn_seconds(entry.plan), entry.case.strategy)
        return reply

    def judge(self, requests: Iterable[tuple[Entry, Judge]]) -> None:
        """Have cases judged side by side, each within the time it has left; a failure is stored and ends its case."""
        started, judging = time.monotonic(), []
        for entry, request in requests:
            try:
                worker = self.loaded(entry.key)
            except WorkerFailed as failure:
                self.fail(entry, failure)
            else:
                worker.send(request)
                judging.append((entry, worker))
        for entry, worker in judging:
            try:
                reply = worker.receive(self.timeout_s - entry.spent_s - (time.monotonic() - started))
            except WorkerFailed as failure:
                self.fail(entry, failure)
            else:
                assert isinstance(reply, Judged)
                entry.spent_s += reply.spent_s  # not what it waited here for the one before it

    def fail(self, entry: Entry, failure: WorkerFailed, prefix: str = "") -> None:
        """Store why a case ends here, and say it."""
        entry.live = False
        error = prefix + failure.error
        self._writer.append(
            Failure(
                case=entry.case.key,
                process=self.process,
                status=failure.status,
                error=error,
                tokens_match=failure.tokens_match,
                worker_died=not failure.alive and failure.status != "timeout",
            )
        )
        self._progress.say(f"{failure.status}: {self.name(entry.case)}: {error}")

    def _load_request(self, key: WorkerKey) -> Load:
        strategy, naive_logits, prefill_quantized = key
        return Load(
            group=self.group,
            strategy=strategy,
            naive_logits=naive_logits,
            seed=self.seed,
            prefill_quantized=prefill_quantized,
            kernels=self.kernels,
        )

    def _take_loaded(self, key: WorkerKey, reply: Reply) -> None:
        if not isinstance(reply, Loaded) or reply.version != VERSION:
            raise WorkerFailed("failed", f"the worker speaks another protocol than {VERSION}", alive=True)
        self._loaded.add(key)
        self.exact |= {key} if reply.exact else set()

    def _start(self, key: WorkerKey) -> None:
        self._workers[key] = self._stack.enter_context(self._fork())
