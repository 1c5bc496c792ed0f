"""What this machine's kernel knows of its TCP connections and addresses.

The connections are the network daemon's; Linux tells their owner's account of segments sent and
sent again to anybody in the same network namespace (NETLINK_SOCK_DIAG, see sock_diag(7) and
`struct tcp_info` in linux/tcp.h). Elsewhere nothing is known, and nothing is made up.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from peer.doctor.messages import Place

_SOCK_DIAG_BY_FAMILY: Final = 20
_REQUEST_DUMP: Final = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_INET_DIAG_INFO: Final = 2
_ESTABLISHED: Final = 1
_HEADER: Final = struct.Struct("=IHHII")
_MESSAGE_BYTES: Final = 72  # struct inet_diag_msg
_ANSWER_BYTES_MAX: Final = 4 * 2**20  # some ten thousand connections; then we look no further
_READ_S: Final = 0.5  # the kernel answers at once, or not at all
_CGNAT: Final = ipaddress.ip_network("100.64.0.0/10")


@dataclass(frozen=True, slots=True)
class Connection:
    """One end of a TCP connection."""

    local: Place
    remote: Place
    segments: int
    """With data, repetitions included."""
    repeated: int
    """Sent again, and not reported as needless by the other side (DSACK)."""
    rtt_us: int
    mtu: int
    inode: int
    """Of the socket: tells whose it is."""


def connections() -> list[Connection]:
    """Established TCP connections of this network namespace; none where the kernel won't say.

    Costs well under a millisecond for the connections of a usual machine; blocks that long.
    """
    if sys.platform != "linux":
        return []
    found = []
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError, struct.error, ValueError):
            found += [c for row in _dump(family) if (c := _read(family, row)) is not None]
    return found


def connection_of(pid: int, remotes: Iterable[Place]) -> Connection | None:
    """A process's connection to one of these places: of several, the one that carried most.

    Other processes may be connected to the same place: two peers behind one address are.
    """
    own = _sockets_of(pid)
    wanted = set(remotes)
    fitting = [c for c in connections() if c.remote in wanted and c.inode in own]
    return max(fitting, key=lambda c: c.segments, default=None)


def own_hosts() -> list[str]:
    """This machine's IP addresses, as far as packets to the world or to a neighbour leave from
    them; without loopback. No packet is sent."""
    found = []
    # Documentation addresses (RFC 5737, RFC 3849), and private ones: other routes may lead there.
    for target in ("192.0.2.1", "10.0.0.1", "172.16.0.1", "192.168.0.1", "2001:db8::1"):
        family = socket.AF_INET6 if ":" in target else socket.AF_INET
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            host = str(probe.getsockname()[0])
            if not ipaddress.ip_address(host).is_loopback and host not in found:
                found.append(host)
    return found


def is_carriers(host: str) -> bool:
    """Whether an address is from the block for carriers' NAT (RFC 6598)."""
    ip = ipaddress.ip_address(host)
    return ip.version == 4 and ip in _CGNAT


def _sockets_of(pid: int) -> set[int]:
    """Inodes of the sockets that a process of this user holds."""
    found = set()
    with contextlib.suppress(OSError):
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError, ValueError):  # closed meanwhile; no socket
                name = str(handle.readlink())
                if name.startswith("socket:["):
                    found.add(int(name[len("socket:[") : -1]))
    return found


# ── netlink ──────────────────────────────────────────────────────────────────────────────
def _dump(family: int) -> list[bytes]:
    request = struct.pack(
        "=BBBBI", family, socket.IPPROTO_TCP, 1 << (_INET_DIAG_INFO - 1), 0, 1 << _ESTABLISHED
    ) + bytes(48)  # struct inet_diag_req_v2, any socket
    head = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0)
    rows: list[bytes] = []
    read = 0
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4)  # NETLINK_SOCK_DIAG
    with netlink:
        netlink.settimeout(_READ_S)
        netlink.send(head + request)
        while read < _ANSWER_BYTES_MAX:
            data = netlink.recv(2**17)
            read += len(data)
            while len(data) >= _HEADER.size:
                size, kind, *_ = _HEADER.unpack_from(data)
                if kind in (_NLMSG_DONE, _NLMSG_ERROR) or size < _HEADER.size:
                    return rows
                rows.append(data[_HEADER.size : size])
                data = data[(size + 3) & ~3 :]
    return rows


def _read(family: int, row: bytes) -> Connection | None:
    local_port, remote_port = struct.unpack_from("!HH", row, 4)
    length = 4 if family == socket.AF_INET else 16
    local = socket.inet_ntop(family, row[8 : 8 + length])
    remote = socket.inet_ntop(family, row[24 : 24 + length])
    rest = row[_MESSAGE_BYTES:]
    while len(rest) >= 4:
        size, kind = struct.unpack_from("=HH", rest)
        if size < 4:
            return None
        if kind == _INET_DIAG_INFO:
            info = rest[4:size].ljust(224, b"\0")  # older kernels tell less
            mtu, rtt_us = _u32(info, 60), _u32(info, 68)
            retrans, needless = _u32(info, 100), _u32(info, 216)
            return Connection(
                Place(_plain(local), local_port), Place(_plain(remote), remote_port),
                _u32(info, 156), max(0, retrans - needless), rtt_us, mtu, _u32(row, 68),
            )  # fmt: skip
        rest = rest[(size + 3) & ~3 :]
    return None


def _u32(data: bytes, offset: int) -> int:
    value: int = struct.unpack_from("=I", data, offset)[0]
    return value


def _plain(host: str) -> str:
    """IPv4 inside IPv6 as IPv4: a socket that listens on both shows it so."""
    mapped = getattr(ipaddress.ip_address(host), "ipv4_mapped", None)
    return str(mapped or ipaddress.ip_address(host))
