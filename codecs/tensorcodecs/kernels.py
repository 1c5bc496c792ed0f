"""The compiled inner loops (numba) of whole chunks: from values to frames, and back.

Everything works on one chunk of at most `CHUNK_VALUES` values at a time, so that what passes from
one loop to the next stays in the core's cache; and on as many chunks as there are in one call, so
that Python is not asked between them. `tensorcodecs.plain` does the same with numpy, bit for bit;
the tests compare them. `level_kernels` holds the loops over values, `stream_kernels` the entropy
coder, `byte_kernels` what the 8-bit codec does otherwise.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import types

from tensorcodecs.byte_kernels import (
    byte_levels,
    count_bytes,
    encode_bytes,
    levels_of_bytes,
    scale_bytes,
)
from tensorcodecs.frame import COMPILED_FROM, HEADER
from tensorcodecs.header_kernels import intact_fields, write_header
from tensorcodecs.jit import entry, inner, readable
from tensorcodecs.level_kernels import (
    BLOCK,
    GROUP,
    LEVELS_MAX,
    NO_SCALE,
    REFUSED,
    UNIT,
    block_steps,
    edges,
    expand,
    inverse_power,
    piece_of,
    quantise,
    read_book,
    read_scales,
    survey,
    write_round,
)
from tensorcodecs.stream_kernels import (
    BAD_LITERALS,
    BAD_SCALE,
    BAD_SIZES,
    BAD_STREAM,
    GOOD,
    LANES,
    LOOKUP,
    collect,
    decode_section,
    length_of,
    package_merge,
    read_group,
    read_layout,
    streams_of,
    symbols_each,
    write_symbols,
)
from tensorcodecs.vector import address_of, fence

__all__ = [
    "byte_levels",
    "count_bytes",
    "decode_frames",
    "decode_section",
    "encode_bytes",
    "encode_chunks",
    "levels_of_bytes",
    "package_merge",
    "scale_bytes",
]

UNUSUAL: Final = 14
"""Not what the compiled reader takes, or damaged: the caller looks closer."""
NO_TABLE: Final = 15
"""The frame names a table that is not built yet."""

_U: Final = np.uint64
_F: Final = np.float32
_FLOAT: Final = 4  # bytes
_HEADER: Final = HEADER.size
_KIND: Final = 2**24 - 1  # the mask of a header's codec, mode and bits

_F32, _U8, _U16, _U32 = types.float32, types.uint8, types.uint16, types.uint32
_I64, _BOOL = types.int64, types.boolean


@inner
def coded_max(count: int) -> int:
    """Bytes that a chunk's body may take before it is known to be too large to send."""
    return 2 * count + 1024


