"""The weighted mean of low-rank products, brought back to their rank without forming a matrix.

mean = sum p_i B_i A_i is a product of stacked factors. QR of both stacks leaves a small core whose
SVD is the mean's own; cutting it at rank r is the best that rank r can do, and the error is
exactly the root of the sum of the cut singular values squared (Eckart and Young, 1936). Averaging
A and B one by one is something else: off by half the sum of p_i p_j (B_i - B_j)(A_i - A_j).

The factors of a product are free up to an invertible r x r matrix, and peers go on training from
them with work in flight, so the choice matters. We take the A nearest to the mean of the A_i that
spans the right rows; one member alone gets its own factors back. Directions that the mean does not
use are filled from the A_i too: a fresh adapter (B = 0) keeps its A instead of dying at zero.

Shapes: m x n = the layer, r = rank, K = ranks stacked (members times r).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Factors = tuple[npt.NDArray[Any], npt.NDArray[Any]]
"""(A: (r, n), B: (m, r))."""

_ZERO: Final = 1e-7  # singular values below this share of the largest are float32's rounding
_FLOOR: Final = 0.03  # flattest direction allowed in A against its steepest, so that B stays small


def mean_product(parts: Sequence[tuple[float, Factors]]) -> tuple[Factors, float]:
    """((A, B), norm of what was cut) for sum p B A over (p, (A, B)), all of one shape.

    The rank must not exceed m or n. O((m + n) K^2 + K^3) time, O((m + n) K) memory, in float64.
    """
    mean_A_rn: Float64 = sum(p * A_rn.astype(np.float64) for p, (A_rn, _) in parts)  # type: ignore[assignment]
    rank = len(mean_A_rn)
    rows_nK = np.concatenate([A_rn.astype(np.float64).T for _, (A_rn, _) in parts], axis=1)
    columns_mK = np.concatenate([p * B_mr.astype(np.float64) for p, (_, B_mr) in parts], axis=1)
    q_rows, r_rows = np.linalg.qr(rows_nK)
    q_columns, r_columns = np.linalg.qr(columns_mK)
    u, sigma, vt = np.linalg.svd(r_columns @ r_rows.T)
    used = min(rank, int(np.count_nonzero(sigma > _ZERO * sigma[0])))
    tail = math.sqrt(float(np.sum(np.square(sigma[used:]))))

    v_nr = np.empty((mean_A_rn.shape[1], rank))
    v_nr[:, :used] = q_rows @ vt[:used].T
    if used < rank:
        rest_rn = mean_A_rn - (mean_A_rn @ v_nr[:, :used]) @ v_nr[:, :used].T
        v_nr[:, used:] = np.linalg.svd(rest_rn, full_matrices=False)[2][: rank - used].T
    gauge_rr, inverse_rr = _tame(mean_A_rn @ v_nr)
    u_mr = np.zeros((columns_mK.shape[0], rank))
    u_mr[:, :used] = (q_columns @ u[:, :used]) * sigma[:used]
    return (gauge_rr @ v_nr.T, u_mr @ inverse_rr), tail


def _tame(matrix_rr: Float64) -> tuple[Float64, Float64]:
    """The matrix with its small singular values raised, and its inverse."""
    x, s, yt = np.linalg.svd(matrix_rr)
    if s[0] == 0.0:
        return np.eye(len(s)), np.eye(len(s))
    s = np.maximum(s, _FLOOR * s[0])
    return (x * s) @ yt, (yt.T / s) @ x.T
