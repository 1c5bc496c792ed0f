"""Peers of every kind train one layer together: a softmax classifier with adapters, in NumPy.

Classes are clouds of points; peers hold different ones. Nothing here is a language model: what is
tested is that the pieces fit, and that nobody's work gets lost between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest

from peer.finetune import baselines
from peer.finetune.changes import Change, Dense, Expanded, LowRank, check_change
from peer.finetune.perturb import derive_seed, z_of
from peer.finetune.products import advance, mean_of
from peer.finetune.weights import Evidence, weight_of

Float64 = npt.NDArray[np.float64]

M, N = 8, 24  # classes, features
FULL = 6  # the rank of the common state
FO_LR, ZO_LR = 0.2, 0.15  # divided by the squared scale, to which a step's effect is proportional


@dataclass
class Points:
    """Points of some classes, spread around their centres."""

    x: Float64
    y: npt.NDArray[np.int64]

    @classmethod
    def of(cls, classes: list[int], each: int, seed: int) -> Points:
        centres = 2.0 * np.random.default_rng(99).standard_normal((M, N)) / np.sqrt(N / 6)
        rng = np.random.default_rng(seed)
        y = np.repeat(np.array(classes), each)
        return cls(centres[y] + rng.standard_normal((len(y), N)), y)

    def loss(self, w_mn: Float64) -> float:
        return float(-np.mean(np.log(self._chances(w_mn)[np.arange(len(self.y)), self.y] + 1e-30)))

    def gradient(self, w_mn: Float64) -> Float64:
        chances = self._chances(w_mn)
        chances[np.arange(len(self.y)), self.y] -= 1.0
        return np.asarray(chances.T @ self.x / len(self.y))

    def accuracy(self, w_mn: Float64) -> float:
        return float(np.mean(np.argmax(self.x @ w_mn.T, axis=1) == self.y))

    def _chances(self, w_mn: Float64) -> Float64:
        scores = self.x @ w_mn.T
        made = np.exp(scores - scores.max(axis=1, keepdims=True))
        return np.asarray(made / made.sum(axis=1, keepdims=True), np.float64)


def fresh(rank: int, round_: int) -> Float64:
    """A new A. A peer without gradients takes one in each round: its few directions would be the
    same for ever."""
    rng = np.random.default_rng([rank, round_])
    return np.asarray(rng.standard_normal((rank, N)) / np.sqrt(N), np.float64)


@dataclass
class Trainer:
    """A peer: its points, its rank, and how it trains from a start."""

    points: Points
    rank: int
    kind: str = "first-order"
    alpha: float = 8.0
    steps: int = 10
    perturbations: int = 8
    A: Float64 = field(init=False)

    def __post_init__(self) -> None:
        self.A = fresh(self.rank, 0)

    @property
    def evidence(self) -> Evidence:
        zo = self.kind == "zeroth-order"
        return Evidence(tokens=len(self.points.y), perturbations=self.perturbations if zo else None)

    def train(self, start: LowRank, round_: int, below: Float64 | None = None) -> Change:
        """What it makes of `start`, with the change `below` folded into the frozen weights."""
        base = np.zeros((M, N)) if below is None else below
        if self.kind == "full":
            W = start.dense()
            for _ in range(self.steps):
                W = W - 0.3 * self.points.gradient(base + W)
            return Dense(W)
        if self.kind == "zeroth-order":
            return Expanded(self._zeroth_order(start, round_, base), start.shape)
        A, B, lr = start.A.copy(), start.B.copy(), FO_LR / start.scale**2
        for _ in range(self.steps):
            G = start.scale * self.points.gradient(base + start.scale * B @ A)
            A, B = A - lr * B.T @ G, B - lr * G @ A.T
        return LowRank(A, B, start.scale)

    def _zeroth_order(self, start: LowRank, round_: int, base: Float64) -> Callable[[], LowRank]:
        """What is sent is (seeds, scalars); what comes back is made from them alone."""
        sent: list[tuple[int, float]] = []
        here, lr = start, ZO_LR / start.scale**2
        for step in range(self.steps):
            tried = []
            for p in range(self.perturbations):
                seed = derive_seed("test", round_, step, p)
                ahead, behind = (_walked(here, [(seed, e)]).dense() for e in (1e-3, -1e-3))
                slope = (self.points.loss(base + ahead) - self.points.loss(base + behind)) / 2e-3
                tried.append((seed, float(np.float32(-lr * slope / self.perturbations))))
            here = _walked(here, tried)
            sent += tried
        return lambda: _walked(start, sent)


def _walked(start: LowRank, directions: list[tuple[int, float]]) -> LowRank:
    A, B = start.A.copy(), start.B.copy()
    for seed, length in directions:
        z = z_of("factors", A.size + B.size, seed, "gaussian").numpy()
        A += length * z[: A.size].reshape(A.shape)
        B += length * z[A.size :].reshape(B.shape)
    return LowRank(A, B, start.scale)


def together(
    peers: list[Trainer], rounds: int, *, whole: bool = True, afresh: bool = False
) -> Float64:
    """The common change after rounds of exact aggregation.

    `whole`: every peer has all of the state in its frozen weights and trains an adapter with B = 0
    on it; else it has what its rank holds. `afresh`: peers with gradients, too, draw a new A in
    each round.
    """
    state = LowRank(fresh(FULL, 0), np.zeros((M, FULL)))
    for round_ in range(rounds):
        parts: list[tuple[float, LowRank | None, Change]] = []
        spectrum = mean_of([(1.0, state)]).spectrum(FULL)
        for peer in peers:
            scale = peer.alpha / peer.rank
            start = LowRank(peer.A, np.zeros((M, peer.rank)), scale)
            if not whole:
                start = spectrum.project(peer.rank, scale=scale, near=peer.A).change
            end = peer.train(start, round_, state.dense() if whole else None)
            check_change(end, (M, N))
            peer.A = fresh(peer.rank, round_ + 1)
            if isinstance(end, LowRank) and not afresh:
                peer.A = np.asarray(end.A)
            weight = weight_of(peer.evidence, effective_dim=30.0)
            parts.append((weight, None if whole else start, end))
        state = advance(state, parts).spectrum(FULL).project(FULL, near=state.A).change
    return state.dense()


# ── peers of different kinds ─────────────────────────────────────────────────────────────
STRONG, WEAK, WEAKEST = [0, 1, 2, 3], [4, 5], [6, 7]


def _hybrid() -> list[Trainer]:
    """Gradients at rank 6; gradients at rank 2; no gradients, at rank 2."""
    return [
        Trainer(Points.of(STRONG, 40, 1), 6),
        Trainer(Points.of(WEAK, 40, 2), 2),
        Trainer(Points.of(WEAKEST, 40, 3), 2, "zeroth-order", steps=20, perturbations=16),
    ]


def test_weak_peers_teach_what_only_they_know() -> None:
    held = [Points.of(classes, 200, 50) for classes in (STRONG, WEAK, WEAKEST)]
    by_one, by_all = (together(_hybrid()[:count], 40, afresh=True) for count in (1, 3))
    alone = [points.accuracy(by_one) for points in held]
    hybrid = [points.accuracy(by_all) for points in held]
    assert alone[0] > 0.9
    assert max(alone[1:]) < 0.1
    assert hybrid[0] > 0.9
    assert hybrid[1] > 0.9
    assert hybrid[2] > 0.7


def test_a_peer_that_trains_everything_joins_in() -> None:
    peers = [*_hybrid()[:2], Trainer(Points.of(WEAKEST, 40, 3), 1, "full")]
    change = together(peers, 40)
    assert Points.of(list(range(M)), 200, 50).accuracy(change) > 0.9


# ── ranks that differ, and drift ─────────────────────────────────────────────────────────
def _drifting(ranks: list[int], steps: int) -> list[Trainer]:
    """Four peers with two classes each."""
    return [
        Trainer(Points.of([2 * i, 2 * i + 1], 40, i), rank, steps=steps, alpha=float(rank))
        for i, rank in enumerate(ranks)
    ]


def _one_rank(
    peers: list[Trainer], rounds: int, mean: Callable[[list[tuple[float, LowRank]]], LowRank]
) -> Float64:
    """All peers train the common factors themselves."""
    state = LowRank(fresh(peers[0].rank, 0), np.zeros((M, peers[0].rank)))
    for round_ in range(rounds):
        ends = [peer.train(state, round_) for peer in peers]
        state = mean([(1.0, end) for end in ends if isinstance(end, LowRank)])
    return state.dense()


def _near_the_mean(parts: list[tuple[float, LowRank]]) -> LowRank:
    near = np.mean([part.A for _, part in parts], axis=0)
    return mean_of(parts).spectrum(len(near)).project(len(near), near=near).change


@pytest.mark.parametrize("rounds", [4, 8])
def test_exact_aggregation_closes_most_of_fedits_gap_to_pooled_data(rounds: int) -> None:
    held, steps = Points.of(list(range(M)), 200, 50), 50
    parts = [peer.points for peer in _drifting([6] * 4, steps)]
    pool = Points(np.concatenate([p.x for p in parts]), np.concatenate([p.y for p in parts]))
    pooled = Trainer(pool, 6, steps=steps, alpha=6.0)
    best = held.loss(_one_rank([pooled], rounds, _near_the_mean))
    fedit = held.loss(_one_rank(_drifting([6] * 4, steps), rounds, baselines.fedit))
    exact = held.loss(_one_rank(_drifting([6] * 4, steps), rounds, _near_the_mean))
    assert exact - best <= 0.5 * (fedit - best)


def _hetlora(peers: list[Trainer], rounds: int) -> Float64:
    top = max(peer.rank for peer in peers)
    state = LowRank(fresh(top, 0), np.zeros((M, top)))
    for round_ in range(rounds):
        ends = [p.train(baselines.truncated(state, p.rank), round_) for p in peers]
        state = baselines.hetlora([(1.0, end) for end in ends if isinstance(end, LowRank)])
    return state.dense()


@pytest.mark.parametrize(("steps", "rounds"), [(10, 20), (50, 8)])
def test_mixed_ranks_are_about_as_good_as_the_lowest_for_all_and_better_than_padding(
    steps: int, rounds: int
) -> None:
    held = Points.of(list(range(M)), 200, 50)
    mixed = held.loss(together(_drifting([1, 2, 4, 6], steps), rounds))
    lowest = held.loss(together(_drifting([1] * 4, steps), rounds))
    assert mixed <= 1.1 * lowest
    assert mixed < 0.5 * held.loss(_hetlora(_drifting([1, 2, 4, 6], steps), rounds))


def test_what_nobody_sees_runs_away() -> None:
    """Four peers of rank 1 that hold rank 1 of a state of rank 6 add to what they do not see; with
    the whole of it in their frozen weights they learn everything."""
    held = Points.of(list(range(M)), 200, 50)
    seen = together(_drifting([1] * 4, 50), 8)
    unseen = together(_drifting([1] * 4, 50), 8, whole=False)
    assert held.accuracy(seen) > 0.9
    assert held.loss(unseen) > 3 * held.loss(seen)


# ── one step ─────────────────────────────────────────────────────────────────────────────
def test_one_local_step_is_a_step_on_the_pooled_data_up_to_the_square_of_its_length() -> None:
    rng = np.random.default_rng(0)
    start = LowRank(rng.standard_normal((4, N)), rng.standard_normal((M, 4)))
    parts = [Points.of([2 * i, 2 * i + 1], 40, i) for i in range(4)]
    pool = Points(np.concatenate([p.x for p in parts]), np.concatenate([p.y for p in parts]))

    def step(points: Points, lr: float) -> LowRank:
        G = points.gradient(start.dense())
        return LowRank(start.A - lr * start.B.T @ G, start.B - lr * G @ start.A.T)

    gaps = []
    for lr in (1e-2, 5e-3, 2.5e-3):
        ends = [(1.0, step(points, lr)) for points in parts]
        pooled = step(pool, lr)
        fedit = baselines.fedit(ends)
        assert np.allclose(fedit.dense(), pooled.dense(), atol=1e-12)  # linear in each factor
        gaps.append(float(np.linalg.norm(mean_of(ends).dense() - pooled.dense())))
    assert gaps[0] / gaps[1] == pytest.approx(4.0, rel=1e-6)
    assert gaps[1] / gaps[2] == pytest.approx(4.0, rel=1e-6)
