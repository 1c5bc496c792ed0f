"""Everybody elects the same peers, in proportion to what they can carry, and losses move little."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Callable

import pytest

from protocols.election import (
    WEIGHT_RATIO_MAX,
    _uniform,
    candidates,
    fair,
    fault_in,
    make_plan,
    revise_plan,
    spans_of,
)
from protocols.messages import Plan, Seat, Span
from protocols.types import Digest, GroupName
from tests.protocols.samples import GROUP, RUN, peer, seats

WEIGHTS = [1, 1, 50, 1000, 10_000, 10_000, 20_000, 100_000, 2**31]


def some_seats(rng: random.Random) -> list[Seat]:
    made = seats([rng.choice(WEIGHTS) for _ in range(rng.randint(1, 16))])
    rng.shuffle(made)
    return made


def plan_of(among: list[Seat], units: int, aggregators_max: int, epoch: int = 3) -> Plan:
    return make_plan(
        run=RUN, group=GROUP, epoch=epoch, round=7, seats=among, units=range(units),
        aggregators_max=aggregators_max, train_ms=5000, exchange_ms=9000, digest=Digest(bytes(32)),
    )  # fmt: skip


def revised(plan: Plan, among: list[Seat], benched: set[str], epoch: int) -> Plan:
    return revise_plan(
        plan, epoch=epoch, seats=among, benched={p for p in plan.peers if p in benched},
        train_ms=100, exchange_ms=9000,
    )  # fmt: skip


def test_the_order_of_the_seats_does_not_matter() -> None:
    for seed in range(1000):
        rng = random.Random(seed)
        among = some_seats(rng)
        units, most = rng.randint(1, 500), rng.randint(1, 16)
        plan = plan_of(among, units, most)
        order = candidates(GROUP, 5, among)
        assert sorted(order) == sorted(s.peer for s in among)
        for _ in range(3):
            rng.shuffle(among)
            assert plan_of(among, units, most) == plan, f"seed {seed}"
            assert candidates(GROUP, 5, among) == order, f"seed {seed}"


def test_a_peer_that_goes_changes_nobody_elses_place() -> None:
    for seed in range(1000):
        rng = random.Random(seed)
        among = some_seats(rng)
        gone = rng.choice(among)
        for slot in range(4):
            order = candidates(GROUP, slot, among)
            rest = [s for s in among if s != gone]
            assert candidates(GROUP, slot, rest) == [p for p in order if p != gone.peer], seed


def test_service_is_in_proportion_to_weight() -> None:
    """First places over 6,000 groups; 0.03 is more than four standard deviations."""
    among = seats([10, 20, 30, 40])
    firsts = Counter(candidates(GroupName(f"site:{i}"), 0, among)[0] for i in range(6000))
    for seat in among:
        assert firsts[seat.peer] / 6000 == pytest.approx(seat.weight / 100, abs=0.03)


def test_the_slots_of_a_group_are_served_independently() -> None:
    among = seats([1] * 8)
    firsts = Counter(candidates(GROUP, slot, among)[0] for slot in range(4000))
    for seat in among:
        assert firsts[seat.peer] / 4000 == pytest.approx(1 / 8, abs=0.025)


@pytest.mark.parametrize("raw", [bytes(32), b"\xff" * 32, b"\x80" + bytes(31)])
def test_no_hash_gives_a_score_that_is_none(raw: bytes) -> None:
    assert 0.0 < _uniform(raw) < 1.0


def test_spans_cover_every_unit_once_and_nobody_serves_two() -> None:
    for seed in range(3000):
        rng = random.Random(seed)
        among = some_seats(rng)
        units, most = rng.choice([1, 2, 3, 17, 1000, 2**22]), rng.randint(1, 16)
        spans = spans_of(GROUP, among, range(units), most, 3)
        able = [s for s in among if s.weight > 1] or among
        assert len(spans) == min(len(able), units, most), f"seed {seed}"
        assert len({s.aggregator for s in spans}) == len(spans), f"seed {seed}"
        assert {s.aggregator for s in spans} <= {s.peer for s in among}
        assert spans[0].start == 0, f"seed {seed}"
        assert spans[-1].stop == units, f"seed {seed}"
        assert all(a.stop == b.start for a, b in itertools.pairwise(spans)), seed
        assert all(s.start < s.stop for s in spans), f"seed {seed}: an empty span"


def test_spans_are_as_large_as_their_aggregators_are_strong() -> None:
    """Within one unit per span that had to be kept from being empty, plus one for rounding."""
    for seed in range(1000):
        rng = random.Random(seed)
        among = some_seats(rng)
        units = rng.randint(100, 10_000)
        spans = spans_of(GROUP, among, range(units), 16, 3)
        weight = {s.peer: s.weight for s in fair(among)}
        total = sum(weight[s.aggregator] for s in spans)
        for span in spans:
            share = units * weight[span.aggregator] / total
            assert abs(span.stop - span.start - share) <= len(spans) + 1, f"seed {seed}"


def test_whoever_boasts_gets_a_few_shares_and_not_all_of_them() -> None:
    for others in (3, 7, 15):
        among = seats([50_000] * others + [2**31])
        liar = among[-1].peer
        spans = {s.aggregator: s.stop - s.start for s in spans_of(GROUP, among, range(9000), 16, 3)}
        assert spans[liar] <= 9000 * WEIGHT_RATIO_MAX / (WEIGHT_RATIO_MAX + others) + others + 1
        assert min(spans.values()) >= 9000 / (WEIGHT_RATIO_MAX + others) - 1
    low = seats([1, 1, 1, 40_000, 40_000])
    assert fair(low) == low, "who can't be reached says nothing about the usual"
    assert fair(seats([0, 0, 1])) == seats([0, 0, 1])


def test_a_revision_moves_only_the_spans_of_those_who_went() -> None:
    for seed in range(2000):
        rng = random.Random(seed)
        among = some_seats(rng)
        plan = plan_of(among, rng.randint(1, 200), rng.randint(1, 16))
        stay = [s for s in among if rng.random() < 0.7] or among[:1]
        joined = [Seat(peer(100 + i), 10_000) for i in range(rng.randint(0, 2))]
        benched = {s.peer for s in stay if rng.random() < 0.2}
        after = revised(plan, stay + joined, {*benched}, epoch=9)
        able = {s.peer for s in stay + joined} - benched or {s.peer for s in stay + joined}
        assert after.round == plan.round
        assert after.digest == plan.digest
        for old, new in zip(plan.spans, after.spans, strict=True):
            assert (old.start, old.stop) == (new.start, new.stop), f"seed {seed}"
            if old.aggregator in able:
                assert new == old, f"seed {seed}: moved without need"
            else:
                assert new.aggregator in able, f"seed {seed}"
                assert new.since_epoch == 9, f"seed {seed}"


def test_every_plan_that_is_made_is_believed() -> None:
    for seed in range(2000):
        rng = random.Random(seed)
        among = some_seats(rng)
        units, most = rng.randint(1, 200), rng.randint(1, 16)
        plan = plan_of(among, units, most)
        assert fault_in(plan, range(units), most, revises=False) is None, f"seed {seed}"
        for epoch in (4, 5, 8):
            stay = [s for s in among if rng.random() < 0.7] or among[:1]
            benched = {str(s.peer) for s in stay if rng.random() < 0.2}
            plan = revised(plan, stay, benched, epoch)
            assert fault_in(plan, range(units), most, revises=True) is None, f"seed {seed}"


def test_a_revision_is_believed_by_one_who_never_saw_what_it_revises() -> None:
    """It came back between the two, and both aggregators had gone in the meantime."""
    moved = 0
    for seed in range(2000):
        rng = random.Random(seed)
        plan = plan_of(some_seats(rng), 200, 3)
        gone = {span.aggregator for span in plan.spans}
        stay = [seat for seat in plan.roster if seat.peer not in gone]
        if stay:
            again = revised(plan, stay, set(), epoch=9)
            moved += again.spans != spans_of(GROUP, again.roster, range(200), 3, 9)
            assert fault_in(again, range(200), 3, revises=False) is None, f"seed {seed}"
    assert moved > 100, "as if each were a round's first plan"


def swap_spans(plan: Plan) -> Plan:
    a, b, *rest = plan.spans
    swapped = (
        dataclasses.replace(a, aggregator=b.aggregator),
        dataclasses.replace(b, aggregator=a.aggregator),
    )
    return dataclasses.replace(plan, spans=(*swapped, *rest))


def grab_span(plan: Plan) -> Plan:
    """Everything to one peer."""
    mine = plan.spans[0].aggregator
    spans = tuple(dataclasses.replace(s, aggregator=mine) for s in plan.spans)
    return dataclasses.replace(plan, spans=spans)


def with_span(index: int, **changes: object) -> Callable[[Plan], Plan]:
    def change(plan: Plan) -> Plan:
        spans = list(plan.spans)
        spans[index] = dataclasses.replace(spans[index], **changes)  # type: ignore[arg-type]
        return dataclasses.replace(plan, spans=tuple(spans))

    return change


def with_plan(**changes: object) -> Callable[[Plan], Plan]:
    return lambda plan: dataclasses.replace(plan, **changes)  # type: ignore[arg-type]


TAMPERINGS: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "nobody": (with_plan(roster=()), "roster"),
    "out of order": (lambda p: dataclasses.replace(p, roster=p.roster[::-1]), "roster"),
    "twice": (lambda p: dataclasses.replace(p, roster=(p.roster[0], *p.roster)), "roster"),
    "no spans": (with_plan(spans=()), "spans"),
    "too many spans": (
        with_plan(spans=tuple(Span(i * 5, i * 5 + 5, peer(0), 3) for i in range(5))),
        "too many",
    ),
    "a hole": (with_span(1, start=90), "cover"),
    "an overlap": (with_span(1, start=0), "cover"),
    "a late start": (with_span(0, start=1), "cover"),
    "an early end": (with_span(-1, stop=99), "cover"),
    "past the end": (with_span(-1, stop=101), "cover"),
    "an empty span": (with_span(0, stop=0), "cover"),
    "backwards": (with_span(0, start=0, stop=-1), "cover"),
    "one span only": (lambda p: dataclasses.replace(p, spans=p.spans[:1]), "cover"),
    "a stranger aggregates": (with_span(0, aggregator=peer(99)), "outside"),
    "an aggregator was taken out": (
        lambda p: dataclasses.replace(
            p, roster=tuple(s for s in p.roster if s.peer != p.spans[0].aggregator)
        ),
        "outside",
    ),
    "from the future": (with_span(0, since_epoch=4), "later epoch"),
}
ELECTIONS: dict[str, Callable[[Plan], Plan]] = {
    "swapped": swap_spans,
    "grabbed": grab_span,
    "another cut": lambda p: with_span(1, start=p.spans[0].stop - 1)(
        with_span(0, stop=p.spans[0].stop - 1)(p)
    ),
    "another group": with_plan(group=GroupName("site:other")),
    "heavier": lambda p: dataclasses.replace(
        p, roster=tuple(dataclasses.replace(s, weight=s.weight * 50 + 1) for s in p.roster[:3])
        + p.roster[3:],
    ),
    "smaller roster": lambda p: dataclasses.replace(
        p, spans=(Span(0, 100, p.spans[1].aggregator, 3),)
    ),
}  # fmt: skip


@pytest.mark.parametrize("revises", [False, True])
@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_plan_with_broken_spans_or_roster_is_never_believed(name: str, revises: bool) -> None:
    tamper, reason = TAMPERINGS[name]
    plan = plan_of(seats([10, 10, 20, 20, 30, 30]), 100, 4)
    assert fault_in(plan, range(100), 4, revises=revises) is None
    assert reason in (fault_in(tamper(plan), range(100), 4, revises=revises) or "believed")


@pytest.mark.parametrize("name", ELECTIONS)
def test_nobody_appoints_himself(name: str) -> None:
    plan = plan_of(seats([10, 10, 20, 20, 30, 30]), 100, 4)
    fault = fault_in(ELECTIONS[name](plan), range(100), 4, revises=False)
    assert fault == "aggregators that nobody elected"


def test_random_tampering_with_a_fresh_plan_is_refused() -> None:
    """Any change to any span of a fresh plan shows."""
    for seed in range(2000):
        rng = random.Random(seed)
        among = some_seats(rng)
        units, most = rng.randint(2, 200), rng.randint(1, 16)
        plan = plan_of(among, units, most)
        index = rng.randrange(len(plan.spans))
        span = plan.spans[index]
        change: dict[str, object] = rng.choice(
            [
                {"start": span.start + rng.choice([-1, 1])},
                {"stop": span.stop + rng.choice([-1, 1])},
                {"aggregator": peer(50)},
            ]
        )
        bad = with_span(index, **change)(plan)
        assert fault_in(bad, range(units), most, revises=False) is not None, f"seed {seed}"


def test_who_cannot_be_reached_serves_nothing_while_somebody_can() -> None:
    for able in range(1, 6):
        among = seats([20_000] * able + [1] * (6 - able))
        open_ = {seat.peer for seat in among[:able]}
        assert {span.aggregator for span in spans_of(GROUP, among, range(1000), 8, 1)} == open_
        for slot in range(20):
            assert set(candidates(GROUP, slot, among)[:able]) == open_
    alone = spans_of(GROUP, seats([1] * 6), range(1000), 8, 1)
    assert len({span.aggregator for span in alone}) == 6
    rather_than_the_benched = seats([0, 1])
    spans = spans_of(GROUP, rather_than_the_benched, range(9), 8, 1)
    assert [span.aggregator for span in spans] == [rather_than_the_benched[1].peer]
