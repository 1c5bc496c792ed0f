"""Gossip's driver: performs what the gossip machine wants, over the same streams as all else.

It holds the payloads, asks the directory for other groups, lends and borrows, pays and takes
payment, and tells the machine of every applied round. Like the driver itself it never waits:
what takes time is a task whose end is another event, and one liar ends its own task only.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from dht.directory import Directory
from peer.debts import Debt, receive_debts, send_debt
from peer.exchange import (
    BATCH_UNITS,
    ELSEWHERE,
    HAVE,
    HEADER,
    LATER,
    NO,
    REPLY,
    UNITS_FRAME_BYTES_MAX,
    YES,
    Exchange,
    Outcome,
    RefusedError,
    answer,
    refuse,
    reply,
    send_units,
    units_in,
)
from peer.net.transport import Stream, Transport, TransportError
from peer.observe import events as ev
from peer.riding import Riding, payload_of
from peer.train.mixing import Mixer, TooFarError
from peer.train.mixtable import MixTable
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.events import Send
from protocols.gossip import GossipMachine
from protocols.gossip_events import (
    Answer,
    AnswerDebt,
    Aware,
    Borrow,
    Borrowed,
    ClosedHeard,
    ContactsFound,
    DebtAnswered,
    DebtOffered,
    DebtsFetched,
    DebtTaken,
    DenyLoan,
    FetchDebts,
    FindContacts,
    FindGroups,
    Forget,
    GossipEffect,
    GossipEvent,
    GrantLoan,
    GroupsFound,
    LoanAsked,
    MixCommitted,
    MixDropped,
    MixLost,
    MixReturned,
    MixSettled,
    NotBorrowed,
    Noted,
    Owed,
    PayDebt,
    RoundDone,
    StateReplaced,
)
from protocols.identity import Signer
from protocols.loans import LOAN_DOMAIN, Contact, Loan, MixId, mix_id, open_loan
from protocols.messages import (
    DebtClosed,
    DebtPush,
    DebtsQuery,
    LoanAgain,
    LoanQuery,
    Message,
    encode,
)
from protocols.records import PeerIdField, PeerRecord, Signed, sign
from protocols.schema import Max, SchemaError, pack, unpack
from protocols.types import GroupName, PeerId

LENDING_MAX: Final = 4  # states shown at once: each is as much upload as a contribution or more
COMPANY_TOLD_MAX: Final = 4 * limits.GROUP_MEMBERS_MAX
OWN_GROUP: Final = 1  # what is drawn may be our own group
_LOAN_REPLY_BYTES_MAX: Final = 1 + limits.LOAN_BYTES_MAX + 1024
_ROSTER_BYTES_MAX: Final = 64 * 2**10
_STATUSES: Final[dict[Answer, int]] = {"paid": HAVE, "later": LATER, "elsewhere": ELSEWHERE}
_REFUSALS: Final[dict[int, Answer]] = {LATER: "later", ELSEWHERE: "elsewhere"}


@dataclass(frozen=True, slots=True)
class RosterNote:
    """A member's answer to DebtsQuery, before the debts: who was in the group, and is it sure."""

    roster: Annotated[tuple[PeerIdField, ...], Max(256)]
    sure: bool
    company: Annotated[tuple[PeerIdField, ...], Max(COMPANY_TOLD_MAX)] = ()
    """Who else stood in the group lately, the silent included."""


Told = tuple[RosterNote, dict[MixId, Debt]]
"""A fellow member's answer: who is in its group, and what that owes."""


class MixingLearner(Protocol):
    """What gossip needs of training."""

    @property
    def mix_table(self) -> MixTable:
        """The state's own, only to be looked at."""

    def outer(self, start: int, stop: int) -> list[npt.NDArray[np.float32]]:
        """See `Method.outer`."""


class Host(Protocol):
    """What gossip needs of the driver."""

    transport: Transport
    signer: Signer
    exchange: Exchange
    emit: ev.Listener

    @property
    def group(self) -> GroupName: ...

    @property
    def round(self) -> int: ...

    def now_s(self) -> float: ...

    def live_members(self) -> list[PeerId]: ...

    def company(self) -> tuple[PeerId, ...]:
        """Who else stood in our group lately, the silent included."""

    def told_company(self, group: GroupName, members: tuple[PeerId, ...]) -> None:
        """A fellow member's answer to that question."""

    def records(self) -> list[PeerRecord]:
        """Of fellow members."""

    def post(self, peer: PeerId, message: Message) -> None: ...

    def start(self, work: Coroutine[Any, Any, None], name: str) -> object: ...

    def wake(self) -> None: ...

    def refused(self, error: RemoteProtocolError) -> None: ...


