"""The directory inside one process follows the same rules as the DHT."""

from __future__ import annotations

from dht.memory import MemoryBoard, MemoryDirectory
from protocols import limits
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
