"""The rows of `kvbench fit` as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import pandas as pd

from bench.tell import tables
from bench.tell.formats import Format
from bench.tell.layout import markdown_table
from bench.tell.words import NOTHING, number

if TYPE_CHECKING:
    from bench.measure.fit import Fit

_HEADERS = ("strategy", "batch", "largest context", "limited by", "cache GB", "process GB", "decode tok/s at most")
_OF_BATCHES = ("strategy", "largest batch", "context", *_HEADERS[3:])
_PROCESS = "process: Python, torch and transformers (0.4 GB), and the workspace of a forward; an estimate"


def render(rows: Sequence[Fit], form: Format, *, of_batches: bool = False) -> str:
    """Write a line per kind and batch size, and below the table why a kind has none; or every field of each row.

    With `of_batches` the batch is what was looked for, and not the context.
    """
    if form != "md":
        return tables.data(pd.DataFrame(map(msgspec.structs.asdict, rows), dtype=object), form)
    first = rows[0]
    weights, memory = _gigabytes(first.weights_bytes), _gigabytes(first.memory_bytes)
    title = f"{first.model}, {first.dtype}: {weights} GB of weights in {memory} GB of memory"
    lines = [
        [
            row.strategy,
            str(row.batch_size),
            f"{row.max_context:,}",
            row.limited_by or NOTHING,
            _gigabytes(row.kv_bytes_allocated),
            _gigabytes(row.workspace_bytes),
            NOTHING if row.tokens_per_s is None else number(row.tokens_per_s),
        ]
        for row in rows
        if row.max_context is not None
    ]
    headers = _OF_BATCHES if of_batches else _HEADERS
    table = markdown_table(lines, headers, ["left", *["right"] * 2, "left", *["right"] * 3])
    reasons = {row.strategy: row.error for row in rows if row.error is not None}
    below = "".join(f"- {strategy}: {reason}\n" for strategy, reason in reasons.items())
    noted = f"\n{_PROCESS}\n" if lines else ""
    return f"{title}\n\n{table}\n{noted}" + (f"\n{below}" if below else "")


def _gigabytes(size: int | None) -> str:
    return NOTHING if size is None else f"{size / 1e9:.3g}"
