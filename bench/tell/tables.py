"""Frames -> text: the table of a run as Markdown, for a terminal, as CSV or JSON. No file access."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import pandas as pd
from rich.console import Group
from rich.text import Text

from bench.analysis import columns, frames
from bench.naming import Row, context
from bench.tell.formats import Format
from bench.tell.layout import Fitted, markdown_table
from bench.tell.words import NOTHING, by_setting, case_labels, missing, number, reason_lines, time_ratio, with_interval
from kvcache.strategies.catalogue import OWN, PLAIN, REFEEDING, YARDSTICKS

Cells = dict[str, Callable[[Row, Row], str]]
"""The columns of a table: header -> the cell of a case, from its prefill row and its decode row (empty without one)."""


def _interval(row: Row, name: str, ends: str = "", one: Collection[str] = ()) -> str:
    """Write a figure and its interval, in columns that begin with `ends`; 1 by definition for the strategies `one`."""
    if row.get("strategy") in one and not missing(row[name]):
        return "1"
    ends = ends or name
    return with_interval(row.get(name), row.get(f"{ends}_low"), row.get(f"{ends}_high"))


def _match(prefill: Row) -> str:
    """Say whether the tokens are right, or the status of a case that failed otherwise."""
    match = prefill["tokens_match"]
    is_lossy = not missing(prefill["exact"]) and prefill["exact"] == "false"  # whose other tokens are no failure
    if prefill["status"] != "ok" and (missing(match) or match != "false" or is_lossy):
        match = prefill["status"]
    return NOTHING if missing(match) else str(match)


def _small(value: float) -> str:
    """Write a divergence, which spans many orders of magnitude."""
    return NOTHING if missing(value) else f"{value:.0e}"


def megabytes(size: float) -> str:
    """Write a size in MB: to a tenth, and one below 10 MB with three digits, since a small cache takes few."""
    if missing(size) or size >= 1e7:
        return NOTHING if missing(size) else f"{size / 1e6:.1f}"
    return number(size / 1e6)


def _word(value: str | None) -> str:
    return NOTHING if missing(value) else str(value)


_CASE: Cells = {"prompt": lambda prefill, _: context(prefill), "strategy": lambda prefill, _: prefill["strategy"]}

TIMES: Cells = _CASE | {
    "TTFT ms": lambda prefill, _: _interval(prefill, "latency_ms"),
    "TPOT ms": lambda _, decode: _interval(decode, "latency_ms"),
    "prefill\ntok/s": lambda prefill, _: number(prefill["tokens_per_s"]),
    "decode\ntok/s": lambda _, decode: number(decode.get("tokens_per_s")),
    "decode\nspeed-up": lambda _, decode: _interval(decode, "speedup_vs_naive", "speedup", REFEEDING),
    "tokens\nmatch": lambda prefill, _: _match(prefill),
}
"""Time to first token, time per output token, throughputs, speed-up over naive; brackets hold 95 % intervals."""

ROOFS: Cells = _CASE | {
    "prefill,\nspeed-up vs hf": lambda prefill, _: _interval(prefill, "speedup_vs_hf", one=YARDSTICKS),
    "prefill\nMFU": lambda prefill, _: _interval(prefill, "mfu"),
    "decode,\nspeed-up vs hf": lambda _, decode: _interval(decode, "speedup_vs_hf", one=YARDSTICKS),
    "decode\nMBU": lambda _, decode: _interval(decode, "mbu"),
    "decode\nbound by": lambda _, decode: _word(decode.get("bound")),
    "compile s": lambda prefill, _: number(prefill["compile_s"]),
}
"""Times faster than hf-generate, and shares of the measured GEMM rate and read bandwidth, each paired within rounds."""

CACHES: Cells = _CASE | {
    "cache\nMB": lambda prefill, decode: megabytes((decode or prefill)["kv_bytes_allocated"]),
    "bytes /\nexact": lambda prefill, decode: number((decode or prefill)["kv_bytes_vs_exact"]),
    "TPOT /\nexact": lambda _, decode: _interval(decode, "latency_vs_exact", one=PLAIN.values()),
    "TTFT /\nexact": lambda prefill, _: _interval(prefill, "latency_vs_exact", one=PLAIN.values()),
    "KL,\nnats": lambda prefill, _: _small(prefill["logit_kl"]),
    "floor": lambda prefill, _: _small(prefill["logit_kl_floor"]),
    "same\ntop 1": lambda prefill, _: number(prefill["top1_agreement"]),
    "recall": lambda prefill, _: number(prefill["recall_agreement"]),
    "equal\ntokens": lambda prefill, _: (
        NOTHING if missing(prefill["matching_tokens"]) else f"{prefill['matching_tokens']} of {prefill['n_gen']}"
    ),
}
"""Bytes, time and quality of each cache; exact is `dynamic`, or `compiled` for kinds that compile."""
_OF_PROMPTS = "TTFT /\nexact"


def cells_of_caches(summary: pd.DataFrame) -> Cells:
    """Choose the columns of `CACHES` for some rows: TTFT only of prompts, which a single token after a context is not.

    Such a prefill is one step, and says nothing of how a prompt is stored.
    """
    of_prompts = (summary["n_prompt"] > 1).any()
    return {header: cell for header, cell in CACHES.items() if of_prompts or header != _OF_PROMPTS}


MEMORY: Cells = _CASE | {
    "cache\nMB": lambda prefill, decode: megabytes((decode or prefill)["kv_bytes_allocated"]),
    "workspace\nMB": lambda prefill, _: megabytes(prefill["workspace_bytes"]),
    "peak beyond\nweights, MB": lambda prefill, _: megabytes(prefill["peak_beyond_weights_bytes"]),
}
"""Memory of each strategy in MB (10^6 bytes): what it adds to the weights."""

COMPARISON: Cells = _CASE | {
    "phase": lambda row, _: row["phase"],
    "A ms": lambda row, _: number(row["a_ms"]),
    "B ms": lambda row, _: number(row["b_ms"]),
    "B / A": lambda row, _: time_ratio(row),
    "verdict": lambda row, _: row["verdict"],
}

LEFT = frozenset({"strategy", "tokens\nmatch", "phase", "verdict", "decode\nbound by"})
"""Headers of the columns of words, which are aligned to the left."""


class _Table(NamedTuple):
    title: str
    headers: list[str]
    lines: list[list[str]]


def render(summary: pd.DataFrame, form: Format) -> str:
    """Write the summary as one document: a readable table (md), or every column of `summary.csv` (csv, json, jsonl)."""
    return markdown(summary) if form == "md" else data(summary[columns.NAMES], form)


def rows(summary: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of the summary with the columns of `summary.csv`; an empty cell is None."""
    return _records(summary[columns.NAMES])


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return frames.records(frame.astype(object).where(frame.notna(), None))


