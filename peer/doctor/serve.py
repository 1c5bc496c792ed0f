"""Answering other peers' doctors: cheap, limited, and of no use against anybody else.

Every peer and bootstrap node does so. What can be asked for is bounded for each asker, for each
address that is dialled, and in all. A dial goes only to the IP address from which the asker's own
live connection comes, so no third party gets a packet (its neighbours behind one router at most a
few connection attempts a minute); and bytes go to the asker only, over its own connection. Over a
relay there are no dials and no bandwidth tests: that line is somebody else's.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Final

from peer.clock import SYSTEM, Clock
from peer.doctor import kernel
from peer.doctor.kernel import Connection
from peer.doctor.messages import (
    PREFIX,
    SEEN_CHARS_MAX,
    SEEN_MAX,
    Answer,
    DialAnswer,
    Dialled,
    DialMe,
    Exchange,
    ExchangeAnswer,
    Hello,
    HelloAnswer,
    PathAnswer,
    Place,
    Request,
    Wait,
    place_of,
    read_request,
    write_answer,
)
from peer.net.transport import CallHandler
from protocols.types import PeerId

PERIOD_S: Final = 60.0  # what the amounts below are for
CALLS_PER_PERIOD: Final = 1000  # a doctor's two bandwidth tests and 150 small exchanges: some 600
BYTES_PER_PERIOD: Final = 8 * 2**20  # each way: 5 s at 10 Mbit/s, or 1.1 Mbit/s all the time
BYTES_PER_PERIOD_ALL: Final = 16 * 2**20  # each way, whoever asks: 2.2 Mbit/s at most
DIALS_PER_PERIOD: Final = 8  # to one IP address; a doctor asks for two to four
DIALS_PER_PERIOD_ALL: Final = 60
DIALS_MAX: Final = 8  # at once
DIAL_TIMEOUT_S: Final = 3.0  # two lost SYNs (1 s, then 2 s)
GREETING_S: Final = 1.0  # who listens speaks first: libp2p and a doctor do so at once
STRANGERS_MAX: Final = 1024  # whose allowances are kept; beyond, the longest unused go
PORT_MIN: Final = 1024  # below are other services; a doctor has no business with them ...
PORTS_LOW: Final = frozenset({80, 443})  # ... but for those that firewalls let through

LIBP2P_GREETING: Final = b"\x13/multistream/1.0.0\n"

Seen = Callable[[PeerId], Awaitable[list[str]]]
"""Multiaddresses from which a peer's connections come."""
Connected = Callable[[PeerId], Awaitable[Connection | None]]
"""What the kernel knows of our connection with a peer."""


class Allowance:
    """Amounts that fill up again over `PERIOD_S`, one for each key; a table of bounded size."""

    def __init__(self, amount: float, clock: Clock, *, keys_max: int = STRANGERS_MAX) -> None:
        self._amount = amount
        self._clock = clock
        self._keys_max = keys_max
        self._left: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()
        """key -> (what was left, when)."""

    def left(self, key: Hashable) -> float:
        """What may be taken now."""
        left, since_s = self._left.get(key, (self._amount, 0.0))
        gained = (self._clock.monotonic() - since_s) * self._amount / PERIOD_S
        return min(self._amount, left + gained)

    def take(self, key: Hashable, amount: float = 1.0) -> None:
        """Take it; the caller has looked whether it is there."""
        left = self.left(key) - amount
        self._left.pop(key, None)
        self._left[key] = (left, self._clock.monotonic())
        while len(self._left) > self._keys_max:
            self._left.popitem(last=False)

    def wait_s(self, key: Hashable, amount: float) -> float:
        """Until so much may be taken."""
        return max(0.0, amount - self.left(key)) * PERIOD_S / self._amount


@dataclass(frozen=True, slots=True)
class Desk:
    """What the answers need of the peer that gives them."""

    seen: Seen
    connection: Connected
    dht_nodes: Callable[[], int]


