"""The top-k codec: of every 4096 values the 64 largest, each in two bits and a place.

A segment of 4096 values sends its `k` largest magnitudes (ties: the lowest index). What they are is
two bits each: a sign, and which of the segment's two magnitudes, the centres of two clusters of
what was kept. Where they are is the gaps between them, which are close to geometric, so that a
Golomb code is the best prefix code there is (Gallager and van Voorhis, 1975); each segment names
the modulus that codes its own gaps in the fewest bits. At 64 of 4096 a segment takes about 628
bits: 208 times less than float32, and 4.9 % above log2 C(4096, 64) + 2 * 64.

Most of a vector's energy stays behind: without `tensorcodecs.feedback` it would be lost for good.

Body: i16 largest magnitude of all segments, quarter octaves; u8 per segment: quarter octaves of
its large magnitude below that, 255: sends nothing; u8 per segment: index of its modulus, and 16 *
index of small / large; (table 1: u16 per segment: how many values it sends, else all `k`); 2 bits
per sent value: negative, large; the gaps, as one stream of bits, lowest first. A gap g of modulus
M: g // M zeros and a one, then g % M as a truncated binary number; a gap from 24 * M up is 24
zeros and 12 bits. The header's parameter is how many of 4096 are sent, its bits are 2.

Shape suffixes: N = values, S = segments, E = sent values, M = moduli, R = ratios, T = bits.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from tensorcodecs.backend import sparse_kernels
from tensorcodecs.errors import DecodeError
from tensorcodecs.frame import (
    FIXED,
    HEADER,
    ZERO,
    Bytes,
    Float32,
    Frame,
    Payload,
    assemble,
    decode_each,
    encode_each,
    refuse_values,
    require_vector,
    scratch,
    seal,
)
from tensorcodecs.layout import CHUNK_VALUES
from tensorcodecs.plain import STEP_MAX, STEP_MIN, powers

if TYPE_CHECKING:
    from collections.abc import Sequence

Int64 = npt.NDArray[np.int64]

CODEC_ID: Final = 7
SEGMENT: Final = 4096
KEPT: Final = 64
KEPT_MAX: Final = 1024
"""Of 4096: with more, `ecsq` is both smaller and nearer."""
BITS: Final = 2
NOTHING: Final = 255
"""Instead of a segment's scale: it sends no value."""
UNARY_MAX: Final = 24
"""A gap of so many moduli is sent as it is, so that no code is longer than 36 bits."""
GAP_BITS: Final = 12
FIXED_POINT: Final = 16
"""The largest magnitude of a segment has so many bits (or one more) when clusters are looked for;
integers, so that any order of adding gives the same."""
ROUNDS_MAX: Final = 16
"""Of moving the two centres; four or five are the rule."""

_ZERO_BITS: Final = 0x0D800000  # 2**-100: smaller magnitudes count as zero
_LIMIT_BITS: Final = 0x5F800000  # VALUE_ABS_MAX
_PEAK: Final = struct.Struct("<h")

# About half an octave apart where a K in 16..512 needs it: within 0.3 % of the best of all.
MODULUS_M: Final = np.array(
    [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 44, 64, 91, 181, 512, 2048], np.int64
)
# The small magnitude in large ones. What a normal source keeps is closest to 3/4.
RATIO_R: Final = np.array(
    [2 ** (-k / 8) for k in (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 26, 36, 56)], np.float32
)

FAULTS: Final = {
    1: "a position outside its segment",
    2: "gaps that do not end where they should",
}
"""What the compiled reader's codes mean."""


