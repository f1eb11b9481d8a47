"""Frames -> text: the table of a run as Markdown, for a terminal, as CSV or JSON. No file access."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import msgspec
import pandas as pd
from rich.console import Group
from rich.text import Text

from bench.analysis import columns
from bench.analysis.summary import PLAIN
from bench.case import HOST_DEVICES
from bench.manifest import Ceiling, Environment
from bench.tell.formats import DocumentFormat, Format
from bench.tell.layout import Fitted, markdown_table
from bench.tell.words import NOTHING, Row, by_setting, case_labels, context, missing, number, time_ratio, with_interval
from kvcache.strategies.catalogue import REFEEDING, YARDSTICKS

FORMATS: tuple[Format, ...] = get_args(Format)

SUMMARY_HEADERS: list[str] = [
    "prompt",
    "strategy",
    "TTFT ms",
    "TPOT ms",
    "prefill\ntok/s",
    "decode\ntok/s",
    "decode\nspeed-up",
    "tokens\nmatch",
]
"""Time to first token, time per output token, throughputs, speed-up over naive; brackets hold 95 % intervals."""

ROOF_HEADERS: list[str] = [
    "prompt",
    "strategy",
    "prefill,\nhf / own",
    "prefill\nMFU",
    "decode,\nhf / own",
    "decode\nMBU",
    "decode\nbound by",
    "compile s",
]
"""Times faster than hf-generate, and shares of the measured GEMM rate and read bandwidth, each paired within rounds."""

CACHE_HEADERS: list[str] = [
    "prompt",
    "strategy",
    "bytes",
    "bytes /\nexact",
    "TPOT /\nexact",
    "TTFT /\nexact",
    "KL,\nnats",
    "floor",
    "same\ntop 1",
    "recall",
    "equal\ntokens",
]
"""Bytes, time and quality of each cache; exact is `dynamic`, or `compiled` for kinds that compile."""

COMPARISON_HEADERS: list[str] = ["prompt", "strategy", "phase", "A ms", "B ms", "B / A", "verdict"]

_LEFT = frozenset({"strategy", "tokens\nmatch", "phase", "verdict", "decode\nbound by"})

Line = list[str]


def render(summary: pd.DataFrame, form: Format) -> str:
    """Write the summary as one document: a readable table (md), or every column of `summary.csv` (csv, json, jsonl)."""
    return markdown(summary) if form == "md" else data(summary[columns.NAMES], form)


def data(frame: pd.DataFrame, form: Literal["csv", "json", "jsonl"]) -> str:
    """Write every row and column of any frame, with all digits; an empty cell is nothing in CSV and null in JSON."""
    if form == "csv":
        return str(frame.to_csv(index=False, lineterminator="\n"))
    records = frame.astype(object).where(frame.notna(), None).to_dict("records")
    if form == "json":
        return json.dumps(records, indent=2, allow_nan=False) + "\n"
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)


def markdown(summary: pd.DataFrame) -> str:
    """Write a table per setting with a line per case, what failed and why, and each case against the roofs."""
    times = _markdown(_summary_tables(summary), SUMMARY_HEADERS)
    roofs = _markdown(_roof_tables(summary), ROOF_HEADERS)
    caches = _markdown(_cache_tables(summary), CACHE_HEADERS)
    return "\n".join(part for part in (times + _failures(summary), caches, roofs) if part)


def terminal(summary: pd.DataFrame) -> Group:
    """Make the same for a terminal of any width: an empty line between cells, headers in two lines, no figure cut."""
    failures = _failures(summary).rstrip()
    times, roofs = _terminal(_summary_tables(summary), SUMMARY_HEADERS), _terminal(_roof_tables(summary), ROOF_HEADERS)
    caches = _terminal(_cache_tables(summary), CACHE_HEADERS)
    return Group(times, *([Text(failures)] if failures else []), caches, roofs)


def comparison_markdown(rows: pd.DataFrame) -> str:
    """Write the rows of a comparison (`bench.judge.compare.Comparison.rows`) as Markdown."""
    return _markdown(_comparison_tables(rows), COMPARISON_HEADERS)


def render_environment(environment: Environment, form: DocumentFormat, ceilings: Sequence[Ceiling] = ()) -> str:
    """Write the fields of an environment and the ceilings measured on it, as tables or as one JSON object."""
    fields = msgspec.structs.asdict(environment)
    if form == "json":
        found = [msgspec.structs.asdict(ceiling) for ceiling in ceilings]
        return json.dumps(fields | ({"ceilings": found} if found else {}), indent=2) + "\n"
    lines = [_environment_line(name, value) for name, value in fields.items()]
    text = f"{markdown_table(lines, ['field', 'value'])}\n"
    return f"{text}\n{_ceilings(ceilings)}" if ceilings else text


def _environment_line(name: str, value: Any) -> Line:
    """A field for a reader: bytes in binary units, the load in two digits, variables as in a shell."""
    label = name.removesuffix("_bytes")
    if value is None or value in ({}, [], ()):
        return [label, NOTHING]
    if label != name:
        unit, size = ("GiB", 2**30) if value >= 2**30 else ("MiB", 2**20)
        return [label, f"{number(value / size)} {unit}"]
    if isinstance(value, dict):
        return [label, " ".join(f"{variable}={setting}" for variable, setting in value.items())]
    return [label, f"{value:.2f}" if isinstance(value, float) else str(value)]


def _ceilings(ceilings: Sequence[Ceiling]) -> str:
    """A line per setting: its read bandwidth and its GEMM rate, each with the kernel that reached it."""
    settings: dict[tuple[str, str, int], dict[str, Ceiling]] = {}
    for ceiling in ceilings:
        settings.setdefault((ceiling.device, ceiling.dtype, ceiling.n_threads), {})[ceiling.ceiling] = ceiling
    lines = [
        [
            device,
            dtype,
            str(n_threads) if device in HOST_DEVICES else NOTHING,
            *_rate(found.get("read_bandwidth"), 1e9),
            *_rate(found.get("gemm"), 1e12),
        ]
        for (device, dtype, n_threads), found in settings.items()
    ]
    headers = ["device", "dtype", "threads", "read GB/s", "by", "GEMM TFLOP/s", "by"]
    align = ["left", "left", "right", "right", "left", "right", "left"]
    return f"{markdown_table(lines, headers, align)}\n"


def _rate(ceiling: Ceiling | None, unit: float) -> Line:
    return [NOTHING, NOTHING] if ceiling is None else [number(ceiling.per_s / unit), ceiling.kernel]


def _summary_tables(summary: pd.DataFrame) -> Iterator[tuple[str, list[Line]]]:
    for title, rows in by_setting(summary, also=["n_gen"]):
        yield title, [_summary_line(case) for case in _cases(rows)]


def _roof_tables(summary: pd.DataFrame) -> Iterator[tuple[str, list[Line]]]:
    """Of the settings that have such figures; a case without any has no line."""
    for title, rows in by_setting(summary, also=["n_gen"]):
        lines = [_roof_line(case) for case in _cases(rows)]
        if lines := [line for line in lines if set(line[2:]) != {NOTHING}]:
            yardstick = "hf-generate and " if rows["speedup_vs_hf"].notna().any() else ""
            yield f"Against {yardstick}the machine's roofs: {title}", lines


def _cache_tables(summary: pd.DataFrame) -> Iterator[tuple[str, list[Line]]]:
    """Of the settings in which a lossy strategy was judged; a case that holds no cache has no line."""
    for title, rows in by_setting(summary, also=["n_gen"]):
        if rows["logit_kl"].notna().any():
            held = [_cache_line(case) for case in _cases(rows) if _holds_cache(case["prefill"])]
            yield f"Caches, against dynamic (compiled kinds: compiled): {title}", held


def _holds_cache(row: Row) -> bool:
    return not missing(row["kv_bytes_allocated"]) and row["kv_bytes_allocated"] > 0


def _cache_line(phases: Mapping[Any, Row]) -> Line:
    prefill = phases["prefill"]
    last = phases.get("decode", prefill)
    return [
        context(prefill),
        prefill["strategy"],
        number(last["kv_bytes_allocated"]),
        number(last["kv_bytes_vs_exact"]),
        _versus_exact(phases.get("decode", {})),
        _versus_exact(prefill),
        _small(prefill["logit_kl"]),
        _small(prefill["logit_kl_floor"]),
        number(prefill["top1_agreement"]),
        number(prefill["recall_agreement"]),
        NOTHING if missing(prefill["matching_tokens"]) else f"{prefill['matching_tokens']} of {prefill['n_gen']}",
    ]


def _versus_exact(row: Row) -> str:
    if row.get("strategy") in PLAIN.values():
        return "1"  # by definition
    return with_interval(*(row.get(f"latency_vs_exact{end}") for end in ("", "_low", "_high")))


def _small(value: float) -> str:
    """A divergence, which spans many orders of magnitude."""
    return NOTHING if missing(value) else f"{value:.0e}"


def _cases(rows: pd.DataFrame) -> list[Mapping[Any, Row]]:
    """Each case's rows by phase: a prefill row opens a case, and its decode row, if it has one, follows."""
    cases = rows.groupby((rows["phase"] == "prefill").cumsum(), sort=False)
    return [dict(case.set_index("phase").to_dict("index")) for _, case in cases]


