"""What one zeroth-order peer measures for a round, step by step, for as long as there is time.

decomfl: a *pass* is K local steps of P directions each, the same directions for everybody. Whoever
has time for several measures them on other batches; its slopes are the passes' means by tokens, as
if they had been one pass on all that data. What is begun and not whole counts for nothing. kseed:
each step draws a direction from the pool, and counts by itself.

Local steps lead away from the run's values: in passing, and after many into the values themselves.
`close` brings these back, and `aside` does for a while.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, cast

import torch

from peer.finetune import decomfl, kseed, mezo
from peer.finetune.mezo import Form, Measured
from peer.finetune.perturb import NOTHING, Directions
from peer.finetune.seed_rules import SeedRules
from peer.finetune.tensors import Weights

Loss = Callable[[], torch.Tensor]
"""Runs the model on one batch; a scalar in nats per token."""

WALK_MAX: Final = 32  # directions that a forward pass makes anew; then they go into the values


class LocalWork:
    """One round's. Touched by one thread; nobody else changes the weights before `close`."""

    def __init__(
        self,
        weights: Weights,
        rules: SeedRules,
        number: int,
        rebuild: Callable[[], None] | None = None,
    ) -> None:
        """`rebuild`: makes the run's values anew; None: keep a copy once they are to change."""
        self.tokens = 0.0
        """Behind what `found` gives."""
        self.steps = 0
        """Local steps so far, those of a pass that is not whole too."""
        self.last: Measured | None = None
        """What the last local step measured."""
        self._weights = weights
        self._rules = rules
        self._walk = _Walk(weights, rebuild)
        self._step: Directions | None = None
        """The last step, to be taken once something is measured after it."""
        self._seeds = decomfl.seeds_of(rules, number) if rules.method == "decomfl" else []
        self._pool = kseed.pool_of(rules)
        self._begun: list[float] = []
        self._begun_tokens = 0.0
        self._passes: list[tuple[float, list[float]]] = []
        self._sums = kseed.LocalSums()

    def step(
        self,
        loss: Loss,
        tokens: float,
        rng: random.Random | None = None,
        odds: Sequence[float] | None = None,
    ) -> bool:
        """One local step on a batch of so many tokens. False if a loss was not finite: the pass
        that it belongs to is lost.

        kseed: `rng` draws the direction, by `odds` if given (`kseed.probabilities`).
        """
        rules = self._rules
        index = 0
        if rules.method == "kseed":
            (index,) = (rng or random.Random()).choices(range(rules.pool), odds)
            seeds = [int(self._pool[index])]
        else:
            seeds = self._seeds[len(self._begun) // rules.perturbations]
        if self._step is not None:
            self._walk.go(self._step)
        self.last = self._walk.measure(loss, seeds, rules.eps, cast("Form", rules.form))
        self._step = None
        if not self.last.finite:
            self._begun, self._begun_tokens = [], 0.0
            self._walk.back()
            return False
        self.steps += 1
        self._step = mezo.descent(self.last, seeds, rules.lr)
        if rules.method == "kseed":
            self._sums.add(index, self.last.slopes[0])
            self.tokens += tokens
            return True
        self._begun += self.last.slopes
        self._begun_tokens += tokens
        if len(self._begun) == rules.scalars:
            self._passes.append((self._begun_tokens, self._begun))
            self.tokens += self._begun_tokens
            self._begun, self._begun_tokens, self._step = [], 0.0, None
            self._walk.back()
        return True

    def found(self) -> dict[int, float]:
        """The scalars that there are to send; none: {}."""
        if self._rules.method == "kseed":
            return dict(self._sums.values())
        if len(self._passes) <= 1:
            return dict(enumerate(self._passes[0][1])) if self._passes else {}
        return {
            i: math.fsum(tokens * slopes[i] for tokens, slopes in self._passes) / self.tokens
            for i in range(self._rules.scalars)
        }

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside the block the values are the run's, and after it where local steps have led."""
        if not self._walk.went:
            yield
            return
        here = self._weights.state()
        self._walk.restore()
        try:
            yield
        finally:
            self._weights.load(here)

    def close(self) -> None:
        """The values are the run's again, to the last bit."""
        self._walk.back()


class _Walk:
    """Local steps away from the run's values: in passing, and after many into the values."""

    def __init__(self, weights: Weights, rebuild: Callable[[], None] | None) -> None:
        self.went = False
        """Whether the values themselves were changed."""
        self._weights = weights
        self._rebuild = rebuild
        self._before: dict[str, torch.Tensor] = {}
        self._away = NOTHING
        self._rounding = 0

    def measure(self, loss: Loss, seeds: Sequence[int], eps: float, form: Form) -> Measured:
        return mezo.measure(self._weights, loss, seeds, eps, form, at=self._away)

    def go(self, step: Directions) -> None:
        self._away = self._away + step
        if len(self._away) > WALK_MAX:
            if self._rebuild is None and not self.went:
                self._before = self._weights.state()
            self.went = True
            self._rounding += 1
            self._weights.apply(self._away, self._rounding)
            self._away = NOTHING

    def back(self) -> None:
        """Where it began."""
        self._away = NOTHING
        if self.went:
            self.restore()
            self.went = False
            self._before = {}

    def restore(self) -> None:
        """Put the run's values into the weights."""
        if self._rebuild is None:
            self._weights.load(self._before)
        else:
            self._rebuild()
