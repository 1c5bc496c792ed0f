"""Groups that gossip in virtual time, with the product's machine and table and whole numbers.

A group is a log of rounds that its members apply one after another, each at its own pace; who
aggregates, who is heard, who dies is drawn from one seed. A unit's state is one whole number, so
"mass is conserved" means equal, not close. Training is a step of each unit in each round, drawn
at random for each group (`learn`); a coded difference is one that is a little off (`coded`).
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from peer.train.mixtable import MixTable
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.events import Send, Tick
from protocols.fragments import Fragments
from protocols.gossip import GossipConfig, GossipMachine
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
    GossipTold,
    GrantLoan,
    GroupsFound,
    LoanAsked,
    NotBorrowed,
    Noted,
    Owed,
    PayDebt,
    RoundDone,
    StateReplaced,
)
from protocols.loans import Contact, Loan, MixId, mix_id, runs_of
from protocols.messages import DebtClosed
from protocols.records import Signed
from protocols.schema import pack
from protocols.types import GroupName, PeerId, RunId

RUN = RunId("ab" * 32)
Payload = dict[int, int]
"""unit -> d."""


@dataclass
class Entry:
    """One round's outcome: what mixes are in which unit, and the notes of its headers."""

    mixes: dict[int, list[tuple[MixId, int, int, int]]]
    """unit -> (mix, until, sign, d)."""
    notes: tuple[Noted, ...]
    steps: list[int] = field(default_factory=list)
    """What was learned, by unit; empty: nothing."""


@dataclass
class State:
    values: list[int]
    table: MixTable
    round: int = 0
    fragments: int = 1

    def copy(self) -> State:
        return State(list(self.values), self.table.copy(), self.round, self.fragments)

    def maybe(self, mix: MixId, loan: Loan, group: GroupName) -> int:
        """Units that have the mix, or would have forgotten it."""
        where = (loan.start, loan.stop)
        until = loan.until(group, self.fragments)
        forgotten = self.table.forgotten(until, loan.sign_for(group), *where)
        return self.table.mask(mix, *where) | forgotten

    def apply(self, entry: Entry) -> None:
        for unit, step in enumerate(entry.steps):
            self.values[unit] += step
        for unit, mixes in entry.mixes.items():
            for mix, until, sign, d in mixes:
                if self.table.admits(unit, mix, until, sign):
                    self.table.add(unit, mix, until, sign)
                    self.values[unit] += sign * d
        self.round += 1


@dataclass
class Member:
    id: PeerId
    group: Group
    machine: GossipMachine
    state: State
    payloads: dict[MixId, Payload] = field(default_factory=dict)
    alive: bool = True


@dataclass
class Group:
    name: GroupName
    round_s: float
    members: dict[PeerId, Member] = field(default_factory=dict)
    log: list[Entry] = field(default_factory=list)
    head: State = field(default_factory=lambda: State([], MixTable(0)))
    """The state after the whole log, whoever has applied it."""
    applied: Counter[tuple[MixId, int]] = field(default_factory=Counter)

    @property
    def living(self) -> list[Member]:
        return [m for m in self.members.values() if m.alive]


