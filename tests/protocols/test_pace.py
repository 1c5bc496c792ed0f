"""Rounds are as long as their exchanges need, within bounds that anybody can check."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.events import PlanAdopted
from protocols.pace import ROUNDS_KEPT, ROUNDS_MIN, Pace
from tests.protocols.test_group import check_invariants, reach
from tests.protocols.test_hostile import Scene, issue
from tests.sim.world import World


def test_one_slow_exchange_changes_nothing() -> None:
    pace = Pace(5.0, 100.0, 0.5)
    for exchange_s in [1.5, 1.5, 90.0, 1.5, 1.5]:
        pace.measured(exchange_s)
    assert pace.round_s == 5.0


def test_rounds_get_as_long_as_the_share_asks_and_no_longer_than_the_bound() -> None:
    pace = Pace(5.0, 100.0, 0.5)
    for _ in range(ROUNDS_MIN):
        assert pace.round_s == 5.0
        pace.measured(20.0)
    assert pace.round_s == 40.0
    for _ in range(ROUNDS_KEPT):
        pace.measured(80.0)
    assert pace.round_s == 100.0


def test_they_get_shorter_again_but_do_not_swing() -> None:
    pace = Pace(5.0, 100.0, 0.5)
    for _ in range(ROUNDS_KEPT):
        pace.measured(20.0)
    for _ in range(ROUNDS_KEPT):
        pace.measured(12.0)
    assert pace.round_s == 40.0, "12 s of 40 s are more than half of what is allowed"
    for _ in range(ROUNDS_KEPT):
        pace.measured(8.0)
    assert pace.round_s == 16.0
    for _ in range(ROUNDS_KEPT):
        pace.measured(0.1)
    assert pace.round_s == 5.0


def test_a_newcomer_goes_by_the_plans_it_follows() -> None:
    pace = Pace(5.0, 100.0, 0.5)
    pace.followed(60.0)
    assert pace.round_s == 60.0
    pace.followed(10_000.0)
    assert pace.round_s == 100.0
    for _ in range(ROUNDS_MIN):
        pace.measured(20.0)
    pace.followed(7.0)
    assert pace.round_s == 40.0, "by then it has measured for itself"


def test_without_a_bound_rounds_stay_as_they_are() -> None:
    pace = Pace(5.0, 0.0, 0.5)
    for _ in range(ROUNDS_KEPT):
        pace.measured(60.0)
    assert pace.round_s == 5.0


def lengths(world: World) -> list[float]:
    """Seconds from one round's contributions to the next, at the first peer."""
    due: dict[int, float] = {}
    for _, event in world.living[0].told:
        if isinstance(event, PlanAdopted):
            due[event.plan.round] = event.due_s
    ordered = [due[n] for n in sorted(due)]
    return [b - a for a, b in pairwise(ordered)]


def test_a_group_on_thin_lines_trains_longer_between_exchanges_and_its_successors_too() -> None:
    world = World(1, round_s=5.0, round_s_max=60.0, exchange_s=60.0)
    peers = [world.add(i, unit_s=1.5) for i in range(4)]
    assert reach(world, peers, 12, 900.0)
    long = lengths(world)[-3:]
    assert all(15.0 < s <= 61.0 for s in long), long
    plans = [e for _, e in peers[0].told if isinstance(e, PlanAdopted)]
    world.crash(world.peers[plans[-1].coordinator])
    assert reach(world, world.living, 16, 400.0)
    assert all(15.0 < s <= 61.0 for s in lengths(world)[-2:]), "the successor keeps the pace"
    for peer in world.living:
        peer.unit_s = 0.0
    assert reach(world, world.living, 30, 900.0)
    assert all(s < 6.0 for s in lengths(world)[-3:]), "and it is taken back"
    check_invariants(world)


def test_nobody_may_plan_beyond_the_bounds_of_the_manifest() -> None:
    scene = Scene(1)
    long = dataclasses.replace(
        scene.plan, epoch=scene.plan.epoch + 1, train_ms=int(scene.world.round_s * 1000) + 2
    )
    answer = scene.attack(scene.victim, issue(scene.aggregator.signer, long))
    assert isinstance(answer, RemoteProtocolError)


def test_standing_chores_follow_the_length_of_rounds() -> None:
    assert Pace(8.0, 0.0, 0.5).chores_s == 1.0
    assert Pace(240.0, 0.0, 0.5).chores_s == 30.0
    assert Pace(1800.0, 0.0, 0.5).chores_s == 420.0
    assert Pace(86400.0, 0.0, 0.5).chores_s == limits.HEARTBEAT_S_MAX
    growing = Pace(8.0, 80.0, 0.5)
    assert (growing.chores_s, growing.chores_s_max) == (1.0, 10.0)
    for _ in range(5):
        growing.measured(20.0)
    assert growing.chores_s == 5.0
