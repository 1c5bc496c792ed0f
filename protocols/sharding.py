"""Who trains on which block of the data: rendezvous hashing, so nobody has to hand out work.

The blocks of all epochs stand in one row (see `blocks`), cut into *extents*. An extent belongs to
the group with the highest score for it, weighted by members, and there to the member with the
highest. Every peer computes the same from the same lists of peers; a peer that comes or goes moves
only its own share. Ownership is a wish, not a right: the ledger says who holds what.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Final

from protocols.types import GroupName, PeerId, RunId

EXTENT_BLOCKS_MAX: Final = 64  # a report names a few ranges; a small data set still has 32 extents
_NO_GROUP: Final = GroupName("")
_STRIDE: Final = 0.6180339887498949  # the golden ratio spreads neighbours best


def extent_blocks(blocks: int) -> int:
    """How many blocks make an extent."""
    return max(1, min(EXTENT_BLOCKS_MAX, blocks // 32))


def block_of(run: RunId, blocks: int, ordinal: int) -> tuple[int, int]:
    """The (epoch, block) that stands at `ordinal`: a different order in every epoch.

    The order is position -> (position x stride + shift) mod blocks, with a stride that shares no
    divisor with `blocks` (so each block comes exactly once): neighbours in the row are far apart
    in the text, and a range of ordinals is spread all over it.
    """
    epoch, position = divmod(ordinal, blocks)
    raw = hashlib.sha256(f"{run}/order/{epoch}".encode()).digest()
    shift = int.from_bytes(raw[:8], "big") % blocks
    jitter = int.from_bytes(raw[8:12], "big") / 2**32
    stride = int(blocks * (_STRIDE + 0.1 * (jitter - 0.5))) % blocks or 1
    while math.gcd(stride, blocks) != 1:
        stride = stride % blocks + 1
    return epoch, (position * stride + shift) % blocks


def score(run: RunId, extent: int, name: str, weight: int = 1) -> float:
    """Of a peer or a group for an extent: the highest has it. -w / ln(u), as in elections."""
    raw = hashlib.sha256(f"{run}/{extent}/{name}".encode()).digest()
    u = ((int.from_bytes(raw[:8], "big") >> 12) + 0.5) / 2**52
    return -weight / math.log(u)


class Shares:
    """Whose extents are whose, as one peer sees the network now."""

    def __init__(
        self,
        run: RunId,
        me: PeerId,
        mates: Iterable[PeerId] = (),
        group: GroupName = _NO_GROUP,
        elsewhere: Mapping[GroupName, int] | None = None,
    ) -> None:
        """`mates`: the group's members; `elsewhere`: the other groups, and how many are in each."""
        self.run = run
        self.me = me
        self.mates = tuple(sorted({me, *mates}))
        self.group = group
        self.elsewhere = dict(sorted((elsewhere or {}).items()))
        self._owners: dict[int, PeerId | None] = {}
        self._surest: tuple[int, int, list[int]] = (0, 0, [])

    def same_as(self, other: Shares) -> bool:
        return (self.mates, self.group, self.elsewhere) == (
            other.mates, other.group, other.elsewhere,
        )  # fmt: skip

    def owner(self, extent: int) -> PeerId | None:
        """The member of our group whose extent this is; None if it is another group's."""
        if extent not in self._owners:
            if len(self._owners) >= 2**17:
                self._owners.clear()
            self._owners[extent] = self._find(extent)
        return self._owners[extent]

    def surest(self, first: int, stop: int) -> list[int]:
        """Our own extents among first..stop-1, those with the highest scores first."""
        if self._surest[:2] != (first, stop):
            mine = [x for x in range(first, stop) if self.owner(x) == self.me]
            mine.sort(key=lambda x: -score(self.run, x, self.me))
            self._surest = (first, stop, mine)
        return self._surest[2]

    def _find(self, extent: int) -> PeerId | None:
        if self.elsewhere:
            ours = (score(self.run, extent, f"group/{self.group}", len(self.mates)), self.group)
            for group, members in self.elsewhere.items():
                if (score(self.run, extent, f"group/{group}", members), group) > ours:
                    return None
        return max(self.mates, key=lambda peer: (score(self.run, extent, peer), peer))
