"""The directory inside one process: the same rules as in the DHT, without a network."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from dht.directory import GroupNotice, RunNotice
from dht.index import Index
from dht.rules import (
    CELL_ENTRIES_MAX,
    RUNS_SHOWN_MAX,
    Rules,
    count_runs,
    is_current,
    is_manifest_of,
)
from protocols import limits
from protocols.records import PeerRecord
from protocols.schema import SchemaError
from protocols.types import PeerId, RunId

CELLS_MAX = 16 * limits.KNOWN_PEERS_MAX  # keys on one board


class MemoryBoard:
    """What the directories of one process share. `clock` gives seconds since 1970."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.rules = Rules()
        self.directories = 0
        self.cells: dict[tuple[RunId, str], dict[PeerId, PeerRecord]] = {}
        self.manifests: dict[RunId, bytes] = {}
        self.announced: dict[PeerId, tuple[RunId, str]] = {}
        self.reads = 0
        """Keys read by anybody."""
        self.writes = 0
        """Keys written by anybody."""

    def read(self, run: RunId, cell: str) -> list[PeerRecord]:
        self.reads += 1
        now_s = self.clock()
        records = self.cells.get((run, cell), {})
        for peer in [p for p, record in records.items() if not is_current(record, now_s)]:
            del records[peer]
        if not records:
            self.cells.pop((run, cell), None)
        return list(records.values())

    def write(self, cell: str, record: PeerRecord) -> bool:
        self.writes += 1
        if (record.run, cell) not in self.cells and len(self.cells) >= CELLS_MAX:
            return False
        records = self.cells.setdefault((record.run, cell), {})
        known = records.get(record.peer)
        if known is not None and known.issued_ms > record.issued_ms:
            return False
        if known is None and len(records) >= CELL_ENTRIES_MAX:
            return False
        records[record.peer] = record
        return True


class MemoryDirectory:
    """`directory.Directory` on a board. One per peer."""

    def __init__(self, board: MemoryBoard, peer: PeerId, rng: random.Random | None = None) -> None:
        self._board = board
        self._peer = peer
        self._index = Index(self._read, rng)
        board.directories += 1

    def size(self) -> int:
        return self._board.directories - 1

    async def _read(self, run: RunId, cells: list[str]) -> list[list[PeerRecord]]:
        return [self._board.read(run, cell) for cell in cells]

    def _write(self, cell: str, record: PeerRecord) -> bool:
        return self._board.write(cell, record)

    async def publish_record(self, signed: bytes, *, contact: bool = True) -> bool:
        try:
            record = self._board.rules.record(signed)
        except SchemaError:
            return False
        if not is_current(record, self._board.clock()):
            return False
        cells = await self._index.cells_to_show(record, contact=contact)
        taken = [self._write(cell, record) for cell in cells]
        return all(taken)

    async def members(self, run: RunId) -> list[PeerRecord]:
        return await self._index.some(run)

    async def nearby(self, mine: PeerRecord) -> list[PeerRecord]:
        return await self._index.nearby(mine)

    async def random_groups(self, run: RunId, count: int) -> list[GroupNotice]:
        return await self._index.random_groups(run, count)

    async def publish_manifest(self, run: RunId, manifest: bytes, name: str) -> bool:
        board = self._board
        if not is_manifest_of(run, manifest) or len(name) > limits.NAME_CHARS_MAX:
            return False
        if not self._index.announces(run, self._peer):
            return True
        if len(board.announced) >= RUNS_SHOWN_MAX and self._peer not in board.announced:
            return False
        board.manifests[run] = manifest
        board.announced[self._peer] = (run, name)
        return True

    async def manifest(self, run: RunId) -> bytes | None:
        return self._board.manifests.get(run)

    async def runs(self) -> list[RunNotice]:
        return count_runs(list(self._board.announced.values()))

    async def close(self) -> None:
        self._board.directories -= 1
        self._board.announced.pop(self._peer, None)
