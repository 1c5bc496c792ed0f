"""Promises of the group machine, in virtual time, over many seeds."""

from __future__ import annotations

import random
from functools import partial

import pytest

from protocols.events import Agreed, PlanAdopted
from tests.sim.world import Peer, World


def rounds(peer: Peer) -> int:
    return peer.machine.round


def in_step(world: World) -> bool:
    """All living peers hold the same history."""
    return len({p.history for p in world.living}) == 1


def gets_in_step(world: World, within_s: float = 5.0) -> bool:
    """At some instant soon, that is: while a round is being applied, some are one ahead."""
    return world.run_until(lambda: in_step(world), within_s)


def reach(world: World, peers: list[Peer], number: int, within_s: float) -> bool:
    """Everyone in `peers` gets to round `number` in time."""
    return world.run_until(lambda: min(rounds(p) for p in peers) >= number, within_s)


def restart(world: World, index: int) -> None:
    world.add(index, fresh=True)


def check_invariants(world: World) -> None:
    """What must hold in every history, whatever happened."""
    for peer in world.peers.values():
        numbers = [a.round for a in peer.history]
        assert numbers == list(range(len(numbers))), f"seed {world.seed}: a gap in the history"
        seen: set[tuple[object, int, int]] = set()
        for applying in peer.history:
            edge = 0
            for start, stop, inside in applying.inside:
                assert start == edge, f"seed {world.seed}: units not covered"
                edge = stop
                for contributor, number, units in inside:
                    assert set(units) <= set(range(start, stop))
                    for unit in units:
                        key = (contributor, number, unit)
                        assert key not in seen, f"seed {world.seed}: applied twice: {key}"
                        seen.add(key)


def test_four_peers_average_together_and_agree_each_round() -> None:
    world = World(1)
    peers = [world.add(i) for i in range(4)]
    world.run(60.0)
    assert all(rounds(p) >= 8 for p in peers)
    assert gets_in_step(world)
    last = peers[0].history[-2]
    assert all(len(inside) == 4 for _, _, inside in last.inside)
    assert any(isinstance(e, Agreed) and len(e.peers) == 4 for _, e in peers[0].told)
    check_invariants(world)


def test_a_peer_alone_trains_on() -> None:
    world = World(2)
    peer = world.add(0)
    world.run(60.0)
    assert rounds(peer) >= 9


def test_rounds_are_paced_by_time() -> None:
    world = World(3, round_s=5.0)
    peers = [world.add(i) for i in range(3)]
    world.run(105.0)
    assert 18 <= rounds(peers[0]) <= 22


def test_a_stable_roster_keeps_its_epoch() -> None:
    world = World(4)
    peers = [world.add(i) for i in range(4)]
    world.run(20.0)
    before = peers[0].machine.epoch
    world.run(100.0)
    assert peers[0].machine.epoch == before


def test_a_newcomer_contributes_within_two_rounds() -> None:
    world = World(5)
    peers = [world.add(i) for i in range(3)]
    world.run(31.0)
    late = world.add(9, fresh=True)
    world.run(31.0 + 2 * 5.0 + 2.0)
    inside = {c for a in peers[0].history for _, _, part in a.inside for c, _, _ in part}
    assert late.id in inside
    world.run(60.0)
    assert gets_in_step(world)


def test_a_fresh_peer_is_never_a_donor() -> None:
    world = World(6)
    a, b = world.add(0, fresh=True), world.add(1, fresh=True)
    world.run(30.0)
    assert not a.machine.ready
    assert not b.machine.ready
    founder = world.add(2)
    world.run(60.0)
    assert gets_in_step(world)
    assert rounds(founder) > 3


def test_two_sites_train_independently_and_survive_each_other() -> None:
    world = World(7)
    a = [world.add(i, site="a") for i in range(2)]
    b = [world.add(i, site="b") for i in range(2, 4)]
    world.run(40.0)
    assert a[0].history == a[1].history
    assert b[0].history == b[1].history
    inside = {c for applying in a[0].history for _, _, part in applying.inside for c, _, _ in part}
    assert inside <= {a[0].id, a[1].id}
    before = rounds(b[0])
    for peer in a:
        world.crash(peer)
    world.run(80.0)
    assert rounds(b[0]) >= before + 6
    assert b[0].history == b[1].history


