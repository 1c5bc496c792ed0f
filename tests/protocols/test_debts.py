"""One member's machine as it pays, or is paid: when a debt is refused, and when it is not yet."""

from __future__ import annotations

import pytest

from protocols.errors import RemoteProtocolError
from protocols.events import Tick
from protocols.gossip import RETRY_S_MAX, GossipConfig, GossipMachine
from protocols.gossip_events import (
    Answer,
    AnswerDebt,
    Aware,
    ContactsFound,
    DebtAnswered,
    DebtOffered,
    DebtTaken,
    FindContacts,
    Forget,
    GossipEffect,
    MixLost,
    Noted,
    Owed,
    PayDebt,
    RoundDone,
    StateReplaced,
)
from protocols.loans import Contact, Loan, mix_id
from protocols.records import Signed
from protocols.schema import pack
from protocols.types import GroupName, PeerId, RunId
from tests.protocols.samples import peer

RUN = RunId("ab" * 32)
EAST, WEST = GroupName("east"), GroupName("west")
ME, LENDER, SECOND, THIRD = (peer(i) for i in range(4))
LOAN = Loan(RUN, EAST, ME, 3, WEST, 5, 2, 4, 1, (Contact(LENDER, ()), Contact(SECOND, ())))
SIGNED = Signed(pack(LOAN), LENDER, bytes(64))
MIX = mix_id(SIGNED.body)
CONFIG = GossipConfig(run=RUN, units=4, every=4, slots=2, round_s=5.0, exchange_s=5.0)


def round_done(
    group: GroupName, number: int, members: tuple[PeerId, ...], *notes: Noted
) -> RoundDone:
    return RoundDone(group, number, members, notes, firm=True)


def offered(mask: int = LOAN.whole, inside: int = 0) -> DebtOffered:
    return DebtOffered(THIRD, SIGNED, LOAN, mask, inside, 0)


def debtor() -> GossipMachine:
    """Of a group that owes all of `LOAN`, with its next contact due."""
    machine = GossipMachine(ME, CONFIG)
    machine.handle(round_done(EAST, 4, (ME,), Noted(MIX, SIGNED, LOAN, 2, 4)), 0.0)
    machine.handle(Tick(), 0.5)  # there is nobody to be told by
    effects = machine.handle(round_done(EAST, 5, (ME,)), 1.0)
    assert PayDebt(MIX, LOAN.contacts[0]) in effects
    return machine


def say(machine: GossipMachine, now_s: float, who: PeerId, what: Answer) -> list[GossipEffect]:
    """An answer, and what the machine does once it has waited long enough."""
    effects = machine.handle(DebtAnswered(MIX, who, what), now_s)
    return effects + machine.handle(Tick(), now_s + RETRY_S_MAX)


# ── being paid ───────────────────────────────────────────────────────────────────────────
def test_a_lender_that_has_just_come_back_from_disk_asks_to_be_paid_later() -> None:
    machine = GossipMachine(LENDER, CONFIG)
    assert machine.handle(offered(), 0.0) == [AnswerDebt("later")]
    machine.handle(round_done(WEST, 8, (LENDER,)), 1.0)
    machine.handle(Tick(), 1.0)
    assert machine.handle(offered(), 2.0) == [AnswerDebt("kept")]


def test_who_has_moved_to_another_group_says_so_and_blames_nobody() -> None:
    machine = GossipMachine(SECOND, CONFIG)
    machine.handle(round_done(GroupName("south"), 8, (SECOND,)), 1.0)
    assert machine.handle(offered(), 2.0) == [AnswerDebt("elsewhere")]
    other = Loan(RunId("cd" * 32), EAST, ME, 3, WEST, 5, 2, 4, 1, LOAN.contacts)
    with pytest.raises(RemoteProtocolError, match="another run"):
        machine.handle(DebtOffered(THIRD, SIGNED, other, 3, 0, 0), 2.0)


def test_what_is_owed_in_part_is_never_taken_whole() -> None:
    """Else the slot would stay busy for a unit that nobody brings."""
    machine = GossipMachine(LENDER, CONFIG)
    machine.handle(round_done(WEST, 8, (LENDER,)), 1.0)
    machine.handle(DebtTaken(SIGNED, LOAN, 0b01), 2.0)
    machine.handle(StateReplaced(WEST, 9, {MIX: 0}), 3.0)
    assert machine.carried[MIX].left == 0b01


# ── paying ───────────────────────────────────────────────────────────────────────────────
def test_a_debt_is_lost_only_when_those_refuse_it_who_are_in_the_group_now() -> None:
    machine = debtor()
    assert PayDebt(MIX, LOAN.contacts[1]) in say(machine, 2.0, LENDER, "refused")
    assert FindContacts(MIX, WEST) in say(machine, 100.0, SECOND, "refused")
    found = (Contact(THIRD, ()),)
    machine.handle(ContactsFound(MIX, found), 200.0)
    assert PayDebt(MIX, found[0]) in machine.handle(Tick(), 200.0)
    effects = say(machine, 201.0, THIRD, "refused")
    assert [type(e) for e in effects] == [MixLost, Forget]
    assert not machine.debts


@pytest.mark.parametrize("answer", ["elsewhere", "unreachable"])
def test_where_the_contacts_are_gone_the_directory_is_asked(answer: Answer) -> None:
    machine = debtor()
    say(machine, 2.0, LENDER, answer)
    assert FindContacts(MIX, WEST) in say(machine, 100.0, SECOND, answer)
    machine.handle(ContactsFound(MIX, ()), 200.0)
    assert PayDebt(MIX, LOAN.contacts[0]) in machine.handle(Tick(), 200.0)
    say(machine, 201.0, LENDER, answer)
    say(machine, 301.0, SECOND, "refused")
    assert machine.debts == {MIX: LOAN.whole}, "not everybody has been asked"


def test_a_debt_of_other_units_in_the_state_that_comes_instead_keeps_its_payload() -> None:
    """Our history had unit 2, the donor's has unit 3."""
    machine = GossipMachine(ME, CONFIG)
    machine.handle(round_done(EAST, 4, (ME, THIRD), Noted(MIX, SIGNED, LOAN, 2, 3)), 0.0)
    told = Aware((ME, THIRD), (Owed(SIGNED, LOAN, 0b10),), sure=True)
    effects = machine.handle(StateReplaced(EAST, 4, {MIX: 0b10}, told), 1.0)
    assert machine.debts == {MIX: 0b10}
    assert Forget(MIX) not in effects
