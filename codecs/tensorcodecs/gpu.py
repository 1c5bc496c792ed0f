"""The two-level codec on a GPU (Triton): the frames of `Ecsq.encode_many`, byte for byte.

Only coded bytes cross between GPU and host. A vector is cut into chunks as everywhere; whole chunks
are quantised, coded, decoded and added up where they are. The host writes and checks headers and
checksums. What is rare goes by way of the host's own code: a last short chunk, chunks that want a
code table of their own or are smaller raw, and received raw and zstd planes.

One lane codes or decodes one stream, two chunks to a warp, so that a GPU has sixteen lanes per
chunk at work; everything else runs over contiguous values. Floats are multiplied and added exactly
as on the CPU: sums in the order of `vector.sum_of_squares`, nothing fused.

Kernels index nothing that a frame's bytes decide without a bound: streams are read up to the end of
the upload, whatever they hold, and judged afterwards. Nothing is written to the caller's tensor
before all frames of a call were found good.

Shape suffixes: N = values, U = chunks, G = received chunks of one width, B = blocks of 256,
T = symbols (or tables), L = magnitudes, S = streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

try:
    import torch
    import triton  # type: ignore[import-untyped, unused-ignore]
    import triton.language as tl  # type: ignore[import-untyped, unused-ignore]
except ImportError as error:
    raise ImportError(
        f"tensorcodecs.gpu needs torch and triton ({error}): "
        "pip install torch triton, or use the codecs on the CPU"
    ) from error

from tensorcodecs import plain
from tensorcodecs.ecsq import CODEC_ID, Ecsq, shipped_tables
from tensorcodecs.errors import DecodeError, EncodeError
from tensorcodecs.frame import FIXED, HEADER, OWN, ZERO, Frame, Payload, refuse_values, seal
from tensorcodecs.huffman import LENGTH_MAX, SYMBOLS, Table, level_table, shown_weights
from tensorcodecs.layout import CHUNK_VALUES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CHUNK_STEP: Final = 3072
"""What a chunk's size must be a multiple of here: all widths then pack into whole blocks."""

_SLAB: Final = 1024  # chunks coded at a time: 400 MB of values, 160 MB of scratch
_LANES: Final = 32  # streams of one program
_ROWS: Final = 4  # blocks per plane that one program quantises or expands
_SUM_ROWS: Final = 16  # blocks that one program sums up
_INFO: Final = 12  # per chunk: peak, table, cost, bytes, eight counts
_WIDTHS: Final = (2, 3, 4)
_NO_FAULT: Final = 2**31 - 1
_PRECISE: Final[dict[str, Any]] = {"enable_fp_fusion": False}  # no fused multiply-add

_BLOCK = tl.constexpr(plain.BLOCK)
_SAMPLE = tl.constexpr(plain.SAMPLE)
_UNIT = tl.constexpr(plain.UNIT)
_NO_SCALE = tl.constexpr(plain.NO_SCALE)
_REFUSED = tl.constexpr(plain.REFUSED)
_STEP_MIN = tl.constexpr(plain.STEP_MIN)
_STEP_MAX = tl.constexpr(plain.STEP_MAX)
_ZERO_CODE = tl.constexpr(plain.ZERO_CODE)
_BOOK_MAX = tl.constexpr(int(plain.BOOK_MAX) * plain.UNIT)
_ESCAPE = tl.constexpr(SYMBOLS - 1)
_SYMBOLS = tl.constexpr(SYMBOLS)
_WINDOW = tl.constexpr(1 << LENGTH_MAX)
_QUARTER = tl.constexpr(int(np.float32(2**0.25).view(np.uint32)) & 0x7FFFFF)
_THREE_QUARTERS = tl.constexpr(int(np.float32(2**0.75).view(np.uint32)) & 0x7FFFFF)
_STEP_1 = tl.constexpr(float(np.float32(2**0.25)))
_STEP_2 = tl.constexpr(float(np.float32(2**0.5)))
_STEP_3 = tl.constexpr(float(np.float32(2**0.75)))
_INVERSE_1 = tl.constexpr(float(np.float32(2**-0.25)))
_INVERSE_2 = tl.constexpr(float(np.float32(2**-0.5)))
_INVERSE_3 = tl.constexpr(float(np.float32(2**-0.75)))
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, ties to even
_MAGIC_BITS = tl.constexpr(0x4B400000)
_SMALL = tl.constexpr(2.0**-80)
_LARGE = tl.constexpr(2.0**100)
_SMALL_FACTOR = tl.constexpr(2.0**70)
_LARGE_FACTOR = tl.constexpr(2.0**-60)
_SMALL_ZERO = tl.constexpr(2.0**-62)
_VALUE_BITS_MAX = tl.constexpr(0x5F800000)  # 2**64
_BAD_SIZES = tl.constexpr(1)
_BAD_STREAM = tl.constexpr(2)
_BAD_LITERALS = tl.constexpr(3)
_BAD_SCALE = tl.constexpr(4)
_GOOD = tl.constexpr(_NO_FAULT)


