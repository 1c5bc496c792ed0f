"""The manifest's section for zeroth-order runs: what everybody's scalars mean, and how they meet.

Ranges that only whoever has the directions' code knows are checked there too
(`peer.finetune.seed_rules`); what is here reads no more than numbers and words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peer.manifest_checks import above_zero, between, need

DIRECTIONS_MAX = 1024  # as `seed_rules`, which imports torch: a minute of forward passes
POOL_MAX = 4096
WEIGHT_MAX = 15 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class ZerothSpec:
    """method.kind = "zo": training by forward passes along random directions."""

    estimator: Literal["decomfl", "kseed"] = "decomfl"
    """`decomfl`: new directions in each round, 2 bytes for each. `kseed`: a fixed pool of them."""
    adapters: bool = True
    """Whether adapters are trained (`method.rank`, `alpha`, `targets`), or all weights."""
    perturbations: int = 8
    """decomfl: P, directions in a local step. Each costs two runs of the model."""
    steps: int = 1
    """decomfl: K, local steps of a pass. A peer with time for several passes does them."""
    pool: int = 4096
    """kseed: K, directions in the pool, in eights."""
    eps: float = 1e-3
    """How far along a direction the loss is measured."""
    noise: Literal["gaussian", "rademacher"] = "gaussian"
    """What directions are made of; rademacher's +1 and -1 are the quicker."""
    master: Literal["fp32", "bf16"] = "fp32"
    """The type of the values that all peers hold alike; bf16 is rounded at random."""
    form: Literal["central", "forward"] = "central"
    """Differences: two runs of the model for a direction, or one and one for all."""
    reduction: Literal["mean", "median", "trimmed"] = "mean"
    """Of the peers' scalars: by their tokens; or where all count alike, decomfl only."""
    trim_percent: int = 20
    """trimmed: so much is left out at either end."""
    weight_max: int = 2**20
    """Tokens that an entry counts for at most, whatever its author claims."""

    def __post_init__(self) -> None:
        between("zeroth.perturbations", self.perturbations, 1, DIRECTIONS_MAX)
        between("zeroth.steps", self.steps, 1, DIRECTIONS_MAX)
        need(self.perturbations * self.steps <= DIRECTIONS_MAX, "zeroth.steps",
             f"must be at most {DIRECTIONS_MAX} together with perturbations",
             self.steps)  # fmt: skip
        between("zeroth.pool", self.pool, 8, POOL_MAX)
        need(self.pool % 8 == 0, "zeroth.pool", "must be a multiple of 8", self.pool)
        above_zero("zeroth.eps", self.eps, 1)
        need(self.estimator == "decomfl" or self.reduction == "mean", "zeroth.reduction",
             "must be mean for kseed: a seed is seldom drawn by two peers at once",
             self.reduction)  # fmt: skip
        between("zeroth.trim_percent", self.trim_percent, 0, 49)
        between("zeroth.weight_max", self.weight_max, 1, WEIGHT_MAX)
