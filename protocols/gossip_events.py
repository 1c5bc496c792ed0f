"""What the gossip machine takes in and gives back, as `protocols.events` is for the group's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from protocols.events import Send, Tick
from protocols.loans import Contact, Loan, MixId
from protocols.messages import DebtClosed, LoanQuery
from protocols.records import Signed
from protocols.types import GroupName, PeerId

Answer = Literal["paid", "kept", "later", "refused", "elsewhere", "unreachable"]
"""To a debt: all of it is in the group's state; it is held and waits for an average; not now; not
ever (the group never lent for it, or it is too old); we are in another; nobody there."""


# ── events: facts ────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class Noted:
    """An applied outcome contains a mix in units start..stop-1."""

    mix: MixId
    signed: Signed
    loan: Loan
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class RoundDone:
    """A round was applied: the state has `round` rounds now."""

    group: GroupName
    round: int
    members: tuple[PeerId, ...]
    """Who lives in the group, ourselves included."""
    notes: tuple[Noted, ...]
    firm: bool
    """Most of the group stood at the state before this round: no part of it that was cut off from
    the others, and whose history will give way to theirs."""


@dataclass(frozen=True, slots=True)
class Owed:
    """What a fellow member says that our group owes, with proofs and payload; `inside`: the units
    of it that our own state has, or may have had and forgotten."""

    signed: Signed
    loan: Loan
    inside: int


@dataclass(frozen=True, slots=True)
class Aware:
    """What a state alone does not tell of its group: who was in it before, and what it owes."""

    roster: tuple[PeerId, ...]
    owed: tuple[Owed, ...]
    sure: bool
    """Whether the teller itself was there or has it from one who was."""


@dataclass(frozen=True, slots=True)
class StateReplaced:
    """A donor's state took the place of ours, or ours is from disk; of each mix that we know,
    these units are in it, or may be and are forgotten. `aware`: what its donor told with it."""

    group: GroupName
    round: int
    inside: Mapping[MixId, int]
    aware: Aware | None = None


@dataclass(frozen=True, slots=True)
class DebtsFetched:
    """What `peer` told, or None: it did not."""

    peer: PeerId
    aware: Aware | None


@dataclass(frozen=True, slots=True)
class ContactsFound:
    """Who is in the group that we owe a mix, by the directory; perhaps nobody."""

    mix: MixId
    contacts: tuple[Contact, ...]


@dataclass(frozen=True, slots=True)
class GroupsFound:
    """Some other groups of the run, drawn at random, each with members to ask."""

    slot: int
    groups: tuple[tuple[GroupName, tuple[Contact, ...]], ...]


@dataclass(frozen=True, slots=True)
class Borrowed:
    """The lender showed its state, d is computed and coded."""

    slot: int
    signed: Signed
    loan: Loan


@dataclass(frozen=True, slots=True)
class NotBorrowed:
    """It did not work out; `gone` if nobody answered (rather than: said no)."""

    slot: int
    peer: PeerId
    gone: bool


@dataclass(frozen=True, slots=True)
class LoanAsked:
    """`sender` asks to see our state; `contacts` are who may be named in the loan, we first."""

    sender: PeerId
    query: LoanQuery
    contacts: tuple[Contact, ...]


@dataclass(frozen=True, slots=True)
class DebtOffered:
    """`sender` shows a loan and offers -d for the units in `mask`; `inside`: what our state has of
    it; `forgotten`: what it would not know any more, and so can't take."""

    sender: PeerId
    signed: Signed
    loan: Loan
    mask: int
    inside: int
    forgotten: int


@dataclass(frozen=True, slots=True)
class DebtTaken:
    """The payload of an admitted debt is here and matches its proof; `left`: its units that our
    state does not have yet."""

    signed: Signed
    loan: Loan
    left: int


@dataclass(frozen=True, slots=True)
class DebtAnswered:
    """What `peer` said when we paid."""

    mix: MixId
    peer: PeerId
    answer: Answer


@dataclass(frozen=True, slots=True)
class ClosedHeard:
    """A fellow member says that a debt needs no more paying."""

    sender: PeerId
    message: DebtClosed


GossipEvent = (
    Tick | RoundDone | StateReplaced | GroupsFound | Borrowed | NotBorrowed | LoanAsked
    | DebtOffered | DebtTaken | DebtAnswered | ClosedHeard | DebtsFetched | ContactsFound
)  # fmt: skip


# ── effects: wishes ──────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class FindGroups:
    """Draw some other groups at random; report GroupsFound, with none if there are none."""

    slot: int
    count: int


@dataclass(frozen=True, slots=True)
class Borrow:
    """Ask a peer for its state and compute d; report Borrowed or NotBorrowed."""

    slot: int
    query: LoanQuery
    to: Contact


@dataclass(frozen=True, slots=True)
class GrantLoan:
    """Answer LoanAsked: sign the loan and show the state."""

    loan: Loan


@dataclass(frozen=True, slots=True)
class DenyLoan:
    """Answer LoanAsked: not now."""

    reason: str


@dataclass(frozen=True, slots=True)
class PayDebt:
    """Bring -d with its proofs to a member of the lending group; report DebtAnswered."""

    mix: MixId
    to: Contact


@dataclass(frozen=True, slots=True)
class AnswerDebt:
    """Answer DebtOffered: "kept" means that the payload is wanted, DebtTaken follows."""

    answer: Answer


@dataclass(frozen=True, slots=True)
class FindContacts:
    """None of those that we know of `group` answers: look it up; report ContactsFound."""

    mix: MixId
    group: GroupName


@dataclass(frozen=True, slots=True)
class FetchDebts:
    """Ask a fellow member what the group owes; report DebtsFetched."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Forget:
    """Nobody here needs this mix's payload any more."""

    mix: MixId


# ── effects that only tell ───────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class MixCommitted:
    """Our group has taken +d in so many units and owes the other side -d."""

    mix: MixId
    loan: Loan
    units: int


@dataclass(frozen=True, slots=True)
class MixReturned:
    """Our group has taken -d in all units that it was owed: this side is done."""

    mix: MixId
    loan: Loan
    units: int


@dataclass(frozen=True, slots=True)
class MixSettled:
    """The lending group says that it has -d: both sides are done."""

    mix: MixId
    loan: Loan
    units: int


@dataclass(frozen=True, slots=True)
class MixDropped:
    """It happened on neither side."""

    mix: MixId
    loan: Loan
    reason: str


@dataclass(frozen=True, slots=True)
class MixLost:
    """Our side has +d and the other never will have -d: that much mass came from nowhere."""

    mix: MixId
    loan: Loan
    units: int
    reason: str


GossipTold = MixCommitted | MixReturned | MixSettled | MixDropped | MixLost
GossipEffect = (
    FindGroups | Borrow | GrantLoan | DenyLoan | PayDebt | AnswerDebt | FindContacts | FetchDebts
    | Forget | Send | GossipTold
)  # fmt: skip
