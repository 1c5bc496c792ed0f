"""One thin line makes nobody else wait, and its work still counts."""

from __future__ import annotations

import math
import random
from statistics import mean

import pytest

from peer.sending import batches, missed_again
from protocols.arrivals import MEDIAN_SHARE, ROUNDS_KEPT, ROUNDS_MIN, SPREAD_S_MIN, Arrivals, K
from protocols.events import CloseSpan, PlanAdopted, StopSending
from protocols.messages import Contributor
from tests.protocols.samples import peer
from tests.protocols.test_group import check_invariants, gets_in_step, reach, rounds
from tests.protocols.test_round import (
    COLLECT_S,
    NOBODY,
    TRAIN_S,
    frozen,
    of,
    outcome,
    plan_of,
    roles,
)
from tests.sim.world import World

UNITS = 80


# ── the deadline ─────────────────────────────────────────────────────────────────────────
def test_without_history_the_rounds_own_arrivals_say_how_long() -> None:
    arrivals = Arrivals()
    assert arrivals.patience_s(12.0, []) == 12.0
    for _ in range(ROUNDS_MIN - 1):
        arrivals.closed([1.0, 1.1], 0)
        assert arrivals.patience_s(12.0, []) == 12.0
        assert arrivals.patience_s(12.0, [1.0, 1.5]) == 6.0
    arrivals.closed([1.0, 1.1], 0)
    assert arrivals.patience_s(12.0, []) == 1.0 + SPREAD_S_MIN


def test_the_deadline_is_median_and_deviations() -> None:
    arrivals = Arrivals()
    for _ in range(3):
        arrivals.closed([1.0, 2.0, 3.0, 4.0, 60.0], 0)
    assert arrivals.patience_s(100.0, []) == 3.0 + K * 1.0
    assert arrivals.patience_s(5.0, []) == 5.0


def test_equal_delays_leave_room_for_jitter() -> None:
    arrivals = Arrivals()
    for _ in range(3):
        arrivals.closed([100.0] * 7, 0)
    assert arrivals.patience_s(600.0, []) == 100.0 * (1 + MEDIAN_SHARE)
    for _ in range(ROUNDS_KEPT):
        arrivals.closed([0.1] * 7, 0)
    assert arrivals.patience_s(60.0, []) == 0.1 + SPREAD_S_MIN


def test_what_delays_everybody_makes_nobody_a_straggler() -> None:
    arrivals = Arrivals()
    for _ in range(3):
        arrivals.closed([1.0, 1.1, 1.2], 0)
    usual_s = arrivals.patience_s(60.0, [1.0, 1.1])
    assert arrivals.patience_s(60.0, [5.0, 5.2]) == usual_s - 1.1 + 5.0
    assert arrivals.patience_s(60.0, [0.1, 0.2]) == usual_s
    assert arrivals.patience_s(5.1, [5.0, 5.2]) == 5.1


def test_who_was_cut_off_counts_as_late_so_that_deadlines_do_not_creep_down() -> None:
    rng = random.Random(1)
    arrivals = Arrivals()
    line = [rng.uniform(1.0, 3.0) for _ in range(8)]  # no straggler among them
    for _ in range(50):
        patience_s = arrivals.patience_s(60.0, [])
        now = [d * rng.uniform(0.9, 1.1) for d in line]
        arrivals.closed([d for d in now if d <= patience_s], sum(d > patience_s for d in now))
    assert arrivals.patience_s(60.0, []) > max(line)


def test_where_half_are_late_nobody_is_a_straggler() -> None:
    arrivals = Arrivals()
    for _ in range(3):
        arrivals.closed([1.0], 2)
    assert arrivals.patience_s(30.0, []) == 30.0
    assert not math.isinf(arrivals.patience_s(30.0, []))


# ── a round ──────────────────────────────────────────────────────────────────────────────
def experienced(delay_s: float) -> Arrivals:
    arrivals = Arrivals()
    for _ in range(3):
        arrivals.closed([delay_s] * 3, 0)
    return arrivals


def test_a_span_closes_without_a_straggler_once_most_are_in() -> None:
    plan = plan_of()
    me, _, others = roles(plan)
    aggregator = frozen(me, plan, experienced(1.0))
    patient_s = TRAIN_S + 1.0 + SPREAD_S_MIN
    aggregator.folded(me, 0, True, TRAIN_S)
    assert aggregator.tick(patient_s, NOBODY) == [], "two of four are not most"
    assert aggregator.deadline_s(NOBODY) == COLLECT_S
    for member in [p for p in plan.peers if p not in (me, others[0])]:
        aggregator.folded(member, 0, True, TRAIN_S + 0.9)
    assert aggregator.deadline_s(NOBODY) == patient_s
    assert aggregator.tick(patient_s - 0.01, NOBODY) == []
    assert of(CloseSpan, aggregator.tick(patient_s, NOBODY)) == [CloseSpan(plan, 0, True)]


