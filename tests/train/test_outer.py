"""Outer optimisers against their formulas, and why the momentum waits in asynchronous runs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from peer.train.dylu import FORGET_ROUNDS, Speeds, local_steps
from peer.train.outer import DelayedNesterov, Nesterov, Outer
from protocols import limits
from protocols.types import PeerId

Float32 = npt.NDArray[np.float32]
A, B, C = (PeerId(name) for name in "abc")


def drive(outer: Outer, means: list[Float32]) -> Float32:
    """theta after these means, in units of four values."""
    theta = np.ones_like(means[0])
    for mean in means:
        for unit, start in enumerate(range(0, len(theta), 4)):
            where = slice(start, min(start + 4, len(theta)))
            outer.step(unit, where, theta[where], mean[where].copy())
    return theta


def draws(count: int, size: int = 10) -> list[Float32]:
    rng = np.random.default_rng(3)
    return [rng.normal(size=size).astype(np.float32) for _ in range(count)]


def test_nesterov_is_its_formula() -> None:
    means = draws(7)
    theta, m = np.ones(10), np.zeros(10)
    for mean in means:
        m = 0.9 * m + mean
        theta = theta - 0.7 * (mean + 0.9 * m)
    assert np.allclose(drive(Nesterov(10, 4, 0.7, 0.9), means), theta, atol=1e-5)


@pytest.mark.parametrize("delay", [1, 2, 3, 5])
def test_delayed_nesterov_is_algorithm_3(delay: int) -> None:
    """arXiv 2401.09135 with c = 0, written down as it stands there."""
    means = draws(13)
    theta, m, buffer = np.ones(10), np.zeros(10), np.zeros(10)
    for t, g in enumerate(means):
        buffer = buffer + g
        if (t + 1) % delay == 0:
            m = 0.9 * m + buffer / delay
            theta = theta - 0.7 * (0.9 * m + g / delay)
            buffer = np.zeros(10)
        else:
            theta = theta - 0.7 * g / delay
    made = DelayedNesterov(10, 3, 4, 0.7, 0.9, delay)
    assert np.allclose(drive(made, means), theta, atol=1e-5)
    assert np.allclose(made.arrays["momentum"], m, atol=1e-5)
    assert set(made.arrays["seen"]) == {13 % delay}


def test_without_delay_it_is_nesterov() -> None:
    means = draws(9)
    late = drive(DelayedNesterov(10, 3, 4, 0.4, 0.8, 1), means)
    assert np.allclose(late, drive(Nesterov(10, 4, 0.4, 0.8), means), atol=1e-5)


def test_a_unit_that_was_left_out_keeps_its_own_count() -> None:
    made = DelayedNesterov(8, 2, 4, 0.5, 0.9, 2)
    theta = np.zeros(8, np.float32)
    for turn, unit in enumerate([0, 0, 0, 1]):
        where = slice(4 * unit, 4 * unit + 4)
        made.step(unit, where, theta[where], np.full(4, turn, np.float32))
    assert made.arrays["seen"].tolist() == [1.0, 1.0]
    assert not made.arrays["momentum"][4:].any()
    assert made.arrays["momentum"][:4].any()


# ── local steps ──────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("speed", "speed_max", "expected"),
    [(10.0, 10.0, 50), (5.0, 10.0, 25), (1.0, 10.0, 5), (3.3, 10.0, 16), (0.01, 10.0, 1)],
)
def test_local_steps_are_in_proportion_to_speed(
    speed: float, speed_max: float, expected: int
) -> None:
    assert local_steps(speed, speed_max, 50) == expected


def test_who_was_not_measured_yet_does_what_the_fastest_does() -> None:
    assert local_steps(0.0, 0.0, 50) == 50
    assert Speeds().steps(A, 50) == 50


def test_speeds_come_from_outcomes_alone() -> None:
    """One contributes 1,000 tokens in each round, the other 500 every fifth: ten times slower."""
    speeds = Speeds()
    for number in range(20):
        weights = {A: 1000.0}
        if number % 5 == 0:
            weights[B] = 500.0
        speeds.applied(number, weights)
    assert speeds.steps(A, 50) == 50
    assert speeds.steps(B, 50) == 5
    speeds.applied(20 + FORGET_ROUNDS, {B: 500.0})
    assert speeds.steps(B, 50) == 50, "the fast one is gone"


def test_the_table_of_speeds_is_bounded() -> None:
    speeds = Speeds()
    for number in range(100):
        speeds.applied(number, {PeerId(f"p{number}-{i}"): 1.0 for i in range(8)})
    assert len(speeds._latest) <= limits.ROSTER_MAX


# ── why ──────────────────────────────────────────────────────────────────────────────────
def asynchronous(outer: Outer, seed: int, *, scale: float) -> float:
    """Distance from a quadratic's optimum, mean of the last 50 arrivals. Eight peers, tenfold apart
    in speed, arrive one by one; each worked on the theta of its last arrival."""
    rng = np.random.default_rng(seed)
    curvature = np.geomspace(0.02, 1.0, 12)
    theta = np.ones(12, np.float32)
    every = np.linspace(1, 10, 8).round().astype(int) * 2  # rounds from arrival to arrival
    held = [theta.copy() for _ in every]
    distances = []
    for now in range(1, 300):
        for worker in rng.permutation(8):
            if (now + worker) % every[worker]:
                continue
            x = held[worker].astype(np.float64)
            for _ in range(max(1, 20 // every[worker])):  # the slow do fewer steps
                x -= 0.3 * (curvature * x + 0.02 * rng.normal(size=12))
            mean = ((held[worker] - x) * scale).astype(np.float32)
            for unit, start in enumerate(range(0, 12, 4)):
                where = slice(start, start + 4)
                outer.step(unit, where, theta[where], mean[where].copy())
            held[worker] = theta.copy()
            distances.append(float(np.linalg.norm(theta * np.sqrt(curvature))))
    return float(np.mean(distances[-50:]))


def test_with_stale_arrivals_delayed_nesterov_beats_momentum_on_every_arrival() -> None:
    """Also where the other gets the same eighth of each step. (With much smaller inner steps, where
    nothing overshoots, momentum on every arrival is the quicker one.)"""
    for seed in range(3):
        delayed = asynchronous(DelayedNesterov(12, 3, 4, 0.7, 0.9, 8), seed, scale=1.0)
        naive = asynchronous(Nesterov(12, 4, 0.7, 0.9), seed, scale=1.0)
        gentle = asynchronous(Nesterov(12, 4, 0.7, 0.9), seed, scale=1 / 8)
        assert delayed < 0.05, f"seed {seed}"
        assert gentle > 5 * delayed, f"seed {seed}: {gentle} against {delayed}"
        assert naive > 1e3, f"seed {seed}: it runs away"
