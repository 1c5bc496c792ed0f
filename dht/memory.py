"""The directory inside one process: the same rules as in the DHT, without a network."""

from __future__ import annotations

import time
from collections.abc import Callable

from dht.directory import RunNotice
from dht.rules import RUNS_SHOWN_MAX, Rules, count_runs, is_current, is_manifest_of
from protocols import limits
from protocols.records import PeerRecord
from protocols.schema import SchemaError
from protocols.types import PeerId, RunId


class MemoryBoard:
    """What the directories of one process share. `clock` gives seconds since 1970."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.rules = Rules()
        self.directories = 0
        self.records: dict[RunId, dict[PeerId, PeerRecord]] = {}
        self.manifests: dict[RunId, bytes] = {}
        self.announced: dict[PeerId, tuple[RunId, str]] = {}


class MemoryDirectory:
    """`directory.Directory` on a board. One per peer."""

    def __init__(self, board: MemoryBoard, peer: PeerId) -> None:
        self._board = board
        self._peer = peer
        board.directories += 1

    def size(self) -> int:
        return self._board.directories - 1

    async def publish_record(self, signed: bytes) -> bool:
        try:
            record = self._board.rules.record(signed)
        except SchemaError:
            return False
        if not is_current(record, self._board.clock()):
            return False
        records = self._board.records.setdefault(record.run, {})
        known = records.get(record.peer)
        if known is not None and known.issued_ms > record.issued_ms:
            return False
        if known is None and len(records) >= limits.KNOWN_PEERS_MAX:
            return False
        records[record.peer] = record
        return True

    async def members(self, run: RunId) -> list[PeerRecord]:
        now_s = self._board.clock()
        records = self._board.records.get(run, {})
        for peer in [p for p, record in records.items() if not is_current(record, now_s)]:
            del records[peer]
        return list(records.values())

    async def publish_manifest(self, run: RunId, manifest: bytes, name: str) -> bool:
        board = self._board
        if not is_manifest_of(run, manifest) or len(name) > limits.NAME_CHARS_MAX:
            return False
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
