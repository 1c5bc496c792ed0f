"""This peer's own coordinate: fed by the round trips of calls, told to others when it has moved.

The tables of neighbours keep the smallest recent round trip of each (a busy machine inflates the
others); here at most one sample per neighbour and `SAMPLE_S` counts, so that a chatty one has no
more say than the rest. What others see is not the latest but a steady version: everybody's groups
are computed from it, and a trembling one would make them tremble.
"""

from __future__ import annotations

import math
from typing import Final

from protocols.coordinates import FIT_ERROR, Coordinate, RoundTrip, fit, update
from protocols.membership import Membership, Neighbour
from protocols.types import PeerId

SAMPLE_S: Final = 5.0
FIT_S: Final = 1.0  # a newcomer's coordinate is fitted anew this often while samples come in ...
FIT_SHARE: Final = 1 / 12  # ... and, where it stays unsure, after so much of the time so far
FIT_PEERS_MAX: Final = 32
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
        elif now_s - self._fitted_s >= max(FIT_S, FIT_SHARE * (now_s - self._started_s)):
            self._fitted_s = now_s
            recent = sorted(self._members.everybody(), key=lambda n: -n.sampled_s)[:FIT_PEERS_MAX]
            trips = [t for n in recent if n.sampled_s > 0 and (t := _trip(n)) is not None]
            self.latest = fit(self._me, self.latest, trips)

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


def _trip(known: Neighbour) -> RoundTrip | None:
    coordinate = known.record.coordinate
    if coordinate is None or known.rtt_s is None:
        return None
    return RoundTrip(known.record.peer, known.rtt_s, coordinate)


def _moved_s(one: Coordinate, other: Coordinate) -> float:
    flat_s = math.hypot(one.x_s - other.x_s, one.y_s - other.y_s, one.z_s - other.z_s)
    return flat_s + abs(one.height_s - other.height_s)
