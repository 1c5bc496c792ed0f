"""The listening end of the bulk lane: who is let in, and what is turned away before it costs much.

A stranger gets no further than a TLS handshake, of which few run at once, each with a deadline.
Only peers come in that have asked for our offer over libp2p a while ago, and prove to be these.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Final

from peer.errors import NetworkError
from peer.net.budget import UploadBudget
from peer.net.calls import Slots, report
from peer.net.framing import serve_stream
from peer.net.lane import (
    ADMITTED_S,
    GREETING,
    HANDSHAKE_TIMEOUT_S,
    IDLE_S,
    OPENS,
    PROBE,
    LaneStream,
)
from peer.net.lane_counters import LaneCounters
from peer.net.pacing import Line
from peer.net.tls import peer_behind
from peer.net.tls_pipe import TlsPipe, tune
from peer.net.transport import StreamHandler
from protocols import limits
from protocols.types import PeerId

HANDSHAKES_MAX: Final = 64  # at once: of groups that start together, each a few milliseconds
HANDSHAKES_PER_HOST_MAX: Final = 16  # behind one address there may be several peers
BACKLOG: Final = 128
OUT_OF_HANDLES_WAIT_S: Final = 1.0  # until some are closed

_log = logging.getLogger(__name__)


class LaneServer:
    """Accepts lanes and serves their streams, within the same slots as libp2p's."""

    def __init__(
        self,
        listener: socket.socket,
        context: ssl.SSLContext,
        budget: UploadBudget,
        slots: Slots,
        counters: LaneCounters,
        on_refused: Callable[[PeerId, str], None],
        line: Line,
    ) -> None:
        """`on_refused` hears who broke the rules after it had been let in."""
        self._line = line
        self.port: int = listener.getsockname()[1]
        self.on_stream: StreamHandler | None = None
        self._listener = listener
        self._context = context
        self._budget = budget
        self._slots = slots
        self._counters = counters
        self._on_refused = on_refused
        self._admitted: OrderedDict[PeerId, float] = OrderedDict()
        """Who has asked for our offer, and until when it may come; longest ago first."""
        self._handshakes: Counter[str] = Counter()
        """In progress, by the host they come from."""
        self._lanes = Slots(limits.STREAMS_MAX, limits.STREAMS_PER_PEER_MAX)
        """Connections: a stream needs one of its own."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.create_task(self._accept(), name="lanes")

    def admit(self, peer: PeerId) -> None:
        """`peer` has asked for our offer: let it in for `ADMITTED_S`."""
        self._admitted.pop(peer, None)
        self._admitted[peer] = asyncio.get_running_loop().time() + ADMITTED_S
        while len(self._admitted) > limits.KNOWN_PEERS_MAX:
            self._admitted.popitem(last=False)

    async def close(self) -> None:
        self._accepting.cancel()
        await asyncio.wait({self._accepting})
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # ── inside ───────────────────────────────────────────────────────────────────────────

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(self._listener)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    continue  # that one connection is gone already
                _log.warning("can't take in a lane: %s", error)
                await asyncio.sleep(OUT_OF_HANDLES_WAIT_S)
                continue
            host = str(address[0]).partition("%")[0]
            if (
                self._handshakes.total() >= HANDSHAKES_MAX
                or self._handshakes[host] >= HANDSHAKES_PER_HOST_MAX
            ):
                self._counters.refused["crowd"] += 1
                sock.close()
                continue
            self._handshakes[host] += 1
            task = asyncio.create_task(self._serve(sock, host), name=f"lane from {host}")
            self._tasks.add(task)
            task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        report(task)

    async def _serve(self, sock: socket.socket, host: str) -> None:
        """One connection from its first byte to its last."""
        try:
            lane = await self._let_in(sock, host)
        finally:
            self._handshakes[host] -= 1
            if not self._handshakes[host]:
                del self._handshakes[host]
        if lane is None:
            return
        pipe, peer = lane
        self._counters.connections += 1
        try:
            await self._streams(pipe, peer)
        finally:
            self._counters.connections -= 1
            self._lanes.leave(peer)
            pipe.close()

    async def _let_in(self, sock: socket.socket, host: str) -> tuple[TlsPipe, PeerId] | None:
        pipe: TlsPipe | None = None
        try:
            tune(sock, host)
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                pipe, shown = await TlsPipe.handshake(
                    sock, self._context, listens=True, pace=self._line.pace(host)
                )
            peer = peer_behind(shown)
        except (TimeoutError, OSError) as error:
            sock.close()
            _log.debug("lane from %s: %s", host, error)
            self._counters.refused["handshake"] += 1
            return None
        except ValueError as error:
            assert pipe is not None
            pipe.abort()
            _log.debug("lane from %s: %s", host, error)
            self._counters.refused["identity"] += 1
            return None
        if self._admitted.get(peer, 0.0) <= asyncio.get_running_loop().time():
            pipe.abort()
            self._counters.refused["unknown"] += 1  # also who still knows our offer of before
            return None
        if not self._lanes.enter(peer):
            pipe.abort()
            self._counters.refused["crowd"] += 1
            return None
        return pipe, peer

    async def _streams(self, pipe: TlsPipe, peer: PeerId) -> None:
        said = b""
        while True:
            try:
                if said != OPENS:  # a new connection is greeted unasked
                    pipe.write(GREETING)  # one byte: it goes, or there is nobody who reads
                pipe.rest()
                async with asyncio.timeout(IDLE_S):
                    await asyncio.sleep(0)  # what is there already is read without a pause
                    before, said = said, await pipe.read(1)
            except (TimeoutError, OSError):
                return
            if said == PROBE and before != PROBE:
                continue
            if said != OPENS:
                if said:
                    self._counters.refused["protocol"] += 1
                    self._on_refused(peer, f"a lane on which a stream begins with {said.hex()}")
                return
            stream = LaneStream(pipe, peer, self._budget, opened_here=False)
            self._counters.accepted += 1
            try:
                await serve_stream(stream, self.on_stream, self._slots)
            finally:
                self._counters.bytes_up += stream.bytes_out
                self._counters.bytes_down += stream.bytes_in
            if not stream.reusable:
                return


def listen(host: str, port: int, *, port_is_given: bool) -> socket.socket:
    """A socket that listens on `port` (0: any), or on any port where that one is taken.

    Raises:
        NetworkError: the port was given by the owner and is taken, or `host` is not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for wanted in dict.fromkeys((port, 0)):
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, wanted))
            listener.listen(BACKLOG)
            listener.setblocking(False)
            return listener
        except OSError as error:
            listener.close()
            if port_is_given or error.errno != errno.EADDRINUSE:
                raise NetworkError(
                    f"port {wanted} on {host} can't be had for the bulk lane"
                    f" ({error.strerror or error}); choose another with --lane-port, or do without"
                    " it: --no-lane"
                ) from None
    raise NetworkError(f"no port on {host} is free for the bulk lane; try --no-lane")
