"""The formats of other tools, one file each: what `kvbench export` writes, and llama-bench's, which `import` reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pandas as pd

    from bench.analysis.tidy import Tidy

ExportFormat = Literal["bmf", "github-action-benchmark", "llama-bench", "benchstat", "parquet"]

Documents = dict[str, bytes]
"""The files of an export by name, as they stand in the run's folder."""

Exporter = Callable[["Tidy", "pd.DataFrame"], Documents]
"""Takes a run and its summary (`bench.analysis.summary.summarize`)."""


def exporter(form: ExportFormat) -> Exporter:
    """Return what writes `form`."""
    match form:
        case "bmf":
            from bench.tell.exchange.bmf import documents
        case "github-action-benchmark":
            from bench.tell.exchange.github_action import documents
        case "llama-bench":
            from bench.tell.exchange.llama_bench import documents
        case "benchstat":
            from bench.tell.exchange.benchstat import documents
        case "parquet":
            from bench.tell.exchange.parquet import documents
    return documents
