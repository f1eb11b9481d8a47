"""The list of the plots that compare kinds of cache: drawn where the run judged a lossy one."""

from collections.abc import Callable
from functools import partial

import pandas as pd

from bench.tell.drawn import MOST_LINES, MOST_PLOTS, few, few_contexts
from bench.tell.plots.agreement import agreement_by_position
from bench.tell.plots.over_context import contexts_of, kv_bytes, tpot_context
from bench.tell.plots.steps import file_suffix
from bench.tell.plots.style import Drawings
from bench.tell.plots.trade import trade
from bench.tell.words import EXTENT, SETTING_COLUMNS, by_setting

ONE_DEPTH = ["n_prompt", *EXTENT]
"""What the points of the trade have in common, beside the setting."""


def groups(summary: pd.DataFrame, agreement: pd.DataFrame) -> list[Callable[[], Drawings]]:
    """Return what lists the plots, in groups that do not depend on each other; see `bench.tell.plots.run.groups`.

    `summary` as `summarize`, `agreement` as `bench.analysis.agreement` makes them, both of one machine.
    """
    judged = summary[summary["kv_bytes_allocated"].fillna(0) > 0]
    judged = judged[judged.groupby([*SETTING_COLUMNS, "n_gen"])["logit_kl"].transform("count") > 0]
    return [lambda: trades(judged), lambda: over_contexts(judged), lambda: agreements(agreement)]


def trades(summary: pd.DataFrame) -> Drawings:
    """List bytes against TPOT of each cell that has times, by file name (without suffix)."""
    decode = summary[(summary["phase"] == "decode") & summary["latency_ms"].notna()]
    columns = [*SETTING_COLUMNS, *ONE_DEPTH]
    several = (rows for _, rows in by_setting(decode, also=ONE_DEPTH) if len(rows) > 1)
    return {"trade" + file_suffix(rows, decode, columns): partial(trade, rows) for rows in few(several, MOST_PLOTS)}


def over_contexts(summary: pd.DataFrame) -> Drawings:
    """List TPOT and bytes against context of each setting with more than one length, by file name."""
    decode = few_contexts(summary[summary["phase"] == "decode"], [*SETTING_COLUMNS, "n_gen"])
    drawn: Drawings = {}
    for _, rows in few(by_setting(decode, also=["n_gen"]), MOST_PLOTS):
        suffix = file_suffix(rows, decode, [*SETTING_COLUMNS, "n_gen"])
        timed = rows[rows["latency_ms"].notna()]
        if len(set(contexts_of(timed))) > 1:
            drawn["tpot-context" + suffix] = partial(tpot_context, timed)
        if len(set(contexts_of(rows))) > 1:
            drawn["kv-bytes" + suffix] = partial(kv_bytes, rows)
    return drawn


def agreements(agreement: pd.DataFrame) -> Drawings:
    """List agreement against position of each setting, by file name."""
    agreement = few_contexts(agreement, SETTING_COLUMNS, MOST_LINES)
    return {
        "agreement" + file_suffix(rows, agreement, SETTING_COLUMNS): partial(agreement_by_position, rows)
        for _, rows in few(by_setting(agreement), MOST_PLOTS)
    }
