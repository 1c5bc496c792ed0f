"""The mean of products is the dense sum, whatever the ranks; what a rank can't hold is known."""

from __future__ import annotations

import tracemalloc
from itertools import permutations

import numpy as np
import numpy.typing as npt
import pytest

from peer.finetune.changes import Change, Dense, Expanded, LowRank, Sparse
from peer.finetune.products import (
    advance,
    mean_of,
    mean_product,
    shares_of,
    spread,
    stack,
)
from tests.finetune.drawn import LAYERS, apart, dense_mean, mixed, pair


@pytest.mark.parametrize(("m", "n"), LAYERS)
@pytest.mark.parametrize("seed", range(3))
def test_unequal_ranks_and_alphas_add_up_to_the_dense_sum(m: int, n: int, seed: int) -> None:
    parts = mixed(seed, m, n)
    mean = mean_of(parts)
    assert mean.rest is None  # no m x n matrix
    assert apart(mean.dense(), dense_mean(parts)) <= 1e-12
    full = mean.spectrum(1).project(min(m, n), scale=0.5)
    assert apart(full.change.dense(), dense_mean(parts)) <= 1e-12


@pytest.mark.parametrize(("m", "n"), LAYERS)
@pytest.mark.parametrize("rank", [1, 2, 5, 8])
def test_every_peer_gets_the_best_that_its_rank_holds_and_is_told_the_rest(
    m: int, n: int, rank: int
) -> None:
    parts = mixed(rank, m, n)
    dense = dense_mean(parts)
    cut = float(np.linalg.norm(np.linalg.svd(dense)[1][rank:]))
    spectrum = mean_of(parts).spectrum(rank)
    near = np.random.default_rng(rank).standard_normal((rank, n))
    for made in (
        spectrum.project(rank),
        spectrum.project(rank, scale=2.0),
        spectrum.project(rank, scale=16 / rank, near=near),
    ):
        assert made.change.rank == rank
        error = float(np.linalg.norm(made.change.dense() - dense))
        assert error == pytest.approx(cut, rel=1e-9, abs=1e-9)  # Eckart and Young
        assert made.tail == pytest.approx(cut, rel=1e-9, abs=1e-9)


def test_the_singular_values_of_stacks_are_those_of_the_dense_sum() -> None:
    parts = mixed(7, 48, 32)
    dense = np.linalg.svd(dense_mean(parts))[1]
    ours = mean_of(parts).spectrum(1).sigma_k
    assert np.allclose(ours, dense[: len(ours)], rtol=1e-13, atol=1e-13 * dense[0])


def test_the_order_of_peers_and_the_unit_of_weights_do_not_matter() -> None:
    parts = mixed(3, 48, 32)
    first = mean_of(parts).spectrum(4).project(4)
    for order in permutations(parts):
        for unit in (1.0, 1e-12, 3e20):
            other = mean_of([(unit * p, part) for p, part in order]).spectrum(4).project(4)
            assert apart(other.change.dense(), first.change.dense()) <= 1e-12
            assert other.tail == pytest.approx(first.tail, rel=1e-12)


def test_two_halves_of_a_weight_are_the_whole_weight() -> None:
    (p, part), *others = mixed(4, 48, 32)
    once = mean_of([(p, part), *others]).dense()
    twice = mean_of([(p / 4, part), *others, (3 * p / 4, part)]).dense()
    assert apart(twice, once) <= 1e-12


@pytest.mark.parametrize("peers", [1, 5])
def test_identical_peers_get_their_own_factors_back(peers: int) -> None:
    part = pair(np.random.default_rng(5), 48, 4, 32, alpha=8.0)
    made = mean_of([(2.0, part)] * peers).spectrum(4).project(4, scale=2.0, near=part.A)
    assert np.allclose(made.change.A, part.A, atol=1e-12)
    assert np.allclose(made.change.B, part.B, atol=1e-12)
    assert made.tail <= 1e-10


def test_scale_moved_from_one_factor_to_the_other_changes_nothing() -> None:
    (p, part), *others = mixed(6, 48, 32)
    moved = LowRank(part.A / 100, part.B * 100, part.scale)
    halved = LowRank(part.A * 2, part.B, part.scale / 2)
    for other in (moved, halved):
        assert apart(mean_of([(p, other), *others]).dense(), dense_mean(mixed(6, 48, 32))) <= 1e-12


