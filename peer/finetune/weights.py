"""How much a peer's change counts: what it learned from, how noisily, and how long ago.

The mean of independent unbiased estimates has the least variance where each weighs the inverse of
its own variance. In a first-order peer's, what varies is which tokens it drew: variance ~ 1 /
tokens. A zeroth-order peer that tries P random directions in a space of d dimensions has, for the
gradient g of its own tokens,

    E |estimate|^2 = (d + P + 1) / P |g|^2      (Gaussian directions; P = 1: the known (d + 2))

so, where the draw of tokens dominates |g|^2 as it does in finetuning's small batches, its variance
is larger by (d + P) / P and it weighs

    tokens * P / (d_eff + P)

with d_eff, the effective dimension, in place of d: a loss whose curvature lives in a few directions
is as easy as a small one (Malladi et al., "Fine-Tuning Language Models with Just Forward Passes",
arXiv 2305.17333: the local effective rank). It can't be known beforehand: `effective_dimension`
fits it to what zeroth-order peers' estimates measure. First-order peers count as P = infinity.

Late work counts tokens / (1 + lambda s) for s versions behind, as in rounds (`peer/train/owed.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What is behind a peer's change.

    Raises (on construction):
        ValueError: a number that is not finite or has no meaning.
    """

    tokens: float
    """Seen since the last change that counted; more than 0."""
    perturbations: int | None = None
    """Directions tried per step by a zeroth-order peer; None: it had the gradient."""
    versions_behind: int = 0
    """How many versions the state has moved on since the work began."""

    def __post_init__(self) -> None:
        if not 0.0 < self.tokens < math.inf:
            raise ValueError(f"{self.tokens} tokens")
        if self.perturbations is not None and self.perturbations < 1:
            raise ValueError(f"{self.perturbations} perturbations")
        if self.versions_behind < 0:
            raise ValueError(f"{self.versions_behind} versions behind")


def weight_of(evidence: Evidence, *, effective_dim: float, staleness: float = 0.0) -> float:
    """The weight of a change in a round of mixed kinds; see the module. Unit: tokens.

    `effective_dim`: of the space that zeroth-order peers search, at least 0. `staleness`: lambda.

    Raises:
        ValueError: either is negative or not finite.
    """
    if not 0.0 <= effective_dim < math.inf or not 0.0 <= staleness < math.inf:
        raise ValueError(f"dimension {effective_dim}, staleness {staleness}")
    weight = evidence.tokens / (1.0 + staleness * evidence.versions_behind)
    if evidence.perturbations is None:
        return weight
    return weight * evidence.perturbations / (effective_dim + evidence.perturbations)


def inverse_variance(variances: Sequence[float]) -> list[float]:
    """Shares that give a mean of independent unbiased estimates the least variance. An estimate
    of variance 0 is exact: such ones share everything.

    Raises:
        ValueError: there are none, or one is negative or not finite.
    """
    if not variances:
        raise ValueError("weights of nothing")
    for variance in variances:
        if not 0.0 <= variance < math.inf:
            raise ValueError(f"a variance of {variance}")
    least = min(variances)
    if least == 0.0:
        exact = sum(variance == 0.0 for variance in variances)
        return [1.0 / exact if variance == 0.0 else 0.0 for variance in variances]
    relative = [least / variance for variance in variances]  # 1 / variance may be infinite
    total = math.fsum(relative)
    return [value / total for value in relative]


def effective_dimension(scalar: float, vector: float, perturbations: int) -> float:
    """d_eff from E|estimate|^2 = (d + P + 1) / P |g|^2, at least 0.

    `scalar`: the mean of squared directional derivatives, which estimates |g|^2 without bias.
    `vector`: the mean of |estimate|^2 over the same steps, each the mean of P directions.

    Raises:
        ValueError: a number that is not positive and finite.
    """
    if not (0.0 < scalar < math.inf and 0.0 < vector < math.inf and perturbations >= 1):
        raise ValueError(f"squares {scalar}, {vector} of {perturbations} perturbations")
    return max(0.0, perturbations * vector / scalar - perturbations - 1)
