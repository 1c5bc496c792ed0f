"""MeZO: gradients from forward passes (Malladi et al., "Fine-tuning language models with just
forward passes", NeurIPS 2023, algorithm 1).

    rho_p = (L(theta + eps z_p) - L(theta - eps z_p)) / (2 eps)      g = mean over p of rho_p z_p

E[g] is the gradient (up to eps^2), E|g|^2 = (d + 2) |gradient|^2 for one gaussian direction and
d |gradient|^2 for a rademacher one; P directions divide what exceeds the gradient by P. Central
differences take 2 P forward passes, forward differences P + 1 with an error of order eps.

The tensors are shifted in passing (`peer.finetune.tensors`): memory as for inference, plus the
largest module's tensors, and nothing to restore.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch

from peer.finetune.perturb import NOTHING, Directions
from peer.finetune.tensors import Weights

Form = Literal["central", "forward"]
FORMS: Final = ("central", "forward")


@dataclass(frozen=True, slots=True)
class Measured:
    """What the loss does along some directions."""

    slopes: tuple[float, ...]
    """rho_p for each seed, in the loss's unit per unit of z."""
    loss: float
    """At the point itself (forward), or the mean of both sides (central), nats per token."""

    @property
    def finite(self) -> bool:
        """Whether everything is a number. If not, the batch or eps was too much: send nothing."""
        return math.isfinite(self.loss) and all(map(math.isfinite, self.slopes))


def measure(
    weights: Weights,
    loss: Callable[[], torch.Tensor],
    seeds: Sequence[int],
    eps: float,
    form: Form = "central",
    at: Directions = NOTHING,
) -> Measured:
    """The slopes of `loss` along the directions of `seeds`, at the master values + `at`.

    `loss` runs the model on one batch, the same each time (no dropout), and gives a scalar.
    Cost: 2 len(seeds) runs (central) or len(seeds) + 1 (forward).
    """
    if eps <= 0 or not math.isfinite(eps):
        raise ValueError(f"eps must be a positive number, not {eps}")
    if not weights.traced:
        weights.trace(loss)

    def value(step: Directions) -> float:
        with weights.moved(step):
            return float(loss())

    if form == "forward":
        here = value(at)
        ahead = [value(at + Directions.of([(seed, eps)])) for seed in seeds]
        return Measured(tuple((there - here) / eps for there in ahead), here)
    slopes, losses = [], []
    for seed in seeds:
        plus = value(at + Directions.of([(seed, eps)]))
        minus = value(at + Directions.of([(seed, -eps)]))
        slopes.append((plus - minus) / (2 * eps))
        losses.append((plus + minus) / 2)
    return Measured(tuple(slopes), math.fsum(losses) / len(losses) if losses else math.nan)


def descent(measured: Measured, seeds: Sequence[int], lr: float) -> Directions:
    """-lr times the mean over p of rho_p z_p."""
    share = lr / len(seeds)
    return Directions.of([(s, -share * rho) for s, rho in zip(seeds, measured.slopes, strict=True)])


def step(
    weights: Weights,
    loss: Callable[[], torch.Tensor],
    seeds: Sequence[int],
    eps: float,
    lr: float,
    form: Form = "central",
) -> Measured:
    """One MeZO step by oneself. A loss that is not finite changes nothing (see `Measured`)."""
    measured = measure(weights, loss, seeds, eps, form)
    if measured.finite:
        weights.apply(descent(measured, seeds, lr), dither_seed=seeds[0])
    return measured
