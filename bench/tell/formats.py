"""The formats of what a command prints. Types alone, so that the command line knows them without importing pandas."""

from typing import Literal

Format = Literal["md", "csv", "json", "jsonl"]
"""Formats of a table: text for a reader, or its rows."""

DocumentFormat = Literal["md", "json"]
"""Formats of what is no table: a verdict, a trace, an environment."""

ExportFormat = Literal["bmf", "github-action-benchmark", "llama-bench", "benchstat", "parquet"]
"""Formats of other tools (`bench.tell.exchange`)."""
