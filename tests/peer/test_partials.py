"""A region's sum weighs as much as what is in it, nobody counts twice, and liars are refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from peer.exchange import UNITS, Exchange, send_units
from peer.net.budget import UploadBudget
from peer.net.memory import MemoryNetwork
from peer.net.transport import Frame
from peer.partials import mask_of
from peer.train.pretrain import MeanReducer
from protocols.blocks import NO_BLOCKS
from protocols.errors import RemoteProtocolError
from protocols.messages import ContributionHeader, Contributor, PartialHeader, Plan
from protocols.types import PeerId
from tensorcodecs import get_codec
from tests.protocols.samples import GROUP, RUN, peer, signer
from tests.protocols.test_round import plan_of

FP32 = get_codec("fp32")
SIZE = 100
COLLECTOR = 3
WEIGHTS = {1: 5.0, 2: 1.0, 3: 3.0, 4: 7.0}


def values(index: int, unit: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng([index, unit]).standard_normal(SIZE).astype(np.float32)


class Sent:
    """A stream that brings units and takes the answers."""

    def __init__(self, sender: PeerId, units: dict[int, bytes]) -> None:
        self.peer = sender
        self.left = list(units.items())
        self.coming: list[Frame] = []

    async def receive(self, bytes_max: int) -> Frame | None:
        if not self.left:
            return None
        unit, payload = self.left.pop(0)
        await send_units(self, unit, [payload])  # type: ignore[arg-type]
        return self.coming.pop()

    async def send(self, kind: int, payload: bytes) -> None:
        if kind == UNITS:
            self.coming.append(Frame(kind, bytes(payload)))


def exchange_of(index: int, units: int) -> Exchange:
    transport = MemoryNetwork().transport(peer(index), UploadBudget())
    return Exchange(transport, signer(index), MeanReducer([SIZE] * units, FP32))


def contribution(index: int, plan: Plan) -> tuple[Sent, ContributionHeader]:
    span = plan.spans[0]
    units = {u: FP32.encode(values(index, u)) for u in range(span.start, span.stop)}
    header = ContributionHeader(
        RUN, GROUP, plan.round, plan.epoch, 0, span.start, span.stop, WEIGHTS[index]
    )
    return Sent(peer(index), units), header


def sum_of(
    plan: Plan, *indices: int, only: range | None = None
) -> tuple[dict[int, bytes], PartialHeader]:
    """What an honest collector makes of those contributions."""
    span = plan.spans[0]
    units = only or range(span.start, span.stop)
    coded = {u: FP32.encode(np.asarray(mean_of(u, *indices), np.float32)) for u in units}
    mask = mask_of(set(units), span.start, span.stop)
    told = {peer(i): WEIGHTS[i] for i in indices}
    contributors = tuple(Contributor(p, told[p], mask, NO_BLOCKS) for p in sorted(told))
    header = PartialHeader(
        RUN, GROUP, plan.round, plan.epoch, 0, span.start, span.stop, contributors,
        tuple(peer(i) for i in indices),
    )  # fmt: skip
    return coded, header


async def closed(exchange: Exchange, plan: Plan) -> tuple[list[Any], tuple[Contributor, ...]]:
    outcome = (await exchange.close_span(plan, 0, keep=True)).outcome
    means = []
    for unit in outcome.units:
        mean = np.empty(SIZE, np.float32)
        FP32.decode_into(unit, mean)
        means.append(mean)
    await exchange.close()
    return means, outcome.header.contributors


def mean_of(unit: int, *indices: int) -> Any:
    total = sum(WEIGHTS[i] for i in indices)
    return sum(WEIGHTS[i] * values(i, unit).astype(np.float64) for i in indices) / total


async def test_a_sum_beside_contributions_gives_the_mean_of_all() -> None:
    plan = plan_of(aggregators_max=1)
    exchange = exchange_of(0, plan.spans[0].stop)
    units, header = sum_of(plan, 1, 2, 3)
    await exchange.receive_contribution(*contribution(4, plan))  # type: ignore[arg-type]
    await exchange.receive_contribution(*contribution(2, plan))  # type: ignore[arg-type]
    await exchange.receive_partial(Sent(peer(COLLECTOR), units), header)  # type: ignore[arg-type]
    means, inside = await closed(exchange, plan)
    for unit, mean in enumerate(means):
        assert np.allclose(mean, mean_of(unit, 1, 2, 3, 4), atol=1e-5), "the second counts once"
    assert {c.peer: c.weight for c in inside} == {peer(i): w for i, w in WEIGHTS.items()}
    assert not any(c.mask for c in inside)


async def test_what_a_sum_lacks_of_a_contribution_counts_if_it_comes_directly() -> None:
    plan = plan_of(aggregators_max=1)
    exchange = exchange_of(0, plan.spans[0].stop)
    units, header = sum_of(plan, 1, 2, only=range(5))
    await exchange.receive_partial(Sent(peer(COLLECTOR), units), header)  # type: ignore[arg-type]
    await exchange.receive_contribution(*contribution(2, plan))  # type: ignore[arg-type]
    means, inside = await closed(exchange, plan)
    for unit, mean in enumerate(means):
        both = (1, 2) if unit < 5 else (2,)
        assert np.allclose(mean, mean_of(unit, *both), atol=1e-5)
    assert {c.peer: bool(c.mask) for c in inside} == {peer(1): True, peer(2): False}


def lacks_a_unit(units: dict[int, bytes], header: PartialHeader) -> PartialHeader:
    units.popitem()
    return header


def brings_more(units: dict[int, bytes], header: PartialHeader) -> PartialHeader:
    units[header.stop + 1] = units[header.start]
    return header


def brings_garbage(units: dict[int, bytes], header: PartialHeader) -> PartialHeader:
    units[header.start] = b"garbage"
    return header


def brings_what_nobody_gave(units: dict[int, bytes], header: PartialHeader) -> PartialHeader:
    mask = mask_of({header.start}, header.start, header.stop)
    told = tuple(dataclasses.replace(c, mask=mask) for c in header.contributors)
    return dataclasses.replace(header, contributors=told)


@pytest.mark.parametrize(
    ("lie", "word"),
    [
        (lacks_a_unit, "early"),
        (brings_more, "not in its sum"),
        (brings_garbage, "unit 0"),
        (brings_what_nobody_gave, "not in its sum"),
    ],
)
async def test_a_sum_that_is_not_what_it_says_is_refused_whole(lie: Any, word: str) -> None:
    plan = plan_of(aggregators_max=1)
    exchange = exchange_of(0, plan.spans[0].stop)
    await exchange.receive_contribution(*contribution(4, plan))  # type: ignore[arg-type]
    units, header = sum_of(plan, 1, 2)
    header = lie(units, header)
    with pytest.raises(RemoteProtocolError, match=word) as told:
        await exchange.receive_partial(Sent(peer(COLLECTOR), units), header)  # type: ignore[arg-type]
    assert told.value.peer == peer(COLLECTOR)
    means, inside = await closed(exchange, plan)
    assert [c.peer for c in inside] == [peer(4)]
    assert np.allclose(means[0], values(4, 0))


async def test_nobody_is_in_two_sums() -> None:
    plan = plan_of(aggregators_max=1)
    exchange = exchange_of(0, plan.spans[0].stop)
    units, header = sum_of(plan, 1, 2)
    await exchange.receive_partial(Sent(peer(COLLECTOR), units), header)  # type: ignore[arg-type]
    units, header = sum_of(plan, 2, 4)
    with pytest.raises(RemoteProtocolError, match="another sum"):
        await exchange.receive_partial(Sent(peer(4), units), header)  # type: ignore[arg-type]
    means, _ = await closed(exchange, plan)
    assert np.allclose(means[0], mean_of(0, 1, 2), atol=1e-5)
