"""Blockwise 8-bit quantisation: one float32 scale per block, then Huffman over the levels.

Each block of K values is divided by its largest magnitude / 127 and rounded to the nearest level
(ties to even), so its largest value is kept to rounding and nothing is clipped. Rounding is
deterministic: the same values give the same levels on every machine. (Dettmers et al., "8-bit
Optimizers via Block-wise Quantization", ICLR 2022, with uniform levels, because an entropy coder
follows.)

Body: f32 scale per block, then the levels: as they are (mode RAW), by zstd, or (OWN) 128 bytes of
code lengths (`huffman.byte_lengths`, symbol = level + 127) and a coded section.

Shape suffixes: N = values, B = blocks, S = symbols.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from tensorcodecs import plain
from tensorcodecs.backend import kernels
from tensorcodecs.errors import DecodeError, EncodeError
from tensorcodecs.frame import (
    OWN,
    RAW,
    VALUE_ABS_MAX,
    Bytes,
    Float32,
    Frame,
    Payload,
    assemble,
    bytes_max,
    compressed,
    decode_each,
    refuse_values,
    require_vector,
    scratch,
)
from tensorcodecs.huffman import byte_lengths, byte_table
from tensorcodecs.layout import CHUNK_VALUES

if TYPE_CHECKING:
    from collections.abc import Sequence

_CODEC_ID: Final = 1
_LEVELS: Final = np.float32(127)
BLOCK_VALUES: Final = 4096  # 0.008 bits of scale per value; error 0.9 % on pseudo-gradients
_BLOCK_MIN: Final = 64
_TABLE_BYTES: Final = 128
_BATCH: Final = 8  # chunks that share a code table: building one takes as long as coding one
_SAMPLE: Final = 8  # every how many runs of 256 levels are counted for it
_CODED_MIN: Final = 4096  # levels; below, the table costs more than it saves

ZERO_BELOW: Final = 2.0**-100
"""A block with no magnitude above this is sent as zeros: its scale would leave float32's range."""

_SCALE_MIN: Final = np.float32(ZERO_BELOW) / _LEVELS
_SCALE_MAX: Final = np.float32(VALUE_ABS_MAX) / _LEVELS

_Levels = npt.NDArray[np.int8]


class Int8:
    """Worst error per value: its block's largest magnitude / 254 (+ 0.01 %), or `ZERO_BELOW`.

    Size: at most 24 + N + 4 * ceil(N / block) bytes; about 0.88 N on pseudo-gradients, whose levels
    are bell-shaped. Zero blocks decode to exact zeros. `lossless=False` sends the levels as they
    are: nothing is faster. Either reads the other's frames.
    """

    def __init__(self, *, block: int = BLOCK_VALUES, lossless: bool = True) -> None:
        if not _block_ok(block):
            raise ValueError(f"block {block} is not a power of two in {_BLOCK_MIN}..65536")
        self.name = "high" if lossless else "int8-raw"
        self.codec_id = _CODEC_ID
        self._block = block
        self._lossless = lossless

    def bytes_max(self, numel: int) -> int:
        """The size of the largest frame of `numel` values."""
        return bytes_max(numel, 4 * _blocks(numel, self._block))

    def encode(self, x_N: Float32) -> bytes:
        """See `Codec.encode`."""
        require_vector(x_N, CHUNK_VALUES)
        return self._encode_batch([x_N])[0]

    def encode_many(self, x_N: Float32) -> list[bytes]:
        """See `Codec.encode_many`."""
        require_vector(x_N, 2**62)
        chunks = [x_N[at : at + CHUNK_VALUES] for at in range(0, len(x_N), CHUNK_VALUES)]
        frames: list[bytes] = []
        for first in range(0, len(chunks), _BATCH):
            try:
                frames += self._encode_batch(chunks[first : first + _BATCH])
            except EncodeError as error:
                raise EncodeError(first * CHUNK_VALUES + error.index, error.value) from None
        return frames

    def _encode_batch(self, chunks: list[Float32]) -> list[bytes]:
        sides: list[Bytes] = []
        levels: list[_Levels] = []
        for number, x_N in enumerate(chunks):
            scale_B = np.empty(_blocks(len(x_N), self._block), np.float32)
            level_N = np.empty(len(x_N), np.int8)
            if not _quantise(x_N, self._block, scale_B, level_N):
                error = refuse_values(x_N)
                raise EncodeError(number * CHUNK_VALUES + error.index, error.value)
            sides.append(scale_B.astype("<f4", copy=False).view(np.uint8))
            levels.append(level_N)
        packed = b""
        if self._lossless and kernels() is not None:
            count_S = np.zeros(256, np.int64)
            for level_N in levels:
                _count(level_N, count_S)
            packed = byte_lengths(count_S)
        return [
            self._pack(side, level_N, packed) for side, level_N in zip(sides, levels, strict=True)
        ]

    def _pack(self, side: Bytes, level_N: _Levels, lengths: bytes) -> bytes:
        numel = len(level_N)
        mode, parts = RAW, [level_N.data.cast("B")]
        compiled = kernels()
        if self._lossless and compiled is None and numel:
            parts, mode = [compressed(level_N.view(np.uint8))], 1
        elif self._lossless and compiled is not None and numel >= _CODED_MIN:
            out = scratch.bytes
            end = int(
                compiled.encode_bytes(level_N, byte_table(lengths).entry_S, out, 0, scratch.symbols)
            )
            mode, parts = OWN, [memoryview(lengths), out.data[:end]]
        # Below 1/32 (2 KiB of a chunk, 16 us at 1 Gbit/s) unpacking takes longer than sending.
        if sum(map(len, parts)) > numel - numel // 32:
            mode, parts = RAW, [level_N.data.cast("B")]
        return assemble(_CODEC_ID, mode, numel, self._block, side.data, *parts)

    def decode_into(self, payload: Payload, out_N: Float32) -> None:
        """See `Codec.decode_into`."""
        require_vector(out_N, CHUNK_VALUES)
        block, scale_B, level_N = _read(payload, len(out_N))
        _scale(level_N, block, scale_B, out_N, add=False)

    def decode_many(self, payloads: Sequence[Payload], out_N: Float32) -> None:
        """See `Codec.decode_many`."""
        decode_each(self.decode_into, payloads, out_N)

    def accumulate(self, payload: Payload, weight: float, acc_N: Float32) -> None:
        """See `Codec.accumulate`."""
        require_vector(acc_N, CHUNK_VALUES)
        block, scale_B, level_N = _read(payload, len(acc_N))
        _scale(level_N, block, scale_B * np.float32(weight), acc_N, add=True)


