"""How long a round is: as long as its communication needs, and no longer.

The exchange of a round happens while the next one trains. It may take at most a share of a
round: where it takes more, rounds get longer (more inner steps for the same bytes), and shorter
again when it takes less than half of that share, so that the length does not swing with every
measurement. Every member measures alike (from contributions due to outcome applied), so a
successor goes on at the same pace; the bounds are the manifest's, so anybody can check a plan.
"""

from __future__ import annotations

from collections import deque
from statistics import median_low
from typing import Final

from protocols import limits

ROUNDS_KEPT: Final = 5
ROUNDS_MIN: Final = 3  # one slow exchange is no reason
CHORES_SHARE: Final = 1 / 8  # of a round from one standing chore to the next: rounds of half an
# hour cost next to nothing between exchanges, and what changes is known within a part of a round
CHORES_SHARE_LONG: Final = 1 / 4  # of what a round has more than ...
LONG_S: Final = 240.0
CALM: Final = 0.5  # of the share: below that, rounds get shorter


def chores_s(phase_s: float) -> float:
    """From one standing chore to the next, in a phase of so many seconds.

    An eighth of it; of a long one nearly a quarter, as nobody can tell then whether something is
    known after five minutes or after nine.
    """
    more_s = max(0.0, phase_s - LONG_S)
    pause_s = CHORES_SHARE * (phase_s - more_s) + CHORES_SHARE_LONG * more_s
    return min(pause_s, limits.HEARTBEAT_S_MAX)


class Pace:
    """The length of rounds, between `round_s` and `round_s_max`."""

    def __init__(self, round_s: float, round_s_max: float, share: float) -> None:
        """`share`: of a round that its exchange may take, above 0."""
        self._least_s = round_s
        self._most_s = max(round_s, round_s_max)
        self._share = share
        self._taken: deque[float] = deque(maxlen=ROUNDS_KEPT)
        self.round_s = round_s
        """From one round's contributions to the next."""

    @property
    def chores_s(self) -> float:
        """How seldom what has to be done again and again may be done, as long as rounds are now:
        heartbeats in a training phase, reading and renewing records, looking for a better group."""
        return chores_s(self.round_s)

    @property
    def chores_s_max(self) -> float:
        """However long rounds become."""
        return chores_s(self._most_s)

    def measured(self, exchange_s: float) -> None:
        """A round's exchange took so long."""
        self._taken.append(max(0.0, exchange_s))
        if len(self._taken) < ROUNDS_MIN:
            return
        usual_s = median_low(self._taken)
        allowed_s = self._share * self.round_s
        if usual_s > allowed_s or usual_s < CALM * allowed_s:
            self.round_s = min(max(usual_s / self._share, self._least_s), self._most_s)

    def followed(self, round_s: float) -> None:
        """Somebody else's plan made a round so long; a newcomer goes by that at first."""
        if len(self._taken) < ROUNDS_MIN:
            self.round_s = min(max(round_s, self._least_s), self._most_s)
