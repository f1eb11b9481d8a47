"""A store survives a kill, and accepts nothing damaged as another value."""

import contextlib
import os
import signal
import time
from contextlib import AbstractContextManager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.errors import DataError, UsageError
from bench.manifest import SCHEMA_VERSION, Manifest
from bench.record import Run
from bench.store import checked_lines, in_processes
from bench.store.run_folder import check_name, find, find_run, make_folder, read_run, samples_file
from tests.handmade import grid, make_case, make_ceiling, make_run, steady_roofs
from tests.stored import create_run

HANDMADE = make_run(grid(["naive", "dynamic"], [8]), rounds=3, roofs=steady_roofs)


def stored(out: Path, run: Run = HANDMADE, *, closed: bool = True) -> Path:
    """Write a handmade run into a new folder under `out`."""
    folder, manifest = create_run(out, run.manifest)
    writer = samples_file(folder, manifest.digest)
    for record in [*run.checks, *run.samples, *run.failures, *run.ceilings]:
        writer.append(record)
    if closed:
        writer.__exit__(None, None, None)
    return folder


def same(found: Run, expected: Run = HANDMADE) -> bool:
    names = ("samples", "checks", "failures", "ceilings")
    return all(getattr(found, name) == getattr(expected, name) for name in names)


def test_a_new_folder_of_runs_is_hidden_from_git_and_what_stands_beside_it_is_not(tmp_path: Path) -> None:
    for name in ("first", "second"):
        make_folder(tmp_path / "results" / "runs", name)
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob(".gitignore")] == [Path("results/runs/.gitignore")]
    assert (tmp_path / "results" / "runs" / ".gitignore").read_text() == "*\n"
    (tmp_path / "kept").mkdir()
    make_folder(tmp_path / "kept", "third")
    assert [path.name for path in (tmp_path / "kept").rglob("*")] == ["third"]


def test_a_gitignore_that_cannot_be_written_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert make_folder(tmp_path / "runs", "first").is_dir()
    assert "runs/.gitignore (Permission denied)" in capsys.readouterr().err


def test_what_is_written_is_read(tmp_path: Path) -> None:
    run = read_run(stored(tmp_path))
    assert same(run)
    assert msgspec.structs.replace(run.manifest, digest="") == msgspec.structs.replace(HANDMADE.manifest, digest="")


@settings(max_examples=60)
@given(data=st.data())
def test_killed_writer_loses_at_most_the_torn_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = stored(tmp_path_factory.mktemp("run"), closed=False)
    path = folder / "samples.jsonl"
    content = path.read_bytes()
    kept = content[: data.draw(st.integers(0, len(content)))]
    path.write_bytes(kept)
    run = read_run(folder)
    assert len(run.samples) + len(run.checks) + len(run.ceilings) == kept.count(b"\n")
    assert run.samples == HANDMADE.samples[: len(run.samples)]


