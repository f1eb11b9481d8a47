"""The pages in a real browser: one can sort, filter, hide columns and switch the baseline, and the page is quiet."""

import io
from pathlib import Path

import pytest
from PIL import Image

from bench.tell.page.comparison import comparison_page
from bench.tell.page.run import run_page
from bench.tell.page.svg import Picture, picture
from bench.tell.plots.style import make_figure, own_settings
from bench.tell.report import Report
from tests.chromium import chromium, opened, why_no_chromium
from tests.handmade import grid, make_run, ranked, run_with_lossy_kinds, smollm2_ms

pytestmark = pytest.mark.browser

CASES = grid(["naive", "dynamic"], [32, 512])


def drawn(name: str) -> Picture:
    with own_settings():
        figure = make_figure(f"Picture {name}", "of a setting", 3)
        figure.add_subplot().plot([1, 2], [1, 2], color="#222222", marker="o")
        return picture(figure, name)


@pytest.fixture(scope="module")
def browser():
    if reason := why_no_chromium():
        pytest.skip(reason)
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(run_page(Report.of(run_with_lossy_kinds()), {"one": drawn("one"), "two": drawn("two")}))
    return file


@pytest.fixture(scope="module")
def comparison_file(tmp_path_factory) -> Path:
    factors = {"first": 1.0, "slower": 2.0, "faster": 0.5}
    runs = [
        make_run(CASES, path=name, ms=lambda case, step, factor=factor: factor * smollm2_ms(case, step))
        for name, factor in factors.items()
    ]
    file = tmp_path_factory.mktemp("page") / "comparison.html"
    file.write_text(comparison_page(ranked(runs), [{f"p-{n}": drawn(f"p-{n}")} for n in range(3)]))
    return file


def column(page, title: str) -> list[str]:
    """The cells of a column of the first table that are shown, from the top."""
    return page.evaluate(
        """(title) => {
          const table = document.querySelector("table.data");
          const heads = [...table.tHead.rows[0].cells].map((head) => head.textContent.replace(/\\s+/g, " ").trim());
          const rows = [...table.tBodies[0].rows].filter((row) => !row.hidden);
          return rows.map((row) => row.cells[heads.indexOf(title)].innerText.trim());
        }""",
        title,
    )


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_loads_without_an_error_or_a_request(browser, run_file, comparison_file, width, scheme):
    for file in (run_file, comparison_file):
        with opened(browser, file, width=width, scheme=scheme) as (page, wrong):
            assert page.evaluate("document.documentElement.scrollWidth") <= width  # only tables and plots scroll
            assert page.locator("svg").first.is_visible()
            paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
            assert wrong == []


def line_colors(page) -> set[str]:
    """The colours in which the lines of the plots are drawn."""
    return set(
        page.evaluate("[...document.querySelectorAll('.plot svg path')].map((path) => getComputedStyle(path).stroke)")
    )


INK, DARK_INK = "rgb(34, 34, 34)", "rgb(228, 232, 237)"


