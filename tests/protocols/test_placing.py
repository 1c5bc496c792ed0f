"""A coordinate that creeps when all is well, and is fitted anew when its peer has been moved."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from protocols import limits
from protocols.coordinates import Coordinate, distance_s
from protocols.grouping import propose
from protocols.membership import RTTS_KEPT, Membership
from protocols.placing import NEAR_AGAIN_S, Placing, measured_s, whom_to_measure
from protocols.records import PeerRecord
from protocols.types import GroupName, PeerId
from tests.protocols.samples import peer, record

Point = tuple[float, float]
ACCESS_S = 0.001


class Town:
    """Peers that stand still, in groups, and one that measures them."""

    def __init__(self, seed: int, groups: int = 8, size: int = 6) -> None:
        self.rng = random.Random(seed)
        self.members = Membership(peer(0))
        self.placing = Placing(peer(0), self.members, 0.0)
        self.now_s = 0.0
        self.centres = [
            (self.rng.uniform(0, 0.25), self.rng.uniform(0, 0.25)) for _ in range(groups)
        ]
        self.places: dict[PeerId, Point] = {}
        self.groups: dict[GroupName, list[PeerRecord]] = {}
        for index in range(groups * size):
            x_s, y_s = (v + self.rng.gauss(0, 0.001) for v in self.centres[index % groups])
            group = GroupName(f"near:{index % groups}")
            stood = dataclasses.replace(
                record(index + 1),
                site="",
                group=group,
                coordinate=Coordinate(x_s, y_s, 0.0, ACCESS_S, 0.05),
            )
            self.members.saw(stood, 0.0)
            self.places[stood.peer] = (x_s, y_s)
            self.groups.setdefault(group, []).append(stood)

    def live(self, seconds: float, place: Point, group: GroupName) -> None:
        """Call the group every 5 s, and a stranger every 20 s, from `place`."""
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.now_s += 5.0
            called = [n for n in self.members.everybody() if n.group == group]
            if self.now_s % 20.0 == 0:
                strangers = [n for n in self.members.everybody() if n.group != group]
                near = self.now_s % 40.0 == 0
                at = self.placing.latest
                stranger = whom_to_measure(at, strangers, self.now_s, near=near)
                assert stranger is not None
                called.append(stranger)
            for n in called:
                true_s = math.dist(place, self.places[n.record.peer]) + 2 * ACCESS_S
                n.hailed_s = self.now_s
                self.members.delivered(n.record.peer, true_s * (1 + self.rng.expovariate(8)))
                self.placing.measured(n.record.peer, self.now_s)

    def error_s(self, place: Point) -> float:
        """How far off the usual prediction is."""
        off = sorted(
            abs(distance_s(self.placing.latest, n.record.coordinate or Coordinate()) - true_s)
            for n in self.members.everybody()
            for true_s in [math.dist(place, self.places[n.record.peer]) + 2 * ACCESS_S]
        )
        return off[len(off) // 2]


@pytest.mark.parametrize("seed", range(6))
def test_who_is_moved_finds_its_new_place_and_its_new_neighbours(seed: int) -> None:
    town = Town(seed)
    here = town.centres[0]
    far = max(town.centres, key=lambda c: math.dist(c, here))
    group = GroupName("near:0")
    town.live(900.0, here, group)
    assert town.error_s(here) < 0.02
    town.live(900.0, far, group)  # the machine is elsewhere; its group is where it was
    me = dataclasses.replace(
        record(0), site="", group=group, coordinate=town.placing.latest, company=6
    )
    others = [(n.record, n.group) for n in town.members.everybody()]
    mine = [r for r, g in others if g == group]
    rtts = measured_s(town.members.everybody(), town.now_s)
    wish = propose(me, mine, others, 16, rtts)
    assert wish is not None
    assert (wish.why, wish.group) == ("far", f"near:{town.centres.index(far)}")


def test_a_member_is_measured_as_long_as_one_heartbeat_may_be_lost() -> None:
    town = Town(1)
    who = next(iter(town.places))
    known = town.members.get(who)
    assert known is not None
    known.hailed_s, known.rtt_s = town.now_s, 0.02
    later_s = town.now_s + 1.5 * limits.HEARTBEAT_S_MAX
    assert measured_s([known], later_s, limits.HEARTBEAT_S_MAX) == {who: 0.02}
    assert measured_s([known], later_s) == {}
    assert measured_s([known], later_s + limits.HEARTBEAT_S_MAX, limits.HEARTBEAT_S_MAX) == {}


def test_a_changed_link_is_believed_after_a_few_calls_and_a_busy_machine_never() -> None:
    town = Town(1)
    who = next(iter(town.places))
    known = town.members.get(who)
    assert known is not None
    for rtt_s in (0.02, 0.9, 0.02, 0.4, 0.5):
        town.members.delivered(who, rtt_s)
        assert known.rtt_s == 0.02
    for _ in range(RTTS_KEPT):
        town.members.delivered(who, 0.1)
    assert known.rtt_s == 0.1


def test_coordinates_alone_move_nobody() -> None:
    town = Town(2)
    group = GroupName("near:0")
    far = max(town.centres, key=lambda c: math.dist(c, town.centres[0]))
    at = Coordinate(*far, 0.0, ACCESS_S, 0.05)
    me = dataclasses.replace(record(0), site="", group=group, coordinate=at, company=6)
    others = [(n.record, n.group) for n in town.members.everybody()]
    mine = [r for r, g in others if g == group]
    assert propose(me, mine, others, 16, {}) is None
    there = town.groups[GroupName(f"near:{town.centres.index(far)}")]
    wish = propose(me, mine, others, 16, {r.peer: 0.003 for r in there[:2]})
    assert wish is not None
    assert wish.why == "far"


def test_strangers_are_measured_far_and_near_in_turn() -> None:
    town = Town(3)
    strangers = town.members.everybody()
    at = Coordinate(*town.centres[2], 0.0, ACCESS_S, 0.05)
    near = whom_to_measure(at, strangers, 1000.0, near=True)
    assert near is not None
    assert near.group == "near:2"
    near.hailed_s = 1000.0
    again = whom_to_measure(at, strangers, 1000.0 + NEAR_AGAIN_S / 2, near=True)
    assert again is not near
    for n in strangers:
        n.hailed_s = 500.0
    strangers[7].hailed_s = 3.0
    assert whom_to_measure(at, strangers, 1000.0, near=False) is strangers[7]
    assert whom_to_measure(None, [], 1000.0, near=True) is None
