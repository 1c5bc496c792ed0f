"""What a group owes another, on the wire: proofs and payloads, whoever asks.

For each proof (an outcome's signed header that has the mix) a frame PROOF with the mix and the
header, then the coded d of the units that it speaks of, as in an outcome.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from peer.exchange import UNITS_FRAME_BYTES_MAX, content_digest, send_units, units_in
from peer.net.transport import Stream
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.loans import Loan, MixId, MixNote, mask_of, mix_id, open_loan
from protocols.messages import OUTCOME_DOMAIN, OutcomeHeader, open_signed
from protocols.records import Signed
from protocols.schema import SchemaError, pack, unpack
from protocols.types import PeerId, RunId

PROOF: Final = 6
PROOFS_MAX: Final = 256  # of one mix: each unit of a slot might be in another outcome, in theory
_MIX: Final = struct.Struct("<Q")
Compute = Callable[[Callable[[], str]], Awaitable[str]]
_PROOF_BYTES_MAX: Final = _MIX.size + 2 * limits.CONTROL_BYTES_MAX


@dataclass(slots=True)
class Debt:
    """A mix of ours with all that proves it."""

    signed: Signed
    loan: Loan
    proofs: list[Signed] = field(default_factory=list)
    payloads: dict[int, bytes] = field(default_factory=dict)
    """unit -> coded d."""

    @property
    def mask(self) -> int:
        return sum(1 << (unit - self.loan.start) for unit in self.payloads)


def notes_for(mix: MixId, proof: Signed, sender: PeerId) -> tuple[OutcomeHeader, list[MixNote]]:
    """The header in `proof`, and what it says of a mix.

    Raises:
        RemoteProtocolError: it is no outcome's, or says nothing of it.
    """
    header = open_signed(proof, OUTCOME_DOMAIN, OutcomeHeader, sender)
    notes = [note for note in header.mixes if mix_id(note.loan.body) == mix]
    if not notes:
        raise RemoteProtocolError(sender, "shows a proof of another mix")
    return header, notes


async def send_debt(stream: Stream, mix: MixId, debt: Debt) -> None:
    """Stream all proofs of a mix with their d."""
    for proof in debt.proofs:
        await stream.send(PROOF, _MIX.pack(mix) + pack(proof))
        for note in notes_for(mix, proof, stream.peer)[1]:
            held = [debt.payloads.get(unit, b"") for unit in range(note.start, note.stop)]
            await send_units(stream, note.start, held)


async def receive_debts(
    stream: Stream,
    run: RunId,
    check: Callable[[int, bytes], None],
    debts_max: int,
    compute: Compute,
) -> dict[MixId, Debt]:
    """What the far side streams, every unit of it proven.

    `check`: raises ValueError where bytes can't be a d of that unit; `compute` runs it elsewhere.

    Raises:
        RemoteProtocolError: proofs that prove nothing, or units that are not the proven ones.
        TransportError: the stream broke.
    """
    peer = stream.peer
    debts: dict[MixId, Debt] = {}
    waiting: list[MixNote] = []
    inside: list[bytes] = []
    current: MixId = 0
    while (frame := await stream.receive(max(UNITS_FRAME_BYTES_MAX, _PROOF_BYTES_MAX))) is not None:
        if frame.kind == PROOF:
            if waiting:
                raise RemoteProtocolError(peer, "a debt that ends before it is proven")
            current, waiting = _proof(peer, run, frame.payload, debts, debts_max)
            continue
        for unit, payload in units_in(peer, frame.kind, frame.payload):
            if not waiting or unit != waiting[0].start + len(inside):
                raise RemoteProtocolError(peer, f"unit {unit} of a debt is out of order")
            inside.append(payload)
            if len(inside) < waiting[0].stop - waiting[0].start:
                continue
            note = waiting.pop(0)
            await _verify(peer, note, inside, check, compute)
            units = zip(range(note.start, note.stop), inside, strict=True)
            loan = debts[current].loan
            debts[current].payloads.update((u, d) for u, d in units if loan.start <= u < loan.stop)
            inside = []
    if waiting:
        raise RemoteProtocolError(peer, "a debt that ends before it is proven")
    return {mix: debt for mix, debt in debts.items() if debt.payloads}


def _proof(
    peer: PeerId, run: RunId, data: bytes, debts: dict[MixId, Debt], debts_max: int
) -> tuple[MixId, list[MixNote]]:
    try:
        (mix,) = _MIX.unpack_from(data)
        proof = unpack(Signed, data[_MIX.size :])
    except (SchemaError, struct.error) as error:
        raise RemoteProtocolError(peer, f"a proof that is none: {error}") from None
    header, notes = notes_for(mix, proof, peer)
    debt = debts.get(mix)
    if debt is None:
        if len(debts) >= debts_max:
            raise RemoteProtocolError(peer, "more debts than there can be")
        debt = debts[mix] = Debt(notes[0].loan, open_loan(notes[0].loan, peer))
    if len(debt.proofs) >= PROOFS_MAX:
        raise RemoteProtocolError(peer, "more proofs than there can be")
    if (header.run, header.group) != (run, debt.loan.borrower) or debt.loan.run != run:
        raise RemoteProtocolError(peer, "a proof of another group")
    if any(not mask_of(debt.loan, note.start, note.stop) for note in notes):
        raise RemoteProtocolError(peer, "a proof of units that were not lent")
    debt.proofs.append(proof)
    return mix, notes


async def _verify(
    peer: PeerId, note: MixNote, inside: list[bytes], check: Callable[[int, bytes], None],
    compute: Compute,
) -> None:  # fmt: skip
    def look() -> str:
        if content_digest(inside) != note.content:
            return "a debt that does not match its proof"
        for unit, payload in enumerate(inside, note.start):
            try:
                check(unit, payload)
            except ValueError as error:
                return f"unit {unit}: {error}"
        return ""

    fault = await compute(look)
    if fault:
        raise RemoteProtocolError(peer, fault)
