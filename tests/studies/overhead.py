"""Compares `dynamic` as kvbench times it with a bare hand-written loop: the cost of measuring (minutes).

Both run in one process on the same weights and take turns in the same rounds, in alternating directions, with
hf-generate as a third. Prints paired ratios with their 95 % intervals. No time is asserted.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import torch
from transformers import DynamicCache

from bench.analysis.estimators import paired_ratio
from bench.case import Case
from bench.machine.affinity import usable_cores
from bench.measure.server_process import worker_environment
from bench.naming import namer
from bench.protocol import CheckCase, Checked, Load, Loaded, MakeReference, TakeTurn, TurnTaken
from bench.worker import Worker

T = TypeVar("T")

Times = tuple[float, float]
"""TTFT and TPOT of one turn, in ms."""


def suite_worker(case: Case, folder: Path) -> Worker:
    """A worker of the suite, loaded and checked, ready to take turns."""
    worker, path = Worker(), str(folder / f"{case.strategy}.safetensors")
    load = Load(group=case.group, strategy=case.strategy, naive_logits=case.naive_logits, seed=case.seed)
    if not isinstance(worker.answer(load), Loaded):
        raise SystemExit(f"{case.model} cannot be loaded")
    worker.answer(MakeReference(case=case, path=path))
    checked = worker.answer(CheckCase(case=case, path=path))
    if not (isinstance(checked, Checked) and checked.tokens_match == "true"):
        raise SystemExit(f"{case.strategy} is not correct here: {checked}")
    return worker


def suite_turn(worker: Worker) -> Times:
    """One turn as the suite takes it."""
    taken = worker.answer(TakeTurn())
    assert isinstance(taken, TurnTaken)
    return taken.prefill_ns / 1e6, sum(taken.step_ns) / 1e6 / len(taken.step_ns)


def bare_turn(worker: Worker) -> Callable[[], Times]:
    """The loop that anybody would write, on the same model and prompt."""
    model, prompt, n_gen = worker.model, worker.prompt, worker.case.n_gen

    @torch.inference_mode()
    def turn() -> Times:
        cache = DynamicCache(config=model.config)
        start = time.perf_counter()
        token = model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        first = time.perf_counter()
        for _ in range(n_gen - 1):
            token = model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        last = time.perf_counter()
        return (first - start) * 1e3, (last - first) * 1e3 / (n_gen - 1)

    return turn


def main() -> None:
    """Measure, and print one line per phase and pair."""
    parser = argparse.ArgumentParser(
        prog="nox -s study -- overhead", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--n-prompt", type=int, default=128)
    parser.add_argument("--n-gen", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=24)
    arguments = parser.parse_args()
    case = Case(
        model=arguments.model,
        strategy="dynamic",
        device="cpu",
        dtype="float32",
        attn_implementation="sdpa",
        n_threads=usable_cores(),
        batch_size=1,
        n_prompt=arguments.n_prompt,
        n_gen=arguments.n_gen,
        n_depth=0,
        seed=0,
    )
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:  # start again, set up as every worker is
        os.execve(sys.executable, sys.orig_argv, worker_environment(case.n_threads))  # noqa: S606  # no shell is wanted
    with tempfile.TemporaryDirectory() as folder:
        dynamic = suite_worker(case, Path(folder))
        hf_generate = suite_worker(msgspec.structs.replace(case, strategy="hf-generate"), Path(folder))
    arms: dict[str, Callable[[], Times]] = {
        "dynamic": partial(suite_turn, dynamic),
        "bare loop": bare_turn(dynamic),
        "hf-generate": partial(suite_turn, hf_generate),
    }
    times: dict[str, list[Times]] = {name: [] for name in arms}
    for number in range(-3, arguments.rounds):
        for name in turns(list(arms), number):
            taken = arms[name]()
            if number >= 0:
                times[name].append(taken)
    print(f"{case.model}, {namer([case])(case)}, {case.n_threads} threads, {arguments.rounds} rounds")
    for phase, name in enumerate(("TTFT", "TPOT")):
        for other in ("bare loop", "hf-generate"):
            ratio = paired_ratio([t[phase] for t in times["dynamic"]], [t[phase] for t in times[other]])
            interval = "too few rounds" if ratio.low is None else f"[{ratio.low:.4f}, {ratio.high:.4f}]"
            print(f"{name} of dynamic / {other}: {ratio.estimate:.4f} {interval}")


def turns(names: list[T], number: int) -> list[T]:
    """The order of a round: everyone is first, middle and last equally often, in both directions."""
    start = number // 2 % len(names)
    order = names[start:] + names[:start]
    return order if number % 2 == 0 else order[::-1]


if __name__ == "__main__":
    main()
