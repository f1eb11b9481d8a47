"""Turns kept in columns: a million samples in numpy arrays of half a gigabyte, where as objects they would take five.

Read as a sequence, each turn is made again as the record that it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Generic, TypeVar, cast, overload

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench.record import CeilingSample, Covariates, Sample

T = TypeVar("T", Sample, CeilingSample)
Ints = NDArray[np.int64]

NONE = int(np.iinfo(np.int64).min)
"""Stands for None in a column of integers."""

CODED = frozenset({"case", "cell", "ceiling", "kernel", "steps"})
"""Fields with few different values; which steps are timed follows from the case."""
LISTS = frozenset({"step_ns", "step_event_ns", "pass_ns"})
COVARIATES: tuple[str, ...] = Covariates.__struct_fields__


@dataclass(frozen=True)
class Coded:
    """A column of few different values: each turn's is `distinct[codes[turn]]`."""

    distinct: list[Any]
    """Strings, or tuples of integers."""
    codes: Ints

    def at(self, turns: Ints) -> Coded:
        """Return the values of some turns; `distinct` has theirs alone."""
        used, codes = np.unique(self.codes[turns], return_inverse=True)
        return Coded([self.distinct[code] for code in used], codes)


@dataclass(frozen=True)
class Lists:
    """A column of lists of integers: that of a turn is `flat[starts[turn] : starts[turn] + lengths[turn]]`."""

    flat: Ints
    lengths: Ints
    """-1 for None."""

    @cached_property
    def starts(self) -> Ints:
        """Where each turn's list begins in `flat`."""
        held = np.maximum(self.lengths, 0)
        return np.cumsum(held) - held

    @property
    def sums(self) -> Ints:
        """The sum of each turn's list; 0 for None."""
        sums, some = np.zeros(len(self.lengths), dtype=np.int64), self.lengths > 0
        if some.any():
            sums[some] = np.add.reduceat(self.flat, self.starts[some])
        return sums

    def replaced(self, turns: NDArray[np.bool_], others: Lists) -> Lists:
        """Return these lists, with those of `others` for the turns that are marked; they are as long."""
        marked = np.repeat(turns, np.maximum(self.lengths, 0))
        flat = self.flat.copy()
        flat[marked] = others.flat[np.repeat(turns, np.maximum(others.lengths, 0))]
        return Lists(flat, self.lengths)

    def at(self, turns: Ints) -> Lists:
        """Return the lists of some turns."""
        lengths = self.lengths[turns]
        held = np.maximum(lengths, 0)
        first = np.cumsum(held) - held
        return Lists(self.flat[np.repeat(self.starts[turns] - first, held) + np.arange(held.sum())], lengths)

    def rows(self, turns: Ints, length: int) -> Ints:
        """Return the lists of some turns that all have `length` values, `[turn, value]`."""
        rows: Ints = self.flat[self.starts[turns][:, None] + np.arange(length)]
        return rows


Column = Ints | Coded | Lists