def test_the_lines_of_a_plot_are_light_on_a_dark_page(browser, run_file):
    with opened(browser, run_file, scheme="light") as (page, _):
        assert INK in line_colors(page)
        assert DARK_INK not in line_colors(page)
    with opened(browser, run_file, scheme="dark") as (page, _):
        assert DARK_INK in line_colors(page)
        assert INK not in line_colors(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_prints_on_white_with_every_column_and_no_tools(browser, run_file, comparison_file, scheme):
    for file in (run_file, comparison_file):
        with opened(browser, file, scheme=scheme) as (page, wrong):
            if file == run_file:
                page.locator("#every-column > summary").click()
            assert page.locator(".tools").first.is_visible()
            page.emulate_media(media="print")
            for tools in page.locator("nav, .tools, .switch").all():
                assert not tools.is_visible()
            boxes = page.evaluate(
                """[...document.querySelectorAll(".scroll, .plot.wide")].map((box) => {
                  const style = getComputedStyle(box);
                  return [style.overflowX, style.overflowY, style.maxHeight];
                })"""
            )
            assert boxes
            assert {tuple(box) for box in boxes} == {("visible", "visible", "none")}
            body = page.evaluate("((style) => [style.backgroundColor, style.color])(getComputedStyle(document.body))")
            assert body == ["rgb(255, 255, 255)", "rgb(27, 31, 36)"]
            assert INK in line_colors(page)
            assert DARK_INK not in line_colors(page)
            printed = page.pdf(format="A4", print_background=True)
            assert printed.startswith(b"%PDF-")
            assert len(printed) > 20_000  # the tables' and plots' own fonts and lines
            assert wrong == []


def test_a_narrow_page_draws_each_panel_below_the_other(browser, tmp_path):
    with own_settings():
        figure = make_figure("Two panels", "of a setting", 3)
        for number in (1, 2):
            figure.add_subplot(1, 2, number).fill_between([0, 1], 0, 1, color="#D55E00", label="one")
        figure.legend(*figure.axes[0].get_legend_handles_labels())
        file = tmp_path / "narrow.html"
        file.write_text(run_page(Report.of(run_with_lossy_kinds()), {"two": picture(figure, "two")}))
    with opened(browser, file, width=390) as (page, wrong):
        panels = page.locator(".narrow .panel")
        assert panels.count() == 2
        assert page.locator(".narrow .legend svg").count() == 1
        for number in (0, 1):  # the coloured area is drawn, not clipped away
            png = panels.nth(number).screenshot()
            assert (0xD5, 0x5E, 0x00) in {
                color for _, color in Image.open(io.BytesIO(png)).convert("RGB").getcolors(1 << 20)
            }
        assert wrong == []


def test_the_rows_of_a_narrow_table_begin_on_a_pixel(browser, run_file):
    """Else the cell that stays in place while the table scrolls covers the line above it."""
    with opened(browser, run_file, width=390) as (page, wrong):
        heights = page.evaluate(
            "[...document.querySelectorAll('table.data tbody tr')].map((row) => row.getBoundingClientRect().height)"
        )
        assert heights
        assert all(height == round(height) for height in heights)
        assert wrong == []


def test_a_table_sorts_by_its_figures_with_the_keyboard(browser, run_file):
    with opened(browser, run_file) as (page, wrong):
        head = page.locator("th", has_text="TPOT ms").first
        head.locator("button").focus()
        page.keyboard.press("Enter")
        figures = [float(cell.split("[")[0]) for cell in column(page, "TPOT ms")]
        assert figures == sorted(figures)
        assert head.get_attribute("aria-sort") == "ascending"
        page.keyboard.press("Enter")
        assert [float(cell.split("[")[0]) for cell in column(page, "TPOT ms")] == sorted(figures, reverse=True)
        page.locator("th button", has_text="strategy").first.click()
        assert column(page, "strategy") == sorted(column(page, "strategy"))
        assert page.locator("th[aria-sort]").count() == 1
        assert wrong == []


def test_rows_are_filtered_by_words(browser, run_file):
    with opened(browser, run_file) as (page, wrong):
        page.get_by_label("Filter the rows").first.fill("prompt 300 FP8")
        assert column(page, "strategy") == ["fp8"]
        assert "1 of 6 rows" in page.locator("output").first.inner_text()
        page.get_by_label("Filter the rows").first.fill("")
        assert len(column(page, "strategy")) == 6
        assert wrong == []


def test_columns_are_hidden_one_by_one_and_in_groups(browser, run_file):
    with opened(browser, run_file) as (page, wrong):
        head = page.locator("th", has_text="TTFT ms").first
        page.locator("summary", has_text="Columns").first.click()
        page.get_by_label("TTFT ms").first.uncheck()
        assert not head.is_visible()
        page.keyboard.press("Escape")
        times = page.get_by_role("button", name="Times", exact=True)
        assert times.get_attribute("aria-pressed") == "true"
        times.click()
        assert not page.locator("th", has_text="TPOT ms").first.is_visible()
        times.click()
        assert head.is_visible()
        assert wrong == []


def test_every_column_is_there_and_can_be_saved(browser, run_file, tmp_path):
    with opened(browser, run_file) as (page, wrong):
        page.locator("#every-column > summary").click()
        assert page.locator("#every-column tbody tr").count() == 12
        assert page.locator("#every-column tbody th[scope=row]").count() == 12
        assert page.locator("#every-column th", has_text="latency_vs_exact_low").is_visible()
        with page.expect_download() as saving:
            page.get_by_role("button", name="Save summary.csv").click()
        saving.value.save_as(tmp_path / "summary.csv")
        lines = (tmp_path / "summary.csv").read_text().splitlines()
        assert len(lines) == 13
        assert lines[0].startswith("model,strategy,phase,")
        assert [line for line in wrong if not line.startswith("blob:")] == []


def test_the_baseline_is_switched_with_all_that_depends_on_it(browser, comparison_file):
    with opened(browser, comparison_file) as (page, wrong):
        assert set(column(page, "verdict")) == {"-", "slower", "faster"}
        assert page.locator("figcaption", has_text="Picture p-0").is_visible()
        page.get_by_role("radio", name="A first").focus()
        page.keyboard.press("ArrowRight")
        assert page.get_by_role("radio", name="B slower").get_attribute("aria-checked") == "true"
        assert page.evaluate("document.activeElement.value") == "1"
        assert set(column(page, "verdict")) == {"-", "faster"}
        assert page.locator(".lead").inner_text().startswith("Ranked by time / time of B")
        assert not page.locator("figcaption", has_text="Picture p-0").is_visible()
        assert page.locator("figcaption", has_text="Picture p-1").is_visible()
        ratios = {cell.split("\n")[0].split("[")[0].strip() for cell in column(page, "time / baseline's")}
        assert "1" in ratios
        assert all(float(ratio) <= 1 for ratio in ratios)
        assert wrong == []
