"""docs/architectures.md: which architecture is measured right, which is refused, and why, from the study's table."""

from pathlib import Path

import pandas as pd

from tests.studies.architecture_causes import CAUSES
from tests.studies.architecture_figures import Figures, figures, lists, odd, of_bytes, right_by_rounding, uncounted

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
ORDER = ("whole", "context", "chunks", "padding")


def write(cells: pd.DataFrame) -> str:
    """Write the page from the study's `cells`, one row each; return its counts."""
    found = figures(cells)
    PAGE.write_text(page(cells), encoding="utf-8")
    return _counts(found)


def page(cells: pd.DataFrame) -> str:
    """Return the page in Markdown."""
    of_types, not_right = lists(cells), odd(cells)
    built = not_right[~not_right["model_type"].isin(of_types["unbuilt"])]
    versions = ", ".join(
        f"{name} {' and '.join(sorted(set(cells[name].astype(str))))}" for name in ("transformers", "torch")
    )
    parts = [
        "# Every architecture of transformers",
        (
            f"`nox -s study -- architectures`, {versions}, CPU. Tiny random models, shrunken so that a dozen tokens "
            "cross windows, top-k, convolutions and rope switches; each in float32 and bfloat16, at batch 1 and 3, "
            "with "
            "a whole prompt, after a context of 8 tokens (`-d 8`), in three chunks, and left-padded. `compiled` runs "
            "its code uncompiled here (eager); its compiled step is tested on its own families. Every cell is in "
            "[architectures.csv](../results/examples/architectures.csv), with the versions that it was made with, its "
            "cause and whose that is."
        ),
        _counts(figures(cells)),
        _words(figures(cells)),
        "## Where all is right",
        f"{len(of_types['right'])} types: {', '.join(of_types['right'])}.",
        "## Where something is not",
        f"{len(of_types['odd'])} types. `compiled` has a row only where it took the model and other logits came.",
        _table(cells, built),
        "## Not built",
        _unbuilt(cells, of_types["unbuilt"]),
        "## Bytes",
        _bytes(of_bytes(cells), uncounted(cells)),
        "## Why",
        _causes(cells, not_right),
    ]
    return "\n\n".join(parts) + "\n"


def _counts(found: Figures) -> str:
    return (
        f"Of {found.known} model types that AutoModelForCausalLM knows, {found.built} could be built, and "
        f"{found.in_both_dtypes} were tried in both dtypes. {found.right} have naive and at least one cached strategy "
        f"measured and equal in float32 at both batch sizes, {found.by_generate_alone} of them with hf-generate alone; "
        "every other has the reason below."
    )


def _words(found: Figures) -> str:
    return (
        "**right**: logits equal the reference's within the dtype's tolerance, and another round gives the same "
        "tokens. **refused**: not measured, with the reason. **failed**: it raised. **false**: other logits. A whole "
        f"prompt and a context are what `kvbench run` measures: there it reports false and failed (exit 5; "
        f"{found.false_in_run} cells are false). Chunks and padding are ways to call the library, and `run` has "
        f"neither: "
        f"what is false there ({found.false_in_library} cells) this study found by comparing, and a caller of the "
        f"library "
        f"sees only other logits. For {found.false_in_library_alone} of these cells `run` reports nothing of that "
        "strategy and dtype either, since it is right for whole prompts and contexts. Other tokens in a second round, "
        f"or beside a mask that kvbench had checked: {found.silent} cells."
    )


def _table(cells: pd.DataFrame, not_right: pd.DataFrame) -> str:
    """A row per type and strategy that is not right everywhere, a column per way of feeding."""
    rows = []
    for name, of_type in not_right.groupby("model_type"):
        for strategy, found in of_type.groupby("strategy", sort=False):
            row = {"type": name, "strategy": strategy or "all"}
            for scenario in ORDER:
                row[scenario] = _worst(found[found["scenario"] == scenario], cells, str(name), str(strategy), scenario)
            row["why"] = ", ".join(f"[{key}](#{key})" for key in dict.fromkeys(found["cause"]))
            rows.append(row)
    return pd.DataFrame(rows).fillna("").to_markdown(index=False)


