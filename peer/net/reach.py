"""What peers tell each other about how they can be reached: requests and answers, read with care.

These calls go between transports, beneath the protocol of rounds, to any peer or bootstrap node:

    Look       -->  dial me back, please.        <-- Seen      what I see of you; relays I know
    Introduce  -->  bring me together with it.   <-- Coming    where it is, and whether it dials
    Come       -->  somebody wants to meet you.  <-- Coming    (between introducer and sought)
    Cut        -->  may I cut and dial you anew? <-- Agreed    (between two, through a relay)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final, TypeVar

from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.schema import Max, SchemaError, pack, unpack
from protocols.types import PeerId

T = TypeVar("T")

ASK: Final = b"\xffmurmuration/reach/1/"
"""Begins every request. The messages of the protocol begin with its version instead."""

PORTS_MAX: Final = 2  # what it listens on, and what it announces
RELAYS_TOLD_MAX: Final = 8
REACH_BYTES_MAX: Final = 8 * 2**10  # sixteen of the longest addresses fit
PEER_CHARS_MAX: Final = 64  # a peer id has 52

_Address = Annotated[str, Max(limits.ADDRESS_CHARS_MAX)]
_Addresses = Annotated[tuple[_Address, ...], Max(limits.ADDRESSES_MAX)]
_Relays = Annotated[tuple[_Address, ...], Max(RELAYS_TOLD_MAX)]


@dataclass(frozen=True, slots=True)
class Look:
    """Try to reach me from outside, at the address that you see me at."""

    ports: Annotated[tuple[Annotated[int, Max(65535)], ...], Max(PORTS_MAX)]
    offers: bool
    """I relay for others."""
    addresses: _Addresses
    """Where, if I do."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of it."""

    place: _Address
    """The far end of your connection, a multiaddress; empty: we talk through a relay."""
    reached: bool
    """A new connection to that host and one of the ports came about."""
    offers: bool
    """I relay for others."""
    relays: _Relays
    """Multiaddresses of relays, mine first."""


@dataclass(frozen=True, slots=True)
class Introduce:
    """Bring me together with `peer`, to whom you are connected or know a way."""

    peer: Annotated[str, Max(PEER_CHARS_MAX)]
    reachable: bool
    """I can be dialled at `addresses`."""
    opened: bool
    """My router lets in what comes from where `peer` is seen: it may dial me where you see me."""
    addresses: _Addresses


@dataclass(frozen=True, slots=True)
class Come:
    """`peer` wants a connection with you."""

    peer: Annotated[str, Max(PEER_CHARS_MAX)]
    reachable: bool
    opened: bool
    addresses: _Addresses
    place: _Address
    """Where whoever introduces sees it; empty: only through a relay."""


@dataclass(frozen=True, slots=True)
class Coming:
    """How the one who is sought goes along."""

    dials: bool
    """It makes the connection itself, now."""
    opened: bool
    """Its router lets in what comes from where the other one is seen; dial it, now, at `place`."""
    place: _Address
    """Where whoever introduces sees it; empty: not known."""


@dataclass(frozen=True, slots=True)
class Cut:
    """I want to cut the relayed connection between us, and to dial you anew. I begin nothing."""


@dataclass(frozen=True, slots=True)
class Agreed:
    """What the other side says to that."""

    yes: bool
    """I have nothing in progress on it, and begin nothing until you have, or for some seconds."""


_KINDS: Final = {b"l": Look, b"i": Introduce, b"c": Come, b"k": Cut}
Question = Look | Introduce | Come | Cut


def write_question(question: Question) -> bytes:
    (kind,) = (kind for kind, one in _KINDS.items() if type(question) is one)
    return ASK + kind + pack(question)


def read_question(sender: PeerId, request: bytes) -> Question:
    """What `sender` asks.

    Raises:
        RemoteProtocolError: nothing that can be asked.
    """
    body = request[len(ASK) :]
    found: type[Question] | None = _KINDS.get(body[:1])
    if found is None or len(body) > REACH_BYTES_MAX:
        raise RemoteProtocolError(sender, "a question about reaching peers that nobody knows")
    return _read(sender, found, body[1:])


def read_seen(peer: PeerId, answer: bytes) -> Seen:
    """Raises RemoteProtocolError: it is none."""
    return _read(peer, Seen, answer)


def read_coming(peer: PeerId, answer: bytes) -> Coming:
    """Raises RemoteProtocolError: it is none."""
    return _read(peer, Coming, answer)


def read_agreed(peer: PeerId, answer: bytes) -> Agreed:
    """Raises RemoteProtocolError: it is none."""
    return _read(peer, Agreed, answer)


def _read(peer: PeerId, kind: type[T], data: bytes) -> T:
    try:
        if len(data) > REACH_BYTES_MAX:
            raise SchemaError(f"{len(data)} bytes")
        return unpack(kind, data)
    except SchemaError as error:
        raise RemoteProtocolError(peer, f"{kind.__name__}: {error}") from None
