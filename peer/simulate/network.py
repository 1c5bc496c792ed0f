"""Machines, the paths between them, and a `Transport` over both that moves frames, not bytes.

A frame costs a few timers however large it is, so a transfer of gigabytes is as cheap to simulate
as one of kilobytes. What passes in time: the sender's line (bulk first come first served, in pieces
of `PIECE_S`), the congestion control of the pair, the receiver's line, latency and jitter. Nothing
is ever lost or reordered inside a stream; different streams and calls overtake each other. A
partition or a dead machine is silence: deadlines have to help. A killed process resets its streams,
as its operating system would.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from functools import partial
from typing import Final, cast

from peer.net.budget import PIECE_S, UploadBudget
from peer.net.calls import (
    CALLS_MAX,
    CALLS_PER_PEER_MAX,
    OK,
    Slots,
    absence,
    check_request,
    gone,
    read_answer,
    refusal,
    report,
)
from peer.net.framing import serve_stream
from peer.net.transport import CallHandler, Frame, Posted, StreamHandler, TransportError
from peer.simulate.links import Line, Path, PathSpec
from peer.simulate.loop import Entry, VirtualLoop
from protocols import limits
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.types import PeerId

PREFIX: Final = "/sim/p2p/"
CALL_BYTES: Final = 120  # a call's own cost: stream header, encryption, packet headers
FRAME_BYTES: Final = 40  # a frame's
WINDOW_PIECES: Final = 3  # sent and not yet taken, per stream: a few round trips' worth
PIECE_BYTES_MIN: Final = 4 * 2**10
CLOSE_WAIT_S: Final = 2.0  # as `framing`'s
AGAIN_S: Final = 0.3  # after a partition: until what was lost in it is sent once more


class Machine:
    """A computer on the network: its lines stay when the process on it comes and goes."""

    def __init__(self, index: int, peer: PeerId, up_bps: float, down_bps: float) -> None:
        self.index = index
        self.peer = peer
        self.up = Line(up_bps)
        self.down = Line(down_bps)
        self.transport: SimTransport | None = None
        self.calls = 0
        """Control messages sent."""
        self.dark = False
        """Switched off: nobody is told that its process is gone."""


class SimNetwork:
    """All machines. `path_of(a, b)` describes the path from machine a to machine b."""

    def __init__(
        self,
        loop: VirtualLoop,
        path_of: Callable[[int, int], PathSpec],
        seed: int,
        wire_bytes: Callable[[int, bytes], int] = lambda _, payload: len(payload),
        piece_s: float = PIECE_S,
    ) -> None:
        """`wire_bytes(kind, payload)`: what a frame would weigh in the real run; `piece_s`: bulk
        takes turns on a line after so long."""
        self.loop = loop
        self.wire_bytes = wire_bytes
        self.piece_s = piece_s
        self.calls = 0
        self.frames = 0
        self.machines: dict[PeerId, Machine] = {}
        self._path_of = path_of
        self._seed = seed
        self._paths: dict[tuple[int, int], Path] = {}
        self._walls: dict[int, Callable[[int, int], bool]] = {}
        self._wall_count = 0
        self._held: list[tuple[_Half, int, tuple[int, bytes] | None]] = []

    def machine(self, index: int, peer: PeerId, up_bps: float, down_bps: float) -> Machine:
        self.machines[peer] = machine = Machine(index, peer, up_bps, down_bps)
        return machine

    def path(self, one: Machine, other: Machine) -> Path:
        key = (one.index, other.index)
        path = self._paths.get(key)
        if path is None:
            spec = self._path_of(*key)
            rng = random.Random(f"{self._seed} path {key[0]} {key[1]}")
            self._paths[key] = path = Path(spec, rng)
        return path

    # ── partitions ───────────────────────────────────────────────────────────────────────
    def wall(self, parts: Callable[[int, int], bool]) -> int:
        """Let nothing pass between machines a and b where `parts(a, b)`; a handle to `open` it."""
        self._wall_count += 1
        self._walls[self._wall_count] = parts
        return self._wall_count

    def open_wall(self, handle: int) -> None:
        """What was held up is sent again."""
        del self._walls[handle]
        held, self._held = self._held, []
        for half, size, frame in held:
            self.loop.call_later(AGAIN_S, half.arrive, size, frame, context=half.context)

    def passes(self, one: Machine, other: Machine) -> bool:
        if not self._walls:
            return True
        return not any(parts(one.index, other.index) for parts in self._walls.values())

    def hold(self, half: _Half, size: int, frame: tuple[int, bytes] | None) -> None:
        self._held.append((half, size, frame))

    def forget(self, stream: SimStream) -> None:
        if self._held:
            self._held = [h for h in self._held if h[0].stream is not stream]


Act = Callable[["SimTransport", Callable[[bytes], None]], None]
"""What a message does where it arrives: (who is there, how to answer)."""


class SimTransport:
    """`peer.net.transport.Transport` of one process. Made inside the process's context."""

    def __init__(self, network: SimNetwork, machine: Machine) -> None:
        self.peer_id = machine.peer
        self.network = network
        self.machine = machine
        self.budget = UploadBudget()
        self.context: Context = copy_context()
        self.dead = False
        self._on_call: CallHandler | None = None
        self._on_stream: StreamHandler | None = None
        self._call_slots = Slots(CALLS_MAX, CALLS_PER_PEER_MAX)
        self._stream_slots = Slots(limits.STREAMS_MAX, limits.STREAMS_PER_PEER_MAX)
        self._serving: dict[asyncio.Task[None], None] = {}
        self._streams: dict[SimStream, None] = {}
        machine.transport = self
        machine.dark = False

    # ── the interface ────────────────────────────────────────────────────────────────────
    def serve(self, on_call: CallHandler, on_stream: StreamHandler) -> None:
        self._on_call = on_call
        self._on_stream = on_stream

    def addresses(self) -> list[str]:
        return [PREFIX + self.peer_id]

    async def connect(self, address: str, timeout_s: float) -> PeerId:
        if not address.startswith(PREFIX):
            raise ValueError(f"{address!r} is not an address in a simulation")
        peer = PeerId(address.removeprefix(PREFIX))
        await self._ask(peer, 0, timeout_s, lambda there, answer: answer(b""))
        return peer

    async def call(self, peer: PeerId, request: bytes, timeout_s: float) -> bytes:
        coded = await self._ask(peer, len(request), timeout_s, self._calls(request))
        return read_answer(peer, coded)

    def post(
        self, peer: PeerId, request: bytes, timeout_s: float, done: Callable[[Posted], None]
    ) -> None:
        """As `call`, for who need not wait for the answer, so it costs no task. `done` is never
        told before this returns."""
        act = self._calls(request)

        def settle(coded: bytes | None) -> None:
            if self.dead:
                return  # whoever asked is gone
            answer: Posted
            try:
                answer = read_answer(peer, self._arrived(peer, coded, timeout_s))
            except (TransportError, RemoteProtocolError) as error:
                answer = error
            done(answer)

        try:
            self._travel(peer, len(request), timeout_s, act, settle)
        except TransportError as error:
            if not self.dead:
                self.network.loop.call_soon(done, error, context=self.context)

    def _calls(self, request: bytes) -> Act:
        check_request(request)
        self.network.calls += 1
        self.machine.calls += 1

        def act(there: SimTransport, answer: Callable[[bytes], None]) -> None:
            there.answer(self.peer_id, request, answer)

        return act

    async def open(self, peer: PeerId, timeout_s: float) -> SimStream:
        opened: list[SimStream] = []

        def ask(there: SimTransport, answer: Callable[[bytes], None]) -> None:
            if self.dead:
                return
            here = SimStream(self, there.machine, opened_here=True)
            far = SimStream(there, self.machine, opened_here=False)
            here.join(far)
            opened.append(here)
            there.accept(far)
            answer(b"")

        await self._ask(peer, 0, timeout_s, ask)
        return opened[0]

    async def close(self) -> None:
        """The process ends, politely or not: streams are reset."""
        self.kill(dark=False)
        serving = list(self._serving)
        for task in serving:
            task.cancel()
        if serving:
            await asyncio.wait(serving)

    # ── for the simulation ───────────────────────────────────────────────────────────────
    def kill(self, *, dark: bool) -> None:
        """Nothing leaves or arrives from now on. `dark`: and nobody is told."""
        if self.dead:
            return
        self.dead = True
        if self.machine.transport is self:
            self.machine.transport = None
            self.machine.dark = dark
        for stream in list(self._streams):
            stream.die(tell=not dark)
        self._streams.clear()

    def answer(self, sender: PeerId, request: bytes, reply: Callable[[bytes], None]) -> None:
        """Let the handler answer a call; `reply` is told the coded answer."""
        self.budget.received(len(request))
        if self._on_call is None:
            return reply(absence("not ready"))
        if not self._call_slots.enter(sender):
            return reply(refusal("too many calls in progress"))
        answer = _at_once(self._on_call(sender, request))
        self._call_slots.leave(sender)
        if isinstance(answer, RemoteProtocolError):
            coded = refusal(answer.reason)
        elif isinstance(answer, Exception):
            raise answer  # a bug: the loop's exception handler ends the simulation
        else:
            coded = OK + answer
        self.budget.charge(len(coded))
        reply(coded)

    def accept(self, stream: SimStream) -> None:
        task = self.network.loop.create_task(
            serve_stream(stream, self._on_stream, self._stream_slots)
        )
        self._serving[task] = None
        task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        del self._serving[task]
        report(task)

    def enter(self, stream: SimStream) -> None:
        self._streams[stream] = None

    def leave(self, stream: SimStream) -> None:
        self._streams.pop(stream, None)

    # ── there and back ───────────────────────────────────────────────────────────────────
    async def _ask(self, peer: PeerId, size: int, timeout_s: float, act: Act) -> bytes:
        """Travel to `peer`, `act` there, and bring the answer back."""
        waiter: asyncio.Future[bytes | None] = self.network.loop.create_future()
        timer = self._travel(peer, size, timeout_s, act, partial(_settle, waiter))
        try:
            coded = await waiter
        finally:
            timer.cancel()
        return self._arrived(peer, coded, timeout_s)

    def _arrived(self, peer: PeerId, coded: bytes | None, timeout_s: float) -> bytes:
        if coded is _NOBODY:
            raise TransportError(peer, "nobody there")
        if coded is None or self.dead:
            raise gone(peer, timeout_s)
        self.budget.received(len(coded))
        return coded

    def _travel(
        self,
        peer: PeerId,
        size: int,
        timeout_s: float,
        act: Act,
        settle: Callable[[bytes | None], None],
    ) -> Entry:
        """The way there and back; `settle` is told the answer, or None when time is up, once.

        Gives the timer, for who stops waiting.
        """
        network, loop, here = self.network, self.network.loop, self.machine
        there = network.machines.get(peer)
        if there is None or there is here or self.dead:
            raise TransportError(peer, "unreachable")
        timer = loop.call_later(timeout_s, settle, None, context=self.context)

        def back(coded: bytes | None) -> None:
            if timer.over or self.dead or not network.passes(there, here):
                return
            size = CALL_BYTES + len(coded or b"")
            delay_s = _control_s(network, there, here, size)
            loop.call_later(delay_s, arrived, coded, context=self.context)

        def arrived(coded: bytes | None) -> None:
            if not timer.over:
                timer.cancel()
                settle(coded if coded is not None else _NOBODY)

        def reach() -> None:
            if not network.passes(here, there):
                return
            transport = there.transport
            if transport is not None:
                act(transport, back)
            elif not there.dark:
                back(None)

        self.budget.charge(size + CALL_BYTES)
        if network.passes(here, there):
            delay_s = _control_s(network, here, there, size + CALL_BYTES)
            context = there.transport.context if there.transport is not None else self.context
            loop.call_later(delay_s, reach, context=context)
        return timer