class Mixing:
    """See the module."""

    def __init__(
        self,
        machine: GossipMachine,
        host: Host,
        directory: Directory,
        learner: MixingLearner,
        mixer: Mixer,
    ) -> None:
        self.machine = machine
        self._host = host
        self._directory = directory
        self._learner = learner
        self._mixer = mixer
        self.riding = Riding(machine, mixer, learner.mix_table)
        self._run = machine.config.run
        self._debts: dict[MixId, Debt] = {}
        """Of our group: loans, proofs; the payloads are `riding`'s."""
        self._hints: dict[int, tuple[float, ...]] = {}
        """A slot's first unit -> how far apart the two groups of its last mix were."""
        self._lending = 0
        self._ahead = 0
        """Changes of the state under way that the machine has not heard of."""

    # ── the machine ──────────────────────────────────────────────────────────────────────
    @property
    def deadline_s(self) -> float:
        return self.machine.deadline_s

    def feed(self, event: GossipEvent) -> None:
        """Hand the machine an event; a peer's blunder is noted, no more."""
        try:
            self.ask(event)
        except RemoteProtocolError as error:
            self._host.refused(error)

    def ask(self, event: GossipEvent) -> list[GossipEffect]:
        """The same for a query: its answers are the caller's to give.

        Raises:
            RemoteProtocolError: a peer broke the rules.
        """
        answers: list[GossipEffect] = []
        for effect in self.machine.handle(event, self._host.now_s()):
            if isinstance(effect, GrantLoan | DenyLoan | AnswerDebt):
                answers.append(effect)
            else:
                self._perform(effect)
        self._host.wake()
        return answers

    def _perform(self, effect: GossipEffect) -> None:
        start = self._host.start
        match effect:
            case FindGroups(slot, count):
                start(self._find_groups(slot, count), f"groups for slot {slot}")
            case FindContacts(mix, group):
                start(self._find_contacts(mix, group), f"contacts in {group}")
            case Borrow(slot, query, to):
                start(self._borrow(slot, query, to), f"borrow from {to.peer}")
            case PayDebt(mix, to):
                start(self._pay(mix, to), f"pay {to.peer}")
            case FetchDebts(peer):
                start(self._fetch_debts(peer), f"debts from {peer}")
            case Forget(mix):
                self._debts.pop(mix, None)
                self.riding.payloads.pop(mix, None)
            case Send(peer, message):
                self._host.post(peer, message)
            case _:
                self._tell(effect)

    def _tell(self, effect: GossipEffect) -> None:
        emit = self._host.emit
        match effect:
            case MixCommitted(mix, loan, units):
                emit(ev.MixCommitted(name_of(mix), loan.lender, loan.start, loan.stop, units))
            case MixReturned(mix, loan, units):
                emit(ev.MixReturned(name_of(mix), loan.borrower, loan.start, loan.stop, units))
            case MixSettled(mix, loan, units):
                emit(ev.MixSettled(name_of(mix), loan.lender, units))
            case MixDropped(mix, loan, reason):
                emit(ev.MixDropped(name_of(mix), loan.lender, reason))
            case MixLost(mix, loan, units, reason):
                emit(ev.MixLost(name_of(mix), loan.lender, units, reason))
            case _:
                pass

    def heard(self, sender: PeerId, message: DebtClosed) -> None:
        """A control message.

        Raises:
            RemoteProtocolError: of another run.
        """
        self.ask(ClosedHeard(sender, message))

    @contextmanager
    def changing(self) -> Iterator[None]:
        """While the state becomes another, until the machine is told: what is in it is no fact yet.

        The table is ahead of the machine then, which would take a mix that has just got in for one
        that most of the group have had for long.
        """
        self._ahead += 1
        try:
            yield
        finally:
            self._ahead -= 1

    # ── rounds ───────────────────────────────────────────────────────────────────────────
    def round_done(self, outcomes: Sequence[Outcome], firm: bool) -> None:
        """A round was applied: what it holds for us. `firm`: see `RoundDone`."""
        group = self._host.group
        noted: list[Noted] = []
        for outcome in outcomes:
            for note in outcome.header.mixes:
                try:
                    loan = open_loan(note.loan, outcome.signed.signer)
                except RemoteProtocolError as error:
                    self._host.refused(error)
                    continue
                mix = mix_id(note.loan.body)
                noted.append(Noted(mix, note.loan, loan, note.start, note.stop))
                if loan.sign_for(group) > 0:
                    self._owe(mix, note.loan, loan, outcome, range(note.start, note.stop))
        members = tuple(self._host.live_members())
        self.feed(RoundDone(group, self._host.round, members, tuple(noted), firm))

    def _owe(
        self, mix: MixId, signed: Signed, loan: Loan, outcome: Outcome, units: Iterable[int]
    ) -> None:
        debt = self._debts.setdefault(mix, Debt(signed, loan))
        if outcome.signed not in debt.proofs:
            debt.proofs.append(outcome.signed)
        first = outcome.header.start
        self.riding.keep(mix, loan, ((u, payload_of(outcome.units[u - first], mix)) for u in units))

    def state_replaced(self, told: Told | None) -> None:
        """Our state is a donor's now, who `told` us what its group owes (None: it did not)."""
        known = self.machine.known()
        inside = {mix: self._maybe(mix, loan) for mix, loan in known.items()}
        aware = self._aware(told) if told is not None else None
        self.feed(StateReplaced(self._host.group, self._host.round, inside, aware))

    def _maybe(self, mix: MixId, loan: Loan) -> int:
        """The units of a mix that our state has, or would not know any more."""
        table, group = self._learner.mix_table, self._host.group or loan.borrower
        sign = loan.sign_for(group) or 1
        forgotten = table.forgotten(self._until(loan, group), sign, loan.start, loan.stop)
        return table.mask(mix, loan.start, loan.stop) | forgotten

    def _until(self, loan: Loan, group: GroupName) -> int:
        return loan.until(group, self.machine.config.fragments)

    # ── who there is ─────────────────────────────────────────────────────────────────────
    async def _find_groups(self, slot: int, count: int) -> None:
        notices = await self._directory.random_groups(self._run, count + OWN_GROUP)
        found = tuple((n.group, self._contacts(n.contacts)) for n in notices)
        self.feed(GroupsFound(slot, found))

    async def _find_contacts(self, mix: MixId, group: GroupName) -> None:
        records = [r for r in await self._directory.members(self._run) if r.group == group]
        if not records:
            notices = await self._directory.random_groups(self._run, limits.AGGREGATORS_MAX)
            records = [r for n in notices if n.group == group for r in n.contacts]
        self.feed(ContactsFound(mix, self._contacts(records)))

    def _contacts(self, records: Iterable[PeerRecord]) -> tuple[Contact, ...]:
        return tuple(
            Contact(r.peer, r.addresses[: limits.CONTACT_ADDRESSES_MAX])
            for r in records
            if r.peer != self._host.signer.peer_id
        )

    async def _open(self, to: Contact) -> Stream:
        remember = getattr(self._host.transport, "remember", None)
        if remember is not None and to.addresses:
            remember(to.peer, to.addresses)
        return await self._host.transport.open(to.peer, limits.CONNECT_TIMEOUT_S)

    # ── borrowing ────────────────────────────────────────────────────────────────────────
    async def _borrow(self, slot: int, query: LoanQuery, to: Contact) -> None:
        try:
            signed, loan = await self._look(query, to)
        except RefusedError:
            self.feed(NotBorrowed(slot, to.peer, False))
        except TransportError:
            self.feed(NotBorrowed(slot, to.peer, True))
        except RemoteProtocolError as error:
            self._host.refused(error)
            self.feed(NotBorrowed(slot, to.peer, False))
        else:
            self.feed(Borrowed(slot, signed, loan))

    async def _look(self, query: LoanQuery, to: Contact) -> tuple[Signed, Loan]:
        """See the lender's state, and keep half of the difference.

        Raises:
            TransportError, RefusedError, RemoteProtocolError: it did not work out.
        """
        query = replace(query, hints=self._hints.get(query.start, ()))
        stream = await self._open(to)
        try:
            await stream.send(HEADER, encode(query))
            await stream.finish()
            signed, loan = await self._loan(stream, query)
            lent = await _units(stream, loan)
        finally:
            await stream.close()
        mix = mix_id(signed.body)
        try:
            far, ratios = await self._differ(mix, loan, lent)
            if far:
                some = sorted(far)[: limits.EXACT_UNITS_MAX]
                lent = await self._look_again(signed, loan, to, some)
                ratios += (await self._differ(mix, loan, lent))[1]
        except BaseException:  # cancelled, too: half of a difference must not stay
            self.riding.payloads.pop(mix, None)
            raise
        if ratios:
            self._hints[loan.start] = tuple(np.max(np.array(ratios), axis=0).tolist())
        return signed, loan

    async def _loan(self, stream: Stream, query: LoanQuery) -> tuple[Signed, Loan]:
        peer = stream.peer
        frame = await stream.receive(_LOAN_REPLY_BYTES_MAX)
        if frame is None or frame.kind != REPLY or not frame.payload:
            raise RemoteProtocolError(peer, "no reply where one is due")
        if frame.payload[0] != YES:
            raise RefusedError(frame.payload[0], frame.payload[1:].decode(errors="replace"))
        try:
            signed = unpack(Signed, frame.payload[1:])
        except SchemaError as error:
            raise RemoteProtocolError(peer, str(error)) from None
        loan = open_loan(signed, peer)
        asked = (query.run, query.group, query.round, query.lender, query.start, query.stop)
        got = (loan.run, loan.borrower, loan.borrower_round, loan.lender, loan.start, loan.stop)
        if asked != got or signed.signer != peer or loan.asker != self._host.signer.peer_id:
            raise RemoteProtocolError(peer, "a loan that nobody asked for")
        return signed, loan

    async def _look_again(
        self, signed: Signed, loan: Loan, to: Contact, far: list[int]
    ) -> dict[int, bytes]:
        stream = await self._open(to)
        try:
            await stream.send(HEADER, encode(LoanAgain(self._run, signed, tuple(far))))
            await stream.finish()
            await answer(stream)
            return await _units(stream, loan)
        finally:
            await stream.close()

    async def _differ(
        self, mix: MixId, loan: Loan, lent: dict[int, bytes]
    ) -> tuple[list[int], list[tuple[float, ...]]]:
        """Keep d of these units; (those that we are too far away from, the others' ratios)."""
        far: list[int] = []
        ratios: list[tuple[float, ...]] = []

        def work(units: list[int]) -> dict[int, bytes]:
            found = {}
            for unit in units:
                (ours,) = self._learner.outer(unit, unit + 1)
                try:
                    difference = self._mixer.difference(unit, ours, lent[unit])
                except TooFarError:
                    far.append(unit)
                    continue
                except ValueError as error:
                    raise RemoteProtocolError(loan.contacts[0].peer, str(error)) from None
                found[unit] = difference.payload
                ratios.append(difference.ratios)
            return found

        units = sorted(lent)
        for at in range(0, len(units), BATCH_UNITS):
            batch = units[at : at + BATCH_UNITS]
            found = await self._host.exchange.compute(lambda b=batch: work(b))  # type: ignore[misc]
            self.riding.keep(mix, loan, found.items())
        return far, ratios

    # ── lending ──────────────────────────────────────────────────────────────────────────
    async def serve_loan(self, stream: Stream, query: LoanQuery) -> None:
        """Show our state to a member of another group.

        Raises:
            RemoteProtocolError: it asks for what it should not.
            TransportError: the stream broke.
        """
        if self._lending >= LENDING_MAX:
            await refuse(stream, LATER, "busy with other loans")
            return
        me = self._host.signer.peer_id
        mine = Contact(me, tuple(self._host.transport.addresses()[: limits.CONTACT_ADDRESSES_MAX]))
        contacts = (mine, *self._contacts(self._host.records()))
        (reply_to,) = self.ask(LoanAsked(stream.peer, query, contacts))
        if not isinstance(reply_to, GrantLoan):
            reason = reply_to.reason if isinstance(reply_to, DenyLoan) else ""
            await refuse(stream, LATER, reason)
            return
        signed = sign(self._host.signer, LOAN_DOMAIN, reply_to.loan)
        await stream.send(REPLY, bytes([YES]) + pack(signed))
        loan = reply_to.loan
        await self._show(stream, range(loan.start, loan.stop), query.hints, exact=False)

    async def serve_again(self, stream: Stream, again: LoanAgain) -> None:
        """Show units of our own loan exactly; raises like `serve_loan`."""
        loan = open_loan(again.loan, stream.peer)
        fits = all(loan.start <= unit < loan.stop for unit in again.units)
        known = again.loan.signer == self._host.signer.peer_id and loan.asker == stream.peer
        if not fits or not known or not self.machine.lends(mix_id(again.loan.body)):
            raise RemoteProtocolError(stream.peer, "asks again for what we do not lend")
        if self._lending >= LENDING_MAX:
            await refuse(stream, LATER, "busy with other loans")
            return
        await reply(stream, YES)
        await self._show(stream, again.units, (), exact=True)

    async def _show(
        self, stream: Stream, units: Sequence[int], hints: Sequence[float], *, exact: bool
    ) -> None:
        def work(batch: Sequence[int]) -> list[bytes]:
            states = [self._learner.outer(unit, unit + 1)[0] for unit in batch]
            return [self._mixer.lend(state, hints, exact=exact) for state in states]

        self._lending += 1
        try:
            for at in range(0, len(units), BATCH_UNITS):
                batch = units[at : at + BATCH_UNITS]
                shown = await self._host.exchange.compute(lambda b=batch: work(b))  # type: ignore[misc]
                for unit, payload in zip(batch, shown, strict=True):
                    await send_units(stream, unit, [payload])
            await stream.finish()
        finally:
            self._lending -= 1

    # ── paying ───────────────────────────────────────────────────────────────────────────
    async def _pay(self, mix: MixId, to: Contact) -> None:
        got: Answer = "unreachable"
        debt = self._debt(mix)
        if debt is None:
            return
        try:
            got = await self._push_debt(mix, debt, to)
        except RefusedError as error:
            got = _REFUSALS.get(error.status, "refused")
        except TransportError:
            pass
        except RemoteProtocolError as error:
            self._host.refused(error)
            got = "refused"
        self.feed(DebtAnswered(mix, to.peer, got))

    def _debt(self, mix: MixId) -> Debt | None:
        debt = self._debts.get(mix)
        if debt is not None:
            debt.payloads = self.riding.payloads.get(mix, {})
        return debt

    async def _push_debt(self, mix: MixId, debt: Debt, to: Contact) -> Answer:
        stream = await self._open(to)
        try:
            mask = self.machine.debts.get(mix, 0)
            if not mask:
                return "later"  # it was settled while the stream was opened
            units = mask.to_bytes(-(-mask.bit_length() // 8), "little")
            await stream.send(HEADER, encode(DebtPush(self._run, debt.signed, units)))
            if await answer(stream) == HAVE:
                return "paid"
            await send_debt(stream, mix, debt)
            await stream.finish()
            await answer(stream)
            return "kept"
        finally:
            await stream.close()

    async def serve_debt(self, stream: Stream, push: DebtPush) -> None:
        """Take -d from a member of the group that borrowed; raises like `serve_loan`."""
        loan, mix = open_loan(push.loan, stream.peer), mix_id(push.loan.body)
        mask = int.from_bytes(push.units, "little")
        if not mask or mask & ~loan.whole:
            raise RemoteProtocolError(stream.peer, "pays for units that were not lent")
        if loan.stop > self.machine.config.units:
            raise RemoteProtocolError(stream.peer, "pays for units that there are not")
        if self._ahead:
            await refuse(stream, LATER, "busy with a round or a state")
            return
        table, until = self._learner.mix_table, self._until(loan, loan.lender)
        where = (loan.start, loan.stop)
        inside, late = table.mask(mix, *where), table.forgotten(until, -1, *where)
        (wanted,) = self.ask(DebtOffered(stream.peer, push.loan, loan, mask, inside, late))
        verdict = wanted.answer if isinstance(wanted, AnswerDebt) else "later"
        if verdict != "kept":
            await refuse(stream, _STATUSES.get(verdict, LATER), "")
            return
        await reply(stream, YES)
        debts = await receive_debts(
            stream, self._run, self._mixer.check, 1, self._host.exchange.compute
        )
        debt = debts.get(mix)
        # A proof may speak of more units than are owed: of a history that gave way to another.
        if debt is None or mask & ~debt.mask:
            raise RemoteProtocolError(stream.peer, "pays less than it offered")
        left = mask & ~table.mask(mix, *where)
        owed = ((u, d) for u, d in debt.payloads.items() if mask >> (u - loan.start) & 1)
        self.riding.keep(mix, loan, owed)
        self.feed(DebtTaken(push.loan, loan, left))
        await reply(stream, YES)

    # ── what fellow members know ─────────────────────────────────────────────────────────
    async def _fetch_debts(self, peer: PeerId) -> None:
        told = await self.ask_debts(peer)
        self.feed(DebtsFetched(peer, self._aware(told) if told is not None else None))

    async def ask_debts(self, peer: PeerId) -> Told | None:
        """What a fellow member knows that our group owes; None if it can't be had."""
        group = self._host.group
        try:
            stream = await self._open(Contact(peer, ()))
            try:
                await stream.send(HEADER, encode(DebtsQuery(self._run, group)))
                await stream.finish()
                note = await _roster(stream)
                debts = await receive_debts(
                    stream, self._run, self._mixer.check, limits.CARRIED_MIXES_MAX,
                    self._host.exchange.compute,
                )  # fmt: skip
            finally:
                await stream.close()
        except (TransportError, RefusedError):
            return None
        except RemoteProtocolError as error:
            self._host.refused(error)
            return None
        self._host.told_company(group, note.company)
        return note, debts

    def _aware(self, told: Told) -> Aware:
        """What we were told, seen from the state that we hold now."""
        note, debts = told
        owed = []
        for mix, debt in debts.items():
            self.riding.keep(mix, debt.loan, debt.payloads.items())
            # What we held may prove other units: of a history that has just given way to this one.
            held = self._debts.setdefault(mix, debt)
            held.proofs += [proof for proof in debt.proofs if proof not in held.proofs]
            inside = self._maybe(mix, debt.loan) & debt.mask
            owed.append(Owed(debt.signed, debt.loan, inside))
        return Aware(note.roster, tuple(owed), note.sure)

    async def serve_debts(self, stream: Stream, query: DebtsQuery) -> None:
        """Tell a fellow member what our group owes; raises like `serve_loan`."""
        if query.group != self._host.group:
            await refuse(stream, NO, "we are in another group")
            return
        company = self._host.company()[:COMPANY_TOLD_MAX]
        note = RosterNote(self.machine.roster, self.machine.aware, company)
        await stream.send(REPLY, bytes([YES]) + pack(note))
        for mix in list(self.machine.debts):
            debt = self._debt(mix)
            if debt is not None:
                await send_debt(stream, mix, debt)
        await stream.finish()


# ── helpers ──────────────────────────────────────────────────────────────────────────────
def name_of(mix: MixId) -> str:
    """How people and logs call a mix."""
    return f"{mix:016x}"


async def _units(stream: Stream, loan: Loan) -> dict[int, bytes]:
    """The units of a loan that the lender shows."""
    found: dict[int, bytes] = {}
    while (frame := await stream.receive(UNITS_FRAME_BYTES_MAX)) is not None:
        for unit, payload in units_in(stream.peer, frame.kind, frame.payload):
            if not loan.start <= unit < loan.stop or unit in found:
                raise RemoteProtocolError(stream.peer, f"unit {unit} of a loan comes unasked")
            found[unit] = payload
    return found


async def _roster(stream: Stream) -> RosterNote:
    frame = await stream.receive(_ROSTER_BYTES_MAX)
    if frame is None or frame.kind != REPLY or not frame.payload:
        raise RemoteProtocolError(stream.peer, "no reply where one is due")
    if frame.payload[0] != YES:
        raise RefusedError(frame.payload[0], frame.payload[1:].decode(errors="replace"))
    try:
        return unpack(RosterNote, frame.payload[1:])
    except SchemaError as error:
        raise RemoteProtocolError(stream.peer, str(error)) from None
