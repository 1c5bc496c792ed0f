"""What a codec costs in the end: validation loss after real training, against float32's.

4 workers train one small language model (`swarm`), and everything they exchange is coded both
ways: each worker's pseudo-gradient, and the mean of what arrives. All codecs of a seed start from
the same warmed-up weights and see the same samples in the same order, so losses are compared seed
by seed. The noise is the standard deviation of float32's own final loss from seed to seed: what
other first weights and other samples change anyway. A codec whose mean difference is smaller than
that can't be told from none.

With feedback, every sender keeps what its frames left out and adds it, faded, to what it sends
next; the mean's coder does so too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from tensorcodecs import get_codec
from tensorcodecs.feedback import encode_with_feedback
from tests.bench.result import Bar, Cell, Progress, Result
from tests.bench.swarm import Plan, Swarm

Float32 = npt.NDArray[np.float32]

_PLAN: Final = Plan()
_QUICK: Final = Plan(warmup_steps=30, rounds=2, steps=10, validation_samples=64)
_SEEDS: Final = 5
_REFERENCE: Final = "fp32"
_LOSSY: Final = ("bf16", "high", "q4", "low", "min", "sparse")
_DECAY: Final = 0.95  # of what was left out; the same for every codec, whatever its default is
_ALONE_MIN: Final = 3.0  # in noises: what can't tell one worker from four can't tell codecs either


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to exchange."""

    codec: str
    feedback: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """How it went with one seed."""

    loss: float
    bits_up: float
    """Per value, of the workers' frames."""
    bits_down: float
    """Per value, of the mean's frames."""


class Channel:
    """One sender's way to all others: what it is given arrives coded and decoded."""

    def __init__(self, arm: Arm) -> None:
        self._codec = get_codec(arm.codec)
        self._decay = _DECAY if arm.feedback else None
        self._residual: Float32 | None = None
        self._bytes = self._values = 0

    def __call__(self, sent: Float32) -> Float32:
        if self._decay is None:
            frames = self._codec.encode_many(sent)
        else:
            residual = np.zeros_like(sent) if self._residual is None else self._residual
            frames, self._residual = encode_with_feedback(self._codec, sent, residual, self._decay)
        self._bytes += sum(map(len, frames))
        self._values += len(sent)
        arrived = np.empty_like(sent)
        self._codec.decode_many(frames, arrived)
        return arrived

    @property
    def bits(self) -> float:
        """Per value, of all that was sent."""
        return 8 * self._bytes / self._values


@dataclass(frozen=True, slots=True)
class Difference:
    """How far losses are from the reference's of the same seeds."""

    mean: float
    spread: float
    """Standard deviation from seed to seed."""
    noise: float
    """Standard deviation of the reference's own losses from seed to seed."""

    @classmethod
    def of(cls, losses: Sequence[float], reference: Sequence[float]) -> Difference:
        """Both by seed, in the same order; two seeds at least."""
        apart = [mine - its for mine, its in zip(losses, reference, strict=True)]
        return cls(fmean(apart), stdev(apart), stdev(reference))

    @property
    def in_noises(self) -> float:
        """The mean in units of the noise."""
        return self.mean / self.noise if self.noise else math.inf


def exchange(swarm: Swarm, arm: Arm, workers: int) -> Run:
    """Train with `arm`."""
    up = [Channel(arm) for _ in range(workers)]
    down = Channel(arm)
    loss = swarm.learn(up, down)
    return Run(loss, fmean(channel.bits for channel in up), down.bits)


