"""Layers and factors that every test of low-rank changes draws from: nothing square or alike."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from peer.finetune.changes import LowRank

Float64 = npt.NDArray[np.float64]

LAYERS = [(48, 32), (32, 48), (8, 200), (200, 8), (17, 17)]
"""(m, n); in the third and fourth a side equals a rank, the last is square."""


def pair(rng: np.random.Generator, m: int, r: int, n: int, alpha: float | None = None) -> LowRank:
    """Factors without any symmetry; alpha = r by default, so that the scale is 1."""
    scale = 1.0 if alpha is None else alpha / r
    return LowRank(rng.standard_normal((r, n)), rng.standard_normal((m, r)), scale)


def mixed(seed: int, m: int, n: int) -> list[tuple[float, LowRank]]:
    """Four peers of unequal weights, ranks and alphas."""
    rng = np.random.default_rng(seed)
    kinds = [(1, 16.0), (2, 16.0), (4, 3.0), (min(8, m, n), 20.0)]
    return [
        (p, pair(rng, m, r, n, a)) for p, (r, a) in zip((3.0, 1.0, 4.0, 1.5), kinds, strict=True)
    ]


def dense_mean(parts: list[tuple[float, LowRank]]) -> Float64:
    """The sum that nobody should form, formed."""
    total = sum(weight for weight, _ in parts)
    made = sum(weight / total * part.scale * (part.B @ part.A) for weight, part in parts)
    return np.asarray(made, np.float64)


def apart(one: npt.NDArray[np.floating], other: npt.NDArray[np.floating]) -> float:
    """Relative distance, against `other`."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))
