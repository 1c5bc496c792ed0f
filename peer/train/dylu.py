"""Dynamic local updates: the slow do fewer steps between contributions (arXiv 2401.09135, DyLU).

    H_w = floor(v_w / v_max * H)

where H is what the fastest does, and v are speeds. Speeds need no messages: an outcome names its
contributors with their weights in tokens, and how many rounds lie between two contributions is
known, so every peer computes the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from protocols import limits
from protocols.types import PeerId

SMOOTHING: Final = 0.5  # of a new measurement
FORGET_ROUNDS: Final = 256  # who contributed nothing for so long does not set the pace


def local_steps(speed: float, speed_max: float, steps: int) -> int:
    """Inner steps between contributions of a peer at `speed`; at least one."""
    if not 0 < speed <= speed_max or not math.isfinite(speed_max):
        return max(1, steps)
    return max(1, math.floor(speed / speed_max * steps))


class Speeds:
    """Tokens per round of everybody whose contributions were seen."""

    def __init__(self) -> None:
        self._latest: dict[PeerId, tuple[int, float]] = {}
        """Peer -> (round of its latest contribution, tokens per round; 0: not known yet)."""

    def applied(self, number: int, weights: Mapping[PeerId, float]) -> None:
        """Round `number`'s outcome contains these contributors' work."""
        for peer, weight in weights.items():
            before, speed = self._latest.get(peer, (number, 0.0))
            rounds = number - before
            if rounds > 0:
                now = weight / rounds
                speed = now if speed == 0 else (1 - SMOOTHING) * speed + SMOOTHING * now
            self._latest[peer] = (number, speed)
        self._latest = {
            p: (n, v) for p, (n, v) in self._latest.items() if number - n <= FORGET_ROUNDS
        }
        while len(self._latest) > limits.ROSTER_MAX:
            del self._latest[min(self._latest, key=lambda p: (self._latest[p][0], p))]

    def steps(self, me: PeerId, steps: int) -> int:
        """How many steps `me` does between contributions, if the fastest does `steps`."""
        fastest = max((v for _, v in self._latest.values()), default=0.0)
        return local_steps(self._latest.get(me, (0, 0.0))[1], fastest, steps)
