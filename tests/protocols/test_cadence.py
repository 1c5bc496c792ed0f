"""Heartbeats are quick while it matters who lives, and rare in a long training phase."""

from __future__ import annotations

import pytest

from protocols import limits
from protocols.company import LEAD_S
from protocols.events import PlanAdopted, Suspected
from protocols.membership import Membership, calls_first
from protocols.messages import Heartbeat
from protocols.pace import chores_s
from tests.protocols.samples import GROUP, RUN, peer, record
from tests.protocols.test_group import check_invariants, gets_in_step, reach, rounds
from tests.sim.world import Peer, World

HALF_AN_HOUR_S = 1800.0


def long_rounds(seed: int, count: int = 4) -> tuple[World, list[Peer]]:
    """A group at the start of a round of half an hour, after one that it completed."""
    world = World(seed, round_s=HALF_AN_HOUR_S, exchange_s=60.0)
    peers = [world.add(i) for i in range(count)]
    assert reach(world, peers, 1, 3 * HALF_AN_HOUR_S), f"seed {seed}"
    world.run(world.now_s + 60.0)
    return world, peers


def due_s(world: World) -> float:
    plans = [e for p in world.living for _, e in p.told if isinstance(e, PlanAdopted)]
    return max(e.due_s for e in plans)


def test_a_long_training_phase_costs_few_words() -> None:
    world, peers = long_rounds(1)
    before = dict(world.sent)
    start_s = world.now_s
    world.run(start_s + HALF_AN_HOUR_S)
    assert all(rounds(p) == 2 for p in peers)
    for p in peers:
        # 8 slow heartbeats, and quick ones around the exchange, to three others; with one a
        # second it would be 5,400.
        assert world.sent[p.id] - before[p.id] < 3 * (8 + 40)


def test_short_rounds_keep_the_quick_rhythm() -> None:
    world = World(2, round_s=5.0)
    peers = [world.add(i) for i in range(3)]
    for second in range(30, 40):
        world.run(float(second))
        words_s = [n.heard_s for p in peers for n in p.machine.members.everybody()]
        assert len(words_s) == 3 * 2
        assert min(words_s) > world.now_s - 1.5 * limits.HEARTBEAT_S


def test_of_two_one_calls_and_the_other_answers() -> None:
    world, peers = long_rounds(5, count=6)
    world.run(world.now_s + 300.0)
    before, start_s = dict(world.sent), world.now_s
    world.run(start_s + HALF_AN_HOUR_S / 2)
    calls = sum(world.sent[p.id] - before[p.id] for p in peers)
    pause_s = chores_s(HALF_AN_HOUR_S)
    assert calls <= 15 * (HALF_AN_HOUR_S / 2 / pause_s + 1), "a pair's call every so often"
    for p in peers:
        for n in p.machine.members.everybody():
            assert n.heard_s > world.now_s - pause_s - 1.0


def test_who_should_call_and_does_not_is_called() -> None:
    """Where one of two does not know that the other is in its group, the other finds out."""
    world = World(6, round_s=5.0)
    one, other = world.add(0), world.add(1)
    assert reach(world, [one, other], 2, 60.0)
    caller, called = (one, other) if calls_first(one.id, other.id) == one.id else (other, one)
    known = caller.machine.members.get(called.id)
    assert known is not None
    caller.machine.members.said_goodbye(called.id)  # as if a goodbye of an earlier life came late
    world.run(world.now_s + 4.0)
    assert not known.left
    assert called.id in caller.machine.live_members(world.now_s)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99, 0.996])
def test_the_dead_are_known_before_they_are_missed(share: float) -> None:
    """Whoever dies in the training phase is out of the plan when contributions are due."""
    for seed in range(3):
        world, peers = long_rounds(seed)
        due = due_s(world)
        world.run(due - HALF_AN_HOUR_S * (1 - share))
        plan = [e for _, e in peers[0].told if isinstance(e, PlanAdopted)][-1].plan
        world.crash(world.peers[plan.spans[seed % len(plan.spans)].aggregator])
        before = rounds(world.living[0])
        assert reach(world, world.living, before + 1, due - world.now_s + 5.0), f"seed {seed}"
        assert gets_in_step(world), f"seed {seed}"
        assert world.now_s < due + 5.0 + 5.0, f"seed {seed}"
        check_invariants(world)


def test_nobody_is_suspected_for_keeping_to_its_word() -> None:
    world = World(3, round_s=HALF_AN_HOUR_S, exchange_s=60.0, loss=0.05)
    peers = [world.add(i) for i in range(6)]
    world.run(4 * HALF_AN_HOUR_S)
    late = world.add(9, fresh=True)  # greeted in a slow phase, it does not expect quick words
    world.run(6 * HALF_AN_HOUR_S)
    assert rounds(late) >= 4
    suspicions = [e for p in [*peers, late] for _, e in p.told if isinstance(e, Suspected)]
    assert suspicions == []


def test_silence_is_measured_by_what_was_announced() -> None:
    table = Membership(peer(0))
    table.saw(record(1), 100.0)
    slack_s = limits.SUSPECT_AFTER_S - limits.HEARTBEAT_S
    table.heartbeat(peer(1), Heartbeat(RUN, GROUP, 1, 1, b"", True, 30_000), 100.0)
    assert table.sweep(GROUP, 130.0 + slack_s) == []
    table.heard(peer(1), 129.0)  # any word is a sign of life, and puts nothing off
    assert table.sweep_s <= 130.0 + slack_s
    assert table.live(GROUP, 130.0 + slack_s)
    assert [p for p, _ in table.sweep(GROUP, 132.6)] == [peer(1)]


def test_nobody_may_announce_a_pause_beyond_all_bounds() -> None:
    table = Membership(peer(0))
    table.saw(record(1), 0.0)
    table.announced(peer(1), 10**9, 0.0)
    table.heard(peer(1), 0.001)
    assert not table.live(GROUP, limits.HEARTBEAT_S_MAX + limits.SUSPECT_AFTER_S)


def test_a_lost_word_is_said_again_soon() -> None:
    world, peers = long_rounds(4, count=2)
    a, b = peers
    world.run(due_s(world) - 15 * 60.0)
    world.partition([a], [b], 230.0)  # at least one slow heartbeat falls into it
    world.run(world.now_s + 240.0)
    now_s = world.now_s
    assert a.machine.live_members(now_s) == b.machine.live_members(now_s)
    assert len(a.machine.live_members(now_s)) == 2
    assert LEAD_S > limits.SUSPECT_AFTER_S