def _block_ok(block: int) -> bool:
    return _BLOCK_MIN <= block <= 2**16 and block & (block - 1) == 0


def _blocks(numel: int, block: int) -> int:
    return -(-numel // block)


def _quantise(x_N: Float32, block: int, scale_B: Float32, level_N: _Levels) -> bool:
    """Fill scales and levels; False if a value can't be sent."""
    compiled = kernels()
    if compiled is not None:
        return bool(compiled.byte_levels(x_N, x_N.view(np.int32), block, scale_B, level_N))
    for index in range(len(scale_B)):
        where = slice(index * block, (index + 1) * block)
        peak = np.abs(x_N[where]).max()
        if not peak <= VALUE_ABS_MAX:  # NaN is not
            return False
        if peak < ZERO_BELOW:
            scale_B[index] = 0
            level_N[where] = 0
        else:
            scale_B[index] = peak / _LEVELS
            level_N[where] = np.rint(x_N[where] * (_LEVELS / peak)).astype(np.int8)
    return True


def _scale(level_N: _Levels, block: int, scale_B: Float32, out_N: Float32, *, add: bool) -> None:
    compiled = kernels()
    if compiled is not None:
        compiled.scale_bytes(level_N, block, scale_B, out_N, add)
        return
    value_N = level_N.astype(np.float32) * np.repeat(scale_B, block)[: len(out_N)]
    if add:
        out_N += value_N
    else:
        out_N[:] = value_N


def _count(level_N: _Levels, count_S: npt.NDArray[np.int64]) -> None:
    compiled = kernels()
    assert compiled is not None
    compiled.count_bytes(level_N, _SAMPLE if len(level_N) >= CHUNK_VALUES // 4 else 1, count_S)


def _read(payload: Payload, numel: int) -> tuple[int, Float32, _Levels]:
    """Block size, scales and levels of a frame, all checked."""
    frame = Frame.parse(payload, _CODEC_ID, numel)
    frame.require()
    block = frame.parameter
    if not _block_ok(block):
        raise DecodeError(f"blocks of {block} values are not allowed")
    side_bytes = 4 * _blocks(numel, block)
    if len(frame.body) < side_bytes:
        raise DecodeError(f"{len(frame.body)} bytes, but the side data alone is {side_bytes}")
    scale_B = _scales(np.frombuffer(frame.body[:side_bytes], np.uint8))
    rest = frame.body[side_bytes:]
    if frame.mode == OWN:
        return block, scale_B, _read_coded(rest, numel)
    return block, scale_B, frame.plane(rest, numel).view(np.int8)


def _read_coded(section: memoryview, numel: int) -> _Levels:
    if len(section) < _TABLE_BYTES:
        raise DecodeError("a code table that is not complete")
    table = byte_table(bytes(section[:_TABLE_BYTES]))
    symbol_S = plain.read_section(section[_TABLE_BYTES:], numel, table)
    compiled = kernels()
    level_N = np.empty(numel, np.int8)
    if compiled is not None:
        good = bool(compiled.levels_of_bytes(symbol_S, level_N))
    else:
        good = symbol_S.max(initial=0) <= 2 * int(_LEVELS)
        level_N[:] = symbol_S.astype(np.int16) - 127
    if not good:
        raise DecodeError("a level beyond 127")
    return level_N


def _scales(side: Bytes) -> Float32:
    scale_B = side.view("<f4").astype(np.float32, copy=False)
    good_B = (scale_B == 0) | ((scale_B >= _SCALE_MIN) & (scale_B <= _SCALE_MAX))
    if not good_B.all():
        index = int(np.argmin(good_B))
        raise DecodeError(f"the scale of block {index} is {scale_B[index]}: not one we would send")
    return scale_B
