"""What the peers of these tests do with calls and streams."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from peer.net.libp2p import Libp2pTransport
from peer.net.transport import Stream, TransportError
from protocols.errors import RemoteProtocolError
from protocols.types import PeerId

ECHO = 2  # frames of this kind come back
PAYLOAD_BYTES_MAX = 16 * 2**20


async def backwards(sender: PeerId, request: bytes) -> bytes:
    if request == b"refuse":
        raise RemoteProtocolError(sender, "not today")
    if request == b"who":
        return sender.encode()
    return request[::-1]


async def echo(stream: Stream) -> None:
    while (frame := await stream.receive(PAYLOAD_BYTES_MAX)) is not None:
        if frame.kind == ECHO:
            await stream.send(ECHO, frame.payload)


@contextlib.asynccontextmanager
async def nobody_answers() -> AsyncIterator[tuple[str, asyncio.Event]]:
    """An address where a connection is taken and nothing is said; set when somebody dialled."""
    dialled = asyncio.Event()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dialled.set()
        with contextlib.suppress(ConnectionError):
            while await reader.read(2**16):
                pass
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    try:
        yield f"/ip4/127.0.0.1/tcp/{server.sockets[0].getsockname()[1]}", dialled
    finally:
        server.close()


async def until_connected(one: Libp2pTransport, other: PeerId, addresses: list[str]) -> None:
    """Dial until it is true that there is a connection."""
    while other not in await one.connections():
        with contextlib.suppress(TransportError):
            await one.dial(other, addresses, 15)
