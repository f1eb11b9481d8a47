import math
from pathlib import Path

import msgspec
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.analysis.tidy import Tidy
from bench.errors import DataError, FailedRun, UsageError
from bench.judge import baseline
from bench.judge.baseline import machine_name, newest, promote, session_of
from bench.record import Covariates, Run
from bench.store import sealed
from bench.store.run_folder import NAME
from bench.store.sessions import read_sessions
from tests.handmade import ENVIRONMENT, fail, grid, make_case, make_run

CASES = grid(["naive", "dynamic"], [32, 128], n_gen=4)


def run_named(name: str, cases: list = CASES, day: int = 1, **arguments) -> Run:
    run = make_run(cases, rounds=2, **arguments)
    created = f"2026-11-{day:02}T04:00:00Z"
    return msgspec.structs.replace(
        run, path=name, manifest=msgspec.structs.replace(run.manifest, run_id=name, created_utc=created)
    )


def test_a_session_comes_back_as_it_was(tmp_path: Path) -> None:
    run = run_named("first")
    path = promote(run, tmp_path, "laptop")
    assert path == tmp_path / "laptop" / "first.json"
    (stored,) = read_sessions(tmp_path / "laptop")
    expected = session_of(Tidy.of(run))
    assert stored.figures == expected.figures
    assert len(stored.figures) == 2 * len(CASES)
    assert stored.environment == ENVIRONMENT
    assert [path.name for path in path.parent.iterdir()] == ["first.json"]


def test_sessions_are_added_and_never_replaced(tmp_path: Path) -> None:
    for name, day in (("b", 2), ("a", 3), ("c", 1)):
        promote(run_named(name, day=day), tmp_path, "laptop")
    sessions = read_sessions(tmp_path / "laptop")
    assert [session.run_id for session in sessions] == ["c", "b", "a"]
    assert newest(sessions).run_id == "c"  # accepted last, though measured first
    before = (tmp_path / "laptop" / "a.json").read_bytes()
    with pytest.raises(UsageError, match="already"):
        promote(run_named("a", seed=9), tmp_path, "laptop")
    assert (tmp_path / "laptop" / "a.json").read_bytes() == before


def test_a_clock_that_went_back_makes_no_session_the_newest(tmp_path: Path) -> None:
    path = promote(run_named("one"), tmp_path, "mine")
    (one,) = read_sessions(path.parent)
    sealed.write(path, msgspec.structs.replace(one, promoted_utc="2126-01-01T00:00:00.000000+00:00"))
    with pytest.raises(UsageError, match=r"before 2126-01-01.*set the clock"):
        promote(run_named("two", day=2), tmp_path, "mine")


@pytest.mark.parametrize("status", ["failed", "oom", "timeout"])
def test_a_failed_run_is_refused(status: str, tmp_path: Path) -> None:
    with pytest.raises(FailedRun, match=f"baseline: dynamic, prompt 32: {status}: not enough memory"):
        promote(run_named("x", failures=[fail(CASES[1], status)]), tmp_path, "laptop")
    assert not list(tmp_path.iterdir())


def test_a_disturbed_run_is_refused(tmp_path: Path) -> None:
    stolen = run_named("x", repetitions=1, covariates=lambda case, number: Covariates(steal_ns=10**12))
    with pytest.raises(DataError, match="of the rounds of naive, prompt 32 were disturbed"):
        promote(stolen, tmp_path, "laptop")
    assert not list(tmp_path.iterdir())


def test_other_tokens_and_a_torn_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FailedRun, match="other tokens"):
        promote(run_named("x", tokens_match={CASES[1].key: "false"}), tmp_path, None)
    torn = run_named("x")
    torn = msgspec.structs.replace(torn, samples=[sample for sample in torn.samples if sample.case != CASES[0].key])
    with pytest.raises(
        DataError, match=r"baseline: naive, prompt 32: not measured: the run ended before .*`kvbench run --resume`"
    ):
        promote(torn, tmp_path, None)
    one_round = [sample for sample in run_named("x").samples if sample.round == 0]
    with pytest.raises(DataError, match=r"baseline: naive, prompt 32 lacks rounds; `kvbench run --resume x`"):
        promote(msgspec.structs.replace(torn, samples=one_round), tmp_path, None)
    assert not list(tmp_path.iterdir())


def test_a_failure_outranks_what_was_not_measured(tmp_path: Path) -> None:
    run = run_named("x", failures=[fail(CASES[1])])
    torn = msgspec.structs.replace(run, samples=[sample for sample in run.samples if sample.case != CASES[0].key])
    with pytest.raises(FailedRun, match="not enough memory"):
        promote(torn, tmp_path, None)


