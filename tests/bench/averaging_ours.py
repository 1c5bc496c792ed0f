"""Our side: one peer of the product's own machine, driver, exchange, codec and libp2p network.

Only training is missing: the contribution is the tensor of the round, and applying an outcome
writes the mean into memory. `gather` ends when a plan with all peers is in force and contributions
are due; `average` releases the contribution and ends when the round is applied. The state's digest
is that of the outcomes, so digests agree exactly if all peers applied the same bytes.
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import uvloop

from peer.capacity import UPLOAD_KBPS_UNKNOWN
from peer.config import PeerConfig
from peer.driver import AppliedFacts, Driver, Taken
from peer.exchange import NO, Exchange, Outcome, refuse
from peer.net.network import open_libp2p
from peer.net.transport import Stream
from peer.observe import events as ev
from peer.state_chunks import StateGrid
from peer.train.pretrain import MeanReducer
from peer.transfer import Snapshot
from protocols import limits
from protocols.events import RecordIssued, RecordSeen, StateReady
from protocols.group import GroupConfig, GroupMachine
from protocols.identity import Signer
from protocols.messages import AssetQuery, Plan
from protocols.records import PeerRecord, sign_record
from protocols.types import Digest, RunId
from tensorcodecs import CHUNK_VALUES, Codec, get_codec
from tests.bench.tensors import Float32, check, contribution
from tests.bench.worker import Reply, serve_async

RUN: Final = RunId("be" * 32)
_ROUND_S: Final = 2.0  # before contributions are due: in less, who plans first is not settled
_EXCHANGE_S: Final = 120.0
_BATCH: Final = 16


class _Tensor:
    """A contribution that is the tensor itself."""

    weight = 1.0
    snr_db = None

    def __init__(self, values: Float32, codec: Codec) -> None:
        self._values = values
        self._codec = codec

    def encode(self, start: int, stop: int, codec: str | None = None) -> list[bytes]:
        return self._codec.encode_many(self._values[start * CHUNK_VALUES : stop * CHUNK_VALUES])


class _Empty(_Tensor):
    """Takes part in a round that formed before everybody was there."""

    weight = 0.0


class Vector:
    """`driver.Learner` whose state is the mean of the last round."""

    grid = StateGrid({"history": np.zeros(32, np.uint8)})

    def __init__(self, numel: int, codec: Codec) -> None:
        self.codec = codec
        self.round = 0
        self._history = hashlib.sha256(b"start").digest()
        self.values = np.empty(numel, np.float32)
        self.mean = np.empty(numel, np.float32)
        self.due = asyncio.Event()
        self.go = asyncio.Event()
        self.applied = asyncio.Event()
        self.everybody = False

    @property
    def digest(self) -> Digest:
        return self.grid.digest(self.grid.leaves(self._arrays()))

    def _arrays(self) -> dict[str, npt.NDArray[np.uint8]]:
        return {"history": np.frombuffer(self._history, np.uint8)}

    async def take(self, number: int) -> Taken:
        if not self.everybody:
            return Taken(_Empty(self.values, self.codec), 0.0, 0, [])
        self.due.set()
        await self.go.wait()
        self.go.clear()
        self.due.clear()
        return Taken(_Tensor(self.values, self.codec), 0.0, 1, [])

    async def apply(
        self, number: int, outcomes: list[Outcome], plan: Plan | None
    ) -> AppliedFacts | None:
        units = [unit for outcome in outcomes for unit in outcome.units]
        for first in range(0, len(units), _BATCH):
            await asyncio.to_thread(self._decode, first, units[first : first + _BATCH])
        total = hashlib.sha256(self._history)
        for outcome in outcomes:
            total.update(outcome.header.content)
        self._history = total.digest()
        self.round = number + 1
        self.applied.set()
        return AppliedFacts(self.digest, 1.0)

    def _decode(self, first: int, units: list[bytes]) -> None:
        if all(units):
            values = slice(first * CHUNK_VALUES, (first + len(units)) * CHUNK_VALUES)
            self.codec.decode_many(units, self.mean[values])

    async def snapshot(self) -> Snapshot:
        return Snapshot(self.round, self.digest, self._arrays())

    async def load(self, state: Snapshot, step_back: bool, parted: int | None = None) -> bool:
        self.round, self._history = state.round, state.arrays["history"].tobytes()
        return True

    async def after_load(self) -> None:
        """Nothing is kept on a disk."""


def signer_of(seed: int, index: int) -> Signer:
    """Who the worker of that index is."""
    return Signer(hashlib.sha256(f"{seed}/{index}".encode()).digest())


class Murmurer:
    """The command handlers; see `tests.bench.averaging` for what each must do."""

    _learner: Vector
    _upload_kbps = UPLOAD_KBPS_UNKNOWN

    def learner(self, numel: int, codec: Codec) -> Vector:
        """What contributes and is averaged."""
        return Vector(numel, codec)

    async def start(
        self, *, index: int, size: int, via: list[str], numel: int, seed: int, codec: str,
        host: str = "127.0.0.1", exchange_s: float = _EXCHANGE_S, regions: int = 1,
        round_s: float = _ROUND_S,
    ) -> Reply:  # fmt: skip
        self._index, self._size, self._seed, self._regions = index, size, seed, regions
        self._learner = self.learner(numel, get_codec(codec))
        self._events: list[ev.Event] = []
        signer = signer_of(seed, index)
        config = PeerConfig(host=host)
        folder = Path(tempfile.mkdtemp())
        self._net = await open_libp2p(config, folder, signer, self._note)
        units = -(-numel // CHUNK_VALUES)
        self._machine = GroupMachine(
            signer.peer_id,
            GroupConfig(
                run=RUN, units=units, site="bench", aggregators_max=size,
                round_s=round_s, exchange_s=exchange_s, collect=True,
            ),
            time.monotonic(),
        )  # fmt: skip

        sizes = [min(CHUNK_VALUES, left) for left in range(numel, 0, -CHUNK_VALUES)]
        reducer = MeanReducer(sizes, self._learner.codec)

        async def no_assets(stream: Stream, _: AssetQuery) -> None:
            await refuse(stream, NO, "no files here")

        self._driver = Driver(
            self._machine, self._net.transport, signer,
            Exchange(self._net.transport, signer, reducer), self._learner, self._note,
            publish=self._publish, serve_asset=no_assets, on_plan=self._planned,
        )  # fmt: skip
        self._signer = signer
        self.started()
        self._publish()
        self._task = asyncio.create_task(self._driver.run())
        for address in via:
            peer = await self._net.transport.connect(address, 10.0)
            await self._net.directory.join([peer])
        self._meeting = asyncio.create_task(self._meet())
        return {"addresses": self._net.transport.addresses()}

    def started(self) -> None:
        """All parts are there, and none of them runs yet."""

    def _note(self, event: ev.Event) -> None:
        if isinstance(event, ev.PeerRefused | ev.DigestDiffered):
            self._events.append(event)

    def _planned(self, plan: Plan) -> None:
        regions = len({seat.region for seat in plan.roster})
        self._learner.everybody = len(plan.roster) == self._size and regions == self._regions

    def _publish(self) -> None:
        now_ms = int(time.time() * 1000)
        record = PeerRecord(
            self._signer.peer_id, RUN, self._machine.group, "bench",
            tuple(self._net.transport.addresses()[: limits.ADDRESSES_MAX]), self._upload_kbps, True,
            0, self._index, now_ms, now_ms + 3_600_000,
        )  # fmt: skip
        self._signed = sign_record(self._signer, record)
        self._driver.feed(RecordIssued(self._signed, record))

    async def _meet(self) -> None:
        """Find the others in the DHT, as any peer does."""
        while len(self._machine.live_members(time.monotonic())) < self._size:
            await self._net.directory.publish_record(self._signed)
            for record in await self._net.directory.members(RUN):
                if record.peer != self._signer.peer_id:
                    self._net.transport.remember(record.peer, record.addresses)
                    self._driver.feed(RecordSeen(record))
            await asyncio.sleep(0.3)

    async def prepare(self, *, number: int) -> Reply:
        await asyncio.to_thread(contribution, self._seed, number, self._index, self._learner.values)
        return {}

    async def gather(self, *, number: int) -> Reply:
        await self._meeting
        if not self._machine.ready:
            self._driver.feed(StateReady(self._learner.round, self._learner.digest))
        await self._learner.due.wait()
        return {"failure": None}

    async def average(self, *, number: int) -> Reply:
        self._learner.applied.clear()
        self._learner.go.set()
        await self._learner.applied.wait()
        return {"failure": None}

    async def verify(self, *, number: int) -> Reply:
        found = await asyncio.to_thread(check, self._seed, number, self._size, self._learner.mean)
        return found.facts()


async def main() -> None:
    peer = Murmurer()
    handlers: dict[str, Any] = {
        "start": peer.start,
        "prepare": peer.prepare,
        "gather": peer.gather,
        "average": peer.average,
        "verify": peer.verify,
    }
    await serve_async(handlers)


if __name__ == "__main__":
    torch.set_num_threads(1)
    uvloop.run(main())
