"""A peer that begins anew in the middle of a round makes another contribution, not more of one."""

from __future__ import annotations

import numpy as np
import pytest

from peer.exchange import UNITS, Exchange, Outcome, send_units
from peer.net.budget import UploadBudget
from peer.net.memory import MemoryNetwork
from peer.net.transport import Frame
from peer.own_work import OwnWork
from peer.simulate.books import Unit
from peer.simulate.learner import SimReducer
from protocols.blocks import NO_BLOCKS, BlockRange, BlockReport
from protocols.errors import RemoteProtocolError
from protocols.messages import (
    OUTCOME_DOMAIN,
    ContributionHeader,
    Contributor,
    OutcomeHeader,
    Plan,
)
from protocols.records import sign
from protocols.types import PeerId
from tests.protocols.samples import GROUP, RUN, peer, signer
from tests.protocols.test_round import plan_of

ME = peer(1)
BEFORE = BlockReport(trained=(BlockRange(0, 4),))
AFTER = BlockReport(trained=(BlockRange(2, 3),))


def outcome(start: int, stop: int, *contributors: Contributor) -> Outcome:
    header = OutcomeHeader(
        RUN, GROUP, 7, 3, start, start, stop, contributors, bytes(32), 1, 0.1, b""
    )
    return Outcome(header, sign(signer(0), OUTCOME_DOMAIN, header), (b"",) * (stop - start))


def test_only_the_contribution_that_was_frozen_last_is_found_inside() -> None:
    work = OwnWork()
    outcomes = [
        outcome(0, 3, Contributor(ME, 5.0, b"", BEFORE)),
        outcome(3, 6, Contributor(peer(2), 4.0, b"", AFTER), Contributor(ME, 4.0, b"\x05", AFTER)),
        outcome(6, 7, Contributor(ME, 5.0, b"", AFTER)),
    ]
    nobody = np.zeros(7, np.bool_)
    assert np.array_equal(work.inside(7, outcomes, ME), nobody), "none in this life"
    work.froze(7, 5.0, BEFORE)
    assert np.flatnonzero(work.inside(7, outcomes, ME)).tolist() == [0, 1, 2]
    work.froze(7, 4.0, AFTER)
    assert np.flatnonzero(work.inside(7, outcomes, ME)).tolist() == [3, 5]
    work.froze(8, 4.0, AFTER)
    assert np.array_equal(work.inside(7, outcomes, ME), nobody), "frozen for another round"
    work.froze(7, 4.0, AFTER)
    work.forget()
    assert np.array_equal(work.inside(7, outcomes, ME), nobody), "thrown away"


class Sent:
    """A stream that brings units and takes the answers."""

    def __init__(self, sender: PeerId, value: float, units: range) -> None:
        self.peer = sender
        self.frames = [(unit, Unit(1.0, ((1, 1),), (value, value)).coded()) for unit in units]
        self.coming: list[Frame] = []

    async def receive(self, bytes_max: int) -> Frame | None:
        if not self.frames:
            return None
        unit, payload = self.frames.pop(0)
        await send_units(self, unit, [payload])  # type: ignore[arg-type]
        return self.coming.pop()

    async def send(self, kind: int, payload: bytes) -> None:
        if kind == UNITS:
            self.coming.append(Frame(kind, bytes(payload)))


def header(plan: Plan, weight: float, report: BlockReport) -> ContributionHeader:
    span = plan.spans[0]
    return ContributionHeader(
        RUN, GROUP, plan.round, plan.epoch, 0, span.start, span.stop, weight, report
    )


@pytest.mark.parametrize("whole", [False, True])
async def test_units_of_two_contributions_are_never_mixed(whole: bool) -> None:
    """A whole one stays; what is there of half a one makes way."""
    plan = plan_of(aggregators_max=1)
    span = plan.spans[0]
    transport = MemoryNetwork().transport(signer(0).peer_id, UploadBudget())
    exchange = Exchange(transport, signer(0), SimReducer(lambda _: None, 0.0))
    units = range(span.start, span.stop)
    first = Sent(ME, 1.0, units if whole else units[:5])
    try:
        await exchange.receive_contribution(first, header(plan, 5.0, BEFORE))  # type: ignore[arg-type]
    except RemoteProtocolError:
        assert not whole, "it ended early"
    second = Sent(ME, 2.0, units)
    assert await exchange.receive_contribution(second, header(plan, 4.0, AFTER))  # type: ignore[arg-type]
    closed = (await exchange.close_span(plan, 0, keep=True)).outcome
    weight, report = (5.0, BEFORE) if whole else (4.0, AFTER)
    assert closed.header.contributors == (Contributor(ME, weight, b"", report),)
    means = {unit[24:40] for unit in closed.units}
    assert len(means) == 1, "all of one"
    await exchange.close()


async def test_a_contribution_that_broke_off_goes_on_where_it_was() -> None:
    plan = plan_of(aggregators_max=1)
    span = plan.spans[0]
    transport = MemoryNetwork().transport(signer(0).peer_id, UploadBudget())
    exchange = Exchange(transport, signer(0), SimReducer(lambda _: None, 0.0))
    units = range(span.start, span.stop)
    whole = header(plan, 5.0, NO_BLOCKS)
    begun, rest = Sent(ME, 1.0, units[:5]), Sent(ME, 1.0, units[5:])
    with pytest.raises(RemoteProtocolError, match="early"):
        await exchange.receive_contribution(begun, whole)  # type: ignore[arg-type]
    assert await exchange.receive_contribution(rest, whole)  # type: ignore[arg-type]
    closed = (await exchange.close_span(plan, 0, keep=True)).outcome
    assert closed.header.contributors == (Contributor(ME, 5.0, b"", NO_BLOCKS),)
    await exchange.close()
