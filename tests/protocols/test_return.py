"""A peer that comes back, from its disk or from sleep: it waits for its company before it plans
anything by itself, and knows its own history.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from protocols import limits
from protocols.events import (
    ApplyRound,
    CompanyTold,
    Effect,
    Event,
    FetchFinished,
    FetchOutcomes,
    FetchState,
    OutcomeHeld,
    PlanAdopted,
    Received,
    RecordIssued,
    RecordSeen,
    Remembered,
    SignPlan,
    StateReady,
    Suspected,
    Tick,
    Undelivered,
)
from protocols.group import GroupConfig, GroupMachine
from protocols.messages import OUTCOME_DOMAIN, Hello, OutcomeHeader
from protocols.records import sign, sign_record
from protocols.standing import SETTLE_S
from protocols.steering import COMPANY_S
from protocols.types import Digest, GroupName
from tests.protocols.samples import GROUP, RUN, peer, record, signer
from tests.sim.world import World

ME, OTHER = 0, 1
ROUND = 5
MINE, THEIRS = Digest(hashlib.sha256(b"mine").digest()), Digest(hashlib.sha256(b"theirs").digest())


class Returned:
    """A machine that holds `ROUND` rounds and has heard of another member from the directory."""

    def __init__(self, *, known: bool = True, past: Remembered | None = None) -> None:
        config = GroupConfig(run=RUN, units=8, site="a")
        self.machine = GroupMachine(peer(ME), config, 0.0)
        if past is not None:
            self.feed(past, 0.0)
        self.feed(StateReady(ROUND, MINE), 0.0)
        own = record(ME)
        self.feed(RecordIssued(sign_record(signer(ME), own), own), 0.0)
        self.feed(Tick(), 0.0)
        if known:
            self.feed(RecordSeen(record(OTHER)), 0.0)

    def feed(self, event: Event, now_s: float) -> list[Effect]:
        return self.machine.handle(event, now_s)

    def plans(self, now_s: float) -> bool:
        return any(isinstance(e, SignPlan) for e in self.feed(Tick(), now_s))

    def hears(self, number: int, digest: Digest, now_s: float, other: int = OTHER) -> list[Effect]:
        signed = sign_record(signer(other), record(other))
        hello = Hello(limits.PROTOCOL_VERSION, RUN, signed, number, digest, True, False, 1000)
        return self.feed(Received(peer(other), hello), now_s)


@pytest.mark.parametrize(("gone_s", "goes_over"), [(10.0, False), (limits.FIRM_S + 1, True)])
def test_a_majority_can_count_on_a_member_that_comes_back(gone_s: float, goes_over: bool) -> None:
    # Three of five stood at our state; the first two whom we meet have gone on without those.
    past = Remembered(GROUP, 4, ROUND, tuple(peer(i) for i in (1, 2, 3, 4)), gone_s)
    returned = Returned(past=past)
    asked = False
    for second in range(1, 30):
        effects: list[Effect] = []
        for other in (1, 2):
            effects += returned.hears(ROUND + 3, THEIRS, float(second), other)
        effects += returned.feed(Tick(), float(second))
        for effect in effects:
            if isinstance(effect, FetchOutcomes):  # which they have of another history than ours
                nothing = FetchFinished(effect.peer, ROUND, 0, "none")
                effects += returned.feed(nothing, second + 0.5)
            asked |= isinstance(effect, FetchState)
    # After so long nobody counts the silent any more, and two are most of two.
    assert asked == goes_over


def test_a_newcomer_counts_the_silent_whom_a_fellow_member_tells_of() -> None:
    # It came while two of five were left; what they go on with is not what most of the group have.
    newcomer = Returned()
    newcomer.hears(ROUND, MINE, 1.0)
    assert newcomer.machine.firm(1.0)
    silent = tuple(peer(i) for i in (2, 3, 4))
    newcomer.feed(CompanyTold(GROUP, (peer(ME), peer(OTHER), *silent)), 2.0)
    assert not newcomer.machine.firm(2.0)
    assert set(newcomer.machine.past(2.0).members) == {peer(OTHER), *silent}
    for other in (2, 3):
        newcomer.hears(ROUND, MINE, 3.0, other)
    assert newcomer.machine.firm(3.0)  # most of those five stand here after all
    newcomer.feed(CompanyTold(GroupName("another"), tuple(peer(i) for i in range(5, 15))), 4.0)
    assert newcomer.machine.firm(4.0)


def test_what_most_of_another_group_had_is_nothing_to_this_one() -> None:
    past = Remembered(GroupName("another"), 4, ROUND, (), 1.0)
    assert Returned(past=past).machine.past(1.0).firm == 0
    assert Returned(past=replace(past, group=GROUP)).machine.past(1.0).firm == ROUND


def test_what_it_must_know_again_is_what_it_says_before_it_stops() -> None:
    past = Remembered(GROUP, 4, ROUND - 1, (peer(3), peer(4)), 0.0)
    returned = Returned(past=past)
    returned.hears(ROUND, MINE, 1.0)
    kept = returned.machine.past(2.0)
    assert (kept.group, kept.epoch, kept.firm) == (GROUP, 4, ROUND - 1)
    assert sorted(kept.members) == sorted([peer(OTHER), peer(3), peer(4)])
    for second in range(2, 60):
        returned.feed(Tick(), float(second))
    assert returned.machine.past(2 * limits.FIRM_S).members == ()


def test_an_epoch_in_which_it_signed_does_not_come_again() -> None:
    returned = Returned(known=False, past=Remembered(GROUP, 4, ROUND, (), 1.0))
    signed = [e.plan for e in returned.feed(Tick(), SETTLE_S) if isinstance(e, SignPlan)]
    assert [plan.epoch for plan in signed] == [5]


def test_who_knows_of_nobody_goes_on_alone_at_once() -> None:
    assert Returned(known=False).plans(SETTLE_S)


def test_who_knows_of_others_waits_for_their_answer_before_it_goes_on_alone() -> None:
    returned = Returned()
    assert not returned.plans(SETTLE_S)
    assert not returned.plans(COMPANY_S - 0.1)
    assert returned.plans(COMPANY_S), "nobody may hold it up for ever"


def test_who_cannot_reach_the_others_it_knows_of_goes_on_alone() -> None:
    returned = Returned()
    assert not returned.plans(SETTLE_S)
    failed = Undelivered(peer(OTHER), "failed to dial")
    assert not [e for e in returned.feed(failed, SETTLE_S + 1) if isinstance(e, SignPlan)]
    assert [e for e in returned.feed(failed, SETTLE_S + 2) if isinstance(e, SignPlan)]


def test_who_is_answered_by_a_group_ahead_catches_up_and_plans_nothing() -> None:
    returned = Returned()
    effects = returned.hears(ROUND + 1, THEIRS, SETTLE_S)
    assert [e for e in effects if isinstance(e, FetchOutcomes)]
    assert not returned.plans(SETTLE_S + 0.1)


def fetched(returned: Returned, base: bytes) -> list[Effect]:
    """What comes of a fetched outcome that covers the round which the other has and we lack."""
    returned.hears(ROUND + 1, THEIRS, SETTLE_S)
    header = OutcomeHeader(RUN, GROUP, ROUND, 3, 0, 0, 8, (), bytes(32), 1, 0.1, base)
    signed = sign(signer(OTHER), OUTCOME_DOMAIN, header)
    effects = returned.feed(OutcomeHeld(peer(OTHER), header, signed, True), SETTLE_S + 0.1)
    effects += returned.feed(FetchFinished(peer(OTHER), ROUND, 1, ""), SETTLE_S + 0.2)
    return effects + returned.feed(Tick(), SETTLE_S + 1.0)


def test_an_outcome_that_starts_from_our_state_is_applied() -> None:
    assert [e for e in fetched(Returned(), MINE) if isinstance(e, ApplyRound)]


def test_an_outcome_of_another_history_is_not_applied_and_the_state_is_fetched() -> None:
    effects = fetched(Returned(), THEIRS)
    assert not [e for e in effects if isinstance(e, ApplyRound)]
    assert [e.donor for e in effects if isinstance(e, FetchState)] == [peer(OTHER)]


# ── from sleep ───────────────────────────────────────────────────────────────────────────
def suspects(effects: list[Effect]) -> bool:
    return any(isinstance(e, Suspected) for e in effects)


def test_who_slept_takes_nobodys_silence_for_death_until_another_word_was_due() -> None:
    returned = Returned()
    returned.hears(ROUND, MINE, 0.5)
    returned.feed(Tick(), 1.0)
    awake_s = 11.0
    assert not suspects(returned.feed(Tick(), awake_s))
    assert returned.machine.live_members(awake_s) == sorted([peer(ME), peer(OTHER)])
    for after_s in (1.0, 2.0, 3.0, limits.SUSPECT_AFTER_S - 0.1):
        assert not suspects(returned.feed(Tick(), awake_s + after_s)), after_s
    assert suspects(returned.feed(Tick(), awake_s + limits.SUSPECT_AFTER_S + 0.1))


def test_who_was_awake_takes_silence_for_what_it_is() -> None:
    returned = Returned()
    returned.hears(ROUND, MINE, 0.5)
    told = [returned.feed(Tick(), 0.5 + 0.25 * n) for n in range(1, 20)]
    assert any(suspects(effects) for effects in told)


def test_a_member_that_slept_for_some_seconds_makes_no_round_by_itself() -> None:
    for seed in range(20):
        world = World(seed)
        members = [world.add(i) for i in range(4)]
        world.run(20.0 + world.rng.uniform(0.0, 5.0))
        sleeper = members[seed % 4]
        slept_s = world.now_s
        world.freeze(sleeper, world.rng.uniform(2.0, 8.0))
        world.run(world.now_s + 20.0)
        plans = [e.plan for t, e in sleeper.told if t > slept_s and isinstance(e, PlanAdopted)]
        assert plans, seed
        assert all(len(plan.roster) > 1 for plan in plans), seed
