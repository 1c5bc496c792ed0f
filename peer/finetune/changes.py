"""What one peer wants changed in one layer, in the form in which it has it.

A layer's weight W is m x n as mathematics has it, y = x W^T: rows are outputs. A change dW is

- `LowRank`: LoRA's s B A with s = alpha / r, of any rank;
- `Dense`: all of it, from a peer that trains every parameter;
- `Sparse`: some values and where they are;
- `Expanded`: whatever a function gives, called once: how zeroth-order peers, who send seeds and
  scalars, take part. Seeds perturb either the factors (then it gives a `LowRank`) or the layer
  itself (then a `Dense`).

Two traps of published code are closed by the types. The scale belongs to the factors, so ranks
and alphas may differ from peer to peer. And which way round a layer stores its weight
(`torch.nn.Linear` as W, GPT-2's `Conv1D` as W^T) is asked for where a change is folded in, and only
there; for square layers nothing else could tell.

Shapes: m x n = the layer (outputs x inputs), r = rank, K = values kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tensorcodecs import VALUE_ABS_MAX

Float64 = npt.NDArray[np.float64]
AnyArray = npt.NDArray[Any]

VALUE_MAX: Final = 1e100
"""No larger magnitudes anywhere: products of two and their squares stay finite in float64."""
SCALE_MAX: Final = 2.0**16
"""alpha / r of a peer's change; people use 0.1 to 64."""
_FOLD_ROWS: Final = 256  # rows of a product made at once when it is folded into a weight


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """scale * B A.

    Raises (on construction):
        ValueError: shapes that don't fit, no rank at all, or values that are not finite.
    """

    A: AnyArray
    """(r, n)."""
    B: AnyArray
    """(m, r)."""
    scale: float = 1.0
    """alpha / r."""

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise ValueError(f"factors A {self.A.shape} and B {self.B.shape} have no product")
        if 0 in (*self.A.shape, *self.B.shape):
            raise ValueError(f"empty factors: A {self.A.shape}, B {self.B.shape}")
        if not math.isfinite(self.scale):
            raise ValueError(f"a scale of {self.scale}")
        for name, values in (("A", self.A), ("B", self.B)):
            refuse_values(name, values)

    @property
    def rank(self) -> int:
        """Columns of B, whether they are independent or not."""
        return int(self.A.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return int(self.B.shape[0]), int(self.A.shape[1])

    def norm(self) -> float:
        """Frobenius norm of the product, which is never formed. O((m + n) r^2)."""
        _, rows_rr = np.linalg.qr(self.A.astype(np.float64).T)
        _, columns_rr = np.linalg.qr(self.B.astype(np.float64))
        return abs(self.scale) * float(np.linalg.norm(columns_rr @ rows_rr.T))

    def dense(self) -> Float64:
        """(m, n), formed."""
        product: Float64 = self.scale * (self.B.astype(np.float64) @ self.A.astype(np.float64))
        return product

    def fold_into(self, weight: AnyArray, *, stored_transposed: bool) -> None:
        """weight += the product, in place, a few rows at a time.

        `stored_transposed`: whether the layer keeps W^T (n, m), as GPT-2's Conv1D does (peft's
        `fan_in_fan_out`), or W (m, n), as `torch.nn.Linear` does.

        Raises:
            ValueError: the weight has another shape.
        """
        m, n = self.shape
        if weight.shape != ((n, m) if stored_transposed else (m, n)):
            raise ValueError(
                f"a weight of {weight.shape} for a change of {m} x {n} "
                f"that is stored {'transposed' if stored_transposed else 'as it is'}"
            )
        B_mr = self.scale * self.B.astype(np.float64)
        left, right = (self.A.astype(np.float64).T, B_mr.T) if stored_transposed else (
            B_mr, self.A.astype(np.float64)
        )  # fmt: skip
        for start in range(0, len(left), _FOLD_ROWS):
            part = slice(start, start + _FOLD_ROWS)
            weight[part] = weight[part] + left[part] @ right


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """The change itself.

    Raises (on construction):
        ValueError: not a matrix, or values that are not finite.
    """

    values: AnyArray
    """(m, n)."""

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or 0 in self.values.shape:
            raise ValueError(f"a dense change of shape {self.values.shape}")
        refuse_values("a dense change", self.values)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return int(self.values.shape[0]), int(self.values.shape[1])

    def dense(self) -> Float64:
        """(m, n)."""
        return self.values.astype(np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Sparse:
    """Values at places counted row by row, ascending: each place at most once.

    Raises (on construction):
        ValueError: places that are outside, twice or out of order; values that are not finite.
    """

    indices: npt.NDArray[np.int64]
    """(K,)."""
    values: AnyArray
    """(K,)."""
    shape: tuple[int, int]
    """(m, n)."""

    def __post_init__(self) -> None:
        m, n = self.shape
        if m < 1 or n < 1 or self.indices.shape != self.values.shape or self.values.ndim != 1:
            raise ValueError(
                f"{self.indices.shape} places and {self.values.shape} values in {m} x {n}"
            )
        if self.indices.dtype != np.int64:
            raise ValueError(f"places of type {self.indices.dtype}")
        if len(self.indices):
            if (np.diff(self.indices) <= 0).any():
                raise ValueError("places out of order, or one given twice")
            if self.indices[0] < 0 or self.indices[-1] >= m * n:
                raise ValueError(f"a place outside {m} x {n}")
        refuse_values("a sparse change", self.values)

    def dense(self) -> Float64:
        """(m, n), formed."""
        flat = np.zeros(self.shape[0] * self.shape[1])
        flat[self.indices] = self.values
        return flat.reshape(self.shape)

    def factors(self) -> LowRank | None:
        """The same as a product, where it lies in so few rows or columns that this is smaller."""
        m, n = self.shape
        rows, row_of = np.unique(self.indices // n, return_inverse=True)
        columns, column_of = np.unique(self.indices % n, return_inverse=True)
        rank = min(len(rows), len(columns))
        if rank == 0 or rank * (m + n) >= m * n:
            return None
        A_rn, B_mr = np.zeros((rank, n)), np.zeros((m, rank))
        if len(rows) <= len(columns):
            A_rn[row_of, self.indices % n] = self.values
            B_mr[rows, np.arange(rank)] = 1.0
        else:
            B_mr[self.indices // n, column_of] = self.values
            A_rn[np.arange(rank), columns] = 1.0
        return LowRank(A_rn, B_mr)


@dataclass(frozen=True, slots=True, eq=False)
class Expanded:
    """What a function makes of seeds and scalars, when it is needed and not before."""

    expand: Callable[[], LowRank | Dense]
    shape: tuple[int, int]
    """(m, n)."""

    def made(self) -> LowRank | Dense:
        """
        Raises:
            ValueError: it is of another shape.
        """
        change = self.expand()
        if change.shape != self.shape:
            raise ValueError(f"seeds gave a change of {change.shape}, not {self.shape}")
        return change


Change = LowRank | Dense | Sparse | Expanded


def check_change(change: Change, shape: tuple[int, int]) -> None:
    """Whether a peer's change belongs to this layer.

    Raises:
        ValueError: it is of another shape, of a rank larger than the layer's smaller side, or has
            values or a scale that nobody who trains would send.
    """
    if change.shape != shape:
        raise ValueError(f"a change of {change.shape} for a layer of {shape}")
    match change:
        case LowRank():
            if change.rank > min(shape):
                raise ValueError(f"rank {change.rank} is more than a layer of {shape} has")
            if not 0.0 < change.scale <= SCALE_MAX:
                raise ValueError(f"a scale of {change.scale}, not in 0..{SCALE_MAX:g}")
            refuse_values("A", change.A, VALUE_ABS_MAX)
            refuse_values("B", change.B, VALUE_ABS_MAX)
        case Dense() | Sparse():
            refuse_values("a change", change.values, VALUE_ABS_MAX)
        case Expanded():
            pass  # made of our own numbers, when it is


def refuse_values(name: str, values: AnyArray, top: float = VALUE_MAX) -> None:
    """Raises ValueError: not floating-point numbers, not finite, or beyond `top`."""
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"{name}: values of type {values.dtype}")
    # NaN survives max and min.
    if values.size and not (float(values.max()) <= top and float(values.min()) >= -top):
        raise ValueError(f"{name}: holds values that are not finite or beyond {top:g}")
