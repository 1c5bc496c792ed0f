"""The whole examination: a network daemon of its own for a minute, and what others say of it.

The daemon has an identity for this once, and the port on which the seat's peer would listen, unless
that one is running: what its router shows and lets in is then looked at from outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dht.node import HivemindDirectory
from peer import finding
from peer.doctor import kernel, machine, reaching, seat
from peer.doctor.facts import Answered, Facts, PeerFacts, PortFacts, RunFacts, ViaFacts
from peer.doctor.messages import NONCE_BYTES, place_of
from peer.doctor.probes import Prober, at_most, wanted_ports
from peer.doctor.serve import connection_by
from peer.errors import ManifestError, NetworkError, VersionError
from peer.exchange import BUDGET_SHARE
from peer.home import home_folder
from peer.manifest import Manifest, default_manifest
from peer.net.libp2p import Libp2pTransport
from protocols.identity import Signer
from protocols.types import PeerId

PEERS_MAX: Final = 4  # who are asked: two tell the kind of a NAT, more make sure
MEASURED_MAX: Final = 3  # with so many loss is measured, at once
RATED_MAX: Final = 2  # with so many bandwidth, one after the other: 8 s each
DHT_S: Final = 10.0
LOOK_S: Final = 20.0  # at disk, memory and device: most of it is importing torch
DIALS_S: Final = 20.0

Say = Callable[[str], None]
"""Hears what is being done."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be examined; fields as in `peer.config.PeerConfig`."""

    home: Path | None = None
    seat: str | None = None
    via: tuple[str, ...] = ()
    run: str | None = None
    host: str = "0.0.0.0"
    port: int = 0
    lane_port: int = 0
    announce: tuple[str, ...] = ()
    upload_bps: float | None = None
    device: str | None = None
    threads: int | None = None
    quick: bool = False
    """Leave out loss and bandwidth: no more than a few kilobytes are sent."""


async def examine(question: Question, say: Say) -> Facts:
    """All the facts, within a minute; trouble on the way is among them.

    Raises:
        PeerError: the question makes no sense, or the folder can't be read.
    """
    found, libp2p, lane = await asyncio.to_thread(_seat, question)
    facts = Facts(
        hosts=tuple(kernel.own_hosts()),
        libp2p=libp2p,
        lane=lane,
        running=found.running,
        upload_bps=question.upload_bps,
        quick=question.quick,
    )
    home = home_folder(question.home)
    looking = asyncio.create_task(
        asyncio.to_thread(machine.look, home, question.device, question.threads), name="machine"
    )
    try:
        async with AsyncExitStack() as stack:
            try:
                transport = await _open(stack, question, libp2p)
            except NetworkError as error:
                facts = replace(facts, network_error=str(error))
            else:
                facts = await _Examination(question, found, transport, facts, say, stack).run()
        facts = replace(facts, machine=await at_most(asyncio.shield(looking), LOOK_S))
    finally:
        looking.cancel()
    return facts


def _seat(question: Question) -> tuple[seat.SeatFacts, PortFacts, PortFacts]:
    found = seat.look(question.home, question.seat)
    return found, *seat.ports(found, question.host, question.port, question.lane_port)


async def _open(stack: AsyncExitStack, question: Question, libp2p: PortFacts) -> Libp2pTransport:
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="murmuration-doctor-"))
    port = libp2p.port if libp2p.free else 0
    transport = await Libp2pTransport.start(
        os.urandom(32), Path(folder), question.host, port,
        announce=question.announce if port or question.announce else (),
    )  # fmt: skip
    stack.push_async_callback(transport.close)
    return transport


