"""The formats of other tools, one file each: what `kvbench export` writes, and llama-bench's, which `import` reads."""

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
    """Return what writes `form`; its module is imported for it alone."""
    match form:
        case "bmf":
            from bench.tell.exchange import bmf

            return bmf.documents
        case "github-action-benchmark":
            from bench.tell.exchange import github_action

            return github_action.documents
        case "llama-bench":
            from bench.tell.exchange import llama_bench

            return llama_bench.documents
        case "benchstat":
            from bench.tell.exchange import benchstat

            return benchstat.documents
        case "parquet":
            from bench.tell.exchange import parquet

            return parquet.documents