@pytest.mark.parametrize("used", [0, 1, 3])
def test_a_fresh_adapter_keeps_its_rows_at_any_rank(used: int) -> None:
    rng = np.random.default_rng(8)
    small = pair(rng, 48, 4, 32)
    small.B[:, used:] = 0
    mean = mean_of([(1.0, small)])
    near = np.concatenate([small.A, rng.standard_normal((3, 32))])
    made = mean.spectrum(7).project(7, near=near)
    assert made.used == used
    assert np.allclose(made.change.A, near)  # with B = 0 and A = 0 no gradient would come back
    assert np.allclose(made.change.dense(), small.dense())


@pytest.mark.parametrize("held", [0.0, 1e-3, 1.0])
def test_rows_that_the_peer_hardly_had_do_not_blow_up_its_columns(held: float) -> None:
    rng = np.random.default_rng(20)
    near = rng.standard_normal((4, 32))
    mean = pair(rng, 48, 4, 32)
    outside = mean.A - (mean.A @ np.linalg.pinv(near)) @ near
    mean = LowRank(outside + held * near, mean.B)
    made = mean_of([(1.0, mean)]).spectrum(4).project(4, near=near)
    assert apart(made.change.dense(), mean.dense()) <= 1e-12
    sizes = np.linalg.svd(near)[1]
    assert np.allclose(np.linalg.svd(made.change.A)[1], sizes)  # as large as it was
    assert np.linalg.norm(made.change.B) <= mean.norm() / sizes[-1] * (1 + 1e-9)


def test_without_anything_to_stay_near_unused_directions_are_zero() -> None:
    part = pair(np.random.default_rng(9), 48, 2, 32)
    made = mean_of([(1.0, part)]).spectrum(5).project(5, scale=-2.0)
    assert made.used == 2
    assert not made.change.A[2:].any()
    assert not made.change.B[:, 2:].any()
    assert apart(made.change.dense(), part.dense()) <= 1e-12
    gram = made.change.A @ made.change.A.T - made.change.B.T @ made.change.B
    assert np.abs(gram).max() <= 1e-10  # both factors got the same share


def test_a_large_layer_is_never_formed() -> None:
    rng = np.random.default_rng(10)
    m, n = 20_000, 15_000  # 2.4 GB as float64
    parts: list[tuple[float, Change]] = [(1.0, pair(rng, m, r, n)) for r in (2, 4, 8)]
    tracemalloc.start()
    mean = mean_of(parts)
    made = mean.spectrum(4).project(4, near=rng.standard_normal((4, n)))
    left = mean.minus(made.change)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 64 * 14 * (m + n)  # eight times what was sent
    assert isinstance(left, LowRank)
    assert left.norm() == pytest.approx(made.tail, rel=1e-9)


def _everybody(m: int, n: int) -> tuple[list[tuple[float, Change]], npt.NDArray[np.float64]]:
    """A peer of each kind, and what they add up to."""
    rng = np.random.default_rng(m)
    full = rng.standard_normal((m, n))
    seeds = rng.standard_normal((m, n))
    low, seeded = pair(rng, m, 4, n, 16.0), pair(rng, m, 2, n, 16.0)
    places = np.sort(rng.choice(m * n, 20, replace=False)).astype(np.int64)
    sparse = Sparse(places, rng.standard_normal(20), (m, n))
    parts: list[tuple[float, Change]] = [
        (3.0, low),
        (1.0, Dense(full)),
        (0.5, Expanded(lambda: Dense(seeds), (m, n))),
        (0.25, Expanded(lambda: seeded, (m, n))),
        (2.0, sparse),
    ]
    total = (
        3.0 * low.dense() + full + 0.5 * seeds + 0.25 * seeded.dense() + 2.0 * sparse.dense()
    ) / 6.75
    return parts, total


@pytest.mark.parametrize(("m", "n"), LAYERS)
def test_peers_of_every_kind_meet_in_one_mean(m: int, n: int) -> None:
    parts, total = _everybody(m, n)
    mean = mean_of(parts)
    assert apart(mean.dense(), total) <= 1e-12
    made = mean.spectrum(4).project(4, near=np.random.default_rng(0).standard_normal((4, n)))
    cut = float(np.linalg.norm(np.linalg.svd(total)[1][4:]))
    assert made.tail == pytest.approx(cut, rel=1e-9)
    left = mean.minus(made.change)
    assert isinstance(left, Dense)
    assert apart(made.change.dense() + left.dense(), total) <= 1e-12  # nothing is lost
    assert float(np.linalg.norm(left.dense())) == pytest.approx(cut, rel=1e-9)


