"""Coordinates foretell round trips, settle, and cannot be thrown out of the network."""

from __future__ import annotations

import math
import random
from statistics import median

import pytest

from protocols import limits
from protocols.coordinates import (
    ERROR_MIN,
    HEIGHT_S_MIN,
    Coordinate,
    RoundTrip,
    distance_s,
    fit,
    update,
)
from protocols.types import PeerId
from tests.protocols.samples import coordinate

BOUND_S = limits.COORDINATE_S_MAX


def peer(index: int) -> PeerId:
    return PeerId(f"p{index}")


def world(rng: random.Random, count: int) -> list[list[float]]:
    """True round trips between peers on a map of 150 ms with access delays of up to 10 ms."""
    points = [(rng.uniform(0, 0.15), rng.uniform(0, 0.15)) for _ in range(count)]
    access_s = [rng.uniform(0.0005, 0.01) for _ in range(count)]
    return [
        [math.dist(a, b) + access_s[i] + access_s[j] for j, b in enumerate(points)]
        for i, a in enumerate(points)
    ]


def errors(rtt_s: list[list[float]], at: list[Coordinate]) -> list[float]:
    return [
        abs(distance_s(at[i], at[j]) - rtt_s[i][j]) / rtt_s[i][j]
        for i in range(len(at))
        for j in range(i)
    ]


def test_peers_that_call_each_other_learn_to_foretell_round_trips_never_measured() -> None:
    for seed in range(5):
        rng = random.Random(seed)
        count = 40
        rtt_s = world(rng, count)
        at = [Coordinate() for _ in range(count)]
        known = [rng.sample([j for j in range(count) if j != i], 12) for i in range(count)]
        for _ in range(400):
            for i in range(count):
                j = rng.choice(known[i])
                noisy_s = rtt_s[i][j] * rng.uniform(1.0, 1.1)
                at[i] = update(peer(i), at[i], RoundTrip(peer(j), noisy_s, at[j]))
        assert median(errors(rtt_s, at)) < 0.12, f"seed {seed}"
        assert max(c.error for c in at) < 0.5, f"seed {seed}"


def test_a_newcomer_finds_its_place_from_a_few_round_trips() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        true = [
            Coordinate(rng.uniform(0, 0.1), rng.uniform(0, 0.1), rng.uniform(0, 0.1), 0.002, 0.05)
            for _ in range(40)
        ]
        mine = Coordinate(0.03, 0.05, 0.07, 0.004)
        trips = [
            RoundTrip(peer(i), distance_s(mine, c) * rng.uniform(1.0, 1.05), c)
            for i, c in enumerate(true[:16])
        ]
        found = fit(peer(99), Coordinate(), trips)
        unseen = [abs(distance_s(found, c) - distance_s(mine, c)) for c in true[16:]]
        assert median(unseen) < 0.008, f"seed {seed}: {median(unseen)}"
        assert found.error < 0.5


def test_one_round_trip_does_not_make_a_newcomer_sure() -> None:
    trip = RoundTrip(peer(1), 0.01, Coordinate(error=0.02))
    assert fit(peer(0), Coordinate(), [trip]).error >= 0.5
    assert fit(peer(0), Coordinate(0.1), []) == Coordinate(0.1)


def test_two_at_the_same_place_part_in_the_same_direction_every_time() -> None:
    here = Coordinate()
    trip = RoundTrip(peer(1), 0.05, here)
    moved = update(peer(0), here, trip)
    assert moved == update(peer(0), here, trip)
    assert distance_s(moved, here) > distance_s(here, here)
    other = update(peer(1), here, RoundTrip(peer(0), 0.05, here))
    assert (moved.x_s, moved.y_s) != (other.x_s, other.y_s)


@pytest.mark.parametrize("rtt_s", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_what_is_no_round_trip_changes_nothing(rtt_s: float) -> None:
    here = Coordinate(0.1, 0.2, 0.3, 0.01, 0.5)
    assert update(peer(0), here, RoundTrip(peer(1), rtt_s, Coordinate())) == here


@pytest.mark.parametrize(
    "wrong",
    [
        {"x_s": math.nan}, {"y_s": math.inf}, {"z_s": -BOUND_S * 1.01}, {"height_s": -1e-9},
        {"height_s": math.nan}, {"error": 1.01}, {"error": -0.1}, {"error": math.nan},
    ],
)  # fmt: skip
def test_an_impossible_coordinate_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="coordinate"):
        Coordinate(**wrong)


def test_whatever_strangers_claim_a_coordinate_stays_one() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        here = Coordinate()
        for i in range(60):
            trip = RoundTrip(
                peer(i), rng.choice([1e-9, 0.001, 0.2, 1e9, rng.random()]), coordinate(rng)
            )
            here = update(peer(0), here, trip)  # its own checks would raise
        assert here.height_s >= HEIGHT_S_MIN
        assert here.error >= ERROR_MIN


def test_one_liar_among_honest_neighbours_moves_a_peer_only_a_little() -> None:
    rng = random.Random(1)
    honest = [
        Coordinate(rng.uniform(0, 0.1), rng.uniform(0, 0.1), rng.uniform(0, 0.1), 0.002, 0.1)
        for _ in range(12)
    ]
    truth = Coordinate(0.05, 0.05, 0.05, 0.002, 0.1)
    here = truth
    for step in range(600):
        index = step % 13
        if index == 12:  # claims to be sure, far away, and close by
            trip = RoundTrip(peer(12), 0.001, Coordinate(-1.0, 1.0, -1.0, 0.0, 0.0))
        else:
            trip = RoundTrip(peer(index), distance_s(truth, honest[index]), honest[index])
        here = update(peer(0), here, trip)
    drift_s = math.dist((here.x_s, here.y_s, here.z_s), (0.05, 0.05, 0.05))
    assert drift_s < 0.1, "its claims are 1.7 s apart from what is measured"
