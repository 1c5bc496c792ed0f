"""The peer's whole part in the network as one machine: find a group, keep in step, run rounds.

`Standing` holds the facts; `Company` keeps in touch, `Moving` chooses the group, `Following` takes
plans up, `Steering` issues them, `CatchingUp` and `Healing` keep the state right; a `Round` at a
time is run. Its promises:

- it follows one plan at a time, and never an older one (the epoch is a fencing token);
- it applies each round at most once, and only outcomes that cover every unit of it;
- it takes part only with a state that has the plan's digest, and heals from the majority else;
- a peer without the run's state is never a donor and never a coordinator.
"""

from __future__ import annotations

import math

from protocols.catching_up import CatchingUp
from protocols.company import Company
from protocols.coordinates import Coordinate
from protocols.errors import RemoteProtocolError
from protocols.events import (
    Applied,
    ApplyRound,
    CompanyTold,
    ContributionDelivered,
    ContributionFolded,
    ContributionOffered,
    ContributionTaken,
    ContributionUndelivered,
    Delivered,
    Effect,
    Event,
    FetchFinished,
    GroupFormed,
    Leaving,
    OutcomeDelivered,
    OutcomeHeld,
    OutcomeOffered,
    OutcomesAtHand,
    OutcomeUndelivered,
    PartialDelivered,
    PartialFolded,
    PartialOffered,
    PartialUndelivered,
    Received,
    RecordIssued,
    RecordSeen,
    Remembered,
    Send,
    SpanReduced,
    StateComing,
    StateFailed,
    StateReady,
    Suspected,
    Tick,
    Undelivered,
)
from protocols.following import Following
from protocols.healing import Healing
from protocols.membership import Membership
from protocols.messages import (
    OUTCOME_DOMAIN,
    Goodbye,
    Heartbeat,
    Hello,
    OutcomeHeader,
    PlanIssued,
    PlanRefused,
    SpanHeld,
    open_signed,
)
from protocols.moving import Moving
from protocols.placing import Placing
from protocols.records import says_the_same
from protocols.round import Round
from protocols.standing import GroupConfig, Standing
from protocols.steering import Steering
from protocols.types import Digest, GroupName, PeerId

__all__ = ["GroupConfig", "GroupMachine"]