class GossipWorld:
    """Groups on one virtual clock. `loss`: of anything that crosses the network. `coded`: the error
    of a difference, relative to it (a codec's root mean square)."""

    def __init__(
        self, seed: int | str, *, units: int = 6, slots: int = 3, every: int = 4, loss: float = 0.0,
        crash: float = 0.0, round_s: float = 5.0, fragments: int = 1, coded: float = 0.0,
    ) -> None:  # fmt: skip
        """`round_s`: of a turn of all fragments; every so many of them a slot is mixed."""
        self.seed = seed
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.loss = loss
        self.crash = crash
        """Chance that a member dies in a round, at some moment of it."""
        self.config = GossipConfig(
            run=RUN, units=units, every=every * fragments, slots=slots, round_s=round_s,
            exchange_s=10.0, fragments=fragments,
        )  # fmt: skip
        self.fragments = Fragments.cut([1] * units, fragments)
        self.groups: dict[GroupName, Group] = {}
        self.peers: dict[PeerId, Member] = {}
        self.told: list[tuple[PeerId, GossipTold]] = []
        self.refusals: list[str] = []
        self.d: dict[tuple[MixId, int], int] = {}
        """What each mix was, as its first outcome had it."""
        self.quiet = False
        """Nobody begins a mix any more."""
        self.coded = coded
        self.learn = 0.0
        """Standard deviation of what a group learns in a round, in each unit."""
        self.learned = [0] * units
        """Per unit: by all groups so far."""
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._names = itertools.count()

    # ── making and breaking ──────────────────────────────────────────────────────────────
    def add_group(self, name: str, size: int, values: Sequence[int]) -> Group:
        round_s = self.config.round_s / self.fragments.count
        group = Group(GroupName(name), round_s * self.rng.uniform(0.8, 1.25))
        table = MixTable(self.config.units)
        group.head = State(list(values), table, fragments=self.fragments.count)
        self.groups[group.name] = group
        for _ in range(size):
            self.add_member(group)
        self._after(self.rng.uniform(0, group.round_s), lambda: self._round(group))
        return group

    def add_member(self, group: Group) -> Member:
        """A newcomer with the state of whoever is furthest."""
        peer = PeerId(f"{group.name}-{next(self._names)}")
        donor = max(group.living, key=lambda m: m.state.round, default=None)
        state = (donor.state if donor is not None else group.head).copy()
        member = Member(peer, group, GossipMachine(peer, self.config), state)
        group.members[peer] = self.peers[peer] = member
        aware = self._tell(donor, member) if donor is not None else None
        self.feed(member, StateReplaced(group.name, state.round, {}, aware))
        self._tick(member)
        return member

    def kill(self, member: Member) -> None:
        """It vanishes, with all that only it knew."""
        member.alive = False
        member.group.members.pop(member.id)

    def heal(self, member: Member, donor: Member) -> None:
        """It takes another's state for its own."""
        member.state = donor.state.copy()
        known = member.machine.known()
        inside = {
            mix: member.state.maybe(mix, loan, member.group.name) for mix, loan in known.items()
        }
        aware = self._tell(donor, member)
        self.feed(member, StateReplaced(member.group.name, member.state.round, inside, aware))

    # ── time ─────────────────────────────────────────────────────────────────────────────
    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now_s + seconds, next(self._order), action))

    def run(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while self._queue and self._queue[0][0] <= end_s:
            self.now_s, _, action = heapq.heappop(self._queue)
            action()
        self.now_s = end_s

    def _tick(self, member: Member) -> None:
        if member.alive:
            self.feed(member, Tick())
            wait_s = member.machine.deadline_s - self.now_s
            assert wait_s > 0, f"seed {self.seed}: a deadline that does not move"
            self._after(min(max(wait_s, 0.01), 1.0), lambda: self._tick(member))

    # ── rounds ───────────────────────────────────────────────────────────────────────────
    def _round(self, group: Group) -> None:
        """Average once: contributions of whoever is up to date and heard, then apply."""
        number = len(group.log)
        ready = [m for m in group.living if m.state.round == number]
        if ready:
            if self.rng.random() < self.crash and len(group.living) > 1:
                victim = self.rng.choice(group.living)  # perhaps the aggregator, perhaps before
                self._after(self.rng.uniform(0, group.round_s), lambda: self._die(victim))
            units = self.fragments.of(number)
            cut = self.rng.randint(units.start, units.stop)
            spans = [(a, b) for a, b in ((units.start, cut), (cut, units.stop)) if a < b]
            entry = Entry({}, (), self._learn(units))
            for start, stop in spans:
                self._reduce(group, self.rng.choice(ready), ready, start, stop, entry)
            group.log.append(entry)
            self._account(group, entry)
            group.head.apply(entry)
            for member in ready:
                self._after(self.rng.uniform(0.05, 0.3) * group.round_s, self._applier(member))
        for member in group.living:
            for missed in range(len(group.log) - member.state.round if member not in ready else 0):
                self._after(0.1 * (missed + 1), self._applier(member))  # it catches up
        self._after(group.round_s * self.rng.uniform(0.9, 1.1), lambda: self._round(group))

    def _learn(self, units: range) -> list[int]:
        if not self.learn:
            return []
        steps = [0] * len(self.learned)
        for unit in units:
            steps[unit] = round(self.rng.gauss(0.0, self.learn))
            self.learned[unit] += steps[unit]
        return steps

    def _die(self, victim: Member) -> None:
        if victim.alive and len(victim.group.living) > 1:
            self.kill(victim)
            self.add_member(victim.group)

    def _reduce(
        self, group: Group, aggregator: Member, ready: list[Member], start: int, stop: int,
        entry: Entry,
    ) -> None:  # fmt: skip
        number = len(group.log)
        table = aggregator.state.table.copy()
        inside: dict[MixId, tuple[Signed, Loan, int]] = {}
        for member in ready:
            if member is not aggregator and self.rng.random() < self.loss:
                continue
            for mix, carried in member.machine.attachable(number):
                for unit in range(max(start, carried.loan.start), min(stop, carried.loan.stop)):
                    if self.rng.random() < self.loss or unit not in member.payloads.get(mix, {}):
                        continue
                    mixes = entry.mixes.setdefault(unit, [])
                    fresh = all(m != mix for m, *_ in mixes)
                    admitted = table.admits(unit, mix, carried.until, carried.sign)
                    room = len(mixes) < limits.MIXES_PER_UNIT_MAX
                    if not (fresh and admitted and room and carried.until >= number):
                        continue
                    table.add(unit, mix, carried.until, carried.sign)
                    d = member.payloads[mix][unit]
                    mixes.append((mix, carried.until, carried.sign, d))
                    signed, loan, mask = inside.get(mix, (carried.signed, carried.loan, 0))
                    inside[mix] = (signed, loan, mask | 1 << (unit - carried.loan.start))
        entry.notes += tuple(
            Noted(mix, signed, loan, loan.start + a, loan.start + b)
            for mix, (signed, loan, mask) in inside.items()
            for a, b in runs_of(mask)
        )

    def _account(self, group: Group, entry: Entry) -> None:
        for unit, mixes in entry.mixes.items():
            for mix, _, _, d in mixes:
                group.applied[mix, unit] += 1
                assert self.d.setdefault((mix, unit), d) == d, f"seed {self.seed}: another d"

    def _applier(self, member: Member) -> Callable[[], None]:
        def apply() -> None:
            group, number = member.group, member.state.round
            if not member.alive or number >= len(group.log):
                return
            entry = group.log[number]
            member.state.apply(entry)
            for unit, mixes in entry.mixes.items():
                for mix, _, sign, d in mixes:
                    if sign > 0:
                        member.payloads.setdefault(mix, {})[unit] = d
            living = tuple(sorted(m.id for m in group.living))
            here = sum(m.state.round >= number for m in group.living)
            firm = 2 * here > len(group.living)
            self.feed(member, RoundDone(group.name, number + 1, living, entry.notes, firm))

        return apply

    # ── the driver's work, symbolically ──────────────────────────────────────────────────
    def feed(self, member: Member, event: GossipEvent) -> list[GossipEffect]:
        """Hand a member's machine an event; the answers to a query are returned, not performed."""
        if not member.alive:
            return []
        try:
            effects = member.machine.handle(event, self.now_s)
        except RemoteProtocolError as error:
            self.refusals.append(error.reason)
            return []
        answers: list[GossipEffect] = []
        for effect in effects:
            match effect:
                case GrantLoan() | DenyLoan() | AnswerDebt():
                    answers.append(effect)
                case FindGroups(slot, count):
                    if not self.quiet:
                        self._later(member, GroupsFound(slot, self._draw(member, count)))
                case Borrow():
                    self._borrow(member, effect)
                case PayDebt(mix, to):
                    self._pay(member, mix, to)
                case FindContacts(mix, name):
                    self._later(member, ContactsFound(mix, self._contacts(self.groups[name])))
                case FetchDebts(peer):
                    self._fetch(member, self.peers[peer])
                case Forget(mix):
                    member.payloads.pop(mix, None)
                case Send(to, DebtClosed() as closed):
                    other = self.peers[to]
                    if self.rng.random() >= self.loss:
                        self._later(other, ClosedHeard(member.id, closed))
                case Send():
                    raise AssertionError(f"sends {effect}")
                case _:
                    self.told.append((member.id, effect))
        return answers

    def _later(self, member: Member, event: GossipEvent) -> None:
        self._after(self.rng.uniform(0.01, 0.3), lambda: self._feed(member, event))

    def _feed(self, member: Member, event: GossipEvent) -> None:
        self.feed(member, event)

    def _draw(
        self, member: Member, count: int
    ) -> tuple[tuple[GroupName, tuple[Contact, ...]], ...]:
        others = [g for g in self.groups.values() if g is not member.group and g.living]
        drawn = self.rng.sample(others, min(count, len(others)))
        return tuple((g.name, self._contacts(g)) for g in drawn)

    def _contacts(self, group: Group) -> tuple[Contact, ...]:
        some = self.rng.sample(group.living, min(3, len(group.living)))
        return tuple(Contact(m.id, ()) for m in some)

    def _borrow(self, member: Member, effect: Borrow) -> None:
        lender = self.peers[effect.to.peer]

        def ask() -> None:
            lost = self.rng.random() < self.loss
            if not lender.alive or lost:
                self._later(member, NotBorrowed(effect.slot, lender.id, True))
                return
            others = [c for c in self._contacts(lender.group) if c.peer != lender.id]
            contacts = (Contact(lender.id, ()), *others)
            answers = self.feed(lender, LoanAsked(member.id, effect.query, contacts))
            answer = answers[0] if answers else None
            if not isinstance(answer, GrantLoan) or self.rng.random() < self.loss:
                self._later(member, NotBorrowed(effect.slot, lender.id, False))
                return
            loan = answer.loan
            signed = Signed(pack(loan), lender.id, bytes(64))
            theirs = lender.state.values[loan.start : loan.stop]

            def receive() -> None:
                if member.alive:
                    ours = member.state.values[loan.start : loan.stop]
                    halves = [self._half(a - b) for a, b in zip(theirs, ours, strict=True)]
                    member.payloads[mix_id(signed.body)] = dict(enumerate(halves, loan.start))
                    self.feed(member, Borrowed(effect.slot, signed, loan))

            self._after(self.rng.uniform(0.05, 0.5), receive)

        self._after(self.rng.uniform(0.01, 0.1), ask)

    def _half(self, gap: int) -> int:
        """As its receiver decodes it."""
        return round(gap / 2 * self.rng.gauss(1.0, self.coded)) if self.coded else gap // 2

    def _pay(self, member: Member, mix: MixId, to: Contact) -> None:
        mask = member.machine.debts[mix]
        loan = member.machine.known()[mix]
        payload = {
            unit: member.payloads[mix][unit]
            for a, b in runs_of(mask)
            for unit in range(loan.start + a, loan.start + b)
        }
        signed = self._proof(member, mix)
        other = self.peers[to.peer]

        def offer() -> None:
            if not other.alive or self.rng.random() < self.loss:
                self._later(member, DebtAnswered(mix, to.peer, "unreachable"))
                return
            inside = other.state.table.mask(mix, loan.start, loan.stop)
            until = loan.until(loan.lender, self.fragments.count)
            late = other.state.table.forgotten(until, -1, loan.start, loan.stop)
            offered = DebtOffered(member.id, signed, loan, mask, inside, late)
            answers = self.feed(other, offered)
            answer = answers[0].answer if answers and isinstance(answers[0], AnswerDebt) else None
            if answer == "kept":
                other.payloads[mix] = payload
                self.feed(other, DebtTaken(signed, loan, mask & ~inside))
            heard = "unreachable" if self.rng.random() < self.loss else answer or "refused"
            self._later(member, DebtAnswered(mix, to.peer, heard))

        self._after(self.rng.uniform(0.01, 0.3), offer)

    def _fetch(self, member: Member, other: Member) -> None:
        def answer() -> None:
            heard = other.alive and member.alive and self.rng.random() >= self.loss
            aware = self._tell(other, member) if heard else None
            self.feed(member, DebtsFetched(other.id, aware))

        self._after(self.rng.uniform(0.01, 0.3), answer)

    def _tell(self, other: Member, member: Member) -> Aware:
        """What `other` knows of their group, payloads included."""
        owed = []
        for mix, loan in other.machine.known().items():
            if mix in other.machine.debts:
                inside = member.state.maybe(mix, loan, member.group.name)
                member.payloads.setdefault(mix, {}).update(other.payloads[mix])
                owed.append(Owed(self._proof(other, mix), loan, inside))
        return Aware(other.machine.roster, tuple(owed), other.machine.aware)

    def _proof(self, member: Member, mix: MixId) -> Signed:
        """The loan, from the header of an outcome that has its mix."""
        return next(n.signed for e in member.group.log for n in e.notes if n.mix == mix)

    # ── what must hold ───────────────────────────────────────────────────────────────────
    def mass(self) -> list[int]:
        """Per unit: what all groups hold but have not learned here, and what is on its way from one
        to another."""
        total = [-learned for learned in self.learned]
        for group in self.groups.values():
            for unit, value in enumerate(group.head.values):
                total[unit] += value
        for (_, unit), d in self.outstanding().items():
            total[unit] -= d
        return total

    def outstanding(self) -> dict[tuple[MixId, int], int]:
        """(mix, unit) with +d in one group and no -d in the other yet."""
        count: Counter[tuple[MixId, int]] = Counter()
        for group in self.groups.values():
            assert all(n == 1 for n in group.applied.values()), f"seed {self.seed}: twice"
            count.update(group.applied.keys())
        assert all(n <= 2 for n in count.values()), f"seed {self.seed}: in three groups"
        return {key: self.d[key] for key, n in count.items() if n == 1}

    def check(self) -> None:
        """Members with the same number of rounds hold the same state; nothing piles up."""
        for group in self.groups.values():
            for member in group.living:
                if member.state.round == len(group.log):
                    assert member.state.values == group.head.values, f"seed {self.seed}: {member}"
                    assert (member.state.table.array == group.head.table.array).all()
                assert len(member.payloads) <= 2 * limits.CARRIED_MIXES_MAX
