"""A bootstrap node: a peer's identity, transport and DHT, and nothing that trains.

It holds other peers' records, answers their questions and relays for those that can't be reached.
Any peer does as much; a bootstrap node is there to have an address that stays.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from dht.directory import RunNotice
from dht.node import HivemindDirectory
from peer import finding
from peer.addresses import check_addresses
from peer.control import ControlServer
from peer.doctor.serve import ProbeServer, desk_of
from peer.errors import UsageError
from peer.exchange import NO, refuse
from peer.home import Seat, open_seat
from peer.net.ladder import LadderTransport
from peer.net.libp2p import CHANGED, unknown_daemon
from peer.net.network import teller
from peer.net.transport import Stream
from peer.observe import events as ev
from peer.observe.hub import Hub, plain
from peer.observe.jsonl import JsonlLog
from peer.observe.metrics import serve_http
from peer.observe.words import clean, plural
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.types import PeerId

SEAT: Final = "bootstrap"
REFUSAL: Final = "this is a bootstrap node: it holds records and relays, and trains nothing"
LOOK_S: Final = 5.0  # connections: one question to the daemon
LOOK_RUNS_S: Final = 30.0  # runs: a search in the DHT
REFUSALS_TOLD_MAX: Final = 20  # of strangers' calls; a peer with a wrong idea calls every second


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """What an operator decides."""

    home: Path | None = None
    """Where the identity lives; None: the user's data folder."""
    host: str = "0.0.0.0"
    """Address to listen on."""
    port: int = 31337
    """Port to listen on; 0: any free one, kept over restarts."""
    announce: tuple[str, ...] = ()
    """Addresses to tell others, if they differ from what this machine sees."""
    via: tuple[str, ...] = ()
    """Other bootstrap nodes or peers; remembered for the next start."""
    relay: bool = True
    """Forward traffic for peers that can't be reached directly."""
    metrics_host: str = "127.0.0.1"
    """Address for /metrics and /healthz."""
    metrics_port: int | None = 9100
    """Port for them (0: any); None: don't serve them."""


class Node:
    """A running bootstrap node. Made by `open_node`."""

    def __init__(
        self, seat: Seat, transport: LadderTransport, directory: HivemindDirectory
    ) -> None:
        self.seat = seat
        self.transport = transport
        self.directory = directory
        self.connected: list[PeerId] = []
        """Peers with a connection to this node, a moment ago."""
        self.runs: list[RunNotice] = []
        """Runs that are announced, half a minute ago."""
        self._begun_s = time.monotonic()
        self._asked = asyncio.Event()

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self._begun_s

    def leave(self) -> None:
        """Ask the node to stop; `open_node`'s block may end then."""
        self._asked.set()

    async def wait_left(self) -> None:
        """Until somebody asked it to stop."""
        await self._asked.wait()

    def health(self) -> dict[str, Any]:
        """What `/healthz` and `peer status` say: plain JSON values. Not ok: no network daemon."""
        return {
            "ok": self.transport.p2p is not None,
            "role": "bootstrap",
            "peer": self.transport.peer_id,
            "addresses": self.transport.addresses(),
            "reach": self.transport.reach_status(),
            "uptime_s": round(self.uptime_s, 1),
            "peers_connected": len(self.connected),
            "dht_nodes": self.directory.size(),
            "runs": plain(self.runs),
        }

    def summary(self) -> str:
        """One line for people."""
        runs = ", ".join(f"{clean(r.name)} ({plural(r.peers, 'peer')})" for r in self.runs)
        return (
            f"{plural(len(self.connected), 'peer')} connected,"
            f" {plural(self.directory.size(), 'DHT node')} known; runs: {runs or 'none yet'}"
        )


@asynccontextmanager
async def open_node(config: NodeConfig, hub: Hub) -> AsyncIterator[Node]:
    """Serve as a bootstrap node for the block's length.

    Raises:
        PeerError: perhaps in an ExceptionGroup; the port is taken, an address is none, ...
    """
    check_addresses(config.via)
    if config.port < 0 or config.port > 65535:
        raise UsageError(f"--port must be 0 to 65535 (got {config.port})")
    async with AsyncExitStack() as stack:
        seat = stack.enter_context(open_seat(config.home, SEAT))
        stack.callback(hub.listen(stack.enter_context(JsonlLog(seat.log_path, announce=hub.emit))))
        signer = seat.identity()
        for notice in seat.notices:
            hub.emit(ev.Notice("warning", notice))

        def restarted(reason: str, seconds: float, p2p: Any) -> None:
            if reason != CHANGED:  # that was our own wish, and is told by whoever wished it
                hub.emit(ev.DaemonRestarted(reason, seconds))

        transport = await LadderTransport.start(
            signer.seed, seat.folder, config.host, config.port, announce=config.announce,
            relay=config.relay, on_restart=restarted, tell=teller(hub.emit),
        )  # fmt: skip
        stack.push_async_callback(transport.close)
        strange = unknown_daemon()
        if strange is not None:
            hub.emit(ev.Notice("warning", strange))
        refusals = _Refusals(hub)
        directory = await HivemindDirectory.start(transport.inner, signer)
        stack.push_async_callback(directory.close)
        probes = ProbeServer(desk_of(transport, directory.size))
        transport.serve(probes.before(refusals.on_call), refusals.on_stream)
        node = Node(seat, transport, directory)
        if config.metrics_port is not None:
            page = serve_http(
                _registry(node), node.health, config.metrics_host, config.metrics_port
            )
            port = await stack.enter_async_context(page)
            where = f"http://{config.metrics_host}:{port}"
            hub.emit(ev.Notice("info", f"metrics at {where}/metrics, health at {where}/healthz"))
        await stack.enter_async_context(ControlServer(seat.control_path, _verbs(node)))
        connector = finding.Connector(
            transport, directory, hub.emit, lambda a: seat.remember(via=(a, *seat.memory.via))
        )
        others = dict.fromkeys((*config.via, *seat.memory.via))
        async with asyncio.TaskGroup() as tasks:
            chores = [
                tasks.create_task(connector.keep(address), name=f"via {address}")
                for address in others
                if address not in transport.addresses()
            ]
            chores.append(tasks.create_task(_keep_looking(node, hub), name="looking"))
            _announce(node, hub)
            try:
                yield node
            finally:
                for chore in chores:
                    chore.cancel()
                hub.emit(ev.Left("asked to stop" if node._asked.is_set() else "closing"))


