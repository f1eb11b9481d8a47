import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.analysis import pairwise
from bench.analysis.pairwise import kth_sum


@settings(max_examples=40)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 2**32), st.booleans(), st.data())
def test_a_sum_is_the_one_that_sorting_all_of_them_finds(m, n, seed, in_steps, data):
    random = np.random.default_rng(seed)
    x, y = (np.sort(random.normal(0, 0.1, size)) for size in (m, n))
    if in_steps:
        x, y = np.round(x, 1), np.round(y, 1)
    everything = np.sort(np.add.outer(x, y).ravel())
    once = np.sort((x[:, None] + x)[np.triu_indices(m)])
    k, j = data.draw(st.integers(1, len(everything))), data.draw(st.integers(1, len(once)))
    assert kth_sum(x, y, k) == pytest.approx(everything[k - 1], abs=1e-11)
    assert kth_sum(x, x, j, triangle=True) == pytest.approx(once[j - 1], abs=1e-11)


@pytest.mark.parametrize("share", [0.001, 0.47, 0.5, 0.999])
def test_a_large_sample_begins_near_the_answer(monkeypatch, share):
    monkeypatch.setattr(pairwise, "LARGE", 1200)
    x = np.sort(np.random.default_rng(0).exponential(0.1, 1500))
    once = np.sort((x[:, None] + x)[np.triu_indices(1500)])
    k = int(share * len(once))
    assert kth_sum(x, x, k, triangle=True) == pytest.approx(once[k - 1], rel=1e-12)
