"""What has passed, at one moment: per host, direction, plane, and across regions or inside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Key = tuple[str, bool]  # the plane; whether it went across regions


@dataclass(frozen=True, slots=True)
class Traffic:
    """IP packets and their bytes, headers included."""

    packets: int = 0
    bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.packets + other.packets, self.bytes + other.bytes)

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(self.packets - other.packets, self.bytes - other.bytes)


@dataclass(slots=True)
class HostCounters:
    """One host's. `sent` is all that the mover read from it, `arrived` all that it was given."""

    sent_by: dict[Key, Traffic] = field(default_factory=dict)
    arrived_by: dict[Key, Traffic] = field(default_factory=dict)
    dropped_by: dict[str, Traffic] = field(default_factory=dict)
    """Of what this host sent, by reason: lost, cut, queue (a full one on the way), refused (by a
    router or firewall), unroutable (nobody has the address), malformed, full (the mover)."""
    loss_runs: int = 0
    """Runs of consecutive lost packets on one path."""
    unread: int = 0
    """Packets that the kernel dropped since the mover was too slow; must be 0."""

    def sent(self, plane: str | None = None, across: bool | None = None) -> Traffic:
        return _total(self.sent_by, plane, across)

    def arrived(self, plane: str | None = None, across: bool | None = None) -> Traffic:
        return _total(self.arrived_by, plane, across)

    def dropped(self, why: str | None = None) -> Traffic:
        fits = (t for w, t in self.dropped_by.items() if why in (None, w))
        return sum(fits, start=Traffic())


@dataclass(frozen=True, slots=True)
class Counters:
    """Everybody's. sent = arrived + dropped + in_flight, in packets."""

    hosts: Mapping[str, HostCounters]
    in_flight: int
    """Packets inside the mover."""
    late_us_mean: float
    """How late packets were given to their receiver, beyond what they were delayed for; tells
    whether the machine was up to it."""
    late_us_max: float
    cpu_s: float
    """Of the mover."""

    def __getitem__(self, host: str) -> HostCounters:
        return self.hosts[host]

    @property
    def sent(self) -> Traffic:
        return sum((h.sent() for h in self.hosts.values()), start=Traffic())

    @property
    def arrived(self) -> Traffic:
        return sum((h.arrived() for h in self.hosts.values()), start=Traffic())

    @property
    def dropped(self) -> Traffic:
        return sum((h.dropped() for h in self.hosts.values()), start=Traffic())


def parse(
    lines: Iterable[list[str]], hosts: list[str], planes: list[str], unread: Mapping[str, int]
) -> Counters:
    """From the mover's answer to `counters`."""
    found = {name: HostCounters(unread=unread[name]) for name in hosts}
    mover = [0, 0, 0, 0, 0]
    for kind, *words in lines:
        if kind == "mover":
            mover = [int(word) for word in words]
            continue
        host = found[hosts[int(words[0])]]
        if kind == "moved":
            plane, across, *numbers = (int(word) for word in words[1:])
            host.sent_by[planes[plane], bool(across)] = Traffic(numbers[0], numbers[1])
            host.arrived_by[planes[plane], bool(across)] = Traffic(numbers[2], numbers[3])
        elif kind == "dropped":
            host.dropped_by[words[1]] = Traffic(int(words[2]), int(words[3]))
        elif kind == "runs":
            host.loss_runs = int(words[1])
    in_flight, late_n, late_ns, late_ns_max, cpu_us = mover
    return Counters(
        found, in_flight, late_ns / late_n / 1e3 if late_n else 0.0, late_ns_max / 1e3, cpu_us / 1e6
    )


def _total(by: Mapping[Key, Traffic], plane: str | None, across: bool | None) -> Traffic:
    fits = (t for (p, a), t in by.items() if plane in (None, p) and across in (None, a))
    return sum(fits, start=Traffic())
