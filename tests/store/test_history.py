"""The history is made of the runs, follows them, and loses nothing when it cannot."""

import errno
import io
import json
import os
import resource
import shutil
from pathlib import Path

import msgspec
import pandas as pd
import pytest
from matplotlib.text import Text
from rich.console import Console

from bench.analysis import columns
from bench.analysis.summary import summarize
from bench.analysis.tidy import Tidy
from bench.errors import DataError, UsageError
from bench.store import duck, history
from bench.store.duck import TYPES, connect
from bench.store.history import DATABASE, History
from bench.store.run_folder import samples_file
from bench.store.summary_file import fitting_rows
from bench.tell import past_runs
from bench.tell.plots import past_runs as past_plots
from bench.tell.plots.past_runs import trends
from tests.cluster import make_cluster_run, node, write_attempt
from tests.commandline import kvbench, refused
from tests.handmade import ENVIRONMENT, grid, make_run
from tests.stored import create_run
from tests.tell.test_exchange import PP

pytest.importorskip("duckdb")

COLUMNS = {column.name: TYPES[column.dtype] for column in columns.COLUMNS}
RUN = make_run(grid(["naive", "dynamic"], [8], n_gen=3))


def add(folder, name, **facts):
    """A stored run, measured a day later for each letter of its name."""
    environment = msgspec.structs.replace(ENVIRONMENT, **facts)
    day = f"2026-03-{ord(name[-1]) - ord('a') + 1:02}T04:00:00+00:00"
    manifest = msgspec.structs.replace(RUN.manifest, run_id=name, created_utc=day, environment=environment)
    path, manifest = create_run(folder, manifest)
    with samples_file(path, manifest.digest) as file:
        for record in [*RUN.checks, *RUN.samples]:
            file.append(record)
    return path


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    for name in "abc":
        add(folder, name, torch="2.14.0" if name == "c" else "2.13.0")
    return folder


@pytest.fixture
def derived(monkeypatch):
    """The runs whose summary was derived from the samples."""
    made = []
    derive = past_runs.derive
    monkeypatch.setattr(past_runs, "derive", lambda path: made.append(path.name) or derive(path))
    return made


def names(*folders, where=None, limit=50, notes=None):
    with connect() as connection:
        found = History(connection, folders, COLUMNS, past_runs.derive)
        (notes if notes is not None else []).extend(found.notes)
        answer = past_runs.listed(found, past_runs.condition(where, {}), limit)
    return [row["run"] for row in answer.rows]


def test_the_newest_runs_come_first_and_only_what_changed_is_read(runs, derived):
    assert names(runs) == ["c", "b", "a"]
    assert sorted(derived) == ["a", "b", "c"]
    assert names(runs, limit=2) == ["c", "b"]
    add(runs, "d")
    assert names(runs) == ["d", "c", "b", "a"]
    shutil.rmtree(runs / "b")
    assert names(runs) == ["d", "c", "a"]
    assert sorted(derived) == ["a", "b", "c", "d"]


def test_the_database_can_be_deleted_and_is_made_again_of_the_summaries(runs, derived):
    before = names(runs)
    (runs / DATABASE).unlink()
    derived.clear()
    assert names(runs) == before
    assert derived == []


def test_a_new_database_has_small_blocks_and_an_older_one_is_used_as_it_is(runs):
    def size_of_a_block():
        with connect() as connection:
            connection.execute(f"ATTACH '{runs / DATABASE}' AS f0")
            found = "SELECT block_size FROM pragma_database_size() WHERE database_name = 'f0'"
            return connection.execute(found).fetchall()

    before = names(runs)
    assert size_of_a_block() == [(16384,)]
    (runs / DATABASE).unlink()
    assert size_of_a_block() == [(262144,)]  # as DuckDB makes it
    assert names(runs) == before
    add(runs, "d")
    assert names(runs) == ["d", *before]
    assert size_of_a_block() == [(262144,)]


def test_a_summary_that_is_not_of_these_samples_is_derived_again(runs, derived):
    names(runs)
    stored = json.loads((runs / "a" / "summary.json").read_text())
    for stale in (stored | {"samples_sha256": "0" * 64}, stored | {"schema_version": 0}, stored["rows"]):
        derived.clear()
        (runs / "a" / "summary.json").write_text(json.dumps(stale))
        names(runs)
        assert derived == ["a"]
        assert fitting_rows(runs / "a") == stored["rows"]


def test_a_damaged_run_is_named_and_skipped_each_time(runs):
    path = runs / "b" / "samples.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"round":1', b'"round":2'))
    for _ in range(2):
        notes = []
        assert names(runs, notes=notes) == ["c", "a"]
        assert len(notes) == 1
        assert "samples.jsonl, line" in notes[0]


