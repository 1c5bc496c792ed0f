"""Which units take their turn in which round, and who says otherwise is refused."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from protocols.coverage import Coverage
from protocols.election import fault_in, make_plan
from protocols.errors import RemoteProtocolError
from protocols.events import OutcomeHeld
from protocols.fragments import Fragments
from protocols.messages import OutcomeHeader, Plan, Seat
from protocols.records import Signed
from protocols.standing import GroupConfig
from protocols.types import Digest, GroupName
from tests.protocols.samples import peer
from tests.sim.world import RUN, World

GROUP = GroupName("site:a")


def test_fragments_take_turns_and_each_unit_has_one() -> None:
    for seed in range(500):
        rng = random.Random(seed)
        sizes = [rng.choice([1, 7, 100]) for _ in range(rng.randint(1, 60))]
        count = rng.randint(1, min(16, len(sizes)))
        cut = Fragments.cut(sizes, count)
        assert (cut.count, cut.units) == (count, len(sizes))
        first = rng.randrange(1000)
        turns = [cut.of(number) for number in range(first, first + count)]
        assert sorted(u for units in turns for u in units) == list(range(len(sizes))), seed
        assert cut.of(first) == cut.of(first + count)


def test_fragments_are_as_large_as_each_other_in_values() -> None:
    for seed in range(500):
        rng = random.Random(seed)
        sizes = [rng.randint(1, 100) for _ in range(200)]
        cut = Fragments.cut(sizes, rng.randint(2, 16))
        parts = [sum(sizes[a:b]) for a, b in itertools.pairwise(cut.edges)]
        assert max(abs(part - sum(sizes) / cut.count) for part in parts) <= 100, f"seed {seed}"


@pytest.mark.parametrize("count", [0, -1, 4])
def test_more_fragments_than_units_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="fragments"):
        Fragments.cut([1, 1, 1], count)


@pytest.mark.parametrize("edges", [(), (0,), (1, 2), (0, 2, 2), (0, 3, 2)])
def test_edges_that_are_none_are_refused(edges: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="fragments"):
        Fragments(edges)


def planned(units: range) -> Plan:
    seats = [Seat(peer(i), 10 + i) for i in range(3)]
    return make_plan(
        run=RUN, group=GROUP, epoch=1, round=5, seats=seats, units=units, aggregators_max=4,
        train_ms=1000, exchange_ms=1000, digest=Digest(bytes(32)),
    )  # fmt: skip


def test_a_plan_covers_exactly_the_units_of_its_round() -> None:
    cut = Fragments.cut([1] * 30, 3)
    own = cut.of(5)
    plan = planned(own)
    assert (plan.spans[0].start, plan.spans[-1].stop) == (own.start, own.stop)
    assert fault_in(plan, own, 4, revises=False) is None
    for other in (cut.of(3), cut.of(4), range(30), range(own.start, own.stop - 1)):
        assert fault_in(planned(other), own, 4, revises=False), other
        assert fault_in(planned(other), own, 4, revises=True), other


def test_an_outcome_of_units_without_a_turn_is_its_senders_fault() -> None:
    world = World(3, units=12, fragments=3)
    one = world.add(0)
    world.add(1)
    world.run(3.0)
    number = one.machine.round
    other = (number + 1) % 3
    header = OutcomeHeader(
        RUN, GROUP, number, 1, 0, 4 * other, 4 * other + 4, (), Digest(bytes(32)), 0, 0.1,
    )  # fmt: skip
    event = OutcomeHeld(peer(1), header, Signed(b"", peer(1), b""), True)
    with pytest.raises(RemoteProtocolError, match="no turn"):
        one.machine.handle(event, world.now_s)
    assert one.machine.round == number


@pytest.mark.parametrize("seed", range(8))
def test_a_group_in_turns_survives_what_a_group_survives(seed: int) -> None:
    """Crashes, freezes, newcomers, partitions: every round's units are its fragment's, no
    contribution counts twice in a unit, and at the end everybody agrees."""
    rng = random.Random(seed)
    count = rng.choice([2, 3, 4])
    world = World(seed, units=12, fragments=count, round_s=2.0)
    peers = [world.add(i) for i in range(5)]
    world.run(15.0)
    for _ in range(4):
        kind, victim = rng.choice(["crash", "freeze", "cut"]), rng.choice(world.living[1:])
        if kind == "crash":
            world.crash(victim)
            world.run(world.now_s + rng.uniform(1, 8))
            world.add(next(i for i, p in enumerate(peers) if p.id == victim.id), fresh=True)
        elif kind == "freeze":
            world.freeze(victim, rng.uniform(1, 10))
        else:
            rest = [p for p in world.living if p is not victim]
            world.partition([victim], rest, rng.uniform(3, 10))
        world.run(world.now_s + 12.0)
    agreed = world.run_until(
        lambda: len({(p.machine.round, p.machine.digest) for p in world.living}) == 1, 60.0
    )
    assert agreed, f"seed {seed}"
    cut = Fragments.cut([1] * 12, count)
    history = world.living[0].history
    assert len(history) > 15, f"seed {seed}"
    for applied in history:
        covered = [u for start, stop, _ in applied.inside for u in range(start, stop)]
        assert covered == list(cut.of(applied.round)), f"seed {seed}"


def test_without_a_change_the_epoch_stays_though_the_spans_move_on() -> None:
    world = World(1, units=12, fragments=4, round_s=1.0)
    for i in range(3):
        world.add(i)
    world.run(20.0)
    one = world.living[0].machine
    epoch, number = one.epoch, one.round
    world.run(40.0)
    assert one.round >= number + 10
    assert one.epoch == epoch


# ── what is inside ───────────────────────────────────────────────────────────────────────
def test_coverage_says_since_when_everything_is_inside_and_never_too_much() -> None:
    for seed in range(500):
        rng = random.Random(seed)
        units = rng.randint(1, 12)
        cut = Fragments.cut([1] * units, rng.randint(1, units))
        coverage = Coverage(cut)
        latest = dict.fromkeys(range(units), -1)
        for number in range(60):
            part = rng.choice([0, 1, 1, 1]) * rng.getrandbits(units) if rng.random() < 0.5 else -1
            for unit in cut.of(number):
                if part >> unit & 1:
                    latest[unit] = number
            coverage.add(number, part & ((1 << units) - 1))
            assert coverage.since <= min(latest.values()), f"seed {seed}"
        for number in range(60, 60 + cut.count):
            coverage.add(number, (1 << units) - 1)
        assert coverage.since == 60, f"seed {seed}"


def test_a_standing_without_fragments_exchanges_everything() -> None:
    config = GroupConfig(run=RUN, units=7)
    assert config.exchanged(3) == range(7)
    assert dataclasses.replace(config, fragments=Fragments((0, 3, 7))).exchanged(3) == range(3, 7)
