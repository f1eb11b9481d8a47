"""Each cell of a cluster run is of one machine, and no round counts twice, however often its job was started."""

from pathlib import Path

import pytest

from bench.analysis.summary import summarize
from bench.analysis.tidy import Tidy
from bench.errors import DataError
from bench.judge.baseline import session_of
from bench.record import Run, Sample
from bench.store import checked_lines, samples_files
from bench.store.attempts import continued, counted
from bench.store.run_folder import read_run
from bench.store.run_records import read_files
from bench.tell.report import Report, document
from bench.turns import Turns
from tests.cluster import make_cluster_run, node, write_attempt
from tests.handmade import compared


def timed(run: Run, n_prompt: int) -> list[Sample]:
    """The timed turns of the cells with so long a prompt."""
    keys = {item.case.key for item in run.manifest.plan if item.case.n_prompt == n_prompt}
    return [sample for sample in run.samples if sample.case in keys and not sample.warmup]


def machines(run: Run, n_prompt: int) -> set[str]:
    return {run.environment(item.case).hostname for item in run.manifest.plan if item.case.n_prompt == n_prompt}


def test_jobs_of_two_nodes_are_one_run(tmp_path: Path) -> None:
    folder, manifest = make_cluster_run(tmp_path)
    first = write_attempt(folder, node("node1"), "a", job=0)
    second = write_attempt(folder, node("node2", cores=1), "b", job=1)
    run = read_run(folder)
    assert sorted(map(repr, run.samples)) == sorted(map(repr, [*first.samples, *second.samples]))
    summary = summarize(Tidy.of(run))
    assert (summary["status"] == "ok").all()
    assert summary.groupby("n_threads")["machine"].unique().map(list).to_dict() == {1: ["node2"], 2: ["node1"]}
    assert run.environment(manifest.plan[-1].case).cores == 1


def test_a_jobs_file_is_read_in_parts_and_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, manifest = make_cluster_run(tmp_path)
    write_attempt(folder, node("node1"), "a", rounds=3)
    write_attempt(folder, node("node1"), "b", rounds=5, first=2, cells=(16,), continues=("a",))
    whole = read_run(folder)
    monkeypatch.setattr("bench.store.checked_lines.PART_BYTES", 700)
    assert len(checked_lines.parts(folder / "samples-job-0.jsonl", manifest.digest)) > 8
    in_parts = read_run(folder)
    assert in_parts == whole
    assert isinstance(in_parts.samples, Turns)
    assert len(timed(whole, 16)) == 2 * 5
    path = folder / "samples-job-0.jsonl"
    with checked_lines.Appender((folder / "samples-job-1.jsonl").open("xb"), manifest.digest) as file:
        file.append(whole.checks[0])
        file.append(samples_files.begin(path))
    with pytest.raises(DataError, match=r"samples-job-1\.jsonl: (does not begin|holds the start of a job behind)"):
        read_run(folder)


def test_a_job_measured_again_elsewhere_counts_once(tmp_path: Path) -> None:
    """node1 died in the second cell: its complete first cell stays, the torn one is node2's alone."""
    folder, _ = make_cluster_run(tmp_path)
    write_attempt(folder, node("node1"), "a", rounds=3, cells=(8,))
    write_attempt(folder, node("node1"), "b", rounds=2, cells=(16,), continues=("a",))
    again = write_attempt(folder, node("node2"), "c", rounds=3, cells=(16,))
    run = read_run(folder)
    assert len(timed(run, 8)) == 2 * 3
    assert timed(run, 16) == [sample for sample in again.samples if not sample.warmup]
    assert machines(run, 8) == {"node1", "bench-1"}  # bench-1: of job-1, which was not started
    assert "node2" in machines(run, 16)


def test_rounds_of_one_machine_add_up(tmp_path: Path) -> None:
    folder, _ = make_cluster_run(tmp_path)
    write_attempt(folder, node("node1"), "a", rounds=1)
    write_attempt(folder, node("node2"), "b", rounds=2)
    write_attempt(folder, node("node1"), "c", rounds=3, first=1, continues=("a",))
    run = read_run(folder)
    assert sorted({sample.round for sample in timed(run, 8)}) == [0, 1, 2]
    assert len(timed(run, 8)) == 2 * 3
    assert "node1" in machines(run, 8)


def test_two_writers_of_a_job_count_once(tmp_path: Path) -> None:
    folder, _ = make_cluster_run(tmp_path)
    write_attempt(folder, node("node1"), "a")
    write_attempt(folder, node("node1"), "b")
    assert len(timed(read_run(folder), 8)) == 2 * 3


def test_a_third_start_adds_to_one_of_two_that_knew_nothing_of_each_other(tmp_path: Path) -> None:
    """Two copies of one run folder were collected: both hold rounds 0 and 1, and the third start continues both."""
    folder, _ = make_cluster_run(tmp_path)
    first = write_attempt(folder, node("node1"), "a", rounds=2)
    write_attempt(folder, node("node1"), "bb", rounds=2)
    third = write_attempt(folder, node("node1"), "ccc", rounds=3, first=2, continues=("a", "bb"))
    run = read_run(folder)
    expected = [*first.samples, *(sample for sample in third.samples if sample.round == 2)]
    assert timed(run, 8) == [sample for sample in expected if " p8 " in sample.case and not sample.warmup]
    assert set(summarize(Tidy.of(run)).query("n_threads == 2")["samples"]) == {3}


