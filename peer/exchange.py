"""The data plane of a round: contributions in, means out, and whoever missed something is served.

Everything bulky happens here and nothing is decided here: the group machine says what to send,
close, push and fetch; this module streams, keeps and verifies. A span keeps every sender's coded
units until it is closed, so a contribution that is sent again, or breaks off, never counts twice,
and the outcome's proof says exactly whose work is in which unit. Then each unit is reduced from its
contributions in the order of their senders' ids: whoever has the same contributions gets the same
bytes, whenever they arrived. Coded contributions are many times smaller than an accumulator, and
nothing decoded outlives its unit.

Arithmetic runs in one codec thread, in batches, so that the event loop only moves bytes.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from peer.capacity import UploadMeter
from peer.clock import SYSTEM, Clock
from peer.net.transport import Stream, Transport, TransportError
from peer.partials import OpenSpan, Partial, runs_of
from peer.riding import Board, Riding, notes_of
from peer.sending import batches, missed_again, unasked
from peer.train.composite import compose, split
from peer.train.method import Contribution, Reducer, SignedReducer, SummingReducer
from protocols import limits
from protocols.blocks import NO_BLOCKS, BlockReport
from protocols.errors import RemoteProtocolError
from protocols.identity import Signer
from protocols.messages import (
    OUTCOME_DOMAIN,
    ContributionHeader,
    OutcomeHeader,
    OutcomePush,
    OutcomeQuery,
    PartialHeader,
    Plan,
    encode,
    open_signed,
)
from protocols.records import Signed, sign
from protocols.schema import SchemaError, pack, unpack
from protocols.types import Digest, PeerId
from tensorcodecs import CHUNK_VALUES
from tensorcodecs.chooser import CANDIDATES, Choice, choose
from tensorcodecs.feedback import decay_of

T = TypeVar("T")

HEADER: Final = 1
UNITS: Final = 2
REPLY: Final = 3
OUTCOME: Final = 4
BYTES: Final = 5
WANT: Final = 7

YES: Final = 0
LATER: Final = 1
HAVE: Final = 2
NO: Final = 3
ELSEWHERE: Final = 4

ROUNDS_HELD_MORE: Final = 2  # beside those kept, rounds in the making
RIVALS_MAX: Final = 4  # outcomes of one span: its aggregators, one after another
BATCH_UNITS: Final = 8  # half a million values: a few milliseconds of codec work at a time
REASON_BYTES_MAX: Final = 2048
BUDGET_SHARE: Final = 0.3  # of a round's exchange for one contribution's way; the mean comes back
MEASURED_BYTES_MIN: Final = 4096  # less says more about delay than about bandwidth
_PLAIN_CANDIDATES: Final = tuple(c for c in CANDIDATES if decay_of(c.codec) is None)
_INDEX: Final = struct.Struct("<I")
_ENTRY: Final = struct.Struct("<II")  # unit, length
FRAME_GOAL_BYTES: Final = limits.FRAME_BYTES_MAX  # units are packed into frames of about this
UNITS_FRAME_BYTES_MAX: Final = limits.UNIT_BYTES_MAX + FRAME_GOAL_BYTES


class RefusedError(Exception):
    """The far side will not take what we offered (LATER: not yet; NO: not at all; ELSEWHERE: others
    might)."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, slots=True)
class Outcome:
    """A reduced span: proof and content."""

    header: OutcomeHeader
    signed: Signed
    units: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Closed:
    """A span's outcome, and who sent units that turned out to be no such thing."""

    outcome: Outcome
    refused: tuple[RemoteProtocolError, ...]


def content_digest(units: Iterable[bytes]) -> Digest:
    """SHA-256 over the units' lengths and bytes: what an outcome's proof commits to."""
    total = hashlib.sha256()
    for unit in units:
        total.update(_INDEX.pack(len(unit)))
        total.update(unit)
    return Digest(total.digest())


