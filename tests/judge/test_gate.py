import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from bench.analysis.tidy import NOT_MEASURED, Tidy
from bench.case import Case
from bench.errors import DataError
from bench.judge import baseline
from bench.judge.baseline import promote, session_of
from bench.judge.gate import EXACT, gate, read_baseline, share_of
from bench.judge.verdict import Verdict, exit_code
from bench.record import Covariates, Run
from bench.store.run_folder import samples_file
from bench.store.sessions import Session
from bench.tell import verdicts
from kvcache.proof.counters import Counters
from tests.handmade import ENVIRONMENT, fail, grid, make_case, make_run
from tests.stored import create_run

CASES = grid(["naive", "dynamic"], [32, 128], n_gen=4)
NAIVE, DYNAMIC = CASES[0].key, CASES[1].key


def change(run: Run, key: str, phase: str, **fields: int) -> Run:
    """The run with other counts of one case and phase."""

    def changed(counters: dict[str, Counters] | None) -> dict[str, Counters]:
        assert counters is not None
        return counters | {phase: msgspec.structs.replace(counters[phase], **fields)}

    checks = [
        msgspec.structs.replace(check, counters=changed(check.counters)) if check.case == key else check
        for check in run.checks
    ]
    return msgspec.structs.replace(run, checks=checks)


def kinds(found: list[Verdict]) -> set[str]:
    return {verdict.kind for verdict in found}


def of_kind(found: list[Verdict], kind: str) -> list[Verdict]:
    return [verdict for verdict in found if verdict.kind == kind]


RUN = make_run(CASES, rounds=2)
BASE = [session_of(Tidy.of(RUN))]


def test_an_unchanged_run_passes_on_any_machine() -> None:
    elsewhere = make_run(
        CASES, rounds=2, seed=3, environment=msgspec.structs.replace(ENVIRONMENT, cores=64, isa="NEON")
    )
    found = gate(elsewhere, BASE)
    assert kinds(found) == {"same", "not-comparable"}
    assert len(of_kind(found, "same")) == 2 * len(CASES) * (1 + len(EXACT))
    assert exit_code(found) == 0
    assert exit_code(found, require_time=True) == 3


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", EXACT)
def test_one_more_of_anything_is_a_regression(name: str, phase: str) -> None:
    before = getattr(BASE[0].by_case_and_phase[DYNAMIC, phase].counters, name)
    found = gate(change(RUN, DYNAMIC, phase, **{name: before + 1}), BASE)
    (worse,) = of_kind(found, "regression")
    assert (worse.case.key, worse.phase, worse.quantity) == (DYNAMIC, phase, name)
    assert (worse.base, worse.head) == (before, before + 1)
    assert exit_code(found) == 1


def test_less_work_passes_and_is_told() -> None:
    found = gate(change(RUN, DYNAMIC, "decode", copied_bytes=0), BASE)
    assert [verdict.quantity for verdict in of_kind(found, "faster")] == ["copied_bytes"]
    assert exit_code(found) == 0


def test_counts_of_other_steps_are_not_compared() -> None:
    found = gate(change(RUN, DYNAMIC, "decode", steps=2, forward_calls=2), BASE)
    assert not of_kind(found, "regression")
    assert exit_code(found) == 3
    assert "2 decode steps were counted, 3 in the baseline" in verdicts.table(found)


def test_a_failed_case_outranks_everything() -> None:
    run = make_run(CASES[:2], rounds=2, failures=[fail(CASES[1])])
    found = gate(run, BASE)
    assert {verdict.case.key for verdict in of_kind(found, "failed")} == {DYNAMIC}
    assert of_kind(found, "missing")
    assert exit_code(found) == 5
    other_tokens = make_run(CASES, rounds=2, tokens_match={DYNAMIC: "false"})
    assert exit_code(gate(other_tokens, BASE)) == 5


def test_tokens_that_match_less_than_in_the_baseline_are_not_counted_as_equal() -> None:
    found = gate(make_run(CASES, rounds=2, tokens_match={DYNAMIC: "tie"}), BASE)
    of_tokens = [verdict for verdict in found if verdict.quantity == "tokens_match" and verdict.kind != "same"]
    assert [(verdict.case.key, verdict.phase) for verdict in of_tokens] == [(DYNAMIC, "prefill"), (DYNAMIC, "decode")]
    assert {verdict.detail for verdict in of_tokens} == {"`tie`, in the baseline `true`"}
    assert "`tie`, in the baseline `true`" in verdicts.table(found)
    assert len(of_kind(found, "same")) == 2 * len(CASES) * (1 + len(EXACT)) - len(of_tokens)
    assert exit_code(found) == 0


