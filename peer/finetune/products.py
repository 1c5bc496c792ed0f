"""The weighted mean of changes to a layer, exactly, and its projection to any peer's rank.

mean = sum p_i s_i B_i A_i is itself a product: of the stacked columns [p_i s_i B_i] and the stacked
rows [A_i], whatever the ranks and scales. QR of both stacks leaves a small core whose SVD is the
mean's own; cutting it at rank r is the best that rank r can do, and the error is exactly the root
of the sum of the cut singular values squared (Eckart and Young, 1936). No m x n matrix is formed,
unless a peer sent one: dense changes are added up densely, and the SVD is then that of the sum of
both kinds, exact for small layers, by a randomised range finder (Halko, Martinsson and Tropp, 2011,
algorithm 4.4) for large ones. What it leaves out is measured, not estimated.

Averaging A and B one by one is something else: off by half the sum of p_i p_j (B_i - B_j)(A_i -
A_j).

The factors of a product are free up to an invertible r x r matrix, and peers go on training from
them with work in flight, so the choice matters (`Spectrum.project`). We take the A nearest to the
one that the peer had, among those that span the right rows and have its singular values; one member
alone gets its own factors back. (Were it only the nearest that spans them, rows that the peer's A
hardly held would come back short and their columns of B huge, and training would diverge.)
Directions that the mean does not use are filled from the peer's A too: a fresh adapter (B = 0)
keeps its A instead of dying at zero.

Everything in float64. The same parts in the same order give the same result on the same machine;
one aggregator computes, and everybody takes what it sends.

Shapes: m x n = the layer, r = rank, K = ranks stacked, k = singular values kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from peer.finetune.changes import AnyArray, Change, Dense, Expanded, Float64, LowRank, Sparse

Factors = tuple[AnyArray, AnyArray]
"""(A: (r, n), B: (m, r))."""

_ZERO: Final = 1e-7  # singular values below this share of the largest are float32's rounding
_FLOOR: Final = 0.03  # flattest direction allowed in A against its steepest, so that B stays small
_EXACT_SIDE_MAX: Final = 256  # smaller side up to which a dense SVD takes about 0.1 s
_OVERSAMPLE: Final = 16  # columns the range finder looks at beyond those asked for
_POWER_STEPS: Final = 4  # each takes the spectrum's square: flat tails are told apart
_SKETCH_KEY: Final = 0x6D75726D  # the sketch is the same on every machine and in every round


@dataclass(frozen=True, slots=True, eq=False)
class Mean:
    """A weighted mean, exactly: factors + rest."""

    shape: tuple[int, int]
    """(m, n)."""
    factors: LowRank | None
    """The low-rank parts, stacked; the weights are in B alone, and the scale is 1."""
    rest: Float64 | None
    """(m, n): the dense parts, if there were any."""

    def dense(self) -> Float64:
        """(m, n), formed."""
        total = np.zeros(self.shape) if self.rest is None else self.rest.copy()
        if self.factors is not None:
            total += self.factors.dense()
        return total

    def minus(self, change: LowRank) -> LowRank | Dense:
        """What is left of the mean besides `change`: factored where no dense part came in.

        Raises:
            ValueError: `change` is of another shape.
        """
        if change.shape != self.shape:
            raise ValueError(f"a change of {change.shape} from a mean of {self.shape}")
        if self.rest is not None:
            return Dense(self.dense() - change.dense())
        assert self.factors is not None  # a mean has parts
        return stack([(1.0, self.factors), (-1.0, change)])

    def spectrum(self, rank: int, *, exact: bool | None = None) -> Spectrum:
        """The mean's singular vectors and values: all of them, or at least the first `rank`.

        `exact`: whether a mean with dense parts is taken apart completely (O(m n min(m, n)) time)
        or by a randomised range finder (O(m n rank)); by default the layer's size decides. Without
        dense parts it is always exact, O((m + n) K^2 + K^3).

        Raises:
            ValueError: the layer has no such rank.
        """
        if not 1 <= rank <= min(self.shape):
            raise ValueError(f"rank {rank} in a layer of {self.shape}")
        if self.rest is None:
            assert self.factors is not None
            return _of_product(self.factors)
        width = rank + _OVERSAMPLE
        if exact is None:
            exact = min(self.shape) <= _EXACT_SIDE_MAX
        if exact or width >= min(self.shape):
            u_mk, sigma_k, vt_kn = np.linalg.svd(self.dense(), full_matrices=False)
            return Spectrum(u_mk, sigma_k, vt_kn.T, 0.0)
        return self._sketched(width)

    def _sketched(self, width: int) -> Spectrum:
        """The range finder's part of the whole, and the norm of what it did not find."""
        dice = np.random.Generator(np.random.Philox(key=_SKETCH_KEY))
        q_mk, _ = np.linalg.qr(self._times(dice.standard_normal((self.shape[1], width))))
        for _ in range(_POWER_STEPS):
            q_nk, _ = np.linalg.qr(self._transposed_times(q_mk))
            q_mk, _ = np.linalg.qr(self._times(q_nk))
        small_nk = self._transposed_times(q_mk)
        v_nk, sigma_k, ut_kk = np.linalg.svd(small_nk, full_matrices=False)
        missed = 0.0
        for start in range(0, self.shape[0], 256):  # directly: a difference of norms would cancel
            rows = slice(start, start + 256)
            left = self._rows(rows) - q_mk[rows] @ small_nk.T
            missed += float(np.sum(np.square(left)))
        return Spectrum(q_mk @ ut_kk.T, sigma_k, v_nk, math.sqrt(missed))

    def _times(self, x_nk: Float64) -> Float64:
        assert self.rest is not None
        y_mk: Float64 = self.rest @ x_nk
        if self.factors is not None:
            y_mk += self.factors.B @ (self.factors.A @ x_nk)
        return y_mk

    def _transposed_times(self, x_mk: Float64) -> Float64:
        assert self.rest is not None
        y_nk: Float64 = self.rest.T @ x_mk
        if self.factors is not None:
            y_nk += self.factors.A.T @ (self.factors.B.T @ x_mk)
        return y_nk

    def _rows(self, rows: slice) -> Float64:
        assert self.rest is not None
        part = self.rest[rows]
        return part if self.factors is None else part + self.factors.B[rows] @ self.factors.A


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """A mean at a peer's rank."""

    change: LowRank
    """With the peer's scale."""
    tail: float
    """Frobenius norm of what the rank could not hold."""
    used: int
    """Ranks in use; the rest has B = 0."""


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """u diag(sigma) v^T, largest first, and how much is missing from it."""

    u_mk: Float64
    sigma_k: Float64
    v_nk: Float64
    beyond: float
    """Frobenius norm of what is in the mean but not here; 0 unless it was sketched."""

    def tail(self, rank: int) -> float:
        """Frobenius norm of the mean without its first `rank` directions."""
        return math.hypot(self.beyond, float(np.linalg.norm(self.sigma_k[rank:])))

    def project(self, rank: int, *, scale: float = 1.0, near: AnyArray | None = None) -> Projection:
        """The best that `rank` can do, as factors of that rank for a peer whose scale is `scale`.

        `near`: the A (rank, n) that the peer had; the new A is the nearest to it, see the module.
        Without it both factors get the square root of the singular values, and directions that are
        not in use are zero: right for sending and for comparing, a dead end for training.

        Raises:
            ValueError: the layer has no such rank, `near` is of another shape, or the scale is 0.
        """
        m, n = len(self.u_mk), len(self.v_nk)
        if not 1 <= rank <= min(m, n):
            raise ValueError(f"rank {rank} in a layer of {(m, n)}")
        if scale == 0.0 or not math.isfinite(scale):
            raise ValueError(f"a scale of {scale}")
        sigma_k = self.sigma_k[:rank]
        used = int(np.count_nonzero(sigma_k > _ZERO * self.sigma_k[0]))
        u_mr = np.zeros((m, rank))
        v_nr = np.zeros((n, rank))
        v_nr[:, :used] = self.v_nk[:, :used]
        if near is None:
            root_k = np.sqrt(sigma_k[:used] / abs(scale))
            u_mr[:, :used] = self.u_mk[:, :used] * (root_k * math.copysign(1.0, scale))
            v_nr[:, :used] *= root_k
            return Projection(LowRank(v_nr.T, u_mr, scale), self.tail(used), used)
        if near.shape != (rank, n):
            raise ValueError(f"an A of {near.shape} to stay near, expected {(rank, n)}")
        near_rn = near.astype(np.float64)
        if used < rank:
            rest_rn = near_rn - (near_rn @ v_nr[:, :used]) @ v_nr[:, :used].T
            v_nr[:, used:] = np.linalg.svd(rest_rn, full_matrices=False)[2][: rank - used].T
        sizes_r = np.asarray(np.linalg.svd(near_rn, compute_uv=False), np.float64)
        gauge_rr, inverse_rr = _tame(near_rn @ v_nr, sizes_r)
        u_mr[:, :used] = self.u_mk[:, :used] * (sigma_k[:used] / scale)
        change = LowRank(gauge_rr @ v_nr.T, u_mr @ inverse_rr, scale)
        return Projection(change, self.tail(used), used)


