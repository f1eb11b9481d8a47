"""The page of one run: its closing sentence, cautions, one table, plots, environment, and how each number is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from bench.analysis import columns
from bench.naming import Row, plural
from bench.record import Check, Run, kernels_of
from bench.tell import notes, tables
from bench.tell.drawn import MOST_PAGE_CASES, few, limits_line, page_line
from bench.tell.environment import facts
from bench.tell.page.render import document
from bench.tell.page.svg import Picture
from bench.tell.page.table import Column, Line, Table, names, separated
from bench.tell.representative import representative_line
from bench.tell.words import NOTHING, SETTING_COLUMNS, number, representing, setting

if TYPE_CHECKING:
    from bench.tell.report import Report

GROUPS: dict[str, tables.Cells] = {
    "Times": tables.TIMES,
    "Caches": tables.CACHES,
    "Machine's roofs": tables.ROOFS,
    "Memory": tables.MEMORY,
}
_SETTINGS = [*SETTING_COLUMNS, "n_gen"]
_HEADERS = {"n_threads": "threads", "attn_implementation": "attention", "batch_size": "batch", "n_gen": "new\ntokens"}


def run_page(report: Report, pictures: Mapping[str, Picture]) -> str:
    """Write the page of a run; `pictures` are its plots, by a name that is unique in the page."""
    run, summary = report.tidy.run, report.summary
    cases = list(dict.fromkeys(summary["case"]))
    shown = summary[summary["case"].isin(few(cases, MOST_PAGE_CASES))]
    return document(
        "run.html",
        title=f"What the cache gains: {', '.join(dict.fromkeys(summary['model']))}",
        name=run.name,
        created=run.manifest.created_utc.partition("T")[0],
        machine=run.machine_names,
        closing=report.closing or _closing(summary),
        failures=tables.failures(summary),
        n_cases=len(cases),
        left_out=page_line(len(cases)),
        cautions=report.caution_lines,
        setting=_shared_setting(summary),
        reading=notes.reading_line(summary),
        table=results(shown),
        pictures=pictures,
        represented=representative_line(report.timed) + limits_line(report.timed),
        notes="\n".join(filter(None, [notes.slope_lines(report.slopes), notes.prediction_lines(summary)])),
        environment=_environment(run),
        turns=_turns(report),
        columns=[(f"`{column.name}`", column.unit, column.meaning) for column in columns.COLUMNS],
        summary=_every_column(shown),
    )


def results(summary: pd.DataFrame) -> Table:
    """Make the one table of a run: a row per case, the columns of all of its tables."""
    varying = [name for name in _SETTINGS if len(set(summary[name])) > 1]
    heads = [Column(_HEADERS.get(name, name), "Setting", left=summary[name].dtype == "string") for name in varying]
    cells: list[tuple[Column, Any]] = [
        (Column("prompt"), tables.TIMES["prompt"]),
        (Column("strategy", left=True, heads_row=True), tables.TIMES["strategy"]),
    ]
    shown_first = {"Times", "Caches"} if summary["logit_kl"].notna().any() else {"Times"}
    for group, own in (GROUPS | {"Caches": tables.cells_of_caches(summary)}).items():
        shown = group in shown_first
        cells += [
            (Column(title, group, left=title in tables.LEFT, hidden=not shown), cell)
            for title, cell in own.items()
            if title not in ("prompt", "strategy")
        ]
    lines = []
    found = list(tables.cases(summary))
    opens = separated([prefill[name] for name in (*varying, "n_prompt", "n_depth")] for prefill, _ in found)
    for (prefill, decode), opening in zip(found, opens, strict=True):
        settings = [str(prefill[name]) for name in varying]
        written = [cell(prefill, decode) for _, cell in cells]
        named = names(*settings, "prompt", *written[:2], prefill["status"])
        lines.append(Line([*settings, *written], named, opening))
    return Table.of("Results", [*heads, *(column for column, _ in cells)], lines)


def _closing(summary: pd.DataFrame) -> str:
    """Say what was measured where there is no sentence about naive and a cache."""
    timed = summary.loc[summary["latency_ms"].notna(), "case"].nunique()
    return f"Measured {timed} of {plural(summary['case'].nunique(), 'case')}."


def _shared_setting(summary: pd.DataFrame) -> str:
    """Write what all cases have in common, as the title of a table does."""
    shared = [name for name in SETTING_COLUMNS if len(set(summary[name])) == 1]
    first: Row = representing(summary)
    return setting(first, also=["n_gen"] if len(set(summary["n_gen"])) == 1 else [], only=shared)


def _environment(run: Run) -> list[tuple[str, str]]:
    manifest = run.manifest
    rows = [("command", f"`{' '.join(manifest.command)}`"), ("measured (UTC)", manifest.created_utc)]
    for machine in run.environments:
        rows += [(name.replace("_", " "), value) for name, value in facts(machine) if value != NOTHING]
    for name, per_s in manifest.ceilings.items():
        unit, size = ("GB/s", 1e9) if name.startswith("read_bandwidth") else ("TFLOP/s", 1e12)
        what = name.replace("_bytes_per_s", "").replace("_flop_per_s", "").replace("_", " ")
        rows.append((f"{what}, at the start", f"{number(per_s / size)} {unit}"))
    rows += [(f"weights of {model}", f"`{digest}`") for model, digest in manifest.weights.items()]
    return rows + _kernels(run)


def _kernels(run: Run) -> list[tuple[str, str]]:
    """List the products of `compiled` by the kernel that computed them, for each number of threads apart."""
    cases = {plan.case.key: plan.case for plan in run.manifest.plan}
    by_threads: dict[int, list[Check]] = {}
    for check in run.checks:
        by_threads.setdefault(cases[check.case].n_threads, []).append(check)
    rows = []
    for n_threads, checks in by_threads.items():
        products: dict[str, list[str]] = {}
        for product, kernel in sorted(kernels_of(checks).items()):
            products.setdefault(kernel, []).append(product)
        where = f", {plural(n_threads, 'thread')}" if len(by_threads) > 1 else ""
        rows += [(f"products by {kernel}{where}", "; ".join(named)) for kernel, named in sorted(products.items())]
    return rows


def _turns(report: Report) -> str:
    """Say how often each case was measured, and how many turns do not count."""
    manifest, measured = report.tidy.run.manifest, report.tidy.measured
    turns = measured.drop_duplicates(["case", "process", "round"])
    rounds = f"{plural(manifest.repetitions, 'round')} in {plural(manifest.processes, 'process', 'processes')} planned"
    return f"{rounds}, {plural(len(turns), 'turn')} timed, {turns['disturbed'].sum()} of them disturbed."


def _every_column(summary: pd.DataFrame) -> dict[str, Any]:
    """Take every column and row of summary.csv, for the script of the page."""
    frame = summary[columns.NAMES]
    rows = frame.astype(object).where(frame.notna(), None).to_numpy().tolist()
    return {"columns": [column._asdict() for column in columns.COLUMNS], "rows": rows}
