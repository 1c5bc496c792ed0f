"""Gossip between simulated groups: it happens, and the judge sees where it would break."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from peer.simulate.mixes import MASS
from peer.simulate.planning import plan
from peer.simulate.report import to_json, to_text
from peer.simulate.scenario import Fault, Kind, Scenario, draw
from peer.simulate.world import Record, simulate


def two_towns(minutes: float = 2.5, **changes: Any) -> Scenario:
    """Three peers in each, which mix all they have every second round."""
    scenario = plan(
        1, peers=6, minutes=minutes, sites=2, round_s=6.0, exchange_s=8.0, parameters=1e5, units=4
    )
    return dataclasses.replace(scenario, **{"gossip_every": 2, "gossip_slots": 2, **changes})


def promises(record: Record) -> set[str]:
    return {violation.promise for violation in record.violations}


def test_two_towns_mix_and_every_mix_is_on_both_sides_or_on_its_way() -> None:
    record = simulate(two_towns())
    assert not record.violations, to_text(record)
    mixes = record.mixes
    assert mixes.both >= 8
    assert mixes.both + mixes.pending == mixes.begun
    assert "on both sides" in to_text(record)
    assert to_json(record)["mixes"]["both"] == mixes.both


def test_members_that_crash_between_commitment_and_payment_leave_nothing_one_sided() -> None:
    faults = tuple(
        Fault(at_s=40.0 + 4.7 * i, kind=Kind.crash, targets=(i % 6,), seconds=6.0) for i in range(8)
    )
    record = simulate(two_towns(3.0, faults=faults, gossip_every=1))
    assert not record.violations, to_text(record)
    assert record.mixes.both >= 8
    assert not record.mixes.lost


CUT_THROUGH = two_towns(
    3.0,
    faults=(Fault(at_s=38.0, kind=Kind.cut, targets=(0, 1, 3), seconds=30.0),),
    gossip_every=1,
    round_s=4.0,
)
"""Both towns are parted, two peers here and one there, and mix on either side of the wall."""


def test_what_the_smaller_parts_of_groups_mix_in_a_partition_is_on_neither_side() -> None:
    record = simulate(CUT_THROUGH)
    assert not record.violations, to_text(record)
    assert record.mixes.neither


def test_groups_whose_parts_pay_at_once_leave_mixes_on_one_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Why a mix waits for most of its group: without, the judge finds half of them torn."""
    from protocols.standing import Standing

    monkeypatch.setattr(Standing, "firm", lambda *_: True)
    record = simulate(CUT_THROUGH)
    assert promises(record) == {"mass is conserved"}
    assert record.mixes.torn


def test_part_of_the_random_scenarios_mixes() -> None:
    every = [draw(seed).gossip_every for seed in range(64)]
    assert set(every) == {0, 1, 2, 4}


def test_without_gossip_nothing_is_said_of_it() -> None:
    record = simulate(two_towns(1.0, gossip_every=0))
    assert record.mixes.begun == 0
    assert "mixes" not in to_text(record)


# ── the judge ────────────────────────────────────────────────────────────────────────────
def test_a_debt_that_is_never_paid_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever should pay says that it did."""
    from protocols.gossip import GossipMachine

    def forgive(self: Any, now_s: float) -> list[Any]:
        able = [mix for mix, debt in self._debts.items() if now_s >= debt.payable_s]
        return [e for mix in able for e in self._close(mix, self._debts[mix], "")]

    monkeypatch.setattr(GossipMachine, "_pay", forgive)
    record = simulate(two_towns())
    assert promises(record) == {"mass is conserved"}
    assert "on one side" in record.violations[0].what


def test_a_mix_that_counts_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that forgets, and members that do not look what was inside."""
    from peer.train.mixtable import MixTable
    from protocols.gossip import GossipMachine

    noted = GossipMachine._noted

    def forgetful(self: Any, note: Any) -> Any:
        carried = self.carried.get(note.mix)
        left = carried.left if carried is not None else 0
        effects = noted(self, note)
        if carried is not None:
            carried.left = left
        return effects

    monkeypatch.setattr(MixTable, "admits", lambda *_: True)
    monkeypatch.setattr(GossipMachine, "_noted", forgetful)
    assert "nothing is applied twice" in promises(simulate(two_towns(1.5)))


def test_a_mix_that_no_proof_names_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from peer import exchange

    monkeypatch.setattr(exchange, "notes_of", lambda *_: ())
    assert promises(simulate(two_towns(1.5))) == {"mass is conserved"}


def test_another_d_on_the_other_side_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lender takes something else away than the borrower added."""
    from peer.riding import Riding
    from peer.simulate.books import coded_mass, read_mass

    attach = Riding.attach

    def skewed(self: Any, *arguments: Any) -> Any:
        for mix, carried in self._machine.carried.items():
            held = self.payloads.get(mix, {})
            if carried.sign < 0 and not getattr(self, f"_skewed_{mix}", False):
                setattr(self, f"_skewed_{mix}", True)
                held.update({u: coded_mass(read_mass(d) + 1) for u, d in held.items()})
        return attach(self, *arguments)

    monkeypatch.setattr(Riding, "attach", skewed)
    assert "mass is conserved" in promises(simulate(two_towns()))


@pytest.mark.parametrize(("seed", "peers"), [(60278, 7), (60314, 8), (60565, 4), (62566, 5)])
def test_what_most_of_a_group_mixed_in_a_partition_stays(seed: int, peers: int) -> None:
    """The smaller part did more rounds meanwhile, and it is that one which comes back."""
    record = simulate(draw(seed, peers=peers))
    assert not [v for v in record.violations if v.promise == MASS], to_text(record)


def test_what_was_borrowed_for_one_group_does_not_ride_in_another() -> None:
    """A loner borrowed, then moved to a neighbour before its next round."""
    record = simulate(draw(52022, peers=7, duration_s=150.0))
    assert not [v for v in record.violations if v.promise == MASS], to_text(record)


def test_a_newcomer_with_another_groups_state_does_not_outvote_a_loner() -> None:
    """What the loner had mixed in was lost with its history, and the lender had paid."""
    record = simulate(draw(52091, peers=6, duration_s=150.0))
    assert not [v for v in record.violations if v.promise == MASS], to_text(record)


@pytest.mark.parametrize(
    ("fate", "drawn"),
    [
        ("orphaned", [(62227, 6), (62181, 5), (62219, 4), (62158, 6)]),
        ("gone", [(62155, 5), (62207, 4), (62150, 4), (62162, 5)]),
    ],
)
def test_what_no_peer_can_mend_is_counted_apart(fate: str, drawn: list[tuple[int, int]]) -> None:
    """All who knew of the debt died, or all who had the state. Which history shows it changes with
    every change of the protocol: one of several does."""
    for seed, peers in drawn:
        record = simulate(draw(seed, peers=peers))
        assert not [v for v in record.violations if v.promise == MASS], to_text(record)
        if getattr(record.mixes, fate):
            return
    raise AssertionError(f"in none of {drawn}")


def test_a_lender_that_restarts_as_it_is_to_be_paid_is_paid_later() -> None:
    """It is a group by itself, and nobody else's word stands for it meanwhile."""
    record = simulate(draw(7058))
    assert not record.violations, to_text(record)
    assert record.mixes.both


def test_a_lender_that_comes_back_with_nothing_is_paid_once_it_has_a_state() -> None:
    """Its "not now" was heard as "never", and what its group was owed was given up."""
    record = simulate(draw(1541850636, peers=6, duration_s=150.0))
    assert not record.violations, to_text(record)
    assert not record.mixes.lost
