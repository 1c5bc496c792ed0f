"""Promises of gossip between groups, over many seeds: both sides or neither, and each once."""

from __future__ import annotations

from statistics import pstdev

import pytest

from protocols import limits
from protocols.gossip_events import MixCommitted, MixLost, MixReturned, MixSettled
from tests.sim.gossip_world import GossipWorld, Group

FAR = 10**12


def settled(world: GossipWorld) -> None:
    """Begin nothing new, let what is under way end, and look that nothing is left."""
    world.quiet = True
    world.loss = min(world.loss, 0.2)
    world.crash = 0.0
    world.run(900)
    world.check()
    assert not world.outstanding(), f"seed {world.seed}"
    for member in world.peers.values():
        if member.alive:
            assert not member.machine.debts, f"seed {world.seed}"
            assert not member.machine.carried, f"seed {world.seed}"
            assert not member.payloads, f"seed {world.seed}"


def two_groups(seed: int, size: int = 3, **how: float) -> tuple[GossipWorld, Group, Group]:
    world = GossipWorld(seed, **how)  # type: ignore[arg-type]
    units = world.config.units
    a = world.add_group("a", size, [FAR + unit for unit in range(units)])
    b = world.add_group("b", size, [-FAR] * units)
    return world, a, b


def test_two_groups_meet_in_the_middle() -> None:
    world, a, b = two_groups(1)
    before = world.mass()
    world.run(600)
    assert world.mass() == before
    assert max(abs(x - y) for x, y in zip(a.head.values, b.head.values, strict=True)) < FAR / 1e5
    settled(world)
    assert world.mass() == before
    told = [type(event) for _, event in world.told]
    assert {MixCommitted, MixReturned, MixSettled} <= set(told)
    assert MixLost not in told
    assert not world.refusals


@pytest.mark.parametrize("seed", range(6))
def test_mass_is_conserved_to_the_last_digit_under_loss_and_crashes(seed: int) -> None:
    """Initiator, lender, aggregator, payer: any of them dies at any moment."""
    fragments = (1, 2, 6)[seed % 3]
    world = GossipWorld(seed, loss=0.25, crash=0.5 / fragments, every=2, fragments=fragments)
    for index in range(5):
        values = [world.rng.randrange(-FAR, FAR) for _ in range(world.config.units)]
        world.add_group(f"g{index}", world.rng.randint(2, 5), values)
    before = world.mass()
    for _ in range(12):
        world.run(60)
        world.check()
        assert world.mass() == before, f"seed {seed}"
    settled(world)
    assert world.mass() == before
    assert not any(isinstance(event, MixLost) for _, event in world.told), f"seed {seed}"
    mixes = {mix for group in world.groups.values() for mix, _ in group.applied}
    assert len(mixes) > 30, f"seed {seed}: {len(mixes)} mixes are no test"


def test_groups_that_all_begin_at_once_do_not_block_or_swap() -> None:
    """Two loners ask each other in the same moment, each time: one lends, and they meet."""
    for seed in range(20):
        world, a, b = two_groups(seed, size=1, every=1)
        a.round_s = b.round_s = 5.0
        world.run(200)
        gap = max(abs(x - y) for x, y in zip(a.head.values, b.head.values, strict=True))
        assert gap < FAR / 100, f"seed {seed}"


def test_a_member_that_heals_to_a_state_without_the_mix_owes_nothing() -> None:
    world, a, b = two_groups(3, size=3)
    before = world.mass()
    first = a.living[0].state.copy()
    world.run(300)
    assert sum(a.applied.values()) > 0
    debtor = next(m for m in [*a.living, *b.living] if m.machine.debts or m.machine.carried)
    donor = debtor.group.living[0]
    donor_now, donor.state = donor.state, first
    world.heal(debtor, donor)
    assert not debtor.machine.debts
    donor.state = donor_now
    debtor.state = donor_now.copy()
    settled(world)
    assert world.mass() == before


def test_a_debt_to_a_group_that_is_gone_is_said_to_be_lost() -> None:
    world, a, b = two_groups(5)
    while not any(m.machine.debts for m in [*a.living, *b.living]):
        world.run(1)
    debtor = next(g for g in (a, b) if any(m.machine.debts for m in g.living))
    for member in (b if debtor is a else a).living:
        world.kill(member)
    world.run(limits.DEBT_TIMEOUT_S + 600)
    lost = [event for _, event in world.told if isinstance(event, MixLost)]
    assert lost
    assert {event.units for event in lost} == {2}
    assert not any(m.machine.debts for m in debtor.living)


def test_no_gossip_means_none() -> None:
    world, a, b = two_groups(7, every=0)
    world.run(300)
    assert a.head.values[0] == FAR
    assert b.head.values[0] == -FAR
    assert not world.told


def test_a_slot_begins_once_in_every_so_many_rounds() -> None:
    world, a, b = two_groups(9, every=4)
    world.run(400)
    rounds = len(a.log) + len(b.log)
    mixes = {mix for group in (a, b) for mix, _ in group.applied}
    assert 0.3 * 3 * rounds / 4 < len(mixes) <= 3 * (rounds / 4 + 2)


def test_many_groups_agree_without_anybody_who_knows_them_all() -> None:
    world = GossipWorld(11, every=2, loss=0.05)
    for index in range(24):
        values = [world.rng.randrange(-FAR, FAR) for _ in range(world.config.units)]
        world.add_group(f"g{index}", 2, values)
    before, spread = world.mass(), pstdev(g.head.values[0] for g in world.groups.values())
    world.run(600)
    assert world.mass() == before
    for unit in range(world.config.units):
        assert pstdev(g.head.values[unit] for g in world.groups.values()) < 0.01 * spread
