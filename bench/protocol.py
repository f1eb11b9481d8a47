"""What the driver and a worker say to each other: one JSON document a line, requests down, replies up."""

from typing import Literal

import msgspec

from bench.case import TOKENS_PER_TURN, Case, DeviceName, Group, NaiveLogits
from bench.manifest import CeilingName, Product
from bench.record import CeilingTimes, CheckFindings, TokensMatch, TurnTimes
from kvcache.arithmetic.costs import Phase
from kvcache.proof.counters import Counters
from kvcache.strategies.catalogue import PLAIN_CACHE

VERSION = 1
"""Raised when a request or a reply changes its meaning: two revisions are compared only if they speak the same."""


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    """Load the group's model and get ready to run `strategy` on it; answered by `Loaded`."""

    group: Group
    strategy: str
    naive_logits: NaiveLogits
    seed: int
    prefill_quantized: bool = False
    """As in `Case`; an older worker does not know it (`Loaded.prefill_quantized`)."""
    kernels: dict[str, str] | None = None
    """The kernel of each product (`kvcache.compiled.candidates`), the default for others; None: those that the worker
    finds to be the fastest. An older worker does not know it."""
    kernels_for: list[int] = []
    """Batch sizes for which `Loaded.kernels` is to say which are used: `kernels`, or else the fastest."""


class MakeReference(msgspec.Struct, frozen=True, kw_only=True, tag="make-reference"):
    """Find what naive greedy re-feed emits for `case` and store it at `path` (safetensors); answered by `Done`."""

    case: Case
    path: str


class MakeText(msgspec.Struct, frozen=True, kw_only=True, tag="make-text"):
    """Store at `path` the text by which the cell of `case` is judged; answered by `TextMade`.

    Only for a worker of the driver's own revision: older ones do not know it.
    """

    case: Case
    path: str
    tokens: list[list[int]] | None = None
    """A text for each sequence of the batch, or a longer one whose beginning it is; None: the model writes it."""
    writer: str = PLAIN_CACHE
    """The exact strategy that then writes; where it fails (it has no memory for it, say), PLAIN_CACHE does."""
    n_context: int = 0
    """The longest context that the text will be used for."""


class Judge(msgspec.Struct, frozen=True, kw_only=True, tag="judge"):
    """Judge a lossy strategy over the text at `text` (`MakeText`), before its case is checked; answered by `Judged`.

    Only for a worker of the driver's own revision.
    """

    case: Case
    path: str
    """The reference, as in `CheckCase`: where a position depends on later ones, nothing is judged."""
    text: str
    n_threads: int
    """Threads for it: several workers may judge at once."""


class CheckCase(msgspec.Struct, frozen=True, kw_only=True, tag="check"):
    """Prepare for `case` and compare with the reference at `path`; untimed; answered by `Checked`."""

    case: Case
    path: str
    count: bool = True
    """Count operations and memory too, which takes longer; without it those fields of `Checked` are None."""
    tokens_per_turn: int = TOKENS_PER_TURN
    """How much of a naive decode is timed (`bench.case.naive_steps`), here and in the turns after it."""


class TakeTurn(msgspec.Struct, frozen=True, kw_only=True, tag="turn"):
    """Time one prefill and its decode steps of the case that was checked last; answered by `TurnTaken`, or `Paused`."""

    lockstep: bool = False
    """Stop after each token with `Paused`, the last one too, and go on at `GoOn`; only for a worker of which `Loaded`
    says that it can."""


class GoOn(msgspec.Struct, frozen=True, kw_only=True, tag="go-on"):
    """Go on with the turn, after `Paused`; answered by the next `Paused`, or by `TurnTaken` after the last."""


class TimeFramework(msgspec.Struct, frozen=True, kw_only=True, tag="framework"):
    """Time decode steps without arithmetic, for the case that was checked last; answered by `FrameworkTimed`."""


class ChooseCeilings(msgspec.Struct, frozen=True, kw_only=True, tag="choose-ceilings"):
    """Find the fastest kernel of each ceiling under these settings; answered by `CeilingsChosen`. Needs no `Load`.

    An older worker knows the first three fields alone, and its `CeilingTurnTaken` has no `read_bytes`.
    """

    device: DeviceName
    dtype: str
    n_threads: int
    read_bytes: int | None = None
    """What is read over and over; None: far more than the caches hold."""
    products: tuple[Product, ...] = ()
    """Products that are tried beside the device's own."""


