"""The two-level codec's Triton kernels for coded streams: what `stream_kernels` does on a CPU.

One lane codes or decodes one stream, two chunks to a warp, so that a GPU has sixteen lanes per
chunk at work. Nothing that a frame's bytes decide is an index without a bound: streams are read up
to the end of the upload, whatever they hold, and judged afterwards.

Shape suffixes: U = chunks, G = received chunks of one width, B = blocks of 256, T = symbols (or
tables), S = streams.
"""

from __future__ import annotations

from typing import Any, Final

import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

from tensorcodecs import plain
from tensorcodecs.gpu_levels import jit, power
from tensorcodecs.huffman import LENGTH_MAX, SYMBOLS

NO_FAULT: Final = 2**31 - 1
_BLOCK = tl.constexpr(plain.BLOCK)
_UNIT = tl.constexpr(plain.UNIT)
_STEP_MIN = tl.constexpr(plain.STEP_MIN)
_STEP_MAX = tl.constexpr(plain.STEP_MAX)
_ZERO_CODE = tl.constexpr(plain.ZERO_CODE)
_BOOK_MAX = tl.constexpr(int(plain.BOOK_MAX) * plain.UNIT)
_ESCAPE = tl.constexpr(SYMBOLS - 1)
_SYMBOLS = tl.constexpr(SYMBOLS)
_WINDOW = tl.constexpr(1 << LENGTH_MAX)
_BAD_SIZES = tl.constexpr(1)
_BAD_STREAM = tl.constexpr(2)
_BAD_LITERALS = tl.constexpr(3)
_BAD_SCALE = tl.constexpr(4)
_GOOD = tl.constexpr(NO_FAULT)


# ── entropy coding ───────────────────────────────────────────────────────────────────────────
@jit
def _append(
    held: tl.tensor,
    have: tl.tensor,
    place: tl.tensor,
    target: tl.tensor,
    one: tl.tensor,
    two: tl.tensor,
    inside: tl.tensor,
) -> Any:
    """Two codes behind the `have` (below 32) bits of `held`; a full word goes to its place."""
    pair = (one >> 9) | ((two >> 9) << (one & 63))
    held |= pair.to(tl.uint64) << have.to(tl.uint64)
    have += (one & 63) + (two & 63)
    full = have >= 32
    tl.store(target + place, held.to(tl.uint32).to(tl.int32, bitcast=True), mask=full & inside)
    held = tl.where(full, held >> 32, held)
    have = tl.where(full, have - 32, have)
    return held, have, place + full.to(tl.int32)


@jit
def _keep(
    literal: tl.tensor, kept: tl.tensor, entry: tl.tensor, symbol: tl.tensor, inside: tl.tensor
) -> Any:
    """A symbol without a code goes to the literals."""
    rare = (entry & 0x40) != 0
    tl.store(literal + kept, symbol.to(tl.int16), mask=rare & inside)
    return kept + rare.to(tl.int32)


