"""The drift of a baseline as a table."""

import pandas as pd

from bench.tell.layout import markdown_table
from bench.tell.words import NOTHING


def markdown(frame: pd.DataFrame) -> str:
    """Write a line per session: times relative to its machine's first session, a column per strategy and phase."""
    columns = list(dict.fromkeys(zip(frame["phase"], frame["strategy"], strict=True)))
    columns.sort(key=lambda column: column[0], reverse=True)  # prefill first
    headers = ["measured", "machine", *(f"{strategy} {phase}" for phase, strategy in columns), "more work"]
    lines = []
    for _, rows in frame.groupby("session", sort=False):
        times = {(row["phase"], row["strategy"]): row["relative_time"] for row in rows.to_dict("records")}
        more = int(rows["more_work"].sum())
        cells = [f"{times[column]:.3f}" if times.get(column, 0) > 0 else NOTHING for column in columns]
        created = str(rows["created_utc"].iloc[0])[:16].replace("T", " ")
        lines.append([created, str(rows["machine"].iloc[0]), *cells, f"{more} counters" if more else NOTHING])
    align = ["left", "right", *["right"] * len(columns), "right"]
    table = markdown_table(lines, headers, align)
    return f"Times relative to the first session of the same machine and software:\n\n{table}\n"
