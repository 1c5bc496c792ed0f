"""What frames travel over: any two-way pipe of bytes, and the one to the network daemon.

asyncio's reader copies every byte three times and wakes its caller for whatever came, some 20 KiB
at a time. `SocketPipe` takes the socket over, reads into one buffer, and wakes its caller once
there is what it asked for: half the CPU time per byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Final, Protocol, Self, cast

from protocols import limits

READ_BYTES_MAX: Final = limits.FRAME_BYTES_MAX  # that can be asked for at once
BUFFER_BYTES_MIN: Final = 8 * 2**10  # most streams carry a question and an answer
BUFFER_BYTES_MAX: Final = 2 * READ_BYTES_MAX
REST_BYTES: Final = BUFFER_BYTES_MAX * 3 // 4  # unread: a read that waits, and half as much again
KERNEL_BYTES: Final = 512 * 2**10  # a whole frame leaves at once, and the next one after it


class Pipe(Protocol):
    """A two-way pipe of bytes with back-pressure. One task may read while another writes."""

    async def read(self, n: int, /) -> bytes:
        """`n` bytes, at most `READ_BYTES_MAX`; fewer only where the pipe ends."""

    def received(self) -> int:
        """Bytes that have come in so far, whether read yet or not."""

    def write(self, *data: bytes | memoryview) -> None: ...

    async def drain(self) -> None:
        """Wait until everything written has left this process: its memory may be reused."""

    def unsent(self) -> int:
        """Bytes written that have not left yet."""

    def close(self) -> None: ...

    def abort(self) -> None:
        """Close without sending what is still unsent. Whoever waits gets an OSError or the end."""


class SocketPipe(asyncio.BufferedProtocol):
    """A connected socket as a `Pipe`. Build it with `take_over`.

    Memory follows what comes in and is not read, up to `BUFFER_BYTES_MAX`; then the sender waits.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._streams = (reader, writer)  # they close the socket when they are collected
        self._transport = cast("asyncio.Transport", writer.transport)
        self._buffer = memoryview(bytearray(BUFFER_BYTES_MIN))
        self._start = self._stop = 0
        """Where in the buffer the bytes are that nobody has read yet."""
        self._wanted = 0
        self._received = 0
        self._ended = False
        """Nothing more will come in."""
        self._resting = False
        """Not reading from the socket, as nobody takes what is there already."""
        self._choked = False
        """Something written has not left yet."""
        self._error: OSError | None = None
        """Why nothing more can be sent."""
        self._readable: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None

    @classmethod
    async def take_over(cls, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Self:
        """The pipe of an asyncio connection, which must not be used in any other way again."""
        pipe = cls(reader, writer)
        transport = pipe._transport
        alive = not transport.is_closing()
        if alive:
            transport.pause_reading()
            transport.set_protocol(pipe)
            transport.set_write_buffer_limits(high=0)  # what `drain` promises
            transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES
            )
        reader.feed_eof()  # so that this waits for nothing:
        with contextlib.suppress(OSError):
            early = await reader.read()
            pipe._buffer = memoryview(bytearray(early.ljust(BUFFER_BYTES_MIN, b"\0")))
            pipe._stop = pipe._received = len(early)
        if alive:
            transport.resume_reading()
        else:
            pipe.connection_lost(None)
        return pipe

    # ── Pipe ─────────────────────────────────────────────────────────────────────────────

    async def read(self, n: int, /) -> bytes:
        while self._stop - self._start < n and not self._ended:
            self._wanted = n
            self._readable = asyncio.get_running_loop().create_future()
            if self._resting:
                self._resting = False
                self._transport.resume_reading()
            try:
                await self._readable
            finally:
                self._readable = None
        start = self._start
        self._start = min(start + n, self._stop)
        return bytes(self._buffer[start : self._start])

    def received(self) -> int:
        return self._received

    def write(self, *data: bytes | memoryview) -> None:
        if self._error is not None:
            raise self._error
        self._transport.writelines(data)

    async def drain(self) -> None:
        if self._choked and self._error is None:
            self._writable = asyncio.get_running_loop().create_future()
            try:
                await self._writable
            finally:
                self._writable = None
        if self._error is not None:
            raise self._error

    def unsent(self) -> int:
        return 0 if self._error is not None else self._transport.get_write_buffer_size()

    def close(self) -> None:
        self._transport.close()

    def abort(self) -> None:
        self._transport.abort()
        self.connection_lost(None)

    # ── asyncio.BufferedProtocol ─────────────────────────────────────────────────────────

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._start == self._stop:
            self._start = self._stop = 0
        elif self._stop > len(self._buffer) * 3 // 4:
            self._make_room()
        return self._buffer[self._stop :]

    def buffer_updated(self, nbytes: int) -> None:
        self._stop += nbytes
        self._received += nbytes
        unread = self._stop - self._start
        if unread >= self._wanted:
            _wake(self._readable)
        if unread >= REST_BYTES:
            self._resting = True
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        self._ended = True
        _wake(self._readable)
        return True  # we may still send

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        if self._error is None:
            self._error = exc if isinstance(exc, OSError) else ConnectionResetError("closed")
        _wake(self._readable)
        _wake(self._writable)

    def pause_writing(self) -> None:
        self._choked = True

    def resume_writing(self) -> None:
        self._choked = False
        _wake(self._writable)

    def _make_room(self) -> None:
        """Bring what is unread to the front, of a larger buffer if it fills much of this one."""
        unread = self._buffer[self._start : self._stop]
        if len(unread) > len(self._buffer) // 2 and len(self._buffer) < BUFFER_BYTES_MAX:
            size = min(2 * len(self._buffer), BUFFER_BYTES_MAX)
            self._buffer = memoryview(bytearray(size))
        self._buffer[: len(unread)] = unread
        self._start, self._stop = 0, len(unread)


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
