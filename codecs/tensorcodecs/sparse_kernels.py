"""The compiled inner loops (numba) of the top-k codec: select, cluster, code; decode and scatter.

`tensorcodecs.sparse` does the same with numpy, bit for bit; the tests compare them.

The k-th largest of a segment is found by halving the range it can lie in, over the float's bits:
counting 4096 magnitudes against a bound takes a core 0.1 us, no sorting and no branch that depends
on a value. It starts from the segment before, whose bound is close, and after a pass or two looks
only at the few hundred values above the lower bound.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tensorcodecs.jit import entry, inner, readable
from tensorcodecs.vector import (
    _at,
    _load,
    _splat,
    _vector,
    bits_float,
    float_bits,
    load64,
    ones,
    store64,
    trailing_zeros,
)

_U: Final = np.uint64
_F: Final = np.float32
_SEGMENT: Final = 4096
_MASK: Final = 64  # values that one step compares
_UNARY_MAX: Final = 24
_GAP_BITS: Final = 12
_FIXED_POINT: Final = 16
_ROUNDS_MAX: Final = 16
_NOTHING: Final = 255
_ZERO_BITS: Final = 0x0D800000  # 2**-100
_LIMIT_BITS: Final = 0x5F800000  # 2**64
_STEP_MIN: Final = -440
_SLACK: Final = 0x180000  # about 0.2 octaves: how far below its neighbour's a bound is guessed

_F32, _U8, _U32 = types.float32, types.uint8, types.uint32
_INT, _BOOL = types.int64, types.boolean

_QUARTER: Final = np.uint32(np.float32(2**0.25).view(np.uint32) & 0x7FFFFF)
_THREE_QUARTERS: Final = np.uint32(np.float32(2**0.75).view(np.uint32) & 0x7FFFFF)
_STEPS: Final = np.array([2 ** (k / 4) for k in range(4)], np.float32)

BAD_PLACE: Final = 1
BAD_STREAM: Final = 2
_WORD: Final = ir.IntType(32)
_MARKS: Final = ir.IntType(64)


@intrinsic
def not_below(typing: Any, words: Any, at: Any, bound: Any) -> Any:
    """A bit mask of which of words[at:at + 64], without their top bits, are at least `bound`."""
    signature = types.uint64(words, types.uint64, types.uint32)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source = _at(context, builder, (sig.args[0], args[0]), args[1])
        magnitude = ir.Constant(_vector(_WORD, _MASK), [0x7FFFFFFF] * _MASK)
        value = builder.and_(_load(builder, source, _vector(_WORD, _MASK), 4), magnitude)
        found = builder.icmp_unsigned(">=", value, _splat(builder, args[2], _MASK))
        return builder.bitcast(found, _MARKS)

    return signature, generate


# ── selection ────────────────────────────────────────────────────────────────────────────────
@inner
def largest(words: Any, first: int, stop: int) -> np.uint32:
    """Bits of the largest magnitude; NaN counts as largest of all."""
    top = np.uint32(0)
    piece = words[first:stop]
    for i in range(piece.size):
        top = max(top, piece[i] & np.uint32(0x7FFFFFFF))
    return top


@inner
def count_from(words: Any, first: int, length: int, bound: int) -> int:
    """How many of `length` (a multiple of 64) magnitudes are at least `bound`."""
    total = 0
    for at in range(first, first + length, _MASK):
        total += ones(not_below(words, _U(at), np.uint32(bound)))
    return total


@inner
def collect(words: Any, first: int, length: int, bound: int, place_C: Any, word_C: Any) -> Any:
    """Places and magnitudes of those that are at least `bound`, padded with 64 zeros; how many."""
    have = _U(0)
    for at in range(0, length, _MASK):
        mask = not_below(words, _U(first + at), np.uint32(bound))
        while mask != _U(0):
            index = _U(at) + trailing_zeros(mask)
            place_C[have] = np.uint32(index)
            word_C[have] = words[_U(first) + index] & np.uint32(0x7FFFFFFF)
            have += _U(1)
            mask &= mask - _U(1)
    word_C[have : have + _U(_MASK)] = np.uint32(0)
    return np.int64(have)


@inner
def select(
    words: Any, first: int, length: int, limit: int, top: int, guess: int, place_C: Any,
    word_C: Any,
) -> Any:  # fmt: skip
    """The `limit` largest of `length` magnitudes, in the order of their places, ties first come.

    Leaves them in place_C and word_C. Returns (how many, the lower bound that was found).
    """
    low = _ZERO_BITS  # at least `limit` are not below it, or all that count are sent
    high = top + 1  # `above`, which is less than `limit`, are not below it
    above = 0
    have = count_from(words, first, length, low)
    while have > limit and have > 4 * limit and high - low > 1:
        middle = guess if low < guess < high else low + ((high - low) >> 1)
        guess = 0
        count = count_from(words, first, length, middle)
        if count >= limit:
            low, have = middle, count
        else:
            high, above = middle, count
    have = collect(words, first, length, low, place_C, word_C)
    if have <= limit:
        return have, low
    padded = (have + _MASK - 1) // _MASK * _MASK
    count = have
    while count > limit and high - low > 1:
        middle = low + ((high - low) >> 1)
        found = count_from(word_C, 0, padded, middle)
        if found >= limit:
            low, count = middle, found
        else:
            high, above = middle, found
    ties = limit - above
    kept = 0
    for i in range(have):
        word = np.int64(word_C[i])
        if word < low:
            continue
        if word < high:
            if ties == 0:
                continue
            ties -= 1
        place_C[kept] = place_C[i]
        word_C[kept] = word_C[i]
        kept += 1
    return kept, low


# ── the two magnitudes ───────────────────────────────────────────────────────────────────────
@inner
def two_means(size_E: Any) -> Any:
    """The centres of two clusters (Lloyd's iteration from the mean), rounded down."""
    total = np.int64(0)
    for i in range(size_E.size):
        total += size_E[i]
    border = total // size_E.size
    small = border
    large = border
    for _ in range(_ROUNDS_MAX):
        count = np.int64(0)
        upper = np.int64(0)
        for i in range(size_E.size):
            above = np.int64(size_E[i] > border)
            count += above
            upper += above * size_E[i]
        if count == 0:
            break
        small = (total - upper) // (size_E.size - count)
        large = upper // count
        if (small + large) >> 1 == border:
            break
        border = (small + large) >> 1
    return small, large


@inner
def _quarters(size: int) -> int:
    """The nearest quarter octave."""
    bits = float_bits(_F(size) * _F(size))
    mantissa = bits & np.uint32(0x7FFFFF)
    exponent = np.int64(bits >> np.uint32(23)) - 127
    return 2 * exponent + (mantissa >= _QUARTER) + (mantissa >= _THREE_QUARTERS)


@inner
def _power(quarters: int) -> np.float32:
    """2 ** (quarters / 4), for normal results."""
    return _STEPS[quarters & 3] * bits_float(np.uint32(((quarters >> 2) + 127) << 23))


@inner
def shape(word_E: Any, ratio_R: Any, size_E: Any, large_E: Any) -> Any:
    """Which of the magnitudes `word_E` are large. Returns (scale of the large, index of ratio)."""
    top = np.uint32(0)
    for i in range(word_E.size):
        top = max(top, word_E[i])
    exponent = np.int64(top >> np.uint32(23)) - 127
    lift = bits_float(np.uint32((_FIXED_POINT - exponent + 127) << 23))
    for i in range(word_E.size):
        size_E[i] = np.int64(bits_float(word_E[i]) * lift)
    small, large = two_means(size_E)
    quarters = _quarters(large)
    size = _power(quarters)
    ratio = 0
    nearest = abs(_F(small) - size * ratio_R[0])
    for i in range(1, ratio_R.size):
        distance = abs(_F(small) - size * ratio_R[i])
        if distance < nearest:
            nearest = distance
            ratio = i
    half = (size + size * ratio_R[ratio]) * _F(0.5)
    for i in range(word_E.size):
        large_E[i] = np.uint8(_F(size_E[i]) > half)
    return quarters + 4 * (exponent - _FIXED_POINT), ratio


# ── gaps ─────────────────────────────────────────────────────────────────────────────────────
@inner
def best_modulus(gap_E: Any, modulus_M: Any) -> int:
    """The first of those that code the gaps in the fewest bits."""
    best = 0
    fewest = np.int64(2**62)
    for index in range(modulus_M.size):
        modulus = modulus_M[index]
        floor = 0
        while 2 << floor <= modulus:
            floor += 1
        short = (2 << floor) - modulus
        # Exact: a gap is below 2**12 and a modulus at most 2**11.
        inverse = (1 << 24) // modulus + 1
        total = np.int64(0)
        for i in range(gap_E.size):
            whole = (gap_E[i] * inverse) >> 24
            bits = whole + 1 + floor + np.int64(gap_E[i] - whole * modulus >= short)
            total += bits if whole < _UNARY_MAX else _UNARY_MAX + _GAP_BITS
        if total < fewest:
            fewest = total
            best = index
    return best


@inner
def write_gaps(gap_E: Any, modulus: int, out: Any, place: Any, held: Any, bits: Any) -> Any:
    """Golomb codes behind the `bits` bits that are held back; (place, held, bits) after them."""
    floor = 0
    while 2 << floor <= modulus:
        floor += 1
    short = (2 << floor) - modulus
    for i in range(gap_E.size):
        gap = gap_E[i]
        whole = gap // modulus
        if whole >= _UNARY_MAX:
            code = _U(gap) << _U(_UNARY_MAX)
            width = _U(_UNARY_MAX + _GAP_BITS)
        else:
            rest = gap - whole * modulus
            width = _U(whole + 1 + floor)
            over = rest - short
            if over >= 0:
                rest = (short + (over >> 1)) | ((over & 1) << floor)
                width += _U(1)
            code = _U((rest << 1) | 1) << _U(whole)
        held |= code << bits
        bits += width
        store64(out, place, held)
        place += bits >> _U(3)
        held >>= bits & _U(56)
        bits &= _U(7)
    return place, held, bits


# ── frames ───────────────────────────────────────────────────────────────────────────────────
@inner
def limit_of(length: int, kept: int) -> int:
    """How many values a segment of that length sends at most."""
    return (kept * length + _SEGMENT - 1) // _SEGMENT


@entry(
    types.Tuple((_INT, _BOOL))(
        readable(_F32), readable(_U32), _INT, readable(_INT), readable(_F32), _U8[::1]
    )
)
def encode_frame(x: Any, words: Any, kept: int, modulus_M: Any, ratio_R: Any, out: Any) -> Any:
    """A chunk's body into `out`. `words` is `x` seen as uint32.

    Returns (its size, or 0 if nothing is sent, or -1 if a value can't be; whether it has counts).
    """
    numel = x.size
    segments = (numel + _SEGMENT - 1) // _SEGMENT
    place_C = np.empty(_SEGMENT + _MASK, np.uint32)
    word_C = np.empty(_SEGMENT + _MASK, np.uint32)
    work = np.empty(_SEGMENT, np.uint32)
    size_E = np.empty(kept, np.int64)
    place_SE = np.empty((segments, kept), np.uint16)
    value_SE = np.empty((segments, kept), np.uint8)
    count_S = np.zeros(segments, np.int64)
    scale_S = np.zeros(segments, np.int64)
    ratio_S = np.zeros(segments, np.int64)
    peak = _STEP_MIN - 1
    guess = 0
    for segment in range(segments):
        first = segment * _SEGMENT
        length = min(_SEGMENT, numel - first)
        top = np.int64(largest(words, first, first + length))
        if top > _LIMIT_BITS:
            return -1, False
        if top < _ZERO_BITS:
            continue
        limit = limit_of(length, kept)
        if length == _SEGMENT:
            count, guess = select(words, first, length, limit, top, guess, place_C, word_C)
        else:
            for i in range(_SEGMENT):
                work[i] = words[first + i] if i < length else np.uint32(0)
            padded = (length + _MASK - 1) // _MASK * _MASK
            count, guess = select(work, 0, padded, limit, top, guess, place_C, word_C)
        guess -= _SLACK
        value_E = value_SE[segment, :count]
        scale, ratio = shape(word_C[:count], ratio_R, size_E[:count], value_E)
        for i in range(count):
            index = np.int64(place_C[i])
            place_SE[segment, i] = np.uint16(index)
            negative = words[first + index] >> np.uint32(31)
            value_E[i] = np.uint8(np.uint32(value_E[i]) << np.uint32(1) | negative)
        count_S[segment] = count
        scale_S[segment] = scale
        ratio_S[segment] = ratio
        peak = max(peak, scale)
    if peak < _STEP_MIN:
        return 0, False
    counted = False
    sent = 0
    for segment in range(segments):
        if peak - scale_S[segment] >= _NOTHING:
            count_S[segment] = 0
        if count_S[segment] > 0:
            sent += count_S[segment]
            length = min(_SEGMENT, numel - segment * _SEGMENT)
            counted |= count_S[segment] < limit_of(length, kept)
    out[0] = np.uint8(peak & 255)
    out[1] = np.uint8((peak >> 8) & 255)
    shapes = 2 + segments
    plane = shapes + segments
    if counted:
        for segment in range(segments):
            out[plane] = np.uint8(count_S[segment] & 255)
            out[plane + 1] = np.uint8(count_S[segment] >> 8)
            plane += 2
    start = plane + (2 * sent + 7) // 8
    out[plane:start] = np.uint8(0)
    place: Any = _U(start)
    held: Any = _U(0)
    bits: Any = _U(0)
    done = 0
    for segment in range(segments):
        count = count_S[segment]
        if count == 0:
            out[2 + segment] = np.uint8(_NOTHING)
            out[shapes + segment] = np.uint8(0)
            continue
        gap_E = size_E[:count]
        before: Any = -1
        for i in range(count):
            here = np.int64(place_SE[segment, i])
            gap_E[i] = here - before - 1
            before = here
            at = done + i
            out[plane + (at >> 2)] |= np.uint8(
                np.uint32(value_SE[segment, i]) << np.uint32(2 * (at & 3))
            )
        done += count
        modulus = best_modulus(gap_E, modulus_M)
        out[2 + segment] = np.uint8(peak - scale_S[segment])
        out[shapes + segment] = np.uint8(modulus | ratio_S[segment] << 4)
        place, held, bits = write_gaps(gap_E, modulus_M[modulus], out, place, held, bits)
    return np.int64(place) + (1 if bits > _U(0) else 0), counted


@entry(
    _INT(
        readable(_U8), _INT, _INT, readable(_INT), readable(_INT), readable(_F32, 2),
        _INT, _U32[::1], _F32[::1],
    )
)  # fmt: skip
def decode_frame(
    data: Any, plane: int, start: int, modulus_S: Any, count_S: Any, book_SD: Any, numel: int,
    place_E: Any, value_E: Any,
) -> int:  # fmt: skip
    """Places and values of a body whose gaps are data[start:]: 0, or what is wrong with it."""
    size = data.size - start
    pad = np.empty(size + 16, np.uint8)
    for i in range(size):
        pad[i] = data[start + i]
    for i in range(size, size + 16):
        pad[i] = np.uint8(0)
    stop_bits = _U(8 * size)
    at: Any = _U(0)
    done = 0
    for segment in range(count_S.size):
        first = segment * _SEGMENT
        stop = min(_SEGMENT, numel - first)
        modulus = modulus_S[segment]
        floor = 0
        while 2 << floor <= modulus:
            floor += 1
        short = (2 << floor) - modulus
        mask = _U((1 << floor) - 1)
        place: Any = -1
        for _ in range(count_S[segment]):
            if at > stop_bits:
                return BAD_STREAM
            word = load64(pad, at >> _U(3)) >> (at & _U(7))
            zeros = np.int64(trailing_zeros(word | _U(1 << _UNARY_MAX)))
            if zeros == _UNARY_MAX:
                gap = np.int64((word >> _U(_UNARY_MAX)) & _U((1 << _GAP_BITS) - 1))
                at += _U(_UNARY_MAX + _GAP_BITS)
            else:
                word >>= _U(zeros + 1)
                rest = np.int64(word & mask)
                at += _U(zeros + 1 + floor)
                if rest >= short:
                    rest = short + (((rest - short) << 1) | np.int64((word >> _U(floor)) & _U(1)))
                    at += _U(1)
                gap = zeros * modulus + rest
            place += 1 + gap
            if place >= stop:
                return BAD_PLACE
            place_E[done] = np.uint32(first + place)
            pick = (data[plane + (done >> 2)] >> np.uint8(2 * (done & 3))) & np.uint8(3)
            value_E[done] = book_SD[segment, np.int64(pick)]
            done += 1
    if np.int64((at + _U(7)) >> _U(3)) != size:
        return BAD_STREAM
    if at & _U(7) and pad[at >> _U(3)] >> np.uint8(at & _U(7)):
        return BAD_STREAM
    return 0


@entry(types.void(readable(_U32), readable(_F32), _F32[::1]))
def scatter(place_E: Any, value_E: Any, out: Any) -> None:
    """out[place] += value."""
    for i in range(place_E.size):
        out[place_E[i]] += value_E[i]
