"""Donors of small states, honest and not, for tests of transfers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np

from peer.capacity import UploadMeter
from peer.donating import Donor
from peer.exchange import HEADER, NO, RefusedError, refuse
from peer.net.transport import Frame, Stream, Transport
from peer.state_chunks import StateGrid
from peer.train.method import ArrayMap
from peer.transfer import Snapshot
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.messages import StateQuery, decode_header
from protocols.types import Digest, PeerId

CHUNK_BYTES = 4096
CHUNKS = 48

Change = Callable[[Frame], Frame | None]
"""What a liar makes of each frame that it sends; None: it ends there."""


def arrays_of(seed: int, chunks: int = CHUNKS, chunk_bytes: int = CHUNK_BYTES) -> ArrayMap:
    values = chunks * chunk_bytes // 8
    rng = np.random.default_rng(seed)
    return {
        "theta": rng.random(values).astype(np.float32),
        "momentum": rng.random(values).astype(np.float32),
    }


class Source:
    """A state that stands still until it is told to move."""

    def __init__(self, seed: int = 0, number: int = 7, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.arrays = arrays_of(seed, chunk_bytes=chunk_bytes)
        self.grid = StateGrid(self.arrays, b"layout", chunk_bytes)
        self.round = number
        self.snapshots = 0

    @property
    def digest(self) -> Digest:
        return self.grid.digest(self.grid.leaves(self.arrays))

    def move(self, chunks: int | None = None) -> None:
        """A round later, and other values in so many chunks of theta (all, if not told)."""
        stop = None if chunks is None else chunks * self.grid.chunk_bytes // 4
        self.arrays = {name: array.copy() for name, array in self.arrays.items()}
        self.arrays["theta"][:stop] += 1.0
        self.round += 1

    async def snapshot(self) -> Snapshot:
        self.snapshots += 1
        return Snapshot(self.round, self.digest, self.arrays, b"ledger")


class Giver:
    """A donor on a transport. `change`: how it lies."""

    def __init__(
        self, transport: Transport, source: Source | None = None, change: Change | None = None
    ) -> None:
        self.source = source or Source()
        self.upload = UploadMeter()
        self.given: list[tuple[PeerId, int, int]] = []
        self.donor = Donor(self.source, self.upload, lambda *told: self.given.append(told))
        self.asked: list[StateQuery] = []
        self.refused: list[RemoteProtocolError] = []
        self.before: Callable[[Stream], Awaitable[None]] | None = None
        self.id = transport.peer_id
        self._change = change
        transport.serve(self._on_call, self._on_stream)

    async def _on_call(self, sender: PeerId, request: bytes) -> bytes:
        return b""

    async def _on_stream(self, stream: Stream) -> None:
        frame = await stream.receive(limits.STREAM_HEADER_BYTES_MAX)
        assert frame is not None
        assert frame.kind == HEADER
        query = decode_header(frame.payload, stream.peer)
        assert isinstance(query, StateQuery)
        self.asked.append(query)
        out: Stream = Lying(stream, self._change) if self._change is not None else stream
        try:
            await self.donor.serve(out, query)
        except RefusedError as error:
            await refuse(stream, error.status, str(error))
        except RemoteProtocolError as error:
            self.refused.append(error)
            await refuse(stream, NO, error.reason)
        except EndedError:
            await stream.finish()


class EndedError(Exception):
    """A liar says no more."""


class Lying:
    """A stream whose frames somebody changes on their way out."""

    def __init__(self, stream: Stream, change: Change) -> None:
        self._stream = stream
        self._change = change
        self.peer = stream.peer
        self.bytes_out = self.bytes_in = 0

    async def send(self, kind: int, payload: bytes | memoryview) -> None:
        frame = self._change(Frame(kind, bytes(payload)))
        if frame is None:
            raise EndedError
        await self._stream.send(frame.kind, frame.payload)

    async def receive(self, payload_bytes_max: int) -> Frame | None:
        return await self._stream.receive(payload_bytes_max)

    async def finish(self) -> None:
        await self._stream.finish()

    async def close(self) -> None:
        await self._stream.close()


def after(count: int, then: Change, kind: int) -> Change:
    """Honest for so many frames of a kind, then as `then`."""
    seen = 0

    def change(frame: Frame) -> Frame | None:
        nonlocal seen
        seen += frame.kind == kind
        return then(frame) if frame.kind == kind and seen > count else frame

    return change


async def reached(condition: Callable[[], bool]) -> None:
    """Until it holds; the loop runs meanwhile."""
    async with asyncio.timeout(20.0):
        while not condition():  # noqa: ASYNC110 - what is watched tells nobody
            await asyncio.sleep(0.005)