def _jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, which has no types. How many chunks there are makes no other program."""
    return triton.jit(function, do_not_specialize=["units", "words"])


# ── scales ───────────────────────────────────────────────────────────────────────────────────
@_jit
def _quarters(square: tl.tensor) -> Any:
    bits = square.to(tl.int32, bitcast=True)
    mantissa = bits & 0x7FFFFF
    upper = (mantissa >= _QUARTER).to(tl.int32) + (mantissa >= _THREE_QUARTERS).to(tl.int32)
    return 2 * ((bits >> 23) - 127) + upper


@_jit
def _widest(total: tl.tensor, share: tl.tensor, peak: tl.tensor, reach: tl.tensor) -> Any:
    return tl.maximum(_quarters(total * share), _quarters(peak * peak * reach))


@_jit
def _power(quarters: tl.tensor) -> Any:
    """2 ** (quarters / 4), for normal results."""
    part = quarters & 3
    step = tl.where(part == 1, _STEP_1, tl.where(part == 2, _STEP_2, _STEP_3))
    step = tl.where(part == 0, 1.0, step)
    return step * (((quarters >> 2) + 127) << 23).to(tl.float32, bitcast=True)


@_jit
def _inverse_power(quarters: tl.tensor) -> Any:
    """2 ** (-quarters / 4), for normal results."""
    part = quarters & 3
    step = tl.where(part == 1, _INVERSE_1, tl.where(part == 2, _INVERSE_2, _INVERSE_3))
    step = tl.where(part == 0, 1.0, step)
    return step * ((127 - (quarters >> 2)) << 23).to(tl.float32, bitcast=True)


@_jit
def _inverses(step: tl.tensor) -> Any:
    """1 / step of blocks that have one, else 0."""
    live = (step > _NO_SCALE) & (step < _REFUSED)
    return tl.where(live, _inverse_power(tl.where(live, step, 0)), 0.0)


@_jit
def _measure(
    x: tl.tensor, start: tl.tensor, inside: tl.tensor, factor: tl.tensor, ROWS: tl.constexpr
) -> Any:
    """Of x[start:start + 256] * factor, row by row: the sum of squares in the order of
    `vector.sum_of_squares`, and the bits of the largest magnitude."""
    place = x + start[:, None] + tl.arange(0, 64)[None, :]
    value = tl.load(place, mask=inside[:, None], other=0.0) * factor
    total = value * value
    peak = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    for quarter in tl.static_range(1, 4):
        value = tl.load(place + 64 * quarter, mask=inside[:, None], other=0.0) * factor
        total = total + value * value
        peak = tl.maximum(peak, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    # Four partial sums of sixteen lanes. Every sum below has two terms: their order can't matter.
    total = tl.sum(tl.reshape(total, (ROWS, 2, 2, 16)), axis=2)
    total = tl.sum(total, axis=1)
    total = tl.sum(tl.reshape(total, (ROWS, 2, 8)), axis=1)
    total = tl.sum(tl.reshape(total, (ROWS, 2, 4)), axis=1)
    total = tl.sum(tl.reshape(total, (ROWS, 2, 2)), axis=1)
    total = tl.sum(total, axis=1)
    return total, tl.max(peak, axis=1)


@_jit
def _scale_kernel(
    x: tl.tensor, step_B: tl.tensor, units: tl.tensor, share: tl.tensor, reach: tl.tensor,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """The step exponent of each block: see `plain.block_steps`."""
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = block < units * BLOCKS
    total, peak = _measure(x, block * _BLOCK, inside, 1.0, ROWS)
    step = _widest(total, share, peak.to(tl.float32, bitcast=True), reach)
    odd = (((total >= _SMALL) & (total <= _LARGE)).to(tl.int32) == 0) & inside
    if tl.max(odd.to(tl.int32), axis=0) > 0:
        small = total < _SMALL
        factor = tl.where(small, _SMALL_FACTOR, _LARGE_FACTOR)
        again, scaled = _measure(x, block * _BLOCK, inside, factor[:, None], ROWS)
        other = _widest(again, share, scaled.to(tl.float32, bitcast=True), reach)
        tiny = tl.where(again < _SMALL_ZERO, _NO_SCALE, other - 280)
        huge = tl.where(peak <= _VALUE_BITS_MAX, other + 240, _REFUSED)
        step = tl.where(odd, tl.where(small, tiny, huge), step)
    tl.store(step_B + block, step, mask=inside)


@_jit
def _describe_kernel(
    x: tl.tensor, step_B: tl.tensor, cost_TL: tl.tensor, inverse_B: tl.tensor, side_U: tl.tensor,
    info_U: tl.tensor, CHUNK: tl.constexpr, BITS: tl.constexpr, TABLES: tl.constexpr,
    TABLES_MAX: tl.constexpr, BLOCKS_MAX: tl.constexpr, SAMPLES_MAX: tl.constexpr,
    INFO: tl.constexpr,
) -> None:  # fmt: skip
    """One chunk's side data (scales, codebook) and, from its sample, the table that suits it."""
    BLOCKS: tl.constexpr = CHUNK // _BLOCK
    TOP: tl.constexpr = (1 << (BITS - 1)) - 1
    unit = tl.program_id(0)
    info = info_U + unit * INFO
    side = side_U + unit * (2 + 2 * TOP + BLOCKS)
    block = tl.arange(0, BLOCKS_MAX)
    inside = block < BLOCKS
    step = tl.load(step_B + unit * BLOCKS + block, mask=inside, other=_NO_SCALE)
    peak = tl.max(step, axis=0)
    down = peak - step
    step = tl.where(down <= 254, step, _NO_SCALE)
    code = tl.where(step > _NO_SCALE, down, _ZERO_CODE)
    tl.store(inverse_B + unit * BLOCKS + block, _inverses(step), mask=inside)
    tl.store(side + 2 + 2 * TOP + block, code.to(tl.uint8), mask=inside)
    tl.store(side, (peak & 255).to(tl.uint8))
    tl.store(side + 1, ((peak >> 8) & 255).to(tl.uint8))

    block = tl.arange(0, SAMPLES_MAX) * _SAMPLE
    inside = block < BLOCKS
    step = tl.load(step_B + unit * BLOCKS + block, mask=inside, other=_NO_SCALE)
    step = tl.where(peak - step <= 254, step, _NO_SCALE)
    place = x + unit * CHUNK + block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    value = tl.load(place, mask=inside[:, None], other=0.0)
    scaled = tl.abs(value * _inverses(step)[:, None])
    scaled = tl.where(scaled < 15.0, scaled, 15.0)
    fixed = (scaled * 4096.0).to(tl.int32)
    level = (scaled + _MAGIC).to(tl.int32, bitcast=True) - _MAGIC_BITS
    level = tl.where(inside[:, None], tl.minimum(level, TOP), -1)
    table = tl.arange(0, TABLES_MAX)
    known = table < TABLES
    cost = tl.where(known, 0, 1 << 30)
    for magnitude in tl.static_range(TOP + 1):
        hit = level == magnitude
        count = tl.sum(tl.sum(hit.to(tl.int32), axis=1), axis=0)
        total = tl.sum(tl.sum(tl.where(hit, fixed, 0), axis=1), axis=0)
        cost += count * tl.load(cost_TL + table * (TOP + 1) + magnitude, mask=known, other=0)
        tl.store(info + 4 + magnitude, count)
        if magnitude > 0:
            # Four values at the level itself keep a rare level's mean sane.
            mean = (total + 4 * magnitude * _UNIT) // (count + 4) - magnitude * _UNIT
            tl.store(side + 2 * magnitude, (mean & 255).to(tl.uint8))
            tl.store(side + 2 * magnitude + 1, ((mean >> 8) & 255).to(tl.uint8))
    tl.store(info, peak)
    tl.store(info + 1, tl.argmin(cost, axis=0))
    tl.store(info + 2, tl.min(cost, axis=0))


