"""The compiled inner loops (numba): quantise, pack and code a chunk; decode, unpack and scale it.

Everything works on one chunk of at most `CHUNK_VALUES` values at a time, so that what passes from
one loop to the next stays in the core's cache. `tensorcodecs.plain` does the same with numpy, bit
for bit; the tests compare them.

A chunk's levels are packed as symbols of twelve bits, planes apart: with K levels to a symbol and
T symbols, level p of symbol t belongs to value p * T + t, so that every loop runs over contiguous
values. Symbols are coded in independent streams of consecutive symbols, which a core decodes eight
at a time and a GPU all at once.

What makes it fast (each measured): eight decoder chains at once, because each waits ten cycles for
its table; a bit buffer with a marker on top, so that `leading_zeros` counts what was consumed; no
bounds checks within a stream (the reader makes sure that a stream of the longest codes would still
lie inside its buffer, and checks afterwards that it ended exactly at its end); the encoder asks for
the next chunk's memory while it codes this one; unsigned indices, which numba doesn't wrap.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import njit, types

from tensorcodecs.vector import (
    add_block,
    bits_float,
    expand_block,
    expand_group,
    find_marks,
    float_bits,
    largest_bits,
    leading_zeros,
    load64,
    merge_block,
    merge_group,
    prefetch,
    prefetch_write,
    quantise_block,
    quantise_group,
    store64,
    sum_of_squares,
    trailing_zeros,
)

_U: Final = np.uint64
_F: Final = np.float32
_BLOCK: Final = 256
_GROUP: Final = 32
_ESCAPE: Final = 4095
_LENGTH_MAX: Final = 13  # of a code
_PACKAGE_MAX: Final = 2**61  # see `huffman.package_merge`
_MARK: Final = np.uint64(1 << 63)
_LANES: Final = 8
_LEVELS_MAX: Final = 8
_UNIT: Final = 4096  # of the fixed-point numbers that codebooks are made of
_SAMPLE: Final = 32  # every how many blocks are looked at for codebook and table

_OPTIONS: Final[dict[str, Any]] = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    "boundscheck": False,
}


# What Python calls is compiled for these types when this module is first imported, and never in
# the middle of a round. Arrays are contiguous; those that only are read may be read-only.
def _readable(kind: Any, ndim: int = 1) -> Any:
    return types.Array(kind, ndim, "C", readonly=True)


_F32, _U8, _U16, _U32 = types.float32, types.uint8, types.uint16, types.uint32
_I8, _I32, _I64, _BOOL = types.int8, types.int32, types.int64, types.boolean

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
@njit(**_OPTIONS)
def _power(quarters: int) -> np.float32:
    """2 ** (quarters / 4), for normal results."""
    return _STEPS[quarters & 3] * bits_float(np.uint32(((quarters >> 2) + 127) << 23))


@njit(**_OPTIONS)
def _inverse_power(quarters: int) -> np.float32:
    """2 ** (-quarters / 4), for normal results."""
    return _INVERSES[quarters & 3] * bits_float(np.uint32((127 - (quarters >> 2)) << 23))


@njit(**_OPTIONS)
def _quarters(square: np.float32) -> int:
    """The nearest quarter octave of sqrt(square): round(2 * log2(square))."""
    bits = float_bits(square)
    mantissa = bits & np.uint32(0x7FFFFF)
    exponent = np.int64(bits >> np.uint32(23)) - 127
    return 2 * exponent + (mantissa >= _QUARTER) + (mantissa >= _THREE_QUARTERS)


@njit(**_OPTIONS)
def _widest(total: np.float32, share: np.float32, peak: np.float32, reach: np.float32) -> int:
    """The larger of sqrt(total * share) and peak * sqrt(reach), in quarter octaves."""
    return max(_quarters(total * share), _quarters(peak * peak * reach))


@njit(**_OPTIONS)
def _odd_block(
    x: Any, start: int, count: int, share: np.float32, reach: np.float32, work: Any
) -> int:
    """The step exponent of a block that is short, huge, tiny or not finite."""
    work[:] = _F(0)
    work[:count] = x[start : start + count]
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


@njit(**_OPTIONS)
def block_steps(x: Any, square: np.float32, reach: np.float32, step_B: Any, work: Any) -> int:
    """Each block's step exponent, in quarter octaves: its rms times sqrt(square), or its largest
    magnitude times sqrt(reach) if that is more.

    Returns the largest; NO_SCALE if all blocks are zero; REFUSED if a value can't be sent.
    """
    count = x.size
    top = NO_SCALE
    whole = square / _F(_BLOCK)
    for block in range((count + _BLOCK - 1) // _BLOCK):
        start = block * _BLOCK
        size = min(_BLOCK, count - start)
        if size == _BLOCK:
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
@njit(**_OPTIONS)
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
            if value + _BLOCK <= count and at + _BLOCK <= length and value % _BLOCK == 0:
                inverse = inverse_B[value >> shift]
                if plane == 0:
                    quantise_block(x, _U(value), inverse, top, amount, out_T, _U(at))
                else:
                    merge_block(x, _U(value), inverse, top, amount, out_T, _U(at))
                at += _BLOCK
                continue
            inverse = _F(0)
            if value < count:
                inverse = inverse_B[value >> shift]
            work[:_GROUP] = _F(0)
            for i in range(min(_GROUP, count - value)):
                work[i] = x[value + i]
            if plane == 0:
                quantise_group(work, _U(0), inverse, top, amount, out_T, _U(at))
            else:
                merge_group(work, _U(0), inverse, top, amount, out_T, _U(at))
            at += _GROUP


@njit(**_OPTIONS)
def survey(x: Any, inverse_B: Any, top: int, sum_L: Any, count_L: Any) -> None:
    """Of every 32nd block: how many values have each magnitude, and their sum / step.

    Sums are in 1/4096 of a step and bounded, so that any order gives the same.
    """
    sum_L[:] = 0
    count_L[:] = 0
    size_L = np.zeros(_LEVELS_MAX, np.int32)
    seen_L = np.zeros(_LEVELS_MAX, np.int32)
    fixed = np.empty(_BLOCK, np.int32)
    level = np.empty(_BLOCK, np.int32)
    for block in range(0, inverse_B.size, _SAMPLE):
        start = block * _BLOCK
        size = min(_BLOCK, x.size - start)
        inverse = inverse_B[block]
        piece = x[start : start + size]
        for i in range(size):
            scaled = min(abs(piece[i] * inverse), _F(15.0))
            fixed[i] = np.int32(scaled * _F(_UNIT))
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


@njit(**_OPTIONS)
def expand(
    symbol_T: Any, first: int, length: int, bits: int, planes: int, book: Any,
    scale_B: Any, shift: int, out: Any, add: bool, work: Any,
) -> None:  # fmt: skip
    """Values of the symbols `first`.. of a chunk with `length` symbols, scaled, into `out`."""
    count = out.size
    for plane in range(planes):
        amount = np.uint32(bits * plane)
        at = 0
        while at < symbol_T.size:
            value = plane * length + first + at
            if value >= count:
                break
            scale = scale_B[value >> shift]
            if value + _BLOCK <= count and at + _BLOCK <= symbol_T.size and value % _BLOCK == 0:
                if add:
                    add_block(symbol_T, _U(at), amount, book, out, _U(value), scale)
                else:
                    expand_block(symbol_T, _U(at), amount, book, out, _U(value), scale)
                at += _BLOCK
                continue
            expand_group(symbol_T, _U(at), amount, book, work, _U(0), scale)
            for i in range(min(_GROUP, count - value)):
                if add:
                    out[value + i] += work[i]
                else:
                    out[value + i] = work[i]
            at += _GROUP


# ── entropy coding ───────────────────────────────────────────────────────────────────────────
@njit(**_OPTIONS)
def encode_stream(
    symbol_T: Any, first: int, stop: int, entry_S: Any, out: Any, start: int,
    literal: Any, literals: int, ahead: Any, ahead_at: int, stride: int,
) -> Any:  # fmt: skip
    """Codes of symbols first..stop-1 into `out` from `start`; symbols without one to `literal`.

    Returns (where the stream ends, how many literals there are now). Asks for the memory of
    `ahead` from `ahead_at` on meanwhile, `stride` values per symbol.
    """
    low = _U(63)
    nine = _U(9)
    held = _U(0)  # bits that are not written yet, and how many
    bits = _U(0)
    place = _U(start)
    at = _U(first)
    last = _U(stop)
    coming = _U(ahead_at)
    while at + _U(4) <= last:
        e0 = _U(entry_S[symbol_T[at]])
        e1 = _U(entry_S[symbol_T[at + _U(1)]])
        e2 = _U(entry_S[symbol_T[at + _U(2)]])
        e3 = _U(entry_S[symbol_T[at + _U(3)]])
        two = e0 + e1
        four = two + e2 + e3
        word = (e0 >> nine) | ((e1 >> nine) << (e0 & low))
        upper = (e2 >> nine) | ((e3 >> nine) << (e2 & low))
        word |= upper << (two & low)
        held |= word << bits
        bits += four & low
        store64(out, place, held)
        place += bits >> _U(3)
        held >>= bits & _U(56)
        bits &= _U(7)
        if four & _U(0x1C0):
            for k in range(4):
                symbol = symbol_T[at + _U(k)]
                if entry_S[symbol] & np.uint32(0x40):
                    literal[literals] = symbol
                    literals += 1
        prefetch(ahead, coming)
        coming += _U(4 * stride)
        at += _U(4)
    while at < last:
        symbol = symbol_T[at]
        entry = _U(entry_S[symbol])
        if entry & _U(0x40):
            literal[literals] = symbol
            literals += 1
        held |= (entry >> nine) << bits
        bits += entry & low
        store64(out, place, held)
        place += bits >> _U(3)
        held >>= bits & _U(56)
        bits &= _U(7)
        at += _U(1)
    return np.int64(place) + (1 if bits > _U(0) else 0), literals


@njit(**_OPTIONS)
def _finish_stream(
    data: Any, place: Any, buffer: Any, end: int, lookup_W: Any, out: Any, at: int, stop: int
) -> bool:
    """Decode the last symbols of a stream one by one; whether it ends exactly at `end`."""
    for i in range(at, stop):
        entry = lookup_W[buffer & _U(8191)]
        buffer >>= _U(entry) & _U(63)
        out[i] = np.uint16(entry >> np.uint32(8))
        used = leading_zeros(buffer)
        place += used >> _U(3)
        buffer = (load64(data, place) | _MARK) >> (used & _U(7))
    used = leading_zeros(buffer)
    partial = used > _U(0)
    if np.int64(place) + (1 if partial else 0) != end:
        return False
    return (not partial) or (buffer & ((_U(1) << (_U(8) - used)) - _U(1))) == _U(0)


@njit(**_OPTIONS)
def decode_stream(
    data: Any, start: int, end: int, lookup_W: Any, out: Any, first: int, stop: int
) -> bool:
    """One stream of symbols first..stop-1; whether it was exactly that.

    `data` must go on for 13 bits per symbol and eight bytes from `start`.
    """
    buffer = load64(data, _U(start)) | _MARK
    return _finish_stream(data, _U(start), buffer, end, lookup_W, out, first, stop)


@njit(**_OPTIONS)
def decode_eight(
    data: Any, start: int, size_N: Any, stream: int, lookup_W: Any, out: Any, each: int,
    coming: Any, coming_at: int, plane: int, next_at: int,
) -> bool:  # fmt: skip
    """Streams stream..stream+7, `each` symbols long (a multiple of 4), the k-th to out[k * each:].

    Asks meanwhile for the memory that comes next: where the values of three planes, `plane` apart,
    will be written in `coming`, and data[next_at:].

    `data` must go on for 13 bits per symbol and eight bytes from where the last one starts.
    """
    low = _U(63)
    three = _U(3)
    seven = _U(7)
    mask = _U(8191)
    eight = np.uint32(8)
    p0 = _U(start)
    p1 = p0 + _U(size_N[stream])
    p2 = p1 + _U(size_N[stream + 1])
    p3 = p2 + _U(size_N[stream + 2])
    p4 = p3 + _U(size_N[stream + 3])
    p5 = p4 + _U(size_N[stream + 4])
    p6 = p5 + _U(size_N[stream + 5])
    p7 = p6 + _U(size_N[stream + 6])
    b0 = load64(data, p0) | _MARK
    b1 = load64(data, p1) | _MARK
    b2 = load64(data, p2) | _MARK
    b3 = load64(data, p3) | _MARK
    b4 = load64(data, p4) | _MARK
    b5 = load64(data, p5) | _MARK
    b6 = load64(data, p6) | _MARK
    b7 = load64(data, p7) | _MARK
    pace = _U(each)
    at = _U(0)
    soon = _U(coming_at)
    later = _U(next_at)
    apart = _U(plane)
    stop = _U(each)
    while at < stop:
        for _ in range(4):
            entry = lookup_W[b0 & mask]
            b0 >>= _U(entry) & low
            out[at] = np.uint16(entry >> eight)
            entry = lookup_W[b1 & mask]
            b1 >>= _U(entry) & low
            out[at + pace] = np.uint16(entry >> eight)
            entry = lookup_W[b2 & mask]
            b2 >>= _U(entry) & low
            out[at + _U(2) * pace] = np.uint16(entry >> eight)
            entry = lookup_W[b3 & mask]
            b3 >>= _U(entry) & low
            out[at + _U(3) * pace] = np.uint16(entry >> eight)
            entry = lookup_W[b4 & mask]
            b4 >>= _U(entry) & low
            out[at + _U(4) * pace] = np.uint16(entry >> eight)
            entry = lookup_W[b5 & mask]
            b5 >>= _U(entry) & low
            out[at + _U(5) * pace] = np.uint16(entry >> eight)
            entry = lookup_W[b6 & mask]
            b6 >>= _U(entry) & low
            out[at + _U(6) * pace] = np.uint16(entry >> eight)
            entry = lookup_W[b7 & mask]
            b7 >>= _U(entry) & low
            out[at + _U(7) * pace] = np.uint16(entry >> eight)
            at += _U(1)
        prefetch(data, later)
        later += _U(48)
        prefetch_write(coming, soon)
        prefetch_write(coming, soon + _U(16))
        prefetch_write(coming, soon + apart)
        prefetch_write(coming, soon + apart + _U(16))
        prefetch_write(coming, soon + apart + apart)
        prefetch_write(coming, soon + apart + apart + _U(16))
        soon += _U(_GROUP)
        used = leading_zeros(b0)
        p0 += used >> three
        b0 = (load64(data, p0) | _MARK) >> (used & seven)
        used = leading_zeros(b1)
        p1 += used >> three
        b1 = (load64(data, p1) | _MARK) >> (used & seven)
        used = leading_zeros(b2)
        p2 += used >> three
        b2 = (load64(data, p2) | _MARK) >> (used & seven)
        used = leading_zeros(b3)
        p3 += used >> three
        b3 = (load64(data, p3) | _MARK) >> (used & seven)
        used = leading_zeros(b4)
        p4 += used >> three
        b4 = (load64(data, p4) | _MARK) >> (used & seven)
        used = leading_zeros(b5)
        p5 += used >> three
        b5 = (load64(data, p5) | _MARK) >> (used & seven)
        used = leading_zeros(b6)
        p6 += used >> three
        b6 = (load64(data, p6) | _MARK) >> (used & seven)
        used = leading_zeros(b7)
        p7 += used >> three
        b7 = (load64(data, p7) | _MARK) >> (used & seven)
    end = np.int64(start)
    good = True
    for k in range(_LANES):
        if k == 0:
            place, buffer = p0, b0
        elif k == 1:
            place, buffer = p1, b1
        elif k == 2:
            place, buffer = p2, b2
        elif k == 3:
            place, buffer = p3, b3
        elif k == 4:
            place, buffer = p4, b4
        elif k == 5:
            place, buffer = p5, b5
        elif k == 6:
            place, buffer = p6, b6
        else:
            place, buffer = p7, b7
        end += np.int64(size_N[stream + k])
        good &= _finish_stream(data, place, buffer, end, lookup_W, out, 0, 0)
    return good


@njit(**_OPTIONS)
def fill_literals(symbol_T: Any, data: Any, start: int, done: int, total: int) -> int:
    """Put literals `done`.. (12 bits each, from data[start]) where ESCAPE stands.

    Returns how many are used up now; more than `total` if there were too few. The symbols must be
    whole groups of 32.
    """
    for at in range(0, symbol_T.size, _GROUP):
        marks = find_marks(symbol_T, _U(at), np.uint16(_ESCAPE))
        while marks != np.uint32(0):
            if done >= total:
                return total + 1
            i = at + np.int64(trailing_zeros(marks))
            marks &= marks - np.uint32(1)
            place = start + done * 3 // 2
            word = np.uint32(data[place]) | (np.uint32(data[place + 1]) << np.uint32(8))
            symbol_T[i] = np.uint16((word >> np.uint32(4 * (done & 1))) & np.uint32(0xFFF))
            done += 1
    return done


@njit(**_OPTIONS)
def pack_literals(literal: Any, count: int, out: Any, start: int) -> int:
    """`count` literals of 12 bits, two to three bytes; where they end."""
    for i in range(0, count, 2):
        first = np.uint32(literal[i])
        second = np.uint32(literal[i + 1]) if i + 1 < count else np.uint32(0)
        place = start + i * 3 // 2
        out[place] = np.uint8(first & np.uint32(255))
        out[place + 1] = np.uint8(
            (first >> np.uint32(8)) | ((second & np.uint32(15)) << np.uint32(4))
        )
        if i + 1 < count:
            out[place + 2] = np.uint8(second >> np.uint32(4))
    return start + (count * 3 + 1) // 2


# ── whole chunks ─────────────────────────────────────────────────────────────────────────────
@njit(**_OPTIONS)
def streams_of(length: int) -> int:
    """How many streams `length` symbols are coded in."""
    if length >= 4096:
        return 16
    return 4 if length >= 256 else 1


@njit(**_OPTIONS)
def symbols_each(length: int) -> int:
    """Symbols in every stream but the last, which has the rest."""
    step = 4 * streams_of(length)
    return (length + step - 1) // step * 4


@njit(**_OPTIONS)
def length_of(count: int, planes: int) -> int:
    """How many symbols `count` values take."""
    step = planes * _GROUP
    return (count + step - 1) // step * _GROUP


@njit(**_OPTIONS)
def write_symbols(
    symbol_T: Any, entry_S: Any, out: Any, start: int, literal: Any, ahead: Any, ahead_at: int,
    stride: int,
) -> int:  # fmt: skip
    """Stream sizes (u16), number of literals (u16), streams, literals; where that ends."""
    length = symbol_T.size
    streams = streams_of(length)
    each = symbols_each(length)
    place = start + 2 * streams + 2
    literals = 0
    for stream in range(streams):
        first = stream * each
        stop = min(length, first + each)
        end, literals = encode_stream(
            symbol_T, first, stop, entry_S, out, place, literal, literals, ahead,
            ahead_at + first * stride, stride,
        )  # fmt: skip
        size = end - place
        out[start + 2 * stream] = np.uint8(size & 255)
        out[start + 2 * stream + 1] = np.uint8(size >> 8)
        place = end
    out[start + 2 * streams] = np.uint8(literals & 255)
    out[start + 2 * streams + 1] = np.uint8(literals >> 8)
    return pack_literals(literal, literals, out, place)


GOOD: Final = 0
BAD_SIZES: Final = 1
BAD_STREAM: Final = 2
BAD_LITERALS: Final = 3
BAD_SCALE: Final = 4
BAD_HEADER: Final = 5
"""Not what the compiled reader takes in one go; the caller looks closer."""


@njit(**_OPTIONS)
def read_layout(data: Any, start: int, stop: int, length: int, size_N: Any) -> int:
    """Stream sizes and number of literals of a coded section; where its streams start, or 0.

    No stream is longer than the longest codes would make it: `read_group` copies into a buffer
    that is made for such.
    """
    streams = streams_of(length)
    place = start + 2 * streams + 2
    if place > stop:
        return 0
    longest = (symbols_each(length) * _LENGTH_MAX + 7) // 8
    total = np.int64(0)
    for stream in range(streams):
        size = np.int64(data[start + 2 * stream]) | np.int64(data[start + 2 * stream + 1]) << 8
        if size > longest:
            return 0
        size_N[stream] = size
        total += size
    literals = np.int64(data[place - 2]) | np.int64(data[place - 1]) << 8
    size_N[16] = literals
    if place + total + (literals * 3 + 1) // 2 != stop:
        return 0
    return place


@njit(**_OPTIONS)
def read_group(
    data: Any, place: int, size_N: Any, stream: int, length: int, lookup_W: Any, out: Any,
    pad: Any, coming: Any, next_at: int,
) -> int:  # fmt: skip
    """Decode streams stream..stream+7 (or as many as there are) into out[0:]; how many symbols.

    Returns -1 if one is not exactly as long as it should be. Reads in place where a stream of the
    longest codes would end inside `data`, else from a copy in `pad`.
    """
    streams = streams_of(length)
    each = symbols_each(length)
    lanes = min(_LANES, streams - stream)
    total = 0
    for k in range(lanes):
        total += size_N[stream + k]
    begin = place
    source = data
    longest = (each * _LENGTH_MAX + 7) // 8 + 8
    last = place + total - size_N[stream + lanes - 1]
    # Every stream but the last of a group is followed by others: only the end can run out.
    far = place
    reach = place
    for k in range(lanes):
        reach = max(reach, far + longest)
        far += size_N[stream + k]
    if reach > data.size or last > data.size:
        for i in range(total):
            pad[i] = data[place + i]
        pad[total : total + longest] = np.uint8(0)
        source = pad
        begin = 0
    if lanes == _LANES and (stream + _LANES) * each <= length:
        if not decode_eight(
            source, begin, size_N, stream, lookup_W, out, each, coming, stream * each, length,
            next_at + stream * each * 3 // 2,
        ):  # fmt: skip
            return -1
        return _LANES * each
    done = 0
    for k in range(lanes):
        symbols = min(each, length - (stream + k) * each)
        end = begin + size_N[stream + k]
        if not decode_stream(source, begin, end, lookup_W, out, done, done + symbols):
            return -1
        done += symbols
        begin = end
    return done


@njit(
    [
        types.void(
            _readable(_F32),
            _I64,
            _F32,
            _F32,
            _I64,
            _readable(_I64, 2),
            _readable(_U32, 2),
            _U8[::1],
            _I64,
            _I64[:, ::1],
            _I64[:, ::1],
            _U16[::1],
            _U16[::1],
        )
    ],
    **_OPTIONS,
)
def encode_chunks(
    x: Any, chunk: int, square: np.float32, reach: np.float32, bits: int, cost_TL: Any,
    entry_TS: Any, out: Any, pitch: int, count_UL: Any, info_U: Any, symbols: Any, literal: Any,
) -> None:  # fmt: skip
    """Code each `chunk` values of `x`, the u-th into out[u * pitch:]: scales, codebook, symbols.

    `cost_TL` says how many 1/256 bits a level costs in each of the tables `entry_TS`; the cheapest
    for the chunk's sample is taken. info_U[u] = (size or 0 if all zero or -1 if refused, table,
    cost of the sample); `count_UL`: magnitudes in the sample. `symbols` and `literal` are room for
    a chunk's symbols each.
    """
    planes = 12 // bits
    top = (1 << (bits - 1)) - 1
    blocks_max = (chunk + _BLOCK - 1) // _BLOCK
    step_B = np.empty(blocks_max, np.int64)
    inverse_B = np.empty(blocks_max, np.float32)
    work = np.empty(_BLOCK, np.float32)
    sum_L = np.zeros(_LEVELS_MAX, np.int64)
    for unit in range((x.size + chunk - 1) // chunk):
        start = unit * chunk
        piece = x[start : start + chunk]
        blocks = (piece.size + _BLOCK - 1) // _BLOCK
        count_L = count_UL[unit]
        peak = block_steps(piece, square, reach, step_B[:blocks], work)
        info_U[unit, 1] = 0
        info_U[unit, 2] = 0
        if peak in (NO_SCALE, REFUSED):
            count_L[:] = 0
            info_U[unit, 0] = 0 if peak == NO_SCALE else -1
            continue
        place = unit * pitch
        out[place] = np.uint8(peak & 255)
        out[place + 1] = np.uint8((peak >> 8) & 255)
        place += 2 + 2 * top
        for block in range(blocks):
            down = peak - step_B[block]
            if down > 254:
                out[place + block] = np.uint8(255)
                inverse_B[block] = _F(0)
            else:
                out[place + block] = np.uint8(down)
                inverse_B[block] = _inverse_power(step_B[block])
        quantised = symbols[: length_of(piece.size, planes)]
        quantise(piece, inverse_B[:blocks], 8, bits, planes, quantised, work)
        survey(piece, inverse_B[:blocks], top, sum_L, count_L)
        for level in range(1, top + 1):
            # Four values at the level itself keep a rare level's mean sane.
            mean = (sum_L[level] + 4 * level * _UNIT) // (count_L[level] + 4) - level * _UNIT
            at = unit * pitch + 2 * level
            out[at] = np.uint8(mean & 255)
            out[at + 1] = np.uint8((mean >> 8) & 255)
        best = 0
        cheapest = np.int64(2**62)
        for table in range(cost_TL.shape[0]):
            cost = np.int64(0)
            for level in range(top + 1):
                cost += count_L[level] * cost_TL[table, level]
            if cost < cheapest:
                best, cheapest = table, cost
        end = write_symbols(
            quantised, entry_TS[best], out, place + blocks, literal, x, start + chunk, planes
        )
        info_U[unit, 0] = end - unit * pitch
        info_U[unit, 1] = best
        info_U[unit, 2] = cheapest


@njit(**_OPTIONS)
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
            scale_B[block] = _power(peak - down) * weight
    return True


@njit(**_OPTIONS)
def read_book(data: Any, place: int, top: int, book: Any) -> bool:
    """The value of each level in steps, from its codebook entry; whether they make sense."""
    book[:] = _F(0)
    for level in range(1, top + 1):
        mean = np.int64(data[place]) | np.int64(data[place + 1]) << 8
        if mean >= 32768:
            mean -= 65536
        value = _F(level * _UNIT + mean) / _F(_UNIT)
        if not _F(0) <= value <= _F(16):
            return False
        book[top + level] = value
        book[top - level] = -value
        place += 2
    digits = 2 * top + 2
    for digit in range(digits, 16):  # looked up with the next level's bits above
        book[digit] = book[digit - digits]
    return True


@njit(**_OPTIONS)
def decode_chunk(
    data: Any, start: int, stop: int, bits: int, lookup_W: Any, out: Any, add: bool,
    weight: np.float32, scratch: Any,
) -> int:  # fmt: skip
    """One chunk's body into `out`: GOOD, or what is wrong. With `add` nothing is changed then."""
    symbols, scale_B, book, work, pad, size_N = scratch
    planes = 12 // bits
    top = (1 << (bits - 1)) - 1
    count = out.size
    blocks = (count + _BLOCK - 1) // _BLOCK
    length = length_of(count, planes)
    if start + 2 + 2 * top + blocks > stop:
        return BAD_SIZES
    peak = np.int64(data[start]) | np.int64(data[start + 1]) << 8
    if peak >= 32768:
        peak -= 65536
    if not read_book(data, start + 2, top, book):
        return BAD_SCALE
    place = start + 2 + 2 * top
    if not read_scales(data, place, blocks, peak, weight, scale_B):
        return BAD_SCALE
    place = read_layout(data, place + blocks, stop, length, size_N)
    if place == 0:
        return BAD_SIZES
    streams = streams_of(length)
    each = symbols_each(length)
    literals = size_N[16]
    literals_at = stop - (literals * 3 + 1) // 2
    used = 0
    for stream in range(0, streams, _LANES):
        first = stream * each
        part = symbols[first:] if add else symbols
        done = read_group(data, place, size_N, stream, length, lookup_W, part, pad, out, stop)
        if done < 0:
            return BAD_STREAM
        used = fill_literals(part[:done], data, literals_at, used, literals)
        if used > literals:
            return BAD_LITERALS
        if not add:
            expand(part[:done], first, length, bits, planes, book, scale_B, 8, out, False, work)
        for k in range(min(_LANES, streams - stream)):
            place += size_N[stream + k]
    if used != literals:
        return BAD_LITERALS
    if add:
        expand(symbols[:length], 0, length, bits, planes, book, scale_B, 8, out, True, work)
    return GOOD


