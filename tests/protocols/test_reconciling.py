"""Partitions that end, and peers that come at the worst of times."""

from __future__ import annotations

import math

import pytest

from protocols.events import (
    Agreed,
    Effect,
    FetchState,
    OutcomeHeld,
    PlanAdopted,
    StateReady,
)
from protocols.membership import Neighbour
from protocols.messages import OUTCOME_DOMAIN, OutcomeHeader
from protocols.records import sign
from protocols.types import Digest
from tests.protocols.test_group import check_invariants, gets_in_step, reach, rounds
from tests.sim.world import Peer, World


def fetches(peers: list[Peer], since_s: float) -> list[tuple[Peer, FetchState]]:
    return [(p, e) for p in peers for t, e in p.told if t >= since_s and isinstance(e, FetchState)]


@pytest.mark.parametrize("seed", range(4))
def test_halves_that_both_went_on_know_since_when(seed: int) -> None:
    """The smaller half takes the larger one's state, and keeps what it did since they parted."""
    world = World(seed)
    peers = [world.add(i) for i in range(5)]
    world.run(22.0 + seed)
    few, most = peers[:2], peers[2:]
    common = min(rounds(p) for p in peers)
    world.partition(few, most, 45.0)
    world.run(world.now_s + 44.0)
    assert all(rounds(p) >= common + 4 for p in peers), "both halves went on"
    assert few[0].history != most[0].history
    start_s = world.now_s
    assert world.run_until(lambda: len({p.history for p in peers}) == 1, 40.0)
    found = fetches(peers, start_s)
    assert {p.id for p, _ in found} == {p.id for p in few}, "the majority keeps what it has"
    for _, effect in found:
        assert effect.parted is not None
        assert common - 1 <= effect.parted <= common + 1
    check_invariants(world)


@pytest.mark.parametrize("seed", range(3))
def test_a_peer_that_computed_wrongly_keeps_nothing(seed: int) -> None:
    """It shared the plan of those who now have another state, so its own is no history."""
    world = World(seed)
    peers = [world.add(i) for i in range(4)]
    world.run(21.0)
    broken = peers[seed]
    done = broken.history[-1]
    broken.history = (*broken.history[:-1], type(done)(done.round, ()))  # a bit that flipped
    start_s = world.now_s
    assert world.run_until(lambda: bool(fetches([broken], start_s)), 20.0)
    assert [e.parted for _, e in fetches([broken], start_s)] == [None]
    assert gets_in_step(world, 20.0)


def test_a_newcomer_in_a_partition_keeps_nothing_of_what_it_never_had() -> None:
    world = World(5)
    peers = [world.add(i) for i in range(4)]
    world.run(21.0)
    late = world.add(9, fresh=True)
    world.run(21.2)  # its state is on the way
    world.partition([late], peers, 20.0)
    assert reach(world, [late], rounds(peers[0]) + 2, 90.0)
    assert gets_in_step(world, 20.0)
    assert all(e.parted is None for _, e in fetches([late], 0.0))


@pytest.mark.parametrize("phase_s", [0.1, 2.5, 4.2, 4.9, 5.05, 5.3])
def test_a_newcomer_in_the_middle_of_a_round_gets_the_state_of_the_epoch_in_progress(
    phase_s: float,
) -> None:
    world = World(int(10 * phase_s))
    peers = [world.add(i) for i in range(3)]
    assert reach(world, peers[:1], 3, 60.0)
    world.run(world.now_s + phase_s)
    late = world.add(9, fresh=True)
    before = rounds(peers[0])
    assert world.run_until(lambda: late.machine.ready, 10.0)
    assert reach(world, [*peers, late], before + 3, 30.0)
    agreed = [e for _, e in late.told if isinstance(e, Agreed) and len(e.peers) == 4]
    assert agreed, "its digest was never compared with everybody's"
    plans = [e.plan for _, e in late.told if isinstance(e, PlanAdopted)]
    assert late.id in plans[-1].peers
    check_invariants(world)


def test_the_larger_part_does_not_give_way_to_a_smaller_one_that_did_more_rounds() -> None:
    """Just after a round it seems to stand alone: its fellows have yet to apply that round."""
    world = World(3)
    peers = [world.add(i) for i in range(5)]
    assert world.run_until(lambda: min(rounds(p) for p in peers) >= 3, 60.0)
    assert world.run_until(lambda: len({p.history for p in peers}) == 1, 20.0)
    machine = peers[0].machine
    here = machine._here
    first, second, *few = here.members.live(here.group, world.now_s)
    for fellow in (first, second):
        fellow.round, fellow.agreed = here.round - 1, here.round - 1
    for far in few:
        far.round, far.agreed, far.digest = here.round + 1, 1, Digest(b"other".ljust(32))

    def taken() -> list[Neighbour]:
        here.members.version += 1
        return machine._healing.overtaken_by(world.now_s)

    assert not taken()
    first.round, first.agreed = here.round + 1, here.round
    assert taken() == [first], "the fellow that went on, and none of the others"
    first.round = second.round = here.round - 2
    assert {n.record.peer for n in taken()} == {n.record.peer for n in few}


