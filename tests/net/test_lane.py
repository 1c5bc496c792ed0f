"""The bulk lane over real daemons: the promises of a transport, and libp2p wherever it fails."""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from peer.errors import NetworkError
from peer.net import lane_dialer
from peer.net.lane import LaneStream
from peer.net.laned import LanedTransport
from peer.net.libp2p import Libp2pTransport
from peer.net.transport import Stream, TransportError
from protocols import limits
from protocols.identity import Signer
from tests.net.peers import ECHO, PAYLOAD_BYTES_MAX, backwards, echo

pytestmark = pytest.mark.asyncio(loop_factories=["uvloop"])

HOST = "127.0.0.1"


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may take its time for a handshake: these tests ask what, not how soon."""
    monkeypatch.setattr(lane_dialer, "WAIT_S", 20.0)


@asynccontextmanager
async def running(folder: Path, name: str, **options: Any) -> AsyncIterator[LanedTransport]:
    seed = hashlib.sha256(name.encode()).digest()
    daemon = await Libp2pTransport.start(seed, folder / name, HOST)
    try:
        transport = await LanedTransport.start(daemon, Signer(seed), folder / name, HOST, **options)
    except BaseException:
        await daemon.close()
        raise
    transport.serve(backwards, echo)
    try:
        yield transport
    finally:
        await transport.close()


@asynccontextmanager
async def pair(
    folder: Path, **options: Any
) -> AsyncIterator[tuple[LanedTransport, LanedTransport]]:
    async with AsyncExitStack() as stack:
        a = await stack.enter_async_context(running(folder, "a"))
        b = await stack.enter_async_context(running(folder, "b", **options))
        await a.connect(b.addresses()[0], 5)
        yield a, b


async def until(true: Any) -> None:
    async with asyncio.timeout(40):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def talk(stream: Stream, text: bytes = b"hello") -> None:
    await stream.send(ECHO, text)
    frame = await stream.receive(PAYLOAD_BYTES_MAX)
    assert frame is not None
    assert frame.payload == text
    await stream.finish()
    assert await stream.receive(0) is None
    await stream.close()


@pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])
async def test_streams_take_the_lane_and_share_one_connection(tmp_path: Path) -> None:
    async with pair(tmp_path) as (a, b):
        for _ in range(5):
            stream = await a.open(b.peer_id, 40)
            assert isinstance(stream, LaneStream)
            assert stream.peer == b.peer_id
            await talk(stream)
        assert a.counters.opened == {"lane": 5}
        assert b.counters.accepted == 5
        assert a.counters.connections == b.counters.connections == 1
        assert a.status()["to"] == {b.peer_id: 1}
        assert await a.call(b.peer_id, b"abc", 5) == b"cba"
        await talk(await b.open(a.peer_id, 40))  # the other way: a connection of its own
        assert b.counters.opened == {"lane": 1}
    assert a.counters.connections == b.counters.connections == 0
    assert not a.counters.failed
    assert not b.counters.refused


@pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])
async def test_twenty_megabytes_pass_both_ways_ten_times_without_loss(tmp_path: Path) -> None:
    pieces = [random.Random(seed).randbytes(2_000_000 + seed) for seed in range(10)]

    async def send(stream: Stream) -> None:
        for piece in pieces:
            await stream.send(ECHO, piece)
        await stream.finish()

    async with pair(tmp_path) as (a, b):
        for _ in range(10):
            stream = await a.open(b.peer_id, 40)
            assert isinstance(stream, LaneStream)
            sending = asyncio.create_task(send(stream))
            for piece in pieces:
                frame = await stream.receive(PAYLOAD_BYTES_MAX)
                assert frame is not None
                assert frame.payload == piece
            assert await stream.receive(0) is None
            await sending
            await stream.close()
        assert a.counters.bytes_up == b.counters.bytes_down
        assert a.counters.bytes_down == b.counters.bytes_up
        assert a.counters.connections == 1


async def test_a_peer_without_a_lane_gets_its_streams_over_libp2p(tmp_path: Path) -> None:
    async with pair(tmp_path, enabled=False) as (a, b):
        for opener, other in ((a, b), (b, a), (a, b)):
            stream = await opener.open(other.peer_id, 40)
            assert not isinstance(stream, LaneStream)
            await talk(stream)
        assert a.counters.failed == {"offer": 1}  # and it did not ask twice
        assert b.port == 0


async def test_where_nobody_listens_libp2p_carries_and_the_next_try_waits(tmp_path: Path) -> None:
    failed: list[str] = []
    async with pair(tmp_path) as (a, b):
        assert a._dialer is not None
        assert b._server is not None
        a._dialer._on_failed = lambda peer, reason: failed.append(peer)
        b._server._accepting.cancel()
        b._server._listener.close()
        for _ in range(3):
            await talk(await a.open(b.peer_id, 40))
        assert a.counters.opened == {"libp2p": 3}
        assert a.counters.failed == {"dial": 1}
        assert failed == [b.peer_id]
        lanes = a._dialer._peers[b.peer_id]
        before_s = 0.0
        for _ in range(12):  # later and later, and never later than that
            wait_s = lanes.not_before_s - asyncio.get_running_loop().time()
            assert min(1.5 * before_s, lane_dialer.BACKOFF_S_MAX - 1) < wait_s
            assert wait_s <= lane_dialer.BACKOFF_S_MAX
            before_s = wait_s
            lanes.not_before_s = 0.0
            await talk(await a.open(b.peer_id, 40))
        assert failed == [b.peer_id]


async def test_a_silent_host_delays_nobody_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes connections and says nothing: the first streams wait a moment, the others don't."""
    monkeypatch.setattr(lane_dialer, "HANDSHAKE_TIMEOUT_S", 3600.0)
    monkeypatch.setattr(lane_dialer, "WAIT_S", 0.1)
    async with pair(tmp_path) as (a, b):
        with socket.create_server((HOST, 0)) as mute:
            assert b._server is not None
            b._server.port = mute.getsockname()[1]
            await asyncio.gather(*[_opened(a, b) for _ in range(8)])
            for _ in range(10):
                await _opened(a, b)
            assert a.counters.opened == {"libp2p": 18}
            assert a._dialer is not None
            assert len(a._dialer._peers[b.peer_id].dials) == lane_dialer.DIALS_PER_PEER_MAX


