"""Which cores a process may use: read, chosen and set, on this process's children and on made-up machines."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import hypothesis
import pytest
from hypothesis import strategies as st

from bench import cores


@pytest.fixture
def child() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinities")


@linux
def test_what_is_given_is_what_a_process_has(child):
    own = cores.common(child)
    assert own == os.sched_getaffinity(0)
    chosen = {min(own)}
    cores.give(child, chosen)
    assert cores.common(child) == chosen
    assert cores.terms(child).startswith(f"cores {min(own)} at nice ")
    cores.give(child, own)
    assert cores.terms(child) == cores.terms(os.getpid())


@linux
def test_cores_that_do_not_exist_are_refused(child):
    with pytest.raises(OSError, match="Invalid argument"):
        cores.give(child, {1023})


@linux
def test_threads_with_other_cores_have_none_in_common(child, monkeypatch):
    one_each = iter([{0}, {1}])
    monkeypatch.setattr(cores, "_threads", lambda pid: [1, 2])
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: next(one_each))
    assert not cores.common(child)


def machine(monkeypatch, siblings):
    texts = {cores.SIBLINGS.format(core): text for core, text in siblings.items()}
    monkeypatch.setattr(cores, "read_file", lambda path: texts.get(str(path)))


@pytest.mark.parametrize(
    ("siblings", "n_threads", "expected"),
    [
        ({}, 1, [{0}, {1}, {2}, {3}]),
        ({}, 2, [{0, 1}, {2, 3}]),
        ({}, 3, []),
        ({}, 4, []),
        ({0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}, 2, [{0, 2}, {1, 3}]),
        ({0: "0,2", 2: "0,2", 1: "1,3", 3: "1,3"}, 2, [{0, 1}, {2, 3}]),
    ],
)
def test_threads_share_no_physical_core_where_they_need_not(siblings, n_threads, expected, monkeypatch):
    machine(monkeypatch, siblings)
    assert cores.choices(range(4), n_threads) == expected


@hypothesis.given(st.sets(st.integers(0, 200), max_size=64), st.integers(1, 64))
def test_choices_are_disjoint_and_as_large_as_asked(own, n_threads):
    found = cores.choices(own, n_threads)
    assert len(found) != 1
    assert {len(chosen) for chosen in found} <= {n_threads}
    assert sum(map(len, found)) == len(frozenset().union(*found))
    assert frozenset().union(*found) <= own


def test_waiting_for_a_core_only_grows():
    before = cores.waited_ns(os.getpid())
    assert before is None or cores.waited_ns(os.getpid()) >= before
    assert cores.waited_ns(2**22 + 1) is None
