"""Costs and bytes of a case whose architecture no formula describes."""

import pytest
import torch

from bench.measure.case_costs import with_costs
from bench.measure.plan import describe
from kvcache.strategies.catalogue import build
from tests.families import hybrid
from tests.handmade import make_case

SPEC = "py:tests.families:hybrid"


@pytest.mark.parametrize("strategy", ["dynamic", "static"])
def test_states_are_predicted_as_they_are_measured(strategy: str) -> None:
    case = make_case(strategy, 12, model=SPEC, batch_size=2, n_gen=4)
    planned = with_costs(case, describe(SPEC, ""))
    measured = build(strategy, hybrid())
    measured.prepare(2, case.capacity)
    measured.generate(torch.ones((2, 12), dtype=torch.long), 4)
    assert planned.decode is not None
    assert planned.kv_bytes_allocated is not None
    assert planned.decode.kv_bytes == measured.kv_bytes
    assert planned.kv_bytes_allocated["decode"] == measured.kv_bytes_allocated
    assert (planned.decode.forward_calls, planned.decode.tokens_processed) == (3, 6)


def test_naive_multiplies_the_whole_sequence_again() -> None:
    plans = [with_costs(make_case(name, 12, model=SPEC, n_gen=4), describe(SPEC, "")) for name in ("naive", "dynamic")]
    naive, cached = (plan.decode for plan in plans)
    assert naive is not None
    assert cached is not None
    assert naive.kv_bytes == 0
    assert naive.tokens_processed == 13 + 14 + 15
    assert naive.flops > 2 * cached.flops


def test_a_kind_that_nothing_is_known_of_says_so() -> None:
    planned = with_costs(make_case("fp8", 12, model=SPEC, n_gen=4), describe(SPEC, ""))
    assert (planned.prefill, planned.decode, planned.kv_bytes_allocated) == (None, None, None)
    assert planned.unpredicted == "nothing is known of the bytes of fp8 on this model"
