"""The files of a ranking: its picture, and the page on which any of its runs can be the baseline."""

from pathlib import Path

from bench.judge.ranking import Ranking
from bench.store.derived import Derived
from bench.tell.report import save_all
from kvcache.files import write_atomically


def write_ranking(ranking: Ranking, folder: Path | None, derived: Derived) -> Path | None:
    """Draw the plots of a ranking into `folder`, by default one in the last run's; return it, or None without rows.

    `derived` collects what fails.
    """
    if ranking.entries.empty:
        return None
    first, last = ranking.tidies[0].run, ranking.tidies[-1].run
    folder = folder if folder is not None else Path(last.path) / "plots" / f"against-{first.name}"
    with derived.trying(f"plots in {folder}"):
        from bench.tell.plots.ranking import ranking_figures

        save_all(lambda: ranking_figures(ranking, ranking.against()), folder, derived)
    return folder


def write_comparison_page(ranking: Ranking, file: Path, derived: Derived) -> None:
    """Write the runs of a ranking as one HTML file in which any can be the baseline; `derived` collects what fails."""
    with derived.trying(str(file)):
        from bench.tell.page.comparison import comparison_page
        from bench.tell.page.svg import picture
        from bench.tell.plots.ranking import ranking_figures
        from bench.tell.plots.style import own_settings

        with own_settings():
            pictures = [
                {
                    f"{name}-{number}": picture(figure, f"{name}-{number}")
                    for name, figure in ranking_figures(ranking, ranking.against(number), number).items()
                }
                for number in range(len(ranking.tidies))
            ]
        write_atomically(file, comparison_page(ranking, pictures).encode())
