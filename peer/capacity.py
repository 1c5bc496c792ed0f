"""How fast this peer uploads: measured on what it sends anyway, and told so that nothing flaps.

Transfers that overlap share the line, so they are measured together: from the moment the first of
them begins, the bytes that far sides have confirmed, over the time since. Each such figure is
something that the line did at least (far sides may be slow, too), so of one burst the best counts,
and of the last few bursts the second best: one figure that is too good to be true changes nothing.

What is told moves only when the measurement lies well apart from it, so that records, rosters and
elections keep still. A budget is a promise of the owner: never more than that is told.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median_low
from typing import Final

from peer.clock import SYSTEM, Clock

UPLOAD_KBPS_UNKNOWN: Final = 100_000  # an unmeasured, unlimited line where nobody knows better
MEASURED_BYTES_MIN: Final = 256 * 2**10  # in a burst; less says more about delay than bandwidth
BURSTS_KEPT: Final = 8
BURSTS_MIN: Final = 3
APART: Final = 1.5  # told and measured: within this factor they are the same


class UploadMeter:
    """Touched by one event loop."""

    def __init__(self, clock: Clock = SYSTEM) -> None:
        self._clock = clock
        self._active = 0
        self._begun_s = 0.0
        self._bytes = 0
        self._best_bps = 0.0
        self._bursts: deque[float] = deque(maxlen=BURSTS_KEPT)
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def active(self) -> bool:
        """Whether something of a round is on its way just now."""
        return self._active > 0

    async def idle(self) -> None:
        """Until nothing is."""
        await self._idle.wait()

    @contextmanager
    def sending(self) -> Iterator[Transfer]:
        """One transfer, from its first byte until the far side has confirmed it (or not)."""
        if not self._active:
            self._begun_s = self._clock.monotonic()
            self._bytes, self._best_bps = 0, 0.0
        self._active += 1
        self._idle.clear()
        try:
            yield Transfer(self)
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()
            if not self._active and self._best_bps > 0:
                self._bursts.append(self._best_bps)

    def confirmed(self, size: int) -> None:
        """A transfer of so many bytes has arrived."""
        self._bytes += size
        seconds = self._clock.monotonic() - self._begun_s
        if self._bytes >= MEASURED_BYTES_MIN and seconds > 0:
            self._best_bps = max(self._best_bps, 8 * self._bytes / seconds)

    @property
    def kbps(self) -> int | None:
        """What the line does; None before it was seen to."""
        if len(self._bursts) < BURSTS_MIN:
            return None
        return max(1, int(sorted(self._bursts)[-2] / 1000))


class Transfer:
    """What `UploadMeter.sending` gives."""

    def __init__(self, meter: UploadMeter) -> None:
        self._meter = meter

    def confirmed(self, size: int) -> None:
        """All of it is there: so many bytes."""
        self._meter.confirmed(size)


class Capacity:
    """What a peer tells of its upload in its record."""

    def __init__(self, budget_bps: float | None) -> None:
        self._most = None if budget_bps is None else max(1, int(budget_bps / 1000))
        self._told: int | None = None

    def kbps(self, measured: int | None, fellows: Sequence[int]) -> int:
        """What to tell now. `fellows`: what our group's others tell: before it was measured, a line
        passes for a usual one."""
        guess = median_low(fellows) if fellows else UPLOAD_KBPS_UNKNOWN
        now = measured if measured is not None else self._most or guess
        if self._most is not None:
            now = min(now, self._most)
        if self._told is None or not self._told / APART <= now <= self._told * APART:
            self._told = now
        return self._told
