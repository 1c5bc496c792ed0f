"""A process of `lane` (worker 0 sends to 1) or `lane_wan` (1 and 2, with cubic, send to 0)."""

from __future__ import annotations

import asyncio
import hashlib
import random
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import uvloop

from peer.net import tls_pipe
from peer.net.lane import LaneStream
from peer.net.laned import LanedTransport
from peer.net.libp2p import Libp2pTransport
from peer.net.transport import Stream, TransportError
from protocols.identity import Signer
from protocols.types import PeerId
from tests.bench.worker import Reply, serve_async

FRAME_BYTES: Final = 256 * 2**10
DATA: Final = 1
SUM: Final = 2


class Mover:
    """The command handlers."""

    async def start(
        self, *, index: int, size: int, via: list[str], seed: int, host: str = "127.0.0.1"
    ) -> Reply:
        self._index = index
        if index == 2:
            tls_pipe.CONGESTION_CONTROL = b"cubic"  # type: ignore[misc]
        secret = hashlib.sha256(f"{seed}/{index}".encode()).digest()
        folder = Path(tempfile.mkdtemp())
        daemon = await Libp2pTransport.start(secret, folder, host)
        self._transport = await LanedTransport.start(daemon, Signer(secret), folder, host)
        self._transport.serve(self._on_call, self._on_stream)
        self._server = await asyncio.start_server(self._on_tcp, host, 0)
        self._frame = random.Random(seed).randbytes(FRAME_BYTES)
        port = self._server.sockets[0].getsockname()[1]
        if via:
            self._tcp_port = int(via[1])
            self._peer = await self._transport.connect(via[0], 10.0)
            asked = await self._transport.call(self._peer, f"{port}".encode(), 5.0)
            assert asked == b"noted"
        return {"addresses": [self._transport.addresses()[0], str(port)]}

    async def _on_call(self, sender: PeerId, request: bytes) -> bytes:
        self._peer, self._tcp_port = sender, int(request)
        return b"noted"

    async def _on_stream(self, stream: Stream) -> None:
        total = 0
        while (frame := await stream.receive(FRAME_BYTES)) is not None:
            total += len(frame.payload)
        await stream.send(SUM, str(total).encode())

    async def _on_tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        total = 0
        while piece := await reader.read(FRAME_BYTES):
            total += len(piece)
        writer.write(str(total).encode())
        await writer.drain()
        writer.close()

    async def move(self, *, carrier: str, total: int, streams: int) -> Reply:
        """Send `total` bytes over so many streams, and hear that as many have arrived."""
        if self._index:
            return {"seconds": 0.0, "bytes": 0}
        frames = total // streams // FRAME_BYTES
        begun_s = time.monotonic()
        send = self._send_tcp if carrier == "tcp" else self._send
        arrived = await asyncio.gather(*(send(carrier, frames) for _ in range(streams)))
        seconds = time.monotonic() - begun_s
        assert arrived == [frames * FRAME_BYTES] * streams, arrived
        return {"seconds": seconds, "bytes": sum(arrived)}

    async def push(self, *, by: int, carrier: str, total: int, deadline_s: float) -> Reply:
        """One stream from `by` to worker 0, on a line that may be too bad: what became of it."""
        if self._index != by:
            return {}
        transport = self._transport.inner if carrier == "libp2p" else self._transport
        begun_s = time.monotonic()
        stream = await transport.open(self._peer, 10.0)
        try:
            async with asyncio.timeout(deadline_s):
                arrived = await self._through(stream, total // FRAME_BYTES)
                fate = "arrived"
        except TimeoutError:
            fate, arrived = "too slow", 0
        except TransportError as error:
            fate, arrived = error.reason, 0
        seconds = time.monotonic() - begun_s
        sent = stream.bytes_out
        await stream.close()
        return {
            "seconds": seconds, "sent": sent, "arrived": arrived, "fate": fate,
            "over": "lane" if isinstance(stream, LaneStream) else "libp2p",
        }  # fmt: skip

    async def _send(self, carrier: str, frames: int) -> int:
        transport = self._transport if carrier == "lane" else self._transport.inner
        stream = await transport.open(self._peer, 5.0)
        assert isinstance(stream, LaneStream) == (carrier == "lane"), stream
        return await self._through(stream, frames)

    async def _through(self, stream: Stream, frames: int) -> int:
        for _ in range(frames):
            await stream.send(DATA, self._frame)
        await stream.finish()
        answer = await stream.receive(100)
        assert answer is not None
        assert await stream.receive(0) is None
        await stream.close()
        return int(answer.payload)

    async def _send_tcp(self, carrier: str, frames: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._tcp_port)
        for _ in range(frames):
            writer.write(self._frame)
            await writer.drain()
        writer.write_eof()
        answer = await reader.read()
        writer.close()
        return int(answer)


async def main() -> None:
    mover = Mover()
    handlers: dict[str, Any] = {"start": mover.start, "move": mover.move, "push": mover.push}
    await serve_async(handlers)


if __name__ == "__main__":
    uvloop.run(main())