def test_a_quorum_above_a_half_is_waited_for() -> None:
    plan = plan_of()
    me, _, others = roles(plan)
    aggregator = frozen(me, plan, experienced(1.0), quorum=1.0)
    for member in [p for p in plan.peers if p != others[0]]:
        aggregator.folded(member, 0, True, TRAIN_S + 0.9)
    assert aggregator.tick(COLLECT_S - 0.01, NOBODY) == []
    assert of(CloseSpan, aggregator.tick(COLLECT_S, NOBODY))


def test_a_member_stops_sending_when_the_outcome_comes() -> None:
    plan = plan_of()
    aggregator, _, others = roles(plan)
    member = frozen(others[0], plan)
    header, _ = outcome(plan, 0, aggregator)
    assert member.outcome_coming(header) == [StopSending(plan.round, 0)]
    member.contribution_undelivered(aggregator, 0, False, TRAIN_S + 1)
    assert member.deadline_s(NOBODY) > TRAIN_S + 1


# ── the order of sending ─────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("size", [1, 3, 8])
def test_batches_cover_every_unit_once_in_the_order_of_what_they_missed(size: int) -> None:
    rng = random.Random(size)
    for _ in range(50):
        start = rng.randint(0, 20)
        stop = start + rng.randint(1, 30)
        share = rng.choice([0.0, 0.3, 0.9])
        missed = {u: rng.randint(1, 3) for u in range(60) if rng.random() < share}
        ranges = batches(start, stop, missed, size)
        order = [u for a, b in ranges for u in range(a, b)]
        assert sorted(order) == list(range(start, stop))
        assert all(0 < b - a <= size for a, b in ranges)
        turns = [missed.get(u, 0) for u in order]
        assert turns == sorted(turns, reverse=True)


def test_units_outside_every_mask_have_missed_a_round() -> None:
    plan = plan_of(2, aggregators_max=2)
    me, other = plan.peers
    first, second = (outcome(plan, i, other)[0] for i in range(2))
    size = first.stop - first.start
    mine = Contributor(me, 1.0, bytes([0b101]) + bytes((size + 7) // 8 - 1))
    inside = outcome(plan, 0, other, contributors=(mine,))[0]
    units = set(range(first.start, second.stop))
    once = missed_again({}, [inside, second], me)
    assert once == dict.fromkeys(units - {first.start, first.start + 2}, 1)
    assert missed_again({}, [inside, second], other) == dict.fromkeys(
        range(inside.start, inside.stop), 1
    )
    again = missed_again(once, [inside, second], me)
    assert set(again.values()) == {2}
    assert missed_again(again, [first, second], other) == {}
    assert peer(0) in plan.peers


# ── a group ──────────────────────────────────────────────────────────────────────────────
def pace_s(world: World) -> float:
    """Mean time of a round, from its planning to the next one's."""
    plans = [
        [t for t, e in p.told if isinstance(e, PlanAdopted) and e.plan.round >= 6]
        for p in world.living
    ]
    first = max(min(times) for times in plans)
    last = max(max(times) for times in plans)
    return (last - first) / (max(rounds(p) for p in world.living) - 6)


def run(seed: int, *, count: int, round_s: float, thin: float) -> World:
    """Thirty rounds of peers that need some 20 s to send their work; the last one `thin` times."""
    world = World(seed, round_s=round_s, exchange_s=300.0, units=UNITS)
    for i in range(count):
        world.add(i, unit_s=0.25 * (thin if i == count - 1 else 1.0))
    assert reach(world, world.living[:-1], 30, 6000.0), f"seed {seed}"
    return world


@pytest.mark.parametrize(
    ("count", "round_s", "most"), [(4, 40.0, 1.01), (3, 1.0, 1.1), (5, 1.0, 1.1)]
)
def test_a_peer_on_a_twentieth_of_the_bandwidth_costs_no_time_and_its_work_counts(
    count: int, round_s: float, most: float
) -> None:
    """Where training hides the exchange; and where the network is all there is to wait for."""
    ratios = []
    for seed in range(1):
        usual = run(seed, count=count, round_s=round_s, thin=1.0)
        thin = run(seed, count=count, round_s=round_s, thin=20.0)
        ratios.append(pace_s(thin) / pace_s(usual))
        slow = thin.living[-1]
        units = [
            unit
            for applying in thin.living[0].history[5:]
            for start, _, inside in applying.inside
            for who, _, part in inside
            for unit in part
            if who == slow.id
        ]
        assert len(set(units)) >= 0.9 * UNITS, f"seed {seed}: some never get their turn"
        check_invariants(thin)
        assert gets_in_step(thin, 60.0), f"seed {seed}"
    assert mean(ratios) <= most, ratios
