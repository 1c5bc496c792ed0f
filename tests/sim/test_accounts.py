"""The ledger of blocks in the simulator: it adds up, and the judge sees where it would not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from peer.simulate.report import to_json, to_text
from peer.simulate.scenario import Fault, Kind, draw
from peer.simulate.world import simulate
from tests.sim.test_mixes import promises, two_towns


def test_two_towns_share_out_the_data_and_their_ledgers_add_up() -> None:
    record = simulate(two_towns(blocks=64))
    assert not record.violations, to_text(record)
    assert record.ledger.trained > 100
    assert record.ledger.lost == 0
    assert "blocks in the ledgers" in to_text(record)
    assert to_json(record)["ledger"]["trained"] == record.ledger.trained


def test_blocks_of_members_that_crash_are_issued_again() -> None:
    faults = tuple(
        Fault(at_s=35.0 + 9 * i, kind=Kind.crash, targets=(i,), seconds=12.0) for i in range(6)
    )
    record = simulate(two_towns(3.0, blocks=64, faults=faults))
    assert not record.violations, to_text(record)
    assert record.ledger.reissued > 0
    assert record.ledger.lost == 0


def test_who_leaves_politely_hands_over_what_it_has_trained() -> None:
    """All of it is inside when it goes; at most the block that it was cut off in is given back."""
    leave = Fault(at_s=50.0, kind=Kind.leave, targets=(2,), seconds=60.0)
    record = simulate(two_towns(3.0, blocks=64, faults=(leave,)))
    assert not record.violations, to_text(record)
    assert record.ledger.lost == 0
    assert record.ledger.repeated == 0


def test_part_of_the_random_scenarios_keeps_a_ledger() -> None:
    assert {draw(seed).blocks for seed in range(64)} == {0, 64, 1024}


# ── the judge ────────────────────────────────────────────────────────────────────────────
def test_a_block_that_counts_before_its_work_is_inside_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from protocols.blocks import from_wire
    from protocols.ledger import Ledger

    def hasty(self: Any, *arguments: Any) -> Any:
        entry = arguments[-1]
        return self._believed(from_wire(entry.report.trained) | from_wire(entry.report.begun))

    monkeypatch.setattr(Ledger, "_through", hasty)
    record = simulate(two_towns(1.5, blocks=64))
    assert "the ledger adds up" in promises(record)
    assert any("samples inside" in violation.what for violation in record.violations)


def test_sums_that_do_not_add_up_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from protocols.ledger import Ledger

    mark = Ledger._mark

    def sloppy(self: Any, done: Any) -> Any:
        found = mark(self, done)
        self.counts["trained"] += 1
        return found

    monkeypatch.setattr(Ledger, "_mark", sloppy)
    record = simulate(two_towns(1.0, blocks=64))
    assert "the ledger adds up" in promises(record)
    assert any("accounted for" in violation.what for violation in record.violations)


def test_members_with_different_ledgers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A newcomer begins an account of its own."""
    from peer.simulate.learner import SimStream

    monkeypatch.setattr(SimStream, "adopt", lambda *_: None)
    town = two_towns(1.5, blocks=64)
    *others, late = town.peers
    record = simulate(
        dataclasses.replace(town, peers=(*others, dataclasses.replace(late, join_s=30.0)))
    )
    assert promises(record) == {"the ledger adds up"}
    assert any("another ledger" in violation.what for violation in record.violations)


@pytest.mark.parametrize(
    "seed",
    [
        7045,  # a peer catches up with a round that it is still training for
        7071,  # two lives of a peer contribute to one round, each to some of its spans
    ],
)
def test_work_that_counts_is_inside_in_every_unit(seed: int) -> None:
    assert promises(simulate(draw(seed))) == set()


@pytest.mark.parametrize(("seed", "peers"), [(51112, 7), (51267, 8), (51297, 3)])
def test_another_plan_for_a_round_gets_the_contribution_that_was_frozen_for_it(
    seed: int, peers: int
) -> None:
    """A second one would hold the same work again, and either may be the one that gets inside."""
    assert promises(simulate(draw(seed, peers=peers, duration_s=150.0))) == set()
