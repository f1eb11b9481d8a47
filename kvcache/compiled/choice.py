"""Chooses the kernel of each product on the processor at hand: times the candidates on the model's own weights.

Steps and prompts are timed separately. Candidates take turns, and so do the products, in the order of a forward: with
all weights between two passes over the same one, the last-level cache holds none of it.
"""

import functools
import math
import operator
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcache.caches.contract import Unsupported
from kvcache.compiled import choices_file
from kvcache.compiled.candidates import OF_PROMPT, PROMPT_ROWS, WIDE, Kernels
from kvcache.compiled.decoder import Decoder
from kvcache.compiled.mlp import Mlp
from kvcache.compiled.products import (
    STEP,
    SUMS,
    Linear,
    Product,
    default_prompt,
    default_step,
    has_bfloat16,
    prompt_kernels,
)
from kvcache.compiled.step import compiled

CLEAR_GAIN = 0.05
"""Share of the default's time by which another candidate must be faster, so that noise changes nothing."""

LEAST_BYTES = 1 << 24
"""Of all weights of equal shape; fewer have their default: two cores of Zen 3 read them in 0.7 ms, at 23 GB/s."""

LEAST_SUMS, MOST_SUMS = 2, 16
"""Rows times places between which a multiply-and-sum is a candidate. Each is a sum of its own in the compiled code, and
more than 16 take long to compile. Over one row a single one takes 1.07 to 1.09 of two's time and four take 0.78 to 0.91
(Zen 3, one thread, float32, four shapes: `results/examples/engine-notes.md`)."""

ROUNDS, LEAST_ROUNDS, ROUNDS_SECONDS = 7, 3, 8.0
"""Passes of each candidate in one phase after the first, which warms up: of them LEAST_ROUNDS, and others only within
so many seconds."""

COMPILE_SECONDS, STEP_SECONDS, SECONDS = 15.0, 22.0, 30.0
"""How long after its start a choice compiles the sums of another product, times those of a step, and times at all: a
product that has not had LEAST_ROUNDS by then keeps its default."""

STEP_BYTES, PROMPT_BYTES = 1 << 27, 1 << 24
"""How many bytes of equal weights a pass covers, one weight at least; PROMPT_BYTES for the least of PROMPT_ROWS."""

EMPTY_CALLS = 200
"""Calls with hardly a weight, of which the shortest is what a call takes by itself."""

TORCHS_OWN = ("linear", "linear-wide")
"""Candidates for a prompt that are not oneDNN's."""

HOPELESS = 3.0
"""A candidate whose first pass takes so many times the default's gets no second one: `F.linear` of bfloat16 without
instructions for it takes six times as long as in float32, in which the default computes (Zen 3)."""

Times = dict[str, list[float]]
"""Seconds of each pass by candidate; passes of one index were taken one after the other."""


class Products(NamedTuple):
    """A product, or a feed-forward block, of a model: its weights of equal shape, and its default candidate."""

    default: str
    parts: list[Linear | Mlp]

    @property
    def weight(self) -> Tensor:
        """The first of its weights."""
        return self.parts[0].weight


class Pass(NamedTuple):
    """One candidate's pass over some weights of equal shape."""

    calls: Sequence[Callable[[], object]]
    """One for each weight."""
    call_s: float = 0.0
    """What each of them takes that it does not take within a step."""

    def seconds(self) -> float:
        """Take the pass; return what one product took."""
        return _seconds(self.calls) - self.call_s


@dataclass
class Choice:
    """The kernels of one model, for a prompt and for steps of some batch sizes."""

    model: Decoder
    pinned: Kernels | None = None
    """Kernels to use, the default where a product is not in it; None: those that are fastest here."""
    _chosen: dict[str, str] = field(default_factory=dict)

    def of_batch(self, rows: int) -> tuple[Decoder, dict[str, str]]:
        """Return the model with kernels for a prompt and for steps over `rows`; and those kernels by product.

        Where they have to be found out, that takes some seconds, once on a processor.

        Raises:
            Unsupported: a pinned kernel does not exist on this processor.
        """
        found = products(self.model, rows)
        known = self._chosen if self.pinned is None else self.pinned
        if self.pinned is None:
            large = {name: own for name, own in found.items() if len(own.parts) * own.weight.nbytes >= LEAST_BYTES}
            if not large.keys() <= known.keys():
                self._chosen |= choices_file.completed(large, lambda missing: choose(missing, rows))
        kernels = {name: known.get(name, own.default) for name, own in found.items()}
        if self.pinned is not None:
            _refuse_missing(kernels)
        for size in PROMPT_ROWS if self.pinned is None else ():
            prompt = [name for name in found if is_of_prompt(name, size)]
            timed = {kernels[name] in TORCHS_OWN for name in prompt if name in known}
            if timed == {True}:  # what is too small to be timed follows
                followers = (name for name in prompt if name not in known)
                kernels |= {name: default_prompt(found[name].weight.dtype, "linear") for name in followers}
            elif len(timed) > 1:  # chosen with those of different models
                kernels |= {name: found[name].default for name in prompt}
        model = self.model.with_kernels(
            lambda linear: kernels[step_name(linear, rows)],
            lambda part: tuple(kernels[prompt_name(part, size)] for size in PROMPT_ROWS),
        )
        return model, kernels


