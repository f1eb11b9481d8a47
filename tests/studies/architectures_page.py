"""docs/architectures.md: which architecture is measured right, which is refused, and why, from the study's table."""

from importlib.metadata import version
from pathlib import Path

import pandas as pd

from tests.studies.architecture_causes import CAUSES, Cause, cause_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
MEASURED = ("right", "tie")
ORDER = ("whole", "context", "chunks", "padding")


def write(cells: pd.DataFrame) -> str:
    """Write the page from the study's `cells`, one row each; return its first lines, the counts."""
    counts, odd = _counts(cells), explained(cells)
    parts = [
        "# Every architecture of transformers",
        (
            f"`nox -s study -- architectures`, transformers {version('transformers')}, torch {version('torch')}, CPU. "
            "Tiny random models, shrunken so that a dozen tokens cross windows, top-k, convolutions and rope switches; "
            "each in float32, most also in bfloat16, at batch 1 and 3, with a whole prompt, after a context of 8 "
            "tokens (`-d 8`), in three chunks, and left-padded. Every cell is in "
            "[architectures.csv](../results/examples/architectures.csv)."
        ),
        counts,
        (
            "**right**: logits equal the reference's within the dtype's tolerance, and another round gives "
            "the same tokens. "
            "**false**: they do not, and `kvbench run` says so (exit 5). **refused**: not measured, with the reason."
        ),
        "## Where all is right",
        _all_right(cells),
        "## Where something is not",
        _table(cells, odd),
        "## Why",
        _causes(odd),
    ]
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return counts


def _counts(cells: pd.DataFrame) -> str:
    tried = cells[cells["strategy"] != ""]
    built, known = tried["model_type"].nunique(), cells["model_type"].nunique()
    whole = tried[(tried["scenario"] == "whole") & (tried["dtype"] == "float32")]
    right = whole[whole["outcome"].isin(MEASURED)].groupby("model_type")["strategy"].agg(set)
    both = sum("naive" in names and len(names) > 1 for names in right)
    narrow = tried[tried["dtype"] == "bfloat16"]["model_type"].nunique()
    silent = int((cells["outcome"] == "silent").sum())
    return (
        f"Of {known} model types that AutoModelForCausalLM knows, {built} could be built. {both} have naive and "
        f"at least one cached strategy measured and equal in float32; every other has the reason below. {narrow} "
        f"were tried in bfloat16 too. Cells that are wrong without saying so: {silent}."
    )


def _all_right(cells: pd.DataFrame) -> str:
    """Name the types whose every cell is right, a tie, or `compiled` refused."""
    fine = cells[cells["outcome"].isin(MEASURED) | (cells["strategy"] == "compiled") & (cells["outcome"] == "refused")]
    whole = [str(name) for name, rows in cells.groupby("model_type") if len(rows) == (fine["model_type"] == name).sum()]
    return f"{len(whole)} types: {', '.join(whole)}."


def explained(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the cells that are not right, with their `cause`; none of `compiled`, which says itself what it takes."""
    where = ["model_type", "batch_size", "strategy", "scenario"]
    fine = cells[(cells["dtype"] == "float32") & cells["outcome"].isin(MEASURED)]
    right = set(fine[where].itertuples(index=False, name=None))
    odd = cells[~cells["outcome"].isin(MEASURED) & (cells["strategy"] != "compiled")]
    keys = odd[where].itertuples(index=False, name=None)
    causes = [cause_of(row, key in right) for row, key in zip(odd.to_dict("records"), keys, strict=True)]
    return odd.assign(cause=pd.Series(causes, index=odd.index, dtype=object))


def _table(cells: pd.DataFrame, odd: pd.DataFrame) -> str:
    """A row per type and strategy that is not right everywhere, a column per way of feeding."""
    rows = []
    for name, of_type in odd.groupby("model_type"):
        for strategy, found in of_type.groupby("strategy", sort=False):
            causes = dict.fromkeys(cause.key for cause in found["cause"])
            row = {"type": name, "strategy": strategy or "all"}
            for scenario in ORDER:
                row[scenario] = _worst(found[found["scenario"] == scenario], cells, str(name), str(strategy), scenario)
            row["why"] = ", ".join(f"[{key}](#{key})" for key in causes)
            rows.append(row)
    return pd.DataFrame(rows).fillna("").to_markdown(index=False)


def _worst(odd: pd.DataFrame, cells: pd.DataFrame, name: str, strategy: str, scenario: str) -> str:
    """Say `false`, `refused` or `failed`, with the part of dtypes and batch sizes it holds for; else `right`."""
    n_dtypes = cells.loc[cells["model_type"] == name, "dtype"].nunique()
    here = (cells["model_type"] == name) & (cells["strategy"] == strategy) & (cells["scenario"] == scenario)
    asked = cells[here]
    if odd.empty:
        return "right" if len(asked) else ""
    words = []
    for outcome, found in odd.groupby("outcome", sort=False):
        dtypes = found["dtype"].unique()
        in_all = len(found) == asked["dtype"].isin(dtypes).sum()
        part = f" {len(found)} of {len(asked)}" if not in_all else "" if len(dtypes) == n_dtypes else f" in {dtypes[0]}"
        words.append(f"{outcome}{part}")
    return ", ".join(words)


def _causes(odd: pd.DataFrame) -> str:
    """A paragraph per cause: whose it is, the mechanism and its place, and the types it concerns."""
    concerned: dict[Cause, dict[str, None]] = {}
    for row in odd.to_dict("records"):
        concerned.setdefault(row["cause"], {})[str(row["model_type"])] = None
    return "\n\n".join(
        f"### {cause.key}\n\n{cause.whose}. {cause.words} Types: {', '.join(concerned[cause])}."
        for cause in CAUSES
        if cause in concerned
    )