def test_a_condition_is_one_on_the_summarys_columns(runs):
    assert names(runs, where="strategy = 'dynamic' AND torch = '2.14.0'") == ["c"]
    assert names(runs, where="n_prompt > 8") == []
    assert names(runs, where="n_prompt = 8 -- of a short prompt", limit=1) == ["c"]
    with pytest.raises(UsageError, match="no_such_column"):
        names(runs, where="no_such_column = 1")


def test_a_row_that_does_not_fit_is_derived_again_and_any_other_error_costs_one_run(runs, derived, monkeypatch):
    names(runs)
    path = runs / "a" / "summary.json"
    whole = json.loads(path.read_text())
    for change in ({"latency_ms": "abc"}, {"n_prompt": 2**70}, {"machine": ...}):
        row = {name: value for name, value in (whole["rows"][0] | change).items() if value is not ...}
        path.write_text(json.dumps(whole | {"rows": [row, *whole["rows"][1:]]}))
        (runs / DATABASE).unlink()
        derived.clear()
        assert names(runs) == ["c", "b", "a"]
        assert derived == ["a"]
    monkeypatch.setattr("tests.store.test_history.past_runs.derive", lambda path: [0] * 2**62)
    path.unlink()
    notes = []
    assert names(runs, notes=notes) == ["c", "b"]
    assert [note.split(":")[:3] for note in notes] == [["skipped", f" {runs / 'a'}", " MemoryError "]]


def test_a_folder_whose_name_is_no_utf_8_is_skipped(runs):
    (runs / "a").rename(os.fsdecode(os.fsencode(runs) + b"/run-\xff"))
    notes = []
    assert names(runs, notes=notes) == ["c", "b"]
    assert [note.endswith("its name is no UTF-8") for note in notes] == [True]
    printed = kvbench("history", str(runs))
    assert "run-" in printed.stderr


def test_one_folder_by_two_names_counts_once(runs, tmp_path):
    (tmp_path / "link").symlink_to(runs)
    assert names(runs, runs / ".." / "runs", tmp_path / "link") == ["c", "b", "a"]


def test_a_folder_that_is_spelled_otherwise_or_moved_is_not_read_again(runs, derived, monkeypatch):
    assert names(runs) == ["c", "b", "a"]
    derived.clear()
    monkeypatch.chdir(runs)
    assert names(Path()) == ["c", "b", "a"]
    monkeypatch.chdir(runs.parent)
    assert names(Path("runs")) == ["c", "b", "a"]
    monkeypatch.setattr(History, "_read", None)
    assert kvbench("history", "runs", "-o", "csv", "--sql", "SELECT min(folder) FROM rows").stdout.endswith("runs/a\n")
    moved = runs.rename(runs.parent / "moved")
    found = kvbench("history", "moved", str(moved), "-o", "csv", "--sql", "SELECT folder FROM runs WHERE run = 'b'")
    assert found.stdout == f"folder\n{moved}/b\n"


def test_a_cluster_run_has_the_hardware_of_its_nodes(tmp_path):
    folder, _ = make_cluster_run(tmp_path)
    write_attempt(folder, node("dead", cpu_model="Z", torch="9.9"), "lost", cells=(8,), rounds=1)
    write_attempt(folder, node("n1", cpu_model="X", gpu="H"), "a")
    write_attempt(folder, node("n2", cpu_model="Y", git_commit="c0"), "b", job=1)
    printed = kvbench("history", str(tmp_path), "-o", "json", "--sql", "SELECT * EXCLUDE (stamp) FROM runs")
    (row,) = json.loads(printed.stdout)
    assert (row["machine"], row["cpu_model"], row["gpu"], row["commit"]) == (
        "n1, n2",
        "X, Y",
        "H",
        f"{ENVIRONMENT.git_commit}, c0",
    )
    assert row["torch"] == ENVIRONMENT.torch


