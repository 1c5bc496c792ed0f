"""Helping others to be reached: dialling them back, naming relays, bringing two together.

Every peer and bootstrap node does this. What strangers can make us do is bounded: connections go
only to the very host that asked (`Look`) or was seen by who introduces (`Come`), a few a second.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Protocol

from peer.net.multiaddress import at, is_address_of, is_relayed, place_of
from peer.net.punch import LOOK_TIMEOUT_S, listens
from peer.net.rates import Rates
from peer.net.reach import (
    RELAYS_TOLD_MAX,
    Agreed,
    Come,
    Coming,
    Cut,
    Introduce,
    Look,
    Seen,
    read_coming,
    read_question,
    write_question,
)
from peer.net.relays import RelayTable
from peer.net.transport import TransportError
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.identity import public_key_of
from protocols.schema import pack
from protocols.types import PeerId

LOOKS_AT_ONCE_MAX: Final = 32
INTRODUCTIONS_AT_ONCE_MAX: Final = 64
COME_TIMEOUT_S: Final = 2.0  # a call, and a look of the far side's at whether a way is open
BUSY: Final = "too many ask for that now; try again in a moment"


class Line(Protocol):
    """What of the transport helping needs."""

    async def connections(self) -> Mapping[PeerId, list[str]]: ...

    async def call(self, peer: PeerId, request: bytes, timeout_s: float) -> bytes: ...


Meet = Callable[[PeerId, Come], Awaitable[Coming]]
"""(who introduces, about whom) -> what we do about it."""
Agree = Callable[[PeerId], Awaitable[bool]]
"""Whether that peer may cut the relayed connection to us now."""


class ReachHelper:
    """Answers what `reach` can ask."""

    def __init__(
        self,
        line: Line,
        table: RelayTable,
        own_relay: Callable[[], list[str]],
        meet: Meet,
        agree: Agree,
    ) -> None:
        """`own_relay`: our addresses while we relay, else none."""
        self._line = line
        self._table = table
        self._own_relay = own_relay
        self._meet = meet
        self._agree = agree
        self._looks = Rates(burst=6, each_s=10.0, all_burst=64, all_each_s=0.25)
        self._introductions = Rates(burst=32, each_s=1.0, all_burst=256, all_each_s=0.05)
        self._meetings = Rates(burst=64, each_s=0.5, all_burst=64, all_each_s=0.25)
        self._cuts = Rates(burst=16, each_s=1.0, all_burst=256, all_each_s=0.05)
        self._looking = 0
        self._introducing = 0

    async def answer(self, sender: PeerId, request: bytes) -> bytes:
        """Raises RemoteProtocolError: no question, or too many."""
        question = read_question(sender, request)
        now_s = asyncio.get_running_loop().time()
        match question:
            case Look():
                if self._looking >= LOOKS_AT_ONCE_MAX or not self._looks.take(sender, now_s):
                    raise RemoteProtocolError(sender, BUSY)
                self._looking += 1
                try:
                    return pack(await self._look(sender, question))
                finally:
                    self._looking -= 1
            case Introduce():
                if self._introducing >= INTRODUCTIONS_AT_ONCE_MAX or not self._introductions.take(
                    sender, now_s
                ):
                    raise RemoteProtocolError(sender, BUSY)
                self._introducing += 1
                try:
                    return pack(await self._introduce(sender, question))
                finally:
                    self._introducing -= 1
            case Come():
                if not self._meetings.take(sender, now_s):
                    raise RemoteProtocolError(sender, BUSY)
                check_peer(sender, question.peer)
                return pack(await self._meet(sender, question))
            case Cut():
                if not self._cuts.take(sender, now_s):
                    raise RemoteProtocolError(sender, BUSY)
                return pack(Agreed(await self._agree(sender)))

    async def _look(self, sender: PeerId, look: Look) -> Seen:
        loop = asyncio.get_running_loop()
        place = seen_at(await self._line.connections(), sender)
        reached = False
        if place is not None and not ipaddress.ip_address(place[0]).is_loopback:
            ports = [port for port in dict.fromkeys(look.ports) if port]
            tries = (listens((place[0], port), LOOK_TIMEOUT_S) for port in ports)
            reached = any(await asyncio.gather(*tries))
        own = self._own_relay()
        told = (*own[:1], *self._table.told(loop.time(), sender))
        if look.offers and reached:
            self._table.add(sender, look.addresses, loop.time())
        return Seen(at(place) if place else "", reached, bool(own), told[:RELAYS_TOLD_MAX])

    async def _introduce(self, sender: PeerId, wish: Introduce) -> Coming:
        target = check_peer(sender, wish.peer)
        connections = await self._line.connections()
        place = seen_at(connections, sender)
        addresses = tuple(a for a in wish.addresses if is_address_of(a, sender))
        come = Come(sender, wish.reachable, wish.opened, addresses, at(place) if place else "")
        try:
            coded = await self._line.call(target, write_question(come), COME_TIMEOUT_S)
            coming = read_coming(target, coded)
        except TransportError as error:
            raise RemoteProtocolError(sender, f"{target} is not here ({error.reason})") from None
        except RemoteProtocolError as error:
            raise RemoteProtocolError(sender, f"{target} would not ({error.reason})") from None
        there = seen_at(await self._line.connections(), target)
        return Coming(coming.dials, coming.opened, at(there) if there else "")


def seen_at(connections: Mapping[PeerId, list[str]], peer: PeerId) -> tuple[str, int] | None:
    """Where the far end of a direct connection to `peer` is, or None."""
    places = (place_of(end) for end in connections.get(peer, ()) if not is_relayed(end))
    return next((place for place in places if place is not None), None)


def check_peer(sender: PeerId, name: str) -> PeerId:
    """Raises RemoteProtocolError: no peer is called that."""
    try:
        if len(name) > limits.ADDRESS_CHARS_MAX:
            raise ValueError("too long")
        public_key_of(PeerId(name))
    except ValueError as error:
        raise RemoteProtocolError(sender, f"{name[:80]!r} is no peer ({error})") from None
    return PeerId(name)
