"""The one place where the group's machine meets the world.

`feed` hands the machine an event and performs the effects it answers with; everything that takes
time becomes an owned task whose end is another event. There are no locks: the machine is only ever
touched here, in the event loop, and never waits. One liar or one dead peer ends its own task, never
the loop.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final, Protocol

from peer.clock import SYSTEM, Clock
from peer.exchange import (
    HAVE,
    HEADER,
    LATER,
    NO,
    Exchange,
    Outcome,
    RefusedError,
    refuse,
)
from peer.incoming import Incoming
from peer.mixing import Mixing
from peer.net.transport import CallHandler, Posted, Stream, Transport, TransportError
from peer.observe import events as ev
from peer.state_chunks import StateGrid
from peer.states import States
from peer.train.method import Contribution
from peer.transfer import Snapshot
from protocols import limits
from protocols.blocks import NO_BLOCKS, BlockReport
from protocols.errors import RemoteProtocolError
from protocols.events import (
    Agreed,
    Applied,
    ApplyRound,
    CloseSpan,
    CompanyTold,
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
    PartialDelivered,
    PartialFolded,
    PartialOffered,
    PartialUndelivered,
    PlanAdopted,
    PublishRecord,
    PushOutcome,
    Received,
    Remembered,
    Send,
    SendContribution,
    SendPartial,
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
from protocols.group import GroupMachine
from protocols.identity import Signer
from protocols.ledger import Counted
from protocols.messages import (
    OUTCOME_DOMAIN,
    PLAN_DOMAIN,
    AssetQuery,
    ContributionHeader,
    DebtClosed,
    DebtPush,
    DebtsQuery,
    Heartbeat,
    Hello,
    LoanAgain,
    LoanQuery,
    Message,
    OutcomeHeader,
    OutcomePush,
    OutcomeQuery,
    PartialHeader,
    Plan,
    PlanIssued,
    StateQuery,
    decode,
    decode_beat,
    decode_header,
    encode,
    open_signed,
)
from protocols.records import PeerRecord, Signed, read_record, sign
from protocols.schema import SchemaError
from protocols.types import Digest, GroupName, PeerId

SLEEP_S_MAX: Final = 3600.0  # the machine says when it wants to be woken
REFUSALS_TOLD_MAX: Final = 64  # per peer; a flood of nonsense must not flood the log


@dataclass(frozen=True, slots=True)
class Taken:
    """A frozen contribution and what a log wants to know of it."""

    contribution: Contribution
    loss: float
    steps: int
    blocks: list[tuple[int, int]]
    report: BlockReport = NO_BLOCKS
    """What the others are told of them."""


@dataclass(frozen=True, slots=True)
class AppliedFacts:
    """What applying a round gave."""

    digest: Digest
    included: float
    """Share of the units whose mean contains this peer's contribution."""
    counted: Counted | None = None
    """What the group's ledger of blocks makes of it; None where nobody keeps one."""


class Learner(Protocol):
    """Training, as the driver needs it. Every call leaves the event loop free."""

    @property
    def round(self) -> int:
        """Rounds in the outer state."""

    @property
    def digest(self) -> Digest:
        """Of the outer state."""

    @property
    def grid(self) -> StateGrid:
        """How the outer state is cut into chunks."""

    async def take(self, number: int) -> Taken: ...

    async def apply(
        self, number: int, outcomes: list[Outcome], plan: Plan | None
    ) -> AppliedFacts | None:
        """Apply a round; None if the state has moved on meanwhile."""

    async def snapshot(self) -> Snapshot: ...

    async def load(self, state: Snapshot, step_back: bool, parted: int | None = None) -> bool:
        """Take a donor's state; False if it is not what its digest says, or older than ours
        without leave to `step_back`. `parted`: what was learned here since that round is kept
        for the next contribution."""

    async def after_load(self) -> None:
        """A state was taken and everybody here knows: make it last."""


