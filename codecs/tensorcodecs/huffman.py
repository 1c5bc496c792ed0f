"""Length-limited canonical Huffman tables over symbols of up to twelve bits.

A symbol packs several low-bit levels (three of 4 bits, four of 3, six of 2) or one byte. Symbols
too rare for a code of their own go by `ESCAPE` and travel as literals. Tables are a pure function
of a few integers (the weights of the levels' magnitudes, or the lengths of byte symbols), so both
sides build the same one and only those integers travel: nothing at all for the shipped tables.

Lengths: package-merge (Larmore and Hirschberg, "A fast algorithm for optimal length-limited
Huffman codes", JACM 1990), in integers. Codes: canonical, in the order (length, symbol), written
with the lowest bit first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from tensorcodecs.backend import kernels
from tensorcodecs.errors import DecodeError

if TYPE_CHECKING:
    from collections.abc import Sequence

LENGTH_MAX: Final = 13
"""Of a code. Twelve would cost 0.4 % more bits on packed triples of levels, measured."""
SYMBOLS: Final = 4096
ESCAPE: Final = SYMBOLS - 1
"""Stands for a symbol without a code. No packing of levels gives it."""
_BYTES: Final = 256
_RARE: Final = 15  # log2 of how rare a symbol without a code is; 13 to 16 were measured
_FLAG: Final = 0x40  # in an encoder's entry: a literal follows at the chunk's end
_PACKAGE_MAX: Final = 2**61
_TABLES_KEPT: Final = 64  # strangers choose tables; each takes 53 KiB

LOOKUP: Final = np.uint16
"""What a decoder's table consists of."""

Weights = tuple[int, ...]
"""Of a level's magnitude 0, and of each magnitude above it with either sign."""


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Both directions of one code."""

    length_S: npt.NDArray[np.uint8]
    """(4096,): bits of each symbol's code; 0: it has none."""
    entry_S: npt.NDArray[np.uint32]
    """(4096,) for encoders: code << 9 | 0x40 if it is an escape | length."""
    lookup_W: npt.NDArray[np.uint16]
    """(8192,) for decoders: the next 13 bits -> symbol << 4 | length. In 16 bits each it
    takes a third of a core's first cache; in 32 it took two."""


def package_merge(weights: npt.NDArray[np.int64], limit: int) -> npt.NDArray[np.uint8]:
    """Optimal code lengths of at most `limit` for positive weights in ascending order (n >= 2).

    No weight exceeds 2**61. Sums that do are cut to it: they stay above every single weight, in
    any order among themselves, so nothing else changes; but int64 holds them.
    """
    compiled = kernels()
    if compiled is not None:
        fast: npt.NDArray[np.uint8] = compiled.package_merge(weights, limit)
        return fast
    count = len(weights)
    leaf = np.ones(count, bool)
    packages = np.empty(0, np.int64)
    rows = []
    for _ in range(limit):
        merged = np.concatenate([weights, packages])
        is_leaf = np.concatenate([leaf, np.zeros(len(packages), bool)])
        order = np.argsort(merged, kind="stable")
        merged = merged[order]
        rows.append(is_leaf[order])
        pairs = len(merged) // 2 * 2
        packages = np.minimum(merged[0:pairs:2] + merged[1:pairs:2], _PACKAGE_MAX)
    lengths = np.zeros(count, np.uint8)
    needed = 2 * count - 2
    for row in reversed(rows):
        leaves = int(row[:needed].sum())
        lengths[:leaves] += 1
        needed = 2 * (needed - leaves)
    return lengths


def table_of(lengths: npt.NDArray[np.uint8]) -> Table:
    """The canonical code with these lengths per symbol (0: none).

    Raises:
        DecodeError: a length beyond LENGTH_MAX, or lengths that no complete code has.
    """
    used = np.flatnonzero(lengths)
    if not len(used) or int(lengths.max()) > LENGTH_MAX:
        raise DecodeError("a code table with a length that is not allowed")
    size_U = lengths[used].astype(np.int64)
    if int((1 << (LENGTH_MAX - size_U)).sum()) != 1 << LENGTH_MAX:
        raise DecodeError("a code table whose lengths break Kraft's equality")
    order = np.argsort(size_U, kind="stable")
    symbol_U, size_U = used[order], size_U[order]
    span_U = 1 << (LENGTH_MAX - size_U)
    start_U = np.cumsum(span_U) - span_U  # of each code, as the top of 13 bits
    lookup = np.repeat((symbol_U << 4 | size_U).astype(np.uint16), span_U)
    reversed_W = _reversed_bits()
    lookup_W = np.empty_like(lookup)
    lookup_W[reversed_W] = lookup
    entry_S = np.zeros(SYMBOLS, np.uint32)
    code_U = reversed_W[start_U]  # low bits first: the unused low bits of the start are zero
    entry_S[symbol_U] = (code_U << 9 | size_U).astype(np.uint32)
    if lengths[ESCAPE]:
        entry_S[lengths == 0] = entry_S[ESCAPE] | _FLAG
    return Table(lengths.copy(), entry_S, lookup_W)


