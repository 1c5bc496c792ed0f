"""Is the laboratory what it says? Every setting, measured from inside, with bounds on both sides.

These bounds hold on a machine that has a core to spare; the tests hold one side of them on any.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Final

from tests.netlab import Host, Lab, LabHost, Line, Nat, Route, Spec, nat_zoo, probe, two_regions
from tests.netlab import traffic as _traffic

_LOAD_S: Final = 4.0  # per measurement of a steady state
_PACKETS: Final = 100_000  # for losses: 0.1 % is 100 of them


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; it holds if `low <= measured <= high`."""

    what: str
    low: float
    measured: float
    high: float
    unit: str

    @property
    def holds(self) -> bool:
        return self.low <= self.measured <= self.high


def delays() -> Iterator[Row]:
    for set_ms in (1, 4, 20, 80, 300):
        with Lab(_pair(Route(a="a", b="b", rtt_ms=set_ms))) as lab:
            found = probe.round_trips_ms(lab.host("a1"), lab.host("b1"), 30)
        yield Row(f"idle round trip, {set_ms} set: median", set_ms, statistics.median(found),
                  set_ms + 0.7, "ms")  # fmt: skip
        yield Row("    95th percentile", set_ms, found[28], set_ms + 1.5, "ms")
    with Lab(_pair(Route(a="a", b="b", rtt_ms=80, jitter_ms=20))) as lab:
        found = probe.round_trips_ms(lab.host("a1"), lab.host("b1"), 60)
    yield Row("80 with up to 20 of jitter each way: least", 80, found[0], 95, "ms")
    yield Row("    mean (jitter is half of its bound on average)", 92, statistics.fmean(found),
              108, "ms")  # fmt: skip
    yield Row("    most", 105, found[-1], 121, "ms")


def queues() -> Iterator[Row]:
    """A full queue of 100 ms, as a ping through it sees it."""
    line = Line(up_mbps=10, buffer_ms=100)
    with Lab(_pair(Route(a="a", b="b", rtt_ms=20), line=line)) as lab, _load(lab, "a1", "b1"):
        time.sleep(_LOAD_S / 2)
        found = probe.round_trips_ms(lab.host("a1"), lab.host("b1"), 30)
    yield Row("20 behind a full queue of 100: median", 60, statistics.median(found), 122, "ms")
    yield Row("    most", 80, found[-1], 123, "ms")


def rates() -> Iterator[Row]:
    for which in ("up_mbps", "down_mbps", "across_up_mbps", "across_down_mbps"):
        for mbps in (1.0, 5.0, 20.0, 100.0):
            payload = max(400_000, int(mbps * 1e6 / 8 * _LOAD_S))
            host = "a1" if "up" in which else "b1"
            with Lab(_pair(Route(a="a", b="b", rtt_ms=20))) as lab:
                lab.set(host, **{which: mbps})
                done = probe.transfer(lab.host("a1"), lab.host("b1"), payload)
            goodput = mbps * probe.PAYLOAD_RATIO
            yield Row(f"TCP payload, {which} = {mbps:g}", goodput * 0.97,
                      done.steady_bps / 1e6, goodput * 1.01, "Mbit/s")  # fmt: skip


def losses() -> Iterator[Row]:
    for loss in (0.001, 0.01, 0.03):
        lost, _ = _lose(loss, 0)
        yield Row(f"random loss of {loss:.1%}", loss * 70, lost * 100, loss * 130, "%")
    for loss, burst in ((0.01, 5.0), (0.03, 10.0)):
        lost, mean = _lose(loss, burst)
        yield Row(f"{loss:.0%} in bursts of {burst:g}", loss * 70, lost * 100, loss * 130, "%")
        yield Row("    mean burst", burst * 0.75, mean, burst * 1.25, "packets")


def formulas() -> Iterator[Row]:
    """Mathis, Semke, Mahdavi, Ott 1997: MSS / RTT * C / sqrt(p), C = 0.87 with delayed
    acknowledgements and 1.22 without."""
    host = Host("a1", "a", congestion="reno")
    route = Route(a="a", b="b", rtt_ms=80, loss=0.01)
    with Lab(Spec(hosts=(host, Host("b1", "b")), routes=(route,)), seed=1) as lab:
        done = probe.transfer(lab.host("a1"), lab.host("b1"), 4_000_000)
    delayed = 1448 * 8e-6 / 0.08 * 0.87 / 0.1
    most = delayed * 1.22 / 0.87
    yield Row("reno at 80 ms and 1 %", delayed * 0.8, done.steady_bps / 1e6, most * 1.4, "Mbit/s")


