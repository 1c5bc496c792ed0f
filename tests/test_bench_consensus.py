"""The consensus table: its arithmetic, and that all of it can be measured."""

from __future__ import annotations

import math

import pytest

from tests.bench import consensus
from tests.sim.gossip_world import GossipWorld


def test_a_logarithm_is_fitted_exactly_and_a_power_is_not() -> None:
    sizes = (8, 16, 32, 64, 128)
    intercept, slope, worst = consensus.fit([(n, 5 + 3 * math.log(n)) for n in sizes])
    assert (intercept, slope) == pytest.approx((5, 3))
    assert worst < 1e-9
    assert consensus.fit([(n, float(n)) for n in sizes])[2] > 0.15 * (128 - 8)


def test_what_is_learned_apart_is_no_mass_out_of_nothing() -> None:
    world = GossipWorld(3, units=2, slots=2, every=2, loss=0.2, crash=0.3, coded=0.2)
    for index in range(4):
        world.add_group(f"g{index}", 3, [10**12, -(10**12)])
    before = world.mass()
    world.learn = 1e9
    world.run(100)
    assert sum(map(abs, world.learned)) > 1e9
    assert world.mass() == before
    world.learn = 0.0
    world.run(600)
    world.check()
    assert world.mass() == before
    values = [group.head.values[0] for group in world.groups.values()]
    assert max(values) - min(values) < 1e8


def test_a_quick_run_measures_everything() -> None:
    result = consensus.run(True, 1, lambda _: None)
    assert len({tuple(row) for row in result.rows}) == 1
    assert len(result.rows) == 4
    mass = [bar for bar in result.bars if "mass" in bar.bar]
    assert mass
    assert all(bar.holds for bar in mass)
    assert all(bar.value is not None for bar in result.bars)
