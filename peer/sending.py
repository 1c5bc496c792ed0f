"""In which order a contribution's units go out, and which of them came too late."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from protocols.messages import OutcomeHeader
from protocols.types import PeerId


def batches(start: int, stop: int, missed: Mapping[int, int], size: int) -> list[tuple[int, int]]:
    """Ranges of at most `size` units that cover start..stop-1 in the order to send them.

    What has `missed` most rounds in a row goes first: on a line too thin for a whole contribution
    a round's time carries another part of it each time, and every unit gets its turn.
    """
    ranges: list[tuple[int, int]] = []
    for times in sorted({missed.get(unit, 0) for unit in range(start, stop)}, reverse=True):
        first: int | None = None
        for unit in range(start, stop + 1):
            inside = unit < stop and missed.get(unit, 0) == times
            if first is not None and (not inside or unit - first == size):
                ranges.append((first, unit))
                first = None
            if inside and first is None:
                first = unit
    return ranges


def missed_again(
    missed: Mapping[int, int], outcomes: Iterable[OutcomeHeader], me: PeerId
) -> dict[int, int]:
    """Unit -> how many rounds in a row it came too late, after a round with these outcomes. Units
    that the round did not exchange keep their count."""
    now = dict(missed)
    for header in outcomes:
        for unit in range(header.start, header.stop):
            now.pop(unit, None)
        mine = next((c for c in header.contributors if c.peer == me), None)
        if mine is not None and not mine.mask:
            continue
        for unit in range(header.start, header.stop):
            if mine is None or not mine.covers(unit - header.start):
                now[unit] = missed.get(unit, 0) + 1
    return now