def data(frame: pd.DataFrame, form: Literal["csv", "json", "jsonl"]) -> str:
    """Write every row and column of any frame, with all digits; an empty cell is nothing in CSV and null in JSON."""
    if form == "csv":
        return str(frame.to_csv(index=False, lineterminator="\n"))
    records = _records(frame)
    if form == "json":
        return json.dumps(records, indent=2, allow_nan=False) + "\n"
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)


def markdown(summary: pd.DataFrame) -> str:
    """Write a table per setting with a line per case, what failed and why, and each case against the roofs."""
    parts = [times_markdown(summary) + _failures(summary), caches_markdown(summary)]
    parts += [_markdown(_roofs(summary)), _markdown(_memory(summary))]
    return "\n".join(part for part in parts if part)


def times_markdown(summary: pd.DataFrame) -> str:
    """Write a line per case with its times, a table per setting."""
    return _markdown(_times(summary))


def caches_markdown(summary: pd.DataFrame) -> str:
    """Write a line per cache with bytes, times and quality, for the settings with a lossy cache or a user's own."""
    return _markdown(_caches(summary))


def terminal(summary: pd.DataFrame) -> Group:
    """Make the same for a terminal of any width: an empty line between cells, headers in two lines, no figure cut."""
    failures = [Text(lines)] if (lines := _failures(summary).rstrip()) else []
    others = [fitted for tables in (_caches, _roofs, _memory) for fitted in _terminal(tables(summary))]
    return Group(*_terminal(_times(summary)), *failures, *others)