# ── levels and symbols ───────────────────────────────────────────────────────────────────────
@_jit
def _quantise_kernel(
    x: tl.tensor, inverse_B: tl.tensor, symbol_T: tl.tensor, CHUNK: tl.constexpr,
    BITS: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """Levels packed into symbols, planes apart; a row is a block of every plane."""
    PLANES: tl.constexpr = 12 // BITS
    TOP: tl.constexpr = (1 << (BITS - 1)) - 1
    HEIGHT: tl.constexpr = CHUNK // PLANES // _BLOCK
    TILES: tl.constexpr = (HEIGHT + ROWS - 1) // ROWS
    unit = tl.program_id(0) // TILES
    row = tl.program_id(0) % TILES * ROWS + tl.arange(0, ROWS)
    inside = row < HEIGHT
    column = tl.arange(0, _BLOCK)[None, :]
    symbol = tl.zeros((ROWS, _BLOCK), tl.int32)
    for plane in tl.static_range(PLANES):
        block = unit * (CHUNK // _BLOCK) + plane * HEIGHT + row
        inverse = tl.load(inverse_B + block, mask=inside, other=0.0)
        value = tl.load(x + block[:, None] * _BLOCK + column, mask=inside[:, None], other=0.0)
        scaled = value * inverse[:, None]
        scaled = tl.where(scaled < 1.0 * TOP, scaled, 1.0 * TOP)  # NaN too
        scaled = tl.where(scaled > -1.0 * TOP, scaled, -1.0 * TOP)
        level = (scaled + _MAGIC).to(tl.int32, bitcast=True) - _MAGIC_BITS
        symbol |= (level + TOP) << (BITS * plane)
    place = symbol_T + (unit * HEIGHT + row)[:, None] * _BLOCK + column
    tl.store(place, symbol.to(tl.int16), mask=inside[:, None])


@_jit
def _expand_kernel(
    symbol_T: tl.tensor, book_G: tl.tensor, scale_B: tl.tensor, unit_G: tl.tensor, out: tl.tensor,
    ADD: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """out = (or +=) codebook value * scale of the block."""
    PLANES: tl.constexpr = 12 // BITS
    BLOCKS: tl.constexpr = CHUNK // _BLOCK
    HEIGHT: tl.constexpr = BLOCKS // PLANES
    TILES: tl.constexpr = (HEIGHT + ROWS - 1) // ROWS
    group = (tl.program_id(0) // TILES).to(tl.int64)
    row = tl.program_id(0) % TILES * ROWS + tl.arange(0, ROWS)
    inside = row < HEIGHT
    column = tl.arange(0, _BLOCK)[None, :]
    start = out + tl.load(unit_G + group).to(tl.int64) * CHUNK
    place = symbol_T + (group * HEIGHT + row)[:, None] * _BLOCK + column
    symbol = tl.load(place, mask=inside[:, None], other=0).to(tl.int32)
    for plane in tl.static_range(PLANES):
        block = plane * HEIGHT + row
        scale = tl.load(scale_B + group * BLOCKS + block, mask=inside, other=0.0)
        digit = (symbol >> (BITS * plane)) & ((1 << BITS) - 1)
        value = tl.load(book_G + group * 16 + digit) * scale[:, None]
        target = start + block[:, None] * _BLOCK + column
        if ADD:
            value = tl.load(target, mask=inside[:, None], other=0.0) + value
        tl.store(target, value, mask=inside[:, None])


# ── entropy coding ───────────────────────────────────────────────────────────────────────────
@_jit
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


@_jit
def _keep(
    literal: tl.tensor, kept: tl.tensor, entry: tl.tensor, symbol: tl.tensor, inside: tl.tensor
) -> Any:
    """A symbol without a code goes to the literals."""
    rare = (entry & 0x40) != 0
    tl.store(literal + kept, symbol.to(tl.int16), mask=rare & inside)
    return kept + rare.to(tl.int32)


@_jit
def _encode_kernel(
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


@_jit
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


@_jit
def _join_kernel(
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


@_jit
def _read16(place: tl.tensor, mask: tl.tensor) -> Any:
    """A little-endian u16 at any address."""
    low = tl.load(place, mask=mask, other=0).to(tl.int32)
    return low | (tl.load(place + 1, mask=mask, other=0).to(tl.int32) << 8)


@_jit
def _report(fault: tl.tensor, found: tl.tensor) -> None:
    """`found`: 16 * chunk + what is wrong with it; the first chunk's is kept."""
    if found < _GOOD:
        tl.atomic_min(fault, found)


@_jit
def _next_word(word: tl.tensor, at: tl.tensor, words: tl.tensor, inside: tl.tensor) -> Any:
    """Zero beyond the upload."""
    piece = tl.load(word + at, mask=inside & (at < words), other=0)
    return piece.to(tl.uint32, bitcast=True).to(tl.uint64)


@_jit
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


@_jit
def _decode_kernel(
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


@_jit
def _check_kernel(
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
    scale = tl.where(live, _power(tl.where(live, peak - down, 0)) * weight, 0.0)
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


# ── encoding ─────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class Coded:
    """Bodies of frames on the device, with room for a header before each."""

    packed: torch.Tensor
    start_U: torch.Tensor
    """Where each body starts in `packed`."""
    info_U: torch.Tensor
    """Peak, table, cost of the sample, bytes; then the sample's counts of eight magnitudes."""


def encode_many(codec: Ecsq, x_N: torch.Tensor, *, chunk: int = CHUNK_VALUES) -> list[bytes]:
    """What `codec.encode_many` would give for these values (N,): a frame for every `chunk` of them.

    `chunk` is `CHUNK_VALUES` for everything that others should read; tests take smaller ones.

    Raises:
        EncodeError: a value is NaN, infinite or beyond `VALUE_ABS_MAX`; says which.
        ValueError: not a contiguous float32 vector on a GPU.
    """
    _require(x_N, chunk)
    frames: list[bytes] = []
    whole = len(x_N) // chunk
    for first in range(0, whole, _SLAB):
        units = min(_SLAB, whole - first)
        piece = x_N[first * chunk : (first + units) * chunk]
        frames += _frames_of(codec, code(codec, piece, chunk=chunk), piece, first * chunk, chunk)
    if whole * chunk < len(x_N):
        frames.append(_encode_on_host(codec, x_N[whole * chunk :], whole * chunk))
    return frames


def code(codec: Ecsq, x_N: torch.Tensor, *, chunk: int = CHUNK_VALUES) -> Coded:
    """The device's part of `encode_many`, without waiting for it: whole chunks, at most 1024.

    A chunk that must be refused (its peak says so) has a body of nonsense.
    """
    bits = codec.bits
    blocks, units = chunk // plain.BLOCK, len(x_N) // chunk
    length = chunk // plain.planes_of(bits)
    streams, each = plain.streams_of(length), plain.symbols_each(length)
    side = 2 + 2 * plain.top_of(bits) + blocks
    pitch = (each * LENGTH_MAX + 31) // 32
    most = side + 2 * streams + 2 + 4 * pitch * streams + 2 * length
    constants = _constants(bits, x_N.device)
    tables = len(constants.cost_TL)
    empty = partial(torch.empty, device=x_N.device)
    step_B = empty(units * blocks, dtype=torch.int32)
    inverse_B = empty(units * blocks, dtype=torch.float32)
    side_U = empty(units * side, dtype=torch.uint8)
    info_U = torch.zeros((units, _INFO), dtype=torch.int32, device=x_N.device)
    symbol_T = empty(units * length, dtype=torch.int16)
    word_S = empty(units * streams * pitch, dtype=torch.int32)
    bits_S = empty(units * streams, dtype=torch.int32)
    literals_S = empty(units * streams, dtype=torch.int32)
    packed = empty(units * (HEADER.size + most), dtype=torch.uint8)
    with torch.cuda.device_of(x_N):  # type: ignore[no-untyped-call]
        _scale_kernel[(triton.cdiv(units * blocks, _SUM_ROWS),)](
            x_N, step_B, units, float(codec.square / np.float32(plain.BLOCK)), float(codec.reach),
            blocks, _SUM_ROWS, num_warps=4, **_PRECISE,
        )  # fmt: skip
        _describe_kernel[(units,)](
            x_N, step_B, constants.cost_TL, inverse_B, side_U, info_U, chunk, bits,
            tables, triton.next_power_of_2(tables), triton.next_power_of_2(blocks),
            triton.next_power_of_2(-(-blocks // plain.SAMPLE)), _INFO, num_warps=8, **_PRECISE,
        )  # fmt: skip
        _quantise_kernel[(units * triton.cdiv(length // plain.BLOCK, _ROWS),)](
            x_N, inverse_B, symbol_T, chunk, bits, _ROWS, num_warps=4, **_PRECISE
        )
        _encode_kernel[(triton.cdiv(units * streams, _LANES),)](
            symbol_T.view(torch.int64), symbol_T, constants.entry_TS, info_U, word_S, bits_S,
            literals_S, units, each, streams, pitch, _INFO, _LANES, num_warps=1, **_PRECISE,
        )  # fmt: skip
        bytes_US = (bits_S.view(units, streams) + 7) >> 3
        literal_bytes_U = (literals_S.view(units, streams).sum(1) * 3 + 1) >> 1
        size_U = bytes_US.sum(1) + literal_bytes_U + (side + 2 * streams + 2)
        start_U = (size_U + HEADER.size).cumsum(0) - size_U
        info_U[:, 3] = size_U
        _join_kernel[(units * (streams + 1),)](
            side_U, word_S.view(torch.uint8), bits_S, symbol_T, literals_S, start_U, packed,
            side, triton.next_power_of_2(side), each, streams, pitch, 256, num_warps=4, **_PRECISE,
        )  # fmt: skip
    return Coded(packed, start_U, info_U)


def _frames_of(codec: Ecsq, coded: Coded, x_N: torch.Tensor, first: int, chunk: int) -> list[bytes]:
    """Headers and checksums; unusual chunks coded anew by the host. `first`: of x_N's values."""
    info_U = coded.info_U.cpu().numpy()
    refused_U = np.flatnonzero(info_U[:, 0] == plain.REFUSED)
    if len(refused_U):
        at = int(refused_U[0]) * chunk
        error = refuse_values(x_N[at : at + chunk].cpu().numpy())
        raise EncodeError(first + at + error.index, error.value)
    stop_U = np.cumsum(info_U[:, 3].astype(np.int64) + HEADER.size)
    data = torch.empty(int(stop_U[-1]), dtype=torch.uint8, pin_memory=x_N.is_cuda)
    data.copy_(coded.packed[: len(data)])
    array = data.numpy()
    chosen_U = np.stack([info_U[:, 3], info_U[:, 1], info_U[:, 2]], 1).astype(np.int64)
    own_U = codec.wants_own(info_U[:, 4:].astype(np.int64), chosen_U)
    most = codec.bytes_max(chunk)
    frames = []
    for unit, stop in enumerate(stop_U):
        peak, table, _, size = (int(v) for v in info_U[unit, :4])
        if peak == plain.NO_SCALE:
            frames.append(codec.zero_frame(chunk))
        elif own_U[unit] or HEADER.size + size >= most:
            at = unit * chunk
            frames.append(_encode_on_host(codec, x_N[at : at + chunk], first + at))
        else:
            frame = bytes(seal(
                array[int(stop) - size - HEADER.size :], size, CODEC_ID, FIXED, chunk,
                codec.parameter, bits=codec.bits, table=table,
            ))  # fmt: skip
            frames.append(frame)
    return frames


def _encode_on_host(codec: Ecsq, x_N: torch.Tensor, at: int) -> bytes:
    """One chunk whose first value is the `at`-th of all."""
    try:
        return codec.encode(x_N.cpu().numpy())
    except EncodeError as error:
        raise EncodeError(at + error.index, error.value) from None


# ── decoding ─────────────────────────────────────────────────────────────────────────────────
def decode_many(
    payloads: Sequence[Payload], out_N: torch.Tensor, *, chunk: int = CHUNK_VALUES
) -> None:
    """The frames of `encode_many` into `out_N` (N,), bit for bit as the CPU reads them.

    Returns when they are known to be good; the device may still be writing, in order with whatever
    is asked of it next. On an error `out_N` is untouched.

    Raises:
        DecodeError: one is not an intact frame of its chunk.
        ValueError: not a contiguous float32 vector on a GPU.
    """
    _require(out_N, chunk)
    Received(payloads, out_N, chunk=chunk).write(out_N, add=False)


def accumulate(
    payloads: Sequence[Payload], weight: float, acc_N: torch.Tensor, *, chunk: int = CHUNK_VALUES
) -> None:
    """acc_N += weight * the frames' values, bit for bit as the CPU adds them.

    `weight` is rounded to float32 and is the caller's to check. On an error `acc_N` is untouched;
    otherwise as `decode_many`. Needs 0.7 to 1.3 bytes of the device's memory per value meanwhile.

    Raises:
        DecodeError: one is not an intact frame of its chunk.
        ValueError: not a contiguous float32 vector on a GPU.
    """
    _require(acc_N, chunk)
    Received(payloads, acc_N, np.float32(weight), chunk=chunk).write(acc_N, add=True)


class Received:
    """Frames for a vector like `like_N`: headers checked, unusual ones decoded, others uploaded.

    `decode`, `check`, `expand` are what the device does, for those who measure it.
    """

    def __init__(
        self,
        payloads: Sequence[Payload],
        like_N: torch.Tensor,
        weight: np.float32 = np.float32(1),  # noqa: B008
        *,
        chunk: int = CHUNK_VALUES,
    ) -> None:
        """
        Raises:
            DecodeError: one is not an intact frame of its chunk, as far as the host can see.
        """
        if len(payloads) != -(-len(like_N) // chunk):
            raise DecodeError(f"{len(payloads)} frames for {len(like_N)} values")
        self._chunk = chunk
        self._zero_U: list[int] = []
        self._odd_U: list[tuple[int, torch.Tensor]] = []
        found: dict[int, _Group] = {}
        size = sum(map(len, payloads))
        host = torch.empty((size + 11) // 8 * 8, dtype=torch.uint8, pin_memory=like_N.is_cuda)
        array = host.numpy()
        place = 0
        for unit, payload in enumerate(payloads):
            numel = min(chunk, len(like_N) - unit * chunk)
            frame = Frame.parse(payload, CODEC_ID, numel)
            if frame.mode == ZERO:
                if len(frame.body) or frame.table:
                    raise DecodeError("a zero frame with a body")
                self._zero_U.append(unit)
            elif numel == chunk and frame.mode in (FIXED, OWN) and frame.bits in _WIDTHS:
                if frame.bits not in found:
                    found[frame.bits] = _Group(frame.bits, chunk)
                found[frame.bits].add(unit, frame, place)
                array[place : place + len(frame.body)] = np.frombuffer(frame.body, np.uint8)
                place += len(frame.body)
            else:
                self._odd_U.append((unit, _decode_on_host(payload, numel, weight)))
        array[place:] = 0
        data = host[: (place + 11) // 8 * 8].to(like_N.device, non_blocking=True)
        self._staged = [group.upload(data) for group in found.values()]
        self._weight = float(weight)

    def decode(self) -> None:
        """Symbols, scales and codebooks of all frames; starts it and doesn't wait."""
        for staged in self._staged:
            staged.decode(self._weight)

    def check(self) -> None:
        """Wait for `decode`.

        Raises:
            DecodeError: a frame is not what an encoder sends.
        """
        for staged in self._staged:
            staged.check()

    def expand(self, out_N: torch.Tensor, *, add: bool) -> None:
        """The values, written or added."""
        for staged in self._staged:
            staged.expand(out_N, add=add)

    def write(self, out_N: torch.Tensor, *, add: bool) -> None:
        """All of it, to a vector like the one it was made for. On an error it is untouched.

        Raises:
            DecodeError: a frame is not what an encoder sends.
        """
        with torch.cuda.device_of(out_N):  # type: ignore[no-untyped-call]
            self.decode()
            self.check()
            self.expand(out_N, add=add)
            for unit, value_N in self._odd_U:
                piece = out_N[unit * self._chunk :][: len(value_N)]
                if add:
                    piece += value_N.to(out_N.device)
                else:
                    piece.copy_(value_N)
            for unit in self._zero_U:
                if not add:
                    out_N[unit * self._chunk :][: self._chunk].zero_()


def _decode_on_host(payload: Payload, numel: int, weight: np.float32) -> torch.Tensor:
    """The weighted values of a frame of any mode."""
    value_N = np.empty(numel, np.float32)
    start_U, stop_U = np.array([0]), np.array([len(payload)])
    _ANY.decode_packed(payload, start_U, stop_U, value_N, weight)
    return torch.from_numpy(value_N)


class _Group:
    """Frames of one width: where in the upload each body, its coded section and its end are."""

    def __init__(self, bits: int, chunk: int) -> None:
        self.bits = bits
        self.chunk = chunk
        self._place: list[tuple[int, int, int]] = []
        self._which: list[tuple[int, int]] = []
        self._own: dict[bytes, int] = {}
        self._tables = list(shipped_tables(bits).tables)

    def add(self, unit: int, frame: Frame, place: int) -> None:
        """
        Raises:
            DecodeError: its code table is not known, or its body is too short to hold anything.
        """
        top = plain.top_of(self.bits)
        side = 2 + 2 * top + plain.blocks_of(self.chunk)
        table, start = frame.table, 0
        if frame.mode == OWN:
            start = top + 1
            shown = bytes(frame.body[:start])
            if table or len(shown) < start:
                raise DecodeError("a code table that is not complete")
            if shown not in self._own:
                self._own[shown] = len(self._tables)
                self._tables.append(level_table(self.bits, shown_weights(shown)))
            table = self._own[shown]
        elif table >= len(shipped_tables(self.bits).tables):
            raise DecodeError(f"table {table} is not known")
        streams = plain.streams_of(self.chunk // plain.planes_of(self.bits))
        if len(frame.body) < start + side + 2 * streams + 2:
            raise DecodeError(plain.FAULTS[1])
        body = place + start
        self._place.append((body, body + side, place + len(frame.body)))
        self._which.append((unit, table))

    def upload(self, data: torch.Tensor) -> _Staged:
        device = data.device
        place = torch.from_numpy(np.array(self._place, np.int64).T.copy()).to(device)
        which = torch.from_numpy(np.array(self._which, np.int32).T.copy()).to(device)
        lookup_TW = _constants(self.bits, device).lookup_TW
        if self._own:
            own = self._tables[-len(self._own) :]
            lookup_TW = torch.cat([lookup_TW, _lookups(own).to(device)])
        return _Staged(self.bits, self.chunk, data, place, which, lookup_TW)


class _Staged:
    """Bodies of one width on the device, and what they decode to."""

    def __init__(
        self, bits: int, chunk: int, data: torch.Tensor, place: torch.Tensor, which: torch.Tensor,
        lookup_TW: torch.Tensor,
    ) -> None:  # fmt: skip
        self._bits, self._chunk = bits, chunk
        self._length = chunk // plain.planes_of(bits)
        self._data = data
        self._body_G, self._section_G, self._stop_G = place
        self._unit_G, self._table_G = which
        self._lookup_TW = lookup_TW
        self._units = len(self._unit_G)
        empty = partial(torch.empty, device=data.device)
        self._symbol_T = empty(self._units * self._length, dtype=torch.int16)
        self._book_G = empty(self._units * 16, dtype=torch.float32)
        self._scale_B = empty(self._units * (chunk // plain.BLOCK), dtype=torch.float32)
        self._fault = torch.full((1,), _NO_FAULT, dtype=torch.int32, device=data.device)

    def decode(self, weight: float) -> None:
        streams, each = plain.streams_of(self._length), plain.symbols_each(self._length)
        _decode_kernel[(triton.cdiv(self._units * streams, _LANES),)](
            self._data, self._data.view(torch.int32), self._section_G, self._stop_G, self._table_G,
            self._unit_G, self._lookup_TW, self._symbol_T.view(torch.int64), self._fault,
            self._units, len(self._data) // 4, each, streams, _LANES, num_warps=1, **_PRECISE,
        )  # fmt: skip
        _check_kernel[(self._units,)](
            self._data, self._body_G, self._section_G, self._stop_G, self._unit_G, self._symbol_T,
            self._book_G, self._scale_B, weight, self._fault, self._chunk, self._bits, streams,
            triton.next_power_of_2(self._chunk // plain.BLOCK), 2048, num_warps=4, **_PRECISE,
        )  # fmt: skip

    def check(self) -> None:
        fault = int(self._fault.item())
        if fault != _NO_FAULT:
            raise DecodeError(plain.FAULTS[fault % 16])

    def expand(self, out_N: torch.Tensor, *, add: bool) -> None:
        tiles = triton.cdiv(self._length // plain.BLOCK, _ROWS)
        _expand_kernel[(self._units * tiles,)](
            self._symbol_T, self._book_G, self._scale_B, self._unit_G, out_N, add, self._chunk,
            self._bits, _ROWS, num_warps=4, **_PRECISE,
        )  # fmt: skip


# ── what both need ───────────────────────────────────────────────────────────────────────────
_ANY: Final = Ecsq(1.0)  # reads the frames of all


@dataclass(frozen=True, slots=True)
class _Constants:
    """The shipped tables of one width, on one device."""

    cost_TL: torch.Tensor
    entry_TS: torch.Tensor
    lookup_TW: torch.Tensor


@lru_cache(maxsize=24)
def _constants(bits: int, device: torch.device) -> _Constants:
    shipped = shipped_tables(bits)
    return _Constants(
        torch.from_numpy(shipped.cost_TL.astype(np.int32)).to(device),
        torch.from_numpy(shipped.entry_TS.astype(np.int32)).to(device),
        _lookups(shipped.tables).to(device),
    )


def _lookups(tables: Sequence[Table]) -> torch.Tensor:
    """(tables, 8192)"""
    lookup_TW: npt.NDArray[np.uint16] = np.stack([table.lookup_W for table in tables])
    return torch.from_numpy(lookup_TW.view(np.int16))


def _require(x_N: torch.Tensor, chunk: int) -> None:
    """Refuse what our own caller must not pass."""
    if x_N.dtype != torch.float32 or x_N.ndim != 1 or not x_N.is_contiguous():
        raise ValueError(
            f"need a contiguous float32 vector, got {x_N.dtype} {tuple(x_N.shape)} "
            f"with strides {x_N.stride()}"
        )
    if not x_N.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(f"need a vector on a GPU, got one on {x_N.device}; Ecsq codes those")
    if not 0 < chunk <= CHUNK_VALUES or chunk % CHUNK_STEP:
        raise ValueError(f"chunks of {chunk} values; need a multiple of {CHUNK_STEP}")
