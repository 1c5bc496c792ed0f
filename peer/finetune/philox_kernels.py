"""Perturbations on the CPU, compiled: Philox4x32-10 in tiles, and values added as they come.

Philox is computed for a tile of counters at a time, each of its words in an array of its own, which
LLVM turns into vector instructions; then the tile's values are read off. Floats are multiplied
and added one by one, nothing fused: the same bits as `perturb`'s other ways.

Shape suffixes: J = seeds, N = values, T = counters in a tile.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import types

from tensorcodecs.jit import entry, inner, readable

_M0: Final = np.uint64(0xD2511F53)
_M1: Final = np.uint64(0xCD9E8D57)
_W0: Final = np.uint64(0x9E3779B9)
_W1: Final = np.uint64(0xBB67AE85)
_LOW: Final = np.uint64(0xFFFFFFFF)
_32: Final = np.uint64(32)
_ROUNDS: Final = 10
_TILE: Final = 256  # counters: their words and their 2048 values stay in the innermost cache
_SIGN: Final = np.uint32(0x80000000)
_ONE: Final = np.uint32(0x3F800000)


@inner
def _tile(first: Any, seed: Any, tag: Any, words_4T: Any) -> None:
    """The four words of counters first, first + 1, ...; key = seed, upper counter half = tag."""
    tag0, tag1 = tag & _LOW, tag >> _32
    for t in range(_TILE):
        counter = first + np.uint64(t)
        c0, c1 = counter & _LOW, counter >> _32
        c2, c3 = tag0, tag1
        k0, k1 = seed & _LOW, seed >> _32
        for _ in range(_ROUNDS):
            p0, p1 = _M0 * c0, _M1 * c2
            c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _32) ^ c3 ^ k1, p0 & _LOW
            k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
        words_4T[0, t] = np.uint32(c0)
        words_4T[1, t] = np.uint32(c1)
        words_4T[2, t] = np.uint32(c2)
        words_4T[3, t] = np.uint32(c3)


@entry(
    types.void(
        readable(types.uint64), readable(types.float32), types.uint64, types.uint64,
        readable(types.float32), types.float32[::1],
    )
)  # fmt: skip
def gaussian(seeds_J: Any, factors_J: Any, tag: Any, start: Any, table: Any, out_N: Any) -> None:
    """out_N += sum over j of factor_j * z_j, in this order, for values start, start + 1, ..."""
    words = np.empty((4, _TILE), np.uint32)
    tile = np.empty(_TILE * 8, np.float32)
    count: Any = np.int64(len(out_N))
    skip: Any = np.int64(start & np.uint64(7))
    counter = start >> np.uint64(3)
    at = -skip  # of the tile's first value in `out_N`
    while at < count:
        low, high = max(-at, 0), min(count - at, _TILE * 8)
        for v in range(_TILE * 8):
            tile[v] = 0.0
        tile[low:high] = out_N[at + low : at + high]
        for j in range(len(seeds_J)):
            factor = factors_J[j]
            _tile(counter, seeds_J[j], tag, words)
            for t in range(_TILE):
                for lane in range(4):
                    word = words[lane, t]
                    tile[8 * t + 2 * lane] += factor * table[word & np.uint32(0xFFFF)]
                    tile[8 * t + 2 * lane + 1] += factor * table[word >> np.uint32(16)]
        out_N[at + low : at + high] = tile[low:high]
        at += _TILE * 8
        counter += np.uint64(_TILE)


@entry(
    types.void(
        readable(types.uint64), readable(types.float32), types.uint64, types.uint64,
        types.float32[::1],
    )
)  # fmt: skip
def rademacher(seeds_J: Any, factors_J: Any, tag: Any, start: Any, out_N: Any) -> None:
    """The same with z = +1 or -1, a bit each: 1 is -1."""
    words = np.empty((4, _TILE), np.uint32)
    tile = np.empty(_TILE * 128, np.float32)
    count: Any = np.int64(len(out_N))
    skip: Any = np.int64(start & np.uint64(127))
    counter = start >> np.uint64(7)
    at = -skip
    while at < count:
        low, high = max(-at, 0), min(count - at, _TILE * 128)
        tile[low:high] = out_N[at + low : at + high]
        for j in range(len(seeds_J)):
            factor = factors_J[j]
            _tile(counter, seeds_J[j], tag, words)
            for t in range(low // 128, (high + 127) // 128):
                for lane in range(4):
                    word = words[lane, t]
                    for bit in range(32):
                        sign = 1.0 - np.float32((word >> np.uint32(bit)) & np.uint32(1)) * 2.0
                        tile[128 * t + 32 * lane + bit] += factor * np.float32(sign)
        out_N[at + low : at + high] = tile[low:high]
        at += _TILE * 128
        counter += np.uint64(_TILE)


@entry(types.void(types.uint64, types.uint64, types.uint64, types.int32[::1]))
def halves(seed: Any, tag: Any, start: Any, out_N: Any) -> None:
    """The sixteen random bits of values start, start + 1, ... as integers."""
    words = np.empty((4, _TILE), np.uint32)
    count: Any = np.int64(len(out_N))
    counter = start >> np.uint64(3)
    at: Any = -np.int64(start & np.uint64(7))
    while at < count:
        _tile(counter, seed, tag, words)
        for v in range(max(-at, 0), min(count - at, _TILE * 8)):
            word = words[(v & 7) >> 1, v >> 3]
            out_N[at + v] = np.int32((word >> np.uint32(16 * (v & 1))) & np.uint32(0xFFFF))
        at += _TILE * 8
        counter += np.uint64(_TILE)
