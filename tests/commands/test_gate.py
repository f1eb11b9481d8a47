"""Every exit code of gate and baseline by the command line, on stored runs made by hand."""

import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from bench.case import Case
from bench.cli import main
from bench.judge import baseline
from bench.manifest import SCHEMA_VERSION
from bench.record import Covariates, Failure, Run
from bench.store.run_folder import samples_file
from tests.handmade import ENVIRONMENT, fail, grid, make_run, smollm2_ms
from tests.stored import create_run

CASES = grid(["naive", "dynamic"], [32, 128], n_gen=4)


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda _: None)  # dozens of runs that nobody will miss after a power cut
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


def store(run: Run, name: str) -> str:
    """Store `run` as results/runs/<name>; return the name."""
    folder, manifest = create_run(Path("results/runs"), msgspec.structs.replace(run.manifest, run_id=name))
    with samples_file(folder, manifest.digest) as writer:
        for record in (*run.checks, *run.samples, *run.failures):
            writer.append(record)
    return name


def stored(name: str, cases: Sequence[Case] = CASES, **arguments) -> str:
    return store(make_run(cases, rounds=2, **arguments), name)


def kvbench(*arguments: str, code: int) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == code


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int) -> str:
    """What is refused is one line on stderr, and nothing on stdout."""
    capsys.readouterr()
    kvbench(*arguments, code=code)
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1, told.err
    return told.err


def test_0_an_unchanged_run_passes(capsys: pytest.CaptureFixture[str]) -> None:
    kvbench("baseline", "promote", stored("one"), "--name", "laptop", code=0)
    assert capsys.readouterr().out == "results/baselines/laptop/one.json\n"
    kvbench("gate", stored("two", seed=5), "--baseline", "results/baselines/laptop", code=0)
    told = capsys.readouterr().out
    assert told.splitlines()[-1].startswith("Times NOT judged (")
    assert told.splitlines()[-1].endswith("Counters: 88 compared, none worse.")
    kvbench("gate", "two", "--baseline", "one", code=0)  # a single run, by its name


