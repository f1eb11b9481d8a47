"""What jobs wrote elsewhere is merged once, checked, and never over what lies there."""

import shutil
from pathlib import Path

import pytest

from bench.store.run_folder import read_run
from tests.cluster import make_cluster_run, node, write_attempt
from tests.commandline import kvbench, refused


def copied(folder: Path, to: Path) -> Path:
    """Copy a run folder to a node without a shared file system."""
    shutil.copytree(folder, to)
    return to


def test_nodes_without_a_shared_file_system_are_merged_once(tmp_path: Path) -> None:
    folder, _ = make_cluster_run(tmp_path / "runs")
    one, two = copied(folder, tmp_path / "one"), copied(folder, tmp_path / "two")
    write_attempt(one, node("node1"), "a", job=0)
    write_attempt(two, node("node2"), "b", job=1)
    write_attempt(two, node("node2"), "c", job=0)  # measured twice, by accident
    arguments = ["collect", str(one), str(two), "--out", str(tmp_path / "runs")]
    printed = kvbench(*arguments)
    assert printed.stdout == f"{folder}\n"
    assert printed.stderr.count("copied to") == 3
    run = read_run(folder)
    assert len([sample for sample in run.samples if not sample.warmup]) == 2 * 2 * 2 * 3
    assert kvbench(*arguments).stderr.count("lies already in") == 3
    assert read_run(folder) == run


def test_a_file_that_grew_takes_the_place_of_its_copy(tmp_path: Path) -> None:
    folder, _ = make_cluster_run(tmp_path / "runs")
    node1 = copied(folder, tmp_path / "node1")
    write_attempt(node1, node("node1"), "a")
    path = node1 / "samples-job-0.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    kvbench("collect", str(node1), "--out", str(tmp_path / "runs"))
    path.write_bytes(whole)
    kvbench("collect", str(node1), "--out", str(tmp_path / "runs"))
    assert (folder / path.name).read_bytes() == whole
    assert not (folder / "samples-job-0-2.jsonl").exists()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content.replace(b'"round":1', b'"round":2', 1), "damaged"),
        (lambda content: b"{}\n" + content, "line 1: damaged, or not the start of a job"),
    ],
)
def test_a_damaged_file_is_not_merged(tmp_path: Path, damage: object, reason: str) -> None:
    assert callable(damage)
    folder, _ = make_cluster_run(tmp_path / "runs")
    node1 = copied(folder, tmp_path / "node1")
    write_attempt(node1, node("node1"), "a")
    path = node1 / "samples-job-0.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    assert reason in refused("collect", str(node1), "--out", str(tmp_path / "runs"), code=3)
    assert list(folder.glob("samples*")) == []


def test_a_folder_without_samples_or_without_its_run_is_refused(tmp_path: Path) -> None:
    folder, _ = make_cluster_run(tmp_path / "runs")
    assert "no such folder" in refused("collect", str(tmp_path / "none"), code=3)
    assert "holds no samples of a job" in refused("collect", str(folder), code=3)
    write_attempt(folder, node("node1"), "a")
    assert "no run folder" in refused("collect", str(folder), "--out", str(tmp_path / "empty"), code=3)


def test_what_is_collected_arrives_below_out_whatever_lies_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make_cluster_run(tmp_path / "runs")
    part = copied(folder, tmp_path / "parts" / folder.name)
    write_attempt(part, node("node1"), "a")
    monkeypatch.chdir(tmp_path / "parts")
    printed = kvbench("collect", folder.name, "--out", "../runs")
    assert printed.stdout == f"../runs/{folder.name}\n"
    assert (folder / "samples-job-0.jsonl").read_bytes() == (part / "samples-job-0.jsonl").read_bytes()


def test_a_file_killed_before_its_first_record_and_a_part_without_the_earlier_one_are_named(tmp_path: Path) -> None:
    folder, _ = make_cluster_run(tmp_path / "runs")
    parts = [tmp_path / "one", tmp_path / "two"]
    for part, attempt, continues in zip(parts, "ab", ((), ("a",)), strict=True):
        part.mkdir()
        write_attempt(folder, node("node1"), attempt, continues=continues, into=part)
    (parts[1] / "samples-job-1.jsonl").write_bytes(b'{"crc32":1')
    said = kvbench("collect", str(parts[1]), "--out", str(tmp_path / "runs")).stderr.splitlines()
    assert said[1].endswith("samples-job-1.jsonl: left out: its job was killed before its first record")
    assert said[2].startswith(f"{folder}: cannot be read until the missing file is collected, too (")
    assert len(kvbench("collect", *map(str, parts), "--out", str(tmp_path / "runs")).stderr.splitlines()) == 3
    read_run(folder)