@lru_cache(maxsize=1)
def _reversed_bits() -> npt.NDArray[np.int64]:
    value = np.arange(1 << LENGTH_MAX, dtype=np.int64)
    result = np.zeros_like(value)
    for bit in range(LENGTH_MAX):
        result |= (value >> bit & 1) << (LENGTH_MAX - 1 - bit)
    return result


@lru_cache(maxsize=_TABLES_KEPT)
def level_table(bits: int, weights: Weights) -> Table:
    """The code for 12 // bits packed levels, each drawn independently.

    `weights` (2**(bits-1) positive integers below 2**16): of magnitude 0, and of each magnitude
    above it with either sign. A symbol rarer than 2**-15 goes by the escape.
    """
    count = 12 // bits
    top = len(weights) - 1
    room = 60 // count
    total = weights[0] + 2 * sum(weights[1:])
    scaled = [max(1, (weight << room) // total) for weight in weights]
    level = np.zeros(1 << bits, np.int64)
    for symbol in range(2 * top + 1):
        level[symbol] = scaled[abs(symbol - top)]
    product = np.ones(1, np.int64)
    for _ in range(count):
        product = np.multiply.outer(level, product).reshape(-1)
    rare = product < int(product.sum()) >> _RARE
    escaped = max(1, int(product[rare].sum()))
    product[rare] = 0
    product[ESCAPE] = escaped
    used = np.flatnonzero(product)
    order = used[np.argsort(product[used], kind="stable")]
    lengths = np.zeros(SYMBOLS, np.uint8)
    lengths[order] = package_merge(product[order], LENGTH_MAX)
    return table_of(lengths)


def byte_lengths(counts: npt.NDArray[np.int64]) -> bytes:
    """128 bytes: the code lengths, two to a byte, that suit `counts` of 256 byte symbols."""
    weights = counts + 1  # whatever was not seen can still come
    order = np.argsort(weights, kind="stable")
    lengths = np.zeros(_BYTES, np.uint8)
    lengths[order] = package_merge(weights[order], LENGTH_MAX)
    return (lengths[0::2] | lengths[1::2] << 4).tobytes()


@lru_cache(maxsize=_TABLES_KEPT)
def byte_table(packed: bytes) -> Table:
    """The code for single bytes with the lengths of `byte_lengths`.

    Raises:
        DecodeError: those are not the lengths of a complete code.
    """
    pairs = np.frombuffer(packed, np.uint8)
    lengths = np.zeros(SYMBOLS, np.uint8)
    lengths[0:_BYTES:2] = pairs & 15
    lengths[1:_BYTES:2] = pairs >> 4
    return table_of(lengths)


_EIGHTH_ROOTS: Final = (65536, 71468, 77936, 84990, 92682, 101070, 110218, 120194)  # 2**(16+i/8)
_SIXTEENTH_ROOT: Final = 68438  # 2**(16+1/16)


def shown_weights(shown: bytes) -> Weights:
    """Weights as they travel: byte b stands for 2**(15 - b / 8), at least 1."""
    weights = []
    for byte in shown:
        down = 120 - min(byte, 120)  # eighths of an octave above 1
        weights.append(max(1, _EIGHTH_ROOTS[down % 8] >> 16 - down // 8))
    return tuple(weights)


def show_weights(counts: Sequence[int]) -> bytes:
    """The nearest weights that can travel; `counts` are of both signs together."""
    halved = [2 * counts[0], *counts[1:]]
    peak = max(1, *halved) << 48
    shown = []
    for count in halved:
        down = 0
        nearly = (count << 16) * _SIXTEENTH_ROOT
        while down < 120 and nearly * _EIGHTH_ROOTS[down % 8] << down // 8 < peak:
            down += 1
        shown.append(down)
    return bytes(shown)