@njit(**_OPTIONS)
def _scratch_for(count: int, symbols: Any, pad: Any) -> Any:
    """Buffers for decoding chunks of up to `count` values of any bits; the large ones are given."""
    scale_B = np.empty((count + _BLOCK - 1) // _BLOCK + 1, np.float32)
    book = np.empty(16, np.float32)
    work = np.empty(_BLOCK, np.float32)
    size_N = np.empty(17, np.int64)
    return symbols, scale_B, book, work, pad, size_N


@njit(
    [
        _I64(
            _readable(_U8),
            _readable(_I64),
            _readable(_I64),
            _I64,
            _readable(_I64),
            _readable(_I64),
            _readable(_U32, 2),
            _F32[::1],
            _I64,
            _BOOL,
            _F32,
            _U16[::1],
            _U8[::1],
        )
    ],
    **_OPTIONS,
)
def decode_chunks(
    data: Any, start_U: Any, stop_U: Any, bits: int, unit_U: Any, table_U: Any, lookup_TW: Any,
    out: Any, chunk: int, add: bool, weight: np.float32, symbols: Any, pad: Any,
) -> int:  # fmt: skip
    """Bodies data[start_U[u]:stop_U[u]] into the unit_U[u]-th `chunk` values of `out`.

    Returns GOOD, or 16 * u + what is wrong with body u; those before it are done.
    """
    scratch = _scratch_for(min(chunk, out.size), symbols, pad)
    for unit in range(start_U.size):
        at = unit_U[unit] * chunk
        piece = out[at : at + chunk]
        fault = decode_chunk(
            data, start_U[unit], stop_U[unit], bits, lookup_TW[table_U[unit]], piece, add, weight,
            scratch,
        )  # fmt: skip
        if fault != GOOD:
            return 16 * unit + fault
    return GOOD


@njit([_I64(_readable(_U8), _readable(_U32), _U16[::1], _I64, _U8[::1])], **_OPTIONS)
def decode_section(data: Any, lookup_W: Any, symbol_T: Any, length: int, pad: Any) -> int:
    """The `length` symbols of one coded section: GOOD, or what is wrong with it.

    `symbol_T` has room for whole groups of 32, and zeros beyond `length`.
    """
    size_N = np.empty(17, np.int64)
    place = read_layout(data, 0, data.size, length, size_N)
    if place == 0:
        return BAD_SIZES
    streams = streams_of(length)
    each = symbols_each(length)
    nowhere = np.empty(1, np.float32)
    for stream in range(0, streams, _LANES):
        part = symbol_T[stream * each :]
        done = read_group(
            data, place, size_N, stream, length, lookup_W, part, pad, nowhere, data.size
        )
        if done < 0:
            return BAD_STREAM
        for k in range(min(_LANES, streams - stream)):
            place += size_N[stream + k]
    literals = size_N[16]
    start = data.size - (literals * 3 + 1) // 2
    if fill_literals(symbol_T, data, start, 0, literals) != literals:
        return BAD_LITERALS
    return GOOD


@njit([_U8[::1](_readable(_I64), _I64)], **_OPTIONS)
def package_merge(weights: Any, limit: int) -> Any:
    """See `huffman.package_merge`: weights in ascending order, at least two."""
    count = weights.size
    rows = np.zeros((limit, 2 * count), np.uint8)
    sizes = np.zeros(limit, np.int64)
    packages = np.empty(count, np.int64)
    merged = np.empty(2 * count, np.int64)
    have = 0
    for row in range(limit):
        leaf = 0
        package = 0
        total = count + have
        for at in range(total):
            if package >= have or (leaf < count and weights[leaf] <= packages[package]):
                merged[at] = weights[leaf]
                rows[row, at] = 1
                leaf += 1
            else:
                merged[at] = packages[package]
                package += 1
        sizes[row] = total
        have = total // 2
        for at in range(have):
            packages[at] = min(merged[2 * at] + merged[2 * at + 1], _PACKAGE_MAX)
    lengths = np.zeros(count, np.uint8)
    needed = 2 * count - 2
    for row in range(limit - 1, -1, -1):
        leaves = 0
        for at in range(needed):
            leaves += rows[row, at]
        for at in range(leaves):
            lengths[at] += np.uint8(1)
        needed = 2 * (needed - leaves)
    return lengths


# ── bytes: one level from -127 to 127 per value ──────────────────────────────────────────────
@njit([_BOOL(_readable(_F32), _readable(_I32), _I64, _F32[::1], _I8[::1])], **_OPTIONS)
def byte_levels(x: Any, bits_N: Any, block: int, scale_B: Any, level_N: Any) -> bool:
    """Scales (largest magnitude / 127) and levels; False if a value can't be sent.

    `bits_N` is `x` seen as int32: the largest magnitude has the largest bits, NaN larger still.
    """
    zero_below = np.int32(0x0D800000)  # 2**-100
    limit = np.int32(0x5F800000)  # 2**64
    for index in range(scale_B.size):
        start = index * block
        stop = min(x.size, start + block)
        values = x[start:stop]
        words = bits_N[start:stop]
        levels = level_N[start:stop]
        top = np.int32(0)
        for i in range(words.size):
            top = max(top, words[i] & np.int32(0x7FFFFFFF))
        if top > limit:
            return False
        if top < zero_below:
            scale_B[index] = _F(0)
            levels[:] = np.int8(0)
            continue
        peak = bits_float(np.uint32(top))
        scale_B[index] = peak / _F(127)
        inverse = _F(127) / peak
        for i in range(values.size):
            levels[i] = np.int8(np.int32(np.rint(values[i] * inverse)))
    return True


@njit([types.void(_readable(_I8), _I64, _readable(_F32), _F32[::1], _BOOL)], **_OPTIONS)
def scale_bytes(level_N: Any, block: int, scale_B: Any, out: Any, add: bool) -> None:
    """out = (or +=) level * scale of its block."""
    for index in range(scale_B.size):
        start = index * block
        stop = min(out.size, start + block)
        levels = level_N[start:stop]
        values = out[start:stop]
        scale = scale_B[index]
        if add:
            for i in range(values.size):
                values[i] += _F(levels[i]) * scale
        else:
            for i in range(values.size):
                values[i] = _F(levels[i]) * scale


@njit([types.void(_readable(_I8), _I64, _I64[::1])], **_OPTIONS)
def count_bytes(level_N: Any, every: int, count_S: Any) -> None:
    """How often each level + 127 occurs in every `every`-th run of 256."""
    for start in range(0, level_N.size, every * _BLOCK):
        for i in range(start, min(level_N.size, start + _BLOCK)):
            count_S[np.int64(level_N[i]) + 127] += 1


@njit([_I64(_readable(_I8), _readable(_U32), _U8[::1], _I64, _U16[::1])], **_OPTIONS)
def encode_bytes(level_N: Any, entry_S: Any, out: Any, start: int, room: Any) -> int:
    """Levels as a coded section at out[start:]; where it ends. `room` is for as many symbols."""
    symbols = room[: level_N.size]
    for i in range(symbols.size):
        symbols[i] = np.uint16(np.int32(level_N[i]) + np.int32(127))
    literal = np.empty(4, np.uint16)
    return write_symbols(symbols, entry_S, out, start, literal, level_N, level_N.size, 1)


@njit([_BOOL(_readable(_U16), _I8[::1])], **_OPTIONS)
def levels_of_bytes(symbol_T: Any, level_N: Any) -> bool:
    """level = symbol - 127; False if one is beyond 127."""
    top = np.uint16(0)
    for i in range(level_N.size):
        top = max(top, symbol_T[i])
    if top > np.uint16(254):
        return False
    for i in range(level_N.size):
        level_N[i] = np.int8(np.int32(symbol_T[i]) - np.int32(127))
    return True