def _refuse_missing(pinned: Mapping[str, str]) -> None:
    """Refuse kernels that this processor does not have, before torch does in words of its own.

    Raises:
        Unsupported: one of them is a product of bfloat16 by oneDNN, which has none here.
    """
    for name, kernel in pinned.items():
        of_onednn = OF_PROMPT in name and kernel not in TORCHS_OWN and not kernel.endswith(WIDE)
        if of_onednn and "bfloat16" in name and not has_bfloat16():
            raise Unsupported(
                f"the pinned kernels (--kernels) name {kernel} for {name}, and on this processor oneDNN has no product "
                f"of bfloat16; {kernel}{WIDE} computes it in float32"
            )


def step_name(linear: Linear, rows: int) -> str:
    """Name a product of a step over so many rows."""
    return f"{linear.shape}, step of {rows}"


def prompt_name(part: Linear | Mlp, rows: int) -> str:
    """Name a product, or a feed-forward block, of a prompt of so many rows."""
    return f"{part.shape}{OF_PROMPT}{rows}"


def is_of_prompt(name: str, rows: int) -> bool:
    """Return whether a product's name is one of a prompt of so many rows."""
    return name.endswith(f"{OF_PROMPT}{rows}")


def products(model: Decoder, rows: int) -> dict[str, Products]:
    """List all products of a model by name: those of a step over `rows` and those of prompts, mixed."""
    found: dict[str, Products] = {}

    def noted(name: str, default: str, part: Linear | Mlp) -> str:
        found.setdefault(name, Products(default, [])).parts.append(part)
        return default

    model.with_kernels(
        lambda linear: noted(step_name(linear, rows), default_step(rows, len(linear.weight)), linear),
        lambda part: tuple(noted(prompt_name(part, size), part.default_prompt, part) for size in PROMPT_ROWS),
    )
    return found


@torch.inference_mode()
def choose(found: Mapping[str, Products], rows: int) -> dict[str, tuple[str, Times]]:
    """Time the candidates of every product; return the fastest one's name, and all times.

    It takes at most SECONDS, and what one pass, or the code of one sum, then still takes.
    """
    start = time.monotonic()
    step = {name: own for name, own in found.items() if OF_PROMPT not in name}
    prompt = {name: own for name, own in found.items() if name not in step}
    of_prompt = {name: prompt_passes(own, int(name.rpartition(OF_PROMPT)[2])) for name, own in prompt.items()}
    times = interleaved(step_passes(step, rows, start + COMPILE_SECONDS), found, start + STEP_SECONDS)
    times |= interleaved(of_prompt, found, start + SECONDS)
    kernels = {name: own.default for name, own in found.items()}
    kernels |= {name: fastest(times[name], kernels[name]) for name in times.keys() & step.keys()}
    for size in PROMPT_ROWS:
        timed = {name: own for name, own in prompt.items() if is_of_prompt(name, size) and name in times}
        kernels |= of_one_library(timed, times)
    return {name: (kernel, times.get(name, Times())) for name, kernel in kernels.items()}


def of_one_library(prompt: Mapping[str, Products], times: Mapping[str, Times]) -> dict[str, str]:
    """Return kernels for the products of a prompt, from the library that takes less time for all of them together.

    Libraries are not mixed: alone `F.linear` took 0.77 of oneDNN's time in the attention's products, between oneDNN's
    others the whole prefill took 1.05 (Zen 3, two threads).
    """
    onednns, torchs = dict[str, str](), dict[str, str]()
    for name, own in prompt.items():
        by_torch = {kernel: taken for kernel, taken in times[name].items() if kernel in TORCHS_OWN}
        onednns[name] = fastest({k: taken for k, taken in times[name].items() if k not in by_torch}, own.default)
        if by_torch:
            torchs[name] = fastest(by_torch, next(iter(by_torch)))
    if torchs.keys() != onednns.keys() or not prompt:
        return onednns
    totals = {
        library: [
            math.fsum(map(operator.mul, in_round, (len(own.parts) for own in prompt.values())))
            for in_round in zip(*(times[name][kernels[name]] for name in prompt), strict=True)
        ]
        for library, kernels in (("onednn", onednns), ("torch", torchs))
    }
    return torchs if fastest(totals, "onednn") == "torch" else onednns


