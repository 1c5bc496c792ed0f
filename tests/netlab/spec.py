"""What a laboratory consists of, as data.

A host stands in a region, at a line of its own, behind a router of its own or none; or it shares
router and line of another host. Routes lead between regions or hosts. Rates are those of IP
packets: a TCP payload gets 1448/1500 = 0.965 of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Literal

HOSTS_MAX: Final = 64  # the mover's table of paths has a row per pair
PLANES_MAX: Final = 7  # and "other" for what belongs to none
RULES_MAX: Final = 16  # per router: forwarded ports, allowed ports
MTU_MIN: Final = 576  # what every IPv4 host must accept (RFC 791)
MTU_MAX: Final = 1500
OTHER: Final = "other"

Protocol = Literal["tcp", "udp"]
_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,15}")


def _check(fine: bool, what: str) -> None:
    if not fine:
        raise ValueError(f"this laboratory cannot be built: {what}")


class Nat(Enum):
    """What stands between a host and the network, in RFC 3489's and RFC 4787's words.

    All but OPEN refuse what nobody inside asked for. All but OPEN and FIREWALL hide the host behind
    another address; all of those but SYMMETRIC show one port to everybody.
    """

    OPEN = "open"
    """Public address, everything comes in."""
    FIREWALL = "firewall"
    """Public address; only answers come in."""
    FULL_CONE = "full-cone"
    """Whoever knows the outer port may use it."""
    ADDRESS_RESTRICTED = "address-cone"
    """Whoever has been written to may answer, from any port."""
    PORT_RESTRICTED = "port-cone"
    """Only the very address and port that has been written to may answer. Most home routers."""
    SYMMETRIC = "symmetric"
    """As before, and everybody sees another outer port. Mobile networks, some companies."""

    @property
    def translates(self) -> bool:
        return self not in (Nat.OPEN, Nat.FIREWALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One access line; None is no limit. Its four queues drop what would wait for longer."""

    up_mbps: float | None = None
    down_mbps: float | None = None
    across_up_mbps: float | None = None
    """What leaves the region is held to this as well."""
    across_down_mbps: float | None = None
    buffer_ms: float = 100.0
    """Home routers have 50-500 ms; a TCP flow needs about its round-trip time."""

    def __post_init__(self) -> None:
        for rate in (self.up_mbps, self.down_mbps, self.across_up_mbps, self.across_down_mbps):
            _check(rate is None or rate > 0, f"a rate of {rate} Mbit/s; None is no limit")
        _check(0 <= self.buffer_ms <= 10_000, f"a buffer of {self.buffer_ms} ms")


@dataclass(frozen=True, slots=True)
class Forward:
    """A port of the router that leads to the host."""

    outer_port: int
    inner_port: int
    protocol: Protocol = "tcp"


@dataclass(frozen=True, slots=True)
class Host:
    """A machine with its place, line and router."""

    name: str
    region: str
    line: Line = Line()
    nat: Nat = Nat.OPEN
    outbound_ports: frozenset[int] = frozenset()
    """If any, what leaves must go to one of these ports; needs a firewall or NAT. No pings then."""
    forwards: tuple[Forward, ...] = ()
    shares: str = ""
    """The host whose router and line it shares; its own region must be the same."""
    udp_timeout_s: float = 120.0
    """How long the router remembers a silent UDP flow (RFC 4787 asks for 120 s, many have 30 s)."""
    tcp_timeout_s: float = 7_440.0
    """The same for TCP (RFC 5382: 2 h 4 min)."""
    congestion: str = "cubic"
    """TCP's congestion control, of those that the kernel has."""

    def __post_init__(self) -> None:
        _check(_NAME.fullmatch(self.name) is not None, f"the host name {self.name!r}")
        _check(_NAME.fullmatch(self.region) is not None, f"the region name {self.region!r}")
        _check(
            not (self.outbound_ports and self.nat is Nat.OPEN),
            f"{self.name}: outbound ports without a firewall or NAT that knows what is an answer",
        )
        _check(not self.forwards or self.nat.translates or self.nat is Nat.FIREWALL,
               f"{self.name}: an open host needs no forwarded port")  # fmt: skip
        _check(len(self.outbound_ports) <= RULES_MAX, f"{self.name}: too many outbound ports")
        _check(len(self.forwards) <= RULES_MAX, f"{self.name}: too many forwarded ports")


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """What lies between two regions (or hosts): the same in both directions.

    Where several lead between two hosts the last one holds. Without one there is no delay.
    """

    a: str
    b: str
    rtt_ms: float = 0.0
    """Round trip: half of it each way."""
    jitter_ms: float = 0.0
    """Up to so much more, each way. Packets keep their order."""
    reorder: bool = False
    """Jitter is drawn for each packet, so that they overtake each other."""
    loss: float = 0.0
    """Ratio of packets lost, each way."""
    burst: float = 0.0
    """Mean run of lost packets (Gilbert-Elliott); 0: each is lost independently."""

    def __post_init__(self) -> None:
        _check(0 <= self.rtt_ms <= 60_000, f"a round-trip time of {self.rtt_ms} ms")
        _check(0 <= self.jitter_ms <= 10_000, f"a jitter of {self.jitter_ms} ms")
        _check(0 <= self.loss <= 1, f"a loss ratio of {self.loss}")
        _check(self.burst == 0 or 1 <= self.burst <= 10_000, f"a mean burst of {self.burst}")


