"""The bulk lane: what both ends of it share: offers, and streams.

A lane is a TCP connection with TLS 1.3 (`tls`) between two peers that can reach each other, beside
libp2p. It carries streams one after another, with the frames of `framing`; calls stay with libp2p,
so control never queues behind bulk.

    over libp2p       LaneAsk  -->  LaneOffer: where I listen. Who has asked is let in for a while.
    on a connection   <-- GREETING, once the listening side knows who is there
                      OPENS  -->  and frames both ways up to the END of each side;
                      then OPENS again, PROBE --> (is anybody there? GREETING says so), or the end.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Final

from peer.net.budget import UploadBudget
from peer.net.framing import CLOSE_WAIT_S, LEFT_FRAME_BYTES_MAX, FramedStream
from peer.net.tls_pipe import TlsPipe
from peer.net.transport import TransportError
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.schema import Max, SchemaError, pack, unpack
from protocols.types import PeerId

OPENS: Final = b"\x01"
GREETING: Final = b"\x02"
PROBE: Final = b"\x03"

ASK: Final = b"\xffmurmuration/lane/1"
"""The whole request. No message of the protocol begins like this: those begin with its version."""

OFFER_ADDRESSES_MAX: Final = limits.ADDRESSES_MAX
IP_CHARS_MAX: Final = 45  # the longest spelling of an IPv6 address
OFFER_BYTES_MAX: Final = 512
OFFER_TTL_S: Final = 600.0  # whoever moves or restarts is found anew within this time
ADMITTED_S: Final = 2 * OFFER_TTL_S  # longer than anybody keeps an offer
HANDSHAKE_TIMEOUT_S: Final = 5.0  # three round trips of a second, and a busy machine
GREETING_TIMEOUT_S: Final = 2.0
IDLE_S: Final = 120.0  # home routers forget quiet connections after a few minutes
CARRIED_BYTES_MAX: Final = 64 * 2**30
"""Then a connection is not used again: AES-GCM's keys last for some 400 GB (RFC 8446, 5.5)."""


@dataclass(frozen=True, slots=True)
class LaneOffer:
    """Where a peer listens for lanes; `port` 0: nowhere. Only TLS tells who is really there."""

    port: Annotated[int, Max(65535)]
    hosts: Annotated[tuple[Annotated[str, Max(IP_CHARS_MAX)], ...], Max(OFFER_ADDRESSES_MAX)]
    """IP addresses, the likeliest first."""


def read_offer(peer: PeerId, data: bytes) -> LaneOffer:
    """The offer in `peer`'s answer; only addresses that one host may have.

    Raises:
        RemoteProtocolError: it is none.
    """
    if len(data) > OFFER_BYTES_MAX:
        raise RemoteProtocolError(peer, f"a lane offer of {len(data)} bytes")
    try:
        offer = unpack(LaneOffer, data)
        for host in offer.hosts:
            ip = ipaddress.ip_address(host)
            if ip.is_multicast or ip.is_unspecified or "%" in host:
                raise ValueError(f"{host} is no host's address")
    except (SchemaError, ValueError) as error:
        raise RemoteProtocolError(peer, f"lane offer: {error}") from None
    return offer


def write_offer(port: int, addresses: list[str]) -> bytes:
    """The coded offer of a peer that is known under these multiaddresses."""
    hosts: list[str] = []
    for address in addresses:
        parts = address.split("/")
        if len(parts) > 2 and parts[1] in ("ip4", "ip6") and "p2p-circuit" not in parts:
            hosts.append(parts[2])
    # On any other machine a loopback address is somebody else's.
    hosts = [h for h in hosts if not ipaddress.ip_address(h).is_loopback] or hosts
    return pack(LaneOffer(port, tuple(dict.fromkeys(hosts))[:OFFER_ADDRESSES_MAX]))


class LaneStream(FramedStream):
    """A stream over a lane. After an orderly end of both sides the lane may carry another one."""

    def __init__(
        self,
        pipe: TlsPipe,
        peer: PeerId,
        budget: UploadBudget,
        *,
        opened_here: bool,
        on_closed: Callable[[LaneStream], None] | None = None,
    ) -> None:
        super().__init__(pipe, peer, budget, opened_here=opened_here)
        self.pipe = pipe
        self.reusable = False
        """Closed, and the connection is as it was before the stream."""
        self.failed = False
        """The connection broke or stood still while the stream was open."""
        self._on_closed = on_closed
        self._closed = False

    def abort(self, reason: str) -> None:
        self.failed = not self._closed
        super().abort(reason)

    async def close(self) -> None:
        """Close this side. After `finish` it first lets the far side come to its end as well."""
        if self._closed:
            return
        orderly = ended = False
        try:
            if self._finished and not self._broken:
                orderly = True
                async with asyncio.timeout(min(CLOSE_WAIT_S, self.progress_timeout_s)):
                    while not self._ended:
                        await self.receive(LEFT_FRAME_BYTES_MAX)
                ended = True
        except (TimeoutError, OSError, TransportError, RemoteProtocolError):
            orderly = not self._broken  # too slow to say goodbye, but what we sent may arrive
        finally:
            self._closed = True
            self.failed = self.failed or self.pipe.died
            self._broken = self._broken or "closed here"
            self._ended = True
            self._receiving.end()
            self._draining.end()
            self.reusable = (
                ended
                and self.pipe.usable
                and not self.pipe.unsent()
                and self.pipe.carried < CARRIED_BYTES_MAX
            )
            if not orderly:
                self.pipe.abort()
            elif not self.reusable:
                self.pipe.close()
            if self._on_closed is not None:
                self._on_closed(self)
