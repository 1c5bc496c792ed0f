"""Getting a state: from several donors at once, each chunk checked as it comes.

The first donor says which state it is and the hash of each chunk; others that stand there, or come
there, join in. Whoever is free asks for the next chunk that nobody was asked for, and at the end
for one that another donor is slow with. A chunk that is not what the digest vouches for is refused,
charged to its sender, and fetched elsewhere; so is all that a donor owed when it vanished. What has
come is on disk (`incoming`), and what we have already, of an earlier try or in our own state, is
not fetched again.

Whether the digest is the group's is asked of its members' own words, at the start and at the end.
"""

from __future__ import annotations

import asyncio
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from peer.clock import SYSTEM, Clock
from peer.donating import WANTED
from peer.errors import StorageError
from peer.exchange import BYTES, ELSEWHERE, HEADER, LATER, WANT, RefusedError
from peer.incoming import Incoming
from peer.net.transport import Stream, Transport, TransportError
from peer.state_chunks import Leaves, StateGrid, describe, leaf_of
from peer.train.method import ArrayMap
from peer.transfer import Snapshot, StateNote, first_reply, note_bytes_max, read_note
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.messages import StateQuery, encode
from protocols.types import Digest, PeerId, RunId

DONORS_MAX: Final = 4  # at once: with more, each newcomer would take up the whole group's lines
AHEAD: Final = 4  # chunks asked of one donor beyond the one that comes: its line is never idle
ASKED_TWICE: Final = 2  # of so many donors may one chunk be on its way
LATE_S: Final = 1.0  # before that nobody else is asked for it
TRIES_MAX: Final = 3  # of one donor in a row without a chunk from it
RETRY_S: Final = 1.0
WAIT_TRIES_MAX: Final = 60  # for a donor that has yet to come to that round


@dataclass(frozen=True, slots=True)
class Order:
    """What is wanted, and of whom."""

    run: RunId
    donors: Sequence[PeerId]
    """Who is asked: the first says which state it is; all others only help."""
    at_least: int = 0
    """Rounds that the state has to have."""
    resume_from: int = 0
    """A state that is here in part will do if it has so many rounds."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A whole state, every chunk of which is what its digest says."""

    state: Snapshot
    given: Mapping[PeerId, int]
    """Bytes of it that each donor gave."""


@dataclass(eq=False, slots=True)
class _Worker:
    """One donor, and what it owes."""

    donor: PeerId
    asked: dict[int, float] = field(default_factory=dict)
    """Chunks that are on their way, the next first, and since when."""
    begun_s: float = 0.0
    chunks: int = 0

    def eta_s(self, place: int, now_s: float) -> float:
        """Until it will have given the chunk at this place of its queue, at its pace so far."""
        return (place + 1) * (now_s - self.begun_s) / max(1, self.chunks)