class Exchange:
    """Streams of one peer's rounds. Single-threaded but for the codec thread's arithmetic."""

    def __init__(
        self,
        transport: Transport,
        signer: Signer,
        reducer: Reducer,
        on_choice: Callable[[PeerId, int, Choice], None] = lambda *_: None,
        clock: Clock = SYSTEM,
        weigh: Callable[[bytes], int] = len,
        rounds_kept: int = limits.OUTCOME_ROUNDS_KEPT,
    ) -> None:
        """`on_choice`: told which codec a link got for our part of a span, and why. `weigh`: the
        bytes that a coded unit stands for, which in a simulation are not its own. `rounds_kept`:
        so many applied rounds are held for those who missed them."""
        self.rounds_kept = rounds_kept
        self._weigh = weigh
        self._transport = transport
        self._signer = signer
        self._reducer = reducer
        self._signed = reducer if isinstance(reducer, SignedReducer) else None
        self._summing = reducer if isinstance(reducer, SummingReducer) else None
        self._on_choice = on_choice
        self._clock = clock
        self._bandwidth_bps: dict[PeerId, float] = {}
        """Measured on the contributions that we sent, the latest counting half."""
        self.upload = UploadMeter(clock)
        """What our line does, all streams of a round together."""
        self._codec = ThreadPoolExecutor(1, thread_name_prefix="codec")
        self._own: tuple[int, Contribution] | None = None
        self._closed = False
        self._own_blocks = NO_BLOCKS
        self._missed: dict[int, int] = {}
        """Unit -> how many rounds in a row ours came too late."""
        self.riding: Riding | None = None
        """Mixes with other groups; None where there is no gossip."""
        self._spans: dict[tuple[int, int, int], OpenSpan] = {}
        self._sums: dict[tuple[int, int, int], Partial] = {}
        """Our region's, closed."""
        self._outcomes: dict[int, list[Outcome]] = {}
        """round -> what is held of it, the latest last. Several of one span may be held while a
        round is undecided; an applied round keeps exactly what was applied."""

    async def close(self) -> None:
        self._closed = True
        self._codec.shutdown(wait=False, cancel_futures=True)

    async def compute(self, fn: Callable[[], T]) -> T:
        """`fn()` in the codec thread."""
        if self._closed:
            raise TransportError(self._transport.peer_id, "is closing")
        return await asyncio.get_running_loop().run_in_executor(self._codec, fn)

    # ── contributions, outgoing ──────────────────────────────────────────────────────────
    def offer(
        self, number: int, contribution: Contribution, blocks: BlockReport = NO_BLOCKS
    ) -> None:
        """This round's frozen work; kept until the next, as an aggregator may die."""
        self._own = (number, contribution)
        self._own_blocks = blocks

    async def send_contribution(self, plan: Plan, index: int, to: PeerId) -> bool:
        """Stream our units of a span to its aggregator; whether all of it is inside.

        Raises:
            TransportError, RemoteProtocolError: the stream broke.
            RefusedError: it does not take them.
        """
        span = plan.spans[index]
        if self._own is None or self._own[0] != plan.round:
            raise RefusedError(NO, "nothing to send")
        contribution = self._own[1]
        loans = self._loans(plan, span.start, span.stop)
        if loans and to != span.aggregator:
            raise RefusedError(NO, "mixes with other groups are not summed up")
        if to == self._transport.peer_id:
            return await self._fold_own(plan, index, contribution)
        header = ContributionHeader(
            plan.run,
            plan.group,
            plan.round,
            plan.epoch,
            index,
            span.start,
            span.stop,
            float(contribution.weight),
            self._own_blocks,
            loans,
        )
        stream = await self._transport.open(to, limits.CONNECT_TIMEOUT_S)
        try:
            await stream.send(HEADER, encode(header))
            codec = self._codec_for(plan, index, to, contribution)
            begun_s, size = self._clock.monotonic(), 0
            with self.upload.sending() as transfer:
                async with unasked(stream, answer(stream)) as said:
                    if contribution.weight > 0:
                        for start, stop in batches(
                            span.start, span.stop, self._missed, BATCH_UNITS
                        ):
                            payloads = await self.compute(
                                lambda a=start, b=stop: contribution.encode(a, b, codec)  # type: ignore[misc]
                            )
                            payloads = self._attach(header.loans, plan.round, start, payloads)
                            if said.done():
                                said.result()
                            size += sum(map(self._weigh, payloads))
                            await send_units(stream, start, payloads)
                await expect_yes(stream)
                transfer.confirmed(size)
            self._sent(to, size, self._clock.monotonic() - begun_s)
        finally:
            await stream.close()
        return True

    def _codec_for(
        self, plan: Plan, index: int, to: PeerId, contribution: Contribution
    ) -> str | None:
        """What this link should carry, if the method leaves it open and the link is known."""
        bandwidth_bps = self._bandwidth_bps.get(to)
        if contribution.snr_db is None or bandwidth_bps is None:
            return None
        span = plan.spans[index]
        wished_db, least_db = contribution.snr_db
        choice = choose(
            (span.stop - span.start) * CHUNK_VALUES,
            bandwidth_bps=bandwidth_bps,
            budget_s=plan.exchange_ms / 1000 * BUDGET_SHARE,
            snr_wished_db=wished_db,
            snr_min_db=least_db,
            candidates=_PLAIN_CANDIDATES,
        )
        self._on_choice(to, index, choice)
        return choice.codec

    def _sent(self, to: PeerId, size: int, seconds: float) -> None:
        """A contribution went through: so fast is this link, our budget included."""
        if size < MEASURED_BYTES_MIN or seconds <= 0:
            return
        if len(self._bandwidth_bps) >= limits.ROSTER_MAX and to not in self._bandwidth_bps:
            self._bandwidth_bps.pop(next(iter(self._bandwidth_bps)))
        now_bps = 8 * size / seconds
        self._bandwidth_bps[to] = (self._bandwidth_bps.get(to, now_bps) + now_bps) / 2

    async def _fold_own(self, plan: Plan, index: int, contribution: Contribution) -> bool:
        span = plan.spans[index]
        state = self._span(plan.round, span.start, span.stop)
        me = self._transport.peer_id
        if contribution.weight <= 0:
            return True
        loans = self._loans(plan, span.start, span.stop)
        if self.riding is not None:
            self.riding.admit_own(loans, plan.round)
        self._begin(state, me, contribution.weight, self._own_blocks)
        for start in range(span.start, span.stop, BATCH_UNITS):
            if state.closed:
                return False
            stop = min(start + BATCH_UNITS, span.stop)
            if all(unit in state.parts.get(me, {}) for unit in range(start, stop)):
                continue
            payloads = await self.compute(
                lambda a=start, b=stop: contribution.encode(a, b)  # type: ignore[misc]
            )
            payloads = self._attach(loans, plan.round, start, payloads)
            self._keep(state, me, contribution.weight, self._own_blocks, enumerate(payloads, start))
        return True

    def _loans(self, plan: Plan, start: int, stop: int) -> tuple[Signed, ...]:
        return () if self.riding is None else self.riding.loans(plan, start, stop)

    def _attach(
        self, loans: Sequence[Signed], number: int, start: int, units: list[bytes]
    ) -> list[bytes]:
        if self.riding is None or not loans:
            return units
        return self.riding.attach(loans, number, start, units)

    # ── contributions, incoming ──────────────────────────────────────────────────────────
    async def receive_contribution(self, stream: Stream, header: ContributionHeader) -> bool:
        """Fold what an admitted sender streams; whether the whole span arrived.

        Raises:
            RemoteProtocolError: a unit that is not this span's, or not a valid coded unit.
            TransportError: the stream broke; what arrived stays inside.
        """
        if header.loans and self.riding is None:
            raise RemoteProtocolError(stream.peer, "mixes in a run without gossip")
        if self.riding is not None:
            self.riding.admit(header, stream.peer)
        state = self._span(header.round, header.start, header.stop)
        await reply(stream, YES)
        if header.weight <= 0:
            await stream.receive(0)
            await reply(stream, YES)
            return True
        self._begin(state, stream.peer, header.weight, header.blocks)
        batch: list[tuple[int, bytes]] = []
        done = False
        while not done:
            frame = await stream.receive(UNITS_FRAME_BYTES_MAX)
            if frame is None:
                done = True
            else:
                units = units_in(stream.peer, frame.kind, frame.payload)
                for unit, _ in units:
                    if not header.start <= unit < header.stop:
                        raise RemoteProtocolError(stream.peer, f"unit {unit} is not in its span")
                batch += units
            if batch and (done or len(batch) >= BATCH_UNITS):
                await self._check(stream.peer, batch)
                self._keep(state, stream.peer, header.weight, header.blocks, batch)
                batch = []
        whole = len(state.parts.get(stream.peer, ())) == header.stop - header.start
        if not whole and not state.closed:
            raise RemoteProtocolError(stream.peer, "ended its contribution early")
        await reply(stream, YES)
        return whole

    # ── sums of regions ──────────────────────────────────────────────────────────────────
    async def send_partial(
        self, plan: Plan, index: int, to: PeerId, answered: tuple[PeerId, ...]
    ) -> tuple[RemoteProtocolError, ...]:
        """Close the sum that we collect for our region, and bring it to the aggregator; who sent
        what turned out to be no part of it.

        Raises:
            TransportError, RemoteProtocolError: the stream broke.
            RefusedError: it does not take it.
        """
        span = plan.spans[index]
        key = (plan.round, span.start, span.stop)
        faults: list[RemoteProtocolError] = []
        if key not in self._sums:
            state = self._span(*key)
            state.closed = True
            coded, faults = await self._reduced(plan, state, None)
            units = {unit: data for unit, data in enumerate(coded, span.start) if data}
            self._sums[key] = Partial(span.start, state.contributors(), units)
            self._spans.pop(key, None)
        partial = self._sums[key]
        header = PartialHeader(
            plan.run, plan.group, plan.round, plan.epoch, index, span.start, span.stop,
            partial.contributors, answered,
        )  # fmt: skip
        stream = await self._transport.open(to, limits.CONNECT_TIMEOUT_S)
        try:
            await stream.send(HEADER, encode(header))
            with self.upload.sending() as transfer:
                async with unasked(stream, answer(stream)) as said:
                    for first, payloads in runs_of(partial.units):
                        for at in range(0, len(payloads), BATCH_UNITS):
                            if said.done():
                                said.result()
                            await send_units(stream, first + at, payloads[at : at + BATCH_UNITS])
                await expect_yes(stream)
                transfer.confirmed(sum(map(self._weigh, partial.units.values())))
        finally:
            await stream.close()
        return tuple(faults)

    async def receive_partial(self, stream: Stream, header: PartialHeader) -> None:
        """Keep an admitted collector's sum, once all of it is here.

        Raises:
            RemoteProtocolError: units that nobody in it contributed to, or no coded units, or
                contributors who are in another sum.
            TransportError: the stream broke.
        """
        if self._summing is None:
            raise RemoteProtocolError(stream.peer, "a sum, of what can't be summed up")
        await reply(stream, YES)
        partial = Partial(header.start, header.contributors)
        expected = set(partial.expected(header.stop))
        while (frame := await stream.receive(UNITS_FRAME_BYTES_MAX)) is not None:
            batch = units_in(stream.peer, frame.kind, frame.payload)
            for unit, _ in batch:
                if unit not in expected:
                    raise RemoteProtocolError(stream.peer, f"unit {unit} is not in its sum")
                expected.discard(unit)
            await self._check(stream.peer, batch, summed=True)
            partial.units.update(batch)
        if expected:
            raise RemoteProtocolError(stream.peer, "ended its region's sum early")
        state = self._span(header.round, header.start, header.stop)
        if (fault := state.take_sum(stream.peer, partial)) is not None:
            raise RemoteProtocolError(stream.peer, fault)
        await reply(stream, YES)

    async def _check(
        self, sender: PeerId, batch: Sequence[tuple[int, bytes]], *, summed: bool = False
    ) -> None:
        """Refuse what can't be units of this run before it is kept."""

        def check() -> tuple[int, str] | None:
            for unit, payload in batch:
                try:
                    if summed and self._summing is not None:
                        self._summing.check_sum(unit, payload)
                        continue
                    riding = self.riding
                    mean = payload if riding is None else riding.check(unit, payload)
                    self._reducer.check(unit, mean)
                except ValueError as error:
                    return unit, str(error)
            return None

        fault = await self.compute(check)
        if fault is not None:
            raise RemoteProtocolError(sender, f"unit {fault[0]}: {fault[1]}")

    def _begin(self, state: OpenSpan, sender: PeerId, weight: float, blocks: BlockReport) -> None:
        """A contribution, or the same once more, is about to come.

        Who began anew in the middle of the round has made another, of other work. Units of both
        are no contribution at all: what is kept of the earlier one is given up, or stays if it is
        whole, and then this one gets inside a later round.
        """
        if state.closed or (state.weights.get(sender), state.blocks.get(sender)) == (
            weight,
            blocks,
        ):
            return
        if len(state.parts.get(sender, ())) == state.units:
            return
        state.weights[sender], state.blocks[sender] = weight, blocks
        state.parts.pop(sender, None)

    def _keep(
        self, state: OpenSpan, sender: PeerId, weight: float, blocks: BlockReport,
        batch: Iterable[tuple[int, bytes]],
    ) -> None:  # fmt: skip
        """What is kept already, from an earlier try, stays."""
        if state.closed or (state.weights[sender], state.blocks[sender]) != (weight, blocks):
            return  # it has begun another contribution since
        kept = state.parts.setdefault(sender, {})
        for unit, payload in batch:
            kept.setdefault(unit, payload)

    def _span(self, number: int, start: int, stop: int) -> OpenSpan:
        key = (number, start, stop)
        if key not in self._spans:
            self._spans[key] = OpenSpan(self._clock.monotonic(), start, stop)
        return self._spans[key]

    # ── outcomes ─────────────────────────────────────────────────────────────────────────
    async def close_span(self, plan: Plan, index: int, *, keep: bool) -> Closed:
        """Reduce, sign and hold what has come in for the span (nothing if not `keep`)."""
        span = plan.spans[index]
        state = self._span(plan.round, span.start, span.stop)
        state.closed = True
        units: list[bytes] = [b""] * (span.stop - span.start)
        faults: list[RemoteProtocolError] = []
        board = None
        if self.riding is not None:
            board = self.riding.board(plan.round, span.start, span.stop)
        if keep:
            units, faults = await self._reduced(plan, state, board)
        contributors = state.contributors() if keep else ()
        header = OutcomeHeader(
            plan.run,
            plan.group,
            plan.round,
            plan.epoch,
            index,
            span.start,
            span.stop,
            contributors,
            await self.compute(lambda: content_digest(units)),
            sum(map(len, units)),
            self._clock.monotonic() - state.opened_s,
            plan.digest,
            () if board is None else notes_of(board, units, content_digest),
        )
        outcome = Outcome(header, sign(self._signer, OUTCOME_DOMAIN, header), tuple(units))
        self.hold(outcome)
        self._spans.pop((plan.round, span.start, span.stop), None)
        return Closed(outcome, tuple(faults))

    async def _reduced(
        self, plan: Plan, state: OpenSpan, board: Board | None
    ) -> tuple[list[bytes], list[RemoteProtocolError]]:
        """All units of a span, a few at a time: contributions are coded in the same thread."""
        units: list[bytes] = []
        faults: list[RemoteProtocolError] = []
        for start in range(state.start, state.stop, BATCH_UNITS):
            some = range(start, min(start + BATCH_UNITS, state.stop))
            coded, refused = await self.compute(
                lambda units=some: self._reduce(plan, state, units, board)  # type: ignore[misc]
            )
            units += coded
            faults += refused
        return units, faults

    def _reduce(
        self, plan: Plan, state: OpenSpan, units: range, board: Board | None
    ) -> tuple[list[bytes], list[RemoteProtocolError]]:
        """Coded means; what turns out to be no unit is taken out of the span."""
        coded: list[bytes] = []
        faults: list[RemoteProtocolError] = []
        for unit in units:
            sources = state.sources(unit)
            parts = [(source.weight, source.payload) for source in sources]
            riding = [m for _, payload in parts for m in split(payload)[1]] if board else []
            if riding:
                parts = [(weight, split(payload)[0]) for weight, payload in parts]
            if self._signed is not None:
                signed = [(s.peer, *part) for s, part in zip(sources, parts, strict=True)]
                reduced = self._signed.reduce_signed(unit, plan.digest, signed)
            else:
                reduced = self._reducer.reduce(unit, parts)
            coded.append(compose(reduced.payload, board.let_in(unit, riding) if board else ()))
            for index, reason in reduced.refused:
                faults.append(RemoteProtocolError(sources[index].peer, f"unit {unit}: {reason}"))
                del sources[index].held_in[unit]
        return coded, faults

    def drop_span(self, number: int, start: int, stop: int) -> None:
        self._sums.pop((number, start, stop), None)
        state = self._spans.pop((number, start, stop), None)
        if state is not None:
            state.closed = True

    def hold(self, outcome: Outcome) -> None:
        """Keep an outcome; of one span only the latest few, of rounds those that we may serve.

        Who is healed by a leap holds what it had and what comes after it: the oldest round goes.
        """
        number = outcome.header.round
        if (
            number not in self._outcomes
            and len(self._outcomes) >= self.rounds_kept + ROUNDS_HELD_MORE
        ):
            oldest = min(self._outcomes)
            if number < oldest:
                return
            del self._outcomes[oldest]
        held = self._outcomes.setdefault(number, [])
        if self.find(outcome.header) is not None:
            return
        rivals = [o for o in held if o.header.start == outcome.header.start]
        if len(rivals) >= RIVALS_MAX:
            held.remove(rivals[0])
        held.append(outcome)

    def find(self, header: OutcomeHeader) -> Outcome | None:
        """The held outcome with exactly this proof."""
        for outcome in self._outcomes.get(header.round, []):
            if outcome.header == header:
                return outcome
        return None

    def settle(self, number: int, applied: Iterable[Outcome]) -> None:
        """Round `number` was applied: keep exactly its outcomes, forget what is too old."""
        outcomes = list(applied)
        if self._own is not None and self._own[0] == number and self._own[1].weight > 0:
            headers = (outcome.header for outcome in outcomes)
            self._missed = missed_again(self._missed, headers, self._transport.peer_id)
        self._outcomes[number] = outcomes
        oldest = number - self.rounds_kept
        for old in [n for n in self._outcomes if n <= oldest or n > number + 1]:
            del self._outcomes[old]
        for key in [k for k in (*self._spans, *self._sums) if k[0] <= number]:
            self.drop_span(*key)

    async def push_outcome(self, epoch: int, outcome: Outcome, to: PeerId) -> None:
        """Stream a held outcome to a member; raises like `send_contribution`."""
        stream = await self._transport.open(to, limits.CONNECT_TIMEOUT_S)
        try:
            await stream.send(HEADER, encode(OutcomePush(epoch, outcome.signed)))
            with self.upload.sending() as transfer:
                async with unasked(stream, answer(stream)) as said:
                    start, units = outcome.header.start, outcome.units
                    for first in range(0, len(units), BATCH_UNITS):
                        if said.done() and said.result() == HAVE:
                            break
                        await send_units(stream, start + first, units[first : first + BATCH_UNITS])
                if said.result() == HAVE:
                    return
                await expect_yes(stream)
                transfer.confirmed(sum(self._weigh(unit) for unit in outcome.units if unit))
        finally:
            await stream.close()

    async def receive_outcome(self, stream: Stream, header: OutcomeHeader, signed: Signed) -> None:
        """Take an admitted outcome and hold it, once its content matches its proof.

        Raises:
            RemoteProtocolError: the content is not what the proof says.
        """
        await reply(stream, YES)
        units: list[bytes] = []
        size = 0
        while (frame := await stream.receive(UNITS_FRAME_BYTES_MAX)) is not None:
            size = self._take_units(stream.peer, header, frame.kind, frame.payload, units, size)
        self.hold(await self._verified(stream.peer, header, signed, units))
        await reply(stream, YES)

    def _take_units(
        self,
        sender: PeerId,
        header: OutcomeHeader,
        kind: int,
        data: bytes,
        units: list[bytes],
        size: int,
    ) -> int:
        for unit, payload in units_in(sender, kind, data):
            if unit != header.start + len(units) or unit >= header.stop:
                raise RemoteProtocolError(sender, f"unit {unit} of an outcome is out of order")
            size += len(payload)
            if size > header.content_bytes:
                raise RemoteProtocolError(sender, "an outcome larger than its proof says")
            units.append(payload)
        return size

    async def _verified(
        self, sender: PeerId, header: OutcomeHeader, signed: Signed, units: list[bytes]
    ) -> Outcome:
        if len(units) != header.stop - header.start:
            raise RemoteProtocolError(sender, "an outcome that ends early")
        if await self.compute(lambda: content_digest(units)) != header.content:
            raise RemoteProtocolError(sender, "an outcome that does not match its proof")
        return Outcome(header, signed, tuple(units))

    # ── serving and fetching what somebody missed ────────────────────────────────────────
    async def serve_outcomes(self, stream: Stream, query: OutcomeQuery) -> None:
        """Send what we hold of a round."""
        latest = {o.header.start: o for o in self._outcomes.get(query.round, [])}
        for start in sorted(latest):
            outcome = latest[start]
            header = outcome.header
            if header.group != query.group or query.span not in (None, header.span):
                continue
            await stream.send(OUTCOME, pack(outcome.signed))
            await send_units(stream, header.start, outcome.units)
        await stream.finish()

    async def fetch_outcomes(
        self,
        peer: PeerId,
        query: OutcomeQuery,
        exchanged: range,
        got: Callable[[OutcomeHeader, Signed], None],
        keep: Callable[[Outcome], None] | None = None,
    ) -> int:
        """Ask `peer` for a round's outcomes; `got` each as it is held; how many came. `exchanged`:
        the units whose turn it is in that round. `keep`: who holds them in our place.

        Raises:
            TransportError, RemoteProtocolError: the stream broke, or what came is no outcome.
        """
        stream = await self._transport.open(peer, limits.CONNECT_TIMEOUT_S)
        count = 0
        current: tuple[OutcomeHeader, Signed] | None = None
        units: list[bytes] = []
        size = 0
        try:
            await stream.send(HEADER, encode(query))
            await stream.finish()
            while True:
                frame = await stream.receive(UNITS_FRAME_BYTES_MAX)
                if frame is not None and frame.kind == UNITS and current is not None:
                    size = self._take_units(
                        peer, current[0], frame.kind, frame.payload, units, size
                    )
                    continue
                if current is not None:
                    (keep or self.hold)(await self._verified(peer, *current, units))
                    got(*current)
                    count += 1
                if frame is None:
                    return count
                if count >= limits.AGGREGATORS_MAX:
                    raise RemoteProtocolError(peer, "more outcomes than a round has")
                current = _signed_outcome(peer, frame.kind, frame.payload, query)
                if current[0].start < exchanged.start or current[0].stop > exchanged.stop:
                    raise RemoteProtocolError(peer, "an outcome of units that had no turn")
                units, size = [], 0
        finally:
            await stream.close()