def test_1_more_work_is_a_regression(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(CASES, rounds=2)
    check = run.checks[1]
    assert check.counters is not None
    more = msgspec.structs.replace(check.counters["decode"], forward_calls=9)
    check = msgspec.structs.replace(check, counters=check.counters | {"decode": more})
    worse = store(msgspec.structs.replace(run, checks=[run.checks[0], check, *run.checks[2:]]), "worse")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    kvbench("gate", worse, "--baseline", stored("one"), "-o", "json", code=1)
    told = capsys.readouterr()
    document = json.loads(told.out)
    assert document["exit_code"] == 1
    assert document["verdicts"][0]["quantity"] == "forward_calls"
    assert told.err.startswith("REGRESSION: dynamic decode, prompt 32, forward_calls +6")
    assert "| REGRESSION | dynamic, prompt 32" in Path("summary.md").read_text()
    kvbench("baseline", "promote", worse, "--name", "laptop", code=0)  # accepted: from now on it is what is expected
    kvbench("gate", worse, "--baseline", "results/baselines/laptop", code=0)


def test_2_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--baseline" in refused(capsys, "gate", stored("one"), code=2)
    assert "--format" in refused(capsys, "gate", "one", "--baseline", "one", "-o", "csv", code=2)
    assert "--name" in refused(capsys, "baseline", "promote", "one", "--name", "../up", code=2)
    kvbench("baseline", "promote", "one", "--name", "a", code=0)
    assert "already" in refused(capsys, "baseline", "promote", "one", "--name", "a", code=2)
    kvbench("baseline", "promote", "one", "--name", "b", code=0)
    assert "which baseline? There are a, b" in refused(capsys, "baseline", "history", code=2)
    Path("file").write_text("")
    assert "--baseline-dir" in refused(capsys, "baseline", "promote", "one", "--baseline-dir", "file", code=2)


@pytest.mark.parametrize("command", ["gate", "promote"])
def test_3_what_cannot_be_compared(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    one = stored("one")
    words = ["gate", "{}", "--baseline", one] if command == "gate" else ["baseline", "promote", "{}"]

    def judge(run: str) -> str:
        return refused(capsys, *[run if word == "{}" else word for word in words], code=3)

    assert "no run folder" in judge("nothing")
    damaged = Path("results/runs", stored("damaged"), "samples.jsonl")
    damaged.write_bytes(damaged.read_bytes().replace(b'"round":1', b'"round":2', 1))
    assert "line" in judge("damaged")
    newer = make_run(CASES, rounds=2)
    newer = msgspec.structs.replace(
        newer, manifest=msgspec.structs.replace(newer.manifest, schema_version=SCHEMA_VERSION + 1)
    )
    assert "newer" in judge(store(newer, "newer"))


@pytest.mark.parametrize("value", ["NaN", "0", "-5", "1.5", "null", "1e400"])
def test_3_times_that_no_clock_gives(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("results/runs", stored("bad"))
    # The checksums are made to fit, so that the value itself must be refused.
    crc = zlib.crc32(json.loads((folder / "manifest.json").read_text())["digest"].encode())
    lines = []
    for line in (folder / "samples.jsonl").read_text().splitlines():
        record = re.sub(r'("prefill_ns":)\d+', rf"\g<1>{value}", line.partition('"record":')[2][:-1])
        crc = zlib.crc32(record.encode(), crc)
        lines.append(f'{{"crc32":{crc},"record":{record}}}\n')
    (folder / "samples.jsonl").write_text("".join(lines))
    assert "samples.jsonl, line" in refused(capsys, "gate", "bad", "--baseline", stored("one"), code=3)


def test_a_summary_that_cannot_be_written_changes_no_verdict(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "no/such/folder/summary.md")
    kvbench("gate", stored("two"), "--baseline", stored("one"), code=0)
    assert "GITHUB_STEP_SUMMARY" in capsys.readouterr().err


def test_3_cases_that_do_not_meet(capsys: pytest.CaptureFixture[str]) -> None:
    one = stored("one")
    kvbench("gate", stored("fewer", CASES[:2]), "--baseline", one, code=3)
    assert "promote a run without it under another --name" in capsys.readouterr().out.splitlines()[-1]
    kvbench("gate", one, "--baseline", "fewer", code=0)
    assert "new" in capsys.readouterr().out
    kvbench("gate", stored("other", grid(["static"], [8])), "--baseline", one, code=3)
    kvbench(
        "gate",
        stored("elsewhere", environment=msgspec.structs.replace(ENVIRONMENT, cores=8)),
        "--baseline",
        one,
        code=0,
    )
    kvbench("gate", "elsewhere", "--baseline", one, "--require-time", code=3)
    Path("results/baselines/empty").mkdir(parents=True)
    assert "no session" in refused(capsys, "gate", one, "--baseline", "results/baselines/empty", code=3)
    assert "no baseline" in refused(capsys, "baseline", "history", "--name", "nothing", code=3)


def test_3_a_damaged_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    kvbench("baseline", "promote", stored("one"), "--name", "a", code=0)
    path = Path("results/baselines/a/one.json")
    path.write_text(path.read_text().replace('"forward_calls": 3', '"forward_calls": 4', 1))
    told = refused(capsys, "gate", "one", "--baseline", "results/baselines/a", code=3)
    assert "one.json: damaged" in told


def test_4_and_times_where_the_machine_is_known(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = baseline.summarize  # with measured ceilings, a run has shares of the roof
    monkeypatch.setattr(
        baseline, "summarize", lambda run: honest(run).assign(mfu=lambda rows: 9 / rows["latency_ms"], mbu=0.5)
    )
    for number in range(5):
        kvbench("baseline", "promote", stored(f"s{number}", seed=number), "--name", "a", code=0)
    judge = ["--baseline", "results/baselines/a", "--require-time"]
    kvbench("gate", stored("same", seed=7), *judge, code=0)
    kvbench("gate", stored("slow", ms=lambda case, step: 2 * smollm2_ms(case, step)), *judge, code=1)
    assert "mfu +" in capsys.readouterr().out.splitlines()[-1]
    stolen = stored("stolen", covariates=lambda case, number: Covariates(steal_ns=10**12))
    kvbench("gate", stolen, *judge, code=4)
    assert capsys.readouterr().out.splitlines()[-1].startswith("INCONCLUSIVE: ")


def test_5_a_failed_case(capsys: pytest.CaptureFixture[str]) -> None:
    failures: list[Failure] = [fail(CASES[1])]
    bad, one = stored("bad", failures=failures), stored("one")
    kvbench("gate", bad, "--baseline", one, code=5)
    assert "FAILED: dynamic prefill, prompt 32 (oom: not enough memory)" in capsys.readouterr().out
    assert "cannot be a baseline" in refused(capsys, "baseline", "promote", bad, code=5)
    assert "--baseline bad cannot be a baseline" in refused(capsys, "gate", one, "--baseline", bad, code=3)
    lying = stored("lying", tokens_match={CASES[1].key: "false"})
    kvbench("gate", lying, "--baseline", one, code=5)
    assert "other tokens" in refused(capsys, "baseline", "promote", lying, code=5)
    assert not Path("results/baselines").exists()


def test_history_tells_and_draws(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        kvbench("baseline", "promote", stored(name), "--name", "a", code=0)
    capsys.readouterr()
    kvbench("baseline", "history", "--plot", "drift.png", code=0)
    assert capsys.readouterr().out.count("| 2026-11-23 04:00 |") == 2
    assert Path("drift.png").stat().st_size > 0
    kvbench("baseline", "history", "-o", "csv", code=0)
    assert capsys.readouterr().out.startswith("session,created_utc,machine")


def test_a_baseline_that_is_the_run_itself_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    kvbench("baseline", "promote", stored("first"), "--name", "mine", code=0)
    for run, itself in ("first", True), (stored("second"), False):
        capsys.readouterr()
        kvbench("gate", run, "--baseline", "results/baselines/mine", code=0)
        assert ("the baseline is this very run" in capsys.readouterr().out) == itself