def mean_of(parts: Sequence[tuple[float, Change]]) -> Mean:
    """The mean of (weight, change) pairs of one layer. Weights need not add up to one.

    O((m + n) K) memory, and m n more if there are dense parts.

    Raises:
        ValueError: no parts, a weight that is not positive and finite, or shapes that differ.
    """
    shares = shares_of([weight for weight, _ in parts])
    shape = parts[0][1].shape
    stacked: list[tuple[float, LowRank]] = []
    rest: Float64 | None = None
    for share, (_, change) in zip(shares, parts, strict=True):
        if change.shape != shape:
            raise ValueError(f"changes of {shape} and of {change.shape} in one mean")
        part = change.made() if isinstance(change, Expanded) else change
        if isinstance(part, Sparse):
            part = part.factors() or part
        if isinstance(part, LowRank):
            stacked.append((share, part))
        else:
            rest = np.zeros(shape) if rest is None else rest
            if isinstance(part, Sparse):
                rest.reshape(-1)[part.indices] += share * part.values.astype(np.float64)
            else:
                rest += share * part.dense()
    return Mean(shape, stack(stacked) if stacked else None, rest)


def spread(mean: Mean, power: float, length: float, rank: int) -> Mean:
    """`length` times the mean, its singular values raised to `power` and scaled to their old norm.

    Where peers drift apart between rounds, the mean holds what all of them learned in full, and of
    what one of N learned a share 1/N. The flatter its spectrum, the more of the latter is kept;
    power 0 is isotropic merging (Marczak et al., arXiv 2502.04959, Iso-C), 1 the mean itself. Also
    flatter is what is nobody's: noise, and one liar's direction.

    Of a mean with dense parts in a large layer only the first `rank` directions (and the
    oversampled ones) are known, and only those are changed.

    Raises:
        ValueError: as `Mean.spectrum`.
    """
    if power == 1.0 and length == 1.0:
        return mean
    found = mean.spectrum(rank)
    sigma_k = found.sigma_k
    used = int(np.count_nonzero(sigma_k > _ZERO * sigma_k[0])) if sigma_k[0] > 0 else 0
    if not used:
        return mean
    raised_k = np.zeros_like(sigma_k)
    raised_k[:used] = (sigma_k[:used] / sigma_k[0]) ** power
    raised_k *= np.linalg.norm(sigma_k) / np.linalg.norm(raised_k)
    if mean.rest is None:
        return Mean(mean.shape, LowRank(found.v_nk.T, found.u_mk * (length * raised_k)), None)
    more = LowRank(found.v_nk.T, found.u_mk * (raised_k - sigma_k))
    stacked = [(length, more)] if mean.factors is None else [(length, mean.factors), (length, more)]
    return Mean(mean.shape, stack(stacked), length * mean.rest)


