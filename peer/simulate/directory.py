"""The directory in a simulation: the rules of `dht.memory`, with the DHT's delays and failures.

What is stored survives (hivemind keeps five replicas); what can be missing is the way in: a peer
needs one reachable bootstrap node, or one peer that it has talked to, before it can store or read
anything. Every look-up costs a few round trips, as many as Kademlia's path is long.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from typing import Final

from dht.directory import RunNotice
from dht.memory import MemoryBoard, MemoryDirectory
from protocols.records import PeerRecord
from protocols.types import PeerId, RunId

HOP_S: Final = 0.12  # asking the nearest known nodes: a round trip across the world, and queues
GIVE_UP_S: Final = 3.0  # a request that nobody answers


class SimDirectory(MemoryDirectory):
    """`directory.Directory` of one simulated peer."""

    def __init__(
        self,
        board: MemoryBoard,
        peer: PeerId,
        entrances: Callable[[], Sequence[object]],
        rng: random.Random,
        failure: float = 0.0,
    ) -> None:
        """`entrances`: bootstrap nodes and acquaintances that can be reached now; `failure`:
        share of requests that nobody answers."""
        super().__init__(board, peer, rng)
        self.reads = 0
        self.writes = 0
        self._entrances = entrances
        self._rng = rng
        self._failure = failure
        self._closed = False

    def size(self) -> int:
        return super().size() if self._entrances() else 0

    async def _read(self, run: RunId, cells: list[str]) -> list[list[PeerRecord]]:
        """Keys that are read at once cost the time of one."""
        self.reads += len(cells)
        if not await self._travel():
            return [[] for _ in cells]
        return await super()._read(run, cells)

    async def publish_record(self, signed: bytes, *, contact: bool = True) -> bool:
        return await self._travel() and await super().publish_record(signed, contact=contact)

    def _write(self, cell: str, record: PeerRecord) -> bool:
        self.writes += 1
        return super()._write(cell, record)

    async def publish_manifest(self, run: RunId, manifest: bytes, name: str) -> bool:
        self.writes += 1
        return await self._travel() and await super().publish_manifest(run, manifest, name)

    async def manifest(self, run: RunId) -> bytes | None:
        self.reads += 1
        return await super().manifest(run) if await self._travel() else None

    async def runs(self) -> list[RunNotice]:
        self.reads += 1
        return await super().runs() if await self._travel() else []

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await super().close()

    def vanish(self) -> None:
        """Gone without a word: what it published stays until it expires."""
        if not self._closed:
            self._closed = True
            self._board.directories -= 1

    async def _travel(self) -> bool:
        """Spend the time of a look-up; whether it came to anything."""
        if not self._entrances() or self._rng.random() < self._failure:
            await asyncio.sleep(GIVE_UP_S)
            return False
        hops = max(1, math.ceil(math.log2(max(2, super().size())) / 3))  # buckets of several bits
        await asyncio.sleep(round(hops * HOP_S * self._rng.uniform(0.5, 1.5), 6))
        return not self._closed