class _Examination:
    """The part of it that needs the network."""

    def __init__(
        self, question: Question, found: seat.SeatFacts, transport: Libp2pTransport, facts: Facts,
        say: Say, stack: AsyncExitStack,
    ) -> None:  # fmt: skip
        self._question = question
        self._seat = found
        self._transport = transport
        self._facts = facts
        self._say = say
        self._stack = stack
        self._connection = connection_by(transport)
        self._directory: HivemindDirectory | None = None

    async def run(self) -> Facts:
        vias, peers = await self._reach()
        manifest = await self._look_around(peers)
        addresses = self._seat.addresses or tuple(self._transport.addresses())
        self._facts = replace(
            self._facts,
            vias=vias,
            addresses=addresses,
            dht_nodes=self._directory.size() if self._directory is not None else 0,
            run=await asyncio.to_thread(run_facts, manifest),
            peers=await self._measure(peers, addresses),
        )
        return self._facts

    async def _reach(self) -> tuple[tuple[ViaFacts, ...], dict[PeerId, str]]:
        """Try all the addresses that are known; who answers, and where."""
        known = dict.fromkeys((*self._question.via, *self._seat.memory.via))
        if self._seat.running:  # we are not to be our own witness
            for address in self._seat.addresses:
                known.pop(address, None)
        if known:
            self._say(f"trying {len(known)} known addresses ...")
        tried = await asyncio.gather(*(reaching.try_via(self._transport, a) for a in known))
        peers = {peer: via.address for via, peer in tried if peer is not None}
        return tuple(via for via, _ in tried), peers

    async def _look_around(self, peers: dict[PeerId, str]) -> Manifest | None:
        """The run, and its members as further witnesses, from the DHT."""
        manifest = self._own_manifest()
        if not peers:
            return manifest
        self._say("looking around in the DHT ...")
        directory = await HivemindDirectory.start(
            self._transport, Signer(os.urandom(32)), is_client=lambda: True
        )
        self._stack.push_async_callback(directory.close)
        self._directory = directory
        await at_most(directory.join(peers), DHT_S)
        if manifest is None:
            manifest = await self._announced_manifest(directory)
        if manifest is not None and len(peers) < PEERS_MAX:
            await at_most(self._meet(directory, manifest, peers), DHT_S)
        return manifest

    async def _meet(
        self, directory: HivemindDirectory, manifest: Manifest, peers: dict[PeerId, str]
    ) -> None:
        own = self._seat.status.get("peer")
        for record in await directory.members(manifest.run_id()):
            if record.peer in peers or record.peer == own or len(peers) >= PEERS_MAX:
                continue
            self._transport.remember(record.peer, record.addresses)
            for address in record.addresses:
                via, peer = await reaching.try_via(self._transport, address, reaching.TRY_S)
                if peer is not None and via.answered is Answered.YES:
                    peers[peer] = address
                    break

    def _own_manifest(self) -> Manifest | None:
        run = self._question.run or self._seat.memory.run
        past = self._seat.memory.run
        if run is not None and past is not None and past.startswith(run):
            run = past
        if run is None or len(run) != 64:
            return None
        with contextlib.suppress(ManifestError, VersionError):
            return finding.saved_manifest(self._seat.folder / "runs" / run)
        return None

    async def _announced_manifest(self, directory: HivemindDirectory) -> Manifest | None:
        wanted = self._question.run
        runs = await at_most(directory.runs(), DHT_S) or []
        fitting = [n.run for n in runs if wanted is None or n.run.startswith(wanted)]
        if len(fitting) != 1:
            return None
        data = await at_most(directory.manifest(fitting[0]), DHT_S)
        with contextlib.suppress(ManifestError, VersionError):
            return Manifest.from_canonical(data) if data is not None else None
        return None

    # ── measuring ────────────────────────────────────────────────────────────────────────
    async def _measure(
        self, peers: dict[PeerId, str], addresses: tuple[str, ...]
    ) -> tuple[PeerFacts, ...]:
        probers = [
            Prober(self._transport, peer, address, self._connection)
            for peer, address in list(peers.items())[:PEERS_MAX]
        ]
        if not probers:
            return ()
        self._say(f"asking {len(probers)} peers what they see ...")
        willing = [
            prober
            for prober, takes in zip(
                probers, await asyncio.gather(*(p.greet() for p in probers)), strict=True
            )
            if takes
        ]
        await self._dial_back(willing, addresses)
        if willing and not self._question.quick:
            await self._measure_line(willing)
        return tuple(prober.facts for prober in probers)

    async def _measure_line(self, willing: list[Prober]) -> None:
        """With those outside first, the nearest first."""
        self._say("measuring loss ...")
        near = sorted(willing, key=lambda p: p.facts.rtt_s or 0.0)
        near = [p for p in near if p.facts.outside] + [p for p in near if not p.facts.outside]
        await asyncio.gather(*(p.measure_loss() for p in near[:MEASURED_MAX]))
        for number, prober in enumerate(near[:RATED_MAX]):
            self._say(f"measuring bandwidth, {number + 1} of {min(len(near), RATED_MAX)} ...")
            await prober.measure_rates()

    async def _dial_back(self, willing: list[Prober], addresses: tuple[str, ...]) -> None:
        nonce = secrets.token_bytes(NONCE_BYTES)
        port = self._facts.libp2p.port if self._facts.libp2p.ours else 0
        if not port:
            places = [place for a in self._transport.addresses() if (place := place_of(a))]
            port = places[0].port if places else 0
        if willing:
            self._say("asking them to open a connection to here ...")
        async with _listening(self._question.host, self._facts.lane, nonce) as lane_port:
            asked = (
                p.dial_back([*wanted_ports(port, p.facts.seen, addresses), *lane_port], nonce)
                for p in willing
            )
            await at_most(asyncio.gather(*asked), DIALS_S)


class _listening:  # noqa: N801 - reads as what it does
    """A listener on the lane's port that says the nonce, where that port is known and free."""

    def __init__(self, host: str, lane: PortFacts, nonce: bytes) -> None:
        self._host = host
        self._lane = lane
        self._nonce = nonce
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> list[int]:
        if self._lane.ours and self._lane.port:
            return [self._lane.port]
        if not self._lane.port or not self._lane.free:
            return []
        with contextlib.suppress(OSError):
            self._server = await asyncio.start_server(self._speak, self._host, self._lane.port)
            return [self._lane.port]
        return []

    async def __aexit__(self, *exc: object) -> None:
        if self._server is not None:
            self._server.close()

    async def _speak(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self._nonce)
        writer.close()


def run_facts(manifest: Manifest | None) -> RunFacts | None:
    """What of a run bears upon the line; None: no run is known. Takes seconds (transformers)."""
    from peer.train.models import parameters_of
    from peer.train.pretrain import SNR_DB

    chosen = manifest or default_manifest()
    try:
        parameters = parameters_of(chosen.model.config)
    except ManifestError:
        return None
    schedule = chosen.schedule
    return RunFacts(
        run=chosen.run_id(),
        name=chosen.name,
        parameters=parameters,
        method=chosen.method.kind,
        codec=chosen.codec.name,
        fragments=schedule.fragments,
        exchange_s=schedule.exchange_s,
        budget_s=schedule.exchange_s * BUDGET_SHARE,
        members_max=chosen.group.members_max,
        aggregators_max=chosen.group.aggregators_max,
        snr_db=SNR_DB,
    )
