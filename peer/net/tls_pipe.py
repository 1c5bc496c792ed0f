"""A TCP connection with TLS as a `Pipe`: records are deciphered straight into the reader's buffer.

The event loop only says when the socket is ready. asyncio's own TLS puts two more buffers, two
copies and a task switch between the socket and its reader, at three times the CPU time per byte
(and with uvloop it can't be handed to another protocol).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import math
import socket
import ssl
import sys
from collections import deque
from typing import Final, Self

from peer.net.pacing import TICK_S, Pace, Sample, acknowledge, limit
from peer.net.pipe import REST_BYTES
from protocols import limits

RECORD_BYTES: Final = 2**14  # the most that a TLS record carries
BUFFER_BYTES_MIN: Final = 2 * RECORD_BYTES
BUFFER_BYTES_MAX: Final = 2 * limits.FRAME_BYTES_MAX
UNSENT_BYTES_MIN: Final = 8 * 2**10
UNSENT_BYTES_MAX: Final = 2 * limits.FRAME_BYTES_MAX
"""In the kernel and not on the line yet: a frame that leaves and the one after it. Less where the
line is slow or unknown: nothing can be taken back from there."""
UNSENT_BYTES_FRESH: Final = 64 * 2**10  # where nothing is known yet
UNSENT_S: Final = 0.5
CONGESTION_CONTROL: Final = b"bbr"  # cubic halves its rate at every loss, be the line full or not
CONGESTION_CONTROL_THIN: Final = b"cubic"  # BBR has four packets of each flow on their way, always

RTO_US_MIN: Final = 50_000
"""What a retransmission waits for beyond the round trip; Linux has 200 ms. Whoever delays its
acknowledgements must do so for less: `ACK_DELAY_US_MAX` (25 ms are QUIC's too, RFC 9002, 6.2.1)."""
ACK_DELAY_US_MAX: Final = 25_000

_TCP_NOTSENT_LOWAT: Final = getattr(socket, "TCP_NOTSENT_LOWAT", 25)
_TCP_THIN_LINEAR_TIMEOUTS: Final = 16
_TCP_RTO_MIN_US: Final = 45  # Linux 6.15, as the next one
_TCP_DELACK_MAX_US: Final = 46


def tune(sock: socket.socket, host: str) -> None:
    """Set a connection to `host` up for bulk, as far as this system goes along."""
    sock.setblocking(False)
    wishes: list[tuple[int, int | bytes]] = [
        (socket.TCP_NODELAY, 1),
        (_TCP_NOTSENT_LOWAT, UNSENT_BYTES_MAX),
    ]
    if sys.platform == "linux":  # elsewhere these numbers mean something else
        # A lost packet with none after it is missed by a timeout only, and a stream has several
        # such: its first, the answer to it, its last.
        wishes += [
            (_TCP_RTO_MIN_US, RTO_US_MIN),
            (_TCP_DELACK_MAX_US, ACK_DELAY_US_MAX),
            (_TCP_THIN_LINEAR_TIMEOUTS, 1),  # the second in a row is no longer than the first
        ]
    # Inside one machine nothing is lost, and BBR's pacing only costs time.
    if hasattr(socket, "TCP_CONGESTION") and not _is_near(host):
        wishes.append((socket.TCP_CONGESTION, CONGESTION_CONTROL))
    for option, value in wishes:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _is_near(host: str) -> bool:
    """On this machine."""
    return ipaddress.ip_address(host).is_loopback


def congestion_control() -> str:
    """What connections to other machines get here, such as `bbr` or `cubic`; empty if unknown."""
    with contextlib.suppress(OSError, AttributeError), socket.socket() as probe:
        tune(probe, "192.0.2.1")
        name = probe.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        return name.rstrip(b"\0").decode(errors="replace")
    return ""


class TlsPipe:
    """A handshaken TLS connection as a `pipe.Pipe`. Build it with `handshake`.

    Memory follows what comes in and is not read, up to `BUFFER_BYTES_MAX`; then the sender waits.
    """

    def __init__(self, sock: ssl.SSLSocket, pace: Pace | None = None) -> None:
        self._socket = sock
        self._pace = pace
        self._look: asyncio.TimerHandle | None = None
        """When to see again how fast it may send; None while nothing is on its way."""
        self._cap_bps = math.inf
        """What the kernel was told last."""
        self._thin = False
        self._loop = asyncio.get_running_loop()
        self._buffer = memoryview(bytearray(BUFFER_BYTES_MIN))
        self._start = self._stop = 0
        """Where in the buffer the bytes are that nobody has read yet."""
        self._wanted = 0
        self._received = 0
        self._sent = 0
        self._ended = False
        """Nothing more will come in."""
        self._reading = False
        """The event loop tells when the socket can be read."""
        self._writing = False
        self._out: deque[memoryview] = deque()
        self._unsent = 0
        self._stride = limits.FRAME_BYTES_MAX
        """Bytes that OpenSSL gets at once."""
        self._offered = 0
        """What it has begun with and not sent whole; 0: nothing."""
        self._error: OSError | None = None
        """Why nothing more can be sent."""
        self._readable: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self.died = False
        """It broke or ended by itself: neither `close` nor `abort` did it."""

    @classmethod
    async def handshake(
        cls,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        listens: bool,
        pace: Pace | None = None,
    ) -> tuple[Self, bytes | None]:
        """A pipe over a connected, non-blocking socket, and the certificate of the far side (DER).
        `pace`: decides how fast it sends, unless the far side is on this machine.

        The socket is the pipe's from now on, and closed where this fails or is cancelled.

        Raises:
            OSError: no TLS 1.3 there (`ssl.SSLError`), or the connection broke.
        """
        secured = None
        try:
            secured = context.wrap_socket(sock, server_side=listens, do_handshake_on_connect=False)
            await _shake_hands(secured)
            near = pace is None or _is_near(pace.host)
            return cls(secured, None if near else pace), secured.getpeercert(binary_form=True)
        except BaseException:
            (secured or sock).close()
            raise

    @property
    def unread(self) -> int:
        """Bytes that came in and that nobody has read."""
        return self._stop - self._start

    @property
    def carried(self) -> int:
        """Bytes in both directions so far."""
        return self._received + self._sent

    def rest(self) -> None:
        """Between two streams: keep little memory, and notice if the far side goes."""
        if not self.unread and len(self._buffer) > BUFFER_BYTES_MIN:
            self._buffer = memoryview(bytearray(BUFFER_BYTES_MIN))
        self._wanted = 1
        self._pull()

    @property
    def usable(self) -> bool:
        return self._error is None and not self._ended

    # ── Pipe ─────────────────────────────────────────────────────────────────────────────

    async def read(self, n: int, /) -> bytes:
        if self.unread < n:
            self._wanted = n
            self._pull()  # what OpenSSL has deciphered already, no event tells of
            while self.unread < n and not self._ended:
                self._readable = self._loop.create_future()
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
        views = [memoryview(d).cast("B") for d in data if len(d)]
        if len(views) > 1:  # a header of its own would be a record and a packet of its own
            head, rest = views[0], views[1]
            room = max(0, RECORD_BYTES - len(head))
            views[:2] = [memoryview(bytes(head) + bytes(rest[:room])), rest[room:]]
        for view in views:
            if len(view):
                self._out.append(view)
                self._unsent += len(view)
        if not self._writing:
            self._push()

    async def drain(self) -> None:
        if self._out and self._error is None:
            self._writable = self._loop.create_future()
            try:
                await self._writable
            finally:
                self._writable = None
        if self._error is not None:
            raise self._error

    def unsent(self) -> int:
        return self._unsent

    def close(self) -> None:
        self._stop_it(ConnectionResetError("closed"))

    def abort(self) -> None:
        self._stop_it(ConnectionResetError("closed"))

    # ── inside ───────────────────────────────────────────────────────────────────────────

    def _pull(self) -> None:
        """Take in what is there, until it is what the reader waits for."""
        while not self._ended and self.unread < REST_BYTES:
            try:
                n = self._socket.recv_into(self._room())
            except ssl.SSLWantReadError:
                self._listen(True)
                if self._pace is not None:
                    acknowledge(self._socket)
                break
            except OSError as error:
                return self._break(error)
            if not n:
                return self._break(ConnectionResetError("the far side closed the connection"))
            self._stop += n
            self._received += n
            if self.unread >= self._wanted:
                break
        else:
            self._listen(False)  # enough for now: let the sender wait
        if self.unread >= self._wanted:
            _wake(self._readable)

    def _push(self) -> None:
        """Send what goes. On a line that can't follow a record at a time: OpenSSL tells nothing of
        what it has sent before that is all it was given, and who moves nothing for seconds is taken
        for dead."""
        if self._pace is not None and self._look is None:
            self._steer()
        try:
            while self._out:
                # What it has begun with must be offered again, and not less of it.
                self._offered = self._offered or self._stride
                n = self._socket.send(self._out[0][: self._offered])
                self._offered = 0
                self._stride = min(2 * self._stride, limits.FRAME_BYTES_MAX)
                self._unsent -= n
                self._sent += n
                if n < len(self._out[0]):
                    self._out[0] = self._out[0][n:]
                else:
                    self._out.popleft()
        except ssl.SSLWantWriteError:
            self._stride = RECORD_BYTES
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._socket.fileno(), self._push)
            return
        except OSError as error:
            return self._break(error)
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._socket.fileno())
        _wake(self._writable)

    def _steer(self) -> None:
        """Have the kernel send as fast as the way there takes it, and look again while it sends."""
        self._look = None
        pace = self._pace
        sample = None if pace is None else Sample.of(self._socket, self._loop.time())
        if pace is None or sample is None:
            return
        cap_bps = pace.look(sample)
        fresh = not pace.rate_bps and math.isinf(cap_bps)
        room = UNSENT_BYTES_FRESH if fresh else int(pace.rate_bps / 8 * UNSENT_S)
        unsent = max(UNSENT_BYTES_MIN, min(UNSENT_BYTES_MAX, room))
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, unsent)
            if cap_bps != self._cap_bps:
                limit(self._socket, cap_bps)
                self._cap_bps = cap_bps
            if pace.thin != self._thin:
                name = CONGESTION_CONTROL_THIN if pace.thin else CONGESTION_CONTROL
                with contextlib.suppress(OSError):
                    self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)
                self._thin = pace.thin
        except OSError:
            self._pace = None  # this system can't
            return
        if self._out or sample.waiting or sample.flying:
            self._look = self._loop.call_later(TICK_S, self._steer)

    def _listen(self, on: bool) -> None:
        if on and not self._reading:
            self._loop.add_reader(self._socket.fileno(), self._pull)
        elif self._reading and not on:
            self._loop.remove_reader(self._socket.fileno())
        self._reading = on

    def _room(self) -> memoryview:
        """Where to read to: behind what is unread, which is brought to the front if it must."""
        if self._start == self._stop:
            self._start = self._stop = 0
        if len(self._buffer) - self._stop < RECORD_BYTES:
            unread = self._buffer[self._start : self._stop]
            if len(unread) > len(self._buffer) // 2 and len(self._buffer) < BUFFER_BYTES_MAX:
                size = min(2 * len(self._buffer), BUFFER_BYTES_MAX)
                self._buffer = memoryview(bytearray(size))
            self._buffer[: len(unread)] = unread
            self._start, self._stop = 0, len(unread)
        return self._buffer[self._stop :]

    def _break(self, error: OSError) -> None:
        self.died = self.died or self._error is None
        self._stop_it(error)

    def _stop_it(self, error: OSError) -> None:
        if self._error is None:
            self._error = error
            self._pace = None
            if self._look is not None:
                self._look.cancel()
            self._listen(False)
            if self._writing:
                self._writing = False
                self._loop.remove_writer(self._socket.fileno())
            self._socket.close()
            self._out.clear()
        self._ended = True
        _wake(self._readable)
        _wake(self._writable)


async def _shake_hands(secured: ssl.SSLSocket) -> None:
    loop = asyncio.get_running_loop()
    handle = secured.fileno()
    while True:
        ready: asyncio.Future[None] = loop.create_future()
        try:
            return secured.do_handshake()
        except ssl.SSLWantReadError:
            loop.add_reader(handle, _wake, ready)
            try:
                await ready
            finally:
                loop.remove_reader(handle)
        except ssl.SSLWantWriteError:
            loop.add_writer(handle, _wake, ready)
            try:
                await ready
            finally:
                loop.remove_writer(handle)


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
