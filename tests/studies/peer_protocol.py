"""What `peers` and the process of another engine say to each other: one JSON document a line.

Imported in the engines' own environments too, so it needs msgspec and numpy alone.
"""

from collections.abc import Callable
from typing import Protocol

import msgspec
import numpy as np


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    """Load the weights in the folder `weights` into `engine`; answered by `Loaded`."""

    engine: str
    weights: str
    dtype: str
    kv: str
    """How the cache is kept, in the engine's own words; `dtype` where it is exact, "" for the engine's default."""
    n_threads: int
    capacity: int
    """Tokens that the cache must hold."""
    absent: int
    """A token that will not be emitted, for engines that need an end token: end-of-sequence is like any other here."""


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """Emit `n_gen` tokens after `context` and `prompt`; answered by `Generated`.

    Feeding `context` is not timed.
    """

    context: list[int]
    prompt: list[int]
    n_gen: int
    logits: bool = False
    """Return the first token's logits, too."""


class Generated(msgspec.Struct, frozen=True, kw_only=True, tag="generated"):
    """The tokens, and the time from the start (or the token before) until each was known, in ns."""

    tokens: list[int]
    ns: list[int]
    logits: list[float] | None = None
    """Of the first token, where they were asked for and the engine gives them."""


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    """The engine with its version and what it says of the processor, and how it keeps the cache."""

    description: str
    kv: str


class Failure(msgspec.Struct, frozen=True, kw_only=True, tag="failure"):
    """The request failed, in one line."""

    error: str


Request = Load | Generate
Reply = Loaded | Generated | Failure

Emit = Callable[[int, "np.ndarray | None"], None]
"""Takes each token as soon as it is known, with its logits `[vocab]` where the engine gives them (a view will do)."""


class Engine(Protocol):
    """Another inference engine with a model loaded: generates greedily, one sequence."""

    description: str
    kv: str

    def prepare(self, request: Generate) -> None:
        """Fill the cache with `request.context` alone; untimed, before each `generate`."""

    def generate(self, request: Generate, emit: Emit) -> None:
        """Feed the prompt and call `emit` with each token."""
