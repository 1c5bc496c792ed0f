"""Promises that the machine does not keep yet: what one peer must not be able to do to a group."""

from __future__ import annotations

import dataclasses

import pytest

from protocols.election import make_plan
from protocols.errors import RemoteProtocolError
from protocols.events import (
    ApplyRound,
    CloseSpan,
    ContributionUndelivered,
    Effect,
    FetchFinished,
    FetchOutcomes,
    OutcomeHeld,
    OutcomeUndelivered,
    PushOutcome,
    SendContribution,
    SignPlan,
    StateReady,
    TakeContribution,
    Tick,
)
from protocols.messages import Heartbeat, OutcomeHeader, Plan, PlanRefused, Seat, Span, SpanHeld
from protocols.records import sign
from protocols.steering import PLANNED_AGAIN_MAX
from protocols.types import Digest
from tests.protocols.test_hostile import (
    FOREIGN_RUN,
    HERE,
    NOTHING_SIGNED,
    Scene,
    contribution,
    issue,
    pushed,
    says,
)
from tests.sim.world import RUN, UNITS, Peer


def others(scene: Scene, but: Peer) -> list[Peer]:
    return [p for p in scene.peers if p is not but]


# ── strangers ────────────────────────────────────────────────────────────────────────────
def test_a_strangers_words_do_not_move_the_epoch() -> None:
    scene = Scene(1)
    machine = scene.victim.machine
    for message in (
        Heartbeat(RUN, HERE, machine.epoch + 2**20, 1, b"", True, 0),
        PlanRefused(RUN, HERE, 1, machine.epoch + 2**20, ""),
    ):
        before = machine.epoch
        scene.attack(scene.victim, says(message, scene.stranger))
        assert machine.epoch == before


def test_a_stranger_cannot_hold_a_span_up_with_a_hand_over() -> None:
    scene = Scene(1, exchanging=True)
    held = SpanHeld(RUN, HERE, scene.plan.round, 0, NOTHING_SIGNED)
    for by in (scene.stranger, scene.member):  # nor a member without a proof
        before = scene.see(scene.aggregator.machine, alive=False)
        answer = scene.attack(scene.aggregator, says(held, by))
        assert isinstance(answer, RemoteProtocolError)
        assert scene.see(scene.aggregator.machine, alive=False) == before


@pytest.mark.parametrize("attack", [contribution(run=FOREIGN_RUN), pushed(run=FOREIGN_RUN)])
def test_a_stream_of_another_run_is_refused(attack: object) -> None:
    scene = Scene(1)
    target, liar, event = attack(scene)  # type: ignore[operator]
    answer = scene.attack(target, event)
    assert isinstance(answer, RemoteProtocolError)
    assert answer.peer == liar


def test_a_refused_stream_changes_nothing_not_even_who_lives() -> None:
    scene = Scene(1)
    target, _, event = contribution(span=16)(scene)
    known = target.machine.members.get(scene.member.id)
    assert known is not None
    known.suspected = known.left = True
    before = scene.see(target.machine)
    assert isinstance(scene.attack(target, event), RemoteProtocolError)
    assert scene.see(target.machine) == before


# ── one hostile member ───────────────────────────────────────────────────────────────────
def test_a_member_cannot_use_up_the_epochs() -> None:
    scene = Scene(1)
    coup = dataclasses.replace(
        scene.plan,
        epoch=2**48,
        spans=tuple(dataclasses.replace(s, since_epoch=0) for s in scene.plan.spans),
    )
    before = scene.victim.machine.epoch
    scene.attack(scene.victim, issue(scene.member.signer, coup))
    assert scene.victim.machine.epoch < before + 2**21


