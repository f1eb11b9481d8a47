"""Frames -> figure: why a cached token is not as many times cheaper as it feeds fewer tokens; where its time goes."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from bench.naming import context
from bench.tell.plots.style import GUIDE, make_figure, value_axis
from bench.tell.words import EXTENT, by_setting, catalogue_place, number
from kvcache.strategies.catalogue import REFEEDING

KERNELS = "kernels below\nthe roof"
PARTS = {"weights read": "#0072B2", "KV read": "#56B4E9", KERNELS: "#D55E00", "framework": "#E69F00"}
"""The steps of the waterfall and their colours."""

UNKNOWN = f"{KERNELS},\nframework"
"""The last two of them where the run does not separate them: on CUDA, for a model that cannot be shrunk, or where the
framework, timed on its own, took more than is left."""


def waterfall_cell(summary: pd.DataFrame) -> pd.DataFrame:
    """Take the decode rows of naive and the plainest cached strategy at the longest prompt that has both; or no row."""
    decode = summary[summary["phase"] == "decode"]
    for _, rows in sorted(decode.groupby("n_prompt"), reverse=True):
        ordered = rows.sort_values("strategy", key=lambda names: names.map(catalogue_place))
        if len(ordered) > 1 and ordered["strategy"].iloc[0] in REFEEDING:
            return ordered.iloc[:2]
    return decode.iloc[:0]


def waterfall(summary: pd.DataFrame) -> Figure:
    """Draw why a cached token is not as many times cheaper as it feeds fewer tokens: where its time goes, in ms."""
    naive, cached = (row for _, row in waterfall_cell(summary).iterrows())
    more_tokens = naive["tokens_processed"] / cached["tokens_processed"]
    faster = cached["speedup_vs_naive"]  # paired, as the table has it
    parts = waterfall_parts(summary, cached)
    title = (
        f"Naive re-feed processes {number(more_tokens)} times the tokens, {cached['strategy']} is "
        f"{number(faster)} times faster:"
    )
    words, _ = next(by_setting(summary, also=EXTENT))
    where = f"where a token's {number(cached['latency_ms'])} ms go"
    figure = make_figure(title, f"{where}\n{words}, prompt {context(cached.to_dict())}", 4.4)
    axes = figure.add_subplot()
    bars = [("a naive step,\nper token fed", 0.0, naive["latency_ms"] / more_tokens, "#222222")]
    below = 0.0
    for name, part in parts.items():
        bars.append((name, below, part, PARTS.get(name, PARTS[KERNELS])))
        below += part
    bars.append((f"a step of\n{cached['strategy']}", 0.0, cached["latency_ms"], GUIDE))
    for place, (_, start, height, color) in enumerate(bars):
        axes.bar(place, height, bottom=start, color=color, width=0.62)
        top = max(start, start + height)
        axes.annotate(f"{number(height)} ms", (place, top), (0, 3), textcoords="offset points", ha="center", fontsize=9)
        if 0 < place < len(bars) - 1:
            axes.plot([place + 0.31, place + 0.69], [start + height] * 2, color=GUIDE, linewidth=1)
    axes.xaxis.set_major_locator(FixedLocator(range(len(bars))))
    axes.set_xticklabels([name for name, *_ in bars])
    value_axis(axes, [height + start for _, start, height, _ in bars], "time of a token (ms)", from_zero=True)
    return figure


def waterfall_parts(summary: pd.DataFrame, cached: pd.Series) -> dict[str, float]:
    """Split a decode step into `PARTS`, in ms: weights (and logits) and KV at the roof, the framework, and the rest.

    A step reads and writes the keys and values held then: on average those between the prefill's end and the last
    step's.
    """
    same = (summary["strategy"] == cached["strategy"]) & (summary["n_prompt"] == cached["n_prompt"])
    (at_first,) = summary[same & (summary["phase"] == "prefill")]["kv_bytes_predicted"]
    kv_ms = (at_first + cached["kv_bytes_predicted"]) / 2 / cached["read_bytes_per_s"] * 1000
    weights_ms = cached["memory_floor_ms"] - kv_ms
    rest_ms, framework_ms = cached["latency_ms"] - weights_ms - kv_ms, cached["framework_ms"]
    parts = {"weights read": weights_ms, "KV read": kv_ms}
    if framework_ms <= rest_ms:  # it was timed on its own, and a machine may be slower then
        return parts | {KERNELS: rest_ms - framework_ms, "framework": framework_ms}
    return parts | {UNKNOWN: rest_ms}
