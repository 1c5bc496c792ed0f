"""Trying addresses: who answers, and where nobody does, what the network says instead."""

from __future__ import annotations

import asyncio
import errno
from typing import Final

from peer.doctor.facts import Answered, ViaFacts
from peer.doctor.messages import place_of
from peer.net.transport import Transport, TransportError
from protocols.types import PeerId

VIA_S: Final = 6.0  # a connection with all its handshakes: four round trips, and lost packets
TRY_S: Final = 4.0  # a bare one: three SYNs, at 0, 1 and 3 s
WEB_PORT: Final = 443


async def try_via(
    transport: Transport, address: str, timeout_s: float = VIA_S
) -> tuple[ViaFacts, PeerId | None]:
    """Connect to the peer there; if it does not answer, find out what does."""
    knocking = asyncio.create_task(_knock_on(address), name=f"knock at {address}")
    try:
        peer = await transport.connect(address, timeout_s)
    except (TransportError, ValueError) as error:
        reason = error.reason if isinstance(error, TransportError) else str(error)
        answered, web = await knocking
        return ViaFacts(address=address, answered=answered, reason=reason, web_port=web), None
    finally:
        knocking.cancel()
    return ViaFacts(address=address, answered=Answered.YES), peer


async def _knock_on(address: str) -> tuple[Answered, bool | None]:
    """(what is there, whether port 443 of that host reacts where it is silent)."""
    target = _target(address)
    if target is None:
        return Answered.SILENT, None
    host, port = target
    answered, web = await asyncio.gather(knock(host, port), knock(host, WEB_PORT))
    if answered is not Answered.SILENT or port == WEB_PORT:
        return answered, None
    return answered, web in (Answered.OTHER, Answered.REFUSED)


async def knock(host: str, port: int) -> Answered:
    """Open a plain TCP connection and close it: `OTHER` where something listens."""
    try:
        async with asyncio.timeout(TRY_S):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return Answered.SILENT
    except OSError as error:
        if error.errno in (errno.ECONNREFUSED, errno.ECONNRESET):
            return Answered.REFUSED
        return Answered.SILENT if error.errno == errno.ETIMEDOUT else Answered.NO_WAY
    writer.transport.abort()
    return Answered.OTHER


def _target(address: str) -> tuple[str, int] | None:
    place = place_of(address)
    if place is not None:
        return place.host, place.port
    parts = address.split("/")
    if len(parts) > 4 and parts[1] in ("dns", "dns4", "dns6") and parts[3] == "tcp":
        port = int(parts[4]) if parts[4].isascii() and parts[4].isdigit() else 0
        return (parts[2], port) if 0 < port < 2**16 else None
    return None