def _summary_line(phases: Mapping[Any, Row]) -> Line:
    prefill = phases["prefill"]
    decode: Row = phases.get("decode", {})
    match = prefill["tokens_match"]
    if prefill["status"] != "ok" and not _failed_by_tokens(prefill):
        match = prefill["status"]
    return [
        context(prefill),
        prefill["strategy"],
        _latency(prefill),
        _latency(decode),
        number(prefill["tokens_per_s"]),
        number(decode.get("tokens_per_s")),
        _speedup(decode),
        NOTHING if missing(match) else match,
    ]


def _failed_by_tokens(row: Row) -> bool:
    """Whether other tokens are the failure; of a lossy strategy they never are."""
    return bool(
        not missing(row["tokens_match"])
        and row["tokens_match"] == "false"
        and (missing(row["exact"]) or row["exact"] != "false")
    )


def _roof_line(phases: Mapping[Any, Row]) -> Line:
    prefill = phases["prefill"]
    decode: Row = phases.get("decode", {})
    bound = decode.get("bound")
    return [
        context(prefill),
        prefill["strategy"],
        _versus_yardstick(prefill),
        _share(prefill, "mfu"),
        _versus_yardstick(decode),
        _share(decode, "mbu"),
        NOTHING if missing(bound) else str(bound),
        number(prefill["compile_s"]),
    ]


