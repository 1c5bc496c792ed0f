"""The transport between machines: libp2p, through hivemind's daemon `p2pd`.

The daemon is a child process that holds the key, the connections and the NAT traversal; we speak
to it over unix sockets. Calls are its unary handlers, streams its raw streams with our framing.
The daemon may die: then everything pending fails at once and a new one takes its place with the
same identity and port.

hivemind 1.1.12 has traits that shape this module: a dead daemon leaves its callers waiting for
ever; a call that is cancelled while its answer arrives kills the reader of all answers; a circuit
address is encoded in a way that the daemon rejects; TCP only, as QUIC loses the end of streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, Self
from weakref import WeakSet

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import (
    P2PDaemonError,
    P2PHandlerError,
    read_pbmsg_safe,
    write_pbmsg,
)
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from peer.errors import NetworkError
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
from peer.net.p2pd import (
    daemon_path,
    port_is_free,
    remember_port,
    remembered_port,
    socket_prefix,
    sweep_sockets,
    write_key,
)
from peer.net.p2pd import unknown_daemon as unknown_daemon
from peer.net.pipe import SocketPipe
from peer.net.transport import CallHandler, Stream, StreamHandler, TransportError
from protocols import limits
from protocols.identity import Signer, public_key_of
from protocols.types import PeerId

CALL: Final = "murmuration/call/1"
BULK: Final = "murmuration/bulk/1"

RESTART_WAITS_S: Final = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0)  # then every 5 s
ADDRESSES_REFRESH_S: Final = 30.0  # NAT mappings and observed addresses turn up late
RECONNECT_TIMEOUT_S: Final = 5.0
STOP_TIMEOUT_S: Final = 3.0  # for a daemon that was asked to go

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
        relay: bool,
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
        self._relay = relay
        self._addresses: list[str] = []
        self._known: OrderedDict[PeerId, list[str]] = OrderedDict()
        """Where peers may be dialled, longest unused first."""
        self._connected: set[PeerId] = set()
        """Peers that answered and have not failed since: no need to dial them."""
        self._on_call: CallHandler | None = None
        self._on_stream: StreamHandler | None = None
        self._call_slots = Slots(CALLS_MAX, CALLS_PER_PEER_MAX)
        self._stream_slots = Slots(limits.STREAMS_MAX, limits.STREAMS_PER_PEER_MAX)
        self._serving: set[asyncio.Task[None]] = set()
        self._streams: WeakSet[FramedStream] = WeakSet()
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
        relay: bool = True,
        on_restart: RestartListener | None = None,
    ) -> Self:
        """Start a daemon with the identity of `seed` (32 bytes, Ed25519); 0.2-0.5 s.

        `folder` keeps the daemon's key file and the port, so that a restarted peer is found where
        it was. `port` 0 means the port of last time, or any. `announce` replaces the addresses
        that others are told; give it together with `port`.

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
            relay=relay,
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

    def addresses(self) -> list[str]:
        return list(self._addresses)

    async def connect(self, address: str, timeout_s: float) -> PeerId:
        peer = peer_of(address)
        if peer == self.peer_id:
            raise TransportError(peer, "that address is this peer's own")
        await self._dial(peer, [address], timeout_s)
        self.remember(peer, [address])
        return peer

    async def call(self, peer: PeerId, request: bytes, timeout_s: float) -> bytes:
        check_request(request)
        self.budget.charge(len(request))
        try:
            async with asyncio.timeout(timeout_s):
                await self._reach(peer, timeout_s)
                coded = await self._client().call_unary_handler(_id(peer), CALL, request)
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
            streamOpen=p2pd_pb2.StreamOpenRequest(peer=_id(peer).to_bytes(), proto=[BULK]),
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

    # ── beyond the interface ─────────────────────────────────────────────────────────────

    def remember(self, peer: PeerId, addresses: Iterable[str]) -> None:
        """Where to dial `peer` when it is not connected, e.g. from its DHT record."""
        good = [a for a in addresses if _is_address_of(a, peer)][: limits.ADDRESSES_MAX]
        if not good or peer == self.peer_id:
            return
        known = self._known.pop(peer, [])
        self._known[peer] = list(dict.fromkeys(good + known))[: limits.ADDRESSES_MAX]
        while len(self._known) > limits.KNOWN_PEERS_MAX:
            self._known.popitem(last=False)

    async def connected(self) -> list[PeerId]:
        """Peers to which there is a connection now; none if the daemon does not say."""
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS)
        try:
            async with asyncio.timeout(limits.CALL_TIMEOUT_S):
                response = await self._tell(self.peer_id, request)
        except (TransportError, TimeoutError):
            return []
        return [PeerId(str(PeerID(peer.id))) for peer in response.peers]

    # ── outgoing ─────────────────────────────────────────────────────────────────────────

    async def _reach(self, peer: PeerId, timeout_s: float) -> None:
        """Dial `peer` where we know how; else libp2p's own routing has to find it."""
        if peer not in self._connected and peer in self._known:
            self._known.move_to_end(peer)
            await self._dial(peer, self._known[peer], timeout_s)

    async def _dial(self, peer: PeerId, addresses: list[str], timeout_s: float) -> None:
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.CONNECT,
            connect=p2pd_pb2.ConnectRequest(
                peer=_id(peer).to_bytes(), addrs=[_dial_bytes(a) for a in addresses]
            ),
        )
        try:
            async with asyncio.timeout(timeout_s):
                await self._tell(peer, request)
        except TimeoutError:
            raise gone(peer, timeout_s) from None
        self._connected.add(peer)

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
    ) -> FramedStream:
        pipe = await SocketPipe.take_over(reader, writer)
        stream = FramedStream(pipe, peer, self.budget, opened_here=opened_here)
        self._streams.add(stream)
        return stream

    # ── incoming ─────────────────────────────────────────────────────────────────────────

    async def _on_unary(self, request: bytes, sender: Any) -> bytes:
        peer = PeerId(str(sender))
        self.budget.received(len(request))
        coded = await answer(self._on_call, self._call_slots, peer, request)
        self.budget.charge(len(coded))
        return coded

    async def _on_inbound(
        self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        peer = PeerId(str(info.peer_id))
        stream = await self._stream(peer, reader, writer, opened_here=False)
        task = asyncio.create_task(
            serve_stream(stream, self._on_stream, self._stream_slots), name=f"stream from {peer}"
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
        family = "ip6" if ":" in self._host else "ip4"
        local = self._host in ("127.0.0.1", "::1", "localhost")
        host = "127.0.0.1" if self._host == "localhost" else self._host
        made: list[Any] = []

        class Daemon(_Daemon):
            def __init__(self) -> None:
                super().__init__()
                made.append(self)  # `create` keeps it to itself where it fails

        creating = asyncio.ensure_future(
            Daemon.create(
                host_maddrs=[f"/{family}/{host}/tcp/{self._port}"],
                announce_maddrs=list(self._announce) or None,
                identity_path=str(self._key_file),
                check_if_identity_free=False,  # it parses RSA keys only
                auto_nat=not local,
                nat_port_map=not local,
                use_relay=self._relay,
            )
        )
        try:
            p2p = await asyncio.shield(creating)
        except asyncio.CancelledError:
            with contextlib.suppress(P2PDaemonError, OSError, EOFError):
                await _stop(await creating, "closed")  # cancelled half-way it would live on
            raise
        except (P2PDaemonError, OSError, EOFError):
            for daemon in made:
                if daemon._child is not None:  # reaped here, while the loop still runs
                    with contextlib.suppress(ProcessLookupError):
                        daemon._child.kill()
                    await daemon._child.wait()
            raise
        try:
            control = p2p._client.control
            control._pending_calls = _Pending(control._pending_calls)
            if str(p2p.peer_id) != self.peer_id:
                raise P2PDaemonError(f"the daemon calls itself {p2p.peer_id}")
            await p2p._client.add_unary_handler(CALL, self._on_unary)
            await p2p.add_binary_stream_handler(BULK, self._on_inbound)
            self.p2p = p2p
            await self._refresh_addresses()
        except BaseException:  # cancelled, too: the daemon must not outlive us
            self.p2p = None
            await _stop(p2p, "start failed")
            raise
        self._remember_port()

    def _remember_port(self) -> None:
        ports = [m[1] for a in self._addresses if (m := re.search(r"/tcp/(\d+)/p2p/", a))]
        if ports and not self._port and not self._announce:
            self._port = int(ports[0])
            remember_port(self._folder, self._port)

    async def _refresh_addresses(self) -> None:
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY)
        async with asyncio.timeout(limits.CALL_TIMEOUT_S):
            response = await self._tell(self.peer_id, request)
        found = [str(Multiaddr(raw)) for raw in response.identify.addrs]
        found.sort(key=lambda a: a.startswith(("/ip4/127.", "/ip6/::1/")))
        self._addresses = [f"{a}/p2p/{self.peer_id}" for a in found][: limits.ADDRESSES_MAX]

    async def _supervise(self) -> None:
        while True:
            reason = await self._daemon_death()
            died_s = time.monotonic()
            _log.warning("network daemon: %s; starting it again", reason)
            peers = [(p, self._known[p]) for p in self._connected if p in self._known]
            await self._stop_daemon(reason)
            for attempt in range(sys.maxsize):
                await asyncio.sleep(RESTART_WAITS_S[min(attempt, len(RESTART_WAITS_S) - 1)])
                try:
                    await self._start_daemon()
                    break
                except (P2PDaemonError, NetworkError, TransportError, OSError, EOFError) as error:
                    _log.warning("the network daemon does not start: %s", error)
            for listener in self.restart_listeners:
                listener(reason, time.monotonic() - died_s, self.p2p)
            await asyncio.gather(*(self._redial(peer, where) for peer, where in peers))

    async def _daemon_death(self) -> str:
        """Wait until the daemon, or a task without which it is of no use, has ended."""
        p2p = self.p2p
        control = p2p._client.control
        child = asyncio.ensure_future(p2p._child.wait())
        try:
            while True:
                done, _ = await asyncio.wait(
                    {child, control._read_task, control._write_task, p2p._listen_task},
                    timeout=ADDRESSES_REFRESH_S,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if done:
                    break
                with contextlib.suppress(TransportError, TimeoutError):
                    await self._refresh_addresses()
            # The connection breaks a moment before the exit status is there.
            await asyncio.wait({child}, timeout=0.1)
            return f"ended with status {child.result()}" if child.done() else "stopped talking"
        finally:
            child.cancel()

    async def _redial(self, peer: PeerId, addresses: list[str]) -> None:
        with contextlib.suppress(TransportError):
            await self._dial(peer, addresses, RECONNECT_TIMEOUT_S)

    async def _stop_daemon(self, reason: str) -> None:
        p2p, self.p2p = self.p2p, None
        self._connected.clear()
        for stream in list(self._streams):
            stream.abort(f"network daemon: {reason}")
        if p2p is not None:
            await _stop(p2p, reason)


class _Pending(dict[Any, Any]):
    """hivemind's table of calls, without those that were cancelled a moment ago.

    Its reader asks `id in table` and then sets the result, which on a cancelled future raises and
    ends the reader: from then on no call is ever answered.
    """

    def __contains__(self, key: object) -> bool:
        future = self.get(key)
        return future is not None and not future.done()


class _Daemon(P2P):  # type: ignore[misc]
    """p2pd in a session of its own, so that Ctrl-C in the terminal reaches only us."""

    _UNIX_SOCKET_PREFIX = "/unix" + socket_prefix()
    stopped = False

    def __del__(self) -> None:
        if not self.stopped:  # else there is nothing left to do, and this may run anywhere
            super().__del__()

    @staticmethod
    def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
        detach = "import os, sys; os.setsid(); os.execv(sys.argv[1], sys.argv[1:])"
        daemon: list[str] = P2P._make_process_args(*args, **kwargs)
        return [sys.executable, "-I", "-S", "-c", detach, *daemon]


async def _stop(p2p: Any, reason: str) -> None:
    """End a daemon, whatever state it is in, and everything that waits for it."""
    for future in list(p2p._client.control._pending_calls.values()):
        if not future.done():
            future.set_exception(P2PDaemonError(f"network daemon: {reason}"))
    p2p._terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await p2p._child.wait()
    except TimeoutError:
        p2p._child.kill()
        await p2p._child.wait()
    p2p.stopped = True
    control = p2p._client.control
    tasks = {p2p._reader_task, p2p._listen_task, control._read_task, control._write_task} - {None}
    done, _ = await asyncio.wait(tasks, timeout=STOP_TIMEOUT_S)
    for task in done:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.debug("network daemon: %r", error)  # a broken pipe: that is how it died
    for maddr in (p2p._daemon_listen_maddr, p2p._client_listen_maddr):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(maddr["unix"])  # noqa: PTH108 - a socket file in /tmp: nothing blocks


def peer_of(address: str) -> PeerId:
    """The peer id at the end of a multiaddress.

    Raises:
        ValueError: not a multiaddress that ends in /p2p/ID with an Ed25519 peer's id.
    """
    where, mark, name = address.rpartition("/p2p/")
    if not mark or not where.startswith("/") or len(address) > limits.ADDRESS_CHARS_MAX:
        raise ValueError(f"{address!r} is not an address like /ip4/192.0.2.7/tcp/31337/p2p/12D3...")
    peer = PeerId(name)
    public_key_of(peer)
    _dial_bytes(address)
    return peer


def _is_address_of(address: str, peer: PeerId) -> bool:
    try:
        return peer_of(address) == peer
    except ValueError:
        return False


def _dial_bytes(address: str) -> bytes:
    """The binary multiaddress without the last /p2p/ID.

    hivemind's own `Multiaddr.to_bytes` codes /p2p/ID as a CID where libp2p wants a multihash.
    """
    where, _, _ = address.rpartition("/p2p/")
    coded = b""
    for index, part in enumerate(re.split(r"/p2p/([^/]+)", where)):
        try:
            if index % 2:
                multihash = _id(PeerId(part)).to_bytes()
                coded += b"\xa5\x03" + bytes([len(multihash)]) + multihash
            elif part:
                coded += Multiaddr(part).to_bytes()
        except (ValueError, LookupError, TypeError, OSError) as error:
            raise ValueError(f"{address!r} is not a multiaddress ({error})") from None
    return coded


def _id(peer: PeerId) -> Any:
    return PeerID.from_base58(peer)


def _short(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[: limits.TEXT_CHARS_MAX]


def _abort(writer: asyncio.StreamWriter | None) -> None:
    if writer is not None:
        writer.transport.abort()
