"""The compiled entropy coder: symbols of up to twelve bits to streams of bits and back.

Symbols are coded in independent streams of consecutive symbols, which a core decodes eight at a
time and a GPU all at once. What makes it fast (each measured): eight decoder chains at once,
because each waits ten cycles for its table; a bit buffer with a marker on top, so that
`leading_zeros` counts what was consumed; no bounds checks within a stream (the reader makes sure
that a stream of the longest codes would still lie inside its buffer, and checks afterwards that it
ended exactly at its end); escapes found without a branch that depends on a symbol; the encoder
asks for the next chunk's memory while it codes this one; unsigned indices, which numba doesn't
wrap.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import types

from tensorcodecs.jit import entry, inner, readable
from tensorcodecs.level_kernels import piece_of, write_round
from tensorcodecs.vector import (
    address_of,
    copy_marks,
    leading_zeros,
    load64,
    low_bits,
    ones,
    prefetch,
    prefetch_write,
    store64,
    trailing_zeros,
)

_U: Final = np.uint64
_GROUP: Final = 32
_ESCAPE: Final = 4095
_LENGTH_MAX: Final = 13  # of a code
_PACKAGE_MAX: Final = 2**61  # see `huffman.package_merge`
_MARK: Final = np.uint64(1 << 63)
LANES: Final = 8
LANE: Final = 6144 + _GROUP
"""From one lane's decoded symbols to the next's: the longest stream of a chunk, and a cache line,
so that they don't all want the same lines of the first cache. A constant takes no register."""
_FLOAT: Final = 4  # bytes

GOOD: Final = 0
BAD_SIZES: Final = 1
BAD_STREAM: Final = 2
BAD_LITERALS: Final = 3
BAD_SCALE: Final = 4

_U8, _U16, _U32, _I64 = types.uint8, types.uint16, types.uint32, types.int64
LOOKUP: Final = _U16
"""The type of a decoder's table: see `huffman.Table`."""


@inner
def encode_stream(
    symbol_T: Any, first: int, stop: int, entry_S: Any, out: Any, start: int,
    literal: Any, literals: int, ahead: int, stride: int,
) -> Any:  # fmt: skip
    """Codes of symbols first..stop-1 into `out` from `start`; symbols without one to `literal`.

    Returns (where the stream ends, how many literals there are now). Asks meanwhile for the memory
    from the address `ahead` on, `stride` bytes per symbol.
    """
    low = _U(63)
    nine = _U(9)
    held = _U(0)  # bits that are not written yet, and how many
    bits = _U(0)
    place = _U(start)
    at = _U(first)
    last = _U(stop)
    coming = _U(ahead)
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
        prefetch(coming)
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


@inner
def _finish_stream(
    data: Any, place: Any, buffer: Any, end: int, lookup_W: Any, out: Any, at: int, stop: int
) -> bool:
    """Decode the last symbols of a stream one by one; whether it ends exactly at `end`."""
    for i in range(at, stop):
        entry = lookup_W[buffer & _U(8191)]
        buffer >>= _U(entry) & _U(15)
        out[i] = np.uint16(entry >> np.uint16(4))
        used = leading_zeros(buffer)
        place += used >> _U(3)
        buffer = (load64(data, place) | _MARK) >> (used & _U(7))
    used = leading_zeros(buffer)
    partial = used > _U(0)
    if np.int64(place) + (1 if partial else 0) != end:
        return False
    return (not partial) or (buffer & ((_U(1) << (_U(8) - used)) - _U(1))) == _U(0)


@inner
def decode_stream(
    data: Any, start: int, end: int, lookup_W: Any, out: Any, first: int, count: int
) -> bool:
    """One stream of `count` symbols to out[first:]; whether it was exactly that.

    `data` must go on for 13 bits per symbol and eight bytes from `start`.
    """
    buffer = load64(data, _U(start)) | _MARK
    return _finish_stream(data, _U(start), buffer, end, lookup_W, out, first, first + count)


