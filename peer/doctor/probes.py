"""Asking one peer: its view of us, round trips, loss, bandwidth; each bounded in time and bytes."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

from peer.clock import SYSTEM, Clock
from peer.doctor.facts import Flow, PeerFacts
from peer.doctor.kernel import Connection
from peer.doctor.messages import (
    NONCE_BYTES,
    PIECE_BYTES_MAX,
    A,
    Answer,
    DialAnswer,
    Dialled,
    DialMe,
    Exchange,
    ExchangeAnswer,
    Hello,
    HelloAnswer,
    Path,
    PathAnswer,
    Place,
    Request,
    Wait,
    place_of,
    read_answer,
    write_request,
)
from peer.doctor.serve import DIAL_TIMEOUT_S, GREETING_S, Connected
from peer.net.transport import Transport, TransportError
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.types import PeerId

HELLOS: Final = 4  # the least round trip of so many
DIAL_ANSWER_S: Final = DIAL_TIMEOUT_S + GREETING_S + 2.0
GENTLE_S: Final = 4.0
GENTLE_CALLS: Final = 160  # of some 5 segments each way: 3 % of them are 24, give or take 5
GENTLE_BYTES: Final = 3000  # two segments and a bit
GENTLE_AT_ONCE: Final = 2  # 50 ms of a queue at 1 Mbit/s: nothing is lost for being too much
RATE_S: Final = 4.0  # slow start is over after one
RATE_BYTES: Final = 7 * 2**20  # below what a peer allows (`serve.BYTES_PER_PERIOD`)
RATE_CALLS: Final = 12  # at once
RATE_PIECE_BYTES: Final = 4 * 2**10  # to begin with: 0.4 s for all of them at 1 Mbit/s
QUICK_S: Final = 0.25  # a piece that is back so soon may be twice as large
SETTLED_SHARE: Final = 1 / 3  # of the time: slow start, and growing pieces
BRIEF_S: Final = 1.5  # slow start takes most of that at 80 ms
RATES_MIN: Final = 8  # pieces, without which there is no rate

T = TypeVar("T")


@dataclass(slots=True)
class _Tally:
    """Pieces that arrived: (when, bytes)."""

    pieces: list[tuple[float, int]] = field(default_factory=list)
    refused: bool = False
    sent: int = 0

    @property
    def cut_short(self) -> bool:
        """Whether more time would have shown more."""
        ended_s = max((when_s for when_s, _ in self.pieces), default=0.0)
        return self.refused or (bool(self.pieces) and ended_s < BRIEF_S)


class Prober:
    """Probes of one peer. Nothing here raises for what the peer does or does not do."""

    def __init__(
        self, transport: Transport, peer: PeerId, address: str, connection: Connected,
        clock: Clock = SYSTEM,
    ) -> None:  # fmt: skip
        """`connection`: our own kernel's view of the connection (`serve.connection_by`)."""
        self._transport = transport
        self._peer = peer
        self._connected = connection
        self._clock = clock
        place = place_of(address)
        self.facts = PeerFacts(
            peer=peer, address=address, outside=place is not None and place.is_outside
        )

    async def greet(self) -> bool:
        """Clock, round trip, and where it sees us; whether it takes probes at all."""
        rtts: list[float] = []
        for _ in range(HELLOS):
            begun_s, begun = self._clock.time(), self._clock.monotonic()
            hello = await self._ask(Hello(), HelloAnswer)
            if not isinstance(hello, HelloAnswer):
                break
            took_s = self._clock.monotonic() - begun
            if not rtts or took_s < min(rtts):
                seen = [p for a in hello.seen if (p := place_of(a)) is not None]
                self.facts = replace(
                    self.facts,
                    skew_s=hello.time_ms / 1000 - (begun_s + took_s / 2),
                    skew_error_s=took_s / 2,
                    seen=seen[0] if seen else None,
                    dht_nodes=hello.dht_nodes,
                    rtt_s=took_s,
                )
            rtts.append(took_s)
        self.facts = replace(self.facts, probes=bool(rtts))
        connection = await self._connection()
        if connection is not None:
            self.facts = replace(self.facts, sent_from=connection.local, mtu=connection.mtu)
        return bool(rtts)

    async def dial_back(self, ports: Sequence[int], nonce: bytes = bytes(NONCE_BYTES)) -> None:
        """Which of our ports it can open at the address where it sees us."""
        dialled = dict(self.facts.dialled)
        for port in ports:
            answer = await self._ask(DialMe(port, nonce), DialAnswer, DIAL_ANSWER_S)
            if not isinstance(answer, DialAnswer):
                break
            with contextlib.suppress(ValueError):
                dialled[port] = Dialled(answer.outcome)
        self.facts = replace(self.facts, dialled=dialled)

    async def measure_loss(self) -> None:
        """Small exchanges, few at once, and what both kernels count meanwhile."""
        before, theirs_before = await self._connection(), await self._path()
        deadline = self._clock.monotonic() + GENTLE_S
        left = iter(range(GENTLE_CALLS))
        request = Exchange(secrets.token_bytes(GENTLE_BYTES), GENTLE_BYTES)

        async def talk() -> None:
            for _ in left:
                if self._clock.monotonic() > deadline:
                    return
                if not isinstance(await self._ask(request, ExchangeAnswer), ExchangeAnswer):
                    return

        await asyncio.gather(*(talk() for _ in range(GENTLE_AT_ONCE)))
        after, theirs = await self._connection(), await self._path()
        if before is not None and after is not None and before.local == after.local:
            self.facts = replace(
                self.facts, mtu=after.mtu,
                up=_flow(after.segments - before.segments, after.repeated - before.repeated),
            )  # fmt: skip
        if theirs_before is not None and theirs is not None:
            self.facts = replace(
                self.facts,
                down=_flow(
                    theirs.segments - theirs_before.segments,
                    theirs.repeated - theirs_before.repeated,
                ),
            )

    async def measure_rates(self) -> None:
        """Bandwidth up, then down; and how long the line's queue gets meanwhile."""
        up = await self._rate(lambda size: Exchange(secrets.token_bytes(size), 0))
        busy = await self._connection()
        down = await self._rate(lambda size: Exchange(b"", size))
        self.facts = replace(
            self.facts,
            up_bps=_bps(up),
            down_bps=_bps(down),
            cut_short=up.cut_short or down.cut_short,
            rtt_busy_s=busy.rtt_us / 1e6 if busy is not None and up.pieces else None,
            large_stuck=self._stuck(up) or self._stuck(down),
        )

    # ── inside ───────────────────────────────────────────────────────────────────────────
    def _stuck(self, tally: _Tally) -> bool:
        return self.facts.rtt_s is not None and not tally.pieces and not tally.refused

    async def _rate(self, request: Callable[[int], Exchange]) -> _Tally:
        """Several exchanges at once, each as large as comes back soon."""
        tally = _Tally()
        begun_s = self._clock.monotonic()

        async def work() -> None:
            size = RATE_PIECE_BYTES
            while (
                self._clock.monotonic() - begun_s < RATE_S
                and tally.sent + size <= RATE_BYTES
                and not tally.refused
            ):
                tally.sent += size
                asked_s = self._clock.monotonic()
                answer = await self._ask(request(size), ExchangeAnswer)
                now_s = self._clock.monotonic()
                if isinstance(answer, Wait):
                    tally.refused = True
                if not isinstance(answer, ExchangeAnswer):
                    return
                tally.pieces.append((now_s - begun_s, size))
                if now_s - asked_s < QUICK_S:
                    size = min(2 * size, PIECE_BYTES_MAX)

        await asyncio.gather(*(work() for _ in range(RATE_CALLS)))
        return tally

    async def _path(self) -> PathAnswer | None:
        answer = await self._ask(Path(), PathAnswer)
        return answer if isinstance(answer, PathAnswer) and answer.segments else None

    async def _connection(self) -> Connection | None:
        """Our end of the connection to it, by our kernel."""
        return await self._connected(self._peer)

    async def _ask(
        self, request: Request, kind: type[A], timeout_s: float = limits.CALL_TIMEOUT_S
    ) -> A | Answer | None:
        """The answer, or None where there is no good one."""
        try:
            data = await self._transport.call(self._peer, write_request(request), timeout_s)
            return read_answer(self._peer, kind, data)
        except (TransportError, RemoteProtocolError):
            return None


