"""Measures pair after pair of an A/B until every quantity is decided or the time is up. Knows no clock of its own."""

from collections import deque
from collections.abc import Callable, Sequence

from bench.ab.record import PairFailure, PairTimes
from bench.ab.verdicts import MOST_PAIRS, Logs, note, quantities_of, standing
from bench.case import Case
from bench.judge.sequential import PAIRS_A_PROMPT, SCREENING_PAIRS
from bench.naming import plural


def conduct(
    cases: Sequence[Case],
    measure: Callable[[int, Sequence[Case]], list[PairTimes | PairFailure]],
    *,
    threshold: float,
    cores: int,
    budget_s: float,
    clock: Callable[[], float],
    say: Callable[[str], None],
    get_ready: Callable[[int], None] | None = None,
) -> list[PairTimes | PairFailure]:
    """Measure pair after pair (`measure(number, cases)`) of what is still open, until all is decided or time is up.

    No pair is begun that would end after `budget_s` if it took as long per case as the slowest of the last
    `PAIRS_A_PROMPT`: one of them had new prompts, and made their references. `get_ready(number)` comes before
    each pair; what it takes is no part of that pace. `cores` are those of `bench.ab.verdicts.verdicts`.
    """
    started = clock()
    records: list[PairTimes | PairFailure] = []
    quantities, logs = quantities_of(cases), Logs()
    paces: deque[float] = deque(maxlen=PAIRS_A_PROMPT)
    failed: set[str] = set()

    def is_too_late(number: int, n_cases: int) -> bool:
        return number > 0 and clock() - started + max(paces) * n_cases > budget_s

    for number in range(MOST_PAIRS):
        left = standing(logs, quantities, number, threshold)
        wanted = list(dict.fromkeys(quantity.case for quantity in left.open if quantity.case.key not in failed))
        if not wanted or is_too_late(number, len(wanted)):
            break
        if get_ready is not None:
            get_ready(number)
            if is_too_late(number, len(wanted)):
                break
        began = clock()
        n_open = sum(quantity.case in wanted for quantity in left.open)
        say(_progress(number, wanted, n_open, len(quantities), max(0.0, budget_s - (began - started))))
        taken = measure(number, wanted)
        paces.append((clock() - began) / len(wanted))
        records += taken
        note(logs, quantities, taken, cores)
        failed |= {record.case for record in taken if isinstance(record, PairFailure)}
    return records


def _progress(number: int, cases: Sequence[Case], n_open: int, n_all: int, left_s: float) -> str:
    """Describe what comes next, as in `process pair 5, confirming: 3 of 8 times open, in 2 cases; 4.2 min left`."""
    what = "screening" if number < SCREENING_PAIRS else "confirming"
    in_cases = f"in {plural(len(cases), 'case')}"
    return f"process pair {number + 1}, {what}: {n_open} of {n_all} times open, {in_cases}; {left_s / 60:.1f} min left"