def test_who_took_another_state_is_no_fellow_of_its_old_company() -> None:
    """It would go forth again with those whom it has just left."""
    world = World(3)
    peers = [world.add(i) for i in range(4)]
    assert world.run_until(lambda: min(rounds(p) for p in peers) >= 4, 60.0)
    assert world.run_until(lambda: len({p.history for p in peers}) == 1, 20.0)
    machine = peers[0].machine
    here, healing = machine._here, machine._healing
    mates = here.members.live(here.group, world.now_s)
    for mate in mates:
        mate.round, mate.agreed = here.round + 1, here.round
    old, new = mates[0], mates[1:]

    def overtaken() -> list[Neighbour]:
        here.members.version += 1
        return healing.overtaken_by(world.now_s)

    assert {n.record.peer for n in overtaken()} == {n.record.peer for n in mates}, "all fellows"
    healing._common = 2
    for mate in new:
        mate.digest = Digest(b"theirs".ljust(32))
    machine.handle(StateReady(here.round, Digest(b"theirs".ljust(32))), world.now_s)
    assert [n.agreed for n in mates] == [2, 2, 2]
    assert old.apart
    for mate in new:  # they tell where they stand: where we do
        mate.round = here.round
    here.members.version += 1
    healing.check_digests(world.now_s)
    assert [n.agreed for n in new] == [here.round] * 2
    assert not any(n.apart for n in new)
    assert not overtaken(), "one that is ahead, and of another history, against three of us"


def test_whose_outcome_begins_elsewhere_is_no_fellow() -> None:
    """It stood where we stand, took another state, and is ahead: nobody follows it for that."""
    world = World(4)
    peers = [world.add(i) for i in range(4)]
    assert world.run_until(lambda: min(rounds(p) for p in peers) >= 4, 60.0)
    assert world.run_until(lambda: len({p.history for p in peers}) == 1, 20.0)
    machine = peers[0].machine
    here = machine._here
    here.current = None
    first, *others = here.members.live(here.group, world.now_s)
    for mate in others:
        mate.round, mate.agreed, mate.digest = here.round, here.round, here.digest
    first.round, first.agreed = here.round + 1, here.round
    here.members.version += 1
    assert machine._healing.overtaken_by(world.now_s) == [first]
    header = OutcomeHeader(
        here.config.run, here.group, here.round, 3, 0, 0, 1, (), bytes(32), 1, 0.1,
        b"elsewhere".ljust(32),
    )  # fmt: skip
    signer = next(p.signer for p in peers if p.id == first.record.peer)
    signed = sign(signer, OUTCOME_DOMAIN, header)
    machine.handle(OutcomeHeld(first.record.peer, header, signed, True), world.now_s)
    assert first.apart
    here.members.version += 1
    assert not machine._healing.overtaken_by(world.now_s)


@pytest.mark.parametrize("index", range(3))
def test_what_a_majority_had_does_not_give_way_to_less(index: int) -> None:
    """Of three, one fell silent and the other stands elsewhere, whichever comes first in line."""
    world = World(6)
    peers = [world.add(i) for i in range(3)]
    assert world.run_until(lambda: min(rounds(p) for p in peers) >= 4, 60.0)
    assert world.run_until(lambda: len({p.history for p in peers}) == 1, 20.0)
    machine = peers[index].machine
    here, healing = machine._here, machine._healing
    here.applied_s = world.now_s - 10.0
    here.current = None
    silent, other = here.members.live(here.group, world.now_s)
    silent.suspected = True
    other.agreed, other.round = here.round - 2, here.round
    other.digest = Digest(b"elsewhere".ljust(32))

    def heals(own_firm: int, their_firm: int) -> bool:
        here.firm_round, other.firm = own_firm, their_firm
        here.members.version += 1
        healing._fetch, healing._compared = None, None
        return any(isinstance(e, FetchState) for e in healing.check_digests(world.now_s))

    parted = here.round - 2
    assert not heals(here.round - 1, parted)
    assert heals(parted, here.round - 1)
    assert heals(parted, parted) == heals(parted - 1, parted), "what both had counts for neither"

    other.round = here.round + 1  # the same where it is ahead of us ...
    here.firm_round, other.firm = here.round - 1, parted
    here.members.version += 1
    assert not healing.overtaken_by(world.now_s)
    here.firm_round, other.firm = parted, here.round - 1
    assert healing.overtaken_by(world.now_s) == [other]

    other.round = here.round - 1  # ... and where it is behind
    here.previous = None
    for step in range(8):
        here.members.version += 1
        other.next_s = world.now_s + 0.5 * step
        stepped = healing.step_back(world.now_s + 0.5 * step)
    assert stepped
    healing._fetch = None
    here.firm_round = here.round
    assert not healing.step_back(world.now_s + 4.0)


def test_who_is_apart_steps_back_however_short_rounds_are() -> None:
    """A majority with fewer rounds is at one state only between two of them."""
    world = World(3)
    peers = [world.add(i) for i in range(3)]
    assert world.run_until(lambda: min(rounds(p) for p in peers) >= 6, 60.0)
    assert world.run_until(lambda: len({p.history for p in peers}) == 1, 20.0)
    machine = peers[0].machine
    here, healing = machine._here, machine._healing
    here.current = here.previous = None
    others = here.members.live(here.group, world.now_s)
    found: list[Effect] = []
    begin_s = math.ceil(world.now_s)  # halves of a second are exact from there
    for step in range(12):
        for index, other in enumerate(others):  # in step at every other look
            other.round = here.round - 4 + (index * step) % 2
            other.agreed, other.digest = 1, Digest(bytes(31) + bytes([other.round]))
            other.next_s = begin_s + 0.5 * step  # it lives
        here.members.version += 1
        found = healing.step_back(begin_s + 0.5 * step)
        assert bool(found) == (step >= 6 and step % 2 == 0), step
        if found:
            break
    assert isinstance(found[0], FetchState)
    assert found[0].step_back