class Sparse:
    """The `kept` largest of every 4096 values, in proportion of a shorter last segment, at least 1.

    Of 64 of 4096 normal values: 0.154 bits per value with the headers, error 0.95 of the norm.
    Deterministic. Zeros and magnitudes below 2**-100 are never sent, nor are segments whose large
    magnitude is 2**-63 below their chunk's largest; what is not sent decodes to zero.
    """

    def __init__(self, kept: int = KEPT, name: str = "") -> None:
        """
        Raises:
            ValueError: `kept` is not in 1..KEPT_MAX.
        """
        if not 1 <= kept <= KEPT_MAX:
            raise ValueError(f"{kept} of {SEGMENT} values is outside 1..{KEPT_MAX}")
        self.kept = kept
        self.name = name or f"sparse:{kept}"
        self.codec_id = CODEC_ID

    def bytes_max(self, numel: int) -> int:
        """The size of the largest frame of `numel` values."""
        limit_S = limits(numel, self.kept)
        side = _PEAK.size + 4 * len(limit_S)
        sent = int(limit_S.sum())
        # Full segments are alike, and a shorter one's gaps are no longer.
        gaps = sum(count * _gap_bits_max(kept) for kept, count in _census(limit_S))
        return HEADER.size + side + -(-BITS * sent // 8) + -(-gaps // 8)

    # ── encoding ─────────────────────────────────────────────────────────────────────────
    def encode(self, x_N: Float32) -> bytes:
        """See `Codec.encode`."""
        require_vector(x_N, CHUNK_VALUES)
        compiled = sparse_kernels()
        if compiled is None:
            return self._encode_plain(x_N)
        numel, segments = len(x_N), segments_of(len(x_N))
        # The writer stores eight bytes at a time.
        out = scratch.room(HEADER.size + 4 * segments + 8 * segments * self.kept + 64)
        size, counted = compiled.encode_frame(
            x_N, x_N.view(np.uint32), self.kept, MODULUS_M, RATIO_R, out[HEADER.size :]
        )
        if size < 0:
            raise refuse_values(x_N)
        if size == 0:
            return self._zero(numel)
        return bytes(
            seal(out, size, CODEC_ID, FIXED, numel, self.kept, bits=BITS, table=int(counted))
        )

    def encode_many(self, x_N: Float32) -> list[bytes]:
        """See `Codec.encode_many`."""
        return encode_each(self.encode, x_N)

    def _zero(self, numel: int) -> bytes:
        return assemble(CODEC_ID, ZERO, numel, self.kept, bits=BITS)

    def _encode_plain(self, x_N: Float32) -> bytes:
        """One chunk by numpy: the same bytes."""
        numel = len(x_N)
        word_N = x_N.view(np.uint32) & np.uint32(0x7FFFFFFF)
        if word_N.max(initial=0) > _LIMIT_BITS:  # infinities and NaN have the largest bits of all
            raise refuse_values(x_N)
        limit_S = limits(numel, self.kept)
        pieces = [
            _survey(x_N[at : at + SEGMENT], word_N[at : at + SEGMENT], int(limit))
            for at, limit in zip(range(0, numel, SEGMENT), limit_S, strict=True)
        ]
        peak = max((piece.scale for piece in pieces if len(piece.places)), default=STEP_MIN)
        live = [piece for piece in pieces if len(piece.places) and peak - piece.scale < NOTHING]
        if not live:
            return self._zero(numel)
        scale_S = np.full(len(pieces), NOTHING, np.uint8)
        shape_S = np.zeros(len(pieces), np.uint8)
        count_S = np.zeros(len(pieces), "<u2")
        picks, codes, widths = [], [], []
        for segment, piece in enumerate(pieces):
            if not len(piece.places) or peak - piece.scale >= NOTHING:
                continue
            modulus, code_E, width_E = _code_gaps(np.diff(piece.places, prepend=-1) - 1)
            scale_S[segment] = peak - piece.scale
            shape_S[segment] = modulus | piece.ratio << 4
            count_S[segment] = len(piece.places)
            picks.append(piece.picks)
            codes.append(code_E)
            widths.append(width_E)
        counted = bool(((scale_S != NOTHING) & (count_S != limit_S)).any())
        side = _PEAK.pack(peak) + scale_S.tobytes() + shape_S.tobytes()
        return assemble(
            CODEC_ID, FIXED, numel, self.kept, side, count_S.tobytes() if counted else b"",
            _pack_picks(np.concatenate(picks)),
            _pack_codes(np.concatenate(codes), np.concatenate(widths)),
            bits=BITS, table=int(counted),
        )  # fmt: skip

    # ── decoding ─────────────────────────────────────────────────────────────────────────
    def decode_into(self, payload: Payload, out_N: Float32) -> None:
        """See `Codec.decode_into`."""
        require_vector(out_N, CHUNK_VALUES)
        sent = _read(payload, len(out_N), np.float32(1))
        out_N[:] = 0
        if sent is not None:
            _write(sent, out_N)

    def decode_many(self, payloads: Sequence[Payload], out_N: Float32) -> None:
        """See `Codec.decode_many`."""
        decode_each(self.decode_into, payloads, out_N)

    def accumulate(self, payload: Payload, weight: float, acc_N: Float32) -> None:
        """See `Codec.accumulate`. Touches the values that were sent, and no other."""
        require_vector(acc_N, CHUNK_VALUES)
        sent = _read(payload, len(acc_N), np.float32(weight))
        if sent is not None:
            _write(sent, acc_N)


# ── sizes ────────────────────────────────────────────────────────────────────────────────────
def segments_of(numel: int) -> int:
    return -(-numel // SEGMENT)


def limits(numel: int, kept: int) -> Int64:
    """(S,): how many values each segment sends at most."""
    limit_S = np.full(segments_of(numel), kept, np.int64)
    if numel % SEGMENT:
        limit_S[-1] = -(-kept * (numel % SEGMENT) // SEGMENT)
    return limit_S


def _census(limit_S: Int64) -> list[tuple[int, int]]:
    """(how many values, how many segments send so many)"""
    found, count = np.unique(limit_S, return_counts=True)
    return list(zip(found.tolist(), count.tolist(), strict=True))


def _gap_bits_max(kept: int) -> int:
    """No segment's gaps take more. With every modulus: a one, and the remainder, of each value;
    a zero per whole modulus; what an escape may add to the zeros it replaces."""
    bounds = []
    for modulus in MODULUS_M.tolist():
        zeros = SEGMENT // modulus
        escapes = min(kept, zeros // UNARY_MAX)
        remainder = (modulus - 1).bit_length()
        bounds.append(kept * (1 + remainder) + zeros + escapes * GAP_BITS)
    return int(min(bounds))


# ── what is sent ─────────────────────────────────────────────────────────────────────────────
class _Piece(NamedTuple):
    """What one segment would send."""

    places: Int64
    """(E,), rising."""
    picks: Bytes
    """(E,): bit 0: negative; bit 1: large."""
    scale: int
    """Of the large magnitude, in quarter octaves."""
    ratio: int


def _survey(x_N: Float32, word_N: npt.NDArray[np.uint32], limit: int) -> _Piece:
    """The `limit` largest magnitudes of a segment, and the two that stand for them."""
    worth = int((word_N >= _ZERO_BITS).sum())
    if worth <= limit:
        place_E = np.flatnonzero(word_N >= _ZERO_BITS)
    else:
        least = np.partition(word_N, len(word_N) - limit)[len(word_N) - limit]
        ties = np.flatnonzero(word_N == least)
        more = np.flatnonzero(word_N > least)
        place_E = np.sort(np.concatenate([more, ties[: limit - len(more)]]))
    if not len(place_E):
        return _Piece(place_E, np.zeros(0, np.uint8), STEP_MIN, 0)
    exponent = (int(word_N[place_E].max()) >> 23) - 127
    lift = np.uint32(FIXED_POINT - exponent + 127 << 23)
    lifted_E = np.abs(x_N[place_E]) * lift.view(np.float32)
    small, large = _two_means(lifted_E.astype(np.int64))
    quarters = _quarters(large)
    large_size = powers(np.array([quarters]))[0]
    ratio = int(np.abs(np.float32(small) - large_size * RATIO_R).argmin())
    half = (large_size + large_size * RATIO_R[ratio]) * np.float32(0.5)
    is_large_E = lifted_E.astype(np.int64).astype(np.float32) > half
    pick_E = np.signbit(x_N[place_E]).astype(np.uint8) | is_large_E.astype(np.uint8) << 1
    return _Piece(place_E, pick_E, quarters + 4 * (exponent - FIXED_POINT), ratio)


def _two_means(size_E: Int64) -> tuple[int, int]:
    """The centres of two clusters (Lloyd's iteration from the mean), rounded down."""
    total = int(size_E.sum())
    border = total // len(size_E)
    small = large = border
    for _ in range(ROUNDS_MAX):
        above = size_E > border
        count = int(above.sum())
        if count == 0:  # all alike
            break
        upper = int(size_E[above].sum())
        small = (total - upper) // (len(size_E) - count)
        large = upper // count
        if (small + large) >> 1 == border:
            break
        border = (small + large) >> 1
    return small, large


def _quarters(size: int) -> int:
    """The nearest quarter octave."""
    bits = int((np.float32(size) * np.float32(size)).view(np.uint32))
    mantissa, exponent = bits & 0x7FFFFF, (bits >> 23) - 127
    return 2 * exponent + (mantissa >= _QUARTER) + (mantissa >= _THREE_QUARTERS)


_QUARTER: Final = int(np.float32(2**0.25).view(np.uint32)) & 0x7FFFFF
_THREE_QUARTERS: Final = int(np.float32(2**0.75).view(np.uint32)) & 0x7FFFFF


# ── where it is ──────────────────────────────────────────────────────────────────────────────
def _code_gaps(gap_E: Int64) -> tuple[int, npt.NDArray[np.uint64], Int64]:
    """(index of the best modulus, codes, their bits)"""
    coded = [_golomb(gap_E, modulus) for modulus in MODULUS_M.tolist()]
    best = int(np.argmin([width_E.sum() for _, width_E in coded]))
    return best, *coded[best]


def _golomb(gap_E: Int64, modulus: int) -> tuple[npt.NDArray[np.uint64], Int64]:
    whole_E, rest_E = gap_E // modulus, gap_E % modulus
    floor = modulus.bit_length() - 1  # bits of the short remainders
    short = (2 << floor) - modulus  # how many there are
    over_E = rest_E - short
    long_E = over_E >= 0
    rest_code_E = np.where(long_E, short + (over_E >> 1) | (over_E & 1) << floor, rest_E)
    code_E = (rest_code_E << 1 | 1) << np.minimum(whole_E, UNARY_MAX)
    width_E = whole_E + 1 + floor + long_E
    escape_E = whole_E >= UNARY_MAX
    code_E = np.where(escape_E, gap_E << UNARY_MAX, code_E)
    width_E = np.where(escape_E, UNARY_MAX + GAP_BITS, width_E)
    return code_E.astype(np.uint64), width_E.astype(np.int64)


def _pack_codes(code_T: npt.NDArray[np.uint64], width_T: Int64) -> bytes:
    bit = np.arange(UNARY_MAX + GAP_BITS)
    bits_TJ = (code_T[:, None] >> bit.astype(np.uint64) & np.uint64(1)).astype(np.uint8)
    return np.packbits(bits_TJ[bit < width_T[:, None]], bitorder="little").tobytes()


def _pack_picks(pick_E: Bytes) -> bytes:
    padded = np.zeros(-(-len(pick_E) // 4) * 4, np.uint8)
    padded[: len(pick_E)] = pick_E
    return (padded[0::4] | padded[1::4] << 2 | padded[2::4] << 4 | padded[3::4] << 6).tobytes()


# ── reading ──────────────────────────────────────────────────────────────────────────────────
class _Sent(NamedTuple):
    """A frame's values, checked."""

    places: npt.NDArray[np.uint32]
    """(E,) in the chunk; no place twice."""
    values: Float32


def _read(payload: Payload, numel: int, weight: np.float32) -> _Sent | None:
    """The places and weighted values of a frame of any K; None if it is all zero.

    Raises:
        DecodeError: not an intact frame of this codec with `numel` values.
    """
    frame = Frame.parse(payload, CODEC_ID, numel)
    kept = frame.parameter
    if frame.bits != BITS or not 1 <= kept <= KEPT_MAX:
        raise DecodeError(f"{kept} of {SEGMENT} values of {frame.bits} bits make no sense here")
    if frame.mode == ZERO:
        if len(frame.body) or frame.table:
            raise DecodeError("a zero frame with a body")
        return None
    if frame.mode != FIXED or frame.table > 1:
        raise DecodeError(f"mode {frame.mode} with table {frame.table} is not known")
    limit_S = limits(numel, kept)
    segments = len(limit_S)
    side = _PEAK.size + (4 if frame.table else 2) * segments
    if len(frame.body) < side or not segments:
        raise DecodeError(f"{len(frame.body)} bytes, but {segments} segments take {side} and more")
    body = np.frombuffer(frame.body, np.uint8)
    (peak,) = _PEAK.unpack_from(frame.body)
    scale_S = body[2 : 2 + segments].astype(np.int64)
    shape_S = body[2 + segments : 2 + 2 * segments]
    live_S = scale_S != NOTHING
    quarters_S = np.where(live_S, peak - scale_S, 0)
    if not STEP_MIN <= peak <= STEP_MAX or (quarters_S < STEP_MIN).any():
        raise DecodeError("a scale that no encoder sends")
    if frame.table:
        count_S = np.frombuffer(frame.body[2 + 2 * segments : side], "<u2").astype(np.int64)
        if (count_S > limit_S).any() or ((count_S > 0) != live_S).any():
            raise DecodeError("a count of values that no encoder sends")
    else:
        count_S = np.where(live_S, limit_S, 0)
    if shape_S[~live_S].any():
        raise DecodeError("a segment without values that has a modulus")
    sent = int(count_S.sum())
    gaps = side + -(-BITS * sent // 8)
    if len(body) < gaps:
        raise DecodeError(f"{len(body)} bytes, but {sent} values take {gaps} and more")
    if sent % 4 and body[gaps - 1] >> 2 * (sent % 4):
        raise DecodeError("padding that is not zero")
    # Large and small of either sign, in the order of the two bits.
    large_S = np.where(live_S, powers(quarters_S), np.float32(0)).astype(np.float32)
    small_S = large_S * RATIO_R[shape_S >> 4]
    book_SD = np.stack([small_S, -small_S, large_S, -large_S], 1) * weight
    modulus_S = MODULUS_M[shape_S & 15]
    compiled = sparse_kernels()
    if compiled is None:
        place_E = _read_gaps(frame.body[gaps:], modulus_S, count_S, numel)
        value_E = book_SD[np.repeat(np.arange(segments), count_S), _picks(body[side:gaps], sent)]
        return _Sent(place_E, value_E)
    place_E, value_E = np.empty(sent, np.uint32), np.empty(sent, np.float32)
    fault = compiled.decode_frame(
        body, side, gaps, modulus_S, count_S, book_SD, numel, place_E, value_E
    )
    if fault:
        raise DecodeError(FAULTS[int(fault)])
    return _Sent(place_E, value_E)


def _write(sent: _Sent, out_N: Float32) -> None:
    """out[place] += value."""
    compiled = sparse_kernels()
    if compiled is None:
        out_N[sent.places] += sent.values
    else:
        compiled.scatter(sent.places, sent.values, out_N)


def _picks(plane: Bytes, sent: int) -> Bytes:
    pick_E: Bytes = np.stack([plane >> shift & 3 for shift in (0, 2, 4, 6)], 1).reshape(-1)
    return pick_E[:sent]


def _read_gaps(
    stream: memoryview, modulus_S: Int64, count_S: Int64, numel: int
) -> npt.NDArray[np.uint32]:
    """Places in the chunk.

    Raises:
        DecodeError: one lies outside its segment, or the stream does not end where it should.
    """
    size = len(stream)
    data = bytes(stream) + bytes(8)
    at = 0  # in bits
    places = []
    for segment, (modulus, count) in enumerate(
        zip(modulus_S.tolist(), count_S.tolist(), strict=True)
    ):
        first = segment * SEGMENT
        stop = min(SEGMENT, numel - first)
        floor = modulus.bit_length() - 1
        short = (2 << floor) - modulus
        place = -1
        for _ in range(count):
            if at > 8 * size:
                raise DecodeError(FAULTS[2])
            byte = at >> 3
            word = int.from_bytes(data[byte : byte + 8], "little") >> (at & 7)
            zeros = (word & -word).bit_length() - 1 if word else UNARY_MAX
            if zeros >= UNARY_MAX:
                gap = word >> UNARY_MAX & (1 << GAP_BITS) - 1
                at += UNARY_MAX + GAP_BITS
            else:
                word >>= zeros + 1
                rest = word & (1 << floor) - 1
                at += zeros + 1 + floor
                if rest >= short:
                    rest = short + (rest - short << 1 | word >> floor & 1)
                    at += 1
                gap = zeros * modulus + rest
            place += 1 + gap
            if place >= stop:
                raise DecodeError(FAULTS[1])
            places.append(first + place)
    if (at + 7) >> 3 != size or (at & 7 and data[at >> 3] >> (at & 7)):
        raise DecodeError(FAULTS[2])
    return np.array(places, np.uint32)
