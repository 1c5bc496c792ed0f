"""Training and its memory on disk, as the driver needs them.

The method lives in the training thread (`Trainer`), files are written in one disk thread, and this
class keeps the two in step: a round counts as reported only when its outcome is in the journal, so
a peer that is killed at any moment comes back at the last round that it told anybody of.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from peer.checkpoint import CheckpointStore, SavedInfo
from peer.driver import AppliedFacts, Taken
from peer.errors import StorageError
from peer.exchange import Outcome
from peer.observe import events as ev
from peer.own_work import OwnWork
from peer.state_chunks import StateGrid
from peer.train.dylu import Speeds
from peer.train.method import ArrayMap, DataSource, Method
from peer.train.mixtable import MixTable
from peer.train.questions import Questions
from peer.train.scoring import Score
from peer.train.shared import SharedStream
from peer.train.stream import BlockStream
from peer.train.trainer import Stats, Trainer, Training
from peer.transfer import Snapshot
from protocols import limits
from protocols.blocks import BlockRange, BlockReport
from protocols.ledger import Counted, Entry, entries_of
from protocols.messages import Counter, Plan
from protocols.records import GroupField, PeerIdField
from protocols.schema import Max, SchemaError, pack, unpack
from protocols.sharding import Shares
from protocols.types import Digest, GroupName, PeerId, RunId

T = TypeVar("T")

EVALUATION_BATCH: Final = 16
TOKENS_KEPT: Final = 1024  # rounds whose tokens are remembered: longer partitions count less
LEDGER: Final = ".ledger"
"""Under this name the ledger's bytes lie among a checkpoint's inner arrays."""


@dataclass(frozen=True, slots=True)
class _Nothing:
    """A contribution of no work."""

    weight: float = 0.0
    snr_db: tuple[float, float] | None = None

    def encode(self, start: int, stop: int, codec: str | None = None) -> list[bytes]:
        return [b""] * (stop - start)


NOTHING: Final = _Nothing()


@dataclass(frozen=True, slots=True)
class ContributorNote:
    """A contributor of a round, as the ledger of blocks counts it."""

    peer: PeerIdField
    blocks: BlockReport
    cover: Annotated[bytes, Max(limits.SPAN_MASK_BYTES_MAX)]
    """Bit i: inside unit i."""


@dataclass(frozen=True, slots=True)
class JournalNote:
    """What a journal entry says beside the outcome itself."""

    group: GroupField
    epoch: Counter
    contributors: Annotated[tuple[ContributorNote, ...], Max(limits.ROSTER_MAX)]
    """What the ledger of blocks was told with it."""


class TrainerLearner:
    """`driver.Learner` over a `Trainer` and a `CheckpointStore`. `open` it, then `close` it."""

    def __init__(
        self,
        me: PeerId,
        build: Callable[[], tuple[Method, DataSource]],
        store: CheckpointStore,
        emit: ev.Listener,
        *,
        run: RunId,
        batch_size: int,
        seed: int,
        threads: int | None,
        checkpoint_every: int,
        own_data: bool = False,
        local_steps: int = 0,
        training: Training = Trainer,
        questions: Callable[[DataSource | None], Questions | None] = lambda _: None,
    ) -> None:
        """`own_data`: the blocks are files of this peer's own, so no ledger is kept of them.
        `local_steps`: of the fastest peer between its contributions, where each contributes when
        it has done its part (asynchronous runs); 0: everybody in every round. `training`: what
        makes the steps. `questions`: makes those that the group scores between its peers, out of
        the data's source; called in the training thread."""
        self.round = 0
        self.digest = Digest(b"")
        self.grid = StateGrid({})
        self.restored = False
        """Whether the state came from disk and so has history of its own."""
        self._me = me
        self._build = build
        self._store = store
        self._emit = emit
        self.departed: Callable[[], tuple[PeerId, ...]] = tuple
        """Who said goodbye to us: the next contribution tells the group."""
        self._run = run
        self._own_data = own_data
        self._batch_size = batch_size
        self._seed = seed
        self._checkpoint_every = checkpoint_every
        self._saved_round = -1
        self._replaced = False
        """A donor's state took the place of what is on disk, and is not there yet."""
        self._trouble = ""
        self._saving = asyncio.Lock()
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="disk")
        self._stream: BlockStream | SharedStream | None = None
        self._source: DataSource | None = None
        self._trainer = training(self._build_all, threads=threads)
        self._validation: list[torch.Tensor] | None = None
        self._make_questions = questions
        self._questions: Questions | None = None
        self._has_questions = True  # as far as is known
        self._life = Stats()
        self._local_steps = local_steps
        self._speeds = Speeds()
        self._own_work = OwnWork()
        self._tokens: deque[tuple[int, int]] = deque(maxlen=TOKENS_KEPT)
        """(round, tokens learned for it): what a history of our own weighs."""

    # ── life ─────────────────────────────────────────────────────────────────────────────
    async def open(self) -> None:
        """Build the model, and go on from the newest valid checkpoint and its journal.

        Raises:
            PeerError: the model, the data or the disk is at fault.
        """
        await self._trainer.open()
        loaded = await self._on_disk(self._store.load)
        skipped = list(self._store.skipped)
        if loaded is None:
            for reason in skipped:
                self._emit(ev.Notice("warning", f"passed over a damaged checkpoint: {reason}"))
            self.grid, self.digest = await self._trainer.run(_layout)
            return

        kept = loaded.inner.pop(LEDGER, None)

        def restore(method: Method) -> int:
            try:
                method.load_state(loaded.arrays)
            except ValueError as error:
                raise StorageError(
                    f"{loaded.path} is no state of this run ({error}); move it away and join again"
                ) from None
            method.load_inner_state(loaded.inner)
            if kept is not None:
                self._adopt(kept.tobytes())
            for entry in loaded.journal:
                nobody = np.zeros(len(entry.units), np.bool_)
                method.apply(entry.units, nobody, method.fragments.of(entry.round).start)
                if entry.digest and method.digest() != entry.digest:
                    raise StorageError(
                        f"round {entry.round} of the journal does not lead to the state that it"
                        " should; move the journal files away and join again"
                    )
                if isinstance(self._stream, SharedStream):
                    self._stream.apply(entry.round, _noted(entry.header))
            if isinstance(self._stream, BlockStream) and "stream" in loaded.facts:
                self._stream.load_state(loaded.facts["stream"])
            return len(loaded.journal)

        replayed = await self._trainer.run(restore)
        self.round = loaded.round + replayed
        self._saved_round = loaded.round
        self.restored = True
        self.grid, self.digest = await self._trainer.run(_layout)
        self._emit(ev.CheckpointLoaded(self.round, loaded.path, replayed, skipped))

    def _build_all(self) -> tuple[Method, BlockStream | SharedStream]:
        method, source = self._build()
        self._source = source
        self._stream = (
            BlockStream(source, batch_size=self._batch_size, seed=self._seed, peer=self._me)
            if self._own_data
            else SharedStream(
                source, self._run, self._me, method.fragments, batch_size=self._batch_size
            )
        )
        return method, self._stream

    def _adopt(self, ledger: bytes, avoid: tuple[BlockRange, ...] = ()) -> bool:
        """In the training thread: go on with a ledger; False if it is none of this run."""
        if isinstance(self._stream, SharedStream) and ledger:
            try:
                self._stream.adopt(ledger, avoid)
            except SchemaError:
                return False
        return True

    def start(self) -> None:
        self._trainer.start()

    async def failed(self) -> None:
        """Wait until training breaks down, and raise why."""
        await self._trainer.failed

    async def close(self, *, save: bool) -> None:
        """Save (if there is something to lose) and end both threads."""
        try:
            if save and self.round > 0:
                await self.save()
        finally:
            await self._trainer.aclose()
            await asyncio.to_thread(self._disk.shutdown)

    @property
    def method(self) -> Method:
        return self._trainer.method

    @property
    def mix_table(self) -> MixTable:
        """See `mixing.MixingLearner`; only of a method that mixes."""
        table = self._trainer.method.mixes
        assert table is not None
        return table

    def outer(self, start: int, stop: int) -> list[npt.NDArray[np.float32]]:
        """See `Method.outer`."""
        return self._trainer.method.outer(start, stop)

    async def share(self, shares: Shares) -> None:
        """Whose part of the run's blocks is whose, from now on."""

        def change(_: Method) -> None:
            if isinstance(self._stream, SharedStream):
                self._stream.share(shares)

        await self._trainer.run(change)

    async def finish(self) -> int:
        """Stop training for good; the next contributions say so. Blocks still in flight."""
        self._trainer.pause()

        def last(_: Method) -> int:
            if not isinstance(self._stream, SharedStream):
                return 0
            self._stream.leave()
            return len(self._stream.work.in_flight)

        return await self._trainer.run(last)

    def stats(self) -> Stats:
        """Since the last contribution."""
        return self._trainer.stats()

    def waited_s(self) -> float:
        """Time since the start in which training stood still."""
        return self._life.waited_s + self._trainer.stats().waited_s

    def waited_share(self) -> float:
        """The same as a share of all the time."""
        now, life = self._trainer.stats(), self._life
        waited = life.waited_s + now.waited_s
        busy = life.trained_s + life.served_s + now.trained_s + now.served_s
        return waited / (waited + busy) if waited + busy > 0 else 0.0

    # ── rounds ───────────────────────────────────────────────────────────────────────────
    async def take(self, number: int) -> Taken:
        if self._local_steps:
            stats = self._trainer.stats()
            if stats.steps < self._speeds.steps(self._me, self._local_steps):
                return Taken(NOTHING, stats.loss, 0, [])  # not its turn yet: the work goes on
        if isinstance(self._stream, SharedStream):
            self._stream.heard_goodbye(self.departed())
        harvest = await self._trainer.harvest(number)
        s, life = harvest.stats, self._life
        self._life = Stats(
            trained_s=life.trained_s + s.trained_s,
            served_s=life.served_s + s.served_s,
            waited_s=life.waited_s + s.waited_s,
        )
        self._tokens.append((number, s.tokens))
        self._own_work.froze(number, float(harvest.contribution.weight), harvest.report)
        return Taken(harvest.contribution, s.loss, s.steps, harvest.blocks, harvest.report)

    async def apply(
        self, number: int, outcomes: list[Outcome], plan: Plan | None
    ) -> AppliedFacts | None:
        units = [payload for outcome in outcomes for payload in outcome.units]
        mine = self._own_work.inside(number, outcomes, self._me)
        entries = entries_of(outcome.header for outcome in outcomes)

        bases = {outcome.header.base for outcome in outcomes if outcome.header.base}

        def step(method: Method) -> tuple[Digest, Counted | None, str] | None:
            if self.round != number or not bases <= {self.digest}:
                return None
            method.apply(units, mine, method.fragments.of(number).start)
            self.round = number + 1
            self.digest = Digest(method.digest())
            stream = self._stream
            counted = stream.apply(number, entries) if isinstance(stream, SharedStream) else None
            if not (method.carries or method.owes() or mine.all()) and stream is not None:
                stream.drop()  # what missed this outcome is lost, and so trained again
            return self.digest, counted, method.refusal

        done = await self._trainer.run(step)
        if done is None:
            return None
        if self._local_steps:
            self._speeds.applied(number, weights_of(outcomes))
        digest, counted, refusal = done
        if refusal:
            self._emit(ev.PeerRefused(outcomes[0].signed.signer, refusal))
        group = outcomes[0].header.group if outcomes else GroupName("")
        note = _note(group, plan.epoch if plan is not None else 0, entries)
        if self._saved_round >= 0:
            await self._try_disk(functools.partial(self._store.append, number, note, units, digest))
        return AppliedFacts(digest, float(mine.mean()) if len(mine) else 0.0, counted)

    async def after_round(self) -> None:
        """A full checkpoint when one is due: before the first journal entry, then every few."""
        if self._saved_round < 0 or self.round - self._saved_round >= self._checkpoint_every:
            await self.save()

    async def evaluate(self) -> float:
        """Mean loss of the outer parameters on the held-out samples; nan without any."""

        def look(method: Method) -> float:
            if self._validation is None:
                samples = self._source.validation() if self._source is not None else []
                self._validation = [
                    torch.stack(samples[i : i + EVALUATION_BATCH])
                    for i in range(0, len(samples), EVALUATION_BATCH)
                ]
            return method.evaluate(self._validation) if self._validation else float("nan")

        return await self._trainer.run(look)

    async def score(self, index: int, count: int) -> Score | None:
        """What the outer parameters score in the share of the questions of the peer with this index
        of so many; None where there are no questions."""

        def look(method: Method) -> Score | None:
            if self._questions is None and self._has_questions:
                self._questions = self._make_questions(self._source)
                self._has_questions = self._questions is not None
            outer_model = getattr(method, "outer_model", None)
            if self._questions is None or outer_model is None:
                return None
            with outer_model() as model:
                return self._questions.score(model, index, count)

        return await self._trainer.run(look)

    # ── states ───────────────────────────────────────────────────────────────────────────
    async def snapshot(self) -> Snapshot:
        def look(method: Method) -> Snapshot:
            stream = self._stream
            at_work = stream.at_work() if isinstance(stream, SharedStream) else ()
            return Snapshot(self.round, self.digest, method.state(), self._ledger(), at_work)

        return await self._trainer.run(look)

    async def load(self, state: Snapshot, step_back: bool, parted: int | None = None) -> bool:
        own = [(n, tokens) for n, tokens in self._tokens if parted is not None and n >= parted]
        # Where work holds for one state only, there is nothing to keep of the other half's.
        learned = sum(tokens for _, tokens in own) if self._trainer.method.carries else 0
        rounds = max(1, state.round - parted) if parted is not None else 0

        reason = ""

        def replace(method: Method) -> bool:
            nonlocal reason
            if state.round < self.round and not step_back:
                return False
            before = method.state()
            try:
                if learned > 0:
                    method.reconcile(state.arrays, float(learned), rounds)
                else:
                    method.load_state(state.arrays)
            except ValueError as error:
                reason = str(error)
                return False
            if method.digest() != state.digest:
                method.load_state(before)
                reason = "it is not what its digest says"
                return False
            self._adopt(state.ledger, state.at_work)
            if isinstance(self._stream, SharedStream):
                self._stream.drop()  # the state took the place of our local work, too
            self.round, self.digest = state.round, state.digest
            return True

        if not await self._trainer.run(replace):
            if reason and state.donor is not None:
                self._emit(ev.PeerRefused(state.donor, f"its state: {reason}"))
            return False
        self._own_work.forget()
        if parted is not None and learned > 0:
            self._emit(ev.Reconciled(state.round, parted, float(learned)))
        # What is on disk is of a history that is ours no more: nothing may be added to that.
        self._saved_round, self._replaced = -1, True
        return True

    async def after_load(self) -> None:
        if self._replaced:
            await self.save()

    async def save(self) -> SavedInfo | None:
        """Write a full checkpoint; None (and a notice) if the disk would not take it."""

        def copy(method: Method) -> tuple[int, Digest, ArrayMap, ArrayMap, dict[str, Any]]:
            inner, stream = method.inner_state(), {}
            if isinstance(self._stream, BlockStream):
                stream = {"stream": self._stream.state()}
            ledger = self._ledger()
            if ledger:
                inner[LEDGER] = np.frombuffer(ledger, np.uint8)
            return self.round, self.digest, method.state(), inner, stream

        async with self._saving:
            number, digest, arrays, inner, stream = await self._trainer.run(copy)
            replace = self._replaced
            if number == 0 or (number == self._saved_round and not replace):
                return None  # a fresh start on disk would pass for history
            facts = {"digest": digest.hex(), **stream}
            # The disk does one thing after another: rounds applied from now on go after this.
            before = self._saved_round
            self._saved_round, self._replaced = number, False
            info = await self._try_disk(
                functools.partial(self._store.save, number, arrays, inner, facts, replace=replace)
            )
            if info is not None:
                self._emit(ev.CheckpointSaved(number, info.path, info.bytes, info.seconds))
            elif self._saved_round == number:  # no other state has come meanwhile
                self._saved_round, self._replaced = before, replace
            return info

    def _ledger(self) -> bytes:
        """In the training thread: the group's account of its blocks at our round."""
        return self._stream.ledger() if isinstance(self._stream, SharedStream) else b""

    async def _on_disk(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work)

    async def _try_disk(self, work: Callable[[], T]) -> T | None:
        """Do it; a full disk is said once, and training goes on: the others hold the state too."""
        try:
            result = await self._on_disk(work)
        except StorageError as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                self._emit(ev.Notice("error", f"{error} (training goes on, unsaved)"))
            return None
        self._trouble = ""
        return result