class GroupMachine:
    """See the module. `handle` raises RemoteProtocolError before anything changed."""

    def __init__(self, me: PeerId, config: GroupConfig, now_s: float) -> None:
        self._here = Standing(me, config, now_s)
        self._company = Company(self._here, now_s)
        self._placing = Placing(me, self._here.members, now_s)
        self._following = Following(self._here)
        self._steering = Steering(self._here, self._following)
        self._healing = Healing(self._here)
        self._moving = Moving(self._here, self._company, self._healing, self._placing, now_s)
        self._catching_up = CatchingUp(self._here, self._healing)
        self._formed: tuple[GroupName, tuple[PeerId, ...]] = (GroupName(""), ())
        self._idle = False
        """Whether the event at hand changes nothing that could call for action."""
        self._rounds_s: float | None = None
        """When a round has something to do; None: to be worked out again."""
        self._rounds_of: tuple[Round | None, Round | None, set[PeerId]] = (None, None, set())
        """Which rounds, and who is suspected, when that was worked out."""

    # ── the outside ──────────────────────────────────────────────────────────────────────
    @property
    def me(self) -> PeerId:
        return self._here.me

    @property
    def config(self) -> GroupConfig:
        return self._here.config

    @property
    def members(self) -> Membership:
        return self._here.members

    @property
    def group(self) -> GroupName:
        return self._here.group

    @property
    def round(self) -> int:
        """Rounds in our outer state: the number of the next one."""
        return self._here.round

    @property
    def digest(self) -> Digest:
        return self._here.digest

    @property
    def ready(self) -> bool:
        """Whether we hold the run's state."""
        return self._here.ready

    @property
    def visiting(self) -> bool:
        """Whether we came from another group and do not stand at this one's state yet."""
        return self._here.visiting

    @property
    def leaving(self) -> bool:
        """Whether goodbye was said: nothing new begins."""
        return self._here.leaving

    @property
    def epoch(self) -> int:
        return self._here.epoch

    @property
    def current(self) -> Round | None:
        """The round in force."""
        return self._here.current

    @property
    def coordinate(self) -> Coordinate | None:
        """Where we stand in the network, as others should see it."""
        return self._placing.told

    @property
    def chores_s(self) -> float:
        """How seldom standing chores may be done, as long as rounds are now."""
        return self._here.pace.chores_s

    def live_members(self, now_s: float) -> list[PeerId]:
        """The group as we see it, ourselves included, in order."""
        return self._here.live_members(now_s)

    def firm(self, now_s: float) -> bool:
        """Whether most of our group stand at exactly our state; see `Standing.firm`."""
        return self._here.firm(now_s)

    def past(self, now_s: float) -> Remembered:
        """What to be told after a restart that happens now."""
        here = self._here
        others = tuple(here.members.company(here.group, now_s))
        return Remembered(here.group, here.epoch, min(here.firm_round, here.round), others, 0.0)

    def coordinator(self, now_s: float) -> PeerId | None:
        """Who should issue the next plan, by what we know."""
        return self._here.coordinator(now_s)

    @property
    def deadline_s(self) -> float:
        """When `handle(Tick())` is due at the latest."""
        here = self._here
        if here.leaving:
            return math.inf
        if self._rounds_s is None or not self._same_rounds():
            suspected = here.suspected()
            times = [r.deadline_s(suspected) for r in (here.current, here.previous) if r]
            self._rounds_s = min(times, default=math.inf)
            self._rounds_of = (here.current, here.previous, suspected)
        return min(self._company.deadline_s, self._moving.deadline_s, self._rounds_s)

    @property
    def phase(self) -> str:
        """For people: looking, syncing, training or exchanging."""
        here = self._here
        if not here.ready:
            return "syncing" if here.members.everybody() else "looking"
        if here.current is None or here.current.training:
            return "training"
        return "exchanging"

    def answer(self, sender: PeerId, now_s: float) -> Heartbeat | None:
        """What a heartbeat of `sender` is answered with, after it was handled."""
        return self._company.answer(sender, now_s)

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """Advance.

        Raises:
            RemoteProtocolError: a peer broke the rules; nothing changed.
        """
        here = self._here
        self._idle = False
        self._company.wake(now_s)
        effects = self._dispatch(event, now_s)
        if not self._idle:
            if effects or not _spares_rounds(event):
                self._rounds_s = None
            if not here.leaving:
                effects += self._advance(now_s)
                self._company.hurry(now_s)
            if any(isinstance(effect, ApplyRound) for effect in effects) and here.firm(now_s):
                here.firm_round = here.round
        self._company.rest(now_s)
        return effects

    def _dispatch(self, event: Event, now_s: float) -> list[Effect]:
        here = self._here
        match event:
            case Tick():
                return self._company.tick(now_s)
            case Received(sender, message):
                return self._received(sender, message, now_s)
            case Delivered(peer, rtt_s, beat):
                here.members.delivered(peer, rtt_s)
                self._placing.measured(peer, now_s)
                self._idle = True
                if beat is not None:
                    self._stands(peer, beat, now_s, now_s - rtt_s)
            case Undelivered(peer, reason):
                if here.members.undelivered(peer):
                    return [Suspected(peer, reason)]
                self._company.undelivered(peer, now_s)
            case RecordSeen(record):
                known = here.members.get(record.peer)
                # Records are read and renewed again and again: most say nothing new.
                self._idle = (
                    known is not None
                    and not known.suspected
                    and says_the_same(record, known.record)
                )
                return self._company.record_seen(record, now_s)
            case RecordIssued():
                return self._company.record_issued(event, now_s)
            case StateReady(number, digest, until):
                self._catching_up.at_hand(until)
                return self._state_ready(number, digest, now_s)
            case Remembered():
                here.firm_round, here.firm_group = event.firm, event.group
                here.knew_epoch(event.group, event.epoch)
                here.members.remember(event.group, event.members, now_s - event.silent_s)
            case CompanyTold(group, members):
                here.members.remember(group, [m for m in members if m != here.me], now_s)
                self._idle = True
            case OutcomesAtHand(until):
                self._catching_up.at_hand(until)
                self._idle = True
            case StateComing():
                self._healing.coming(now_s)
                self._idle = True
            case StateFailed(donor, _, busy):
                self._healing.failed(donor, now_s, busy=busy)
            case ContributionOffered(sender, header):
                here.own_run(sender, header.run)
                here.round_for(sender, header.group, header.round).check_offer(sender, header)
                here.members.heard(sender, now_s)
            case PartialOffered(sender, part):
                here.own_run(sender, part.run)
                here.round_for(sender, part.group, part.round).check_partial(sender, part)
                here.members.heard(sender, now_s)
            case OutcomeOffered(sender, push, header):
                here.own_run(sender, header.run)
                current = here.round_for(sender, header.group, header.round)
                current.check_outcome(sender, push.epoch, header, push.outcome.signer)
                here.members.heard(sender, now_s)
                return current.outcome_coming(header)
            case Applied(number, digest):
                return self._applied(number, digest, now_s)
            case OutcomeHeld():
                return self._catching_up.held(event, now_s)
            case FetchFinished():
                return self._catching_up.fetch_finished(event, now_s)
            case SpanReduced(header, signed):
                if here.current is not None and here.current.reduces(header):
                    return here.current.hold(header, signed, now_s)
            case OutcomeDelivered(peer, number, span):
                for r in (here.current, here.previous):
                    if r is not None and r.number == number:
                        r.outcome_delivered(peer, span)
            case OutcomeUndelivered(peer, number, span):
                for r in (here.current, here.previous):
                    if r is not None and r.number == number:
                        r.outcome_undelivered(peer, span, now_s)
            case Leaving(reason):
                here.leaving = True
                bye = Goodbye(here.config.run, reason)
                return [Send(n.record.peer, bye) for n in here.members.in_group(here.group)]
            case _:
                return self._contribution_event(event, now_s)
        return []

    def _contribution_event(self, event: Event, now_s: float) -> list[Effect]:
        here = self._here
        current = here.current
        match event:
            case ContributionTaken(number, weight):
                if current is not None and current.number == number:
                    return current.contribution_taken(weight, now_s)
            case ContributionFolded(sender, number, span, complete):
                if current is not None and current.number == number:
                    current.folded(sender, span, complete, now_s)
            case PartialFolded(sender, number, span, answered):
                if current is not None and current.number == number:
                    current.partial_folded(sender, span, answered)
            case PartialDelivered(peer, number, span):
                if current is not None and current.number == number:
                    current.partial_delivered(peer, span)
            case PartialUndelivered(peer, number, span, refused):
                if current is not None and current.number == number:
                    current.partial_undelivered(peer, span, refused, now_s)
            case ContributionDelivered(peer, number, span):
                if current is not None and current.number == number:
                    current.contribution_delivered(peer, span)
            case ContributionUndelivered(peer, number, span, refused):
                if current is not None and current.number == number:
                    current.contribution_undelivered(peer, span, refused, now_s)
        return []

    def _received(self, sender: PeerId, message: object, now_s: float) -> list[Effect]:
        here = self._here
        match message:
            case Hello():
                version = here.members.version
                effects = self._company.hello(sender, message, now_s)
                self._idle = here.members.version == version
                return effects
            case Heartbeat():
                unknown = here.members.get(sender) is None
                self._stands(sender, message, now_s)
                self._idle = self._idle and not unknown
                return self._company.greet(sender, now_s, answer=True) if unknown else []
            case PlanIssued(signed):
                return self._following.plan_issued(sender, signed, now_s)
            case PlanRefused():
                here.own_run(sender, message.run)
                here.members.heard(sender, now_s)
                known = here.members.get(sender)
                if message.group == here.group and known and known.group == here.group:
                    here.heard_of_epoch(message.known_epoch)
                    return self._steering.refused(message, now_s)
            case SpanHeld():
                return self._span_held(sender, message, now_s)
            case Goodbye():
                here.own_run(sender, message.run)
                if here.members.get(sender) is not None:
                    here.members.said_goodbye(sender)
                    return [Suspected(sender, f"left: {printable(message.reason)}")]
        return []

    def _stands(
        self, sender: PeerId, beat: Heartbeat, now_s: float, asked_s: float | None = None
    ) -> None:
        """A member says where it stands: in a heartbeat, or in its answer to ours of `asked_s`."""
        here = self._here
        here.own_run(sender, beat.run)
        self._idle = not here.members.heartbeat(sender, beat, now_s, asked_s)
        if beat.group == here.group and here.members.get(sender) is not None:
            here.heard_of_epoch(beat.epoch)

    def _span_held(self, sender: PeerId, message: SpanHeld, now_s: float) -> list[Effect]:
        here = self._here
        here.own_run(sender, message.run)
        current = here.current
        if current is None or current.number != message.round or message.group != here.group:
            return []
        header = open_signed(message.outcome, OUTCOME_DOMAIN, OutcomeHeader, sender)
        if (header.run, header.group, header.round) != (message.run, here.group, message.round):
            raise RemoteProtocolError(sender, "hands over an outcome of another round")
        effects = current.handed_over(sender, message.span, header, message.outcome.signer)
        here.members.heard(sender, now_s)
        return effects

    def _advance(self, now_s: float) -> list[Effect]:
        here = self._here
        effects = self._moving.regroup(now_s)
        if not here.group or here.record is None:
            return effects
        members = here.outlook(now_s).members
        if (here.group, members) != self._formed:
            self._formed = (here.group, members)
            effects.append(GroupFormed(here.group, members))
        effects += self._moving.meet_a_stranger(now_s)
        effects += self._moving.settle_in(now_s)
        if not here.visiting:
            effects += self._catching_up.sync(now_s)
        if not here.ready or here.visiting:
            return effects
        effects += self._following.adopt_pending(now_s)
        effects += self._healing.check_digests(now_s)
        self._steering.bench_the_useless(now_s)
        if not self._healing.fetching:
            effects += self._steering.coordinate(now_s)
        due_s = self._rounds_s
        if effects or due_s is None or now_s >= due_s or not self._same_rounds():
            effects += self._run_rounds(now_s)
        return effects

    def _run_rounds(self, now_s: float) -> list[Effect]:
        here = self._here
        self._rounds_s = None
        suspected = here.suspected()
        effects: list[Effect] = []
        if here.previous is not None:
            effects += here.previous.tick(now_s, suspected)
        if here.current is not None:
            effects += here.current.tick(now_s, suspected)
            effects += here.current.complete()
        return effects

    def _same_rounds(self) -> bool:
        """Whether what the rounds wait for is what it was when `_rounds_s` was worked out."""
        current, previous, suspected = self._rounds_of
        here = self._here
        return (
            current is here.current and previous is here.previous and suspected is here.suspected()
        )

    def _applied(self, number: int, digest: Digest, now_s: float) -> list[Effect]:
        here = self._here
        if number != here.round:
            return []
        if here.current is not None and here.current.number == number:
            here.due_s = here.current.due_s
            here.pace.measured(now_s - here.due_s)
            here.current.over()
            here.previous, here.current = here.current, None
        self._moved_to(number + 1, digest, now_s)
        return self._company.beat(now_s)

    def _state_ready(self, number: int, digest: Digest, now_s: float) -> list[Effect]:
        here = self._here
        here.previous = here.current = None
        here.ready = here.newcomer = True
        here.visiting = False
        if self._healing.from_afar:
            self._moving.came_with_a_foreign_state(now_s)
        self._healing.fetched(number, digest)
        self._moved_to(number, digest, now_s)
        return self._company.beat(now_s)

    def _moved_to(self, number: int, digest: Digest, now_s: float) -> None:
        here = self._here
        here.round, here.digest = number, digest
        here.applied_s = here.moved_s = now_s
        self._catching_up.settled()


def _spares_rounds(event: Event) -> bool:
    """Whether an event by itself does nothing to a round; most are of this kind."""
    match event:
        case Tick() | RecordSeen() | Delivered():
            return True
        case Received(_, message):
            return isinstance(message, Heartbeat | Hello)
    return False


def printable(text: str) -> str:
    """A stranger's text without what could move a terminal's cursor."""
    return "".join(c if c.isprintable() else "?" for c in text)
