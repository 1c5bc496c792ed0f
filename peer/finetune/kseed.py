"""FedKSeed: a pool of K fixed directions (Qin et al., "Federated full-parameter tuning of
billion-sized language models with communication cost under 18 kilobytes", ICML 2024).

A peer draws a direction from the pool for each of its local steps, as many as it likes, and adds
its slope to that direction's sum. The run's state is one number for each direction:

    a_j <- a_j + sum over i of p_i * (peer i's sum of slopes along z_j)
    theta = theta_0 - lr * sum over j of a_j z_j

So it depends on the base and K numbers alone: a late joiner needs 8 K bytes, whatever came before.

FedKSeed-Pro draws directions more often along which slopes are large. Here a peer goes by the means
of what entries report, |sum of slopes| of one peer in one round, where the paper's go by single
slopes, which are not sent. It is each peer's own choice and needs no agreement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from peer.finetune.perturb import Directions, derive_seed
from peer.finetune.scalars import Reading
from peer.finetune.seed_rules import SeedRules

Sums = npt.NDArray[np.float64]


def pool_of(rules: SeedRules) -> npt.NDArray[np.uint64]:
    """(K,) the seeds of the pool."""
    return np.array([derive_seed("pool", rules.seed, j) for j in range(rules.pool)], np.uint64)


def add(rules: SeedRules, sums_K: Sums, readings: Sequence[Reading]) -> Sums:
    """The sums after a round: each gets the weighted mean of what the peers found. (A peer that
    did not draw a direction found nothing along it.) The order of readings does not matter."""
    if not readings:
        return sums_K
    total = sum(reading.weight for reading in readings)
    found: dict[int, list[float]] = {}
    for reading in readings:
        for index, value in reading.scalars.items():
            found.setdefault(index, []).append(reading.weight * value)
    out = sums_K.copy()
    for index, parts in found.items():
        out[index] += math.fsum(parts) / total
    return out


def step_of(rules: SeedRules, pool_K: npt.NDArray[np.uint64], sums_K: Sums) -> Directions:
    """The way from the base to the state: -lr * a_j along each direction with a sum."""
    some = np.flatnonzero(sums_K)
    factors = (-rules.lr * sums_K[some]).astype(np.float32)
    seen = factors != 0  # some are too small for float32
    return Directions(pool_K[some][seen], factors[seen])


def loudness(rules: SeedRules, rounds: Sequence[Sequence[Reading]]) -> Sums:
    """(K,) the mean of |scalar| over all entries that have drawn a direction; for those that none
    has, the mean of the others'."""
    heard: dict[int, list[float]] = {}
    for readings in rounds:
        for reading in readings:
            for index, value in reading.scalars.items():
                heard.setdefault(index, []).append(abs(value))
    means = {index: math.fsum(values) / len(values) for index, values in heard.items()}
    rest = math.fsum(means.values()) / len(means) if means else 0.0
    return np.array([means.get(index, rest) for index in range(rules.pool)])


def probabilities(loudness_K: Sums) -> Sums:
    """FedKSeed-Pro's: the softmax of the means scaled to 0..1. Uniform while nothing is known."""
    low, high = float(loudness_K.min()), float(loudness_K.max())
    if high == low:
        return np.full(len(loudness_K), 1 / len(loudness_K))
    weights = np.exp((loudness_K - low) / (high - low))
    return np.asarray(weights / weights.sum())


class LocalSums:
    """What one peer finds in a round, as it goes along."""

    def __init__(self) -> None:
        self._slopes: dict[int, list[float]] = {}
        self.steps = 0

    def add(self, index: int, slope: float) -> None:
        self._slopes.setdefault(index, []).append(slope)
        self.steps += 1

    def values(self) -> Mapping[int, float]:
        """The sum for each direction that was drawn."""
        return {index: math.fsum(slopes) for index, slopes in self._slopes.items()}
