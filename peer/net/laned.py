"""A transport whose streams take the bulk lane wherever there is one.

Around any other transport: calls, addresses and whatever has no lane are that one's. Both ends
need not agree: who has no lane says so when it is asked, and gets its streams as before.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol, Self

from peer.net.budget import UploadBudget
from peer.net.calls import Slots
from peer.net.ladder import LadderTransport
from peer.net.lane import ASK, write_offer
from peer.net.lane_counters import LaneCounters
from peer.net.lane_dialer import LaneDialer
from peer.net.lane_server import LaneServer, listen
from peer.net.p2pd import remember_port, remembered_port
from peer.net.pacing import Line
from peer.net.tls import contexts
from peer.net.tls_pipe import congestion_control
from peer.net.transport import CallHandler, Stream, StreamHandler, Transport
from protocols.identity import Signer
from protocols.types import PeerId

PORT_FILE: Final = "lane-port"

Told = Callable[[PeerId, str], None]
"""(peer, reason)."""


class SlottedTransport(Transport, Protocol):
    """A transport that shares its caps."""

    budget: UploadBudget
    stream_slots: Slots
    """Streams from others, in all and each."""


class LanedTransport:
    """`transport.Transport` over another one, with lanes. Build it with `start`."""

    def __init__(
        self, inner: SlottedTransport, server: LaneServer | None, dialer: LaneDialer | None,
        counters: LaneCounters,
    ) -> None:  # fmt: skip
        self.peer_id = inner.peer_id
        self.inner = inner
        self.counters = counters
        self.before: Callable[[CallHandler], CallHandler] = lambda on_call: on_call
        """What else answers calls, in front of the handler that is served."""
        self._server = server
        self._dialer = dialer

    @classmethod
    async def start(
        cls,
        inner: SlottedTransport,
        signer: Signer,
        folder: Path,
        host: str = "0.0.0.0",
        port: int = 0,
        *,
        enabled: bool = True,
        on_failed: Told = lambda peer, reason: None,
        on_refused: Told = lambda peer, reason: None,
    ) -> Self:
        """Listen for lanes beside `inner`, which this transport closes.

        `port` 0 means the port of last time, kept in `folder`, or any. Not `enabled`: others who
        ask are told that there are none here.

        Raises:
            NetworkError: the given port is taken, or `host` is not this machine's.
            StorageError: `folder` can't be written.
        """
        counters, line = LaneCounters(), Line()
        if not enabled:
            return cls(inner, None, None, counters)
        listens, dials = contexts(signer, folder)
        found = port or remembered_port(folder, PORT_FILE)
        listener = listen(
            "127.0.0.1" if host == "localhost" else host, found, port_is_given=port != 0
        )
        server = LaneServer(
            listener, listens, inner.budget, inner.stream_slots, counters, on_refused, line
        )
        remember_port(folder, server.port, PORT_FILE)
        dialer = LaneDialer(
            inner.peer_id, dials, inner.budget, counters, inner.call, on_failed, on_refused,
            line,
        )  # fmt: skip
        return cls(inner, server, dialer, counters)

    @property
    def port(self) -> int:
        """Where this peer listens for lanes; 0: nowhere."""
        return 0 if self._server is None else self._server.port

    def status(self) -> dict[str, Any]:
        """What `peer status` shows of lanes: plain JSON values."""
        return {
            "port": self.port,
            "congestion_control": congestion_control(),
            "to": {} if self._dialer is None else dict(self._dialer.lanes()),
            **self.counters.plain(),
        }

    # ── transport.Transport ──────────────────────────────────────────────────────────────

    def serve(self, on_call: CallHandler, on_stream: StreamHandler) -> None:
        async def answered(sender: PeerId, request: bytes) -> bytes:
            return await self._offer(sender) if request == ASK else await on_call(sender, request)

        self.inner.serve(self.before(answered), on_stream)
        if self._server is not None:
            self._server.on_stream = on_stream

    def addresses(self) -> list[str]:
        return self.inner.addresses()

    async def connect(self, address: str, timeout_s: float) -> PeerId:
        return await self.inner.connect(address, timeout_s)

    async def call(self, peer: PeerId, request: bytes, timeout_s: float) -> bytes:
        return await self.inner.call(peer, request, timeout_s)

    async def open(self, peer: PeerId, timeout_s: float) -> Stream:
        if self._dialer is not None:
            stream = await self._dialer.open(peer, timeout_s)
            if stream is not None:
                self.counters.opened["lane"] += 1
                return stream
        opened = await self.inner.open(peer, timeout_s)
        self.counters.opened["libp2p"] += 1
        return opened

    async def close(self) -> None:
        if self._dialer is not None:
            await self._dialer.close()
        if self._server is not None:
            await self._server.close()
        await self.inner.close()

    # ── beyond the interface ─────────────────────────────────────────────────────────────

    def __getattr__(self, name: str) -> Any:
        """`remember` and whatever else the transport inside has to offer."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    async def _offer(self, sender: PeerId) -> bytes:
        if self._server is None:
            return write_offer(0, [])
        addresses = self.inner.addresses()
        if isinstance(self.inner, LadderTransport):  # it knows who would dial in vain
            addresses = await self.inner.lane_addresses(sender)
        if not addresses:
            return write_offer(0, [])
        self._server.admit(sender)
        return write_offer(self._server.port, addresses)