def test_imports_of_different_machines_are_different_lines(tmp_path):
    for cpu, day in (("Ryzen", 1), ("Xeon", 2)):
        path = tmp_path / f"{cpu}.json"
        path.write_text(json.dumps([PP | {"cpu_info": cpu, "test_time": f"2026-04-0{day}T00:00:00Z"}]))
        kvbench("import", str(path), "--out", str(tmp_path / "runs"))
    path.write_text(json.dumps([PP | {"gpu_info": "H200", "type_k": "q8_0"}]))
    kvbench("import", str(path), "--out", str(tmp_path / "runs"))
    with connect() as connection:
        found = History(connection, [tmp_path / "runs"], COLUMNS, past_runs.derive)
        rows = past_runs.trend(found, past_runs.condition(None, {}))
    assert rows["machine"].to_list() == [f"measured elsewhere, {made_of}" for made_of in ("Ryzen", "Xeon", "H200")]
    assert len(rows.groupby(past_runs.CASE)) == 2
    listed = kvbench("history", str(tmp_path / "runs"), "--where", "machine LIKE '%H200'").stdout
    assert "measured elsewhere, H200" in listed
    assert "Xeon" not in listed


def test_cases_of_other_logits_or_a_quantised_prefill_are_no_points_of_one_line(tmp_path):
    cases = grid(["naive"], [8], n_gen=1) + grid(["naive"], [16], n_gen=1, naive_logits="all")
    cases += [msgspec.structs.replace(case, prefill_quantized=True) for case in grid(["dynamic"], [8], n_gen=1)]
    setups = summarize(Tidy.of(make_run(cases)))["setup"]
    assert setups.fillna("").to_list() == ["", "naive_logits=all", "prefill_quantized=true"]
    assert "setup" in past_runs.CASE


def test_a_plot_that_cannot_be_written_leaves_the_one_before(runs, monkeypatch, tmp_path):
    plot = tmp_path / "trend.svg"
    kvbench("history", str(runs), "--plot", str(plot))
    before = plot.read_bytes()
    assert before.startswith(b"<?xml")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "--plot" in refused("history", str(runs), "--plot", str(plot))
    assert plot.read_bytes() == before
    assert [path.name for path in tmp_path.glob("*trend*")] == ["trend.svg"]


def test_several_folders_are_one_history(runs, tmp_path):
    add(tmp_path / "others", "z")
    assert names(runs, tmp_path / "others") == ["z", "c", "b", "a"]
    with pytest.raises(DataError, match="no such folder"):
        names(tmp_path / "missing")
    with pytest.raises(DataError, match=r"manifest\.json: a file; give the folder of runs"):
        names(runs / "a" / "manifest.json")