def run(quick: bool, seed: int, progress: Progress) -> Result:
    """See `registry.Measurement`."""
    torch.set_num_threads(1)
    plan = _QUICK if quick else _PLAN
    arms = [Arm(_REFERENCE), *(Arm(codec) for codec in _LOSSY)]
    arms += [Arm(codec, feedback=True) for codec in _LOSSY]
    runs: dict[Arm, list[Run]] = {arm: [] for arm in arms}
    alone: list[float] = []
    first: list[float] = []
    for number in range(2 if quick else _SEEDS):
        swarm = Swarm(seed + number, plan)
        first.append(swarm.first_loss)
        alone.append(exchange(swarm, Arm(_REFERENCE), 1).loss)
        for arm in arms:
            runs[arm].append(exchange(swarm, arm, plan.workers))
        losses = {arm: runs[arm][-1].loss for arm in arms}
        progress(
            f"seed {seed + number}: fp32 {losses[Arm(_REFERENCE)]:.4f}, q4 {losses[Arm('q4')]:.4f}"
        )
    its = [one.loss for one in runs[Arm(_REFERENCE)]]
    rows = [_row(arm, found, its) for arm, found in runs.items()]
    rows.append(_alone_row(alone, its))
    notes = _notes(plan, swarm, fmean(first), seed, len(its))
    return Result(rows, _bars(runs, alone), notes)


def _bars(runs: Mapping[Arm, Sequence[Run]], alone: Sequence[float]) -> list[Bar]:
    its = [one.loss for one in runs[Arm(_REFERENCE)]]
    q4 = Difference.of([one.loss for one in runs[Arm("q4")]], its)
    return [
        Bar.at_most(
            "parity: q4 both ways minus fp32, of the mean over seeds the size (nats)",
            abs(q4.mean), q4.noise,
            f"the noise: standard deviation of fp32's final loss over {len(its)} seeds",
        ),
        Bar.at_least(
            "parity: one worker alone minus fp32 (noises)",
            Difference.of(alone, its).in_noises, _ALONE_MIN,
            "can this tell anything apart?",
        ),
    ]  # fmt: skip


def _row(arm: Arm, runs: Sequence[Run], reference: Sequence[float]) -> dict[str, Cell]:
    losses = [one.loss for one in runs]
    row: dict[str, Cell] = {
        "codec": arm.codec,
        "feedback": "yes" if arm.feedback else "no",
        "bits up": f"{fmean(one.bits_up for one in runs):.3f}",
        "bits down": f"{fmean(one.bits_down for one in runs):.3f}",
    }
    return row | _losses(losses, None if arm.codec == _REFERENCE else reference)


def _alone_row(losses: Sequence[float], reference: Sequence[float]) -> dict[str, Cell]:
    row: dict[str, Cell] = {
        "codec": "one worker alone", "feedback": "-", "bits up": "0", "bits down": "0",
    }  # fmt: skip
    return row | _losses(losses, reference)


def _losses(losses: Sequence[float], reference: Sequence[float] | None) -> dict[str, Cell]:
    row: dict[str, Cell] = {"loss": f"{fmean(losses):.4f}", "± seeds": f"{stdev(losses):.4f}"}
    if reference is None:
        return row | {"minus fp32": "-", "± seeds of it": "-", "in noises": "-"}
    apart = Difference.of(losses, reference)
    return row | {
        "minus fp32": f"{apart.mean:+.4f}",
        "± seeds of it": f"{apart.spread:.4f}",
        "in noises": f"{apart.in_noises:+.2f}",
    }


def _notes(plan: Plan, swarm: Swarm, first: float, seed: int, seeds: int) -> list[str]:
    setting = (
        f"Seeds {seed} to {seed + seeds - 1}. A Llama-like model of {swarm.layout.numel:,} "
        f"parameters on the bytes of the standard library's text; {plan.workers} workers with "
        f"samples of their own; {plan.warmup_steps} steps together, then {plan.rounds} rounds of "
        f"{plan.steps} AdamW steps each (lr {plan.lr:g}, {plan.batch} samples of {plan.tokens}); "
        f"outer {swarm.outer}, the default run's. Loss: nats per byte on {plan.validation_samples} "
        f"held-out samples, {first:.3f} before the rounds."
    )
    feedback = (
        f"With feedback: workers and the mean's coder add {_DECAY:g} of what was left out "
        "to what is sent next. fp32 leaves nothing out."
    )
    limits = (
        f"{plan.rounds} rounds of a small model with a constant learning rate: effects of late "
        "training, or of thousands of rounds, are not seen here."
    )
    return [setting, feedback, limits]