class TakeCeilingTurn(msgspec.Struct, frozen=True, kw_only=True, tag="ceiling-turn"):
    """Time some passes of the kernel chosen for `ceiling`; answered by `CeilingTurnTaken`."""

    ceiling: CeilingName


Request = (
    Load
    | MakeReference
    | MakeText
    | Judge
    | CheckCase
    | TakeTurn
    | GoOn
    | TimeFramework
    | ChooseCeilings
    | TakeCeilingTurn
)


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    """The worker is ready."""

    version: int
    code: str
    """The folder that the worker's own code was imported from."""
    lockstep: bool = False
    """Whether it knows `TakeTurn.lockstep` (which works on the CPU) and `CheckCase.count`."""
    prefill_quantized: bool = False
    """Whether it runs the strategy so (`Load.prefill_quantized`)."""
    kernels: dict[str, str] = {}
    """The kernels for `Load.kernels_for`; empty where the strategy, or an older worker, has no choice."""
    exact: bool = False
    """Whether the strategy promises to be exact, which of a user's cache only the worker knows."""


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """The request was carried out; it has no other answer."""


class TextMade(msgspec.Struct, frozen=True, kw_only=True, tag="text-made"):
    """The text is stored, with the exact predictions."""

    writer: str = ""
    """The strategy that wrote it; empty where it was given."""
    tokens: list[list[int]] = []
    """What it wrote, for the longest context: `[batch, n]`."""


class Judged(msgspec.Struct, frozen=True, kw_only=True, tag="judged"):
    """The worker keeps what it found for `Checked`."""

    spent_s: float


class Checked(CheckFindings, frozen=True, kw_only=True, tag="checked"):
    """How the case's tokens and logits compare, and its sizes."""

    counters: dict[Phase, Counters] | None = None
    """None where they were not to be counted (`CheckCase.count`)."""


class Paused(msgspec.Struct, frozen=True, kw_only=True, tag="paused"):
    """A token of a turn in lockstep is done; the worker waits for `GoOn`, and that time is no step's."""


class TurnTaken(TurnTimes, frozen=True, kw_only=True, tag="turn-taken"):
    """The time stamps of one turn, as intervals."""


class FrameworkTimed(msgspec.Struct, frozen=True, kw_only=True, tag="framework-timed"):
    """The times of such steps; None where they cannot be measured (`bench.measure.framework`)."""

    step_ns: list[int] | None


class CeilingsChosen(msgspec.Struct, frozen=True, kw_only=True, tag="ceilings-chosen"):
    """The fastest kernel of each ceiling."""

    kernels: dict[CeilingName, str]


class CeilingTurnTaken(CeilingTimes, frozen=True, kw_only=True, tag="ceiling-turn-taken"):
    """The times of one turn of a ceiling."""


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """The request failed; the worker lives on unless `ends`."""

    status: Literal["failed", "oom", "unsupported"]
    error: str
    tokens_match: TokensMatch | None = None
    ends: bool = False
    """The process can do nothing more, and ends after this answer."""
    of_model: bool = False
    """Nothing can be measured of the model, whatever the strategy."""


Reply = (
    Loaded
    | Done
    | TextMade
    | Judged
    | Checked
    | Paused
    | TurnTaken
    | FrameworkTimed
    | CeilingsChosen
    | CeilingTurnTaken
    | Refused
)


class Introduction(msgspec.Struct, frozen=True, kw_only=True):
    """The first line of a fork server: what it and its workers are made of."""

    version: int
    code: str
    python: str
    torch: str
    transformers: str
    isa: str
    model_code: str | None = None
    """The file of a `py:` model's module."""
    refused: str | None = None
    """Why the model is not available."""
    attn_implementation: str = ""
    max_positions: int | None = None


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """A later line of a fork server: one of its workers has ended."""

    pid: int
    exit_code: int
    """Negative: the signal that killed it."""
