"""What becomes of the variables for threads that a user has set."""

from __future__ import annotations

import pytest

from bench.machine.threads import binding, notice, user_variables, with_threads


def test_the_number_of_threads_is_set_and_nothing_caps_it():
    mine = {"PATH": "/bin", "OMP_NUM_THREADS": "8", "OMP_THREAD_LIMIT": "1", "OMP_DYNAMIC": "true"}
    mine |= {"OMP_PROC_BIND": "close"}
    assert with_threads(2, mine) == {
        "PATH": "/bin",
        "OMP_NUM_THREADS": "2",
        "MKL_NUM_THREADS": "2",
        "OMP_PROC_BIND": "close",
    }


def test_the_users_variables_are_those_that_concern_threads():
    mine = {"PATH": "/bin", "KMP_AFFINITY": "compact", "OMP_NUM_THREADS": "", "MKL_NUM_THREADS": "4"}
    assert user_variables(mine) == {"MKL_NUM_THREADS": "4", "KMP_AFFINITY": "compact"}


@pytest.mark.parametrize(
    ("counts", "variables", "expected"),
    [
        ({2}, {}, None),
        ({2}, {"OMP_NUM_THREADS": "2"}, None),
        ({2}, {"OMP_NUM_THREADS": "4,2"}, "OMP_NUM_THREADS=4,2 overridden (--threads decides)"),
        ({1, 2}, {"MKL_NUM_THREADS": "2"}, "MKL_NUM_THREADS=2 overridden (--threads decides)"),
        ({2}, {"OMP_THREAD_LIMIT": "1"}, "OMP_THREAD_LIMIT=1 overridden (--threads decides)"),
        ({2}, {"GOMP_CPU_AFFINITY": "0 1"}, "GOMP_CPU_AFFINITY=0 1 kept"),
        (
            {2},
            {"OMP_NUM_THREADS": "8", "OMP_PROC_BIND": "close", "OMP_WAIT_POLICY": "active"},
            "OMP_NUM_THREADS=8 overridden (--threads decides); OMP_PROC_BIND=close, OMP_WAIT_POLICY=active kept",
        ),
    ],
)
def test_one_line_says_what_is_overridden_and_what_is_kept(counts, variables, expected):
    assert notice(counts, variables) == (f"variables for threads: {expected}" if expected else None)


def test_what_binds_threads_is_named():
    assert binding({"OMP_NUM_THREADS": "2"}) is None
    assert binding({"OMP_PLACES": "cores", "OMP_PROC_BIND": "close"}) == "OMP_PROC_BIND=close, OMP_PLACES=cores"
