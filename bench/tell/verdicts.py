"""Verdicts -> a table with the worst first, Markdown, JSON, one sentence that says what to do, and an exit code."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec
from rich.console import Group
from rich.text import Text

from bench.judge.verdict import COMPARED, TIMES, Verdict, VerdictKind, exit_code, is_compared, worst_first
from bench.naming import namer
from bench.tell.layout import Fitted, markdown_table
from bench.tell.words import NOTHING, SETTING_COLUMNS, number, setting

Command = Literal["gate", "ab", "unfinished ab"]
"""The command that found the verdicts (`kvbench report` reads a stored A/B, too): each has another way out."""

_ADVICE: dict[Command, dict[str, str]] = {
    "gate": {
        "regression": "undo it, or accept it with `kvbench baseline promote`",
        "missing": "measure it, or promote a run without it under another --name",
        "nothing": "no case lies on both sides; measure the cases of the baseline",
        "inconclusive": "measure again on a quieter machine, or for longer",
    },
    "ab": {
        "regression": "undo it, or merge it knowing what it costs",
        "missing": "fix the side that fails, or leave the case out",
        "nothing": "nothing was compared; see why below the table",
        "inconclusive": "run again with a longer --budget, fewer cases, or on a quieter machine",
    },
}
_ADVICE["unfinished ab"] = _ADVICE["ab"] | {"inconclusive": "it did not come to its end, so run it again"}

PAIRED_TIMES = "times in ms; a change above zero is slower, and is paired by process, so it need not be head / base"

HEADERS = ["verdict", "case", "phase", "quantity", "base", "head", "change", "detectable"]

_GROUPED: frozenset[VerdictKind] = frozenset({"not-comparable", "inconclusive"})
"""Kinds whose details stand in one line for all verdicts that share them."""
_WHOLE_CASES: frozenset[VerdictKind] = frozenset({"missing", "new"})
"""Kinds of cases that one side lacks, often all for one reason: that, too, stands in one line."""
_STYLES = {
    "failed": "bold red",
    "regression": "bold red",
    "missing": "red",
    "inconclusive": "yellow",
    "faster": "green",
}


def sentence(verdicts: Iterable[Verdict], *, require_time: bool = False, command: Command = "gate") -> str:
    """Say what was found and what to do now, in one line."""
    ordered, advice = worst_first(verdicts), _ADVICE[command]
    name = namer(verdict.case for verdict in ordered)
    leading = {kind: list(group) for kind, group in itertools.groupby(ordered, key=lambda verdict: verdict.kind)}

    def worst(kind: VerdictKind) -> str:
        first, others = leading[kind][0], len(leading[kind]) - 1
        more = f" (and {others} more)" if others else ""
        return f"{name(first.case, first.phase)}{_what(first)}{more}"

    match exit_code(ordered, require_time=require_time):
        case 5:
            return f"FAILED: {worst('failed')}; fix this first, its other figures mean nothing."
        case 1:
            return f"REGRESSION: {worst('regression')}; {advice['regression']}."
        case 3 if "missing" in leading:
            return f"NOT COMPARABLE: {worst('missing')}; {advice['missing']}."
        case 3 if any(map(is_compared, ordered)):
            return "NOT COMPARABLE: times were required and some could not be compared; see why below the table."
        case 3:
            return f"NOT COMPARABLE: {advice['nothing']}."
        case 4:
            return f"INCONCLUSIVE: {worst('inconclusive')}; {advice['inconclusive']}."
    compared = [verdict for verdict in ordered if verdict.kind in COMPARED]
    n_times = sum(verdict.quantity in TIMES for verdict in compared)
    n_exact = len(compared) - n_times
    faster = f", {worst('faster')}" if "faster" in leading else ""
    if n_times == 0:
        return f"Times NOT judged{_why_no_time(ordered)}. Counters: {n_exact} compared, none worse{faster}."
    skipped = sum(verdict.quantity in TIMES for verdict in leading.get("not-comparable", []))
    not_judged = f"; {skipped} times NOT judged, see why below the table" if skipped else ""
    return f"PASSED: {n_times} times and {n_exact} counters compared, none worse{faster}{not_judged}; nothing to do."


def _why_no_time(ordered: Sequence[Verdict]) -> str:
    """Give the reasons why times were not judged, in brackets."""
    lacking = (verdict for verdict in ordered if verdict.quantity in TIMES and verdict.kind == "not-comparable")
    reasons = dict.fromkeys(verdict.detail for verdict in lacking)
    return f" ({'; '.join(reasons)})" if reasons else ""


def terminal(verdicts: Iterable[Verdict]) -> Group:
    """Make the table for a terminal of any width, and below it what is not worth a row."""
    ordered = worst_first(verdicts)
    shared, rows = _rows(ordered)
    cells, styles = [cells for _, cells in rows], [_STYLES.get(kind, "") for kind, _ in rows]
    drawn = Fitted(shared or None, HEADERS, cells, frozenset(HEADERS[:4]), names=4, styles=styles)
    return Group(*([drawn] if rows else []), *(Text(line) for line in _notes(ordered)))


def markdown(verdicts: Iterable[Verdict], *, title: str, require_time: bool = False, command: Command = "gate") -> str:
    """Write a heading, the closing sentence, the table and the notes: what a pull request's summary shows."""
    ordered = worst_first(verdicts)
    return f"### {title}\n\n{sentence(ordered, require_time=require_time, command=command)}\n\n{table(ordered)}"


