"""A comparison of two runs as text: one sentence, a table, what could not be compared, and what differs."""

from typing import Literal

from rich.console import Group
from rich.text import Text

from bench.analysis import frames
from bench.analysis.frames import CASE_COLUMNS
from bench.judge.compare import Comparison, Difference
from bench.naming import Name, namer, plural
from bench.tell import tables, words
from bench.tell.formats import Format

HOW = (
    "A ratio is that of the two medians. Its interval is unpaired: it covers what varies within the runs, not what "
    "changed between them."
)


def sentence(comparison: Comparison) -> str:
    """Say in one line what got faster or slower, and how much could not be compared."""
    rows = comparison.rows
    counts = rows["verdict"].value_counts()
    parts = [_extreme(comparison, "faster", best="min"), _extreme(comparison, "slower", best="max")]
    without = ("no difference shown", "too few rounds", "measured elsewhere")
    parts += [f"{name} in {counts[name]}" for name in without if name in counts]
    why = f" ({'; '.join(comparison.fields_apart)})" if comparison.fields_apart else ""
    parts = [part for part in parts if part] or [f"nothing could be compared{why}"]
    lacking = len(comparison.one_sided)
    noun = "case" if rows.empty else "other case"
    parts += [f"{plural(lacking, noun)} not comparable"] if lacking else []
    machine = "" if comparison.same_machine else ", on another machine or software"
    what = f", {plural(len(rows), 'time')} of {plural(rows[CASE_COLUMNS].drop_duplicates().shape[0], 'case')}"
    return f"B ({comparison.b}) against A ({comparison.a}){machine}{what if len(rows) else ''}: {'; '.join(parts)}"


def render(comparison: Comparison, form: Format) -> str:
    """Render sentence, table, exclusions and differences (md), or the rows alone (csv, json, jsonl)."""
    if form != "md":
        return tables.data(comparison.rows, form)
    parts = [f"{sentence(comparison)}.\n"]
    if not comparison.rows.empty:
        parts.append(tables.comparison_markdown(comparison.rows))
    return "\n".join([*parts, *_below(comparison)])


def terminal(comparison: Comparison) -> Group:
    """Make the same document for a terminal of any width."""
    drawn = tables.comparison_terminal(comparison.rows)
    return Group(Text(f"{sentence(comparison)}.\n"), *drawn, Text("\n" + "\n".join(_below(comparison)).rstrip()))


def _below(comparison: Comparison) -> list[str]:
    """List the paragraphs below the table: how to read it, what is not in it, and what differs between the runs."""
    parts = [] if comparison.rows.empty else [f"{HOW}\n"]
    excluded = {
        f"Only in A ({comparison.a})": comparison.only_in_a,
        f"Only in B ({comparison.b})": comparison.only_in_b,
        "Not comparable": comparison.not_comparable,
        "Without a time in either": comparison.in_neither,
    }
    name = _name(comparison)
    for title, cases in excluded.items():
        if cases:
            parts.append(f"{title}:\n\n{words.reason_lines((name(one.case), '', one.reason) for one in cases)}")
    if comparison.differences:
        parts.append("Differences, A -> B:\n\n" + "".join(f"- {line}\n" for line in comparison.differences))
    return parts


def _name(comparison: Comparison) -> Name:
    cases = [*comparison.one_sided, *comparison.in_neither]
    return namer([*frames.records(comparison.rows[CASE_COLUMNS]), *(one.case for one in cases)])


def _extreme(comparison: Comparison, difference: Difference, best: Literal["min", "max"]) -> str:
    """How many rows have this difference, and the largest of them; nothing where there is none."""
    rows = comparison.rows[comparison.rows["verdict"] == difference]
    if rows.empty:
        return ""
    row = rows.loc[rows["ratio"].agg(f"idx{best}")].to_dict()
    largest = f"{_name(comparison)(row, row['phase'])}, time x {words.time_ratio(row)}"
    return f"{difference} in {len(rows)} (most: {largest})"
