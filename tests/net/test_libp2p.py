"""The promises of the transport, kept by real daemons on loopback, also when a daemon dies."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import signal
import socket
import stat
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from peer.errors import NetworkError
from peer.net.daemon import Posture
from peer.net.framing import FramedStream
from peer.net.libp2p import Libp2pTransport
from peer.net.p2pd import sweep_sockets
from peer.net.transport import Stream, TransportError
from protocols import limits
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.identity import Signer
from protocols.types import PeerId
from tests.net.peers import (
    ECHO,
    PAYLOAD_BYTES_MAX,
    backwards,
    echo,
    nobody_answers,
    until_connected,
)

pytestmark = pytest.mark.asyncio(loop_factories=["uvloop"])

HOST = "127.0.0.1"


@asynccontextmanager
async def running(folder: Path, name: str, **options: Any) -> AsyncIterator[Libp2pTransport]:
    transport = await Libp2pTransport.start(
        hashlib.sha256(name.encode()).digest(), folder / name, HOST, **options
    )
    transport.serve(backwards, echo)
    try:
        yield transport
    finally:
        await transport.close()


@asynccontextmanager
async def pair(folder: Path) -> AsyncIterator[tuple[Libp2pTransport, Libp2pTransport]]:
    async with AsyncExitStack() as stack:
        a = await stack.enter_async_context(running(folder, "a"))
        b = await stack.enter_async_context(running(folder, "b"))
        await a.connect(b.addresses()[0], 5)
        yield a, b


async def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])
async def test_calls_are_answered_or_refused_with_the_reason(tmp_path: Path) -> None:
    async with pair(tmp_path) as (a, b):
        assert await a.call(b.peer_id, b"abc", 5) == b"cba"
        assert await b.call(a.peer_id, b"who", 5) == b.peer_id.encode()
        assert await a.connected() == [b.peer_id]
        with pytest.raises(RemoteProtocolError, match="not today") as caught:
            await a.call(b.peer_id, b"refuse", 5)
        assert caught.value.peer == b.peer_id
        with pytest.raises(LocalProtocolError):
            await a.call(b.peer_id, bytes(limits.CONTROL_BYTES_MAX + 1), 5)
        full = bytes(limits.CONTROL_BYTES_MAX)
        assert await a.call(b.peer_id, full, 5) == full
        # A peer without our limit is refused by the far side.
        coded = await a.p2p._client.call_unary_handler(
            b.p2p.peer_id, "murmuration/call/1", full + b"1"
        )
        assert b"too large" in coded


@pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])
async def test_twenty_megabytes_pass_both_ways_ten_times_without_loss(tmp_path: Path) -> None:
    pieces = [random.Random(seed).randbytes(2_000_000 + seed) for seed in range(10)]

    async def send(stream: Stream) -> None:
        for piece in pieces:
            await stream.send(ECHO, piece)
        await stream.finish()

    async with pair(tmp_path) as (a, b):
        for _ in range(10):
            stream = await a.open(b.peer_id, 5)
            sending = asyncio.create_task(send(stream))
            for piece in pieces:
                frame = await stream.receive(PAYLOAD_BYTES_MAX)
                assert frame is not None
                assert frame.payload == piece
            assert await stream.receive(0) is None
            await sending
            await stream.close()


async def test_a_frozen_receiver_costs_no_more_than_the_deadline(tmp_path: Path) -> None:
    frozen = asyncio.Event()

    async def freeze(stream: Stream) -> None:
        await frozen.wait()

    async with pair(tmp_path) as (a, b):
        b.serve(backwards, freeze)
        stream = await a.open(b.peer_id, 5)
        assert isinstance(stream, FramedStream)
        stream.progress_timeout_s = 0.3
        with pytest.raises(TransportError, match="took nothing"):
            await stream.send(1, bytes(64 * 2**20))
        await stream.close()
        assert await a.call(b.peer_id, b"still here", 5) == b"ereh llits"


async def test_one_stranger_cannot_take_all_streams(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def hold(stream: Stream) -> None:
        await stream.send(1, b"")
        await release.wait()

    async with pair(tmp_path) as (a, b):
        b.serve(backwards, hold)
        streams = [await a.open(b.peer_id, 5) for _ in range(limits.STREAMS_PER_PEER_MAX)]
        for stream in streams:
            assert await stream.receive(0) is not None
        one_more = await a.open(b.peer_id, 5)
        with pytest.raises(TransportError, match="too many streams"):
            await one_more.receive(0)
        release.set()
        for stream in [*streams, one_more]:
            await stream.finish()
            await stream.close()


@pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])
async def test_a_killed_daemon_comes_back_as_the_same_peer(tmp_path: Path) -> None:
    restarts: list[str] = []
    back = asyncio.Event()

    def on_restart(reason: str, seconds: float, p2p: Any) -> None:
        restarts.append(reason)
        back.set()

    async def never(sender: PeerId, request: bytes) -> bytes:
        return await asyncio.get_running_loop().create_future() or b""

    async with pair(tmp_path) as (a, b):
        a.restart_listeners.append(on_restart)
        before = a.addresses()
        b.serve(never, echo)
        stream = await a.open(b.peer_id, 5)
        calling = asyncio.create_task(a.call(b.peer_id, b"abc", 60))
        reading = asyncio.create_task(stream.receive(10))
        await asyncio.sleep(0.05)  # both are on their way
        killed_s = time.monotonic()
        os.kill(a.p2p._child.pid, signal.SIGKILL)
        for task in (calling, reading):
            with pytest.raises(TransportError):
                await task
        assert time.monotonic() - killed_s < 1.0
        await stream.close()
        async with asyncio.timeout(10):
            await back.wait()
        assert "-9" in restarts[0]
        assert a.addresses() == before
        b.serve(backwards, echo)
        assert await a.call(b.peer_id, b"abc", 5) == b"cba"
        assert await b.call(a.peer_id, b"who", 5) == b.peer_id.encode()
        back_stream = await b.open(a.peer_id, 5)
        await back_stream.send(ECHO, b"hello")
        assert await back_stream.receive(10) is not None
        await back_stream.finish()
        await back_stream.close()


async def test_a_dial_that_succeeded_has_made_a_connection(tmp_path: Path) -> None:
    async with (
        running(tmp_path, "a") as a,
        running(tmp_path, "b") as b,
        nobody_answers() as (nowhere, dialled),
    ):
        # While this one lasts the daemon has in mind what else was dialled, also when it is gone.
        waiting = asyncio.create_task(a.dial(b.peer_id, [nowhere], 15))
        async with asyncio.timeout(15):
            await dialled.wait()
        await until_connected(a, b.peer_id, b.addresses())
        await a.disconnect(b.peer_id)
        while not a.is_connected(b.peer_id):
            with contextlib.suppress(TransportError):
                await a.dial(b.peer_id, b.addresses(), 15)
                assert b.peer_id in await a.connections()
        assert await a.call(b.peer_id, b"abc", 5) == b"cba"
        await asyncio.gather(waiting, return_exceptions=True)


async def test_who_connects_while_the_daemon_is_exchanged_waits_for_the_new_one(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, "a") as a, running(tmp_path, "b") as b:
        changes = asyncio.create_task(a.change(Posture(relays=True)))
        for _ in range(100):  # it is told to go
            await asyncio.sleep(0)
        assert await a.connect(b.addresses()[0], 15) == b.peer_id
        assert await a.call(b.peer_id, b"abc", 5) == b"cba"
        await changes


async def test_a_port_that_was_asked_for_and_is_taken_is_an_error_with_advice(
    tmp_path: Path,
) -> None:
    with socket.socket() as holder:
        holder.bind((HOST, 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(NetworkError, match=rf"port {port} is taken; choose another"):
            async with running(tmp_path, "a", port=port):
                pass


async def test_a_port_is_remembered_and_given_up_only_when_taken(tmp_path: Path) -> None:
    async with running(tmp_path, "a") as first:
        addresses = first.addresses()
    key = tmp_path / "a" / "libp2p.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    async with running(tmp_path, "a") as again:
        assert again.addresses() == addresses
    port = int((tmp_path / "a" / "port").read_text())
    with socket.socket() as holder:
        holder.bind((HOST, port))
        holder.listen()
        async with running(tmp_path, "a") as elsewhere:
            assert elsewhere.addresses() != addresses
            assert elsewhere.peer_id == again.peer_id


async def test_an_address_that_does_not_answer_is_nobodys_crash(tmp_path: Path) -> None:
    stranger = Signer(b"s" * 32).peer_id
    async with pair(tmp_path) as (a, b):
        port = await closed_port()
        with pytest.raises(TransportError):
            await a.connect(f"/ip4/127.0.0.1/tcp/{port}/p2p/{stranger}", 5)
        somebody_else = b.addresses()[0].replace(b.peer_id, stranger)
        with pytest.raises(TransportError):
            await a.connect(somebody_else, 5)
        with pytest.raises(TransportError, match="own"):
            await a.connect(a.addresses()[0], 5)
        with pytest.raises(TransportError):
            await a.call(stranger, b"abc", 0.5)
        with pytest.raises(TransportError):
            await a.open(stranger, 0.5)


async def test_a_remembered_address_is_dialled_when_it_is_needed(tmp_path: Path) -> None:
    async with running(tmp_path, "a") as a, running(tmp_path, "b") as b:
        a.remember(b.peer_id, ["nonsense", a.addresses()[0], *b.addresses()])
        assert await a.call(b.peer_id, b"abc", 5) == b"cba"


async def test_closing_leaves_nothing_behind(tmp_path: Path) -> None:
    async with pair(tmp_path) as (a, b):
        still_open = await a.open(b.peer_id, 5)
        pids = [a.p2p._child.pid, b.p2p._child.pid]
        assert [os.getsid(pid) for pid in pids] == pids  # Ctrl-C does not reach them
        sockets = [
            Path(maddr["unix"])
            for p2p in (a.p2p, b.p2p)
            for maddr in (p2p._daemon_listen_maddr, p2p._client_listen_maddr)
        ]
        assert all(path.exists() for path in sockets)
    assert not any(path.exists() for path in sockets)
    with pytest.raises(TransportError):
        await still_open.receive(10)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


ORPHAN = """
import asyncio, pathlib, sys
from peer.net.daemon import Posture
from peer.net.libp2p import Libp2pTransport
async def main():
    transport = await Libp2pTransport.start(b"o" * 32, pathlib.Path(sys.argv[1]), "127.0.0.1")
    print(transport.p2p._child.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_a_daemon_does_not_outlive_a_killed_peer(tmp_path: Path) -> None:
    peer = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "ignore", "-c", ORPHAN, str(tmp_path), stdout=-1
    )
    assert peer.stdout is not None
    daemon = int(await peer.stdout.readline())
    peer.kill()
    await peer.wait()
    async with asyncio.timeout(5):
        while Path(f"/proc/{daemon}").exists():  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.02)
    sweep_sockets()  # as the next peer does when it starts
    assert not list(Path(tempfile.gettempdir()).glob(f"murmuration-{peer.pid}-*"))  # noqa: ASYNC240
