"""DeComFL: new directions each round, one scalar for each (Li et al., "Achieving dimension-free
communication in federated learning via zeroth-order optimization", ICLR 2025).

In a round everybody takes K local steps along the same K x P directions, z_kp, with slopes of its
own that it measures at its own drifting values:

    theta_i,k+1 = theta_i,k - lr / P * sum over p of rho_i,kp z_kp

It sends the slopes, forgets its own steps, and everybody applies the slopes' mean:

    theta <- theta - lr / P * sum over k, p of mean_i(rho_i,kp) z_kp

Instead of the mean: the median or a trimmed mean of each slope, which a minority of liars can't
move far. Everything here is a pure function of the entries, whatever their order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from peer.finetune.perturb import Directions, derive_seed
from peer.finetune.scalars import Reading
from peer.finetune.seed_rules import SeedRules

Factors = npt.NDArray[np.float32]


def seeds_of(rules: SeedRules, number: int) -> list[list[int]]:
    """The seeds of round `number`: P for each of K steps. Nobody sends them."""
    return [
        [derive_seed("decomfl", rules.seed, number, k, p) for p in range(rules.perturbations)]
        for k in range(rules.steps)
    ]


def dither_of(rules: SeedRules, number: int) -> int:
    """What bfloat16 values are rounded by in this round."""
    return derive_seed("dither", rules.seed, number)


def reduce(rules: SeedRules, readings: Sequence[Reading]) -> dict[int, float]:
    """One slope for each direction; 0 (left out) where there are no readings.

    Sums are exact before they are rounded once (math.fsum), so their order does not matter.
    """
    if not readings:
        return {}
    means = {}
    for index in range(rules.scalars):
        slopes = [reading.scalars.get(index, 0.0) for reading in readings]
        if rules.reduction == "mean":
            weights = [reading.weight for reading in readings]
            total = math.fsum(w * x for w, x in zip(weights, slopes, strict=True))
            value = total / sum(weights)
        else:
            value = _middle(sorted(slopes), rules)
        if value:
            means[index] = value
    return means


def factors_of(rules: SeedRules, slopes: Mapping[int, float]) -> Factors:
    """(K * P,) what each direction is multiplied with: -lr / P * slope. All that a late joiner
    needs of a round."""
    share = rules.lr / rules.perturbations
    return np.array([-share * slopes.get(i, 0.0) for i in range(rules.scalars)], np.float32)


def step_of(rules: SeedRules, number: int, factors_KP: Factors) -> Directions:
    """The step of round `number` that all peers take. Directions of factor 0 are left out: a sum
    that is 0 would still turn -0 into 0, and cost as much as any other."""
    seeds = np.array([s for step in seeds_of(rules, number) for s in step], np.uint64)
    some = np.flatnonzero(factors_KP)
    return Directions(seeds[some], factors_KP[some])


def _middle(slopes: list[float], rules: SeedRules) -> float:
    """The mean of what is left when as many are cut off at either end."""
    count = len(slopes)
    if rules.reduction == "median":
        cut = (count - 1) // 2
    else:
        cut = min(count * rules.trim_percent // 100, (count - 1) // 2)
    kept = slopes[cut : count - cut]
    return math.fsum(kept) / len(kept)
