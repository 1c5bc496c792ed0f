"""The compiled loops between values and levels: scales, codebooks, symbols (see `kernels`).

A chunk's levels are packed as symbols of twelve bits, planes apart: with K levels to a symbol and
T symbols, level p of symbol t belongs to value p * T + t, so that every loop runs over contiguous
values.

Values of a large vector are written past the caches: a core then doesn't read from memory what it
is about to overwrite. And they are written while the next symbols are decoded (`write_round`):
decoding waits for its tables, writing for memory, and each has time for the other.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from tensorcodecs.jit import inner
from tensorcodecs.vector import (
    add_block,
    bits_float,
    expand_block,
    expand_group,
    float_bits,
    largest_bits,
    lines_from,
    merge_block,
    merge_group,
    quantise_block,
    quantise_group,
    sum_of_squares,
    write_lines,
)

_U: Final = np.uint64
_F: Final = np.float32
BLOCK: Final = 256
GROUP: Final = 32
LEVELS_MAX: Final = 8
UNIT: Final = 4096  # of the fixed-point numbers that codebooks are made of
_LINE: Final = 16  # values in 64 bytes
_SAMPLE: Final = 32  # every how many blocks are looked at for codebook and table

# Thresholds between quarter octaves: mantissas of 2**0.25 and 2**0.75.
_QUARTER: Final = np.uint32(np.float32(2**0.25).view(np.uint32) & 0x7FFFFF)
_THREE_QUARTERS: Final = np.uint32(np.float32(2**0.75).view(np.uint32) & 0x7FFFFF)
_STEPS: Final = np.array([2 ** (k / 4) for k in range(4)], np.float32)
_INVERSES: Final = np.array([2 ** (-k / 4) for k in range(4)], np.float32)

NO_SCALE: Final = -(2**15)
"""Instead of a block's step exponent: all its values count as zero."""
REFUSED: Final = 2**15 - 1
"""Instead of a block's step exponent: it has a value that can't be sent."""


# ── scales ───────────────────────────────────────────────────────────────────────────────────
@inner
def power(quarters: int) -> np.float32:
    """2 ** (quarters / 4), for normal results."""
    return _STEPS[quarters & 3] * bits_float(np.uint32(((quarters >> 2) + 127) << 23))


@inner
def inverse_power(quarters: int) -> np.float32:
    """2 ** (-quarters / 4), for normal results."""
    return _INVERSES[quarters & 3] * bits_float(np.uint32((127 - (quarters >> 2)) << 23))


@inner
def _quarters(square: np.float32) -> int:
    """The nearest quarter octave of sqrt(square): round(2 * log2(square))."""
    bits = float_bits(square)
    mantissa = bits & np.uint32(0x7FFFFF)
    exponent = np.int64(bits >> np.uint32(23)) - 127
    return 2 * exponent + (mantissa >= _QUARTER) + (mantissa >= _THREE_QUARTERS)


@inner
def _widest(total: np.float32, share: np.float32, peak: np.float32, reach: np.float32) -> int:
    """The larger of sqrt(total * share) and peak * sqrt(reach), in quarter octaves."""
    return max(_quarters(total * share), _quarters(peak * peak * reach))


@inner
def _odd_block(
    x: Any, start: int, count: int, share: np.float32, reach: np.float32, work: Any
) -> int:
    """The step exponent of a block that is short, huge, tiny or not finite."""
    for i in range(BLOCK):  # an assignment of slices takes numba two seconds to compile
        work[i] = x[start + i] if i < count else _F(0)
    total = sum_of_squares(work, _U(0))
    peak = bits_float(largest_bits(work, _U(0)))
    if _F(2.0**-80) <= total <= _F(2.0**100):
        return _widest(total, share, peak, reach)
    if total < _F(2.0**-80):
        for i in range(count):
            work[i] = work[i] * _F(2.0**70)
        total = sum_of_squares(work, _U(0))
        if total < _F(2.0**-62):
            return NO_SCALE
        return _widest(total, share, peak * _F(2.0**70), reach) - 280
    for i in range(count):
        if not abs(work[i]) <= _F(2.0**64):
            return REFUSED
        work[i] = work[i] * _F(2.0**-60)
    return _widest(sum_of_squares(work, _U(0)), share, peak * _F(2.0**-60), reach) + 240


