"""Where the time comes from: the system by default, the simulator's loop where it runs.

The driver, the exchange and the chores ask a clock that they are handed, so that the same code
lives through a day in a few seconds.
"""

from __future__ import annotations

import time
from typing import Final, Protocol


class Clock(Protocol):
    """Seconds as float. `monotonic` runs on the event loop's scale."""

    def monotonic(self) -> float:
        """Never goes back; its zero means nothing."""

    def time(self) -> float:
        """Since 1970, as this machine's calendar has it: others' may be seconds apart."""


class _System:
    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time()


SYSTEM: Final[Clock] = _System()
