"""A relayed connection is cut for a shorter way only where nothing breaks; all in this process."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from peer.net import ways
from peer.net.pairs import Change, Pair
from peer.net.reach_helper import ReachHelper
from peer.net.relays import RelayTable
from peer.net.transport import TransportError
from peer.net.ways import Ways
from protocols.identity import Signer
from protocols.types import PeerId

ONE, OTHER = sorted(Signer(hashlib.sha256(bytes([n])).digest()).peer_id for n in (1, 2))
RELAY = Signer(bytes(32)).peer_id
RELAYED = f"/ip4/198.51.100.1/tcp/443/p2p/{RELAY}/p2p-circuit"
DIRECT = "/ip4/203.0.113.7/tcp/4001"


@dataclass(eq=False)
class Between:
    """What is between the two: one connection, streams on it, and those that its end broke."""

    way: str | None = RELAYED
    streams: list[tuple[PeerId, bool]] = field(default_factory=list)
    """Who opened it, and whether the other side knows of it."""
    broken: int = 0
    cuts: int = 0
    cutting: asyncio.Event = field(default_factory=asyncio.Event)
    may_end: asyncio.Event = field(default_factory=asyncio.Event)
    """A daemon that was told to cut does it then."""
    ends: dict[PeerId, End] = field(default_factory=dict)


class End:
    """One of them: what of libp2p's transport the ways need, and the ways."""

    port = 0

    def __init__(self, between: Between, peer_id: PeerId, *, open_: bool) -> None:
        self.peer_id = peer_id
        self.between = between
        self.other = OTHER if peer_id == ONE else ONE
        self._known = [f"{RELAYED}/p2p/{self.other}"]
        self._known += [f"{DIRECT}/p2p/{self.other}"] if open_ else []
        between.ends[peer_id] = self
        self.ways = Ways(cast("Any", self), "0.0.0.0", lambda: False, lambda text: None)
        self.helper = ReachHelper(self, RelayTable(), list, self.ways.meet, self.ways.agree)

    def addresses(self) -> list[str]:
        return []

    def known(self, peer: PeerId) -> list[str]:
        return self._known

    def is_connected(self, peer: PeerId) -> bool:
        return self.between.way is not None

    def streams_with(self, peer: PeerId) -> int:
        return sum(by == self.peer_id or arrived for by, arrived in self.between.streams)

    async def connections(self) -> Mapping[PeerId, list[str]]:
        return {self.other: [self.between.way]} if self.between.way else {}

    async def call(self, peer: PeerId, request: bytes, timeout_s: float) -> bytes:
        if self.between.way is None or peer != self.other:
            raise TransportError(peer, "no connection")
        await everything_else()  # on its way
        answer = await self.between.ends[peer].helper.answer(self.peer_id, request)
        await everything_else()  # and back
        return answer

    async def dial(self, peer: PeerId, addresses: Iterable[str], timeout_s: float) -> None:
        self.between.way = DIRECT if any(DIRECT in a for a in addresses) else RELAYED

    async def disconnect(self, peer: PeerId) -> None:
        self.between.cutting.set()
        await self.between.may_end.wait()
        self.between.cuts += 1
        self.between.broken += len(self.between.streams)
        self.between.streams.clear()
        self.between.way = None

    async def open(self, *, arrives: bool = True) -> None:
        """As the ladder does it."""
        await self.ways.ready(self.other, 10.0, bulk=True)
        with self.ways.talking(self.other):
            self.between.streams.append((self.peer_id, arrives))


@pytest.fixture
def between(monkeypatch: pytest.MonkeyPatch) -> Between:
    async def listens(place: tuple[str, int], timeout_s: float) -> bool:
        return True

    monkeypatch.setattr(ways, "listens", listens)
    return Between()


def two(between: Between, *, both_open: bool = False) -> tuple[End, End]:
    """The first can dial the other one, and perhaps the other way round, too."""
    one = End(between, ONE, open_=True)
    return one, End(between, OTHER, open_=both_open)


async def everything_else() -> None:
    """Let all tasks go on to where they wait."""
    for _ in range(100):
        await asyncio.sleep(0)


async def close(*ends: End) -> None:
    for end in ends:
        await end.ways.close()


