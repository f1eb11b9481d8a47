"""Rough times before anything is measured, for `--dry-run` and for the share of a run that is done."""

from __future__ import annotations

from bench.case import Case, naive_steps
from bench.record import CasePlan
from kvcache.arithmetic.costs import Costs
from kvcache.strategies.catalogue import REFEEDING


def turn_seconds(item: CasePlan) -> float:
    """A rough time of one turn, before anything is measured: only its proportion between cases is used later."""
    if item.prefill is None:
        return 1.0
    seconds = _seconds(item.prefill, item.case)
    if item.decode is not None:
        share = 1.0
        if item.case.strategy in REFEEDING:
            share = len(naive_steps(item.case)) / (item.case.n_gen - 1)
        seconds += share * _seconds(item.decode, item.case)
    return seconds


def _seconds(costs: Costs, case: Case) -> float:
    """A middling machine: a core multiplies 80 GFLOP/s and streams 7 GB/s, a forward's own overhead is 15 ms."""
    cuda = case.device == "cuda"
    flops_per_s = 1e14 if cuda else 8e10 * case.n_threads
    bytes_per_s = 1e12 if cuda else 7e9 * case.n_threads
    return max(costs.flops / flops_per_s, costs.bytes / bytes_per_s) + 15e-3 * costs.forward_calls
