"""`kvbench report` and `kvbench compare`: stored runs and A/Bs, without torch."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from bench.cli import main
from tests.commandline import BLOCKED, ROOT, kvbench, refused
from tests.handmade import grid, make_run
from tests.tell.test_exchange import PP
from tests.torture import store, store_ab
from tests.untraced import untraced_variables

REPORT_AND_COMPARE = f"""
import contextlib, sys
{BLOCKED.replace("main()", "")}
run, plots, ab = sys.argv[1:]
for arguments in ["report", run], ["compare", run, run, "--plots", plots], ["report", ab]:
    with contextlib.suppress(SystemExit):
        main(arguments)
"""


@pytest.mark.usefixtures("unsaved")
def test_report_and_compare_need_no_torch(tmp_path: Path) -> None:
    run_folder = store(make_run(grid(["naive", "dynamic"], [8, 16], n_gen=4)), tmp_path / "runs")
    kvbench("report", str(run_folder))
    before = (run_folder / "summary.csv").read_text()
    (run_folder / "summary.csv").unlink()
    ab, plots = store_ab(tmp_path / "ab"), tmp_path / "plots"
    command = [sys.executable, "-c", REPORT_AND_COMPARE, str(run_folder), str(plots), str(ab)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=300, env=untraced_variables()
    )
    assert (run_folder / "summary.csv").read_text() == before
    assert "no difference" in done.stdout
    assert "against main; a change up to 3 % counts as none" in done.stdout
    assert "not written" not in done.stderr
    drawn = {path.name for folder in (plots, run_folder / "plots") for path in folder.iterdir()}
    names = ("forest", "overlay", "speedup", "step_latency", "throughput")
    assert {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")} <= drawn


TABLE = """
import sys
from pathlib import Path
import bench.cli
from bench.store.run_folder import read_run
from bench.tell import notes, tables
from bench.tell.report import Report
report = Report.of(read_run(Path(sys.argv[1])))
print(tables.markdown(report.summary), notes.reading_line(report.summary), report.closing)
print(report.summary["predicted_ms"].notna().any())
print({"scipy", "matplotlib", "torch", "transformers", "duckdb", "jinja2"} & set(sys.modules))
"""


def test_a_table_waits_for_no_import_that_only_the_rest_of_a_report_needs() -> None:
    command = [sys.executable, "-c", TABLE, "results/examples/smollm2-135m-2-cores"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=300, env=untraced_variables()
    )
    assert done.stdout.splitlines()[-2:] == ["True", "set()"]


@pytest.mark.usefixtures("unsaved")
def test_formats_keep_stdout_clean(run_folder: Path) -> None:
    out = str(run_folder.parent)
    assert len(json.loads(kvbench("report", run_folder.name, "--out", out, "-o", "json").stdout)) == 16
    lines = kvbench("report", run_folder.name, "--out", out, "-o", "jsonl").stdout.splitlines()
    assert [json.loads(line)["phase"] for line in lines[:2]] == ["prefill", "decode"]
    assert kvbench("report", run_folder.name, "--out", out, "-o", "csv").stderr.strip() == str(run_folder)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("unsaved")
def test_a_terminal_without_a_size_loses_no_figure(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    drawn = []
    for columns in ("1", "40"):
        monkeypatch.setenv("COLUMNS", columns)
        with redirect_stdout(Terminal()) as terminal, pytest.raises(SystemExit):
            main(["report", str(run_folder)])
        drawn.append(terminal.getvalue())
    assert drawn[0] == drawn[1]
    assert "hf-generate" in drawn[0]


@pytest.mark.parametrize("command", [["report", "x"], ["compare", "x", "y"], ["run", "--resume", "x"]])
def test_missing_run_is_code_3(command: list[str], tmp_path: Path) -> None:
    assert "no run folder" in refused(*command, "--out", str(tmp_path), code=3)


def test_an_ab_is_reported_by_name_in_its_own_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    store_ab(tmp_path / "mine")
    printed = kvbench("report", "mine", "--out", str(tmp_path), code=4)
    assert printed.stdout.startswith("kvbench ab: mine against main; a change up to 3 % counts as none\n")
    assert not (tmp_path / "summary").exists()  # the A/B itself has told it
    assert "csv" in refused("report", "mine", "--out", str(tmp_path), "-o", "csv")
    assert "the record of an A/B" in refused("compare", "mine", "mine", "--out", str(tmp_path), code=3)


@pytest.mark.usefixtures("unsaved")
def test_the_page_is_written_beside_the_run_and_where_a_flag_says(run_folder: Path, tmp_path: Path) -> None:
    kvbench("report", str(run_folder), "--html", str(tmp_path / "mine.html"))
    page = (tmp_path / "mine.html").read_text()
    assert page == (run_folder / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    printed = kvbench("report", str(run_folder), "--html", str(tmp_path / "none" / "mine.html"), code=2)
    assert printed.stdout.endswith(f"{run_folder}\n")  # the table, all the same
    assert "mine.html (No such file or directory)" in printed.stderr
    store_ab(tmp_path / "mine")
    assert "only a run has a page" in refused("report", str(tmp_path / "mine"), "--html", str(tmp_path / "x.html"))


@pytest.mark.usefixtures("unsaved")
def test_any_number_of_runs_is_compared(run_folder: Path, tmp_path: Path) -> None:
    run, plots = str(run_folder), ["--plots", str(tmp_path / "plots")]
    printed = kvbench("compare", run, run, run, *plots, "--html", str(tmp_path / "three.html"))
    assert printed.stdout.startswith("Ranked by time / time of A, ")
    assert printed.stderr.splitlines() == [f"plots: {tmp_path / 'plots'}", f"page: {tmp_path / 'three.html'}"]
    assert (tmp_path / "three.html").read_text().count('role="radio"') == 3
    rows = json.loads(kvbench("compare", run, run, run, *plots, "-o", "json").stdout)
    assert len(rows) == 3 * 16
    two = kvbench("compare", run, run, *plots).stdout
    assert kvbench("compare", run, run, *plots, "--html", str(tmp_path / "two.html")).stdout == two
    assert (tmp_path / "two.html").read_text().count('role="radio"') == 2
    lost = kvbench("compare", run, run, run, *plots, "--html", str(tmp_path), code=2)
    assert f"not written: {tmp_path} (Is a directory)" in lost.stderr


def test_two_runs_of_different_models_are_ranked(tmp_path: Path) -> None:
    for model in ("llama 1B F16", "llama 3B F16"):
        (tmp_path / "x.jsonl").write_text(json.dumps(PP | {"model_type": model}))
        kvbench("import", str(tmp_path / "x.jsonl"), "--out", str(tmp_path), "--name", model[6:8])
    runs = [str(path) for path in sorted(tmp_path.glob("2026*"))]
    printed = kvbench("compare", *runs, "--plots", str(tmp_path / "plots"), "--html", str(tmp_path / "two.html"))
    assert printed.stdout.startswith("Ranked by time / time of A")
    assert (tmp_path / "two.html").exists()
    (tmp_path / "x.jsonl").write_text(json.dumps(PP | {"n_prompt": 9}))
    kvbench("import", str(tmp_path / "x.jsonl"), "--out", str(tmp_path), "--name", "other-work")
    other = str(*tmp_path.glob("*-other-work"))
    assert "nothing could be compared (model: " in kvbench("compare", runs[0], other, code=3).stdout


def test_a_run_alone_is_not_compared(run_folder: Path) -> None:
    assert "give two runs or more" in refused("compare", str(run_folder))


@pytest.mark.usefixtures("unsaved")
def test_the_folder_is_the_very_last_line_of_a_terminal(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cautions, and what the plots leave out, come before it."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    with pytest.raises(SystemExit):
        main(["report", str(run_folder)])
    lines = screen.getvalue().splitlines()
    assert lines[-1] == str(run_folder)
    assert any(line.startswith("- ") for line in lines[:-1])