def test_a_member_cannot_make_everybody_wait_a_day() -> None:
    scene = Scene(1)
    day_ms = 24 * 3600 * 1000
    plan = make_plan(
        run=RUN, group=HERE, epoch=scene.plan.epoch + 1, round=scene.plan.round + 1,
        seats=[Seat(p.id, 10_000) for p in scene.peers], units=range(UNITS), aggregators_max=4,
        train_ms=day_ms, exchange_ms=day_ms, digest=Digest(b""),
    )  # fmt: skip
    before = scene.see(scene.victim.machine, alive=False)
    assert isinstance(
        scene.attack(scene.victim, issue(scene.member.signer, plan)), RemoteProtocolError
    )
    assert scene.see(scene.victim.machine, alive=False) == before


def test_a_revision_keeps_the_bounds_of_the_plan_in_force() -> None:
    scene = Scene(1, exchanging=True)
    cut = dataclasses.replace(
        scene.plan,
        epoch=scene.plan.epoch + 1,
        spans=(Span(0, UNITS, scene.member.id, scene.plan.epoch),),
    )
    current = scene.victim.machine.current
    scene.attack(scene.victim, issue(scene.member.signer, cut))
    assert scene.victim.machine.current is current


def office(scene: Scene) -> Peer:
    """Who coordinates the group."""
    now_s = scene.world.now_s
    return next(p for p in scene.peers if p.machine._here.coordinator(now_s) == p.id)


def rival_of(plan: Plan, roster: list[Peer]) -> Plan:
    """The same round in the same epoch, planned by another, for these."""
    return make_plan(
        run=RUN, group=HERE, epoch=plan.epoch, round=plan.round,
        seats=[s for s in plan.roster if s.peer in {p.id for p in roster}], units=range(UNITS),
        aggregators_max=2, train_ms=plan.train_ms, exchange_ms=plan.exchange_ms,
        digest=Digest(plan.digest),
    )  # fmt: skip


def planned(effects: RemoteProtocolError | list[Effect]) -> list[Plan]:
    assert not isinstance(effects, RemoteProtocolError)
    return [e.plan for e in effects if isinstance(e, SignPlan)]


def test_who_coordinates_plans_once_more_where_another_planned_the_same_round() -> None:
    scene = Scene(1)
    head = office(scene)
    plan = scene.plan
    member = next(p for p in scene.peers if p is not head)
    no = PlanRefused(RUN, HERE, plan.epoch, plan.epoch, "another plan of this epoch is in force")
    assert planned(scene.attack(member, says(no, head))) == []  # not its office
    old = dataclasses.replace(no, epoch=plan.epoch - 1)
    ahead = dataclasses.replace(no, known_epoch=plan.epoch + 1)
    assert planned(scene.attack(head, says(old, member))) == []
    for times in range(1, PLANNED_AGAIN_MAX + 1):
        (again,) = planned(scene.attack(head, says(no, member)))
        assert (again.round, again.epoch) == (plan.round, plan.epoch + times)
        assert again.peers == plan.peers
        head.machine._following.adopt(again, head.id, scene.world.now_s, scene.world.now_s)
        no = dataclasses.replace(no, epoch=again.epoch, known_epoch=again.epoch)
    assert planned(scene.attack(head, says(no, member))) == []  # nobody can go on for ever
    assert planned(scene.attack(head, says(ahead, member))) == []


@pytest.mark.parametrize("known", [2, 4])
def test_two_plans_of_one_round_cost_no_round(known: int) -> None:
    """Two members follow one whom the coordinator's plan did not reach in time, in a plan for those
    two or, as both makers took in the others at the same instant, for everybody."""
    scene = Scene(1)
    plan, head = scene.plan, office(scene)
    among = sorted(scene.peers, key=lambda p: p is head)
    two, rival = among[:2], rival_of(plan, among[:known])
    for peer in two:
        peer.machine._here.current = None
        peer.machine._following.adopt(rival, two[0].id, scene.world.now_s, scene.world.now_s)
        assert peer.machine.current is not None
        assert peer.machine.current.plan == rival
    for peer in two:
        scene.world._feed(peer, issue(head.signer, plan))
    assert scene.world.run_until(
        lambda: all(p.machine.round > plan.round for p in scene.peers), plan.train_ms / 1000 + 1.0
    )
    assert len({p.history for p in scene.peers}) == 1
    for _, _, shares in head.history[plan.round].inside:
        assert {who for who, _, _ in shares} == {p.id for p in scene.peers}