@inner
def decode_eight(
    data: Any, start: int, size_N: Any, stream: int, lookup_W: Any, lane_T: Any, each: int,
    coming: int, plane: int, following: int, piece: Any, rounds: int,
) -> bool:  # fmt: skip
    """Streams stream..stream+7, `each` symbols long (a multiple of 4), the k-th to
    lane_T[k * LANE:].

    Asks meanwhile for the memory from the address `following` on, which is read next, and for that
    of three planes of values, `plane` bytes apart from `coming` on, which is written next; unless
    that is 0. Writes the first `rounds` of `piece` instead (see `level_kernels`), which are at most
    a quarter of `each`.

    `data` must go on for 13 bits per symbol and eight bytes from where the last one starts.
    """
    low = _U(15)
    three = _U(3)
    seven = _U(7)
    width = _U(63) - leading_zeros(_U(lookup_W.size))  # of what a code is looked up by
    eight = np.uint16(4)
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
    at = _U(0)
    soon = _U(coming)
    later = _U(following)
    apart = _U(plane)
    stop = _U(each)
    to_write = _U(4 * rounds)
    while at < stop:
        for _ in range(4):
            entry = lookup_W[low_bits(b0, width)]
            b0 >>= _U(entry) & low
            lane_T[at] = np.uint16(entry >> eight)
            entry = lookup_W[low_bits(b1, width)]
            b1 >>= _U(entry) & low
            lane_T[at + _U(LANE)] = np.uint16(entry >> eight)
            entry = lookup_W[low_bits(b2, width)]
            b2 >>= _U(entry) & low
            lane_T[at + _U(2 * LANE)] = np.uint16(entry >> eight)
            entry = lookup_W[low_bits(b3, width)]
            b3 >>= _U(entry) & low
            lane_T[at + _U(3 * LANE)] = np.uint16(entry >> eight)
            entry = lookup_W[low_bits(b4, width)]
            b4 >>= _U(entry) & low
            lane_T[at + _U(4 * LANE)] = np.uint16(entry >> eight)
            entry = lookup_W[low_bits(b5, width)]
            b5 >>= _U(entry) & low
            lane_T[at + _U(5 * LANE)] = np.uint16(entry >> eight)
            entry = lookup_W[low_bits(b6, width)]
            b6 >>= _U(entry) & low
            lane_T[at + _U(6 * LANE)] = np.uint16(entry >> eight)
            entry = lookup_W[low_bits(b7, width)]
            b7 >>= _U(entry) & low
            lane_T[at + _U(7 * LANE)] = np.uint16(entry >> eight)
            at += _U(1)
        prefetch(later)
        later += _U(48)
        if coming != 0:
            prefetch_write(soon)
            prefetch_write(soon + _U(64))
            prefetch_write(soon + apart)
            prefetch_write(soon + apart + _U(64))
            prefetch_write(soon + apart + apart)
            prefetch_write(soon + apart + apart + _U(64))
            soon += _U(_GROUP * _FLOAT)
        if at <= to_write:
            write_round(piece, (at >> _U(2)) - _U(1))
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
    for k in range(LANES):
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
        good &= _finish_stream(data, place, buffer, end, lookup_W, lane_T, 0, 0)
    return good