class Driver:
    """Runs one `GroupMachine` over a transport. Use as an async context manager."""

    def __init__(
        self,
        machine: GroupMachine,
        transport: Transport,
        signer: Signer,
        exchange: Exchange,
        learner: Learner,
        emit: ev.Listener,
        *,
        serve_asset: Callable[[Stream, AssetQuery], Coroutine[Any, Any, None]],
        publish: Callable[[], None] = lambda: None,
        on_plan: Callable[[Plan], None] = lambda _: None,
        incoming: Incoming | None = None,
        clock: Clock = SYSTEM,
    ) -> None:
        """`publish`: sign and store our record anew; `on_plan`: somebody else wants to know.
        `incoming`: where a state on its way survives a restart."""
        self.machine = machine
        self.transport = transport
        self.signer = signer
        self.exchange = exchange
        self.learner = learner
        self.emit = emit
        self.publish = publish
        self._serve_asset = serve_asset
        self.on_plan = on_plan
        self.clock = clock
        self.remember: Callable[[Remembered], None] = lambda _: None
        """Told after each round what a restart must know again."""
        self.mixing: Mixing | None = None
        """Gossip with other groups; set by whoever puts the peer together, where there is any."""
        self._outboxes: dict[PeerId, deque[Message]] = {}
        self._poster = getattr(transport, "post", None)
        """A transport's own way to send a message without a task that waits for the answer."""
        self._last_coded: tuple[Message | None, bytes] = (None, b"")
        self._quiet = asyncio.Event()
        self._applying = 0
        self._settled = asyncio.Event()
        self._settled.set()
        self._wake = asyncio.Event()
        self._sleeps_until_s = math.inf
        self._tasks: asyncio.TaskGroup | None = None
        self._refusals: dict[PeerId, int] = {}
        self._states = States(self, learner, incoming)
        self._due: dict[int, tuple[float, Plan]] = {}
        self._sent: dict[int, Taken] = {}
        self._taking: set[int] = set()
        self._sending: dict[tuple[int, int], asyncio.Task[None]] = {}
        """(round, span) -> our contribution on its way."""
        self._fetching: dict[asyncio.Task[None], int] = {}
        """A fetch of outcomes under way -> their round."""
        self._coordinator: PeerId | None = None
        self._epoch = 0
        self._fetched_from = PeerId("")
        self.round_finished: Callable[[int, AppliedFacts, list[Outcome], Plan | None, float], None]
        self.round_finished = lambda *_: None
        self.before: Callable[[CallHandler], CallHandler] = lambda on_call: on_call
        """Puts a handler of other calls in front of ours."""

    # ── life ─────────────────────────────────────────────────────────────────────────────
    async def run(self) -> None:
        """Drive until cancelled. Cancelling ends every task that this driver started."""
        self.transport.serve(self.before(self._on_call), self._on_stream)
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            while True:
                if self._deadline_s() <= self.clock.monotonic():
                    self.feed(Tick())
                    if self.mixing is not None:
                        self.mixing.feed(Tick())
                self._wake.clear()
                self._sleeps_until_s = self._deadline_s()
                wait_s = max(0.0, self._sleeps_until_s - self.clock.monotonic())
                # An alarm costs a third of a timeout, which would have to cancel this task.
                alarm = loop.call_later(min(wait_s, SLEEP_S_MAX), self._wake.set)
                try:
                    await self._wake.wait()
                finally:
                    alarm.cancel()

    def feed(self, event: Event) -> None:
        """Hand the machine an event and do what it wants; a peer's blunder is noted, no more."""
        try:
            self._handle(event)
        except RemoteProtocolError as error:
            self.refused(error)

    def _handle(self, event: Event) -> None:
        effects = self.machine.handle(event, self.clock.monotonic())
        for effect in effects:
            self._perform(effect)
        self.wake()

    def _deadline_s(self) -> float:
        mixing_s = math.inf if self.mixing is None else self.mixing.deadline_s
        return min(self.machine.deadline_s, mixing_s)

    def wake(self) -> None:
        """Look again, if there is something to do before we meant to."""
        if self._deadline_s() < self._sleeps_until_s:
            self._wake.set()

    def refused(self, error: RemoteProtocolError) -> None:
        """A peer broke the rules: say so (so often and no more), change nothing."""
        if len(self._refusals) >= limits.KNOWN_PEERS_MAX:
            self._refusals.clear()
        count = self._refusals.get(error.peer, 0) + 1
        self._refusals[error.peer] = count
        if count <= REFUSALS_TOLD_MAX:
            self.emit(ev.PeerRefused(error.peer, error.reason))

    # ── what gossip needs of us ──────────────────────────────────────────────────────────
    @property
    def group(self) -> GroupName:
        return self.machine.group

    @property
    def round(self) -> int:
        return self.learner.round

    def now_s(self) -> float:
        return self.clock.monotonic()

    def live_members(self) -> list[PeerId]:
        return self.machine.live_members(self.now_s())

    def company(self) -> tuple[PeerId, ...]:
        return self.machine.past(self.now_s()).members

    def told_company(self, group: GroupName, members: tuple[PeerId, ...]) -> None:
        self.feed(CompanyTold(group, members))

    def records(self) -> list[PeerRecord]:
        """Of fellow members that live."""
        live = self.machine.members.live(self.machine.group, self.now_s())
        return [neighbour.record for neighbour in live]

    def start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None] | None:
        """Own a task; None while nothing runs, or all is ending."""
        if self._tasks is None:
            work.close()
            return None
        try:
            return self._tasks.create_task(work, name=name)
        except RuntimeError:  # it is ending, and takes no more
            work.close()
            return None

    # ── effects ──────────────────────────────────────────────────────────────────────────
    def _perform(self, effect: Effect) -> None:
        match effect:
            case Send(peer, message):
                self.post(peer, message)
            case SignPlan(plan, to):
                signed = sign(self.signer, PLAN_DOMAIN, plan)
                for peer in to:
                    self.post(peer, PlanIssued(signed))
            case TakeContribution(number):
                self.start(self._take(number), f"take {number}")
            case SendContribution(plan, span, to):
                work = self._send_contribution(plan, span, to)
                task = self.start(work, f"send {span} to {to}")
                if task is not None:
                    self._sending = {k: t for k, t in self._sending.items() if not t.done()}
                    self._sending[plan.round, span] = task
            case StopSending(number, span):
                if (late := self._sending.pop((number, span), None)) is not None:
                    late.cancel()
            case CloseSpan(plan, span, keep):
                self.start(self._close_span(plan, span, keep), f"close {span}")
            case SendPartial():
                self.start(self._send_partial(effect), f"sum {effect.span} to {effect.to}")
            case DropSpan(number, span):
                plan_now = self._due.get(number)
                if plan_now is not None:
                    bounds = plan_now[1].spans[span]
                    self.exchange.drop_span(number, bounds.start, bounds.stop)
            case PushOutcome():
                self.start(self._push(effect), f"push {effect.header.span} to {effect.to}")
            case FetchOutcomes(peer, number, span):
                task = self.start(self._fetch(peer, number, span), f"fetch {number} from {peer}")
                if task is not None:
                    self._fetching = {t: n for t, n in self._fetching.items() if not t.done()}
                    self._fetching[task] = number
            case ApplyRound() if not self.machine.leaving:
                self.start(self._apply(effect), f"apply {effect.round}")
            case FetchState():
                self.start(self._fetch_state(effect), f"state from {effect.donor}")
            case PublishRecord():
                self.publish()
            case _:
                self._tell(effect)

    def _tell(self, effect: Effect) -> None:
        now_s = self.clock.monotonic()
        match effect:
            case PlanAdopted(plan, coordinator, due_s):
                self._coordinator = coordinator
                if plan.epoch > self._epoch:
                    # Before anything is signed in it: after a restart it is another's, or over.
                    self._epoch = plan.epoch
                    self.remember(self.machine.past(now_s))
                self._due = {n: d for n, d in self._due.items() if n >= plan.round - 1}
                self._due[plan.round] = (due_s, plan)
                self.on_plan(plan)
                self.emit(
                    ev.RoundPlanned(
                        plan.group,
                        plan.round,
                        plan.epoch,
                        coordinator,
                        list(plan.peers),
                        [span.aggregator for span in plan.spans],
                        max(0.0, due_s - now_s),
                        max(self.machine.config.round_s, plan.train_ms / 1000),
                    )
                )
            case GroupFormed(group, members):
                self.emit(ev.GroupChanged(group, list(members)))
            case Suspected(peer, reason):
                self.emit(ev.MemberSuspected(peer, reason))
            case Agreed(number, digest, peers):
                self.emit(ev.DigestsAgreed(number, digest.hex(), list(peers)))
            case Differed(number, mine, majority, donor):
                self.emit(ev.DigestDiffered(number, mine.hex(), majority.hex(), donor))
            case _:
                pass

    # ── control messages ─────────────────────────────────────────────────────────────────
    def post(self, peer: PeerId, message: Message) -> None:
        """Queue a message; one sender per peer, so a slow one delays nobody else."""
        box = self._outboxes.get(peer)
        if box is None:
            self._outboxes[peer] = box = deque()
            self._quiet.clear()
            if self._poster is None:
                self.start(self._deliver(peer, box), f"messages to {peer}")
            else:
                asyncio.get_running_loop().call_soon(self._post_next, peer, box)
        if isinstance(message, Heartbeat | Hello):
            for queued in [m for m in box if isinstance(m, type(message))]:
                box.remove(queued)  # only the newest says where we stand
        if len(box) >= limits.OUTBOX_MESSAGES_MAX:
            box.popleft()
        box.append(message)

    async def posted(self) -> None:
        """Until every queued message was delivered or given up."""
        while self._outboxes:
            await self._quiet.wait()

    async def settled(self) -> None:
        """Until no round is being applied: the state and what was told of it agree."""
        await self._settled.wait()

    def taken(self, number: int) -> Taken | None:
        """This peer's own contribution to a round, if it was the last one."""
        return self._sent.get(number)

    async def _deliver(self, peer: PeerId, box: deque[Message]) -> None:
        while box:
            coded = self._coded(box.popleft())
            begun_s = self.clock.monotonic()
            answer: Posted
            try:
                answer = await self.transport.call(peer, coded, limits.CALL_TIMEOUT_S)
            except (TransportError, RemoteProtocolError) as error:
                answer = error
            self._delivered(peer, begun_s, answer)
        self._emptied(peer)

    def _post_next(self, peer: PeerId, box: deque[Message]) -> None:
        """As `_deliver`, where the transport tells by itself what became of a message."""
        coded = self._coded(box.popleft())
        begun_s = self.clock.monotonic()

        def done(answer: Posted) -> None:
            self._delivered(peer, begun_s, answer)
            if box:
                self._post_next(peer, box)
            else:
                self._emptied(peer)

        assert self._poster is not None
        self._poster(peer, coded, limits.CALL_TIMEOUT_S, done)

    def _delivered(self, peer: PeerId, begun_s: float, answer: Posted) -> None:
        if isinstance(answer, TransportError):
            self.feed(Undelivered(peer, answer.reason))
            return
        beat: Heartbeat | None = None
        if isinstance(answer, RemoteProtocolError):
            self.refused(answer)  # it lives and says no: our message was stale, or of another run
        elif answer:
            try:
                beat = decode_beat(answer, peer)
            except RemoteProtocolError as error:
                self.refused(error)
        self.feed(Delivered(peer, self.clock.monotonic() - begun_s, beat))

    def _emptied(self, peer: PeerId) -> None:
        del self._outboxes[peer]
        if not self._outboxes:
            self._quiet.set()

    def _coded(self, message: Message) -> bytes:
        """Most messages go to the whole group, one after another."""
        if message is not self._last_coded[0]:
            self._last_coded = (message, encode(message))
        return self._last_coded[1]

    async def _on_call(self, sender: PeerId, request: bytes) -> bytes:
        try:
            message = decode(request, sender)
            if isinstance(message, Hello):
                self._remember(sender, message)
            if isinstance(message, DebtClosed):
                if self.mixing is not None:
                    self.mixing.heard(sender, message)
            else:
                self._handle(Received(sender, message))
            if isinstance(message, Heartbeat):
                beat = self.machine.answer(sender, self.clock.monotonic())
                return b"" if beat is None else encode(beat)
        except RemoteProtocolError as error:
            self.refused(error)
            raise
        return b""

    def _remember(self, sender: PeerId, hello: Hello) -> None:
        """Keep the addresses of a peer that introduces itself, to be able to dial it."""
        remember = getattr(self.transport, "remember", None)
        if remember is None:
            return
        try:
            record = read_record(hello.record)
        except SchemaError as error:
            raise RemoteProtocolError(sender, str(error)) from None
        if record.peer == sender:
            remember(sender, record.addresses)

    # ── this peer's part of a round ──────────────────────────────────────────────────────
    async def _take(self, number: int) -> None:
        """Freeze the work for a round, once: a plan that takes the place of another for the same
        round gets the same contribution. The first may be inside what comes of it, and a second
        would hold the same work once more."""
        if number in self._taking:
            return  # whoever asks now is told with the other
        if (before := self._sent.get(number)) is not None:
            self.feed(ContributionTaken(number, float(before.contribution.weight)))
            return
        self._taking.add(number)
        try:
            taken = await self.learner.take(number)
        finally:
            self._taking.discard(number)
        self.exchange.offer(number, taken.contribution, taken.report)
        self._sent = {number: taken}
        self.emit(
            ev.ContributionSent(
                number, float(taken.contribution.weight), taken.blocks, taken.loss, taken.steps
            )
        )
        self.feed(ContributionTaken(number, float(taken.contribution.weight)))

    async def _send_contribution(self, plan: Plan, span: int, to: PeerId) -> None:
        failed = ContributionUndelivered(to, plan.round, span, False)
        try:
            whole = await self.exchange.send_contribution(plan, span, to)
        except RefusedError as error:
            final = error.status != LATER
            self.feed(ContributionUndelivered(to, plan.round, span, final))
        except TransportError as error:
            self.feed(Undelivered(to, error.reason))
            self.feed(failed)
        except RemoteProtocolError as error:
            self.refused(error)
            self.feed(failed)
        else:
            if to == self.transport.peer_id:
                self.feed(ContributionFolded(to, plan.round, span, whole))
            self.feed(ContributionDelivered(to, plan.round, span))

    async def _send_partial(self, effect: SendPartial) -> None:
        to, number, span = effect.to, effect.plan.round, effect.span
        try:
            faults = await self.exchange.send_partial(effect.plan, span, to, effect.answered)
        except RefusedError as error:
            self.feed(PartialUndelivered(to, number, span, error.status != LATER))
        except (TransportError, RemoteProtocolError) as error:
            if isinstance(error, TransportError):
                self.feed(Undelivered(to, error.reason))
            else:
                self.refused(error)
            self.feed(PartialUndelivered(to, number, span, False))
        else:
            for fault in faults:
                self.refused(fault)
            self.feed(PartialDelivered(to, number, span))

    async def _close_span(self, plan: Plan, span: int, keep: bool) -> None:
        closed = await self.exchange.close_span(plan, span, keep=keep)
        for error in closed.refused:
            self.refused(error)
        outcome = closed.outcome
        self.feed(SpanReduced(outcome.header, outcome.signed))

    async def _push(self, effect: PushOutcome) -> None:
        header = effect.header
        outcome = self.exchange.find(header)
        if outcome is None:
            return
        try:
            await self.exchange.push_outcome(effect.epoch, outcome, effect.to)
        except (TransportError, RefusedError, RemoteProtocolError) as error:
            if isinstance(error, TransportError):
                self.feed(Undelivered(effect.to, error.reason))
            self.feed(OutcomeUndelivered(effect.to, header.round, header.span))
        else:
            self.feed(OutcomeDelivered(effect.to, header.round, header.span))

    async def _fetch(self, peer: PeerId, number: int, span: int | None) -> None:
        query = OutcomeQuery(self.machine.config.run, self.machine.group, number, span)
        count, reason = 0, ""

        def got(header: OutcomeHeader, signed: Signed) -> None:
            nonlocal count
            count += 1
            self.feed(OutcomeHeld(peer, header, signed, True))

        for outcome in await self._states.kept(number) if span is None else ():
            self.exchange.hold(outcome)
            got(outcome.header, outcome.signed)
        if count:
            self._fetched_from = peer
            self.feed(FetchFinished(peer, number, count, ""))
            return
        try:
            exchanged = self.machine.config.exchanged(number)
            await self.exchange.fetch_outcomes(peer, query, exchanged, got)
            self._fetched_from = peer
        except TransportError as error:
            reason = error.reason
            self.feed(Undelivered(peer, reason))
        except RemoteProtocolError as error:
            reason = error.reason
            self.refused(error)
        self.feed(FetchFinished(peer, number, count, reason))

    async def _apply(self, effect: ApplyRound) -> None:
        self._applying += 1
        self._settled.clear()
        try:
            with self.mixing.changing() if self.mixing is not None else nullcontext():
                await self._apply_held(effect)
        finally:
            self._applying -= 1
            if not self._applying:
                self._settled.set()

    async def _apply_held(self, effect: ApplyRound) -> None:
        outcomes = [self.exchange.find(header) for header, _ in effect.outcomes]
        held = [outcome for outcome in outcomes if outcome is not None]
        if len(held) != len(outcomes):
            raise AssertionError("the machine applies what the exchange does not hold")
        firm = self.machine.firm(self.clock.monotonic())
        facts = await self.learner.apply(effect.round, held, effect.plan)
        here = (self.learner.round, self.learner.digest)
        if facts is None or here != (effect.round + 1, facts.digest):
            return  # a donor's state took the place of ours, and the machine hears of that
        self.exchange.settle(effect.round, held)
        for task, number in self._fetching.items():
            if number <= effect.round:
                task.cancel()  # what still comes is here, and others need that line
        self._tell_late(effect.round, facts.included)
        if effect.plan is None:
            self.emit(ev.CaughtUp(effect.round, self._fetched_from))
        due_s = self._due.get(effect.round, (self.clock.monotonic(), None))[0]
        self.feed(Applied(effect.round, facts.digest))
        self.remember(self.machine.past(self.clock.monotonic()))
        if self.mixing is not None:
            self.mixing.round_done(held, firm)
        self.round_finished(
            effect.round, facts, held, effect.plan, max(0.0, self.clock.monotonic() - due_s)
        )

    def _tell_late(self, number: int, included: float) -> None:
        """What is not inside stays in our local progress, and so in the next contribution."""
        taken = self._sent.get(number)
        if taken is not None and taken.contribution.weight > 0 and included < 1.0:
            tokens = float(taken.contribution.weight) * (1.0 - included)
            self.emit(ev.WorkCarriedOver(number, 1.0 - included, tokens))

    async def _fetch_state(self, effect: FetchState) -> None:
        donor = effect.donor
        begun_s = self.clock.monotonic()
        if (effect.round, effect.digest) == (self.learner.round, self.learner.digest):
            # A run's beginning is made from its manifest, the same everywhere: who comes before
            # the first round is over has it already.
            self.feed(StateReady(self.learner.round, self.learner.digest))
            return
        try:
            fetched = await self._states.fetch(effect)
        except RefusedError as error:
            self.feed(StateFailed(donor, str(error), busy=error.status == LATER))
            return
        except TransportError as error:
            self.feed(StateFailed(donor, error.reason))
            return
        except RemoteProtocolError as error:
            self.refused(error)
            self.feed(StateFailed(donor, error.reason))
            return
        state, mixing = fetched.state, self.mixing
        with mixing.changing() if mixing is not None else nullcontext():
            # Asked first: between the load and the word of it nothing may be waited for, or the
            # machine would go on with a round of the state that is no more.
            told = await mixing.ask_debts(donor) if mixing is not None else None
            if not await self.learner.load(state, effect.step_back, effect.parted):
                self._states.drop_backlog()
                self.feed(StateFailed(donor, "its state is older than ours, or not what it says"))
                return
            self._sent.clear()  # that work is gone, and what comes now is other work
            self._states.replaced()
            seconds = self.clock.monotonic() - begun_s
            given = {str(giver): size for giver, size in fetched.given.items()}
            self.emit(ev.StateReceived(donor, state.round, state.bytes, seconds, given))
            if mixing is not None:
                mixing.state_replaced(told)
        self.feed(StateReady(state.round, state.digest, self._states.until))
        await self.learner.after_load()
        self.remember(self.machine.past(self.clock.monotonic()))
        await self._states.tidy()

    # ── streams that others open ─────────────────────────────────────────────────────────
    async def _on_stream(self, stream: Stream) -> None:
        try:
            frame = await stream.receive(limits.STREAM_HEADER_BYTES_MAX)
            if frame is None or frame.kind != HEADER:
                raise RemoteProtocolError(stream.peer, "a stream without a header")
            await self._serve(stream, decode_header(frame.payload, stream.peer))
        except RemoteProtocolError as error:
            self.refused(error)
            await refuse(stream, NO, error.reason)
        except TransportError:
            pass  # its own task will notice; heartbeats decide who lives

    async def _serve(self, stream: Stream, header: object) -> None:
        match header:
            case ContributionHeader():
                await self._serve_contribution(stream, header)
            case PartialHeader():
                await self._serve_partial(stream, header)
            case OutcomePush():
                await self._serve_push(stream, header)
            case OutcomeQuery():
                self._check_run(stream.peer, header.run)
                await self.exchange.serve_outcomes(stream, header)
            case StateQuery():
                self._check_run(stream.peer, header.run)
                await self._states.serve(stream, header)
            case AssetQuery():
                self._check_run(stream.peer, header.run)
                await self._serve_asset(stream, header)
            case LoanQuery() | LoanAgain() | DebtPush() | DebtsQuery():
                self._check_run(stream.peer, header.run)
                await self._serve_gossip(stream, header)

    async def _serve_gossip(
        self, stream: Stream, header: LoanQuery | LoanAgain | DebtPush | DebtsQuery
    ) -> None:
        mixing = self.mixing
        if mixing is None:
            await refuse(stream, NO, "we do not gossip")
            return
        if not self.machine.ready:
            # Not for good: a debt that this ended would be lost.
            await refuse(stream, LATER, "we have no state yet")
            return
        match header:
            case LoanQuery():
                await mixing.serve_loan(stream, header)
            case LoanAgain():
                await mixing.serve_again(stream, header)
            case DebtPush():
                await mixing.serve_debt(stream, header)
            case DebtsQuery():
                await mixing.serve_debts(stream, header)

    def _check_run(self, sender: PeerId, run: str) -> None:
        if run != self.machine.config.run:
            raise RemoteProtocolError(sender, f"asks for run {run[:12]}, ours is another")

    async def _admitted(
        self, stream: Stream, header: ContributionHeader | PartialHeader, offer: Event
    ) -> bool:
        """Whether what `offer` tells of may come; else whoever offers it was told why not."""
        self._check_run(stream.peer, header.run)
        machine = self.machine
        ahead = header.round > machine.round or header.epoch > machine.epoch
        waiting = machine.current is None and header.round == machine.round
        if header.group == machine.group and (ahead or waiting):
            await refuse(stream, LATER, "we are not there yet")
            return False
        try:
            self._handle(offer)
        except RemoteProtocolError as error:
            # A late or superseded contribution is everyday life, not a breach.
            self.refused(error)
            await refuse(stream, NO, error.reason)
            return False
        return True

    async def _serve_partial(self, stream: Stream, header: PartialHeader) -> None:
        if await self._admitted(stream, header, PartialOffered(stream.peer, header)):
            await self.exchange.receive_partial(stream, header)
            self.feed(PartialFolded(stream.peer, header.round, header.span, header.answered))

    async def _serve_contribution(self, stream: Stream, header: ContributionHeader) -> None:
        if not await self._admitted(stream, header, ContributionOffered(stream.peer, header)):
            return
        whole = False
        try:
            whole = await self.exchange.receive_contribution(stream, header)
        finally:
            self.feed(ContributionFolded(stream.peer, header.round, header.span, whole))

    async def _serve_push(self, stream: Stream, push: OutcomePush) -> None:
        header = open_signed(push.outcome, OUTCOME_DOMAIN, OutcomeHeader, stream.peer)
        self._check_run(stream.peer, header.run)
        machine = self.machine
        held = self.exchange.find(header) is not None
        if header.group == machine.group and (header.round < machine.round or held):
            await refuse(stream, HAVE, "")
            if held:
                self.feed(OutcomeHeld(stream.peer, header, push.outcome, False))
            return
        ahead = header.round > machine.round or push.epoch > machine.epoch
        waiting = machine.current is None and header.round == machine.round
        if header.group == machine.group and (ahead or waiting):
            await refuse(stream, LATER, "we are not there yet")
            return
        self._handle(OutcomeOffered(stream.peer, push, header))
        await self.exchange.receive_outcome(stream, header, push.outcome)
        self.feed(OutcomeHeld(stream.peer, header, push.outcome, False))
