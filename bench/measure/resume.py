"""What an interrupted run holds already, and so what is left to measure."""

from __future__ import annotations

from collections.abc import Sequence

from bench.analysis.disturbance import is_disturbed
from bench.case import Case
from bench.machine.affinity import usable_cores
from bench.record import CasePlan, CellPlan, Run, Sample


class Past:
    """What an interrupted run holds already; nothing of a new one."""

    def __init__(self, run: Run | None) -> None:
        self._rounds: dict[tuple[str, int], set[int]] = {}
        self._disturbed: set[tuple[str, int, int]] = set()
        self._failed: set[tuple[str, int]] = set()
        self.cell_plans: dict[str, CellPlan] = {}
        """What `--budget` left of each cell, by `Case.cell.key`; those decided in this run are added."""
        self.turns = 0
        if run is not None:
            threads = {item.case.key: item.case.n_threads for item in run.manifest.plan}
            for sample in run.samples:
                self.turns = max(self.turns, sample.order + 1)
                if not sample.warmup:
                    self._rounds.setdefault((sample.case, sample.process), set()).add(sample.round)
                    if sample_is_disturbed(sample, threads[sample.case]):
                        self._disturbed.add((sample.case, sample.process, sample.round))
            for taken in run.ceilings:  # they too have used up the number of a torn round
                self.turns = max(self.turns, taken.order + 1)
                if not taken.warmup:
                    self._rounds.setdefault((taken.cell, taken.process), set()).add(taken.round)
            self._failed = {(failure.case, failure.process) for failure in run.failures if not failure.worker_died}
            self.cell_plans = {plan.cell: plan for plan in run.cell_plans}

    @property
    def spent_s(self) -> float:
        """Seconds of the budget that were spent, as far as they are stored."""
        return max((plan.spent_s for plan in self.cell_plans.values()), default=0.0)

    def failed(self, case: Case, process: int) -> bool:
        """Return whether a failure of the case is stored that is its result: only a dead worker is tried again."""
        return (case.key, process) in self._failed

    def next_round(self, cell: Sequence[CasePlan], process: int) -> int:
        """Return the first round number that neither a case nor a ceiling of the cell has used."""
        keys = [cell[0].case.cell.key, *(item.case.key for item in cell)]
        used = [self._rounds.get((key, process), set()) for key in keys]
        return max((number + 1 for rounds in used for number in rounds), default=0)

    def rounds(self, cell: Sequence[CasePlan], process: int) -> tuple[int, int]:
        """Return the number of complete rounds, and how many of them no case was disturbed in.

        A round is complete if every case of the cell that has not failed has its turn in it: the others were torn by
        the interruption, and a pair is never made of two sessions.
        """
        live = [item.case.key for item in cell if not self.failed(item.case, process)]
        if not live:
            return 0, 0
        complete = set.intersection(*(self._rounds.get((key, process), set()) for key in live))
        whole = [n for n in complete if not any((key, process, n) in self._disturbed for key in live)]
        return len(complete), len(whole)

    def missing_rounds(self, cell: Sequence[CasePlan], process: int, repetitions: int) -> int:
        """Return the number of rounds still to do, if none of them is disturbed."""
        plan = self.cell_plans.get(cell[0].case.cell.key)
        if plan is not None:
            repetitions = 0 if plan.left_out else plan.repetitions
        if all(self.failed(item.case, process) for item in cell):
            return 0
        complete, whole = self.rounds(cell, process)
        return max(0, min(repetitions - whole, most_rounds(repetitions) - complete))


def most_rounds(repetitions: int) -> int:
    """Return the most rounds of a cell: those that were disturbed are replaced, up to half as many again."""
    return repetitions + repetitions // 2


def sample_is_disturbed(sample: Sample, n_threads: int) -> bool:
    """Return whether a turn does not count, by the rule of every table."""
    covariates = sample.covariates
    wall_ns = sample.prefill_ns + sum(sample.step_ns)
    lost_ns = (covariates.steal_ns or 0) + (covariates.throttled_ns or 0)
    threads = min(n_threads, usable_cores())
    return bool(is_disturbed(lost_ns, wall_ns, threads, covariates.gpu_throttle_reasons or 0))
