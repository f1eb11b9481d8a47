"""Counts the counter gate's false alarms on an unchanged tree, and whether it finds planted extra work (minutes)."""

import argparse
import time
from functools import partial
from multiprocessing import Pool

from bench.analysis.tidy import Tidy
from bench.judge.baseline import session_of
from bench.machine.affinity import usable_cores
from bench.store.sessions import Session
from kvcache.strategies.cached import Dynamic
from tests.planted import PLANTED, alarms, counted


def is_alarm(base: Session, _number: int) -> bool:
    """Count the unchanged strategy again and judge it against `base`: one decision."""
    return bool(alarms(counted(Dynamic), base))


def main() -> None:
    """Print both, and fail if there is a false alarm or a planted extra was missed."""
    parser = argparse.ArgumentParser(prog="nox -s study -- counter_decisions", description=__doc__)
    parser.add_argument("--decisions", type=int, default=1000, help="on the unchanged tree [default: 1000]")
    n, begin = parser.parse_args().decisions, time.monotonic()
    base = session_of(Tidy.of(counted(Dynamic)))
    with Pool(usable_cores()) as pool:
        false = sum(pool.imap_unordered(partial(is_alarm, base), range(n), chunksize=10))
    print(f"unchanged tree: {false} alarms in {n} decisions, each counted anew ({time.monotonic() - begin:.0f} s)")
    missed = 0
    for name, (proper, mutant, counter) in PLANTED.items():
        found = {verdict.quantity for verdict in alarms(counted(mutant), session_of(Tidy.of(counted(proper))))}
        missed += counter not in found
        print(f"{name}: {'caught' if counter in found else 'MISSED'} ({', '.join(sorted(found))})")
    print(f"{time.monotonic() - begin:.0f} s in all")
    raise SystemExit(bool(false or missed))


if __name__ == "__main__":
    main()