@pytest.mark.asyncio
async def test_where_nothing_is_in_progress_a_stream_goes_without_the_relay(
    between: Between,
) -> None:
    one, other = two(between)
    between.may_end.set()
    await one.open()
    assert between.way == DIRECT
    assert (between.cuts, between.broken) == (1, 0)
    await close(one, other)


@pytest.mark.asyncio
async def test_a_stream_that_did_not_arrive_here_yet_is_not_cut(between: Between) -> None:
    one, other = two(between)
    between.may_end.set()
    await other.open(arrives=False)
    assert one.streams_with(OTHER) == 0
    await one.open()
    assert between.way == RELAYED
    assert (between.cuts, len(between.streams)) == (0, 2)
    await close(one, other)


@pytest.mark.asyncio
async def test_a_stream_waits_while_the_other_side_cuts(between: Between) -> None:
    one, other = two(between)
    cuts = asyncio.create_task(one.open())
    async with asyncio.timeout(10):
        await between.cutting.wait()
    opens = asyncio.create_task(other.open())
    await everything_else()
    between.may_end.set()
    await asyncio.gather(cuts, opens)
    assert between.way == DIRECT
    assert (between.cuts, between.broken, len(between.streams)) == (1, 0, 2)
    await close(one, other)


@pytest.mark.asyncio
async def test_of_two_that_want_to_cut_at_once_one_does(between: Between) -> None:
    one, other = two(between, both_open=True)
    between.may_end.set()
    await asyncio.gather(one.open(), other.open())
    assert between.way == DIRECT
    assert (between.cuts, between.broken, len(between.streams)) == (1, 0, 2)
    await close(one, other)


@pytest.mark.asyncio
async def test_a_stream_waits_for_a_shorter_way_that_is_being_looked_for_already(
    between: Between,
) -> None:
    one, other = two(between)
    between.may_end.set()
    await one.ways.ready(OTHER, 10.0)  # somebody talks to it: worth a look
    one.ways.tend(await one.connections())
    await one.open()
    assert between.way == DIRECT
    assert (between.cuts, between.broken) == (1, 0)
    await close(one, other)


@pytest.mark.asyncio
async def test_a_promise_to_begin_nothing_ends_by_itself(
    between: Between, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "HOLD_S", 0.2)
    one, other = two(between)
    assert await other.ways.agree(ONE)
    opens = asyncio.create_task(other.open())
    await everything_else()
    assert not between.streams
    await opens
    assert between.way == RELAYED
    await close(one, other)


@pytest.mark.asyncio
async def test_a_call_that_ends_soon_is_waited_for_and_another_one_means_no(
    between: Between,
) -> None:
    one, other = two(between)
    with other.ways.talking(ONE):
        asked = asyncio.create_task(other.ways.agree(ONE))
        await everything_else()
        assert not asked.done()
    assert await asked
    await close(other)
    with one.ways.talking(OTHER):
        assert not await one.ways.agree(OTHER)
    await close(one)


@pytest.mark.asyncio
async def test_only_a_relayed_connection_is_ever_given_up(between: Between) -> None:
    one, other = two(between)
    for way in (DIRECT, None):
        between.way = way
        assert not await other.ways.agree(ONE)
    await close(one, other)


@pytest.mark.asyncio
async def test_a_stream_that_would_have_to_wait_beyond_its_deadline_fails(
    between: Between,
) -> None:
    one, other = two(between)
    assert await other.ways.agree(ONE)
    with pytest.raises(TransportError, match="just being made anew"):
        await other.ways.ready(ONE, 0.1, bulk=True)
    await other.ways.ready(ONE, 0.1)  # a call may go: it breaks at worst
    await close(one, other)


@pytest.mark.asyncio
async def test_one_change_that_is_over_does_not_end_another() -> None:
    pair = Pair()
    with pair.change(Change(theirs=True, cuts=True)):
        with pair.change(Change()):
            assert (pair.held, pair.switching, pair.cutting) == (True, True, True)
        assert (pair.held, pair.switching, pair.cutting) == (True, False, True)
    assert (pair.held, pair.switching, pair.cutting) == (False, False, False)
