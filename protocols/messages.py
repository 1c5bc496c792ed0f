"""Everything that crosses the wire between two peers, with its bounds.

Control messages travel as unary calls (`encode` / `decode`); stream headers are the first frame of
a bulk stream. Plans and outcomes are `Signed`, because others than their author pass them on.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Final, TypeVar

from protocols import limits
from protocols.blocks import NO_BLOCKS, BlockReport
from protocols.errors import RemoteProtocolError
from protocols.identity import verify
from protocols.loans import MixNote
from protocols.records import (
    DigestField,
    GroupField,
    NameField,
    PeerIdField,
    RunIdField,
    Signed,
    TextField,
)
from protocols.schema import Max, SchemaError, pack, unpack
from protocols.types import PeerId

T = TypeVar("T")
Counter = Annotated[int, Max(2**48)]
Unit = Annotated[int, Max(limits.UNITS_MAX)]
SpanIndex = Annotated[int, Max(limits.AGGREGATORS_MAX)]
Pause = Annotated[int, Max(int(limits.HEARTBEAT_S_MAX * 1000))]
WEIGHT_MAX: Final = 1e15  # sums of weights stay exact in a float64, and far from infinity

HINT_MAX: Final = 2.0**20  # a distance in sizes of the momentum; beyond it fp32 is sent anyway

WaysMask = Annotated[bytes, Max((limits.ROSTER_MAX + 7) // 8)]
REGIONS_MAX: Final = 8  # a group in more places than these is no group

PLAN_DOMAIN: Final = "plan"
OUTCOME_DOMAIN: Final = "outcome"


# ── what plans are made of ───────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class Seat:
    """A roster member and its weight in elections: kbit/s of upload, 1 if not reachable.

    0: benched. It contributes, but did not deliver as aggregator, so it is not elected.
    """

    peer: PeerIdField
    weight: Annotated[int, Max(2**31)]
    region: Annotated[int, Max(REGIONS_MAX - 1)] = 0
    """Those with the same number are near each other (`regions`)."""


@dataclass(frozen=True, slots=True)
class Span:
    """Units start..stop-1 and who reduces them, since which epoch."""

    start: Unit
    stop: Unit
    aggregator: PeerIdField
    since_epoch: Counter


@dataclass(frozen=True, slots=True)
class Plan:
    """One round of one group, as its coordinator signed it.

    Times are durations from the moment of receipt, so that clocks need not agree.
    """

    run: RunIdField
    group: GroupField
    epoch: Counter
    round: Counter
    roster: Annotated[tuple[Seat, ...], Max(limits.ROSTER_MAX)]
    spans: Annotated[tuple[Span, ...], Max(limits.AGGREGATORS_MAX)]
    train_ms: Annotated[int, Max(24 * 3600 * 1000)]
    """Until contributions are due."""
    exchange_ms: Annotated[int, Max(24 * 3600 * 1000)]
    """From then until the round must have ended."""
    digest: DigestField
    """Outer state that everybody starts from."""

    @property
    def peers(self) -> list[PeerId]:
        return [seat.peer for seat in self.roster]


@dataclass(frozen=True, slots=True)
class Contributor:
    """Whose work is inside an outcome, with what weight, in which of the span's units."""

    peer: PeerIdField
    weight: float
    mask: Annotated[bytes, Max(limits.SPAN_MASK_BYTES_MAX)]
    """Bit i (least significant first) = unit start+i is inside; empty = all of them."""
    blocks: BlockReport = NO_BLOCKS
    """What it said of its blocks, the same in all spans that hold this contribution."""

    def covers(self, offset: int) -> bool:
        return not self.mask or bool(self.mask[offset // 8] >> (offset % 8) & 1)


def check_contributors(contributors: tuple[Contributor, ...], start: int, stop: int) -> None:
    """Raise ValueError where they can't be those of units start..stop-1."""
    size = (stop - start + 7) // 8
    if stop <= start:
        raise ValueError("an empty span")
    if any(c.mask and len(c.mask) != size for c in contributors):
        raise ValueError("a mask of the wrong size")
    if any(not 0.0 < c.weight <= WEIGHT_MAX for c in contributors):
        raise ValueError("a weight that is not positive, or too large")
    if len({c.peer for c in contributors}) != len(contributors):
        raise ValueError("a contributor who is there twice")


@dataclass(frozen=True, slots=True)
class OutcomeHeader:
    """The proof of one reduced span. `content` is SHA-256 over its coded units."""

    run: RunIdField
    group: GroupField
    round: Counter
    epoch: Counter
    span: SpanIndex
    start: Unit
    stop: Unit
    contributors: Annotated[tuple[Contributor, ...], Max(limits.ROSTER_MAX)]
    content: DigestField
    content_bytes: Counter
    seconds: float
    base: DigestField = b""
    """Digest of the state that the round started from: on another one it means nothing."""
    mixes: Annotated[tuple[MixNote, ...], Max(limits.MIX_NOTES_MAX)] = ()
    """Mixes with other groups that ride along, each unit of each once."""

    def __post_init__(self) -> None:
        if any(not self.start <= m.start < m.stop <= self.stop for m in self.mixes):
            raise ValueError("a mix outside of its span")
        check_contributors(self.contributors, self.start, self.stop)
        if not self.seconds >= 0.0:
            raise ValueError("a duration below zero")


# ── control messages ─────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class Hello:
    """First words to a peer: who I am, in which run, at which version."""

    version: Annotated[int, Max(2**16)]
    run: RunIdField
    record: Annotated[bytes, Max(limits.RECORD_BYTES_MAX)]
    round: Counter
    digest: DigestField
    ready: bool
    """Whether it holds the run's state (a donor); a fresh joiner does not."""
    answer: bool
    """Whether a Hello is wanted back."""
    next_ms: Pause
    """The sender's next word to its group follows within this time."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """I live, and this is where I stand."""

    run: RunIdField
    group: GroupField
    epoch: Counter
    round: Counter
    digest: DigestField
    ready: bool
    next_ms: Pause
    """The sender's next word to its group follows within this time."""
    firm: Counter = 0
    """The latest round of its history at which most of the group stood at its state; at most
    `round`."""
    since: Counter = 0
    """The round at which it took the history that it has now, from others or from its own disk."""
    near: WaysMask = b""
    """To whom of the roster of `epoch`'s plan the sender's way is short, and ..."""
    far: WaysMask = b""
    """... long (`regions.Ways`); both empty if none is long."""


@dataclass(frozen=True, slots=True)
class PlanIssued:
    """A coordinator's plan (signed under PLAN_DOMAIN)."""

    plan: Signed


@dataclass(frozen=True, slots=True)
class PlanRefused:
    """The sender does not follow a plan, and says which epoch it knows."""

    run: RunIdField
    group: GroupField
    epoch: Counter
    known_epoch: Counter
    reason: TextField


@dataclass(frozen=True, slots=True)
class SpanHeld:
    """To a span's new aggregator: it was already reduced before; here is the proof."""

    run: RunIdField
    group: GroupField
    round: Counter
    span: SpanIndex
    outcome: Signed


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The sender leaves of its own will."""

    run: RunIdField
    reason: TextField


@dataclass(frozen=True, slots=True)
class DebtClosed:
    """To fellow members: nobody need pay this debt any more."""

    run: RunIdField
    group: GroupField
    mix: Annotated[int, Max(2**63 - 1)]
    paid: bool
    """Or given up."""


Message = Hello | Heartbeat | PlanIssued | PlanRefused | SpanHeld | Goodbye | DebtClosed


# ── stream headers ───────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class ContributionHeader:
    """A member's work for one span follows, a frame per unit."""

    run: RunIdField
    group: GroupField
    round: Counter
    epoch: Counter
    span: SpanIndex
    start: Unit
    stop: Unit
    weight: float
    blocks: BlockReport = NO_BLOCKS
    """Which blocks of the data are behind it."""
    loans: Annotated[tuple[Signed, ...], Max(limits.LOANS_MAX)] = ()
    """Of the mixes with other groups that ride along in these units."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight <= WEIGHT_MAX:
            raise ValueError("a weight out of range")
        if any(len(loan.body) > limits.LOAN_BYTES_MAX for loan in self.loans):
            raise ValueError("a loan that is too long")


@dataclass(frozen=True, slots=True)
class PartialHeader:
    """A collector's sum over its region for one span follows: the weighted mean of what its
    `contributors` sent, a frame per unit."""

    run: RunIdField
    group: GroupField
    round: Counter
    epoch: Counter
    span: SpanIndex
    start: Unit
    stop: Unit
    contributors: Annotated[tuple[Contributor, ...], Max(limits.ROSTER_MAX)]
    """Whose work is inside; what is in none of their masks is not sent."""
    answered: Annotated[tuple[PeerIdField, ...], Max(limits.ROSTER_MAX)]
    """Who has said what it has to say, the contributors included."""

    def __post_init__(self) -> None:
        check_contributors(self.contributors, self.start, self.stop)


@dataclass(frozen=True, slots=True)
class OutcomePush:
    """A reduced span follows; the sender acts under `epoch`."""

    epoch: Counter
    outcome: Signed


@dataclass(frozen=True, slots=True)
class OutcomeQuery:
    """Please send what you hold of a round: one span, or all (span = None)."""

    run: RunIdField
    group: GroupField
    round: Counter
    span: SpanIndex | None


@dataclass(frozen=True, slots=True)
class StateQuery:
    """Please give chunks of an outer state: of the one with this `digest`, or if that is empty of
    any of yours of at least `round` rounds."""

    run: RunIdField
    round: Counter = 0
    digest: DigestField = b""


@dataclass(frozen=True, slots=True)
class AssetQuery:
    """Please send a file that the manifest names, from `offset` on."""

    run: RunIdField
    name: NameField
    offset: Counter


@dataclass(frozen=True, slots=True)
class LoanQuery:
    """Another group's member asks to see our state of units start..stop-1, to mix with it."""

    run: RunIdField
    group: GroupField
    """The asker's."""
    lender: GroupField
    """Which group it takes us for."""
    round: Counter
    start: Unit
    stop: Unit
    hints: Annotated[tuple[float, ...], Max(8)]
    """How far apart the last two states were, in units of the momentum's size, for each vector of
    the state; empty if it does not know."""

    def __post_init__(self) -> None:
        if self.stop <= self.start:
            raise ValueError("a query for no units")
        if any(not 0.0 < hint <= HINT_MAX for hint in self.hints):
            raise ValueError("a hint out of range")


@dataclass(frozen=True, slots=True)
class DebtPush:
    """The borrower's outcome with +d was applied: here is the proof, and -d for your group."""

    run: RunIdField
    loan: Signed
    units: Annotated[bytes, Max(limits.SLOT_UNITS_MAX // 8)]
    """Bit i (least significant first): for unit loan.start + i."""

    def __post_init__(self) -> None:
        if len(self.loan.body) > limits.LOAN_BYTES_MAX:
            raise ValueError("a loan that is too long")


@dataclass(frozen=True, slots=True)
class LoanAgain:
    """To the lender: we are too far away to read these units of your loan; show them exactly."""

    run: RunIdField
    loan: Signed
    units: Annotated[tuple[Unit, ...], Max(limits.EXACT_UNITS_MAX)]

    def __post_init__(self) -> None:
        if len(self.loan.body) > limits.LOAN_BYTES_MAX:
            raise ValueError("a loan that is too long")
        if any(a >= b for a, b in pairwise(self.units)):
            raise ValueError("units that are out of order, or there twice")


@dataclass(frozen=True, slots=True)
class DebtsQuery:
    """To a fellow member: what does our group owe, and who was in it before us?"""

    run: RunIdField
    group: GroupField


StreamHeader = (
    ContributionHeader | PartialHeader | OutcomePush | OutcomeQuery | StateQuery | AssetQuery
    | LoanQuery | DebtPush | LoanAgain | DebtsQuery
)  # fmt: skip

_MESSAGES: Final[dict[int, type]] = {
    1: Hello,
    2: Heartbeat,
    3: PlanIssued,
    4: PlanRefused,
    5: SpanHeld,
    6: Goodbye,
    7: DebtClosed,
}
_HEADERS: Final[dict[int, type]] = {
    65: ContributionHeader,
    66: OutcomePush,
    67: OutcomeQuery,
    68: StateQuery,
    69: AssetQuery,
    70: LoanQuery,
    71: DebtPush,
    72: LoanAgain,
    73: DebtsQuery,
    74: PartialHeader,
}
_TAG_OF: Final[dict[type, int]] = {k: t for t, k in (_MESSAGES | _HEADERS).items()}


def encode(message: Message | StreamHeader) -> bytes:
    """Version byte, tag byte, canonical msgpack."""
    return bytes((limits.PROTOCOL_VERSION, _TAG_OF[type(message)])) + pack(message)


def decode(data: bytes, sender: PeerId) -> Message:
    """The control message in `data`.

    Raises:
        RemoteProtocolError: oversized, of another version, of no known type, or malformed.
    """
    return _decode(data, sender, _MESSAGES, limits.CONTROL_BYTES_MAX)


def decode_beat(data: bytes, sender: PeerId) -> Heartbeat:
    """The heartbeat in `data`, which answers one of ours; raises like `decode`."""
    message = decode(data, sender)
    if not isinstance(message, Heartbeat):
        raise RemoteProtocolError(sender, f"answers with a {type(message).__name__}")
    return message


def decode_header(data: bytes, sender: PeerId) -> StreamHeader:
    """The stream header in `data`; raises like `decode`."""
    return _decode(data, sender, _HEADERS, limits.STREAM_HEADER_BYTES_MAX)


def _decode(data: bytes, sender: PeerId, kinds: dict[int, type[T]], bytes_max: int) -> T:
    if len(data) > bytes_max:
        raise RemoteProtocolError(sender, f"message of {len(data)} bytes, at most {bytes_max}")
    if len(data) < 2:
        raise RemoteProtocolError(sender, "message too short")
    if data[0] != limits.PROTOCOL_VERSION:
        raise RemoteProtocolError(
            sender, f"speaks protocol version {data[0]}, we speak {limits.PROTOCOL_VERSION}"
        )
    kind = kinds.get(data[1])
    if kind is None:
        raise RemoteProtocolError(sender, f"unknown message type {data[1]}")
    try:
        return unpack(kind, data[2:])
    except SchemaError as error:
        raise RemoteProtocolError(sender, str(error)) from None


def open_signed(signed: Signed, domain: str, kind: type[T], sender: PeerId) -> T:
    """What `signed` holds, once its signature is verified. `sender` passed it to us.

    Raises:
        RemoteProtocolError: wrong signature or malformed body; names the sender.
    """
    if not verify(signed.signer, domain, signed.body, signed.signature):
        raise RemoteProtocolError(sender, f"{domain} with a wrong signature of {signed.signer}")
    try:
        return unpack(kind, signed.body)
    except SchemaError as error:
        raise RemoteProtocolError(sender, str(error)) from None