class ProbeServer:
    """Answers probes. `before` puts it in front of the handler of all other calls."""

    def __init__(self, desk: Desk, clock: Clock = SYSTEM) -> None:
        self._desk = desk
        self._clock = clock
        self._calls = Allowance(CALLS_PER_PERIOD, clock)
        self._in = Allowance(BYTES_PER_PERIOD, clock)
        self._out = Allowance(BYTES_PER_PERIOD, clock)
        self._dials = Allowance(DIALS_PER_PERIOD, clock)
        self._all_in = Allowance(BYTES_PER_PERIOD_ALL, clock, keys_max=1)
        self._all_out = Allowance(BYTES_PER_PERIOD_ALL, clock, keys_max=1)
        self._all_dials = Allowance(DIALS_PER_PERIOD_ALL, clock, keys_max=1)
        self._dialling = 0
        self._direct: OrderedDict[PeerId, bool] = OrderedDict()
        """Whether the peer's connection was its own when it last said hello."""

    def before(self, on_call: CallHandler) -> CallHandler:
        """`on_call`, for what is no probe."""

        async def answered(sender: PeerId, data: bytes) -> bytes:
            if data.startswith(PREFIX):
                return write_answer(await self._answer(sender, read_request(sender, data)))
            return await on_call(sender, data)

        return answered

    async def _answer(self, sender: PeerId, request: Request) -> Answer:
        if self._calls.left(sender) < 1:
            return _wait(self._calls.wait_s(sender, 1))
        self._calls.take(sender)
        match request:
            case Hello():
                return await self._hello(sender)
            case DialMe():
                return await self._dial(sender, request)
            case Exchange():
                return await self._exchange(sender, request)
            case _:
                return await self._path(sender)

    async def _hello(self, sender: PeerId) -> HelloAnswer:
        seen = await self._desk.seen(sender)
        self._note(sender, any(place_of(address) for address in seen))
        told = tuple(a for a in seen if len(a) <= SEEN_CHARS_MAX)[:SEEN_MAX]
        nodes = max(0, min(self._desk.dht_nodes(), 2**31))
        return HelloAnswer(int(self._clock.time() * 1000), told, nodes)

    def _note(self, sender: PeerId, direct: bool) -> None:
        self._direct.pop(sender, None)
        self._direct[sender] = direct
        while len(self._direct) > STRANGERS_MAX:
            self._direct.popitem(last=False)

    async def _place(self, sender: PeerId) -> Place | None:
        places = [place_of(address) for address in await self._desk.seen(sender)]
        return next((place for place in places if place is not None), None)

    # ── dialling back ────────────────────────────────────────────────────────────────────
    async def _dial(self, sender: PeerId, request: DialMe) -> DialAnswer | Wait:
        place = await self._place(sender)
        if place is None:
            return DialAnswer(Dialled.RELAYED, "")
        if request.port < PORT_MIN and request.port not in PORTS_LOW:
            return DialAnswer(Dialled.DECLINED, "")
        waits_s = max(self._dials.wait_s(place.host, 1), self._all_dials.wait_s(None, 1))
        if waits_s > 0 or self._dialling >= DIALS_MAX:
            return _wait(waits_s)
        self._dials.take(place.host)
        self._all_dials.take(None)
        self._dialling += 1
        try:
            outcome = await dial(Place(place.host, request.port), request.nonce)
        finally:
            self._dialling -= 1
        return DialAnswer(outcome, place.host)

    # ── bandwidth, and what the kernel knows ─────────────────────────────────────────────
    async def _exchange(self, sender: PeerId, request: Exchange) -> ExchangeAnswer | Wait:
        if not self._direct.get(sender, False):
            return _wait(PERIOD_S)  # relayed, or it has not said hello
        taken, wanted = len(request.payload), request.wanted
        wait_s = max(
            self._in.wait_s(sender, taken), self._all_in.wait_s(None, taken),
            self._out.wait_s(sender, wanted), self._all_out.wait_s(None, wanted),
        )  # fmt: skip
        if wait_s > 0:
            return _wait(wait_s)
        for allowance, key, amount in (
            (self._in, sender, taken), (self._all_in, None, taken),
            (self._out, sender, wanted), (self._all_out, None, wanted),
        ):  # fmt: skip
            allowance.take(key, amount)
        return ExchangeAnswer(bytes(wanted))

    async def _path(self, sender: PeerId) -> PathAnswer:
        found = await self._desk.connection(sender)
        if found is None:
            return PathAnswer(0, 0, 0, 0)
        return PathAnswer(found.segments, found.repeated, found.rtt_us, found.mtu)


async def dial(place: Place, nonce: bytes) -> Dialled:
    """Open a TCP connection, hear who greets, and close it; never longer than a few seconds."""
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(place.host, place.port)
    except TimeoutError:
        return Dialled.SILENT
    except OSError as error:
        if error.errno in (errno.ECONNREFUSED, errno.ECONNRESET):
            return Dialled.REFUSED
        return Dialled.SILENT if error.errno == errno.ETIMEDOUT else Dialled.UNREACHABLE
    try:
        said = b""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
            async with asyncio.timeout(GREETING_S):
                said = await reader.readexactly(len(nonce))
        if said == nonce and any(nonce):
            return Dialled.NONCE
        return Dialled.LIBP2P if said and LIBP2P_GREETING.startswith(said) else Dialled.OPEN
    finally:
        writer.transport.abort()


def seen_by(transport: object) -> Seen:
    """Asks the libp2p daemon behind `transport`; nothing where there is none."""

    connections: Callable[[], Awaitable[dict[PeerId, list[str]]]] | None = getattr(
        transport, "connections", None
    )

    async def seen(peer: PeerId) -> list[str]:
        return [] if connections is None else (await connections()).get(peer, [])

    return seen


def connection_by(transport: object) -> Connected:
    """Looks for the connection among those of the libp2p daemon behind `transport`."""
    seen = seen_by(transport)

    async def connection(peer: PeerId) -> Connection | None:
        places = [place for a in await seen(peer) if (place := place_of(a)) is not None]
        pid = getattr(getattr(getattr(transport, "p2p", None), "_child", None), "pid", None)
        if pid is None or not places:
            return None
        return await asyncio.to_thread(kernel.connection_of, pid, places)

    return connection


def desk_of(transport: object, dht_nodes: Callable[[], int]) -> Desk:
    """The desk of a peer on libp2p."""
    return Desk(seen_by(transport), connection_by(transport), dht_nodes)


def _wait(seconds: float) -> Wait:
    return Wait(min(3600, max(1, int(seconds) + 1)))
