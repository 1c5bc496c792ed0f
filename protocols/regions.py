"""Regions of a group: members with short ways between them, and long ones to everybody else.

A group usually lies in one place. Where it spans two continents (few peers, or a declared site that
is spread out) the ways between are long, and often thin. Then in each region one *collector* per
span adds up what its neighbours contribute, and one sum crosses instead of one contribution each;
the outcome comes back the same way, once per region. What leaves a region no longer grows with
the members in it.

Each member measures its ways to those it calls, and says in its heartbeats which are long; from
that the coordinator's plan says who lies in which region. Who collects follows from the plan, at
every peer alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final

from protocols.election import able_to_serve, candidates
from protocols.messages import REGIONS_MAX, Plan, Seat
from protocols.types import PeerId

FAR_S: Final = 0.03  # of round trip; less is the size of a continent
MEMBERS_MIN: Final = 2  # one alone has nobody to collect from


@dataclass(frozen=True, slots=True)
class Ways:
    """What a member measured of its ways to others, as bits over a plan's roster (bit i, least
    significant first: the i-th). In both masks 0: nothing yet. Empty masks: all are near."""

    near: bytes = b""
    far: bytes = b""

    def said(self, index: int) -> bool | None:
        """Whether the `index`-th is far; None: unknown."""
        if _bit(self.far, index):
            return True
        return False if _bit(self.near, index) else None


def ways_to(roster: Sequence[Seat], rtts_s: Mapping[PeerId, float]) -> Ways:
    """For a heartbeat: `rtts_s` of those whom we have measured."""
    near, far = bytearray((len(roster) + 7) // 8), bytearray((len(roster) + 7) // 8)
    for index, seat in enumerate(roster):
        rtt_s = rtts_s.get(seat.peer)
        if rtt_s is not None:
            (far if rtt_s >= FAR_S else near)[index // 8] |= 1 << (index % 8)
    return Ways(bytes(near), bytes(far)) if any(far) else Ways()


def with_regions(
    seats: Sequence[Seat], roster: Sequence[PeerId], told: Mapping[PeerId, Ways]
) -> tuple[Seat, ...]:
    """The same seats, each with its region; all in region 0 where there is but one. What is not
    known of a newcomer leaves all as it was: one word of each pair is enough.

    Clusters by single linkage at `FAR_S` (J. C. Gower, G. J. S. Ross, 1969): who is nearer than
    that to any member of a region is in it. `told`: each member's ways to the `roster`.
    """
    if any(seat.peer not in told for seat in seats):
        return tuple(seats)
    plain = tuple(replace(seat, region=0) if seat.region else seat for seat in seats)
    if len(seats) < 2 * MEMBERS_MIN or not any(ways.far for ways in told.values()):
        return plain
    index = {peer: i for i, peer in enumerate(roster)}
    peers = sorted(seat.peer for seat in seats)
    region = {peer: peer for peer in peers}

    def root(peer: PeerId) -> PeerId:
        while region[peer] != peer:
            region[peer] = region[region[peer]]
            peer = region[peer]
        return peer

    for a, b in combinations(peers, 2):
        pairs = ((a, b), (b, a))
        said = [told[one].said(index[other]) for one, other in pairs if other in index]
        if True in said:
            continue
        # Who knows of no long way at all has measured short ones, or nothing yet.
        if False in said or Ways() in (told[a], told[b]):
            first, second = sorted((root(a), root(b)))
            region[second] = first
        else:
            return tuple(seats)
    names = sorted({root(peer) for peer in peers})
    if not 1 < len(names) <= REGIONS_MAX:
        return plain
    return tuple(replace(seat, region=names.index(root(seat.peer))) for seat in plain)


def _bit(mask: bytes, index: int) -> bool:
    return index // 8 < len(mask) and bool(mask[index // 8] >> (index % 8) & 1)


def collectors_of(plan: Plan) -> tuple[dict[int, PeerId], ...]:
    """For each span: region -> who collects there. Not where the span's aggregator is: that is
    where everything goes anyway. Nobody where all are in one region.

    Rendezvous over the region's members that others can reach, if there are any, each taking a
    second span only when all of these have one.
    """
    members: dict[int, list[Seat]] = {}
    for seat in plan.roster:
        members.setdefault(seat.region, []).append(seat)
    found: tuple[dict[int, PeerId], ...] = tuple({} for _ in plan.spans)
    if len(members) < 2:
        return found
    home = {seat.peer: seat.region for seat in plan.roster}
    for region, seats in members.items():
        if len(seats) < MEMBERS_MIN:
            continue
        able = able_to_serve(seats)
        taken: set[PeerId] = set()
        for slot, span in enumerate(plan.spans):
            if home[span.aggregator] == region:
                continue
            order = candidates(plan.group, slot, able)
            if taken.issuperset(order):
                taken.clear()
            chosen = next(peer for peer in order if peer not in taken)
            taken.add(chosen)
            found[slot][region] = chosen
    return found
