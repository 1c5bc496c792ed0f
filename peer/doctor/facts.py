"""What a doctor found out: plain facts, for `explain` and for scripts. No opinions here."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from peer.doctor.messages import Dialled, Place


class Answered(StrEnum):
    """What came of trying an address."""

    YES = "yes"
    OTHER = "other"
    """Something listens there, but it is not that peer."""
    REFUSED = "refused"
    """The machine answers that nobody listens."""
    SILENT = "silent"
    """No packet came back."""
    NO_WAY = "no way"
    """This machine knows no way there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ViaFacts:
    """An address that was tried."""

    address: str
    answered: Answered
    reason: str = ""
    """In the transport's words."""
    web_port: bool | None = None
    """Where it was silent: whether packets to port 443 of that host come back. None: not tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """What TCP counted one way while little was sent."""

    segments: int
    repeated: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFacts:
    """What one peer that answered told us, and what was measured with it."""

    peer: str
    address: str
    """Where it is reached: a multiaddress, of a relay perhaps."""
    probes: bool = True
    """Whether it answers probes: older versions don't."""
    skew_s: float | None = None
    """Its clock less ours."""
    skew_error_s: float = 0.0
    """At most: half the round trip in which it was asked."""
    seen: Place | None = None
    """Where it sees our connection come from."""
    sent_from: Place | None = None
    """Where that connection really comes from, by our kernel's account."""
    outside: bool = False
    """Whether its address is of the public internet, so that it sees us as strangers do."""
    rtt_s: float | None = None
    """Least round trip of a small call, software included."""
    rtt_busy_s: float | None = None
    """TCP's own, while we were sending as fast as it goes."""
    dialled: dict[int, Dialled] = field(default_factory=dict)
    """Our ports that it dialled back, and what came of it."""
    dht_nodes: int = 0
    up: Flow | None = None
    down: Flow | None = None
    mtu: int = 0
    up_bps: float | None = None
    """Payload that it received from us, bit/s; None: not measured with it."""
    down_bps: float | None = None
    cut_short: bool = False
    """It wanted no more bytes, or they were through in a moment: the line may do more."""
    large_stuck: bool = False
    """Small calls pass, larger ones don't."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PortFacts:
    """The port on which this peer listens."""

    port: int
    """0: any."""
    given: bool
    """Whether the owner chose it."""
    free: bool
    """Whether it could be bound."""
    ours: bool
    """Whether the peer in the seat holds it."""
    error: str = ""
    """Why it can't be bound at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """This machine."""

    home: str
    disk_free: int
    """Bytes."""
    writable: bool
    memory_total: int
    """Bytes; 0: unknown."""
    memory_free: int
    threads: int
    device: str
    device_memory: int
    """Bytes; 0: the machine's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """The run that this peer would train, as far as it bears upon line and machine."""

    run: str
    name: str
    parameters: int
    method: str
    codec: str
    fragments: int
    exchange_s: float
    budget_s: float
    """What of it a contribution may take."""
    members_max: int
    aggregators_max: int
    snr_db: tuple[float, float]
    """(wished, least) where links choose their codec."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All of it."""

    hosts: tuple[str, ...]
    """This machine's own IP addresses, without loopback."""
    libp2p: PortFacts
    lane: PortFacts
    running: bool
    """Whether a peer trains in the seat now: it shares the line."""
    addresses: tuple[str, ...] = ()
    """What libp2p would tell others: addresses at routers and relays too."""
    vias: tuple[ViaFacts, ...] = ()
    peers: tuple[PeerFacts, ...] = ()
    dht_nodes: int = 0
    """Other nodes that ours met."""
    upload_bps: float | None = None
    """The owner's budget (`--upload`)."""
    machine: MachineFacts | None = None
    run: RunFacts | None = None
    quick: bool = False
    """Line and machine were not measured."""
    network_error: str = ""
    """Why libp2p did not start; empty: it did."""


class Nat(StrEnum):
    """What stands between this machine and the internet, as far as TCP shows it."""

    NONE = "none"
    """The world sees the address that this machine has."""
    CONE = "cone"
    """One outer port whoever is spoken to (endpoint-independent mapping, RFC 4787)."""
    SYMMETRIC = "symmetric"
    """Another outer port for everybody: no hole can be punched."""
    SOME = "some"
    """Translated; too few observers to tell how."""
    UNKNOWN = "unknown"
    """Nobody outside answered."""


class Reach(StrEnum):
    """Whether strangers can open connections to this peer."""

    DIRECT = "direct"
    RELAY = "relay"
    """Only through another peer."""
    REFUSED = "refused"
    """Not at all: answers only come to what it asked for."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conclusions:
    """What follows from the facts."""

    nat: Nat
    reach: Reach
    relay: str
    """Through whom, where it is a relay."""
    lane: bool | None
    """Whether the bulk lane's port can be reached as well; None: not tried."""
    skew_s: float | None
    rtt_s: float | None
    loss_up: float | None
    loss_down: float | None
    mtu: int
    up_bps: float | None
    down_bps: float | None
    at_least: bool
    """Whether the line may do more than was measured."""
    role: str
    """aggregator, member or unknown."""
    codec: str
    """What a round needs; empty: unknown."""
    fits: bool | None
    """Whether a round's exchange fits the line."""
    upload: str
    """What to give as --upload; empty: nothing."""


def plain(value: Any) -> Any:
    """A fact as JSON values: dataclasses as objects, enums by their names."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Dialled):
        return value.name.lower()
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value
