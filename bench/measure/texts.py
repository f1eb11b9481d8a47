"""The texts that judge lossy strategies: the user's own, or one that the model writes, once for all of its cells."""

from collections.abc import Sequence

from bench.case import Case
from bench.manifest import CasePlan, TextFile
from bench.measure.resume import Past
from bench.measure.worker_process import WorkerFailed
from bench.measure.workers import Workers
from bench.protocol import MakeText, TextMade
from bench.record import FILE, Text
from bench.store.checked_lines import Appender
from kvcache.strategies.catalogue import COMPILING, PLAIN, PLAIN_CACHE, is_lossy


class Texts:
    """Has a text written by the fastest exact strategy for the longest cell, stores it, and gives it to every cell.

    Where that fails (its worker dies, or takes longer than --timeout), `dynamic` writes one, and where that fails, one
    of the length that a cell needs itself.
    """

    def __init__(self, plans: Sequence[CasePlan], past: Past, writer: Appender, file: TextFile | None) -> None:
        """Know what an interrupted run wrote; `file` stands for what the model would write."""
        self._cases = {item.case.key: item.case for item in plans}
        self._past, self._writer, self._file = past, writer, file
        self._failed: dict[Case, tuple[int, WorkerFailed]] = {}
        """The shortest context for which no text could be written, and why, by `Case.text`."""

    def make(self, case: Case, path: str, workers: Workers) -> str:
        """Have the text of a lossy case stored at `path`, with the exact predictions; return who wrote it.

        Raises:
            WorkerFailed: the model cannot do that.
        """
        if self._file is not None:
            flat = self._file.tokens[case.model]
            n = len(flat) // case.batch_size
            rows = [flat[row * n : (row + 1) * n] for row in range(case.batch_size)]
            workers.ask_reference(MakeText(case=case, path=path, tokens=rows))
            return FILE
        alike = [other for other in self._cases.values() if other.text == case.text]
        own = case.n_depth + case.n_prompt
        for text in self._past.texts:
            if self._cases[text.case] in alike and (text.n_context is None or text.n_context >= own):
                workers.ask_reference(MakeText(case=case, path=path, tokens=text.tokens))
                return text.writer
        lossy = [other for other in alike if is_lossy(other.strategy) and not self._left_out(other)]
        longest = max(other.n_depth + other.n_prompt for other in lossy)
        fastest = PLAIN[any(other.strategy in COMPILING for other in alike)]
        for n_context, writer in dict.fromkeys([(longest, fastest), (longest, PLAIN_CACHE), (own, PLAIN_CACHE)]):
            if case.text not in self._failed or n_context < self._failed[case.text][0]:
                request = MakeText(case=case, path=path, writer=writer, n_context=n_context)
                try:
                    return self._written(request, workers)
                except WorkerFailed as failure:
                    if writer == PLAIN_CACHE:
                        self._failed[case.text] = n_context, failure
        raise self._failed[case.text][1]

    def _left_out(self, case: Case) -> bool:
        """Return whether `--budget` leaves out the case's cell, as far as that is decided."""
        plan = self._past.cell_plans.get(case.cell.key)
        return plan is not None and plan.left_out is not None

    def _written(self, request: MakeText, workers: Workers) -> str:
        """Have a new text written and store it; return who wrote it. Raises WorkerFailed."""
        made = workers.ask_reference(request)
        assert isinstance(made, TextMade)
        text = Text(case=request.case.key, writer=made.writer, n_context=request.n_context, tokens=made.tokens)
        self._past.texts.append(text)
        self._writer.append(text)
        return text.writer
