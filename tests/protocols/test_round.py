"""One round, as one member: who may take part, when it closes, and what it never does twice."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest

from protocols.arrivals import Arrivals
from protocols.collecting import TRIES_MAX
from protocols.election import make_plan, revise_plan
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
    TakeContribution,
)
from protocols.identity import SIGNATURE_BYTES
from protocols.messages import ContributionHeader, Contributor, OutcomeHeader, Plan, Seat, SpanHeld
from protocols.records import Signed
from protocols.round import COLLECT_SHARE, Round
from protocols.types import Digest, PeerId
from tests.protocols.samples import GROUP, RUN, peer, seats

TRAIN_S, EXCHANGE_S = 5.0, 10.0
COLLECT_S, END_S = TRAIN_S + COLLECT_SHARE * EXCHANGE_S, TRAIN_S + EXCHANGE_S
STRANGER = peer(99)
NOBODY: set[PeerId] = set()


def plan_of(members: int = 4, aggregators_max: int = 2, epoch: int = 3) -> Plan:
    return make_plan(
        run=RUN, group=GROUP, epoch=epoch, round=7, seats=seats([10] * members), units=range(20),
        aggregators_max=aggregators_max, train_ms=int(TRAIN_S * 1000),
        exchange_ms=int(EXCHANGE_S * 1000), digest=Digest(bytes(32)),
    )  # fmt: skip


def revised(plan: Plan, *, without: set[PeerId] = NOBODY, joined: tuple[Seat, ...] = ()) -> Plan:
    return revise_plan(
        plan,
        epoch=plan.epoch + 1,
        seats=[s for s in plan.roster if s.peer not in without] + list(joined),
        benched=(),
        train_ms=plan.train_ms,
        exchange_ms=plan.exchange_ms,
    )


def start(me: PeerId, plan: Plan, quorum: float = 0.5, arrivals: Arrivals | None = None) -> Round:
    return Round(me, plan, 0.0, quorum, arrivals or Arrivals())


def roles(plan: Plan) -> tuple[PeerId, PeerId, list[PeerId]]:
    """Aggregators of span 0 and 1, and the members who aggregate nothing."""
    first, second = (s.aggregator for s in plan.spans)
    return first, second, [p for p in plan.peers if p not in (first, second)]


def outcome(plan: Plan, span: int, by: PeerId, /, **changes: Any) -> tuple[OutcomeHeader, Signed]:
    place = plan.spans[span]
    header = OutcomeHeader(
        plan.run, plan.group, plan.round, plan.epoch, span, place.start, place.stop,
        (Contributor(by, 1.0, b""),), bytes(32), 1, 0.1,
    )  # fmt: skip
    return dataclasses.replace(header, **changes), Signed(b"", by, bytes(SIGNATURE_BYTES))


def offer(plan: Plan, span: int, /, **changes: Any) -> ContributionHeader:
    place = plan.spans[span]
    header = ContributionHeader(
        plan.run, plan.group, plan.round, plan.epoch, span, place.start, place.stop, 1.0
    )
    return dataclasses.replace(header, **changes)


def of(kind: type, effects: list[Effect]) -> list[Any]:
    return [e for e in effects if isinstance(e, kind)]


def frozen(me: PeerId, plan: Plan, arrivals: Arrivals | None = None, quorum: float = 0.5) -> Round:
    """A round whose contribution was taken and reached every aggregator."""
    made = start(me, plan, quorum, arrivals)
    made.tick(TRAIN_S, NOBODY)
    made.contribution_taken(100.0, TRAIN_S)
    for span, place in enumerate(plan.spans):
        made.contribution_delivered(place.aggregator, span)
    return made


# ── contributing ─────────────────────────────────────────────────────────────────────────
def test_work_is_frozen_when_it_is_due_and_only_once() -> None:
    plan = plan_of()
    member = start(roles(plan)[2][0], plan)
    assert member.deadline_s(NOBODY) == TRAIN_S
    assert member.tick(TRAIN_S - 0.01, NOBODY) == []
    phases = [member.training]
    assert member.tick(TRAIN_S, NOBODY) == [TakeContribution(7)]
    phases.append(member.training)
    assert phases == [True, False]
    assert of(TakeContribution, member.tick(TRAIN_S + 1, NOBODY)) == []


def test_each_span_goes_to_its_aggregator() -> None:
    plan = plan_of()
    member = start(roles(plan)[2][0], plan)
    member.tick(TRAIN_S, NOBODY)
    sent = member.contribution_taken(100.0, TRAIN_S)
    assert sent == [SendContribution(plan, i, s.aggregator) for i, s in enumerate(plan.spans)]
    assert of(SendContribution, member.tick(TRAIN_S + 1, NOBODY)) == []


def test_a_lost_contribution_is_sent_again_a_few_times() -> None:
    plan = plan_of()
    first, second, others = roles(plan)
    member = start(others[0], plan)
    member.tick(TRAIN_S, NOBODY)
    member.contribution_taken(100.0, TRAIN_S)
    member.contribution_delivered(second, 1)
    now_s, again = TRAIN_S, 0
    for _ in range(20):
        member.contribution_undelivered(first, 0, False, now_s)
        now_s = min(member.deadline_s(NOBODY), now_s + 5.0)
        sent = of(SendContribution, member.tick(now_s, NOBODY))
        assert all(e.span == 0 and e.to == first for e in sent)
        again += len(sent)
    assert again == TRIES_MAX - 1


@pytest.mark.parametrize("answer", ["delivered", "refused", "from another"])
def test_a_contribution_that_was_answered_is_not_sent_again(answer: str) -> None:
    plan = plan_of()
    first, second, others = roles(plan)
    member = start(others[0], plan)
    member.tick(TRAIN_S, NOBODY)
    member.contribution_taken(100.0, TRAIN_S)
    match answer:
        case "delivered":
            member.contribution_delivered(first, 0)
        case "refused":
            member.contribution_undelivered(first, 0, True, TRAIN_S)
        case _:
            member.contribution_undelivered(second, 0, False, TRAIN_S)
    for now_s in (TRAIN_S + 1, TRAIN_S + 5, COLLECT_S):
        assert of(SendContribution, member.tick(now_s, NOBODY)) == []


# ── who may contribute ───────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"span": 2}, "does not exist"),
        ({"span": 16}, "does not exist"),
        ({"span": 1}, "not ours"),
        ({"start": 1}, "bounds"),
        ({"stop": 19}, "bounds"),
        ({"stop": 21}, "bounds"),
        ({"epoch": 2}, "epoch 2"),
        ({"epoch": 4}, "epoch 4"),
    ],
)
def test_a_contribution_for_anything_else_is_refused(changes: dict[str, int], reason: str) -> None:
    plan = plan_of()
    first, _, others = roles(plan)
    aggregator = start(first, plan)
    aggregator.check_offer(others[0], offer(plan, 0))
    with pytest.raises(RemoteProtocolError, match=reason) as caught:
        aggregator.check_offer(others[0], offer(plan, 0, **changes))
    assert caught.value.peer == others[0]


def test_a_stranger_is_the_strangers_fault() -> None:
    plan = plan_of()
    aggregator = start(roles(plan)[0], plan)
    with pytest.raises(RemoteProtocolError, match="roster") as caught:
        aggregator.check_offer(STRANGER, offer(plan, 0))
    assert caught.value.peer == STRANGER


def test_a_late_contribution_is_refused() -> None:
    plan = plan_of()
    first, _, others = roles(plan)
    aggregator = frozen(first, plan)
    aggregator.tick(COLLECT_S, NOBODY)
    with pytest.raises(RemoteProtocolError, match="closed"):
        aggregator.check_offer(others[0], offer(plan, 0))
    aggregator.hold(*outcome(plan, 0, first), COLLECT_S)
    with pytest.raises(RemoteProtocolError, match="closed"):
        aggregator.check_offer(others[0], offer(plan, 0))


def test_an_unmoved_span_takes_contributions_sent_before_the_revision() -> None:
    plan = plan_of()
    first, second, others = roles(plan)
    aggregator = start(first, plan)
    after = revised(plan, without={second})
    aggregator.revise(after, 1.0)
    aggregator.check_offer(others[0], offer(plan, 0))
    aggregator.check_offer(others[0], offer(after, 0))
    moved = start(after.spans[1].aggregator, plan)
    moved.revise(after, 1.0)
    with pytest.raises(RemoteProtocolError, match="epoch"):
        moved.check_offer(others[0], offer(plan, 1))


# ── closing ──────────────────────────────────────────────────────────────────────────────
def test_a_span_closes_as_soon_as_everyone_has_answered_and_only_once() -> None:
    plan = plan_of()
    first = roles(plan)[0]
    aggregator = frozen(first, plan)
    for member in plan.peers[:-1]:
        aggregator.folded(member, 0, True, TRAIN_S + 0.1)
        assert of(CloseSpan, aggregator.tick(TRAIN_S + 1, NOBODY)) == []
    aggregator.folded(plan.peers[-1], 0, True, TRAIN_S + 0.1)
    assert of(CloseSpan, aggregator.tick(TRAIN_S + 1, NOBODY)) == [CloseSpan(plan, 0, keep=True)]
    for now_s in (TRAIN_S + 1, COLLECT_S, END_S, END_S + 100):
        assert of(CloseSpan, aggregator.tick(now_s, NOBODY)) == []


def test_half_a_contribution_is_not_an_answer() -> None:
    plan = plan_of()
    first, _, others = roles(plan)
    aggregator = frozen(first, plan)
    for member in plan.peers:
        aggregator.folded(member, 0, member != others[0], TRAIN_S + 0.1)
    assert of(CloseSpan, aggregator.tick(TRAIN_S + 1, NOBODY)) == []


def test_nobody_waits_for_the_suspected_except_for_oneself() -> None:
    plan = plan_of()
    first, second, others = roles(plan)
    aggregator = frozen(first, plan)
    for member in (second, others[0]):
        aggregator.folded(member, 0, True, TRAIN_S + 0.1)
    gone = {others[1], first}
    assert of(CloseSpan, aggregator.tick(TRAIN_S + 1, gone)) == []
    aggregator.folded(first, 0, True, TRAIN_S + 0.1)
    assert of(CloseSpan, aggregator.tick(TRAIN_S + 1, gone)) == [CloseSpan(plan, 0, keep=True)]


@pytest.mark.parametrize("quorum", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("answers", range(8))
def test_at_the_collect_deadline_a_quorum_decides(answers: int, quorum: float) -> None:
    plan = plan_of(members=8)
    first = roles(plan)[0]
    aggregator = start(first, plan, quorum)
    aggregator.tick(TRAIN_S, NOBODY)
    aggregator.contribution_taken(1.0, TRAIN_S)
    for span, place in enumerate(plan.spans):
        aggregator.contribution_delivered(place.aggregator, span)
    for member in plan.peers[:answers]:
        aggregator.folded(member, 0, True, COLLECT_S - 0.1)
    assert of(CloseSpan, aggregator.tick(COLLECT_S - 0.01, NOBODY)) == []
    assert aggregator.deadline_s(NOBODY) == COLLECT_S
    closed = of(CloseSpan, aggregator.tick(COLLECT_S, NOBODY))
    assert closed == [CloseSpan(plan, 0, keep=answers >= quorum * 8)]


def test_a_stranger_in_the_accumulator_is_no_part_of_the_quorum() -> None:
    plan = plan_of()
    aggregator = frozen(roles(plan)[0], plan)
    for index in range(50, 60):
        aggregator.folded(peer(index), 0, True, TRAIN_S + 0.1)
    assert of(CloseSpan, aggregator.tick(COLLECT_S, NOBODY)) == [CloseSpan(plan, 0, keep=False)]


# ── outcomes ─────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("changes", "epoch", "reason"),
    [
        ({"span": 2}, 3, "does not exist"),
        ({"span": 1}, 3, "does not aggregate"),
        ({"start": 1}, 3, "bounds"),
        ({"stop": 20}, 3, "bounds"),
        ({}, 2, "epoch 2"),
        ({}, 4, "epoch 4"),
    ],
)
def test_an_outcome_of_anything_else_is_refused(
    changes: dict[str, Any], epoch: int, reason: str
) -> None:
    plan = plan_of()
    first, _, others = roles(plan)
    member = start(others[0], plan)
    header, _ = outcome(plan, 0, first)
    member.check_outcome(first, 3, header, first)
    with pytest.raises(RemoteProtocolError, match=reason) as caught:
        member.check_outcome(first, epoch, dataclasses.replace(header, **changes), first)
    assert caught.value.peer == first


def test_only_the_aggregator_may_push_a_spans_outcome() -> None:
    plan = plan_of()
    first, _, others = roles(plan)
    member = start(others[0], plan)
    for liar in (*(p for p in plan.peers if p != first), STRANGER):
        with pytest.raises(RemoteProtocolError, match="does not aggregate") as caught:
            member.check_outcome(liar, 3, outcome(plan, 0, liar)[0], liar)
        assert caught.value.peer == liar


def test_an_aggregator_that_lost_its_span_may_push_it_no_more() -> None:
    plan = plan_of()
    first, second, others = roles(plan)
    member = start(others[0], plan)
    member.revise(revised(plan, without={second}), 1.0)
    member.check_outcome(first, 3, outcome(plan, 0, first)[0], first)
    with pytest.raises(RemoteProtocolError, match="does not aggregate"):
        member.check_outcome(second, 3, outcome(plan, 1, second)[0], second)


def test_a_held_outcome_is_pushed_to_everyone_else_until_it_arrives() -> None:
    plan = plan_of()
    first, second, others = roles(plan)
    aggregator = frozen(first, plan)
    held = outcome(plan, 0, first)
    aggregator.hold(*held, TRAIN_S + 1)
    pushes = of(PushOutcome, aggregator.tick(TRAIN_S + 1, {others[1]}))
    assert {p.to for p in pushes} == {second, others[0]}
    assert all((p.header, p.signed, p.epoch) == (*held, 3) for p in pushes)
    aggregator.outcome_delivered(second, 0)
    aggregator.outcome_undelivered(others[0], 0, TRAIN_S + 1)
    again = of(PushOutcome, aggregator.tick(TRAIN_S + 5, NOBODY))
    assert {p.to for p in again} == {others[0], others[1]}, "the suspect is back"
    count = 0
    for step in range(20):
        aggregator.outcome_undelivered(others[0], 0, TRAIN_S + 10 * step)
        count += len(of(PushOutcome, aggregator.tick(TRAIN_S + 10 * step + 9, NOBODY)))
    assert count == TRIES_MAX - 2


def test_a_round_is_applied_once_and_only_when_every_span_is_held() -> None:
    plan = plan_of(aggregators_max=4)
    member = frozen(plan.peers[0], plan)
    held = [outcome(plan, i, s.aggregator) for i, s in enumerate(plan.spans)]
    order = [2, 0, 3, 1]
    for index in order:
        assert member.complete() == []
        assert index in member.missing()
        member.hold(*held[index], TRAIN_S + 1)
    assert member.complete() == [ApplyRound(plan, 7, tuple(held))]
    for _ in range(3):
        member.hold(*held[0], TRAIN_S + 2)
        assert member.complete() == []
        assert of(ApplyRound, member.tick(END_S + 1, NOBODY)) == []


def test_who_caught_up_with_a_round_takes_nothing_for_it_any_more() -> None:
    """It would be work of the next round, and pass for what that round has inside."""
    plan = plan_of()
    aggregator, _, _ = roles(plan)
    member = start(aggregator, plan)
    member.over()
    assert not member.training
    assert member.deadline_s(NOBODY) == math.inf
    for now_s in (TRAIN_S, COLLECT_S, END_S, 10 * END_S):
        assert member.tick(now_s, NOBODY) == []


def test_what_a_member_holds_it_hands_on_when_the_round_is_over() -> None:
    plan = plan_of()
    aggregator, _, _ = roles(plan)
    member = frozen(aggregator, plan)
    member.hold(*outcome(plan, 0, aggregator), TRAIN_S + 1)
    member.over()
    assert member.deadline_s(NOBODY) == TRAIN_S + 1
    effects = member.tick(TRAIN_S + 1, NOBODY)
    assert {e.to for e in of(PushOutcome, effects)} == set(plan.peers) - {aggregator}
    assert len(of(PushOutcome, effects)) == len(effects)


@pytest.mark.parametrize("changes", [{"span": 5}, {"start": 1}, {"stop": 20}])
def test_an_outcome_that_does_not_fit_is_not_held(changes: dict[str, int]) -> None:
    plan = plan_of()
    first, _, others = roles(plan)
    member = frozen(others[0], plan)
    member.hold(*outcome(plan, 0, first, **changes), TRAIN_S + 1)
    assert member.missing() == [0, 1]


def test_nobody_waits_longer_than_the_end_of_the_plan() -> None:
    plan = plan_of()
    first, second, others = roles(plan)
    member = frozen(others[0], plan)
    member.hold(*outcome(plan, 1, second), TRAIN_S + 1)
    assert member.deadline_s(NOBODY) == END_S
    assert of(FetchOutcomes, member.tick(END_S - 0.01, NOBODY)) == []
    asked: list[PeerId] = []
    now_s = END_S
    for _ in range(6):
        (fetch,) = of(FetchOutcomes, member.tick(now_s, {second}))
        asked.append(fetch.peer)
        assert member.deadline_s({second}) > now_s
        now_s = member.deadline_s({second})
    assert asked[0] == first, "who reduced it should have it"
    assert set(asked) == {first, others[1]}, "one after another, and never the suspected or us"


# ── revisions ────────────────────────────────────────────────────────────────────────────
def test_work_is_sent_again_to_whoever_takes_a_span_over() -> None:
    plan = plan_of()
    _, second, others = roles(plan)
    after = revised(plan, without={second})
    heir = after.spans[1].aggregator
    member = frozen(next(p for p in others if p != heir), plan)
    effects = member.revise(after, TRAIN_S + 1)
    effects += member.tick(TRAIN_S + 1, {second})
    assert of(SendContribution, effects) == [SendContribution(after, 1, heir)]
    assert of(TakeContribution, effects) == [], "from what it still holds"


def test_before_work_is_frozen_nothing_is_sent_anywhere() -> None:
    plan = plan_of()
    _, second, others = roles(plan)
    member = start(others[0], plan)
    effects = member.revise(revised(plan, without={second}), 1.0)
    assert effects + member.tick(1.0, {second}) == []


def test_who_holds_the_outcome_hands_it_over_instead() -> None:
    plan = plan_of()
    _, second, others = roles(plan)
    after = revised(plan, without={second})
    heir = after.spans[1].aggregator
    member = frozen(next(p for p in others if p != heir), plan)
    held = outcome(plan, 1, second)
    member.hold(*held, TRAIN_S + 1)
    effects = member.revise(after, TRAIN_S + 2) + member.tick(TRAIN_S + 2, {second})
    assert of(Send, effects) == [Send(heir, SpanHeld(RUN, GROUP, 7, 1, held[1]))]
    assert of(SendContribution, effects) == []


def heir_of(plan: Plan) -> tuple[Round, Plan, list[PeerId]]:
    """The peer that takes span 1 over, after its aggregator went; the plan; the others."""
    second = plan.spans[1].aggregator
    after = revised(plan, without={second})
    heir = after.spans[1].aggregator
    made = frozen(heir, plan)
    made.revise(after, TRAIN_S + 1)
    made.tick(TRAIN_S + 1, {second})
    made.contribution_delivered(heir, 1)
    return made, after, [p for p in after.peers if p != heir]


def test_a_span_that_was_reduced_before_is_fetched_not_reduced_again() -> None:
    plan = plan_of(members=5)
    heir, after, others = heir_of(plan)
    gone = plan.spans[1].aggregator
    proof = (outcome(plan, 1, gone)[0], gone)
    assert heir.handed_over(others[0], 1, *proof) == [FetchOutcomes(others[0], 7, 1)]
    assert heir.handed_over(others[1], 1, *proof) == [], "one is enough"
    for member in after.peers:
        heir.folded(member, 1, True, TRAIN_S + 0.1)
    assert 1 not in [e.span for e in of(CloseSpan, heir.tick(TRAIN_S + 2, NOBODY))]
    held = outcome(plan, 1, plan.spans[1].aggregator)
    heir.hold(*held, TRAIN_S + 2)
    heir.fetch_finished(others[0])
    effects = heir.tick(TRAIN_S + 2, NOBODY)
    assert 1 not in [e.span for e in of(CloseSpan, effects)]
    assert {e.to for e in of(PushOutcome, effects)} == {*others}
    assert all(e.epoch == after.epoch for e in of(PushOutcome, effects))


def test_a_hand_over_without_a_proof_is_the_senders_fault() -> None:
    plan = plan_of(members=5)
    heir, _, others = heir_of(plan)
    gone = plan.spans[1].aggregator
    header = outcome(plan, 1, gone)[0]
    for sender, span, shown, by in (
        (STRANGER, 1, header, gone),
        (others[0], 2, header, gone),
        (others[0], 1, header, STRANGER),
        (others[0], 1, dataclasses.replace(header, stop=header.stop + 1), gone),
    ):
        with pytest.raises(RemoteProtocolError) as caught:
            heir.handed_over(sender, span, shown, by)
        assert caught.value.peer == sender


def test_a_hand_over_that_comes_to_nothing_does_not_hold_the_span_up() -> None:
    plan = plan_of(members=5)
    heir, after, others = heir_of(plan)
    gone = plan.spans[1].aggregator
    heir.handed_over(others[0], 1, outcome(plan, 1, gone)[0], gone)
    for member in after.peers:
        heir.folded(member, 1, True, TRAIN_S + 0.1)
    heir.fetch_finished(others[0])
    closed = of(CloseSpan, heir.tick(TRAIN_S + 2, NOBODY))
    assert CloseSpan(after, 1, keep=True) in closed


def test_an_aggregator_that_is_replaced_forgets_what_it_collected() -> None:
    plan = plan_of()
    _, second, others = roles(plan)
    aggregator = frozen(second, plan)
    for member in plan.peers:
        aggregator.folded(member, 1, True, TRAIN_S + 0.1)
    benched = revise_plan(
        plan, epoch=4, seats=plan.roster, benched={second}, train_ms=0, exchange_ms=10_000
    )
    effects = aggregator.revise(benched, TRAIN_S + 1) + aggregator.tick(TRAIN_S + 1, NOBODY)
    assert of(DropSpan, effects) == [DropSpan(7, 1)]
    assert of(CloseSpan, effects) == []
    with pytest.raises(RemoteProtocolError, match="not ours"):
        aggregator.check_offer(others[0], offer(benched, 1))


def test_a_newcomer_gets_the_outcomes_too() -> None:
    plan = plan_of()
    first = roles(plan)[0]
    aggregator = frozen(first, plan)
    aggregator.hold(*outcome(plan, 0, first), TRAIN_S + 1)
    aggregator.tick(TRAIN_S + 1, NOBODY)
    for member in plan.peers:
        aggregator.outcome_delivered(member, 0)
    late = Seat(peer(30), 1)
    aggregator.revise(revised(plan, joined=(late,)), TRAIN_S + 2)
    pushes = of(PushOutcome, aggregator.tick(TRAIN_S + 2, NOBODY))
    assert [p.to for p in pushes] == [late.peer]


def test_a_revision_brings_the_due_time_forward_but_never_puts_it_off() -> None:
    plan = plan_of()
    for train_s, due_s in ((0.0, 1.0), (2.0, 3.0), (9.0, TRAIN_S)):
        member = start(roles(plan)[2][0], plan)
        again = revise_plan(
            plan, epoch=4, seats=plan.roster, benched=(), train_ms=int(train_s * 1000),
            exchange_ms=10_000,
        )  # fmt: skip
        member.revise(again, 1.0)
        assert member.due_s == due_s
        assert member.end_s <= max(due_s, TRAIN_S) + EXCHANGE_S


# ── whatever happens ─────────────────────────────────────────────────────────────────────
class Storm:
    """One member's round under random events; keeps the books that prove its promises."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.plan = plan_of(self.rng.randint(1, 6), self.rng.randint(1, 4))
        self.me = self.rng.choice(self.plan.peers)
        self.round = start(self.me, self.plan)
        self.now_s = 0.0
        self.suspected: set[PeerId] = set()
        self.taken = 0
        self.applied = 0
        self.open = {i for i, s in enumerate(self.plan.spans) if s.aggregator == self.me}
        """Spans that we reduce and have not closed."""
        self.tries: dict[tuple[int, PeerId, int], int] = {}

    def check(self, effects: list[Effect]) -> None:
        at = f"seed {self.seed} at {self.now_s:.2f}"
        for effect in effects:
            match effect:
                case TakeContribution():
                    self.taken += 1
                    assert self.taken == 1, f"{at}: frozen twice"
                    assert self.now_s >= self.round.due_s, f"{at}: frozen early"
                case SendContribution(plan, span, to):
                    assert self.taken, f"{at}: sent before it was frozen"
                    assert to == plan.spans[span].aggregator == self.plan.spans[span].aggregator
                    key = (span, to, plan.spans[span].since_epoch)
                    self.tries[key] = self.tries.get(key, 0) + 1
                    assert self.tries[key] <= TRIES_MAX, f"{at}: {key} sent too often"
                case CloseSpan(_, span, _):
                    assert span in self.open, f"{at}: span {span} closed twice, or not ours"
                    self.open.remove(span)
                case ApplyRound(_, number, outcomes):
                    self.applied += 1
                    assert self.applied == 1, f"{at}: applied twice"
                    assert number == 7
                    assert [h.span for h, _ in outcomes] == list(range(len(self.plan.spans)))
                case PushOutcome(epoch, _, _, to):
                    assert epoch == self.plan.epoch, at
                    assert to != self.me, f"{at}: talks to itself"
                    assert to not in self.suspected, f"{at}: waits for the suspected"
                case FetchOutcomes(source, _, span):
                    assert source != self.me, f"{at}: talks to itself"
                    assert span is not None or source not in self.suspected, at
                case _:
                    pass

    def step(self) -> None:
        rng, r = self.rng, self.round
        span = rng.randrange(len(self.plan.spans))
        who = rng.choice([*self.plan.peers, STRANGER])
        effects: list[Effect] = []
        match rng.randrange(12):
            case 0 if r.taking:
                effects = r.contribution_taken(1.0, self.now_s)
            case 1 if who != STRANGER:
                r.folded(who, span, rng.random() < 0.9, TRAIN_S + 0.1)
            case 2:
                r.contribution_undelivered(who, span, rng.random() < 0.2, self.now_s)
            case 3:
                r.contribution_delivered(who, span)
            case 4 if self.plan.spans[span].aggregator == who != self.me:
                effects = r.hold(*outcome(self.plan, span, who), self.now_s)
            case 5 if span not in self.open and self.plan.spans[span].aggregator == self.me:
                effects = r.hold(*outcome(self.plan, span, self.me), self.now_s)
            case 6 if who != STRANGER and len(self.plan.peers) > 1:
                effects = self.revise(who)
            case 7 if who in self.plan.peers and who != self.me:
                effects = r.handed_over(who, span, outcome(self.plan, span, who)[0], who)
            case 8:
                r.fetch_finished(who)
            case 9:
                r.outcome_undelivered(who, span, self.now_s)
            case 10 if who != self.me:
                self.suspected ^= {who}
            case _:
                self.now_s += rng.choice([0.05, 0.5, 2.0])
        effects += r.tick(self.now_s, self.suspected)
        effects += r.complete()
        self.check(effects)
        deadline_s = r.deadline_s(self.suspected)
        assert deadline_s > self.now_s, f"seed {self.seed}: the driver would spin"
        if not r.applying and r.missing():
            assert deadline_s <= max(r.end_s, self.now_s + 2.0), (
                f"seed {self.seed}: no end in sight"
            )

    def revise(self, gone: PeerId) -> list[Effect]:
        if gone == self.me:
            return []
        old, self.plan = self.plan, revised(self.plan, without={gone})
        ours = {i for i, s in enumerate(self.plan.spans) if s.aggregator == self.me}
        before = {i for i, s in enumerate(old.spans) if s.aggregator == self.me}
        held = {i for i in ours if i not in self.round.missing()}
        self.open = (self.open & ours) | (ours - before - held)
        return self.round.revise(self.plan, self.now_s)


def test_whatever_happens_nothing_is_done_twice_and_there_is_always_a_deadline() -> None:
    first = random.SystemRandom().randrange(2**31)
    applied = 0
    for seed in [*range(1500), *range(first, first + 500)]:
        storm = Storm(seed)
        for _ in range(60):
            storm.step()
        applied += storm.applied
    assert applied > 100, "a storm that never lets a round through proves little"
