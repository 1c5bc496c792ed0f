"""Frames over any two-way pipe of bytes: the `Stream` that every transport hands out.

A frame travels as one or more pieces of at most `FRAME_BYTES_MAX`, each under a header:

    u32 bytes of the frame still to come, this piece included | u32 bytes in this piece
    u8 kind | u32 CRC-32 of the nine bytes before

The checksum finds readers and writers that are out of step. What a piece carries is encrypted and
authenticated by the transport, and whatever is kept is checked from end to end by its owner: coded
units, outcomes, states and files have checksums or digests of their own.

Pieces keep one read small (reads of a megabyte and more cost 2-3 CPU-seconds per GB in malloc and
page faults) and let a slow line interleave streams. An explicit END tells an orderly end from a
stream that was cut short. Memory follows what has arrived, never what a header promises.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import zlib
from collections.abc import Callable
from typing import Final, Protocol

from peer.net.budget import UploadBudget
from peer.net.calls import Slots
from peer.net.pipe import Pipe
from peer.net.transport import Frame, Stream, StreamHandler, TransportError
from protocols import limits
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.types import PeerId

FIELDS: Final = struct.Struct(">IIB")
HEADER: Final = struct.Struct(">IIBI")
END: Final = 127
REFUSED: Final = 126  # the far side wants no more of this; the payload is its reason
KIND_MAX: Final = 125
CLOSE_WAIT_S: Final = 2.0  # for the far side's orderly end
LEFT_FRAME_BYTES_MAX: Final = limits.UNIT_BYTES_MAX + limits.FRAME_BYTES_MAX
"""Of what is read to no purpose until then: the largest frame that anybody sends, of units."""


class _Watch:
    """Breaks a stream on which somebody waits while nothing moves.

    Its timer is set again only when it fires: a deadline for every operation would cost more than
    many an operation itself. It looks four times per `progress_timeout_s`, so who was last seen
    moving may get a quarter more.
    """

    def __init__(self, stream: FramedStream, position: Callable[[], int], what: str) -> None:
        self._stream = stream
        self._position = position
        self._what = what
        self._waiting = False
        self._seen = 0
        self._since_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        self._waiting = True
        self._seen = self._position()
        self._since_s = asyncio.get_running_loop().time()
        if self._timer is None:
            self._set()

    def __exit__(self, *_: object) -> None:
        self._waiting = False

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _set(self) -> None:
        loop = asyncio.get_running_loop()
        timeout_s = self._stream.progress_timeout_s
        due_s = min(self._since_s + timeout_s, loop.time() + timeout_s / 4)
        self._timer = loop.call_at(due_s, self._look)

    def _look(self) -> None:
        self._timer = None
        if not self._waiting:
            return
        now_s = asyncio.get_running_loop().time()
        timeout_s = self._stream.progress_timeout_s
        position = self._position()
        if position != self._seen:
            self._seen, self._since_s = position, now_s
        if now_s - self._since_s >= timeout_s:
            self._stream.abort(f"{self._what} for {timeout_s:g} s")
        else:
            self._set()


class FramedStream:
    """`transport.Stream` over a pipe. One task may send while another receives."""

    def __init__(
        self,
        pipe: Pipe,
        peer: PeerId,
        budget: UploadBudget,
        *,
        opened_here: bool,
        progress_timeout_s: float = limits.PROGRESS_TIMEOUT_S,
    ) -> None:
        self.peer = peer
        self.bytes_out = 0
        self.bytes_in = 0
        self.progress_timeout_s = progress_timeout_s
        self._pipe = pipe
        self._budget = budget
        self._receiving = _Watch(self, pipe.received, "sent nothing")
        self._draining = _Watch(self, pipe.unsent, "took nothing")
        self._opened_here = opened_here
        self._sending = False
        self._finished = False
        """No more frames go out."""
        self._ended = False
        """No more frames will come in."""
        self._broken = ""
        """Why the stream can't be used any more."""

    # ── transport.Stream ─────────────────────────────────────────────────────────────────

    async def send(self, kind: int, payload: bytes | memoryview) -> None:
        if not 0 <= kind <= KIND_MAX:
            raise LocalProtocolError(f"frame kind {kind} is outside 0..{KIND_MAX}")
        if self._finished or self._sending:
            raise LocalProtocolError("a stream has one sender at a time, and none after finish()")
        self._sending = True
        try:
            await self._send(kind, memoryview(payload).cast("B"))
        finally:
            self._sending = False

    async def receive(self, payload_bytes_max: int) -> Frame | None:
        if self._ended:
            return None
        kind, left, payload = await self._piece(payload_bytes_max)
        if kind == END:
            self._ended = True
            return None
        if left:
            whole = bytearray(payload)
            while left:
                more_kind, more_left, payload = await self._piece(left, left)
                if more_kind != kind:
                    raise self._blame(f"frame of kind {kind} goes on as kind {more_kind}")
                whole += payload
                left = more_left
            payload = bytes(whole)
        if kind == REFUSED:
            text = payload[: limits.TEXT_CHARS_MAX].decode(errors="replace")
            raise self._break(f"refused: {text}")
        return Frame(kind, payload)

    async def finish(self) -> None:
        if self._finished or self._broken:
            return
        self._finished = True
        self._budget.charge(HEADER.size)
        await self._write(END, memoryview(b""), 0)

    async def close(self) -> None:
        """Close this side. After `finish` it first lets the far side come to its end as well."""
        orderly = False
        try:
            if self._finished and not self._broken:
                async with asyncio.timeout(min(CLOSE_WAIT_S, self.progress_timeout_s)):
                    await self._until_the_end()
                orderly = True
        except (TimeoutError, OSError, TransportError, RemoteProtocolError):
            orderly = not self._broken  # too slow to say goodbye, but what we sent may arrive
        finally:
            self._broken = self._broken or "closed here"
            self._ended = True
            self._receiving.end()
            self._draining.end()
            if orderly:
                self._pipe.close()
            else:
                self._pipe.abort()

    # ── beyond the interface ─────────────────────────────────────────────────────────────

    def abort(self, reason: str) -> None:
        """Break the stream at once; whoever waits on it gets a TransportError with `reason`."""
        self._break(reason)

    async def refuse(self, reason: str) -> None:
        """Tell the far side why nothing more will come; it gets a TransportError."""
        if self._finished or self._broken or self._sending:
            return
        text = reason.encode()[: limits.TEXT_CHARS_MAX]
        self._budget.charge(HEADER.size + len(text))
        await self._write(REFUSED, memoryview(text), len(text))
        await self.finish()

    # ── inside ───────────────────────────────────────────────────────────────────────────

    async def _send(self, kind: int, view: memoryview) -> None:
        left = len(view)
        while True:
            piece = view[: self._budget.piece_bytes]
            await self._budget.take(HEADER.size + len(piece))
            await self._write(kind, piece, left)
            view = view[len(piece) :]
            left -= len(piece)
            if not left:
                return

    async def _write(self, kind: int, piece: memoryview, left: int) -> None:
        if self._broken:
            raise TransportError(self.peer, self._broken)
        try:
            self._pipe.write(_header(left, len(piece), kind), piece)
            with self._draining:
                await self._pipe.drain()
        except OSError as error:
            raise self._break(f"stream broke while sending ({error})") from None
        except asyncio.CancelledError:
            self._break("sending was cancelled in the middle of a frame")
            raise
        if self._broken:
            raise TransportError(self.peer, self._broken)
        self.bytes_out += HEADER.size + len(piece)

    async def _piece(
        self, left_max: int, left_expected: int | None = None
    ) -> tuple[int, int, bytes]:
        """(kind, bytes of the frame after this piece, the piece)."""
        header = await self._read(HEADER.size)
        left, length, kind, _ = HEADER.unpack(header)
        if header != _header(left, length, kind):
            raise self._blame("wrong checksum")
        if left > (left_max if kind <= KIND_MAX else limits.TEXT_CHARS_MAX):
            raise self._blame(f"frame of {left} bytes where at most {left_max} are allowed")
        if left_expected is not None and left != left_expected:
            raise self._blame(f"frame should have {left_expected} bytes left, not {left}")
        if length > min(left, limits.FRAME_BYTES_MAX) or (left and not length):
            raise self._blame(f"piece of {length} bytes in a frame of {left}")
        if kind > END or (kind == END and left):
            raise self._blame(f"frame of unknown kind {kind}")
        return kind, left - length, await self._read(length) if length else b""

    async def _read(self, n: int) -> bytes:
        if self._broken:
            raise TransportError(self.peer, self._broken)
        try:
            with self._receiving:
                data = await self._pipe.read(n)
        except OSError as error:
            raise self._break(f"stream broke while receiving ({error})") from None
        self.bytes_in += len(data)
        self._budget.received(len(data))
        if len(data) < n:
            raise self._break("stream was cut short")
        return data

    async def _until_the_end(self) -> None:
        """Whoever opened closes first: it waits for END only, the other side for the real end."""
        while not self._ended:
            await self.receive(LEFT_FRAME_BYTES_MAX)
        while not self._opened_here and await self._pipe.read(limits.FRAME_BYTES_MAX):
            pass

    def _break(self, reason: str) -> TransportError:
        self._broken = self._broken or reason
        self._receiving.end()
        self._draining.end()
        self._pipe.abort()
        return TransportError(self.peer, self._broken)

    def _blame(self, reason: str) -> RemoteProtocolError:
        self._break(reason)
        return RemoteProtocolError(self.peer, reason)


def _header(left: int, length: int, kind: int) -> bytes:
    fields = FIELDS.pack(left, length, kind)
    return fields + zlib.crc32(fields).to_bytes(4)


class Inbound(Stream, Protocol):
    """A stream that somebody else opened."""

    async def refuse(self, reason: str) -> None:
        """Tell the far side why nothing more will come."""


async def serve_stream(stream: Inbound, handler: StreamHandler | None, slots: Slots) -> None:
    """Run `handler` and close the stream: with an orderly end if it returned.

    A RemoteProtocolError is told to the far side; any other error is the caller's to report.
    """
    if handler is None or not slots.enter(stream.peer):
        with contextlib.suppress(TransportError):
            await stream.refuse("not ready" if handler is None else "too many streams")
        return await stream.close()
    try:
        await handler(stream)
        await stream.finish()
    except RemoteProtocolError as error:
        with contextlib.suppress(TransportError):
            await stream.refuse(error.reason)
    except TransportError:
        pass  # the handler let it through: there is nobody left to tell
    finally:
        slots.leave(stream.peer)
        await stream.close()
