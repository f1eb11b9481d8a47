"""Which rounds of a run were measured, which of them are whole, and how many are still missing."""

from collections.abc import Collection

import numpy as np

from bench.analysis.disturbance import COUNTED, is_disturbed
from bench.analysis.frames import wall_ns
from bench.record import CellPlan, Run, Sample
from bench.turns import NONE, Turns, alike


class Rounds:
    """The measured rounds of a run, warm-ups left out; none of a run that is None."""

    def __init__(self, run: Run | None) -> None:
        self.measured: dict[tuple[str, int], set[int]] = {}
        """(case key, process) -> the numbers of its rounds."""
        self.disturbed: dict[tuple[str, int], set[int]] = {}
        """Those of its rounds that do not count."""
        if run is None:
            return
        samples = Turns.of(Sample, run.samples)
        cases, process, number = samples.coded("case"), samples.ints("process"), samples.ints("round")
        planned = {item.case.key: item.case for item in run.manifest.plan}
        facts = [(planned[key].n_threads, run.environment(planned[key]).cores) for key in cases.distinct]
        n_threads, cores = np.array(facts, dtype=np.int64).reshape(-1, 2)[cases.codes].T
        known = {name: np.where(samples.ints(name) == NONE, 0, samples.ints(name)) for name in COUNTED}
        disturbed = is_disturbed(**known, wall_ns=wall_ns(samples), n_threads=n_threads, cores=cores)
        timed = np.flatnonzero(samples.ints("warmup") == 0)
        for places in alike(cases.codes[timed], process[timed]):
            turns = timed[places]
            key = cases.distinct[cases.codes[turns[0]]], int(process[turns[0]])
            self.measured[key] = set(number[turns].tolist())
            self.disturbed[key] = set(number[turns[disturbed[turns]]].tolist())

    def count(self, cases: Collection[str], process: int) -> tuple[int, int]:
        """Return how many rounds have a turn of each of `cases` (keys), and how many of those are undisturbed."""
        if not cases:
            return 0, 0
        complete = set.intersection(*(self.measured.get((key, process), set()) for key in cases))
        torn = set.union(*(self.disturbed.get((key, process), set()) for key in cases))
        return len(complete), len(complete - torn)

    def missing(self, cases: Collection[str], process: int, repetitions: int) -> int:
        """Return how many rounds of `cases` (keys) are still to do, if none of them is disturbed."""
        complete, whole = self.count(cases, process)
        return max(0, min(repetitions - whole, most_rounds(repetitions) - complete))


def most_rounds(repetitions: int) -> int:
    """Return the most rounds of a cell: those that were disturbed are replaced, up to half as many again."""
    return repetitions + repetitions // 2


def planned_rounds(plan: CellPlan | None, repetitions: int) -> int:
    """Return the rounds that a cell is to have: `repetitions`, unless `--budget` decided otherwise."""
    if plan is None:
        return repetitions
    return 0 if plan.left_out else plan.repetitions