async def _opened(a: LanedTransport, b: LanedTransport) -> None:
    await talk(await a.open(b.peer_id, 40))


async def test_a_lane_that_comes_late_serves_the_next_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_dialer, "WAIT_S", 0.0001)
    async with pair(tmp_path) as (a, b):
        await talk(await a.open(b.peer_id, 40))
        assert a.counters.opened == {"libp2p": 1}
        await until(lambda: a.counters.connections == 1)
        monkeypatch.setattr(lane_dialer, "WAIT_S", 20.0)
        await talk(await a.open(b.peer_id, 40))
        assert a.counters.opened == {"libp2p": 1, "lane": 1}


async def test_a_lane_that_dies_in_mid_stream_is_an_error_and_libp2p_comes_next(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path) as (a, b):
        stream = await a.open(b.peer_id, 40)
        assert isinstance(stream, LaneStream)
        await stream.send(ECHO, b"hello")
        assert b._server is not None
        for task in b._server._tasks:
            task.cancel()
        with pytest.raises(TransportError):
            await stream.send(1, bytes(64 * 2**20))
        await stream.close()
        assert a.counters.failed == {"broke": 1}
        await talk(await a.open(b.peer_id, 40))
        assert a.counters.opened == {"lane": 1, "libp2p": 1}
        assert a.counters.connections == 0


async def test_a_lane_that_has_worked_and_breaks_is_dialled_again_at_once(tmp_path: Path) -> None:
    """It was a full line, most likely; over libp2p the bulk would be in the way of calls."""
    async with pair(tmp_path) as (a, b):
        await talk(await a.open(b.peer_id, 40))
        assert b._server is not None
        for _ in range(2):
            stream = await a.open(b.peer_id, 40)
            assert isinstance(stream, LaneStream)
            await stream.send(ECHO, b"hello")
            for task in b._server._tasks:
                task.cancel()
            with pytest.raises(TransportError):
                await stream.send(1, bytes(64 * 2**20))
            await stream.close()
        assert a.counters.failed == {"broke": 2}
        await talk(await a.open(b.peer_id, 40))  # twice in a row is no chance
        assert a.counters.opened == {"lane": 3, "libp2p": 1}


@pytest.mark.parametrize("noticed", [True, False])
async def test_an_idle_lane_that_died_is_replaced_unnoticed(tmp_path: Path, noticed: bool) -> None:
    async with pair(tmp_path) as (a, b):
        await talk(await a.open(b.peer_id, 40))
        assert a._dialer is not None
        assert b._server is not None
        for task in b._server._tasks:
            task.cancel()
        (idle,) = a._dialer._peers[b.peer_id].idle
        if noticed:
            await until(lambda: not idle.pipe.usable)
        else:
            idle.since_s = 0.0  # long ago
        await talk(await a.open(b.peer_id, 40))
        await talk(await a.open(b.peer_id, 40))
        assert a.counters.opened == {"lane": 3}
        assert not a.counters.failed