def _note(group: GroupName, epoch: int, entries: list[Entry]) -> bytes:
    """A journal entry's header; without covers where they would not fit."""
    for covers in (True, False):
        noted = tuple(
            ContributorNote(
                e.peer, e.report, e.cover.to_bytes(-(-e.cover.bit_length() // 8), "little") * covers
            )
            for e in entries
        )
        note = pack(JournalNote(group, epoch, noted))
        if len(note) <= limits.STREAM_HEADER_BYTES_MAX:
            break
    return note


def _noted(header: bytes) -> list[Entry]:
    """The contributors in a journal entry; none in one that an earlier version wrote."""
    try:
        note = unpack(JournalNote, header)
    except SchemaError:
        return []
    return [Entry(c.peer, c.blocks, int.from_bytes(c.cover, "little")) for c in note.contributors]


def weights_of(outcomes: list[Outcome]) -> dict[PeerId, float]:
    """The weight of everybody whose whole work is inside."""
    spans = [{c.peer: c.weight for c in o.header.contributors if not c.mask} for o in outcomes]
    return {
        peer: min(span[peer] for span in spans)
        for peer in (spans[0] if spans else {})
        if all(peer in span for span in spans)
    }


def _layout(method: Method) -> tuple[StateGrid, Digest]:
    return method.grid, Digest(method.digest())
