"""When contributions arrive after they were due, and so how long a straggler is waited for.

An aggregator keeps the delays of the last rounds and closes a span, once most are in, at

    median + max(K x MAD, a twentieth of the median, SPREAD_S_MIN)

(MAD: the median absolute deviation, so that one peer on a thin line moves neither). Whoever was
still on its way counts as infinitely late: if that were left out, each round's deadline would
look at ever quicker peers. And where this round's median is the later one, it counts: what delays
everybody (a machine that they share, a slow step) makes nobody a straggler. What of a contribution
arrived in time is inside, unit by unit; the rest stays with its sender, which begins with it the
next time.

The next round's training hides the exchange, so for a quarter of it waiting costs nothing: there is
no haste before that, and what a lost packet delays is waited for. Not for longer, as the way back
takes its time too, and rounds grow (`pace`) where both together take more than half of one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable
from statistics import median_low
from typing import Final

from protocols.pace import Pace

TRAIN_SHARE: Final = 0.25  # of a round
ROUNDS_KEPT: Final = 5  # enough for a median, few enough to follow a link that changes
ROUNDS_MIN: Final = 2  # before that, this round's own arrivals must do
FIRST_FACTOR: Final = 4.0  # the times that the slowest of most may be exceeded then
FIRST_S_MIN: Final = 2.0
K: Final = 3.0  # two standard deviations, if delays were normally distributed
MEDIAN_SHARE: Final = 0.05
SPREAD_S_MIN: Final = 0.5  # what a busy machine or a lost packet or two cost


class Arrivals:
    """Delays of others' contributions at one aggregator; our own needs no network."""

    def __init__(self, pace: Pace | None = None) -> None:
        """`pace`: how long rounds are, where that gives time."""
        self._pace = pace
        self._rounds: deque[tuple[float, ...]] = deque(maxlen=ROUNDS_KEPT)

    def closed(self, delays_s: Iterable[float], missing: int) -> None:
        """A span was closed: after how long others came, and how many were still on their way."""
        seen = (*(max(0.0, d) for d in delays_s), *[math.inf] * missing)
        if seen:
            self._rounds.append(seen)

    def patience_s(self, most_s: float, seen_s: Collection[float]) -> float:
        """How long after its due time a span may be closed without those who are missing.

        `seen_s`: this round's delays so far, of most of the group.
        """
        delays = [d for seen in self._rounds for d in seen]
        least_s = TRAIN_SHARE * self._pace.round_s if self._pace is not None else 0.0
        if len(self._rounds) < ROUNDS_MIN:
            if not seen_s:
                return most_s
            return min(most_s, max(FIRST_FACTOR * max(seen_s), FIRST_S_MIN, least_s))
        middle = median_low(delays)
        if math.isinf(middle):
            return most_s
        spread = median_low([abs(d - middle) for d in delays])
        middle = max(middle, median_low(seen_s) if seen_s else 0.0)
        slack = max(K * spread, MEDIAN_SHARE * middle, SPREAD_S_MIN)
        return min(most_s, max(middle + slack, least_s))