async def test_an_idle_lane_is_asked_whether_anybody_is_there(tmp_path: Path) -> None:
    async with pair(tmp_path) as (a, b):
        assert a._dialer is not None
        for _ in range(3):
            await talk(await a.open(b.peer_id, 40))
            (idle,) = a._dialer._peers[b.peer_id].idle
            idle.since_s = 0.0  # long ago
        assert a.counters.opened == {"lane": 3}
        assert a.counters.connections == 1


async def test_one_stranger_cannot_take_more_streams_by_two_ways(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def hold(stream: Stream) -> None:
        await stream.send(1, b"")
        await release.wait()

    async with pair(tmp_path) as (a, b):
        b.serve(backwards, hold)
        half = limits.STREAMS_PER_PEER_MAX // 2
        streams = [await a.open(b.peer_id, 40) for _ in range(half)]
        streams += [
            await a.inner.open(b.peer_id, 40) for _ in range(limits.STREAMS_PER_PEER_MAX - half)
        ]
        for stream in streams:
            assert await stream.receive(0) is not None
        one_more = [await a.open(b.peer_id, 40), await a.inner.open(b.peer_id, 40)]
        for stream in one_more:
            with pytest.raises(TransportError, match="too many streams"):
                await stream.receive(0)
        release.set()
        for stream in [*streams, *one_more]:
            await stream.finish()
            await stream.close()
        assert a.counters.opened == {"lane": half + 1}
        assert not a.counters.failed


async def test_a_frozen_receiver_costs_no_more_than_the_deadline(tmp_path: Path) -> None:
    frozen = asyncio.Event()

    async def freeze(stream: Stream) -> None:
        await frozen.wait()

    async with pair(tmp_path) as (a, b):
        b.serve(backwards, freeze)
        stream = await a.open(b.peer_id, 40)
        assert isinstance(stream, LaneStream)
        stream.progress_timeout_s = 0.3
        with pytest.raises(TransportError, match="took nothing"):
            await stream.send(1, bytes(64 * 2**20))
        await stream.close()
        assert a.counters.failed == {"broke": 1}
        assert await a.call(b.peer_id, b"still here", 5) == b"ereh llits"


async def test_a_cancelled_stream_takes_its_connection_with_it(tmp_path: Path) -> None:
    async with pair(tmp_path) as (a, b):
        stream = await a.open(b.peer_id, 40)
        sending = asyncio.create_task(stream.send(1, bytes(PAYLOAD_BYTES_MAX)))
        await until(lambda: stream.bytes_out > 0)
        sending.cancel()
        await asyncio.wait({sending})
        await stream.close()
        assert a.counters.connections == 0
        assert not a.counters.failed  # nobody's fault but ours
        await talk(await a.open(b.peer_id, 40))
        await until(lambda: b.counters.connections == 1)


async def test_a_stream_that_one_side_left_open_is_not_used_again(tmp_path: Path) -> None:
    """Whoever closes without `finish` breaks the stream; whoever never closes is cut off."""
    async with pair(tmp_path) as (a, b):
        stream = await a.open(b.peer_id, 40)
        await stream.send(ECHO, b"hello")
        await stream.close()
        await until(lambda: b.counters.connections == 0)
        assert a.counters.connections == 0
        left = await a.open(b.peer_id, 40)
        assert isinstance(left, LaneStream)
        await left.finish()
        assert await left.receive(0) is None  # the far side has ended as well
        await talk(await a.open(b.peer_id, 40))
        await left.close()
        assert a.counters.connections == 2


async def test_closing_leaves_nothing_behind(tmp_path: Path) -> None:
    async with pair(tmp_path) as (a, b):
        still_open = await a.open(b.peer_id, 40)
        await talk(await b.open(a.peer_id, 40))
        ports = [a.port, b.port]
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex((HOST, port)) != 0
    with pytest.raises(TransportError):
        await still_open.receive(10)
    await still_open.close()
    assert a.counters.connections == b.counters.connections == 0
    names = [task.get_name() for task in asyncio.all_tasks()]
    assert not [name for name in names if "lane" in name]


async def test_the_port_is_remembered_and_one_that_is_taken_is_an_error(tmp_path: Path) -> None:
    async with running(tmp_path, "a") as first:
        port = first.port
    async with running(tmp_path, "a") as again:
        assert again.port == port
    with socket.create_server((HOST, port)):
        async with running(tmp_path, "a") as elsewhere:
            assert elsewhere.port != port
        with pytest.raises(NetworkError, match="--lane-port"):
            async with running(tmp_path, "a", port=port):
                pass
