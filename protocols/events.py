"""What the group's state machine takes in and gives back.

A machine never waits, reads a clock, rolls dice or opens a socket. The driver hands it an event
and the time; it answers with the effects it wants. `peer/driver.py` performs them for real and a
simulator performs them in simulated time.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocols.messages import (
    ContributionHeader,
    Heartbeat,
    Message,
    OutcomeHeader,
    OutcomePush,
    PartialHeader,
    Plan,
)
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
    beat: Heartbeat | None = None
    """Where it stands: what a heartbeat is answered with."""


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
    until: int = 0
    """The outcomes of all rounds from there to before this one are here, too."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """What `GroupMachine.past` said before this peer stopped; comes before the `StateReady` of the
    state that it finds on its disk, if there is one. A majority that it was part of then counts on
    it: if it went on with the first one that it meets, a minority could pass for most of the group.
    And an epoch in which it has signed may not come again."""

    group: GroupName
    epoch: int
    """The latest that it knew."""
    firm: int
    """The latest round of that state's history at which most of the group stood at its state."""
    members: tuple[PeerId, ...]
    """Who else was in the group."""
    silent_s: float
    """For so long this peer was gone."""


@dataclass(frozen=True, slots=True)
class CompanyTold:
    """A fellow member tells a newcomer who else stood in the group lately, the silent included: who
    has never heard them could take what is left of a group for most of it."""

    group: GroupName
    members: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class OutcomesAtHand:
    """The same, later: there are more of them now."""

    until: int


@dataclass(frozen=True, slots=True)
class StateComing:
    """More of the state that is being fetched has come, and is what it should be."""


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
class PartialOffered:
    """`sender` opened a stream with its region's sum for a span. Admit it or raise."""

    sender: PeerId
    header: PartialHeader


@dataclass(frozen=True, slots=True)
class PartialFolded:
    """Its whole sum is in the accumulator; it speaks for those who `answered`."""

    sender: PeerId
    round: int
    span: int
    answered: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class PartialDelivered:
    """The aggregator took our region's sum."""

    peer: PeerId
    round: int
    span: int


@dataclass(frozen=True, slots=True)
class PartialUndelivered:
    """It did not; `refused` if it said no for good."""

    peer: PeerId
    round: int
    span: int
    refused: bool


@dataclass(frozen=True, slots=True)
class ContributionDelivered:
    """An aggregator, or our region's collector, took our span (or had closed it already)."""

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
    | Remembered
    | CompanyTold
    | StateComing | StateFailed | OutcomesAtHand | ContributionTaken | ContributionOffered
    | PartialOffered | PartialFolded | PartialDelivered | PartialUndelivered
    | ContributionFolded | ContributionDelivered | ContributionUndelivered | SpanReduced
    | OutcomeOffered | OutcomeHeld | FetchFinished | OutcomeDelivered | OutcomeUndelivered | Applied
    | Leaving
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
class SendPartial:
    """Freeze what came in for a span that we collect, and bring its mean to the aggregator;
    report PartialDelivered or PartialUndelivered."""

    plan: Plan
    span: int
    to: PeerId
    answered: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class DropSpan:
    """We no longer aggregate or collect this span: forget its accumulator."""

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
    digest: Digest
    """Where the donor stood when it was heard last; if that is our own state, nothing is due."""
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
    Send | SignPlan | TakeContribution | SendContribution | StopSending | CloseSpan | SendPartial
    | DropSpan
    | PushOutcome | FetchOutcomes | ApplyRound | FetchState | PublishRecord | PlanAdopted
    | GroupFormed | Suspected | Agreed | Differed
)  # fmt: skip