@pytest.mark.parametrize("phase_s", [0.0, 1.0, 2.5, 4.0, 4.9, 5.0, 5.05, 5.1, 5.15, 5.2, 5.3])
@pytest.mark.parametrize("victim", ["coordinator", "aggregator"])
def test_killing_the_coordinator_or_an_aggregator_costs_no_round(
    phase_s: float, victim: str
) -> None:
    for seed in range(3):
        world = World(seed)
        peers = [world.add(i) for i in range(4)]
        assert reach(world, peers[:1], 3, 60.0)
        world.run(world.now_s + phase_s)
        plans = [e for _, e in peers[0].told if isinstance(e, PlanAdopted)]
        coordinator = plans[-1].plan.spans[0].aggregator
        aggregators = [s.aggregator for s in plans[-1].plan.spans]
        target = coordinator if victim == "coordinator" else aggregators[-1]
        world.crash(world.peers[target])
        survivors = world.living
        before = min(rounds(p) for p in survivors)
        assert reach(world, survivors, before + 2, 22.0), (
            f"seed {seed}: stuck at {[rounds(p) for p in survivors]}"
        )
        world.run(world.now_s + 20.0)
        assert gets_in_step(world), f"seed {seed}"
        assert not any("Differed" in type(e).__name__ for p in survivors for _, e in p.told), (
            f"seed {seed}: somebody had to heal"
        )
        check_invariants(world)


def test_a_frozen_peer_costs_less_than_the_deadline_and_comes_back() -> None:
    for seed in range(8):
        world = World(seed)
        peers = [world.add(i) for i in range(4)]
        world.run(20.0 + world.rng.uniform(0.0, 5.0))
        frozen = peers[seed % 4]
        others = [p for p in peers if p is not frozen]
        before = rounds(others[0])
        world.freeze(frozen, 25.0)
        world.run(world.now_s + 20.0)
        assert all(rounds(p) >= before + 2 for p in others), f"seed {seed}"
        assert len({p.history for p in others}) == 1, f"seed {seed}"
        world.run(world.now_s + 40.0)
        assert gets_in_step(world), f"seed {seed}: {[rounds(p) for p in peers]}"
        check_invariants(world)


def test_a_partition_heals() -> None:
    for seed in range(8):
        world = World(seed)
        peers = [world.add(i) for i in range(5)]
        world.run(20.0 + world.rng.uniform(0.0, 5.0))
        world.partition(peers[:2], peers[2:], 30.0)
        world.run(world.now_s + 100.0)
        assert gets_in_step(world), f"seed {seed}: {[rounds(p) for p in peers]}"
        assert rounds(peers[0]) > 15, f"seed {seed}"
        check_invariants(world)


def test_a_loner_that_looked_far_away_at_first_joins_its_neighbours_later() -> None:
    for seed in range(4):
        world = World(seed, latency_s=0.1)  # everybody starts on a busy machine ...
        peers = [world.add(i, site="") for i in range(4)]
        world.run(12.0)
        assert len({p.machine.group for p in peers}) == 4, f"seed {seed}"
        world.latency_s = 0.002  # ... that comes to rest
        world.run(60.0)
        assert len({p.machine.group for p in peers}) == 1, f"seed {seed}"
        assert gets_in_step(world), f"seed {seed}"


def chaos(seed: int) -> World:
    """Everything at once: crashes, restarts, freezes, partitions and loss."""
    rng = random.Random(seed)
    world = World(
        seed,
        latency_s=rng.choice([0.005, 0.02, 0.1]),
        loss=rng.choice([0.0, 0.02, 0.1]),
        round_s=rng.choice([3.0, 5.0]),
    )
    count = rng.randint(2, 8)
    for i in range(count):
        world.add(i, speed_s=rng.choice([0.02, 0.3, 1.0]))
    world.run(15.0)
    for _ in range(rng.randint(1, 8)):
        world.run(world.now_s + rng.uniform(0.0, 10.0))
        peer = rng.choice(list(world.peers.values()))
        match rng.randint(0, 3):
            case 0 if len(world.living) > 1 and peer.alive:
                world.crash(peer)
                index = next(i for i in range(count) if list(world.peers).index(peer.id) == i)
                back_s = rng.uniform(0.5, 20.0)
                world.after(back_s, partial(restart, world, index))
            case 1 if peer.alive and not peer.frozen:
                world.freeze(peer, rng.uniform(0.5, 15.0))
            case 2:
                everybody = list(world.peers.values())
                rng.shuffle(everybody)
                cut = rng.randint(1, max(1, len(everybody) - 1))
                world.partition(everybody[:cut], everybody[cut:], rng.uniform(1.0, 20.0))
            case _:
                pass
    return world


def test_whatever_happens_nothing_is_applied_twice_and_everybody_agrees_in_the_end() -> None:
    first = random.SystemRandom().randrange(2**31)
    # 1123788676: two halves took each other's state, and then nobody knew a plan any more.
    for seed in [1123788676, *range(25), *range(first, first + 15)]:
        world = chaos(seed)
        if not any(p.machine.ready for p in world.living):
            continue  # every holder of the state died before anybody else had it
        world.run(world.now_s + 90.0)
        check_invariants(world)
        before = max(rounds(p) for p in world.living)
        assert gets_in_step(world, 30.0), (
            f"seed {seed}: {[(p.id[-4:], rounds(p), p.machine.epoch) for p in world.living]}"
        )
        world.run(world.now_s + 30.0)
        assert max(rounds(p) for p in world.living) >= before + 4, f"seed {seed}: stands still"
