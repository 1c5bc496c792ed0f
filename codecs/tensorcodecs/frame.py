"""One coded chunk on the wire: a header of 24 bytes, then the codec's body.

    0   3  magic b"MTC"
    3   1  version (1)
    4   4  checksum: the low half of XXH3-64 over everything after these eight bytes
    8   1  codec id
    9   1  mode: how the plane of levels is coded, see the constants
    10  1  bits per level (0 where a codec has none)
    11  1  table: of a coded plane, which
    12  4  numel: values in the chunk
    16  4  parameter: the codec's own (a step, a block size)
    20  4  size: bytes after this header

All little-endian. A reader knows from codec, numel and mode how large anything can get before it
allocates, and refuses a payload that says otherwise. The checksum finds accidents, not forgery:
who sent a frame is the transport's business.
"""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from tensorcodecs.errors import DecodeError, EncodeError
from tensorcodecs.layout import CHUNK_VALUES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint16]
Payload = bytes | bytearray | memoryview

MAGIC: Final = b"MTC"
VERSION: Final = 1
HEADER: Final = struct.Struct("<3sBIBBBBIII")
_FIELDS: Final = struct.Struct("<BBBBIII")  # what the checksum covers of the header
CHECKED: Final = 8
"""Where what the checksum covers begins."""
COMPILED_FROM: Final = CHECKED + 241
"""Bytes of the shortest frame whose checksum is compiled: shorter ones go by other rules."""
_CHECKSUM: Final = struct.Struct("<I")

RAW: Final = 0
ZSTD: Final = 1
FIXED: Final = 2
"""Huffman-coded with a shipped table."""
OWN: Final = 3
"""Huffman-coded with a table that the body describes."""
ZERO: Final = 4
"""Every value is zero; there is no body."""

FRAME_VALUES_MAX: Final = 2**22  # 16 MiB of float32: one adapted layer's factors

VALUE_ABS_MAX: Final = 2.0**64
"""Largest magnitude that is encoded. Beyond it lies divergence, not training.

Readers accept up to 64 times as much (rounding, codebooks), which leaves room below float32's
2**128 for any weighted sum: no frame can overflow an accumulator.
"""

# Level 1 finds matches in noise: they cost time and ratio. With a 64-entry table and matches of 7
# it still folds runs of zeros, and codes the rest as literals: on the exponent plane of float32
# 60 us instead of 168 us per chunk, 3.19 instead of 3.26 bits per byte.
_PARAMETERS: Final = zstandard.ZstdCompressionParameters.from_level(
    1, min_match=7, hash_log=6, write_content_size=True, write_checksum=False, write_dict_id=False
)


class _Scratch(threading.local):
    """Buffers and zstd contexts of one thread, so that coding a chunk allocates only its result."""

    def __init__(self) -> None:
        self.floats: Float32 = np.empty(CHUNK_VALUES, np.float32)
        self.bytes: Bytes = np.empty(4 * CHUNK_VALUES, np.uint8)
        self.symbols: Words = np.empty(CHUNK_VALUES + 512, np.uint16)
        self.literals: Words = np.empty(CHUNK_VALUES + 512, np.uint16)
        self.escapes: npt.NDArray[np.uint32] = np.empty(CHUNK_VALUES + 512, np.uint32)
        self.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
        # The window is what a hostile frame could make zstd allocate.
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=FRAME_VALUES_MAX)

        self._room: Bytes = np.empty(0, np.uint8)

    def room(self, size: int) -> Bytes:
        """At least `size` bytes to build frames in, which stay until the next time."""
        if len(self._room) < size:
            self._room = np.empty(size, np.uint8)
        return self._room

    def body(self, size: int) -> Bytes:
        """`size` bytes to build side and plane in; frames above one chunk get fresh memory."""
        return self.bytes[:size] if size <= len(self.bytes) else np.empty(size, np.uint8)


