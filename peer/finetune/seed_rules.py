"""What every peer of a zeroth-order run agrees on: the head of its seed log.

The rules are data with canonical bytes; their hash binds every signature and every record, so that
no entry of one run passes for another's.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Final

from peer.finetune.mezo import FORMS
from peer.finetune.tensors import MASTERS
from protocols.schema import Exactly, Max, pack

DIRECTIONS_MAX: Final = 1024  # K x P of a DeComFL round: 2 KiB, and a minute of forward passes
POOL_MAX: Final = 4096  # seeds of FedKSeed, as in its paper: 8.8 KiB at most in an entry
REDUCTIONS: Final = ("mean", "median", "trimmed")
WEIGHT_MAX: Final = 15 << 30  # what an entry can say (`scalars`)

_Word = Annotated[str, Max(16)]
_Hash = Annotated[bytes, Exactly(32)]


@dataclass(frozen=True)
class SeedRules:
    """How a run's scalars come about and what is done with them."""

    run: _Hash
    """The run's id."""
    base: _Hash
    """`Weights.digest` of the values that the log starts from."""
    seed: Annotated[int, Max(2**63 - 1)]
    """What all directions are derived from."""
    method: _Word
    """"decomfl": new directions each round. "kseed": a fixed pool of directions."""
    lr: float
    """Step size, the same in every round: FedKSeed's sums mean nothing otherwise."""
    eps: float
    """How far along z the loss is measured."""
    noise: _Word = "gaussian"
    """"gaussian" or "rademacher"."""
    master: _Word = "fp32"
    """"fp32" or "bf16": the type of the values that are hashed."""
    form: _Word = "central"
    """"central" or "forward" differences."""
    perturbations: Annotated[int, Max(DIRECTIONS_MAX)] = 4
    """P, directions in a local step (kseed: 1)."""
    steps: Annotated[int, Max(DIRECTIONS_MAX)] = 1
    """K, local steps in a round. (kseed: each peer takes as many as it likes, and this is 1.)"""
    pool: Annotated[int, Max(POOL_MAX)] = 0
    """Seeds in the pool, a multiple of 8; decomfl: 0."""
    reduction: _Word = "mean"
    """Of the peers' scalars: "mean" by weight; "median" or "trimmed", where all count alike."""
    trim_percent: Annotated[int, Max(49)] = 20
    """trimmed: so much is left out at either end, rounded down to whole peers."""
    weight_max: Annotated[int, Max(WEIGHT_MAX)] = WEIGHT_MAX
    """What an entry's weight counts for at most."""
    scalar_max: float = 1e6
    """An entry with a larger scalar is refused; who measures more sends nothing."""

    def __post_init__(self) -> None:
        """Raises ValueError for rules that make no run."""
        words = {
            "method": ("decomfl", "kseed"), "noise": ("gaussian", "rademacher"),
            "master": tuple(MASTERS), "form": FORMS, "reduction": REDUCTIONS,
        }  # fmt: skip
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}")
        for name in ("lr", "eps", "scalar_max"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 < value < 1e9):
                raise ValueError(f"{name} must be a positive number")
        if self.method == "decomfl":
            if not 1 <= self.perturbations * self.steps <= DIRECTIONS_MAX or self.pool:
                raise ValueError(
                    f"decomfl needs 1..{DIRECTIONS_MAX} steps x perturbations, no pool"
                )
        elif (self.perturbations, self.steps) != (1, 1) or not self.pool or self.pool % 8:
            raise ValueError("kseed needs a pool in eights, and 1 for perturbations and steps")
        elif self.reduction != "mean":
            raise ValueError("kseed's sums are means: a seed is seldom drawn by two peers at once")
        if not self.weight_max:
            raise ValueError("weight_max must be positive")

    @cached_property
    def genesis(self) -> bytes:
        """SHA-256 (32 bytes) of the rules: the hash that the log's first record follows."""
        return hashlib.sha256(b"murmuration/seeds/1" + pack(self)).digest()

    @property
    def scalars(self) -> int:
        """How many scalars a peer may send in a round."""
        return self.pool or self.perturbations * self.steps