_NOBODY: Final = b"nobody there"


def _at_once(work: Awaitable[bytes]) -> bytes | Exception:
    """What a handler of calls answers: the driver's never waits, so it needs no task."""
    steps = work.__await__()
    try:
        next(steps)
    except StopIteration as end:
        return cast("bytes", end.value)
    except Exception as error:  # the caller tells whose it is
        return error
    return LocalProtocolError("a handler of calls that waits for something")


def _settle(waiter: asyncio.Future[bytes | None], value: bytes | None) -> None:
    if not waiter.done():
        waiter.set_result(value)


def _control_s(network: SimNetwork, here: Machine, there: Machine, size: int) -> float:
    """Seconds until a small message is there: control never waits for bulk."""
    now_s = network.loop.time()
    delay_s = network.path(here, there).delay_s(size, now_s)
    return delay_s + here.up.control(size, now_s) + there.down.control(size, now_s + delay_s)


class _Half:
    """One direction of a stream: frames on their way, and who waits for them."""

    def __init__(self, stream: SimStream, source: SimTransport, target: SimTransport) -> None:
        self.stream = stream
        """The receiving end."""
        self.context = target.context
        self.inbox: deque[tuple[int, bytes, int]] = deque()
        self.unread = 0
        """Bytes sent and not taken yet."""
        self.moved_s = -math.inf
        self.ended = False
        self.reader: asyncio.Future[None] | None = None
        self.writer: asyncio.Future[None] | None = None
        self._source = source
        self._target = target
        self._network = source.network
        self._path = source.network.path(source.machine, target.machine)
        self._arrived_s = -math.inf

    def sizes(self) -> tuple[int, int]:
        """Bytes of a piece, and how many may be on their way."""
        bps = min(self._source.machine.up.bps, self._target.machine.down.bps)
        bps = min(bps, self._path.rate_bps(self._network.loop.time()))
        piece = max(PIECE_BYTES_MIN, int(bps / 8 * self._network.piece_s))
        return piece, WINDOW_PIECES * piece

    def put(self, size: int, frame: tuple[int, bytes] | None) -> None:
        """Send a piece of `size` bytes; `frame`: what is whole when it has arrived."""
        loop = self._network.loop
        now_s = loop.time()
        loss = self._path.loss_at(now_s)
        self.unread += size
        self._source.budget.bytes_up += size
        start_s, end_s = self._source.machine.up.bulk(int(size * (1 + loss)), now_s)
        if loss > 0:
            begin_s = max(start_s, self._path.free_s)
            self._path.free_s = begin_s + 8 * size / self._path.rate_bps(now_s)
            end_s = max(end_s, self._path.free_s)
            start_s = begin_s
        if start_s > now_s + 1e-3:
            loop.call_at(start_s, self._depart, size, frame, end_s, context=self._source.context)
        else:
            self._depart(size, frame, end_s)

    def _depart(self, size: int, frame: tuple[int, bytes] | None, end_s: float) -> None:
        """Its turn on the sender's line begins; the line is free again at `end_s`."""
        loop = self._network.loop
        now_s = loop.time()
        latency_s = self._path.delay_s(min(size, 4096), now_s)
        # What is lost and sent again comes later, but holds nobody else's up.
        straight_s = self._path.spec.latency_s
        _, through_s = self._target.machine.down.bulk(size, now_s + straight_s)
        due_s = max(through_s + latency_s - straight_s, end_s + latency_s, self._arrived_s)
        self._arrived_s = due_s
        loop.call_at(due_s, self.arrive, size, frame, context=self.context)

    def arrive(self, size: int, frame: tuple[int, bytes] | None) -> None:
        stream = self.stream
        if stream.broken or self._target.dead:
            return
        if not self._network.passes(self._source.machine, self._target.machine):
            self._network.hold(self, size, frame)
            return
        self.moved_s = self._network.loop.time()
        self._target.budget.bytes_down += size
        if frame is None:
            self.unread -= size
        else:
            self.inbox.append((frame[0], frame[1], size))
            _wake(self.reader)
        _wake(self.writer)

    def take(self) -> tuple[int, bytes]:
        kind, payload, size = self.inbox.popleft()
        self.unread -= size
        _wake(self.writer)
        return kind, payload

    def wake(self) -> None:
        _wake(self.reader)
        _wake(self.writer)


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


