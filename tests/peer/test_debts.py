"""Debts between two gossip drivers, over streams in memory: what is offered is what is proven."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, cast

from dht.directory import Directory, GroupNotice
from peer.debts import Debt
from peer.exchange import content_digest
from peer.mixing import Host, Mixing, MixingLearner
from peer.net.transport import Frame, Stream
from peer.simulate.books import coded_mass
from peer.simulate.learner import SimMixer
from peer.train.mixtable import MixTable
from protocols.errors import RemoteProtocolError
from protocols.events import Tick
from protocols.gossip import GossipConfig, GossipMachine
from protocols.gossip_events import DebtAnswered, Noted, RoundDone
from protocols.loans import LOAN_DOMAIN, Contact, Loan, MixNote, mix_id
from protocols.messages import (
    OUTCOME_DOMAIN,
    DebtPush,
    DebtsQuery,
    OutcomeHeader,
    decode_header,
)
from protocols.records import Signed, sign
from protocols.types import GroupName, PeerId, RunId
from tests.protocols.samples import peer, signer

RUN = RunId("ab" * 32)
EAST, WEST = GroupName("east"), GroupName("west")
ME, LENDER, DONOR = (peer(i) for i in range(3))
LOAN = Loan(RUN, EAST, ME, 3, WEST, 5, 2, 4, 1, (Contact(LENDER, ()),))
SIGNED = sign(signer(1), LOAN_DOMAIN, LOAN)
MIX = mix_id(SIGNED.body)
CONFIG = GossipConfig(run=RUN, units=4, every=4, slots=2, round_s=5.0, exchange_s=5.0)
D = {2: coded_mass(7), 3: coded_mass(-9)}


class Pipe:
    """One end of a stream."""

    def __init__(self, far: PeerId, inbox: asyncio.Queue[Frame | None],
                 outbox: asyncio.Queue[Frame | None]) -> None:  # fmt: skip
        self.peer = far
        self._inbox, self._outbox = inbox, outbox

    async def send(self, kind: int, payload: bytes | memoryview) -> None:
        self._outbox.put_nowait(Frame(kind, bytes(payload)))

    async def receive(self, payload_bytes_max: int) -> Frame | None:
        return await self._inbox.get()

    async def finish(self) -> None:
        self._outbox.put_nowait(None)

    async def close(self) -> None:
        self._outbox.put_nowait(None)


class Peer:
    """A gossip driver and all that it asks for: host, learner, exchange and transport."""

    def __init__(self, index: int, group: GroupName, peers: dict[PeerId, Peer]) -> None:
        self.signer = signer(index)
        self.group, self.round = group, 8
        self.mix_table = MixTable(CONFIG.units)
        self.transport = self.exchange = self
        self.faults: list[str] = []
        self.silent: list[PeerId] = []
        """Who opened a stream and said nothing."""
        self.told: list[object] = []
        self.companies: list[tuple[GroupName, tuple[PeerId, ...]]] = []
        """What fellow members said of who was there."""
        self.tasks: list[asyncio.Task[None]] = []
        self.peers = peers
        peers[self.signer.peer_id] = self
        self.mixing = Mixing(
            GossipMachine(self.signer.peer_id, CONFIG), cast("Host", self),
            cast("Directory", self), cast("MixingLearner", self), SimMixer(),
        )  # fmt: skip

    def emit(self, event: object) -> None:
        self.told.append(event)

    def now_s(self) -> float:
        return 0.0

    def wake(self) -> None: ...

    def post(self, peer: PeerId, message: object) -> None: ...

    def start(self, work: Coroutine[Any, Any, None], name: str) -> object:
        self.tasks.append(asyncio.ensure_future(work))
        return self.tasks[-1]

    def company(self) -> tuple[PeerId, ...]:
        return tuple(sorted(set(self.peers) - {self.signer.peer_id}))

    def told_company(self, group: GroupName, members: tuple[PeerId, ...]) -> None:
        self.companies.append((group, members))

    def refused(self, error: RemoteProtocolError) -> None:
        self.faults.append(error.reason)

    async def random_groups(self, run: RunId, count: int) -> list[GroupNotice]:
        return []

    async def compute(self, work: Callable[[], Any]) -> Any:
        return work()

    async def open(self, peer: PeerId, timeout_s: float) -> Stream:
        there, back = asyncio.Queue[Frame | None](), asyncio.Queue[Frame | None]()
        far = self.peers[peer]
        far.start(far.serve(Pipe(self.signer.peer_id, there, back)), "serve")
        return cast("Stream", Pipe(peer, back, there))

    async def serve(self, pipe: Pipe) -> None:
        stream = cast("Stream", pipe)
        frame = await stream.receive(2**20)
        if frame is None:
            return self.silent.append(pipe.peer)
        header = decode_header(frame.payload, stream.peer)
        try:
            if isinstance(header, DebtPush):
                await self.mixing.serve_debt(stream, header)
            else:
                assert isinstance(header, DebtsQuery)
                await self.mixing.serve_debts(stream, header)
        except RemoteProtocolError as error:
            self.refused(error)
            await stream.close()

    def know(self, start: int, stop: int, epoch: int) -> None:
        """An applied outcome of east has the mix in these units."""
        proof = outcome(start, stop, epoch)
        debt = self.mixing._debts.setdefault(MIX, Debt(SIGNED, LOAN))
        debt.proofs.append(proof)
        self.mixing.riding.keep(MIX, LOAN, ((u, D[u]) for u in range(start, stop)))
        for unit in range(start, stop):
            self.mix_table.add(unit, MIX, LOAN.until(EAST, 1), 1)
        note = Noted(MIX, SIGNED, LOAN, start, stop)
        members = tuple(p for p, who in self.peers.items() if who.group == self.group)
        self.mixing.feed(RoundDone(self.group, self.round, members, (note,), firm=False))


def outcome(start: int, stop: int, epoch: int) -> Signed:
    inside = [D[unit] for unit in range(start, stop)]
    note = MixNote(SIGNED, start, stop, content_digest(inside))
    header = OutcomeHeader(RUN, EAST, 7, epoch, 0, 0, 4, (), bytes(32), 0, 0.0, bytes(32), (note,))
    return sign(signer(0), OUTCOME_DOMAIN, header)


def lender(peers: dict[PeerId, Peer]) -> Peer:
    """Who has lent, and has done a round in its group."""
    west = Peer(1, WEST, peers)
    west.mixing.feed(RoundDone(WEST, 8, (LENDER,), (), firm=True))
    west.mixing.feed(Tick())  # there is nobody to be told by
    west.mixing.feed(RoundDone(WEST, 9, (LENDER,), (), firm=True))
    return west


async def settle(*peers: Peer) -> None:
    while tasks := [task for who in peers for task in who.tasks if not task.done()]:
        await asyncio.gather(*tasks)
    for who in peers:
        assert not who.faults


async def test_what_the_donor_of_a_state_proves_is_shown_beside_what_we_proved() -> None:
    """Our history had the mix in unit 2 only, the donor's has it in both, by another outcome."""
    peers: dict[PeerId, Peer] = {}
    west, me, donor = lender(peers), Peer(0, EAST, peers), Peer(2, EAST, peers)
    me.know(2, 3, epoch=1)
    donor.know(2, 4, epoch=2)
    me.mix_table.load(donor.mix_table.array)
    me.mixing.state_replaced(await me.mixing.ask_debts(DONOR))
    assert me.mixing.machine.debts == {MIX: LOAN.whole}
    assert me.companies == [(EAST, donor.company())]  # who fell silent counts for us, too
    await me.mixing._pay(MIX, LOAN.contacts[0])
    await settle(west, me, donor)
    assert west.mixing.machine.carried[MIX].left == LOAN.whole
    assert west.mixing.riding.payloads[MIX] == D


