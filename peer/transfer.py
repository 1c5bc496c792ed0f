"""State and files from one donor: what a newcomer needs before it can take part.

A state travels as its tensors' bytes in order, after a description that must equal the receiver's
own layout: nothing is allocated that the receiver's model does not have anyway. Files (tokenizer,
base weights, small data) are named in the manifest with size and SHA-256; a broken download goes
on where it ended.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt

from peer.errors import StorageError
from peer.exchange import BYTES, HEADER, NO, REPLY, YES, RefusedError, refuse
from peer.net.transport import Stream, Transport, TransportError
from peer.train.method import ArrayMap
from protocols import limits
from protocols.blocks import BlockRange, BlockRanges
from protocols.errors import RemoteProtocolError
from protocols.messages import AssetQuery, Counter, StateQuery, encode
from protocols.records import DigestField, NameField
from protocols.schema import Max, SchemaError, pack, unpack
from protocols.types import Digest, PeerId, RunId

PIECE_BYTES: Final = 1 << 20
DESCRIPTION_BYTES_MAX: Final = (1 << 20) + limits.LEDGER_BYTES_MAX
TENSORS_MAX: Final = 65536


@dataclass(frozen=True, slots=True)
class TensorNote:
    name: Annotated[str, Max(512)]
    dtype: NameField
    shape: Annotated[tuple[Counter, ...], Max(8)]


@dataclass(frozen=True, slots=True)
class StateNote:
    """What a donor is about to send."""

    round: Counter
    digest: DigestField
    tensors: Annotated[tuple[TensorNote, ...], Max(TENSORS_MAX)]
    ledger: Annotated[bytes, Max(limits.LEDGER_BYTES_MAX)]
    """The group's account of its blocks at that round (`protocols.ledger_state`); may be none."""
    at_work: BlockRanges
    """Blocks that the donor trains on and no outcome tells of yet, for the newcomer to keep off."""
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

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


def describe(arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[TensorNote, ...]:
    return tuple(
        TensorNote(name, arrays[name].dtype.str, tuple(arrays[name].shape))
        for name in sorted(arrays)
    )


async def serve_state(stream: Stream, state: Snapshot) -> int:
    """Send a snapshot; how many bytes it was."""
    arrays = state.arrays
    note = StateNote(state.round, state.digest, describe(arrays), state.ledger, state.at_work)
    await stream.send(REPLY, bytes([YES]) + pack(note))
    sent = 0
    for tensor in note.tensors:
        raw = _raw(arrays[tensor.name])
        for start in range(0, len(raw), PIECE_BYTES):
            piece = raw[start : start + PIECE_BYTES]
            await stream.send(BYTES, piece)
            sent += len(piece)
    await stream.finish()
    return sent


async def fetch_state(
    transport: Transport, donor: PeerId, run: RunId, expected: tuple[TensorNote, ...]
) -> Snapshot:
    """Download the outer state.

    `expected`: this peer's own layout; anything else is refused before memory is taken.

    Raises:
        TransportError: the donor went away.
        RefusedError: it has no state to give.
        RemoteProtocolError: its state is not of this run's shape.
    """
    stream = await transport.open(donor, limits.CONNECT_TIMEOUT_S)
    try:
        await stream.send(HEADER, encode(StateQuery(run)))
        await stream.finish()
        note = _note(donor, await _first(stream, DESCRIPTION_BYTES_MAX))
        if note.tensors != expected:
            raise RemoteProtocolError(donor, "its state has other tensors than this run's")
        arrays: ArrayMap = {}
        for tensor in note.tensors:
            array = np.empty(tensor.shape, dtype=np.dtype(tensor.dtype))
            await _fill(stream, _raw(array))
            arrays[tensor.name] = array
        if await stream.receive(0) is not None:
            raise RemoteProtocolError(donor, "its state goes on after its end")
        return Snapshot(note.round, Digest(note.digest), arrays, note.ledger, note.at_work)
    finally:
        await stream.close()


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
        await _first(stream, 4096)
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


def _raw(array: npt.NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


async def _first(stream: Stream, bytes_max: int) -> bytes:
    frame = await stream.receive(bytes_max)
    if frame is None or frame.kind != REPLY or not frame.payload:
        raise TransportError(stream.peer, "no reply where one is due")
    if frame.payload[0] != YES:
        raise RefusedError(frame.payload[0], frame.payload[1:].decode(errors="replace"))
    return frame.payload[1:]


def _note(donor: PeerId, data: bytes) -> StateNote:
    try:
        note = unpack(StateNote, data)
    except SchemaError as error:
        raise RemoteProtocolError(donor, str(error)) from None
    if sum(math.prod(t.shape) for t in note.tensors) > limits.STATE_BYTES_MAX:
        raise RemoteProtocolError(donor, "its state is larger than any model")
    return note


async def _fill(stream: Stream, target: memoryview) -> None:
    at = 0
    while at < len(target):
        frame = await stream.receive(PIECE_BYTES)
        if frame is None:
            raise TransportError(stream.peer, "its state ended early")
        if frame.kind != BYTES or at + len(frame.payload) > len(target) or not frame.payload:
            raise RemoteProtocolError(stream.peer, "its state does not fit its description")
        target[at : at + len(frame.payload)] = frame.payload
        at += len(frame.payload)
