"""Which cause a cell of the matrix has: by what was said, and by what was seen of the types known to have it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from tests.studies.architecture_causes import (
    ADDED,
    BATCH_STATE,
    CAPACITY,
    FAILS,
    HYBRID_MASK,
    LONGROPE,
    MIXED,
    NOT_BUILT,
    NOT_COMPILED,
    OWN_CACHE,
    OWN_TOKENS,
    PADDING,
    POSITIONS,
    PREFIX,
    ROUNDED_PADDING,
    ROUNDING,
    SEVERAL,
    STATIC_LAYER,
    STOPPED,
    TOP_K,
    UNEXPLAINED,
    Cause,
)

MEASURED = ("right", "tie")
STOP = "the study stopped"
"""How the study begins the reason of a type whose process it lost."""
_BY_WORDS = {
    STOP: STOPPED,
    "no end within": STOPPED,
    "compiled runs transformers'": NOT_COMPILED,
    "compiled takes": NOT_COMPILED,
    "compiled has no": NOT_COMPILED,
    "for a prompt that is padded": PADDING,
    "selects among the padding too": PADDING,
    "counts the padding too": PADDING,
    "takes no past_key_values": OWN_CACHE,
    "leaves the cache empty": OWN_CACHE,
    "in no Cache of transformers": OWN_CACHE,
    "StaticCache has no layer": STATIC_LAYER,
    "in a static cache": CAPACITY,
    "from the longest row": LONGROPE,
    "has no num_hidden_layers": FAILS,
    "only supported for `decoder_input_ids` of length 1": FAILS,
    "no attribute 'num_hidden_layers'": FAILS,
    "expected scalar type Float but found BFloat16": MIXED,
    "expect parameter to have scalar type of Float": MIXED,
    "to have the same dtype, but got: float != c10::BFloat16": MIXED,
}

Seen = Callable[[Mapping[Any, Any]], bool]


def _unstable(cell: Mapping[Any, Any]) -> bool:
    """Whether naive re-feed showed that later tokens change the logits; of padded rows nobody asked."""
    return str(cell["prefix_stable"]) == "False" or cell["scenario"] == "padding"


def _in_parts(cell: Mapping[Any, Any]) -> bool:
    return cell["scenario"] in {"context", "chunks"} and str(cell["prefix_stable"]) == "True"


def _by_generate(cell: Mapping[Any, Any]) -> bool:
    return cell["strategy"] == "hf-generate" and cell["scenario"] in {"whole", "context"}


def _by_generate_together(cell: Mapping[Any, Any]) -> bool:
    return _by_generate(cell) and int(cell["batch_size"]) > 1


def _by_a_cache(cell: Mapping[Any, Any]) -> bool:
    return cell["strategy"] in {"dynamic", "static", "hf-generate", "compiled"}


_ROBERTAS = {"camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
_FALSE: list[tuple[Cause, set[str], Seen]] = [
    (TOP_K, {"axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa", "hy_v4"}, _unstable),
    (SEVERAL, {"falcon_mamba", "jamba", "mamba", "recurrent_gemma", "zamba"}, _in_parts),
    (POSITIONS, _ROBERTAS, _by_generate),
    (LONGROPE, {"phi3", "phimoe", "phi4_multimodal"}, _by_a_cache),
    (BATCH_STATE, {"rwkv"}, _by_generate_together),
    (ADDED, {"xlm", "xlnet"}, _by_generate),
    (PREFIX, {"cpmant", "prophetnet"}, _unstable),
]
"""Of a cell that is `false`: a cause, the types known for it, and its mark."""
_FAILING = {
    "cpmant": OWN_TOKENS,
    "prophetnet": FAILS,
    **dict.fromkeys(["inkling_text", "inkling2_text"], HYBRID_MASK),
}
"""Types whose forward fails with a cache, and the cause."""


def _fails(cell: Mapping[Any, Any]) -> bool:
    """Whether transformers' own code failed: `run` refuses that, and of a padded prompt it is raised."""
    reason = str(cell["reason"])
    by_size = "must match the size" in reason and cell["model_type"] in _FAILING
    raised = cell["outcome"] == "failed" and ("(transformers, " in reason or by_size)
    return raised or (cell["outcome"] == "refused" and " fails in transformers (" in reason)


def cause_of(cell: Mapping[Any, Any], right_in_float32: bool = False) -> Cause:
    """Return why a cell (a row of the study's table) that is not right is so."""
    reason, outcome, narrow = str(cell["reason"]), cell["outcome"], cell["dtype"] == "bfloat16"
    for words, cause in _BY_WORDS.items():
        if words in reason:
            return ROUNDED_PADDING if cause == PADDING and right_in_float32 and narrow else cause
    if not cell["scenario"]:
        return NOT_BUILT if outcome == "refused" else UNEXPLAINED
    if cell["strategy"] == "compiled" and outcome == "refused":
        return NOT_COMPILED
    if right_in_float32 and narrow and outcome == "false":
        # Both paths lie about so far from the exact one.
        return ROUNDING if float(cell["logits_error"]) <= 2 * float(cell["rounding_error"] or 0) else UNEXPLAINED
    if _fails(cell):
        return _FAILING.get(cell["model_type"], FAILS)
    if outcome == "false":
        for cause, types, seen in _FALSE:
            if cell["model_type"] in types and seen(cell):
                return cause
    return UNEXPLAINED


def with_causes(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the table with `cause` and `whose` of every cell that is not right; empty of the others."""
    where = ["model_type", "batch_size", "strategy", "scenario"]
    fine = cells["outcome"].isin(MEASURED)
    right = set(cells.loc[fine & (cells["dtype"] == "float32"), where].itertuples(index=False, name=None))
    keys = cells[where].itertuples(index=False, name=None)
    causes = [
        None if row["outcome"] in MEASURED else cause_of(row, key in right)
        for row, key in zip(cells.to_dict("records"), keys, strict=True)
    ]
    return cells.assign(
        cause=[cause.key if cause else "" for cause in causes], whose=[cause.whose if cause else "" for cause in causes]
    )
