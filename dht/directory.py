"""What peers look up about each other: the one interface to discovery.

The network's shared state is only this: signed member records, manifests by their hash, and the
names of runs. Nobody ever reads all records of a large run: each method costs a number of reads
that grows at most like the logarithm of the run's size. Implementations: `dht.node` (hivemind's
Kademlia) and `dht.memory` (one process); `dht.index` is what they share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from protocols.records import PeerRecord
from protocols.types import GroupName, RunId


@dataclass(frozen=True, slots=True)
class RunNotice:
    """A run that somebody says exists."""

    run: RunId
    name: str
    peers: int
    """How many different peers announce it; in a large run only some do."""


@dataclass(frozen=True, slots=True)
class GroupNotice:
    """A group of a run, and some of its members by their own signed word."""

    group: GroupName
    contacts: tuple[PeerRecord, ...]
    """Latest first; at least one."""


class Directory(Protocol):
    """Discovery. Every method has its own deadline inside and never raises for a slow network."""

    def size(self) -> int:
        """Other DHT nodes known; 0 means: not joined yet."""

    async def publish_record(self, signed: bytes, *, contact: bool = True) -> bool:
        """Store a signed record (`protocols.records.sign_record`) where it belongs; False if
        nobody took it. `contact`: it also stands in the index of groups, for strangers."""

    async def members(self, run: RunId) -> list[PeerRecord]:
        """Some of the run's members with valid, unexpired records; all where they are few."""

    async def nearby(self, mine: PeerRecord) -> list[PeerRecord]:
        """Those whom a peer with the record `mine` should know: its cells' (by label, or by place
        once it has a coordinate), its group's, and some of anybody where those are few."""

    async def random_groups(self, run: RunId, count: int) -> list[GroupNotice]:
        """Up to `count` different groups of the run, drawn at random; fewer if there are fewer.

        The asker's own may be among them. Fair to within the scatter of the cells' sizes.
        """

    async def publish_manifest(self, run: RunId, manifest: bytes, name: str) -> bool:
        """Store canonical manifest bytes under their hash and announce the run by name; where
        very many do so already, only some of them again."""

    async def manifest(self, run: RunId) -> bytes | None:
        """The manifest's bytes, verified by hash, or None if nobody has them."""

    async def runs(self) -> list[RunNotice]:
        """Runs that are announced now."""

    async def close(self) -> None:
        """Leave."""
