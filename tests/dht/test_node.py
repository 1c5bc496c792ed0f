"""The directory over real daemons: found by others, proof against forgers, alive after a crash."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID

from dht.node import HivemindDirectory
from dht.rules import manifest_key, members_key
from peer.net.libp2p import Libp2pTransport
from protocols.identity import Signer
from protocols.records import PeerRecord
from protocols.types import PeerId
from tests.dht.samples import MANIFEST, RUN, record, signed, signer

pytestmark = pytest.mark.asyncio(loop_factories=["uvloop"])

ALICE = signer("alice")
BOB = signer("bob")
MALLORY = signer("mallory")


@asynccontextmanager
async def node(folder: Path, owner: Signer) -> AsyncIterator[tuple[Libp2pTransport, Any]]:
    transport = await Libp2pTransport.start(owner.seed, folder / owner.peer_id, "127.0.0.1")
    directory = await HivemindDirectory.start(transport, owner)
    try:
        yield transport, directory
    finally:
        await directory.close()
        await transport.close()


@asynccontextmanager
async def swarm(folder: Path, *owners: Signer) -> AsyncIterator[list[HivemindDirectory]]:
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(node(folder, owner)) for owner in owners]
        first, _ = nodes[0]
        for transport, directory in nodes[1:]:
            peer = await transport.connect(first.addresses()[0], 5)
            assert await directory.join([peer])
        yield [directory for _, directory in nodes]


@asynccontextmanager
async def forger(folder: Path, *known_to: HivemindDirectory) -> AsyncIterator[Any]:
    """A DHT node that checks nothing, known to those directories."""
    transport = await Libp2pTransport.start(MALLORY.seed, folder / "mallory", "127.0.0.1")
    rogue = await DHTNode.create(p2p=transport.p2p, cache_on_store=False)
    for directory in known_to:
        where = directory._transport
        assert isinstance(where, Libp2pTransport)
        # Connected first: a daemon that must look an address up may not find it in time.
        peer = await transport.connect(where.addresses()[0], 5)
        assert await rogue.protocol.call_ping(PeerID.from_base58(peer))
    try:
        yield rogue
    finally:
        await rogue.shutdown()
        await transport.close()


async def until(what: Any) -> None:
    async with asyncio.timeout(15):
        while not await what():  # noqa: ASYNC110 - other processes decide
            await asyncio.sleep(0.02)


def peers(records: list[PeerRecord]) -> set[PeerId]:
    return {r.peer for r in records}


@pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])
async def test_what_one_peer_publishes_the_others_find(tmp_path: Path) -> None:
    carol = signer("carol")
    async with swarm(tmp_path, ALICE, BOB, carol) as (a, b, c):
        for directory, owner in ((a, ALICE), (b, BOB), (c, carol)):
            assert directory.size() > 0
            assert await directory.publish_record(signed(owner))
        assert await a.publish_manifest(RUN, MANIFEST, "tiny")
        for directory in (a, b, c):
            assert peers(await directory.members(RUN)) == {
                ALICE.peer_id,
                BOB.peer_id,
                carol.peer_id,
            }
            assert await directory.manifest(RUN) == MANIFEST
            assert [(n.run, n.name, n.peers) for n in await directory.runs()] == [(RUN, "tiny", 1)]
        assert abs(c.clock_skew_s) < 1
        later = signed(BOB, issued_s=time.time() + 1, group="found one")
        assert await b.publish_record(later)
        assert await b.publish_record(later)  # again: the same is there already
        groups = {r.peer: r.group for r in await a.members(RUN)}
        assert groups[BOB.peer_id] == "found one"


async def test_what_was_published_alone_is_found_by_whoever_comes(tmp_path: Path) -> None:
    async with node(tmp_path, ALICE) as (first, a):
        assert a.size() == 0
        assert not await a.publish_record(signed(ALICE))  # nobody took it
        assert not await a.publish_manifest(RUN, MANIFEST, "tiny")
        assert await a.manifest(RUN) == MANIFEST
        async with node(tmp_path, BOB) as (second, b):
            await second.connect(first.addresses()[0], 5)

            async def found() -> bool:  # the directory's own task joins through the connection
                return await b.manifest(RUN) == MANIFEST and bool(await b.members(RUN))

            await until(found)


async def test_a_node_that_comes_back_with_nothing_is_told_of_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dht.node.NOTICE_REFRESH_S", 0.5)
    async with node(tmp_path, BOB) as (b, bob):
        for life in range(2):
            async with node(tmp_path, ALICE) as (a, alice):
                if not life:
                    assert await bob.join([await b.connect(a.addresses()[0], 5)])
                    assert await bob.publish_manifest(RUN, MANIFEST, "storm")

                async def told(alice: HivemindDirectory = alice) -> bool:
                    return [notice.run for notice in await alice.runs()] == [RUN]

                await until(told)


async def test_two_islands_become_one_where_there_is_a_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entrance came back with nothing, and a newcomer with it; those who train forgot it."""
    monkeypatch.setattr("dht.node.MEET_S", 0.5)
    carol, dave = signer("carol"), signer("dave")
    async with swarm(tmp_path, ALICE, BOB) as (_, bob), swarm(tmp_path, carol, dave) as (c, d):
        assert await bob.publish_manifest(RUN, MANIFEST, "storm")
        assert not await d.runs()
        entrance, member = c._transport, bob._transport
        assert isinstance(entrance, Libp2pTransport)
        assert isinstance(member, Libp2pTransport)
        await member.connect(entrance.addresses()[0], 5)

        async def found() -> bool:
            return [notice.run for notice in await d.runs()] == [RUN]

        await until(found)


