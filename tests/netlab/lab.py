"""A running laboratory: real kernels and real processes on emulated lines.

Every host is a network namespace whose only way out is a TUN device; the mover reads what comes out
of all of them and decides what arrives where and when. Nothing has a route to the world.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import struct
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final

from tests.netlab import counters, namespaces
from tests.netlab.control import ANSWER_S_MAX, Mover
from tests.netlab.counters import Counters
from tests.netlab.namespaces import LabError
from tests.netlab.requirements import missing
from tests.netlab.spec import OTHER, Host, Line, Route, Spec

_TUNSETIFF: Final = 0x400454CA
_IFF_TUN: Final = 0x0001
_IFF_NO_PI: Final = 0x1000
_DEVICE: Final = "tun0"
_TUN_PACKETS: Final = 10_000  # waiting for the mover: 0.1 s at 1 Gbit/s
_PROTOCOLS: Final = {None: 0, "tcp": 6, "udp": 17}
_POLL_S: Final = 0.005
_ALLOWED: Final = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
_numbers = itertools.count()


class LabHost:
    """One host of a running laboratory."""

    def __init__(self, facts: Host, index: int, node: int, address: str, public: str, ns: str):
        self.facts = facts
        self.index = index
        self.node = node
        self.address = address
        """Its own address: a private one behind a router."""
        self.public_address = public
        """What others see."""
        self.namespace = ns
        self._children: list[subprocess.Popen[Any]] = []

    @property
    def name(self) -> str:
        return self.facts.name

    def inside(self) -> AbstractContextManager[None]:
        """Sockets and processes that the calling thread makes in the block are this host's.

        A socket stays in its place afterwards; so one test can hold sockets of many hosts.
        """
        return namespaces.inside(self.namespace)

    def command(self, command: Sequence[str]) -> list[str]:
        """For those who start processes in a way of their own (asyncio)."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def popen(self, command: Sequence[str], **how: Any) -> subprocess.Popen[Any]:
        """`subprocess.Popen` on this host. It is killed, with all that it started, at the end."""
        with self.inside():
            child = subprocess.Popen(command, **how)
        self._children.append(child)
        return child

    def run(
        self, command: Sequence[str], *, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end, with its output as text. Its exit status is the caller's to check."""
        with self.popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as child:  # fmt: skip
            try:
                out, err = child.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                child.kill()
                raise
        return subprocess.CompletedProcess(command, child.returncode, out, err)

    def unread(self) -> int:
        """Packets that the kernel dropped since the mover did not read fast enough."""
        with self.inside():
            lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
        (line,) = (x for x in lines if x.strip().startswith(f"{_DEVICE}:"))
        return int(line.partition(":")[2].split()[11])  # transmitted, dropped

    def reap(self) -> None:
        """After the end: collect what was killed."""
        for child in self._children:
            child.kill()
            child.wait()
            pipes: list[IO[Any] | None] = [child.stdin, child.stdout, child.stderr]
            for pipe in pipes:
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()


class Lab:
    """`with Lab(spec) as lab:` builds it; leaving the block removes all of it, processes included.

    It is removed as well when this process dies in any route. `seed` decides every random drop and
    jitter for a given order of packets.

    Raises:
        LabError: the machine lacks something (`missing()` says what), or building failed.
    """

    def __init__(self, spec: Spec, *, seed: int = 0, mover_nice: int = 0) -> None:
        """`mover_nice` is added to the niceness of this process; negative where the hosts' own work
        keeps all cores busy and the network must not feel it."""
        self.spec = spec
        self._seed = seed
        self._nice = mover_nice
        self._planes = [OTHER, *dict.fromkeys(plane.name for plane in spec.planes)]
        self._hosts: dict[str, LabHost] = {}
        self._lines: dict[int, Line] = {}
        self._routes: dict[tuple[int, int], Route] = {}
        self._mover: Mover | None = None

    # ── life ─────────────────────────────────────────────────────────────────────────────
    def __enter__(self) -> Lab:
        lack = missing()
        if lack is not None:
            raise LabError(lack)
        namespaces.sweep()
        prefix = namespaces.new_prefix(next(_numbers))
        self._hosts = _place(self.spec, prefix)
        try:
            self._build(prefix)
        except BaseException:
            self._remove(prefix)
            raise
        self._prefix = prefix
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove(self._prefix)

    def _build(self, prefix: str) -> None:
        namespaces.ip(f"netns add {host.namespace}" for host in self._hosts.values())
        with ExitStack() as open_files:
            tuns = []
            for host in self._hosts.values():
                tun = _open_tun(host)
                open_files.callback(os.close, tun)  # the mover has its own copy
                tuns.append(tun)
                _configure(host, self.spec.mtu)
            self._mover = Mover(prefix, tuns, self._nice)
            self._mover.tell(self._start(tuns))

    def _remove(self, prefix: str) -> None:
        mover, self._mover = self._mover, None
        try:
            if mover is not None:
                mover.close()
        finally:
            namespaces.remove(prefix)  # nothing is left to do, unless the mover failed
            for host in self._hosts.values():
                host.reap()

    def _start(self, tuns: list[int]) -> Iterator[str]:
        regions = self.spec.regions
        for host in self._hosts.values():
            facts = host.facts
            if not facts.shares:
                yield (
                    f"node {host.node} {regions.index(facts.region)} {host.public_address} "
                    f"{facts.nat.value} {facts.udp_timeout_s} {facts.tcp_timeout_s} {self._seed}"
                )
                yield from (f"allow {host.node} {port}" for port in sorted(facts.outbound_ports))
                yield self._line(host.node, facts.line)
        for host, tun in zip(self._hosts.values(), tuns, strict=True):
            yield f"host {host.index} {host.node} {host.address} {tun}"
            for f in host.facts.forwards:
                yield (
                    f"forward {host.node} {_PROTOCOLS[f.protocol]} {f.outer_port} {host.index} "
                    f"{f.inner_port}"
                )
        for plane in self.spec.planes:
            yield (
                f"plane {self._planes.index(plane.name)} {_PROTOCOLS[plane.protocol]} "
                f"{plane.first_port} {plane.last_port}"
            )
        for route in self.spec.routes:
            for a, b in self._pairs([route.a], [route.b]):
                self._routes[a, b] = route
        yield from (self._path(a, b, route) for (a, b), route in self._routes.items())

    # ── what a test uses ─────────────────────────────────────────────────────────────────
    def host(self, name: str) -> LabHost:
        return self._hosts[name]

    @property
    def hosts(self) -> list[LabHost]:
        return list(self._hosts.values())

    def set(self, host: str, **changes: Any) -> None:
        """Change a host's line from now on: `lab.set("a1", up_mbps=5)`. Fields are those of `Line`;
        who shares its router shares the change."""
        node = self._hosts[host].node
        self._tell([self._line(node, replace(self._lines[node], **changes))])

    def set_route(self, a: str, b: str, *, one_way: bool = False, **changes: Any) -> None:
        """Change the way between two regions or hosts: `lab.set_route("a", "b", loss=0.01)`.

        Fields are those of `Route`; `one_way` only from a to b. Packets that are on their way keep
        their delay, so a shorter one lets new packets overtake them, as a new route does.
        """
        commands = []
        for x, y in self._pairs([a], [b], one_way=one_way):
            route = replace(self._routes.get((x, y), Route(a=a, b=b)), **changes)
            self._routes[x, y] = route
            commands.append(self._path(x, y, route))
        self._tell(commands)

    def cut(
        self, side: str | Iterable[str], other: str | Iterable[str] | None = None,
        *, one_way: bool = False,
    ) -> None:  # fmt: skip
        """Nothing passes any more between two sides, packets on their way included.

        A side is a region, a host, or several; without another, it is cut off from everybody else.
        `one_way` cuts only what goes from the first to the second.
        """
        left = [side] if isinstance(side, str) else list(side)
        if other is None:
            mine = self._nodes(left)
            right = [h.name for h in self.hosts if h.node not in mine]
        else:
            right = [other] if isinstance(other, str) else list(other)
        self._tell(f"cut {x} {y} 1" for x, y in self._pairs(left, right, one_way=one_way))

    def heal(self) -> None:
        """Mend every cut."""
        nodes = sorted({host.node for host in self.hosts})
        self._tell(f"cut {x} {y} 0" for x in nodes for y in nodes)

    def counters(self) -> Counters:
        lines = self._running.ask("counters")
        unread = {name: host.unread() for name, host in self._hosts.items()}
        return counters.parse(lines, list(self._hosts), self._planes, unread)

    def settle(
        self, *, packets: int = 0, host: str | None = None, timeout_s: float = ANSWER_S_MAX
    ) -> Counters:
        """Wait until at least so many packets were sent (by the host, if one is named) and none is
        under way; the counters then.

        Raises:
            LabError: it did not come to that in time.
        """
        give_up = time.monotonic() + timeout_s
        while time.monotonic() < give_up:
            now = self.counters()
            sent = now.sent if host is None else now[host].sent()
            if now.in_flight == 0 and sent.packets >= packets:
                return now
            time.sleep(_POLL_S)
        raise LabError(f"packets were still under way after {timeout_s} s")

    @property
    def mover_pid(self) -> int:
        return self._running.pid

    # ── words for the mover ──────────────────────────────────────────────────────────────
    @property
    def _running(self) -> Mover:
        if self._mover is None:
            raise LabError("the laboratory is not running: use it in its `with` block")
        return self._mover

    def _tell(self, commands: Iterable[str]) -> None:
        self._running.tell(commands)

    def _line(self, node: int, line: Line) -> str:
        self._lines[node] = line
        rates = (line.up_mbps, line.down_mbps, line.across_up_mbps, line.across_down_mbps)
        return f"line {node} {' '.join(f'{(r or 0) * 1e6}' for r in rates)} {line.buffer_ms}"

    def _path(self, a: int, b: int, route: Route) -> str:
        jitter = f"{route.jitter_ms} {route.reorder:d}"
        return f"path {a} {b} {route.rtt_ms / 2} {jitter} {route.loss} {route.burst}"

    def _nodes(self, places: Iterable[str]) -> AbstractSet[int]:
        found: AbstractSet[int] = frozenset()
        for place in places:
            here = {h.node for h in self.hosts if place in (h.name, h.facts.region)}
            if not here:
                raise ValueError(f"no host or region is called {place!r}")
            found = found | here
        return found

    def _pairs(
        self, a: Iterable[str], b: Iterable[str], *, one_way: bool = False
    ) -> list[tuple[int, int]]:
        a, b = list(a), list(b)
        left, right = sorted(self._nodes(a)), sorted(self._nodes(b))
        # A region's route is not that between two hosts at one router; those are named.
        named = not {*a, *b} & set(self.spec.regions)
        both = [(x, y) for x in left for y in right if x != y or named]
        return both if one_way else list(dict.fromkeys([*both, *((y, x) for x, y in both)]))


def _place(spec: Spec, prefix: str) -> dict[str, LabHost]:
    """Addresses: 11.REGION.0.x is public to everybody's eye and leads nowhere from here; behind a
    router 192.168.1.x, the same ones in every home."""
    nodes: dict[str, int] = {}
    homes: dict[int, int] = {}
    placed: dict[str, LabHost] = {}
    for host in spec.hosts:
        if not host.shares:
            nodes[host.name] = len(nodes)
    for index, host in enumerate(spec.hosts):
        node = nodes[host.shares or host.name]
        public = f"11.{spec.regions.index(host.region) + 1}.0.{node + 1}"
        owner = next(h for h in spec.hosts if h.name == (host.shares or host.name))
        address = public
        if owner.nat.translates:
            homes[node] = homes.get(node, 1) + 1
            address = f"192.168.1.{homes[node]}"
        placed[host.name] = LabHost(host, index, node, address, public, f"{prefix}-{host.name}")
    return placed


def _open_tun(host: LabHost) -> int:
    with host.inside():
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            request = struct.pack("16sH14x", _DEVICE.encode(), _IFF_TUN | _IFF_NO_PI)
            fcntl.ioctl(tun, _TUNSETIFF, request)
        except OSError:
            os.close(tun)
            raise
    return tun


def _configure(host: LabHost, mtu: int) -> None:
    _allow(host.facts.congestion)
    with host.inside():
        for name, value in (
            ("ipv6/conf/all/disable_ipv6", "1"),  # the mover speaks IPv4 only
            ("ipv4/tcp_congestion_control", host.facts.congestion),
            ("ipv4/tcp_no_metrics_save", "1"),  # a flow learns nothing from the one before
            ("ipv4/ping_group_range", "0 2147483647"),
        ):
            try:
                Path("/proc/sys/net", name).write_text(value)
            except OSError as error:
                raise LabError(f"{host.name}: net/{name} = {value}: {error}") from error
    namespaces.ip(
        [
            "link set lo up",
            f"addr add {host.address}/32 dev {_DEVICE}",
            f"link set {_DEVICE} mtu {mtu} txqueuelen {_TUN_PACKETS} up",
            f"route add default dev {_DEVICE}",
        ],
        host.namespace,
    )


def _allow(congestion: str) -> None:
    """A namespace may choose only what the machine allows everybody; cubic is no secret.

    This is the one setting outside the namespaces that is touched: a word is added to a list.
    """
    allowed = _ALLOWED.read_text().split()
    if congestion not in allowed:
        try:
            _ALLOWED.write_text(" ".join([*allowed, congestion]))
        except OSError as error:
            raise LabError(f"this kernel has no congestion control {congestion!r}") from error
