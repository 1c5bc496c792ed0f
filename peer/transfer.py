"""What a state is on the wire, and files from one donor.

A donor first sends a note: round, digest, the description of the arrays (which must equal the
receiver's own: nothing is allocated that its model does not have anyway), and the hash of every
chunk. `donating` gives chunks and `receiving` gets them. Files (tokenizer, base weights, small
data) are named in the manifest with size and SHA-256; a broken download goes on where it ended.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from peer.errors import StorageError
from peer.exchange import BYTES, HEADER, NO, REPLY, YES, RefusedError, refuse
from peer.net.transport import Stream, Transport, TransportError
from peer.state_chunks import (
    LEAF_BYTES,
    LEAVES_BYTES_MAX,
    TENSORS_MAX,
    Leaves,
    StateGrid,
    TensorNote,
)
from peer.train.method import ArrayMap
from protocols import limits
from protocols.blocks import BlockRange, BlockRanges
from protocols.errors import RemoteProtocolError
from protocols.messages import AssetQuery, Counter, encode
from protocols.records import DigestField
from protocols.schema import Max, SchemaError, pack, unpack
from protocols.types import Digest, PeerId, RunId

PIECE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class StateNote:
    """What a donor is about to send."""

    round: Counter
    digest: DigestField
    tensors: Annotated[tuple[TensorNote, ...], Max(TENSORS_MAX)]
    leaves: Annotated[bytes, Max(LEAVES_BYTES_MAX)]
    """The SHA-256 of its chunks, in order."""
    ledger: Annotated[bytes, Max(limits.LEDGER_BYTES_MAX)]
    """The group's account of its blocks at that round (`protocols.ledger_state`); may be none."""
    at_work: BlockRanges
    """Blocks that the donor trains on, and no outcome tells yet: for others to keep off."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The outer state after `round` rounds, and what the group knows beside it at that round."""

    round: int
    digest: Digest
    arrays: ArrayMap
    ledger: bytes = b""
    at_work: tuple[BlockRange, ...] = ()
    """The donor's blocks that no outcome tells yet."""
    donor: PeerId | None = None
    """Whose word it is; None: our own."""

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


def note_of(state: Snapshot, tensors: tuple[TensorNote, ...], leaves: Leaves) -> StateNote:
    return StateNote(
        state.round, state.digest, tensors, b"".join(leaves), state.ledger, state.at_work
    )


def read_note(donor: PeerId, data: bytes, grid: StateGrid) -> tuple[StateNote, Leaves, StateGrid]:
    """A donor's word on its state, the hashes of that state's chunks, and how it is cut. `grid`: of
    any state of the run.

    Raises:
        RemoteProtocolError: it is no such word, of another shape than this run's states, or its
            hashes are not those that its digest vouches for.
    """
    try:
        note = unpack(StateNote, data)
    except SchemaError as error:
        raise RemoteProtocolError(donor, str(error)) from None
    try:
        theirs = grid.like(note.tensors)
        leaves = theirs.split(note.leaves)
        digest = theirs.digest(leaves)
    except ValueError as error:
        raise RemoteProtocolError(donor, f"its state: {error}") from None
    if digest != note.digest:
        raise RemoteProtocolError(donor, "the hashes of its state's chunks are not of its digest")
    return note, leaves, theirs


def note_bytes_max(grid: StateGrid) -> int:
    """A donor's word on a state of this grid is no longer than this."""
    return len(pack(grid.tensors)) + LEAF_BYTES * grid.count + limits.LEDGER_BYTES_MAX + (1 << 20)


async def serve_asset(stream: Stream, path: Path, offset: int) -> None:
    """Send a file from `offset` on."""
    try:
        file = await asyncio.to_thread(path.open, "rb")
    except OSError:
        await refuse(stream, NO, f"{path.name} is not here")
        return
    with file:
        file.seek(offset)
        await stream.send(REPLY, bytes([YES]))
        while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
            await stream.send(BYTES, piece)
        await stream.finish()


async def fetch_asset(
    transport: Transport, donor: PeerId, run: RunId, name: str, size: int, sha256: str, path: Path
) -> None:
    """Download a file that the manifest names; goes on after what `path`.part already holds.

    Raises:
        TransportError, RefusedError: try another donor.
        RemoteProtocolError: what came is not the file.
        StorageError: the disk is full.
    """
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    if have > size:
        part.unlink()
        have = 0
    stream = await transport.open(donor, limits.CONNECT_TIMEOUT_S)
    try:
        await stream.send(HEADER, encode(AssetQuery(run, name, have)))
        await stream.finish()
        await first_reply(stream, 4096)
        with part.open("ab") as file:
            while (frame := await stream.receive(PIECE_BYTES)) is not None:
                have += len(frame.payload)
                if frame.kind != BYTES or have > size:
                    raise RemoteProtocolError(donor, f"{name} is larger than the manifest says")
                await asyncio.to_thread(file.write, frame.payload)
    except OSError as error:
        raise StorageError(f"cannot write {part}: {error}; free some space and try again") from None
    finally:
        await stream.close()
    if await asyncio.to_thread(file_sha256, part) != sha256:
        part.unlink()
        raise RemoteProtocolError(donor, f"{name} does not match the manifest's SHA-256")
    part.rename(path)


def file_sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            total.update(piece)
    return total.hexdigest()


async def first_reply(stream: Stream, bytes_max: int) -> bytes:
    """What follows a YES.

    Raises:
        RefusedError: it is none.
        TransportError: the stream broke.
    """
    frame = await stream.receive(bytes_max)
    if frame is None or frame.kind != REPLY or not frame.payload:
        raise TransportError(stream.peer, "no reply where one is due")
    if frame.payload[0] != YES:
        raise RefusedError(frame.payload[0], frame.payload[1:].decode(errors="replace"))
    return frame.payload[1:]
