"""What cannot be written, drawn or printed costs nothing else: neither the table, nor the exit code, nor a sample."""

import errno
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import typer

from bench.cli import main
from bench.commands.output import emit, print_verdicts
from bench.commands.streams import lasting_streams
from bench.judge.verdict import Verdict
from bench.store.run_folder import read_run
from bench.study import train
from kvcache.learn.training_folder import Outcome
from tests.commandline import ROOT, kvbench
from tests.handmade import grid, make_case, make_run
from tests.torture import store, store_ab
from tests.untraced import untraced_variables


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half as large as the other commands': it is reported some fifty times here."""
    return store(make_run(grid(["naive", "dynamic"], [8, 16], n_gen=4)), tmp_path_factory.mktemp("runs"))


def broken(*_: Any, **__: Any) -> Any:
    """Fail as no writer is expected to."""
    raise RuntimeError("planted")


def full(*_: Any, **__: Any) -> Any:
    """Fail as a writer does on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


WRITERS = {
    "bench.tell.report.document": "summary.md",
    "bench.tell.report.benchmark_json": "benchmark.json",
    "bench.tell.report.write_atomically": "summary.csv, summary.json, summary.md, benchmark.json",
    "bench.tell.report.cautions": "cautions, summary.md",
    "bench.tell.report.slopes": "plots, summary.md",
    "bench.tell.notes.closing_lines": "the closing sentence, summary.md",
    "bench.tell.notes.reading_line": "how to read the figures, summary.md",
    "bench.tell.plots.run.step_latency": "plots/step_latency",
    "bench.tell.plots.run.across.figures": "plots",
    "bench.tell.plots.run.against_roofs": "plots",
    "bench.tell.plots.style.write": "plots/step_latency",
    "bench.tell.page.svg.picture": "plots/step_latency",
    "bench.tell.page.run.document": "report.html",
}


@pytest.mark.usefixtures("unsaved")
@pytest.mark.parametrize(("writer", "failure"), list(zip(WRITERS, itertools.cycle([broken, full]), strict=False)))
def test_a_derived_file_that_fails_costs_no_table(
    writer: str, failure: Callable[..., Any], run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One way of failing for each, by turns: what catches them is the same."""
    monkeypatch.setattr(writer, failure)
    if "plots" not in WRITERS[writer]:
        monkeypatch.setattr("bench.tell.report.write_plots", lambda report, derived: {})
    printed = kvbench("report", str(run_folder))
    assert printed.stdout.endswith(f"{run_folder}\n")
    assert "dynamic" in printed.stdout
    (line,) = [line for line in printed.stderr.splitlines() if line.startswith("kvbench:")]
    assert f"not written: {WRITERS[writer]}" in line
    assert "planted" in line or "No space left" in line


