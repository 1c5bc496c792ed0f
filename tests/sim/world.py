"""A world in which group machines live, die and lose messages, in virtual time.

Every peer is the product's own `GroupMachine`; what its driver would do (streams, arithmetic,
signatures) is done here symbolically: a contribution is (peer, number), an outcome is the set of
contributions in it, a state is the chain of the outcomes that were applied. Thus a test can ask
what no real network lets it ask: was anything applied twice, did two peers ever disagree about a
round's outcome after they had agreed on its digest, did anybody wait longer than a deadline.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from peer.sending import batches, missed_again
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.events import (
    Agreed,
    Applied,
    ApplyRound,
    CloseSpan,
    ContributionDelivered,
    ContributionFolded,
    ContributionOffered,
    ContributionTaken,
    ContributionUndelivered,
    Delivered,
    Differed,
    DropSpan,
    Effect,
    Event,
    FetchFinished,
    FetchOutcomes,
    FetchState,
    GroupFormed,
    OutcomeDelivered,
    OutcomeHeld,
    OutcomeOffered,
    OutcomeUndelivered,
    PlanAdopted,
    PublishRecord,
    PushOutcome,
    Received,
    RecordIssued,
    RecordSeen,
    Send,
    SendContribution,
    SignPlan,
    SpanReduced,
    StateFailed,
    StateReady,
    StopSending,
    Suspected,
    TakeContribution,
    Tick,
    Undelivered,
)
from protocols.fragments import Fragments
from protocols.group import GroupConfig, GroupMachine
from protocols.identity import Signer
from protocols.messages import (
    OUTCOME_DOMAIN,
    PLAN_DOMAIN,
    ContributionHeader,
    Contributor,
    Heartbeat,
    Message,
    OutcomeHeader,
    OutcomePush,
    PlanIssued,
    Span,
    decode,
    decode_beat,
    encode,
)
from protocols.records import PeerRecord, Signed, sign, sign_record
from protocols.types import Digest, GroupName, PeerId, RunId

RUN = RunId("ab" * 32)
UNITS = 8


@cache
def signer(index: int) -> Signer:
    return Signer(hashlib.sha256(b"peer %d" % index).digest())


Share = tuple[PeerId, int, tuple[int, ...]]
"""Whose contribution, its number, and in which units it is inside."""


SpanKey = tuple[int, int, int, int]
"""Round, span, and its bounds, which another plan of the round may draw elsewhere."""


@dataclass(frozen=True)
class Applying:
    """One round as one peer applied it: who is inside which units."""

    round: int
    inside: tuple[tuple[int, int, tuple[Share, ...]], ...]


@dataclass
class Peer:
    """One simulated process."""

    signer: Signer
    site: str
    machine: GroupMachine
    incarnation: int = 0
    wakes_s: float = math.inf
    """When its machine is ticked next."""
    alive: bool = True
    frozen: bool = False
    speed_s: float = 0.05
    history: tuple[Applying, ...] = ()
    contribution: int = 0
    """Number of this peer's latest contribution."""
    unit_s: float = 0.0
    """How long a unit of its contribution takes on its line up; 0: the line is no limit."""
    missed: dict[int, int] = field(default_factory=dict)
    """Unit -> how many rounds in a row it came too late."""
    line: list[tuple[SendContribution, int]] = field(default_factory=list)
    """Units that wait for the line."""
    carrying: bool = False
    folded: dict[SpanKey, dict[PeerId, tuple[int, set[int]]]] = field(default_factory=dict)
    """Whose contribution (its number) is in our accumulator, in which units."""
    closed: set[SpanKey] = field(default_factory=set)
    content: dict[bytes, frozenset[Share]] = field(default_factory=dict)
    kept: dict[int, tuple[tuple[OutcomeHeader, Signed], ...]] = field(default_factory=dict)
    told: list[tuple[float, Effect]] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    inbox: list[Event] = field(default_factory=list)

    @property
    def id(self) -> PeerId:
        return self.signer.peer_id

    @property
    def digest(self) -> Digest:
        return Digest(hashlib.sha256(repr(self.history).encode()).digest())


