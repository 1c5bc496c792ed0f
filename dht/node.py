"""The directory in hivemind's Kademlia DHT, inside our own event loop.

A DHT of one node is not joined yet: until another node answers, `size()` is 0 and a task of ours
keeps asking whomever the transport is connected to. Manifests and run entries are stored again by
us before they end; member records by the caller, who has to sign them anew. When the transport's
daemon is replaced, a new node takes over the old one's place, storage and duties.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, Final, Protocol, Self

from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2

from dht.directory import GroupNotice, RunNotice
from dht.index import Index, latest
from dht.rules import (
    NOTICE_REFRESH_S,
    NOTICE_TTL_S,
    RUNS_KEY,
    Rules,
    RunEntry,
    count_runs,
    is_current,
    is_manifest_of,
    key_id,
    manifest_key,
    members_key,
    sign_run_entry,
)
from dht.validator import BoundedStorage, Validator, guard
from protocols import limits
from protocols.identity import Signer
from protocols.records import PeerRecord
from protocols.schema import SchemaError
from protocols.types import PeerId, RunId

REPLICAS: Final = 5
RPC_TIMEOUT_S: Final = 3.0  # one question to one node
QUERY_TIMEOUT_S: Final = 8.0  # a search or a store: a few questions, some to dead nodes
RPCS_MAX: Final = 64  # questions of ours in flight
REJOIN_S: Final = 1.0  # how often to look for a first node; costs one question to the daemon
MEET_S: Final = 5.0  # how often to look for nodes among those with whom there is a connection
MEET_MAX: Final = 8  # asked at a time, each a message there and back
MEET_AGAIN_S: Final = 60.0  # who is no node, or did not answer, is asked again so much later
ASKED_MAX: Final = 4096
OWN_ENTRIES_MAX: Final = 16  # runs that one process announces and is a member of
OFFSETS_MAX: Final = 64

_log = logging.getLogger(__name__)


class Daemon(Protocol):
    """What the directory needs of the libp2p transport."""

    p2p: Any
    restart_listeners: list[Any]

    async def connected(self) -> list[PeerId]: ...


class HivemindDirectory:
    """`directory.Directory` over hivemind's DHTNode. Build it with `start`."""

    def __init__(self, transport: Daemon, signer: Signer, is_client: Callable[[], bool]) -> None:
        self._transport = transport
        self._signer = signer
        self._is_client = is_client
        self._client_mode = False
        self._rules = Rules()
        self._node: Any = None
        self._storage: BoundedStorage | None = None
        self._index = Index(self._read)
        self._records: dict[RunId, tuple[bytes, bool]] = {}
        self._manifests: dict[RunId, tuple[bytes, str]] = {}
        self._offsets_s: dict[PeerId, float] = {}
        self._asked_s: dict[PeerId, float] = {}
        """When those were asked with whom there was a connection and who were no nodes of ours."""
        self._keeper: asyncio.Task[None] | None = None
        self._stale = asyncio.Event()
        """Set when the daemon was replaced: the node has to be replaced as well."""

    @classmethod
    async def start(
        cls, transport: Daemon, signer: Signer, *, is_client: Callable[[], bool] = lambda: False
    ) -> Self:
        """A node on the transport's daemon that knows nobody yet; `join` comes next.

        `is_client`: whether to store nothing for others and answer nobody, as peers do that can't
        be reached; asked for each of the transport's daemons.
        """
        directory = cls(transport, signer, is_client)
        await directory._start_node()
        transport.restart_listeners.append(directory._on_restart)
        directory._keeper = asyncio.create_task(directory._keep(), name="directory")
        return directory

    # ── directory.Directory ──────────────────────────────────────────────────────────────

    def size(self) -> int:
        return len(self._node.protocol.routing_table.uid_to_peer_id)

    async def publish_record(self, signed: bytes, *, contact: bool = True) -> bool:
        try:
            record = self._rules.record(signed)
        except SchemaError:
            return False
        self._records.pop(record.run, None)
        self._records[record.run] = (signed, contact)
        while len(self._records) > OWN_ENTRIES_MAX:
            del self._records[next(iter(self._records))]
        return await self._store_record(record, signed, contact)

    async def members(self, run: RunId) -> list[PeerRecord]:
        return await self._index.some(run)

    async def nearby(self, mine: PeerRecord) -> list[PeerRecord]:
        return await self._index.nearby(mine)

    async def random_groups(self, run: RunId, count: int) -> list[GroupNotice]:
        return await self._index.random_groups(run, count)

    async def publish_manifest(self, run: RunId, manifest: bytes, name: str) -> bool:
        if not is_manifest_of(run, manifest) or len(name) > limits.NAME_CHARS_MAX:
            return False
        self._manifests.pop(run, None)
        self._manifests[run] = (manifest, name)
        while len(self._manifests) > OWN_ENTRIES_MAX:
            del self._manifests[next(iter(self._manifests))]
        if not self._index.announces(run, self._signer.peer_id):
            return True
        return await self._store_manifest(run, manifest, name)

    async def manifest(self, run: RunId) -> bytes | None:
        if run in self._manifests:
            return self._manifests[run][0]
        for found in await self._get([manifest_key(run)], latest=False):
            data = found.value if found is not None else None
            if isinstance(data, bytes) and is_manifest_of(run, data):
                return data
        return None

    async def runs(self) -> list[RunNotice]:
        announced: list[tuple[RunId, str]] = []
        for found in await self._get([RUNS_KEY], latest=True):
            for value in _entries(found):
                with contextlib.suppress(SchemaError):
                    _, entry = self._rules.run_entry(value)
                    announced.append((entry.run, entry.name))
        return count_runs(announced)

    async def close(self) -> None:
        if self._on_restart in self._transport.restart_listeners:
            self._transport.restart_listeners.remove(self._on_restart)
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        with contextlib.suppress(TimeoutError):  # a dead daemon never answers
            async with asyncio.timeout(1.0):
                await self._node.shutdown()

    # ── beyond the interface ─────────────────────────────────────────────────────────────

    async def join(self, peers: Iterable[PeerId]) -> bool:
        """Meet the DHT through `peers` the transport is connected to; whether any node is known.

        Cheap to repeat, and harmless with peers that are no DHT nodes.
        """
        known = self.size()
        names = [PeerID.from_base58(peer) for peer in peers if peer != self._signer.peer_id]
        await asyncio.gather(*(self._ping(name) for name in names))
        if self.size() > known:
            node = self._node
            await _within(node.find_nearest_nodes([node.node_id]), QUERY_TIMEOUT_S)
            if not known:
                await self._store_all()
        return self.size() > 0

    async def _meet(self) -> None:
        """Ask some of those whom the transport is connected to, and the node does not know.

        A node that comes back with nothing, and whoever comes to the DHT through it, would be an
        island else: those who were there before have forgotten it, and each side has company.
        """
        now_s = asyncio.get_running_loop().time()
        known = self._node.protocol.routing_table.peer_id_to_uid
        others = [
            peer
            for peer in await self._transport.connected()
            if PeerID.from_base58(peer) not in known
            and now_s - self._asked_s.get(peer, -math.inf) >= MEET_AGAIN_S
        ]
        some = random.sample(others, min(MEET_MAX, len(others)))
        for peer in some:
            self._asked_s.pop(peer, None)
            self._asked_s[peer] = now_s
        while len(self._asked_s) > ASKED_MAX:
            del self._asked_s[next(iter(self._asked_s))]
        if some:
            await self.join(some)
        for peer in some:
            if PeerID.from_base58(peer) in known:
                self._asked_s.pop(peer, None)  # it may come back with nothing, too

    @property
    def clock_skew_s(self) -> float:
        """How far the others' clocks are ahead of ours: the median of the nodes that we met."""
        return statistics.median(self._offsets_s.values()) if self._offsets_s else 0.0

    # ── asking and storing ───────────────────────────────────────────────────────────────

    async def _read(self, run: RunId, cells: list[str]) -> list[list[PeerRecord]]:
        """The valid records in each cell."""
        now_s = time.time()
        keys = [members_key(run, cell) for cell in cells]
        read: list[list[PeerRecord]] = []
        for key, found in zip(keys, await self._get(keys, latest=True), strict=True):
            place, records = key_id(key), []
            for value in _entries(found):
                with contextlib.suppress(SchemaError):  # kept here by an older version of ours
                    record = self._rules.record(value)
                    # Our own storage answers too, and the root of an empty run is somebody's guess.
                    if place in self._rules.places(value, record) and is_current(record, now_s):
                        records.append(record)
            read.append(latest(records))
        return read

    async def _get(self, keys: list[bytes], *, latest: bool) -> list[Any]:
        """For each key what was found in time, as hivemind's value with expiration, or None."""
        futures = await self._node.get_many(
            keys,
            sufficient_expiration_time=float("inf") if latest else None,
            return_futures=True,
        )
        values = (_within(futures[key], QUERY_TIMEOUT_S) for key in keys)
        return list(await asyncio.gather(*values))

    async def _store(self, key: bytes, value: bytes, expires_s: float, subkey: str | None) -> bool:
        store = self._node.store(
            key, value, expires_s, subkey=subkey, exclude_self=self._client_mode
        )
        return bool(await _within(store, QUERY_TIMEOUT_S)) and self.size() > 0

    async def _store_record(self, record: PeerRecord, signed: bytes, contact: bool) -> bool:
        cells = await self._index.cells_to_show(record, contact=contact)
        keys = [members_key(record.run, cell) for cell in cells]
        expires_s = record.expires_ms / 1000
        return all(
            await asyncio.gather(
                *(self._store(key, signed, expires_s, record.peer) for key in keys)
            )
        )

    async def _store_manifest(self, run: RunId, manifest: bytes, name: str) -> bool:
        expires_ms = round((time.time() + NOTICE_TTL_S) * 1000)
        expires_s = expires_ms / 1000
        entry = sign_run_entry(self._signer, RunEntry(run, name, expires_ms))
        stored, announced = await asyncio.gather(
            self._store(manifest_key(run), manifest, expires_s, None),
            self._store(RUNS_KEY, entry, expires_s, self._signer.peer_id),
        )
        return stored and announced

    async def _store_all(self) -> None:
        await self._store_manifests()
        for signed, contact in list(self._records.values()):
            record = self._rules.record(signed)
            if is_current(record, time.time()):
                await self._store_record(record, signed, contact)

    async def _store_manifests(self) -> None:
        for run, (manifest, name) in list(self._manifests.items()):
            if self._index.announces(run, self._signer.peer_id):
                await self._store_manifest(run, manifest, name)

    async def _ping(self, name: Any) -> None:
        protocol = self._node.protocol
        request = dht_pb2.PingRequest(peer=protocol.node_info, validate=False)
        asked_s = time.time()
        reply = await _within(
            protocol.get_stub(name).rpc_ping(request, timeout=RPC_TIMEOUT_S), RPC_TIMEOUT_S + 1
        )
        answered_s = time.time()
        if reply is None:
            return
        if len(reply.peer.node_id) != DHTID.HASH_NBYTES:
            return  # a client: it stores nothing
        if reply.dht_time > 0:
            self._offsets_s.pop(PeerId(str(name)), None)
            self._offsets_s[PeerId(str(name))] = reply.dht_time - (asked_s + answered_s) / 2
            while len(self._offsets_s) > OFFSETS_MAX:
                del self._offsets_s[next(iter(self._offsets_s))]
        await protocol.update_routing_table(DHTID.from_bytes(reply.peer.node_id), name)

    # ── the node's life ──────────────────────────────────────────────────────────────────

    async def _start_node(self) -> bool:
        self._client_mode = self._is_client()
        node = await DHTNode.create(
            p2p=self._transport.p2p,
            node_id=DHTID.from_bytes(hashlib.sha1(self._signer.public_key).digest()),
            num_replicas=REPLICAS,
            wait_timeout=RPC_TIMEOUT_S,
            parallel_rpc=RPCS_MAX,
            cache_locally=False,
            cache_nearest=0,
            cache_on_store=False,
            cache_refresh_before_expiry=0,
            reuse_get_requests=False,
            client_mode=self._client_mode,
            record_validator=Validator(self._rules),
            ensure_bootstrap_success=False,
            strict=False,
        )
        self._storage = guard(node.protocol, self._storage)
        self._node = node
        return True

    def _on_restart(self, reason: str, seconds: float, p2p: Any) -> None:
        self._stale.set()

    async def _keep(self) -> None:
        """Rejoin while alone, meet others, replace the node with the daemon, keep our notices
        alive."""
        loop = asyncio.get_running_loop()
        refresh_s = loop.time() + NOTICE_REFRESH_S
        meet_s = loop.time() + MEET_S
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REJOIN_S):
                    await self._stale.wait()
            if self._transport.p2p is None:
                continue
            if self._stale.is_set():
                self._stale.clear()
                self._node.is_alive = False
                if await _within(self._start_node(), QUERY_TIMEOUT_S) is None:
                    self._stale.set()  # that daemon is gone again
                    continue
            if not self.size():
                await self.join(await self._transport.connected())
            elif loop.time() >= meet_s:
                meet_s = loop.time() + MEET_S * random.uniform(0.8, 1.2)
                await self._meet()
            if loop.time() >= refresh_s:
                refresh_s = loop.time() + NOTICE_REFRESH_S * random.uniform(0.8, 1.2)
                await self._store_manifests()  # whoever has records stores them again himself


async def _within(work: Awaitable[Any], timeout_s: float) -> Any:
    """The result of hivemind's `work`, or None if it failed or took too long.

    Its failures come from the network and may be of any type; they must not end ours.
    """
    future = asyncio.ensure_future(work)
    try:
        await asyncio.wait({future}, timeout=timeout_s)
    finally:
        future.cancel()
    if not future.done() or future.cancelled():
        return None
    if (error := future.exception()) is not None:
        _log.debug("DHT: %r", error)
        return None
    return future.result()


def _entries(found: Any) -> Iterator[bytes]:
    if found is not None and isinstance(found.value, dict):
        for entry in found.value.values():
            if isinstance(entry.value, bytes):
                yield entry.value
