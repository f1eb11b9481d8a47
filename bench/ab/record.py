"""What is stored of an A/B, and its verdicts, worked out anew from that. Needs no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import msgspec

from bench.ab import verdicts
from bench.ab.pair import PairFailure, PairTimes
from bench.ab.workers import Introduction, Side
from bench.case import Case
from bench.errors import DataError
from bench.record import Environment, Verdict
from bench.store import checked_lines

MANIFEST, PAIRS = "ab.json", "pairs.jsonl"

AB_VERSION = 3
"""Of what is stored. Version 1 had each turn's mean step, not its steps, 2 neither turns in lockstep nor checksums."""

_decode_record = msgspec.json.Decoder(PairTimes | PairFailure | checked_lines.Closing).decode


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


def signed(manifest: AbManifest) -> AbManifest:
    """The same, with its digest."""
    blank = msgspec.structs.replace(manifest, digest="")
    return msgspec.structs.replace(manifest, digest=hashlib.sha256(msgspec.json.encode(blank)).hexdigest())


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

    def verdicts(self) -> list[Verdict]:
        """What its pairs say."""
        return verdicts.verdicts(
            self.records, self.manifest.cases, self.manifest.settings.threshold, finished=self.finished
        )


def read(folder: Path) -> Ab:
    """A stored A/B; of one that was killed, what it had finished.

    Raises:
        DataError: it is missing or damaged, or of another version.
    """
    manifest = _read_manifest(folder / MANIFEST)
    try:
        return Ab(manifest, *checked_lines.read(folder / PAIRS, manifest.digest, _decode_record))
    except checked_lines.Damaged as error:
        raise DataError(str(error)) from error


def _read_manifest(path: Path) -> AbManifest:
    try:
        content = path.read_bytes()
        version = msgspec.json.decode(content, type=dict[str, object]).get("schema_version")
        if isinstance(version, int) and version != AB_VERSION:
            raise DataError(f"{path}: stored in version {version} of the form, and this kvbench reads {AB_VERSION}")
        manifest = msgspec.json.decode(content, type=AbManifest)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: damaged ({error})") from error
    if manifest != signed(manifest):
        raise DataError(f"{path}: damaged (its digest does not fit its content)")
    return manifest