@entry(
    _I64(
        readable(_F32), _I64, _F32, _F32, _I64, _I64, _I64, readable(_I64, 2), readable(_BOOL),
        readable(_U32, 2), _U8[::1], _I64, _I64, _I64[:, ::1], _I64[:, ::1], _U16[::1], _U16[::1],
    )
)  # fmt: skip
def encode_chunks(
    x: Any, chunk: int, square: np.float32, reach: np.float32, bits: int, kind: int,
    parameter: int, cost_TL: Any, ready_T: Any, entry_TS: Any, out: Any, before: int, pitch: int,
    count_UL: Any, info_U: Any, symbols: Any, literal: Any,
) -> int:  # fmt: skip
    """Code each `chunk` values of `x`, the u-th to out[u * pitch:]: a frame. With a pitch of 0
    frames lie one after another, and coding ends where there is no room for the largest.

    Its body (scales, codebook, symbols) begins after `before` bytes; the header says `kind` (codec,
    mode and bits) and `parameter`, if the frame has COMPILED_FROM bytes. `cost_TL` says how
    many 1/256 bits a level costs in each of the tables `entry_TS`; the cheapest for the chunk's
    sample is taken. info_U[u] = (body's size or 0 if all zero or -1 if refused, table, cost of the
    sample); `count_UL`: magnitudes in the sample. `symbols` and `literal` are room for a chunk's
    symbols each.

    Returns how many chunks were coded: fewer if a table is not ready, which info_U names; or, with
    a pitch of 0, if a chunk's frame is not for this to write (all zero, refused or very small).
    """
    planes = 12 // bits
    tail = 0
    top = (1 << (bits - 1)) - 1
    blocks_max = (chunk + BLOCK - 1) // BLOCK
    step_B = np.empty(blocks_max, np.int64)
    inverse_B = np.empty(blocks_max, np.float32)
    work = np.empty(BLOCK, np.float32)
    sum_L = np.empty(LEVELS_MAX, np.int64)
    sums = np.empty(8, np.uint64)
    for unit in range((x.size + chunk - 1) // chunk):
        start = unit * chunk
        piece = x[start : start + chunk]
        blocks = (piece.size + BLOCK - 1) // BLOCK
        count_L = count_UL[unit]
        peak = block_steps(piece, square, reach, step_B[:blocks], work)
        info_U[unit, 1] = 0
        info_U[unit, 2] = 0
        if peak in (NO_SCALE, REFUSED):
            if pitch == 0:
                return unit
            for level in range(LEVELS_MAX):
                count_L[level] = 0
            info_U[unit, 0] = 0 if peak == NO_SCALE else -1
            continue
        if pitch == 0 and out.size - tail < before + coded_max(piece.size):
            return unit
        body = (tail if pitch == 0 else unit * pitch) + before
        place = body
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
                inverse_B[block] = inverse_power(step_B[block])
        quantised = symbols[: length_of(piece.size, planes)]
        quantise(piece, inverse_B[:blocks], 8, bits, planes, quantised, work)
        survey(piece, inverse_B[:blocks], top, sum_L, count_L)
        for level in range(1, top + 1):
            # Four values at the level itself keep a rare level's mean sane.
            mean = (sum_L[level] + 4 * level * UNIT) // (count_L[level] + 4) - level * UNIT
            at = body + 2 * level
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
        info_U[unit, 1] = best
        info_U[unit, 2] = cheapest
        if not ready_T[best]:
            return unit
        ahead = np.int64(address_of(x, _U(start + chunk)))
        end = write_symbols(
            quantised, entry_TS[best], out, place + blocks, literal, ahead, planes * _FLOAT
        )
        info_U[unit, 0] = end - body
        head = body - _HEADER
        if pitch == 0 and end - head < COMPILED_FROM:
            return unit
        tail = end
        if before == _HEADER and end - head >= COMPILED_FROM:
            write_header(out, head, end, kind, best, piece.size, parameter, sums)
    return (x.size + chunk - 1) // chunk


# ── decoding ─────────────────────────────────────────────────────────────────────────────────
@inner
def _whole(count: int, planes: int) -> bool:
    """Whether a chunk of `count` values can be written past the caches."""
    length = length_of(count, planes)
    return length * planes == count and length % (2 * LANES * BLOCK) == 0


@inner
def decode_chunk(
    data: Any, start: int, stop: int, bits: int, lookup_W: Any, out: Any, add: bool,
    past_cache: bool, weight: np.float32, waiting: Any, left: int, scratch: Any,
) -> int:  # fmt: skip
    """One chunk's body into `out`: GOOD, or what is wrong. With `add` nothing is changed then.

    With `past_cache` the chunk is `_whole`; the last eight streams' values are not written but left
    to be, in the second half of the room for symbols. Meanwhile `waiting`, a piece with `left`
    rounds, is written first, if there are any.
    """
    symbols, lane_T, escape_E, scale_B, book, work, pad, size_N = scratch
    planes = 12 // bits
    top = (1 << (bits - 1)) - 1
    count = out.size
    blocks = (count + BLOCK - 1) // BLOCK
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
    coming = np.int64(0) if past_cache else np.int64(address_of(out, _U(0)))
    following = np.int64(address_of(data, _U(stop)))
    used = np.int64(0)
    for stream in range(0, streams, LANES):
        first = stream * each
        done = read_group(
            data, place, size_N, stream, length, lookup_W, lane_T, pad, coming, following,
            waiting, left,
        )  # fmt: skip
        if done < 0:
            return BAD_STREAM
        begin = first if add or past_cache else 0
        part = symbols[begin : begin + done + GROUP]
        used = collect(lane_T, each, part, data, literals_at, used, literals, escape_E)
        if used > literals:
            return BAD_LITERALS
        part = part[:done]
        if past_cache:
            if left > 0:
                edges(waiting, work)
            waiting = piece_of(part, book, scale_B, out, first, length, bits, planes)
            left = part.size // GROUP - 1
        elif not add:
            expand(part, first, length, bits, planes, book, scale_B, out, add, work)
        for k in range(min(LANES, streams - stream)):
            place += size_N[stream + k]
    if used != literals:
        return BAD_LITERALS
    if add:
        part = symbols[:length]
        expand(part, np.int64(0), length, bits, planes, book, scale_B, out, add, work)
    return GOOD


@inner
def _write_out(piece: Any, rounds: int, work: Any) -> None:
    """All of a piece."""
    for number in range(rounds):
        write_round(piece, _U(number))
    edges(piece, work)


@entry(
    _I64(
        readable(_U8), readable(_I64), readable(_I64), _I64, _I64, _I64, readable(_BOOL),
        readable(LOOKUP, 2), _F32[::1], _I64, _BOOL, _BOOL, _F32, _U16[::1], _U16[::1], _U32[::1],
        _U8[::1],
    )
)  # fmt: skip
def decode_frames(
    data: Any, start_U: Any, stop_U: Any, first: int, bits: int, kind: int, ready_T: Any,
    lookup_TW: Any, out: Any, chunk: int, add: bool, past_cache: bool, weight: np.float32,
    symbols: Any, lane_T: Any, escape_E: Any, pad: Any,
) -> int:  # fmt: skip
    """Frames data[start_U[u]:stop_U[u]] from the `first` on into the u-th `chunk` values of `out`.

    Checks header and checksum of each; all are of one `kind` (codec, mode and bits, as they follow
    each other in a header). With 0 for a kind they are bodies that were checked, coded by the first
    table. `symbols`, `lane_T`, `escape_E` and `pad` are room for a chunk's symbols, twice, their
    places and bytes.

    Returns 16 * u + why it stopped at u: GOOD after the last, UNUSUAL, NO_TABLE, or what is wrong.
    """
    # Two of each: a chunk's last values are written while the next one is decoded.
    scale_2B = np.zeros((2, (min(chunk, out.size) + BLOCK - 1) // BLOCK + 1), np.float32)
    book_2 = np.empty((2, 16), np.float32)
    work = np.empty(BLOCK, np.float32)
    size_N = np.empty(17, np.int64)
    sums = np.empty(8, np.uint64)
    planes = 12 // bits
    length = length_of(chunk, planes)
    half = length // 2
    past_cache = past_cache and _whole(chunk, planes)
    left = np.int64(0)
    waiting = piece_of(
        symbols[half:length], book_2[0], scale_2B[0], out[: out.size], half, length, bits, planes
    )
    found = GOOD
    unit = first
    while unit < start_U.size:
        start = start_U[unit]
        stop = stop_U[unit]
        piece = out[unit * chunk : (unit + 1) * chunk]
        table = np.int64(0)
        if kind != 0:
            fields = intact_fields(data, start, stop, kind, _KIND, piece.size, sums)
            table = fields >> 24
            if fields < 0 or table >= lookup_TW.shape[0]:
                found = UNUSUAL
                break
            start += _HEADER
        if not ready_T[table]:
            found = NO_TABLE
            break
        direct = past_cache and piece.size == chunk
        if left > 0 and not direct:
            _write_out(waiting, left, work)
            left = np.int64(0)
        scratch = (
            symbols, lane_T, escape_E, scale_2B[unit & 1], book_2[unit & 1], work, pad, size_N,
        )  # fmt: skip
        found = decode_chunk(
            data, start, stop, bits, lookup_TW[table], piece, add, direct, weight, waiting, left,
            scratch,
        )  # fmt: skip
        if found != GOOD:
            break
        if direct:
            waiting = piece_of(
                symbols[half:length], book_2[unit & 1], scale_2B[unit & 1], piece, half, length,
                bits, planes,
            )  # fmt: skip
            left = half // GROUP - 1
        unit += 1
    if left > 0 and found in (GOOD, UNUSUAL, NO_TABLE):
        _write_out(waiting, left, work)
    if past_cache:
        fence()
    return 16 * unit + found
