"""A state over libp2p's daemons: a donor that goes away, and a receiver that is started again."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from peer.incoming import Incoming
from peer.net.budget import UploadBudget
from peer.net.libp2p import Libp2pTransport
from peer.receiving import Fetched, Order, Receiver
from peer.state_chunks import StateGrid
from tests.peer.donors import CHUNKS, Giver, Source, reached
from tests.protocols.samples import RUN

pytestmark = pytest.mark.asyncio(loop_factories=["uvloop"])

HOST = "127.0.0.1"
CHUNK_BYTES = 64 * 2**10
DONOR_BPS = 8 * 1_500_000  # two donors take a second
BYTES = CHUNKS * CHUNK_BYTES


class Everything(Incoming):
    """Keeps the smallest states, too."""

    def keeps(self, grid: StateGrid) -> bool:
        return True


@asynccontextmanager
async def running(
    folder: Path, name: str, budget: UploadBudget | None = None
) -> AsyncIterator[Libp2pTransport]:
    seed = hashlib.sha256(name.encode()).digest()
    transport = await Libp2pTransport.start(seed, folder / name, HOST, budget=budget)
    try:
        yield transport
    finally:
        await transport.close()


class Here:
    """How many bytes have come."""

    size = 0

    def moved(self, size: int) -> None:
        self.size = size


async def receiver(
    transport: Libp2pTransport, givers: list[tuple[Libp2pTransport, Giver]], here: Here,
    incoming: Incoming | None = None,
) -> Receiver:  # fmt: skip
    for other, _ in givers:
        await transport.connect(other.addresses()[0], 10.0)
    donors = [giver.id for _, giver in givers]
    grid = givers[0][1].source.grid
    return Receiver(
        transport, grid, Order(RUN, donors), moved=here.moved, incoming=incoming
    )  # fmt: skip


def check(fetched: Fetched, source: Source) -> None:
    assert (fetched.state.round, fetched.state.digest) == (source.round, source.digest)
    for name, array in source.arrays.items():
        np.testing.assert_array_equal(fetched.state.arrays[name], array)


async def test_a_donor_that_goes_away_costs_no_chunk(tmp_path: Path) -> None:
    async with (
        running(tmp_path, "one", UploadBudget(DONOR_BPS)) as one,
        running(tmp_path, "two", UploadBudget(DONOR_BPS)) as two,
        running(tmp_path, "taker") as taker,
    ):
        givers = [(t, Giver(t, Source(chunk_bytes=CHUNK_BYTES))) for t in (one, two)]
        here = Here()
        getting = asyncio.create_task((await receiver(taker, givers, here)).run())
        await reached(lambda: here.size > BYTES // 3)
        await one.close()
        fetched = await getting
        check(fetched, givers[1][1].source)
        assert fetched.given[givers[1][1].id] > BYTES // 3


async def test_a_receiver_that_is_started_again_goes_on_where_it_was(tmp_path: Path) -> None:
    here, begun = Here(), Source(chunk_bytes=CHUNK_BYTES)
    async with (
        running(tmp_path, "one", UploadBudget(DONOR_BPS)) as one,
        running(tmp_path, "two", UploadBudget(DONOR_BPS)) as two,
    ):
        givers = [(t, Giver(t, Source(chunk_bytes=CHUNK_BYTES))) for t in (one, two)]
        async with running(tmp_path, "taker") as taker:
            incoming = Everything(tmp_path / "incoming")
            getting = asyncio.create_task((await receiver(taker, givers, here, incoming)).run())
            await reached(lambda: here.size > BYTES // 2)
            getting.cancel()
            await asyncio.gather(getting, return_exceptions=True)
        for _, giver in givers:
            giver.source.move()
        async with running(tmp_path, "taker") as taker:
            incoming = Everything(tmp_path / "incoming")
            fetched = await (await receiver(taker, givers, Here(), incoming)).run()
        check(fetched, begun)
        assert sum(fetched.given.values()) <= BYTES - here.size
