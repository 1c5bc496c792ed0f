"""What a measurement gives back: a table for people, and bars for machines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

Progress = Callable[[str], None]
"""Called with one short line at a time, for whoever waits."""

Cell = str | int | float | None


class BenchError(Exception):
    """Nothing could be measured. The text says what to do next."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One promise: `value` must satisfy `must`. Not measured (None) is not kept."""

    bar: str
    value: float | None
    must: str
    holds: bool
    reference: str
    """What `value` is measured against, in words."""

    @classmethod
    def at_most(cls, bar: str, value: float | None, limit: float, reference: str) -> Self:
        """`value` must not exceed `limit` (NaN does)."""
        return cls(bar, value, f"<= {limit:g}", value is not None and value <= limit, reference)

    @classmethod
    def at_least(cls, bar: str, value: float | None, limit: float, reference: str) -> Self:
        """`value` must reach `limit` (NaN does not)."""
        return cls(bar, value, f">= {limit:g}", value is not None and value >= limit, reference)


@dataclass(frozen=True, slots=True)
class Result:
    """One run of a measurement."""

    rows: Sequence[Mapping[str, Cell]]
    """The table: column title -> cell, the same columns in every row."""
    bars: Sequence[Bar]
    notes: Sequence[str] = ()
    """What a reader must know to judge the numbers: one sentence or two each."""
