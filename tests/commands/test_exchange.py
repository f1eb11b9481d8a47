"""The commands export and import: where files go, what is said, and that an import stands beside a run of ours."""

import json
from pathlib import Path

import pytest

from bench.store.run_folder import samples_file
from tests.commandline import kvbench, refused
from tests.handmade import fail, grid, make_run
from tests.stored import create_run
from tests.tell.test_exchange import PP, TG

RUN = make_run([*grid(["dynamic"], [512], n_gen=1), *grid(["dynamic"], [512], n_gen=1, batch_size=2)])


def store(run, out):
    folder, manifest = create_run(out, run.manifest)
    with samples_file(folder, manifest.digest) as file:
        for record in [*run.checks, *run.samples, *run.failures]:
            file.append(record)
    return folder


@pytest.fixture
def run(tmp_path):
    return store(RUN, tmp_path / "runs")


def test_a_document_goes_into_the_runs_folder_to_a_file_or_to_stdout(run, tmp_path):
    assert kvbench("export", str(run), "--to", "bmf").stdout == f"{run / 'bmf.json'}\n"
    document = (run / "bmf.json").read_text()
    assert kvbench("export", str(run), "--to", "bmf", "--out", "-").stdout == document
    assert (
        kvbench("export", str(run), "--to", "bmf", "--out", str(tmp_path / "x.json")).stdout == f"{tmp_path}/x.json\n"
    )
    assert (tmp_path / "x.json").read_text() == document


def test_two_documents_get_a_name_each(run, tmp_path):
    printed = kvbench("export", str(run), "--to", "github-action-benchmark", "--out", str(tmp_path / "action.json"))
    paths = [tmp_path / f"action-{name}.json" for name in ("smaller", "bigger")]
    assert printed.stdout == "".join(f"{path}\n" for path in paths)
    assert all(json.loads(path.read_text()) for path in paths)


def test_what_a_format_cannot_hold_is_said(run):
    printed = kvbench("export", str(run), "--to", "llama-bench")
    assert printed.stderr == "left out: 1 case with several sequences in a batch, which llama-bench does not have\n"


@pytest.mark.parametrize("to", ["bmf", "github-action-benchmark", "llama-bench", "benchstat"])
def test_nothing_of_an_imported_generation_is_left_out(tmp_path, to):
    path = tmp_path / "llama.jsonl"
    path.write_text(json.dumps(TG))
    folder = kvbench("import", str(path), "--out", str(tmp_path / "runs")).stdout.strip()
    assert kvbench("export", folder, "--to", to).stderr == ""


@pytest.mark.parametrize("to", ["bmf", "github-action-benchmark", "llama-bench", "benchstat"])
def test_a_case_that_failed_is_said_to_be_left_out(tmp_path, to):
    cases = grid(["naive", "dynamic"], [8], n_gen=3)
    folder = store(make_run(cases, failures=[fail(cases[1])]), tmp_path)
    line = "left out: 2 rows of the summary without a time; `kvbench report` shows why\n"
    assert kvbench("export", str(folder), "--to", to).stderr == line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "github-action-benchmark", "--out", "-"], "--out -: github-action-benchmark is not one text"),
        (["--to", "xml"], "--to xml"),
        (["--to", "bmf", "--out", "."], "--out .: is a folder; give a file"),
        (["--to", "github-action-benchmark", "--out", "/"], "--out /: is a folder; give a file"),
        (["--to", "bmf", "--out", "/dev/null/x"], "--out /dev/null/x: cannot be written"),
    ],
)
def test_what_cannot_be_written_is_one_line(run, arguments, message):
    assert message in refused("export", str(run), *arguments)


def test_an_import_stands_beside_a_run_of_ours_without_an_interval(run, tmp_path):
    path = tmp_path / "llama.jsonl"
    path.write_text("".join(f"{json.dumps(test)}\n" for test in (PP, TG, TG | {"n_prompt": 5})))
    printed = kvbench("import", str(path), "--out", str(tmp_path / "runs"))
    folder = Path(printed.stdout.strip())
    assert printed.stderr == "left out: 1 of 3 tests (prompt and generation timed together)\n"
    shown = kvbench("report", str(folder))
    assert "llama.cpp" in shown.stdout
    assert f"imported from llama-bench ({path}): measured elsewhere, its tokens were not checked" in shown.stderr
    compared = json.loads(kvbench("compare", str(folder), str(folder), "-o", "json").stdout)
    assert {row["verdict"] for row in compared} == {"measured elsewhere"}
    assert {row["ratio_low"] for row in compared} == {None}
    assert {row["a_low"] for row in compared} >= {1.0}
    refused("import", str(path), "--out", str(tmp_path / "runs"))


def test_a_broken_line_costs_nothing_that_is_there(run, tmp_path):
    path = tmp_path / "llama.jsonl"
    path.write_text(f"{json.dumps(PP)}\n{{")
    before = sorted((tmp_path / "runs").iterdir())
    assert "llama.jsonl, line 2: no JSON" in refused("import", str(path), "--out", str(tmp_path / "runs"), code=3)
    assert sorted((tmp_path / "runs").iterdir()) == before
