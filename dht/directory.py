"""What peers look up about each other: the one interface to discovery.

The network's shared state is only this: signed member records, manifests by their hash, and the
names of runs. Implementations: `dht.node` (hivemind's Kademlia) and `dht.memory` (one process).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from protocols.records import PeerRecord
from protocols.types import RunId


@dataclass(frozen=True, slots=True)
class RunNotice:
    """A run that somebody says exists."""

    run: RunId
    name: str
    peers: int
    """How many different peers announce it."""


class Directory(Protocol):
    """Discovery. Every method has its own deadline inside and never raises for a slow network."""

    def size(self) -> int:
        """Other DHT nodes known; 0 means: not joined yet."""

    async def publish_record(self, signed: bytes) -> bool:
        """Store a signed record (`protocols.records.sign_record`); False if nobody took it."""

    async def members(self, run: RunId) -> list[PeerRecord]:
        """All valid, unexpired records of a run."""

    async def publish_manifest(self, run: RunId, manifest: bytes, name: str) -> bool:
        """Store canonical manifest bytes under their hash and announce the run by name."""

    async def manifest(self, run: RunId) -> bytes | None:
        """The manifest's bytes, verified by hash, or None if nobody has them."""

    async def runs(self) -> list[RunNotice]:
        """Runs that are announced now."""

    async def close(self) -> None:
        """Leave."""
