"""An outer state as chunks: the grid, a hash for each chunk, and the digest over them all.

The state's canonical bytes are its arrays' bytes, array by array in order of their names. Each
array is cut into chunks of `CHUNK_BYTES`, the last one shorter; no chunk holds parts of two arrays.
The *leaves* are the chunks' SHA-256, in order. The digest, which heartbeats tell and plans sign, is
SHA-256 over what the state is (run's layout, names, types, shapes, size of a chunk) and the leaves.

So who knows the digest can check a list of leaves, and then each chunk by itself, from whomever it
comes. That is a Merkle tree with one level: a deeper one would make proofs for single chunks small,
but whoever wants a chunk wants them all, and all leaves are 1/32768 of the state.

A round that changes a part of the state changes some chunks: `ChunkHashes` hashes only those again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt

from protocols import limits
from protocols.messages import Counter
from protocols.records import NameField
from protocols.schema import Max, pack
from protocols.types import Digest

CHUNK_BYTES: Final = 1 << 20  # 0.4 s at 20 Mbit/s: so much a bad donor or a broken line can cost
LEAF_BYTES: Final = 32
LEAVES_BYTES_MAX: Final = LEAF_BYTES * (limits.STATE_BYTES_MAX // CHUNK_BYTES)
TENSORS_MAX: Final = 65536

Arrays = Mapping[str, npt.NDArray[Any]]
Leaves = tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class TensorNote:
    name: Annotated[str, Max(512)]
    dtype: NameField
    shape: Annotated[tuple[Counter, ...], Max(8)]


@dataclass(frozen=True, slots=True)
class _Head:
    """What a state is, beside its values."""

    layout: Annotated[bytes, Max(256)]
    chunk_bytes: Counter
    tensors: Annotated[tuple[TensorNote, ...], Max(TENSORS_MAX)]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes start..stop-1 of an array, which are at `offset` in the canonical bytes."""

    name: str
    start: int
    stop: int
    offset: int

    def __len__(self) -> int:
        return self.stop - self.start


def describe(arrays: Arrays) -> tuple[TensorNote, ...]:
    return tuple(
        TensorNote(name, arrays[name].dtype.str, tuple(arrays[name].shape))
        for name in sorted(arrays)
    )


class StateGrid:
    """How a run's states are cut, the same on every peer of the run; states with an array that
    grows, as a log does, have one for each length (`like`). Immutable."""

    def __init__(
        self,
        arrays: Arrays | tuple[TensorNote, ...],
        layout: bytes = b"",
        chunk_bytes: int = CHUNK_BYTES,
        grows: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """`arrays`: any state of the run, or its description; values don't matter. `layout`: what
        else must be the same for equal bytes to mean the same state. `grows`: which arrays, of one
        dimension, differ in length from state to state, and the most bytes of each."""
        self.tensors = arrays if isinstance(arrays, tuple) else describe(arrays)
        self.layout = layout
        self.chunk_bytes = chunk_bytes
        self._grows = grows
        self._first: dict[str, int] = {}
        chunks: list[Chunk] = []
        offset = 0
        for note in self.tensors:
            self._first[note.name] = len(chunks)
            size = math.prod(note.shape) * np.dtype(note.dtype).itemsize
            for start in range(0, size, chunk_bytes):
                stop = min(start + chunk_bytes, size)
                chunks.append(Chunk(note.name, start, stop, offset + start))
            offset += size
        self.chunks = tuple(chunks)
        self.bytes = offset

    def like(self, tensors: tuple[TensorNote, ...]) -> StateGrid:
        """The grid of the state that is described so: this one, unless something has grown.

        Raises:
            ValueError: no state of this run is like that.
        """
        if tensors == self.tensors:
            return self
        if len(tensors) != len(self.tensors) or not all(map(self._fits, tensors, self.tensors)):
            raise ValueError("it has other tensors than this run's")
        return StateGrid(tensors, self.layout, self.chunk_bytes, self._grows)

    def _fits(self, note: TensorNote, own: TensorNote) -> bool:
        if note.name not in self._grows or (note.name, note.dtype) != (own.name, own.dtype):
            return note == own
        size = math.prod(note.shape) * np.dtype(own.dtype).itemsize
        return len(note.shape) == 1 and size <= self._grows[note.name]

    @property
    def count(self) -> int:
        return len(self.chunks)

    @cached_property
    def _head(self) -> bytes:
        head = pack(_Head(self.layout, self.chunk_bytes, self.tensors))
        return b"murmuration/state/1\0" + len(head).to_bytes(8) + head

    def touching(self, name: str, start: int, stop: int) -> range:
        """The numbers of the chunks that hold any of bytes start..stop-1 of an array."""
        first = self._first[name]
        if stop <= start:
            return range(first, first)
        return range(first + start // self.chunk_bytes, first + (stop - 1) // self.chunk_bytes + 1)

    def empty(self) -> dict[str, npt.NDArray[Any]]:
        """Arrays of this shape to write chunks into."""
        return {t.name: np.empty(t.shape, np.dtype(t.dtype)) for t in self.tensors}

    def view(self, arrays: Arrays, index: int) -> memoryview:
        """A chunk's bytes, without a copy. The arrays must be contiguous."""
        chunk = self.chunks[index]
        return _bytes_of(arrays[chunk.name])[chunk.start : chunk.stop]

    def leaf(self, arrays: Arrays, index: int) -> bytes:
        return leaf_of(self.view(arrays, index))

    def leaves(self, arrays: Arrays) -> Leaves:
        """Cost: one pass of SHA-256; other threads run meanwhile."""
        return tuple(self.leaf(arrays, index) for index in range(self.count))

    def digest(self, leaves: Sequence[bytes]) -> Digest:
        """Of the state with these leaves.

        Raises:
            ValueError: a wrong number of leaves, or something that is none.
        """
        if len(leaves) != self.count or any(len(leaf) != LEAF_BYTES for leaf in leaves):
            raise ValueError(f"{len(leaves)} leaves where {self.count} are due")
        total = hashlib.sha256(self._head)
        total.update(b"".join(leaves))
        return Digest(total.digest())

    def split(self, leaves: bytes) -> Leaves:
        """The leaves in one string; `digest` counts them."""
        return tuple(leaves[at : at + LEAF_BYTES] for at in range(0, len(leaves), LEAF_BYTES))


class ChunkHashes:
    """The leaves of a state that changes in place, each hashed again only after `changed`."""

    def __init__(self, grid: StateGrid) -> None:
        self._grid = grid
        self._leaves: list[bytes] = [b""] * grid.count

    def changed(self, name: str, start: int, stop: int) -> None:
        """Bytes start..stop-1 of an array may have changed."""
        for index in self._grid.touching(name, start, stop):
            self._leaves[index] = b""

    def replaced(self) -> None:
        """All of it may have changed."""
        self._leaves = [b""] * self._grid.count

    def digest(self, arrays: Arrays) -> Digest:
        for index, leaf in enumerate(self._leaves):
            if not leaf:
                self._leaves[index] = self._grid.leaf(arrays, index)
        return self._grid.digest(self._leaves)


def leaf_of(chunk: bytes | memoryview) -> bytes:
    return hashlib.sha256(chunk).digest()


def _bytes_of(array: npt.NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    if not array.flags.c_contiguous:
        raise ValueError("an array that is not contiguous has no bytes to show")
    return array.reshape(-1).view(np.uint8).data
