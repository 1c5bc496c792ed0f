"""Sets of whole numbers as sorted, disjoint ranges: small where numbers come in runs.

A range is (start, stop), stop excluded. Every operation costs a binary search and a move of what
lies behind it; two sets are merged in one pass.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

Range = tuple[int, int]


class Ranges:
    """A set of whole numbers. `len` is how many numbers; iterating gives its ranges in order."""

    __slots__ = ("_count", "_starts", "_stops")

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        """The union of `ranges`, which may overlap and come in any order."""
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._count = 0
        for start, stop in sorted(ranges):
            if self._stops and start <= self._stops[-1]:
                self._stops[-1] = max(self._stops[-1], stop)
            elif start < stop:
                self._starts.append(start)
                self._stops.append(stop)
        self._count = sum(self._stops) - sum(self._starts)

    def __len__(self) -> int:
        return self._count

    def __bool__(self) -> bool:
        return self._count > 0

    def __iter__(self) -> Iterator[Range]:
        return zip(self._starts, self._stops, strict=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        return f"Ranges({list(self)})"

    def __contains__(self, number: int) -> bool:
        i = bisect_right(self._starts, number) - 1
        return i >= 0 and number < self._stops[i]

    @property
    def pieces(self) -> int:
        """Of how many ranges it consists."""
        return len(self._starts)

    @property
    def top(self) -> int:
        """One more than its largest number; 0 if it is empty."""
        return self._stops[-1] if self._stops else 0

    def copy(self) -> Ranges:
        return Ranges(self)

    def add(self, start: int, stop: int) -> int:
        """Put start..stop-1 in; how many of them are new."""
        if start >= stop:
            return 0
        i, j = bisect_left(self._stops, start), bisect_right(self._starts, stop)
        inside = sum(self._stops[i:j]) - sum(self._starts[i:j])
        first, last = start, stop
        if i < j:
            first, last = min(start, self._starts[i]), max(stop, self._stops[j - 1])
        self._starts[i:j], self._stops[i:j] = [first], [last]
        new = last - first - inside
        self._count += new
        return new

    def remove(self, start: int, stop: int) -> int:
        """Take start..stop-1 out; how many of them were there."""
        if start >= stop:
            return 0
        i, j = bisect_right(self._stops, start), bisect_left(self._starts, stop)
        if i >= j:
            return 0
        pieces = [
            piece
            for piece in ((self._starts[i], start), (stop, self._stops[j - 1]))
            if piece[0] < piece[1]
        ]
        before = sum(self._stops[i:j]) - sum(self._starts[i:j])
        self._starts[i:j] = [piece[0] for piece in pieces]
        self._stops[i:j] = [piece[1] for piece in pieces]
        gone = before - sum(b - a for a, b in pieces)
        self._count -= gone
        return gone

    def within(self, start: int, stop: int) -> list[Range]:
        """What of start..stop-1 is in."""
        found: list[Range] = []
        for i in range(bisect_right(self._stops, start), len(self._starts)):
            if self._starts[i] >= stop:
                break
            found.append((max(start, self._starts[i]), min(stop, self._stops[i])))
        return found

    def missing(self, start: int, stop: int) -> list[Range]:
        """What of start..stop-1 is not in."""
        found: list[Range] = []
        for a, b in self.within(start, stop):
            if start < a:
                found.append((start, a))
            start = b
        if start < stop:
            found.append((start, stop))
        return found

    def __or__(self, other: Ranges) -> Ranges:
        return Ranges([*self, *other])

    def __and__(self, other: Ranges) -> Ranges:
        few, many = (self, other) if self.pieces <= other.pieces else (other, self)
        return Ranges(piece for a, b in few for piece in many.within(a, b))

    def __sub__(self, other: Ranges) -> Ranges:
        return Ranges(piece for a, b in self for piece in other.missing(a, b))
