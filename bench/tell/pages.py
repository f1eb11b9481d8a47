"""The figures in the documentation, made from committed runs, so that none is stale; and the table of all columns.

`python -m bench.tell.pages README.md docs/caches.md` writes them between the marks of a page. A mark is a comment that
says what comes after it (`PARTS`) and of which run: `<!-- caches of results/examples/caches-2-cores, depth 2048 -->`,
`<!-- text of FILE.md -->` what a study wrote below its title, or `<!-- columns of summary.csv -->`.
"""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from bench.analysis import columns
from bench.analysis.summary import summarize
from bench.analysis.tidy import Tidy
from bench.errors import DataError, KvbenchError
from bench.naming import Row
from bench.store.run_folder import read_run
from bench.tell import tables
from bench.tell.words import missing, number, with_interval
from kvcache.strategies.catalogue import PLAIN

ROOT = Path(__file__).resolve().parents[2]
"""What a mark's path begins at."""

END = "<!-- made by bench/tell/pages.py -->"
_MARK = re.compile(
    rf"(<!-- (?P<part>\w+) of (?P<source>[^\s,]+)(?P<choice>, [^>]*)? -->\n)(?P<old>.*?)(?={END})", re.DOTALL
)
_FIGURES = "  - `"
"""How a line begins that is made below a kind."""


def filled(page: str, root: Path = ROOT) -> str:
    """Return `page` with every part that is made anew; runs are read below `root`.

    Raises:
        KeyError: a mark names no part of `PARTS`.
        DataError: there is no such run, or it cannot be read.
    """

    def fill(found: re.Match[str]) -> str:
        source = found["source"]
        if source == "summary.csv":
            made = _columns()
        elif found["part"] == "text":
            made = _untitled(_text(root / source))
        else:
            chosen = _chosen(summarize(Tidy.of(read_run(root / source))), found["choice"] or "")
            made = PARTS[found["part"]](chosen, found["old"])
        return f"{found[1]}{made.strip()}\n"

    return _MARK.sub(fill, page)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def _chosen(summary: pd.DataFrame, choice: str) -> pd.DataFrame:
    """Apply a mark's choice: `, without static`, `, depth 2048`, `, prompts 128 2048`."""
    for words in filter(None, choice.split(", ")):
        verb, *values = words.split()
        if verb == "without":
            summary = summary[~summary["strategy"].isin(values)]
        else:
            column = {"depth": "n_depth", "prompts": "n_prompt"}[verb]
            summary = summary[summary[column].isin([int(value) for value in values])]
    return summary


def _columns() -> str:
    lines = [f"| `{column.name}` | {column.unit} | {column.meaning} |" for column in columns.COLUMNS]
    return "\n".join(["| column | unit | meaning |", "|---|---|---|", *lines])


def _times(summary: pd.DataFrame, _old: str) -> str:
    return _untitled(tables.times_markdown(summary))


def _caches(summary: pd.DataFrame, _old: str) -> str:
    return _untitled(tables.caches_markdown(summary))


def _untitled(table: str) -> str:
    """Return what stands below a title, which the page's own words say."""
    return table.partition("\n\n")[2]


def _kinds(summary: pd.DataFrame, old: str) -> str:
    """Write below each item of a list, for each kind that it begins with, what that held, cost and lost.

    Figures are those at the greatest depth.
    """
    rows = summary[summary["n_depth"] == summary["n_depth"].max()]
    by_name = {row["strategy"]: row for row in rows.to_dict("records")}  # the later row of a case is decode's
    made: list[str] = []
    for item in re.split(r"(?m)^(?=- )", old):
        text = [line for line in item.rstrip().splitlines() if not line.startswith(_FIGURES)]
        names = re.findall(r"`([^`]+)`", item.partition("**:")[0])
        made += [*text, *(f"{_FIGURES}{name}`: {_figures(by_name.get(name))}" for name in names)]
    return "\n".join(made)


def _figures(row: Mapping[Any, Any] | None) -> str:
    if row is None:
        return "not measured"
    if row["status"] != "ok":
        return f"{row['status']}, {row['error']}"
    held = f"{tables.megabytes(row['kv_bytes_allocated'])} MB"
    if row["strategy"] in PLAIN.values():
        return f"{held}, {with_interval(row['latency_ms'], row['latency_ms_low'], row['latency_ms_high'])} ms a step"
    ratio = with_interval(row["latency_vs_exact"], row["latency_vs_exact_low"], row["latency_vs_exact_high"])
    return f"{held}, {number(row['kv_bytes_vs_exact'])} of the exact one's; a step {ratio} times as long{_lost(row)}"


def _lost(row: Row) -> str:
    if missing(row["logit_kl"]):
        return ""
    recall = "" if missing(row["recall_agreement"]) else f", recall {number(row['recall_agreement'])}"
    return f"; KL {row['logit_kl']:.0e} nats, same top 1 {number(row['top1_agreement'])}{recall}"


PARTS: dict[str, Callable[[pd.DataFrame, str], str]] = {"times": _times, "caches": _caches, "kinds": _kinds}
"""What a mark can ask for: a run's first table, its table of caches, or a line for each kind in a list of them."""


def main(names: list[str]) -> None:
    """Make the parts of each page anew; a run that cannot be read is one line on stderr and its exit code."""
    for name in names:
        path = Path(name)
        try:
            made = filled(path.read_text(encoding="utf-8"))
        except KvbenchError as error:
            sys.stderr.write(f"{name}: {error}\n")
            sys.exit(error.exit_code)
        path.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
