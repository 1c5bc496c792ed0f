"""The Gaussian values that perturbations are made of: a table, the same bits on every machine.

Sixteen random bits make one value: the top one is its sign, the others choose among 32,768
magnitudes. Those are the half normal's quantiles at the middles of equal shares, scaled to a mean
square of one and rounded to multiples of 2**-12, so each is exact in float32. Largest: 4.325.
Variance 1 within 1e-6, kurtosis 2.9992.

Nothing but additions, multiplications, divisions and square roots of float64 goes into it, one
NumPy call each; IEEE 754 rounds these the same everywhere, and no library's logarithm takes part.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

MAGNITUDES: Final = 2**15
GRID: Final = 2.0**-12  # 1/1000 of the spread of the smallest values, far below what training feels
TABLE_SHA256: Final = "1f196cb6bf1c57ced59f57a41f1a93a213d4cafbe3cfae908a22d7dc8e14e920"
"""Of the table's little-endian bytes; it is the run's meaning of "gaussian"."""

_PI: Final = 3.141592653589793
_NEWTON: Final = 16  # the last values settle, to 1e-11, with the fourteenth step
_TERMS: Final = 140  # of the series below, at |x| <= 4.4


@lru_cache(maxsize=1)
def gaussian_table() -> npt.NDArray[np.float32]:
    """(65536,) float32: the value of each pattern of 16 bits. Read only.

    Raises:
        ArithmeticError: this machine does not calculate by IEEE 754; its replicas would drift.
    """
    share = (np.arange(MAGNITUDES) + 0.5) / (2 * MAGNITUDES)  # of the area between 0 and x
    x = np.full(MAGNITUDES, 0.0)
    for _ in range(_NEWTON):  # the area is concave in x: from the left no step goes too far
        area, density = _area_and_density(x)
        x = np.minimum(x + (share - area) / density, 4.5)
    x = x / np.sqrt(_total(x * x) / MAGNITUDES)
    magnitude = np.rint(x / GRID) * GRID
    table = np.concatenate([magnitude, -magnitude]).astype("<f4")
    if hashlib.sha256(table.tobytes()).hexdigest() != TABLE_SHA256:
        raise ArithmeticError(
            "this machine's floating point does not follow IEEE 754: the table of normal values"
            " came out otherwise, and its replicas of a zeroth-order run would drift"
        )
    out = table.astype(np.float32)
    out.flags.writeable = False
    return out


def _area_and_density(
    x: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The normal's area between 0 and x, and its density at x, for 0 <= x <= 4.5.

    Both from series with positive terms alone: exp(x^2/2) = sum (x^2/2)^k / k!, and area/density =
    sum x^(2k+1) / (1 * 3 * ... * (2k+1)) (Abramowitz and Stegun, 26.2.11).
    """
    square = x * x
    power, growth = np.ones_like(x), np.ones_like(x)
    term, ratio = x.copy(), x.copy()
    for k in range(1, _TERMS):
        power = power * (square / (2 * k))
        growth = growth + power
        term = term * (square / (2 * k + 1))
        ratio = ratio + term
    density = 1.0 / (growth * np.sqrt(2 * _PI))
    return ratio * density, density


def _total(x: npt.NDArray[np.float64]) -> float:
    """A sum in a fixed order: NumPy's own depends on the width of the machine's vectors."""
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return float(x[0])
