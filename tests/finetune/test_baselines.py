"""Others' ways to combine adapters: what each promises, and the traps of published code."""

from __future__ import annotations

import numpy as np
import pytest

from peer.finetune import baselines
from peer.finetune.changes import LowRank
from peer.finetune.products import advance, mean_of, shares_of
from tests.finetune.drawn import LAYERS, apart, dense_mean, mixed, pair


def alike(seed: int, m: int, n: int, r: int = 4) -> list[tuple[float, LowRank]]:
    """Three peers of one rank and scale."""
    rng = np.random.default_rng(seed)
    return [(p, pair(rng, m, r, n, 16.0)) for p in (1.0, 2.0, 5.0)]


# ── FedIT and what repairs it ────────────────────────────────────────────────────────────
@pytest.mark.parametrize("peers", [1, 3])
def test_fedit_is_exact_for_one_peer_and_for_identical_ones(peers: int) -> None:
    part = pair(np.random.default_rng(0), 48, 4, 32, 8.0)
    mean = baselines.fedit([(1.5, part)] * peers)
    assert apart(mean.dense(), part.dense()) <= 1e-14
    exact = mean_of([(1.5, part)] * peers).spectrum(4).project(4, scale=2.0, near=part.A)
    assert np.allclose(exact.change.A, mean.A)
    assert np.allclose(exact.change.B, mean.B)


def test_every_peer_is_in_fedits_mean_by_its_weight() -> None:
    """A published FedIT baseline kept client 0's weighted factors alone, through a typo."""
    parts = alike(1, 48, 32)
    mean = baselines.fedit(parts)
    assert apart(mean.A, np.asarray(sum(p / 8 * part.A for p, part in parts))) <= 1e-14
    assert apart(mean.B, np.asarray(sum(p / 8 * part.B for p, part in parts))) <= 1e-14
    for index, (p, part) in enumerate(parts):
        changed = [*parts]
        changed[index] = (p, LowRank(part.A + 1.0, part.B, part.scale))
        assert np.allclose(baselines.fedit(changed).A - mean.A, p / 8)


@pytest.mark.parametrize(("m", "n"), LAYERS)
def test_fedit_and_its_residual_are_exact_in_either_orientation(m: int, n: int) -> None:
    """Published code transposes the residual always: right for GPT-2's Conv1D, wrong for Linear,
    and silent where the layer is square."""
    parts = alike(2, m, n)
    mean, residual = baselines.fedex(parts)
    assert residual.rank == 3 * 4 + 4  # never dense
    assert apart(mean.dense() + residual.dense(), dense_mean(parts)) <= 1e-12
    weight = np.random.default_rng(3).standard_normal((m, n))
    for transposed in (False, True):
        stored = weight.T.copy() if transposed else weight.copy()
        mean.fold_into(stored, stored_transposed=transposed)
        residual.fold_into(stored, stored_transposed=transposed)
        moved = (stored.T if transposed else stored) - weight
        assert apart(moved, dense_mean(parts)) <= 1e-12


def test_factors_of_different_ranks_or_scales_have_no_average() -> None:
    rng = np.random.default_rng(4)
    for other in (pair(rng, 48, 2, 32), pair(rng, 48, 4, 32, 8.0)):
        parts = [(1.0, pair(rng, 48, 4, 32)), (1.0, other)]
        with pytest.raises(ValueError, match="no common average"):
            baselines.fedit(parts)
        with pytest.raises(ValueError, match="no common average"):
            baselines.fedex(parts)


# ── stacking and one SVD ─────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(("m", "n"), LAYERS)
def test_stacking_is_exact_with_the_weight_on_one_factor(m: int, n: int) -> None:
    parts = mixed(5, m, n)
    stacked = baselines.flora(parts)
    assert stacked.rank == sum(part.rank for _, part in parts)
    assert apart(stacked.dense(), dense_mean(parts)) <= 1e-14
    first = parts[0][1]
    assert np.array_equal(stacked.B[:, : first.rank], first.B)  # B as it came


def test_a_layer_whose_side_equals_the_rank_is_no_puzzle() -> None:
    """Published code finds the rank by looking for a dimension that equals it."""
    rng = np.random.default_rng(6)
    for m, n in ((4, 9), (9, 4), (4, 4)):
        parts = [(1.0, pair(rng, m, 4, n, 8.0)), (3.0, pair(rng, m, 4, n, 8.0))]
        for made in (
            baselines.flora(parts).dense(),
            mean_of(parts).spectrum(4).project(4).change.dense(),
            sum(part.dense() for part in baselines.fedex(parts)),
        ):
            assert apart(np.asarray(made), dense_mean(parts)) <= 1e-12


@pytest.mark.parametrize(("m", "n"), LAYERS)
def test_one_svd_gives_each_peer_the_best_of_its_rank_with_its_scale(m: int, n: int) -> None:
    parts = mixed(7, m, n)
    dense = dense_mean(parts)
    u, sigma, vt = np.linalg.svd(dense)
    receivers = [(part.rank, part.scale) for _, part in parts]
    for (rank, scale), made in zip(receivers, baselines.flexlora(parts, receivers), strict=True):
        assert (made.change.rank, made.change.scale) == (rank, scale)
        best = (u[:, :rank] * sigma[:rank]) @ vt[:rank]
        assert apart(made.change.dense(), best) <= 1e-9