def _versus_yardstick(row: Row) -> str:
    if row.get("strategy") in YARDSTICKS and not missing(row["speedup_vs_hf"]):
        return "1"
    return with_interval(row.get("speedup_vs_hf"), row.get("speedup_vs_hf_low"), row.get("speedup_vs_hf_high"))


def _share(row: Row, name: str) -> str:
    return with_interval(row.get(name), row.get(f"{name}_low"), row.get(f"{name}_high"))


def _latency(row: Row) -> str:
    return with_interval(row.get("latency_ms"), row.get("latency_ms_low"), row.get("latency_ms_high"))


def _speedup(row: Row) -> str:
    if row.get("strategy") in REFEEDING and not missing(row["speedup_vs_naive"]):
        return "1"  # by definition, so without digits and interval
    return with_interval(row.get("speedup_vs_naive"), row.get("speedup_low"), row.get("speedup_high"))


def _failures(summary: pd.DataFrame) -> str:
    """A line per case that did not end well."""
    labels = case_labels(summary)
    failed = summary[(summary["status"] != "ok") & (summary["phase"] == "prefill")].to_dict("records")
    lines = [f"- {labels[row['case']]}: {row['status']}: {row['error']}\n" for row in failed]
    return "".join(["\n", *lines]) if lines else ""


def _comparison_tables(rows: pd.DataFrame) -> Iterator[tuple[str, list[Line]]]:
    for title, group in by_setting(rows, also=["n_gen"]):
        yield (
            title,
            [
                [
                    context(row),
                    row["strategy"],
                    row["phase"],
                    number(row["a_ms"]),
                    number(row["b_ms"]),
                    time_ratio(row),
                    row["verdict"],
                ]
                for row in group.to_dict("records")
            ],
        )


def _markdown(tables: Iterator[tuple[str, list[Line]]], headers: Line) -> str:
    align = ["left" if header in _LEFT else "right" for header in headers]
    names = [header.replace("\n", " ") for header in headers]
    return "\n".join(f"{title}\n\n{markdown_table(lines, names, align)}\n" for title, lines in tables)


def _terminal(tables: Iterator[tuple[str, list[Line]]], headers: Line) -> Group:
    return Group(*(Fitted(title, headers, lines, _LEFT, names=2, sections=True) for title, lines in tables))
