"""The directory inside one process follows the same rules as the DHT."""

from __future__ import annotations

import random
from dataclasses import replace

from dht.memory import MemoryBoard, MemoryDirectory
from protocols import limits
from protocols.coordinates import Coordinate
from protocols.records import sign_record
from tests.dht.samples import MANIFEST, OTHER_RUN, RUN, record, signed, signer

ALICE = signer("alice")
BOB = signer("bob")


class Clock:
    now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


async def test_what_one_publishes_another_reads_until_it_ends() -> None:
    clock = Clock()
    board = MemoryBoard(clock)
    mine, yours = MemoryDirectory(board, ALICE.peer_id), MemoryDirectory(board, BOB.peer_id)
    assert (mine.size(), yours.size()) == (1, 1)
    assert await mine.publish_record(signed(ALICE, issued_s=clock.now_s))
    assert await yours.members(RUN) == [record(ALICE, issued_s=clock.now_s)]
    assert await yours.members(OTHER_RUN) == []
    clock.now_s += 91
    assert await yours.members(RUN) == []
    assert await mine.publish_manifest(RUN, MANIFEST, "tiny")
    assert await yours.manifest(RUN) == MANIFEST
    assert [(n.run, n.name, n.peers) for n in await yours.runs()] == [(RUN, "tiny", 1)]
    await mine.close()
    assert yours.size() == 0
    assert await yours.runs() == []


async def test_a_large_run_is_found_piece_by_piece() -> None:
    """Nobody reads everybody: own cell, own group, and groups drawn from the index."""
    clock = Clock()
    board = MemoryBoard(clock)
    owners = [signer(f"peer {i}") for i in range(160)]
    directories = [
        MemoryDirectory(board, o.peer_id, random.Random(i)) for i, o in enumerate(owners)
    ]
    records = {}
    for step in range(4):  # the first ones learn only later how many came
        clock.now_s += 45
        for i, owner in enumerate(owners):
            place = Coordinate(0.02 * (i % 16), 0.0, 0.001 * (i // 16), 0.001, 0.1)
            mine = replace(
                record(owner, issued_s=clock.now_s, group=f"near:{i % 16}"), coordinate=place,
                company=10,
            )  # fmt: skip
            records[owner.peer_id] = mine
            before = board.writes
            assert await directories[i].publish_record(
                sign_record(owner, mine), contact=i // 16 < limits.GROUP_CONTACTS
            )
            await directories[i].nearby(mine)
            assert step < 3 or board.writes - before <= 16
    assert all(len(found) <= 128 for found in board.cells.values())
    before = board.reads
    some = await MemoryDirectory(board, ALICE.peer_id).members(RUN)
    assert board.reads - before == 1
    assert 16 <= len(some) <= 64
    for i in range(0, 160, 7):
        mine = records[owners[i].peer_id]
        before = board.reads
        near = {r.peer for r in await directories[i].nearby(mine)}
        assert board.reads - before <= 8
        assert {r.peer for r in records.values() if r.group == mine.group} <= near
    drawn = set()
    before = board.reads
    for _ in range(40):
        notices = await directories[0].random_groups(RUN, 2)
        assert len({n.group for n in notices}) == len(notices) == 2
        for notice in notices:
            assert all(r.group == notice.group for r in notice.contacts)
            assert 1 <= len(notice.contacts) <= limits.GROUP_CONTACTS
        drawn |= {n.group for n in notices}
    assert board.reads - before <= 40 * 3
    assert len(drawn) == 16, "each is drawn sooner or later"
    few = await MemoryDirectory(MemoryBoard(clock), ALICE.peer_id).random_groups(RUN, 2)
    assert few == []


async def test_in_a_large_run_only_some_announce_it() -> None:
    clock = Clock()
    board = MemoryBoard(clock)
    for i in range(200):
        owner = signer(f"peer {i}")
        directory = MemoryDirectory(board, owner.peer_id)
        await directory.publish_record(signed(owner, issued_s=clock.now_s))
        assert await directory.publish_manifest(RUN, MANIFEST, "tiny")
    (notice,) = await directory.runs()
    assert 20 <= notice.peers <= 120
    assert await directory.manifest(RUN) == MANIFEST


async def test_what_breaks_the_rules_is_refused() -> None:
    clock = Clock()
    directory = MemoryDirectory(MemoryBoard(clock), ALICE.peer_id)
    new = signed(ALICE, issued_s=clock.now_s, group="new")
    assert not await directory.publish_record(new[:-1])
    assert not await directory.publish_record(signed(ALICE, issued_s=clock.now_s - 100))
    assert await directory.publish_record(new)
    assert not await directory.publish_record(signed(ALICE, issued_s=clock.now_s - 10))
    assert [r.group for r in await directory.members(RUN)] == ["new"]
    assert not await directory.publish_manifest(OTHER_RUN, MANIFEST, "tiny")
    assert not await directory.publish_manifest(RUN, MANIFEST, "n" * (limits.NAME_CHARS_MAX + 1))
    assert await directory.manifest(OTHER_RUN) is None
