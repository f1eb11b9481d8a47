"""The Markdown table of `peers`: a line for each engine, and the reasons of those that were not timed."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.analysis.estimators import paired_ratio
from tests.studies.overhead import Times

YARDSTICK = "compiled"

HEAD = (
    f"| dtype | engine | KV cache | tokens | TTFT ms | TTFT / {YARDSTICK}'s | TPOT ms | TPOT / {YARDSTICK}'s |\n"
    "|---|---|---|---|---|---|---|---|"
)


@dataclass
class Findings:
    """What the table is made of, and the list under it."""

    lines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def note(self, text: str) -> int:
        """Add a note, and return its number."""
        say(text)
        self.notes.append(text)
        return len(self.notes)

    def leave_out(self, name: str, dtype: str, kv: str, reason: object) -> None:
        """Give an engine a line without times, with its reason in a note."""
        self.lines.append(untimed_row(dtype, name, kv, self.note(f"{name}, {dtype}: {reason}")))


def row(dtype: str, name: str, kv: str, tokens: str, times: Sequence[Times], yardstick: Sequence[Times]) -> str:
    """Write an engine's line: medians, and ratios paired round by round with the yardstick's times, if it has any."""
    cells = [dtype, name, kv, tokens]
    for phase in range(2):
        own, other = ([turn[phase] for turn in turns] for turns in (times, yardstick))
        cells += [f"{np.median(own):.1f}", "-"]
        if other and name != YARDSTICK:
            ratio = paired_ratio(own, other)
            interval = "" if ratio.low is None else f" [{ratio.low:.2f}-{ratio.high:.2f}]"
            cells[-1] = f"{ratio.estimate:.2f}{interval}"
    return f"| {' | '.join(cells)} |"


def untimed_row(dtype: str, name: str, kv: str, note: int) -> str:
    """Write the line of an engine that has no times, for the reason in the note of that number."""
    return f"| {dtype} | {name} | {kv} | not timed ({note}) | - | - | - | - |"


def parting(tokens: Sequence[int], expected: Sequence[int], logits: np.ndarray, tolerance: float) -> str:
    """Say where a sequence parts from the expected one, whose `logits [n_gen, vocab]` say whether that was a near tie.

    Up to that token both were fed the same, so the expected logits there show how close the engine's choice was.
    """
    at = next((at for at, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b), None)
    if at is None:
        return "same" if len(tokens) == len(expected) else f"{len(tokens)} of {len(expected)} only"
    lost = logit_gap(logits, at, expected[at], tokens[at])
    return f"{at} of {len(expected)} same, then {'a tie' if lost <= tolerance else 'others'} ({lost:.1e})"


def logit_gap(logits: np.ndarray, at: int, best: int, other: int) -> float:
    """Return how far the logit of `other` lies below that of `best` at a position, as a share of the largest logit."""
    return float((logits[at, best] - logits[at, other]) / np.abs(logits).max())


def say(text: str) -> None:
    """Print progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