async def test_a_proof_of_more_units_than_are_owed_pays_for_those_only() -> None:
    """Our history had the mix in both units, the donor's has it in unit 3 only."""
    peers: dict[PeerId, Peer] = {}
    west, me, donor = lender(peers), Peer(0, EAST, peers), Peer(2, EAST, peers)
    me.know(2, 4, epoch=1)
    donor.know(3, 4, epoch=2)
    me.mix_table.load(donor.mix_table.array)
    me.mixing.state_replaced(await me.mixing.ask_debts(DONOR))
    assert me.mixing.machine.debts == {MIX: 0b10}
    await me.mixing._pay(MIX, LOAN.contacts[0])
    await settle(west, me, donor)
    assert west.mixing.machine.carried[MIX].left == 0b10
    assert west.mixing.riding.payloads[MIX] == {3: D[3]}


async def test_who_has_moved_away_refuses_no_debt_for_its_old_group() -> None:
    peers: dict[PeerId, Peer] = {}
    west, me = lender(peers), Peer(0, EAST, peers)
    west.mixing.feed(RoundDone(GroupName("south"), 9, (LENDER,), (), firm=True))
    me.know(2, 4, epoch=1)
    await me.mixing._pay(MIX, LOAN.contacts[0])
    await settle(west, me)
    assert me.mixing.machine.debts == {MIX: LOAN.whole}


async def test_what_has_just_got_into_the_state_is_not_said_to_be_there_for_good() -> None:
    """The table has it before the machine hears of the round, or of the donor's state."""
    peers: dict[PeerId, Peer] = {}
    west, me = lender(peers), Peer(0, EAST, peers)
    me.know(2, 4, epoch=1)
    with west.mixing.changing():
        for unit in (2, 3):
            west.mix_table.add(unit, MIX, LOAN.until(WEST, 1), -1)
        await me.mixing._pay(MIX, LOAN.contacts[0])
    await settle(west, me)
    assert me.mixing.machine.debts == {MIX: LOAN.whole}
    await me.mixing._pay(MIX, LOAN.contacts[0])
    await settle(west, me)
    assert not me.mixing.machine.debts


async def test_a_debt_that_is_settled_while_its_stream_is_opened_is_not_paid_with_nothing() -> None:
    peers: dict[PeerId, Peer] = {}
    west, me = lender(peers), Peer(0, EAST, peers)
    me.know(2, 4, epoch=1)
    opened = me.open

    async def meanwhile(peer: PeerId, timeout_s: float) -> Stream:
        stream = await opened(peer, timeout_s)
        me.mixing.feed(DebtAnswered(MIX, LENDER, "paid"))  # another payment was answered
        return stream

    me.open = meanwhile  # type: ignore[method-assign]
    await me.mixing._pay(MIX, LOAN.contacts[0])
    await settle(west, me)
    assert ME in west.silent
    assert not me.mixing.machine.debts