@dataclass(frozen=True, slots=True)
class Plane:
    """A kind of traffic that is counted apart: whatever has one of these ports at either end.

    Ports are those that the sender sees. The first plane that fits counts the packet.
    """

    name: str
    first_port: int
    last_port: int
    protocol: Protocol | None = None

    def __post_init__(self) -> None:
        _check(self.name != OTHER, "the plane 'other' is there already")
        _check(0 <= self.first_port <= self.last_port <= 65535, f"the ports of plane {self.name}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """A whole laboratory."""

    hosts: tuple[Host, ...]
    routes: tuple[Route, ...] = ()
    planes: tuple[Plane, ...] = field(default=())
    mtu: int = MTU_MAX

    def __post_init__(self) -> None:
        names = [host.name for host in self.hosts]
        places = {*names, *self.regions}
        _check(0 < len(names) <= HOSTS_MAX, f"{len(names)} hosts; 1 to {HOSTS_MAX} fit")
        _check(len(places) == len(names) + len(self.regions), "two hosts or regions of one name")
        _check(len(self.planes) <= PLANES_MAX, f"more than {PLANES_MAX} planes")
        _check(MTU_MIN <= self.mtu <= MTU_MAX, f"an MTU of {self.mtu}")
        for route in self.routes:
            _check(
                {route.a, route.b} <= places, f"a route between {route.a} and {route.b}: no such"
            )
        by_name = {host.name: host for host in self.hosts}
        for host in self.hosts:
            owner = by_name.get(host.shares) if host.shares else None
            _check(
                not host.shares
                or (owner is not None and owner.nat.translates and not owner.shares
                    and owner.region == host.region),
                f"{host.name} shares the router of {host.shares}, who has none in its region",
            )  # fmt: skip

    @property
    def regions(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(host.region for host in self.hosts))


def two_regions(
    a: int = 4,
    b: int = 4,
    *,
    inside_ms: float = 4.0,
    between_ms: float = 80.0,
    up_mbps: float | None = 100.0,
    inside_mbps: float | None = None,
    loss: float = 0.0,
    burst: float = 0.0,
    jitter_ms: float = 0.0,
    planes: tuple[Plane, ...] = (),
) -> Spec:
    """Hosts a1.. in region "a" and b1.. in region "b".

    Each has `up_mbps` each way across regions and `inside_mbps` (ten times that) in all; round-trip
    times; loss, burst and jitter are those of the route between the regions.
    """
    inside = inside_mbps if inside_mbps or not up_mbps else 10 * up_mbps
    line = Line(up_mbps=inside, down_mbps=inside, across_up_mbps=up_mbps, across_down_mbps=up_mbps)
    return Spec(
        hosts=tuple(
            Host(f"{region}{i + 1}", region, line)
            for region, size in (("a", a), ("b", b))
            for i in range(size)
        ),
        routes=(
            *(Route(a=region, b=region, rtt_ms=inside_ms) for region in "ab"[: 1 + (b > 0)]),
            *([Route(a="a", b="b", rtt_ms=between_ms, loss=loss, burst=burst, jitter_ms=jitter_ms)]
              if a and b else []),
        ),
        planes=planes,
    )  # fmt: skip


def nat_zoo(*, rtt_ms: float = 20.0, line: Line | None = None) -> Spec:
    """Two hosts of every kind of place that a volunteer's machine stands in.

    open1, open2; cone1, cone2 (port-restricted NAT); sym1, sym2 (symmetric NAT); wall1, wall2
    (public address, inbound refused); web1, web2 (inbound refused, and out only to port 443).
    """
    kinds: dict[str, tuple[Nat, frozenset[int]]] = {
        "open": (Nat.OPEN, frozenset()),
        "cone": (Nat.PORT_RESTRICTED, frozenset()),
        "sym": (Nat.SYMMETRIC, frozenset()),
        "wall": (Nat.FIREWALL, frozenset()),
        "web": (Nat.FIREWALL, frozenset({443})),
    }
    hosts = tuple(
        Host(f"{kind}{i}", "zoo", line or Line(), nat, ports)
        for kind, (nat, ports) in kinds.items()
        for i in (1, 2)
    )
    return Spec(hosts=hosts, routes=(Route(a="zoo", b="zoo", rtt_ms=rtt_ms),))
