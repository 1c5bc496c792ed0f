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
FIT_SWEEPS: Final = 60  # a newcomer's passes over its first round trips; 16 of them take 10 ms
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
    return _flat_s(one, other) + one.height_s + other.height_s


def _flat_s(one: Coordinate, other: Coordinate) -> float:
    return math.hypot(one.x_s - other.x_s, one.y_s - other.y_s, one.z_s - other.z_s)


def update(me: PeerId, mine: Coordinate, trip: RoundTrip) -> Coordinate:
    """`mine` after one more round trip: the paper's figure 3 with heights.

    A round trip that is no positive number changes nothing; one beyond `RTT_S_MAX` counts as that.
    """
    if not (math.isfinite(trip.rtt_s) and trip.rtt_s > 0):
        return mine
    rtt_s = min(max(trip.rtt_s, RTT_S_MIN), limits.RTT_S_MAX)
    theirs = trip.coordinate
    their_error = max(theirs.error, ERROR_MIN)
    share = mine.error / (mine.error + their_error) if mine.error > 0 else 0.0
    predicted_s = distance_s(mine, theirs)
    wrong = min(1.0, abs(predicted_s - rtt_s) / rtt_s)
    error = wrong * GAIN * share + mine.error * (1 - GAIN * share)
    step_s = GAIN * share * (rtt_s - predicted_s)
    most_s = STEP_S_MAX * mine.error
    step_s = min(max(step_s, -most_s), most_s)
    flat_s = _flat_s(mine, theirs)
    if flat_s > 0:
        axis = [(a - b) / flat_s for a, b in _axes(mine, theirs)]
    else:
        axis = _direction(me, trip.peer)
    # A unit vector of the height model: the flat part points away, heights always add.
    length_s = flat_s + mine.height_s + theirs.height_s
    lean = flat_s / length_s if flat_s > 0 else 1.0
    rise = (mine.height_s + theirs.height_s) / length_s
    x_s, y_s, z_s = (
        _bounded(old + step_s * lean * part)
        for old, part in zip((mine.x_s, mine.y_s, mine.z_s), axis, strict=True)
    )
    height_s = min(max(mine.height_s + step_s * rise, HEIGHT_S_MIN), limits.COORDINATE_S_MAX)
    return Coordinate(x_s, y_s, z_s, height_s, min(max(error, ERROR_MIN), 1.0))


def fit(me: PeerId, start: Coordinate, trips: Sequence[RoundTrip]) -> Coordinate:
    """Where a newcomer stands: its first round trips again and again, until they agree.

    Without it a peer would spend minutes at places where it is not, and call on the wrong
    neighbours. The error that comes out is at least one part in as many as there are samples.
    """
    if not trips:
        return start
    found = start
    for _ in range(FIT_SWEEPS):
        for trip in trips:
            found = update(me, found, trip)
    # Repeating a few samples proves nothing; with few of them the point is not determined.
    error = max(found.error, 1.0 / (1 + len(trips)))
    return Coordinate(found.x_s, found.y_s, found.z_s, found.height_s, error)


def _axes(one: Coordinate, other: Coordinate) -> list[tuple[float, float]]:
    return [(one.x_s, other.x_s), (one.y_s, other.y_s), (one.z_s, other.z_s)]


def _bounded(value_s: float) -> float:
    return min(max(value_s, -limits.COORDINATE_S_MAX), limits.COORDINATE_S_MAX)


def _direction(me: PeerId, other: PeerId) -> list[float]:
    """A direction for two peers at the same place: as good as random, and the same every time."""
    raw = hashlib.sha256(f"{me}\x00{other}".encode()).digest()
    parts = [int.from_bytes(raw[i : i + 4], "big") / 2**31 - 1 for i in (0, 4, 8)]
    length = math.hypot(*parts) or 1.0
    return [part / length for part in parts]
