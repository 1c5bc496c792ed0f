"""A whole vector in one piece: the layout it belongs to, and its coded chunks, each at hand.

    0   4  magic b"MTCF"
    4   1  version (1)
    5   3  zero
    8  32  the layout's digest: which tensor sits where
    40  8  numel: values in the vector
    48  4  chunks: one per `CHUNK_VALUES` values
    52  4  checksum: the low half of XXH3-64 over bytes 0-51 and the offsets
    56  8  per chunk: where it ends, counted from the first chunk's start
        .  the chunks: frames (`tensorcodecs.frame`), each with its own checksum

So a range of chunks can be read, or fetched, alone; and a file that was cut short, mixed up or
meant for another model is refused before anything is allocated.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from tensorcodecs.codec import codec_of
from tensorcodecs.ecsq import Ecsq
from tensorcodecs.errors import DecodeError
from tensorcodecs.frame import Float32, Payload, checksum_of, require_vector
from tensorcodecs.layout import CHUNK_VALUES

if TYPE_CHECKING:
    from tensorcodecs.codec import Codec
    from tensorcodecs.layout import Layout

MAGIC: Final = b"MTCF"
VERSION: Final = 1
_HEAD: Final = struct.Struct("<4sBBH32sQI")
_CHECKSUM: Final = struct.Struct("<I")
_START: Final = _HEAD.size + _CHECKSUM.size
_BATCH: Final = 64  # chunks read in one call, whose error names them


def pack_vector(x_N: Float32, layout: Layout, codec: Codec) -> bytes:
    """`x_N` (layout.numel,) as one container.

    Raises:
        ValueError: another length.
        EncodeError: a value is NaN, infinite or too large; `layout.name_at` names its tensor.
    """
    require_vector(x_N, 2**62)
    if len(x_N) != layout.numel:
        raise ValueError(f"{len(x_N)} values for a layout of {layout.numel}")
    frames = codec.encode_many(x_N)
    ends = np.cumsum([len(frame) for frame in frames], dtype="<u8").tobytes()
    head = _HEAD.pack(MAGIC, VERSION, 0, 0, layout.digest(), layout.numel, len(frames))
    return b"".join((head, _CHECKSUM.pack(checksum_of(head + ends)), ends, *frames))


class Container:
    """A container whose header and offsets were found good; chunks are checked as they are read."""

    def __init__(self, data: Payload, layout: Layout) -> None:
        """
        Raises:
            DecodeError: not a container, not of this layout, damaged, or cut short.
        """
        self._data = memoryview(data).cast("B")
        if len(self._data) < _START:
            raise DecodeError(f"{len(self._data)} bytes are too few for a container")
        magic, version, zero, zeros, digest, numel, chunks = _HEAD.unpack_from(self._data)
        if magic != MAGIC:
            raise DecodeError("not a container: the first bytes are not MTCF")
        if version != VERSION:
            raise DecodeError(f"container version {version}; this program reads {VERSION}")
        if digest != layout.digest() or numel != layout.numel:
            raise DecodeError("a container of another layout: other tensors, shapes or names")
        if chunks != layout.units or len(self._data) < _START + 8 * chunks:
            raise DecodeError(f"a container of {chunks} chunks, expected {layout.units}")
        (checksum,) = _CHECKSUM.unpack_from(self._data, _HEAD.size)
        body = _START + 8 * chunks
        offsets = self._data[_START:body]
        if zero or zeros or checksum_of(bytes(self._data[: _HEAD.size]) + offsets) != checksum:
            raise DecodeError("the container's checksum does not match: damaged on the way")
        ends = np.frombuffer(offsets, "<u8").astype(np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
        if (ends < starts).any() or int(ends[-1] if chunks else 0) != len(self._data) - body:
            raise DecodeError("chunk offsets that do not add up to the container's size")
        self.numel = numel
        self.chunks = chunks
        self._starts = starts + body
        self._ends = ends + body

    def chunk(self, index: int) -> memoryview:
        """One chunk's frame, not yet checked."""
        return self._data[int(self._starts[index]) : int(self._ends[index])]

    def read_into(self, out_N: Float32, first: int = 0) -> None:
        """Chunks `first`.. into `out_N`, as many as it holds. On an error it holds anything.

        Raises:
            ValueError: `out_N` is not of whole chunks, or there are fewer.
            DecodeError: a chunk is damaged or not what it should be; says which.
        """
        self._walk(out_N, first, None)

    def add_into(self, acc_N: Float32, weight: float, first: int = 0) -> None:
        """acc_N += weight * chunks `first`..; on an error the chunks before it are inside.

        Raises: like `read_into`.
        """
        self._walk(acc_N, first, np.float32(weight))

    def _walk(self, out_N: Float32, first: int, weight: np.float32 | None) -> None:
        """Batch by batch; added if there is a weight."""
        require_vector(out_N, 2**62)
        at = first * CHUNK_VALUES
        if at + len(out_N) > self.numel or (
            len(out_N) % CHUNK_VALUES and at + len(out_N) != self.numel
        ):
            raise ValueError(f"chunks {first}.. do not hold {len(out_N)} values")
        count = -(-len(out_N) // CHUNK_VALUES)
        for start in range(first, first + count, _BATCH):
            stop = min(start + _BATCH, first + count)
            where = slice((start - first) * CHUNK_VALUES, (stop - first) * CHUNK_VALUES)
            try:
                self._read(start, stop, out_N[where], weight)
            except DecodeError as error:
                raise DecodeError(f"chunks {start}..{stop - 1}: {error}") from None

    def _read(self, start: int, stop: int, out_N: Float32, weight: np.float32 | None) -> None:
        frames = [self.chunk(index) for index in range(start, stop)]
        codecs = [codec_of(frame) for frame in frames]
        first = codecs[0]
        if isinstance(first, Ecsq) and all(codec is first for codec in codecs):
            add = weight is not None
            factor = weight if weight is not None else np.float32(1)
            span = slice(start, stop)
            first.decode_packed(
                self._data, self._starts[span], self._ends[span], out_N, factor, add=add
            )
            return
        for index, (codec, frame) in enumerate(zip(codecs, frames, strict=True)):
            where = slice(index * CHUNK_VALUES, (index + 1) * CHUNK_VALUES)
            if weight is None:
                codec.decode_into(frame, out_N[where])
            else:
                codec.accumulate(frame, float(weight), out_N[where])


def unpack_vector(data: Payload, layout: Layout) -> npt.NDArray[np.float32]:
    """The vector (layout.numel,) of a container.

    Raises:
        DecodeError: not an intact container of this layout.
    """
    container = Container(data, layout)
    out_N = np.empty(layout.numel, np.float32)
    container.read_into(out_N)
    return out_N
