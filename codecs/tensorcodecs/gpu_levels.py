"""The two-level codec's Triton kernels between values and levels: scales, codebooks, symbols.

Everything runs over contiguous values. Floats are multiplied and added exactly as on the CPU: sums
in the order of `vector.sum_of_squares`, nothing fused.

Shape suffixes: U = chunks, G = received chunks of one width, B = blocks of 256, T = symbols (or
tables), L = magnitudes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

from tensorcodecs import plain

if TYPE_CHECKING:
    from collections.abc import Callable

_BLOCK = tl.constexpr(plain.BLOCK)
_SAMPLE = tl.constexpr(plain.SAMPLE)
_UNIT = tl.constexpr(plain.UNIT)
_NO_SCALE = tl.constexpr(plain.NO_SCALE)
_REFUSED = tl.constexpr(plain.REFUSED)
_ZERO_CODE = tl.constexpr(plain.ZERO_CODE)
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


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, which has no types. How many chunks there are makes no other program."""
    return triton.jit(function, do_not_specialize=["units", "words"])


# ── scales ───────────────────────────────────────────────────────────────────────────────────
@jit
def _quarters(square: tl.tensor) -> Any:
    bits = square.to(tl.int32, bitcast=True)
    mantissa = bits & 0x7FFFFF
    upper = (mantissa >= _QUARTER).to(tl.int32) + (mantissa >= _THREE_QUARTERS).to(tl.int32)
    return 2 * ((bits >> 23) - 127) + upper


@jit
def _widest(total: tl.tensor, share: tl.tensor, peak: tl.tensor, reach: tl.tensor) -> Any:
    return tl.maximum(_quarters(total * share), _quarters(peak * peak * reach))


@jit
def power(quarters: tl.tensor) -> Any:
    """2 ** (quarters / 4), for normal results."""
    part = quarters & 3
    step = tl.where(part == 1, _STEP_1, tl.where(part == 2, _STEP_2, _STEP_3))
    step = tl.where(part == 0, 1.0, step)
    return step * (((quarters >> 2) + 127) << 23).to(tl.float32, bitcast=True)


@jit
def _inverse_power(quarters: tl.tensor) -> Any:
    """2 ** (-quarters / 4), for normal results."""
    part = quarters & 3
    step = tl.where(part == 1, _INVERSE_1, tl.where(part == 2, _INVERSE_2, _INVERSE_3))
    step = tl.where(part == 0, 1.0, step)
    return step * ((127 - (quarters >> 2)) << 23).to(tl.float32, bitcast=True)


@jit
def _inverses(step: tl.tensor) -> Any:
    """1 / step of blocks that have one, else 0."""
    live = (step > _NO_SCALE) & (step < _REFUSED)
    return tl.where(live, _inverse_power(tl.where(live, step, 0)), 0.0)


@jit
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


@jit
def scale_kernel(
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


@jit
def describe_kernel(
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
@jit
def quantise_kernel(
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


@jit
def expand_kernel(
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
