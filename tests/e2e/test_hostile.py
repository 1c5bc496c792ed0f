"""A stranger with its own program against real peers: refused by name, and nothing changes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path

from peer.exchange import HEADER, UNITS
from peer.net.libp2p import Libp2pTransport
from peer.net.transport import TransportError
from protocols.errors import RemoteProtocolError
from protocols.identity import Signer
from protocols.messages import (
    OUTCOME_DOMAIN,
    PLAN_DOMAIN,
    ContributionHeader,
    Heartbeat,
    Hello,
    Message,
    OutcomeHeader,
    OutcomePush,
    Plan,
    PlanIssued,
    Seat,
    Span,
    encode,
)
from protocols.records import PeerRecord, Signed, sign, sign_record
from protocols.types import GroupName, PeerId, RunId
from tests.e2e.processes import Fleet, Process, check_agreement, check_once, fleet

LIAR = Signer(hashlib.sha256(b"a liar").digest())


def record(run: RunId, signer: Signer, group: GroupName) -> bytes:
    now_ms = int(time.time() * 1000)
    return sign_record(
        signer,
        PeerRecord(signer.peer_id, run, group, "", (), 10**6, True, 99, 1, now_ms, now_ms + 60_000),
    )


def forged(signed: Signed) -> Signed:
    return Signed(signed.body, signed.signer, bytes(64))


class Liar:
    """Says what no honest peer says."""

    def __init__(self, transport: Libp2pTransport, victim: Process) -> None:
        started = victim.all("Started")[0]
        plan = victim.all("RoundPlanned")[-1]
        self.transport = transport
        self.to = PeerId(victim.id)
        self.run = RunId(started["run"])
        self.group = GroupName(plan["group"])
        self.epoch = int(plan["epoch"])
        self.round = int(plan["round"])
        self.victim = victim

    async def call(self, request: bytes) -> None:
        """Send a request; being refused is what should happen."""
        with contextlib.suppress(RemoteProtocolError, TransportError):
            await self.transport.call(self.to, request, 5.0)

    async def say(self, message: Message) -> None:
        await self.call(encode(message))

    async def stream(self, *frames: tuple[int, bytes]) -> None:
        """Open a stream and send frames until it is closed on us."""
        with contextlib.suppress(RemoteProtocolError, TransportError):
            stream = await self.transport.open(self.to, 5.0)
            try:
                for kind, payload in frames:
                    await stream.send(kind, payload)
                await stream.finish()
                while await stream.receive(2**20) is not None:
                    pass
            finally:
                await stream.close()

    async def lie(self) -> None:
        """Every kind of nonsense, one after another."""
        run, group, here = self.run, self.group, self.to
        seats = tuple(sorted([Seat(LIAR.peer_id, 10**6), Seat(here, 1)], key=lambda s: s.peer))
        coup = Plan(
            run, group, self.epoch + 1, self.round, seats,
            (Span(0, 1, LIAR.peer_id, self.epoch + 1),), 0, 1000, b"",
        )  # fmt: skip
        outcome = OutcomeHeader(run, group, self.round, self.epoch, 0, 0, 1, (), bytes(32), 4, 0.0)
        given = ContributionHeader(run, group, self.round, self.epoch, 0, 0, 1, 1e6)
        await self.call(b"")
        await self.call(b"\x80\x04garbage" * 100)
        await self.call(os.urandom(5000))
        await self.call(encode(Heartbeat(run, group, 1, 1, b"", True, 0))[:-3])
        await self.call(bytes([9]) + encode(Heartbeat(run, group, 1, 1, b"", True, 0))[1:])
        await self.say(Heartbeat(RunId("ff" * 32), group, 2**40, 2**40, b"", True, 0))
        stolen = record(run, Signer(hashlib.sha256(b"another").digest()), group)
        await self.say(Hello(1, run, stolen, 99, b"x" * 32, True, False, 0))
        await self.say(Hello(7, run, record(run, LIAR, group), 99, b"x" * 32, True, False, 0))
        await self.say(PlanIssued(forged(sign(LIAR, PLAN_DOMAIN, coup))))
        await self.say(PlanIssued(sign(LIAR, PLAN_DOMAIN, coup)))
        await self.say(PlanIssued(sign(LIAR, OUTCOME_DOMAIN, coup)))
        await self.stream((HEADER, os.urandom(300)))
        await self.stream((UNITS, b"no header"))
        await self.stream((HEADER, encode(given)), (UNITS, os.urandom(5000)))
        await self.stream((HEADER, bytes(2**20)))
        await self.stream(
            (HEADER, encode(OutcomePush(self.epoch, sign(LIAR, OUTCOME_DOMAIN, outcome)))),
            (UNITS, os.urandom(5000)),
        )
        forgery = forged(sign(LIAR, OUTCOME_DOMAIN, outcome))
        await self.stream((HEADER, encode(OutcomePush(self.epoch, forgery))))


async def test_garbage_oversized_forged_and_stale_words_are_refused_by_name(
    tmp_path: Path,
) -> None:
    async with fleet(tmp_path) as it:
        await two(it)
        processes = [it["a"], it["b"]]
        transport = await Libp2pTransport.start(LIAR.seed, tmp_path / "liar", "127.0.0.1")
        try:
            for process in processes:
                await transport.connect(process.address, 10.0)
                await Liar(transport, process).lie()
            rounds = {p.name: len(p.rounds) for p in processes}
            await it.until(lambda: all(len(p.rounds) >= rounds[p.name] + 2 for p in processes))
        finally:
            await transport.close()
        for process in processes:
            refused = [f for f in process.all("PeerRefused") if f["peer"] == LIAR.peer_id]
            assert len(refused) >= 10, [f["reason"] for f in refused]
            assert process.code is None
        for fact in [f for p in processes for f in p.rounds]:
            assert all(LIAR.peer_id not in span["contributors"] for span in fact["spans"])
            assert LIAR.peer_id not in fact["roster"]
        check_agreement(processes)
        check_once(processes)
        await it.together("a", "b")


async def two(it: Fleet) -> None:
    it.start("a", founder=True)
    await it.started("a")
    it.start("b", via="a")
    await it.together("a", "b")
