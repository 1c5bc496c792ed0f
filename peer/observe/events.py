"""Everything a peer has to say, as data. Logs, metrics and the live view are listeners.

Facts in the past tense. Every event becomes one JSON line: `{"event": "RoundFinished", ...}`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class SpanReport:
    """What became of one span in a round: the proof behind "averaged"."""

    span: int
    start: int
    stop: int
    aggregator: str
    epoch: int
    contributors: dict[str, float]
    """Peer -> weight (tokens) of everyone with at least one unit inside."""
    coverage: float
    """Share of (roster member, unit) pairs that are inside the mean, 0..1."""
    bytes: int
    """Coded size of the outcome."""
    seconds: float
    """From the first contribution to the closed span, at the aggregator; 0 if not ours."""
    digest: str
    """SHA-256 of the outcome's coded units, hex."""


@dataclass(frozen=True, slots=True)
class Started:
    peer: str
    run: str
    run_name: str
    addresses: list[str]
    join_command: str
    device: str
    parameters: int
    seat: str
    """The folder that holds identity, checkpoints and logs."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something in words for the owner. `level`: info, warning or error."""

    level: str
    text: str


@dataclass(frozen=True, slots=True)
class ViaAnswered:
    address: str
    peer: str


@dataclass(frozen=True, slots=True)
class ViaFailed:
    """An address did not answer; it is tried again in `retry_s`."""

    address: str
    reason: str
    retry_s: float


@dataclass(frozen=True, slots=True)
class GroupChanged:
    group: str
    members: list[str]
    """Live members, this peer included."""


@dataclass(frozen=True, slots=True)
class MemberSuspected:
    """A member stopped answering; rounds go on without it."""

    peer: str
    reason: str


@dataclass(frozen=True, slots=True)
class PeerRefused:
    """A peer broke the rules; its message changed nothing."""

    peer: str
    reason: str


@dataclass(frozen=True, slots=True)
class RoundPlanned:
    """A plan is in force. A larger `epoch` for the same round replaced an earlier plan."""

    group: str
    round: int
    epoch: int
    coordinator: str
    roster: list[str]
    aggregators: list[str]
    """One per span."""
    due_s: float
    """Seconds until contributions are due."""
    round_s: float


@dataclass(frozen=True, slots=True)
class MixCommitted:
    """Our group has half of what lies between it and `group` in `units` of the units start..stop-1,
    and owes the other side the same, with the other sign."""

    mix: str
    group: str
    start: int
    stop: int
    units: int


@dataclass(frozen=True, slots=True)
class MixReturned:
    """Our group has taken its side of a mix that `group` began."""

    mix: str
    group: str
    start: int
    stop: int
    units: int


@dataclass(frozen=True, slots=True)
class MixSettled:
    """`group` says that it has its side: the mix is done."""

    mix: str
    group: str
    units: int


@dataclass(frozen=True, slots=True)
class MixDropped:
    """A mix with `group` happened on neither side."""

    mix: str
    group: str
    reason: str


@dataclass(frozen=True, slots=True)
class MixLost:
    """Our group has its side of a mix and `group` never will: in `units` units the two together no
    longer hold what they held."""

    mix: str
    group: str
    units: int
    reason: str


@dataclass(frozen=True, slots=True)
class ContributionSent:
    """This peer's work of a round went out (to itself included)."""

    round: int
    weight: float
    blocks: list[tuple[int, int]]
    """(epoch, block) pairs trained since the last contribution: disjoint between peers."""
    loss: float
    """Mean training loss over the round's inner steps."""
    steps: int


@dataclass(frozen=True, slots=True)
class WorkCarriedOver:
    """Part of this peer's work of a round came too late for its outcome.

    None of it is lost: it stays in the local progress and goes out with the next contribution,
    with a weight that falls with its age (`outer.staleness`). But for zeroth-order runs, where work
    holds for one round's state alone: there it is lost, and its blocks are trained again.
    """

    round: int
    share: float
    """Of the units, 0..1."""
    tokens: float
    """Weight that was not counted this time."""


@dataclass(frozen=True, slots=True)
class CodecChosen:
    """A link got its own codec for our part of a span (`codec.name = "auto"`)."""

    peer: str
    span: int
    codec: str
    bytes: int
    """Expected, like `seconds`."""
    seconds: float
    fits: bool
    """Whether that is within the round's budget."""
    reason: str


@dataclass(frozen=True, slots=True)
class RoundFinished:
    """A round's outcome was applied here."""

    group: str
    round: int
    epoch: int
    roster: list[str]
    spans: list[SpanReport]
    included: float
    """Share of units whose mean contains this peer's contribution, 0..1."""
    digest: str
    """Outer state after the round, hex: must agree within the group."""
    loss: float | None
    """Mean training loss of this peer's last inner steps."""
    validation_loss: float | None
    tokens_per_s: float
    bytes_up: int
    bytes_down: int
    """Since the round before."""
    waited_s: float
    """Time in which training stood still for the network since the round before."""
    seconds: float
    """From contributions due to outcome applied."""