@inner
def block_steps(x: Any, square: np.float32, reach: np.float32, step_B: Any, work: Any) -> int:
    """Each block's step exponent, in quarter octaves: its rms times sqrt(square), or its largest
    magnitude times sqrt(reach) if that is more.

    Returns the largest; NO_SCALE if all blocks are zero; REFUSED if a value can't be sent.
    """
    count = x.size
    top = NO_SCALE
    whole = square / _F(BLOCK)
    for block in range((count + BLOCK - 1) // BLOCK):
        start = block * BLOCK
        size = min(BLOCK, count - start)
        if size == BLOCK:
            total = sum_of_squares(x, _U(start))
            if _F(2.0**-80) <= total <= _F(2.0**100):
                peak = bits_float(largest_bits(x, _U(start)))
                step = _widest(total, whole, peak, reach)
            else:
                step = _odd_block(x, start, size, whole, reach, work)
        else:
            step = _odd_block(x, start, size, square / _F(size), reach, work)
        step_B[block] = step
        top = max(top, step)
    return top


# ── levels and symbols ───────────────────────────────────────────────────────────────────────
@inner
def quantise(
    x: Any, inverse_B: Any, shift: int, bits: int, planes: int, out_T: Any, work: Any
) -> None:
    """Levels of all values, packed: `planes` to a symbol, blocks of 2**shift values."""
    count = x.size
    top = np.uint32((1 << (bits - 1)) - 1)
    length = out_T.size
    for plane in range(planes):
        amount = np.uint32(bits * plane)
        at = 0
        while at < length:
            value = plane * length + at
            if value + BLOCK <= count and at + BLOCK <= length and value % BLOCK == 0:
                inverse = inverse_B[value >> shift]
                if plane == 0:
                    quantise_block(x, _U(value), inverse, top, amount, out_T, _U(at))
                else:
                    merge_block(x, _U(value), inverse, top, amount, out_T, _U(at))
                at += BLOCK
                continue
            inverse = _F(0)
            if value < count:
                inverse = inverse_B[value >> shift]
            for i in range(GROUP):
                work[i] = x[value + i] if value + i < count else _F(0)
            if plane == 0:
                quantise_group(work, _U(0), inverse, top, amount, out_T, _U(at))
            else:
                merge_group(work, _U(0), inverse, top, amount, out_T, _U(at))
            at += GROUP


@inner
def survey(x: Any, inverse_B: Any, top: int, sum_L: Any, count_L: Any) -> None:
    """Of every 32nd block: how many values have each magnitude, and their sum / step.

    Sums are in 1/4096 of a step and bounded, so that any order gives the same.
    """
    for magnitude in range(LEVELS_MAX):
        sum_L[magnitude] = 0
        count_L[magnitude] = 0
    size_L = np.empty(LEVELS_MAX, np.int32)
    seen_L = np.empty(LEVELS_MAX, np.int32)
    fixed = np.empty(BLOCK, np.int32)
    level = np.empty(BLOCK, np.int32)
    for block in range(0, inverse_B.size, _SAMPLE):
        start = block * BLOCK
        size = min(BLOCK, x.size - start)
        inverse = inverse_B[block]
        piece = x[start : start + size]
        for i in range(size):
            scaled = min(abs(piece[i] * inverse), _F(15.0))
            fixed[i] = np.int32(scaled * _F(UNIT))
            level[i] = min(np.int32(np.rint(scaled)), np.int32(top))
        for magnitude in range(top + 1):
            total = np.int32(0)
            seen = np.int32(0)
            for i in range(size):
                if level[i] == magnitude:
                    total += fixed[i]
                    seen += np.int32(1)
            size_L[magnitude] = total
            seen_L[magnitude] = seen
        for magnitude in range(top + 1):
            sum_L[magnitude] += size_L[magnitude]
            count_L[magnitude] += seen_L[magnitude]


@inner
def expand(
    symbol_T: Any, first: int, length: int, bits: int, planes: int, book: Any,
    scale_B: Any, out: Any, add: bool, work: Any,
) -> None:  # fmt: skip
    """Values of the symbols `first`.. of a chunk with `length` symbols, scaled, into `out`."""
    count = out.size
    size = symbol_T.size
    for plane in range(planes):
        amount = np.uint32(bits * plane)
        at = 0
        while at < size:
            value = plane * length + first + at
            if value >= count:
                break
            scale = scale_B[value // BLOCK]
            if value + BLOCK <= count and at + BLOCK <= size and value % BLOCK == 0:
                if add:
                    add_block(symbol_T, _U(at), amount, book, out, _U(value), scale)
                else:
                    expand_block(symbol_T, _U(at), amount, book, out, _U(value), scale)
                at += BLOCK
                continue
            expand_group(symbol_T, _U(at), amount, book, work, _U(0), scale)
            for i in range(min(GROUP, count - value)):
                if add:
                    out[value + i] += work[i]
                else:
                    out[value + i] = work[i]
            at += GROUP


# ── past the caches ──────────────────────────────────────────────────────────────────────────
# A *piece* is what is to be written so: symbols, codebook, scales, the chunk's values; then as
# integers the number of its first symbol and of the chunk's symbols, bits, planes, how many values
# after a block's start a cache line begins, and in how many rounds most of it is written.
@inner
def piece_of(
    symbol_T: Any, book: Any, scale_B: Any, out: Any, first: int, length: int, bits: int,
    planes: int,
) -> Any:  # fmt: skip
    """The symbols `first`.. of a whole chunk; `first` and `length` are multiples of 256."""
    skip = np.int64(lines_from(out, _U(0)))
    rounds = symbol_T.size // GROUP - 1
    return symbol_T, book, scale_B, out, first, length, bits, planes, skip, rounds


@inner
def write_round(piece: Any, number: Any) -> None:
    """Two lines of each plane. After all rounds come the `edges`."""
    symbol_T, book, scale_B, out, first, length, bits, planes, skip, _ = piece
    at = _U(skip) + number * _U(GROUP)
    value = _U(first) + at
    amount = np.uint32(0)
    for _ in range(planes):
        scale = scale_B[value // _U(BLOCK)]
        following = scale_B[(value + _U(GROUP - 1)) // _U(BLOCK)]
        write_lines(
            symbol_T, at, amount, book, out, value, scale, following, np.uint32(_LINE - skip)
        )
        value += _U(length)
        amount += np.uint32(bits)


@inner
def edges(piece: Any, work: Any) -> None:
    """What no round has written: 32 values of each plane, before the first line and at the end."""
    symbol_T, book, scale_B, out, first, length, bits, planes, skip, rounds = piece
    last = rounds * GROUP
    for plane in range(planes):
        amount = np.uint32(bits * plane)
        start = plane * length + first
        scale = scale_B[start // BLOCK]
        expand_group(symbol_T, _U(0), amount, book, work, _U(0), scale)
        for i in range(skip):
            out[start + i] = work[i]
        scale = scale_B[(start + last) // BLOCK]
        expand_group(symbol_T, _U(last), amount, book, work, _U(0), scale)
        for i in range(skip, GROUP):
            out[start + last + i] = work[i]


# ── what a body begins with ──────────────────────────────────────────────────────────────────
@inner
def read_scales(
    data: Any, place: int, blocks: int, peak: int, weight: np.float32, scale_B: Any
) -> bool:
    """Steps times weight from their codes; whether all are such as an encoder sends."""
    if not -440 <= peak <= 264:
        return False
    for block in range(blocks):
        down = np.int64(data[place + block])
        if down == 255:
            scale_B[block] = _F(0)
        elif peak - down < -440:
            return False
        else:
            scale_B[block] = power(peak - down) * weight
    return True


@inner
def read_book(data: Any, place: int, top: int, book: Any) -> bool:
    """The value of each level in steps, from its codebook entry; whether they make sense."""
    for digit in range(16):
        book[digit] = _F(0)
    for level in range(1, top + 1):
        mean = np.int64(data[place]) | np.int64(data[place + 1]) << 8
        if mean >= 32768:
            mean -= 65536
        value = _F(level * UNIT + mean) / _F(UNIT)
        if not _F(0) <= value <= _F(16):
            return False
        book[top + level] = value
        book[top - level] = -value
        place += 2
    digits = 2 * top + 2
    for digit in range(digits, 16):  # looked up with the next level's bits above
        book[digit] = book[digit - digits]
    return True
