"""The transport between machines: libp2p, through hivemind's daemon `p2pd`.

The daemon is a child process that holds the key, the connections and the NAT traversal; we speak
to it over unix sockets. Calls are its unary handlers, streams its raw streams with our framing.
The daemon may die: then everything pending fails at once and a new one takes its place with the
same identity and port.

hivemind 1.1.12 has traits that shape this module: a dead daemon leaves its callers waiting for
ever; a call that is cancelled while its answer arrives kills the reader of all answers; a circuit
address is encoded in a way that the daemon rejects; TCP only, as QUIC loses the end of streams; a
dial says that it succeeded when all there is is a connection that was closed before (`_dial`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, Self
from weakref import WeakSet

from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import (
    P2PDaemonError,
    P2PHandlerError,
    read_pbmsg_safe,
    write_pbmsg,
)
from hivemind.proto import p2pd_pb2

from peer.errors import NetworkError
from peer.net import daemon
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
from peer.net.daemon import STOP_TIMEOUT_S, Posture
from peer.net.framing import FramedStream, serve_stream
from peer.net.multiaddress import dial_bytes, is_address_of, libp2p_id, peer_of, read
from peer.net.p2pd import (
    daemon_path,
    port_is_free,
    remember_port,
    remembered_port,
    sweep_sockets,
    write_key,
)
from peer.net.p2pd import unknown_daemon as unknown_daemon
from peer.net.pipe import SocketPipe
from peer.net.transport import CallHandler, Stream, StreamHandler, TransportError
from protocols import limits
from protocols.identity import Signer
from protocols.types import PeerId

CALL: Final = "murmuration/call/1"
BULK: Final = "murmuration/bulk/1"

RESTART_WAITS_S: Final = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0)  # then every 5 s
ADDRESSES_REFRESH_S: Final = 30.0  # NAT mappings and observed addresses turn up late
RECONNECT_TIMEOUT_S: Final = 5.0

CHANGED: Final = "another way to be reached"

RestartListener = Callable[[str, float, Any], None]
"""(reason, seconds without a daemon, the new hivemind P2P); called in the event loop."""

_log = logging.getLogger(__name__)


class Libp2pTransport:
    """`transport.Transport` over one supervised p2pd. Build it with `start`."""

    def __init__(
        self,
        signer: Signer,
        folder: Path,
        *,
        host: str,
        port: int,
        budget: UploadBudget,
        announce: tuple[str, ...],
        posture: Posture,
    ) -> None:
        self.peer_id = signer.peer_id
        self.budget = budget
        self.p2p: Any = None
        """hivemind's P2P of the daemon that runs now; another one after a restart."""
        self.restart_listeners: list[RestartListener] = []
        self._folder = folder
        self._key_file = write_key(folder, signer)
        self._host = host
        self._port = port or remembered_port(folder)
        self._port_is_given = port != 0
        self._announce = announce
        self.posture = posture
        """How the daemon stands to the world; `change` changes it."""
        self._changed = asyncio.Event()
        """Another posture is wanted than the daemon's."""
        self._restarted = asyncio.Event()
        self._runs = asyncio.Event()
        """Set while there is a daemon, and when there will be none any more."""
        self._addresses: list[str] = []
        self._known: OrderedDict[PeerId, list[str]] = OrderedDict()
        """Where peers may be dialled, longest unused first."""
        self._connected: set[PeerId] = set()
        """Peers that answered and have not failed since: no need to dial them."""
        self._on_call: CallHandler | None = None
        self._on_stream: StreamHandler | None = None
        self._beneath: tuple[bytes, CallHandler] | None = None
        self._call_slots = Slots(CALLS_MAX, CALLS_PER_PEER_MAX)
        self.stream_slots = Slots(limits.STREAMS_MAX, limits.STREAMS_PER_PEER_MAX)
        self._serving: set[asyncio.Task[None]] = set()
        self._streams: WeakSet[_Stream] = WeakSet()
        self._supervisor: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        seed: bytes,
        folder: Path,
        host: str = "0.0.0.0",
        port: int = 0,
        *,
        budget: UploadBudget | None = None,
        announce: Iterable[str] = (),
        posture: Posture | None = None,
        on_restart: RestartListener | None = None,
    ) -> Self:
        """Start a daemon with the identity of `seed` (32 bytes, Ed25519); 0.2-0.5 s.

        `folder` keeps the daemon's key file and the port, so that a restarted peer is found where
        it was. `port` 0 means the port of last time, or any. `announce` replaces the addresses
        that others are told; give it together with `port`. `posture`: see `daemon.Posture`.

        Raises:
            NetworkError: the given port is taken, or the daemon does not start.
        """
        transport = cls(
            Signer(seed),
            folder,
            host=host,
            port=port,
            budget=budget or UploadBudget(),
            announce=tuple(announce),
            posture=posture or Posture(),
        )
        if on_restart is not None:
            transport.restart_listeners.append(on_restart)
        sweep_sockets()
        try:
            await transport._start_daemon()
        except (P2PDaemonError, TransportError, OSError, EOFError) as error:
            raise NetworkError(
                f"the network daemon does not start ({error}); check that {daemon_path()} can be "
                "executed here and that --host names an address of this machine"
            ) from None
        transport._supervisor = asyncio.create_task(transport._supervise(), name="p2pd supervisor")
        return transport

    # ── transport.Transport ──────────────────────────────────────────────────────────────

    def serve(self, on_call: CallHandler, on_stream: StreamHandler) -> None:
        self._on_call = on_call
        self._on_stream = on_stream

    def serve_beneath(self, prefix: bytes, on_call: CallHandler) -> None:
        """Calls that begin with `prefix` are `on_call`'s, whoever serves the others, or nobody."""
        self._beneath = (prefix, on_call)

    def addresses(self) -> list[str]:
        return list(self._addresses)

    async def connect(self, address: str, timeout_s: float) -> PeerId:
        peer = peer_of(address)
        if peer == self.peer_id:
            raise TransportError(peer, "that address is this peer's own")
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + timeout_s
        while True:
            p2p = self.p2p
            try:
                await self._dial(peer, [address], max(give_up_s - loop.time(), 0.01))
                break
            except TransportError:
                if p2p is not None and p2p is self.p2p:
                    raise
                # A daemon with another posture takes the place of the one that was to dial.
                if not await self._daemon_runs(give_up_s):
                    raise
        self.remember(peer, [address])
        return peer

    async def call(self, peer: PeerId, request: bytes, timeout_s: float) -> bytes:
        check_request(request)
        self.budget.charge(len(request))
        try:
            async with asyncio.timeout(timeout_s):
                await self._reach(peer, timeout_s)
                coded = await self._client().call_unary_handler(libp2p_id(peer), CALL, request)
        except TimeoutError:
            self._connected.discard(peer)
            raise gone(peer, timeout_s) from None
        except (P2PDaemonError, P2PHandlerError, OSError) as error:
            self._connected.discard(peer)
            raise TransportError(peer, _short(error)) from None
        self._connected.add(peer)
        self.budget.received(len(coded))
        return read_answer(peer, coded)

    async def open(self, peer: PeerId, timeout_s: float) -> Stream:
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.STREAM_OPEN,
            streamOpen=p2pd_pb2.StreamOpenRequest(peer=libp2p_id(peer).to_bytes(), proto=[BULK]),
        )
        try:
            async with asyncio.timeout(timeout_s):
                await self._reach(peer, timeout_s)
                reader, writer = await self._ask(peer, request)
        except TimeoutError:
            self._connected.discard(peer)
            raise gone(peer, timeout_s) from None
        self._connected.add(peer)
        return await self._stream(peer, reader, writer, opened_here=True)

    async def close(self) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor})
        for task in self._serving:
            task.cancel()
        if self._serving:
            await asyncio.wait(self._serving, timeout=STOP_TIMEOUT_S)
        await self._stop_daemon("closed")
        self._runs.set()

    # ── beyond the interface ─────────────────────────────────────────────────────────────

    def remember(self, peer: PeerId, addresses: Iterable[str]) -> None:
        """Where to dial `peer` when it is not connected, e.g. from its DHT record."""
        good = [a for a in addresses if is_address_of(a, peer)][: limits.ADDRESSES_MAX]
        if not good or peer == self.peer_id:
            return
        known = self._known.pop(peer, [])
        self._known[peer] = list(dict.fromkeys(good + known))[: limits.ADDRESSES_MAX]
        while len(self._known) > limits.KNOWN_PEERS_MAX:
            self._known.popitem(last=False)

    @property
    def port(self) -> int:
        """Where the daemon listens; 0: not known."""
        return self._port

    async def change(self, posture: Posture) -> None:
        """Another daemon with this posture in place of the one that runs; 0.3-0.6 s.

        Streams and calls break off as where a daemon dies; connections are made again.
        """
        self.posture = posture
        self._restarted.clear()
        self._changed.set()
        await self._restarted.wait()

    async def connected(self) -> list[PeerId]:
        """Peers to which there is a connection now; none if the daemon does not say."""
        return list(await self.connections())

    async def connections(self) -> dict[PeerId, list[str]]:
        """Peers to which there are connections now, and the far ends of these as multiaddresses
        (of ours or theirs, without /p2p/ID; relayed ones contain /p2p-circuit); none if the
        daemon does not say."""
        try:
            async with asyncio.timeout(limits.CALL_TIMEOUT_S):
                return await self._peers(self.peer_id)
        except (TransportError, TimeoutError):
            return {}

    async def _peers(self, named: PeerId) -> dict[PeerId, list[str]]:
        """`connections`; TransportError that names `named` if the daemon does not say."""
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS)
        response = await self._tell(named, request)
        found: dict[PeerId, list[str]] = {}
        for peer in response.peers:
            ends = found.setdefault(PeerId(str(PeerID(peer.id))), [])
            ends += [read(raw) for raw in peer.addrs]
        return found

    async def dial(self, peer: PeerId, addresses: Iterable[str], timeout_s: float) -> None:
        """Connect to `peer` at any of these multiaddresses, or of those that the daemon knows.

        Where there is a connection already, it is left as it is.

        Raises:
            TransportError: it is at none of them.
            ValueError: one is no multiaddress.
        """
        named = [a if "/p2p/" in a else f"{a}/p2p/{peer}" for a in addresses]
        await self._dial(peer, named, timeout_s)

    async def disconnect(self, peer: PeerId) -> None:
        """Close all connections to `peer`, and what goes over them."""
        self._connected.discard(peer)
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.DISCONNECT,
            disconnect=p2pd_pb2.DisconnectRequest(peer=libp2p_id(peer).to_bytes()),
        )
        with contextlib.suppress(TransportError, TimeoutError):
            async with asyncio.timeout(limits.CALL_TIMEOUT_S):
                await self._tell(peer, request)

    def streams_with(self, peer: PeerId) -> int:
        """Streams with `peer`, opened by either side, that nobody has closed."""
        return sum(stream.peer == peer and stream.is_open for stream in self._streams)

    def is_connected(self, peer: PeerId) -> bool:
        """Whether `peer` answered and has not failed since."""
        return peer in self._connected

    def known(self, peer: PeerId) -> list[str]:
        """The addresses of `peer` that were remembered."""
        return list(self._known.get(peer, ()))

    # ── outgoing ─────────────────────────────────────────────────────────────────────────

    async def _reach(self, peer: PeerId, timeout_s: float) -> None:
        """Dial `peer` where we know how; else libp2p's own routing has to find it."""
        if peer not in self._connected and peer in self._known:
            self._known.move_to_end(peer)
            await self._dial(peer, self._known[peer], timeout_s)

    async def _dial(self, peer: PeerId, addresses: list[str], timeout_s: float) -> None:
        """Connect, and see that there is a connection.

        While the daemon dials a peer for anybody (its DHT, a request given up here), everybody's
        dials to that peer are one, and that one ends with the connection that it once made, also
        when that has been closed since. It lasts as long as an address that does not answer is
        waited for, 5 to 15 s; until then only the peer's own dial to us makes a connection.
        """
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.CONNECT,
            connect=p2pd_pb2.ConnectRequest(
                peer=libp2p_id(peer).to_bytes(), addrs=[dial_bytes(a) for a in addresses]
            ),
        )
        try:
            async with asyncio.timeout(timeout_s):
                await self._tell(peer, request)
                there = peer in await self._peers(peer)
        except TimeoutError:
            raise gone(peer, timeout_s) from None
        if not there:
            self._connected.discard(peer)
            raise TransportError(peer, "the network daemon takes a closed connection for a new one")
        self._connected.add(peer)

    async def _daemon_runs(self, give_up_s: float) -> bool:
        """Wait for the daemon that takes another one's place; whether there is one then."""
        try:
            async with asyncio.timeout_at(give_up_s):
                await self._runs.wait()
        except TimeoutError:
            return False
        return self.p2p is not None

    def _client(self) -> Any:
        if self.p2p is None:
            raise P2PDaemonError("the network daemon is being restarted")
        return self.p2p._client

    async def _tell(self, peer: PeerId, request: Any) -> Any:
        """One request to the daemon on a connection of its own, and its response."""
        response = p2pd_pb2.Response()
        _, writer = await self._ask(peer, request, response)
        writer.close()
        return response

    async def _ask(
        self, peer: PeerId, request: Any, response: Any = None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        response = p2pd_pb2.Response() if response is None else response
        writer: asyncio.StreamWriter | None = None
        try:
            connector = self._client().control.daemon_connector
            reader, writer = await connector.open_connection()
            await write_pbmsg(writer, request)
            await read_pbmsg_safe(reader, response)
            if response.type == p2pd_pb2.Response.ERROR:
                raise P2PDaemonError(response.error.msg)
        except (P2PDaemonError, OSError, EOFError) as error:
            _abort(writer)
            self._connected.discard(peer)
            raise TransportError(peer, _short(error)) from None
        except asyncio.CancelledError:
            _abort(writer)
            raise
        return reader, writer

    async def _stream(
        self,
        peer: PeerId,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        opened_here: bool,
    ) -> _Stream:
        pipe = await SocketPipe.take_over(reader, writer)
        stream = _Stream(pipe, peer, self.budget, opened_here=opened_here)
        self._streams.add(stream)
        return stream

    # ── incoming ─────────────────────────────────────────────────────────────────────────

    async def _on_unary(self, request: bytes, sender: Any) -> bytes:
        peer = PeerId(str(sender))
        self.budget.received(len(request))
        handler = self._on_call
        if self._beneath is not None and request.startswith(self._beneath[0]):
            handler = self._beneath[1]
        coded = await answer(handler, self._call_slots, peer, request)
        self.budget.charge(len(coded))
        return coded

    async def _on_inbound(
        self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        peer = PeerId(str(info.peer_id))
        stream = await self._stream(peer, reader, writer, opened_here=False)
        task = asyncio.create_task(
            serve_stream(stream, self._on_stream, self.stream_slots), name=f"stream from {peer}"
        )
        self._serving.add(task)
        task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        report(task)

    # ── the daemon's life ────────────────────────────────────────────────────────────────

    async def _start_daemon(self) -> None:
        if self._port and not port_is_free(self._host, self._port):
            if self._port_is_given:
                raise NetworkError(
                    f"port {self._port} is taken; choose another with --port, or stop the program "
                    "that holds it"
                )
            self._port = 0
        p2p = await daemon.launch(
            self._key_file, self._host, self._port, self._announce, self.posture
        )
        try:
            control = p2p._client.control
            control._pending_calls = daemon.Pending(control._pending_calls)
            if str(p2p.peer_id) != self.peer_id:
                raise P2PDaemonError(f"the daemon calls itself {p2p.peer_id}")
            await p2p._client.add_unary_handler(CALL, self._on_unary)
            await p2p.add_binary_stream_handler(BULK, self._on_inbound)
            self.p2p = p2p
            await self.refresh_addresses()
        except BaseException:  # cancelled, too: the daemon must not outlive us
            self.p2p = None
            await daemon.stop(p2p, "start failed")
            raise
        self._remember_port()
        self._runs.set()

    def _remember_port(self) -> None:
        ports = [m[1] for a in self._addresses if (m := re.search(r"/tcp/(\d+)/p2p/", a))]
        if ports and not self._port and not self._announce:
            self._port = int(ports[0])
            remember_port(self._folder, self._port)

    async def refresh_addresses(self) -> None:
        """Ask the daemon under which addresses it is known.

        Raises:
            TransportError, TimeoutError: it does not say.
        """
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY)
        async with asyncio.timeout(limits.CALL_TIMEOUT_S):
            response = await self._tell(self.peer_id, request)
        found = [a for raw in response.identify.addrs if (a := read(raw))]
        found.sort(key=lambda a: a.startswith(("/ip4/127.", "/ip6/::1/")))
        self._addresses = [f"{a}/p2p/{self.peer_id}" for a in found][: limits.ADDRESSES_MAX]

    async def _supervise(self) -> None:
        while True:
            reason = await self._daemon_death()
            died_s = time.monotonic()
            if reason != CHANGED:
                _log.warning("network daemon: %s; starting it again", reason)
            peers = [(p, self._known[p]) for p in self._connected if p in self._known]
            await self._stop_daemon(reason)
            for attempt in range(sys.maxsize):
                await asyncio.sleep(RESTART_WAITS_S[min(attempt, len(RESTART_WAITS_S) - 1)])
                self._changed.clear()  # the posture of this moment is what it gets
                try:
                    await self._start_daemon()
                    break
                except (P2PDaemonError, NetworkError, TransportError, OSError, EOFError) as error:
                    _log.warning("the network daemon does not start: %s", error)
            for listener in self.restart_listeners:
                listener(reason, time.monotonic() - died_s, self.p2p)
            if not self._changed.is_set():
                self._restarted.set()
            await asyncio.gather(*(self._redial(peer, where) for peer, where in peers))

    async def _daemon_death(self) -> str:
        """Wait until the daemon, or a task without which it is of no use, has ended."""
        p2p = self.p2p
        control = p2p._client.control
        child = asyncio.ensure_future(p2p._child.wait())
        changed = asyncio.ensure_future(self._changed.wait())
        try:
            while True:
                done, _ = await asyncio.wait(
                    {child, changed, control._read_task, control._write_task, p2p._listen_task},
                    timeout=ADDRESSES_REFRESH_S,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if done:
                    break
                with contextlib.suppress(TransportError, TimeoutError):
                    await self.refresh_addresses()
            if changed in done:
                return CHANGED
            # The connection breaks a moment before the exit status is there.
            await asyncio.wait({child}, timeout=0.1)
            return f"ended with status {child.result()}" if child.done() else "stopped talking"
        finally:
            child.cancel()
            changed.cancel()

    async def _redial(self, peer: PeerId, addresses: list[str]) -> None:
        with contextlib.suppress(TransportError):
            await self._dial(peer, addresses, RECONNECT_TIMEOUT_S)

    async def _stop_daemon(self, reason: str) -> None:
        p2p, self.p2p = self.p2p, None
        self._runs.clear()
        self._connected.clear()
        for stream in list(self._streams):
            stream.abort(f"network daemon: {reason}")
        if p2p is not None:
            await daemon.stop(p2p, reason)


class _Stream(FramedStream):
    """A stream of the daemon's."""

    @property
    def is_open(self) -> bool:
        return not self._broken


def _short(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[: limits.TEXT_CHARS_MAX]


def _abort(writer: asyncio.StreamWriter | None) -> None:
    if writer is not None:
        writer.transport.abort()
