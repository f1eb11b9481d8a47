"""What an interrupted run holds already, and so what is left to measure."""

from __future__ import annotations

from collections.abc import Sequence

from bench.case import Case
from bench.record import CasePlan, Run


class Past:
    """What an interrupted run holds already; nothing of a new one."""

    def __init__(self, run: Run | None) -> None:
        self._rounds: dict[tuple[str, int], set[int]] = {}
        self._failed: set[tuple[str, int]] = set()
        self.turns = 0
        if run is not None:
            for sample in run.samples:
                self.turns = max(self.turns, sample.order + 1)
                if not sample.warmup:
                    self._rounds.setdefault((sample.case, sample.process), set()).add(sample.round)
            for taken in run.ceilings:  # they too have used up the number of a torn round
                self.turns = max(self.turns, taken.order + 1)
                if not taken.warmup:
                    self._rounds.setdefault((taken.cell, taken.process), set()).add(taken.round)
            self._failed = {(failure.case, failure.process) for failure in run.failures if not failure.worker_died}

    def failed(self, case: Case, process: int) -> bool:
        """Return whether a failure of the case is stored that is its result: only a dead worker is tried again."""
        return (case.key, process) in self._failed

    def next_round(self, cell: Sequence[CasePlan], process: int) -> int:
        """Return the first round number that neither a case nor a ceiling of the cell has used."""
        keys = [cell[0].case.cell.key, *(item.case.key for item in cell)]
        used = [self._rounds.get((key, process), set()) for key in keys]
        return max((number + 1 for rounds in used for number in rounds), default=0)

    def missing_rounds(self, cell: Sequence[CasePlan], process: int, repetitions: int) -> int:
        """Return the number of rounds still to do.

        A round counts once every case of the cell that has not failed has its turn in it: the others were torn by the
        interruption, and a pair is never made of two sessions.
        """
        live = [item.case.key for item in cell if not self.failed(item.case, process)]
        if not live:
            return 0
        complete = set.intersection(*(self._rounds.get((key, process), set()) for key in live))
        return max(0, repetitions - len(complete))