class World:
    """Peers, a network between them, and one clock."""

    def __init__(
        self,
        seed: int,
        *,
        latency_s: float = 0.02,
        loss: float = 0.0,
        round_s: float = 5.0,
        exchange_s: float = 10.0,
        round_s_max: float = 0.0,
        units: int = UNITS,
        members_max: int = limits.GROUP_MEMBERS_MAX,
        fragments: int = 1,
    ) -> None:
        self.seed = seed
        self.members_max = members_max
        self.places: dict[PeerId, tuple[float, float]] = {}
        """Where a peer is on a map in seconds of round trip; without one, anywhere is as far."""
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.latency_s = latency_s
        self.loss = loss
        self.round_s = round_s
        self.exchange_s = exchange_s
        self.units = units
        self.fragments = Fragments.cut([1] * units, fragments)
        self.round_s_max = round_s_max
        self.peers: dict[PeerId, Peer] = {}
        self.cut: set[frozenset[PeerId]] = set()
        self._arrived_s: dict[tuple[PeerId, PeerId], float] = {}
        self.sent: dict[PeerId, int] = {}
        """Control messages that each peer got through."""
        self.applied: dict[tuple[PeerId, int], list[Applying]] = {}
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    # ── making and breaking ──────────────────────────────────────────────────────────────
    def add(
        self,
        index: int,
        *,
        site: str = "a",
        fresh: bool = False,
        speed_s: float = 0.05,
        unit_s: float = 0.0,
        place: tuple[float, float] | None = None,
    ) -> Peer:
        """A peer with index's identity; `fresh` = it must get the state from somebody."""
        config = GroupConfig(
            run=RUN,
            units=self.units,
            fragments=self.fragments,
            site=site,
            members_max=self.members_max,
            round_s=self.round_s,
            exchange_s=self.exchange_s,
            round_s_max=self.round_s_max,
        )
        me = signer(index)
        if place is not None:
            self.places[me.peer_id] = place
        old = self.peers.get(me.peer_id)
        machine = GroupMachine(me.peer_id, config, self.now_s)
        peer = Peer(me, site, machine, speed_s=speed_s, unit_s=unit_s)
        if old is not None:
            peer.incarnation = old.incarnation + 1
            peer.contribution = old.contribution
        self.peers[peer.id] = peer
        self._issue_record(peer)
        if not fresh:
            self._feed(peer, StateReady(0, peer.digest))
        self._every(peer)
        self._discover(peer, peer.incarnation)
        return peer

    def crash(self, peer: Peer) -> None:
        peer.alive = False

    def freeze(self, peer: Peer, seconds: float) -> None:
        peer.frozen = True

        def thaw() -> None:
            peer.frozen = False
            inbox, peer.inbox = peer.inbox, []
            for event in inbox:
                self._feed(peer, event)
            self._feed(peer, Tick())

        self.after(seconds, thaw)

    def partition(self, left: list[Peer], right: list[Peer], seconds: float) -> None:
        pairs = {frozenset((a.id, b.id)) for a in left for b in right}
        self.cut |= pairs
        self.after(seconds, lambda: self.cut.difference_update(pairs))

    # ── time ─────────────────────────────────────────────────────────────────────────────
    def after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now_s + seconds, next(self._order), action))

    def run(self, until_s: float) -> None:
        while self._queue and self._queue[0][0] <= until_s:
            self.now_s, _, action = heapq.heappop(self._queue)
            action()
        self.now_s = until_s

    def run_until(self, condition: Callable[[], bool], within_s: float) -> bool:
        """Advance until `condition` holds; False if it did not within the time."""
        end_s = self.now_s + within_s
        while not condition():
            if not self._queue or self._queue[0][0] > end_s:
                self.now_s = end_s
                return condition()
            self.now_s, _, action = heapq.heappop(self._queue)
            action()
        return True

    @property
    def living(self) -> list[Peer]:
        return [p for p in self.peers.values() if p.alive]

    # ── the driver's work, symbolically ──────────────────────────────────────────────────
    def _every(self, peer: Peer) -> None:
        """Tick the machine whenever its deadline comes, and only then."""
        wakes_s = max(peer.machine.deadline_s, self.now_s + 0.005)
        if wakes_s >= peer.wakes_s:
            return
        peer.wakes_s = wakes_s

        def tick() -> None:
            if not peer.alive or self.peers.get(peer.id) is not peer or peer.wakes_s != wakes_s:
                return  # something that came later asked for an earlier time
            peer.wakes_s = math.inf
            if not peer.frozen:
                self._feed(peer, Tick())
                assert peer.machine.deadline_s > self.now_s, (
                    f"seed {self.seed}: a deadline that does not move would spin the driver"
                )

        self.after(wakes_s - self.now_s, tick)

    def _discover(self, peer: Peer, incarnation: int) -> None:
        """Read everybody's records, as from the DHT."""
        if not peer.alive or peer.incarnation != incarnation:
            return
        for other in list(self.peers.values()):
            if other.id != peer.id and other.alive and not peer.frozen:
                self._feed(peer, RecordSeen(self._record(other)))
        self.after(5.0, lambda: self._discover(peer, incarnation))

    def _record(self, peer: Peer) -> PeerRecord:
        now_ms = int(self.now_s * 1000)
        return PeerRecord(
            peer.id, RUN, peer.machine.group, peer.site, (), 10_000, True, peer.machine.round,
            1000, now_ms, now_ms + 60_000, len(peer.machine.live_members(self.now_s)),
            peer.machine.coordinate,
        )  # fmt: skip

    def _issue_record(self, peer: Peer) -> None:
        record = self._record(peer)
        self._feed(peer, RecordIssued(sign_record(peer.signer, record), record))

    def _feed(self, peer: Peer, event: Event) -> None:
        if not peer.alive:
            return
        if peer.frozen:
            if len(peer.inbox) < 1000:
                peer.inbox.append(event)
            return
        try:
            effects = peer.machine.handle(event, self.now_s)
        except RemoteProtocolError as error:
            peer.refusals.append(str(error))
            return
        for effect in effects:
            self._perform(peer, effect)
        self._every(peer)

    def _reaches(self, a: Peer, b: Peer) -> bool:
        return b.alive and frozenset((a.id, b.id)) not in self.cut

    def _delay_s(self) -> float:
        delay_s = self.latency_s * self.rng.uniform(0.5, 2.0)
        while self.rng.random() < self.loss:
            delay_s += 0.2  # a transport underneath sends again
        return delay_s

    def _way_s(self, peer: Peer, to: PeerId) -> float:
        """From one to the other: half a round trip on the map, where both are on it."""
        if peer.id not in self.places or to not in self.places:
            return self._delay_s()
        trip_s = 0.001 + math.dist(self.places[peer.id], self.places[to])
        return trip_s / 2 * self.rng.uniform(1.0, 1.2)

    def _later(self, peer: Peer, seconds: float, event: Event) -> None:
        incarnation = peer.incarnation

        def act() -> None:
            if self.peers.get(peer.id) is peer and peer.incarnation == incarnation:
                self._feed(peer, event)

        self.after(seconds, act)

    def _perform(self, peer: Peer, effect: Effect) -> None:
        match effect:
            case Send(to, message):
                self._send(peer, to, message)
            case SignPlan(plan, to):
                signed = sign(peer.signer, PLAN_DOMAIN, plan)
                for other in to:
                    self._send(peer, other, PlanIssued(signed))
            case TakeContribution(number):
                peer.contribution += 1
                weight = 100.0
                self._later(peer, peer.speed_s, ContributionTaken(number, weight))
            case SendContribution():
                self._send_contribution(peer, effect)
            case StopSending(number, span):
                peer.line = [
                    (e, u) for e, u in peer.line if (e.plan.round, e.span) != (number, span)
                ]
            case CloseSpan():
                self._close(peer, effect)
            case DropSpan(number, span):
                for key in [k for k in peer.folded if k[:2] == (number, span)]:
                    del peer.folded[key]
                peer.closed = {k for k in peer.closed if k[:2] != (number, span)}
            case PushOutcome():
                self._push(peer, effect)
            case FetchOutcomes():
                self._fetch(peer, effect)
            case ApplyRound():
                self._apply(peer, effect)
            case FetchState(donor, step_back=step_back):
                peer.told.append((self.now_s, effect))
                self._fetch_state(peer, donor, step_back)
            case PublishRecord():
                self._issue_record(peer)
            case PlanAdopted() | GroupFormed() | Suspected() | Agreed() | Differed():
                peer.told.append((self.now_s, effect))

    def _send(self, peer: Peer, to: PeerId, message: Message) -> None:
        other = self.peers.get(to)
        delay_s = self._way_s(peer, to)
        if other is None or not self._reaches(peer, other):
            self._later(peer, delay_s, Undelivered(to, "unreachable"))
            return
        self.sent[peer.id] = self.sent.get(peer.id, 0) + 1
        data = encode(message)
        assert len(data) <= limits.CONTROL_BYTES_MAX
        # One message after another, as the driver sends them: none overtakes an earlier one.
        arrives_s = max(self.now_s + delay_s, self._arrived_s.get((peer.id, to), 0.0))
        self._arrived_s[peer.id, to] = arrives_s
        delay_s = arrives_s - self.now_s
        self._later(other, delay_s, Received(peer.id, decode(data, peer.id)))
        if other.frozen:
            self._later(peer, limits.CALL_TIMEOUT_S, Undelivered(to, "no answer"))
        elif isinstance(message, Heartbeat):
            self.after(delay_s, lambda: self._answer(peer, other, delay_s))
        else:
            self._later(peer, 2 * delay_s, Delivered(to, 2 * delay_s))

    def _answer(self, peer: Peer, other: Peer, delay_s: float) -> None:
        """`other` has just had a heartbeat of `peer`, and says where it stands itself."""
        if other.frozen:
            self._later(peer, limits.CALL_TIMEOUT_S, Undelivered(other.id, "no answer"))
            return
        if self.peers.get(other.id) is not other or not self._reaches(peer, other):
            self._later(peer, delay_s, Undelivered(other.id, "unreachable"))
            return
        answer = other.machine.answer(peer.id, self.now_s)
        beat = None if answer is None else decode_beat(encode(answer), other.id)
        self._later(peer, delay_s, Delivered(other.id, 2 * delay_s, beat))

    def _send_contribution(self, peer: Peer, effect: SendContribution) -> None:
        plan, span = effect.plan, effect.plan.spans[effect.span]
        number = peer.contribution
        header = ContributionHeader(
            plan.run, plan.group, plan.round, plan.epoch, effect.span, span.start, span.stop, 100.0
        )
        other = self.peers.get(effect.to)
        if other is None or not self._reaches(peer, other):
            bad = ContributionUndelivered(effect.to, plan.round, effect.span, False)
            self._later(peer, self._delay_s(), bad)
            return

        def arrive() -> None:
            failed = ContributionUndelivered(effect.to, plan.round, effect.span, False)
            if not self._reaches(peer, other) or other.frozen or not peer.alive:
                self._later(peer, limits.PROGRESS_TIMEOUT_S, failed)
                return
            if self.peers.get(other.id) is not other:
                self._later(peer, 0.1, failed)
                return
            try:
                if other is not peer:
                    other.machine.handle(ContributionOffered(peer.id, header), self.now_s)
            except RemoteProtocolError as error:
                other.refusals.append(str(error))
                refused = ContributionUndelivered(
                    effect.to, plan.round, effect.span, "closed" in str(error)
                )
                self._later(peer, 0.02, refused)
                return
            order = [unit for unit, _ in batches(span.start, span.stop, peer.missed, 1)]
            if peer.unit_s and other is not peer:
                peer.line += [(effect, unit) for unit in order]
                if not peer.carrying:
                    peer.carrying = True
                    self.after(peer.unit_s, lambda: self._carry(peer, peer.incarnation))
                return
            for unit in order:
                self._fold(peer, other, effect, number, unit)

        self.after(self._delay_s() * 3, arrive)

    def _carry(self, peer: Peer, incarnation: int) -> None:
        """The line has brought one more unit; of several spans in turn."""
        peer.carrying = bool(peer.line)
        if not peer.alive or self.peers.get(peer.id) is not peer or not peer.line:
            return
        effect, unit = peer.line.pop(0)
        other = self.peers.get(effect.to)
        if other is not None and self._reaches(peer, other) and not other.frozen:
            self._fold(peer, other, effect, peer.contribution, unit)
        peer.carrying = bool(peer.line)
        if peer.line:
            turn = min(peer.line, key=lambda e: (e[0].span - effect.span - 1) % 16)
            peer.line.remove(turn)
            peer.line.insert(0, turn)
            self.after(peer.unit_s, lambda: self._carry(peer, incarnation))

    def _fold(
        self, peer: Peer, other: Peer, effect: SendContribution, number: int, unit: int
    ) -> None:
        """A unit has arrived; with the last one the contribution is whole."""
        plan, span = effect.plan, effect.plan.spans[effect.span]
        key = (plan.round, effect.span, span.start, span.stop)
        if key in other.closed:
            return
        _, units = other.folded.setdefault(key, {}).setdefault(peer.id, (number, set()))
        units.add(unit)
        if len(units) == span.stop - span.start:
            self._feed(other, ContributionFolded(peer.id, plan.round, effect.span, True))
            self._later(peer, 0.02, ContributionDelivered(effect.to, plan.round, effect.span))

    def _close(self, peer: Peer, effect: CloseSpan) -> None:
        plan, span = effect.plan, effect.plan.spans[effect.span]
        key = (plan.round, effect.span, span.start, span.stop)
        peer.closed.add(key)
        parts = peer.folded.get(key, {}) if effect.keep else {}
        inside = frozenset((p, n, tuple(sorted(units))) for p, (n, units) in parts.items())
        content = hashlib.sha256(repr(sorted(inside)).encode()).digest()
        header = OutcomeHeader(
            plan.run, plan.group, plan.round, plan.epoch, effect.span, span.start, span.stop,
            tuple(Contributor(p, 100.0, mask(u, span)) for p, _, u in sorted(inside)), content, 1,
            0.1, plan.digest,
        )  # fmt: skip
        peer.content[content] = inside
        signed = sign(peer.signer, OUTCOME_DOMAIN, header)
        self._later(peer, 0.02, SpanReduced(header, signed))

    def _push(self, peer: Peer, effect: PushOutcome) -> None:
        header = effect.header
        other = self.peers.get(effect.to)
        failed = OutcomeUndelivered(effect.to, header.round, header.span)
        if other is None or not self._reaches(peer, other):
            self._later(peer, self._delay_s(), failed)
            return

        def arrive() -> None:
            if (
                not self._reaches(peer, other)
                or other.frozen
                or not peer.alive
                or self.peers.get(other.id) is not other
            ):
                self._later(peer, limits.PROGRESS_TIMEOUT_S, failed)
                return
            if other.machine.round <= header.round:
                try:
                    push = OutcomePush(effect.epoch, effect.signed)
                    wishes = other.machine.handle(OutcomeOffered(peer.id, push, header), self.now_s)
                except RemoteProtocolError as error:
                    other.refusals.append(str(error))
                    self._later(peer, 0.02, failed)
                    return
                for wish in wishes:
                    self._perform(other, wish)
                other.content[header.content] = peer.content[header.content]
                self._feed(other, OutcomeHeld(peer.id, header, effect.signed, False))
            self._later(peer, 0.02, OutcomeDelivered(effect.to, header.round, header.span))

        self.after(self._delay_s() * 2, arrive)

    def _fetch(self, peer: Peer, effect: FetchOutcomes) -> None:
        other = self.peers.get(effect.peer)

        def answer() -> None:
            count = 0
            if other is not None and self._reaches(peer, other) and not other.frozen:
                held = other.kept.get(effect.round, ())
                current = other.machine.current
                if not held and current is not None and current.number == effect.round:
                    held = tuple(s.outcome for s in current._spans if s.outcome is not None)
                for header, signed in held:
                    if effect.span is None or header.span == effect.span:
                        count += 1
                        peer.content[header.content] = other.content[header.content]
                        self._feed(peer, OutcomeHeld(other.id, header, signed, True))
            self._feed(peer, FetchFinished(effect.peer, effect.round, count, ""))

        frozen = other is not None and other.frozen
        self.after(limits.PROGRESS_TIMEOUT_S if frozen else self._delay_s() * 3, answer)

    def _apply(self, peer: Peer, effect: ApplyRound) -> None:
        incarnation = peer.incarnation

        def done() -> None:
            if not peer.alive or peer.incarnation != incarnation:
                return
            if len(peer.history) != effect.round:
                return  # a donor's state came first
            inside = tuple(
                (header.start, header.stop, tuple(sorted(peer.content[header.content])))
                for header, _ in effect.outcomes
            )
            applying = Applying(effect.round, inside)
            self.applied.setdefault((peer.id, effect.round), []).append(applying)
            peer.history = (*peer.history, applying)
            peer.kept[effect.round] = effect.outcomes
            headers = (header for header, _ in effect.outcomes)
            peer.missed = missed_again(peer.missed, headers, peer.id)
            peer.kept.pop(effect.round - limits.OUTCOME_ROUNDS_KEPT, None)
            self._feed(peer, Applied(effect.round, peer.digest))

        self.after(0.05, done)

    def _fetch_state(self, peer: Peer, donor: PeerId, step_back: bool) -> None:
        other = self.peers.get(donor)

        def arrive() -> None:
            ok = other is not None and self._reaches(peer, other) and not other.frozen
            behind = other is None or (len(other.history) < len(peer.history) and not step_back)
            if not ok or other is None or behind or not other.machine.ready:
                self._feed(peer, StateFailed(donor, "gone"))
                return
            peer.history = other.history
            peer.kept.clear()
            self._feed(peer, StateReady(len(peer.history), peer.digest))

        self.after(0.3, arrive)


def mask(units: tuple[int, ...], span: Span) -> bytes:
    """Which of a span's units are inside, as an outcome's header says it; empty: all."""
    if len(units) == span.stop - span.start:
        return b""
    bits = sum(1 << unit - span.start for unit in units)
    return bits.to_bytes((span.stop - span.start + 7) // 8, "little")


def group_name(site: str) -> GroupName:
    return GroupName(f"site:{site}")