def included_units(
    outcomes: list[Outcome], peer: PeerId, only: tuple[float, BlockReport] | None = None
) -> npt.NDArray[np.bool_]:
    """For every unit whether `peer`'s contribution is inside its mean; `only` if it came with that
    weight and that report."""
    parts: list[npt.NDArray[np.bool_]] = []
    for outcome in outcomes:
        size = outcome.header.stop - outcome.header.start
        theirs = next((c for c in outcome.header.contributors if c.peer == peer), None)
        if theirs is None or (only is not None and (theirs.weight, theirs.blocks) != only):
            parts.append(np.zeros(size, np.bool_))
        elif not theirs.mask:
            parts.append(np.ones(size, np.bool_))
        else:
            bits = np.unpackbits(np.frombuffer(theirs.mask, np.uint8), bitorder="little")
            parts.append(bits[:size].astype(np.bool_))
    return np.concatenate(parts) if parts else np.zeros(0, np.bool_)


# ── helpers ──────────────────────────────────────────────────────────────────────────────
def _signed_outcome(
    peer: PeerId, kind: int, data: bytes, query: OutcomeQuery
) -> tuple[OutcomeHeader, Signed]:
    if kind != OUTCOME:
        raise RemoteProtocolError(peer, f"a frame of kind {kind} where an outcome should start")
    try:
        signed = unpack(Signed, data)
    except SchemaError as error:
        raise RemoteProtocolError(peer, str(error)) from None
    header = open_signed(signed, OUTCOME_DOMAIN, OutcomeHeader, peer)
    if (header.run, header.group, header.round) != (query.run, query.group, query.round):
        raise RemoteProtocolError(peer, "an outcome that nobody asked for")
    return header, signed


