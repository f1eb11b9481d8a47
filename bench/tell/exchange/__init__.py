"""The formats of other tools, one file each: what `kvbench export` writes."""

from collections.abc import Callable, Mapping

import pandas as pd

from bench.analysis.tidy import Tidy
from bench.tell.exchange import benchstat, bmf, github_action, llama_bench, parquet
from bench.tell.formats import ExportFormat

EXPORTERS: Mapping[ExportFormat, Callable[[Tidy, pd.DataFrame], dict[str, bytes]]] = {
    "bmf": bmf.documents,
    "github-action-benchmark": github_action.documents,
    "llama-bench": llama_bench.documents,
    "benchstat": benchstat.documents,
    "parquet": parquet.documents,
}
"""Each takes a run and its summary, and returns the files of the export by name, as they stand in the run's folder."""
