"""What an interrupted run holds already, and so what is left to measure."""

from collections.abc import Iterator, Sequence

from bench.analysis.rounds import Rounds, planned_rounds
from bench.case import Case, Group
from bench.manifest import CasePlan
from bench.measure.plan import Limits
from bench.record import CellPlan, Run, Text


class Past:
    """What an interrupted run holds already; nothing of a new one."""

    def __init__(self, run: Run | None) -> None:
        self._rounds = Rounds(run)
        self._ceilings: dict[tuple[str, int], set[int]] = {}
        self._failed: set[tuple[str, int]] = set()
        self.cell_plans: dict[str, CellPlan] = {}
        """What `--budget` left of each cell, by `Case.cell.key`; those decided in this run are added."""
        self.texts: list[Text] = []
        """Those that were written; a text that is written in this run is added."""
        self.turns = 0
        if run is not None:
            orders = [*(sample.order for sample in run.samples), *(taken.order for taken in run.ceilings)]
            self.turns = max(orders, default=-1) + 1
            for taken in run.ceilings:  # they too have used up the number of a torn round
                if not taken.warmup:
                    self._ceilings.setdefault((taken.cell, taken.process), set()).add(taken.round)
            self._failed = {(failure.case, failure.process) for failure in run.failures if not failure.worker_died}
            self.cell_plans = {plan.cell: plan for plan in run.cell_plans}
            self.texts = list(run.texts)

    @property
    def spent_s(self) -> float:
        """Seconds of the budget that were spent, as far as they are stored."""
        return max((plan.spent_s for plan in self.cell_plans.values()), default=0.0)

    def failed(self, case: Case, process: int) -> bool:
        """Return whether a failure of the case is stored that is its result: only a dead worker is tried again."""
        return (case.key, process) in self._failed

    def next_round(self, cell: Sequence[CasePlan], process: int) -> int:
        """Return the first round number that neither a case nor a ceiling of the cell has used."""
        used = [self._rounds.measured.get((item.case.key, process), set()) for item in cell]
        used.append(self._ceilings.get((cell[0].case.cell.key, process), set()))
        return max((number + 1 for rounds in used for number in rounds), default=0)

    def rounds(self, cell: Sequence[CasePlan], process: int) -> tuple[int, int]:
        """Return the number of complete rounds, and how many of them no case was disturbed in.

        A round is complete if every case of the cell that has not failed has its turn in it: the others were torn by
        the interruption, and a pair is never made of two sessions.
        """
        return self._rounds.count(self._live(cell, process), process)

    def missing_rounds(self, cell: Sequence[CasePlan], process: int, repetitions: int) -> int:
        """Return the number of rounds still to do, if none of them is disturbed."""
        live = self._live(cell, process)
        plan = self.cell_plans.get(cell[0].case.cell.key)
        return self._rounds.missing(live, process, planned_rounds(plan, repetitions)) if live else 0

    def pending(self, plans: Sequence[CasePlan], limits: Limits) -> Iterator[tuple[Group, int, list[list[CasePlan]]]]:
        """List the sets of workers still to be started, in order: group, process number, and the cells to measure."""
        for group in dict.fromkeys(item.case.group for item in plans):
            cells: dict[Case, list[CasePlan]] = {}
            for item in plans:
                if item.case.group == group:
                    cells.setdefault(item.case.cell, []).append(item)
            for process in range(limits.processes):
                todo = [cell for cell in cells.values() if self.missing_rounds(cell, process, limits.repetitions)]
                if todo:
                    yield group, process, todo

    def _live(self, cell: Sequence[CasePlan], process: int) -> list[str]:
        return [item.case.key for item in cell if not self.failed(item.case, process)]


def pending_cells(plans: Sequence[CasePlan], limits: Limits, previous: Run | None = None) -> list[list[CasePlan]]:
    """List the cells that a run would measure, one per set of processes."""
    return [cell for _, _, cells in Past(previous).pending(plans, limits) for cell in cells]
