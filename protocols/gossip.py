"""Gossip between groups, as one member sees it: each mix happens on both sides or on neither.

Every few rounds a group mixes each *slot* (a fixed range of units) with one other group, half and
half. The slot's initiator, by rendezvous over the group's members, *borrows* a look at the other
group's state, and d, half the difference, rides in the next averages of its own group. An applied
outcome with +d is the commitment: every member knows from its header what the group owes, and holds
the bytes. So any of them can *pay*: bring -d, with that header as proof, to the group that lent,
again and again until it says that -d is in its state. There too it rides in the next averages.

Exactly once: a unit's state remembers the mixes that are in it (`peer/train/mixtable.py`; part of
the state itself, so whoever gets the state gets it too), and no aggregator includes one that is in.
A mix may count in the borrower's rounds up to `Loan.until` and never later, so what is owed is
known then and final. What this costs is a delay of some rounds, never mass: all that may be lost is
a debt that nobody of the other group takes for hours, and then that is said (`MixLost`).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Final

from protocols import limits
from protocols.election import candidates
from protocols.errors import RemoteProtocolError
from protocols.events import Send, Tick
from protocols.gossip_events import (
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
    PayDebt,
    RoundDone,
    StateReplaced,
)
from protocols.loans import Contact, Loan, MixId, mask_of, mix_id
from protocols.messages import DebtClosed, LoanQuery, Seat
from protocols.records import Signed
from protocols.schema import pack
from protocols.types import GroupName, PeerId, RunId

GROUPS_DRAWN: Final = 3  # partners tried before a slot waits for its next turn
BORROW_TRIES_MAX: Final = 6
RETRY_S: Final = 1.0
RETRY_S_MAX: Final = 60.0
LOAN_ROUNDS: Final = 6.0  # of ours: the other side's way to its commitment and back to us
KNOWN_AFTER_ROUNDS: Final = 2  # then every other member has seen us in a round, and knows our loans
ROSTER_EVER_MAX: Final = 16 * limits.GROUP_MEMBERS_MAX


@dataclass(frozen=True, kw_only=True)
class GossipConfig:
    """What the manifest decides."""

    run: RunId
    units: int
    every: int
    """Rounds between two mixes of the same slot; 0: no gossip."""
    slots: int
    round_s: float
    """From one average of a unit to the next."""
    exchange_s: float
    fragments: int = 1
    """Rounds in which every unit is exchanged once."""

    def bounds(self, slot: int) -> tuple[int, int]:
        """The units of a slot."""
        count = self.count
        return self.units * slot // count, self.units * (slot + 1) // count

    @property
    def count(self) -> int:
        """How many slots there are."""
        least = -(-self.units // limits.SLOT_UNITS_MAX)
        return max(1, least, min(self.slots, self.units))


@dataclass(slots=True)
class _Attempt:
    """A slot's way to a loan."""

    round: int
    partners: list[tuple[GroupName, list[Contact]]] = field(default_factory=list)
    tries: int = 0


@dataclass(slots=True)
class Carried:
    """A mix whose payload we hold for our group's averages: +d that we borrowed, or -d owed us."""

    signed: Signed
    loan: Loan
    sign: int
    until: int
    mask: int
    """Units that we hold it for: all that were borrowed, or those that are owed us."""
    left: int
    """Those that are not in the state yet."""


@dataclass(slots=True)
class _Open:
    """A mix that is on its way in our group, whoever carries it."""

    loan: Loan
    inside: int
    until: int


@dataclass(slots=True)
class _Debt:
    """-d that our group owes."""

    signed: Signed
    loan: Loan
    mask: int
    round: int
    """Of the state that had it first, all of it."""
    contacts: list[Contact]
    """Whom to try, in turn; those in front were tried."""
    final: bool = False
    learned: bool = False
    """From a fellow member, after it was said that it is owed."""
    payable_s: float = math.inf
    next_s: float = 0.0
    tried: int = 0
    """Of the contacts."""
    failures: int = 0
    rank: int = 0
    """Our turn to pay, among the group and members `ranked`: it is looked at all the time."""
    ranked: tuple[GroupName, tuple[PeerId, ...]] | None = None
    refused: set[PeerId] = field(default_factory=set)
    """Since `contacts` were looked up."""
    there: frozenset[PeerId] = frozenset()
    """Who is in the group that lent, by the directory; nobody: we have not looked."""


