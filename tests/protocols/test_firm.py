"""What a part of a group that is cut off does is not final: gossip waits for most of the group."""

from __future__ import annotations

from protocols.gossip import GossipConfig, GossipMachine
from protocols.gossip_events import (
    AnswerDebt,
    Aware,
    DebtOffered,
    DebtsFetched,
    DebtTaken,
    Noted,
    PayDebt,
    RoundDone,
    StateReplaced,
)
from protocols.loans import Contact, Loan, mix_id
from protocols.records import Signed
from protocols.schema import pack
from protocols.types import GroupName, PeerId
from tests.protocols.samples import RUN

HERE, THERE = GroupName("here"), GroupName("there")
ME, MATE, LENDER = PeerId("me"), PeerId("mate"), PeerId("lender")


def machine() -> GossipMachine:
    """Of a member that was there from the first round."""
    config = GossipConfig(run=RUN, units=2, every=8, slots=1, round_s=5.0, exchange_s=5.0)
    gossip = GossipMachine(ME, config)
    gossip.handle(done(1, firm=False), 0.0)
    return gossip


def loan_of(borrower: GroupName, lender: GroupName, signer: PeerId) -> tuple[Signed, Loan]:
    loan = Loan(RUN, borrower, ME, 1, lender, 1, 0, 2, 1, (Contact(signer, ()),))
    return Signed(pack(loan), signer, bytes(64)), loan


def done(number: int, *notes: Noted, firm: bool) -> RoundDone:
    return RoundDone(HERE, number, (MATE, ME), notes, firm)


def pays(gossip: GossipMachine, event: RoundDone) -> bool:
    effects = gossip.handle(event, 1000.0 * event.round)
    return any(isinstance(effect, PayDebt) for effect in effects)


def test_a_debt_is_paid_when_most_of_the_group_had_what_it_is_for() -> None:
    gossip = machine()
    signed, loan = loan_of(HERE, THERE, LENDER)
    note = Noted(mix_id(signed.body), signed, loan, 0, 2)
    assert not pays(gossip, done(2, note, firm=True))
    assert not pays(gossip, done(3, firm=False))
    assert not pays(gossip, done(4, firm=False))
    assert pays(gossip, done(5, firm=True)) or pays(gossip, done(6, firm=False))


def test_another_state_has_to_become_that_of_most_anew() -> None:
    gossip = machine()
    signed, loan = loan_of(HERE, THERE, LENDER)
    mix = mix_id(signed.body)
    gossip.handle(done(2, Noted(mix, signed, loan, 0, 2), firm=True), 0.0)
    gossip.handle(StateReplaced(HERE, 4, {mix: 0b11}, Aware((), (), True)), 0.0)
    assert not pays(gossip, done(5, firm=False))
    assert pays(gossip, done(6, firm=True)) or pays(gossip, done(7, firm=False))


def test_who_has_yet_to_hear_who_fell_silent_takes_nothing_for_firm() -> None:
    gossip = machine()
    signed, loan = loan_of(HERE, THERE, LENDER)
    mix = mix_id(signed.body)
    gossip.handle(StateReplaced(HERE, 4, {}), 0.0)
    gossip.handle(done(5, Noted(mix, signed, loan, 0, 2), firm=True), 0.0)
    for number in range(6, 12):
        assert not pays(gossip, done(number, firm=True))
    gossip.handle(DebtsFetched(MATE, Aware((), (), True)), 0.0)
    assert pays(gossip, done(12, firm=True)) or pays(gossip, done(13, firm=False))


def test_a_lender_says_that_it_has_its_side_when_most_of_its_group_have() -> None:
    gossip = machine()
    signed, loan = loan_of(THERE, HERE, ME)
    gossip.handle(done(2, firm=True), 0.0)
    gossip.handle(DebtTaken(signed, loan, 0b11), 0.0)
    gossip.handle(done(3, Noted(mix_id(signed.body), signed, loan, 0, 2), firm=True), 0.0)

    def answer() -> str:
        (said,) = gossip.handle(DebtOffered(MATE, signed, loan, 0b11, 0b11, 0), 0.0)
        assert isinstance(said, AnswerDebt)
        return said.answer

    assert answer() == "later"
    gossip.handle(done(4, firm=False), 0.0)
    assert answer() == "later"
    gossip.handle(done(5, firm=True), 0.0)
    assert answer() == "paid"
