"""Where a peer stands in the network: Vivaldi coordinates from the round trips of its calls.

Every peer keeps a point in three dimensions and a height above it (what its own access line adds
to every round trip). The predicted round trip of two peers is the distance of their points plus
both heights. Each measured round trip moves the point a little towards where the prediction would
have been right; how far depends on how sure both sides are. Algorithm, constants and the height
model: Dabek, Cox, Kaashoek, Morris, "Vivaldi: A Decentralized Network Coordinate System", SIGCOMM
2004 (sections 3.3 and 5.4). What a stranger says of itself is bounded before it counts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from protocols import limits
from protocols.types import PeerId

GAIN: Final = 0.25  # the paper's c_c and c_e: a larger one learns faster and trembles more
HEIGHT_S_MIN: Final = 1e-4  # the smallest access delay; keeps two points from lying on each other
RTT_S_MIN: Final = 2e-4  # below this the machine is measured, not the network
ERROR_MIN: Final = 0.02  # nobody is surer than this: a claim of no error would fix us to a liar
STEP_S_MAX: Final = 0.1  # by one who knows nothing; who is settled moves by a part of that:
# one liar who claims to be far and near at once would else throw us by its whole distance
FIT_SWEEPS: Final = 60  # a newcomer's passes over its first round trips; 16 of them take 1 ms
FIT_STILL: Final = 2e-5  # a pass that changes less (in seconds, and of the error) is the last
FIT_ERROR: Final = 0.5  # above it a coordinate is still a newcomer's: fitted, not nudged


@dataclass(frozen=True, slots=True)
class Coordinate:
    """A point and a height, in seconds of round trip, and how wrong it usually is.

    Raises:
        ValueError: outside of what a coordinate can be.
    """

    x_s: float = 0.0
    y_s: float = 0.0
    z_s: float = 0.0
    height_s: float = HEIGHT_S_MIN
    error: float = 1.0
    """Moving average of the relative error of its predictions: 0 right, 1 knows nothing."""

    def __post_init__(self) -> None:
        # The comparisons are false for NaN, too.
        bound_s = limits.COORDINATE_S_MAX
        if not all(-bound_s <= v <= bound_s for v in (self.x_s, self.y_s, self.z_s)):
            raise ValueError(f"a coordinate beyond {bound_s:g} s")
        if not (0.0 <= self.height_s <= bound_s and 0.0 <= self.error <= 1.0):
            raise ValueError("a coordinate with an impossible height or error")


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """A measured round trip to a peer that says it stands at `coordinate`."""

    peer: PeerId
    rtt_s: float
    coordinate: Coordinate


def distance_s(one: Coordinate, other: Coordinate) -> float:
    """The predicted round trip."""
    flat_s = math.hypot(one.x_s - other.x_s, one.y_s - other.y_s, one.z_s - other.z_s)
    return flat_s + one.height_s + other.height_s


def update(me: PeerId, mine: Coordinate, trip: RoundTrip) -> Coordinate:
    """`mine` after one more round trip: the paper's figure 3 with heights.

    A round trip that is no positive number changes nothing; one beyond `RTT_S_MAX` counts as that.
    """
    if not (math.isfinite(trip.rtt_s) and trip.rtt_s > 0):
        return mine
    return Coordinate(*_nudged(me, _flat(mine), trip.peer, _rtt_s(trip), _flat(trip.coordinate)))


def fit(me: PeerId, start: Coordinate, trips: Sequence[RoundTrip]) -> Coordinate:
    """Where a newcomer stands: its first round trips again and again, until they agree.

    Without it a peer would spend minutes at places where it is not, and call on the wrong
    neighbours. The error that comes out is at least one part in as many as there are samples.
    """
    samples = [
        (trip.peer, _rtt_s(trip), _flat(trip.coordinate))
        for trip in trips
        if math.isfinite(trip.rtt_s) and trip.rtt_s > 0
    ]
    if not samples:
        return start
    found = _flat(start)
    for _ in range(FIT_SWEEPS):
        before = found
        for peer, rtt_s, theirs in samples:
            found = _nudged(me, found, peer, rtt_s, theirs)
        if max(abs(a - b) for a, b in zip(before, found, strict=True)) < FIT_STILL:
            break
    # Repeating a few samples proves nothing; with few of them the point is not determined.
    x_s, y_s, z_s, height_s, error = found
    return Coordinate(x_s, y_s, z_s, height_s, max(error, 1.0 / (1 + len(samples))))


Flat = tuple[float, float, float, float, float]
"""A coordinate's fields; a fit makes a thousand of them."""


def _flat(coordinate: Coordinate) -> Flat:
    c = coordinate
    return c.x_s, c.y_s, c.z_s, c.height_s, c.error


def _rtt_s(trip: RoundTrip) -> float:
    return min(max(trip.rtt_s, RTT_S_MIN), limits.RTT_S_MAX)


def _nudged(me: PeerId, mine: Flat, peer: PeerId, rtt_s: float, theirs: Flat) -> Flat:
    x_s, y_s, z_s, height_s, error = mine
    their_x_s, their_y_s, their_z_s, their_height_s, their_error = theirs
    dx_s, dy_s, dz_s = x_s - their_x_s, y_s - their_y_s, z_s - their_z_s
    flat_s = math.sqrt(dx_s * dx_s + dy_s * dy_s + dz_s * dz_s)
    heights_s = height_s + their_height_s
    length_s = flat_s + heights_s  # which is the predicted round trip
    share = error / (error + max(their_error, ERROR_MIN)) if error > 0 else 0.0
    gain = GAIN * share
    wrong = min(1.0, abs(length_s - rtt_s) / rtt_s)
    most_s = STEP_S_MAX * error
    step_s = min(max(gain * (rtt_s - length_s), -most_s), most_s)
    # A unit vector of the height model: the flat part points away, heights always add.
    if flat_s > 0:
        push = step_s / length_s
        dx_s, dy_s, dz_s = push * dx_s, push * dy_s, push * dz_s
    else:
        dx_s, dy_s, dz_s = (step_s * part for part in _direction(me, peer))
    bound_s = limits.COORDINATE_S_MAX
    rise_s = step_s * heights_s / length_s
    return (
        min(max(x_s + dx_s, -bound_s), bound_s),
        min(max(y_s + dy_s, -bound_s), bound_s),
        min(max(z_s + dz_s, -bound_s), bound_s),
        min(max(height_s + rise_s, HEIGHT_S_MIN), bound_s),
        min(max(wrong * gain + error * (1 - gain), ERROR_MIN), 1.0),
    )


def _direction(me: PeerId, other: PeerId) -> list[float]:
    """A direction for two peers at the same place: as good as random, and the same every time."""
    raw = hashlib.sha256(f"{me}\x00{other}".encode()).digest()
    parts = [int.from_bytes(raw[i : i + 4], "big") / 2**31 - 1 for i in (0, 4, 8)]
    length = math.hypot(*parts) or 1.0
    return [part / length for part in parts]
