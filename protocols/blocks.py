"""What members tell each other of the data they train on, in contributions and outcomes.

The blocks of all epochs stand in one endless row: *ordinal* epoch x blocks + position, where every
epoch has its own order (`sharding.block_of`). So a run of ordinals is a spread of blocks, and what
a peer did in a round is a few ranges.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Final

from protocols import limits
from protocols.ranges import Ranges
from protocols.records import PeerIdField
from protocols.schema import Max

ORDINAL_MAX: Final = 2**48


@dataclass(frozen=True, slots=True)
class BlockRange:
    """Ordinals start..stop-1."""

    start: Annotated[int, Max(ORDINAL_MAX)]
    stop: Annotated[int, Max(ORDINAL_MAX)]

    def __post_init__(self) -> None:
        if not self.start < self.stop:
            raise ValueError("an empty range of blocks")


BlockRanges = Annotated[tuple[BlockRange, ...], Max(limits.REPORT_RANGES_MAX)]


@dataclass(frozen=True, slots=True)
class BlockReport:
    """What a contributor did with which blocks, at the moment its contribution was frozen.

    A block counts as trained when all its samples were handed out. Each list is sorted and
    disjoint; together they hold at most `REPORT_BLOCKS_MAX` blocks.
    """

    trained: BlockRanges = ()
    """Whose work is in this contribution, or in an earlier one that is not wholly inside yet."""
    begun: BlockRanges = ()
    """Of which some samples were handed out."""
    held: BlockRanges = ()
    """Which it goes on with: its own if nobody has them."""
    final: bool = False
    """It leaves: what it has begun, and what does not get inside now, is for others."""
    left: Annotated[tuple[PeerIdField, ...], Max(limits.ROSTER_MAX)] = ()
    """Peers that said goodbye to it, and whose blocks may go to others."""

    def __post_init__(self) -> None:
        total = 0
        for ranges in (self.trained, self.begun, self.held):
            if any(a.stop > b.start for a, b in pairwise(ranges)):
                raise ValueError("ranges of blocks that overlap or are not in order")
            total += sum(r.stop - r.start for r in ranges)
        if total > limits.REPORT_BLOCKS_MAX:
            raise ValueError(f"a report of {total} blocks")


NO_BLOCKS: Final = BlockReport()


def to_wire(ranges: Ranges) -> tuple[BlockRange, ...]:
    return tuple(BlockRange(start, stop) for start, stop in ranges)


def from_wire(ranges: tuple[BlockRange, ...]) -> Ranges:
    return Ranges((r.start, r.stop) for r in ranges)