class _Refusals:
    """Says no to whoever takes this node for a member, naming what it is."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._told = 0

    async def on_call(self, sender: PeerId, request: bytes) -> bytes:
        self._note(sender, "called")
        raise RemoteProtocolError(sender, REFUSAL)

    async def on_stream(self, stream: Stream) -> None:
        await stream.receive(limits.STREAM_HEADER_BYTES_MAX)
        self._note(stream.peer, "opened a stream")
        await refuse(stream, NO, REFUSAL)

    def _note(self, sender: PeerId, deed: str) -> None:
        self._told += 1
        if self._told <= REFUSALS_TOLD_MAX:
            self._hub.emit(ev.PeerRefused(sender, f"{deed}, but this is a bootstrap node"))


async def _keep_looking(node: Node, hub: Hub) -> NoReturn:
    """Look around, and tell what has changed."""
    told, addresses = "", node.transport.addresses()
    runs_s = 0.0
    while True:
        node.connected = await node.transport.connected()
        if time.monotonic() >= runs_s:
            node.runs = await node.directory.runs()
            runs_s = time.monotonic() + LOOK_RUNS_S
        if node.summary() != told:
            told = node.summary()
            hub.emit(ev.Notice("info", told))
        if node.transport.addresses() != addresses:  # a forwarded port, or how others see us
            addresses = node.transport.addresses()
            _announce(node, hub)
        await asyncio.sleep(LOOK_S)


def _announce(node: Node, hub: Hub) -> None:
    addresses = node.transport.addresses()
    via = addresses[0] if addresses else "ADDRESS"
    hub.emit(
        ev.Started(
            node.transport.peer_id, "", "bootstrap node", addresses,
            f"python -m peer join --via {via}", "", 0, str(node.seat.folder),
        )
    )  # fmt: skip


def _verbs(node: Node) -> dict[str, Any]:
    """What `peer status` and `peer leave` may ask."""

    async def status(_: dict[str, Any]) -> dict[str, Any]:
        return {**node.health(), "phase": "serving", "seat": str(node.seat.folder)}

    async def leave(_: dict[str, Any]) -> dict[str, Any]:
        node.leave()
        return {"leaving": True, "peer": node.transport.peer_id}

    return {"status": status, "leave": leave}


# ── metrics ──────────────────────────────────────────────────────────────────────────────
def _registry(node: Node) -> CollectorRegistry:
    registry = CollectorRegistry()
    gauges = {
        "peers_connected": ("Peers with a connection to this node", lambda: len(node.connected)),
        "dht_nodes": ("Other DHT nodes in the routing table", node.directory.size),
        "runs": ("Runs that are announced", lambda: len(node.runs)),
        "uptime_seconds": ("Since this process was ready", lambda: node.uptime_s),
        "daemon_up": ("Whether the network daemon runs", lambda: node.transport.p2p is not None),
    }
    for name, (text, read) in gauges.items():
        gauge = Gauge(f"murmuration_bootstrap_{name}", text, registry=registry)
        gauge.set_function(read)
    registry.register(_DaemonBytes(node))
    return registry


class _DaemonBytes(Collector):
    """What the network daemon has moved: the DHT, relayed traffic, and its talk with us.

    From the kernel's account of the daemon (Linux); nothing elsewhere. It starts anew with it.
    """

    def __init__(self, node: Node) -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        for name, ways in (("up", "wchar"), ("down", "rchar")):
            amount = self._account().get(ways)
            if amount is not None:
                metric = f"murmuration_bootstrap_bytes_{name}"
                yield CounterMetricFamily(
                    metric, f"Bytes {name} through the network daemon", value=amount
                )

    def _account(self) -> dict[str, int]:
        p2p = self._node.transport.p2p
        if p2p is None:
            return {}
        try:
            lines = Path(f"/proc/{p2p._child.pid}/io").read_text().splitlines()
        except OSError:
            return {}
        return {key: int(value) for key, _, value in (line.partition(": ") for line in lines)}
