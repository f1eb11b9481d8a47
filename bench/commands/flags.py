"""The words of the command line -> values, each mistake one clear line that names the flag and says what is valid."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any, TypeVar, get_args

import msgspec

from bench.case import PRESETS, NaiveLogits, Sweep
from bench.errors import UsageError
from bench.machine.affinity import usable_cores
from bench.machine.devices import DEVICES
from bench.measure.plan import Limits
from kvcache.models import ATTN_IMPLEMENTATIONS, DTYPES
from kvcache.strategies.catalogue import STRATEGIES

MAX_TIMEOUT_S = 1e6

Word = TypeVar("Word", bound=str)


def integers(flag: str, text: str, minimum: int = 1) -> tuple[int, ...]:
    """The integers of a comma-separated list, each at least `minimum`."""
    found = []
    for word in words(flag, text):
        try:
            value = int(word)
        except ValueError:
            raise UsageError(
                f"{flag} {word}: not an integer; give integers of at least {minimum}, as in 32,128"
            ) from None
        if value < minimum:
            raise UsageError(f"{flag} {word}: too small; give integers of at least {minimum}")
        if value in found:
            raise UsageError(f"{flag} {text}: {value} is named twice; give every value once")
        found.append(value)
    return tuple(found)


def choices(flag: str, text: str, valid: Collection[str]) -> tuple[str, ...]:
    """The words of a comma-separated list, each one of `valid`; a miss names what it may have meant."""
    found = words(flag, text)
    for word in found:
        if word not in valid:
            near = difflib.get_close_matches(word, valid, n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise UsageError(f"{flag} {word}: unknown{hint} (valid: {', '.join(valid)})")
    return found


def one(flag: str, text: str, valid: Collection[Word]) -> Word:
    """The one of `valid` that `text` is; a miss names what it may have meant."""
    if "," in text:
        raise UsageError(f"{flag} {text}: takes one value, not a list (valid: {', '.join(valid)})")
    choices(flag, text, valid)
    return next(word for word in valid if word == text)


def words(flag: str, text: str) -> tuple[str, ...]:
    """The words of a comma-separated list, none of them empty, each given once."""
    found = tuple(word.strip() for word in text.split(","))
    if not all(found):
        raise UsageError(f"{flag} {text!r}: an empty value in the list")
    doubled = next((word for word in found if found.count(word) > 1), None)
    if doubled is not None:
        raise UsageError(f"{flag} {text}: {doubled} is named twice; give every value once")
    return found


def at_least(flag: str, value: float, minimum: int) -> None:
    """Refuse a number that is too small."""
    if value < minimum:
        raise UsageError(f"{flag} {value}: too small; give at least {minimum}")


def limits(repetitions: int | None, processes: int | None, timeout_s: float | None) -> Limits:
    """How much is measured, checked; None takes the default."""
    default = Limits()
    repetitions = default.repetitions if repetitions is None else repetitions
    processes = default.processes if processes is None else processes
    timeout_s = default.timeout_s if timeout_s is None else timeout_s
    at_least("--repetitions", repetitions, 1)
    at_least("--processes", processes, 1)
    if not 1 <= timeout_s <= MAX_TIMEOUT_S:  # NaN fails it too
        raise UsageError(f"--timeout {timeout_s:g}: give seconds from 1 to {MAX_TIMEOUT_S:g}")
    return Limits(repetitions=repetitions, processes=processes, timeout_s=timeout_s)


def device(text: str) -> str:
    """Check that this machine has the device: asking for CUDA never gives the CPU in silence."""
    name = one("--device", text, DEVICES)
    reason = DEVICES[name].why_unusable()
    if reason is not None:
        raise UsageError(f"--device {name}: {reason}; use --device cpu")
    return name


def sweeps(
    preset: str,
    *,
    model: str | None,
    strategies: str | None,
    n_prompt: str | None,
    n_gen: str | None,
    n_depth: str | None,
    batch_size: str | None,
    dtype: str | None,
    threads: str | None,
    device_name: str | None,
    attn_implementation: str | None,
    naive_logits: str | None,
    seed: int | None,
) -> tuple[Sweep, ...]:
    """The sweeps of a preset with every flag that was given (not None) put in its place.

    Raises:
        UsageError: a flag's value is not valid.
    """
    preset = one("--preset", preset, PRESETS)
    if seed is not None and not 0 <= seed < 2**63:
        raise UsageError(f"--seed {seed}: give an integer from 0 to 2**63 - 1")
    chosen: dict[str, Any] = {
        "models": words("--model", model) if model is not None else None,
        "strategies": choices("--strategies", strategies, STRATEGIES) if strategies is not None else None,
        "n_prompt": integers("--n-prompt", n_prompt) if n_prompt is not None else None,
        "n_gen": integers("--n-gen", n_gen) if n_gen is not None else None,
        "n_depth": integers("--n-depth", n_depth, minimum=0) if n_depth is not None else None,
        "batch_size": integers("--batch-size", batch_size) if batch_size is not None else None,
        "dtype": choices("--dtype", dtype, DTYPES) if dtype is not None else None,
        "n_threads": thread_counts(threads),
        "device": device(device_name) if device_name is not None else None,
        "attn_implementation": (
            one("--attn-implementation", attn_implementation, ATTN_IMPLEMENTATIONS)
            if attn_implementation is not None
            else None
        ),
        "naive_logits": one("--naive-logits", naive_logits, get_args(NaiveLogits))
        if naive_logits is not None
        else None,
        "seed": seed,
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    return tuple(dict.fromkeys(msgspec.structs.replace(sweep, **given) for sweep in PRESETS[preset]))


def thread_counts(text: str | None) -> tuple[int, ...]:
    """Thread counts of `--threads`; all the cores this process may use where it is not given."""
    cores = usable_cores()
    if text is None:
        return (cores,)
    counts = integers("--threads", text)
    if max(counts) > cores:
        raise UsageError(f"--threads {max(counts)}: this process may use {cores} cores")
    return counts
