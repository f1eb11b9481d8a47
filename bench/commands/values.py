"""The words of the command line -> values; each mistake says what is wrong with the word and what is valid."""

import difflib
from collections.abc import Collection
from typing import Any, get_args

import typer

from bench.errors import UsageError


def thread_count(given: int | None) -> int:
    """Return the number of threads, by default the cores that this process can keep busy.

    More threads than a container's CPU quota keeps busy are allowed, with a caution in the report.

    Raises:
        UsageError: more threads than cores.
    """
    from bench.machine.affinity import allowed_cores, usable_cores

    if given is not None and given > allowed_cores():
        raise UsageError(f"--threads {given}: this process may use {allowed_cores()} cores")
    return usable_cores() if given is None else given


def available_device(name: str) -> str:
    """Return `name`; asking for CUDA never gives the CPU silently.

    Raises:
        UsageError: this machine has no such device that torch can use.
    """
    from bench.machine.devices import DEVICES

    reason = DEVICES[name].why_unusable()
    if reason is not None:
        raise UsageError(f"--device {name}: {reason}; use --device cpu")
    return name


def integers(text: str, least: int) -> tuple[int, ...]:
    """Return the integers of a comma-separated list, each at least `least` and given once.

    Raises:
        typer.BadParameter: one is not valid.
    """
    numbers: list[int] = []
    for word in words(text):
        try:
            value = int(word)
        except ValueError:
            raise typer.BadParameter(f"{word}: not an integer; give integers of at least {least}") from None
        if value < least:
            raise typer.BadParameter(f"{word}: too small; give integers of at least {least}")
        if value in numbers:
            raise typer.BadParameter(f"{text}: {value} is given twice; give every value once")
        numbers.append(value)
    return tuple(numbers)


def words(text: str, valid: Collection[str] = (), prefix: str | None = None) -> tuple[str, ...]:
    """Return the words of a comma-separated list, each given once; with `valid`, each one of them.

    A word of three parts with colons between, of which the first is `prefix`, is valid, too.

    Raises:
        typer.BadParameter: a word is empty, unknown, or given twice.
    """
    found = tuple(word.strip() for word in text.split(","))
    if not all(found):
        raise typer.BadParameter(f"{text!r}: an empty value in the list")
    for word in found:
        if found.count(word) > 1:
            raise typer.BadParameter(f"{text}: {word} is given twice; give every value once")
        if prefix and word.startswith(prefix):
            if word.count(":") != 2 or not all(word.split(":")):
                raise typer.BadParameter(f"{word}: give {prefix}module:factory, as in {prefix}my_cache:make")
        elif valid and word not in valid:
            raise typer.BadParameter(unknown(word, valid))
    return found


def invalid(word: str, option: Any) -> str:
    """Say what is valid for `option`, a flag of one Literal or one number, where `word` is not."""
    kind = option.type_descriptor.annotation
    if choices := get_args(kind):
        return unknown(word, choices)
    least, most = (None if bound is None else str(bound).removesuffix(".0") for bound in (option.min, option.max))
    span = "" if least is None else f" of at least {least}" if most is None else f" from {least} to {most}"
    return f"{word}: give {'an integer' if kind is int else 'a number'}{span}"


def unknown(word: str, valid: Collection[str]) -> str:
    """Say that `word` is none of `valid`, and which of them it may have meant."""
    if "," in word:
        return f"{word}: takes one value, not a list (valid: {', '.join(valid)})"
    near = difflib.get_close_matches(word, valid, n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{word}: unknown{hint} (valid: {', '.join(valid)})"
