"""One averaging round of one group, as one member sees it.

A member trains until its contribution is due, sends each span to that span's aggregator, and
collects the reduced spans; the round is complete when an outcome for every span is held, and then
it is applied exactly once. An aggregator closes a span when every live member has answered (with
its contribution, or with the proof that the span was reduced before), or when most have and the
others are late by what is usual (`Arrivals`), or at the collect deadline. A member whose outcome
comes stops sending: what is not inside by then goes into its next contribution.

A revised plan (same round, larger epoch) moves the spans of aggregators that vanished: members
send again from what they still hold, or hand over the outcome if they have one, so no span is
reduced twice as long as one holder answers. Where that fails, digests tell and the minority heals.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from protocols.arrivals import Arrivals
from protocols.collecting import RETRY_S, TRIES_MAX, Collecting
from protocols.errors import RemoteProtocolError
from protocols.events import (
    ApplyRound,
    CloseSpan,
    DropSpan,
    Effect,
    FetchOutcomes,
    PushOutcome,
    Send,
    SendContribution,
    StopSending,
    TakeContribution,
)
from protocols.messages import ContributionHeader, OutcomeHeader, PartialHeader, Plan, SpanHeld
from protocols.records import Signed
from protocols.types import PeerId

COLLECT_SHARE: Final = 0.6  # of the exchange; the rest is for outcomes to come back
COLLECTOR_TRIES: Final = 2  # then the aggregator gets it, over the long way


@dataclass(slots=True)
class _Try:
    """A delivery that may be repeated: when, and how often it was tried."""

    at_s: float
    count: int = 0


@dataclass(slots=True)
class _Span:
    """What this member knows of one span."""

    outcome: tuple[OutcomeHeader, Signed] | None = None
    own: _Try | None = None
    """Our contribution's way; None before it is frozen, inf once it is there."""
    to: PeerId | None = None
    """Who takes it: our region's collector or the aggregator."""
    direct: bool = False
    """Our region's collector does not take it, or is gone: the aggregator has to."""
    delays_s: list[float] = field(default_factory=list)
    """If we aggregate: how long after the due time others' contributions were whole."""
    answered: set[PeerId] = field(default_factory=set)
    """If we aggregate: members whose contribution is in, or never will be."""
    fetching: PeerId | None = None
    """If we aggregate after somebody else: who hands us the outcome it holds."""
    closing: bool = False
    pushes: dict[PeerId, _Try] = field(default_factory=dict)


