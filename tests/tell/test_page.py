"""The pages: whole, quiet, escaped; what a browser makes of them is in test_page_in_browser.py."""

import itertools
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import msgspec
import pytest

from bench.analysis import columns
from bench.analysis.tidy import Tidy
from bench.record import JobStart, Run
from bench.tell import drawn as drawn_amounts
from bench.tell import ranking, tables
from bench.tell.benchmark_json import benchmark_json
from bench.tell.page import run as run_pages
from bench.tell.page.comparison import comparison_page
from bench.tell.page.run import run_page
from bench.tell.page.svg import Picture, picture
from bench.tell.page.table import Column, Line, Table
from bench.tell.pages import ROOT
from bench.tell.plots.style import make_figure, own_settings
from bench.tell.report import Report
from tests.handmade import ENVIRONMENT, fail, grid, make_run, on_nodes, ranked, run_with_lossy_kinds

CASES = grid(["naive", "dynamic"], [16, 64], n_gen=4)
MARKUP = {
    "a model": "</script><img src=x onerror=alert(1)>",
    "a host": "\"><svg onload=alert(2)>'",
    "an error": "</script><script>alert(3)</script> & <b>`<i>`</b>",
    "a run": "<a href=//x>",
}


class Elements(HTMLParser):
    """Every element of a document in order, and the text in it that is shown or run."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    @property
    def structure(self) -> list[str]:
        """The elements, whatever the names and errors are; backticks in an error are code."""
        return [tag for tag in self.tags if tag != "code"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "xlink:href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def named(name: str, host: str, error: str, folder: str) -> Run:
    """A run with these words in every place that they can come from, one case failed."""
    cases = [msgspec.structs.replace(case, model=name) for case in CASES]
    environment = msgspec.structs.replace(ENVIRONMENT, hostname=host)
    failures = [fail(cases[-1], error=error)]
    return make_run(cases, path=f"runs/{folder}", environment=environment, failures=failures)


def drawn(title: str) -> Picture:
    with own_settings():
        figure = make_figure(title, title, 3)
        figure.add_subplot().set_xlabel(title)
        return picture(figure, "one")


def embedded(page: str, name: str) -> object:
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@pytest.fixture(scope="module")
def page() -> str:
    return run_page(Report.of(run_with_lossy_kinds()), {"one": drawn("a plot")})


def test_a_page_needs_nothing_but_itself(page: str) -> None:
    elements = Elements(page)
    assert all(link.startswith(("#", "data:")) for link in elements.links), elements.links
    style = (run_pages.__file__.replace("run.py", "page.css"), run_pages.__file__.replace("run.py", "page.js"))
    for path in style:
        text = open(path, encoding="utf-8").read()  # noqa: PTH123, SIM115
        assert text in page
        assert not re.search(r"https?:|@import|url\(|fetch|XMLHttp", text)
    assert "default-src 'none'" in page
    assert len(elements.ids) == len(set(elements.ids))


def test_the_sentence_comes_first_and_everything_is_explained() -> None:
    run = make_run(CASES, failures=[fail(CASES[-1], error="the machine is too small")])
    report = Report.of(run)
    shown = "".join(Elements(run_page(report, {})).texts)
    order = [report.closing[:40], "1 of 4 cases without a time", "Before you believe", "Results", "Environment"]
    places = [shown.index(text) for text in [*order, "How each number is made"]]
    assert places == sorted(places)
    for text in ("the machine is too small", "AMD EPYC 9B45", *(column.meaning[:30] for column in columns.COLUMNS)):
        assert text.replace("`", "") in shown, text


@pytest.mark.parametrize(
    ("threads", "rows"),
    [
        ([2], [("products by sum-4", "a; b, step of 1")]),
        (
            [1, 2],
            [
                ("products by sum-2, 1 thread", "a; b, step of 1"),
                ("products by sum-4, 2 threads", "a; b, step of 1"),
            ],
        ),
    ],
)
def test_the_environment_names_the_kernels_of_products(threads: list[int], rows: list[tuple[str, str]]) -> None:
    """Of several numbers of threads each has its own."""
    run = make_run([msgspec.structs.replace(CASES[0], n_threads=count) for count in threads])
    of_case = {plan.case.key: f"sum-{2 * plan.case.n_threads}" for plan in run.manifest.plan}
    checks = [
        msgspec.structs.replace(check, kernels=dict.fromkeys(["b, step of 1", "a"], of_case[check.case]))
        for check in run.checks
    ]
    page = run_page(Report.of(msgspec.structs.replace(run, checks=checks)), {})
    shown = [text for text in Elements(page).texts if text.strip()]
    found = [(name, value) for name, value in itertools.pairwise(shown) if name.startswith("products by")]
    assert found == rows


def test_pages_name_the_machine_that_measured_and_not_the_one_that_submitted() -> None:
    submitted, measured = (msgspec.structs.replace(ENVIRONMENT, hostname=name) for name in ("login-1", "node-7"))
    start = JobStart(run_id="r", job="job-0", attempt="a", continues=[], environment=measured, ceilings={})
    run = make_run(CASES, environment=submitted)
    run = msgspec.structs.replace(run, starts={case.cell.key: start for case in CASES})
    compared = comparison_page(ranked([run] * 3), [{f"one-{n}": drawn("m")} for n in range(3)])
    for page in (run_page(Report.of(run), {}), compared):
        assert "node-7" in page
        assert "login-1" not in page


def test_a_run_of_several_nodes_is_described_by_all_of_them() -> None:
    run = on_nodes(make_run(CASES), lambda cell: f"node-{cell.n_prompt}")
    made_of = {"node-16": "Xeon", "node-64": "EPYC"}
    starts = {
        cell: msgspec.structs.replace(
            start,
            environment=msgspec.structs.replace(
                start.environment, cpu_model=made_of[start.environment.hostname], git_commit=start.environment.hostname
            ),
        )
        for cell, start in run.starts.items()
    }
    runs = [msgspec.structs.replace(run, starts=starts), make_run(CASES)]
    page = "".join(Elements(comparison_page(ranked(runs), [{}] * 2)).texts)
    assert "node-16, node-64, Xeon, EPYC, " in page
    assert "node-16, node-64" in page.replace("node-16, node-64, Xeon", "")  # the commits
    document = json.loads(benchmark_json(Tidy.of(runs[0])))
    assert document["machine_info"]["cpu"]["brand_raw"] == "Xeon, EPYC"
    assert document["commit_info"]["id"] == "node-16, node-64"
    assert document["kvbench"]["cpu_model"] == "Xeon, EPYC"
    text = ranking.render(ranked(runs), "md")
    assert "| machine" in text
    assert re.search(r"\| node-64 +\|", text)
    assert "| machine" not in ranking.render(ranked([runs[1]] * 2), "md")


def test_names_hosts_and_errors_are_escaped_wherever_they_stand() -> None:
    harmless = run_page(Report.of(named("m", "h", "e", "r")), {"one": drawn("m")})
    name, host, error, folder = MARKUP.values()
    made = run_page(Report.of(named(name, host, error, folder)), {"one": drawn(name)})
    assert Elements(made).tags.count("script") == 2
    assert Elements(made).structure == Elements(harmless).structure
    shown = "".join(Elements(made).texts)
    for text in (name, host, error.replace("`", ""), folder.removeprefix("<a href=//")):
        assert text in shown.replace("`", ""), text
    rows = embedded(made, "summary")["rows"]
    assert {row[0] for row in rows} == {name}
    assert error in {row[columns.NAMES.index("error")] for row in rows}


def test_a_comparison_escapes_too() -> None:
    name, host, error, folder = MARKUP.values()
    pages = []
    for words in (("m", "h", "e", "r"), (name, host, error, folder)):
        runs = [named(*words), named(*words), named(*words)]
        pages.append(comparison_page(ranked(runs), [{f"one-{n}": drawn(words[0])} for n in range(3)]))
    assert Elements(pages[0]).structure == Elements(pages[1]).structure


def test_a_picture_takes_the_pages_colours_and_words() -> None:
    with own_settings():
        figure = make_figure("What is shown", "of a setting", 3)
        axes = figure.add_subplot()
        axes.plot([1, 2], [1, 2], color="#0072B2", marker="o")
        one, other = picture(figure, "one"), picture(figure, "other")
        assert figure.get_suptitle() == "What is shown\nof a setting"
    assert one.title == "What is shown\nof a setting"
    assert "What is shown" not in one.svg
    assert "var(--c-0072b2,#0072b2)" in one.svg
    assert "<style" not in one.svg  # matplotlib's is for every element, of the page too
    assert "DejaVu" not in one.svg
    ids = [{element.get("id") for element in ET.XML(each.svg).iter()} - {None} for each in (one, other)]
    assert all(ids)
    assert not ids[0] & ids[1]
    links = set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", one.svg))
    assert links <= ids[0]


def test_a_table_has_every_case_once_and_no_empty_column() -> None:
    found = run_pages.results(Report.of(run_with_lossy_kinds()).summary)
    titles = [column.title for column in found.columns]
    assert titles[:2] == ["prompt", "strategy"]
    assert set(tables.CACHES) <= set(titles)
    assert "compile s" not in titles
    assert not next(column for column in found.columns if column.group == "Caches").hidden
    assert len(found.lines) == 6
    assert found.lines[0].names == "prompt 100 dynamic ok"
    assert [line.opens for line in found.lines] == [False, False, False, True, False, False]


def test_a_page_of_very_many_cases_has_some_of_them_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (drawn_amounts, run_pages):
        monkeypatch.setattr(module, "MOST_PAGE_CASES", 3)
    page = run_page(Report.of(make_run(CASES)), {})
    assert "The page has 3 of 4 cases, evenly spread; summary.csv has all." in page
    assert page.count("<tr data-names=") == 3
    rows = embedded(page, "summary")
    assert isinstance(rows, dict)
    assert len(rows["rows"]) == 6
    assert drawn_amounts.page_line(3) == ""


def test_settings_that_vary_have_columns() -> None:
    cases = [case for batch in (1, 4) for case in grid(["dynamic"], [16], n_gen=4, batch_size=batch)]
    found = run_pages.results(Report.of(make_run(cases)).summary)
    assert [column.title for column in found.columns][:3] == ["batch", "prompt", "strategy"]
    assert [line.cells[0] for line in found.lines] == ["1", "4"]


def test_a_column_without_a_figure_is_left_out() -> None:
    lines = [Line(["a", "-", "1 [1-2]"], "a"), Line(["b", "-", "-"], "b")]
    found = Table.of("x", [Column("name"), Column("none"), Column("figure")], lines)
    assert [(column.title, column.intervals) for column in found.columns] == [("name", False), ("figure", True)]
    assert found.lines[1].cells == ["b", "-"]


def test_the_committed_page_is_of_the_committed_run() -> None:
    folder = ROOT / "results" / "examples" / "smollm2-135m-2-cores"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 1_000_000
    assert [column["name"] for column in embedded(page, "summary")["columns"]] == columns.NAMES
    rows = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    rows = rows["rows"] if isinstance(rows, dict) else rows  # the form of older files is a list
    assert [row[columns.NAMES.index("latency_ms")] for row in embedded(page, "summary")["rows"]] == pytest.approx(
        [row["latency_ms"] for row in rows]
    )
