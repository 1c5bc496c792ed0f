"""What the group's state machine takes in and gives back.

A machine never waits, reads a clock, rolls dice or opens a socket. The driver hands it an event
and the time; it answers with the effects it wants. `peer/driver.py` performs them for real and a
simulator performs them in simulated time.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocols.messages import ContributionHeader, Message, OutcomeHeader, OutcomePush, Plan
from protocols.records import PeerRecord, Signed
from protocols.types import Digest, GroupName, PeerId


# ── events: facts ────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; nothing else happened."""


@dataclass(frozen=True, slots=True)
class Received:
    """`message` arrived; `sender` is authenticated by the transport."""

    sender: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class Delivered:
    """A control message to `peer` was answered after `rtt_s`."""

    peer: PeerId
    rtt_s: float


@dataclass(frozen=True, slots=True)
class Undelivered:
    """`peer` could not be reached, or a stream with it broke."""

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class RecordSeen:
    """A valid, unexpired record, from the DHT or from its owner."""

    record: PeerRecord


@dataclass(frozen=True, slots=True)
class RecordIssued:
    """This peer's own record was signed anew."""

    signed: bytes
    record: PeerRecord


@dataclass(frozen=True, slots=True)
class StateReady:
    """The outer state is here: from a donor, from disk, or fresh from the manifest's seed."""

    round: int
    digest: Digest


@dataclass(frozen=True, slots=True)
class StateFailed:
    """A state transfer from `donor` did not work."""

    donor: PeerId
    reason: str
    busy: bool = False
    """It serves others just now and may be asked again soon."""


@dataclass(frozen=True, slots=True)
class ContributionTaken:
    """The training thread froze this round's work."""

    round: int
    weight: float


@dataclass(frozen=True, slots=True)
class ContributionOffered:
    """`sender` opened a stream with a contribution for a span. Admit it or raise."""

    sender: PeerId
    header: ContributionHeader


@dataclass(frozen=True, slots=True)
class ContributionFolded:
    """What `sender` sent for a span is in the accumulator; `complete` if all of it."""

    sender: PeerId
    round: int
    span: int
    complete: bool


@dataclass(frozen=True, slots=True)
class ContributionDelivered:
    """An aggregator took our span (or had closed it already)."""

    peer: PeerId
    round: int
    span: int


@dataclass(frozen=True, slots=True)
class ContributionUndelivered:
    """Our span did not reach its aggregator; `refused` if it said no for good."""

    peer: PeerId
    round: int
    span: int
    refused: bool


@dataclass(frozen=True, slots=True)
class SpanReduced:
    """Our reducer closed; the outcome is signed and held."""

    header: OutcomeHeader
    signed: Signed


@dataclass(frozen=True, slots=True)
class OutcomeOffered:
    """`sender` opened a stream with an outcome. Admit it or raise."""

    sender: PeerId
    push: OutcomePush
    header: OutcomeHeader


@dataclass(frozen=True, slots=True)
class OutcomeHeld:
    """An outcome's content arrived, matches its proof, and is held."""

    sender: PeerId
    header: OutcomeHeader
    signed: Signed
    fetched: bool
    """We asked for it (from somebody who may have applied it), rather than got it pushed."""


@dataclass(frozen=True, slots=True)
class FetchFinished:
    """A fetch of outcomes from `peer` ended; `spans` were received."""

    peer: PeerId
    round: int
    spans: int
    reason: str


@dataclass(frozen=True, slots=True)
class OutcomeDelivered:
    """A member took an outcome that we pushed."""

    peer: PeerId
    round: int
    span: int


@dataclass(frozen=True, slots=True)
class OutcomeUndelivered:
    peer: PeerId
    round: int
    span: int


@dataclass(frozen=True, slots=True)
class Applied:
    """The round's outcome is in the outer state, which now has `digest`."""

    round: int
    digest: Digest


@dataclass(frozen=True, slots=True)
class Leaving:
    """The owner wants to go: say goodbye and take no more part."""

    reason: str


Event = (
    Tick | Received | Delivered | Undelivered | RecordSeen | RecordIssued | StateReady
    | StateFailed | ContributionTaken | ContributionOffered | ContributionFolded
    | ContributionDelivered | ContributionUndelivered | SpanReduced | OutcomeOffered
    | OutcomeHeld | FetchFinished | OutcomeDelivered | OutcomeUndelivered | Applied | Leaving
)  # fmt: skip


# ── effects: wishes ──────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class Send:
    """Deliver a control message; report Delivered or Undelivered."""

    peer: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class SignPlan:
    """Sign the plan, deliver it to `to`; this peer has adopted it already."""

    plan: Plan
    to: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class TakeContribution:
    """Freeze the work done since the last one; report ContributionTaken."""

    round: int


@dataclass(frozen=True, slots=True)
class SendContribution:
    """Stream our units of a span to its aggregator (fold them here if that is us)."""

    plan: Plan
    span: int
    to: PeerId


@dataclass(frozen=True, slots=True)
class StopSending:
    """The span is closed: what of our contribution is still on its way comes too late."""

    round: int
    span: int


@dataclass(frozen=True, slots=True)
class CloseSpan:
    """Freeze the span's accumulator, whatever is in it, and report SpanReduced.

    `keep=False`: there was no quorum; the outcome is "no change".
    """

    plan: Plan
    span: int
    keep: bool


@dataclass(frozen=True, slots=True)
class DropSpan:
    """We no longer aggregate this span: forget its accumulator."""

    round: int
    span: int


@dataclass(frozen=True, slots=True)
class PushOutcome:
    """Stream a held outcome to a member; report OutcomeDelivered or OutcomeUndelivered."""

    epoch: int
    signed: Signed
    header: OutcomeHeader
    to: PeerId


@dataclass(frozen=True, slots=True)
class FetchOutcomes:
    """Ask `peer` for a round's outcomes (one span or all); OutcomeHeld each, FetchFinished."""

    peer: PeerId
    round: int
    span: int | None


@dataclass(frozen=True, slots=True)
class ApplyRound:
    """Apply exactly these outcomes, in span order; report Applied."""

    plan: Plan | None
    round: int
    outcomes: tuple[tuple[OutcomeHeader, Signed], ...]


@dataclass(frozen=True, slots=True)
class FetchState:
    """Download the outer state from `donor`; report StateReady or StateFailed."""

    donor: PeerId
    round: int
    step_back: bool = False
    """Take it even if it has fewer rounds than ours: the majority went another way."""
    parted: int | None = None
    """We and the donor went on without each other from this round on: what we learned since then
    is work, and is kept for the next contribution."""


@dataclass(frozen=True, slots=True)
class PublishRecord:
    """Something in our own record changed (the group): sign and store it anew."""

    group: GroupName


# ── effects that only tell ───────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class PlanAdopted:
    plan: Plan
    coordinator: PeerId
    due_s: float
    """On the machine's clock."""


@dataclass(frozen=True, slots=True)
class GroupFormed:
    group: GroupName
    members: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Suspected:
    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class Agreed:
    """All of `peers` reported the same digest at the start of `round`."""

    round: int
    digest: Digest
    peers: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Differed:
    round: int
    mine: Digest
    majority: Digest
    donor: PeerId


Effect = (
    Send | SignPlan | TakeContribution | SendContribution | StopSending | CloseSpan | DropSpan
    | PushOutcome | FetchOutcomes | ApplyRound | FetchState | PublishRecord | PlanAdopted
    | GroupFormed | Suspected | Agreed | Differed
)  # fmt: skip
