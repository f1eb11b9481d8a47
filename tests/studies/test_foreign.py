"""The table of the study `foreign`, from a run made by hand."""

import re

import msgspec
import pandas as pd
import pytest

from bench.record import Failure
from tests.handmade import run_with_lossy_kinds
from tests.studies import foreign
from tests.studies.foreign_caches import PACKAGES


@pytest.fixture
def summary():
    run = run_with_lossy_kinds(("dynamic", "cache:foreign_caches:kakeyalattice", "cache:foreign_caches:turboquant"))
    lost = [plan.case.key for plan in run.manifest.plan if plan.case.strategy.endswith(":turboquant")]
    reason = f"{foreign.MODULE}turboquant raised AttributeError: no trapz ({foreign.INSTALLED}/core.py, line 7)"
    failures = [Failure(case=key, process=0, status="failed", error=reason) for key in lost]
    samples = [sample for sample in run.samples if sample.case not in lost]
    checks = [
        msgspec.structs.replace(check, growth_bytes=10**9) if "kakeyalattice" in check.case else check
        for check in run.checks
        if check.case not in lost
    ]
    run = msgspec.structs.replace(run, failures=failures, samples=samples, checks=checks)
    frame = foreign.with_cautions(run)
    return frame[frame["n_prompt"] == 300]


@pytest.mark.parametrize("times", [True, False])
def test_what_ran_is_a_line_and_what_did_not_is_its_reason(summary, times: bool) -> None:
    found = foreign.table(summary, times=times)
    assert list(found["status"]) == ["ok", "ok", "failed"]
    assert list(found["bytes_vs_dynamic"])[:2] == [1, 0.25]
    page = foreign.markdown(found, ["-d", "0"], "torch 2")
    assert "`kvbench run -d 0`\n(torch 2, whatever" in page
    assert f"| {PACKAGES['kakeyalattice'].title} | e8, q_range 38 (recommended) |" in re.sub(" +", " ", page)
    refused, _, cautions = page.partition("\nRefused, ")[2].partition("\nMeasured with a caution:")
    reason = "`raised AttributeError: no trapz (core.py, line 7)`"
    assert f"- turboquant 0.2.0, {PACKAGES['turboquant'].settings}, context 0: {reason}\n" in refused
    assert "- kakeyalattice 1.5.0, e8, q_range 38 (recommended), context 0: `its process grew by 1000.0 MB" in cautions
    assert ("step / dynamic" in page) == times
    assert ("Times are left out" in page) != times
    assert str(foreign.TREE) not in page + found.to_csv()


def test_a_reason_that_two_contexts_have_is_written_once(summary) -> None:
    found = foreign.table(summary, times=False)
    page = foreign.markdown(pd.concat([found, found.assign(n_depth=384)], ignore_index=True), [], "")
    (line,) = [line for line in page.splitlines() if line.startswith("- turboquant")]
    assert ", context 0 and 384: `raised AttributeError" in line


def test_a_package_that_pip_does_not_install_has_a_row_with_pips_reason(summary) -> None:
    found = foreign.table(summary, times=False)
    assert foreign.with_missing(found, {}).to_csv() == found.to_csv()
    found = foreign.with_missing(found, {"randkv": "ERROR: No matching distribution found for randkv==0.1.0"})
    assert list(found["status"]) == ["ok", "ok", "failed", "not installed"]
    page = foreign.markdown(found, [], "")
    reason = "not installed: `ERROR: No matching distribution found for randkv==0.1.0`"
    assert f"- randkv 0.1.0, {PACKAGES['randkv'].settings}: {reason}" in page
    assert ", context 0: `raised AttributeError" in page


def test_every_package_is_pinned() -> None:
    assert {"turboquant==0.2.0", "kakeyalattice==1.5.0", "randkv==0.1.0"} <= {
        each.pins[0] for each in PACKAGES.values()
    }
    assert all("==" in pin for each in PACKAGES.values() for pin in each.pins)