scratch: Final = _Scratch()


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame whose header and checksum were found good."""

    codec: int
    mode: int
    bits: int
    table: int
    numel: int
    parameter: int
    body: memoryview

    @classmethod
    def read(cls, payload: Payload, *, intact: bool = False) -> Frame:
        """Any codec's frame. `intact`: its checksum was found good before.

        Raises:
            DecodeError: it is none, is damaged, or has bytes missing or left over.
        """
        data = memoryview(payload).cast("B")
        if len(data) < HEADER.size:
            raise DecodeError(f"{len(data)} bytes are too few for a frame's header")
        magic, version, checksum, codec, mode, bits, table, numel, parameter, size = (
            HEADER.unpack_from(data)
        )
        if magic != MAGIC:
            raise DecodeError("not a frame: the first bytes are not MTC")
        if version != VERSION:
            raise DecodeError(f"frame version {version}; this program reads version {VERSION}")
        body = data[HEADER.size :]
        if len(body) != size:
            raise DecodeError(f"the header announces {size} bytes, {len(body)} follow")
        if not intact and checksum_of(data[CHECKED:]) != checksum:
            raise DecodeError("the checksum does not match: damaged on the way")
        if numel > FRAME_VALUES_MAX:
            raise DecodeError(f"a frame of {numel} values; at most {FRAME_VALUES_MAX} are allowed")
        return cls(codec, mode, bits, table, numel, parameter, body)

    @classmethod
    def parse(cls, payload: Payload, codec_id: int, numel: int, *, intact: bool = False) -> Frame:
        """Read a frame that must be `codec_id`'s and hold `numel` values; `intact`: see `read`.

        Raises:
            DecodeError: it is not one, is damaged, or has bytes missing or left over.
        """
        frame = cls.read(payload, intact=intact)
        if frame.codec != codec_id:
            raise DecodeError(f"a frame of codec {frame.codec}, expected {codec_id}")
        if frame.numel != numel:
            raise DecodeError(f"a frame of {frame.numel} values, expected {numel}")
        return frame

    def require(self, *, bits: int = 0, table: int = 0) -> None:
        """Refuse header fields that this codec does not use.

        Raises:
            DecodeError: one is not what it must be.
        """
        if (self.bits, self.table) != (bits, table):
            raise DecodeError(f"{self.bits} bits and table {self.table} make no sense here")

    def split(self, side_bytes: int) -> tuple[Bytes, Bytes]:
        """The side data and the plane (`numel` bytes), both read-only, exactly as long as asked.

        Raises:
            DecodeError: the body is shorter, longer or unpacks to another size.
        """
        if len(self.body) < side_bytes:
            raise DecodeError(f"{len(self.body)} bytes, but the side data alone is {side_bytes}")
        side = np.frombuffer(self.body[:side_bytes], np.uint8)
        return side, self.plane(self.body[side_bytes:], self.numel)

    def plane(self, packed: memoryview, size: int) -> Bytes:
        """A RAW or ZSTD plane of exactly `size` bytes.

        Raises:
            DecodeError: it is of another size, broken, or coded otherwise.
        """
        if self.mode == RAW:
            if len(packed) != size:
                raise DecodeError(f"a raw plane of {len(packed)} bytes, expected {size}")
            return np.frombuffer(packed, np.uint8)
        if self.mode != ZSTD:
            raise DecodeError(f"mode {self.mode} is not known here")
        return np.frombuffer(_decompress(packed, size), np.uint8)


def checksum_of(data: Payload) -> int:
    """32 bits."""
    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF


def _decompress(packed: memoryview, size: int) -> bytes:
    try:
        # Asked first: given a size in the zstd header, the library allocates that much.
        declared = zstandard.frame_content_size(packed)
        if declared != size:
            raise DecodeError(f"the compressed plane unpacks to {declared} bytes, expected {size}")
        plane = scratch.decompressor.decompress(
            packed, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise DecodeError(f"the compressed plane is broken: {error}") from error
    if len(plane) != size:
        raise DecodeError(f"the compressed plane unpacked to {len(plane)} bytes, expected {size}")
    return plane


def seal(
    out: Bytes,
    size: int,
    codec: int,
    mode: int,
    numel: int,
    parameter: int,
    *,
    bits: int,
    table: int,
) -> memoryview:
    """The frame whose body is out[HEADER.size : HEADER.size + size]; overwrites what is before.

    It is a view of `out`.
    """
    _FIELDS.pack_into(out.data, CHECKED, codec, mode, bits, table, numel, parameter, size)
    data = out.data[: HEADER.size + size]
    data[:4] = MAGIC + bytes([VERSION])
    _CHECKSUM.pack_into(data, 4, checksum_of(data[CHECKED:]))
    return data


def pack(codec_id: int, parameter: int, side: Bytes, plane: Bytes, *, lossless: bool) -> bytes:
    """A frame of `plane`'s length; the plane is compressed if `lossless` and where that pays."""
    mode, packed = RAW, plane.data
    if lossless and len(plane):
        smaller = compressed(plane)
        # Below 1/32 (2 KiB of a chunk, 16 us at 1 Gbit/s) unpacking takes longer than sending.
        if len(smaller) <= len(plane) - len(plane) // 32 - 1:
            mode, packed = ZSTD, smaller
    return assemble(codec_id, mode, len(plane), parameter, side.data, packed)


