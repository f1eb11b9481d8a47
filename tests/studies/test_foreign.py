"""The table of the study `foreign`, from a run made by hand."""

import msgspec
import pytest

from bench.analysis.summary import summarize
from bench.analysis.tidy import Tidy
from bench.record import Failure
from tests.handmade import run_with_lossy_kinds
from tests.studies import foreign
from tests.studies.foreign_caches import PACKAGES


@pytest.fixture
def summary():
    run = run_with_lossy_kinds(("dynamic", "cache:foreign_caches:kakeyalattice", "cache:foreign_caches:turboquant"))
    lost = [plan.case.key for plan in run.manifest.plan if plan.case.strategy.endswith(":turboquant")]
    reason = f"AttributeError: no trapz ({foreign.INSTALLED}/turboquant/core.py, line 7)"
    failures = [Failure(case=key, process=0, status="failed", error=reason) for key in lost]
    samples = [sample for sample in run.samples if sample.case not in lost]
    checks = [check for check in run.checks if check.case not in lost]
    run = msgspec.structs.replace(run, failures=failures, samples=samples, checks=checks)
    frame = summarize(Tidy.of(run))
    return frame[frame["n_prompt"] == 300]


@pytest.mark.parametrize("times", [True, False])
def test_what_ran_is_a_line_and_what_did_not_is_its_reason(summary, times: bool) -> None:
    found = foreign.table(summary, times=times)
    assert list(found["status"]) == ["ok", "ok", "failed"]
    assert list(found["bytes_vs_dynamic"])[:2] == [1, 0.25]
    page = foreign.markdown(found, ["-d", "0"])
    assert f"| {PACKAGES['kakeyalattice'].title} " in page
    assert "- turboquant 0.2.0, depth 0: failed: `AttributeError: no trapz (turboquant/core.py, line 7)`" in page
    assert ("step / dynamic" in page) == times
    assert ("Times are left out" in page) != times
    assert str(foreign.TREE) not in page + found.to_csv()


def test_a_package_that_pip_does_not_install_has_a_row_with_pips_reason(summary) -> None:
    found = foreign.table(summary, times=False)
    assert foreign.with_missing(found, {}).to_csv() == found.to_csv()
    found = foreign.with_missing(found, {"randkv": "ERROR: No matching distribution found for randkv==0.1.0"})
    assert list(found["status"]) == ["ok", "ok", "failed", "not installed"]
    page = foreign.markdown(found, [])
    assert "- randkv 0.1.0: not installed: `ERROR: No matching distribution found for randkv==0.1.0`" in page
    assert ", depth 0: failed: `AttributeError" in page


def test_every_package_is_pinned() -> None:
    assert {"turboquant==0.2.0", "kakeyalattice==1.5.0", "randkv==0.1.0"} <= {
        each.pins[0] for each in PACKAGES.values()
    }
    assert all("==" in pin for each in PACKAGES.values() for pin in each.pins)