def _flow(segments: int, repeated: int) -> Flow:
    return Flow(segments=max(0, segments), repeated=max(0, repeated))


def _bps(tally: _Tally) -> float | None:
    """Bits per second from when it had settled until the last piece."""
    pieces = sorted(tally.pieces)
    if len(pieces) < RATES_MIN:
        return None
    end_s = pieces[-1][0]
    first = next(i for i, (when_s, _) in enumerate(pieces) if when_s >= end_s * SETTLED_SHARE)
    first = min(first, len(pieces) - 2)
    seconds = end_s - pieces[first][0]
    if seconds <= 0:
        return None
    return 8 * sum(size for _, size in pieces[first + 1 :]) / seconds


async def at_most(work: Awaitable[T], seconds: float) -> T | None:
    """Its result, or None if it took longer; it is cancelled then."""
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        return None


def wanted_ports(listening: int, seen: Place | None, addresses: Sequence[str]) -> list[int]:
    """Ports to be dialled back: those that we tell others for the address that is seen, where we
    listen, and the one that the router shows. At most three."""
    ports = [
        place.port
        for place in map(place_of, addresses)
        if place is not None and seen is not None and place.host == seen.host
    ]
    if listening:
        ports.append(listening)
    if seen is not None:
        ports.append(seen.port)
    return list(dict.fromkeys(ports))[:3]
