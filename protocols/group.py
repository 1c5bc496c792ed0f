"""The peer's whole part in the network as one machine: find a group, keep in step, run rounds.

It composes membership (who lives), election (who coordinates), one `Round` at a time, and healing
(catch up by outcomes, or by a donor's state). Its promises:

- it follows one plan at a time, and never an older one (the epoch is a fencing token);
- it applies each round at most once, and only outcomes that cover every unit;
- it takes part only with a state that has the plan's digest, and heals from the majority else;
- a peer without the run's state is never a donor and never a coordinator.
"""

from __future__ import annotations

import math
from collections import Counter as Tally
from dataclasses import dataclass, replace
from typing import Final

from protocols import limits
from protocols.election import candidates, fault_in, make_plan, revise_plan
from protocols.errors import RemoteProtocolError
from protocols.events import (
    Agreed,
    Applied,
    ApplyRound,
    ContributionDelivered,
    ContributionFolded,
    ContributionOffered,
    ContributionTaken,
    ContributionUndelivered,
    Delivered,
    Differed,
    Effect,
    Event,
    FetchFinished,
    FetchOutcomes,
    FetchState,
    GroupFormed,
    Leaving,
    OutcomeDelivered,
    OutcomeHeld,
    OutcomeOffered,
    OutcomeUndelivered,
    PlanAdopted,
    PublishRecord,
    Received,
    RecordIssued,
    RecordSeen,
    Send,
    SignPlan,
    SpanReduced,
    StateFailed,
    StateReady,
    Suspected,
    Tick,
    Undelivered,
)
from protocols.grouping import choose_group
from protocols.membership import Membership, Neighbour, seat_of
from protocols.messages import (
    OUTCOME_DOMAIN,
    PLAN_DOMAIN,
    Goodbye,
    Heartbeat,
    Hello,
    OutcomeHeader,
    Plan,
    PlanIssued,
    PlanRefused,
    Seat,
    SpanHeld,
    open_signed,
)
from protocols.records import PeerRecord, Signed, read_record
from protocols.round import Round
from protocols.schema import SchemaError
from protocols.types import Digest, GroupName, PeerId, RunId

SETTLE_S: Final = 2.0  # a newcomer listens this long before it believes that it is alone
BEHIND_GRACE_S: Final = 1.5  # others finish a round a little earlier; outcomes are on their way
RETRY_S: Final = 2.0
FETCH_TRIES_MAX: Final = 3
JOIN_MARGIN_S: Final = 0.7  # a round's roster grows only this long before contributions are due
TRAIN_S_MIN: Final = 0.3
SOUND_OUT_S: Final = 3.0  # how often a loner measures the round trip to the same peer again
SOUND_OUT_MAX: Final = 8  # and to how many a second
BEATS_MAX: Final = 8 * limits.GROUP_MEMBERS_MAX  # a site label can gather more than a group
EPOCH_LEAP_MAX: Final = 2**20  # epochs grow by one; more at once is a lie or an accident
PATIENCE_S: Final = 6.0  # a coordinator that lives but plans nothing is passed over after this
BENCH_S: Final = 60.0  # and tried again after this
DONOR_BACKOFF_S_MAX: Final = 600.0


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """What the manifest and the owner decide."""

    run: RunId
    units: int
    site: str = ""
    members_max: int = limits.GROUP_MEMBERS_MAX
    aggregators_max: int = 4
    round_s: float = 5.0
    """From one round's contributions to the next."""
    exchange_s: float = 20.0
    """A round that is not complete this long after its contributions were due is made good."""
    quorum: float = 0.5


@dataclass(slots=True)
class _Attempt:
    """A fetch under way or to be repeated."""

    peer: PeerId
    until_s: float