def test_factored_and_sparse_peers_alone_leave_a_factored_rest() -> None:
    parts: list[tuple[float, Change]] = [*mixed(11, 48, 32)]
    parts.append((1.0, Sparse(np.arange(40, 60, dtype=np.int64), np.ones(20), (48, 32))))
    mean = mean_of(parts)
    made = mean.spectrum(3).project(3)
    left = mean.minus(made.change)
    assert isinstance(left, LowRank)
    assert apart(made.change.dense() + left.dense(), mean.dense()) <= 1e-12
    assert left.norm() == pytest.approx(made.tail, rel=1e-9)


def test_a_large_dense_change_is_sketched_and_what_is_missed_is_measured() -> None:
    rng = np.random.default_rng(12)
    m, n, rank = 300, 200, 8
    signal = pair(rng, m, rank, n)
    parts: list[tuple[float, Change]] = [
        (1.0, Dense(signal.dense() + 0.5 * rng.standard_normal((m, n)))),
        (1.0, pair(rng, m, 3, n)),
    ]
    mean = mean_of(parts)
    sketched = mean.spectrum(rank, exact=False)
    made = sketched.project(rank)
    error = float(np.linalg.norm(made.change.dense() - mean.dense()))
    assert made.tail == pytest.approx(error, rel=1e-9)  # told exactly
    best = mean.spectrum(rank, exact=True).tail(rank)
    assert best * (1 - 1e-12) <= error <= 1.001 * best  # and hardly worse than the best
    again = mean.spectrum(rank, exact=False)
    assert np.array_equal(again.sigma_k, sketched.sigma_k)  # no dice


def test_large_dense_layers_are_sketched_by_themselves() -> None:
    rng = np.random.default_rng(13)
    part = pair(rng, 1100, 2, 1030)
    spectrum = mean_of([(1.0, Dense(part.dense()))]).spectrum(2)
    assert len(spectrum.sigma_k) < 50
    assert apart(spectrum.project(2).change.dense(), part.dense()) <= 1e-10


# ── factor averaging is something else: methods 2.1's numbers ────────────────────────────
WEIGHTS = np.array([0.4, 0.3, 0.2, 0.1])


def _spread() -> float:
    """sum p^2 - 2 sum p^3 + (sum p^2)^2 over sum p^2: the cross term's share for these weights,
    as an expectation over independent factors."""
    p2, p3 = float(np.sum(WEIGHTS**2)), float(np.sum(WEIGHTS**3))
    return (p2 - 2 * p3 + p2**2) / p2


def _factors_error(drift: float | None, seed: int) -> tuple[float, float]:
    """(squared error of averaging factors, squared norm of the update): 4 peers, r = 8, 48 x 32."""
    rng = np.random.default_rng(seed)
    start = pair(rng, 48, 8, 32)
    peers = [pair(rng, 48, 8, 32) for _ in WEIGHTS]
    base = np.zeros((48, 32))
    if drift is not None:
        base = start.dense()
        peers = [LowRank(start.A + drift * q.A, start.B + drift * q.B) for q in peers]
    exact = mean_of(list(zip(WEIGHTS.tolist(), peers, strict=True))).dense()
    A = sum(p * q.A for p, q in zip(WEIGHTS, peers, strict=True))
    B = sum(p * q.B for p, q in zip(WEIGHTS, peers, strict=True))
    cross = 0.5 * sum(
        p * o * (one.B - other.B) @ (one.A - other.A)
        for p, one in zip(WEIGHTS, peers, strict=True)
        for o, other in zip(WEIGHTS, peers, strict=True)
    )
    assert apart(exact - B @ A, np.asarray(cross)) <= 1e-9  # exactly half the cross term
    return float(np.sum(np.square(cross))), float(np.sum(np.square(exact - base)))