def test_what_is_unsupported_here_is_left_out(tmp_path: Path) -> None:
    unsupported = [fail(CASES[1], "unsupported", "no compiler")]
    promote(run_named("x", failures=unsupported), tmp_path, "laptop")
    (stored,) = read_sessions(tmp_path / "laptop")
    assert CASES[1] not in {row.case for row in stored.figures}
    with pytest.raises(FailedRun, match="unsupported"):
        promote(run_named("y", failures=[fail(case, "unsupported", "no") for case in CASES]), tmp_path, "other")


def test_a_run_that_lacks_a_case_needs_another_name(tmp_path: Path) -> None:
    promote(run_named("all"), tmp_path, "laptop")
    with pytest.raises(DataError, match=r"some lacks dynamic decode, prompt 128, which .* another --name"):
        promote(run_named("some", CASES[:2]), tmp_path, "laptop")
    promote(run_named("some", CASES[:2]), tmp_path, "narrow")
    promote(run_named("more", [*CASES, make_case("static", 32, n_gen=4)]), tmp_path, "laptop")


def test_a_resumed_run_counts_the_fewest_graphs() -> None:
    run = run_named("x", processes=2)
    first = run.checks[0]
    more = {phase: msgspec.structs.replace(found, compiled_graphs=3) for phase, found in first.counters.items()}
    resumed = msgspec.structs.replace(run, checks=[msgspec.structs.replace(first, counters=more), *run.checks[1:]])
    assert session_of(Tidy.of(resumed)).figures[0].counters.compiled_graphs == 0
    other = {phase: msgspec.structs.replace(found, forward_calls=99) for phase, found in first.counters.items()}
    with pytest.raises(DataError, match="not deterministic"):
        session_of(
            Tidy.of(msgspec.structs.replace(run, checks=[msgspec.structs.replace(first, counters=other), *run.checks]))
        )


@pytest.mark.parametrize("value", [math.inf, 0.0, -1.0])
@pytest.mark.parametrize("column", ["latency_ms", "mfu", "mbu"])
def test_impossible_figures_are_refused(
    column: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = baseline.summarize
    monkeypatch.setattr(baseline, "summarize", lambda tidy: honest(tidy).assign(**{column: value}))
    with pytest.raises(DataError, match=f"{column} of .* is {value}"):
        promote(run_named("x"), tmp_path, None)
    assert not list(tmp_path.iterdir())


def test_a_time_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = baseline.summarize
    monkeypatch.setattr(baseline, "summarize", lambda tidy: honest(tidy).assign(latency_ms=math.nan))
    with pytest.raises(DataError, match=r"latency_ms of naive prefill, prompt 32, is nan"):
        promote(run_named("x"), tmp_path, None)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return promote(run_named("x", CASES[:1]), tmp_path_factory.mktemp("baselines"), "laptop")


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_is_read_as_another_value(data: st.DataObject, stored: Path, tmp_path: Path) -> None:
    content = stored.read_bytes()
    damage = data.draw(st.sampled_from(["flip", "cut", "swap"]))
    if damage == "flip":
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
    elif damage == "cut":
        damaged = bytearray(content[: data.draw(st.integers(0, len(content) - 1))])
    else:
        lines = content.split(b"\n")
        one, other = data.draw(st.integers(0, len(lines) - 1)), data.draw(st.integers(0, len(lines) - 1))
        lines[one], lines[other] = lines[other], lines[one]
        damaged = bytearray(b"\n".join(lines))
    (tmp_path / "x.json").write_bytes(damaged)
    try:
        read = read_sessions(tmp_path)
    except DataError:
        return
    assert read == read_sessions(stored.parent)


def test_a_newer_schema_is_refused(stored: Path, tmp_path: Path) -> None:
    newer = stored.read_text().replace('"schema_version": 1', '"schema_version": 2')
    (tmp_path / "x.json").write_text(newer)
    with pytest.raises(DataError, match="schema 2 is newer"):
        read_sessions(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        read_sessions(tmp_path / "nothing")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--baseline-dir"):
        promote(run_named("x"), tmp_path / "file", "laptop")


def test_a_machine_has_a_name_of_its_own() -> None:
    other = msgspec.structs.replace(ENVIRONMENT, torch="2.14.0")
    assert machine_name(ENVIRONMENT).startswith("amd-epyc-9b45-2-cores-")
    assert machine_name(ENVIRONMENT) != machine_name(other)
    assert machine_name(ENVIRONMENT) == machine_name(msgspec.structs.replace(ENVIRONMENT, hostname="b", load_1min=9.0))
    assert NAME.fullmatch(machine_name(ENVIRONMENT))


def test_shares_are_stored_as_none_where_nothing_was_measured() -> None:
    assert pd.isna(baseline.summarize(Tidy.of(run_named("x")))["mfu"]).all()
    assert {row.mfu for row in session_of(Tidy.of(run_named("x"))).figures} == {None}
