"""The dialling end of the bulk lane: where peers listen, what came of trying, and idle connections.

`open` gives a stream over a lane, or None in a moment: then libp2p carries it. A dial that takes
longer goes on without anybody waiting, and its connection serves a later stream. A peer to which
no lane came about, or whose lane broke, is left in peace for a while, each time for longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from peer.net.budget import UploadBudget
from peer.net.lane import (
    ASK,
    GREETING,
    GREETING_TIMEOUT_S,
    HANDSHAKE_TIMEOUT_S,
    IDLE_S,
    OFFER_TTL_S,
    OPENS,
    PROBE,
    LaneOffer,
    LaneStream,
    read_offer,
)
from peer.net.lane_counters import LaneCounters
from peer.net.pacing import Line
from peer.net.tls import peer_behind
from peer.net.tls_pipe import TlsPipe, tune
from peer.net.transport import TransportError
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.types import PeerId

WAIT_S: Final = 2.0  # four round trips of half a second: on a thin line that is at work already,
# bulk over libp2p would be in the way of all calls to that peer
PROVEN_WAIT_S: Final = 5.0  # where lanes have worked: it is the line that is slow, then
BACKOFF_S: Final = 30.0
BACKOFF_S_MAX: Final = 3600.0
STAGGER_S: Final = 0.15  # between the tries of two addresses (RFC 8305 says 0.25)
DIALS_PER_PEER_MAX: Final = 4
IDLE_PER_PEER_MAX: Final = 4  # a round has a stream each way, and gossip and repairs now and then
IDLE_MARGIN_S: Final = 10.0  # the dialling end gives up idle connections first
FRESH_S: Final = 10.0
"""Who was heard on a connection so recently need not be asked again: that costs a round trip, and
who went silently since is missed by the heartbeats anyway."""

Ask = Callable[[PeerId, bytes, float], Awaitable[bytes]]
"""(peer, request, timeout_s) -> answer; `Transport.call`."""
Told = Callable[[PeerId, str], None]
"""(peer, reason)."""


class _LaneError(Exception):
    """No lane came about. `kind`: one of `FAILURES`."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(slots=True, eq=False)
class _Idle:
    pipe: TlsPipe
    since_s: float
    timer: asyncio.TimerHandle


@dataclass(slots=True)
class _Lanes:
    """What is known of the lanes to one peer."""

    offer: LaneOffer | None = None
    offer_until_s: float = 0.0
    idle: list[_Idle] = field(default_factory=list)
    """Connections that wait for a stream, the last used at the end."""
    dials: dict[asyncio.Task[TlsPipe], float] = field(default_factory=dict)
    """In progress -> since when."""
    failures: int = 0
    """In a row."""
    proven: bool = False
    """The last stream over a lane to it came to its end."""
    not_before_s: float = 0.0
    """No lane is tried until then."""


