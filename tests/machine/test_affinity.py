"""Which cores a process may use: read and set, on a child of this process."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.commands.values import thread_count
from bench.errors import UsageError
from bench.machine import affinity, cgroup
from bench.machine.affinity import binding, notice, user_variables, with_threads
from tests.untraced import untraced_variables

TWO_THREADS = "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start(); print(); input()"


@pytest.fixture
def child() -> Iterator[int]:
    """A process of two threads."""
    command = [sys.executable, "-c", TWO_THREADS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinities")


@linux
def test_what_is_given_is_what_a_process_has(child):
    own = affinity.common(child)
    assert own == os.sched_getaffinity(0)
    chosen = {min(own)}
    affinity.give(child, chosen)
    assert len(list(Path(f"/proc/{child}/task").iterdir())) == 2
    assert affinity.common(child) == chosen
    assert affinity.terms(child).startswith(f"cores {min(own)} at nice ")
    affinity.give(child, own)
    assert affinity.terms(child) == affinity.terms(os.getpid())


BOUND = """
from bench.commands.values import thread_count
from bench.errors import UsageError
from bench.machine import affinity, cgroup
import ctypes, os, sys
before = os.sched_getaffinity(0)
if len(sys.argv) == 1:
    import torch
else:
    ctypes.CDLL(sys.argv[1])
assert affinity.allowed_cores() == len(before), "counted after the import"
bound = affinity.unbind()
print(len(before), len(bound or before), len(os.sched_getaffinity(0)), affinity.unbind() == bound)
"""


@linux
@pytest.mark.parametrize(
    ("name", "value", "alone"), [("OMP_PROC_BIND", "close", False), ("GOMP_CPU_AFFINITY", "0", True)]
)
def test_an_import_that_binds_changes_neither_the_count_nor_what_children_inherit(name, value, alone):
    """By torch, and by its OpenMP library alone, which is what binds and takes no seconds to load."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    libraries = sorted(Path(torch.origin).parent.glob("lib/libgomp*"))
    command = [sys.executable, "-c", BOUND, *map(str, libraries[:1] if alone else [])]
    answer = subprocess.check_output(command, text=True, env=untraced_variables() | {name: value})
    n_cores = len(os.sched_getaffinity(0))
    before, bound, after, again = answer.split()
    assert int(before) == int(after) == n_cores
    assert bound == "1"
    assert again == "True"


@linux
def test_a_thread_that_is_not_bound_is_left_alone():
    before = os.sched_getaffinity(0)
    assert affinity.unbind() is None
    assert os.sched_getaffinity(0) == before


@linux
def test_cores_that_do_not_exist_are_refused(child):
    with pytest.raises(OSError, match="Invalid argument"):
        affinity.give(child, {1023})


@linux
def test_threads_with_other_cores_have_none_in_common(child, monkeypatch):
    one_each = iter([{0}, {1}])
    monkeypatch.setattr(affinity, "_threads", lambda pid: [1, 2])
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: next(one_each))
    assert not affinity.common(child)


@pytest.mark.skipif(sys.platform != "linux", reason="what a thread does is told by proc(5)")
def test_a_process_is_at_rest_when_all_its_threads_sleep(child):
    spins = "import threading\nthreading.Thread(target=input, daemon=True).start()\nprint(flush=True)\nwhile True: pass"
    command = [sys.executable, "-c", spins]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as spinning:
        assert spinning.stdout is not None
        spinning.stdout.readline()
        assert not any(affinity.at_rest(spinning.pid) for _ in range(50))
        spinning.kill()
    deadline = time.monotonic() + 60
    while not affinity.at_rest(child):
        assert time.monotonic() < deadline


@linux
def test_a_process_that_is_gone_is_told():
    for use in (affinity.common, affinity.terms, lambda pid: affinity.give(pid, {0})):
        with pytest.raises(FileNotFoundError):
            use(2**22 + 1)


def test_waiting_for_a_core_only_grows():
    before = affinity.waited_ns(os.getpid())
    assert before is None or affinity.waited_ns(os.getpid()) >= before
    assert affinity.waited_ns(2**22 + 1) is None


def test_threads_may_exceed_a_quota_but_not_the_cores(monkeypatch):
    monkeypatch.setattr(affinity, "_AT_START", frozenset(range(4)))
    monkeypatch.setattr(cgroup, "cpu_quota", lambda: 1.5)
    assert thread_count(None) == 1
    assert thread_count(4) == 4
    with pytest.raises(UsageError, match="--threads 5: this process may use 4 cores"):
        thread_count(5)


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