_END: Final = -1
_REFUSED: Final = -2
_CLOSED: Final = -3


class SimStream:
    """`peer.net.transport.Stream`: frames between two transports."""

    def __init__(self, transport: SimTransport, there: Machine, *, opened_here: bool) -> None:
        self.peer = there.peer
        self.bytes_out = 0
        self.bytes_in = 0
        self.broken = ""
        self._transport = transport
        self._network = transport.network
        self._there = there
        self._opened_here = opened_here
        self._finished = False
        self._ended = False
        self._closed_there = False
        self._far: SimStream
        self._in: _Half
        self._out: _Half

    def join(self, far: SimStream) -> None:
        """The two ends of one stream."""
        self._far, far._far = far, self
        self._out = far._in = _Half(far, self._transport, far._transport)
        self._in = far._out = _Half(self, far._transport, self._transport)
        self._transport.enter(self)
        far._transport.enter(far)

    # ── the interface ────────────────────────────────────────────────────────────────────
    async def send(self, kind: int, payload: bytes | memoryview) -> None:
        if self._finished:
            raise LocalProtocolError("no frames after finish()")
        await self._send(kind, bytes(payload))

    async def receive(self, payload_bytes_max: int) -> Frame | None:
        if self._ended:
            return None
        half = self._in
        while not half.inbox:
            await self._wait(half, reads=True)
        kind, payload = half.take()
        if kind in (_END, _CLOSED):
            self._ended = True
            self._closed_there = kind == _CLOSED
            return None
        if kind == _REFUSED:
            raise self._break(f"refused: {payload.decode(errors='replace')}")
        if len(payload) > payload_bytes_max:
            reason = f"frame of {len(payload)} bytes where at most {payload_bytes_max} are allowed"
            self._break(reason)
            raise RemoteProtocolError(self.peer, reason)
        self.bytes_in += len(payload)
        return Frame(kind, payload)

    async def finish(self) -> None:
        if not self._finished and not self.broken:
            self._finished = True
            self._out.put(FRAME_BYTES, (_END, b""))

    async def close(self) -> None:
        """As `framing.FramedStream`: orderly after `finish`, else with a reset."""
        orderly = False
        try:
            if self._finished and not self.broken:
                await self._goodbye(self._network.loop.time() + CLOSE_WAIT_S)
                orderly = not self.broken  # too slow or not, what we sent may arrive
        finally:
            self._transport.leave(self)
            if orderly:
                if self._opened_here:
                    self._out.put(FRAME_BYTES, (_CLOSED, b""))
                self.broken = "closed here"
            else:
                self.die(tell=True)
            self._ended = True
            self._network.forget(self)

    async def _goodbye(self, until_s: float) -> None:
        """Let the far side come to its end: the opener waits for END, the other for the close."""
        half = self._in
        while not self.broken:
            while half.inbox:
                kind = half.take()[0]
                self._ended = self._ended or kind in (_END, _CLOSED)
                self._closed_there = self._closed_there or kind == _CLOSED
            if self._closed_there or (self._opened_here and self._ended):
                return
            if self._network.loop.time() >= until_s:
                return
            half.reader = waiter = self._network.loop.create_future()
            timer = self._network.loop.call_at(until_s, _wake, waiter)
            try:
                await waiter
            finally:
                timer.cancel()

    async def refuse(self, reason: str) -> None:
        """Tell the far side why nothing more will come; it gets a TransportError."""
        if self._finished or self.broken:
            return
        text = reason.encode()[: limits.TEXT_CHARS_MAX]
        self._out.put(FRAME_BYTES + len(text), (_REFUSED, text))
        await self.finish()

    # ── inside ───────────────────────────────────────────────────────────────────────────
    def die(self, reason: str = "closed here", *, tell: bool) -> None:
        """Break this end; the far side hears of it after the way there, if at all."""
        if self.broken:
            return
        self.broken = reason
        self._in.wake()
        self._out.wake()
        far, network = self._far, self._network
        if not tell or far.broken:
            return
        here = self._transport.machine
        if network.passes(here, self._there):
            delay_s = network.path(here, self._there).delay_s(FRAME_BYTES, network.loop.time())
            network.loop.call_later(delay_s, far.reset, context=far._transport.context)

    def reset(self) -> None:
        """The far side has gone."""
        if not self.broken:
            self.broken = "stream broke (connection reset)"
            self._in.wake()
            self._out.wake()

    async def _send(self, kind: int, payload: bytes) -> None:
        half = self._out
        self._network.frames += 1
        left = self._network.wire_bytes(kind, payload) + FRAME_BYTES
        self.bytes_out += left
        piece_bytes, window_bytes = half.sizes()
        while True:
            self._check()
            while half.unread >= window_bytes:
                await self._wait(half, reads=False)
            piece = min(left, piece_bytes)
            left -= piece
            half.put(piece, None if left else (kind, payload))
            if not left:
                return

    def _check(self) -> None:
        if self.broken:
            raise TransportError(self.peer, self.broken)

    async def _wait(self, half: _Half, *, reads: bool) -> None:
        """Until something moved; give up where nothing does."""
        self._check()
        loop = self._network.loop
        begun_s = loop.time()
        waiter: asyncio.Future[None] = loop.create_future()
        if reads:
            half.reader = waiter
        else:
            half.writer = waiter
        timeout_s = limits.PROGRESS_TIMEOUT_S
        timer = loop.call_at(begun_s + timeout_s, _wake, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
        self._check()
        now_s = loop.time()
        if now_s - max(begun_s, half.moved_s) >= timeout_s:
            what = "sent" if reads else "took"
            raise self._break(f"{what} nothing for {timeout_s:g} s")

    def _break(self, reason: str) -> TransportError:
        self.die(reason, tell=True)
        return TransportError(self.peer, reason)