def table(verdicts: Iterable[Verdict]) -> str:
    """Write the table and the notes as Markdown."""
    ordered = worst_first(verdicts)
    shared, rows = _rows(ordered)
    parts = [f"{shared}\n"] if shared and rows else []
    if rows:
        align = ["left"] * 4 + ["right"] * 4
        cells = [cells for _, cells in rows]
        parts.append(f"{markdown_table(cells, HEADERS, align)}\n")
    notes = "".join(f"- {line}\n" for line in _notes(ordered))
    return "\n".join([*parts, *([notes] if notes else [])])


def document(verdicts: Iterable[Verdict], *, title: str, require_time: bool = False, command: Command = "gate") -> str:
    """Write title, exit code, sentence and all verdicts (worst first) as a JSON object; an unknown figure is null."""
    ordered = worst_first(verdicts)
    page = {
        "title": title,
        "exit_code": exit_code(ordered, require_time=require_time),
        "sentence": sentence(ordered, require_time=require_time, command=command),
        "verdicts": [msgspec.structs.asdict(verdict) | {"case": verdict.case.key} for verdict in ordered],
    }
    return msgspec.json.format(msgspec.json.encode(page)).decode() + "\n"


def _rows(ordered: Sequence[Verdict]) -> tuple[str, list[tuple[VerdictKind, list[str]]]]:
    """Find the setting that all cases share, and the cells of every verdict that is worth a row."""
    cases = list(dict.fromkeys(verdict.case for verdict in ordered))
    alike = [field for field in [*SETTING_COLUMNS, "n_gen"] if len({getattr(case, field) for case in cases}) == 1]
    all_quantized = {"prefill_quantized": all(case.prefill_quantized for case in cases)}
    shared = setting(msgspec.structs.asdict(cases[0]) | all_quantized, only=alike) if cases else ""
    name = namer(cases)
    rows = [(verdict.kind, _cells(verdict, name(verdict.case))) for verdict in ordered if not _is_dull(verdict)]
    return shared, rows


def _cells(verdict: Verdict, name: str) -> list[str]:
    counts = verdict.quantity not in TIMES
    return [
        _word(verdict),
        name,
        verdict.phase,
        verdict.quantity,
        _figure(verdict.base, counts),
        _figure(verdict.head, counts),
        _change(verdict) or NOTHING,
        NOTHING if verdict.detectable is None else f"+{verdict.detectable:.1%}",
    ]


def _is_dull(verdict: Verdict) -> bool:
    """Return whether one line says it for all such: exact figures that are equal, and times that were not compared."""
    return verdict.kind == "not-comparable" or (verdict.kind == "same" and verdict.quantity not in TIMES)


def _notes(ordered: Sequence[Verdict]) -> list[str]:
    """List details, a line per reason for which something was not compared, and how many exact figures are equal."""
    name = namer(verdict.case for verdict in ordered)
    equal = sum(verdict.kind == "same" and _is_dull(verdict) for verdict in ordered)
    paired = any(verdict.quantity == "time" and verdict.effect is not None for verdict in ordered)
    reasons = Counter((verdict.kind, verdict.detail) for verdict in ordered)
    shared = {key: count for key, count in reasons.items() if key[0] in _GROUPED | _WHOLE_CASES and count > 1}
    detailed = [
        verdict
        for verdict in ordered
        if verdict.detail and verdict.kind != "same" and (verdict.kind, verdict.detail) not in shared
    ]
    return [
        *(
            _lead(verdict) + f"{name(verdict.case, verdict.phase)}, {verdict.quantity}: {verdict.detail}"
            for verdict in detailed
        ),
        *(f"{kind.replace('-', ' ')} ({count}): {reason}" for (kind, reason), count in shared.items() if reason),
        *([f"exact figures that are equal: {equal}"] if equal else []),
        *([PAIRED_TIMES] if paired else []),
    ]


def _lead(verdict: Verdict) -> str:
    """Name the verdict, where no row of the table shows it."""
    return f"{_word(verdict)}, " if _is_dull(verdict) else ""


def _word(verdict: Verdict) -> str:
    if verdict.kind == "faster" and verdict.quantity not in TIMES:
        return "LESS WORK"
    return verdict.kind.replace("-", " ") if verdict.kind in {"not-comparable", "new"} else verdict.kind.upper()


def _what(verdict: Verdict) -> str:
    """Name the quantity and its change, for the sentence: `, time +12.3% [+8.1 to +16.0]`."""
    change = _change(verdict)
    parts = [f", {verdict.quantity} {change}"] if change else []
    parts += [f" ({verdict.detail})"] if verdict.detail and verdict.kind not in _GROUPED else []
    return "".join(parts)


def _change(verdict: Verdict) -> str:
    """Write a time's slow-down with its interval, or a counter's difference."""
    if verdict.effect is not None:
        if verdict.low is None or verdict.high is None:
            return f"{verdict.effect:+.1%}"
        return f"{verdict.effect:+.1%} [{100 * verdict.low:+.1f} to {100 * verdict.high:+.1f}]"
    if verdict.base is None or verdict.head is None or verdict.base == verdict.head:
        return ""
    return f"{verdict.head - verdict.base:+,.0f}"


def _figure(value: float | None, counts: bool) -> str:
    return f"{value:,.0f}" if counts and value is not None else number(value)
