"""A transport that climbs: direct, past routers, through a relay, whatever leads to a peer.

Around libp2p's. Who can't be reached from outside is found out, and gets relays (`outside`); pairs
that talk through a relay look for a shorter way (`ways`); everybody helps the others with both
(`reach_helper`). Those whom a peer reaches itself talk to it over that same connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Self

from peer.net.budget import UploadBudget
from peer.net.calls import report
from peer.net.libp2p import Libp2pTransport, RestartListener
from peer.net.multiaddress import is_relayed, place_of
from peer.net.outside import WATCH_S, Outside, Told, Verdict, remembered
from peer.net.reach import ASK
from peer.net.reach_helper import ReachHelper, seen_at
from peer.net.relays import RelayTable
from peer.net.transport import CallHandler, Stream, StreamHandler, TransportError
from peer.net.ways import Ways
from protocols.types import PeerId

LOCAL: Final = ("127.0.0.1", "::1", "localhost")
"""Listening there, nobody is outside."""
RETRY_S_MIN: Final = 0.5  # with less left, another try is in vain
RETRY_S: Final = 0.3  # between the tries after the second
TRIES_MAX_NOWHERE: Final = 4  # for a stream to a peer of which no address is known: it must come


class LadderTransport:
    """`transport.Transport` over libp2p's. Build it with `start`."""

    def __init__(
        self, inner: Libp2pTransport, folder: Path, host: str, *, relay: bool, tell: Told
    ) -> None:
        self.peer_id = inner.peer_id
        self.inner = inner
        self.budget = inner.budget
        self.stream_slots = inner.stream_slots
        table = RelayTable()
        self.outside = Outside(inner, table, folder, host, relay, tell)
        self.ways = Ways(
            inner, host, lambda: self.outside.reachable, lambda text: tell("debug", text)
        )
        self._helper = ReachHelper(
            inner, table, self.outside.own_relay, self.ways.meet, self.ways.agree
        )
        self._tasks: list[asyncio.Task[None]] = []

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
        relay: bool = False,
        on_restart: RestartListener | None = None,
        tell: Told = lambda level, text: None,
    ) -> Self:
        """See `Libp2pTransport.start`. `relay`: offer to forward for others; `tell` hears what
        the owner should know of being reached.

        Raises:
            NetworkError: the given port is taken, or the daemon does not start.
        """
        posture = await asyncio.to_thread(remembered, folder, relays=relay)
        inner = await Libp2pTransport.start(
            seed, folder, host, port,
            budget=budget, announce=announce, posture=posture, on_restart=on_restart,
        )  # fmt: skip
        self = cls(inner, folder, host, relay=relay, tell=tell)
        if posture.private:
            self.outside.standing.verdict = Verdict.UNREACHABLE
        inner.serve_beneath(ASK, self._helper.answer)  # also while this peer is only starting
        if host not in LOCAL:
            self._tasks.append(asyncio.create_task(self.outside.keep(), name="reachability"))
            self._tasks.append(asyncio.create_task(self._tend(), name="ways"))
            for task in self._tasks:
                task.add_done_callback(report)
        return self

    @property
    def reachable(self) -> bool:
        """Whether others can dial this peer, as far as is known."""
        return self.outside.reachable

    def reach_status(self) -> dict[str, Any]:
        """What `peer status` shows of being reached: plain JSON values."""
        standing = self.outside.standing
        return {
            "verdict": str(standing.verdict),
            "seen_at": list(standing.seen_at),
            "symmetric": standing.symmetric,
            "through": list(self.outside.relays()),
            "relaying": standing.relaying,
            "not_relaying": standing.not_relaying,
            "relayed": self.ways.relayed(),
        }

    async def lane_addresses(self, peer: PeerId) -> list[str]:
        """Where `peer` may dial this machine's other ports: nowhere, if it is outside and we can't
        be reached from there, so that it does not try."""
        own = self.inner.addresses()
        if self.reachable:
            return own
        place = seen_at(await self.inner.connections(), peer)
        near = {network_of(found[0]) for a in own if (found := place_of(a)) is not None}
        return own if place is not None and network_of(place[0]) in near - {None} else []

    # ── transport.Transport ──────────────────────────────────────────────────────────────

    def serve(self, on_call: CallHandler, on_stream: StreamHandler) -> None:
        async def answered(sender: PeerId, request: bytes) -> bytes:
            with self.ways.talking(sender):
                return await on_call(sender, request)

        self.inner.serve(answered, on_stream)

    def addresses(self) -> list[str]:
        """Those that lead here: relayed ones first where nobody dials us."""
        own = self.inner.addresses()
        return own if self.reachable else sorted(own, key=lambda a: not is_relayed(a))

    async def connect(self, address: str, timeout_s: float) -> PeerId:
        peer = await self.inner.connect(address, timeout_s)
        if not is_relayed(address):
            self.outside.reached(peer)
        return peer

    async def call(self, peer: PeerId, request: bytes, timeout_s: float) -> bytes:
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + timeout_s
        await self.ways.ready(peer, timeout_s)
        try:
            with self.ways.talking(peer):
                return await self.inner.call(peer, request, max(give_up_s - loop.time(), 0.01))
        except TransportError:
            self.ways.lost(peer)
            raise

    async def open(self, peer: PeerId, timeout_s: float) -> Stream:
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + timeout_s
        for tries in itertools.count(1):
            try:
                await self.ways.ready(peer, give_up_s - loop.time(), bulk=True)
                with self.ways.talking(peer):
                    return await self.inner.open(peer, max(give_up_s - loop.time(), 0.01))
            except TransportError:
                self.ways.lost(peer)
                nowhere = tries >= TRIES_MAX_NOWHERE and not self.inner.known(peer)
                if nowhere or loop.time() >= give_up_s - RETRY_S_MIN:
                    raise
                # Nothing was sent yet, and a relay that is gone is known as such only now; one that
                # is busy, or a way that is just being made, serves a moment or some seconds later.
                if tries > 1:
                    await asyncio.sleep(RETRY_S)
        raise AssertionError("unreachable")

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self.ways.close()
        await self.inner.close()

    # ── beyond the interface ─────────────────────────────────────────────────────────────

    def __getattr__(self, name: str) -> Any:
        """`remember`, `p2p` and whatever else libp2p's transport has to offer."""
        if name.startswith("_") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    async def _tend(self) -> None:
        """Connections come and go, and the daemon does not tell of it."""
        while True:
            await asyncio.sleep(WATCH_S)
            with contextlib.suppress(TransportError, TimeoutError):
                self.ways.tend(await self.inner.connections())


def network_of(host: str) -> str | None:
    """The network that a private address belongs to, as far as anybody can tell, else None."""
    ip = ipaddress.ip_address(host)
    if ip.is_global:
        return None
    return str(ipaddress.ip_network(f"{host}/{24 if ip.version == 4 else 64}", strict=False))
