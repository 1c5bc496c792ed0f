"""What `tensorcodecs.kernels` does, with numpy: the same bytes and the same values, slower.

For machines without numba, for the unusual frames (raw and zstd planes, stochastic rounding), and
as the second opinion that the compiled loops are tested against. Decoding Huffman streams runs all
streams of a chunk in step, a lane each.

Shape suffixes: N = values, B = blocks of 256, T = symbols, L = magnitudes, S = streams.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from tensorcodecs.backend import kernels
from tensorcodecs.errors import DecodeError
from tensorcodecs.frame import Bytes, Float32, scratch
from tensorcodecs.huffman import ESCAPE, LENGTH_MAX, Table

Int64 = npt.NDArray[np.int64]
Symbols = npt.NDArray[np.uint16]

BLOCK: Final = 256
GROUP: Final = 32
UNIT: Final = 4096
SAMPLE: Final = 32
NO_SCALE: Final = -(2**15)
REFUSED: Final = 2**15 - 1
STEP_MIN: Final = -440
STEP_MAX: Final = 264
ZERO_CODE: Final = 255
BOOK_MAX: Final = 16.0

_QUARTER: Final = int(np.float32(2**0.25).view(np.uint32)) & 0x7FFFFF
_THREE_QUARTERS: Final = int(np.float32(2**0.75).view(np.uint32)) & 0x7FFFFF
_STEPS: Final = np.array([2 ** (k / 4) for k in range(4)], np.float32)
_INVERSES: Final = np.array([2 ** (-k / 4) for k in range(4)], np.float32)


def planes_of(bits: int) -> int:
    """Levels in a symbol."""
    return 12 // bits


def top_of(bits: int) -> int:
    """The largest magnitude of a level."""
    return (1 << (bits - 1)) - 1


def blocks_of(count: int) -> int:
    return -(-count // BLOCK)


def length_of(count: int, planes: int) -> int:
    """How many symbols `count` values take."""
    return -(-count // (planes * GROUP)) * GROUP


def streams_of(length: int) -> int:
    """How many streams `length` symbols are coded in."""
    if length >= 4096:
        return 16
    return 4 if length >= 256 else 1


def symbols_each(length: int) -> int:
    """Symbols in every stream but the last, which has the rest."""
    step = 4 * streams_of(length)
    return -(-length // step) * 4


# ── scales ───────────────────────────────────────────────────────────────────────────────────
def _squares(x_BK: Float32) -> Float32:
    """Sums of squares of rows of 256, in the order of `vector.sum_of_squares`."""
    square_BRJ = (x_BK * x_BK).reshape(-1, 16, 16)
    part_BPJ = square_BRJ[:, 0:4].copy()
    for row in range(4, 16, 4):
        part_BPJ += square_BRJ[:, row : row + 4]
    lane_BJ = (part_BPJ[:, 0] + part_BPJ[:, 1]) + (part_BPJ[:, 2] + part_BPJ[:, 3])
    while lane_BJ.shape[1] > 1:
        half = lane_BJ.shape[1] // 2
        lane_BJ = lane_BJ[:, :half] + lane_BJ[:, half:]
    result: Float32 = lane_BJ[:, 0]
    return result


def _quarters(square_B: Float32) -> Int64:
    bits_B = square_B.view(np.uint32).astype(np.int64)
    mantissa_B = bits_B & 0x7FFFFF
    exponent_B = (bits_B >> 23) - 127
    return 2 * exponent_B + (mantissa_B >= _QUARTER) + (mantissa_B >= _THREE_QUARTERS)


def _widest(total_B: Float32, share_B: Float32, peak_B: Float32, reach: np.float32) -> Int64:
    return np.maximum(_quarters(total_B * share_B), _quarters(peak_B * peak_B * reach))


def block_steps(x_N: Float32, square: np.float32, reach: np.float32) -> Int64:
    """Each block's step exponent in quarter octaves, or NO_SCALE, or REFUSED: its rms times
    sqrt(square), or its largest magnitude times sqrt(reach) if that is more."""
    count, blocks = len(x_N), blocks_of(len(x_N))
    x_BK = np.zeros((blocks, BLOCK), np.float32)
    x_BK.reshape(-1)[:count] = x_N
    share_B = np.full(blocks, square / np.float32(BLOCK), np.float32)
    if count % BLOCK:
        share_B[-1] = square / np.float32(count % BLOCK)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        total_B = _squares(x_BK)
        peak_B = np.abs(x_BK).max(1, initial=0)
        step_B = _widest(total_B, share_B, peak_B, reach)
        for block in np.flatnonzero(~((total_B >= 2.0**-80) & (total_B <= 2.0**100))):
            one = slice(block, block + 1)
            if total_B[block] < 2.0**-80:
                scale = np.float32(2.0**70)
                small = _squares(x_BK[one] * scale)
                step = _widest(small, share_B[one], peak_B[one] * scale, reach)[0] - 280
                step_B[block] = NO_SCALE if small[0] < 2.0**-62 else step
            elif not (np.abs(x_BK[block]) <= 2.0**64).all():
                step_B[block] = REFUSED
            else:
                scale = np.float32(2.0**-60)
                total = _squares(x_BK[one] * scale)
                step_B[block] = _widest(total, share_B[one], peak_B[one] * scale, reach)[0] + 240
    return step_B


def powers(quarters_B: Int64) -> Float32:
    """2 ** (quarters / 4), for normal results."""
    bits_B = ((quarters_B >> 2) + 127 << 23).astype(np.uint32)
    power_B: Float32 = _STEPS[quarters_B & 3] * bits_B.view(np.float32)
    return power_B


def inverses(quarters_B: Int64) -> Float32:
    """2 ** (-quarters / 4), for normal results."""
    bits_B = (127 - (quarters_B >> 2) << 23).astype(np.uint32)
    power_B: Float32 = _INVERSES[quarters_B & 3] * bits_B.view(np.float32)
    return power_B


def scale_codes(step_B: Int64, peak: int) -> tuple[Bytes, Float32]:
    """One byte per block (quarter octaves below the peak), and 1 / step (0 for zero blocks)."""
    down_B = peak - step_B
    live_B = down_B <= 254
    inverse_B = np.where(live_B, inverses(np.where(live_B, step_B, 0)), np.float32(0))
    return np.where(live_B, down_B, ZERO_CODE).astype(np.uint8), inverse_B.astype(np.float32)


def read_scales(code_B: Bytes, peak: int) -> Float32:
    """Steps from their codes.

    Raises:
        DecodeError: no encoder sends such.
    """
    step_B = peak - code_B.astype(np.int64)
    live_B = code_B != ZERO_CODE
    if not STEP_MIN <= peak <= STEP_MAX or (live_B & (step_B < STEP_MIN)).any():
        raise DecodeError("a scale that no encoder sends")
    scale_B: Float32 = np.where(live_B, powers(np.where(live_B, step_B, 0)), np.float32(0))
    return scale_B


# ── levels and symbols ───────────────────────────────────────────────────────────────────────
def levels_of(x_N: Float32, inverse_B: Float32, top: int) -> npt.NDArray[np.int8]:
    """rint(x / step) within +-top; ties to even."""
    scaled_N = x_N * np.repeat(inverse_B, BLOCK)[: len(x_N)]
    level_N: npt.NDArray[np.int8] = np.rint(np.clip(scaled_N, -top, top)).astype(np.int8)
    return level_N


def survey(
    x_N: Float32, level_N: npt.NDArray[np.int8], inverse_B: Float32, top: int
) -> tuple[Int64, Int64]:
    """Of every 32nd block: sums of |x| / step per magnitude in 1/4096, and counts."""
    sum_L, count_L = np.zeros(top + 1, np.int64), np.zeros(top + 1, np.int64)
    for block in range(0, len(inverse_B), SAMPLE):
        where = slice(block * BLOCK, (block + 1) * BLOCK)
        scaled = np.minimum(np.abs(x_N[where] * inverse_B[block]), np.float32(15))
        fixed = (scaled * np.float32(UNIT)).astype(np.int64)
        level = np.minimum(np.rint(scaled), top).astype(np.int64)
        sum_L += np.bincount(level, fixed, top + 1).astype(np.int64)
        count_L += np.bincount(level, minlength=top + 1)
    return sum_L, count_L


def book_entries(sum_L: Int64, count_L: Int64) -> npt.NDArray[np.int16]:
    """Mean minus level of magnitudes 1.. in 1/4096 of a step."""
    level_L = np.arange(1, len(sum_L), dtype=np.int64)
    mean_L = (sum_L[1:] + 4 * level_L * UNIT) // (count_L[1:] + 4) - level_L * UNIT
    return mean_L.astype(np.int16)


def read_book(entry_L: npt.NDArray[np.int16], top: int) -> Float32:
    """(16,): the value of symbol digit d, which is level d - top, in steps.

    Raises:
        DecodeError: no encoder sends such.
    """
    level_L = np.arange(1, top + 1, dtype=np.int64)
    fixed_L = level_L * UNIT + entry_L.astype(np.int64)
    value_L = fixed_L.astype(np.float32) / np.float32(UNIT)
    if not ((value_L >= 0) & (value_L <= BOOK_MAX)).all():
        raise DecodeError("a codebook that no encoder sends")
    book = np.zeros(16, np.float32)
    book[top + 1 : 2 * top + 1] = value_L
    book[top - 1 :: -1][:top] = -value_L
    return book


def symbols_of(level_N: npt.NDArray[np.int8], bits: int) -> Symbols:
    """Levels packed into symbols, planes apart."""
    planes, top = planes_of(bits), top_of(bits)
    length = length_of(len(level_N), planes)
    digit_PT = np.full((planes, length), top, np.uint16)
    digit_PT.reshape(-1)[: len(level_N)] = level_N.astype(np.int16) + top
    symbol_T = np.zeros(length, np.uint16)
    for plane in range(planes):
        symbol_T |= digit_PT[plane] << (bits * plane)
    return symbol_T


def digits_of(symbol_T: Symbols, count: int, bits: int) -> Bytes:
    """The digits (level + top) of the first `count` values."""
    planes = planes_of(bits)
    digit_PT = np.empty((planes, len(symbol_T)), np.uint8)
    for plane in range(planes):
        digit_PT[plane] = symbol_T >> (bits * plane) & ((1 << bits) - 1)
    return digit_PT.reshape(-1)[:count]


def pack_digits(digit_N: Bytes, bits: int) -> Bytes:
    """Two digits to a byte, or four of 2 bits, in the values' order: the plane that zstd sees."""
    width = 2 if bits == 2 else 4
    each = 8 // width
    padded = np.zeros(-(-len(digit_N) // each) * each, np.uint8)
    padded[: len(digit_N)] = digit_N
    packed = np.zeros(len(padded) // each, np.uint8)
    for part in range(each):
        packed |= padded[part::each] << (width * part)
    return packed


def unpack_digits(packed: Bytes, count: int, bits: int) -> Bytes:
    """The reverse of `pack_digits`.

    Raises:
        DecodeError: padding that is not zero.
    """
    width = 2 if bits == 2 else 4
    each = 8 // width
    digit = np.empty(len(packed) * each, np.uint8)
    for part in range(each):
        digit[part::each] = packed >> (width * part) & ((1 << width) - 1)
    if digit[count:].any():
        raise DecodeError("padding that is not zero")
    return digit[:count]


def packed_bytes(count: int, bits: int) -> int:
    """How long `pack_digits` is."""
    return -(-count // (4 if bits == 2 else 2))


def values_of(digit_N: Bytes, book: Float32, scale_B: Float32) -> Float32:
    """book[digit] * scale of the block."""
    scale_N = np.repeat(scale_B, BLOCK)[: len(digit_N)]
    result: Float32 = book[digit_N & 15] * scale_N
    return result


# ── entropy coding ───────────────────────────────────────────────────────────────────────────
def encode_symbols(symbol_T: Symbols, table: Table) -> bytes:
    """Stream sizes (u16), number of literals (u16), streams, literals."""
    length = len(symbol_T)
    streams, each = streams_of(length), symbols_each(length)
    entry_T = table.entry_S[symbol_T]
    size_T = (entry_T & 63).astype(np.int64)
    code_T = (entry_T >> 9).astype(np.uint64)
    literal = symbol_T[(entry_T & 0x40) != 0]
    sizes, coded = [], []
    for stream in range(streams):
        where = slice(stream * each, min(length, (stream + 1) * each))
        size, code = size_T[where], code_T[where]
        # Every bit of every code, lowest first, picked where the code is long enough.
        bit = np.arange(LENGTH_MAX)
        bits_TJ = (code[:, None] >> bit.astype(np.uint64) & np.uint64(1)).astype(np.uint8)
        flat = bits_TJ[bit[None, :] < size[:, None]]
        data = np.packbits(flat, bitorder="little").tobytes()
        sizes.append(len(data))
        coded.append(data)
    head = np.array([*sizes, len(literal)], "<u2").tobytes()
    return head + b"".join(coded) + _pack_literals(literal)


def _pack_literals(literal: Symbols) -> bytes:
    padded = np.zeros(-(-len(literal) // 2) * 2, np.uint16)
    padded[: len(literal)] = literal
    first, second = padded[0::2], padded[1::2]
    packed = np.empty((len(first), 3), np.uint8)
    packed[:, 0] = first & 255
    packed[:, 1] = (first >> 8) | (second & 15) << 4
    packed[:, 2] = second >> 4
    return packed.tobytes()[: (3 * len(literal) + 1) // 2]


def decode_symbols(section: memoryview, length: int, table: Table) -> Symbols:
    """The reverse of `encode_symbols`.

    Raises:
        DecodeError: sizes that don't add up, a stream or literals that don't end where they should.
    """
    streams, each = streams_of(length), symbols_each(length)
    head = 2 * streams + 2
    if len(section) < head:
        raise DecodeError("sizes of streams that don't add up")
    *sizes, literals = (int(v) for v in np.frombuffer(section[:head], "<u2"))
    literal_bytes = (3 * literals + 1) // 2
    longest = (each * LENGTH_MAX + 7) // 8
    if head + sum(sizes) + literal_bytes != len(section) or max(sizes) > longest:
        raise DecodeError("sizes of streams that don't add up")
    data = np.zeros(len(section) + longest + 8, np.uint8)
    data[: len(section)] = np.frombuffer(section, np.uint8)
    start_S = head + np.cumsum([0, *sizes[:-1]], dtype=np.int64)
    count_S = np.minimum(each, length - each * np.arange(streams))
    symbol_SE = np.zeros((streams, each), np.uint16)
    place_S = start_S * 8  # in bits
    for at in range(each):
        byte_S = place_S >> 3
        word_S = (
            data[byte_S].astype(np.int64)
            | data[byte_S + 1].astype(np.int64) << 8
            | data[byte_S + 2].astype(np.int64) << 16
        )
        entry_S = table.lookup_W[(word_S >> (place_S & 7)) & ((1 << LENGTH_MAX) - 1)]
        symbol_SE[:, at] = entry_S >> 4
        place_S = place_S + np.where(at < count_S, (entry_S & 15).astype(np.int64), 0)
    end_S = start_S + np.array(sizes)
    spare_S = data[np.minimum(place_S >> 3, len(data) - 1)] >> (place_S & 7)
    exact_S = ((place_S + 7) >> 3 == end_S) & ((place_S % 8 == 0) | (spare_S == 0))
    if not exact_S.all():
        raise DecodeError("a stream that does not end where it should")
    symbol_T = np.concatenate([symbol_SE[s, : count_S[s]] for s in range(streams)])
    escaped = np.flatnonzero(symbol_T == ESCAPE)
    if len(escaped) != literals:
        raise DecodeError("literals that do not match the symbols")
    triple = np.zeros((-(-literals // 2), 3), np.uint8)
    triple.reshape(-1)[:literal_bytes] = np.frombuffer(section, np.uint8)[
        len(section) - literal_bytes :
    ]
    wide = triple.astype(np.uint16)
    literal = np.stack([wide[:, 0] | (wide[:, 1] & 15) << 8, wide[:, 1] >> 4 | wide[:, 2] << 4], 1)
    symbol_T[escaped] = literal.reshape(-1)[:literals]
    return symbol_T


FAULTS: Final = {
    1: "sizes of streams that don't add up",
    2: "a stream that does not end where it should",
    3: "literals that do not match the symbols",
    4: "a scale or codebook that no encoder sends",
}
"""What the compiled reader's codes mean."""


def read_section(section: memoryview, length: int, table: Table) -> Symbols:
    """`decode_symbols`, compiled where that is possible.

    The result is this thread's scratch: the next call overwrites it.

    Raises:
        DecodeError: sizes that don't add up, a stream or literals that don't end where they should.
    """
    compiled = kernels()
    if compiled is None:
        return decode_symbols(section, length, table)
    data = np.frombuffer(section, np.uint8)
    fault = compiled.decode_section(
        data, table.lookup_W, scratch.symbols, length, scratch.literals, scratch.bytes,
        scratch.escapes,
    )  # fmt: skip
    if fault:
        raise DecodeError(FAULTS[int(fault)])
    return scratch.symbols[:length]
