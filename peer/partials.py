"""What a collector sums up for its region, and what the aggregator makes of that.

See `protocols.regions`. A sum is a coded weighted mean like an outcome's, with its contributors and
their masks. At the aggregator it stands for them: it weighs as much as they do together, unit by
unit, and whoever is inside it is not counted again if its contribution comes directly, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from protocols.blocks import NO_BLOCKS, BlockReport
from protocols.messages import Contributor
from protocols.types import PeerId


@dataclass(slots=True)
class Partial:
    """One region's sum of a span."""

    start: int
    contributors: tuple[Contributor, ...]
    units: dict[int, bytes] = field(default_factory=dict)
    """Unit -> coded mean of those whose mask covers it."""

    def weight(self, unit: int) -> float:
        return sum(c.weight for c in self.contributors if c.covers(unit - self.start))

    def inside(self, unit: int) -> set[PeerId]:
        """Whose work a unit holds; nobody's where it has not come."""
        if unit not in self.units:
            return set()
        return {c.peer for c in self.contributors if c.covers(unit - self.start)}

    def expected(self, stop: int) -> list[int]:
        """The units that somebody contributed to."""
        return [
            unit
            for unit in range(self.start, stop)
            if any(c.covers(unit - self.start) for c in self.contributors)
        ]


@dataclass(slots=True)
class OpenSpan:
    """What has come in for a span: sender -> unit -> coded bytes."""

    opened_s: float
    start: int
    stop: int
    weights: dict[PeerId, float] = field(default_factory=dict)
    blocks: dict[PeerId, BlockReport] = field(default_factory=dict)
    parts: dict[PeerId, dict[int, bytes]] = field(default_factory=dict)
    sums: dict[PeerId, Partial] = field(default_factory=dict)
    """Collector -> its region's sum."""
    closed: bool = False

    @property
    def units(self) -> int:
        return self.stop - self.start

    def sources(self, unit: int) -> list[Source]:
        """What a unit is reduced from, in an order that everybody would find."""
        summed: set[PeerId] = set()
        found: list[Source] = []
        for collector, partial in self.sums.items():
            if unit in partial.units:
                summed |= partial.inside(unit)
                found.append(
                    Source(collector, partial.weight(unit), partial.units[unit], partial.units)
                )
        for peer, units in self.parts.items():
            if unit in units and peer not in summed:
                found.append(Source(peer, self.weights[peer], units[unit], units))
        return sorted(found, key=lambda s: (s.peer, s.weight))

    def take_sum(self, collector: PeerId, partial: Partial) -> str | None:
        """Keep a region's whole sum; why not, if it can't stand beside what is here."""
        if self.closed or collector in self.sums:
            return None
        told = {c.peer: (c.weight, c.blocks) for c in partial.contributors}
        for other in self.sums.values():
            if any(c.peer in told for c in other.contributors):
                return "sums up who is in another sum already"
        for peer, fact in told.items():
            if peer in self.parts and (self.weights[peer], self.blocks[peer]) != fact:
                del self.parts[peer]  # it began anew meanwhile, and this is what its region has
        self.sums[collector] = partial
        return None

    def contributors(self) -> tuple[Contributor, ...]:
        """Everyone with at least one unit inside, in order; full masks are left out."""
        inside: dict[PeerId, set[int]] = {}
        facts: dict[PeerId, tuple[float, BlockReport]] = {}
        for peer, units in self.parts.items():
            if units:
                inside[peer] = set(units)
                facts[peer] = (self.weights[peer], self.blocks.get(peer, NO_BLOCKS))
        for partial in self.sums.values():
            for unit in partial.units:
                for peer in partial.inside(unit):
                    inside.setdefault(peer, set()).add(unit)
            for c in partial.contributors:
                facts[c.peer] = (c.weight, c.blocks)
        return tuple(
            Contributor(peer, facts[peer][0], mask_of(inside[peer], self.start, self.stop),
                        facts[peer][1])
            for peer in sorted(inside)
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """One coded part of a unit: a contribution, or a region's sum."""

    peer: PeerId
    weight: float
    payload: bytes
    held_in: dict[int, bytes]
    """From where it is taken out if it turns out to be no such thing."""


def mask_of(units: Collection[int], start: int, stop: int) -> bytes:
    """As in `Contributor.mask`; empty if all of start..stop-1 are in `units`."""
    if len(units) >= stop - start:
        return b""
    inside = bytearray((stop - start + 7) // 8)
    for unit in units:
        inside[(unit - start) // 8] |= 1 << ((unit - start) % 8)
    return bytes(inside)


def runs_of(units: Mapping[int, bytes]) -> Iterable[tuple[int, list[bytes]]]:
    """(first unit, payloads) of each stretch without a gap, in order."""
    first, payloads = -1, list[bytes]()
    for unit in sorted(units):
        if payloads and unit != first + len(payloads):
            yield first, payloads
            payloads = []
        if not payloads:
            first = unit
        payloads.append(units[unit])
    if payloads:
        yield first, payloads
