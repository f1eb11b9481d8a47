"""The page of a comparison: any of its runs can be made the baseline."""

from collections.abc import Mapping, Sequence

import pandas as pd

from bench.analysis import frames
from bench.judge.ranking import Ranking
from bench.naming import Row, plural
from bench.tell import ranking as text
from bench.tell.comparison import HOW
from bench.tell.page.render import document, point
from bench.tell.page.svg import Picture
from bench.tell.page.table import Column, Line, Table, names, separated
from bench.tell.words import NOTHING, SETTING_COLUMNS


def comparison_page(ranking: Ranking, pictures: Sequence[Mapping[str, Picture]]) -> str:
    """Write the page of several runs; `pictures` are the plots against each run as the baseline, names unique."""
    rows = [ranking.against(number) for number in range(len(ranking.tidies))]
    baselines = [
        {
            "sentence": text.sentence(ranking, number),
            "pictures": own,
            "differences": text.difference_lines(ranking, number)
            or "All runs have the same machine, software and weights.",
        }
        for number, own in enumerate(pictures)
    ]
    settings = [title for title, _ in text.by_shared_setting(ranking, rows[0])]
    return document(
        "comparison.html",
        title=f"{plural(len(ranking.tidies), 'run')} compared",
        runs=_runs(ranking),
        baselines=baselines,
        excluded=text.exclusions(ranking),
        setting=settings[0] if len(settings) == 1 else "",
        table=results(ranking, rows[0]),
        how=HOW,
        switch={"against": [[_switched(row) for row in frames.records(own)] for own in rows]},
    )


def results(ranking: Ranking, rows: pd.DataFrame) -> Table:
    """Make the table: a row per run, case and phase; `rows` as `Ranking.against` makes them."""
    cells = text.cells(ranking)
    varying = [name for name in [*SETTING_COLUMNS, "n_gen"] if name not in ranking.apart and len(set(rows[name])) > 1]
    ratio = f"/ {ranking.letters[0]}"
    columns = [Column(name) for name in varying]
    columns += [
        Column(
            "time / baseline's" if header == ratio else header,
            left=header in text.LEFT,
            heads_row=header == "strategy",
            kind="ratio" if header == ratio else "verdict" if header == "verdict" else "",
        )
        for header in cells
    ]
    records = frames.records(rows)
    opens = separated((row["group"], row["phase"]) for row in records)
    lines = []
    for row, opening in zip(records, opens, strict=True):
        settings = [str(row[name]) for name in varying]
        written = [cell(row) for cell in cells.values()]
        named = names(*settings, "prompt", *written[:-2], row["name"])
        lines.append(Line([*settings, *written], named, opening))
    return Table.of("Results", columns, lines)


def _runs(ranking: Ranking) -> list[dict[str, str]]:
    """Describe each run: its letter, its name, what it has of its own, when and where it was measured."""
    described = []
    for letter, name, tidy in zip(ranking.letters, text.run_names(ranking), ranking.tidies, strict=True):
        of = tidy.run.distinct
        cores = ", ".join(plural(int(count), "core") for count in of("cores"))
        made_of = dict.fromkeys(each.gpu or each.cpu_model for each in tidy.run.environments)
        described.append(
            {
                "letter": letter,
                "name": tidy.run.name,
                "run": name,
                "measured": tidy.run.manifest.created_utc.partition("T")[0],
                "machine": ", ".join([tidy.run.machine_names, *made_of, cores]),
                "torch": ", ".join(of("torch")),
                "transformers": ", ".join(of("transformers")),
                "commit": ", ".join(commit[:10] for commit in of("git_commit")) or NOTHING,
            }
        )
    return described


def _switched(row: Row) -> tuple[str, str, str]:
    """Write what of a row depends on the baseline: the ratio, its interval, and the verdict."""
    written = text.ratio(row)
    figure = point(written) or written
    return figure, written[len(figure) :].strip(), text.verdict(row)
