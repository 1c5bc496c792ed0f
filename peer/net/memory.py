"""The transport inside one process: for tests, notebooks and a first look.

`MemoryNetwork` connects its transports through pipes with back-pressure and the same framing as on
the wire. A peer can be cut off (everything to and from it breaks at once) or frozen (nothing moves,
so deadlines have to help), and a link can be given a latency.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from peer.net.budget import UploadBudget
from peer.net.calls import (
    CALLS_MAX,
    CALLS_PER_PEER_MAX,
    Slots,
    answer,
    check_request,
    gone,
    read_answer,
    report,
)
from peer.net.framing import FramedStream, serve_stream
from peer.net.transport import CallHandler, Stream, StreamHandler, TransportError
from protocols import limits
from protocols.types import PeerId

PIPE_BYTES_MAX: Final = 512 * 2**10  # in flight per direction; about what sockets hold
PREFIX: Final = "/memory/p2p/"


class MemoryNetwork:
    """All the peers of one process. `latency_s`: one way, where a link has none of its own."""

    def __init__(self, latency_s: float = 0.0) -> None:
        self._latency_s = latency_s
        self._latencies_s: dict[frozenset[PeerId], float] = {}
        self._transports: dict[PeerId, MemoryTransport] = {}
        self._links: set[_Link] = set()
        self._cut: set[PeerId] = set()
        self._frozen: set[PeerId] = set()
        self._changed = asyncio.Event()

    def transport(self, peer_id: PeerId, budget: UploadBudget | None = None) -> MemoryTransport:
        """A new peer on this network."""
        if peer_id in self._transports:
            raise ValueError(f"{peer_id} is on this network already")
        transport = MemoryTransport(self, peer_id, budget or UploadBudget())
        self._transports[peer_id] = transport
        return transport

    def set_latency(self, one: PeerId, other: PeerId, latency_s: float) -> None:
        self._latencies_s[frozenset((one, other))] = latency_s

    def cut(self, peer: PeerId) -> None:
        """Break every stream of `peer` and refuse new ones until `heal`."""
        self._cut.add(peer)
        for link in list(self._links):
            if peer in link.ends:
                link.break_()
        self._wake()

    def freeze(self, peer: PeerId) -> None:
        """Let nothing to or from `peer` move until `heal`; nobody is told."""
        self._frozen.add(peer)
        self._wake()

    def heal(self, peer: PeerId) -> None:
        self._cut.discard(peer)
        self._frozen.discard(peer)
        self._wake()

    # ── for the transports ───────────────────────────────────────────────────────────────

    def latency_s(self, ends: frozenset[PeerId]) -> float:
        return self._latencies_s.get(ends, self._latency_s)

    def moves(self, ends: frozenset[PeerId]) -> bool:
        return not (self._frozen & ends)

    def find(self, sender: PeerId, peer: PeerId) -> MemoryTransport:
        transport = self._transports.get(peer)
        if transport is None or {sender, peer} & self._cut:
            raise TransportError(peer, "unreachable")
        return transport

    async def cross(self, sender: PeerId, peer: PeerId) -> MemoryTransport:
        """Travel one way; the transport at the other end."""
        ends = frozenset((sender, peer))
        await asyncio.sleep(self.latency_s(ends))
        transport = self.find(sender, peer)
        while not self.moves(ends):
            changed = self._changed
            await changed.wait()
            transport = self.find(sender, peer)
        return transport

    def link(self, one: PeerId, other: PeerId) -> _Link:
        link = _Link(self, frozenset((one, other)))
        self._links.add(link)
        return link

    def unlink(self, link: _Link) -> None:
        self._links.discard(link)

    def leave(self, peer: PeerId) -> None:
        self._transports.pop(peer, None)
        for link in list(self._links):
            if peer in link.ends:
                link.break_()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        for link in self._links:
            link.wake()


class MemoryTransport:
    """`transport.Transport` on a `MemoryNetwork`."""

    def __init__(self, network: MemoryNetwork, peer_id: PeerId, budget: UploadBudget) -> None:
        self.peer_id = peer_id
        self.budget = budget
        self.network = network
        self._on_call: CallHandler | None = None
        self._on_stream: StreamHandler | None = None
        self._call_slots = Slots(CALLS_MAX, CALLS_PER_PEER_MAX)
        self.stream_slots = Slots(limits.STREAMS_MAX, limits.STREAMS_PER_PEER_MAX)
        self._serving: set[asyncio.Task[None]] = set()

    def serve(self, on_call: CallHandler, on_stream: StreamHandler) -> None:
        self._on_call = on_call
        self._on_stream = on_stream

    def addresses(self) -> list[str]:
        return [PREFIX + self.peer_id]

    async def connect(self, address: str, timeout_s: float) -> PeerId:
        if not address.startswith(PREFIX):
            raise ValueError(f"{address!r} is not an address like {PREFIX}ID")
        peer = PeerId(address.removeprefix(PREFIX))
        try:
            async with asyncio.timeout(timeout_s):
                await self.network.cross(self.peer_id, peer)
        except TimeoutError:
            raise gone(peer, timeout_s) from None
        return peer

    async def call(self, peer: PeerId, request: bytes, timeout_s: float) -> bytes:
        check_request(request)
        self.budget.charge(len(request))
        try:
            async with asyncio.timeout(timeout_s):
                remote = await self.network.cross(self.peer_id, peer)
                coded = await remote.answer(self.peer_id, request)
                await self.network.cross(peer, self.peer_id)
        except TimeoutError:
            raise gone(peer, timeout_s) from None
        self.budget.received(len(coded))
        return read_answer(peer, coded)

    async def open(self, peer: PeerId, timeout_s: float) -> Stream:
        try:
            async with asyncio.timeout(timeout_s):
                remote = await self.network.cross(self.peer_id, peer)
        except TimeoutError:
            raise gone(peer, timeout_s) from None
        link = self.network.link(self.peer_id, peer)
        there, here = link.pipes()
        remote.accept(FramedStream(there, self.peer_id, remote.budget, opened_here=False))
        return FramedStream(here, peer, self.budget, opened_here=True)

    async def close(self) -> None:
        self.network.leave(self.peer_id)
        for task in self._serving:
            task.cancel()
        if self._serving:
            await asyncio.wait(self._serving)

    # ── called by the other end ──────────────────────────────────────────────────────────

    async def answer(self, sender: PeerId, request: bytes) -> bytes:
        self.budget.received(len(request))
        coded = await answer(self._on_call, self._call_slots, sender, request)
        self.budget.charge(len(coded))
        return coded

    def accept(self, stream: FramedStream) -> None:
        task = asyncio.create_task(
            serve_stream(stream, self._on_stream, self.stream_slots),
            name=f"stream from {stream.peer}",
        )
        self._serving.add(task)
        task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        report(task)


class _Link:
    """Two half pipes that live and break together."""

    def __init__(self, network: MemoryNetwork, ends: frozenset[PeerId]) -> None:
        self.network = network
        self.ends = ends
        self.broken = False
        self._halves = (_Half(self), _Half(self))

    def pipes(self) -> tuple[_Pipe, _Pipe]:
        one, other = self._halves
        return _Pipe(self, one, other), _Pipe(self, other, one)

    def break_(self) -> None:
        self.broken = True
        self.network.unlink(self)
        self.wake()

    def wake(self) -> None:
        for half in self._halves:
            half.changed.set()

    def check(self) -> None:
        if self.broken:
            raise ConnectionResetError("connection reset")


class _Half:
    """Bytes on their way in one direction. One reader and one writer wait on `changed`."""

    def __init__(self, link: _Link) -> None:
        self.link = link
        self.changed = asyncio.Event()
        self.ended = False
        self.size = 0
        self.taken = 0
        """Bytes that have arrived and been read."""
        self._pieces: deque[tuple[float, bytes]] = deque()
        """(when it arrives, what)."""

    def put(self, data: bytes | memoryview) -> None:
        if self.ended:
            raise ConnectionResetError("the pipe is closed")
        network = self.link.network
        due_s = asyncio.get_running_loop().time() + network.latency_s(self.link.ends)
        self._pieces.append((due_s, bytes(data)))
        self.size += len(data)
        self.changed.set()

    def take(self, n: int) -> bytes:
        due_s, data = self._pieces.popleft()
        if len(data) > n:
            self._pieces.appendleft((due_s, data[n:]))
            data = data[:n]
        self.size -= len(data)
        self.taken += len(data)
        self.changed.set()
        return data

    def wait_s(self) -> float | None:
        """Seconds until something arrives; None if only a change can tell."""
        if not self.link.network.moves(self.link.ends):
            return None
        if self._pieces:
            return max(0.0, self._pieces[0][0] - asyncio.get_running_loop().time())
        return 0.0 if self.ended else None


class _Pipe:
    """One end of a link, as `framing.Pipe`."""

    def __init__(self, link: _Link, incoming: _Half, outgoing: _Half) -> None:
        self._link = link
        self._incoming = incoming
        self._outgoing = outgoing

    async def read(self, n: int, /) -> bytes:
        data = bytearray()
        while len(data) < n:
            self._link.check()
            wait_s = self._incoming.wait_s()
            if wait_s != 0.0:
                await _change(self._incoming, wait_s)
            elif self._incoming.size:
                data += self._incoming.take(n - len(data))
            else:
                break
        return bytes(data)

    def received(self) -> int:
        return self._incoming.taken

    def write(self, *data: bytes | memoryview) -> None:
        self._link.check()
        for piece in data:
            if len(piece):
                self._outgoing.put(piece)

    async def drain(self) -> None:
        await asyncio.sleep(0)  # a sender that never waits would starve its receiver
        while self._outgoing.size > PIPE_BYTES_MAX:
            self._link.check()
            await _change(self._outgoing, None)
        self._link.check()

    def unsent(self) -> int:
        return self._outgoing.size

    def close(self) -> None:
        self._outgoing.ended = True
        self._outgoing.changed.set()
        if self._incoming.ended:
            self._link.network.unlink(self._link)

    def abort(self) -> None:
        self._link.break_()


async def _change(half: _Half, wait_s: float | None) -> None:
    """Wait for a change of `half`, at most `wait_s`."""
    half.changed.clear()
    try:
        async with asyncio.timeout(wait_s):
            await half.changed.wait()
    except TimeoutError:
        pass