def fastest(times: Times, default: str) -> str:
    """Return the candidate with the shortest pass, or the default where that is not clearly slower."""
    best = min(times, key=lambda name: min(times[name]))
    ratio = statistics.median(map(operator.truediv, times[best], times[default]))
    limit = 1 - CLEAR_GAIN
    return best if ratio < limit and min(times[best]) < limit * min(times[default]) else default


def step_passes(found: Mapping[str, Products], rows: int, end: float) -> dict[str, dict[str, Pass]]:
    """Make the passes over the weights of a step; what is not compiled by `end` is left out.

    A multiply-and-sum is compiled for each shape, as a step does: one kernel for all shapes was slower, and not by the
    same factor for each candidate. In a step it is part of a larger kernel: what its call takes by itself, as one with
    hardly a weight shows, does not count. Products that a step reads most of come first.
    """
    passes: dict[str, dict[str, Pass]] = {}
    call_s: float | None = None
    for name, own in sorted(found.items(), key=lambda item: -len(item[1].parts) * item[1].weight.nbytes):
        of_product, linears = dict[str, Pass](), _some(own, STEP_BYTES)
        for kernel, product in STEP.items():
            places = SUMS.get(kernel)
            if places is None:
                of_product[kernel] = _pass(product, linears, rows)
            elif kernel == own.default or (LEAST_SUMS <= places * rows <= MOST_SUMS and len(own.weight) % places == 0):
                if call_s is None:
                    empty = _pass(compiled(product), [Linear(own.weight.new_zeros(16, 16))], rows)
                    call_s = min(empty.seconds() for _ in range(EMPTY_CALLS))
                if time.monotonic() > end:
                    return passes
                own_shape = _pass(compiled(product), linears, rows)._replace(call_s=call_s)
                own_shape.calls[0]()  # compiles
                of_product[kernel] = own_shape
        passes[name] = of_product
    return passes


def prompt_passes(own: Products, rows: int) -> dict[str, Pass]:
    """Make the passes over the weights of a prompt's product: the fewer weights, the more rows."""
    x = torch.ones(1, rows, own.weight.shape[1], dtype=own.weight.dtype)
    parts = _some(own, PROMPT_BYTES * PROMPT_ROWS[0] // rows)
    kernels = prompt_kernels(x.dtype)
    return {name: Pass([functools.partial(part.over_prompt, x, name) for part in parts]) for name in kernels}


def interleaved(
    passes: Mapping[str, Mapping[str, Pass]], found: Mapping[str, Products], end: float
) -> dict[str, Times]:
    """Take all passes in rounds, every second round in the opposite order; a candidate that does not run has none.

    Empty where `end` comes before LEAST_ROUNDS are over.
    """
    first: dict[str, dict[str, float]] = {name: {} for name in passes}
    for name, own in passes.items():
        for kernel, taken in own.items():
            if time.monotonic() > end:
                return {}
            first[name][kernel] = _first(taken)
    left: dict[str, dict[str, Pass]] = {}
    for name, own in passes.items():
        limit = HOPELESS * first[name][found[name].default]
        left[name] = {kernel: taken for kernel, taken in own.items() if first[name][kernel] <= limit}
    names = list(dict.fromkeys(kernel for own in passes.values() for kernel in own))
    times: dict[str, Times] = {name: {kernel: [] for kernel in own} for name, own in left.items()}
    start = time.monotonic()
    for number in range(ROUNDS):
        if number >= LEAST_ROUNDS and time.monotonic() - start > ROUNDS_SECONDS:
            break
        for kernel in names[:: 1 if number % 2 else -1]:
            for name in (name for name, own in left.items() if kernel in own):
                if time.monotonic() > end:
                    return _of_rounds(times, number)
                times[name][kernel].append(left[name][kernel].seconds())
    return times


def _of_rounds(times: Mapping[str, Times], number: int) -> dict[str, Times]:
    """Return the times of so many whole rounds; none where they are too few."""
    whole = {name: {kernel: taken[:number] for kernel, taken in own.items()} for name, own in times.items()}
    return whole if number >= LEAST_ROUNDS else {}


def _seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Return what one of the calls took."""
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) / len(calls)


def _first(taken: Pass) -> float:
    try:
        return taken.seconds()
    except RuntimeError:  # oneDNN has no such product on this processor
        return math.inf


def _some(own: Products, most_bytes: int) -> list[Any]:
    return own.parts[: max(1, most_bytes // own.weight.nbytes)]


def _pass(product: Product, linears: Sequence[Linear], rows: int) -> Pass:
    weight = linears[0].weight
    x = torch.ones(rows, 1, weight.shape[1], dtype=weight.dtype)
    return Pass([functools.partial(product, x, linear.weight, None) for linear in linears])