def test_a_round_that_two_attempts_measured_counts_once(tmp_path: Path) -> None:
    """The first attempt went on writing after the second had begun to continue it."""
    folder, _ = make_cluster_run(tmp_path)
    first = write_attempt(folder, node("node1"), "a", rounds=2)
    write_attempt(folder, node("node1"), "b", rounds=3, first=1, continues=("a",))
    taken = timed(read_run(folder), 8)
    assert [sample.round for sample in taken] == [0, 0, 1, 1, 2, 2]
    assert all(sample in first.samples for sample in taken[:4])


def test_the_next_attempt_continues_only_what_counts(tmp_path: Path) -> None:
    folder, manifest = make_cluster_run(tmp_path)
    write_attempt(folder, node("node1"), "a", rounds=1)
    write_attempt(folder, node("node1"), "b", rounds=2)
    write_attempt(folder, node("node1"), "c", rounds=3, first=2, cells=(8,), continues=("b",))
    write_attempt(folder, node("node1"), "d", rounds=1, cells=(16,))
    _, starts = counted(read_files(folder, manifest, "job-0"), manifest)
    assert continued(starts) == ["b", "c"]


def test_quiet_rounds_count_before_disturbed_ones_and_complete_cells_before_torn_ones(tmp_path: Path) -> None:
    """Of three planned rounds a disturbed one is replaced, up to four in all."""
    folder, _ = make_cluster_run(tmp_path)
    write_attempt(folder, node("torn"), "a", rounds=2)
    write_attempt(folder, node("disturbed"), "b", rounds=4, steal_ns=10**12)
    assert "disturbed" in machines(read_run(folder), 8)
    write_attempt(folder, node("quiet"), "c", rounds=3)
    write_attempt(folder, node("disturbed"), "d", rounds=4, steal_ns=10**12)
    write_attempt(folder, node("again"), "e", rounds=3)
    assert machines(read_run(folder), 8) == {"quiet", "bench-1"}  # bench-1: of job-1, which was not started


def test_a_missing_attempt_is_named(tmp_path: Path) -> None:
    folder, _ = make_cluster_run(tmp_path)
    write_attempt(folder, node("node1"), "b", continues=("a",))
    with pytest.raises(DataError, match=r"samples-job-0\.jsonl: continues an earlier samples file of job-0"):
        read_run(folder)
    write_attempt(folder, node("node1"), "c")
    (folder / "samples-job-0.jsonl").unlink()
    with pytest.raises(DataError, match=r"a samples file is missing \(there are samples-job-0-2\.jsonl\)"):
        read_run(folder)


def test_a_file_under_another_jobs_name_is_refused(tmp_path: Path) -> None:
    folder, _ = make_cluster_run(tmp_path)
    write_attempt(folder, node("node1"), "a", job=0)
    (folder / "samples-job-0.jsonl").rename(folder / "samples-job-1.jsonl")
    with pytest.raises(DataError, match="does not begin as a samples file of job-1"):
        read_run(folder)


def test_an_attempt_killed_before_its_first_record_counts_for_nothing(tmp_path: Path) -> None:
    folder, _ = make_cluster_run(tmp_path)
    (folder / "samples-job-0.jsonl").write_bytes(b'{"crc32":1,"rec')
    assert read_run(folder).samples == []
    write_attempt(folder, node("node1"), "a")
    assert len(timed(read_run(folder), 8)) == 2 * 3


def test_several_machines_are_named_and_never_one_table(tmp_path: Path) -> None:
    folder, _ = make_cluster_run(tmp_path)
    write_attempt(folder, node("node1"), "a", rounds=3, cells=(8,))
    write_attempt(folder, node("node2", cores=4), "b", rounds=3, cells=(16,))
    write_attempt(folder, node("node2", cores=4), "c", job=1)
    report = Report.of(read_run(folder))
    first, second = (caution.text for caution in report.cautions if "node1" in caution.text)
    assert first == "the run was measured on node1, node2, which differ in cores"
    assert "2 threads was measured on node1, node2, since its job was resumed" in second
    titles = [line for line in document(report).splitlines() if line.startswith("smollm2-135m")]
    assert [title.rpartition(", ")[2] for title in titles[:3]] == ["on node1", "on node2", "on node2"]
    with pytest.raises(DataError, match=r"was measured on several machines \(node1, node2\)"):
        session_of(report.tidy)


def test_runs_of_a_cluster_are_compared_by_what_measured_them(tmp_path: Path) -> None:
    def measured(out: Path, *names: str) -> Run:
        folder, _ = make_cluster_run(out)
        for job, name in enumerate(names):
            write_attempt(folder, node(name), name, job=job)
        return read_run(folder)

    a = measured(tmp_path / "a", "node1", "node2")
    assert compared(a, measured(tmp_path / "b", "node1", "node2")).differences == []
    swapped = compared(a, measured(tmp_path / "c", "node2", "node1"))
    assert swapped.differences == ["machine: another one for 8 of 8 cases that both plan"]
    assert swapped.same_machine  # in all that decides times
    others = compared(a, measured(tmp_path / "d", "node3", "node4")).differences
    assert "hostname: node1, node2 -> node3, node4" in others
