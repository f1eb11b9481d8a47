"""What is stored of an A/B, and its verdicts, worked out anew from that. Needs no torch."""

import sys
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from bench.case import Case
from bench.manifest import Environment
from bench.protocol import Introduction
from bench.store import checked_lines, sealed

MANIFEST, PAIRS = "ab.json", "pairs.jsonl"

AB_VERSION = 3
"""Of what is stored. Version 1 had each turn's mean step, not its steps, 2 neither turns in lockstep nor checksums."""

SideName = Literal["base", "head"]
NAMES: tuple[SideName, SideName] = ("base", "head")


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of one side."""

    side: SideName
    block: int
    prefill_ns: int
    step_ns: list[int]
    """Of each timed decode step."""
    wall_ns: int
    """Of both phases; in lockstep of the other side's turn too."""
    waited_ns: int | None
    """Time that the worker's threads waited for a core during it, all of them together (Linux)."""
    prefill_waited_ns: int | None = None
    """What of that was before the first token, if the turn was in lockstep."""
    steal_ns: int | None
    throttled_ns: int | None = None
    """Time for which a container's CPU quota stopped threads; None without a quota."""


class PairTimes(msgspec.Struct, frozen=True, kw_only=True, tag="pair"):
    """The turns of one case in one process pair."""

    case: str
    pair: int
    turns: list[Turn]
    lockstep: bool
    """Whether base's and head's turns were taken at once, a step of one and then the same step of the other."""
    kernels: dict[str, str] | None = None
    """The kernels that both sides were pinned to, where they have a choice; None: none were."""


class PairFailure(msgspec.Struct, frozen=True, kw_only=True, tag="pair-failure"):
    """A side that could not be measured, and why."""

    case: str
    pair: int
    side: SideName
    status: str
    error: str


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """What `base` or `head` is."""

    name: SideName
    label: str
    """Its commit, or the working tree and a digest of its content; and the interpreter and variables, where given."""
    python: str = sys.executable
    variables: dict[str, str] = {}
    tree: str | None = None
    """The checkout whose code this side runs; None: the driver's own code."""
    folder: str | None = None
    """Where its workers run: the current folder's place in the checkout."""

    @property
    def has_worker(self) -> bool:
        """Whether the checkout holds this project's code, and not only a user's."""
        return self.tree is not None and (Path(self.tree) / "bench" / "worker.py").is_file()


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured, and what counts as a change."""

    threshold: float = 0.03
    budget_s: float = 600.0
    timeout_s: float = 900.0


class AbManifest(msgspec.Struct, frozen=True, kw_only=True):
    """`ab.json`: what was compared with what, where. Beside it, `pairs.jsonl` has every turn."""

    schema_version: int
    created_utc: str
    command: list[str]
    settings: Settings
    base: Side
    head: Side
    introductions: dict[str, Introduction]
    """What each side's processes said of themselves."""
    environment: Environment
    cases: list[Case]
    digest: str = ""
    """SHA-256 of this manifest with an empty digest."""

    @property
    def title(self) -> str:
        """What was compared with what, in one line."""
        threshold = f"{100 * self.settings.threshold:g} %"
        return f"kvbench ab: {self.head.label} against {self.base.label}; a change up to {threshold} counts as none"


_decode_record = msgspec.json.Decoder(PairTimes | PairFailure | checked_lines.Closing).decode


class Ab(NamedTuple):
    """A stored A/B."""

    manifest: AbManifest
    records: list[PairTimes | PairFailure]
    finished: bool
    """Otherwise it was interrupted, or still measures."""

    @property
    def title(self) -> str:
        """Its manifest's, and whether that is all."""
        return self.manifest.title + ("" if self.finished else " (unfinished)")


def read(folder: Path) -> Ab:
    """Read a stored A/B; of one that was killed, what it had finished.

    Raises:
        DataError: it is missing or damaged, or of another version.
    """
    manifest = sealed.read(folder / MANIFEST, AbManifest, AB_VERSION)
    return Ab(manifest, *checked_lines.read(folder / PAIRS, manifest.digest, _decode_record))
