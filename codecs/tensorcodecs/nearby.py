"""Values for a receiver that holds something near them: only what it can't know is sent.

Each block of K values has a step D. The sender rounds q = round(x / D) and sends q mod 2**b; the
receiver, whose own values are y, takes the integer nearest to y / D that is congruent to it. That
is q wherever |x - y| < D (2**(b-1) - 1), however large x itself is: bits are spent on the distance
between two models, not on the models. (Modulo quantisation: Moniqua, Lu & De Sa, ICML 2020; with
lattices: Davies et al., "New bounds for distributed mean estimation", ICLR 2021.) A hash of the
unreduced q tells when a receiver is too far away; then it asks again for more bits, or `fp32`.

Body: the hash (8 bytes), a float32 step per block, then q mod 2**b of all values in b bits each,
least significant first. Not in the table of codecs: nobody can decode it alone.

Shape suffixes: N = values, B = blocks, G = groups of W values
that are packed together.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

from tensorcodecs.errors import DecodeError
from tensorcodecs.frame import (
    HEADER,
    RAW,
    VALUE_ABS_MAX,
    Float32,
    Frame,
    Payload,
    assemble,
    refuse_values,
    require_vector,
)
from tensorcodecs.layout import CHUNK_VALUES

CODEC_ID: Final = 6
BLOCK_VALUES: Final = 4096
BITS_MIN: Final = 4
BITS_MAX: Final = 16

STEP_MIN: Final = 2.0**-100
STEP_MAX: Final = 2.0**64

SPREADS: Final = 16.0
"""A block's range (2**b steps) in root mean squares of the expected distance: of a normal one, one
value in 1e15 lies beyond half of it; sparse blocks have heavier tails, and heal by asking again."""

_WHOLE_BITS: Final = 50  # q stays an exact integer in a float64, with room for y's own
_ACCEPTED_MAX: Final = 64 * VALUE_ABS_MAX  # as other readers: no weighted sum can overflow
_BLOCK_MIN: Final = 64
_HASH: Final = struct.Struct("<Q")
_Int64 = npt.NDArray[np.int64]
_Float64 = npt.NDArray[np.float64]


class TooFarError(DecodeError):
    """The frame is whole, but the receiver's own values are not near enough to decode it."""


