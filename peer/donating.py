"""Giving our state away: a snapshot is kept for as long as somebody fetches chunks of it.

The state moves with every round, a transfer takes many of them: so what is given is a copy, one for
all who want that round's, and of at most `SNAPSHOTS_MAX` rounds at once. Whoever fetches from
several donors asks for one state by its digest, and is told if we have moved on or are not there
yet. Rounds come first: while something of a round goes out, states only trickle.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final, Protocol

from peer.capacity import UploadMeter
from peer.exchange import BYTES, ELSEWHERE, LATER, NO, REPLY, WANT, YES, RefusedError
from peer.net.transport import Stream
from peer.state_chunks import Leaves, StateGrid, describe
from peer.transfer import Snapshot, note_of
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.messages import StateQuery
from protocols.schema import pack
from protocols.types import Digest, PeerId

SNAPSHOTS_MAX: Final = 2  # each as large as the state: the memory that giving it may cost
STREAMS_MAX: Final = 8  # more would each be slower; who is told "later" has other donors
STREAMS_PER_PEER_MAX: Final = 2
LINGER_S: Final = 60.0  # after a stream broke: its other end may be restarting, and go on then
SHARED_ROUNDS: Final = 2  # who has so few rounds more gives the snapshot that there is
WANTED_MAX: Final = 64  # chunks in one frame of wishes
WANTED: Final = struct.Struct("<I")
ROUND_YIELD_S: Final = 1.0  # a stream that is silent for longer looks broken on a thin line
TRICKLE_BYTES: Final = 64 * 2**10


class Source(Protocol):
    """Whose state is given: a `driver.Learner`."""

    @property
    def round(self) -> int: ...

    @property
    def digest(self) -> Digest: ...

    @property
    def grid(self) -> StateGrid: ...

    async def snapshot(self) -> Snapshot: ...


@dataclass(eq=False, slots=True)
class _Held:
    """A snapshot, and who needs it."""

    state: Snapshot
    grid: StateGrid
    leaves: Leaves
    users: int = 0
    stale: bool = False
    """Our history is another now: only for those who ask for just this state."""
    expiry: asyncio.TimerHandle | None = None


class Donor:
    """Gives chunks of one peer's state. Touched by the event loop only."""

    def __init__(
        self, source: Source, upload: UploadMeter, served: Callable[[PeerId, int, int], None]
    ) -> None:
        """`upload`: what of rounds goes out; `served`: told (to whom, round, bytes) at the end."""
        self._source = source
        self._upload = upload
        self._served = served
        self._shelf: dict[Digest, _Held] = {}
        self._streams: dict[PeerId, int] = {}
        self._making = asyncio.Lock()

    @property
    def held(self) -> int:
        """Snapshots in memory."""
        return len(self._shelf)

    def replaced(self) -> None:
        """Another history took the place of ours."""
        for held in self._shelf.values():
            held.stale = True

    async def serve(self, stream: Stream, query: StateQuery) -> None:
        """Answer a query, then give what chunks are asked for until the far side ends.

        Raises:
            RefusedError: not now, or not here; to be told to the far side.
            RemoteProtocolError: it asks for what no state has.
            TransportError: the stream broke.
        """
        with self._admitted(stream.peer):
            held = await self._find(query)
            held.users += 1
            if held.expiry is not None:
                held.expiry.cancel()
                held.expiry = None
            sent, polite = 0, False
            try:
                note = note_of(held.state, held.grid.tensors, held.leaves)
                await stream.send(REPLY, bytes([YES]) + pack(note))
                async for index in self._wishes(stream, held.grid.count):
                    sent += await self._give(stream, held, index)
                polite = True
            finally:
                held.users -= 1
                self._spare(held, 0.0 if polite else LINGER_S)
                if sent:
                    self._served(stream.peer, held.state.round, sent)

    @contextmanager
    def _admitted(self, peer: PeerId) -> Iterator[None]:
        mine = self._streams.get(peer, 0)
        if mine >= STREAMS_PER_PEER_MAX or sum(self._streams.values()) >= STREAMS_MAX:
            raise RefusedError(LATER, "busy with other newcomers")
        self._streams[peer] = mine + 1
        try:
            yield
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]

    # ── which state ──────────────────────────────────────────────────────────────────────
    async def _find(self, query: StateQuery) -> _Held:
        async with self._making:  # whoever asks meanwhile shares what comes of it
            if not query.digest:
                return self._shared(query.round) or await self._take(query.round)
            digest = Digest(query.digest)
            if digest in self._shelf:
                return self._shelf[digest]
            if digest == self._source.digest:
                held = await self._take(self._source.round)
                if held.state.digest == digest:
                    return held
            if query.round > self._source.round:
                raise RefusedError(LATER, "we are not there yet")
            raise RefusedError(ELSEWHERE, f"we have moved on to round {self._source.round}")

    def _shared(self, at_least: int) -> _Held | None:
        """What we hold already, if it is as good as new."""
        least = max(at_least, self._source.round - SHARED_ROUNDS)
        fresh = [h for h in self._shelf.values() if not h.stale and h.state.round >= least]
        return max(fresh, key=lambda held: held.state.round, default=None)

    async def _take(self, at_least: int) -> _Held:
        """A snapshot of where we stand."""
        if self._source.round < at_least:
            raise RefusedError(LATER, "we are not there yet")
        self._make_room()
        state = await self._source.snapshot()
        if state.digest in self._shelf:
            return self._shelf[state.digest]
        grid = self._source.grid.like(describe(state.arrays))
        leaves = await asyncio.get_running_loop().run_in_executor(None, grid.leaves, state.arrays)
        if grid.digest(leaves) != state.digest:
            raise RefusedError(NO, "our own state is not what its digest says")
        held = self._shelf[state.digest] = _Held(state, grid, leaves)
        return held

    def _make_room(self) -> None:
        while len(self._shelf) >= SNAPSHOTS_MAX:
            idle = [held for held in self._shelf.values() if not held.users]
            if not idle:
                raise RefusedError(LATER, "busy giving the states of other rounds")
            self._drop(min(idle, key=lambda held: held.state.round))

    def _spare(self, held: _Held, for_s: float) -> None:
        """Nobody may need it any more; it goes `for_s` from now."""
        if held.users or held.expiry is not None:
            return
        if for_s <= 0:
            self._drop(held)
        else:
            loop = asyncio.get_running_loop()
            held.expiry = loop.call_later(for_s, self._drop, held)

    def _drop(self, held: _Held) -> None:
        if held.expiry is not None:
            held.expiry.cancel()
            held.expiry = None
        if not held.users:
            self._shelf.pop(held.state.digest, None)

    # ── its chunks ───────────────────────────────────────────────────────────────────────
    async def _wishes(self, stream: Stream, count: int) -> AsyncIterator[int]:
        """The chunks of so many that are asked for, one after another."""
        left = 2 * count + WANTED_MAX  # again what was lost on the way; more is no transfer
        while (frame := await stream.receive(WANTED.size * WANTED_MAX)) is not None:
            if frame.kind != WANT or not frame.payload or len(frame.payload) % WANTED.size:
                raise RemoteProtocolError(stream.peer, "asks for chunks in no known way")
            for (index,) in WANTED.iter_unpack(frame.payload):
                left -= 1
                if index >= count or left < 0:
                    raise RemoteProtocolError(stream.peer, f"asks for chunk {index} of {count}")
                yield index

    async def _give(self, stream: Stream, held: _Held, index: int) -> int:
        chunk = held.grid.view(held.state.arrays, index)
        at = 0
        while at < len(chunk):
            size = limits.FRAME_BYTES_MAX
            if self._upload.active:
                size = TRICKLE_BYTES
                with suppress(TimeoutError):
                    async with asyncio.timeout(ROUND_YIELD_S):
                        await self._upload.idle()
            await stream.send(BYTES, chunk[at : at + size])
            at += size
        return len(chunk)