def test_a_run_that_supports_nothing_fails() -> None:
    nothing = make_run(CASES, rounds=2, failures=[fail(case, "unsupported", "no compiler") for case in CASES])
    assert exit_code(gate(nothing, BASE)) == 5


def test_a_missing_case_names_its_nearest() -> None:
    one_thread = msgspec.structs.replace(CASES[1], n_threads=1)
    found = gate(make_run([CASES[0], one_thread, *CASES[2:]], rounds=2), BASE)
    missing = of_kind(found, "missing")
    assert [(verdict.case.key, verdict.phase) for verdict in missing] == [(DYNAMIC, "prefill"), (DYNAMIC, "decode")]
    assert "n_threads = 1" in missing[0].detail
    assert {verdict.case.key for verdict in of_kind(found, "new")} == {one_thread.key}
    assert exit_code(found) == 3


def test_a_case_that_was_not_measured_is_missing_and_resuming_is_the_advice() -> None:
    torn = msgspec.structs.replace(RUN, samples=[sample for sample in RUN.samples if sample.case != DYNAMIC])
    found = gate(torn, BASE)
    missing = of_kind(found, "missing")
    assert [(verdict.case.key, verdict.phase) for verdict in missing] == [(DYNAMIC, "prefill"), (DYNAMIC, "decode")]
    assert {verdict.detail for verdict in missing} == {NOT_MEASURED}
    assert "`kvbench run --resume` measures it" in verdicts.table(found)
    assert not of_kind(found, "failed")
    assert exit_code(found) == 3


def test_a_new_case_is_reported_and_passes() -> None:
    found = gate(make_run([*CASES, make_case("static", 32, n_gen=4)], rounds=2), BASE)
    assert len(of_kind(found, "new")) == 2
    assert exit_code(found) == 0


def test_nothing_in_common_is_no_pass() -> None:
    found = gate(make_run(grid(["static"], [8], n_gen=4), rounds=2), BASE)
    assert kinds(found) == {"missing", "new"}
    assert exit_code(found) == 3


def test_a_case_without_decode() -> None:
    cases = [make_case("dynamic", 32, n_gen=1)]
    run = make_run(cases, rounds=2)
    assert exit_code(gate(run, [session_of(Tidy.of(run))])) == 0


def test_the_roof_follows_the_physics() -> None:
    assert [share_of(CASES[0], phase) for phase in ("prefill", "decode")] == ["mfu", "mfu"]
    assert [share_of(CASES[1], phase) for phase in ("prefill", "decode")] == ["mfu", "mbu"]


# --- times -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Summaries with shares of a roof, as a run with measured ceilings has them: inverse to the time."""
    honest = baseline.summarize

    def summarize(tidy: Tidy):
        summary = honest(tidy)
        return summary.assign(mfu=30 / summary["latency_ms"], mbu=30 / summary["latency_ms"])

    monkeypatch.setattr(baseline, "summarize", summarize)


def stored_sessions(n: int = 6, **arguments) -> list[Session]:
    """Sessions of one machine, a few percent apart."""
    random = np.random.default_rng(7)
    sessions = []
    for number in range(n):
        drift = float(np.exp(random.normal(0, 0.02)))
        session = session_of(Tidy.of(make_run(CASES, ms=times(drift), seed=number, **arguments)))
        sessions.append(msgspec.structs.replace(session, run_id=f"session-{number}"))
    return sessions


def times(factor: float = 1.0, key: str = "") -> Callable[[Case, int], float]:
    def ms(case: Case, step: int) -> float:
        return 40.0 * (factor if key in {"", case.key} and (step or not key) else 1.0)

    return ms


def judged(found: list[Verdict], quantity: str = "mbu") -> Verdict:
    (verdict,) = (verdict for verdict in found if (verdict.case.key, verdict.quantity) == (DYNAMIC, quantity))
    return verdict


@pytest.mark.usefixtures("roofs")
def test_an_unchanged_time_passes() -> None:
    found = gate(make_run(CASES, ms=times(1.01), seed=99), stored_sessions())
    assert kinds(found) == {"same"}
    verdict = judged(found)
    assert verdict.base == pytest.approx(0.75, rel=0.03)
    assert abs(verdict.effect or 1) < 0.05
    assert verdict.low < verdict.effect < verdict.high  # type: ignore[operator]
    assert "from 6 sessions" in verdict.detail
    assert exit_code(found, require_time=True) == 0


