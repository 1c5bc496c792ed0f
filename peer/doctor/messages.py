"""The probe protocol: what a doctor may ask any peer, and the answers.

A request is a call like any other (authenticated, capped, with a deadline), told from the driver's
messages by its first bytes. Requests and answers are a tag and a dataclass by its schema. What an
answer claims is one peer's word: `explain` says what follows only where several agree, or where the
worst that a lie can do is a wrong piece of advice.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Final, TypeVar

from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.schema import Exactly, Max, SchemaError, pack, unpack
from protocols.types import PeerId

PREFIX: Final = b"\xffmurmuration/probe/1"
"""No message of the protocol begins like this: those begin with their version."""

PIECE_BYTES_MAX: Final = 48 * 2**10  # with all around it within a call
SEEN_MAX: Final = 4  # connections between two peers: mostly one, two after a simultaneous open
SEEN_CHARS_MAX: Final = 128
NONCE_BYTES: Final = 16
HOST_CHARS_MAX: Final = 45  # the longest spelling of an IPv6 address


@dataclass(frozen=True, slots=True)
class Hello:
    """What time is it, and where do you see me?"""


@dataclass(frozen=True, slots=True)
class HelloAnswer:
    """A peer's clock and view."""

    time_ms: int
    """Unix time when it answered."""
    seen: Annotated[tuple[Annotated[str, Max(SEEN_CHARS_MAX)], ...], Max(SEEN_MAX)]
    """Multiaddresses from which it sees the asker's connections come."""
    dht_nodes: Annotated[int, Max(2**31)]
    """Other nodes in its routing table."""


@dataclass(frozen=True, slots=True)
class DialMe:
    """Open a TCP connection to this port, at the address where you see me and nowhere else."""

    port: Annotated[int, Max(65535)]
    nonce: Annotated[bytes, Exactly(NONCE_BYTES)]
    """What a listener of the asker's own says there; zeros if it has none."""


class Dialled(IntEnum):
    """What came of dialling back."""

    NONCE = 1
    """Open, and the asker's own listener spoke: no doubt that it was reached."""
    LIBP2P = 2
    """Open, and a libp2p node spoke."""
    OPEN = 3
    """Open; whoever listens said nothing that we know."""
    REFUSED = 4
    """The machine (or its router) says that nobody listens there."""
    SILENT = 5
    """No answer in time: dropped on the way, as firewalls and routers do."""
    UNREACHABLE = 6
    """No way there, says the network."""
    RELAYED = 7
    """The asker is connected through a relay: there is no address of its own to dial."""
    DECLINED = 8
    """Not tried: that port is none of a doctor's business."""


@dataclass(frozen=True, slots=True)
class DialAnswer:
    """What came of it."""

    outcome: Annotated[int, Max(255)]
    """A `Dialled`."""
    host: Annotated[str, Max(HOST_CHARS_MAX)]
    """The IP address that was dialled; empty: none."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """Take these bytes and give me so many: for round trips, and for bandwidth either way."""

    payload: Annotated[bytes, Max(PIECE_BYTES_MAX)]
    wanted: Annotated[int, Max(PIECE_BYTES_MAX)]


@dataclass(frozen=True, slots=True)
class ExchangeAnswer:
    """So many bytes, of no meaning."""

    payload: Annotated[bytes, Max(PIECE_BYTES_MAX)]


@dataclass(frozen=True, slots=True)
class Path:
    """What does your kernel say of our connection?"""


@dataclass(frozen=True, slots=True)
class PathAnswer:
    """TCP's own account of the answerer's end (Linux' tcp_info); all 0 where it is not known."""

    segments: Annotated[int, Max(2**32)]
    """Segments with data that left there, repetitions included."""
    repeated: Annotated[int, Max(2**32)]
    """Of them, those sent again and not reported as needless: about what was lost on the way."""
    rtt_us: Annotated[int, Max(2**32)]
    """Smoothed round-trip time."""
    mtu: Annotated[int, Max(2**32)]
    """The path's, as far as it has learnt."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Not now: enough was asked of me for a while."""

    seconds: Annotated[int, Max(3600)]


Request = Hello | DialMe | Exchange | Path
Answer = HelloAnswer | DialAnswer | ExchangeAnswer | PathAnswer | Wait

REQUESTS: Final[dict[int, type[Request]]] = {1: Hello, 2: DialMe, 3: Exchange, 4: Path}
ANSWERS: Final[dict[int, type[Answer]]] = {
    0: Wait, 1: HelloAnswer, 2: DialAnswer, 3: ExchangeAnswer, 4: PathAnswer,
}  # fmt: skip
_TAGS: Final = {kind: tag for table in (REQUESTS, ANSWERS) for tag, kind in table.items()}

A = TypeVar("A", bound=HelloAnswer | DialAnswer | ExchangeAnswer | PathAnswer)


def write_request(request: Request) -> bytes:
    """A request as bytes for a call."""
    return PREFIX + bytes([_TAGS[type(request)]]) + pack(request)


def write_answer(answer: Answer) -> bytes:
    """An answer as bytes."""
    return bytes([_TAGS[type(answer)]]) + pack(answer)


def read_request(sender: PeerId, data: bytes) -> Request:
    """The request in a call that begins with `PREFIX`.

    Raises:
        RemoteProtocolError: it is none.
    """
    body = data[len(PREFIX) :]
    kind = REQUESTS.get(body[0]) if body else None
    if kind is None or len(data) > limits.CONTROL_BYTES_MAX:
        raise RemoteProtocolError(sender, "a probe of no kind that is known here")
    try:
        return unpack(kind, body[1:])
    except SchemaError as error:
        raise RemoteProtocolError(sender, f"probe: {error}") from None


def read_answer(sender: PeerId, kind: type[A], data: bytes) -> A | Wait:
    """The answer to a request: of this kind, or a plea for patience.

    Raises:
        RemoteProtocolError: it is neither.
    """
    if len(data) > limits.CONTROL_BYTES_MAX or not data:
        raise RemoteProtocolError(sender, f"a probe's answer of {len(data)} bytes")
    found = ANSWERS.get(data[0])
    if found is not Wait and found is not kind:
        raise RemoteProtocolError(sender, f"answered a probe with {data[0]}")
    try:
        return unpack(Wait, data[1:]) if found is Wait else unpack(kind, data[1:])
    except SchemaError as error:
        raise RemoteProtocolError(sender, f"a probe's answer: {error}") from None


@dataclass(frozen=True, slots=True)
class Place:
    """An IP address and a TCP port."""

    host: str
    port: int

    @property
    def is_outside(self) -> bool:
        """Whether it is of the public internet."""
        return ipaddress.ip_address(self.host).is_global

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def place_of(address: str) -> Place | None:
    """The place in a multiaddress of the form /ip4/A/tcp/P or /ip6/A/tcp/P, whatever follows;
    None for any other, and for a relay's."""
    parts = address.split("/")
    if len(parts) < 5 or parts[1] not in ("ip4", "ip6") or parts[3] != "tcp":
        return None
    if "p2p-circuit" in parts or len(address) > limits.ADDRESS_CHARS_MAX:
        return None
    try:
        ip = ipaddress.ip_address(parts[2])
        port = int(parts[4]) if parts[4].isascii() and parts[4].isdigit() else 0
    except ValueError:
        return None
    if not 0 < port < 2**16 or ip.is_multicast or ip.is_unspecified or "%" in parts[2]:
        return None
    return Place(str(ip), port)
