"""A process of `join_lines`: worker 0 wants a state, the others have it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import uvloop

from peer.capacity import UploadMeter
from peer.donating import Donor
from peer.exchange import NO, RefusedError, refuse
from peer.incoming import Incoming
from peer.net.laned import LanedTransport
from peer.net.libp2p import Libp2pTransport
from peer.net.transport import Stream
from peer.receiving import Order, Receiver
from peer.state_chunks import StateGrid
from peer.train.method import ArrayMap
from peer.transfer import Snapshot
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.identity import Signer
from protocols.messages import StateQuery, decode_header
from protocols.types import Digest, PeerId, RunId
from tests.bench.worker import Reply, serve_async

_RUN: Final = RunId("ab" * 32)
_ROUND: Final = 7
_HOST: Final = "0.0.0.0"


class Source:
    """`donating.Source` whose state never moves."""

    round = _ROUND

    def __init__(self, total: int, seed: int, *, empty: bool) -> None:
        rng = np.random.default_rng(seed)
        values = total // 8
        self.arrays: ArrayMap = {
            name: np.zeros(values, np.float32) if empty else rng.random(values, np.float32)
            for name in ("momentum", "theta")
        }
        self.grid = StateGrid(self.arrays)
        self.digest = Digest(b"") if empty else self.grid.digest(self.grid.leaves(self.arrays))

    async def snapshot(self) -> Snapshot:
        copies = {name: array.copy() for name, array in self.arrays.items()}
        return Snapshot(self.round, self.digest, copies)


class Worker:
    """The command handlers."""

    async def start(self, *, index: int, size: int, via: list[str], seed: int, total: int) -> Reply:
        self._index, self._total = index, total
        secret = hashlib.sha256(f"{seed}/{index}".encode()).digest()
        self._folder = Path(tempfile.mkdtemp())
        self._daemon = await Libp2pTransport.start(secret, self._folder, _HOST)
        self._transport = await LanedTransport.start(
            self._daemon, Signer(secret), self._folder, _HOST
        )
        self._source = Source(total, seed, empty=index == 0)
        self._donor = Donor(self._source, UploadMeter(), lambda *_: None)
        self._transport.serve(self._on_call, self._on_stream)
        return {"addresses": self._transport.addresses()}

    async def _on_call(self, sender: PeerId, request: bytes) -> bytes:
        return b"here"

    async def _on_stream(self, stream: Stream) -> None:
        frame = await stream.receive(limits.STREAM_HEADER_BYTES_MAX)
        assert frame is not None
        query = decode_header(frame.payload, stream.peer)
        assert isinstance(query, StateQuery)
        try:
            await self._donor.serve(stream, query)
        except RefusedError as error:
            await refuse(stream, error.status, str(error))
        except RemoteProtocolError as error:
            await refuse(stream, NO, error.reason)

    async def meet(self) -> Reply:
        return {
            "peer": self._transport.peer_id,
            "addresses": self._transport.addresses(),
            "digest": self._source.digest.hex(),
        }

    async def get(
        self, *, donors: list[str], addresses: list[list[str]], fate: str, after: int
    ) -> Reply:
        """Worker 0 gets the state; worker 1 meets its `fate` when it has sent so many bytes."""
        if self._index == 1 and fate:
            self._doom = asyncio.create_task(self._meet_fate(fate, after))
        if self._index:
            return {}
        for peer, known in zip(donors, addresses, strict=True):
            self._transport.remember(PeerId(peer), known)
            await self._transport.call(PeerId(peer), b"there?", 10.0)
        blamed: list[str] = []
        receiver = Receiver(
            self._transport,
            self._source.grid,
            Order(_RUN, [PeerId(peer) for peer in donors]),
            blame=lambda error: blamed.append(str(error)),
            incoming=Incoming(self._folder / "incoming"),
        )
        before, begun_s = self._transport.budget.bytes_down, time.monotonic()
        fetched = await receiver.run()
        seconds = time.monotonic() - begun_s
        grid = self._source.grid
        return {
            "seconds": seconds,
            "given": {str(peer): size for peer, size in fetched.given.items()},
            "received": self._transport.budget.bytes_down - before,
            "digest": grid.digest(grid.leaves(fetched.state.arrays)).hex(),
            "blamed": blamed,
        }

    async def _meet_fate(self, fate: str, after: int) -> None:
        while self._transport.budget.bytes_up < after:  # noqa: ASYNC110 - a counter tells nobody
            await asyncio.sleep(0.01)
        how = signal.SIGKILL if fate == "killed" else signal.SIGSTOP
        for pid in (*_children(), os.getpid()):
            os.kill(pid, how)


def _children() -> list[int]:
    me = os.getpid()
    return [int(pid) for pid in Path(f"/proc/{me}/task/{me}/children").read_text().split()]


async def main() -> None:
    worker = Worker()
    handlers: dict[str, Any] = {"start": worker.start, "meet": worker.meet, "get": worker.get}
    await serve_async(handlers)


if __name__ == "__main__":
    uvloop.run(main())