def advance(
    state: LowRank,
    parts: Sequence[tuple[float, LowRank | None, Change]],
    *,
    power: float = 1.0,
    length: float = 1.0,
) -> Mean:
    """state + the mean of (end - start) over (weight, start, end): what each peer made of what it
    was given.

    `start`: what the peer's model held of the state when it began; None: all of it, and `end` is
    only what the peer added. Where ranks differ this is not the mean of the ends. A peer of rank 4
    that was given the first 4 directions of a state of rank 16 ends without the other 12, and a
    mean of ends would shrink those in every round, geometrically, though nobody wanted it (rank
    collapse, arXiv 2602.13486). But nor does that peer see what it adds beyond its 4 directions:
    where nobody sees it, the state runs away. Let weak peers hold the whole state, folded into
    their frozen weights, and train what their rank allows on top (start = None).

    `power`, `length`: the mean is `spread` by them, at the state's rank; all parts must be changes
    then (start = None).

    Raises: like `mean_of`.
    """
    mean = mean_of([(weight, end) for weight, _, end in parts])
    if power != 1.0 or length != 1.0:
        if any(start is not None for _, start, _ in parts):
            raise ValueError("a mean of ends can't be spread")
        mean = spread(mean, power, length, state.rank)
    shares = shares_of([weight for weight, _, _ in parts])
    before = [
        (-share, start)
        for share, (_, start, _) in zip(shares, parts, strict=True)
        if start is not None
    ]
    ends = [] if mean.factors is None else [(1.0, mean.factors)]
    return Mean(mean.shape, stack([(1.0, state), *ends, *before]), mean.rest)