@jit
def encode_kernel(
    symbol4_T: tl.tensor, literal_T: tl.tensor, entry_TS: tl.tensor, info_U: tl.tensor,
    word_S: tl.tensor, bits_S: tl.tensor, literals_S: tl.tensor, units: tl.tensor,
    EACH: tl.constexpr, STREAMS: tl.constexpr, PITCH: tl.constexpr, INFO: tl.constexpr,
    LANES: tl.constexpr,
) -> None:  # fmt: skip
    """A lane per stream of EACH symbols: codes to words, and how many bits and literals.

    `symbol4_T` and `literal_T` are the same memory: the k-th literal of a stream takes the place
    of its k-th symbol, which was read before.
    """
    unit = tl.program_id(0) * (LANES // STREAMS) + tl.arange(0, LANES // STREAMS)[:, None]
    stream = unit * STREAMS + tl.arange(0, STREAMS)[None, :]
    inside = stream < units * STREAMS
    table = tl.load(info_U + unit * INFO + 1, mask=unit < units, other=0)
    entry = entry_TS + table * _SYMBOLS
    source = symbol4_T + stream * (EACH // 4)
    literal = literal_T + stream * EACH
    target = word_S + stream * PITCH
    held = tl.zeros((LANES // STREAMS, STREAMS), tl.uint64)
    have = tl.zeros((LANES // STREAMS, STREAMS), tl.int32)
    place = tl.zeros((LANES // STREAMS, STREAMS), tl.int32)
    kept = tl.zeros((LANES // STREAMS, STREAMS), tl.int32)
    four = tl.load(source, mask=inside, other=0)
    for at in range(EACH // 4):
        a = (four & 4095).to(tl.int32)
        b = ((four >> 16) & 4095).to(tl.int32)
        c = ((four >> 32) & 4095).to(tl.int32)
        d = ((four >> 48) & 4095).to(tl.int32)
        four = tl.load(source + at + 1, mask=inside & (at + 1 < EACH // 4), other=0)
        one = tl.load(entry + a)
        two = tl.load(entry + b)
        three = tl.load(entry + c)
        last = tl.load(entry + d)
        held, have, place = _append(held, have, place, target, one, two, inside)
        held, have, place = _append(held, have, place, target, three, last, inside)
        kept = _keep(literal, kept, one, a, inside)
        kept = _keep(literal, kept, two, b, inside)
        kept = _keep(literal, kept, three, c, inside)
        kept = _keep(literal, kept, last, d, inside)
    rest = held.to(tl.uint32).to(tl.int32, bitcast=True)
    tl.store(target + place, rest, mask=(have > 0) & inside)
    tl.store(bits_S + stream, place * 32 + have, mask=inside)
    tl.store(literals_S + stream, kept, mask=inside)


@jit
def _literal_at(
    literal: tl.tensor,
    index: tl.tensor,
    end: tl.tensor,
    count: tl.tensor,
    inside: tl.tensor,
    EACH: tl.constexpr,
) -> Any:
    """The index-th literal of a chunk; `end` and `count`: of each stream's."""
    past = index[:, None] >= end[None, :]
    stream = tl.sum(past.to(tl.int32), axis=1)
    before = tl.sum(tl.where(past, count[None, :], 0), axis=1)
    return tl.load(literal + stream * EACH + index - before, mask=inside, other=0).to(tl.int32)


@jit
def join_kernel(
    side_U: tl.tensor, byte_S: tl.tensor, bits_S: tl.tensor, literal_T: tl.tensor,
    literals_S: tl.tensor, start_U: tl.tensor, out: tl.tensor, SIDE: tl.constexpr,
    SIDE_MAX: tl.constexpr, EACH: tl.constexpr, STREAMS: tl.constexpr, PITCH: tl.constexpr,
    STEP: tl.constexpr,
) -> None:  # fmt: skip
    """A program per stream that copies it to where it belongs, and one more per chunk for the rest:
    side data, sizes and literals."""
    HEAD: tl.constexpr = SIDE + 2 * STREAMS + 2
    unit = tl.program_id(0) // (STREAMS + 1)
    part = tl.program_id(0) % (STREAMS + 1)
    stream = tl.arange(0, STREAMS)
    size = (tl.load(bits_S + unit * STREAMS + stream) + 7) >> 3
    body = out + tl.load(start_U + unit)
    lane = tl.arange(0, STEP)
    if part < STREAMS:
        total = tl.sum(tl.where(stream == part, size, 0), axis=0)
        target = body + HEAD + tl.sum(tl.where(stream < part, size, 0), axis=0)
        source = byte_S + (unit * STREAMS + part) * (4 * PITCH)
        for at in range(0, total, STEP):
            piece = tl.load(source + at + lane, mask=at + lane < total, other=0)
            tl.store(target + at + lane, piece, mask=at + lane < total)
    else:
        count = tl.load(literals_S + unit * STREAMS + stream)
        literals = tl.sum(count, axis=0)
        beside = tl.arange(0, SIDE_MAX)
        scales = tl.load(side_U + unit * SIDE + beside, mask=beside < SIDE, other=0)
        tl.store(body + beside, scales, mask=beside < SIDE)
        low = (size & 255).to(tl.uint8)
        tl.store(body + SIDE + 2 * stream, low)
        tl.store(body + SIDE + 2 * stream + 1, (size >> 8).to(tl.uint8))
        tl.store(body + SIDE + 2 * STREAMS, (literals & 255).to(tl.uint8))
        tl.store(body + SIDE + 2 * STREAMS + 1, (literals >> 8).to(tl.uint8))
        packed = body + HEAD + tl.sum(size, axis=0)
        literal = literal_T + unit * (STREAMS * EACH)
        end = tl.cumsum(count, axis=0)
        for first in range(0, literals, 2 * STEP):
            index = first + 2 * lane
            one = _literal_at(literal, index, end, count, index < literals, EACH)
            two = _literal_at(literal, index + 1, end, count, index + 1 < literals, EACH)
            place = packed + (index >> 1) * 3
            tl.store(place, (one & 255).to(tl.uint8), mask=index < literals)
            middle = (one >> 8) | ((two & 15) << 4)
            tl.store(place + 1, middle.to(tl.uint8), mask=index < literals)
            tl.store(place + 2, (two >> 4).to(tl.uint8), mask=index + 1 < literals)


@jit
def _read16(place: tl.tensor, mask: tl.tensor) -> Any:
    """A little-endian u16 at any address."""
    low = tl.load(place, mask=mask, other=0).to(tl.int32)
    return low | (tl.load(place + 1, mask=mask, other=0).to(tl.int32) << 8)


@jit
def _report(fault: tl.tensor, found: tl.tensor) -> None:
    """`found`: 16 * chunk + what is wrong with it; the first chunk's is kept."""
    if found < _GOOD:
        tl.atomic_min(fault, found)


@jit
def _next_word(word: tl.tensor, at: tl.tensor, words: tl.tensor, inside: tl.tensor) -> Any:
    """Zero beyond the upload."""
    piece = tl.load(word + at, mask=inside & (at < words), other=0)
    return piece.to(tl.uint32, bitcast=True).to(tl.uint64)


@jit
def _refill(
    held: tl.tensor,
    have: tl.tensor,
    coming: tl.tensor,
    later: tl.tensor,
    at: tl.tensor,
    word: tl.tensor,
    words: tl.tensor,
    inside: tl.tensor,
) -> Any:
    """At least 33 bits in `held`. Two words are on their way, so that nobody waits for memory."""
    needs = have <= 32
    held |= tl.where(needs, coming, 0) << tl.where(needs, have, 0).to(tl.uint64)
    have = tl.where(needs, have + 32, have)
    coming = tl.where(needs, later, coming)
    later = tl.where(needs, _next_word(word, at, words, inside & needs), later)
    return held, have, coming, later, at + needs.to(tl.int64)


@jit
def decode_kernel(
    byte: tl.tensor, word: tl.tensor, section_G: tl.tensor, stop_G: tl.tensor, table_G: tl.tensor,
    unit_G: tl.tensor, lookup_TW: tl.tensor, symbol4_T: tl.tensor, fault: tl.tensor,
    units: tl.tensor, words: tl.tensor, EACH: tl.constexpr, STREAMS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:  # fmt: skip
    """A lane per stream of EACH symbols; each must end exactly where the next one starts."""
    group = tl.program_id(0) * (LANES // STREAMS) + tl.arange(0, LANES // STREAMS)[:, None]
    known = group < units
    stream = tl.arange(0, STREAMS)[None, :]
    inside = known & (stream >= 0)
    section = tl.load(section_G + group, mask=known, other=0)
    stop = tl.load(stop_G + group, mask=known, other=0)
    size = _read16(byte + section + 2 * stream, inside)
    literals = _read16(byte + section + 2 * STREAMS, known)
    ends = tl.cumsum(size, axis=1)
    total = tl.sum(size, axis=1)[:, None]
    fits = section + 2 * STREAMS + 2 + total + ((literals * 3 + 1) >> 1) == stop
    inside = inside & fits
    start = section + 2 * STREAMS + 2 + (ends - size)
    lookup = lookup_TW + tl.load(table_G + group, mask=known, other=0) * _WINDOW
    target = symbol4_T + (group.to(tl.int64) * STREAMS + stream) * (EACH // 4)

    at = start >> 2
    skip = (start & 3) * 8
    held = _next_word(word, at, words, inside) | (_next_word(word, at + 1, words, inside) << 32)
    held = held >> skip.to(tl.uint64)
    have = (64 - skip).to(tl.int32)
    coming = _next_word(word, at + 2, words, inside)
    later = _next_word(word, at + 3, words, inside)
    at += 4
    used = tl.zeros((LANES // STREAMS, STREAMS), tl.int32)
    for index in range(EACH // 4):
        four = tl.zeros((LANES // STREAMS, STREAMS), tl.int64)
        for pair in tl.static_range(2):
            held, have, coming, later, at = _refill(
                held, have, coming, later, at, word, words, inside
            )
            for part in tl.static_range(2):
                window = (held & (_WINDOW - 1)).to(tl.int32)
                entry = tl.load(lookup + window).to(tl.int32) & 0xFFFF
                length = entry & 15
                held = held >> length.to(tl.uint64)
                have -= length
                used += length
                four |= (entry >> 4).to(tl.int64) << (32 * pair + 16 * part)
        tl.store(target + index, four, mask=inside)
    spare = (0 - used) & 7
    clean = (held.to(tl.int32) & ((1 << spare) - 1)) == 0
    exact = (((used + 7) >> 3) == size) & clean
    wrong = tl.where(fits, tl.where(exact, 0, _BAD_STREAM), _BAD_SIZES)
    unit = tl.load(unit_G + group, mask=known, other=0)
    found = tl.where(known & (wrong > 0), unit * 16 + wrong, _GOOD)
    _report(fault, tl.min(tl.min(found, axis=1), axis=0))


@jit
def check_kernel(
    byte: tl.tensor, body_G: tl.tensor, section_G: tl.tensor, stop_G: tl.tensor, unit_G: tl.tensor,
    symbol_T: tl.tensor, book_G: tl.tensor, scale_B: tl.tensor, weight: tl.tensor, fault: tl.tensor,
    CHUNK: tl.constexpr, BITS: tl.constexpr, STREAMS: tl.constexpr, BLOCKS_MAX: tl.constexpr,
    TILE: tl.constexpr,
) -> None:  # fmt: skip
    """One chunk's scales (times the weight) and codebook, and its literals put in their places."""
    BLOCKS: tl.constexpr = CHUNK // _BLOCK
    TOP: tl.constexpr = (1 << (BITS - 1)) - 1
    LENGTH: tl.constexpr = CHUNK // (12 // BITS)
    group = tl.program_id(0).to(tl.int64)
    body = byte + tl.load(body_G + group)
    section = tl.load(section_G + group)
    stop = tl.load(stop_G + group)
    wrong = 0
    peak = tl.load(body).to(tl.int32) | (tl.load(body + 1).to(tl.int32) << 8)
    peak = (peak ^ 0x8000) - 0x8000
    if (peak < _STEP_MIN) | (peak > _STEP_MAX):
        wrong = _BAD_SCALE
        peak = peak * 0
    block = tl.arange(0, BLOCKS_MAX)
    inside = block < BLOCKS
    down = tl.load(body + 2 + 2 * TOP + block, mask=inside, other=_ZERO_CODE).to(tl.int32)
    live = down != _ZERO_CODE
    below = live & (peak - down < _STEP_MIN)
    if tl.max(below.to(tl.int32), axis=0) > 0:
        wrong = _BAD_SCALE
    live = live & (peak - down >= _STEP_MIN)
    scale = tl.where(live, power(tl.where(live, peak - down, 0)) * weight, 0.0)
    tl.store(scale_B + group * BLOCKS + block, scale, mask=inside)

    level = tl.arange(0, 16) - TOP
    magnitude = tl.abs(level)
    named = (magnitude > 0) & (magnitude <= TOP)
    entry = (_read16(body + 2 * magnitude, named) ^ 0x8000) - 0x8000
    fixed = tl.where(named, magnitude * _UNIT + entry, 0)
    if tl.max(((fixed < 0) | (fixed > _BOOK_MAX)).to(tl.int32), axis=0) > 0:
        wrong = _BAD_SCALE
    value = fixed.to(tl.float32) * 0.000244140625  # / 4096
    tl.store(book_G + group * 16 + tl.arange(0, 16), tl.where(level < 0, value * -1.0, value))

    stream = tl.arange(0, STREAMS)
    total = tl.sum(_read16(byte + section + 2 * stream, stream >= 0), axis=0)
    head = byte + section + 2 * STREAMS
    literals = tl.load(head).to(tl.int32) | (tl.load(head + 1).to(tl.int32) << 8)
    start = stop - ((literals * 3 + 1) >> 1)
    if section + 2 * STREAMS + 2 + total != start:
        literals = literals * 0  # refused already; don't look where they would be
    source = byte + start
    done = 0
    for at in range(0, LENGTH, TILE):
        index = at + tl.arange(0, TILE)
        place = symbol_T + group * LENGTH + index
        symbol = tl.load(place, mask=index < LENGTH, other=0)
        mark = (symbol == _ESCAPE).to(tl.int32)
        found = tl.sum(mark, axis=0)
        if found > 0:
            rank = done + tl.cumsum(mark, axis=0) - 1
            real = (mark > 0) & (rank < literals)
            pair = _read16(source + ((rank * 3) >> 1), real)
            filled = (pair >> (4 * (rank & 1))) & 4095
            tl.store(place, filled.to(tl.int16), mask=real)
        done += found
    if done != literals:
        wrong = tl.where(wrong == 0, _BAD_LITERALS, wrong)
    unit = tl.load(unit_G + group)
    _report(fault, tl.where(wrong == 0, _GOOD, unit * 16 + wrong))
