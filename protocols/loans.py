"""What two groups show each other so that a mix happens on both sides or on neither.

A *mix* moves two groups' states towards each other over a range of units: the borrower adds d, the
lender subtracts the same coded bytes, so what they hold together stays what it was. It begins with
a `Loan`, the lender's signed word that it showed its state. The borrower's outcome that contains +d
is the commitment; from then on it owes -d, and proves it with that outcome's signed header, whose
`MixNote` carries the loan. So whoever has a header knows the whole story, and a mix has one id
everywhere: 63 bits of the hash of its loan.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Final

from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.identity import verify
from protocols.records import DigestField, GroupField, PeerIdField, RunIdField, Signed
from protocols.schema import Max, SchemaError, unpack
from protocols.types import GroupName, PeerId

LOAN_DOMAIN: Final = "loan"

Counter = Annotated[int, Max(2**48)]
Unit = Annotated[int, Max(limits.UNITS_MAX)]
MixId = int
"""1 to 2**63 - 1: names a loan."""


@dataclass(frozen=True, slots=True)
class Contact:
    """Somebody in a group who can be asked, and where."""

    peer: PeerIdField
    addresses: Annotated[
        tuple[Annotated[str, Max(limits.ADDRESS_CHARS_MAX)], ...],
        Max(limits.CONTACT_ADDRESSES_MAX),
    ]


@dataclass(frozen=True, slots=True)
class Loan:
    """`lender` showed `borrower` its state of units start..stop-1, and will take -d for it."""

    run: RunIdField
    borrower: GroupField
    asker: PeerIdField
    """Who asked, of the borrowing group."""
    borrower_round: Counter
    """The borrower's round when it asked: +d counts in the rounds soon after, or never."""
    lender: GroupField
    lender_round: Counter
    start: Unit
    stop: Unit
    number: Counter
    """Tells apart the loans of one lender."""
    contacts: Annotated[tuple[Contact, ...], Max(limits.CONTACTS_MAX)]
    """Of the lending group, the lender itself first: who can be paid."""

    def __post_init__(self) -> None:
        if self.stop <= self.start:
            raise ValueError("a loan of no units")
        if self.borrower == self.lender:
            raise ValueError("a group that borrows from itself")

    @property
    def whole(self) -> int:
        """The mask of all its units: bit i is unit start + i."""
        return (1 << (self.stop - self.start)) - 1

    def sign_for(self, group: GroupName) -> int:
        """What its mix does in `group`: +1, -1, or 0 where it has no business."""
        return 1 if group == self.borrower else -1 if group == self.lender else 0

    def until(self, group: GroupName, fragments: int) -> int:
        """The last round of `group` whose outcome may contain the mix, in a run whose state is
        exchanged in so many fragments: each unit has as many turns as without."""
        if group == self.borrower:
            return self.borrower_round + limits.MIX_COMMIT_ROUNDS * fragments
        return self.lender_round + limits.MIX_WINDOW_ROUNDS * fragments


@dataclass(frozen=True, slots=True)
class MixNote:
    """In an outcome's header: the mix of `loan` is inside units start..stop-1."""

    loan: Signed
    start: Unit
    stop: Unit
    content: DigestField
    """SHA-256 over the length and bytes of each unit's coded d."""

    def __post_init__(self) -> None:
        if self.stop <= self.start:
            raise ValueError("a mix in no units")
        if len(self.loan.body) > limits.LOAN_BYTES_MAX:
            raise ValueError("a loan that is too long")


def mix_id(body: bytes) -> MixId:
    """Of the loan with these signed bytes. Never 0."""
    return (int.from_bytes(hashlib.sha256(body).digest()[:8], "big") >> 1) or 1


def open_loan(signed: Signed, sender: PeerId) -> Loan:
    """The loan in `signed`, once its signature is verified. `sender` passed it to us.

    Raises:
        RemoteProtocolError: wrong signature, malformed, or not first among its own contacts.
    """
    if len(signed.body) > limits.LOAN_BYTES_MAX:
        raise RemoteProtocolError(sender, f"a loan of {len(signed.body)} bytes")
    if not verify(signed.signer, LOAN_DOMAIN, signed.body, signed.signature):
        raise RemoteProtocolError(sender, f"a loan with a wrong signature of {signed.signer}")
    try:
        loan = unpack(Loan, signed.body)
    except SchemaError as error:
        raise RemoteProtocolError(sender, str(error)) from None
    if not loan.contacts or loan.contacts[0].peer != signed.signer:
        raise RemoteProtocolError(sender, "a loan whose lender can't be asked")
    return loan


def mask_of(loan: Loan, start: int, stop: int) -> int:
    """Units start..stop-1 as a mask over the loan's; what lies outside of it is left out."""
    first, last = max(start, loan.start), min(stop, loan.stop)
    return ((1 << (last - first)) - 1) << (first - loan.start) if last > first else 0


def runs_of(mask: int) -> list[tuple[int, int]]:
    """The stretches of set bits as (start, stop) pairs."""
    found: list[tuple[int, int]] = []
    at = 0
    while mask:
        gap = (mask & -mask).bit_length() - 1
        mask >>= gap
        length = (~mask & (mask + 1)).bit_length() - 1
        found.append((at + gap, at + gap + length))
        mask >>= length
        at += gap + length
    return found