@pytest.mark.usefixtures("roofs")
def test_a_slower_decode_is_a_regression_of_that_alone() -> None:
    found = gate(make_run(CASES, ms=times(1.5, DYNAMIC), seed=99), stored_sessions())
    (worse,) = of_kind(found, "regression")
    assert (worse.case.key, worse.phase, worse.quantity) == (DYNAMIC, "decode", "mbu")
    assert worse.effect == pytest.approx(0.5, abs=0.08)
    assert worse.detectable is not None
    assert worse.detectable < 0.5
    assert exit_code(found) == 1


@pytest.mark.usefixtures("roofs")
def test_a_faster_decode_is_told() -> None:
    found = gate(make_run(CASES, ms=times(0.5, DYNAMIC), seed=99), stored_sessions())
    assert judged(found).kind == "faster"
    assert exit_code(found) == 0


OTHER_MACHINE = msgspec.structs.replace(ENVIRONMENT, cpu_model="Xeon")


@pytest.mark.usefixtures("roofs")
@pytest.mark.parametrize(
    ("sessions", "rounds", "why"),
    [
        (lambda: stored_sessions(4), 6, "4 of 5 sessions stored of this machine"),
        (lambda: stored_sessions(6, environment=OTHER_MACHINE), 6, "0 of 5 sessions stored of this machine"),
        (stored_sessions, 5, "5 timed rounds, the sessions have 6"),
    ],
)
def test_a_time_without_ground_is_not_compared(sessions: Callable[[], list[Session]], rounds: int, why: str) -> None:
    found = gate(make_run(CASES, ms=times(1.5), rounds=rounds), sessions())
    assert judged(found).kind == "not-comparable"
    assert why in judged(found).detail
    assert exit_code(found) == 0
    assert exit_code(found, require_time=True) == 3


@pytest.mark.usefixtures("roofs")
def test_a_share_that_the_run_lost_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = stored_sessions()
    patched = baseline.summarize
    monkeypatch.setattr(baseline, "summarize", lambda tidy: patched(tidy).assign(mbu=math.nan))
    found = gate(make_run(CASES, ms=times()), sessions)
    assert judged(found).kind == "inconclusive"
    assert exit_code(found) == 4


def with_kernels(run: Run, kernels: dict[str, str] | None) -> Run:
    """The run, of which these kernels computed every case."""
    checks = [msgspec.structs.replace(check, kernels=kernels) for check in run.checks]
    return msgspec.structs.replace(run, checks=checks)


@pytest.mark.usefixtures("roofs")
def test_a_time_by_other_kernels_is_not_judged() -> None:
    past = stored_sessions()
    fast, slow = {"4x4 float32, step of 1": "sum-4"}, {"4x4 float32, step of 1": "linear"}
    for session in past:
        figures = [msgspec.structs.replace(row, kernels=fast) for row in session.figures]
        past[past.index(session)] = msgspec.structs.replace(session, figures=figures)
    run = make_run(CASES, ms=times(1.5))
    found = gate(with_kernels(run, slow), past)
    assert judged(found).kind == judged(found, "mfu").kind == "not-comparable"
    assert "4x4 float32, step of 1: linear, there sum-4" in judged(found).detail
    assert {verdict.kind for verdict in found if verdict.quantity in EXACT} == {"same"}
    assert judged(gate(with_kernels(run, fast), past)).kind == "regression"
    for unknown in (None, {"other, prompt": "linear"}, fast | {"other, prompt": "linear"}):
        found = judged(gate(with_kernels(run, unknown), past))
        assert found.kind == "not-comparable"
        assert "not known" in found.detail
    mixed = [*past[:2], *stored_sessions(6)]  # sessions by other kernels do not count
    assert "from 6 sessions" in judged(gate(with_kernels(run, None), mixed)).detail
    few = judged(gate(with_kernels(run, None), [*past[:2], *stored_sessions(3)])).detail
    assert few.endswith("and counters, 2 of other kernels left out (4x4 float32, step of 1: not known, there sum-4)")


def test_a_session_keeps_the_kernels_of_its_cases() -> None:
    session = session_of(Tidy.of(with_kernels(RUN, {"a, prompt": "linear"})))
    assert {tuple((row.kernels or {}).items()) for row in session.figures} == {(("a, prompt", "linear"),)}


