"""The compiled loops of the 8-bit codec: one level from -127 to 127 per value."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import types

from tensorcodecs.jit import entry, readable
from tensorcodecs.stream_kernels import write_symbols
from tensorcodecs.vector import address_of, bits_float

_U: Final = np.uint64
_F: Final = np.float32
_BLOCK: Final = 256
_F32, _I8, _U8, _U16 = types.float32, types.int8, types.uint8, types.uint16
_U32, _I32, _I64, _BOOL = types.uint32, types.int32, types.int64, types.boolean


@entry(_BOOL(readable(_F32), readable(_I32), _I64, _F32[::1], _I8[::1]))
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
            for i in range(levels.size):
                levels[i] = np.int8(0)
            continue
        peak = bits_float(np.uint32(top))
        scale_B[index] = peak / _F(127)
        inverse = _F(127) / peak
        for i in range(values.size):
            levels[i] = np.int8(np.int32(np.rint(values[i] * inverse)))
    return True


@entry(types.void(readable(_I8), _I64, readable(_F32), _F32[::1], _BOOL))
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


@entry(types.void(readable(_I8), _I64, _I64[::1]))
def count_bytes(level_N: Any, every: int, count_S: Any) -> None:
    """How often each level + 127 occurs in every `every`-th run of 256."""
    for start in range(0, level_N.size, every * _BLOCK):
        for i in range(start, min(level_N.size, start + _BLOCK)):
            count_S[np.int64(level_N[i]) + 127] += 1


@entry(_I64(readable(_I8), readable(_U32), _U8[::1], _I64, _U16[::1]))
def encode_bytes(level_N: Any, entry_S: Any, out: Any, start: int, room: Any) -> int:
    """Levels as a coded section at out[start:]; where it ends. `room` is for as many symbols."""
    symbols = room[: level_N.size]
    for i in range(symbols.size):
        symbols[i] = np.uint16(np.int32(level_N[i]) + np.int32(127))
    literal = np.empty(4, np.uint16)
    ahead = np.int64(address_of(level_N, _U(level_N.size)))
    return write_symbols(symbols, entry_S, out, start, literal, ahead, np.int64(1))


@entry(_BOOL(readable(_U16), _I8[::1]))
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