def test_alphas_that_differ_are_folded_in_before_the_mean() -> None:
    """Equal factors, other alphas: the product's mean follows the alphas."""
    part = pair(np.random.default_rng(8), 48, 4, 32)
    parts = [(1.0, LowRank(part.A, part.B, scale)) for scale in (0.25, 4.0)]
    for made in (
        baselines.flora(parts),
        baselines.padded_mean(parts),
        baselines.rbla(parts),
        baselines.flexlora(parts, [(4, 0.5)])[0].change,
    ):
        assert apart(made.dense(), 2.125 * part.dense()) <= 1e-12


# ── frozen and private factors ───────────────────────────────────────────────────────────
def test_a_frozen_a_makes_the_mean_of_b_exact() -> None:
    rng = np.random.default_rng(9)
    A = rng.standard_normal((4, 32))
    parts = [(p, LowRank(A, rng.standard_normal((48, 4)), 2.0)) for p in (0.5, 0.25, 3.0)]
    mean = baselines.ffa(parts)
    assert np.array_equal(mean.A, A)
    assert apart(mean.dense(), dense_mean(parts)) <= 1e-15
    with pytest.raises(ValueError, match="frozen"):
        baselines.ffa([*parts, (1.0, LowRank(A + 1e-9, parts[0][1].B, 2.0))])


def test_a_shared_a_leaves_everybodys_b_alone() -> None:
    parts = alike(10, 48, 32)
    for _, own in parts:
        made = baselines.fedsa(parts, own)
        assert np.array_equal(made.B, own.B)
        assert np.array_equal(made.A, baselines.fedit(parts).A)
    with pytest.raises(ValueError, match="own factors"):
        baselines.fedsa(parts, pair(np.random.default_rng(0), 48, 3, 32, 12.0))


# ── ranks that differ ────────────────────────────────────────────────────────────────────
def test_padding_equals_fedit_where_ranks_are_equal() -> None:
    parts = alike(11, 48, 32)
    fedit = baselines.fedit(parts).dense()
    assert apart(baselines.padded_mean(parts).dense(), fedit) <= 1e-12
    assert apart(baselines.rbla(parts).dense(), fedit) <= 1e-12
    same = [(p, parts[0][1]) for p, _ in parts]
    assert apart(baselines.hetlora(same).dense(), baselines.fedit(same).dense()) <= 1e-12


def test_cutting_after_padding_is_where_one_began() -> None:
    part = pair(np.random.default_rng(12), 48, 3, 32, 6.0)
    wide = baselines.padded(part, 8)
    assert apart(wide.dense(), part.dense()) <= 1e-15
    back = baselines.truncated(wide, 3, scale=2.0)
    assert np.array_equal(back.A, part.A)
    assert np.array_equal(back.B, part.B)
    again = baselines.truncated(baselines.padded(back, 8), 3, scale=2.0)
    assert np.array_equal(again.dense(), back.dense())
    for rank in (0, 9):
        with pytest.raises(ValueError, match="ranks"):
            baselines.truncated(wide, rank)
    with pytest.raises(ValueError, match="fit into"):
        baselines.padded(wide, 7)


def test_zero_padding_loses_four_fifths_of_independent_products() -> None:
    """By theory, with k_j of N equal peers holding rank j: the squared share that is lost is
    1 - 2 / N + sum k_j^2 / (N^2 sum k_j); 0.81 for ranks 2, 4, 8 and 16 (79 % in the notes)."""
    ranks = (2, 4, 8, 16)
    holders = [sum(r > j for r in ranks) for j in range(16)]
    theory = np.sqrt(1 - 2 / 4 + sum(k * k for k in holders) / (16 * sum(holders)))
    lost, whole = 0.0, 0.0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        parts = [(1.0, pair(rng, 48, r, 32)) for r in ranks]
        exact = dense_mean(parts)
        lost += float(np.sum(np.square(baselines.padded_mean(parts).dense() - exact)))
        whole += float(np.sum(np.square(exact)))
    assert np.sqrt(lost / whole) == pytest.approx(theory, rel=0.02)
    assert np.sqrt(lost / whole) == pytest.approx(0.79, abs=0.03)


def test_sparsity_weights_are_the_products_norms() -> None:
    parts = mixed(13, 48, 32)
    norms = [float(np.linalg.norm(part.dense())) for _, part in parts]
    assert np.allclose(baselines.sparsity_weights(parts), shares_of(norms))
    weighted = [(w, part) for w, (_, part) in zip(norms, parts, strict=True)]
    assert apart(baselines.hetlora(parts).dense(), baselines.padded_mean(weighted).dense()) <= 1e-12


