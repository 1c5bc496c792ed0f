"""One coded chunk on the wire: header, checksum, side data, and one plane that may be compressed.

    0   3  magic b"MTC"          8   4  numel: values in the chunk
    3   1  version (1)          12   4  block: values per scale (0 where a codec has none)
    4   1  codec id             16   4  size: bytes after this header
    5   1  mode: 0 raw, 1 zstd  20   4  CRC-32 of bytes 0-19 and of everything after the header
    6   2  zero                 24      side data, then the plane (little-endian throughout)

Every codec splits a chunk in two: *side* data, sent as it is (scales, mantissa bytes: noise that no
coder shrinks), and a *plane* of exactly `numel` bytes, which zstd's Huffman stage shrinks. So a
reader knows the size of everything from (codec, numel, block) before it allocates, and a payload
that says otherwise is refused.

The checksum finds accidents, not forgery: who sent a frame is the transport's business.
"""

from __future__ import annotations

import struct
import threading
import zlib
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import zstandard

from tensorcodecs.layout import CHUNK_VALUES

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Payload = bytes | bytearray | memoryview

MAGIC: Final = b"MTC"
VERSION: Final = 1
HEADER: Final = struct.Struct("<3sBBBHIIII")
_CHECKED: Final = HEADER.size - 4  # the header's bytes that the checksum covers

RAW: Final = 0
ZSTD: Final = 1

FRAME_VALUES_MAX: Final = 2**22  # 16 MiB of float32: one adapted layer's factors; a unit is 2**16

VALUE_ABS_MAX: Final = 2.0**64
"""Largest magnitude that is encoded. Beyond it lies divergence, not training.

Readers accept up to twice as much (rounding, sums), which leaves room below float32's 2**128 for
any weighted sum: no frame can overflow an accumulator.
"""

# Level 1 finds matches in noise: they cost time and ratio. With a 64-entry table and matches of 7
# it still folds runs of zeros, and codes the rest as literals: on the exponent plane of float32
# 60 us instead of 168 us per chunk, 3.19 instead of 3.26 bits per byte.
_PARAMETERS: Final = zstandard.ZstdCompressionParameters.from_level(
    1, min_match=7, hash_log=6, write_content_size=True, write_checksum=False, write_dict_id=False
)


class DecodeError(ValueError):
    """A payload is not a frame of this codec and length; the text says what is wrong with it."""


class EncodeError(ValueError):
    """A value can't be sent: NaN, infinite, or beyond VALUE_ABS_MAX.

    `index` is the first such value's place in the chunk; `Layout.name_at` names its tensor.
    """

    def __init__(self, index: int, value: float) -> None:
        super().__init__(f"value {index} is {value}; only finite values up to 2**64 can be sent")
        self.index = index
        self.value = value


class _Scratch(threading.local):
    """Buffers and zstd contexts of one thread, so that coding a chunk allocates only its result."""

    def __init__(self) -> None:
        self.floats: Float32 = np.empty(CHUNK_VALUES, np.float32)
        self.bytes: Bytes = np.empty(4 * CHUNK_VALUES, np.uint8)
        self.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
        # The window is what a hostile frame could make zstd allocate.
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=FRAME_VALUES_MAX)

    def body(self, size: int) -> Bytes:
        """`size` bytes to build side and plane in; frames above one chunk get fresh memory."""
        return self.bytes[:size] if size <= len(self.bytes) else np.empty(size, np.uint8)