@pytest.mark.parametrize(
    "damage", [lambda _: b"x" * 8192, lambda db: db[: len(db) // 2], lambda db: db[:5000] + b"x" * 5000 + db[10000:]]
)
def test_an_unreadable_database_is_one_line_that_says_what_to_do(runs, damage):
    names(runs)
    (runs / DATABASE).write_bytes(damage((runs / DATABASE).read_bytes()))
    with pytest.raises(DataError, match="damaged; delete it: it is made again") as refusal:
        names(runs)
    assert "\n" not in str(refusal.value)


def test_where_no_database_can_be_stored_it_is_made_in_memory(runs):
    (runs / DATABASE).mkdir()
    notes = []
    assert names(runs, notes=notes) == ["c", "b", "a"]
    assert len(notes) == 1
    assert "made in memory for this once" in notes[0]


def test_a_full_disk_costs_the_database_and_not_the_answer(runs):
    names(runs)
    add(runs, "d")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    notes = []
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # no file can grow beyond one page
    try:
        assert names(runs, notes=notes) == ["d", "c", "b", "a"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [note for note in notes if "made in memory" in note]
    assert names(runs) == ["d", "c", "b", "a"]


@pytest.mark.parametrize(
    "sql",
    [
        "DROP TABLE f0.runs",
        "SELECT 1; SELECT 2",
        "COPY runs TO 'out.csv'",
        "SELECT * FROM read_text('/etc/hostname')",
        "SELEC",
    ],
)
def test_a_query_only_reads_and_reaches_no_file(runs, sql):
    with connect() as connection, pytest.raises(UsageError):
        History(connection, [runs], COLUMNS, past_runs.derive).query(sql, asked="--sql")
    assert names(runs) == ["c", "b", "a"]


def test_a_database_that_was_killed_while_its_tables_were_made_is_whole_or_empty(runs, monkeypatch):
    """Nothing is committed before the last table is there."""
    with connect() as connection, monkeypatch.context() as patch:
        patch.setattr(history, "RUN_COLUMNS", {"folder": "NO_SUCH_TYPE"})
        with pytest.raises(DataError):
            History(connection, [runs], COLUMNS, past_runs.derive)
    with connect() as connection:
        connection.execute(f"ATTACH '{runs / DATABASE}' AS left_over")
        assert connection.execute("SHOW ALL TABLES").fetchall() == []
    assert names(runs) == ["c", "b", "a"]


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_lists_queries_and_draws(runs, tmp_path):
    printed = kvbench("history", str(runs))
    assert [line.split("|")[2].strip() for line in printed.stdout.splitlines()[2:]] == ["c", "b", "a"]
    assert printed.stderr == ""
    assert kvbench("history", str(runs), "--strategy", "static").stdout == "no run\n"
    sql = "SELECT run, count(*) AS n FROM runs JOIN rows USING (folder) GROUP BY run ORDER BY run"
    assert kvbench("history", str(runs), "-o", "csv", "--sql", sql).stdout == "run,n\na,4\nb,4\nc,4\n"
    (runs / "a").rename(runs / "a|b")
    assert r"| a\|b " in kvbench("history", str(runs)).stdout
    (runs / "a|b").rename(runs / "a")
    listed = json.loads(kvbench("history", str(runs), "-o", "json", "--limit", "1").stdout)
    assert [(row["run"], row["torch"], row["machine"]) for row in listed] == [("c", "2.14.0", "bench-1")]
    plot = tmp_path / "trend.png"
    assert f"plot: {plot}" in kvbench("history", str(runs), "--plot", str(plot)).stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    table = tmp_path / "runs.parquet"
    kvbench("history", str(runs), "-o", "parquet", "--out", str(table))
    assert table.read_bytes().startswith(b"PAR1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "parquet"], "--format parquet: give --out FILE"),
        (["--sql", "SELECT 1", "--model", "x"], "--sql: goes without"),
        (["--sql", "SELECT 1", "--limit", "5"], "--sql: goes without"),
        (["--sql", ""], "kvbench: --sql: give one SELECT; the history is only read"),
        (["--where", "nosuch > 1"], "kvbench: --where nosuch > 1: Binder Error"),
        (["--where", "nosuch > 1"], "; valid: folder, model, strategy, phase, "),
        (["--out", "."], "--out .: cannot be written (Is a directory)"),
        (["--plot", "trend.gif"], "--plot trend.gif: give a file that ends in .png or .svg"),
        (["--plot", "x.png", "--strategy", "static"], "--plot: no run has such a latency"),
    ],
)
def test_what_cannot_be_asked_is_one_line(runs, arguments, message):
    assert message in refused("history", str(runs), *arguments)


def test_columns_of_one_name_are_numbered_and_json_has_no_nan(runs, tmp_path):
    def asked(sql, form):
        return kvbench("history", str(runs), "--sql", sql, "-o", form).stdout

    assert asked("SELECT 1 AS a, 2 AS a, 3 AS A_1", "csv") == "a,a_1,A_1_1\n1,2,3\n"
    assert "machine_1" in json.loads(asked("SELECT * FROM runs JOIN rows USING (folder)", "json"))[0]
    assert json.loads(asked("SELECT 'nan'::DOUBLE AS x, ['inf'::DOUBLE] AS y", "json")) == [{"x": None, "y": [None]}]


def test_a_full_temporary_folder_is_named(runs, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    refusal = refused("history", str(runs), "-o", "parquet", "--out", str(tmp_path / "x.parquet"))
    assert "set TMPDIR to a folder with room" in refusal
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        with pytest.raises(UsageError, match=r"parquet: .*; set TMPDIR to a folder with room"):
            duck.parquet({"a": "BIGINT"}, [{"a": 1}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_without_duckdb_one_line_says_what_to_install(runs, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "duckdb", None)
    assert "pip install 'kvbench[history]'" in refused("history", str(runs))
    assert history.DATABASE == DATABASE


def test_the_list_fits_a_terminal_and_says_what_was_measured(runs, monkeypatch):
    """Of an interrupted run no case has a time; columns that are empty, or alike, take no width."""
    manifest = msgspec.structs.replace(
        RUN.manifest, run_id="d", environment=msgspec.structs.replace(ENVIRONMENT, git_commit="0123456789" * 4)
    )
    path, manifest = create_run(runs, manifest)
    with samples_file(path, manifest.digest):
        pass
    listed = json.loads(kvbench("history", str(runs), "-o", "json").stdout)
    assert {row["run"]: (row["cases"], row["measured"]) for row in listed} == {
        **dict.fromkeys("abc", (2, 2)),
        "d": (2, 0),
    }
    with connect() as connection:
        found = History(connection, [runs], COLUMNS, past_runs.derive)
        table = past_runs.terminal(past_runs.listed(found, past_runs.condition(None, {}), 50))
    screen = io.StringIO()
    Console(file=screen, width=80, color_system=None).print(table)
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "012345678 " in screen.getvalue()
    assert "0123456789" not in screen.getvalue()
    assert "origin" not in screen.getvalue()


def test_a_plot_has_a_line_per_machine_with_its_intervals_and_marks_what_changed():
    """Two machines in turns; a commit and a release of transformers come to both, torch stays."""
    days = pd.to_datetime([f"2026-03-{day:02}" for day in range(1, 9)])
    latency = [10.0, 20.0, 10.5, 20.5, 11.0, 21.0, 11.5, 21.5]
    rows = pd.DataFrame(
        {
            **dict.fromkeys(past_runs.CASE, "x"),
            **dict.fromkeys(("n_prompt", "n_depth", "n_gen", "n_threads", "batch_size"), 1),
            "device": "cpu",
            "phase": "decode",
            "machine": ["one", "two"] * 4,
            "measured_utc": days,
            "commit": [*["a"] * 4, *["b"] * 4],
            "transformers": [*["5.23"] * 6, *["5.24"] * 2],
            "torch": "2.13",
            "latency_ms": latency,
            "latency_ms_low": [value - 1 for value in latency],
            "latency_ms_high": [value + 2 for value in latency],
        }
    )
    figure = trends(rows, past_runs.CASE)
    (axes,) = figure.axes
    assert "8 runs, 2 machines" in figure.get_suptitle()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        *("one", "two"),
        *("another transformers", "another commit"),
    ]
    drawn = [list(line.get_ydata()) for line in axes.lines if len(line.get_xdata()) == 4]
    assert drawn == [latency[::2], latency[1::2]]
    intervals = [[tuple(segment[:, 1]) for segment in lines.get_segments()] for lines in axes.collections]
    assert intervals == [[(value - 1, value + 2) for value in latency[place::2]] for place in (0, 1)]
    marks = [line for line in axes.lines if len(line.get_xdata()) == 2 and len(set(line.get_xdata())) == 1]
    at = [(line.get_linestyle(), pd.Timestamp(line.get_xdata()[0])) for line in marks]
    transformers, commit = past_plots.MARKED["transformers"], past_plots.MARKED["commit"]
    assert sorted(at) == sorted(
        [(commit, days[4]), (commit, days[5]), (transformers, days[6]), (transformers, days[7])]
    )
    assert [text.get_text() for text in axes.texts] == [" transformers 5.24", " transformers 5.24"][: len(axes.texts)]


def test_the_title_of_a_panel_is_as_wide_as_the_figure():
    when = pd.to_datetime(["2026-03-01", "2026-04-01"])
    setup = "type_k=q8_0 type_v=q8_0 n_cpu_moe=8 tensor_buft_overrides=blk.0=CPU n_batch=2048"
    rows = pd.DataFrame(
        {
            **dict.fromkeys([*past_runs.CASE, *past_plots.MARKED, "machine"], "x"),
            **dict.fromkeys(("n_prompt", "n_depth", "n_gen", "n_threads", "batch_size"), 1),
            "device": "cpu",
            "measured_utc": when,
            "latency_ms": 1.0,
            "latency_ms_low": 1.0,
            "latency_ms_high": 1.0,
            "model": "a model with a name as long as names of models are today",
            "phase": "decode",
        }
    )
    figure = trends(pd.concat([rows, rows.assign(setup=setup)]), past_runs.CASE)
    figure.canvas.draw()
    right = figure.bbox.width
    for axes in figure.axes:
        extent = axes.title.get_window_extent()
        assert extent.x0 >= 0
        assert extent.x1 <= right
    assert figure.axes[1].get_title().endswith("n_batch=2048")


def test_a_plot_counts_the_runs_it_draws_and_names_the_lines_it_has(runs):
    rows = pd.DataFrame(
        {
            **dict.fromkeys(past_runs.CASE, "x"),
            "n_prompt": 8,
            "n_depth": 0,
            "n_gen": 3,
            "n_threads": 1,
            "batch_size": 1,
            "device": "cpu",
            "strategy": [*["dynamic"] * 12, "static"],
            "phase": [*[str(n // 2) for n in range(12)], "6"],
            "machine": "one",
            "measured_utc": pd.to_datetime([f"2026-03-{1 + n % 2 if n < 12 else 3:02}" for n in range(13)]),
            "commit": "a",
            "transformers": "1",
            "torch": [str(n % 2) for n in range(13)],
            **dict.fromkeys(("latency_ms", "latency_ms_low", "latency_ms_high"), 1.0),
        }
    )
    figure = trends(rows, past_runs.CASE)
    words = " ".join(text.get_text() for text in figure.findobj(Text))
    assert "2 runs, 1 machine; 6 of 7 cases and phases" in words
    assert "another torch" in words
    assert "another commit" not in words
