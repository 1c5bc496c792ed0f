"""Who lies where follows from what members measured; who collects, from the plan alone."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter

import pytest

from protocols.election import make_plan
from protocols.messages import Plan, Seat
from protocols.regions import FAR_S, Ways, collectors_of, ways_to, with_regions
from protocols.types import Digest, PeerId
from tests.protocols.samples import GROUP, RUN, peer, seats

NEAR_S, LONG_S = 0.004, 0.08


def told(among: list[Seat], places: list[int], half: random.Random | None) -> dict[PeerId, Ways]:
    """What each measured where only `places` matter; `half`: one of each pair calls."""
    rtts: dict[PeerId, dict[PeerId, float]] = {seat.peer: {} for seat in among}
    for (i, a), (j, b) in itertools.combinations(list(enumerate(among)), 2):
        rtt_s = NEAR_S if places[i] == places[j] else LONG_S
        callers = [(a, b), (b, a)] if half is None else [half.choice([(a, b), (b, a)])]
        for one, other in callers:
            rtts[one.peer][other.peer] = rtt_s
    return {p: ways_to(among, r) for p, r in rtts.items()}


def regions(found: tuple[Seat, ...]) -> list[int]:
    return [seat.region for seat in found]


@pytest.mark.parametrize("seed", range(20))
def test_planted_regions_are_found_whoever_of_each_pair_measures(seed: int) -> None:
    rng = random.Random(seed)
    among = sorted(seats([1000] * rng.randint(4, 16)), key=lambda s: s.peer)
    places = [rng.randrange(rng.randint(1, 4)) for _ in among]
    roster = [seat.peer for seat in among]
    found = with_regions(among, roster, told(among, places, rng))
    for (i, a), (j, b) in itertools.combinations(list(enumerate(found)), 2):
        assert (a.region == b.region) == (places[i] == places[j])
    assert {seat.region for seat in found} == set(range(len(set(places))))


def test_one_place_is_one_region_and_costs_a_heartbeat_nothing() -> None:
    among = seats([1000] * 6)
    ways = told(among, [0] * 6, None)
    assert set(ways.values()) == {Ways()}
    assert regions(with_regions(among, [s.peer for s in among], ways)) == [0] * 6


def test_what_nobody_has_measured_yet_leaves_regions_as_they_were() -> None:
    among = sorted(seats([1000] * 5), key=lambda s: s.peer)
    places = [0, 0, 1, 1, 1]
    roster = [seat.peer for seat in among]
    ways = told(among, places, None)
    before = with_regions(among, roster, ways)
    silent = {p: w for p, w in ways.items() if p != roster[4]}
    assert with_regions(before, roster, silent) == before, "one has not said a word"
    stranger = Seat(peer(99), 1000)
    unknown = {**ways, stranger.peer: Ways(b"", b"\x01")}
    assert with_regions([*before, stranger], roster, unknown) == (*before, stranger)


def test_masks_that_are_cut_short_say_nothing() -> None:
    assert Ways(b"", b"\x01").said(0) is True
    assert Ways(b"\x02", b"\x01").said(1) is False
    assert Ways(b"\x02", b"\x01").said(8) is None
    assert ways_to(seats([1, 1]), {peer(1): FAR_S}).said(1) is True


def plan_of(among: list[Seat], spans: int) -> Plan:
    return make_plan(
        run=RUN, group=GROUP, epoch=3, round=7, seats=among, units=range(64),
        aggregators_max=spans, train_ms=5000, exchange_ms=9000, digest=Digest(bytes(32)),
    )  # fmt: skip


def test_every_far_region_has_one_collector_for_each_span_and_they_take_turns() -> None:
    among = [dataclasses.replace(s, region=i % 2) for i, s in enumerate(seats([1000] * 8))]
    plan = plan_of(among, 8)
    home = {seat.peer: seat.region for seat in plan.roster}
    found = collectors_of(plan)
    for span, collectors in zip(plan.spans, found, strict=True):
        assert set(collectors) == {1 - home[span.aggregator]}
        assert all(home[c] == region for region, c in collectors.items())
    turns = Counter(c for collectors in found for c in collectors.values())
    assert max(turns.values()) - min(turns.values()) <= 1


def test_a_region_of_one_collects_nothing() -> None:
    among = [dataclasses.replace(s, region=int(i == 0)) for i, s in enumerate(seats([1000] * 4))]
    plan = plan_of(among, 4)
    alone = among[0].peer
    for span, collectors in zip(plan.spans, collectors_of(plan), strict=True):
        assert 1 not in collectors
        assert bool(collectors) == (span.aggregator == alone)


def test_without_regions_nobody_collects() -> None:
    assert not any(collectors_of(plan_of(seats([1000] * 8), 8)))


def test_who_cannot_be_reached_or_is_benched_collects_nothing_while_others_can() -> None:
    weights = [1000, 1000, 1000, 1, 1000, 0, 1000, 1]
    among = [dataclasses.replace(s, region=i % 2) for i, s in enumerate(seats(weights))]
    weight = {seat.peer: seat.weight for seat in among}
    for collectors in collectors_of(plan_of(among, 8)):
        assert all(weight[peer] > 1 for peer in collectors.values())
