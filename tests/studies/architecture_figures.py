"""What the matrix's table adds up to: the counts of the page and the README, and its lists of types."""

from dataclasses import dataclass

import pandas as pd

from tests.studies.architecture_cell import CHUNKED, GENERATED
from tests.studies.architecture_rules import MEASURED


@dataclass(frozen=True)
class Figures:
    """Counts of model types, and of cells."""

    known: int
    built: int
    right: int
    """Types with naive and one cached strategy right in float32, the whole prompt, at each batch size."""
    by_generate_alone: int
    """Those of `right` whose only such strategy is hf-generate."""
    in_both_dtypes: int
    false_in_run: int
    """Cells that are false and that `kvbench run` measures."""
    false_in_library: int
    """Cells that are false and that only callers of the library meet."""
    false_in_library_alone: int
    """Those whose strategy is right in every cell that `run` measures."""
    silent: int


def figures(cells: pd.DataFrame) -> Figures:
    """Count."""
    tried = cells[cells["scenario"] != ""]
    whole = tried[(tried["scenario"] == "whole") & (tried["dtype"] == "float32") & tried["outcome"].isin(MEASURED)]
    n_batches = tried.loc[tried["scenario"] == "whole", "batch_size"].nunique()
    batches = whole.groupby(["model_type", "strategy"])["batch_size"].nunique()
    by_type: dict[str, set[str]] = {}
    for model_type, strategy in batches[batches == n_batches].index:
        by_type.setdefault(model_type, set()).add(strategy)
    right = [names - {"naive"} for names in by_type.values() if "naive" in names and len(names) > 1]
    false = tried[tried["outcome"] == "false"]
    in_run = false["scenario"].isin(GENERATED)
    who = ["model_type", "dtype", "strategy"]
    seen = set(false.loc[in_run, who].itertuples(index=False, name=None))
    alone = [key for key in false.loc[~in_run, who].itertuples(index=False, name=None) if key not in seen]
    return Figures(
        known=cells["model_type"].nunique(),
        built=tried["model_type"].nunique(),
        right=len(right),
        by_generate_alone=sum(names == {"hf-generate"} for names in right),
        in_both_dtypes=int((tried.groupby("model_type")["dtype"].nunique() == tried["dtype"].nunique()).sum()),
        false_in_run=int(in_run.sum()),
        false_in_library=int((~in_run).sum()),
        false_in_library_alone=len(alone),
        silent=int((cells["outcome"] == "silent").sum()),
    )


def readme_line(found: Figures) -> str:
    """Say it in one line, as the README does."""
    return (
        f"Of {found.built} architectures of transformers tried, {found.right} are measured right with a cache "
        f"({found.by_generate_alone} of them by hf-generate alone): [each, and why](docs/architectures.md)."
    )


def odd(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the cells that are not right, but for what `compiled` does not take: it takes few, and says so."""
    not_taken = (cells["strategy"] == "compiled") & (cells["outcome"] == "refused")
    return cells[~cells["outcome"].isin(MEASURED) & ~not_taken]


def lists(cells: pd.DataFrame) -> dict[str, list[str]]:
    """Put each type into one of three lists: all right, something not, not built."""
    unbuilt = set(cells.loc[cells["scenario"] == "", "model_type"])
    not_right = set(odd(cells)["model_type"]) - unbuilt
    every = dict.fromkeys(cells["model_type"])
    return {
        "right": [each for each in every if each not in unbuilt and each not in not_right],
        "odd": [each for each in every if each in not_right],
        "unbuilt": [each for each in every if each in unbuilt],
    }


def right_by_rounding(cells: pd.DataFrame) -> dict[str, list[str]]:
    """List, by cause, the types with cells that are false in float32 and within the tolerance of bfloat16."""
    where = ["model_type", "batch_size", "strategy", "scenario"]
    false = cells[(cells["outcome"] == "false") & (cells["dtype"] == "float32")]
    narrow = cells.loc[(cells["dtype"] == "bfloat16") & cells["outcome"].isin(MEASURED), where]
    both = false.merge(narrow, on=where)
    return {str(cause): list(dict.fromkeys(rows["model_type"])) for cause, rows in both.groupby("cause")}


def of_bytes(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the float32 cells of dynamic and static whose bytes were measured: their prediction, and `within` 1 %."""
    rows = cells[
        (cells["dtype"] == "float32") & cells["strategy"].isin(CHUNKED) & (cells["kv_bytes_measured"].astype(str) != "")
    ]
    numbers = rows.assign(**{name: pd.to_numeric(rows[name]) for name in rows.columns if name.startswith("kv_bytes_")})
    within = pd.Series(data=True, index=rows.index)
    for name in ("kv_bytes_measured", "kv_bytes_allocated"):
        predicted = numbers[name.replace("measured", "predicted") if "measured" in name else f"{name}_predicted"]
        within &= (predicted - numbers[name]).abs() <= 0.01 * numbers[name]  # of no prediction: False
    return numbers.assign(within=within)


def uncounted(cells: pd.DataFrame) -> list[str]:
    """List the types with a dynamic or a static cache whose bytes nobody counted yet."""
    cached = cells["strategy"].isin(CHUNKED) & ~cells["outcome"].isin(["refused", "failed"]) & (cells["reason"] == "")
    counted = set(of_bytes(cells)["model_type"])
    return [str(each) for each in dict.fromkeys(cells.loc[cached, "model_type"]) if each not in counted]
