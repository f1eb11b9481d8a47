"""Who writes the text that judges a cell, and which cells fail where nobody can."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.case import Case
from bench.manifest import CasePlan
from bench.measure.checks import Checks
from bench.measure.texts import Texts
from bench.measure.worker_process import WorkerFailed
from bench.measure.workers import Entry, WorkerKey, worker_key
from bench.protocol import Done, MakeReference, MakeText, Request, TextMade
from tests.handmade import make_case, make_run


class Workers:
    """Stands for the processes: `failing` are the writers, and lengths, of which a text fails."""

    process = 0

    def __init__(self, *failing: tuple[str, int], exact: frozenset[WorkerKey] = frozenset()) -> None:
        self.failing, self.exact = failing, exact
        self.asked: list[tuple[str, int]] = []
        self.failed: list[tuple[str, str]] = []
        self.checked: list[str] = []

    def ask_reference(self, request: Request) -> Done | TextMade:
        if isinstance(request, MakeReference):
            return Done()
        assert isinstance(request, MakeText)
        self.asked.append((request.writer, request.n_context))
        if (request.writer, request.n_context) in self.failing:
            raise WorkerFailed("timeout", "no reply within 3 s", alive=False)
        return TextMade(writer=request.writer, tokens=[[1, 2, 3]])

    def fail(self, entry: Entry, _failure: WorkerFailed, prefix: str = "") -> None:
        entry.live = False
        self.failed.append((entry.case.strategy, prefix))

    def attempt(self, entry: Entry, _request: object) -> None:
        self.checked.append(entry.case.strategy)


def plans(*cases: Case) -> list[CasePlan]:
    return make_run(list(cases)).manifest.plan


def written(workers: Any, *cases: Case) -> str:
    past: Any = SimpleNamespace(texts=[], cell_plans={})
    writer: Any = []
    return Texts(plans(*cases), past, writer, None).make(cases[0], "text", workers)


def test_where_the_fastest_writer_fails_dynamic_writes_as_much() -> None:
    lossy, exact = make_case("compiled-int8", n_prompt=8), make_case("compiled", n_prompt=8)
    workers = Workers(("compiled", 8))
    assert written(workers, lossy, exact) == "dynamic"
    assert workers.asked == [("compiled", 8), ("dynamic", 8)]


def test_where_dynamic_fails_too_it_writes_what_the_cell_needs() -> None:
    short, long = (make_case("compiled-int8", n_prompt=n) for n in (8, 300))
    workers = Workers(("compiled", 300), ("dynamic", 300))
    assert written(workers, short, long) == "dynamic"
    assert workers.asked == [("compiled", 300), ("dynamic", 300), ("dynamic", 8)]


def test_a_cache_that_promises_to_be_exact_needs_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    cases = make_case("cache:mine:exact"), make_case("cache:mine:lossy"), make_case("fp8")
    workers: Any = Workers(exact=frozenset({worker_key(cases[0])}))

    class NoTexts:
        def make(self, *_: object) -> str:
            raise WorkerFailed("failed", "it cannot be written", alive=True)

    nothing: Any = None
    texts: Any = NoTexts()
    Checks(workers, nothing, nothing, texts).prove([Entry(plan) for plan in plans(*cases)], 1)
    reason = "making the text that judges it failed: "
    assert workers.failed == [("cache:mine:lossy", reason), ("fp8", reason)]
    assert workers.checked == ["cache:mine:exact"]
