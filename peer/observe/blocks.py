"""What the ledger counted in a round, as events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict

from peer.observe import events as ev
from protocols.ledger import Counted
from protocols.ranges import Range
from protocols.types import GroupName, PeerId


def blocks_told(group: GroupName, counted: Counted) -> Iterator[ev.Event]:
    """The round's account, and what a volunteer should hear of it."""
    yield ev.BlocksCounted(
        group=group,
        round=counted.round,
        by=_plain(counted.trained),
        again=_plain(counted.repeated),
        **asdict(counted.totals),
    )
    for taken in counted.reissued:
        yield ev.BlocksReissued(counted.round, taken.peer, list(taken.blocks), taken.reason)
    if counted.lost:
        yield ev.BlocksLost(counted.round, list(counted.lost))


def _plain(blocks: Mapping[PeerId, tuple[Range, ...]]) -> dict[str, list[Range]]:
    return {str(peer): list(ranges) for peer, ranges in blocks.items()}