@settings(max_examples=200)
@given(data=st.data())
def test_no_damage_is_accepted(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A flipped bit, swapped or missing or doubled lines: the same values are read, or DataError is raised."""
    folder = stored(tmp_path_factory.mktemp("run"))
    path = folder / data.draw(st.sampled_from(["samples.jsonl", "manifest.json"]))
    content = bytearray(path.read_bytes())
    lines = bytes(content).splitlines(keepends=True)
    i, j = data.draw(st.integers(0, len(lines) - 1)), data.draw(st.integers(0, len(lines) - 1))
    match data.draw(st.sampled_from(["flip", "swap", "drop", "double"])):
        case "flip":
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        case "swap":
            lines[i], lines[j] = lines[j], lines[i]
            content = bytearray(b"".join(lines))
        case "drop":
            content = bytearray(b"".join(lines[:i] + lines[i + 1 :]))
        case "double":
            content = bytearray(b"".join(lines[: i + 1] + lines[i:]))
    path.write_bytes(bytes(content))
    with contextlib.suppress(DataError):  # naming the file, as test_damaged_line_is_named shows
        assert same(read_run(folder))  # only a lost closing line goes unnoticed: it is a kill just before it


def test_damaged_line_is_named(tmp_path: Path) -> None:
    path = stored(tmp_path) / "samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[4] = lines[4].replace(b'"round":0', b'"round":1')
    path.write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=r"samples\.jsonl, line 5"):
        read_run(path.parent)


@settings(max_examples=60)
@given(data=st.data())
def test_no_damage_is_accepted_in_a_file_that_is_read_in_parts(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """It says the same, of the same line, as of a file that is read in one part."""
    path = stored(tmp_path_factory.mktemp("run")) / "samples.jsonl"
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(bytes(content))
    said = refusal(path.parent)
    with patch.object(checked_lines, "PART_BYTES", data.draw(st.integers(1, len(content)))), one_process():
        assert refusal(path.parent) == said


def test_a_file_that_is_read_in_parts_by_several_processes(tmp_path: Path) -> None:
    path = stored(tmp_path) / "samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    with patch.object(checked_lines, "PART_BYTES", 500), patch.object(os, "sched_getaffinity", lambda _: {0, 1}):
        assert len(checked_lines.parts(path, "")) >= 2 * in_processes.FEWEST
        assert same(read_run(path.parent))
        path.write_bytes(b"".join([*lines[:-3], lines[-2], lines[-3], lines[-1]]))
        assert refusal(path.parent) == f"{path}, line {len(lines) - 2}: damaged (its checksum does not fit)"
        path.write_bytes(b"".join([*lines, lines[-1]]))
        assert refusal(path.parent) == f"{path}, line {len(lines) + 1}: stands after the closing line"


def test_a_reader_that_is_killed_is_no_end_of_the_file() -> None:
    with patch.object(os, "sched_getaffinity", lambda _: {0, 1}), pytest.raises(EOFError):
        list(in_processes.mapped(lambda item: os._exit(9) if item == 5 else item, range(8)))


def test_results_come_in_order_however_long_each_takes_and_an_error_in_its_turn(tmp_path: Path) -> None:
    def slow_at_first(item: int) -> int:
        (tmp_path / f"{item}").touch()
        while item == 0 and not (tmp_path / "3").exists():  # the other process goes on meanwhile
            os.sched_yield()
        return 10 // (4 - item)

    with patch.object(os, "sched_getaffinity", lambda _: {0, 1}):
        results = in_processes.mapped(slow_at_first, range(6), fewest=1)
        assert [next(results) for _ in range(4)] == [2, 3, 5, 10]
        with pytest.raises(ZeroDivisionError):
            next(results)


@pytest.mark.parametrize("cores", [{0}, {0, 1}])
def test_what_is_done_beside_gives_its_result_or_its_error(cores: set[int]) -> None:
    with patch.object(os, "sched_getaffinity", lambda _: cores):
        with in_processes.beside(os.getpid) as result:
            assert (result() == os.getpid()) == (len(cores) == 1)
        with pytest.raises(ZeroDivisionError), in_processes.beside(lambda: 1 // 0) as result:
            result()
    two = patch.object(os, "sched_getaffinity", lambda _: {0, 1})
    with two, pytest.raises(EOFError), in_processes.beside(lambda: os._exit(9)) as result:
        result()


def test_a_process_that_is_ended_before_it_began_does_not_handle_that_as_its_parent_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under load another may have done all there is to do by then."""
    started: list[BaseProcess] = []
    start, begin = BaseProcess.start, BaseProcess._bootstrap  # type: ignore[attr-defined]  # a forked one's first call

    def counted(process: BaseProcess) -> None:
        started.append(process)
        start(process)

    def late(process: BaseProcess, *args: Any, **named: Any) -> Any:
        if len(started) == 2:
            time.sleep(0.5)
        return begin(process, *args, **named)

    monkeypatch.setattr(BaseProcess, "start", counted)
    monkeypatch.setattr(BaseProcess, "_bootstrap", late)
    handler = signal.signal(signal.SIGTERM, lambda *_: (tmp_path / "handled").touch())
    try:
        with patch.object(os, "sched_getaffinity", lambda _: {0, 1}):
            assert list(in_processes.mapped(abs, [-1, 2], fewest=1)) == [1, 2]
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert not (tmp_path / "handled").exists()


def refusal(folder: Path) -> str | None:
    """Return what is said of a run that cannot be read."""
    try:
        read_run(folder)
    except DataError as error:
        return str(error)
    return None


def one_process() -> AbstractContextManager[object]:
    """Read in this process, however many parts there are."""
    return patch.object(os, "sched_getaffinity", lambda _: {0})


def test_zero_time_is_refused(tmp_path: Path) -> None:
    sample = msgspec.structs.replace(HANDMADE.samples[0], prefill_ns=0)
    folder = stored(tmp_path, msgspec.structs.replace(HANDMADE, samples=[sample]))
    with pytest.raises(DataError, match="not positive"):
        read_run(folder)


def test_two_writers_have_files_of_their_own(tmp_path: Path) -> None:
    folder, manifest = create_run(tmp_path, HANDMADE.manifest)
    with samples_file(folder, manifest.digest) as first, samples_file(folder, manifest.digest) as second:
        for number, sample in enumerate(HANDMADE.samples):
            (first, second)[number % 2].append(sample)
    assert sorted(path.name for path in folder.glob("samples*")) == ["samples-2.jsonl", "samples.jsonl"]
    assert sorted(map(repr, read_run(folder).samples)) == sorted(map(repr, HANDMADE.samples))


def test_newer_schema_is_refused(tmp_path: Path) -> None:
    newer = msgspec.structs.replace(HANDMADE.manifest, schema_version=SCHEMA_VERSION + 1)
    folder, _ = create_run(tmp_path, newer)
    with pytest.raises(DataError, match="newer"):
        read_run(folder)


def test_folder_is_never_taken_twice(tmp_path: Path) -> None:
    create_run(tmp_path, HANDMADE.manifest)
    with pytest.raises(UsageError, match="exists already"):
        create_run(tmp_path, HANDMADE.manifest)


def test_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UsageError, match="--out"):
        create_run(tmp_path / "out", HANDMADE.manifest)


