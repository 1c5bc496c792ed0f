"""Tokens behind the next contribution: new work, and older work that no outcome contains yet.

A contribution has one weight. Work that missed s exchanges counts w / (1 + lambda s) of its tokens
(lambda is the manifest's `outer.staleness`), because the parameters have moved on under it; unit by
unit that is

    D[s] = sum over k = 0..s of tokens_k / (1 + lambda k),    tokens_k: of k contributions ago

and the contribution weighs the mean of D over its values. With fragments a unit is exchanged in
every P-th round only; what it waits for its turn does not make it stale: s is k / P, rounded down.

A peer that took another half's state after a partition (`reconciled`) carries its whole history of
R rounds and W tokens as one difference. The others' contribution of one round stands for R rounds
of theirs too, so the difference weighs what an average round did, (W + new) / (R + 1): the result
is the mix of both halves by their tokens. With fragments the others' contribution holds P rounds,
and the difference weighs P times as much.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

AGE_MAX: Final = 64  # older contributions are counted as if they were so old

Mask = npt.NDArray[np.bool_]


class Owed:
    """Counts tokens in and weights out."""

    def __init__(self, sizes: Sequence[int], staleness: float = 0.0, fragments: int = 1) -> None:
        """`sizes`: values in each unit. `staleness`: lambda, at least 0. `fragments`: P."""
        self._sizes = np.array(sizes, np.float64)
        self._staleness = staleness
        self._fragments = fragments
        self._missed = np.zeros(len(sizes), np.int64)  # contributions since the unit was inside one
        self._age_max = AGE_MAX * fragments
        self.reset()

    def reset(self) -> None:
        """Nothing is owed."""
        self.any = False
        """Whether at the latest freeze any unit had work that no outcome contains."""
        self._fresh = 0.0
        self._rounds: deque[float] = deque()  # tokens per contribution, latest first
        self._missed[:] = 0
        self._history = (0.0, 0)

    def reconciled(self, tokens: float, rounds: int) -> None:
        """The next contribution carries the work of so many rounds; see the module."""
        self.reset()
        self._history = (tokens, rounds)

    def add(self, tokens: int) -> None:
        """Inner steps were made."""
        self._fresh += tokens

    def freeze(self, counted: Mask | None, units: Mask | None = None) -> float:
        """The weight of a contribution frozen now.

        `counted`: which units of the one before are inside an outcome; None if there was none.
        `units`: which ones this one sends; None: all.
        """
        if counted is not None:
            self._missed = np.where(counted, 0, np.minimum(self._missed + 1, self._age_max - 1))
        if len(self._rounds) == self._age_max:
            oldest = self._rounds.pop()
            self._rounds[-1] += oldest
        self._rounds.appendleft(self._fresh)
        self._fresh = 0.0
        if len(self._missed) == 0:
            return 0.0
        weight_U = self._weigh()
        sent = self._sizes if units is None else self._sizes * units
        self.any = bool((weight_U > 0).any())
        return float((weight_U * sent).sum() / max(1.0, sent.sum()))

    def _weigh(self) -> npt.NDArray[np.float64]:
        """What each unit's part of a contribution weighs."""
        tokens = np.array(self._rounds)
        late = np.arange(len(tokens)) // self._fragments
        discounted = np.cumsum(tokens / (1.0 + self._staleness * late))
        reached = np.minimum(self._missed, len(tokens) - 1)
        weight_U = discounted[reached]
        before, rounds = self._history
        if rounds:
            never = self._missed >= len(tokens) - 1
            whole = (before + float(tokens.sum())) / (rounds + len(tokens)) * self._fragments
            weight_U = np.where(never, whole, weight_U)
            if not never.any():
                self._history = (0.0, 0)
        return weight_U
