"""Adam's memory follows the factors, or is given up where they have turned away."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from peer.finetune.changes import LowRank
from peer.finetune.moments import Adam, Carried, Moments, carry_moments
from tests.finetune.drawn import apart, pair

M, R, N = 20, 4, 15
Float64 = npt.NDArray[np.float64]


def _history(factors: LowRank, gradients: list[Float64], adam: Adam) -> tuple[Moments, Moments]:
    """Adam's moments after these gradients of the layer (m, n)."""
    of = [[np.zeros(f.shape), np.zeros(f.shape)] for f in (factors.A, factors.B)]
    for G in gradients:
        slopes = (factors.scale * factors.B.T @ G, factors.scale * G @ factors.A.T)
        for held, slope in zip(of, slopes, strict=True):
            held[0] = adam.beta1 * held[0] + (1 - adam.beta1) * slope
            held[1] = adam.beta2 * held[1] + (1 - adam.beta2) * slope**2
    return Moments(*of[0]), Moments(*of[1])


def _gradients(seed: int, steps: int, noise: float) -> list[Float64]:
    rng = np.random.default_rng(seed)
    steady = rng.standard_normal((M, N))
    return [steady + noise * rng.standard_normal((M, N)) for _ in range(steps)]


def _regauged(before: LowRank, gauge: Float64, scale: float) -> LowRank:
    """The same product."""
    ratio = before.scale / scale
    return LowRank(gauge @ before.A, ratio * before.B @ np.linalg.inv(gauge), scale)


def _check(carried: Carried, expected: tuple[Moments, Moments], tolerance: float) -> None:
    for got, want in zip((carried.A, carried.B), expected, strict=True):
        assert apart(got.mean, np.asarray(want.mean)) <= 1e-9
        assert apart(got.square, np.asarray(want.square)) <= tolerance
        assert (got.square >= 0).all()


@pytest.mark.parametrize("scale", [2.0, 0.5])
def test_renamed_ranks_carry_their_moments_exactly(scale: float) -> None:
    rng = np.random.default_rng(0)
    before = pair(rng, M, R, N, 8.0)
    gauge = np.eye(R)[[2, 0, 3, 1]] * np.array([1.0, -3.0, 0.5, 2.0])
    after = _regauged(before, gauge, scale)
    adam = Adam(steps=30)
    made = carry_moments(before, after, _history(before, _gradients(1, 30, 2.0), adam), adam)
    _check(made, _history(after, _gradients(1, 30, 2.0), adam), 1e-9)
    assert max(made.rows_turned.max(), made.columns_turned.max()) <= 1e-9


def test_any_gauge_carries_means_and_steady_squares_exactly() -> None:
    rng = np.random.default_rng(2)
    before = pair(rng, M, R, N, 8.0)
    after = _regauged(before, rng.standard_normal((R, R)), 0.7)
    adam = Adam(steps=200, beta2=0.99)
    for gradients in (_gradients(3, 200, 0.0), _gradients(3, 1, 5.0)):
        made = carry_moments(before, after, _history(before, gradients[:1] * 200, adam), adam)
        _check(made, _history(after, gradients[:1] * 200, adam), 1e-9)


def test_noisy_squares_are_carried_nearer_than_by_leaving_them() -> None:
    """Not exactly: that would need the covariances between ranks."""
    adam = Adam(steps=500, beta2=0.99)
    gradients = _gradients(3, 500, 3.0)
    carried_off, left_off = [], []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        before = pair(rng, M, R, N, 8.0)
        rotation = np.linalg.qr(np.eye(R) + 0.3 * rng.standard_normal((R, R)))[0]
        rotation *= np.sign(np.diag(rotation))  # not far from where it was
        after = _regauged(before, rotation, 2.0)
        left = _history(before, gradients, adam)
        made = carry_moments(before, after, left, adam)
        expected = _history(after, gradients, adam)
        _check(made, expected, 0.35)
        for got, was, want in zip((made.A, made.B), left, expected, strict=True):
            carried_off.append(apart(got.square, np.asarray(want.square)))
            left_off.append(apart(was.square, np.asarray(want.square)))
    assert sum(carried_off) < 0.8 * sum(left_off)


def test_the_start_at_zero_is_accounted_for() -> None:
    rng = np.random.default_rng(4)
    before = pair(rng, M, R, N)
    after = _regauged(before, rng.standard_normal((R, R)), 1.0)
    gradients = _gradients(5, 3, 0.0)  # steady, and three steps into betas of 0.9 and 0.999
    adam = Adam(steps=3)
    made = carry_moments(before, after, _history(before, gradients, adam), adam)
    _check(made, _history(after, gradients, adam), 1e-9)
    none = Adam(steps=3, beta1=0.0, beta2=0.0)
    made = carry_moments(before, after, _history(before, gradients, none), none)
    _check(made, _history(after, gradients, none), 1e-9)