@inner
def collect(
    lane_T: Any, each: int, symbol_T: Any, data: Any, start: int, done: int, total: int,
    escape_E: Any,
) -> Any:  # fmt: skip
    """The lanes' symbols, `each` of them but the last's, one after another to `symbol_T`.

    Where ESCAPE stands come the literals `done`.. (12 bits each, from data[start]). Returns how
    many are used up now; more than `total` if there were too few. `symbol_T` must go on for 32
    symbols and `escape_E` is room for as many places.
    """
    size = symbol_T.size - _GROUP
    found = _U(0)
    for lane in range((size + each - 1) // each):
        first = lane * each
        count = min(each, size - first)
        for at in range(0, count, _GROUP):
            marks = copy_marks(
                lane_T, _U(lane * LANE + at), symbol_T, _U(first + at), np.uint16(_ESCAPE)
            )
            if count - at < _GROUP:  # what follows is the next lane's to write
                marks &= (_U(1) << _U(count - at)) - _U(1)
            # Whether there is an escape is a coin's toss: the first three are always noted.
            left = marks
            for k in range(3):
                place = _U(first + at) + trailing_zeros(left | _U(1 << 63))
                escape_E[found + _U(k)] = np.uint32(place)
                left &= left - _U(1)
            many = found + _U(ones(marks))
            found += _U(3)
            while found < many:
                escape_E[found] = np.uint32(_U(first + at) + trailing_zeros(left))
                left &= left - _U(1)
                found += _U(1)
            found = many
    if np.int64(found) > total - done:
        return total + 1
    for k in range(np.int64(found)):
        place = start + (done + k) * 3 // 2
        word = np.uint32(data[place]) | (np.uint32(data[place + 1]) << np.uint32(8))
        symbol_T[escape_E[k]] = np.uint16(
            (word >> np.uint32(4 * ((done + k) & 1))) & np.uint32(0xFFF)
        )
    return done + np.int64(found)


@inner
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


# ── how symbols are cut into streams ─────────────────────────────────────────────────────────
@inner
def streams_of(length: int) -> int:
    """How many streams `length` symbols are coded in."""
    if length >= 4096:
        return 16
    return 4 if length >= 256 else 1


@inner
def symbols_each(length: int) -> int:
    """Symbols in every stream but the last, which has the rest."""
    step = 4 * streams_of(length)
    return (length + step - 1) // step * 4


@inner
def length_of(count: int, planes: int) -> int:
    """How many symbols `count` values take."""
    step = planes * _GROUP
    return (count + step - 1) // step * _GROUP


@inner
def write_symbols(
    symbol_T: Any, entry_S: Any, out: Any, start: int, literal: Any, ahead: int, stride: int
) -> int:  # fmt: skip
    """Stream sizes (u16), number of literals (u16), streams, literals; where that ends.

    Asks for memory meanwhile: see `encode_stream`.
    """
    length = symbol_T.size
    streams = streams_of(length)
    each = symbols_each(length)
    place = start + 2 * streams + 2
    literals = np.int64(0)  # a plain 0 has a type of its own, for which all is compiled again
    for stream in range(streams):
        first = stream * each
        stop = min(length, first + each)
        end, literals = encode_stream(
            symbol_T, first, stop, entry_S, out, place, literal, literals,
            ahead + first * stride, stride,
        )  # fmt: skip
        size = end - place
        out[start + 2 * stream] = np.uint8(size & 255)
        out[start + 2 * stream + 1] = np.uint8(size >> 8)
        place = end
    out[start + 2 * streams] = np.uint8(literals & 255)
    out[start + 2 * streams + 1] = np.uint8(literals >> 8)
    return pack_literals(literal, literals, out, place)


@inner
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


@inner
def read_group(
    data: Any, place: int, size_N: Any, stream: int, length: int, lookup_W: Any, lane_T: Any,
    pad: Any, coming: int, following: int, piece: Any, rounds: int,
) -> Any:  # fmt: skip
    """Decode streams stream..stream+7, or as many as there are, into the lanes; how many symbols.

    Returns -1 if one is not exactly as long as it should be. Reads in place where a stream of the
    longest codes would end inside `data`, else from a copy in `pad`. Asks for memory, or writes
    `piece`, meanwhile: see `decode_eight`.
    """
    streams = streams_of(length)
    each = symbols_each(length)
    lanes = min(LANES, streams - stream)
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
    if lanes == LANES and (stream + LANES) * each <= length:
        first = stream * each
        if not decode_eight(
            source, begin, size_N, stream, lookup_W, lane_T, each,
            coming + first * _FLOAT if coming != 0 else coming, length * _FLOAT,
            following + first * 3 // 2, piece, rounds,
        ):  # fmt: skip
            return -1
        return LANES * each
    done = np.int64(0)
    for k in range(lanes):
        symbols = min(each, length - (stream + k) * each)
        end = begin + size_N[stream + k]
        if not decode_stream(source, begin, end, lookup_W, lane_T, k * LANE, symbols):
            return -1
        done += symbols
        begin = end
    return done


# ── sections ─────────────────────────────────────────────────────────────────────────────────
@entry(_I64(readable(_U8), readable(LOOKUP), _U16[::1], _I64, _U16[::1], _U8[::1], _U32[::1]))
def decode_section(
    data: Any, lookup_W: Any, symbol_T: Any, length: int, lane_T: Any, pad: Any, escape_E: Any
) -> int:
    """The `length` symbols of one coded section: GOOD, or what is wrong with it.

    `symbol_T` must go on for 32 symbols more.
    """
    size_N = np.empty(17, np.int64)
    place = read_layout(data, np.int64(0), data.size, length, size_N)
    if place == 0:
        return BAD_SIZES
    streams = streams_of(length)
    each = symbols_each(length)
    following = np.int64(address_of(data, _U(data.size)))
    nowhere = np.empty(1, np.float32)
    zero = np.int64(0)
    nothing = piece_of(symbol_T[:0], nowhere, nowhere, nowhere, zero, zero, zero, zero)
    literals = size_N[16]
    start = data.size - (literals * 3 + 1) // 2
    used = zero
    for stream in range(0, streams, LANES):
        done = read_group(
            data, place, size_N, stream, length, lookup_W, lane_T, pad, zero, following,
            nothing, zero,
        )  # fmt: skip
        if done < 0:
            return BAD_STREAM
        first = stream * each
        part = symbol_T[first : first + done + _GROUP]
        used = collect(lane_T, each, part, data, start, used, literals, escape_E)
        if used > literals:
            return BAD_LITERALS
        for k in range(min(LANES, streams - stream)):
            place += size_N[stream + k]
    if used != literals:
        return BAD_LITERALS
    return GOOD


@entry(_U8[::1](readable(_I64), _I64))
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
