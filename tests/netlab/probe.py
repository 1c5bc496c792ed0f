"""Measuring a laboratory from inside it: what its tests and `verify` are made of."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from tests.netlab.lab import Lab, LabHost
from tests.netlab.namespaces import LabError

WAIT_S: Final = 20.0  # for what surely comes; a busy machine is no failure
PAYLOAD_RATIO: Final = 1448 / 1500  # of TCP with timestamps at an MTU of 1500
_CHUNK: Final = bytes(65536)


@contextmanager
def udp(host: LabHost, port: int = 0) -> Iterator[socket.socket]:
    """A UDP socket on the host."""
    with host.inside():
        found = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with found:
        found.bind((host.address, port))
        found.settimeout(WAIT_S)
        yield found


@contextmanager
def listening(host: LabHost, port: int) -> Iterator[socket.socket]:
    """A listening TCP socket on the host."""
    with host.inside():
        found = socket.socket()
    with found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host.address, port))
        found.listen()
        found.settimeout(WAIT_S)
        yield found


def connect(host: LabHost, to: tuple[str, int], timeout_s: float = WAIT_S) -> socket.socket:
    """A TCP connection from the host; the caller closes it."""
    with host.inside():
        found = socket.socket()
    found.settimeout(timeout_s)
    try:
        found.connect(to)
    except OSError:
        found.close()
        raise
    return found


def round_trips_ms(a: LabHost, b: LabHost, times: int = 20) -> list[float]:
    """One after the other, of small UDP packets between two open hosts; sorted."""
    found = []
    with udp(a) as near, udp(b) as far:
        for number in range(times):
            began = time.perf_counter()
            near.sendto(number.to_bytes(4, "big"), far.getsockname())
            data, sender = far.recvfrom(64)
            far.sendto(data, sender)
            near.recv(64)
            found.append((time.perf_counter() - began) * 1e3)
    return sorted(found)


def flood(lab: Lab, a: LabHost, b: LabHost, packets: int, size: int = 100) -> None:
    """Send UDP packets, no faster than the mover reads them; ends when none is under way."""
    with udp(a) as near, udp(b) as far:
        sent = lab.counters()[a.name].sent().packets
        for first in range(0, packets, 1000):
            batch = min(1000, packets - first)
            for _ in range(batch):
                near.sendto(_CHUNK[:size], far.getsockname())
            sent += batch
            lab.settle(packets=sent, host=a.name)


@dataclass(frozen=True, slots=True)
class Transfer:
    """One TCP flow's bytes, seen by its receiver."""

    payload: int
    whole_s: float
    """From before the connection was opened until the last byte was there."""
    steady_bps: float
    """Of the last three quarters of the bytes: without slow start."""

    @property
    def whole_bps(self) -> float:
        return self.payload * 8 / self.whole_s


def transfer(a: LabHost, b: LabHost, payload: int, port: int = 7000) -> Transfer:
    """Send so many bytes from one host to another over one TCP connection.

    Raises:
        LabError: nothing moved for `WAIT_S`.
    """
    began = time.perf_counter()
    with (
        listening(b, port) as door,
        connect(a, (b.public_address, port)) as source,
        door.accept()[0] as sink,
        selectors.DefaultSelector() as ready,
    ):
        source.setblocking(False)
        sink.setblocking(False)
        ready.register(source, selectors.EVENT_WRITE)
        ready.register(sink, selectors.EVENT_READ)
        left, got, quarter = payload, 0, (0, 0.0)
        while got < payload:
            events = ready.select(WAIT_S)
            if not events:
                raise LabError(f"nothing moved for {WAIT_S} s after {got} of {payload} bytes")
            for key, _ in events:
                if key.fileobj is source:
                    left -= source.send(_CHUNK[:left])
                    if not left:
                        ready.unregister(source)
                else:
                    got += len(sink.recv(len(_CHUNK)))
                    if not quarter[0] and got >= payload // 4:
                        quarter = got, time.perf_counter()
        ended = time.perf_counter()
    steady = (payload - quarter[0]) * 8 / (ended - quarter[1])
    return Transfer(payload, ended - began, steady)


# ── who can reach whom ───────────────────────────────────────────────────────────────────
def seen_as(near: socket.socket, server: socket.socket) -> tuple[str, int]:
    """Which address a server that anybody reaches sees behind a UDP socket; it answers."""
    near.sendto(b"who am I?", server.getsockname())
    _, seen = server.recvfrom(64)
    server.sendto(b"you are", seen)
    near.recv(64)
    return str(seen[0]), int(seen[1])


def arrives(lab: Lab, near: socket.socket, to: tuple[str, int]) -> bool:
    """Whether one UDP packet reaches a host, whoever that is; told by counters, not by time."""
    before = lab.settle()
    near.sendto(b"knock", to)
    after = lab.settle(packets=before.sent.packets + 1)
    return after.arrived.packets > before.arrived.packets


def punches(lab: Lab, a: LabHost, b: LabHost, server: LabHost, tries: int = 3) -> bool:
    """UDP hole punching: both learn from a server which address it sees behind the other, and write
    to it a few times; who hears something answers to where it came from. True if an answer came."""
    with udp(a) as x, udp(b) as y, udp(server) as s:
        seen_x, seen_y = seen_as(x, s), seen_as(y, s)
        for _ in range(tries):
            for near, far, target in ((x, y, seen_y), (y, x, seen_x)):
                if arrives(lab, near, target):
                    return arrives(lab, far, far.recvfrom(64)[1])
        return False


def tcp_opens(lab: Lab, a: LabHost, b: LabHost, port: int) -> bool:
    """Whether a TCP connection from one host to a listening port of another comes about; told by
    whether the first SYN arrives."""
    with listening(b, port), a.inside():
        before = lab.settle()
        had = before[a.name].sent().packets
        with socket.socket() as near:
            near.setblocking(False)
            near.connect_ex((b.public_address, port))
            now = lab.settle(packets=had + 1, host=a.name)
            return now[b.name].arrived().packets > before[b.name].arrived().packets
