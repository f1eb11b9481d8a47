"""How a count and a case are written wherever a person reads them: tables, plots, verdicts, progress and errors."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import msgspec

from bench.case import Case

Row = Mapping[Any, Any]
"""A row of a frame, by column name."""


def plural(count: int, noun: str, nouns: str = "") -> str:
    """Write a count with its noun.

    >>> plural(1, "case"), plural(2, "case"), plural(1024, "token"), plural(3, "process", "processes")
    ('1 case', '2 cases', '1,024 tokens', '3 processes')
    """
    return f"{count:,} {noun if count == 1 else nouns or f'{noun}s'}"


FIELDS: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys(("model", "dtype", "device", "attn_implementation"), str),
    "n_threads": lambda count: plural(count, "thread"),
    "batch_size": lambda size: f"batch {size}",
    "n_gen": lambda count: plural(count, "new token"),
    "seed": lambda seed: f"seed {seed}",
    "naive_logits": lambda positions: "all logits" if positions == "all" else "",
    "prefill_quantized": lambda on: "prefill quantized" if on else "",
}
"""The fields of a case that its name has where they differ, and how each is written."""


class Name(Protocol):
    """Names a case, with a phase if one is given; a cell, which has no strategy, by its prompt."""

    def __call__(self, case: Case | Row, phase: str = "") -> str: ...


def context(row: Row) -> str:
    """Write the prompt length, and the tokens cached before it if there are any: `512`, `128 @ 2048`."""
    return f"{row['n_prompt']} @ {row['n_depth']}" if row["n_depth"] else str(row["n_prompt"])


def namer(cases: Iterable[Case | Row]) -> Name:
    """Make what names each of these cases: `dynamic decode, prompt 512 @ 2048`, and what else differs between them."""
    values: dict[str, set[Any]] = {}
    for row in map(_row, cases):
        for field in FIELDS.keys() & row.keys():
            values.setdefault(field, set()).add(row[field])
    differing = [field for field in FIELDS if len(values.get(field, ())) > 1]

    def name(case: Case | Row, phase: str = "") -> str:
        row = _row(case)
        words = [f"{row['strategy']} {phase}".strip(), f"prompt {context(row)}"]
        return ", ".join(filter(None, [*words, *(FIELDS[field](row[field]) for field in differing)]))

    return name


def _row(case: Case | Row) -> Row:
    return msgspec.structs.asdict(case) if isinstance(case, Case) else case
