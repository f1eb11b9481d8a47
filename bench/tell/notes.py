"""What stands below a table: a closing sentence, the fitted slopes, and the cautions. Values -> lines of Markdown."""

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from bench.analysis import frames
from bench.analysis.cautions import Caution
from bench.analysis.tidy import Tidy, paired_ratio
from bench.naming import Row, context
from bench.record import LEAST_READ_BYTES
from bench.tell.drawn import few
from bench.tell.words import by_setting, case_labels, catalogue_place, missing, number, with_interval
from kvcache.strategies.catalogue import COMPILING, REFEEDING, YARDSTICKS

MOST_SENTENCES, MOST_LENGTHS = 8, 8
"""Settings with a closing sentence, and context lengths that it has figures of."""


def slope_lines(slopes: pd.DataFrame) -> str:
    """Write a line per curve: its fitted slope (`bench.analysis.slopes.slopes`), and whether it differs from zero."""
    lines: list[str] = []
    for title, rows in by_setting(slopes):
        lines += [f"Latency of a decode step against the position of its token ({title}):", ""]
        for row in frames.records(rows):
            positions = f"positions {row['first_position']} to {row['last_position']}"
            if missing(row["slope_ms_per_1000_tokens"]):
                lines.append(f"- {row['strategy']}: too few positions for a slope ({positions.partition(' ')[2]})")
                continue
            slope = with_interval(row["slope_ms_per_1000_tokens"], row["slope_low"], row["slope_high"])
            where = "" if missing(row["slope_at"]) else f"at position {row['slope_at']:,} of a curve "
            lines.append(
                f"- {row['strategy']}: {slope} ms per 1,000 tokens {where}over {positions}, {_significance(row)}"
            )
        lines.append("")
    return "\n".join(lines)


def reading_line(summary: pd.DataFrame) -> str:
    """Say in one line how to read the figures of a summary table, and why a share is missing; nothing where none is."""
    timed = summary[summary["latency_ms"].notna()]
    sentences = []
    if timed.loc[~timed["strategy"].isin(REFEEDING), "speedup_vs_naive"].notna().any():
        sentences.append(
            "A speed-up pairs the turns of the same round, so it need not equal the ratio of the two medians."
        )
    if timed["latency_ms_low"].isna().any():
        sentences.append("A figure without brackets has fewer than six rounds, too few for an interval.")
    sentences += [*_roofs(timed), *_missing_shares(timed, case_labels(summary))]
    return f"{' '.join(sentences)}\n" if sentences else ""


def _roofs(timed: pd.DataFrame) -> Iterator[str]:
    """Say what MBU is a share of, where that was chosen for the cases; older runs read one size for all."""
    rows = timed[timed["mbu"].notna() & timed["read_bytes"].notna()]
    if len(rows):
        sizes = rows["read_bytes"]
        ends = dict.fromkeys(number(size / 1e6) for size in (sizes.min(), sizes.max()))
        bounds = ["", "which is the smallest read that is timed"] if sizes.min() <= LEAST_READ_BYTES else [""]
        bounds += [f"at most {limit}, which a step exceeds" for limit in rows["read_limit"].dropna().unique()]
        what = "as many bytes as the largest step of its cell reads"
        yield f"MBU is a share of the best read of {what} ({' to '.join(ends)} MB{', '.join(bounds)})."


def _missing_shares(timed: pd.DataFrame, labels: Mapping[str, str]) -> Iterator[str]:
    """Say of which cases a share of the roofs is missing, and why: a sentence for each reason."""
    for reason, rows in timed[timed["no_share"].notna()].groupby("no_share", sort=False):
        shares = " and ".join(name.upper() for name in ("mfu", "mbu") if rows[name].isna().all())
        some = set(rows["case"]) != set(timed["case"])
        where = f" of {_listed([labels[case] for case in dict.fromkeys(rows['case'])])}" if some else ""
        yield f"No {shares}{where}: {reason}."