def units_in(sender: PeerId, kind: int, data: bytes) -> list[tuple[int, bytes]]:
    """The (unit, coded bytes) that a frame holds.

    Raises:
        RemoteProtocolError: it is no frame of units, or its lengths don't add up.
    """
    if kind != UNITS or not data:
        raise RemoteProtocolError(sender, f"a frame of kind {kind} where units should be")
    found: list[tuple[int, bytes]] = []
    at = 0
    while at < len(data):
        if len(data) - at < _ENTRY.size:
            raise RemoteProtocolError(sender, "a frame of units that is cut short")
        unit, length = _ENTRY.unpack_from(data, at)
        at += _ENTRY.size
        if length > min(len(data) - at, limits.UNIT_BYTES_MAX):
            raise RemoteProtocolError(sender, f"unit {unit} is longer than its frame")
        found.append((unit, data[at : at + length]))
        at += length
    return found


async def send_units(stream: Stream, first: int, payloads: Sequence[bytes]) -> None:
    """Send units first, first + 1, ..., several to a frame."""
    parts: list[bytes] = []
    size = 0
    for unit, payload in enumerate(payloads, first):
        if parts and size + len(payload) > FRAME_GOAL_BYTES:
            await stream.send(UNITS, b"".join(parts))
            parts, size = [], 0
        parts += (_ENTRY.pack(unit, len(payload)), payload)
        size += _ENTRY.size + len(payload)
    if parts:
        await stream.send(UNITS, b"".join(parts))


async def reply(stream: Stream, status: int, reason: str = "") -> None:
    await stream.send(REPLY, bytes([status]) + reason.encode()[: REASON_BYTES_MAX - 1])


async def refuse(stream: Stream, status: int, reason: str) -> None:
    """Tell the opener of `stream` why not, and wait for it to close."""
    try:
        await reply(stream, status, reason)
        await stream.finish()
    except TransportError:
        pass  # it has gone already


async def answer(stream: Stream) -> int:
    """YES or HAVE.

    Raises:
        RefusedError: LATER, NO or ELSEWHERE, with the far side's reason.
    """
    frame = await stream.receive(REASON_BYTES_MAX)
    if frame is None or frame.kind != REPLY or not frame.payload:
        raise RemoteProtocolError(stream.peer, "no reply where one is due")
    status = frame.payload[0]
    if status not in (YES, HAVE):
        raise RefusedError(status, frame.payload[1:].decode(errors="replace"))
    return status


async def expect_yes(stream: Stream) -> None:
    await answer(stream)
