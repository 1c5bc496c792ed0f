"""Routers and firewalls of every kind: what they show, what they let in, what punching opens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.netlab import Forward, Host, Lab, Nat, Route, Spec, nat_zoo, probe

pytestmark = pytest.mark.usefixtures("machine")


@pytest.fixture(scope="module")
def zoo(machine: None) -> Iterator[Lab]:
    with Lab(nat_zoo(rtt_ms=2), seed=3) as lab:
        yield lab


@pytest.fixture(scope="module")
def home(machine: None) -> Iterator[Lab]:
    """Two machines at one router with a forwarded port, and cones that let in more."""
    spec = Spec(
        hosts=(
            Host("open1", "a"),
            Host("open2", "a"),
            Host("home1", "a", nat=Nat.PORT_RESTRICTED, forwards=(Forward(4001, 4000),)),
            Host("home2", "a", shares="home1"),
            Host("full", "a", nat=Nat.FULL_CONE),
            Host("half", "a", nat=Nat.ADDRESS_RESTRICTED),
            Host("short", "a", nat=Nat.PORT_RESTRICTED, udp_timeout_s=0.3),
        ),
        routes=(Route(a="a", b="a", rtt_ms=2),),
    )
    with Lab(spec) as lab:
        yield lab


def test_a_port_restricted_cone_shows_one_port_to_everybody(zoo: Lab) -> None:
    with (
        probe.udp(zoo.host("cone1")) as near,
        probe.udp(zoo.host("open1")) as x,
        probe.udp(zoo.host("open2")) as y,
    ):
        seen = probe.seen_as(near, x)
        assert seen == probe.seen_as(near, y)
        assert seen[0] == zoo.host("cone1").public_address != zoo.host("cone1").address


def test_a_symmetric_nat_shows_everybody_another_port(zoo: Lab) -> None:
    with (
        probe.udp(zoo.host("sym1")) as near,
        probe.udp(zoo.host("open1")) as x,
        probe.udp(zoo.host("open1")) as x2,
        probe.udp(zoo.host("open2")) as y,
    ):
        seen = [probe.seen_as(near, server) for server in (x, x2, y)]
        assert {address for address, _ in seen} == {zoo.host("sym1").public_address}
        assert len({port for _, port in seen}) == 3
        assert probe.seen_as(near, x) == seen[0], "the same flow keeps its port"


@pytest.mark.parametrize("kind", ["cone1", "sym1", "wall1"])
def test_only_those_who_were_written_to_may_answer(zoo: Lab, kind: str) -> None:
    with (
        probe.udp(zoo.host(kind)) as near,
        probe.udp(zoo.host("open1")) as friend,
        probe.udp(zoo.host("open1")) as other_port,
        probe.udp(zoo.host("open2")) as stranger,
    ):
        seen = probe.seen_as(near, friend)
        assert probe.arrives(zoo, friend, seen)
        assert not probe.arrives(zoo, other_port, seen)
        assert not probe.arrives(zoo, stranger, seen)


def test_an_open_host_hears_everybody(zoo: Lab) -> None:
    with probe.udp(zoo.host("open1")) as near, probe.udp(zoo.host("sym2")) as far:
        assert probe.arrives(zoo, far, near.getsockname())


@pytest.mark.parametrize(
    ("a", "b", "opens"),
    [
        ("open1", "sym1", True),  # it answers to where the packet came from
        ("cone1", "cone2", True),
        ("cone1", "wall1", True),
        ("wall1", "wall2", True),
        ("sym1", "wall1", False),  # the wall sees a port that it has not written to
        ("sym1", "cone1", False),
        ("sym1", "sym2", False),
    ],
)
def test_hole_punching_opens_what_it_can(zoo: Lab, a: str, b: str, opens: bool) -> None:
    assert probe.punches(zoo, zoo.host(a), zoo.host(b), zoo.host("open2")) is opens


@pytest.mark.parametrize("inside", ["cone1", "sym1", "wall1"])
def test_tcp_goes_out_through_every_router_and_comes_in_through_none(zoo: Lab, inside: str) -> None:
    done = probe.transfer(zoo.host(inside), zoo.host("open1"), payload=200_000)
    assert done.payload == 200_000
    assert not probe.tcp_opens(zoo, zoo.host("open1"), zoo.host(inside), 7000)
    assert probe.tcp_opens(zoo, zoo.host(inside), zoo.host("open1"), 7001)


def test_who_may_only_go_out_to_443_does_only_that(zoo: Lab) -> None:
    web, server = zoo.host("web1"), zoo.host("open1")
    assert probe.transfer(web, server, payload=50_000, port=443).payload == 50_000
    assert not probe.tcp_opens(zoo, web, server, 7000)
    assert not probe.tcp_opens(zoo, server, web, 443)
    with probe.udp(web) as near, probe.udp(server, 443) as far, probe.udp(server, 444) as wrong:
        assert probe.arrives(zoo, near, far.getsockname())
        assert not probe.arrives(zoo, near, wrong.getsockname())


def test_refused_packets_are_counted(zoo: Lab) -> None:
    before = zoo.settle()["open2"]
    with probe.udp(zoo.host("open2")) as near:
        near.sendto(b"x", (zoo.host("cone1").public_address, 30000))
        near.sendto(b"x", (zoo.host("cone1").public_address, 30001))
        after = zoo.settle(packets=before.sent().packets + 2, host="open2")["open2"]
    assert after.dropped("refused").packets == before.dropped("refused").packets + 2


def test_a_full_cone_lets_in_whoever_knows_the_port(home: Lab) -> None:
    with (
        probe.udp(home.host("full")) as near,
        probe.udp(home.host("open1")) as friend,
        probe.udp(home.host("open2")) as stranger,
    ):
        assert probe.arrives(home, stranger, probe.seen_as(near, friend))


def test_an_address_restricted_cone_lets_in_other_ports_of_a_friend(home: Lab) -> None:
    with (
        probe.udp(home.host("half")) as near,
        probe.udp(home.host("open1")) as friend,
        probe.udp(home.host("open1")) as other_port,
        probe.udp(home.host("open2")) as stranger,
    ):
        seen = probe.seen_as(near, friend)
        assert probe.arrives(home, other_port, seen)
        assert not probe.arrives(home, stranger, seen)


def test_neighbours_at_one_router_talk_without_it(home: Lab) -> None:
    one, two = home.host("home1"), home.host("home2")
    assert one.public_address == two.public_address
    assert one.address != two.address
    with probe.udp(one) as near, probe.udp(two) as far:
        assert probe.arrives(home, near, far.getsockname())
        assert far.recvfrom(64)[1] == near.getsockname()


def test_two_hosts_at_one_router_with_one_port_are_told_apart(home: Lab) -> None:
    with (
        probe.udp(home.host("home1"), 5000) as one,
        probe.udp(home.host("home2"), 5000) as two,
        probe.udp(home.host("open1")) as server,
    ):
        assert probe.seen_as(one, server) != probe.seen_as(two, server)


def test_a_forwarded_port_leads_to_its_host(home: Lab) -> None:
    inside, outside = home.host("home1"), home.host("open1")
    with (
        probe.listening(inside, 4000) as door,
        probe.connect(outside, (inside.public_address, 4001)) as near,
        door.accept()[0] as far,
    ):
        near.sendall(b"hello")
        assert far.recv(64) == b"hello"
    assert not probe.tcp_opens(home, outside, inside, 4002)


def test_nobody_reaches_the_own_public_address_from_inside(home: Lab) -> None:
    with probe.udp(home.host("home2")) as near:
        assert not probe.arrives(home, near, (home.host("home1").public_address, 4001))


def test_a_silent_flow_is_forgotten_and_answers_do_not_keep_it(home: Lab) -> None:
    with probe.udp(home.host("short")) as near, probe.udp(home.host("open1")) as server:
        first = probe.seen_as(near, server)
        while probe.arrives(home, server, first):
            pass
        assert probe.seen_as(near, server) != first, "a new flow, and so a new port"


def test_the_table_of_flows_is_bounded(home: Lab) -> None:
    """4,096 flows fit; the one after that is refused, and old ones go on."""
    with probe.udp(home.host("full")) as near, probe.udp(home.host("open1")) as server:
        probe.seen_as(near, server)
        before = home.settle()
        had = before["full"].sent().packets
        for port in range(5000):
            near.sendto(b"x", (home.host("open2").address, 10_000 + port))
            if port % 1000 == 999:
                after = home.settle(packets=had + port + 1, host="full")
        refused = after["full"].dropped("refused") - before["full"].dropped("refused")
        assert 5000 - 4096 <= refused.packets < 5000 - 4096 + 10
        probe.seen_as(near, server)
