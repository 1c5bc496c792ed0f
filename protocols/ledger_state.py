"""A ledger as bytes: what checkpoints keep, and newcomers get from their donor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from protocols import limits
from protocols.blocks import ORDINAL_MAX, BlockRange, from_wire
from protocols.coverage import Coverage
from protocols.fragments import Fragments
from protocols.ledger import Batch, Holder, Ledger
from protocols.ranges import Ranges
from protocols.records import PeerIdField, RunIdField
from protocols.schema import Max, SchemaError, pack, unpack
from protocols.types import RunId

Count = Annotated[int, Max(ORDINAL_MAX)]
Pieces = Annotated[tuple[BlockRange, ...], Max(limits.LEDGER_RANGES_MAX)]


Rounds = Annotated[tuple[Count, ...], Max(limits.FRAGMENTS_MAX)]


@dataclass(frozen=True, slots=True)
class BatchState:
    since: Count
    blocks: Pieces


@dataclass(frozen=True, slots=True)
class HolderState:
    peer: PeerIdField
    seen: Count
    leases: Pieces
    touched: Pieces
    batches: Annotated[tuple[BatchState, ...], Max(2 * limits.FRAGMENTS_MAX + 2)]
    whole: Rounds
    """One more than `Coverage` has, as the next too, so that never is 0."""
    begun: Rounds
    cover: Annotated[bytes, Max(limits.LEDGER_COVER_UNITS_MAX // 8)]


@dataclass(frozen=True, slots=True)
class LedgerState:
    run: RunIdField
    blocks: Count
    units: Annotated[int, Max(limits.UNITS_MAX)]
    floor: Count
    accounted: Pieces
    reissued: Pieces
    holders: Annotated[tuple[HolderState, ...], Max(limits.LEDGER_HOLDERS_MAX)]
    trained: Count
    repeated: Count
    unasked: Count
    reissued_count: Count
    lost: Count
    elsewhere: Count


def pack_ledger(ledger: Ledger) -> bytes:
    """At most `LEDGER_BYTES_MAX`."""
    counts = ledger.counts
    holders = tuple(
        HolderState(
            peer, holder.seen, _pieces(holder.leases), _pieces(holder.touched),
            tuple(BatchState(b.since, _pieces(b.blocks)) for b in holder.batches),
            tuple(n + 1 for n in holder.coverage.whole),
            tuple(n + 1 for n in holder.coverage.begun), _bits(holder.coverage.cover),
        )
        for peer, holder in sorted(ledger.holders.items())
    )  # fmt: skip
    return pack(
        LedgerState(
            ledger.run, ledger.blocks, ledger.units, ledger.floor, _pieces(ledger.accounted),
            _pieces(ledger.reissued), holders, counts["trained"], counts["repeated"],
            counts["unasked"], counts["reissued"], counts["lost"], counts["elsewhere"],
        )
    )  # fmt: skip


def unpack_ledger(
    data: bytes, run: RunId, blocks: int, units: int, fragments: Fragments | None = None
) -> Ledger:
    """The ledger that `data` holds, which a stranger may have written.

    Raises:
        SchemaError: it is none, of other data or another model, or it does not add up.
    """
    if len(data) > limits.LEDGER_BYTES_MAX:
        raise SchemaError(f"a ledger of {len(data)} bytes")
    state = unpack(LedgerState, data)
    if (state.run, state.blocks, state.units) != (run, blocks, units):
        raise SchemaError("a ledger of another run, other data or another model")
    ledger = Ledger(run, blocks, units, fragments)
    ledger.floor = state.floor
    ledger.accounted = from_wire(state.accounted)
    ledger.reissued = from_wire(state.reissued)
    for told in state.holders:
        coverage = Coverage(ledger.fragments)
        coverage.cover = int.from_bytes(told.cover, "little")
        fit = len(told.whole) == len(told.begun) == ledger.fragments.count
        batches = [Batch(batch.since, from_wire(batch.blocks)) for batch in told.batches]
        if told.peer in ledger.holders or coverage.cover >> units or not fit:
            raise SchemaError(f"a ledger with an impossible holder {told.peer}")
        coverage.whole = [number - 1 for number in told.whole]
        coverage.begun = [number - 1 for number in told.begun]
        ledger.holders[told.peer] = Holder(
            told.seen, from_wire(told.leases), from_wire(told.touched), batches, coverage
        )
    ledger.counts |= {
        "trained": state.trained, "repeated": state.repeated, "unasked": state.unasked,
        "reissued": state.reissued_count, "lost": state.lost, "elsewhere": state.elsewhere,
    }  # fmt: skip
    ahead = ledger.floor + 2 * ledger.window
    low = min((start for start, _ in ledger.accounted), default=ledger.floor)
    if low < ledger.floor or max(ledger.accounted.top, ledger.taken().top) > ahead:
        raise SchemaError("a ledger that reaches beyond its window")
    if ledger.pieces > limits.LEDGER_RANGES_MAX:
        raise SchemaError(f"a ledger of {ledger.pieces} pieces")
    fault = ledger.fault()
    if fault:
        raise SchemaError(f"a ledger that does not add up: {fault}")
    return ledger


def _pieces(ranges: Ranges) -> tuple[BlockRange, ...]:
    return tuple(BlockRange(start, stop) for start, stop in ranges)


def _bits(cover: int) -> bytes:
    return cover.to_bytes(-(-cover.bit_length() // 8), "little")