def test_rbla_does_not_dilute_what_few_peers_have() -> None:
    rng = np.random.default_rng(14)
    small, large = pair(rng, 48, 2, 32), pair(rng, 48, 6, 32, 12.0)
    made = baselines.rbla([(3.0, small), (1.0, large)])
    assert np.allclose(made.A[:2], 0.75 * small.A + 0.25 * large.A[:2])
    assert np.allclose(made.A[2:], large.A[2:])
    assert np.allclose(made.B[:, 2:], 2.0 * large.B[:, 2:])
    diluted = baselines.padded_mean([(3.0, small), (1.0, large)])
    assert np.allclose(diluted.A[2:], 0.25 * large.A[2:])


def test_the_pruning_penaltys_gradient_is_its_slope() -> None:
    rng = np.random.default_rng(15)
    part = pair(rng, 6, 4, 5)
    value, grad_A, grad_B = baselines.prune_penalty(part, 3)
    assert value == pytest.approx(float(np.linalg.norm(part.A[3:]) * np.linalg.norm(part.B[:, 3:])))
    to_A, to_B = 1e-6 * rng.standard_normal(part.A.shape), 1e-6 * rng.standard_normal(part.B.shape)
    ahead, _, _ = baselines.prune_penalty(LowRank(part.A + to_A, part.B + to_B), 3)
    behind, _, _ = baselines.prune_penalty(LowRank(part.A - to_A, part.B - to_B), 3)
    slope = float(np.sum(grad_A * to_A) + np.sum(grad_B * to_B))
    assert (ahead - behind) / 2 == pytest.approx(slope, rel=1e-4)
    fresh = LowRank(part.A, np.zeros((6, 4)))
    assert not baselines.prune_penalty(fresh, 3)[2].any()  # no slope at a norm of zero


def test_a_peer_gives_up_ranks_that_it_does_not_use() -> None:
    rng = np.random.default_rng(16)
    before = pair(rng, 48, 8, 32)
    faded = LowRank(before.A, before.B * np.where(np.arange(8) < 7, 1.0, 0.5))
    grown = LowRank(before.A, before.B * np.where(np.arange(8) < 7, 1.0, 1.5))
    assert baselines.pruned_rank(before, faded) == 7  # 0.99 * 8, rounded down
    assert baselines.pruned_rank(before, faded, share=0.5) == 4
    assert baselines.pruned_rank(before, grown) == 8
    assert baselines.pruned_rank(before, before) == 8
    one = pair(rng, 48, 1, 32)
    assert baselines.pruned_rank(one, LowRank(one.A, one.B / 2)) == 1


def test_directions_that_weak_peers_cannot_hold_do_not_fade() -> None:
    """Rank collapse: nobody trains, yet a mean of what the peers hold shrinks round by round."""
    rng = np.random.default_rng(17)
    state = mean_of([(1.0, pair(rng, 48, 8, 32))]).spectrum(8).project(8).change
    kept, naive = state, state
    ranks = (2, 2, 4, 8)
    for _ in range(5):
        spectrum = mean_of([(1.0, kept)]).spectrum(8)
        held = [spectrum.project(rank).change for rank in ranks]
        kept = advance(kept, [(1.0, h, h) for h in held]).spectrum(8).project(8).change
        spectrum = mean_of([(1.0, naive)]).spectrum(8)
        held = [spectrum.project(rank).change for rank in ranks]
        naive = mean_of([(1.0, h) for h in held]).spectrum(8).project(8).change
    assert apart(kept.dense(), state.dense()) <= 1e-9
    last = np.linalg.svd(naive.dense())[1][7] / np.linalg.svd(state.dense())[1][7]
    assert last == pytest.approx(0.25**5, rel=1e-6)  # one of four peers holds it


def test_work_of_any_rank_moves_the_state_by_its_share() -> None:
    rng = np.random.default_rng(18)
    state = pair(rng, 48, 8, 32)
    starts = [mean_of([(1.0, state)]).spectrum(8).project(rank).change for rank in (2, 8)]
    ends = [LowRank(s.A + 0.1, s.B - 0.2, s.scale) for s in starts]
    moved = advance(state, [(w, s, e) for w, s, e in zip((3.0, 1.0), starts, ends, strict=True)])
    steps = [e.dense() - s.dense() for s, e in zip(starts, ends, strict=True)]
    assert apart(moved.dense(), state.dense() + 0.75 * steps[0] + 0.25 * steps[1]) <= 1e-12


def test_no_parts_and_no_weights_are_refused_everywhere() -> None:
    part = pair(np.random.default_rng(19), 6, 2, 4)
    other = pair(np.random.default_rng(19), 4, 2, 6)
    for combine in (
        baselines.fedit,
        baselines.fedex,
        baselines.flora,
        baselines.ffa,
        baselines.padded_mean,
        baselines.hetlora,
        baselines.rbla,
    ):
        with pytest.raises(ValueError, match="nothing"):
            combine([])
        with pytest.raises(ValueError, match=r"shape|frozen"):
            combine([(1.0, part), (1.0, other)])
    with pytest.raises(ValueError, match="weight"):
        baselines.flora([(0.0, part)])