def capacity() -> Iterator[Row]:
    """Eight hosts, four flows, 160 Mbit/s each."""
    with Lab(two_regions(4, 4, up_mbps=160, inside_mbps=1000)) as lab:
        with _load(lab, "a1", "b1"), _load(lab, "a2", "b2"), _load(lab, "a3", "b3"), _load(
            lab, "a4", "b4"
        ):  # fmt: skip
            time.sleep(3)  # cubic has found the rate
            before, began = lab.counters(), time.perf_counter()
            time.sleep(_LOAD_S)
            after, took = lab.counters(), time.perf_counter() - began
        arrived = after.arrived.bytes - before.arrived.bytes
    yield Row("IP traffic of four flows of 160 Mbit/s", 600, arrived * 8e-6 / took, 680, "Mbit/s")
    yield Row("    the mover's share of a core", 0, (after.cpu_s - before.cpu_s) / took, 0.8, "")
    yield Row("    packets late by, mean", 0, after.late_us_mean, 1000, "us")
    yield Row("    packets that the mover missed", 0, sum(h.unread for h in after.hosts.values()),
              0, "")  # fmt: skip
    with Lab(two_regions(1, 1, up_mbps=None, between_ms=1)) as lab:
        with _load(lab, "a1", "b1"):
            time.sleep(1)
            before, began = lab.counters(), time.perf_counter()
            time.sleep(_LOAD_S)
            after, took = lab.counters(), time.perf_counter() - began
        arrived = after.arrived.bytes - before.arrived.bytes
    yield Row("one flow without any cap", 500, arrived * 8e-6 / took, 1e5, "Mbit/s")


def routers() -> Iterator[Row]:
    """One row per pair of kinds. Web hosts speak to port 443 only, so they have no part in this."""
    kinds = {"open": Nat.OPEN, "wall": Nat.FIREWALL, "cone": Nat.PORT_RESTRICTED,
             "sym": Nat.SYMMETRIC}  # fmt: skip
    with Lab(nat_zoo()) as lab:
        for a, b in combinations_with_replacement(kinds, 2):
            if b == "open":
                continue
            got = probe.punches(lab, lab.host(f"{a}1"), lab.host(f"{b}2"), lab.host("open2"))
            want = a == "open" or Nat.SYMMETRIC not in (kinds[a], kinds[b])
            yield Row(f"hole punching {a} - {b}", want, got, want, "opens")


PARTS: Final[dict[str, Callable[[], Iterator[Row]]]] = {
    "delays": delays,
    "queues": queues,
    "rates": rates,
    "losses": losses,
    "formulas": formulas,
    "capacity": capacity,
    "routers": routers,
}


def _pair(route: Route, line: Line | None = None) -> Spec:
    return Spec(hosts=(Host("a1", "a", line or Line()), Host("b1", "b")), routes=(route,))


def _lose(loss: float, burst: float) -> tuple[float, float]:
    with Lab(_pair(Route(a="a", b="b", loss=loss, burst=burst))) as lab:
        probe.flood(lab, lab.host("a1"), lab.host("b1"), _PACKETS)
        found = lab.settle()["a1"]
    lost = found.dropped("lost").packets
    return lost / found.sent().packets, lost / found.loss_runs


@contextmanager
def _load(lab: Lab, a: str, b: str, port: int = 9000) -> Iterator[None]:
    """One TCP flow that sends as much as it can."""
    program = [sys.executable, "-I", _traffic.__file__]
    sink = lab.host(b).popen([*program, "sink", str(port)], stdout=subprocess.PIPE)
    assert sink.stdout is not None
    sink.stdout.readline()
    target: LabHost = lab.host(b)
    source = lab.host(a).popen([*program, "source", target.address, str(port)])
    try:
        yield
    finally:
        for process in (source, sink):
            process.kill()
            process.wait()
        sink.stdout.close()
