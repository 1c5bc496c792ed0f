"""What a peer must know again after a restart to weigh histories: one small file beside its state.

Written after every round, the latest only: while one write is under way, newer words wait for it
and replace each other.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from peer.clock import SYSTEM, Clock
from peer.errors import StorageError
from peer.home import write_atomic
from protocols import limits
from protocols.events import Remembered
from protocols.types import GroupName, PeerId

PAST_BYTES_MAX: Final = 1 << 20
Complain = Callable[[str], None]


class PastFile:
    """One run's `past.json`."""

    def __init__(self, path: Path, complain: Complain, clock: Clock = SYSTEM) -> None:
        self._path = path
        self._complain = complain
        self._clock = clock
        self._next: Remembered | None = None
        self._writing: asyncio.Task[None] | None = None
        self._trouble = ""

    def load(self) -> Remembered | None:
        """What was kept, as old as it is now; None (and a word where that is a fault) without."""
        try:
            if not self._path.exists():
                return None
            if self._path.stat().st_size > PAST_BYTES_MAX:
                raise ValueError(f"is larger than {PAST_BYTES_MAX} bytes")
            return _read(json.loads(self._path.read_bytes()), self._clock.time())
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._complain(
                f"{self._path} could not be read ({error}): this peer forgets who was in its group"
            )
            return None

    def keep(self, past: Remembered) -> None:
        """Write it down soon."""
        self._next = past
        if self._writing is None:
            self._writing = asyncio.create_task(self._write(), name="past")

    async def close(self) -> None:
        """Wait for what is still being written."""
        if self._writing is not None:
            await self._writing

    async def _write(self) -> None:
        try:
            while self._next is not None:
                past, self._next = self._next, None
                data = json.dumps(
                    {
                        "group": past.group,
                        "epoch": past.epoch,
                        "firm": past.firm,
                        "members": past.members,
                        "at_s": self._clock.time() - past.silent_s,
                    }
                )
                try:
                    await asyncio.to_thread(write_atomic, self._path, data.encode())
                    self._trouble = ""
                except StorageError as error:
                    if str(error) != self._trouble:  # once, not in every round
                        self._trouble = str(error)
                        self._complain(str(error))
        finally:
            self._writing = None


def _read(kept: Any, now_s: float) -> Remembered:
    members = tuple(PeerId(str(peer)) for peer in kept["members"])[: limits.ROSTER_MAX]
    return Remembered(
        GroupName(str(kept["group"])),
        max(0, int(kept["epoch"])),
        max(0, int(kept["firm"])),
        members,
        max(0.0, now_s - float(kept["at_s"])),
    )
