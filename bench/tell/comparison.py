"""A comparison of two runs as text: one sentence, a table, what could not be compared, and what differs."""

from collections.abc import Iterable
from typing import Literal

from bench.judge.compare import Comparison, Difference
from bench.tell import tables, words
from bench.tell.formats import Format

HOW = (
    "A ratio is that of the two medians. Its interval is unpaired: it covers what varies within the runs, not what "
    "changed between them."
)


def sentence(comparison: Comparison) -> str:
    """Say in one line what got faster or slower, and how much could not be compared."""
    counts = comparison.rows["verdict"].value_counts()
    parts = [_extreme(comparison, "faster", best="min"), _extreme(comparison, "slower", best="max")]
    without = ("no difference shown", "too few rounds", "measured elsewhere")
    parts += [f"{name} in {counts[name]}" for name in without if name in counts]
    why = f" ({'; '.join(comparison.fields_apart)})" if comparison.fields_apart else ""
    parts = [part for part in parts if part] or [f"nothing could be compared{why}"]
    lacking = len(comparison.one_sided)
    parts += [f"{words.plural(lacking, 'case')} not comparable"] if lacking else []
    machine = "" if comparison.same_machine else ", on another machine or software"
    return f"{comparison.b} against {comparison.a}{machine}: {'; '.join(parts)}"


def render(comparison: Comparison, form: Format) -> str:
    """Render sentence, table, exclusions and differences (md), or the rows alone (csv, json, jsonl)."""
    if form != "md":
        return tables.data(comparison.rows, form)
    parts = [f"{sentence(comparison)}.\n"]
    if not comparison.rows.empty:
        parts.append(tables.comparison_markdown(comparison.rows))
        parts.append(f"{HOW}\n")
    excluded = {
        f"Only in A ({comparison.a})": comparison.only_in_a,
        f"Only in B ({comparison.b})": comparison.only_in_b,
        "Not comparable": comparison.not_comparable,
        "Without a time in either": comparison.in_neither,
    }
    for title, cases in excluded.items():
        if cases:
            parts.append(f"{title}:\n\n{excluded_lines(('', one.case, one.reason) for one in cases)}")
    if comparison.differences:
        parts.append("Differences, A -> B:\n\n" + "".join(f"- {line}\n" for line in comparison.differences))
    return "\n".join(parts)


def excluded_lines(excluded: Iterable[tuple[str, str, str]]) -> str:
    """Write a line per lead and reason, of triples of lead, case and reason.

    It names the case that has it, or says how many have it and names one of them as an example.
    """
    found = list(excluded)
    names = words.short_names(case for _, case, _ in found)
    alike: dict[tuple[str, str], list[str]] = {}
    for lead, case, reason in found:
        alike.setdefault((lead, reason), []).append(names[case])
    return "".join(
        f"- {lead}{f'{len(cases)} cases, such as ' if len(cases) > 1 else ''}{cases[0]}: {reason}\n"
        for (lead, reason), cases in alike.items()
    )


def _extreme(comparison: Comparison, difference: Difference, best: Literal["min", "max"]) -> str:
    """How many rows have this difference, and the largest of them; nothing where there is none."""
    rows = comparison.rows[comparison.rows["verdict"] == difference]
    if rows.empty:
        return ""
    row = rows.loc[rows["ratio"].agg(f"idx{best}")].to_dict()
    largest = f"{words.row_name(row)}, time x {words.time_ratio(row)}"
    return f"{difference} in {len(rows)} of {len(comparison.rows)} (most: {largest})"