def test_plots_that_a_flag_asks_for_are_exit_code_2_after_the_table(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.tell.plots.comparison.forest", broken)
    runs = ["compare", str(run_folder), str(run_folder)]
    for flags, code in ([], 0), (["--plots", str(tmp_path)], 2):
        printed = kvbench(*runs, *flags, code=code)
        assert "no difference" in printed.stdout
        assert "planted" in printed.stderr


@pytest.mark.parametrize("writer", ["bench.tell.plots.drift.figure", "bench.tell.plots.style.save"])
def test_a_drift_plot_that_fails_is_exit_code_2_after_the_table(
    writer: str, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kvbench("baseline", "promote", str(run_folder), "--baseline-dir", str(tmp_path), "--name", "mine")
    monkeypatch.setattr(writer, broken)
    history = ["baseline", "history", "--baseline-dir", str(tmp_path)]
    printed = kvbench(*history, "--plot", str(tmp_path / "drift"), code=2)
    assert printed.stdout == kvbench(*history).stdout
    assert "--plot" in printed.stderr
    assert "planted" in printed.stderr


def test_pictures_of_a_trace_that_fail_leave_its_table(
    love: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.study.trace_pictures.draw", broken)
    trace = ["trace", "-m", str(love), "--prompt", "", "-n", "2", "-t", "1", "-o", "json"]
    printed = kvbench(*trace, "--plot", str(tmp_path / "trace.png"), code=2)
    assert json.loads(printed.stdout)
    assert "planted" in printed.stderr


def test_a_step_summary_that_cannot_be_written_leaves_the_verdict(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = ["gate", str(run_folder), "--baseline", str(run_folder)]
    verdict = kvbench(*gate).stdout
    os.mkfifo(tmp_path / "unread")
    for path in (tmp_path, tmp_path / "missing" / "page", tmp_path / "unread", "/dev/full", "\0"):
        if path != "\0":
            monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
        else:
            monkeypatch.setattr("bench.tell.verdicts.markdown", broken)
        printed = kvbench(*gate)
        assert printed.stdout == verdict
        assert "GITHUB_STEP_SUMMARY" in printed.stderr


@pytest.mark.parametrize(
    ("kind", "code"), [("failed", 5), ("regression", 1), ("missing", 3), ("inconclusive", 4), ("same", 0)]
)
@pytest.mark.parametrize("form", ["md", "json"])
@pytest.mark.parametrize("command", ["gate", "ab"])
def test_no_verdict_changes_by_a_lost_step_summary(
    command: Any, form: Any, kind: Any, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "/dev/full")
    found = [
        Verdict(case=make_case(), phase="decode", quantity="forward_calls", kind=each, base=1, head=2)
        for each in ("same", kind)
    ]
    with pytest.raises(typer.Exit) as ended:
        print_verdicts(found, form, command=command, title="title")
    printed = capsys.readouterr()
    assert ended.value.exit_code == code
    assert "title" in printed.out
    assert "not written: the workflow's summary (GITHUB_STEP_SUMMARY) (No space left on device)" in printed.err


def test_a_loss_curve_that_cannot_be_drawn_leaves_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.tell.plots.training.loss_curve", broken)
    outcome = Outcome(
        loss=1.0, entropy=1.0, losses=[(1, 1.0)], shape=(1, 2), n_parameters=1, n_texts=1, n_cut=0, n_targets=1
    )
    train._draw(outcome, tmp_path)
    assert "loss.png" in capsys.readouterr().err


MATPLOTLIB = {
    "a window, TeX, a font that is missing, and a backend that is": (
        {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        "backend: QtAgg\ntext.usetex: True\nfont.family: Nowhere\n",
    ),
    "a broken style, no backend at all, and no folder for settings": (
        {"MPLBACKEND": "nonsense", "MPLCONFIGDIR": "/proc/none"},
        "axes.grid: maybe\nnonsense\n",
    ),
    "a style that is no text": ({}, "\udcff\udcfe"),
}
"""Variables, and a file of settings: several at once, since each alone would fail or change the plot."""


REPORTS = """
import importlib, json, os, sys
import pandas, scipy.stats
import bench.tell.report
from bench.cli import main

assert "matplotlib" not in sys.modules  # it reads the settings when it is imported
for name in sys.argv[2:]:
    importlib.import_module(name)
for folder, (variables, streams) in json.loads(sys.argv[1]).items():
    child = os.fork()
    if child == 0:
        os.environ.update(variables)
        os.chdir(folder)
        for name, path in streams.items():
            number = ["stdin", "stdout", "stderr"].index(name)
            if path:
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
            else:  # as in a process that starts with it closed
                os.close(number)
                setattr(sys, name, None)
        from bench.tell.page import svg
        from bench.tell.plots import run, style

        drawn, write = style.drawn, style.write  # one plot stands for all
        run.step_latency = lambda *_: style.make_figure("", "", 1)
        style.drawn = lambda figure: drawn(figure) if figure.get_label()[:10] == "Throughput" else style.Drawn(b"", "")
        style.write = lambda made, path: write(made, path) if made.png else []
        svg.picture = lambda *_: svg.Picture("", "<svg/>")
        main(["report", folder])
    # At once: what is still buffered, the next fork would write to its own stdout.
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def codes_of_reports(
    given: Mapping[Path, tuple[Mapping[str, str], Mapping[str, str | None]]], *imported: str
) -> list[int]:
    """Report each run in a fork of one process, under its variables and with its streams; return the exit codes."""
    by_folder = json.dumps({str(folder): each for folder, each in given.items()})
    command = [sys.executable, "-c", REPORTS, by_folder, *imported]
    env = untraced_variables() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env, check=True, timeout=900)
    return [int(code) for code in done.stdout.split()]


def test_a_plot_that_cannot_be_saved_is_still_on_the_page(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.tell.plots.style.write", full)
    printed = kvbench("report", str(run_folder))
    assert "not written: plots/step_latency" in printed.stderr
    assert 'id="step_latency-figure_1"' in (run_folder / "report.html").read_text(encoding="utf-8")


def test_the_users_settings_of_matplotlib_change_no_plot(tmp_path: Path) -> None:
    stored = store(make_run(grid(["dynamic"], [8, 16], n_gen=4)), tmp_path / "runs")
    given: dict[Path, tuple[dict[str, str], dict[str, str | None]]] = {
        shutil.copytree(stored, tmp_path / "expected"): ({}, {"stdout": os.devnull})
    }
    for name, (variables, style) in MATPLOTLIB.items():
        folder = shutil.copytree(stored, tmp_path / name)
        (folder / "matplotlibrc").write_text(style, encoding="utf-8", errors="surrogateescape")
        streams: dict[str, str | None] = {"stdout": os.devnull, "stderr": str(folder / "errors")}
        given[folder] = ({"MATPLOTLIBRC": str(folder / "matplotlibrc")} | variables, streams)
    assert codes_of_reports(given) == [0] * len(given)
    for name in MATPLOTLIB:
        assert "matplotlib" not in (tmp_path / name / "errors").read_text().lower(), name
        drawn, expected = (tmp_path / folder / "plots" / "throughput.svg" for folder in (name, "expected"))
        assert drawn.read_bytes() == expected.read_bytes(), name


STREAMS: dict[str, tuple[dict[str, str | None], int]] = {
    "no stdout": ({"stdout": None, "stderr": "errors"}, 0),
    "no stderr": ({"stdout": "output", "stderr": None}, 0),
    "neither": ({"stdout": None, "stderr": None}, 0),
    "read in part": ({"stdout": "pipe", "stderr": "errors"}, 0),
    "a full device": ({"stdout": "/dev/full", "stderr": "errors"}, 5),
    "full for errors": ({"stdout": "output", "stderr": "/dev/full"}, 0),
}


def test_a_report_survives_its_streams(tmp_path: Path) -> None:
    run = make_run(grid(["dynamic"], [8], n_gen=4))
    folders = {name: store(run, tmp_path / name) for name in STREAMS}
    for folder in folders.values():
        os.mkfifo(folder / "pipe")
    with subprocess.Popen(
        ["timeout", "900", "head", "-1", folders["read in part"] / "pipe"], stdout=subprocess.DEVNULL
    ):
        given = {folders[name]: ({}, streams) for name, (streams, _) in STREAMS.items()}
        codes = codes_of_reports(given, "bench.tell.plots.run")
    assert dict(zip(STREAMS, codes, strict=True)) == {name: code for name, (_, code) in STREAMS.items()}
    for name, folder in folders.items():
        errors = (folder / "errors").read_text() if (folder / "errors").exists() else ""
        assert "Traceback" not in errors, name
        assert "Exception ignored" not in errors, name
        assert ("kvbench: stdout: cannot be written (No space left on device)" in errors) is (name == "a full device")
        assert (folder / "plots" / "throughput.svg").exists(), name


def test_a_process_that_starts_without_streams_reports(tmp_path: Path) -> None:
    folder = store(make_run(grid(["dynamic"], [8], n_gen=4)), tmp_path / "runs")
    without = ["bash", "-c", '"$0" -m bench.cli report "$1" <&- >&- 2>&-', sys.executable, str(folder)]
    assert subprocess.run(without, cwd=ROOT, check=False, timeout=120, env=untraced_variables()).returncode == 0
    assert (folder / "plots" / "throughput.svg").exists()


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_character_that_the_locale_lacks_is_escaped(errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors))
    with lasting_streams():
        emit("\u00d7\udcff")
    assert sys.stdout.buffer.getvalue() == rb"\xd7\udcff"


def test_a_fault_after_the_measurement_says_where_it_is_kept(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = read_run(run_folder)
    monkeypatch.setattr("bench.measure.run.measure", lambda *_: measured)
    monkeypatch.setattr("bench.tell.report.summarize", broken)
    run = ["run", "-m", "random:tiny", "-p", "8", "-n", "4", "-t", "1", "--strategies", "naive"]
    printed = kvbench(*run, "--out", str(tmp_path), code=5)
    assert "planted" in printed.stderr
    assert f"what was measured is kept in {run_folder}" in printed.stderr


class Refusing(io.StringIO):
    """A stream that takes nothing."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.usefixtures("unsaved")
@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["report"], ["ab-report"], ["gate"], ["compare"]], ids=str
)
@pytest.mark.parametrize(("number", "code"), [(errno.EPIPE, 0), (errno.ENOSPC, 5)])
def test_every_command_that_prints_survives_its_stdout(
    arguments: list[str], number: int, code: int, run_folder: Path, tmp_path: Path
) -> None:
    run = str(run_folder)
    match arguments[0]:
        case "report":
            arguments = ["report", run]
        case "ab-report":  # inconclusive: the verdict stands
            store_ab(tmp_path / "mine")
            arguments, code = ["report", str(tmp_path / "mine")], 4
        case "gate":
            arguments = ["gate", run, "--baseline", run]
        case "compare":
            arguments = ["compare", run, run, "--plots", str(tmp_path)]
    errors = io.StringIO()
    with redirect_stdout(Refusing(number)), redirect_stderr(errors), pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == code, errors.getvalue()
    assert ("stdout: cannot be written" in errors.getvalue()) is (number == errno.ENOSPC)
    with redirect_stdout(io.StringIO()), redirect_stderr(Refusing(number)), pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code in (0, 4)