def test_a_run_whose_processes_had_other_kernels_is_no_baseline_and_its_times_are_not_judged(tmp_path: Path) -> None:
    run = make_run(CASES, processes=2)
    checks = [msgspec.structs.replace(one, kernels={"a": "linear" if one.process else "sum-2"}) for one in run.checks]
    mixed = msgspec.structs.replace(run, checks=checks)
    assert {row.kernels["a"] for row in session_of(Tidy.of(mixed)).figures if row.kernels} == {"sum-2, linear"}
    with pytest.raises(DataError, match=r"a was computed by sum-2, linear in its processes.*--kernels"):
        promote(mixed, tmp_path, "mixed")


def with_read(session: Session, read_bytes: int | None) -> Session:
    figures = [msgspec.structs.replace(row, read_bytes=read_bytes) for row in session.figures]
    return msgspec.structs.replace(session, figures=figures)


@pytest.mark.usefixtures("roofs")
@pytest.mark.parametrize(
    ("stored", "now", "kind"),
    [(540, 540, "same"), (540, 585, "same"), (540, 610, "not-comparable"), (None, 540, "not-comparable")],
)
def test_shares_of_other_reads_are_not_compared(
    stored: int | None, now: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tenth more or less the caches hold as much; sessions of before had one read for all cases."""
    sessions = [with_read(session, stored) for session in stored_sessions()]
    patched = baseline.summarize
    monkeypatch.setattr(baseline, "summarize", lambda tidy: patched(tidy).assign(read_bytes=now))
    found = gate(make_run(CASES, ms=times(1.01), seed=99), sessions)
    assert judged(found).kind == kind
    assert judged(found, "mfu").kind == "same"
    monkeypatch.setattr(baseline, "summarize", lambda tidy: patched(tidy).assign(mbu=math.nan))
    assert judged(gate(make_run(CASES, ms=times()), sessions)).kind == "inconclusive"


@pytest.mark.usefixtures("roofs")
def test_other_weights_have_no_common_time() -> None:
    run = make_run(CASES, ms=times(1.5))
    other = msgspec.structs.replace(run.manifest, weights={CASES[0].model: "00" * 32})
    assert judged(gate(msgspec.structs.replace(run, manifest=other), stored_sessions())).kind == "not-comparable"


@pytest.mark.usefixtures("roofs")
def test_sessions_that_did_other_work_do_not_set_the_time() -> None:
    past = [session_of(Tidy.of(change(make_run(CASES, seed=n), DYNAMIC, "decode", copied_bytes=9))) for n in range(5)]
    past = [msgspec.structs.replace(session, run_id=f"{n}") for n, session in enumerate(past)]
    assert judged(gate(make_run(CASES), [*past, *stored_sessions(3)])).kind == "not-comparable"


@pytest.mark.usefixtures("roofs")
def test_a_disturbed_run_is_inconclusive_not_slow() -> None:
    def stolen(case: Case, number: int) -> Covariates:
        return Covariates(steal_ns=10**11 if case.key == DYNAMIC and number < 2 else 0)

    found = gate(make_run(CASES, ms=times(1.5, DYNAMIC), covariates=stolen, rounds=8), stored_sessions())
    assert judged(found).kind == "inconclusive"
    assert not of_kind(found, "regression")
    assert exit_code(found) == 4


# --- where baselines come from ---------------------------------------------------------------------------------------


def store(run: Run, out: Path) -> Path:
    folder, manifest = create_run(out, run.manifest)
    with samples_file(folder, manifest.digest) as writer:
        for record in (*run.checks, *run.samples, *run.failures):
            writer.append(record)
    return folder


def test_a_baseline_is_a_folder_of_sessions_or_a_run(tmp_path: Path) -> None:
    folder = store(RUN, tmp_path / "runs")
    (single,) = read_baseline(str(folder), tmp_path)
    assert single.figures == BASE[0].figures
    assert read_baseline("handmade", tmp_path / "runs")[0].figures == single.figures
    baseline.promote(RUN, tmp_path / "baselines", "laptop")
    assert read_baseline(str(tmp_path / "baselines" / "laptop"), tmp_path)[0].figures == single.figures
    with pytest.raises(DataError, match=r"--baseline .*no run folder"):
        read_baseline("nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no session"):
        read_baseline(str(tmp_path / "empty"), tmp_path)


def test_shares_that_no_clock_gives_are_refused(roofs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    patched = baseline.summarize
    for value in (math.inf, -0.5, 0.0):
        monkeypatch.setattr(baseline, "summarize", lambda run, value=value: patched(run).assign(mbu=value))
        with pytest.raises(DataError, match="mbu"):
            gate(RUN, BASE)
