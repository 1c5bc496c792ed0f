"""Peers behind routers and firewalls of every kind reach each other; real daemons, real kernels.

Each test says what must come about, not how fast: that is `python -m tests.bench ladder`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from peer.net.outside import Verdict
from tests.net.lab_peers import LabPeer, settle, start_all
from tests.netlab import Host, Lab, missing, nat_zoo

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

MEGABYTE = bytes(range(256)) * 2**12


@contextmanager
def people(
    folder: Path, names: list[str], relays: int = 1
) -> Iterator[tuple[Lab, list[LabPeer], dict[str, LabPeer]]]:
    """Relays on open hosts, at port 443, and peers in the zoo that have met the first of them."""
    zoo = nat_zoo(rtt_ms=4)
    extra = tuple(Host(f"relay{i + 1}", "zoo") for i in range(relays))
    hosts = tuple(h for h in zoo.hosts if h.name in names)
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(dataclasses.replace(zoo, hosts=(*extra, *hosts))))
        volunteers = [LabPeer(lab.host(h.name), folder, port=443, relay=True) for h in extra]
        found = {n: LabPeer(lab.host(n), folder) for n in names}
        start_all([*volunteers, *found.values()], stack)
        settle(volunteers, list(found.values()))
        yield lab, volunteers, found


def test_pairs_of_every_kind_talk_and_go_as_directly_as_they_can(tmp_path: Path) -> None:
    with people(tmp_path, ["open1", "cone1", "wall1", "sym1", "web1"]) as (_, _, them):
        reachable = {name for name, peer in them.items() if peer.ladder.reachable}
        assert reachable == {"open1"}
        must_be_direct = [("open1", "sym1"), ("cone1", "wall1"), ("sym1", "open1")]
        for a, b in [*must_be_direct, ("sym1", "web1"), ("web1", "open1"), ("wall1", "sym1")]:
            them[a].meets(them[b])
            them[b].meets(them[a])
            them[a].do(them[a].talk, them[b].id, MEGABYTE)
        for a, b in must_be_direct:
            them[a].until_direct(them[b])
        for a, b in [("sym1", "web1"), ("web1", "open1")]:
            assert them[a].way_to(them[b]) != "direct"
        # A lane was dialled where there is one, and nobody tried where there can be none.
        assert them["sym1"].transport.counters.opened["lane"] == 1
        for name in ("open1", "wall1"):  # a stream does not wait for what its lane comes to
            them[name].until_lanes_failed({"offer": 1})


def test_a_relay_dies_and_another_one_carries_on(tmp_path: Path) -> None:
    with people(tmp_path, ["sym1", "sym2"], relays=2) as (_, relays, them):
        one, two = them["sym1"], them["sym2"]
        both = {relay.id for relay in relays}
        for peer in (one, two):
            peer.until_through(both)
        one.meets(two)
        two.meets(one)
        one.do(one.talk, two.id, MEGABYTE)
        (through,) = {
            end for ends in [one.do(one.ladder.inner.connections)[two.id]] for end in ends
        }
        (dead,) = [relay for relay in relays if relay.id in through]
        dead.kill_daemon()
        one.keep_talking(two, MEGABYTE)
        ends = one.do(one.ladder.inner.connections)[two.id]
        assert not any(dead.id in end for end in ends)


def test_a_pair_that_could_be_direct_later_is(tmp_path: Path) -> None:
    with people(tmp_path, ["cone1", "cone2"]) as (lab, _, them):
        one, two = them["cone1"], them["cone2"]
        lab.cut("cone1", "cone2")
        one.meets(two)
        two.meets(one)
        one.do(one.talk, two.id, MEGABYTE)
        assert one.way_to(two) != "direct"
        lab.heal()
        one.until_direct(two)
        one.do(one.talk, two.id, MEGABYTE)


def test_a_volunteer_that_cannot_be_reached_relays_for_nobody_says_why_and_remembers(
    tmp_path: Path,
) -> None:
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(nat_zoo(rtt_ms=4)))
        relay = LabPeer(lab.host("open1"), tmp_path / "x", port=443, relay=True)
        wall = LabPeer(lab.host("wall1"), tmp_path / "x", relay=True)
        start_all([relay, wall], stack)
        settle([relay], [wall])
        standing = wall.ladder.outside.standing
        assert standing.verdict is Verdict.UNREACHABLE
        assert not standing.relaying
        assert standing.not_relaying == "nobody outside can reach this peer"
        assert any("forward the port" in said for said in wall.said)
        assert relay.ladder.outside.standing.relaying

        # The next time it knows from the start, and need not find it out again.
        wall.close()
        with LabPeer(lab.host("wall1"), tmp_path / "x", relay=True) as again:
            assert again.ladder.inner.posture.private
            assert not again.ladder.reachable
            again.until_settled()
            assert again.ladder.outside.relays() == [relay.id]
