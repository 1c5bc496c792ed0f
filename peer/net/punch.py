"""Single packets and connections beside the daemon's: is a way open, and opening one.

A router or firewall that refuses what nobody inside asked for lets in the answer to whatever went
out. So a peer behind one sends a first packet (`poke`) from the daemon's port to where the other
peer is seen; the other one's ordinary dial, from its daemon's port, then looks like the answer.
This works wherever an inner port has the same outer port towards everybody, on one of both sides
at least where the other one is open to answers; behind two symmetric NATs it does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Final

BANNER: Final = b"\x13/multistream/1.0.0\n"
"""How every libp2p listener begins."""
LOOK_TIMEOUT_S: Final = 1.5  # three round trips of half a second; what is refused is mostly dropped


async def listens(place: tuple[str, int], timeout_s: float = LOOK_TIMEOUT_S) -> bool:
    """Whether a libp2p daemon answers a new connection there. Never raises for the network."""
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(*place)
            writer.write(BANNER)  # newer listeners wait for the dialler's word
            return await reader.readexactly(len(BANNER)) == BANNER
    except (TimeoutError, OSError, EOFError):
        return False
    finally:
        if writer is not None:
            writer.transport.abort()


def poke(host: str, port: int, place: tuple[str, int]) -> bool:
    """Send one packet from `host`:`port`, where the daemon listens, to `place`; whether it went.

    It is the first of a TCP handshake that is given up at once: the socket is gone before an
    answer is, so that the other side's dial finds the daemon and not us.
    """
    family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
    if (":" in host) != (family == socket.AF_INET6):
        return False
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as the daemon does
            sock.bind((host, port))
            with contextlib.suppress(BlockingIOError):
                sock.connect(place)
        except OSError:
            return False
    return True
