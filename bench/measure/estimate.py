"""Rough times before anything is measured, for `--dry-run` and for the share of a run that is done."""

from __future__ import annotations

from bench.case import Case, naive_steps
from bench.machine.devices import DEVICES
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
    """Estimate a phase on a middling machine, where a forward's own overhead is 15 ms."""
    rates = DEVICES[case.device].typical_rates(case.n_threads)
    return max(costs.flops / rates.flops_per_s, costs.bytes / rates.bytes_per_s) + 15e-3 * costs.forward_calls
