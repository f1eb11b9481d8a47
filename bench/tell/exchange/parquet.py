"""The summary as Apache Parquet, written by DuckDB (extra `history`)."""

import pandas as pd

from bench.analysis import columns
from bench.analysis.tidy import Tidy
from bench.store.duck import TYPES, parquet
from bench.tell import tables


def documents(tidy: Tidy, summary: pd.DataFrame) -> dict[str, bytes]:
    """Write every row and column of `summary.csv`, each column of its type.

    Raises:
        UsageError: DuckDB is not installed.
    """
    types = {column.name: TYPES[column.dtype] for column in columns.COLUMNS}
    return {"summary.parquet": parquet(types, tables.rows(summary))}