class GroupMachine:
    """See the module. `handle` raises RemoteProtocolError before anything changed."""

    def __init__(self, me: PeerId, config: GroupConfig, now_s: float) -> None:
        self.me = me
        self.config = config
        self.members = Membership(me)
        self.group = GroupName("")
        self.round = 0
        """Rounds in our outer state: the number of the next one."""
        self.digest = Digest(b"")
        self.ready = False
        self.epoch = 0
        self.current: Round | None = None
        self.previous: Round | None = None
        self.leaving = False
        self._started_s = now_s
        self._record: RecordIssued | None = None
        self._pending: tuple[Plan, PeerId, float] | None = None
        self._next_beat_s = now_s
        self._applied_s = now_s
        self._due_s = -math.inf
        self._formed: tuple[GroupName, tuple[PeerId, ...]] = (GroupName(""), ())
        self._agreed = -1
        self._behind_since_s: float | None = None
        self._apart_since_s: float | None = None
        self._fetch: _Attempt | None = None
        self._fetch_tries = 0
        self._caught: dict[int, tuple[OutcomeHeader, Signed]] = {}
        self._state_fetch: _Attempt | None = None
        self._bad_donors: dict[PeerId, tuple[float, float]] = {}
        """Donor -> (until when it is avoided, for how long the next time)."""
        self._benched: dict[PeerId, float] = {}
        """Alive but useless, and until when they are passed over."""
        self._moved_s = now_s
        """When we last got a step further: a plan, an outcome, a state."""
        self._newcomer = True
        """Others know the plan in force and we don't, so one of them should coordinate."""
        self._regroup_s = now_s
        self._idle = False
        """Whether the event at hand changes nothing that could call for action."""

    # ── the outside ──────────────────────────────────────────────────────────────────────
    @property
    def deadline_s(self) -> float:
        """When `handle(Tick())` is due at the latest."""
        if self.leaving:
            return math.inf
        times = [self._next_beat_s]
        if self.current is not None:
            times.append(self.current.deadline_s(self._suspected()))
        if self.previous is not None:
            times.append(self.previous.deadline_s(self._suspected()))
        return min(times)

    @property
    def phase(self) -> str:
        """For people: looking, syncing, training or exchanging."""
        if not self.ready:
            return "syncing" if self.members.everybody() else "looking"
        if self.current is None or self.current.training:
            return "training"
        return "exchanging"

    def live_members(self, now_s: float) -> list[PeerId]:
        """The group as we see it, ourselves included, in order."""
        return sorted([self.me, *(n.record.peer for n in self.members.live(self.group, now_s))])

    def coordinator(self, now_s: float) -> PeerId | None:
        """Who should issue the next plan, by what we know."""
        seats = self._eligible(now_s)
        order = candidates(self.group, 0, seats) if seats else []
        able = [p for p in order if not self._is_benched(p, now_s)]
        return next(iter(able or order), None)

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """Advance.

        Raises:
            RemoteProtocolError: a peer broke the rules; nothing changed.
        """
        self._idle = False
        effects = self._dispatch(event, now_s)
        if not self.leaving and not self._idle:
            effects += self._advance(now_s)
        return effects

    # ── events ───────────────────────────────────────────────────────────────────────────
    def _dispatch(self, event: Event, now_s: float) -> list[Effect]:
        match event:
            case Tick():
                return self._tick(now_s)
            case Received(sender, message):
                return self._received(sender, message, now_s)
            case Delivered(peer, rtt_s):
                self.members.delivered(peer, rtt_s)
                self._idle = True
            case Undelivered(peer, reason):
                if self.members.undelivered(peer):
                    return [Suspected(peer, reason)]
            case RecordSeen(record):
                return self._record_seen(record, now_s)
            case RecordIssued():
                return self._record_issued(event)
            case StateReady(number, digest):
                return self._state_ready(number, digest, now_s)
            case StateFailed(donor, _):
                self._state_fetch = None
                self._avoid(donor, now_s)
            case ContributionOffered(sender, header):
                self._own_run(sender, header.run)
                self._round_for(sender, header.group, header.round).check_offer(sender, header)
                self.members.heard(sender, now_s)
            case OutcomeOffered(sender, push, header):
                self._own_run(sender, header.run)
                current = self._round_for(sender, header.group, header.round)
                current.check_outcome(sender, push.epoch, header, push.outcome.signer)
                self.members.heard(sender, now_s)
            case Applied(number, digest):
                return self._applied(number, digest, now_s)
            case OutcomeHeld():
                return self._held(event, now_s)
            case FetchFinished():
                return self._fetch_finished(event, now_s)
            case SpanReduced(header, signed):
                if self.current is not None and self.current.reduces(header):
                    return self.current.hold(header, signed, now_s)
            case OutcomeDelivered(peer, number, span):
                for r in (self.current, self.previous):
                    if r is not None and r.number == number:
                        r.outcome_delivered(peer, span)
            case OutcomeUndelivered(peer, number, span):
                for r in (self.current, self.previous):
                    if r is not None and r.number == number:
                        r.outcome_undelivered(peer, span, now_s)
            case Leaving(reason):
                self.leaving = True
                bye = Goodbye(self.config.run, reason)
                return [Send(n.record.peer, bye) for n in self.members.in_group(self.group)]
            case _:
                return self._contribution_event(event, now_s)
        return []

    def _contribution_event(self, event: Event, now_s: float) -> list[Effect]:
        current = self.current
        match event:
            case ContributionTaken(number, weight):
                if current is not None and current.number == number:
                    return current.contribution_taken(weight, now_s)
            case ContributionFolded(sender, number, span, complete):
                if current is not None and current.number == number:
                    current.folded(sender, span, complete)
            case ContributionDelivered(peer, number, span):
                if current is not None and current.number == number:
                    current.contribution_delivered(peer, span)
            case ContributionUndelivered(peer, number, span, refused):
                if current is not None and current.number == number:
                    current.contribution_undelivered(peer, span, refused, now_s)
        return []

    def _received(self, sender: PeerId, message: object, now_s: float) -> list[Effect]:
        match message:
            case Hello():
                return self._hello(sender, message, now_s)
            case Heartbeat():
                self._own_run(sender, message.run)
                unknown = self.members.get(sender) is None
                self._idle = not self.members.heartbeat(sender, message, now_s) and not unknown
                if message.group == self.group and not unknown:
                    self._heard_of_epoch(message.epoch)
                return self._greet(sender, answer=True) if unknown else []
            case PlanIssued(signed):
                return self._plan_issued(sender, signed, now_s)
            case PlanRefused():
                self._own_run(sender, message.run)
                self.members.heard(sender, now_s)
                known = self.members.get(sender)
                if message.group == self.group and known and known.group == self.group:
                    self._heard_of_epoch(message.known_epoch)
            case SpanHeld():
                return self._span_held(sender, message, now_s)
            case Goodbye():
                self._own_run(sender, message.run)
                if self.members.get(sender) is not None:
                    self.members.said_goodbye(sender)
                    return [Suspected(sender, f"left: {printable(message.reason)}")]
        return []

    def _heard_of_epoch(self, epoch: int) -> None:
        """A fellow member knows a later epoch; a leap beyond reason is not believed."""
        if epoch <= self.epoch + EPOCH_LEAP_MAX:
            self.epoch = max(self.epoch, epoch)

    def _span_held(self, sender: PeerId, message: SpanHeld, now_s: float) -> list[Effect]:
        self._own_run(sender, message.run)
        current = self.current
        if current is None or current.number != message.round or message.group != self.group:
            return []
        header = open_signed(message.outcome, OUTCOME_DOMAIN, OutcomeHeader, sender)
        if (header.run, header.group, header.round) != (message.run, self.group, message.round):
            raise RemoteProtocolError(sender, "hands over an outcome of another round")
        effects = current.handed_over(sender, message.span, header, message.outcome.signer)
        self.members.heard(sender, now_s)
        return effects

    def _own_run(self, sender: PeerId, run: RunId) -> None:
        if run != self.config.run:
            raise RemoteProtocolError(sender, f"speaks of run {run[:12]}, ours is another")

    # ── membership ───────────────────────────────────────────────────────────────────────
    def _hello(self, sender: PeerId, hello: Hello, now_s: float) -> list[Effect]:
        self._own_run(sender, hello.run)
        if hello.version != limits.PROTOCOL_VERSION:
            raise RemoteProtocolError(sender, f"speaks protocol version {hello.version}")
        try:
            record = read_record(hello.record)
        except SchemaError as error:
            raise RemoteProtocolError(sender, str(error)) from None
        if record.peer != sender or record.run != self.config.run:
            raise RemoteProtocolError(sender, "shows a record that is not its own")
        self.members.saw(record, now_s)
        self.members.heard(sender, now_s)
        known = self.members.get(sender)
        if known is not None:
            known.round, known.digest = hello.round, Digest(hello.digest)
            known.ready = hello.ready
        return self._greet(sender, answer=False) if hello.answer else []

    def _record_seen(self, record: PeerRecord, now_s: float) -> list[Effect]:
        if record.run != self.config.run or record.peer == self.me:
            return []
        known = self.members.get(record.peer)
        returned = (
            known is not None and known.suspected and record.issued_ms > known.record.issued_ms
        )
        if self.members.saw(record, now_s) or returned:
            return self._greet(record.peer, answer=True)
        return []

    def _record_issued(self, event: RecordIssued) -> list[Effect]:
        before, self._record = self._record, event
        if before is None or before.record.group == event.record.group:
            return []
        # Those who choose a group right now should know at once where we stand.
        known = sorted(self.members.everybody(), key=lambda n: -n.heard_s)
        return [
            effect
            for n in known[: 4 * limits.GROUP_MEMBERS_MAX]
            if not n.left and not n.suspected
            for effect in self._greet(n.record.peer, answer=False)
        ]

    def _greet(self, peer: PeerId, *, answer: bool) -> list[Effect]:
        if self._record is None or self.leaving:
            return []
        hello = Hello(
            limits.PROTOCOL_VERSION,
            self.config.run,
            self._record.signed,
            self.round,
            self.digest,
            self.ready,
            answer,
        )
        return [Send(peer, hello)]

    def _tick(self, now_s: float) -> list[Effect]:
        effects: list[Effect] = []
        if now_s >= self._next_beat_s and not self.leaving:
            self._next_beat_s = now_s + limits.HEARTBEAT_S
            effects += self._beat(now_s)
            effects += [
                Suspected(peer, f"silent for {limits.SUSPECT_AFTER_S:g} s")
                for peer in self.members.sweep(self.group, now_s)
            ]
        return effects

    def _beat(self, now_s: float) -> list[Effect]:
        if not self.group:
            return []
        beat = Heartbeat(
            self.config.run, self.group, self.epoch, self.round, self.digest, self.ready, 0
        )
        effects: list[Effect] = []
        for n in self.members.in_group(self.group)[:BEATS_MAX]:
            # Suspects are hailed now and then: they may be back.
            every_s = 5 * limits.HEARTBEAT_S if n.suspected else 0.0
            if now_s - n.hailed_s < every_s:
                continue
            n.hailed_s = now_s
            if n.heard_s > 0 and not n.suspected:
                effects.append(Send(n.record.peer, beat))
            else:
                effects += self._greet(n.record.peer, answer=True)
        return effects

    def _regroup(self, now_s: float) -> list[Effect]:
        if self._record is None or now_s < self._regroup_s:
            return []
        self._regroup_s = now_s + 1.0
        settled = now_s - self._started_s >= SETTLE_S
        if not self.group and not self.config.site and not settled:
            return []
        others = [
            (n.record, n.group)
            for n in self.members.everybody()
            if not n.left and not n.suspected and n.heard_s > 0
        ]
        rtts = {n.record.peer: n.rtt_s for n in self.members.everybody() if n.rtt_s is not None}
        mine = replace(
            self._record.record, group=self.group, site=self.config.site, round=self.round
        )
        chosen = choose_group(mine, others, rtts, self.config.members_max)
        patient = now_s - self._started_s < 3 * SETTLE_S
        company = any(group == self.group for _, group in others)
        probes = [] if company or self.config.site else self._sound_out(now_s)
        if chosen is None and patient:
            return probes
        chosen = chosen or GroupName(f"near:{self.me[-12:]}")
        if chosen == self.group:
            return probes
        self.group, self.epoch, self._started_s = chosen, 0, now_s
        self.current = self.previous = self._pending = None
        self._newcomer = True
        return [PublishRecord(chosen)]

    def _sound_out(self, now_s: float) -> list[Effect]:
        """A loner measures others again: a first round trip, on a busy machine or a connection
        that is just being made, makes neighbours look far away."""
        others = [
            n
            for n in self.members.everybody()
            if not n.left and not n.suspected and now_s - n.hailed_s >= SOUND_OUT_S
        ]
        effects: list[Effect] = []
        for n in sorted(others, key=lambda n: n.hailed_s)[:SOUND_OUT_MAX]:
            n.hailed_s = now_s
            effects += self._greet(n.record.peer, answer=False)
        return effects

    def _suspected(self) -> set[PeerId]:
        return self.members.suspects(self.group)

    # ── standing: who is where ───────────────────────────────────────────────────────────
    def _eligible(self, now_s: float) -> list[Seat]:
        """Live, ready members who stand at the group's latest round, ourselves included.

        Newcomers come last in line: as long as a member of the plan in force lives, it
        coordinates, because it knows that plan.
        """
        live = [n for n in self.members.live(self.group, now_s) if n.ready]
        if self.ready and not self._outnumbered(live):
            # Whoever stands here with another state is about to heal, or we are.
            seats = [
                seat_of(n.record) for n in live if n.round == self.round and n.digest == self.digest
            ]
            if self._record is not None:
                seats.append(seat_of(self._record.record))
        else:
            top = max([n.round for n in live], default=0)
            seats = [seat_of(n.record) for n in live if n.round == top]
        latest = self.current or self.previous
        if latest is not None:
            incumbents = [s for s in seats if s.peer in latest.plan.peers]
            return incumbents or seats
        if self._newcomer and any(n.epoch > 0 for n in live):
            return [s for s in seats if s.peer != self.me]
        return seats

    def _outnumbered(self, live: list[Neighbour]) -> bool:
        """Whether those with more rounds than we are at least as many as those at our state.

        One that claims to be ahead does not stop a group that is at work.
        """
        ahead = sum(n.ready and n.round > self.round for n in live)
        if self.round == 0:
            return ahead > 0  # a fresh start is no history, however many share it
        return ahead >= self._camp(live)

    def _camp(self, live: list[Neighbour]) -> int:
        """How many stand at exactly our state, ourselves included."""
        return 1 + sum(n.ready and n.round == self.round and n.digest == self.digest for n in live)

    def _ahead(self, now_s: float) -> list[Neighbour]:
        """Live, ready members whose state has more rounds than ours."""
        live = self.members.live(self.group, now_s)
        return sorted(
            (n for n in live if n.ready and n.round > self.round),
            key=lambda n: (-n.round, n.record.peer),
        )

    # ── moving on ────────────────────────────────────────────────────────────────────────
    def _advance(self, now_s: float) -> list[Effect]:
        effects = self._regroup(now_s)
        if not self.group or self._record is None:
            return effects
        members = tuple(self.live_members(now_s))
        if (self.group, members) != self._formed:
            self._formed = (self.group, members)
            effects.append(GroupFormed(self.group, members))
        effects += self._sync(now_s)
        if not self.ready:
            return effects
        effects += self._adopt_pending(now_s)
        effects += self._check_digests(now_s)
        self._bench_the_useless(now_s)
        effects += self._coordinate(now_s)
        suspected = self._suspected()
        if self.previous is not None:
            effects += self.previous.tick(now_s, suspected)
        if self.current is not None:
            effects += self.current.tick(now_s, suspected)
            done = self.current.complete()
            if done:
                effects += done
        return effects

    # ── being coordinator ────────────────────────────────────────────────────────────────
    def _coordinate(self, now_s: float) -> list[Effect]:
        healing = self._state_fetch is not None
        settled = now_s - self._started_s >= SETTLE_S
        if healing or not settled or self.coordinator(now_s) != self.me:
            return []
        seats = self._seats(now_s)
        if self.current is None:
            return self._next_round(seats, now_s)
        return self._mend_round(self.current, seats, now_s)

    def _bench_the_useless(self, now_s: float) -> None:
        """Pass over a coordinator that lives and does not plan, or does not mend its round."""
        chief = self.coordinator(now_s)
        if chief == self.me or (chief is None and not self._newcomer):
            return
        current = self.current
        if current is None:
            since_s = max(self._moved_s, self._started_s + SETTLE_S)
            useless = now_s - since_s > PATIENCE_S
        else:
            since_s = max(self._moved_s, current.end_s)
            useless = bool(current.missing()) and now_s - since_s > RETRY_S
        if not useless:
            return
        self._moved_s = now_s
        if current is None and self.previous is None and self._newcomer:
            # Where everybody took another's state, nobody knows a plan any more and each waits
            # for the others: from now on it is anybody's turn.
            self._newcomer = False
        elif chief is not None:
            self._bench(chief, now_s)

    def _bench(self, peer: PeerId, now_s: float) -> None:
        self._benched = {p: t for p, t in self._benched.items() if t > now_s}
        if len(self._benched) < limits.ROSTER_MAX:
            self._benched[peer] = now_s + BENCH_S

    def _is_benched(self, peer: PeerId, now_s: float) -> bool:
        return self._benched.get(peer, -math.inf) > now_s

    def _seats(self, now_s: float) -> list[Seat]:
        """Everyone who can take part in the round that we stand at."""
        live = self.members.live(self.group, now_s)
        seats = [seat_of(n.record) for n in live if n.ready and n.round == self.round]
        assert self._record is not None
        seats.append(seat_of(self._record.record))
        seats = [Seat(s.peer, 0) if self._is_benched(s.peer, now_s) else s for s in seats]
        if len(seats) > limits.ROSTER_MAX:
            order = candidates(self.group, 0, seats)[: limits.ROSTER_MAX]
            seats = [s for s in seats if s.peer in order]
        return seats

    def _next_round(self, seats: list[Seat], now_s: float) -> list[Effect]:
        live = [n for n in self.members.live(self.group, now_s) if n.ready]
        waiting = any(n.round < self.round for n in live)
        if waiting and now_s - self._applied_s < limits.DIGEST_WAIT_S:
            return []
        same = [s for s in seats if self._same_digest(s.peer)]
        train_s = max(TRAIN_S_MIN, self._due_s + self.config.round_s - now_s)
        plan = make_plan(
            run=self.config.run,
            group=self.group,
            epoch=max(self.epoch, 1),
            round=self.round,
            seats=same,
            units=self.config.units,
            aggregators_max=self.config.aggregators_max,
            train_ms=int(min(train_s, self.config.round_s) * 1000),
            exchange_ms=int(self.config.exchange_s * 1000),
            digest=self.digest,
        )
        last = self.previous.plan if self.previous is not None else None
        unchanged = (
            last is not None
            and last.epoch == self.epoch
            and last.roster == plan.roster
            and [(s.start, s.stop, s.aggregator) for s in last.spans]
            == [(s.start, s.stop, s.aggregator) for s in plan.spans]
        )
        if not unchanged:
            plan = make_plan(
                run=plan.run,
                group=plan.group,
                epoch=self.epoch + 1,
                round=plan.round,
                seats=same,
                units=self.config.units,
                aggregators_max=self.config.aggregators_max,
                train_ms=plan.train_ms,
                exchange_ms=plan.exchange_ms,
                digest=self.digest,
            )
        return self._issue(plan, now_s)

    def _mend_round(self, current: Round, seats: list[Seat], now_s: float) -> list[Effect]:
        """Take the dead out, let newcomers in, bench aggregators that do not deliver."""
        if current.applying:
            return []
        plan = current.plan
        if self.me not in plan.peers:  # its members are gone, and it was not ours to mend
            self.current = None
            return self._next_round(seats, now_s)
        live = {s.peer for s in seats}
        keep = [s for s in plan.roster if s.peer in live or self._may_return(s.peer, now_s)]
        joiners = [
            s
            for s in seats
            if s.peer not in plan.peers
            and current.training
            and current.due_s - now_s > JOIN_MARGIN_S
            and self._same_digest(s.peer)
        ]
        late = [
            plan.spans[i].aggregator
            for i in current.missing()
            if now_s > current.collect_s + 0.5 * (current.end_s - current.collect_s)
        ]
        for peer in late:
            if peer != self.me and not self._is_benched(peer, now_s):
                self._bench(peer, now_s)
        room = max(0, limits.ROSTER_MAX - len(keep))
        revised = revise_plan(
            plan,
            epoch=self.epoch + 1,
            seats=keep + joiners[:room],
            benched={p for p in plan.peers if self._is_benched(p, now_s)},
            train_ms=int(max(0.0, current.due_s - now_s) * 1000),
            exchange_ms=plan.exchange_ms,
        )
        moved = [s.aggregator for s in revised.spans] != [s.aggregator for s in plan.spans]
        if revised.peers == plan.peers and not (late and moved):
            return []
        return self._issue(revised, now_s)

    def _may_return(self, peer: PeerId, now_s: float) -> bool:
        """A roster member that lives, whether or not it stands at our round this instant."""
        if peer == self.me:
            return True
        return any(n.record.peer == peer for n in self.members.live(self.group, now_s))

    def _same_digest(self, peer: PeerId) -> bool:
        if peer == self.me:
            return True
        known = self.members.get(peer)
        return known is not None and known.digest == self.digest

    def _issue(self, plan: Plan, now_s: float) -> list[Effect]:
        everyone = {n.record.peer for n in self.members.in_group(self.group)} | set(plan.peers)
        to = tuple(sorted(everyone - {self.me}))
        return [SignPlan(plan, to), *self._adopt(plan, self.me, now_s, now_s)]

    # ── following plans ──────────────────────────────────────────────────────────────────
    def _plan_issued(self, sender: PeerId, signed: Signed, now_s: float) -> list[Effect]:
        plan = open_signed(signed, PLAN_DOMAIN, Plan, sender)
        self._own_run(sender, plan.run)
        if signed.signer != sender:
            raise RemoteProtocolError(sender, f"passes on a plan of {signed.signer}")
        if plan.group != self.group:
            raise RemoteProtocolError(sender, f"plans for group {plan.group}, ours is {self.group}")
        known = self.members.get(sender)
        if known is None or known.group != self.group:
            raise RemoteProtocolError(sender, "plans for a group that it is not in")
        if sender not in plan.peers:
            raise RemoteProtocolError(sender, "plans a round without itself")
        if plan.epoch > self.epoch + EPOCH_LEAP_MAX:
            raise RemoteProtocolError(sender, f"leaps to epoch {plan.epoch}")
        if plan.train_ms > self.config.round_s * 1000 + 1:
            raise RemoteProtocolError(sender, f"plans {plan.train_ms} ms of training")
        if plan.exchange_ms > self.config.exchange_s * 1000 + 1:
            raise RemoteProtocolError(sender, f"plans {plan.exchange_ms} ms of exchange")
        revises = self.current is not None and self.current.number == plan.round
        reason = fault_in(plan, self.config.units, self.config.aggregators_max, revises=revises)
        if reason is not None:
            raise RemoteProtocolError(sender, f"plans {reason}")
        self.members.heard(sender, now_s)
        refusal = self._refusal(plan, sender, now_s)
        if refusal:
            no = PlanRefused(plan.run, plan.group, plan.epoch, self.epoch, refusal)
            return [Send(sender, no)]
        if not self.ready or plan.round > self.round:
            if self._pending is None or plan.epoch >= self._pending[0].epoch:
                self._pending = (plan, sender, now_s)
            self.epoch = max(self.epoch, plan.epoch)
            return []
        return self._adopt(plan, sender, now_s, now_s)

    def _refusal(self, plan: Plan, sender: PeerId, now_s: float) -> str:
        latest = self.current or self.previous
        in_force = latest.plan if latest is not None else None
        if in_force is not None and plan.epoch < in_force.epoch:
            return f"epoch {in_force.epoch} is in force"
        if in_force is not None and plan.epoch == in_force.epoch:
            if plan.round < in_force.round or plan == in_force:
                return f"round {in_force.round} is in force"
            if plan.round == in_force.round:
                return "another plan of this epoch is in force"
            if plan.roster != in_force.roster:
                return "another roster needs another epoch"
        current = self.current
        if current is not None and current.number == plan.round:
            if current.applying:
                return f"round {plan.round} is being applied"
            if not current.training and not same_bounds(plan, current.plan):
                return f"round {plan.round} is cut otherwise"
        if plan.round < self.round:
            return f"round {self.round} is where we stand"
        if self.ready and plan.round == self.round and plan.digest != self.digest:
            return "it starts from another state"
        return ""

    def _adopt(
        self, plan: Plan, coordinator: PeerId, received_s: float, now_s: float
    ) -> list[Effect]:
        self.epoch = max(self.epoch, plan.epoch)
        self._pending = None
        self._moved_s = now_s
        current = self.current
        if current is not None and current.number == plan.round and same_bounds(plan, current.plan):
            effects = current.revise(plan, now_s)
            return [PlanAdopted(plan, coordinator, current.due_s), *effects]
        self.current = Round(self.me, plan, received_s, self.config.quorum)
        return [PlanAdopted(plan, coordinator, self.current.due_s)]

    def _adopt_pending(self, now_s: float) -> list[Effect]:
        if self._pending is None:
            return []
        plan, coordinator, received_s = self._pending
        if plan.round > self.round:
            return []
        self._pending = None
        if self._refusal(plan, coordinator, now_s) or plan.digest != self.digest:
            return []
        return self._adopt(plan, coordinator, received_s, now_s)

    def _round_for(self, sender: PeerId, group: GroupName, number: int) -> Round:
        """The round in force, which a stream must belong to."""
        if group != self.group:
            raise RemoteProtocolError(sender, f"is of group {group}, ours is {self.group}")
        if self.current is None or self.current.number != number:
            mine = self.current.number if self.current else self.round
            raise RemoteProtocolError(sender, f"round {number}; we are in round {mine}")
        return self.current

    # ── outcomes and state ───────────────────────────────────────────────────────────────
    def _held(self, event: OutcomeHeld, now_s: float) -> list[Effect]:
        self.members.heard(event.sender, now_s)
        header = event.header
        if header.round != self.round:
            return []
        if event.fetched and len(self._caught) < limits.AGGREGATORS_MAX:
            self._caught[header.start] = (header, event.signed)
        if self.current is not None and self.current.number == header.round:
            return self.current.hold(header, event.signed, now_s)
        return []

    def _fetch_finished(self, event: FetchFinished, now_s: float) -> list[Effect]:
        if self.current is not None and self.current.number == event.round:
            self.current.fetch_finished(event.peer)
        if self._fetch is None or self._fetch.peer != event.peer:
            return []
        self._fetch.until_s = now_s + RETRY_S / 4
        whole = self._assembled()
        trusted = self._same_history(whole, now_s)
        if event.round == self.round and whole and self.ready and trusted:
            if self.current is not None and self.current.applying:
                return []
            plan = self.current.plan if self.current is not None else None
            if self.current is not None:
                self.current.applying = True
            self._fetch.until_s = now_s + self.config.exchange_s
            return [ApplyRound(plan, self.round, whole)]
        self._fetch_tries += 1
        return []

    def _assembled(self) -> tuple[tuple[OutcomeHeader, Signed], ...]:
        """Fetched outcomes that together cover every unit, or nothing."""
        edge, parts = 0, []
        for start in sorted(self._caught):
            header, signed = self._caught[start]
            if header.start != edge:
                return ()
            parts.append((header, signed))
            edge = header.stop
        return tuple(parts) if edge == self.config.units else ()

    def _same_history(
        self, outcomes: tuple[tuple[OutcomeHeader, Signed], ...], now_s: float
    ) -> bool:
        """Whether fetched outcomes can be those of our own group's round.

        Outcomes of the plan that we follow are. Of a later epoch we can't know, but what a
        clear minority did by itself while it was cut off is not what the group did.
        """
        if self.current is None:
            return True
        later = [h for h, _ in outcomes if h.epoch > self.current.plan.epoch]
        if not later:
            return True
        support = max(len(h.contributors) for h in later)
        return 2 * support > self._camp(self.members.live(self.group, now_s))

    def _applied(self, number: int, digest: Digest, now_s: float) -> list[Effect]:
        if number != self.round:
            return []
        if self.current is not None and self.current.number == number:
            self._due_s = self.current.due_s
            self.previous, self.current = self.current, None
        self._moved_to(number + 1, digest, now_s)
        return self._beat(now_s)

    def _state_ready(self, number: int, digest: Digest, now_s: float) -> list[Effect]:
        self.previous = self.current = None
        self.ready = self._newcomer = True
        self._state_fetch = None
        self._moved_to(number, digest, now_s)
        return self._beat(now_s)

    def _moved_to(self, number: int, digest: Digest, now_s: float) -> None:
        self.round, self.digest = number, digest
        self._applied_s = self._moved_s = now_s
        self._behind_since_s = self._apart_since_s = None
        self._fetch = None
        self._fetch_tries = 0
        self._caught.clear()

    def _sync(self, now_s: float) -> list[Effect]:
        """Get the state, or make good what we missed."""
        if self._state_fetch is not None:
            if now_s < self._state_fetch.until_s:
                return []
            self._avoid(self._state_fetch.peer, now_s)
            self._state_fetch = None
        if not self.ready:
            return self._fetch_state(self._donors(now_s), now_s)
        ahead = self._ahead(now_s)
        if not ahead:
            self._behind_since_s = None
            return self._step_back(now_s)
        if self._behind_since_s is None:
            self._behind_since_s = now_s
        busy = self.current is not None and self.current.applying
        urgent = self._pending is not None or (
            self.current is None or now_s > self.current.end_s or self.current.training
        )
        if busy or (now_s - self._behind_since_s < BEHIND_GRACE_S and not urgent):
            return []
        gap = ahead[0].round - self.round
        if gap > limits.OUTCOME_ROUNDS_KEPT or self._fetch_tries >= FETCH_TRIES_MAX:
            self._fetch_tries = 0
            if not self._outnumbered(self.members.live(self.group, now_s)):
                return []  # they are fewer than we: it is they who must come back
            return self._fetch_state(ahead, now_s)
        if self._fetch is not None and now_s < self._fetch.until_s:
            return []
        source = ahead[self._fetch_tries % len(ahead)].record.peer
        self._fetch = _Attempt(source, now_s + self.config.exchange_s)
        self._caught.clear()
        return [FetchOutcomes(source, self.round, None)]

    def _step_back(self, now_s: float) -> list[Effect]:
        """We have more rounds than a majority that went on without us: theirs count."""
        live = self.members.live(self.group, now_s)
        latest = self.current or self.previous
        ours = set(latest.plan.peers) if latest is not None else set()
        others = [
            n for n in live if n.ready and 0 < n.round < self.round and n.record.peer not in ours
        ]
        camps = Tally((n.round, n.digest) for n in others)
        best = max(camps, key=lambda c: (camps[c], c), default=None)
        if best is None or camps[best] <= self._camp(live):
            self._apart_since_s = None
            return []
        if self._apart_since_s is None:
            self._apart_since_s = now_s
        if now_s - self._apart_since_s < 2 * BEHIND_GRACE_S:
            return []
        donors = [n for n in others if (n.round, n.digest) == best]
        return self._fetch_state(donors, now_s, step_back=True)

    def _donors(self, now_s: float) -> list[Neighbour]:
        """Peers with the run's state: our group's first, then those with most history."""
        return sorted(
            (n for n in self.members.everybody() if n.ready and not n.suspected and n.heard_s > 0),
            key=lambda n: (n.group != self.group, -n.round, n.record.peer),
        )

    def _avoid(self, donor: PeerId, now_s: float) -> None:
        """A transfer from it failed: others first, and twice as long each time."""
        if len(self._bad_donors) >= limits.KNOWN_PEERS_MAX:
            self._bad_donors.clear()
        _, wait_s = self._bad_donors.get(donor, (0.0, RETRY_S))
        self._bad_donors[donor] = (now_s + wait_s, min(2 * wait_s, DONOR_BACKOFF_S_MAX))

    def _fetch_state(
        self, donors: list[Neighbour], now_s: float, *, step_back: bool = False
    ) -> list[Effect]:
        never = (0.0, 0.0)
        able = [d for d in donors if self._bad_donors.get(d.record.peer, never)[0] <= now_s]
        if not able:
            return []
        donor = able[0]
        self._state_fetch = _Attempt(donor.record.peer, now_s + 600.0)
        return [FetchState(donor.record.peer, donor.round, step_back)]

    # ── agreement ────────────────────────────────────────────────────────────────────────
    def _check_digests(self, now_s: float) -> list[Effect]:
        """Compare with everyone who stands at the same round; the minority heals."""
        same_round = [
            n
            for n in self.members.live(self.group, now_s)
            if n.ready and n.round == self.round and n.digest
        ]
        if not same_round or (self.current is not None and self.current.applying):
            return []
        behind = any(n.ready and n.round < self.round for n in self.members.live(self.group, now_s))
        tally = Tally([self.digest, *(n.digest for n in same_round)])
        if len(tally) == 1:
            peers = tuple(sorted([self.me, *(n.record.peer for n in same_round)]))
            latest = self.previous
            expected = len(latest.plan.peers) if latest is not None else len(peers)
            if self._agreed < self.round and len(peers) >= expected:
                self._agreed = self.round
                return [Agreed(self.round, self.digest, peers)]
            return []
        if behind and now_s - self._applied_s < limits.DIGEST_WAIT_S:
            return []  # who is the majority shows when all have reported
        return self._heal(same_round, tally, now_s)

    def _heal(
        self, same_round: list[Neighbour], tally: Tally[Digest], now_s: float
    ) -> list[Effect]:
        holders: dict[Digest, list[PeerId]] = {self.digest: [self.me]}
        for n in same_round:
            holders.setdefault(n.digest, []).append(n.record.peer)
        assert self._record is not None
        seats = [seat_of(n.record) for n in same_round] + [seat_of(self._record.record)]
        order = candidates(self.group, 0, seats)
        first = {d: min(order.index(p) for p in peers) for d, peers in holders.items()}
        winner = min(tally, key=lambda d: (-tally[d], first[d]))
        if winner == self.digest or self._state_fetch is not None:
            return []
        donors = [n for n in same_round if n.digest == winner]
        effects = self._fetch_state(donors, now_s)
        if effects:
            donor = donors[0].record.peer
            effects.insert(0, Differed(self.round, self.digest, winner, donor))
        return effects


def same_bounds(one: Plan, other: Plan) -> bool:
    """Whether two plans cut the layout alike."""
    return [(s.start, s.stop) for s in one.spans] == [(s.start, s.stop) for s in other.spans]


def printable(text: str) -> str:
    """A stranger's text without what could move a terminal's cursor."""
    return "".join(c if c.isprintable() else "?" for c in text)