def prediction_lines(summary: pd.DataFrame) -> str:
    """Write a line per phase: how far `predicted_ms` is from the measured latency; none where nothing was predicted.

    Each machine has lines of its own.
    """
    lines: list[str] = []
    predicted = summary[summary["predicted_ms"].notna()]
    several = len(set(predicted["machine"])) > 1
    for (machine, phase), rows in predicted.groupby(["machine", "phase"], sort=False):
        errors = (rows["predicted_ms"] / rows["latency_ms"] - 1).abs()
        where = f" on {machine}" if several else ""
        shares = f"median error {errors.median():.1%}, largest {errors.max():.1%}, over {len(errors)} cases"
        lines.append(f"- {phase}{where}: {shares}\n")
    if not lines:
        return ""
    title = "`predicted_ms` from costs and ceilings, each case's overhead and shares of the roofs fitted on the others:"
    return "".join([title, "\n\n", *lines])


def caution_lines(cautions: Sequence[Caution], labels: Mapping[str, str]) -> str:
    """Write a line per caution; cases with the same one share a line. `labels` name the cases, by key."""
    cases: dict[tuple[str, str], list[str]] = {}
    for caution in cautions:
        named = [labels[caution.case]] if caution.case else []
        cases.setdefault((caution.text, caution.advice), []).extend(named)
    lines = [f"- {_where(names)}{text}. {advice[0].upper()}{advice[1:]}.\n" for (text, advice), names in cases.items()]
    return "".join(lines)


def closing_lines(tidy: Tidy, summary: pd.DataFrame) -> str:
    """Say in one sentence per setting what the cache bought at each length, and what the fast path adds to it.

    Nothing is said of a setting without decode times of both naive and a cached strategy.
    """
    decode = summary[(summary["phase"] == "decode") & summary["speedup_vs_naive"].notna()]
    cached = decode[~decode["strategy"].isin(REFEEDING)]
    settings = list(by_setting(cached, also=["n_gen"]))
    lines: list[str] = []
    for title, rows in few(settings, MOST_SENTENCES):
        # The first cached strategy of the catalogue that was measured; the yardstick or a compiled one if no other was.
        names = dict.fromkeys(rows["strategy"])
        ranked = sorted(names, key=lambda name: (name in COMPILING, name in YARDSTICKS, catalogue_place(name)))
        plain, fast = ranked[0], [name for name in ranked[1:] if name in COMPILING]
        own = frames.records(rows[rows["strategy"] == plain])
        figures = ["speedup_vs_naive", "speedup_low", "speedup_high"]
        bought = [
            f"{with_interval(*(row[name] for name in figures))} at prompt {context(row)}"
            for row in few(own, MOST_LENGTHS)
        ]
        some = f" ({MOST_LENGTHS} of {len(own):,} lengths, evenly spread)" if len(own) > MOST_LENGTHS else ""
        added = [f"; {name} over {plain}: {gains}" for name in fast if (gains := _gains(tidy, rows, plain, name))]
        where = f" ({title})" if len(settings) > 1 else ""
        gained = f"{', '.join(bought)}{some}{''.join(added)}"
        lines.append(f"Speed-up of decode{where}, {plain} over naive re-feed: {gained}.\n")
    if len(settings) > MOST_SENTENCES:
        lines.append(f"These are {MOST_SENTENCES} of {len(settings):,} settings, evenly spread.\n")
    return "".join(lines)


def _gains(tidy: Tidy, rows: pd.DataFrame, plain: str, fast: str) -> str:
    """Say how many times as fast as `plain` the strategy `fast` is, paired by round, at each length that both have."""
    keys = {(row["strategy"], context(row)): row["case"] for row in frames.records(rows)}
    gains = []
    lengths = [length for strategy, length in keys if strategy == plain and (fast, length) in keys]
    for length in few(lengths, MOST_LENGTHS):
        above, below = (tidy.by_case_and_phase[keys[strategy, length], "decode"] for strategy in (plain, fast))
        ratio = paired_ratio(above, below, "latency_ms")
        gains += [f"{with_interval(ratio.estimate, ratio.low, ratio.high)} at prompt {length}"] if ratio else []
    return ", ".join(gains)


def _where(names: list[str]) -> str:
    return f"{_listed(names)}: " if names else ""


def _listed(names: list[str]) -> str:
    return "; ".join(names) if len(names) <= 2 else f"{names[0]} and {len(names) - 1} other cases"


def _significance(slope: Row) -> str:
    if missing(slope["slope_low"]):
        return "without an interval: too few rounds"
    if slope["slope_low"] <= 0 <= slope["slope_high"]:
        return "not significantly different from zero"
    return "significantly different from zero"
