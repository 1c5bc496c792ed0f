"""How much this peer may upload, and what went over the wire so far.

One budget per peer, shared by every stream and call. Bulk *takes*: it waits for its turn, first
come first served. Control is *charged*: it never waits, and the debt delays the bulk behind it, so
heartbeats and plans pass even when the line is full of updates.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Final

from peer.errors import UsageError
from protocols import limits

BURST_S: Final = 0.1  # unused budget of at most this long is kept, so a pause can't flood the line
PIECE_S: Final = 0.05  # a piece lasts this long: 32 streams on a full line still all move in 2 s
PIECE_BYTES_MIN: Final = 1024  # below this the headers and wake-ups cost more than they help
RATE_BITS_MIN: Final = 8 * PIECE_BYTES_MIN  # slower than this, no stream meets its deadline

_RATE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]?)(?:bit|bps|bit/s)?", re.IGNORECASE)
_FACTORS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def parse_rate(text: str) -> float:
    """Bits per second out of `20mbit`, `1.5gbit`, `800kbit` or plain bits.

    Raises:
        UsageError: not a rate, or one too slow to take part.
    """
    match = _RATE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a rate; write it like 20mbit, 800kbit or 1gbit")
    bits_per_s = float(match[1]) * _FACTORS[match[2].lower()]
    if bits_per_s < RATE_BITS_MIN:
        raise UsageError(f"{text!r} is too slow to take part; give at least 10kbit")
    return bits_per_s


class UploadBudget:
    """A token bucket in bytes; None as rate means as fast as the line goes.

    `clock` gives seconds on the same scale as the event loop's; tests inject their own.
    """

    def __init__(
        self, bits_per_s: float | None = None, clock: Callable[[], float] | None = None
    ) -> None:
        self._bytes_per_s = None if bits_per_s is None else bits_per_s / 8
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        self._free_s = float("-inf")
        """When everything granted so far will have left at the allowed rate."""
        self.bytes_up = 0
        self.bytes_down = 0

    @property
    def piece_bytes(self) -> int:
        """How much a stream should send at once: small where the line is slow."""
        if self._bytes_per_s is None:
            return limits.FRAME_BYTES_MAX
        share = int(self._bytes_per_s * PIECE_S)
        return min(limits.FRAME_BYTES_MAX, max(PIECE_BYTES_MIN, share))

    def reserve(self, n_bytes: int) -> float:
        """Book `n_bytes` and say in how many seconds they may be sent."""
        if self._bytes_per_s is None:
            return 0.0
        now_s = self._clock()
        start_s = max(self._free_s, now_s - BURST_S)
        self._free_s = start_s + n_bytes / self._bytes_per_s
        return max(0.0, start_s - now_s)

    async def take(self, n_bytes: int) -> None:
        """Wait until `n_bytes` of bulk may be sent."""
        wait_s = self.reserve(n_bytes)
        if wait_s > 0:
            try:
                await asyncio.sleep(wait_s)
            except asyncio.CancelledError:
                self._free_s -= n_bytes / (self._bytes_per_s or 1.0)  # never sent: give it back
                raise
        self.bytes_up += n_bytes

    def charge(self, n_bytes: int) -> None:
        """Book `n_bytes` of control that are sent at once."""
        self.reserve(n_bytes)
        self.bytes_up += n_bytes

    def received(self, n_bytes: int) -> None:
        self.bytes_down += n_bytes
