"""The ways of one round in a group of several regions: through whom, and what a collector does.

A member brings its part of a span to its region's collector, or to the aggregator itself where
there is none, or where the collector fails or has closed its sum. A collector closes its sum when
all its live neighbours have answered, or most have and the others are late by what is usual, and
brings it to the aggregator; an outcome that it gets it hands on to its neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from protocols.arrivals import Arrivals
from protocols.errors import RemoteProtocolError
from protocols.events import Effect, SendPartial
from protocols.messages import ContributionHeader, PartialHeader, Plan
from protocols.regions import collectors_of
from protocols.types import PeerId

GATHER_SHARE: Final = 0.5  # of the time in which contributions are collected; then the sum crosses
RETRY_S: Final = 0.4
TRIES_MAX: Final = 4


@dataclass(slots=True)
class _Sum:
    """A span that we collect for our region."""

    answered: set[PeerId] = field(default_factory=set)
    delays_s: list[float] = field(default_factory=list)
    closed: bool = False
    at_s: float = math.inf
    """When to bring it (again)."""
    tries: int = 0


class Collecting:
    """Part of a `Round`, which owns the clock's marks and the outcomes."""

    def __init__(self, me: PeerId, plan: Plan, arrivals: Arrivals) -> None:
        """`arrivals`: what earlier rounds say about our neighbours' delays."""
        self._me = me
        self._arrivals = arrivals
        self._sums: dict[int, _Sum] = {}
        self._ever: list[set[PeerId]] = [set() for _ in plan.spans]
        """Who was a collector of each span under any plan of this round."""
        self._summed: list[set[int]] = [set() for _ in plan.spans]
        """Regions whose sum we have, if we aggregate."""
        self._fit(plan)

    def _fit(self, plan: Plan) -> None:
        self._plan = plan
        self._collectors = collectors_of(plan)
        self._region = {seat.peer: seat.region for seat in plan.roster}
        for ever, now in zip(self._ever, self._collectors, strict=True):
            ever.update(now.values())

    def revise(self, plan: Plan, now_s: float) -> list[int]:
        """Another plan for the same round; the spans whose sums are no longer ours to make. What
        is closed goes to the aggregator of now."""
        before = self._plan
        self._fit(plan)
        gone = [i for i in self._sums if not self.collects(i)]
        for i in gone:
            del self._sums[i]
        for i, span in enumerate(plan.spans):
            if span.aggregator != before.spans[i].aggregator:
                self._summed[i].clear()
                if (found := self._sums.get(i)) is not None and found.closed:
                    found.at_s, found.tries = now_s, 0
        return gone

    # ── ways ─────────────────────────────────────────────────────────────────────────────
    def way(self, i: int) -> PeerId:
        """Who takes our part of span `i`."""
        aggregator = self._plan.spans[i].aggregator
        return self._collectors[i].get(self._region.get(self._me, -1), aggregator)

    def collects(self, i: int) -> bool:
        """Whether we collect span `i` for our region."""
        return (
            bool(self._collectors[i]) and self.way(i) == self._me != self._plan.spans[i].aggregator
        )

    def receivers(self, i: int, lost: set[PeerId]) -> list[PeerId]:
        """To whom we bring span `i`'s outcome: as its aggregator our own region and the others'
        collectors, or whole regions whose collectors are among the `lost`; as a collector our
        neighbours; as anybody else nobody."""
        collectors = self._collectors[i]
        if self._plan.spans[i].aggregator == self._me:
            return [
                peer
                for peer in self._plan.peers
                if peer != self._me
                and (
                    (hand := collectors.get(self._region[peer])) is None
                    or hand == peer
                    or hand in lost
                )
            ]
        return self._neighbours() if self.collects(i) else []

    def brings(self, sender: PeerId, i: int) -> bool:
        """Whether `sender` may bring us span `i`'s outcome."""
        region = self._region.get(self._me, -1)
        return sender in (self._plan.spans[i].aggregator, self._collectors[i].get(region))

    def unheard(self, i: int, waiting: list[PeerId]) -> bool:
        """Whether some of those for whom span `i`'s aggregator waits are in a region whose sum has
        yet to come: that takes as long as the lines between regions need."""
        return any(
            self._region.get(peer) in self._collectors[i]
            and self._region[peer] not in self._summed[i]
            for peer in waiting
        )

    def _neighbours(self) -> list[PeerId]:
        region = self._region.get(self._me)
        return [p for p, r in self._region.items() if r == region and p != self._me]

    # ── what comes in ────────────────────────────────────────────────────────────────────
    def check_offer(self, sender: PeerId, header: ContributionHeader) -> None:
        """Whether we take a neighbour's part of a span that we collect.

        Raises:
            RemoteProtocolError: it is none of our region, or the sum is closed.
        """
        if self._region.get(sender) != self._region.get(self._me):
            raise RemoteProtocolError(sender, f"span {header.span} is not ours to collect for it")
        if header.loans:
            raise RemoteProtocolError(sender, "mixes with other groups are not to be summed up")
        found = self._sums.get(header.span)
        if found is not None and found.closed:
            raise RemoteProtocolError(sender, f"the sum of span {header.span} is closed")

    def check_partial(self, sender: PeerId, header: PartialHeader) -> None:
        """Whether `sender` may bring its region's sum of a span, whose bounds and epoch are right.

        Raises:
            RemoteProtocolError: it is no collector, or names others than its neighbours.
        """
        if sender not in self._ever[header.span]:
            raise RemoteProtocolError(sender, f"does not collect span {header.span}")
        region = self._region.get(sender)
        told = {c.peer for c in header.contributors} | set(header.answered)
        if any(self._region.get(peer) != region for peer in told):
            raise RemoteProtocolError(sender, "sums up others than its region's members")

    def summed(self, sender: PeerId, i: int) -> None:
        """Its region's sum of span `i` is here."""
        if (region := self._region.get(sender)) is not None:
            self._summed[i].add(region)

    def folded(self, sender: PeerId, i: int, delay_s: float) -> None:
        """A neighbour's part of a span that we collect is whole."""
        found = self._sums.setdefault(i, _Sum())
        if sender != self._me and sender not in found.answered:
            found.delays_s.append(delay_s)
        found.answered.add(sender)

    # ── time ─────────────────────────────────────────────────────────────────────────────
    def deadline_s(self, i: int, due_s: float, collect_s: float, suspected: set[PeerId]) -> float:
        """When `tick` has something to do for span `i`, which we collect."""
        found = self._sums.get(i)
        if found is not None and found.closed:
            return found.at_s
        if not self._waiting(found, suspected):
            return -math.inf
        return self._closes_s(found, due_s, collect_s, suspected)

    def tick(
        self, i: int, now_s: float, due_s: float, collect_s: float, suspected: set[PeerId]
    ) -> list[Effect]:
        """Close the sum when it is time to, and bring it to the aggregator."""
        found = self._sums.setdefault(i, _Sum())
        if not found.closed:
            waiting = self._waiting(found, suspected)
            if waiting and now_s < self._closes_s(found, due_s, collect_s, suspected):
                return []
            self._arrivals.closed(found.delays_s, len(waiting))
            found.closed, found.at_s = True, now_s
        if now_s < found.at_s:
            return []
        found.at_s = math.inf
        found.tries += 1
        span = self._plan.spans[i]
        return [SendPartial(self._plan, i, span.aggregator, tuple(sorted(found.answered)))]

    def _waiting(self, found: _Sum | None, suspected: set[PeerId]) -> list[PeerId]:
        answered = found.answered if found is not None else set()
        return [
            p for p in (*self._neighbours(), self._me)
            if p not in answered and (p not in suspected or p == self._me)
        ]  # fmt: skip

    def _closes_s(
        self, found: _Sum | None, due_s: float, collect_s: float, suspected: set[PeerId]
    ) -> float:
        most_s = GATHER_SHARE * (collect_s - due_s)
        live = [p for p in (*self._neighbours(), self._me) if p not in suspected or p == self._me]
        if found is None or 2 * len(found.answered.intersection(live)) <= len(live):
            return due_s + most_s
        return due_s + self._arrivals.patience_s(most_s, found.delays_s)

    def delivered(self, peer: PeerId, i: int) -> None:
        found = self._sums.get(i)
        if found is not None and self._plan.spans[i].aggregator == peer:
            found.at_s = math.inf

    def undelivered(self, peer: PeerId, i: int, refused: bool, now_s: float) -> None:
        found = self._sums.get(i)
        if found is None or self._plan.spans[i].aggregator != peer or refused:
            return
        if found.tries < TRIES_MAX:
            found.at_s = now_s + RETRY_S * 2 ** (found.tries - 1)
