"""What the peers of these tests do with calls and streams."""

from __future__ import annotations

from peer.net.transport import Stream
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