def comparison_markdown(rows: pd.DataFrame) -> str:
    """Write the rows of a comparison (`bench.judge.compare.Comparison.rows`) as Markdown."""
    found = by_setting(rows, also=["n_gen"])
    return _markdown(_table(title, COMPARISON, [(row, {}) for row in frames.records(own)]) for title, own in found)


def comparison_terminal(rows: pd.DataFrame) -> list[Fitted]:
    """Make the same for a terminal of any width."""
    found = by_setting(rows, also=["n_gen"])
    tables = [_table(title, COMPARISON, [(row, {}) for row in frames.records(own)]) for title, own in found]
    return [Fitted(title, headers, lines, LEFT, names=3) for title, headers, lines in tables]


def _times(summary: pd.DataFrame) -> Iterator[_Table]:
    for title, rows in by_setting(summary, also=["n_gen"]):
        yield _table(title, TIMES, cases(rows))


def _roofs(summary: pd.DataFrame) -> Iterator[_Table]:
    """Yield a table for each setting that has such figures; a case without any has no line."""
    for title, rows in by_setting(summary, also=["n_gen"]):
        yardstick = f"{', '.join(YARDSTICKS)} and " if rows["speedup_vs_hf"].notna().any() else ""
        table = _table(f"Against {yardstick}the machine's roofs: {title}", ROOFS, cases(rows))
        if lines := [line for line in table.lines if set(line[2:]) != {NOTHING}]:
            yield table._replace(lines=lines)


def _caches(summary: pd.DataFrame) -> Iterator[_Table]:
    """Yield a table for each setting in which a lossy cache or a user's own was measured, judged or not.

    A case that holds no cache has no line.
    """
    for title, rows in by_setting(summary, also=["n_gen"]):
        held = rows[(rows["kv_bytes_allocated"] > 0).groupby(rows["case"]).transform("any")]
        if ((held["exact"] == "false") | held["strategy"].str.startswith(OWN)).any():
            yield _table(
                f"Caches compared with dynamic (compiled kinds with compiled): {title}",
                cells_of_caches(held),
                cases(held),
            )


def _memory(summary: pd.DataFrame) -> Iterator[_Table]:
    """Yield a table for each setting that has such figures; a case without any has no line."""
    known = summary[summary["peak_beyond_weights_bytes"].notna()]
    for title, rows in by_setting(known, also=["n_gen"]):
        weights = number(rows["weights_bytes"].iloc[0] / 1e6)
        yield _table(f"Memory, beside the weights' {weights} MB: {title}", MEMORY, cases(rows))


def cases(rows: pd.DataFrame) -> Iterator[tuple[Row, Row]]:
    """Yield each case's rows: a prefill row opens a case, and its decode row, if it has one, follows."""
    records = frames.records(rows)
    for row, following in zip(records, [*records[1:], {}], strict=True):
        if row["phase"] == "prefill":
            yield row, following if following.get("phase") == "decode" else {}


def _table(title: str, cells: Cells, cases: Iterable[tuple[Row, Row]]) -> _Table:
    return _Table(title, list(cells), [[cell(*case) for cell in cells.values()] for case in cases])


def failures(summary: pd.DataFrame) -> list[tuple[str, str, str]]:
    """List the cases that did not end well: label, status and error of each."""
    labels = case_labels(summary)
    failed = frames.records(summary[(summary["status"] != "ok") & (summary["phase"] == "prefill")])
    return [(labels[row["case"]], row["status"], row["error"]) for row in failed]


def _failures(summary: pd.DataFrame) -> str:
    """Write a line per reason for which cases did not end well."""
    lines = reason_lines((case, "", f"{status}: {error}") for case, status, error in failures(summary))
    return f"\n{lines}" if lines else ""


def _markdown(tables: Iterable[_Table]) -> str:
    parts = []
    for title, headers, lines in tables:
        align = ["left" if header in LEFT else "right" for header in headers]
        written = markdown_table(lines, [header.replace("\n", " ") for header in headers], align)
        parts.append(f"{title}\n\n{written}\n")
    return "\n".join(parts)


def _terminal(tables: Iterable[_Table]) -> list[Fitted]:
    return [Fitted(title, headers, lines, LEFT, names=2, sections=True) for title, headers, lines in tables]