class LaneDialer:
    """Streams over lanes to whoever can be reached directly."""

    def __init__(
        self,
        own: PeerId,
        context: ssl.SSLContext,
        budget: UploadBudget,
        counters: LaneCounters,
        ask: Ask,
        on_failed: Told,
        on_refused: Told,
        line: Line,
    ) -> None:
        """`on_failed` hears when lanes to a peer fail for the first time in a row, `on_refused`
        when somebody broke the rules."""
        self._own = own
        self._line = line
        self._context = context
        self._budget = budget
        self._counters = counters
        self._ask = ask
        self._on_failed = on_failed
        self._on_refused = on_refused
        self._peers: OrderedDict[PeerId, _Lanes] = OrderedDict()
        """Longest unused first."""
        self._open: dict[TlsPipe, LaneStream] = {}
        self._closed = False

    def lanes(self) -> dict[PeerId, int]:
        """Peers to which there are connections now, and how many."""
        found = {peer: len(lanes.idle) for peer, lanes in self._peers.items() if lanes.idle}
        for stream in self._open.values():
            found[stream.peer] = found.get(stream.peer, 0) + 1
        return found

    async def open(self, peer: PeerId, timeout_s: float) -> LaneStream | None:
        """A stream over a lane, or None if there is none now. Never raises a TransportError."""
        if self._closed or peer == self._own:
            return None
        loop = asyncio.get_running_loop()
        lanes = self._of(peer)
        wait_s = max(WAIT_S, PROVEN_WAIT_S) if lanes.proven else WAIT_S
        deadline_s = loop.time() + min(wait_s, timeout_s / 2)
        stream = await self._again(peer, lanes, deadline_s)
        now_s = loop.time()
        if stream is not None or now_s >= deadline_s:
            return stream
        if now_s < lanes.not_before_s or len(lanes.dials) >= DIALS_PER_PEER_MAX:
            return None
        # A peer that drops our packets silently costs one wait, not one for every stream.
        deadline_s = min([deadline_s, *(since_s + wait_s for since_s in lanes.dials.values())])
        if deadline_s <= now_s:
            return None
        dial = asyncio.create_task(self._dial(peer, lanes), name=f"lane to {peer}")
        lanes.dials[dial] = now_s

        def dialled(task: asyncio.Task[TlsPipe]) -> None:
            del lanes.dials[task]
            if task.cancelled():
                return
            error = task.exception()
            if error is not None:
                self._note_failure(peer, lanes, error)
            else:
                self._keep(task.result(), lanes)  # whether anybody still waits for it or not

        dial.add_done_callback(dialled)
        await asyncio.wait({dial}, timeout=deadline_s - now_s)
        return await self._again(peer, lanes, loop.time() + WAIT_S)

    async def close(self) -> None:
        self._closed = True
        dials = [dial for lanes in self._peers.values() for dial in lanes.dials]
        for dial in dials:
            dial.cancel()
        if dials:
            await asyncio.wait(dials)
        for lanes in self._peers.values():
            while lanes.idle:
                self._drop(self._take_idle(lanes).pipe)
        for stream in list(self._open.values()):
            stream.abort("closed")  # whoever opened it will close it

    # ── connections ──────────────────────────────────────────────────────────────────────

    def _of(self, peer: PeerId) -> _Lanes:
        lanes = self._peers.pop(peer, None) or _Lanes()
        self._peers[peer] = lanes
        if len(self._peers) > limits.KNOWN_PEERS_MAX:
            for other, old in self._peers.items():
                if not old.idle and not old.dials:
                    del self._peers[other]
                    break
        return lanes

    def _take_idle(self, lanes: _Lanes) -> _Idle:
        idle = lanes.idle.pop()
        idle.timer.cancel()
        return idle

    def _keep(self, pipe: TlsPipe, lanes: _Lanes) -> None:
        """Until the next stream to the same peer."""
        if self._closed or not pipe.usable or len(lanes.idle) >= IDLE_PER_PEER_MAX:
            return self._drop(pipe)
        pipe.rest()

        def tired() -> None:
            lanes.idle.remove(idle)
            self._drop(pipe)

        loop = asyncio.get_running_loop()
        idle = _Idle(pipe, loop.time(), loop.call_later(IDLE_S - IDLE_MARGIN_S, tired))
        lanes.idle.append(idle)

    def _drop(self, pipe: TlsPipe) -> None:
        pipe.close()
        self._counters.connections -= 1

    # ── streams ──────────────────────────────────────────────────────────────────────────

    async def _again(self, peer: PeerId, lanes: _Lanes, deadline_s: float) -> LaneStream | None:
        """A stream over a connection that is idle, if the far side is still there."""
        loop = asyncio.get_running_loop()
        while lanes.idle and loop.time() < deadline_s:
            idle = self._take_idle(lanes)
            pipe = idle.pipe
            try:
                if loop.time() - idle.since_s > FRESH_S:
                    async with asyncio.timeout_at(deadline_s):
                        pipe.write(PROBE)
                        await _greeted(pipe)
                if not pipe.usable or pipe.unread:
                    raise ConnectionResetError("it is not as it was left")
                pipe.write(OPENS)
            except (TimeoutError, OSError):
                self._drop(pipe)  # gone while nobody looked: nothing to hold against the peer
            except BaseException:
                self._drop(pipe)
                raise
            else:
                stream = LaneStream(
                    pipe, peer, self._budget, opened_here=True, on_closed=self._ended
                )
                self._open[pipe] = stream
                return stream
        return None

    def _ended(self, stream: LaneStream) -> None:
        pipe, lanes = stream.pipe, self._of(stream.peer)
        del self._open[pipe]
        self._counters.bytes_up += stream.bytes_out
        self._counters.bytes_down += stream.bytes_in
        if stream.reusable:
            lanes.failures, lanes.not_before_s, lanes.proven = 0, 0.0, True
            self._keep(pipe, lanes)
            return
        self._drop(pipe)
        if stream.failed and not self._closed:
            self._note_failure(stream.peer, lanes, _LaneError("broke", "a lane broke"))

    # ── dialling ─────────────────────────────────────────────────────────────────────────

    async def _dial(self, peer: PeerId, lanes: _Lanes) -> TlsPipe:
        """A connection to `peer` that it has greeted.

        Raises:
            _LaneError: there is none.
        """
        known = lanes.offer if lanes.offer_until_s > asyncio.get_running_loop().time() else None
        if known is not None:
            with contextlib.suppress(_LaneError):
                return await self._connect(peer, known)
            # It may have moved, or have forgotten us: ask again, once.
        try:
            answer = await self._ask(peer, ASK, limits.CALL_TIMEOUT_S)
        except (TransportError, RemoteProtocolError) as error:
            raise _LaneError("offer", error.reason) from None
        try:
            offer = read_offer(peer, answer)
        except RemoteProtocolError as error:
            self._on_refused(peer, error.reason)
            raise _LaneError("offer", error.reason) from None
        if not offer.port or not offer.hosts:
            raise _LaneError("offer", "it has no lane")
        lanes.offer = offer
        lanes.offer_until_s = asyncio.get_running_loop().time() + OFFER_TTL_S
        return await self._connect(peer, offer)

    async def _connect(self, peer: PeerId, offer: LaneOffer) -> TlsPipe:
        """The first of the offered hosts at which `peer` is."""
        tries: set[asyncio.Task[TlsPipe]] = set()
        hosts = list(offer.hosts)
        error = _LaneError("dial", "nobody answers")
        try:
            while hosts or tries:
                if hosts:
                    tries.add(asyncio.create_task(self._reach(peer, hosts.pop(0), offer.port)))
                done, tries = await asyncio.wait(
                    tries,
                    timeout=STAGGER_S if hosts else None,  # each has a deadline of its own
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for one in done:
                    failure = one.exception()
                    if failure is None:
                        done.remove(one)
                        tries |= done
                        self._counters.connections += 1
                        return one.result()
                    if not isinstance(failure, _LaneError):
                        raise failure
                    if error.kind == "dial":
                        error = failure
            raise error
        finally:
            for other in tries:
                other.cancel()
                other.add_done_callback(_close_late)

    async def _reach(self, peer: PeerId, host: str, port: int) -> TlsPipe:
        """One address, one try: connected, proven to be `peer`, and greeted."""
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
        pipe: TlsPipe | None = None
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                tune(sock, host)
                async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                    await asyncio.get_running_loop().sock_connect(sock, (host, port))
                    pipe, shown = await TlsPipe.handshake(
                        sock, self._context, listens=False, pace=self._line.pace(host)
                    )
            except BaseException:
                sock.close()
                raise
            there = peer_behind(shown)
            if there != peer:
                raise _LaneError("identity", f"{there} is at {host}")
            async with asyncio.timeout(GREETING_TIMEOUT_S):
                await _greeted(pipe)
        except BaseException as error:
            if pipe is not None:
                pipe.abort()
            if isinstance(error, TimeoutError | OSError):
                kind = "dial" if pipe is None else "greeting"
                raise _LaneError(kind, f"{host}: {str(error) or 'no answer'}") from None
            if isinstance(error, ValueError):
                raise _LaneError("identity", str(error)) from None
            raise
        return pipe

    def _note_failure(self, peer: PeerId, lanes: _Lanes, error: BaseException) -> None:
        """Leave `peer` in peace for a while; a bug of ours is told to the event loop as well."""
        loop = asyncio.get_running_loop()
        if not isinstance(error, _LaneError):
            loop.call_exception_handler({"message": f"lane to {peer} failed", "exception": error})
        self._counters.failed[error.kind if isinstance(error, _LaneError) else "bug"] += 1
        if loop.time() < lanes.not_before_s:
            return  # dials side by side fail together
        if lanes.proven:  # it may just be back, or its line was full: the next try tells
            lanes.proven = False
            return
        lanes.offer = None
        lanes.not_before_s = loop.time() + min(BACKOFF_S * 2**lanes.failures, BACKOFF_S_MAX)
        lanes.failures += 1
        if lanes.failures == 1:
            self._on_failed(peer, str(error))


async def _greeted(pipe: TlsPipe) -> None:
    """Raises OSError where the far side turns us away, or breaks the rules."""
    if await pipe.read(1) != GREETING:
        raise ConnectionResetError("turned away")


def _close_late(task: asyncio.Task[TlsPipe]) -> None:
    """A try that succeeded at the moment it was no longer needed."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()