@dataclass(frozen=True, slots=True)
class BlocksCounted:
    """The group's ledger of blocks after a round. Ranges are ordinals: epoch x blocks + position.

    Counts are blocks since the run began. trained + lost + elsewhere = all that is accounted for:
    every ordinal below `floor`, and some above it.
    """

    group: str
    round: int
    by: dict[str, list[tuple[int, int]]]
    """Newly trained in this round, by whom: each block once."""
    again: dict[str, list[tuple[int, int]]]
    """Trained once more."""
    trained: int
    repeated: int
    """Trained more than once, each time counted."""
    unasked: int
    """Of the repeated: not because they were re-issued, but because two peers took them at once."""
    reissued: int
    """Taken back from peers that went without accounting for them."""
    lost: int
    elsewhere: int
    """Left to other groups."""
    in_flight: int
    """Begun or trained, and not wholly inside the group's state yet."""
    held: int
    waiting: int
    """Free, among those."""
    floor: int


@dataclass(frozen=True, slots=True)
class BlocksReissued:
    """`peer` held these blocks (ordinals) and went without accounting for them."""

    round: int
    peer: str
    blocks: list[tuple[int, int]]
    reason: str


@dataclass(frozen=True, slots=True)
class BlocksLost:
    """The group went on without these blocks (ordinals): who held them never accounted for them."""

    round: int
    blocks: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class DigestsAgreed:
    """Everyone in the roster who reported has the same state at the start of `round`."""

    round: int
    digest: str
    peers: list[str]


@dataclass(frozen=True, slots=True)
class DigestDiffered:
    """This peer's state differs from the majority's; it heals from `donor`."""

    round: int
    mine: str
    majority: str
    donor: str


@dataclass(frozen=True, slots=True)
class StateReceived:
    donor: str
    round: int
    bytes: int
    seconds: float
    given: dict[str, int]
    """Donor -> bytes that came from it; the rest was here already."""


@dataclass(frozen=True, slots=True)
class StateArriving:
    """A long transfer goes on: so many of its bytes are here, each chunk checked."""

    donor: str
    bytes: int
    total: int


@dataclass(frozen=True, slots=True)
class Scored:
    """A member of the group (or this peer) told how its share of the questions went."""

    peer: str
    round: int
    sums: dict[str, Any]
    """Counts, and perplexity, exact_match and accuracy that follow: `Score.report`."""


@dataclass(frozen=True, slots=True)
class ScoredTogether:
    """What the group's shares come to together: all are in, or the next ones are due."""

    round: int
    peers: list[str]
    """Who told."""
    members: int
    """How many were to tell."""
    sums: dict[str, Any]
    """See `Scored`."""


@dataclass(frozen=True, slots=True)
class Reconciled:
    """A majority's state replaced ours after both had gone on without each other.

    What was learned here since `parted` is not lost: it is the next contribution's.
    """

    round: int
    parted: int
    """The last round at whose start both had the same state."""
    tokens: float
    """Behind what is kept."""


@dataclass(frozen=True, slots=True)
class StateServed:
    peer: str
    round: int
    bytes: int


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """A missed round was made good from others' outcomes."""

    round: int
    donor: str


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    round: int
    path: str
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class CheckpointLoaded:
    round: int
    path: str
    replayed: int
    """Rounds replayed from the journal on top."""
    skipped: list[str]
    """Damaged files that were passed over, with the reason."""


@dataclass(frozen=True, slots=True)
class Progress:
    """About once a second while training."""

    round: int
    epoch: int
    loss: float
    tokens_per_s: float
    steps: int
    due_s: float
    """Seconds until the round's contributions are due (0 while exchanging)."""
    phase: str
    """looking, syncing, training or exchanging."""
    group: str
    members: list[str]
    aggregators: list[str]
    coordinator: str
    bytes_up: int
    bytes_down: int
    """Since the start."""
    waited_share: float
    """Share of the time so far in which training stood still for the network."""


@dataclass(frozen=True, slots=True)
class DaemonRestarted:
    """The network daemon died and was brought back with the same identity."""

    reason: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Left:
    reason: str


Event = (
    Started | Notice | ViaAnswered | ViaFailed | GroupChanged | MemberSuspected | PeerRefused
    | RoundPlanned | CodecChosen | ContributionSent | MixCommitted | MixReturned | MixSettled
    | MixDropped | MixLost | WorkCarriedOver | RoundFinished | BlocksCounted | BlocksReissued
    | BlocksLost | DigestsAgreed | DigestDiffered | StateReceived | Reconciled | StateServed
    | StateArriving | CaughtUp | CheckpointSaved | CheckpointLoaded | Progress
    | Scored | ScoredTogether | DaemonRestarted | Left
)  # fmt: skip

Listener = Callable[[Event], None]
"""Called in the event loop; must not block and must not raise."""