scratch: Final = _Scratch()


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame whose header and checksum were found good."""

    mode: int
    numel: int
    block: int
    body: memoryview

    @classmethod
    def parse(cls, payload: Payload, codec_id: int, numel: int) -> Frame:
        """Read the header of a frame that must be `codec_id`'s and hold `numel` values.

        Raises:
            DecodeError: it is not one, is damaged, or has bytes missing or left over.
        """
        data = memoryview(payload).cast("B")
        if len(data) < HEADER.size:
            raise DecodeError(f"{len(data)} bytes are too few for a frame's header")
        header = HEADER.unpack_from(data)
        magic, version, codec, mode, zero, values, block, size, checksum = header
        if magic != MAGIC:
            raise DecodeError("not a frame: the first bytes are not MTC")
        if version != VERSION:
            raise DecodeError(f"frame version {version}; this program reads version {VERSION}")
        body = data[HEADER.size :]
        if len(body) != size:
            raise DecodeError(f"the header announces {size} bytes, {len(body)} follow")
        if zlib.crc32(body, zlib.crc32(data[:_CHECKED])) != checksum:
            raise DecodeError("the checksum does not match: damaged on the way")
        if zero != 0:
            raise DecodeError("reserved header bytes are not zero")
        if codec != codec_id:
            raise DecodeError(f"a frame of codec {codec}, expected {codec_id}")
        if values != numel:
            raise DecodeError(f"a frame of {values} values, expected {numel}")
        return cls(mode, values, block, body)

    def split(self, side_bytes: int) -> tuple[Bytes, Bytes]:
        """The side data and the plane (`numel` bytes), both read-only, exactly as long as asked.

        Raises:
            DecodeError: the body is shorter, longer or unpacks to another size.
        """
        if len(self.body) < side_bytes:
            raise DecodeError(f"{len(self.body)} bytes, but the side data alone is {side_bytes}")
        side = np.frombuffer(self.body[:side_bytes], np.uint8)
        packed = self.body[side_bytes:]
        if self.mode == RAW:
            if len(packed) != self.numel:
                raise DecodeError(f"a raw plane of {len(packed)} bytes, expected {self.numel}")
            return side, np.frombuffer(packed, np.uint8)
        if self.mode != ZSTD:
            raise DecodeError(f"mode {self.mode} is not known")
        return side, np.frombuffer(_decompress(packed, self.numel), np.uint8)


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


def pack(codec_id: int, block: int, side: Bytes, plane: Bytes, *, lossless: bool) -> bytes:
    """A frame of `plane`'s length; the plane is compressed if `lossless` and where that pays."""
    mode, packed = RAW, plane.data
    if lossless and len(plane):
        smaller = memoryview(scratch.compressor.compress(plane.data))
        # Below 1/32 (2 KiB of a chunk, 16 us at 1 Gbit/s) unpacking takes longer than sending.
        if len(smaller) <= len(plane) - len(plane) // 32 - 1:
            mode, packed = ZSTD, smaller
    size = len(side) + len(packed)
    head = HEADER.pack(MAGIC, VERSION, codec_id, mode, 0, len(plane), block, size, 0)[:_CHECKED]
    checksum = zlib.crc32(packed, zlib.crc32(side.data, zlib.crc32(head)))
    return b"".join((head, checksum.to_bytes(4, "little"), side.data, packed))


def bytes_max(numel: int, side_bytes: int) -> int:
    """The size of the largest frame of `numel` values: nothing compressed."""
    return HEADER.size + side_bytes + numel


def require_vector(x_N: Float32) -> None:
    """Refuse what our own caller must not pass: another type, shape or stride, or too much.

    Raises:
        ValueError: not a contiguous 1-D float32 array of at most FRAME_VALUES_MAX values.
    """
    if x_N.dtype != np.float32 or x_N.ndim != 1 or not x_N.flags.c_contiguous:
        raise ValueError(f"need a contiguous float32 vector, got {x_N.dtype} {x_N.shape}")
    if len(x_N) > FRAME_VALUES_MAX:
        raise ValueError(f"{len(x_N)} values; a frame holds at most {FRAME_VALUES_MAX}")


def refuse_values(x_N: Float32) -> EncodeError:
    """The error that names the first value of `x_N` that can't be sent (there is one)."""
    index = int(np.argmin(np.abs(x_N) <= VALUE_ABS_MAX))  # False for NaN too
    return EncodeError(index, float(x_N[index]))