async def test_forgeries_are_refused_by_those_who_store_and_those_who_read(
    tmp_path: Path,
) -> None:
    place = DHTID.generate(members_key(RUN, "peers/"))
    end_s = time.time() + 60
    async with swarm(tmp_path, ALICE, BOB) as (a, b), forger(tmp_path, a, b) as rogue:
        truth = record(ALICE)
        assert await a.publish_record(signed(ALICE, issued_s=truth.issued_ms / 1000))
        for subkey, value in (
            (ALICE.peer_id, b"garbage"),
            (ALICE.peer_id, signed(MALLORY)),  # another's record in her place
            (MALLORY.peer_id, signed(MALLORY)),  # with an end that is not the signed one
            ("anything", b"x" * 10_000),
        ):
            replica = PeerID.from_base58(ALICE.peer_id)
            packed = rogue.protocol.serializer.dumps(value)
            taken = await rogue.protocol.call_store(
                replica, [place], [packed], [end_s], subkeys=[subkey]
            )
            assert taken == [False]
            rogue.protocol.storage.store_subkey(place, subkey, packed, end_s)
        # Readers ask the forger as well, who claims that what he has lives for ever.
        kept = rogue.protocol.storage.data
        kept[place] = dataclasses.replace(kept[place], expiration_time=float("inf"))
        false = rogue.protocol.serializer.dumps(b"another manifest")
        rogue.protocol.storage.store(DHTID.generate(manifest_key(RUN)), false, end_s)

        async def known() -> bool:
            return bool(b.size() == 2)

        await until(known)
        for _ in range(5):  # whoever answers first
            b._node.protocol.storage.clear()
            assert await b.members(RUN) == [truth]
        assert await b.manifest(RUN) is None
        assert await a.publish_manifest(RUN, MANIFEST, "tiny")
        assert await b.manifest(RUN) == MANIFEST


async def test_a_directory_survives_its_daemon(tmp_path: Path) -> None:
    async with node(tmp_path, ALICE) as (first, a), node(tmp_path, BOB) as (second, b):
        peer = await second.connect(first.addresses()[0], 5)
        assert await b.join([peer])
        assert await b.publish_record(signed(BOB))
        assert await b.publish_manifest(RUN, MANIFEST, "tiny")
        os.kill(second.p2p._child.pid, signal.SIGKILL)
        # Whoever held the entries may be gone as well: the directory stores them again.
        a._node.protocol.storage.clear()

        async def found() -> bool:
            return bool(peers(await a.members(RUN)) and a._storage) and len(a._storage) >= 3

        await until(found)
        assert b.size() == 1
        assert await a.manifest(RUN) == MANIFEST
