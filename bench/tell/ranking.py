"""A ranking of several runs as text: one sentence, the runs, one table, and what could not be compared."""

from collections.abc import Callable, Iterator

import pandas as pd
from rich.console import Group
from rich.text import Text

from bench.analysis import frames
from bench.analysis.frames import CASE_COLUMNS
from bench.judge.ranking import BASELINE, COLUMNS, Ranking
from bench.naming import Row, context, namer, plural
from bench.tell import tables
from bench.tell.comparison import HOW
from bench.tell.formats import Format
from bench.tell.layout import Fitted, markdown_table
from bench.tell.words import (
    NOTHING,
    SETTING_COLUMNS,
    missing,
    reason_lines,
    representing,
    setting,
    time_ratio,
    with_interval,
)

Cells = dict[str, Callable[[Row], str]]

_HEADERS = {"n_threads": "threads", "attn_implementation": "attention", "n_gen": "new tokens"}
LEFT = {"strategy", "phase", "run", "machine", "verdict", "model", "device", "dtype", "attention"}
"""Headers of columns of words."""


def sentence(ranking: Ranking, baseline: int = 0) -> str:
    """Say in a line which run is the fastest in each phase, and by how much."""
    own = ranking.letters[baseline]
    parts = []
    for phase, (count, ranked) in ranking.standings(baseline).items():
        places = ", ".join(f"{one.run} {one.ratio:.3f}" for one in ranked)
        parts.append(f"{phase} {places} ({plural(count, 'case')})")
    if not parts:
        return f"Nothing could be ranked: no case has a time in all {len(ranking.tidies)} runs."
    what = f"Ranked by time / time of {own}, geometric mean over the cases that all {len(ranking.tidies)} runs have"
    return f"{what}: {'; '.join(parts)}."


def run_names(ranking: Ranking) -> list[str]:
    """Name each run, and what it has of its own: `before, model random:gpt2`."""
    names = []
    for tidy in ranking.tidies:
        cases = [item.case for item in tidy.run.manifest.plan]
        own = {name: dict.fromkeys(str(getattr(case, name)) for case in cases) for name in ranking.apart}
        names.append(", ".join([tidy.run.label, *(f"{name} {' '.join(values)}" for name, values in own.items())]))
    return names


def run_lines(ranking: Ranking, baseline: int = 0) -> list[str]:
    """Write a line per run: its letter, its name, and whether it is of another machine than the baseline."""
    lines = []
    for number, (letter, name) in enumerate(zip(ranking.letters, run_names(ranking), strict=True)):
        said = ", baseline" if number == baseline else ""
        said += "" if ranking.same_machine(number, baseline) else ", on another machine or software"
        lines.append(f"- {letter}: {name}{said}\n")
    return lines


def cells(ranking: Ranking, baseline: int = 0) -> Cells:
    """Return the columns of the table: header -> the cell of a row of `Ranking.against`."""
    subjects: Cells = {_HEADERS.get(name, name): _value_of(name) for name in ranking.apart if name != "strategy"}
    return {
        "prompt": context,
        "phase": lambda row: row["phase"],
        "strategy": lambda row: row["strategy"],
        **subjects,
        "rank": lambda row: str(row["rank"]),
        "run": lambda row: row["run"],
        **({"machine": _value_of("machine")} if any(len(tidy.run.environments) > 1 for tidy in ranking.tidies) else {}),
        "ms": lambda row: with_interval(row["ms"], row["ms_low"], row["ms_high"]),
        f"/ {ranking.letters[baseline]}": ratio,
        "verdict": verdict,
    }


def by_shared_setting(ranking: Ranking, rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Group the rows of a ranking by the settings that runs share, under their title."""
    shared = [name for name in [*SETTING_COLUMNS, "n_gen"] if name not in ranking.apart]
    for _, own in rows.groupby(shared, sort=False):
        yield setting(representing(own), also=["n_gen"] if "n_gen" in shared else [], only=shared), own


def render(ranking: Ranking, form: Format, baseline: int = 0) -> str:
    """Render sentence, runs, table and exclusions (md), or the rows alone (csv, json, jsonl)."""
    rows = ranking.against(baseline)
    if form != "md":
        return tables.data(rows[COLUMNS], form)
    parts = [f"{sentence(ranking, baseline)}\n", "".join(run_lines(ranking, baseline))]
    columns = cells(ranking, baseline)
    align = ["left" if header in LEFT else "right" for header in columns]
    for title, own in by_shared_setting(ranking, rows):
        lines = [[cell(row) for cell in columns.values()] for row in frames.records(own)]
        parts.append(f"{title}\n\n{markdown_table(lines, list(columns), align)}\n")
    return "\n".join([*parts, *_below(ranking, baseline)])


def terminal(ranking: Ranking, baseline: int = 0) -> Group:
    """Make the same document for a terminal of any width."""
    columns = cells(ranking, baseline)
    drawn = [
        Fitted(
            title,
            list(columns),
            [[cell(row) for cell in columns.values()] for row in frames.records(own)],
            frozenset(LEFT),
            names=3,
        )
        for title, own in by_shared_setting(ranking, ranking.against(baseline))
    ]
    above = "\n".join([f"{sentence(ranking, baseline)}\n", *run_lines(ranking, baseline)])
    return Group(Text(above), *drawn, Text("\n" + "\n".join(_below(ranking, baseline)).rstrip()))


def _below(ranking: Ranking, baseline: int) -> list[str]:
    """List the paragraphs below the table: how to read it, what is not in it, and what differs between the runs."""
    parts = [f"{HOW}\n"] if len(ranking.entries) else []
    parts += filter(None, [exclusions(ranking)])
    if changed := difference_lines(ranking, baseline):
        parts.append(f"Differences from {ranking.letters[baseline]}:\n\n{changed}")
    return parts


def ratio(row: Row) -> str:
    """Write the ratio of a row of `Ranking.against`: 1 for the baseline's own, `-` without a counterpart."""
    if missing(row["ratio"]):
        return NOTHING
    return "1" if row["verdict"] == BASELINE else time_ratio(row)


def verdict(row: Row) -> str:
    """Write the verdict of a row of `Ranking.against`: `-` for the baseline's own."""
    return NOTHING if row["verdict"] == BASELINE else str(row["verdict"])


def exclusions(ranking: Ranking) -> str:
    """Write a line per run and reason: which cases have no time there; empty if every run has all."""
    every = [*ranking.lacking, *ranking.nowhere]
    name = namer([*frames.records(ranking.entries[CASE_COLUMNS]), *(one.case for one in every)])
    parts = []
    for title, lacking in (("Not in every run", ranking.lacking), ("Without a time in any run", ranking.nowhere)):
        lines = reason_lines((name(one.case), f"{one.run}: " if one.run else "", one.reason) for one in lacking)
        parts += [f"{title}:\n\n{lines}"] if lines else []
    return "\n".join(parts)


def difference_lines(ranking: Ranking, baseline: int = 0) -> str:
    """Write a line per run and field in which its machine, software or weights differ from the baseline's."""
    own = ranking.letters[baseline]
    return "".join(
        f"- {own} -> {letter}, {line}\n" for letter, lines in ranking.differences(baseline).items() for line in lines
    )


def _value_of(column: str) -> Callable[[Row], str]:
    return lambda row: str(row[column])
