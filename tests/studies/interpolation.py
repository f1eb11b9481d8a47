"""Compares naive decode timed at every k-th position with every position timed, paired round by round (minutes).

Prints the ratio of the two TPOTs with its 95 % interval. No time is asserted.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from torch import Tensor

from bench.analysis.estimators import paired_ratio
from bench.case import Case, naive_steps
from bench.machine.affinity import usable_cores
from bench.naming import namer
from bench.protocol import TakeTurn, TurnTaken
from bench.worker import Worker
from tests.studies.overhead import suite_worker


def thinned_ms(worker: Worker) -> float:
    """TPOT as the suite gets it: the timed steps, interpolated linearly."""
    taken = worker.answer(TakeTurn())
    assert isinstance(taken, TurnTaken)
    every = np.arange(1, worker.case.n_gen)
    return float(np.interp(every, taken.steps, taken.step_ns).mean()) / 1e6


def full_ms(worker: Worker) -> float:
    """TPOT with every step computed and timed."""
    stamps: list[float] = []

    def stamp(token: Tensor, logits: Tensor) -> None:
        stamps.append(time.perf_counter())

    worker.strategy.reset()
    worker.strategy.generate(worker.prompt, worker.case.n_gen, stamp)
    return (stamps[-1] - stamps[0]) * 1e3 / (worker.case.n_gen - 1)


def main() -> None:
    """Measure, and print one line per prompt length."""
    parser = argparse.ArgumentParser(
        prog="nox -s study -- interpolation", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--n-prompt", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    for n_prompt in arguments.n_prompt:
        case = Case(
            model=arguments.model,
            strategy="naive",
            device="cpu",
            dtype="float32",
            attn_implementation="sdpa",
            n_threads=usable_cores(),
            batch_size=1,
            n_prompt=n_prompt,
            n_gen=32,
            n_depth=0,
            seed=0,
        )
        with tempfile.TemporaryDirectory() as folder:
            worker = suite_worker(case, Path(folder))
        thinned: list[float] = []
        full: list[float] = []
        for number in range(arguments.rounds):
            for first in (True, False) if number % 2 == 0 else (False, True):
                (thinned if first else full).append((thinned_ms if first else full_ms)(worker))
        ratio = paired_ratio(thinned, full)
        interval = "too few rounds" if ratio.low is None else f"[{ratio.low:.4f}, {ratio.high:.4f}]"
        steps = f"{len(naive_steps(case))} of {case.n_gen - 1} steps timed"
        print(f"{namer([case])(case)}: {steps}, thinned / full TPOT {ratio.estimate:.4f} {interval}")


if __name__ == "__main__":
    main()