def stack(parts: Sequence[tuple[float, LowRank]]) -> LowRank:
    """sum p s B A as one product of scale 1 and rank sum r, the weights in B alone.

    Raises:
        ValueError: no parts, or shapes that differ.
    """
    if len({part.shape for _, part in parts}) != 1:
        raise ValueError(f"{len(parts)} changes of shapes {sorted({p.shape for _, p in parts})}")
    A_Kn = np.concatenate([part.A.astype(np.float64) for _, part in parts])
    B_mK = np.concatenate(
        [(p * part.scale) * part.B.astype(np.float64) for p, part in parts], axis=1
    )
    return LowRank(A_Kn, B_mK)


def mean_product(parts: Sequence[tuple[float, Factors]]) -> tuple[Factors, float]:
    """((A, B), norm of what was cut) for sum p B A over (p, (A, B)), all of one shape and scale,
    at their own rank; p add up to one. The A nearest to the mean of the A.

    The rank must not exceed m or n. O((m + n) K^2 + K^3) time, O((m + n) K) memory, in float64.
    """
    rank = len(parts[0][1][0])
    stacked = stack([(p, LowRank(A_rn, B_mr)) for p, (A_rn, B_mr) in parts])
    near_rn = sum(p * A_rn.astype(np.float64) for p, (A_rn, _) in parts)
    made = _of_product(stacked).project(rank, near=np.asarray(near_rn))
    return (made.change.A, made.change.B), made.tail


def shares_of(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum.

    Raises:
        ValueError: there are none, or one is not positive and finite.
    """
    if not weights:
        raise ValueError("a mean of nothing")
    for weight in weights:
        if not 0.0 < weight < math.inf:
            raise ValueError(f"a weight of {weight}")
    top = max(weights)  # the sum of huge ones stays finite
    total = math.fsum(weight / top for weight in weights)
    return [weight / top / total for weight in weights]


def _of_product(change: LowRank) -> Spectrum:
    """The spectrum of a product by QR of its factors and the SVD of the small core."""
    q_rows, r_rows = np.linalg.qr(change.A.T)
    q_columns, r_columns = np.linalg.qr(change.scale * change.B)
    u, sigma_k, vt = np.linalg.svd(r_columns @ r_rows.T, full_matrices=False)
    return Spectrum(q_columns @ u, sigma_k, q_rows @ vt.T, 0.0)


def _tame(near_rr: Float64, sizes_r: Float64) -> tuple[Float64, Float64]:
    """The matrix of these singular values (largest first, the small ones raised) that is nearest
    to `near_rr`, and its inverse. Nearest are the same singular vectors in the same order (von
    Neumann's trace inequality)."""
    x, _, yt = np.linalg.svd(near_rr)
    if sizes_r[0] == 0.0:
        return np.eye(len(sizes_r)), np.eye(len(sizes_r))
    s = np.maximum(sizes_r, _FLOOR * sizes_r[0])
    return (x * s) @ yt, (yt.T / s) @ x.T
