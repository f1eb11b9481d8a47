"""A trace -> text: the table T=1, T=2, ... for a terminal, as Markdown, as JSON. Pure functions."""

import json
from dataclasses import asdict
from itertools import zip_longest

from rich.table import Table
from rich.text import Text

from bench.study.trace import ShownStep, Trace
from bench.tell.layout import markdown_table, terminal_table
from bench.tell.words import NOTHING, number

LONGEST_INPUT = {"page": 52, "terminal": 20}
"""Characters of a step's input in the table; of a longer one the end is shown."""
LEGEND = (
    "fed: what went through the model, and how many tokens; cached: tokens whose keys and values were held; product: "
    "the largest of a decoder layer's, rows x inner x columns; ms: median of a few turns. T=1 is the prefill."
)


def markdown(trace: Trace) -> str:
    """Return the trace as Markdown: a line per step, the strategies side by side."""
    headers = [header.replace("\n", " ") for header in _headers(trace)]
    align = ["left" if _is_text(header) else "right" for header in headers]
    lines = _lines(trace, LONGEST_INPUT["page"])
    return f"{trace.setting}\n\n{markdown_table(lines, headers, align)}\n\n{LEGEND}\n"


def terminal(trace: Trace) -> Table:
    """Return the same for a terminal of 100 columns, without a column for the cache where nothing ever is in it."""
    table = terminal_table(trace.setting, LEGEND)
    empty = {
        f"{name}\ncached" for name, steps in trace.steps.items() if not any(shown.step.n_cached for shown in steps)
    }
    headers = _headers(trace)
    kept = [place for place, header in enumerate(headers) if header not in empty]
    for place in kept:
        header = headers[place]
        table.add_column(header, justify="left" if _is_text(header) else "right", no_wrap=not header.endswith("fed"))
    for line in _lines(trace, LONGEST_INPUT["terminal"]):
        table.add_row(*(Text(line[place]) for place in kept))  # text, not markup: [SOS] is no style
    return table


def inputs(trace: Trace) -> str:
    """Return each step's whole input, as the study note's script prints it."""
    lines = [
        f"T={place} {name} input: {shown.fed}\n"
        for place, row in enumerate(zip_longest(*trace.steps.values()), 1)
        for name, shown in zip(trace.steps, row, strict=True)
        if shown is not None
    ]
    return "".join(lines)


def as_json(trace: Trace) -> str:
    """Return everything as JSON, with all digits: the steps of each strategy as a list."""
    document = {
        "model": trace.model,
        "setting": trace.setting,
        "prompt": trace.prompt,
        "n_prompt": trace.n_prompt,
        "tokens": list(trace.tokens),
        "tokens_match": trace.tokens_match,
        "steps": {
            name: [_record(place, shown) for place, shown in enumerate(steps, 1)] for name, steps in trace.steps.items()
        },
    }
    return json.dumps(document, indent=2) + "\n"


def _record(place: int, shown: ShownStep) -> dict[str, object]:
    step = shown.step
    product = None if step.product is None else {**asdict(step.product), "kind": step.product.kind}
    return {
        "T": place,
        "fed": shown.fed,
        "fed_ids": list(step.fed),
        "n_fed": len(step.fed),
        "n_cached": step.n_cached,
        "kv_bytes": step.kv_bytes,
        "product": product,
        "out": shown.out,
        "out_id": step.out,
        "ms": shown.ms,
    }


def _headers(trace: Trace) -> list[str]:
    return ["T", *(f"{name}\n{column}" for name in trace.steps for column in ("fed", "cached", "product", "ms")), "out"]


def _is_text(header: str) -> bool:
    return header.endswith(("fed", "product", "out"))


def _lines(trace: Trace, longest: int) -> list[list[str]]:
    rows = zip_longest(*trace.steps.values())
    return [
        [str(place), *(cell for shown in row for cell in _cells(shown, longest)), _out(row)]
        for place, row in enumerate(rows, 1)
    ]


def _cells(shown: ShownStep | None, longest: int) -> list[str]:
    if shown is None:
        return [NOTHING] * 4
    step, product = shown.step, shown.step.product
    text = shown.fed if len(shown.fed) <= longest else f"\N{HORIZONTAL ELLIPSIS}{shown.fed[1 - longest :]}"
    size = NOTHING if product is None else f"{product.kind} {product.rows}x{product.inner}x{product.columns}"
    return [f"{text.strip() or repr(text)} ({len(step.fed)})", str(step.n_cached), size, number(shown.ms)]


def _out(row: tuple[ShownStep | None, ...]) -> str:
    """Return the token that came out, or the tokens where the strategies chose different ones."""
    return " / ".join(dict.fromkeys(shown.out.strip() or repr(shown.out) for shown in row if shown is not None))
