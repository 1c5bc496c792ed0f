"""Which block this peer trains on next, and what it reports of its blocks: its side of the ledger.

It works on what it holds. With each contribution it says what it has trained and begun, what it
still holds, and which free blocks it would like to have next; the outcome makes these its own. Who
runs dry before that (a newcomer, a peer that got faster) goes on with its own extents' blocks:
first those that it has asked for, then from the far end, where others come last.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from protocols import limits
from protocols.blocks import BlockRange, BlockReport, to_wire
from protocols.ledger import Counted, Entry, Ledger
from protocols.ranges import Ranges
from protocols.sharding import Shares
from protocols.types import PeerId

HAND_BLOCKS_MIN: Final = 2
AVOID_ROUNDS: Final = 2  # the round in progress, and one more should it leave the donor out
HAND_ROUNDS: Final = 3  # a hand lasts until the outcome after next, should one round leave us out


class Worklist:
    """One peer's blocks. Touch it from one thread only, like its ledger."""

    def __init__(self, me: PeerId, ledger: Ledger) -> None:
        self.me = me
        self.ledger = ledger
        self.shares = Shares(ledger.run, me)
        self.leaving = False
        self.open: int | None = None
        """The block whose samples are being handed out."""
        self.in_flight = Ranges()
        """Trained here, and not known to be wholly inside."""
        self._queue = Ranges()
        self._claims = Ranges()
        self._avoid = (Ranges(), 0)
        self._begun = 0
        self._rebuild()

    def next(self) -> int | None:
        """Begin a block: its ordinal, or None where all within reach is somebody's."""
        if self.leaving:
            return None
        source = self._queue
        if not source:
            self._claims = self._claims - self.ledger.taken() - self._mine()
            source = self._claims
        first = next(iter(source), None)
        ordinal = first[0] if first is not None else self.ledger.spare(self.shares, self._busy())
        if ordinal is not None:
            source.remove(ordinal, ordinal + 1)
            self.open = ordinal
            self._begun += 1
        return ordinal

    def finished(self) -> None:
        """All samples of the open block were handed out."""
        if self.open is not None:
            self.in_flight.add(self.open, self.open + 1)
            self.open = None

    def leave(self) -> None:
        """Begin nothing more; the next reports hand back what is not trained."""
        self.leaving = True

    def report(self, number: int, left: Iterable[PeerId] = ()) -> BlockReport:
        """At the freeze for round `number`: what the contribution holds, and what this peer goes
        on with. It is `final` when nothing trained is left for a later one."""
        holder = self.ledger.holders.get(self.me)
        known = holder.touched if holder is not None else Ranges()
        room = limits.REPORT_BLOCKS_MAX - limits.LEASE_BLOCKS_MAX - 1
        trained = _limited(self.in_flight & known, self.in_flight - known, room)
        begun = Ranges([(self.open, self.open + 1)] if self.open is not None else [])
        held = Ranges()
        self._claims = Ranges()
        if not self.leaving:
            wanted = max(HAND_BLOCKS_MIN, HAND_ROUNDS * self._begun)
            leases = self._held()
            wanted = min(wanted, limits.LEASE_BLOCKS_MAX)
            besides = self._busy() | leases
            claims = self.ledger.choose(self.shares, max(0, wanted - len(leases)), besides)
            held = _limited(leases, claims, limits.LEASE_BLOCKS_MAX)
            self._claims = self._own(held & claims)
        self._begun = 0
        gone = tuple(sorted(p for p in left if p in self.ledger.holders))[: limits.ROSTER_MAX]
        final = self.leaving and self.ledger.finishes(self.me, number, trained)
        return BlockReport(to_wire(trained), to_wire(begun), to_wire(held), final, gone)

    def apply(self, number: int, entries: Iterable[Entry]) -> Counted:
        """An outcome was applied: what it changed."""
        counted = self.ledger.apply(number, entries)
        for blocks in (counted.trained.get(self.me, ()), counted.repeated.get(self.me, ())):
            for piece in blocks:
                self.in_flight.remove(*piece)
        avoid, rounds = self._avoid
        self._avoid = (avoid, rounds - 1) if rounds > 1 else (Ranges(), 0)
        self._rebuild()
        return counted

    def at_work(self) -> tuple[BlockRange, ...]:
        """What this peer trains on that no outcome tells yet: so a newcomer can keep off."""
        return to_wire(_limited(self._mine(), self._claims, limits.REPORT_BLOCKS_MAX))

    def adopt(self, ledger: Ledger, avoid: Ranges | None = None) -> None:
        """Take a donor's ledger; what was trained here stays in flight.

        `avoid`: what the donor is at, until the outcomes say who holds what.
        """
        self.ledger = ledger
        self._avoid = (avoid or Ranges(), AVOID_ROUNDS)
        self._claims = Ranges()
        self._rebuild()

    def drop(self) -> None:
        """The local work is gone: what was in flight is trained again."""
        self.in_flight = Ranges()
        self.open = None
        self._claims = Ranges()
        self._rebuild()

    def share(self, shares: Shares) -> None:
        """The network looks otherwise now."""
        self.shares = shares

    def _busy(self) -> Ranges:
        """What is not to be begun, beside what the ledger knows."""
        return self._mine() | self._avoid[0]

    def _mine(self) -> Ranges:
        mine = self.in_flight.copy()
        if self.open is not None:
            mine.add(self.open, self.open + 1)
        return mine

    def _own(self, ranges: Ranges) -> Ranges:
        """The part that lies in this peer's own extents."""
        size = self.ledger.extent
        found = Ranges()
        for start, stop in ranges:
            for extent in range(start // size, -(-stop // size)):
                if self.shares.owner(extent) == self.me:
                    found.add(max(start, extent * size), min(stop, (extent + 1) * size))
        return found

    def _rebuild(self) -> None:
        leases = self.ledger.leases_of(self.me)
        if self.open is not None:
            theirs = self.open in self.ledger.taken() and self.open not in leases
            if theirs or self.open < self.ledger.floor:
                self.open = None  # somebody else has it, or had it: theirs counts
        self._queue = self._held()

    def _held(self) -> Ranges:
        """What we hold and have not begun in this life. What an earlier life has begun is not
        gone on with: nobody could tell its work from ours, so it is given up first."""
        holder = self.ledger.holders.get(self.me)
        return holder.leases - holder.touched - self._mine() if holder is not None else Ranges()


def _limited(first: Ranges, then: Ranges, blocks_max: int) -> Ranges:
    """As much of two disjoint sets as a report may hold; `first` goes first."""
    chosen = Ranges()
    for part in (first, then):
        for start, stop in part:
            stop = min(stop, start + blocks_max - len(chosen))
            if start >= stop:
                return chosen
            chosen.add(start, stop)
            if chosen.pieces > limits.REPORT_RANGES_MAX:
                chosen.remove(start, stop)
                return chosen
    return chosen
