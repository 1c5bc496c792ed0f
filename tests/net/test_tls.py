"""TLS as a pipe of bytes, whatever the sizes; offers and certificates, whatever the bytes."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.net import tls
from peer.net.lane import read_offer, write_offer
from peer.net.pipe import READ_BYTES_MAX
from peer.net.tls_pipe import BUFFER_BYTES_MAX, BUFFER_BYTES_MIN, TlsPipe, tune
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.identity import Signer

HOST = "127.0.0.1"
ALICE, BOB = Signer(b"a" * 32), Signer(b"b" * 32)
PEER = BOB.peer_id

both_loops = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])


@asynccontextmanager
async def pipes(folder: Path) -> AsyncIterator[tuple[TlsPipe, TlsPipe]]:
    """Alice's end, who dialled, and Bob's."""
    loop = asyncio.get_running_loop()
    with socket.create_server((HOST, 0)) as listener, socket.socket() as dialled:
        listener.setblocking(False)
        tune(dialled, HOST)
        await loop.sock_connect(dialled, listener.getsockname())
        accepted, _ = await loop.sock_accept(listener)
        tune(accepted, HOST)
        (here, his), (there, hers) = await asyncio.gather(
            TlsPipe.handshake(dialled, tls.contexts(ALICE, folder / "a")[1], listens=False),
            TlsPipe.handshake(accepted, tls.contexts(BOB, folder / "b")[0], listens=True),
        )
    assert tls.peer_behind(his) == BOB.peer_id
    assert tls.peer_behind(hers) == ALICE.peer_id
    try:
        yield here, there
    finally:
        here.close()
        there.close()


def test_a_connection_is_set_up_as_far_as_the_system_goes_along() -> None:
    refuses = 0

    class Old(socket.socket):
        """Of a system that knows none of it."""

        def setsockopt(self, *_: object) -> None:
            nonlocal refuses
            refuses += 1
            raise OSError("no such option")

    with Old() as sock:
        tune(sock, "192.0.2.1")
        assert not sock.getblocking()
    assert refuses


@both_loops
@pytest.mark.parametrize("seed", range(4))
async def test_whatever_is_written_is_read_in_pieces_of_any_size(tmp_path: Path, seed: int) -> None:
    async def write(pipe: TlsPipe, data: bytes, rng: random.Random) -> None:
        view = memoryview(data)
        while view:
            n = rng.choice((1, 13, 16384, 16385, rng.randrange(1, 400_000)))
            pipe.write(view[: n // 3], view[n // 3 : n])
            view = view[n:]
            await pipe.drain()
            assert pipe.unsent() == 0

    async def read(pipe: TlsPipe, total: int, rng: random.Random) -> bytes:
        got = bytearray()
        while len(got) < total:
            n = min(total - len(got), rng.choice((1, 13, rng.randrange(1, READ_BYTES_MAX + 1))))
            piece = await pipe.read(n)
            assert len(piece) == n
            got += piece
        return bytes(got)

    rng = random.Random(seed)
    up, down = rng.randbytes(3_000_000), rng.randbytes(2_000_000)
    async with pipes(tmp_path) as (here, there):
        _, _, upped, downed = await asyncio.gather(
            write(here, up, random.Random(seed + 1)),
            write(there, down, random.Random(seed + 2)),
            read(there, len(up), random.Random(seed + 3)),
            read(here, len(down), random.Random(seed + 4)),
        )
        assert upped == up
        assert downed == down
        assert here.received() == len(down)
        assert here.carried == there.carried == len(up) + len(down)
        here.close()
        assert await there.read(1) == b""
        assert there.died
        assert not here.died


@both_loops
async def test_memory_follows_what_is_not_read_and_the_sender_waits(tmp_path: Path) -> None:
    async with pipes(tmp_path) as (here, there):
        assert len(there._buffer) == BUFFER_BYTES_MIN
        here.write(bytes(64 * 2**20))
        draining = asyncio.create_task(here.drain())
        assert await there.read(1) == b"\0"
        done, _ = await asyncio.wait({draining}, timeout=0.2)
        assert not done
        assert len(there._buffer) <= BUFFER_BYTES_MAX
        left = 64 * 2**20 - 1
        while left:
            left -= len(await there.read(min(left, READ_BYTES_MAX)))
        await draining
        there.rest()
        assert len(there._buffer) == BUFFER_BYTES_MIN


@both_loops
async def test_a_large_piece_is_seen_to_move_on_a_line_that_takes_little(tmp_path: Path) -> None:
    """Or the sender takes the far side for dead, which takes as much as the line gives."""
    left = 64 * 2**20
    seen: set[int] = set()
    async with pipes(tmp_path) as (here, there):
        here.write(bytes(left))
        while left:
            left -= len(await there.read(min(left, READ_BYTES_MAX)))
            seen.add(here.unsent())
        await here.drain()
    assert len(seen) > 8


@both_loops
async def test_a_broken_pipe_says_so_to_whoever_waits(tmp_path: Path) -> None:
    async with pipes(tmp_path) as (here, there):
        reading = asyncio.create_task(here.read(10))
        there.write(b"12345")
        await there.drain()
        here.write(bytes(64 * 2**20))
        draining = asyncio.create_task(here.drain())
        await asyncio.wait({reading, draining}, timeout=0.1)
        there.abort()
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await draining
        assert await reading == b"12345"
        with pytest.raises((ConnectionError, ssl.SSLError)):
            here.write(b"1")
        assert here.died


@both_loops
async def test_a_cancelled_handshake_closes_its_socket(tmp_path: Path) -> None:
    here, there = socket.socketpair()
    here.setblocking(False)
    context = tls.contexts(ALICE, tmp_path)[1]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await TlsPipe.handshake(here, context, listens=False)
    there.close()


def test_the_key_is_on_disk_for_a_moment_only(tmp_path: Path) -> None:
    listens, dials = tls.contexts(ALICE, tmp_path)
    assert not list(tmp_path.iterdir())
    for context in (listens, dials):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_3
        assert context.verify_mode == ssl.CERT_REQUIRED


@given(st.binary(max_size=600))
def test_no_bytes_make_reading_an_offer_fail_otherwise(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        assert len(read_offer(PEER, data).hosts) <= limits.ADDRESSES_MAX


def test_an_offer_names_hosts_that_others_can_dial() -> None:
    def hosts(*addresses: str) -> tuple[str, ...]:
        return read_offer(PEER, write_offer(9, list(addresses))).hosts

    assert hosts("/ip4/127.0.0.1/tcp/1/p2p/x") == ("127.0.0.1",)
    assert hosts(
        "/ip4/192.0.2.7/tcp/1/p2p/x", "/ip4/192.0.2.7/tcp/2/p2p/x", "/ip6/2001:db8::1/tcp/1/p2p/x",
        "/dns4/example.org/tcp/1/p2p/x", "/ip4/198.51.100.1/tcp/1/p2p/y/p2p-circuit/p2p/x",
        "/ip4/127.0.0.1/tcp/1/p2p/x",
    ) == ("192.0.2.7", "2001:db8::1")  # fmt: skip


@given(st.binary(max_size=3000))
def test_no_bytes_make_reading_a_certificate_fail_otherwise(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        tls.peer_behind(data)
