"""What is stored of an A/B, and its verdicts, worked out anew from that. Needs no torch."""

from __future__ import annotations

from pathlib import Path

import msgspec

from bench import trial
from bench.case import Case
from bench.pairs import PairFailure, PairTimes
from bench.record import Environment, Verdict
from bench.sides import Introduction, Side
from bench.store import DataError

MANIFEST, PAIRS = "ab.json", "pairs.jsonl"

AB_VERSION = 3
"""Of what is stored. Version 1 had each turn's mean step, not its steps, version 2 no turns in lockstep."""


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

    @property
    def title(self) -> str:
        """What was compared with what, in one line."""
        threshold = f"{100 * self.settings.threshold:g} %"
        return f"kvbench ab: {self.head.label} against {self.base.label}; a change up to {threshold} counts as none"


def is_record(folder: Path) -> bool:
    """Whether an A/B is stored there."""
    return (folder / MANIFEST).is_file()


def read(folder: Path) -> tuple[AbManifest, list[PairTimes | PairFailure]]:
    """A stored A/B; of one that was killed, what it had finished.

    Raises:
        DataError: it is missing or damaged, or of another version.
    """
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=AbManifest)
        if manifest.schema_version != AB_VERSION:
            version = manifest.schema_version
            raise DataError(f"{folder}: stored in version {version} of the form, and this kvbench reads {AB_VERSION}")
        *lines, _torn = (folder / PAIRS).read_bytes().split(b"\n")
        return manifest, [msgspec.json.decode(line, type=PairTimes | PairFailure) for line in lines]
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise DataError(f"{folder}: damaged ({error})") from error


def verdicts(folder: Path) -> tuple[str, list[Verdict]]:
    """The title of a stored A/B, and what its pairs say; raises as `read`."""
    manifest, records = read(folder)
    return manifest.title, trial.verdicts(records, manifest.cases, manifest.settings.threshold)
