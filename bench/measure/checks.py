"""Proves the tokens of a cell's cases before any of their times, and stores each check with its framework's time."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.errors import UsageError, blaming
from bench.machine.places import temporary_folder
from bench.measure.progress import ProgressBar
from bench.measure.texts import Texts
from bench.measure.worker_process import WorkerFailed
from bench.measure.workers import Entry, WorkerKey, Workers
from bench.protocol import CheckCase, Checked, FrameworkTimed, Judge, MakeReference, TimeFramework
from bench.record import Check
from bench.store.checked_lines import Appender
from kvcache.strategies.catalogue import COMPILING, LOSSY, is_lossy


class Checks:
    """Checks the cases of one group in one set of processes."""

    def __init__(
        self, workers: Workers, writer: Appender, progress: ProgressBar, texts: Texts, *, sole_model: bool = False
    ) -> None:
        """With `sole_model` nothing else is planned and nothing stored: a model without a reference ends the run."""
        self._workers, self._writer, self._progress, self._texts = workers, writer, progress, texts
        self._sole_model = sole_model
        self._framework: dict[tuple[WorkerKey, int], list[int] | None] = {}
        """What steps without arithmetic take, by worker and batch size."""

    def prove(self, entries: Sequence[Entry], tokens_per_turn: int) -> None:
        """Check the tokens of every case of a cell; a case fails that emits others."""
        with temporary_folder() as scratch:
            reference = self._reference(entries, scratch)
            lossy = [
                entry
                for entry in entries  # a user's cache may promise to be exact
                if entry.live and is_lossy(entry.case.strategy) and entry.key not in self._workers.exact
            ]
            written_by = self._judge(lossy, reference, scratch) if lossy else ""
            for entry in entries:
                if entry.live:
                    request = CheckCase(case=entry.case, path=reference, tokens_per_turn=tokens_per_turn)
                    self._check(entry, request, written_by)

    def store(self, entry: Entry) -> None:
        """Store the check of a case, with what its framework takes: timed in a worker that has warmed up."""
        if entry.check is not None:
            step_ns = self._framework_step_ns(entry) if entry.live else None
            self._writer.append(msgspec.structs.replace(entry.check, framework_step_ns=step_ns))

    def _reference(self, entries: Sequence[Entry], scratch: Path) -> str:
        """Have the cell's expected tokens and logits made; without them no case of it can be proved, or timed."""
        path = str(scratch / "reference.safetensors")
        sole_model, self._sole_model = self._sole_model, False  # whatever comes of this cell is stored
        try:
            self._workers.ask_reference(MakeReference(case=entries[0].case, path=path))
        except WorkerFailed as failure:
            if failure.of_model and sole_model:
                raise UsageError(blaming("--model", entries[0].case.model, failure.error)) from None
            for entry in entries:
                self._workers.fail(entry, failure, "the reference (one parallel forward) failed: ")
        return path

    def _judge(self, lossy: Sequence[Entry], reference: str, scratch: Path) -> str:
        """Have the lossy cases of a cell judged over a text, and return who wrote it; they fail where that does."""
        text = str(scratch / "text.safetensors")
        try:
            written_by = self._texts.make(lossy[0].case, text, self._workers)
        except WorkerFailed as failure:
            for entry in lossy:
                self._workers.fail(entry, failure, "making the text that judges it failed: ")
            return ""
        for together in _side_by_side(lossy):
            n_threads = together[0].case.n_threads // len(together)
            self._workers.judge(
                [(entry, Judge(case=entry.case, path=reference, text=text, n_threads=n_threads)) for entry in together]
            )
        return written_by

    def _check(self, entry: Entry, request: CheckCase, written_by: str) -> None:
        found = self._workers.attempt(entry, request)
        if not isinstance(found, Checked):
            return
        entry.check = Check(case=entry.case.key, process=self._workers.process, **msgspec.structs.asdict(found))
        if found.quality is not None:
            quality = msgspec.structs.replace(found.quality, writer=written_by)
            entry.check = msgspec.structs.replace(entry.check, quality=quality)
        if found.tokens_match == "false" and not is_lossy(entry.case.strategy):
            expected = "naive's" if found.reference_by_naive else "the parallel forward's"
            error = f"logits differ from {expected} by {found.logits_error:.1e} of the largest logit"
            if found.depends_on_later:
                error += ": earlier positions of this model depend on later ones, and a cache keeps them as they were"
            elif found.reference_rounding:
                error += (
                    f"; rounding in {entry.case.dtype} alone moves naive's own by {found.reference_rounding:.1e}: "
                    "compare in float32"
                )
            self._workers.fail(entry, WorkerFailed("failed", error, alive=True, tokens_match="false"))

    def _framework_step_ns(self, entry: Entry) -> list[int] | None:
        """Time the framework in the worker's steps: once for each batch, since lengths do not matter."""
        case = entry.case
        if case.n_gen == 1:
            return None
        batch = entry.key, case.batch_size
        if batch not in self._framework:
            self._framework[batch] = None
            try:
                found = self._workers.ask(entry, TimeFramework())
            except WorkerFailed as failure:
                if failure.alive:  # the case itself is none the worse
                    self._progress.say(f"no framework_ms for {self._workers.name(case)}: {failure.error}")
                else:
                    self._workers.fail(entry, failure, "timing the framework: ")
            else:
                assert isinstance(found, FrameworkTimed)
                self._framework[batch] = found.step_ns
        return self._framework[batch]


def _side_by_side(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Divide the cases that are judged into those that share the threads, since half of a small step is no arithmetic.

    Alone are compiled code, which runs on the number of threads that it was compiled for, a user's cache, which is to
    find torch's settings as they are timed, and what runs on a GPU, which has one queue.
    """
    sharing = [e for e in entries if e.case.strategy in LOSSY - COMPILING and e.case.on_host]
    size = entries[0].case.n_threads
    shared = [sharing[first : first + size] for first in range(0, len(sharing), size)]
    return shared + [[entry] for entry in entries if entry not in sharing]