def test_a_round_that_is_being_applied_cannot_be_planned_again() -> None:
    scene = Scene(1, exchanging=True)
    machine = scene.victim.machine
    assert scene.world.run_until(
        lambda: machine.current is not None and machine.current.applying, 20.0
    )
    assert machine.current is not None
    plan = machine.current.plan
    cut = dataclasses.replace(
        plan, epoch=plan.epoch + 1, train_ms=0, spans=(Span(0, UNITS, scene.member.id, plan.epoch),)
    )
    header = OutcomeHeader(
        RUN, HERE, plan.round, plan.epoch + 1, 0, 0, UNITS, (), bytes(32), 1, 0.1
    )
    signed = sign(scene.member.signer, "outcome", header)
    effects: list[Effect] = []
    for event in (
        issue(scene.member.signer, cut),
        OutcomeHeld(scene.member.id, header, signed, False),
    ):
        answer = scene.attack(scene.victim, event)
        effects += answer if isinstance(answer, list) else []
    assert not [e for e in effects if isinstance(e, ApplyRound | TakeContribution)]


# ── one broken member ────────────────────────────────────────────────────────────────────
def test_a_coordinator_that_lives_but_plans_nothing_is_passed_over() -> None:
    scene = Scene(1)
    perform = scene.world._perform

    def mute(peer: Peer, effect: Effect) -> None:
        if peer is scene.aggregator and isinstance(effect, SignPlan | CloseSpan | PushOutcome):
            return
        perform(peer, effect)

    scene.world._perform = mute  # type: ignore[method-assign]
    before = [p.machine.round for p in others(scene, scene.aggregator)]
    scene.world.run(scene.world.now_s + 100.0)
    after = [p.machine.round for p in others(scene, scene.aggregator)]
    assert all(b - a >= 3 for a, b in zip(before, after, strict=True)), (before, after)


def test_a_coordinator_whose_streams_all_fail_is_passed_over() -> None:
    scene = Scene(1)
    broken, world = scene.aggregator, scene.world
    perform = world._perform

    def cut(peer: Peer, effect: Effect) -> None:
        match effect:
            case SendContribution(plan, span, to) if to == broken.id and peer is not broken:
                failed = ContributionUndelivered(to, plan.round, span, False)
                world._later(peer, 5.0, failed)
            case PushOutcome(_, _, header, to) if peer is broken:
                world._later(peer, 5.0, OutcomeUndelivered(to, header.round, header.span))
            case FetchOutcomes(source, number, _) if source == broken.id:
                world._later(peer, 5.0, FetchFinished(source, number, 0, ""))
            case _:
                perform(peer, effect)

    world._perform = cut  # type: ignore[method-assign]
    before = [p.machine.round for p in others(scene, broken)]
    world.run(world.now_s + 100.0)
    after = [p.machine.round for p in others(scene, broken)]
    assert all(b - a >= 3 for a, b in zip(before, after, strict=True)), (before, after)


# ── our own leftovers ────────────────────────────────────────────────────────────────────
def test_a_round_that_a_donors_state_overtook_asks_for_nothing_more() -> None:
    scene = Scene(1)
    machine = scene.victim.machine
    assert machine.current is not None
    number = machine.current.number
    machine.handle(StateReady(number + 5, Digest(b"q" * 32)), scene.world.now_s)
    late: list[Effect] = []
    for step in range(40):
        late += [
            e
            for e in machine.handle(Tick(), scene.world.now_s + step / 2)
            if (isinstance(e, TakeContribution | FetchOutcomes) and e.round == number)
            or (isinstance(e, CloseSpan) and e.plan.round == number)
        ]
    assert late == []
