"""Peers on the hosts of a laboratory, all in this process: a thread and an event loop for each.

The sockets and processes that a thread makes are its host's. What is done with a peer is done in
its own loop: `peer.do(...)` waits for it, `peer.begin(...)` does not.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from peer.net.ladder import LadderTransport
from peer.net.laned import LanedTransport
from peer.net.multiaddress import is_relayed
from peer.net.outside import Verdict
from peer.net.transport import TransportError
from protocols.identity import Signer
from protocols.types import PeerId
from tests.net.peers import ECHO, backwards, echo
from tests.netlab import LabHost

T = TypeVar("T")

PORT: Final = 4001
LANE_PORT: Final = 4002
WAIT_S: Final = 60.0  # of a busy machine's; the promises are measured by the bench


class LabPeer:
    """`with LabPeer(host, folder) as peer:` starts one: the ladder, and the lane on it."""

    def __init__(
        self, host: LabHost, folder: Path, *, port: int = PORT, relay: bool = False,
        lane: bool = True,
    ) -> None:  # fmt: skip
        self.host = host
        self.name = host.name
        self.said: list[str] = []
        self._folder = folder / host.name
        self._port, self._relay, self._lane = port, relay, lane
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=host.name, daemon=True)
        self._up = threading.Event()
        self._closed = False
        self.transport: LanedTransport

    @property
    def ladder(self) -> LadderTransport:
        inner = self.transport.inner
        assert isinstance(inner, LadderTransport)
        return inner

    @property
    def id(self) -> PeerId:
        return self.transport.peer_id

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        self._up.wait()
        self.do(self._start)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it; harmless when it has ended."""
        if self._closed:
            return
        self._closed = True
        try:
            if hasattr(self, "transport"):
                self.do(self.transport.close)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(WAIT_S)

    def _run(self) -> None:
        with self.host.inside():
            asyncio.set_event_loop(self._loop)
            self._loop.call_soon(self._up.set)
            self._loop.run_forever()
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    async def _start(self) -> None:
        seed = hashlib.sha256(self.name.encode()).digest()
        ladder = await LadderTransport.start(
            seed, self._folder, port=self._port, relay=self._relay,
            tell=lambda level, text: self.said.append(f"{level}: {text}"),
        )  # fmt: skip
        self.transport = await LanedTransport.start(
            ladder, Signer(seed), self._folder, port=LANE_PORT, enabled=self._lane
        )
        self.transport.serve(backwards, echo)

    # ── what tests do with it ────────────────────────────────────────────────────────────

    def begin(self, work: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work(*arguments), self._loop)

    def do(self, work: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> T:
        return self.begin(work, *arguments).result(WAIT_S)

    def addresses(self) -> list[str]:
        return self.transport.addresses()

    def public_address(self) -> str:
        """Where an open host is dialled."""
        return f"/ip4/{self.host.public_address}/tcp/{self._port}/p2p/{self.id}"

    def meets(self, other: LabPeer) -> None:
        """As if the other one's record had been read."""
        self.do(self._remember, other.id, other.addresses())

    async def _remember(self, peer: PeerId, addresses: list[str]) -> None:
        self.transport.remember(peer, addresses)

    async def talk(self, peer: PeerId, payload: bytes = bytes(2**20)) -> tuple[float, float]:
        """Seconds until a call was answered, and from then until a stream had brought back what it
        carried there."""
        begun_s = time.monotonic()
        assert await self.transport.call(peer, b"abc", 15.0) == b"cba"
        answered_s = time.monotonic()
        stream = await self.transport.open(peer, 15.0)
        await stream.send(ECHO, payload)
        frame = await stream.receive(len(payload))
        assert frame is not None
        assert frame.payload == payload
        await stream.finish()
        await stream.close()
        return answered_s - begun_s, time.monotonic() - answered_s

    def way_to(self, other: LabPeer) -> str:
        """`direct`, `relayed` or `none`."""
        ends = self.do(self.ladder.inner.connections).get(other.id, [])
        if not ends:
            return "none"
        return "relayed" if all(map(is_relayed, ends)) else "direct"

    def keep_talking(self, other: LabPeer, payload: bytes) -> float:
        """Until it goes again; the seconds that it took."""
        begun_s = time.monotonic()
        while True:
            try:
                self.do(self.talk, other.id, payload)
                return time.monotonic() - begun_s
            except TransportError:
                if time.monotonic() > begun_s + WAIT_S:
                    raise

    def kill_daemon(self) -> None:
        """The host goes dark: its daemon dies, and none takes its place."""
        inner = self.ladder.inner
        assert inner._supervisor is not None
        self._loop.call_soon_threadsafe(inner._supervisor.cancel)
        os.kill(inner.p2p._child.pid, signal.SIGKILL)

    def until_relaying(self) -> float:
        return self.until(lambda: self.ladder.outside.standing.relaying, "relaying")

    def until_settled(self) -> float:
        """It knows whether it can be reached, and through whom if not."""
        outside = self.ladder.outside

        def settled() -> bool:
            known = outside.standing.verdict is not Verdict.UNKNOWN
            return known and (outside.reachable or bool(outside.relays()))

        return self.until(settled, "being reached")

    def until_direct(self, other: LabPeer) -> float:
        return self.until(lambda: self.way_to(other) == "direct", f"a direct way to {other.name}")

    def until_lanes_failed(self, reasons: dict[str, int]) -> float:
        return self.until(lambda: self.transport.counters.failed == reasons, f"lanes: {reasons}")

    def until_through(self, relays: set[PeerId]) -> float:
        return self.until(lambda: set(self.ladder.outside.relays()) == relays, "its relays")

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> float:
        """Wait for what happens by itself; the seconds that it took."""
        begun_s = time.monotonic()
        while not condition():
            assert time.monotonic() < begun_s + timeout_s, f"{self.name}: {what}; {self.said}"
            time.sleep(0.02)
        return time.monotonic() - begun_s


def start_all(peers: list[LabPeer], stack: ExitStack) -> None:
    """All at once."""
    threads = [threading.Thread(target=peer.__enter__) for peer in peers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for peer in peers:
        stack.push(peer)


def settle(relays: list[LabPeer], peers: list[LabPeer]) -> dict[str, float]:
    """Relays that relay, the others met through the first; peers that know how they are reached.

    The seconds from each peer's first connection until then.
    """
    for relay in relays:
        relay.until_relaying()
    for relay in relays[1:]:
        relay.do(relay.transport.connect, relays[0].public_address(), 15.0)
        relay.until_settled()
    begun_s = time.monotonic()
    took = {}
    meetings = [
        peer.begin(peer.transport.connect, relays[0].public_address(), 15.0) for peer in peers
    ]
    for peer, meeting in zip(peers, meetings, strict=True):
        meeting.result(WAIT_S)
        peer.until_settled()
        took[peer.name] = time.monotonic() - begun_s
    return took
