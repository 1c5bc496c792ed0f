"""This peer's own coordinate: fed by the round trips of calls, told to others when it has moved.

The tables of neighbours keep the smallest recent round trip of each (a busy machine inflates the
others); here at most one sample per neighbour and `SAMPLE_S` counts, so that a chatty one has no
more say than the rest. What others see is not the latest but a steady version: everybody's groups
are computed from it, and a trembling one would make them tremble.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import median
from typing import Final

from protocols import limits
from protocols.coordinates import FIT_ERROR, Coordinate, RoundTrip, distance_s, fit, update
from protocols.membership import Membership, Neighbour
from protocols.types import GroupName, PeerId

SAMPLE_S: Final = 5.0
FIT_S: Final = 1.0  # a newcomer's coordinate is fitted anew this often while samples come in ...
FIT_SHARE: Final = 1 / 12  # ... and, where it stays unsure, after so much of the time so far
FIT_PEERS_MAX: Final = 32
FIT_GROUP_MAX: Final = 4  # of one group, if we know others
FIT_WINDOW_S: Final = 240.0  # older round trips may be those of another place
LOST: Final = 0.4  # who is usually so far out, relatively, has been moved,
LOST_NEAR: Final = 1.0  # and who is so far out for
NEAREST: Final = 3  # those who answer quickest, too
NOISE_S: Final = 0.020  # by more than this, or it is a busy machine
NEAR_AGAIN_S: Final = 120.0  # between two round trips to the same near stranger
CHECK_S: Final = 15.0  # how often a settled coordinate is asked whether it is right at all
CHECK_MIN: Final = 6  # by so many round trips
SAMPLES_MIN: Final = 4  # three dimensions and a height are not determined by fewer ...
PLACE_WAIT_S: Final = 10.0  # ... but where there are fewer peers, it is not worth waiting
STEADY_S: Final = 0.003  # smaller moves are noise, and told to nobody
MOVED_S: Final = 0.010  # larger ones are told at once, but ...
TELL_S: Final = 10.0  # ... not more often than this


class Placing:
    """See the module. Pure: the machine calls it with what it measured."""

    def __init__(self, me: PeerId, members: Membership, now_s: float) -> None:
        self._me = me
        self._members = members
        self._started_s = now_s
        self._fitted_s = -math.inf
        self._checked_s = now_s
        self._told_s = -math.inf
        self._samples = 0
        self.placed_s = math.inf
        """When there first was something to tell."""
        self.latest = Coordinate()
        self.told: Coordinate | None = None
        """What others should see; None until there is something to say."""

    def measured(self, peer: PeerId, now_s: float) -> None:
        """A call to `peer` was answered; its round trip stands in the table."""
        known = self._members.get(peer)
        if known is None or now_s - known.sampled_s < SAMPLE_S:
            return
        trip = _trip(known)
        if trip is None:
            return
        known.sampled_s = now_s
        self._samples += 1
        if self.latest.error <= FIT_ERROR:
            self.latest = update(self._me, self.latest, trip)
            if now_s - self._checked_s >= CHECK_S:
                self._checked_s = now_s
                self._check(now_s)
        elif now_s - self._fitted_s >= max(FIT_S, FIT_SHARE * (now_s - self._started_s)):
            self._fitted_s = now_s
            self._fit(self._recent(now_s))

    def _check(self, now_s: float) -> None:
        """Begin anew where most of the predictions are wrong, or those of the nearest."""
        trips = self._recent(now_s)
        if len(trips) < CHECK_MIN:
            return
        off = []
        for t in trips:
            wrong_s = abs(distance_s(self.latest, t.coordinate) - t.rtt_s)
            off.append((t.rtt_s, wrong_s / t.rtt_s if wrong_s > NOISE_S else 0.0))
        nearest = [wrong for _, wrong in sorted(off)[:NEAREST]]
        if median(wrong for _, wrong in off) > LOST or median(nearest) > LOST_NEAR:
            self._fit(trips)

    def _fit(self, trips: list[RoundTrip]) -> None:
        """Fit, beginning where the nearest stands: far ones alone allow mirror images."""
        nearest = min(trips, key=lambda t: t.rtt_s, default=None)
        if nearest is not None:
            start = replace(nearest.coordinate, error=1.0)
            self.latest = fit(self._me, start, trips)

    def _recent(self, now_s: float) -> list[RoundTrip]:
        """The latest round trips, few of each group."""
        trips: list[RoundTrip] = []
        groups: dict[GroupName, int] = {}
        for known in sorted(self._members.everybody(), key=lambda n: -n.sampled_s):
            if now_s - known.sampled_s > FIT_WINDOW_S or len(trips) >= FIT_PEERS_MAX:
                break
            taken = groups.get(known.group, 0) if known.group else 0
            trip = _trip(known)
            if taken < FIT_GROUP_MAX and trip is not None:
                groups[known.group] = taken + 1
                trips.append(trip)
        return trips

    def news(self, now_s: float) -> bool:
        """Bring `told` up to date; True if others should hear of it soon."""
        if self.told is None:
            waited = now_s - self._started_s >= PLACE_WAIT_S
            if self._samples < SAMPLES_MIN and not waited:
                return False
            self.told, self._told_s, self.placed_s = self.latest, now_s, now_s
            return True
        moved_s = _moved_s(self.told, self.latest)
        surer = self.latest.error < self.told.error / 2
        if moved_s < STEADY_S and not surer:
            return False
        if now_s - self._told_s < TELL_S:
            return False
        self.told, self._told_s = self.latest, now_s
        return moved_s >= MOVED_S


def whom_to_measure(
    mine: Coordinate | None, strangers: Sequence[Neighbour], now_s: float, *, near: bool
) -> Neighbour | None:
    """Of `strangers` the one who was asked longest ago, or the nearest one not asked lately.

    Far ones hold the map together; near ones tell who has moved here that it has.
    """
    placed = [n for n in strangers if now_s - n.hailed_s > NEAR_AGAIN_S]
    if not near or mine is None or not placed:
        return min(strangers, key=lambda n: (n.hailed_s, n.record.peer), default=None)
    # What was measured of somebody's group says more than the coordinate of somebody lost.
    quickest: dict[GroupName, float] = {}
    for n in strangers:
        if n.group and n.rtt_s is not None and now_s - n.hailed_s <= FIT_WINDOW_S:
            quickest[n.group] = min(n.rtt_s, quickest.get(n.group, math.inf))

    def guess_s(n: Neighbour) -> float:
        at = n.record.coordinate
        by_map_s = distance_s(mine, at) if at is not None else math.inf
        return quickest.get(n.group, by_map_s)

    return min(placed, key=lambda n: (guess_s(n), n.record.peer))


def measured_s(
    known: Iterable[Neighbour], now_s: float, pause_s: float = 0.0
) -> dict[PeerId, float]:
    """Round trips to choose a group by: an old one may be that of another place. (Whom we never
    hailed answered our first hello just now.) `pause_s`: from one heartbeat to the next; one that
    is lost must not make a member a stranger."""
    fresh_s = max(limits.HEARTBEAT_S_MAX, 2 * pause_s)
    return {
        n.record.peer: n.rtt_s
        for n in known
        if n.rtt_s is not None and (n.hailed_s < 0 or now_s - n.hailed_s <= fresh_s)
    }


def _trip(known: Neighbour) -> RoundTrip | None:
    coordinate = known.record.coordinate
    if coordinate is None or known.rtt_s is None:
        return None
    return RoundTrip(known.record.peer, known.rtt_s, coordinate)


def _moved_s(one: Coordinate, other: Coordinate) -> float:
    flat_s = math.hypot(one.x_s - other.x_s, one.y_s - other.y_s, one.z_s - other.z_s)
    return flat_s + abs(one.height_s - other.height_s)