def _worst(not_right: pd.DataFrame, cells: pd.DataFrame, name: str, strategy: str, scenario: str) -> str:
    """Say `false`, `refused` or `failed`, with the part of dtypes and batch sizes it holds for; else `right`."""
    n_dtypes = cells.loc[cells["model_type"] == name, "dtype"].nunique()
    here = (cells["model_type"] == name) & (cells["strategy"] == strategy) & (cells["scenario"] == scenario)
    asked = cells[here]
    if not_right.empty:
        return "right" if len(asked) else ""
    words = []
    for outcome, found in not_right.groupby("outcome", sort=False):
        dtypes = found["dtype"].unique()
        in_all = len(found) == asked["dtype"].isin(dtypes).sum()
        part = f" {len(found)} of {len(asked)}" if not in_all else "" if len(dtypes) == n_dtypes else f" in {dtypes[0]}"
        words.append(f"{outcome}{part}")
    return ", ".join(words)


def _unbuilt(cells: pd.DataFrame, types: list[str]) -> str:
    rows = cells[cells["model_type"].isin(types) & (cells["scenario"] == "")].drop_duplicates("model_type")
    return "\n".join(f"- {row['model_type']}: {row['reason']}" for row in rows.to_dict("records"))


def _bytes(rows: pd.DataFrame, missing: list[str]) -> str:
    """Say where the bytes of a cache are what `kvbench run` predicts before it reads any weights."""
    predicted = rows[rows["kv_bytes_predicted"].notna()]
    exact = [name for name, found in predicted.groupby("model_type") if found["within"].all()]
    first = (
        f"`kv_bytes` and `kv_bytes_allocated` after the last step, float32, dynamic and static: predicted within 1 % "
        f"for {len(exact)} of the {rows['model_type'].nunique()} types in which they were counted (columns "
        "`kv_bytes_*`; `--bytes` counts nothing else)."
    )
    others = [
        f"- {row['model_type']}, {row['strategy']}, {row['scenario']}, batch {row['batch_size']}: "
        f"used {row['kv_bytes_measured']:.0f}, predicted {row['kv_bytes_predicted']:.0f}; "
        f"allocated {row['kv_bytes_allocated']:.0f}, predicted {row['kv_bytes_allocated_predicted']:.0f}"
        for row in predicted[~predicted["within"]].to_dict("records")
    ]
    others += [
        f"- no prediction for {', '.join(dict.fromkeys(found['model_type']))}: {reason}"
        for reason, found in rows[rows["kv_bytes_predicted"].isna()].groupby("unpredicted")
    ]
    others += [f"- not counted: {', '.join(missing)}"] if missing else []
    return "\n".join([first, "", *others]) if others else first


def _causes(cells: pd.DataFrame, not_right: pd.DataFrame) -> str:
    """A paragraph per cause: whose it is, the mechanism and its place, and the types it concerns."""
    concerned = {str(key): list(dict.fromkeys(rows["model_type"])) for key, rows in not_right.groupby("cause")}
    narrow = right_by_rounding(cells)
    paragraphs = []
    for cause in CAUSES:
        if cause.key not in concerned:
            continue
        types = concerned[cause.key]
        sentences = [f"{cause.whose}. {cause.words}"]
        sentences += [f"Where: {cause.place}."] if cause.place else []
        sentences.append(f"Types: {', '.join(types)}.")
        if within := narrow.get(cause.key):
            sentences.append(
                f"In bfloat16 {', '.join(within)} {'has' if len(within) == 1 else 'have'} cells that are right only "
                "within its tolerance of 0.03: the same are false in float32."
            )
        paragraphs.append(f"### {cause.key}\n\n{' '.join(sentences)}")
    return "\n\n".join(paragraphs)
