"""What cannot be built is refused before anything is built."""

from __future__ import annotations

import pytest

from tests.netlab.spec import Forward, Host, Line, Plane, Route, Spec, nat_zoo, two_regions


@pytest.mark.parametrize(
    "build",
    [
        lambda: Line(up_mbps=0),
        lambda: Line(buffer_ms=-1),
        lambda: Host("Big Name", "a"),
        lambda: Host("x", "a", outbound_ports=frozenset({443})),
        lambda: Host("x", "a", forwards=(Forward(1, 1),)),
        lambda: Route(a="a", b="b", loss=1.5),
        lambda: Route(a="a", b="b", burst=0.5),
        lambda: Plane("other", 1, 2),
        lambda: Plane("bulk", 2, 1),
        lambda: Spec(hosts=()),
        lambda: Spec(hosts=(Host("x", "a"), Host("x", "a"))),
        lambda: Spec(hosts=(Host("a", "a"),)),
        lambda: Spec(hosts=(Host("x", "a"),), routes=(Route(a="a", b="nowhere"),)),
        lambda: Spec(hosts=(Host("x", "a"), Host("y", "a", shares="x"))),
        lambda: Spec(hosts=(Host("x", "a"),), mtu=100),
    ],
)
def test_what_makes_no_sense_is_refused(build: object) -> None:
    assert callable(build)
    with pytest.raises(ValueError, match="this laboratory cannot be built"):
        build()


def test_two_regions_give_ten_times_the_rate_inside() -> None:
    spec = two_regions(4, 3, up_mbps=20)
    assert [host.name for host in spec.hosts] == ["a1", "a2", "a3", "a4", "b1", "b2", "b3"]
    assert spec.hosts[0].line == Line(
        up_mbps=200, down_mbps=200, across_up_mbps=20, across_down_mbps=20
    )
    assert [(route.a, route.b, route.rtt_ms) for route in spec.routes] == [
        ("a", "a", 4), ("b", "b", 4), ("a", "b", 80),
    ]  # fmt: skip


def test_two_regions_may_be_one_and_may_be_unlimited() -> None:
    spec = two_regions(2, 0, up_mbps=None)
    assert spec.regions == ("a",)
    assert spec.hosts[0].line == Line()


def test_the_zoo_has_two_of_every_kind() -> None:
    kinds = [(host.nat, bool(host.outbound_ports)) for host in nat_zoo().hosts]
    assert len(kinds) == 10
    assert all(kinds.count(kind) == 2 for kind in kinds)
