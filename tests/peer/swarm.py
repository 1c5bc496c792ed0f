"""Whole peers in one process, over the in-memory network, with the toy method."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

from dht.memory import MemoryBoard, MemoryDirectory
from peer.config import PeerConfig
from peer.home import Seat
from peer.manifest import Manifest, ScheduleSpec, default_manifest
from peer.manifest_toml import Content
from peer.net.budget import UploadBudget
from peer.net.memory import MemoryNetwork, MemoryTransport
from peer.observe import events as ev
from peer.observe.hub import Hub
from peer.peer import Peer, open_peer
from peer.train.method import DataSource, Method
from protocols.identity import Signer
from protocols.types import PeerId
from tests.toys import ToyData, ToyMethod

E = TypeVar("E", bound=ev.Event)


def toy_manifest(round_s: float = 0.4, exchange_s: float = 3.0, fragments: int = 1) -> Manifest:
    return dataclasses.replace(
        default_manifest(),
        name="toy",
        schedule=ScheduleSpec(
            round_s=round_s,
            exchange_s=exchange_s,
            evaluate_every=1,
            checkpoint_every=5,
            fragments=fragments,
        ),
    )


class InMemory:
    """A `peer.peer.Network` in one process."""

    def __init__(self, transport: MemoryTransport, directory: MemoryDirectory) -> None:
        self.transport = transport
        self.directory = directory
        self.budget = transport.budget

    async def close(self) -> None:
        await self.directory.close()
        await self.transport.close()


class Swarm:
    """Starts peers, each in a task of its own, and watches their events."""

    adaptive = False

    def __init__(self, folder: Path, manifest: Manifest | None = None, size: int = 300_000) -> None:
        self.folder = folder
        self.manifest = manifest or toy_manifest()
        self.size = size
        self.network = MemoryNetwork(latency_s=0.001)
        self.board = MemoryBoard()
        self.peers: dict[str, Peer] = {}
        self.events: dict[str, list[ev.Event]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stops: dict[str, asyncio.Event] = {}
        self._changed = asyncio.Condition()
        self._pokes: set[asyncio.Task[None]] = set()
        self._ids: dict[str, PeerId] = {}
        self._transports: dict[str, MemoryTransport] = {}

    async def start(
        self, name: str, *, via: str | None = None, site: str = "town", wait: bool = True
    ) -> Peer:
        """A peer called `name`; the first one starts the run, others join through `via`.

        All at one site, unless told otherwise: they share one event loop, and on a busy machine
        its round trips make neighbours look a continent apart.
        """
        stop = asyncio.Event()
        ready = asyncio.Event()
        self._stops[name] = stop
        self.events.setdefault(name, [])
        self._tasks[name] = asyncio.create_task(self._live(name, via, site, ready, stop), name=name)
        if wait:
            waiter = asyncio.create_task(ready.wait())
            await asyncio.wait(
                {waiter, self._tasks[name]}, timeout=30, return_when=asyncio.FIRST_COMPLETED
            )
            waiter.cancel()
            if self._tasks[name].done():
                await self._tasks[name]
        return self.peers[name]

    async def _live(
        self, name: str, via: str | None, site: str, ready: asyncio.Event, stop: asyncio.Event
    ) -> None:
        hub = Hub()
        hub.listen(self.events[name].append)
        hub.listen(lambda _: self._poke())
        config = PeerConfig(
            home=self.folder / name,
            via=tuple(self.peers[via].addresses) if via else (),
            manifest=None if via else self.manifest,
            data=self._data(name),
            files={} if via else self._files(name),
            site=site,
            threads=1,
        )
        async with open_peer(config, hub=hub, build=self._build(name), network=self._open) as peer:
            self.peers[name] = peer
            self._ids[name] = peer.id
            ready.set()
            await stop.wait()

    def _data(self, name: str) -> tuple[Path, ...]:
        """The peer's own files, if the run leaves data to each."""
        return ()

    def _files(self, name: str) -> dict[str, Content]:
        """The files of the run, where `name` starts it."""
        return {}

    def _build(self, name: str) -> Callable[[Manifest, Path], tuple[Method, DataSource]]:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")

        def build(manifest: Manifest, assets: Path) -> tuple[Method, DataSource]:
            method = ToyMethod(self.size, seed, fragments=manifest.schedule.fragments)
            method.snr_db = (16.5, 5.5) if self.adaptive else None
            return method, ToyData()

        return build

    async def _open(self, config: PeerConfig, seat: Seat, signer: Signer, hub: Hub) -> InMemory:
        transport = self.network.transport(signer.peer_id, UploadBudget(config.upload_bps))
        self._transports[str(signer.peer_id)] = transport
        return InMemory(transport, MemoryDirectory(self.board, signer.peer_id))

    def _poke(self) -> None:
        async def poke() -> None:
            async with self._changed:
                self._changed.notify_all()

        task = asyncio.get_running_loop().create_task(poke())
        self._pokes.add(task)
        task.add_done_callback(self._pokes.discard)

    def all(self, name: str, kind: type[E]) -> list[E]:
        return [event for event in self.events[name] if isinstance(event, kind)]

    async def until(self, condition: Callable[[], bool], within_s: float = 30.0) -> None:
        """Wait for a condition on the peers' events; the time-out's message says where we are."""
        for task in self._tasks.values():
            if task.done() and not task.cancelled() and task.exception() is not None:
                await task
        try:
            async with asyncio.timeout(within_s), self._changed:
                await self._changed.wait_for(condition)
        except TimeoutError:
            where = {
                n: (p.round, p._machine.phase, p._machine.epoch, len(p.members))
                for n, p in self.peers.items()
            }
            raise AssertionError(f"not within {within_s} s: {where}") from None

    def finished(self, name: str) -> list[ev.RoundFinished]:
        return self.all(name, ev.RoundFinished)

    async def stop(self, name: str) -> None:
        """Leave politely."""
        self._stops[name].set()
        await self._tasks.pop(name)
        self.peers.pop(name)

    def forget_rounds(self, name: str) -> None:
        """Look only at the rounds from here on."""
        self.events[name][:] = [e for e in self.events[name] if not isinstance(e, ev.RoundFinished)]

    def network_id(self, name: str) -> PeerId:
        """A peer's id, also of one that is gone."""
        return self._ids[name]

    def transport(self, name: str) -> MemoryTransport:
        """A living peer's own."""
        return self._transports[self._ids[name]]

    async def crash(self, name: str) -> None:
        """Vanish: the network is cut first, so nobody hears a goodbye."""
        self.network.cut(PeerId(self.peers[name].id))
        task = self._tasks.pop(name)
        self.peers.pop(name)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.asynccontextmanager
async def swarm(
    folder: Path, manifest: Manifest | None = None, *, adaptive: bool = False,
    size: int = 300_000,
) -> AsyncIterator[Swarm]:  # fmt: skip
    """A swarm whose peers all end with the block. `adaptive`: every link chooses its codec."""
    it = Swarm(folder, manifest, size)
    it.adaptive = adaptive
    try:
        yield it
    finally:
        for name in list(it._tasks):
            it._stops[name].set()
        await asyncio.gather(*it._tasks.values(), return_exceptions=True)