def steps_for(
    typical_N: Float32, ratio: float, *, bits: int = 8, block: int = BLOCK_VALUES
) -> Float32:
    """Steps (B,) such that a distance of `ratio` times the root mean square of `typical_N`, block
    by block, is decoded in all but freak cases. What is typical is the caller's to know."""
    numel = len(typical_N)
    spread_B = np.empty(-(-numel // block), np.float64)
    for index in range(len(spread_B)):
        piece = typical_N[index * block : (index + 1) * block].astype(np.float64)
        spread_B[index] = np.sqrt(np.dot(piece, piece) / len(piece))
    step_B = spread_B * (ratio * SPREADS / 2**bits)
    # A block that never moved still has neighbours that did: no step is far below the others'.
    floor = max(STEP_MIN, float(step_B.max(initial=0.0)) / 64)
    steps_B: Float32 = np.clip(step_B, floor, STEP_MAX).astype(np.float32)
    return steps_B


def bytes_max(numel: int, *, bits: int, block: int = BLOCK_VALUES) -> int:
    """The size of every frame of `numel` values."""
    return HEADER.size + _HASH.size + 4 * -(-numel // block) + -(-numel * bits // 8)


def encode_near(
    x_N: Float32, step_B: Float32, *, bits: int = 8, block: int = BLOCK_VALUES
) -> bytes:
    """`x_N` (N,) for a receiver within step * (2**(bits-1) - 1) of it. Deterministic.

    Worst error per value: step / 2 (and float32's rounding). Size: 32 + 4 B + N bits / 8 bytes.
    A step too fine for its block's largest value is widened to 2**-50 of that.

    Raises:
        EncodeError: a value is NaN, infinite or beyond `VALUE_ABS_MAX`; says which.
        ValueError: the steps, bits or block make no sense.
    """
    require_vector(x_N, CHUNK_VALUES)
    if not (_block_ok(block) and BITS_MIN <= bits <= BITS_MAX):
        raise ValueError(f"{bits} bits in blocks of {block}")
    if step_B.shape != (-(-len(x_N) // block),) or not _steps_ok(step_B):
        raise ValueError("steps that are not one sound number to a block")
    peak_B = _peaks(x_N, block)
    if not (peak_B <= VALUE_ABS_MAX).all():  # NaN is not
        raise refuse_values(x_N)
    step_B = np.maximum(step_B, peak_B * np.float32(2.0**-_WHOLE_BITS)).astype(np.float32)
    q_N = np.rint(x_N / _spread(step_B, block, len(x_N))).astype(np.int64)
    side = _HASH.pack(_hash(q_N)) + step_B.astype("<f4").tobytes()
    plane = _pack_bits(q_N & ((1 << bits) - 1), bits)
    return assemble(CODEC_ID, RAW, len(x_N), block, side, plane, bits=bits)


def decode_near(payload: Payload, near_N: Float32) -> Float32:
    """The sender's values (N,), from ours that are near them. `near_N` is only read.

    Raises:
        TooFarError: ours are too far away: ask again for more.
        DecodeError: not an intact frame of exactly N values.
    """
    require_vector(near_N, CHUNK_VALUES)
    numel = len(near_N)
    frame = Frame.parse(payload, CODEC_ID, numel)
    bits, block = frame.bits, frame.parameter
    if not BITS_MIN <= bits <= BITS_MAX or frame.table or frame.mode != RAW:
        raise DecodeError(f"{bits} bits, table {frame.table} and mode {frame.mode} make no sense")
    if not _block_ok(block):
        raise DecodeError(f"blocks of {block} values are not allowed")
    if len(frame.body) != bytes_max(numel, bits=bits, block=block) - HEADER.size:
        raise DecodeError(f"a body of {len(frame.body)} bytes for {numel} values of {bits} bits")
    blocks = -(-numel // block)
    edge = _HASH.size + 4 * blocks
    step_B = np.frombuffer(frame.body[_HASH.size : edge], "<f4").astype(np.float32, copy=False)
    if not _steps_ok(step_B):
        raise DecodeError("a step that is not one we would send")
    rest_N = _unpack_bits(frame.body[edge:], numel, bits)
    step_N = _spread(step_B, block, numel)
    near = near_N / step_N
    if not bool((np.abs(near) < 2.0 ** (_WHOLE_BITS + 2)).all()):
        raise TooFarError("our values are too large for the sender's steps")
    turns_N = np.rint((near - rest_N) / float(1 << bits)).astype(np.int64)
    q_N = rest_N + (turns_N << bits)
    if (_hash(q_N),) != _HASH.unpack(frame.body[: _HASH.size]):
        raise TooFarError("the sender's values are too far from ours")
    x_N = q_N * step_N
    if not bool((np.abs(x_N) <= _ACCEPTED_MAX).all()):
        raise DecodeError("a value beyond what anybody sends")
    return x_N.astype(np.float32)


def _block_ok(block: int) -> bool:
    return _BLOCK_MIN <= block <= 2**16 and block & (block - 1) == 0


def _steps_ok(step_B: Float32) -> bool:
    return bool(((step_B >= STEP_MIN) & (step_B <= STEP_MAX)).all())


def _peaks(x_N: Float32, block: int) -> Float32:
    """The largest magnitude of each block; NaN where there is one."""
    if len(x_N) == 0:
        return np.empty(0, np.float32)
    starts = np.arange(0, len(x_N), block)
    return np.maximum.reduceat(np.abs(x_N), starts).astype(np.float32, copy=False)


def _spread(step_B: Float32, block: int, numel: int) -> _Float64:
    """Each value's step, in float64: x / step is then the same number on every machine."""
    return np.repeat(step_B.astype(np.float64), block)[:numel]


def _hash(q_N: _Int64) -> int:
    return xxhash.xxh3_64_intdigest(q_N.astype("<i8", copy=False).data)


def _pack_bits(rest_N: _Int64, bits: int) -> bytes:
    """b bits each, least significant first."""
    if bits == 8:
        return rest_N.astype(np.uint8).tobytes()
    if bits == 16:
        return rest_N.astype("<u2").tobytes()
    some = _values_to_word(bits)
    if some:
        rest_GW = np.zeros((-(-len(rest_N) // some), some), np.uint64)
        rest_GW.ravel()[: len(rest_N)] = rest_N
        word_G = np.bitwise_or.reduce(rest_GW << _shifts(some, bits), axis=1).astype("<u8")
        plane = word_G.view(np.uint8).reshape(-1, 8)[:, : some * bits // 8].ravel()
        return bytes(plane[: -(-len(rest_N) * bits // 8)])
    bit_Nb = (rest_N[:, None] >> np.arange(bits)) & 1
    return np.packbits(bit_Nb.astype(np.uint8), bitorder="little").tobytes()


def _unpack_bits(plane: memoryview, numel: int, bits: int) -> _Int64:
    """The other way; spare bits at the end must be zero, so that a frame has one spelling.

    Raises:
        DecodeError: they are not.
    """
    if bits == 8:
        return np.frombuffer(plane, np.uint8).astype(np.int64)
    if bits == 16:
        return np.frombuffer(plane, "<u2").astype(np.int64)
    some = _values_to_word(bits)
    if some:
        groups, size = -(-numel // some), some * bits // 8
        padded = np.zeros(groups * size, np.uint8)
        padded[: len(plane)] = np.frombuffer(plane, np.uint8)
        byte_G8 = np.zeros((groups, 8), np.uint8)
        byte_G8[:, :size] = padded.reshape(groups, size)
        rest_GW = byte_G8.view("<u8") >> _shifts(some, bits)
        rest = (rest_GW & np.uint64((1 << bits) - 1)).ravel().astype(np.int64)
        if rest[numel:].any():
            raise DecodeError("spare bits that are not zero")
        return rest[:numel]
    bit_N = np.unpackbits(np.frombuffer(plane, np.uint8), bitorder="little")
    if bit_N[numel * bits :].any():
        raise DecodeError("spare bits that are not zero")
    bit_Nb = bit_N[: numel * bits].reshape(numel, bits).astype(np.int64)
    rest_N: _Int64 = (bit_Nb << np.arange(bits)).sum(axis=1)
    return rest_N


def _values_to_word(bits: int) -> int:
    """How many values fill whole bytes of one 64-bit word; 0: too many."""
    return 8 if bits <= 8 else 4 if bits % 2 == 0 else 0


def _shifts(some: int, bits: int) -> npt.NDArray[np.uint64]:
    return np.arange(some, dtype=np.uint64) * np.uint64(bits)