def compressed(plane: Bytes) -> memoryview:
    """zstd's Huffman stage over a plane."""
    return memoryview(scratch.compressor.compress(plane.data))


def assemble(
    codec_id: int,
    mode: int,
    numel: int,
    parameter: int,
    *parts: Payload,
    bits: int = 0,
    table: int = 0,
) -> bytes:
    """A frame of the parts one after another."""
    size = sum(len(part) for part in parts)
    fields = _FIELDS.pack(codec_id, mode, bits, table, numel, parameter, size)
    total = xxhash.xxh3_64(fields)
    for part in parts:
        total.update(part)
    checksum = _CHECKSUM.pack(total.intdigest() & 0xFFFFFFFF)
    return b"".join((MAGIC, bytes([VERSION]), checksum, fields, *parts))


def bytes_max(numel: int, side_bytes: int) -> int:
    """The size of the largest frame of `numel` values: nothing compressed."""
    return HEADER.size + side_bytes + numel


def require_vector(x_N: Float32, limit: int = FRAME_VALUES_MAX) -> None:
    """Refuse what our own caller must not pass: another type, shape or stride, or too much.

    Raises:
        ValueError: not a contiguous, aligned 1-D float32 array of at most `limit` values.
    """
    flags = x_N.flags
    if x_N.dtype != np.float32 or x_N.ndim != 1 or not (flags.c_contiguous and flags.aligned):
        raise ValueError(f"need a contiguous float32 vector, got {x_N.dtype} {x_N.shape}")
    if len(x_N) > limit:
        raise ValueError(f"{len(x_N)} values; a frame holds at most {limit}")


def encode_each(encode: Callable[[Float32], bytes], x_N: Float32) -> list[bytes]:
    """A frame for every `CHUNK_VALUES` of `x_N`, one by one.

    Raises:
        EncodeError: a value can't be sent; its index is that in `x_N`.
    """
    require_vector(x_N, 2**62)
    frames = []
    for at in range(0, len(x_N), CHUNK_VALUES):
        try:
            frames.append(encode(x_N[at : at + CHUNK_VALUES]))
        except EncodeError as error:
            raise EncodeError(at + error.index, error.value) from None
    return frames


def require_frames(payloads: Sequence[Payload], out_N: Float32) -> None:
    """One frame for every `CHUNK_VALUES` of `out_N`.

    Raises:
        DecodeError: more or fewer.
        ValueError: `out_N` is not what `require_vector` wants.
    """
    require_vector(out_N, 2**62)
    if len(payloads) != -(-len(out_N) // CHUNK_VALUES):
        raise DecodeError(f"{len(payloads)} frames for {len(out_N)} values")


def decode_each(
    decode_into: Callable[[Payload, Float32], None], payloads: Sequence[Payload], out_N: Float32
) -> None:
    """The frames of `encode_each` into `out_N`, one by one.

    Raises: like `require_frames`, and whatever `decode_into` does.
    """
    require_frames(payloads, out_N)
    for unit, payload in enumerate(payloads):
        decode_into(payload, out_N[unit * CHUNK_VALUES : (unit + 1) * CHUNK_VALUES])


def refuse_values(x_N: Float32) -> EncodeError:
    """The error that names the first value of `x_N` that can't be sent (there is one)."""
    index = int(np.argmin(np.abs(x_N) <= VALUE_ABS_MAX))  # False for NaN too
    return EncodeError(index, float(x_N[index]))