class Round:
    """Member and aggregator roles of one round. Driven by `GroupMachine`, which owns liveness."""

    def __init__(
        self, me: PeerId, plan: Plan, now_s: float, quorum: float, arrivals: Arrivals,
        neighbours: Arrivals | None = None,
    ) -> None:  # fmt: skip
        """`quorum`: share of the live roster below which a span at its deadline is left as is.
        `arrivals`: what earlier rounds say about delays; this one adds to it. `neighbours`: the
        same of those for whom we collect."""
        self.me = me
        self.plan = plan
        self.adopted_s = now_s
        self.due_s = now_s + plan.train_ms / 1000
        self.collect_s = self.due_s + plan.exchange_ms / 1000 * COLLECT_SHARE
        self.end_s = self.due_s + plan.exchange_ms / 1000
        self.taking = False
        self.weight: float | None = None
        self.applying = False
        self._over = False
        self._quorum = quorum
        self._arrivals = arrivals
        self._latest_end_s = self.end_s + 2 * plan.exchange_ms / 1000
        """However often it is revised, a round ends by then."""
        self._roster_ever = set(plan.peers)
        self._revised = False
        self._spans = [_Span() for _ in plan.spans]
        self._fetch = _Try(self.end_s)
        self._collecting = Collecting(me, plan, neighbours or Arrivals())

    # ── what the group asks ──────────────────────────────────────────────────────────────
    @property
    def number(self) -> int:
        return self.plan.round

    @property
    def training(self) -> bool:
        """The contribution is not due yet: members may still join."""
        return not (self.taking or self.applying or self._over) and self.weight is None

    def over(self) -> None:
        """It is in the state, by whatever way: from now on it only hands its outcomes on.

        Who caught up with it may have been training for it still. What it took now would be of the
        next round's work, and nobody could tell which of the two contributions is inside.
        """
        self._over = True

    def missing(self) -> list[int]:
        return [i for i, span in enumerate(self._spans) if span.outcome is None]

    def deadline_s(self, suspected: set[PeerId]) -> float:
        """When `tick` next has something to do."""
        if self._over:
            return self._next_push_s(suspected)
        times = [self._next_push_s(suspected)]
        if self.training and self.me in self.plan.peers:
            times.append(self.due_s)
        if not self.applying and self.missing():
            times.append(self._fetch.at_s)
        for i, span in enumerate(self._spans):
            if span.outcome is not None:
                continue
            mine = self.plan.spans[i].aggregator == self.me
            if mine and not span.closing:
                times.append(self._closes_s(i, span, suspected))
            if span.own is not None:
                times.append(-math.inf if self._stranded(i, span, suspected) else span.own.at_s)
            if self._collecting.collects(i) and self.weight is not None:
                marks = (self.due_s, self.collect_s)
                times.append(self._collecting.deadline_s(i, *marks, suspected))
        return min(times)

    def _stranded(self, i: int, span: _Span, suspected: set[PeerId]) -> bool:
        """Whether our part of a span lies with a collector that is gone."""
        others = (None, self.me, self.plan.spans[i].aggregator)
        return span.to not in others and span.to in suspected and not span.direct

    def _next_push_s(self, suspected: set[PeerId]) -> float:
        held = (span for span in self._spans if span.outcome is not None)
        return min(
            (
                attempt.at_s
                for span in held
                for peer, attempt in span.pushes.items()
                if peer not in suspected and attempt.count < TRIES_MAX
            ),
            default=math.inf,
        )

    # ── time ─────────────────────────────────────────────────────────────────────────────
    def tick(self, now_s: float, suspected: set[PeerId]) -> list[Effect]:
        if self._over:
            return self._push(now_s, suspected)
        effects: list[Effect] = []
        if self.training and now_s >= self.due_s and self.me in self.plan.peers:
            self.taking = True
            effects.append(TakeContribution(self.number))
        effects += self._resend(now_s, suspected)
        effects += self._collect(now_s, suspected)
        effects += self._close_ready(now_s, suspected)
        effects += self._push(now_s, suspected)
        if now_s >= self._fetch.at_s and self.missing() and not self.applying:
            effects += self.fetch_missing(now_s, suspected)
        return effects

    def fetch_missing(self, now_s: float, suspected: set[PeerId]) -> list[Effect]:
        """Ask the next member (aggregators first) for what we lack."""
        missing = self.missing()
        sources = [self.plan.spans[i].aggregator for i in missing] + list(self.plan.peers)
        live = [p for p in dict.fromkeys(sources) if p != self.me and p not in suspected]
        self._fetch.count += 1
        self._fetch.at_s = now_s + 2.0
        if not live or not missing:
            return []
        source = live[(self._fetch.count - 1) % len(live)]
        return [FetchOutcomes(source, self.number, None)]

    def _resend(self, now_s: float, suspected: set[PeerId]) -> list[Effect]:
        effects: list[Effect] = []
        for i, span in enumerate(self._spans):
            if span.own is None or span.outcome is not None:
                continue
            aggregator, way = self.plan.spans[i].aggregator, self._collecting.way(i)
            if self._stranded(i, span, suspected):
                span.direct, span.own = True, _Try(now_s)
            if now_s < span.own.at_s:
                continue
            if way in suspected and way != self.me:
                span.direct = True
            span.to = aggregator if span.direct else way
            span.own.at_s = math.inf
            span.own.count += 1
            effects.append(SendContribution(self.plan, i, span.to))
        return effects

    def _collect(self, now_s: float, suspected: set[PeerId]) -> list[Effect]:
        """What our region's sums need, once we have contributed ourselves."""
        effects: list[Effect] = []
        for i, span in enumerate(self._spans):
            if span.outcome is None and self.weight is not None and self._collecting.collects(i):
                effects += self._collecting.tick(i, now_s, self.due_s, self.collect_s, suspected)
        return effects

    def _close_ready(self, now_s: float, suspected: set[PeerId]) -> list[Effect]:
        effects: list[Effect] = []
        for i, span in enumerate(self._spans):
            if (
                self.plan.spans[i].aggregator != self.me
                or span.outcome is not None
                or span.closing
                or (span.fetching is not None and now_s < self.collect_s)
            ):
                continue
            live = [p for p in self.plan.peers if p not in suspected or p == self.me]
            waiting = [p for p in live if p not in span.answered]
            if waiting and now_s < self._closes_s(i, span, suspected):
                continue
            span.closing = True
            self._arrivals.closed(span.delays_s, len(waiting))
            answered = len(span.answered & set(self.plan.peers))
            enough = not waiting or answered >= self._quorum * len(live)
            effects.append(CloseSpan(self.plan, i, keep=enough))
        return effects

    def _closes_s(self, i: int, span: _Span, suspected: set[PeerId]) -> float:
        """When a span that we aggregate closes without those who are missing.

        After a revision members send anew, so that usual delays say nothing about it.
        """
        live = [p for p in self.plan.peers if p not in suspected or p == self.me]
        most = 2 * len(span.answered.intersection(live)) > len(live)
        enough = len(span.answered.intersection(live)) >= self._quorum * len(live)
        usual = span.fetching is None and not self._revised and self.weight is not None
        waiting = [p for p in live if p not in span.answered]
        if not (most and enough and usual) or self._collecting.unheard(i, waiting):
            return self.collect_s
        most_s = self.collect_s - self.due_s
        return self.due_s + self._arrivals.patience_s(most_s, span.delays_s)

    def _push(self, now_s: float, suspected: set[PeerId]) -> list[Effect]:
        effects: list[Effect] = []
        for i, span in enumerate(self._spans):
            if span.outcome is None:
                continue
            if suspected.intersection(span.pushes):
                self._queue_pushes(i, span, now_s, suspected)
            header, signed = span.outcome
            for peer, attempt in span.pushes.items():
                if peer not in suspected and now_s >= attempt.at_s and attempt.count < TRIES_MAX:
                    attempt.at_s = math.inf
                    attempt.count += 1
                    effects.append(PushOutcome(self.plan.epoch, signed, header, peer))
        return effects

    # ── plans ────────────────────────────────────────────────────────────────────────────
    def revise(self, plan: Plan, now_s: float) -> list[Effect]:
        """Another roster or other aggregators for the same round."""
        old, self.plan = self.plan, plan
        self._roster_ever |= set(plan.peers)
        if self.training:
            self.due_s = min(self.due_s, now_s + plan.train_ms / 1000)
        else:
            self._revised = True
        exchange_s = plan.exchange_ms / 1000
        start_s = max(now_s, self.due_s)
        self.end_s = min(max(self.end_s, start_s + exchange_s), self._latest_end_s)
        self.collect_s = max(self.collect_s, min(start_s + exchange_s * COLLECT_SHARE, self.end_s))
        self._fetch = _Try(self.end_s)
        effects: list[Effect] = [
            DropSpan(self.number, i) for i in self._collecting.revise(plan, now_s)
        ]
        for i, span in enumerate(self._spans):
            before, after = old.spans[i].aggregator, plan.spans[i].aggregator
            if before != after:
                effects += self._reassign(i, span, before, after, now_s)
            elif span.outcome is not None:
                self._queue_pushes(i, span, now_s)  # members that joined the roster need it too
            elif span.to not in (after, self._collecting.way(i)) and span.own is not None:
                span.direct, span.own = False, _Try(now_s)  # another collects now
        return effects

    def _reassign(
        self, i: int, span: _Span, before: PeerId, after: PeerId, now_s: float
    ) -> list[Effect]:
        effects: list[Effect] = []
        if before == self.me:
            effects.append(DropSpan(self.number, i))
            span.answered.clear()
            span.delays_s.clear()
            span.closing = False
            span.fetching = None
            span.pushes.clear()
        if span.outcome is not None:
            if after == self.me:
                self._queue_pushes(i, span, now_s)
            else:
                _, signed = span.outcome
                held = SpanHeld(self.plan.run, self.plan.group, self.number, i, signed)
                effects.append(Send(after, held))
        elif self.weight is not None:
            way = self._collecting.way(i)
            if span.own is None or span.direct or span.to != way or way == after:
                span.own = _Try(now_s)  # else it lies with our collector, who brings it there
            span.direct = False
        return effects

    def _queue_pushes(
        self, i: int, span: _Span, now_s: float, suspected: Collection[PeerId] = ()
    ) -> None:
        lost = {p for p, attempt in span.pushes.items() if attempt.count >= TRIES_MAX}
        for peer in self._collecting.receivers(i, lost.union(suspected)):
            span.pushes.setdefault(peer, _Try(now_s))

    # ── contributions ────────────────────────────────────────────────────────────────────
    def contribution_taken(self, weight: float, now_s: float) -> list[Effect]:
        self.taking = False
        self.weight = weight
        for span in self._spans:
            if span.outcome is None:
                span.own = _Try(now_s)
        return self._resend(now_s, set())

    def check_offer(self, sender: PeerId, header: ContributionHeader) -> None:
        """Whether a contribution may be folded.

        Raises:
            RemoteProtocolError: not a member, not our span, another epoch, or closed already.
        """
        plan = self.plan
        if sender not in plan.peers:
            raise RemoteProtocolError(sender, f"is not in the roster of round {plan.round}")
        if header.span >= len(plan.spans):
            raise RemoteProtocolError(sender, f"span {header.span} does not exist")
        span = plan.spans[header.span]
        if span.aggregator == self.me:
            self._check_part(sender, header)
        elif self._collecting.collects(header.span):
            self._check_part(sender, header)
            self._collecting.check_offer(sender, header)
        else:
            raise RemoteProtocolError(sender, f"span {header.span} is not ours to reduce")

    def check_partial(self, sender: PeerId, header: PartialHeader) -> None:
        """Whether a region's sum may be folded; raises like `check_offer`."""
        if sender not in self.plan.peers or header.span >= len(self.plan.spans):
            raise RemoteProtocolError(sender, f"no collector of round {self.number}")
        if self.plan.spans[header.span].aggregator != self.me:
            raise RemoteProtocolError(sender, f"span {header.span} is not ours to reduce")
        self._check_part(sender, header)
        self._collecting.check_partial(sender, header)

    def _check_part(self, sender: PeerId, header: ContributionHeader | PartialHeader) -> None:
        plan, span = self.plan, self.plan.spans[header.span]
        if (header.start, header.stop) != (span.start, span.stop):
            raise RemoteProtocolError(sender, f"span {header.span} with other bounds")
        if not span.since_epoch <= header.epoch <= plan.epoch:
            raise RemoteProtocolError(
                sender, f"epoch {header.epoch}; span {header.span} is of {span.since_epoch}"
            )
        state = self._spans[header.span]
        if state.closing or state.outcome is not None:
            raise RemoteProtocolError(sender, f"span {header.span} is closed")

    def partial_folded(self, sender: PeerId, span: int, answered: Collection[PeerId]) -> None:
        """A region's whole sum is here, and speaks for those who `answered`."""
        if span >= len(self._spans) or self.plan.spans[span].aggregator != self.me:
            return
        self._spans[span].answered.update(answered)
        self._collecting.summed(sender, span)

    def partial_delivered(self, peer: PeerId, span: int) -> None:
        self._collecting.delivered(peer, span)

    def partial_undelivered(self, peer: PeerId, span: int, refused: bool, now_s: float) -> None:
        self._collecting.undelivered(peer, span, refused, now_s)

    def folded(self, sender: PeerId, span: int, complete: bool, now_s: float) -> None:
        if not complete or span >= len(self._spans):
            return
        if self.plan.spans[span].aggregator != self.me:
            self._collecting.folded(sender, span, now_s - self.due_s)
            return
        state = self._spans[span]
        if sender != self.me and sender not in state.answered:
            state.delays_s.append(now_s - self.due_s)
        state.answered.add(sender)

    def contribution_delivered(self, peer: PeerId, span: int) -> None:
        if span < len(self._spans) and self._spans[span].to == peer:
            state = self._spans[span]
            if state.own is not None:
                state.own.at_s = math.inf

    def contribution_undelivered(
        self, peer: PeerId, span: int, refused: bool, now_s: float
    ) -> None:
        if span >= len(self._spans) or self._spans[span].to != peer:
            return
        state = self._spans[span]
        own = state.own
        if own is None:
            return
        if peer != self.plan.spans[span].aggregator and (refused or own.count >= COLLECTOR_TRIES):
            state.direct, state.own = True, _Try(now_s)
            if peer == self.me:  # it does not go into our own sum, either
                self._collecting.folded(peer, span, now_s - self.due_s)
        elif not refused and own.count < TRIES_MAX:
            own.at_s = now_s + RETRY_S * 2 ** (own.count - 1)

    # ── outcomes ─────────────────────────────────────────────────────────────────────────
    def check_outcome(
        self, sender: PeerId, epoch: int, header: OutcomeHeader, signer: PeerId
    ) -> None:
        """Whether a pushed outcome may be taken.

        Raises:
            RemoteProtocolError: not from the span's aggregator, another epoch or other bounds.
        """
        plan = self.plan
        if header.span >= len(plan.spans):
            raise RemoteProtocolError(sender, f"span {header.span} does not exist")
        span = plan.spans[header.span]
        if not self._collecting.brings(sender, header.span):
            raise RemoteProtocolError(sender, f"does not aggregate span {header.span}")
        if not span.since_epoch <= epoch <= plan.epoch:
            raise RemoteProtocolError(
                sender, f"epoch {epoch}; span {header.span} is of epoch {span.since_epoch}"
            )
        if (header.start, header.stop) != (span.start, span.stop):
            raise RemoteProtocolError(sender, f"span {header.span} with other bounds")
        if signer not in self._roster_ever:
            raise RemoteProtocolError(sender, f"an outcome signed by {signer}, no member")

    def outcome_coming(self, header: OutcomeHeader) -> list[Effect]:
        """The span's aggregator (checked) has closed it: what we still send is too late."""
        own = self._spans[header.span].own
        if own is None:
            return []
        own.at_s = math.inf
        return [StopSending(self.number, header.span)]

    def hold(self, header: OutcomeHeader, signed: Signed, now_s: float) -> list[Effect]:
        """An outcome is here. The later one counts, until the round is applied."""
        if self.applying or header.span >= len(self._spans):
            return []
        mine = self.plan.spans[header.span]
        if (header.start, header.stop) != (mine.start, mine.stop):
            return []
        effects = self.outcome_coming(header)
        span = self._spans[header.span]
        span.outcome = (header, signed)
        span.own = None
        span.closing = False
        span.fetching = None
        self._queue_pushes(header.span, span, now_s)
        return effects

    def reduces(self, header: OutcomeHeader) -> bool:
        """Whether this is our own reduction of a span that is still ours."""
        return (
            header.round == self.number
            and header.span < len(self._spans)
            and self.plan.spans[header.span].aggregator == self.me
        )

    def handed_over(
        self, sender: PeerId, span: int, header: OutcomeHeader, signer: PeerId
    ) -> list[Effect]:
        """A member holds an outcome for a span that we aggregate now.

        Raises:
            RemoteProtocolError: it is no member, or what it shows is no proof of that span.
        """
        if sender not in self.plan.peers:
            raise RemoteProtocolError(sender, f"is not in the roster of round {self.number}")
        if span >= len(self._spans) or header.span != span or signer not in self._roster_ever:
            raise RemoteProtocolError(sender, f"hands over span {span} without a proof of it")
        mine = self.plan.spans[span]
        if (header.start, header.stop) != (mine.start, mine.stop):
            raise RemoteProtocolError(sender, f"hands over span {span} with other bounds")
        if mine.aggregator != self.me:
            return []
        state = self._spans[span]
        again = sender in state.answered
        state.answered.add(sender)
        if again or state.outcome is not None or state.fetching is not None or state.closing:
            return []
        state.fetching = sender
        return [FetchOutcomes(sender, self.number, span)]

    def fetch_finished(self, peer: PeerId) -> None:
        for span in self._spans:
            if span.fetching == peer:
                span.fetching = None

    def outcome_delivered(self, peer: PeerId, span: int) -> None:
        if span < len(self._spans) and peer in self._spans[span].pushes:
            self._spans[span].pushes[peer].at_s = math.inf

    def outcome_undelivered(self, peer: PeerId, span: int, now_s: float) -> None:
        attempt = self._spans[span].pushes.get(peer) if span < len(self._spans) else None
        if attempt is not None and attempt.count < TRIES_MAX:
            attempt.at_s = now_s + RETRY_S * 2 ** (attempt.count - 1)

    def complete(self) -> list[Effect]:
        """Once every span's outcome is held: apply, exactly once."""
        held = [span.outcome for span in self._spans]
        if self.applying or any(h is None for h in held):
            return []
        self.applying = True
        outcomes = tuple(h for h in held if h is not None)
        return [ApplyRound(self.plan, self.number, outcomes)]
