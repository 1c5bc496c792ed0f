"""Groups part, join and lose members to nearer ones while rounds go on, and nobody loses work."""

from __future__ import annotations

from collections import Counter

from tests.protocols.test_group import check_invariants, reach, rounds
from tests.sim.world import Peer, World


def groups(world: World) -> dict[str, list[Peer]]:
    found: dict[str, list[Peer]] = {}
    for peer in world.living:
        found.setdefault(peer.machine.group, []).append(peer)
    return found


def come_to(world: World, count: int, within_s: float) -> bool:
    """That many groups, and no more and no fewer."""
    return world.run_until(lambda: len(groups(world)) == count, within_s)


def stands_in(world: World, peer: Peer, group: str, within_s: float) -> bool:
    return world.run_until(lambda: peer.machine.group == group, within_s)


def catches_up(world: World, peer: Peer, other: Peer, within_s: float) -> bool:
    return world.run_until(lambda: peer.history == other.history, within_s)


def each_in_step(world: World, within_s: float = 10.0) -> bool:
    """At some instant soon all members of every group hold the same history."""
    return world.run_until(
        lambda: all(len({p.history for p in members}) == 1 for members in groups(world).values()),
        within_s,
    )


def goes_on(world: World, count: int = 4) -> bool:
    """Every peer gets `count` rounds further in the time that so many rounds take, and some."""
    return reach(
        world, world.living, max(map(rounds, world.living)) + count, (count + 5) * world.round_s
    )


def test_a_site_with_too_many_peers_parts_and_both_halves_go_on() -> None:
    for seed in range(3):
        world = World(seed, members_max=8)
        peers = [world.add(i) for i in range(7)]
        world.run(30.0)
        before = max(map(rounds, peers))
        assert before >= 3, f"seed {seed}"
        late = [world.add(7 + i, fresh=True) for i in range(5)]
        assert come_to(world, 2, 60.0), f"seed {seed}"
        world.run(world.now_s + 20.0)
        sizes = sorted(len(members) for members in groups(world).values())
        assert sum(sizes) == 12
        assert sizes[0] >= 3, f"seed {seed}: {sizes}"
        assert sizes[1] <= 8, f"seed {seed}: {sizes}"
        assert goes_on(world), f"seed {seed}"
        assert each_in_step(world), f"seed {seed}"
        assert all(p.machine.group.startswith("site:a") for p in peers + late)
        kept = [p for p in world.living if len(p.history) > before]
        assert len(kept) == 12, f"seed {seed}: somebody lost its history"
        check_invariants(world)


def test_twenty_at_once_become_groups_of_the_allowed_size() -> None:
    world = World(5, members_max=6)
    for i in range(20):
        world.add(i)
    world.run(90.0)
    sizes = Counter(p.machine.group for p in world.living)
    assert max(sizes.values()) <= 6, sizes
    assert min(sizes.values()) >= 2, sizes
    assert goes_on(world, 2)
    check_invariants(world)


def test_a_peer_whose_link_changed_goes_over_to_those_who_are_near_now() -> None:
    for seed in range(2):
        world = World(seed)
        east = [world.add(i, site="", place=(0.0, 0.001 * i)) for i in range(3)]
        west = [world.add(10 + i, site="", place=(0.15, 0.001 * i)) for i in range(3)]
        world.run(60.0)
        assert len(groups(world)) == 2, f"seed {seed}: {groups(world).keys()}"
        mover = east[1]
        old = mover.machine.group
        world.places[mover.id] = (0.15, 0.004)
        there = west[0].machine.group
        assert there != old
        assert stands_in(world, mover, there, 1200.0), f"seed {seed}"
        assert catches_up(world, mover, west[0], 30.0), f"seed {seed}"
        assert goes_on(world), f"seed {seed}"
        assert each_in_step(world), f"seed {seed}"
        latest = mover.history[-1]
        assert any(mover.id in {p for p, *_ in inside} for _, _, inside in latest.inside)
        assert all(p.machine.group == old for p in east if p is not mover)
        check_invariants(world)


def test_two_small_groups_that_turn_out_to_be_neighbours_become_one() -> None:
    for seed in range(2):
        world = World(seed)
        left = [world.add(i, site="", place=(0.0, 0.001 * i)) for i in range(2)]
        right = [world.add(10 + i, site="", place=(0.004, 0.001 * i)) for i in range(3)]
        world.partition(left, right, 60.0)
        world.run(60.0)
        assert len(groups(world)) == 2, f"seed {seed}"
        assert come_to(world, 1, 1200.0), f"seed {seed}"
        assert goes_on(world), f"seed {seed}"
        assert each_in_step(world), f"seed {seed}"
        check_invariants(world)


def test_who_has_nobody_near_joins_somebody_far_in_the_end() -> None:
    world = World(1)
    peers = [world.add(i, site="", place=(0.12 * i, 0.0)) for i in range(2)]
    world.run(30.0)
    assert len(groups(world)) == 2
    assert come_to(world, 1, 90.0)
    assert goes_on(world)
    assert each_in_step(world)
    assert peers[0].history == peers[1].history


def test_well_placed_peers_stay_where_they_are() -> None:
    world = World(2)
    for i in range(3):
        world.add(i, site="", place=(0.002 * i, 0.0))
        world.add(10 + i, site="", place=(0.002 * i, 0.08))
    world.run(60.0)
    before = {p.id: p.machine.group for p in world.living}
    assert len(set(before.values())) == 2
    world.run(400.0)
    assert {p.id: p.machine.group for p in world.living} == before
    check_invariants(world)
