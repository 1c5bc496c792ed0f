"""Adam's moments when an adapter's factors are exchanged for others with another gauge.

Averaging replaces (A, B) of scale s by (A', B') of scale s'. Where A' = R A and s' B' = s B R^-1
the product is the same and only the gauge has changed; gradients then change by

    dL/dB = s G A^T    ->   dL/dB' = s' / s (dL/dB) R^T          (G = dL/dW, m x n)
    dL/dA = s B^T G    ->   dL/dA' = R^-T (dL/dA)

and so do their running means, linearly. The running mean of squares v can't be known without the
covariances between the ranks. We move the square of the mean as the mean moves and the rest as if
its ranks were independent (as LDAdam does, arXiv 2410.16103):

    v' = (M m)^2 + (M o M)(v - m^2)^+         M = R^-T or s' / s R, o and ^2 entry by entry

with both corrected for their start at zero. Exact for permutations and changes of sign or size of
ranks, and where gradients are steady.

If the rows of A' leave the span of A's there is no such R. How much of a row lies outside says how
far it turned; R is then the least-squares one, and for a rank whose row turned beyond a limit the
moments of B are forgotten. A's depend on the columns of B in the same way. Ranks may differ: new
directions start with nothing.

Shapes: m x n = the layer, r = rank before, q = rank after.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from peer.finetune.changes import AnyArray, Float64, LowRank

TURNED_MAX: Final = 0.5
"""The share of a row's or column's length outside the old span (the sine of an angle) beyond which
its partner's moments are more wrong than right: at 0.5 a quarter of the energy is new."""
_SINGULAR: Final = 1e-7  # directions below this share of the longest are float32's rounding


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Adam's running means over one factor, as Adam keeps them: not corrected for their start."""

    mean: AnyArray
    """Of gradients."""
    square: AnyArray
    """Of their squares; of the same shape."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adam:
    """What the moments were made with.

    Raises (on construction):
        ValueError: not Adam's ranges.
    """

    steps: int
    """That went into them, at least 1."""
    beta1: float = 0.9
    beta2: float = 0.999

    def __post_init__(self) -> None:
        if self.steps < 1 or not (0.0 <= self.beta1 < 1.0 and 0.0 <= self.beta2 < 1.0):
            raise ValueError(f"moments of {self}")


@dataclass(frozen=True, slots=True, eq=False)
class Carried:
    """Moments for the new factors, and what became of the old ones."""

    A: Moments
    B: Moments
    rows_turned: Float64
    """(q,): the share of each new row of A outside the span of the old ones, 0 to 1. Beyond the
    limit its rank's moments of B are zero."""
    columns_turned: Float64
    """(q,): the same of B's columns, for the moments of A."""


def carry_moments(
    before: LowRank,
    after: LowRank,
    moments: tuple[Moments, Moments],
    adam: Adam,
    *,
    turned_max: float = TURNED_MAX,
) -> Carried:
    """The moments (of A, of B) for the factors `after`, rotated or zero; see the module.

    O((m + n) r^2 + r^3).

    Raises:
        ValueError: layers or the moments' shapes differ, or a scale is 0.
    """
    if before.shape != after.shape:
        raise ValueError(f"factors of a layer of {before.shape}, then of {after.shape}")
    if 0.0 in (before.scale, after.scale):
        raise ValueError("factors of scale 0 have no gradient")
    of_A, of_B = moments
    for name, held, factor in (("A", of_A, before.A), ("B", of_B, before.B)):
        if held.mean.shape != factor.shape or held.square.shape != factor.shape:
            raise ValueError(f"moments of {held.mean.shape} for a factor {name} of {factor.shape}")
    A_rn, B_mr = before.A.astype(np.float64), before.B.astype(np.float64)
    gauge_qr, rows_turned = _gauge(A_rn.T, after.A.astype(np.float64).T)
    _, columns_turned = _gauge(B_mr, after.B.astype(np.float64))
    inverse_qr = np.asarray(np.linalg.pinv(gauge_qr, rcond=_SINGULAR).T, np.float64)
    scaled_qr = after.scale / before.scale * gauge_qr
    return Carried(
        _moved(of_A, inverse_qr * (columns_turned <= turned_max)[:, None], adam),
        _transposed(
            _moved(_transposed(of_B), scaled_qr * (rows_turned <= turned_max)[:, None], adam)
        ),
        rows_turned,
        columns_turned,
    )


def _gauge(old: Float64, new: Float64) -> tuple[Float64, Float64]:
    """(least-squares R (q, r) with new ~ old R^T, the share of each column of new that lies outside
    old's span), where old is (d, r) and new (d, q)."""
    u, sigma, vt = np.linalg.svd(old, full_matrices=False)
    kept = int(np.count_nonzero(sigma > _SINGULAR * sigma[0])) if sigma[0] > 0.0 else 0
    inside = u[:, :kept].T @ new
    whole_q = np.linalg.norm(new, axis=0)
    outside_q = np.linalg.norm(new - u[:, :kept] @ inside, axis=0)
    R_qr = (vt[:kept].T @ (inside / sigma[:kept, None])).T
    return R_qr, np.asarray(outside_q / np.where(whole_q > 0.0, whole_q, 1.0), np.float64)


def _moved(held: Moments, map_qr: Float64, adam: Adam) -> Moments:
    """Over the first axis."""
    started1 = -math.expm1(adam.steps * math.log(adam.beta1)) if adam.beta1 else 1.0
    started2 = -math.expm1(adam.steps * math.log(adam.beta2)) if adam.beta2 else 1.0
    mean = held.mean.astype(np.float64) / started1
    spread = np.maximum(held.square.astype(np.float64) / started2 - np.square(mean), 0.0)
    moved = map_qr @ mean
    square = np.square(moved) + np.square(map_qr) @ spread
    return Moments(started1 * moved, started2 * square)


def _transposed(held: Moments) -> Moments:
    return Moments(held.mean.T, held.square.T)