def test_run_is_found_by_path_or_name(tmp_path: Path) -> None:
    folder = stored(tmp_path)
    assert find_run(str(folder), Path("elsewhere")) == folder
    assert find_run(folder.name, tmp_path) == folder
    with pytest.raises(DataError, match=folder.name):
        find_run("missing", tmp_path)


@pytest.mark.parametrize("name", ["a/b", "..", ".", "", "a b", "ä", "a\n", "a" * 201])
def test_bad_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--name"):
        check_name(name)


def test_a_folder_that_may_not_be_read_is_no_missing_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
        find(str(tmp_path), tmp_path)


def test_manifest_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = stored(tmp_path)
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match="damaged"):
        read_run(folder)
    assert Manifest.__struct_config__.frozen


@pytest.mark.parametrize("fields", [{"pass_ns": []}, {"pass_ns": [5, 0]}, {"pass_ns": [-1]}, {"amount": 0}])
def test_impossible_ceiling_is_refused(tmp_path: Path, fields: dict[str, object]) -> None:
    bad = make_ceiling(make_case("naive", 8).cell, "gemm", 1e9, **fields)
    folder = stored(tmp_path, msgspec.structs.replace(HANDMADE, ceilings=[bad]))
    with pytest.raises(DataError, match="amount or a time"):
        read_run(folder)


def test_ceiling_of_a_cell_that_is_not_planned_is_refused(tmp_path: Path) -> None:
    stranger = make_ceiling(make_case("naive", 9).cell, "gemm", 1e9)
    folder = stored(tmp_path, msgspec.structs.replace(HANDMADE, ceilings=[stranger]))
    with pytest.raises(DataError, match="does not plan"):
        read_run(folder)


def test_runs_stored_before_there_were_ceilings_are_read() -> None:
    """A digest is of the stored fields, so it holds whatever the manifest and its plan have gained since."""
    (example,) = (Path(__file__).resolve().parents[2] / "results" / "examples").glob("smollm2-135m-2-cores")
    assert read_run(example).samples


def test_what_is_not_there_is_answered_with_what_is(tmp_path: Path) -> None:
    for name, manifest in (("20260101-run", "manifest.json"), ("20260102-ab", "ab.json"), ("20260103-other", "x.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / manifest).touch()
    with pytest.raises(DataError, match=r"the latest there are 20260102-ab, 20260101-run$"):
        find("mistyped", tmp_path)
    with pytest.raises(DataError, match="there is none yet"):
        find("mistyped", tmp_path / "20260103-other")