class GossipMachine:
    """See the module. `handle` raises RemoteProtocolError before anything changed."""

    def __init__(self, me: PeerId, config: GossipConfig) -> None:
        self.me = me
        self.config = config
        self.group = GroupName("")
        self.round = 0
        self.members: tuple[PeerId, ...] = ()
        self.carried: dict[MixId, Carried] = {}
        self._attempts: dict[int, _Attempt] = {}
        self._open: dict[MixId, _Open] = {}
        self._debts: dict[MixId, _Debt] = {}
        self._leases: dict[MixId, tuple[Loan, float]] = {}
        """What we lent, and until when we lend nothing else of it."""
        self._loans = 0
        self._rounds_here = 0
        """Rounds that we have done in this group, with this state."""
        self._roster_ever: dict[PeerId, None] = {}
        """Members of this group, the latest seen last: whose loans we honour."""
        self._unaware = False
        """We may not know all that our group owes."""
        self._asked: set[PeerId] = set()
        self._unsure: set[PeerId] = set()
        """Members who may not know it all either."""
        self._fetching_s = -math.inf
        self._firm = -1
        """The latest of our states that most of the group stood at."""
        self._taken: dict[MixId, int] = {}
        """-d that is in our state since this round, and not firm yet."""
        self._since = 0
        """What our state had at this round is firm only when that round is."""

    # ── the outside ──────────────────────────────────────────────────────────────────────
    @property
    def deadline_s(self) -> float:
        """When `handle(Tick())` is due at the latest."""
        times = [
            max(debt.next_s, debt.payable_s + self._rank(mix) * self._patience_s)
            for mix, debt in self._debts.items()
        ]
        if self._unaware:
            times.append(self._fetching_s)
        return min(times, default=math.inf)

    @property
    def aware(self) -> bool:
        """Whether we know all that our group owes, as far as anybody does."""
        return not self._unaware

    @property
    def roster(self) -> tuple[PeerId, ...]:
        """Members of our group, now and before: whose loans it honours."""
        return tuple(self._roster_ever)

    @property
    def debts(self) -> dict[MixId, int]:
        """What our group owes: mix -> units as a mask."""
        return {mix: debt.mask for mix, debt in self._debts.items()}

    def known(self) -> dict[MixId, Loan]:
        """Mixes that a new state must be asked about."""
        found = {mix: c.loan for mix, c in self.carried.items()}
        return found | {mix: debt.loan for mix, debt in self._debts.items()}

    def attachable(self, number: int) -> list[tuple[MixId, Carried]]:
        """What should ride in our contribution to round `number`, the oldest loans first: of those
        with units in the same span, `LOANS_MAX`."""
        return [(m, c) for m, c in self.carried.items() if c.left and c.until >= number]

    def _until(self, loan: Loan, group: GroupName) -> int:
        return loan.until(group, self.config.fragments)

    def handle(self, event: GossipEvent, now_s: float) -> list[GossipEffect]:
        """Advance.

        Raises:
            RemoteProtocolError: a peer broke the rules; nothing changed.
        """
        match event:
            case Tick():
                return self._fetch(now_s) + self._pay(now_s)
            case RoundDone():
                return self._round_done(event, now_s)
            case StateReplaced():
                return self._state_replaced(event)
            case DebtsFetched(peer, aware):
                self._fetching_s = now_s + RETRY_S
                return self._told(peer, aware) if aware is not None else []
            case ContactsFound(mix, contacts):
                return self._contacts_found(mix, contacts)
            case GroupsFound(slot, groups):
                return self._groups_found(slot, groups)
            case Borrowed(slot, signed, loan):
                return self._borrowed(slot, signed, loan)
            case NotBorrowed(slot, peer, gone):
                return self._not_borrowed(slot, peer, gone)
            case LoanAsked():
                return self._loan_asked(event, now_s)
            case DebtOffered():
                return self._debt_offered(event)
            case DebtTaken(signed, loan, left):
                return self._debt_taken(signed, loan, left)
            case DebtAnswered():
                return self._debt_answered(event, now_s)
            case ClosedHeard(sender, message):
                return self._closed_heard(sender, message)

    # ── rounds ───────────────────────────────────────────────────────────────────────────
    def _round_done(self, event: RoundDone, now_s: float) -> list[GossipEffect]:
        new = event.group != self.group
        effects = self._moved(event.group, event.round - 1) if new else []
        self.round, self.members = event.round, event.members
        self._rounds_here += 1
        if event.firm and not self._unaware:  # else we do not know yet who has fallen silent
            self._firm = event.round - 1
            self._taken = {mix: since for mix, since in self._taken.items() if since > self._firm}
        for peer in event.members:
            self._roster_ever.pop(peer, None)
            self._roster_ever[peer] = None
        while len(self._roster_ever) > ROSTER_EVER_MAX:
            del self._roster_ever[next(iter(self._roster_ever))]
        for note in event.notes:
            effects += self._noted(note)
        effects += self._finish(now_s)
        return effects + self._initiate() + self._pay(now_s)

    def _moved(self, group: GroupName, number: int) -> list[GossipEffect]:
        """We stand in another group: what is under way in the old one is others' business."""
        self.group = group
        self._restart(number)
        self._rounds_here = 0
        self._unaware, self._asked = number > 0, set()
        gone = list(self.carried)
        self._attempts.clear()
        self._open.clear()
        self._leases.clear()
        self._roster_ever.clear()
        self.carried.clear()
        return [Forget(mix) for mix in gone if mix not in self._debts]

    def _noted(self, note: Noted) -> list[GossipEffect]:
        """An applied outcome contains a mix."""
        sign = note.loan.sign_for(self.group)
        mask = mask_of(note.loan, note.start, note.stop)
        if not sign or not mask:
            return []
        effects: list[GossipEffect] = []
        until = self.round + limits.MIX_COMMIT_ROUNDS * self.config.fragments
        open_ = self._open.setdefault(note.mix, _Open(note.loan, 0, until))
        open_.inside |= mask
        open_.until = until
        carried = self.carried.get(note.mix)
        if carried is not None:
            carried.left &= ~mask
        if sign > 0:
            if note.mix not in self._debts and len(self._debts) >= limits.CARRIED_MIXES_MAX:
                return [MixLost(note.mix, note.loan, mask.bit_count(), "too many debts at once")]
            debt = self._debts.setdefault(note.mix, _debt(note.signed, note.loan, 0, self.round))
            debt.mask |= mask
            debt.round = self.round
            return effects
        self._taken[note.mix] = self.round
        if len(self._taken) > 4 * limits.CARRIED_MIXES_MAX:
            self._restart(self.round)
        if open_.inside == note.loan.whole or (carried is not None and not carried.left):
            self._leases.pop(note.mix, None)
            effects.append(MixReturned(note.mix, note.loan, open_.inside.bit_count()))
        return effects

    def _finish(self, now_s: float) -> list[GossipEffect]:
        """Close what is complete or out of time."""
        effects: list[GossipEffect] = []
        for mix, carried in list(self.carried.items()):
            if carried.left and self.round <= carried.until:
                continue
            del self.carried[mix]
            if mix not in self._debts:
                effects.append(Forget(mix))
                if carried.sign > 0:
                    effects.append(MixDropped(mix, carried.loan, "no average took it in time"))
        for mix, debt in self._debts.items():
            # Paid is what most of the group have: no other history will take its place.
            if debt.final and math.isinf(debt.payable_s) and self._firm >= debt.round:
                debt.payable_s = now_s
            over = self.round > self._until(debt.loan, debt.loan.borrower)
            if not debt.final and (debt.mask == debt.loan.whole or over):
                debt.final = True
                if debt.learned:
                    continue
                effects.append(MixCommitted(mix, debt.loan, debt.mask.bit_count()))
        self._open = {
            mix: o for mix, o in self._open.items()
            if o.inside != o.loan.whole and self.round <= o.until
        }  # fmt: skip
        self._leases = {m: lease for m, lease in self._leases.items() if now_s < lease[1]}
        stale = [s for s, a in self._attempts.items() if a.round + self.config.every <= self.round]
        for slot in stale:
            del self._attempts[slot]
        return effects

    def _state_replaced(self, event: StateReplaced) -> list[GossipEffect]:
        """What our group has is what the new state has."""
        new = event.group != self.group
        effects = self._moved(event.group, event.round) if new else []
        self.round = event.round
        self._rounds_here = 0
        self._restart(event.round)
        for mix, carried in self.carried.items():
            carried.left = carried.mask & ~event.inside.get(mix, 0)
        for mix, debt in list(self._debts.items()):
            debt.mask &= event.inside.get(mix, 0)
            debt.round, debt.payable_s = event.round, math.inf
            if not debt.mask:
                del self._debts[mix]
                effects += [
                    MixDropped(mix, debt.loan, "the group's state does not have it"),
                    *([Forget(mix)] if mix not in self.carried else []),
                ]
        self._open.clear()
        # What the group owes for rounds that we never saw, somebody must tell us.
        self._unaware, self._asked = event.round > 0, set()
        self._unsure.clear()
        effects += self._told(None, event.aware) if event.aware is not None else []
        # What we had of another history may be owed all the same, for other units.
        return [e for e in effects if not isinstance(e, Forget) or not self._needs(e.mix)]

    def _needs(self, mix: MixId) -> bool:
        return mix in self._debts or mix in self.carried

    def _restart(self, number: int) -> None:
        """Nothing that our state has at this round is firm yet."""
        self._firm, self._since = -1, number
        self._taken.clear()

    def _fetch(self, now_s: float) -> list[GossipEffect]:
        """Ask one member after another what we owe together, until one has told us."""
        if not self._unaware or now_s < self._fetching_s:
            return []
        others = [peer for peer in self.members if peer != self.me]
        source = next((p for p in others if p not in self._asked), None)
        if source is None:
            # Nobody answered, or nobody is there: a loner that has done a round knows enough.
            self._unaware, self._asked = bool(others) or not self.members, set()
            self._fetching_s = now_s + self.config.round_s
            return []
        self._asked.add(source)
        self._fetching_s = now_s + RETRY_S_MAX  # should no answer be reported
        return [FetchDebts(source)]

    def _told(self, teller: PeerId | None, aware: Aware) -> list[GossipEffect]:
        """A fellow member tells what we could not see."""
        if teller is not None:
            self._unsure.add(teller)
        # If nobody is sure any more, what all of them know together has to do.
        everybody = self._unsure >= {peer for peer in self.members if peer != self.me}
        if aware.sure or (everybody and teller is not None):
            self._unaware = False
        older = dict.fromkeys([*aware.roster[-ROSTER_EVER_MAX:], *self._roster_ever])
        self._roster_ever = dict.fromkeys(list(older)[-ROSTER_EVER_MAX:])
        effects: list[GossipEffect] = []
        for owed in aware.owed:
            mix, loan = mix_id(owed.signed.body), owed.loan
            if mix in self._debts:
                self._debts[mix].mask |= owed.inside
                continue
            ours = loan.borrower == self.group and loan.run == self.config.run
            if not owed.inside or not ours or len(self._debts) >= limits.CARRIED_MIXES_MAX:
                effects += [] if self._needs(mix) else [Forget(mix)]
                continue
            self._debts[mix] = _debt(owed.signed, loan, owed.inside, self.round)
            self._debts[mix].learned = True
            self._debts[mix].tried = len(loan.contacts)  # an old one: look who is there now
        return effects

    # ── borrowing ────────────────────────────────────────────────────────────────────────
    def _initiate(self) -> list[GossipEffect]:
        """Begin a mix of each slot whose turn it is, if it falls to us."""
        every = self.config.every
        if not every or not self.round or self.me not in self.members:
            return []
        effects: list[GossipEffect] = []
        for slot in range(self.config.count):
            if self.round % every != slot % every or slot in self._attempts:
                continue
            if self.initiator(slot) != self.me or self._engaged(*self.config.bounds(slot)):
                continue
            self._attempts[slot] = _Attempt(self.round)
            effects.append(FindGroups(slot, GROUPS_DRAWN))
        return effects

    def initiator(self, slot: int) -> PeerId:
        """Who begins the mix of a slot at our round."""
        return self._order(f"gossip\x00{slot}\x00{self.round}")[0]

    def _order(self, what: str) -> list[PeerId]:
        name = GroupName(f"{self.group}\x00{what}")
        return candidates(name, 0, [Seat(peer, 1) for peer in self.members])

    def _engaged(self, start: int, stop: int, but: int | None = None) -> bool:
        """Whether an unfinished mix of ours (but for the attempt at that slot) overlaps these."""
        loans = [c.loan for c in self.carried.values() if c.left]
        loans += [o.loan for o in self._open.values()]
        loans += [loan for loan, _ in self._leases.values()]
        if any(loan.start < stop and start < loan.stop for loan in loans):
            return True
        bounds = [self.config.bounds(slot) for slot in self._attempts if slot != but]
        return any(a < stop and start < b for a, b in bounds)

    def _groups_found(
        self, slot: int, groups: tuple[tuple[GroupName, tuple[Contact, ...]], ...]
    ) -> list[GossipEffect]:
        attempt = self._attempts.get(slot)
        if attempt is None:
            return []
        fit = [(g, list(c)) for g, c in groups if g != self.group and c]
        attempt.partners = sorted(fit, key=lambda item: self._lot(slot, item[0]))[:GROUPS_DRAWN]
        return self._borrow(slot, attempt)

    def _key(self, group: GroupName) -> bytes:
        return hashlib.sha256(f"{self.config.run}\x00{group}".encode()).digest()

    def _lot(self, slot: int, group: GroupName) -> bytes:
        """The draw among the groups that were found: the same for whoever draws."""
        text = f"{self.config.run}\x00{self.group}\x00{self.round}\x00{slot}\x00{group}"
        return hashlib.sha256(text.encode()).digest()

    def _borrow(self, slot: int, attempt: _Attempt) -> list[GossipEffect]:
        while attempt.partners and not attempt.partners[0][1]:
            attempt.partners.pop(0)
        if not attempt.partners or attempt.tries >= BORROW_TRIES_MAX:
            del self._attempts[slot]
            return []
        attempt.tries += 1
        group, contacts = attempt.partners[0]
        start, stop = self.config.bounds(slot)
        query = LoanQuery(self.config.run, self.group, group, self.round, start, stop, ())
        return [Borrow(slot, query, contacts.pop(0))]

    def _not_borrowed(self, slot: int, peer: PeerId, gone: bool) -> list[GossipEffect]:
        attempt = self._attempts.get(slot)
        if attempt is None:
            return []
        if not gone and attempt.partners:
            attempt.partners.pop(0)  # that group is busy, whomever we ask
        return self._borrow(slot, attempt)

    def _borrowed(self, slot: int, signed: Signed, loan: Loan) -> list[GossipEffect]:
        attempt = self._attempts.pop(slot, None)
        mix = mix_id(signed.body)
        full = len(self.carried) >= limits.CARRIED_MIXES_MAX
        if attempt is None or loan.borrower != self.group or mix in self.carried or full:
            return [Forget(mix), MixDropped(mix, loan, "it came too late")]
        self.carried[mix] = Carried(
            signed, loan, 1, self._until(loan, self.group), loan.whole, loan.whole
        )
        return []

    # ── lending ──────────────────────────────────────────────────────────────────────────
    def _loan_asked(self, event: LoanAsked, now_s: float) -> list[GossipEffect]:
        query = event.query
        if query.run != self.config.run:
            raise RemoteProtocolError(event.sender, "asks for a loan in another run")
        if event.sender in self.members or query.group == query.lender:
            raise RemoteProtocolError(event.sender, "asks its own group for a loan")
        bounds = [self.config.bounds(slot) for slot in range(self.config.count)]
        if (query.start, query.stop) not in bounds:
            raise RemoteProtocolError(event.sender, "asks for units that are no slot")
        if not self.config.every:
            raise RemoteProtocolError(event.sender, "this run does not gossip")
        if query.lender != self.group or self._rounds_here < KNOWN_AFTER_ROUNDS:
            return [DenyLoan("we are in another group, or new in this one")]
        slot = bounds.index((query.start, query.stop))
        # Two that ask each other at once would swap their states: the same one always lends.
        gives_way = slot in self._attempts and self._key(query.group) < self._key(self.group)
        if self._engaged(query.start, query.stop, but=slot if gives_way else None):
            return [DenyLoan("busy with another mix")]
        if len(self._leases) >= limits.CARRIED_MIXES_MAX:
            return [DenyLoan("too many loans at once")]
        self._attempts.pop(slot, None)
        self._loans += 1
        loan = Loan(
            self.config.run, query.group, event.sender, query.round, self.group, self.round,
            query.start, query.stop, self._loans, event.contacts[: limits.CONTACTS_MAX],
        )  # fmt: skip
        self._leases[mix_id(pack(loan))] = (loan, now_s + self._lease_s)
        return [GrantLoan(loan)]

    def lends(self, mix: MixId) -> bool:
        """Whether this loan of ours is in force."""
        return mix in self._leases

    @property
    def _lease_s(self) -> float:
        return LOAN_ROUNDS * self.config.round_s + self.config.exchange_s

    def _debt_offered(self, event: DebtOffered) -> list[GossipEffect]:
        """Whether to take -d, for units that are not in our state yet."""
        loan, mix = event.loan, mix_id(event.signed.body)
        if loan.run != self.config.run:
            raise RemoteProtocolError(event.sender, "pays a debt of another run")
        if loan.stop > self.config.units:
            raise RemoteProtocolError(event.sender, "pays for units that there are not")
        if loan.lender != self.group:
            # Who has just come back from disk has done no round yet, and so is in no group.
            return [AnswerDebt("elsewhere" if self.group else "later")]
        lender = event.signed.signer
        if lender != self.me and lender not in self._roster_ever:
            if self._unaware:
                return [AnswerDebt("later")]
            raise RemoteProtocolError(event.sender, "pays for a loan that we know nothing of")
        if event.mask and event.inside & event.mask == event.mask:
            # Most of our group must have it: else a history without it may take the state's place.
            firm = self._firm >= self._taken.get(mix, self._since)
            return [AnswerDebt("paid" if firm else "later")]
        too_late = event.mask & ~event.inside & event.forgotten
        if too_late or self.round > self._until(loan, self.group):
            raise RemoteProtocolError(event.sender, "pays too late for us to count it once")
        held = self.carried.get(mix)
        if held is not None and not event.mask & ~(held.left | event.inside):
            return [AnswerDebt("later")]  # on its way
        if held is None and len(self.carried) >= limits.CARRIED_MIXES_MAX:
            return [AnswerDebt("later")]
        return [AnswerDebt("kept")]

    def _debt_taken(self, signed: Signed, loan: Loan, left: int) -> list[GossipEffect]:
        mix = mix_id(signed.body)
        if loan.lender != self.group or len(self.carried) >= limits.CARRIED_MIXES_MAX:
            return [Forget(mix)]
        self.carried[mix] = Carried(signed, loan, -1, self._until(loan, self.group), left, left)
        return []

    # ── paying ───────────────────────────────────────────────────────────────────────────
    @property
    def _patience_s(self) -> float:
        """After which the next member tries to pay too."""
        return LOAN_ROUNDS * self.config.round_s + RETRY_S

    def _rank(self, mix: MixId) -> int:
        debt = self._debts[mix]
        if debt.ranked != (self.group, self.members):
            order = self._order(f"debt\x00{mix}")
            debt.rank = order.index(self.me) if self.me in order else len(order)
            debt.ranked = self.group, self.members
        return debt.rank

    def _pay(self, now_s: float) -> list[GossipEffect]:
        effects: list[GossipEffect] = []
        for mix, debt in list(self._debts.items()):
            if now_s - debt.payable_s >= limits.DEBT_TIMEOUT_S:
                effects += self._close(mix, debt, "nobody of the other group takes it")
                continue
            begin_s = debt.payable_s + self._rank(mix) * self._patience_s
            if now_s < max(begin_s, debt.next_s):
                continue
            debt.next_s = now_s + RETRY_S_MAX  # should no answer be reported
            if debt.tried < len(debt.contacts):
                effects.append(PayDebt(mix, debt.contacts[debt.tried]))
            else:
                effects.append(FindContacts(mix, debt.loan.lender))
        return effects

    def _contacts_found(self, mix: MixId, contacts: tuple[Contact, ...]) -> list[GossipEffect]:
        debt = self._debts.get(mix)
        if debt is not None:
            found = {c.peer: c for c in (*contacts, *debt.loan.contacts)}
            debt.contacts = list(found.values())[: limits.GROUP_MEMBERS_MAX]
            debt.tried, debt.next_s = 0, -math.inf
            debt.there, debt.refused = frozenset(c.peer for c in contacts), set()
        return []

    def _debt_answered(self, event: DebtAnswered, now_s: float) -> list[GossipEffect]:
        debt = self._debts.get(event.mix)
        if debt is None:
            return []
        if event.answer == "paid":
            return self._close(event.mix, debt, "")
        debt.next_s = now_s + max(RETRY_S, self.config.round_s / 2)
        if event.answer in ("kept", "later"):
            debt.failures = 0
            return []
        if event.answer == "refused":
            debt.refused.add(event.peer)
            # The loan's few contacts may know less than others, or have come back just now.
            if debt.there and debt.refused >= debt.there:
                return self._close(event.mix, debt, "the other group refuses it")
        debt.tried += 1
        debt.failures += 1
        debt.next_s = now_s + min(RETRY_S * 2 ** min(debt.failures, 16), RETRY_S_MAX)
        return []

    def _close(self, mix: MixId, debt: _Debt, lost: str) -> list[GossipEffect]:
        del self._debts[mix]
        self.carried.pop(mix, None)
        units = debt.mask.bit_count()
        told = MixLost(mix, debt.loan, units, lost) if lost else MixSettled(mix, debt.loan, units)
        closed = DebtClosed(self.config.run, self.group, mix, not lost)
        others = [peer for peer in self.members if peer != self.me]
        return [told, Forget(mix), *(Send(peer, closed) for peer in others)]

    def _closed_heard(self, sender: PeerId, message: DebtClosed) -> list[GossipEffect]:
        if message.run != self.config.run:
            raise RemoteProtocolError(sender, "closes a debt of another run")
        debt = self._debts.get(message.mix)
        if message.group != self.group or sender not in self._roster_ever:
            return []  # one who has just joined or moved; the debt is closed all the same, later
        # One who closes what may still grow has seen another history than we.
        if debt is None or not debt.final:
            return []
        del self._debts[message.mix]
        return [Forget(message.mix)]


def _debt(signed: Signed, loan: Loan, mask: int, number: int) -> _Debt:
    return _Debt(signed, loan, mask, number, list(loan.contacts))