@pytest.mark.parametrize(("drift", "published"), [(0.05, 0.029), (0.2, 0.107), (None, 0.76)])
def test_averaging_factors_errs_by_what_theory_says(drift: float | None, published: float) -> None:
    errors, updates = zip(*(_factors_error(drift, seed) for seed in range(50)), strict=True)
    measured = float(np.sqrt(sum(errors) / sum(updates)))
    growth = 1.0 if drift is None else drift**2 / (2 + drift**2)
    assert measured == pytest.approx(np.sqrt(_spread() * growth), rel=0.02)
    assert measured == pytest.approx(published, rel=0.1)  # other weights give a little more or less


def test_what_makes_no_mean_is_refused() -> None:
    part = pair(np.random.default_rng(14), 6, 2, 4)
    with pytest.raises(ValueError, match="nothing"):
        mean_of([])
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight"):
            mean_of([(1.0, part), (weight, part)])
    with pytest.raises(ValueError, match="in one mean"):
        mean_of([(1.0, part), (1.0, Dense(np.ones((4, 6))))])
    with pytest.raises(ValueError, match="shapes"):
        stack([(1.0, part), (1.0, pair(np.random.default_rng(0), 4, 2, 6))])
    mean = mean_of([(1.0, part)])
    for rank in (0, 5):
        with pytest.raises(ValueError, match="rank"):
            mean.spectrum(rank)
        with pytest.raises(ValueError, match="rank"):
            mean.spectrum(1).project(rank)
    with pytest.raises(ValueError, match="stay near"):
        mean.spectrum(1).project(3, near=part.A)
    with pytest.raises(ValueError, match="scale"):
        mean.spectrum(1).project(2, scale=0.0)
    with pytest.raises(ValueError, match="from a mean"):
        mean.minus(pair(np.random.default_rng(0), 4, 2, 6))


def test_huge_weights_and_values_stay_finite() -> None:
    assert shares_of([1e308, 1e308]) == [0.5, 0.5]
    huge = LowRank(np.full((2, 4), 2.0**64), np.full((6, 2), -(2.0**64)))
    (A, B), tail = mean_product([(0.5, (huge.A, huge.B)), (0.5, (-huge.A, huge.B + 1))])
    assert np.isfinite(A).all()
    assert np.isfinite(B).all()
    assert np.isfinite(tail)


# ── against drift ────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dense", [False, True])
def test_a_spread_mean_keeps_its_directions_and_its_norm(power: float, dense: bool) -> None:
    rng = np.random.default_rng(9)
    parts: list[tuple[float, Change]] = [(1.0, pair(rng, 24, 3, 16)) for _ in range(3)]
    if dense:
        parts.append((2.0, Dense(rng.standard_normal((24, 16)))))
    exact = mean_of(parts).dense()
    u, sigma, vt = np.linalg.svd(exact, full_matrices=False)
    held = np.where(sigma > 1e-7 * sigma[0], sigma, 0.0)
    raised = np.where(held > 0, held**power, 0.0)
    raised *= np.linalg.norm(held) / np.linalg.norm(raised)
    got = spread(mean_of(parts), power, 1.5, 4).dense()
    assert apart(got, 1.5 * (u * raised) @ vt) <= 1e-9
    assert np.linalg.norm(got) == pytest.approx(1.5 * np.linalg.norm(exact))


def test_the_flatter_a_mean_the_more_is_left_of_what_one_of_many_learned() -> None:
    """Eight peers learn one thing in common and each one of its own, as large."""
    common, *own = (np.linalg.qr(np.random.default_rng(7).standard_normal((32, 9)))[0]).T
    parts = [(1.0, LowRank(np.stack([common, mine]), np.stack([common, mine], 1))) for mine in own]
    start = LowRank(np.zeros((1, 32)), np.zeros((32, 1)))
    kept = []
    for power in (1.0, 0.5, 0.0):
        changes = [(weight, None, part) for weight, part in parts]
        change = advance(start, changes, power=power).dense()
        kept.append(float(own[0] @ change @ own[0]) / float(common @ change @ common))
    assert kept == pytest.approx([1 / 8, 8**-0.5, 1.0])


def test_nothing_spread_is_nothing_and_a_mean_of_ends_is_not_spread() -> None:
    nothing = LowRank(np.zeros((2, 8)), np.zeros((8, 2)))
    assert not spread(mean_of([(1.0, nothing)]), 0.5, 2.0, 2).dense().any()
    with pytest.raises(ValueError, match="ends"):
        advance(nothing, [(1.0, nothing, nothing)], power=0.5)
