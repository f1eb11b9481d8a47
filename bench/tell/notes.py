"""What is said below a table: the fitted slopes, and the cautions. Values -> lines of Markdown."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from bench.analysis.cautions import Caution
from bench.tell.words import Row, by_setting, missing, with_interval
from kvcache.strategies.catalogue import REFEEDING


def slope_lines(slopes: pd.DataFrame) -> str:
    """A line per curve: its fitted slope (`bench.analysis.slopes.slopes`), and whether it is told from zero."""
    lines: list[str] = []
    for title, rows in by_setting(slopes):
        lines += [f"Latency of a decode step against the position of its token ({title}):", ""]
        for row in rows.to_dict("records"):
            if missing(row["slope_ms_per_1000_tokens"]):
                lines.append(
                    f"- {row['strategy']}: too few positions for a slope "
                    f"({row['first_position']} to {row['last_position']})"
                )
                continue
            slope = with_interval(row["slope_ms_per_1000_tokens"], row["slope_low"], row["slope_high"])
            lines.append(
                f"- {row['strategy']}: {slope} ms per 1,000 tokens over positions "
                f"{row['first_position']} to {row['last_position']}, {_told_from_zero(row)}"
            )
        lines.append("")
    return "\n".join(lines)


def reading_line(summary: pd.DataFrame) -> str:
    """How the figures of a summary table are to be read, in one line; nothing where nothing needs saying."""
    timed = summary[summary["latency_ms"].notna()]
    told = []
    if timed.loc[~timed["strategy"].isin(REFEEDING), "speedup_vs_naive"].notna().any():
        told.append("A speed-up pairs the turns of the same round, so it need not equal the ratio of the two medians.")
    if timed["latency_ms_low"].isna().any():
        told.append("A figure without brackets has fewer than six rounds, too few for an interval.")
    return f"{' '.join(told)}\n" if told else ""


def prediction_lines(summary: pd.DataFrame) -> str:
    """A line per phase: how far `predicted_ms` is from the measured latency; nothing where nothing was predicted."""
    lines: list[str] = []
    for phase, rows in summary[summary["predicted_ms"].notna()].groupby("phase", sort=False):
        errors = (rows["predicted_ms"] / rows["latency_ms"] - 1).abs()
        lines.append(
            f"- {phase}: median error {errors.median():.1%}, largest {errors.max():.1%}, over {len(errors)} cases\n"
        )
    if not lines:
        return ""
    title = "`predicted_ms` from costs and ceilings, each case's overhead and shares of the roofs fitted on the others:"
    return "".join([title, "\n\n", *lines])


def caution_lines(cautions: Sequence[Caution]) -> str:
    """A line per caution; cases with the same one share a line."""
    cases: dict[tuple[str, str], list[str]] = {}
    for caution in cautions:
        cases.setdefault((caution.text, caution.advice), []).extend([caution.case] if caution.case else [])
    lines = [f"- {_where(keys)}{text}. {advice[0].upper()}{advice[1:]}.\n" for (text, advice), keys in cases.items()]
    return "".join(lines)


def _where(keys: list[str]) -> str:
    if not keys:
        return ""
    return f"{', '.join(keys)}: " if len(keys) <= 2 else f"{keys[0]} and {len(keys) - 1} other cases: "


def _told_from_zero(slope: Row) -> str:
    if missing(slope["slope_low"]):
        return "without an interval: too few rounds"
    if slope["slope_low"] <= 0 <= slope["slope_high"]:
        return "not told from zero"
    return "told from zero"