class Receiver:
    """One transfer. `run` it once."""

    def __init__(
        self,
        transport: Transport,
        grid: StateGrid,
        order: Order,
        *,
        stood: Callable[[PeerId, int], Mapping[PeerId, Digest]] = lambda *_: {},
        blame: Callable[[RemoteProtocolError], None] = lambda _: None,
        begun: Callable[[StateNote], None] = lambda _: None,
        moved: Callable[[int], None] = lambda _: None,
        trouble: Callable[[str], None] = lambda _: None,
        own: ArrayMap | None = None,
        incoming: Incoming | None = None,
        clock: Clock = SYSTEM,
    ) -> None:
        """`stood(donor, round)`: where the members of its group said that they stood at a round.
        `blame`: told of who broke the rules. `begun`: told which state it will be. `moved`: told
        how many bytes are here, whenever it is more. `trouble`: told when the disk takes no more
        of it. `own`: the state that is here."""
        self._transport = transport
        self._grid = grid
        self._order = order
        self._stood = stood
        self._blame = blame
        self._begun = begun
        self._moved = moved
        self._trouble = trouble
        self._own = own
        self._incoming = incoming if incoming is not None and incoming.keeps(grid) else None
        self._clock = clock
        self._arrays: ArrayMap = {}
        self._note: StateNote | None = None
        self._leaves: Leaves = ()
        self._ledgers: Tally[bytes] = Tally()
        self._votes: dict[PeerId, Digest] = {}
        self._missing: set[int] = set()
        self._here_bytes = 0
        self._todo: deque[int] = deque()
        """Of these, what nobody has been asked for, or whoever was did not give it."""
        self._workers: list[_Worker] = []
        self._given: Tally[PeerId] = Tally()
        self._complete = asyncio.Event()
        self._changed = asyncio.Event()
        """Somebody has given or given up."""

    async def run(self) -> Fetched:
        """Get it.

        Raises:
            TransportError: no donor is left.
            RefusedError: the first donor has no state to give, or one that its group did not have.
            RemoteProtocolError: what the first donor said is no state of this run.
        """
        first, stream = await self._first()
        try:
            note = self._note
            assert note is not None
            self._begun(note)
            self._arrays = self._grid.empty()
            self._missing = set(range(self._grid.count))
            await self._take_what_is_here()
            self._todo = deque(sorted(self._missing))
            left = sum(len(self._grid.chunks[index]) for index in self._missing)
            self._here_bytes = self._grid.bytes - left
        except BaseException:
            await stream.close()
            raise
        await self._gather(first, stream)
        self._count_votes(first)
        ledger = self._ledgers.most_common(1)[0][0]
        state = Snapshot(note.round, Digest(note.digest), self._arrays, ledger, note.at_work, first)
        return Fetched(state, dict(self._given))

    # ── which state ──────────────────────────────────────────────────────────────────────
    async def _first(self) -> tuple[PeerId, Stream]:
        """A donor that gives a state as it is wanted, and the stream to it."""
        order = self._order
        before = await self._on_order()
        if before is not None and before[0] >= max(order.at_least, order.resume_from):
            for donor in order.donors[:DONORS_MAX]:
                with suppress(TransportError, RefusedError):
                    try:
                        return donor, await self._ask(donor, *before)
                    except RemoteProtocolError as error:
                        self._blame(error)
        donor = order.donors[0]
        return donor, await self._ask(donor, order.at_least, Digest(b""))

    async def _ask(self, donor: PeerId, number: int, digest: Digest) -> Stream:
        """A stream to a donor that gives this state; any of at least so many rounds if there is no
        digest."""
        stream = await self._transport.open(donor, limits.CONNECT_TIMEOUT_S)
        try:
            await stream.send(HEADER, encode(StateQuery(self._order.run, number, digest)))
            data = await first_reply(stream, note_bytes_max(self._grid))
            note, leaves, grid = read_note(donor, data, self._grid)
            if note.round < number or (digest and (note.digest, note.round) != (digest, number)):
                raise RemoteProtocolError(donor, "it gives another state than was asked for")
            if self._note is None:
                self._note, self._leaves, self._grid = note, leaves, grid
                try:
                    self._count_votes(donor)
                except RefusedError:
                    self._note = None
                    raise
            self._ledgers[note.ledger] += 1
        except BaseException:
            await stream.close()
            raise
        return stream

    def _count_votes(self, donor: PeerId) -> None:
        """Raises RefusedError: more members say that they stood elsewhere at that round."""
        assert self._note is not None
        self._votes.update(self._stood(donor, self._note.round))
        tally = Tally(self._votes.values())
        ours = tally.pop(Digest(self._note.digest), 0)
        if max(tally.values(), default=0) > ours:
            raise RefusedError(ELSEWHERE, "most of its group stood at another state at that round")

    # ── what is here already ─────────────────────────────────────────────────────────────
    async def _on_order(self) -> tuple[int, Digest] | None:
        if self._incoming is None:
            return None
        try:
            return await asyncio.to_thread(self._incoming.on_order)
        except StorageError as error:
            self._no_disk(error)
            return None

    async def _take_what_is_here(self) -> None:
        assert self._note is not None
        own = self._own
        if own is not None and describe(own) == self._grid.tensors:
            leaves = await asyncio.get_running_loop().run_in_executor(None, self._grid.leaves, own)
            for index, leaf in enumerate(leaves):
                if leaf == self._leaves[index]:
                    self._grid.view(self._arrays, index)[:] = self._grid.view(own, index)
                    self._missing.discard(index)
        self._own = None
        if self._incoming is not None:
            disk = self._incoming
            try:
                found = await asyncio.to_thread(disk.take, self._grid, self._leaves, self._arrays)
                self._missing.difference_update(found)
                digest = Digest(self._note.digest)
                await asyncio.to_thread(disk.begin, self._grid, self._note.round, digest)
            except StorageError as error:
                self._no_disk(error)

    def _no_disk(self, error: StorageError) -> None:
        self._incoming = None
        self._trouble(f"{error} (the state comes all the same, but not over a restart)")

    # ── chunks ───────────────────────────────────────────────────────────────────────────
    async def _gather(self, first: PeerId, stream: Stream) -> None:
        """Work with as many donors as there are until nothing is missing."""
        if not self._missing:
            with suppress(TransportError):
                await stream.finish()
            await stream.close()
            return
        spare = deque(donor for donor in self._order.donors if donor != first)
        done = asyncio.create_task(self._complete.wait())
        # In the order of their beginning, in which they end: a simulation must repeat itself.
        tasks = [asyncio.create_task(self._work(first, stream), name=f"chunks from {first}")]
        try:
            while not self._complete.is_set():
                while spare and len(tasks) < DONORS_MAX:
                    donor = spare.popleft()
                    work = self._work(donor, None)
                    tasks.append(asyncio.create_task(work, name=f"chunks from {donor}"))
                if not tasks:
                    raise TransportError(first, "no donor of its state is left")
                ended, _ = await asyncio.wait({*tasks, done}, return_when=asyncio.FIRST_COMPLETED)
                for over in [task for task in tasks if task in ended]:
                    tasks.remove(over)
                    over.result()
        finally:
            for task in (*tasks, done):
                task.cancel()
            await asyncio.gather(*tasks, done, return_exceptions=True)

    async def _work(self, donor: PeerId, stream: Stream | None) -> None:
        """Get chunks from one donor until it has no more for us."""
        assert self._note is not None
        tries = waits = 0
        while True:
            worker = _Worker(donor, begun_s=self._clock.monotonic())
            try:
                if stream is None:
                    stream = await self._ask(donor, self._note.round, Digest(self._note.digest))
                self._workers.append(worker)
                await self._drain(worker, stream)
            except RefusedError as error:
                waits += 1
                if error.status != LATER or waits >= WAIT_TRIES_MAX:
                    return
            except TransportError:
                tries = 1 if worker.chunks else tries + 1
                if tries >= TRIES_MAX:
                    return
            except RemoteProtocolError as error:
                self._blame(error)
                return
            finally:
                self._give_up(worker)
                if stream is not None:
                    if self._complete.is_set() and not worker.asked:
                        with suppress(TransportError):
                            await stream.finish()
                    await stream.close()
            stream = None
            await asyncio.sleep(RETRY_S)

    def _give_up(self, worker: _Worker) -> None:
        """What it owes is asked of others."""
        if worker in self._workers:
            self._workers.remove(worker)
        owed = [index for index in worker.asked if index in self._missing]
        free = [index for index in owed if not any(index in w.asked for w in self._workers)]
        self._todo.extendleft(reversed(free))
        self._wake()

    async def _drain(self, worker: _Worker, stream: Stream) -> None:
        """Ask and receive, for ever."""
        while True:
            wishes = self._next(worker)
            if wishes:
                worker.asked |= dict.fromkeys(wishes, self._clock.monotonic())
                await stream.send(WANT, b"".join(map(WANTED.pack, wishes)))
            if not worker.asked:
                with suppress(TimeoutError):  # who is late shows by the clock alone
                    async with asyncio.timeout(LATE_S):
                        await self._changed.wait()
                continue
            index = next(iter(worker.asked))
            data = await self._chunk(stream, index)
            del worker.asked[index]
            worker.chunks += 1
            if index in self._missing:
                await self._keep(worker.donor, index, data)

    def _next(self, worker: _Worker) -> list[int]:
        """What to ask of it now."""
        wishes: list[int] = []
        while self._todo and len(worker.asked) + len(wishes) <= AHEAD:
            index = self._todo.popleft()
            if index in self._missing:
                wishes.append(index)
        if not wishes and not worker.asked and (late := self._late(worker)) is not None:
            wishes.append(late)
        return wishes

    def _late(self, worker: _Worker) -> int | None:
        """A chunk that others are slower with than this donor would be."""
        now_s = self._clock.monotonic()
        askers = Tally(index for other in self._workers for index in other.asked)
        latest: tuple[float, int] | None = None
        for other in self._workers:
            for place, (index, since_s) in enumerate(other.asked.items()):
                late = now_s - since_s >= LATE_S and askers[index] < ASKED_TWICE
                if late and index in self._missing:
                    eta_s = other.eta_s(place, now_s)
                    latest = max(latest or (0.0, -1), (eta_s, index))
        if latest is None:
            return None
        own_s = worker.eta_s(0, now_s) if worker.chunks else 0.0  # who has yet to begin is tried
        return latest[1] if latest[0] > own_s else None

    async def _chunk(self, stream: Stream, index: int) -> bytearray:
        """The chunk that comes next on a stream, as it should be."""
        size = len(self._grid.chunks[index])
        data = bytearray()
        while len(data) < size:
            frame = await stream.receive(size - len(data))
            if frame is None:
                raise TransportError(stream.peer, "its state ended early")
            if frame.kind != BYTES or not frame.payload:
                raise RemoteProtocolError(stream.peer, "its state does not fit its description")
            data += frame.payload
        if leaf_of(memoryview(data)) != self._leaves[index]:
            raise RemoteProtocolError(
                stream.peer, f"chunk {index} of its state is not what the digest vouches for"
            )
        return data

    async def _keep(self, donor: PeerId, index: int, data: bytearray) -> None:
        self._missing.discard(index)
        self._grid.view(self._arrays, index)[:] = data
        self._given[donor] += len(data)
        assert self._note is not None
        self._votes.update(self._stood(self._order.donors[0], self._note.round))
        if self._incoming is not None:
            try:
                put = self._incoming.put
                await asyncio.to_thread(put, self._grid, index, memoryview(data))
            except StorageError as error:
                self._no_disk(error)
        self._here_bytes += len(data)
        self._moved(self._here_bytes)
        if not self._missing:
            self._complete.set()
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