class Turns(Sequence[T], Generic[T]):
    """The turns of a run in columns, in the order of writing; the covariates' columns stand beside the others."""

    def __init__(self, kind: type[T], columns: dict[str, Column], length: int) -> None:
        self._kind: type[T] = kind
        self._columns, self._length = columns, length

    @classmethod
    def of(cls, kind: type[T], turns: Sequence[T]) -> Turns[T]:
        """Return `turns` in columns; as they are where they are so already.

        Raises:
            OverflowError: an integer has more than 64 bits.
        """
        if isinstance(turns, Turns):
            return turns
        fields = _by_field(kind.__struct_fields__, turns)
        fields |= _by_field(COVARIATES, fields.pop("covariates"))
        return cls(kind, {name: _column(name, values) for name, values in fields.items()}, len(turns))

    @classmethod
    def joined(cls, kind: type[T], parts: list[Turns[T]]) -> Turns[T]:
        """Join turns that came in parts, column by column; no part is left in `parts`, lest it keep all of its own."""
        if len(parts) < 2:
            return parts.pop() if parts else cls.of(kind, [])
        length, columns = sum(map(len, parts)), [dict(part.columns) for part in parts]
        parts.clear()
        return cls(kind, {name: _joined([own.pop(name) for own in columns]) for name in list(columns[0])}, length)

    def at(self, places: Ints) -> Turns[T]:
        """Return the turns at some different places, in rising order; these themselves where that is all of them."""
        if len(places) == len(self):
            return self
        columns: dict[str, Column] = {
            name: column[places] if isinstance(column, np.ndarray) else column.at(places)
            for name, column in self._columns.items()
        }
        return Turns(self._kind, columns, len(places))

    @property
    def columns(self) -> Mapping[str, Column]:
        """The columns, by field."""
        return self._columns

    def ints(self, name: str) -> Ints:
        """Return a column of integers, `NONE` where there is none."""
        return cast("Ints", self._columns[name])

    def coded(self, name: str) -> Coded:
        """Return a column of few different values."""
        return cast("Coded", self._columns[name])

    def lists(self, name: str) -> Lists:
        """Return a column of lists of integers."""
        return cast("Lists", self._columns[name])

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        """Make a turn, or several, again."""
        if isinstance(place, slice):
            return list(self._made(np.arange(self._length)[place]))
        return next(self._made(np.array([range(self._length)[place]])))

    def __iter__(self) -> Iterator[T]:
        return self._made(np.arange(self._length))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # equal to a list, which has none

    def _made(self, places: Ints) -> Iterator[T]:
        """Make the turns at some places again, some thousand at a time."""
        for start in range(0, len(places), 4096):
            part = places[start : start + 4096]
            values = {name: _values(column, part) for name, column in self._columns.items()}
            for row in zip(*values.values(), strict=True):
                fields = dict(zip(values, row, strict=True))
                covariates = Covariates(**{name: fields.pop(name) for name in COVARIATES})
                yield self._kind(**fields | {"warmup": bool(fields["warmup"]), "covariates": covariates})


def _by_field(names: Sequence[str], turns: Sequence[msgspec.Struct]) -> dict[str, Sequence[Any]]:
    """Return the values of each field of some turns, or of their covariates."""
    rows = zip(*map(msgspec.structs.astuple, turns), strict=True)
    return dict(zip(names, rows, strict=True)) if turns else dict.fromkeys(names, ())


def _column(name: str, values: Sequence[Any]) -> Column:
    """Put the values of a field into a column.

    Raises:
        OverflowError: an integer has more than 64 bits.
    """
    if name in LISTS:
        lengths = _ints([-1 if value is None else len(value) for value in values])
        flat = np.fromiter(chain.from_iterable(value or () for value in values), dtype=np.int64)
        return Lists(flat, lengths)
    if name not in CODED:
        return _ints(values)
    if name == "steps":
        values = list(map(tuple, values))
    places = {value: place for place, value in enumerate(dict.fromkeys(values))}
    return Coded(list(places), _ints([places[value] for value in values]))


def _joined(parts: list[Any]) -> Column:
    """Join the parts of a column."""
    if isinstance(parts[0], Lists):
        return Lists(*(np.concatenate([getattr(part, side) for part in parts]) for side in ("flat", "lengths")))
    if isinstance(parts[0], Coded):
        places: dict[Any, int] = {}
        codes = [
            _ints([places.setdefault(value, len(places)) for value in part.distinct])[part.codes] for part in parts
        ]
        return Coded(list(places), np.concatenate(codes))
    return np.concatenate(parts)


def alike(*keys: Ints) -> list[Ints]:
    """Group the places of arrays of one length: those at which all of them have equal values, in rising order."""
    order = np.lexsort(keys)
    changed = np.any([np.diff(key[order]) != 0 for key in keys], axis=0)
    return np.split(order, np.flatnonzero(changed) + 1) if len(order) else []


def _ints(values: Sequence[int | None]) -> Ints:
    if None in values:
        values = [NONE if value is None else value for value in values]
    return np.array(values, dtype=np.int64)


def _values(column: Column, places: Ints) -> list[Any]:
    """Return the values of some turns as they were in their records."""
    if isinstance(column, Lists):
        ends = column.starts[places] + column.lengths[places]
        return [
            None if length < 0 else column.flat[end - length : end].tolist()
            for end, length in zip(ends.tolist(), column.lengths[places].tolist(), strict=True)
        ]
    if isinstance(column, Coded):
        values = [column.distinct[code] for code in column.codes[places].tolist()]
        return [list(value) if isinstance(value, tuple) else value for value in values]
    return [None if value == NONE else value for value in column[places].tolist()]
