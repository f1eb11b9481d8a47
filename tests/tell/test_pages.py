"""The figures of the documentation are those of the committed runs, and are made anew where a mark stands."""

from pathlib import Path

import msgspec
import pytest

from bench.record import Failure
from bench.tell import pages
from tests.handmade import run_with_lossy_kinds

PAGES = [pages.ROOT / name for name in ("README.md", "docs/caches.md", "results/README.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_a_page_is_as_it_is_made(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert pages.END in text
    assert pages.filled(text) == text, f"run python -m bench.tell.pages {page.relative_to(pages.ROOT)}"


@pytest.fixture
def handmade(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "read_run", lambda path: run_with_lossy_kinds())


@pytest.mark.usefixtures("handmade")
def test_each_kind_of_a_list_has_its_line() -> None:
    page = f"""Before.
<!-- kinds of some/run -->
- **`fp8`**: two
  lines.
  - `fp8`: stale
- **`dynamic`, exact**: grows.
- **`nobody`, `cache:mine:make`**: others.
{pages.END}
- after
"""
    made = pages.filled(page)
    lines = made.splitlines()
    assert lines[2:4] == ["- **`fp8`**: two", "  lines."]
    assert lines[4].startswith("  - `fp8`: ")
    assert "0.250 of the exact one's; a step " in lines[4]
    assert lines[4].endswith("; KL 2e-02 nats, same top 1 0.500, recall 0.750")
    assert lines[6].startswith("  - `dynamic`: ")
    assert lines[6].endswith(" ms a step")
    assert lines[8] == "  - `nobody`: not measured"
    assert lines[-2:] == [pages.END, "- after"]
    assert pages.filled(made) == made


def test_a_kind_that_is_unsupported_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_with_lossy_kinds(["dynamic", "offloaded"])
    lost = [plan.case.key for plan in run.manifest.plan if plan.case.strategy == "offloaded"]
    run = msgspec.structs.replace(
        run,
        failures=[Failure(case=key, process=0, status="unsupported", error="it needs CUDA") for key in lost],
        samples=[sample for sample in run.samples if sample.case not in lost],
        checks=[check for check in run.checks if check.case not in lost],
    )
    monkeypatch.setattr(pages, "read_run", lambda path: run)
    page = f"<!-- kinds of some/run -->\n- **`dynamic`, `offloaded`**: x\n{pages.END}\n"
    dynamic, offloaded = pages.filled(page).splitlines()[2:4]
    assert dynamic.endswith(" ms a step")
    assert offloaded == "  - `offloaded`: unsupported, it needs CUDA"


@pytest.mark.usefixtures("handmade")
def test_a_mark_chooses_rows() -> None:
    page = f"<!-- times of a/run, without fp8 -->\nstale\n{pages.END}\n"
    made = pages.filled(page)
    assert "stale" not in made
    assert "| dynamic" in made
    assert "| fp8" not in made
    assert "| fp8" in pages.filled(page.replace("times", "caches").replace(", without fp8", ", depth 0"))
    assert "dynamic" not in pages.filled(page.replace("without fp8", "prompts 7 9"))
    with pytest.raises(KeyError, match="colours"):
        pages.filled(page.replace("times", "colours"))


@pytest.mark.parametrize("mark", ["times of no/such/run", "text of no/such/study.md"])
def test_a_page_of_a_run_that_is_missing_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mark: str
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"<!-- {mark} -->\nold\n{pages.END}\n")
    with pytest.raises(SystemExit) as ended:
        pages.main([str(page)])
    assert ended.value.code == 3
    assert capsys.readouterr().err.startswith(f"{page}: ")
    assert "old" in page.read_text()


def test_a_text_of_a_study_stands_without_its_title(tmp_path: Path) -> None:
    (tmp_path / "study.md").write_text("# Title\n\nMeasured.\n\n| a |\n")
    page = f"<!-- text of study.md -->\nstale\n{pages.END}\n"
    assert pages.filled(page, tmp_path) == f"<!-- text of study.md -->\nMeasured.\n\n| a |\n{pages.END}\n"