def _turned(rng: np.random.Generator, old: Float64, sine: float) -> Float64:
    """Rows of the same lengths of which a part lies outside the span of the old ones."""
    q = np.linalg.qr(old.T)[0]
    outside = rng.standard_normal(old.shape)
    outside -= (outside @ q) @ q.T
    outside *= np.linalg.norm(old, axis=1, keepdims=True) / np.linalg.norm(
        outside, axis=1, keepdims=True
    )
    return np.asarray(math.sqrt(1 - sine**2) * old + sine * outside)


@pytest.mark.parametrize("sine", [0.0, 0.3, 0.49, 0.51, 1.0])
def test_a_factor_that_turned_too_far_makes_its_partner_forget(sine: float) -> None:
    rng = np.random.default_rng(6)
    before = pair(rng, M, R, N)
    adam = Adam(steps=10)
    moments = _history(before, _gradients(7, 10, 1.0), adam)
    rows = carry_moments(before, LowRank(_turned(rng, before.A, sine), before.B), moments, adam)
    assert rows.rows_turned == pytest.approx(np.full(R, sine), abs=1e-9)
    assert rows.columns_turned.max() <= 1e-9
    assert bool(rows.B.mean.any()) == bool(rows.B.square.any()) == (sine < 0.5)
    assert rows.A.mean.any() or sine == 1.0
    columns = _turned(rng, before.B.T, sine).T
    turned = carry_moments(before, LowRank(before.A, columns), moments, adam)
    assert turned.columns_turned == pytest.approx(np.full(R, sine), abs=1e-9)
    assert bool(turned.A.mean.any()) == bool(turned.A.square.any()) == (sine < 0.5)
    assert apart(turned.B.mean, np.asarray(moments[1].mean)) <= 1e-9


@pytest.mark.parametrize("rank", [2, 6])
def test_another_rank_keeps_what_it_shares(rank: int) -> None:
    rng = np.random.default_rng(8)
    before = pair(rng, M, R, N)
    outside = _turned(rng, before.A, 1.0)[:2]
    wide = LowRank(np.concatenate([before.A, outside]), np.pad(before.B, ((0, 0), (0, 2))))
    after = LowRank(before.A[:2], before.B[:, :2]) if rank == 2 else wide
    adam = Adam(steps=10)
    moments = _history(before, _gradients(9, 10, 1.0), adam)
    made = carry_moments(before, after, moments, adam)
    assert made.A.mean.shape == after.A.shape
    assert made.B.square.shape == after.B.shape
    kept = min(rank, R)
    assert np.allclose(made.A.mean[:kept], moments[0].mean[:kept])
    assert np.allclose(made.B.square[:, :kept], moments[1].square[:, :kept])


def test_one_rank_may_turn_alone() -> None:
    rng = np.random.default_rng(13)
    before = pair(rng, M, R, N)
    adam = Adam(steps=10)
    moments = _history(before, _gradients(14, 10, 1.0), adam)
    A = before.A.copy()
    A[1] = _turned(rng, before.A, 1.0)[1]
    made = carry_moments(before, LowRank(A, before.B), moments, adam)
    assert not made.B.square[:, 1].any()
    others = [0, 2, 3]
    assert apart(made.B.mean[:, others], np.asarray(moments[1].mean[:, others])) <= 1e-9


def test_a_fresh_adapter_has_nothing_to_carry_for_its_rows() -> None:
    rng = np.random.default_rng(10)
    before = LowRank(rng.standard_normal((R, N)), np.zeros((M, R)))
    after = LowRank(before.A, rng.standard_normal((M, R)))
    adam = Adam(steps=1)
    made = carry_moments(before, after, _history(before, _gradients(11, 1, 0.0), adam), adam)
    assert made.columns_turned.min() == 1.0
    assert not made.A.mean.any()
    assert made.B.mean.any()
    same = carry_moments(before, before, _history(before, _gradients(11, 1, 0.0), adam), adam)
    assert same.columns_turned.max() == 0.0


def test_what_does_not_belong_together_is_refused() -> None:
    rng = np.random.default_rng(12)
    before = pair(rng, M, R, N)
    moments = _history(before, [], Adam(steps=1))
    with pytest.raises(ValueError, match="a layer of"):
        carry_moments(before, pair(rng, N, R, M), moments, Adam(steps=1))
    with pytest.raises(ValueError, match="for a factor A"):
        carry_moments(before, before, (moments[1], moments[1]), Adam(steps=1))
    with pytest.raises(ValueError, match="scale 0"):
        carry_moments(before, LowRank(before.A, before.B, 0.0), moments, Adam(steps=1))
    for steps, beta in ((0, 0.9), (1, 1.0), (1, -0.1)):
        with pytest.raises(ValueError, match="moments"):
            Adam(steps=steps, beta1=beta)
