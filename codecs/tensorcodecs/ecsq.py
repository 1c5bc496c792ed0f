"""The two-level codec: a uniform step per block, then Huffman over the packed levels.

Level one (entropy-constrained scalar quantisation): each block of 256 values gets a step of
a * rms, or as much more as its largest value needs, rounded to a quarter of an octave and sent in
one byte; values become rint(x / step) within
+-7, +-3 or +-1, and decode to the mean of what was rounded to each level (a small codebook per
chunk). Level two: three, four or six levels are packed into a symbol and Huffman-coded with a
shipped table, or with a table of the chunk's own where that saves more than 2 %.

`a` is the rate knob. The result is 0.26 bits above the Shannon bound of a normal source, and a
better entropy coder could win 0.02 of them (docs/results/plane.md). Of the quantisers measured only
int4 with the largest magnitude for a scale comes as close, at its one rate of 3.3 bits.

Body: (mode OWN: u8 per magnitude, `huffman.shown_weights`;) i16 largest step exponent, quarter
octaves; i16 codebook entries of levels 1.., in 1/4096 of a step above the level; u8 per block:
quarter octaves below the largest, 255: all zero; then the coded section (`plain.encode_symbols`),
or the packed digits, raw or by zstd.
"""

from __future__ import annotations

import struct
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from tensorcodecs import plain
from tensorcodecs.backend import kernels
from tensorcodecs.errors import DecodeError, EncodeError
from tensorcodecs.frame import (
    COMPILED_FROM,
    FIXED,
    HEADER,
    OWN,
    RAW,
    ZERO,
    ZSTD,
    Bytes,
    Float32,
    Frame,
    Payload,
    assemble,
    compressed,
    refuse_values,
    require_frames,
    require_vector,
    scratch,
    seal,
)
from tensorcodecs.huffman import (
    LENGTH_MAX,
    LOOKUP,
    SYMBOLS,
    Table,
    Weights,
    level_table,
    show_weights,
    shown_weights,
)
from tensorcodecs.layout import CHUNK_VALUES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import ModuleType

CODEC_ID: Final = 4
RATE_MIN: Final = 0.45
RATE_MAX: Final = 4.0
_BATCH: Final = 8  # chunks from one pass to the next: what a core's cache still holds
_CLIP: Final = 1.25  # how far beyond the last level's edge a value may lie; 1 to 2 were measured
_OWN_GAIN: Final = 0.02  # what a chunk's own table must save: building one takes a millisecond
_FLOAT: Final = struct.Struct("<f")
_PAST_CACHE_BYTES: Final = 16 * 2**20  # half of a large core complex's last cache
_BITS_AT: Final = 10  # in a header
_TABLE_AT: Final = 11
_STEP: Final = struct.Struct("<h")
_SPARSE_BITS: Final = 0.4  # per value: below, zstd finds runs that a code per symbol can't use

# Weights of the magnitudes 0, 1, ... in blocks of normal, Laplace and Student-t values, coded with
# these steps by the codec itself. They fix the bytes of version 1.
_TABLES: Final[dict[int, tuple[Weights, ...]]] = {
    4: (
        (65535, 59217, 44033, 26676, 13287, 5451, 1856, 647),  # normal, 0.45
        (65535, 57881, 40186, 21783, 9274, 3122, 835, 199),  # normal, 0.5
        (65535, 56126, 35622, 16585, 5767, 1482, 274, 45),  # normal, 0.56
        (65535, 53996, 30373, 11613, 3063, 548, 66, 7),  # normal, 0.63
        (65535, 51473, 24917, 7475, 1400, 159, 11, 1),  # normal, 0.71
        (65535, 48411, 19538, 4350, 529, 36, 1, 1),  # normal, 0.8
        (65535, 44832, 14372, 2181, 153, 6, 1, 1),  # normal, 0.9
        (65535, 39398, 19835, 10106, 5207, 2679, 1396, 1483),  # Laplace, 0.45
        (65535, 38274, 18464, 9011, 4392, 2159, 1038, 979),  # Laplace, 0.5
        (65535, 36600, 16514, 7513, 3410, 1538, 696, 542),  # Laplace, 0.56
        (65535, 34381, 14140, 5878, 2414, 982, 397, 258),  # Laplace, 0.63
        (65535, 31898, 11776, 4375, 1602, 583, 203, 111),  # Laplace, 0.71
        (65535, 29293, 9572, 3131, 1006, 314, 97, 43),  # Laplace, 0.8
        (65535, 26608, 7576, 2128, 590, 156, 42, 15),  # Laplace, 0.9
        (65535, 33321, 11563, 4406, 1898, 918, 485, 853),  # Student t3, 0.45
        (65535, 33221, 11303, 4192, 1765, 842, 440, 754),  # Student t3, 0.5
        (65535, 32861, 10679, 3774, 1541, 719, 371, 612),  # Student t3, 0.56
        (65535, 31954, 9595, 3169, 1241, 565, 292, 454),  # Student t3, 0.63
        (65535, 30361, 8155, 2496, 943, 417, 215, 315),  # Student t3, 0.71
        (65535, 28151, 6613, 1870, 678, 299, 143, 212),  # Student t3, 0.8
        (65535, 25451, 5120, 1349, 470, 202, 97, 137),  # Student t3, 0.9
    ),
    3: (
        (65535, 43105, 12321, 1632),  # normal, 0.95
        (65535, 39284, 8423, 670),  # normal, 1.06
        (65535, 34974, 5266, 226),  # normal, 1.19
        (65535, 30590, 3061, 63),  # normal, 1.33
        (65535, 25713, 1477, 12),  # normal, 1.5
        (65535, 21339, 662, 2),  # normal, 1.68
        (65535, 23258, 5604, 1842),  # Laplace, 0.95
        (65535, 21937, 4760, 1320),  # Laplace, 1.06
        (65535, 19985, 3720, 822),  # Laplace, 1.19
        (65535, 17846, 2760, 476),  # Laplace, 1.33
        (65535, 15413, 1870, 238),  # Laplace, 1.5
        (65535, 13193, 1234, 116),  # Laplace, 1.68
        (65535, 14842, 2134, 856),  # Student t3, 0.95
        (65535, 14565, 1987, 766),  # Student t3, 1.06
        (65535, 13909, 1735, 633),  # Student t3, 1.19
        (65535, 12900, 1442, 495),  # Student t3, 1.33
        (65535, 11405, 1109, 357),  # Student t3, 1.5
        (65535, 9814, 834, 253),  # Student t3, 1.68
    ),
    2: (
        (65535, 19574),  # normal, 1.75
        (65535, 15210),  # normal, 2
        (65535, 11016),  # normal, 2.3
        (65535, 7114),  # normal, 2.7
        (65535, 4084),  # normal, 3.2
        (65535, 1592),  # normal, 4
        (65535, 8481),  # Laplace, 1.75
        (65535, 8181),  # Laplace, 2
        (65535, 7239),  # Laplace, 2.3
        (65535, 5609),  # Laplace, 2.7
        (65535, 3858),  # Laplace, 3.2
        (65535, 3760),  # Student t3, 1.75
        (65535, 3729),  # Student t3, 2
        (65535, 3581),  # Student t3, 2.3
        (65535, 3147),  # Student t3, 2.7
        (65535, 2456),  # Student t3, 3.2
    ),
}


class Tables:
    """The shipped tables of one width, side by side for the kernels.

    Each is built when it is first asked for: that takes a millisecond, and few are ever used.
    """

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._weights = _TABLES[bits]
        count = len(self._weights)
        self.cost_TL = np.stack([_costs(w) for w in self._weights])
        """1/256 bits per level of each magnitude, its sign included."""
        self.ready_T = np.zeros(count, np.bool_)
        """Which rows of the next two are there."""
        self.entry_TS = np.zeros((count, SYMBOLS), np.uint32)
        self.lookup_TW = np.zeros((count, 1 << LENGTH_MAX), LOOKUP)

    def __len__(self) -> int:
        return len(self._weights)

    def build(self, number: int) -> Table:
        """Table `number`, ready for the kernels from now on. Safe in any thread."""
        table = level_table(self._bits, self._weights[number])
        if not self.ready_T[number]:
            self.entry_TS[number] = table.entry_S
            self.lookup_TW[number] = table.lookup_W
            self.ready_T[number] = True
        return table

    @property
    def tables(self) -> tuple[Table, ...]:
        """All of them."""
        return tuple(map(self.build, range(len(self))))


@lru_cache(maxsize=3)
def shipped_tables(bits: int) -> Tables:
    """Of levels of so many bits."""
    return Tables(bits)


def _costs(weights: Weights) -> npt.NDArray[np.int64]:
    """What a level of each magnitude costs, in 1/256 bits; integers, so that all choose alike."""
    total = weights[0] + 2 * sum(weights[1:])
    return np.array([_log2_256(total) - _log2_256(w) for w in weights], np.int64)


def _log2_256(value: int) -> int:
    """256 * log2(value), rounded down, in integers."""
    whole = value.bit_length() - 1
    result, mantissa = whole, value << 32 >> whole
    for _ in range(8):
        mantissa = mantissa * mantissa >> 32
        result = result << 1 | mantissa >> 33
        mantissa >>= mantissa >> 33
    return result


class Ecsq:
    """Step a * rms. At 1/2: 3.12 bits per value, error 0.143 of the norm; at 1: 2.15 and 0.28; at
    2 (ternary): 1.26 and 0.51. Deterministic, unless `seed` asks for stochastic rounding.

    Zero blocks decode to exact zeros, and blocks 2**-63 below their chunk's largest become zero.
    No value lies beyond 1.37 times the last level's edge (7.5, 3.5 or 1.5 steps): 1.25 times, and
    half a quarter octave of rounding. Those past the edge decode to the codebook's last entry, the
    mean of such values. With ternary levels a block of one magnitude, be it of either sign, is half
    a step everywhere and becomes zero.
    """

    def __init__(self, a: float, name: str = "") -> None:
        """
        Raises:
            ValueError: `a` is not in RATE_MIN..RATE_MAX.
        """
        if not RATE_MIN <= a <= RATE_MAX:
            raise ValueError(f"a step of {a} rms is outside {RATE_MIN}..{RATE_MAX}")
        self.a = a
        self.bits = 4 if a < 0.95 else 3 if a < 1.75 else 2
        self.name = name or f"ecsq:{a:g}"
        self.codec_id = CODEC_ID
        self.square = np.float32(a) * np.float32(a)
        # Its outliers decide a heavy-tailed block's step: clipping them would cost more.
        self.reach = np.float32((1 / (_CLIP * (plain.top_of(self.bits) + 0.5))) ** 2)
        self.parameter = int.from_bytes(_FLOAT.pack(a), "little")

    def bytes_max(self, numel: int) -> int:
        """The size of the largest frame of `numel` values: nothing entropy-coded."""
        side = 2 + 2 * plain.top_of(self.bits) + plain.blocks_of(numel)
        return HEADER.size + side + plain.packed_bytes(numel, self.bits)

    @cached_property
    def shipped(self) -> Tables:
        """What its frames may name as their table."""
        return shipped_tables(self.bits)

    # ── encoding ─────────────────────────────────────────────────────────────────────────
    def encode(self, x_N: Float32, *, seed: int | None = None) -> bytes:
        """See `Codec.encode`. With `seed`, rounding is stochastic and without bias."""
        require_vector(x_N, CHUNK_VALUES)
        if seed is not None or kernels() is None or not len(x_N):
            return self._encode_plain(x_N, seed)
        return self.encode_many(x_N)[0]

    def encode_many(self, x_N: Float32) -> list[bytes]:
        """See `Codec.encode_many`."""
        return [bytes(frame) for frame in self._frames(x_N)]

    def encode_into(self, x_N: Float32, out: Bytes) -> list[int]:
        """The frames of `encode_many` one after another into `out`; where each of them ends.

        `out`: (S,) uint8, at least `bytes_max(CHUNK_VALUES)` per chunk. The way for whoever keeps
        a buffer: fresh memory for every frame would take half as long again.

        Raises: like `encode`; ValueError if `out` is too small.
        """
        need = -(-len(x_N) // CHUNK_VALUES) * self.bytes_max(CHUNK_VALUES)
        if out.dtype != np.uint8 or out.ndim != 1 or len(out) < need:
            raise ValueError(f"need a vector of {need} bytes to encode into")
        require_vector(x_N, 2**62)
        ends: list[int] = []
        wide = _BATCH * CHUNK_VALUES
        straight = kernels() is not None
        for first in range(0, len(x_N), wide):
            part = x_N[first : first + wide]
            done = self._straight_into(part, out, ends) if straight else 0
            # What does not suit the shipped tables comes in runs: don't code it all twice.
            straight = straight and done * CHUNK_VALUES >= len(part)
            at = ends[-1] if ends else 0
            try:
                for frame in self._frames(part[done * CHUNK_VALUES :]):
                    out[at : at + len(frame)] = np.frombuffer(frame, np.uint8)
                    at += len(frame)
                    ends.append(at)
            except EncodeError as bad:
                index = first + done * CHUNK_VALUES + bad.index
                raise EncodeError(index, bad.value) from None
        return ends

    def _straight_into(self, x_N: Float32, out: Bytes, ends: list[int]) -> int:
        """Frames of a batch's first chunks into `out` behind the last of `ends`, which grow; how
        many: up to the first that wants another mode or table, or more room to try."""
        compiled = kernels()
        assert compiled is not None
        units = -(-len(x_N) // CHUNK_VALUES)
        count_UL = np.zeros((units, 8), np.int64)
        info_U = np.zeros((units, 3), np.int64)
        start = ends[-1] if ends else 0
        shipped = self.shipped
        while True:
            done = compiled.encode_chunks(
                x_N, CHUNK_VALUES, self.square, self.reach, self.bits, kind_of(self.bits),
                self.parameter, shipped.cost_TL, shipped.ready_T, shipped.entry_TS, out[start:],
                HEADER.size, 0, count_UL, info_U, scratch.symbols, scratch.literals,
            )  # fmt: skip
            if done == units or shipped.ready_T[info_U[done, 1]]:
                break
            shipped.build(int(info_U[done, 1]))
        size_U = info_U[:done, 0] + HEADER.size
        wrong_U = self.wants_own(count_UL[:done], info_U[:done])
        wrong_U |= size_U >= self.bytes_max(CHUNK_VALUES)
        if len(x_N) < units * CHUNK_VALUES and done == units:
            last = len(x_N) - (units - 1) * CHUNK_VALUES
            wrong_U[-1] |= size_U[-1] >= self.bytes_max(last)
        if wrong_U.any():
            done = int(wrong_U.argmax())
        ends += (start + np.cumsum(size_U[:done])).tolist()
        return int(done)

    def _frames(self, x_N: Float32) -> Iterator[bytes | memoryview]:
        """Each chunk's frame; a memoryview holds only until the next one is asked for."""
        require_vector(x_N, 2**62)
        compiled = kernels()
        if compiled is None:
            for at in range(0, len(x_N), CHUNK_VALUES):
                try:
                    plainly = self._encode_plain(x_N[at : at + CHUNK_VALUES])
                except EncodeError as bad:
                    raise EncodeError(at + bad.index, bad.value) from None
                yield plainly
            return
        chunk = min(CHUNK_VALUES, len(x_N))
        pitch = HEADER.size + 2 * chunk + 1024
        out = scratch.room(_BATCH * pitch)
        shipped = self.shipped
        for first in range(0, len(x_N), _BATCH * CHUNK_VALUES):
            part = x_N[first : first + _BATCH * CHUNK_VALUES]
            units = -(-len(part) // CHUNK_VALUES)
            count_UL = np.zeros((units, 8), np.int64)
            info_U = np.zeros((units, 3), np.int64)
            done = 0
            while done < units:
                done += compiled.encode_chunks(
                    part[done * CHUNK_VALUES :], CHUNK_VALUES, self.square, self.reach, self.bits,
                    kind_of(self.bits), self.parameter, shipped.cost_TL, shipped.ready_T,
                    shipped.entry_TS, out[done * pitch :], HEADER.size, pitch, count_UL[done:],
                    info_U[done:], scratch.symbols, scratch.literals,
                )  # fmt: skip
                if done < units:
                    shipped.build(int(info_U[done, 1]))
            own_U = self.wants_own(count_UL, info_U)
            for unit in range(units):
                values = part[unit * CHUNK_VALUES : (unit + 1) * CHUNK_VALUES]
                size, table = int(info_U[unit, 0]), int(info_U[unit, 1])
                if size < 0:
                    error = refuse_values(values)
                    raise EncodeError(first + unit * CHUNK_VALUES + error.index, error.value)
                if size == 0:
                    yield self.zero_frame(len(values))
                else:
                    at = unit * pitch
                    frame: bytes | memoryview = out.data[at : at + HEADER.size + size]
                    if len(frame) < COMPILED_FROM:
                        frame = seal(
                            out[at:], size, CODEC_ID, FIXED, len(values), self.parameter,
                            bits=self.bits, table=table,
                        )  # fmt: skip
                    if own_U[unit] or len(frame) >= self.bytes_max(len(values)):
                        own = bool(own_U[unit])
                        frame = self._smallest(values, bytes(frame), count_UL[unit], own=own)
                    yield frame

    def _smallest(
        self, x_N: Float32, fixed: bytes, count_L: npt.NDArray[np.int64], *, own: bool
    ) -> bytes:
        """The smallest frame of a chunk that the shipped table does not suit well."""
        counts = [int(c) for c in count_L[: plain.top_of(self.bits) + 1]]
        choices = []
        if _entropy(counts) < _SPARSE_BITS:
            choices.append(self._encode_digits(x_N, ZSTD))
        if own:
            choices.append(self._encode_own(x_N, show_weights(counts)))
        best = min([*choices, fixed], key=len)
        return best if len(best) < self.bytes_max(len(x_N)) else self._encode_digits(x_N, RAW)

    def _encode_own(self, x_N: Float32, shown: bytes) -> bytes:
        """One chunk with the table that `shown` describes."""
        compiled = kernels()
        assert compiled is not None
        table = level_table(self.bits, shown_weights(shown))
        start = HEADER.size + len(shown)
        room = 2 * len(x_N) + 1024
        out = np.empty(start + room, np.uint8)
        out[HEADER.size : start] = np.frombuffer(shown, np.uint8)
        info_U = np.zeros((1, 3), np.int64)
        compiled.encode_chunks(
            x_N, CHUNK_VALUES, self.square, self.reach, self.bits, 0, 0,
            np.zeros((1, len(shown)), np.int64), np.ones(1, np.bool_), table.entry_S[None], out,
            start, len(out), np.zeros((1, 8), np.int64), info_U, scratch.symbols, scratch.literals,
        )  # fmt: skip
        size = len(shown) + int(info_U[0, 0])
        return bytes(
            seal(out, size, CODEC_ID, OWN, len(x_N), self.parameter, bits=self.bits, table=0)
        )

    def _encode_digits(self, x_N: Float32, mode: int) -> bytes:
        """One chunk with its digits RAW or by ZSTD."""
        side, level_N, _ = self._quantised(x_N, None)
        digit_N = (level_N + plain.top_of(self.bits)).astype(np.uint8)
        packed = plain.pack_digits(digit_N, self.bits)
        body = bytes(compressed(packed)) if mode == ZSTD else packed.tobytes()
        return assemble(CODEC_ID, mode, len(x_N), self.parameter, side, body, bits=self.bits)

    def zero_frame(self, numel: int) -> bytes:
        """`numel` zeros."""
        return assemble(CODEC_ID, ZERO, numel, self.parameter, bits=self.bits)

    def wants_own(
        self, count_UL: npt.NDArray[np.int64], info_U: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Which chunks a table of their own would code at least `_OWN_GAIN` smaller."""
        total_U = count_UL.sum(1)
        share_UL = count_UL / np.maximum(total_U, 1)[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            bits_UL = np.where(share_UL > 0, -share_UL * np.log2(share_UL), 0.0)
        entropy_U = bits_UL.sum(1) + 1 - share_UL[:, 0]  # and a sign
        shipped_U = info_U[:, 2] / 256 / np.maximum(total_U, 1)
        gain_U: npt.NDArray[np.bool_] = entropy_U < (1 - _OWN_GAIN) * shipped_U
        gain_U &= total_U > 0
        return gain_U

    def _encode_plain(self, x_N: Float32, seed: int | None = None) -> bytes:
        """One chunk in whatever mode is smallest."""
        if not len(x_N):
            return self.zero_frame(0)
        side, level_N, count_L = self._quantised(x_N, seed)
        if not side:
            return self.zero_frame(len(x_N))
        mode, table, shown, body = self._pack(level_N, count_L)
        return assemble(
            CODEC_ID, mode, len(x_N), self.parameter, shown, side, body, bits=self.bits, table=table
        )

    def _quantised(
        self, x_N: Float32, seed: int | None
    ) -> tuple[bytes, npt.NDArray[np.int8], npt.NDArray[np.int64]]:
        """Side data (b"" if all is zero), levels, and how often each magnitude was sampled.

        Raises:
            EncodeError: a value can't be sent.
        """
        top = plain.top_of(self.bits)
        step_B = plain.block_steps(x_N, self.square, self.reach)
        if (step_B == plain.REFUSED).any():
            raise refuse_values(x_N)
        peak = int(step_B.max())
        if peak == plain.NO_SCALE:
            return b"", np.zeros(len(x_N), np.int8), np.zeros(top + 1, np.int64)
        code_B, inverse_B = plain.scale_codes(step_B, peak)
        if seed is None:
            level_N = plain.levels_of(x_N, inverse_B, top)
        else:
            level_N = _round_stochastically(x_N, inverse_B, top, seed)
        sum_L, count_L = plain.survey(x_N, level_N, inverse_B, top)
        entry_L = plain.book_entries(sum_L, count_L)
        if seed is not None:
            entry_L[:] = 0  # means would bring the bias back
        side = _STEP.pack(peak) + entry_L.astype("<i2").tobytes() + code_B.tobytes()
        return side, level_N, count_L

    def _pack(
        self, level_N: npt.NDArray[np.int8], count_L: npt.NDArray[np.int64]
    ) -> tuple[int, int, bytes, bytes]:
        """The smallest of: raw, zstd, a shipped table, an own one. (mode, table, weights, bytes)"""
        digit_N = (level_N + plain.top_of(self.bits)).astype(np.uint8)
        packed = plain.pack_digits(digit_N, self.bits)
        choices = [(RAW, 0, b"", packed.tobytes())]
        counts = [int(c) for c in count_L]
        if kernels() is None:  # coding streams bit by bit with numpy would take a second
            choices.append((ZSTD, 0, b"", bytes(compressed(packed))))
            return min(choices, key=lambda choice: len(choice[3]))
        entropy = _entropy(counts)
        symbol_T = plain.symbols_of(level_N, self.bits)
        cost_T = self.shipped.cost_TL @ count_L
        best = int(cost_T.argmin())
        own = entropy < (1 - _OWN_GAIN) * float(cost_T[best]) / 256 / max(1, sum(counts))
        if entropy < _SPARSE_BITS:
            choices.append((ZSTD, 0, b"", bytes(compressed(packed))))
        if own:
            shown = show_weights(counts)
            table = level_table(self.bits, shown_weights(shown))
            choices.append((OWN, 0, shown, plain.encode_symbols(symbol_T, table)))
        table = self.shipped.tables[best]
        choices.append((FIXED, best, b"", plain.encode_symbols(symbol_T, table)))
        return min(choices, key=lambda choice: len(choice[2]) + len(choice[3]))

    # ── decoding ─────────────────────────────────────────────────────────────────────────
    def decode_into(self, payload: Payload, out_N: Float32) -> None:
        """See `Codec.decode_into`."""
        require_vector(out_N, CHUNK_VALUES)
        self._read_many([payload], out_N, np.float32(1), add=False)

    def accumulate(self, payload: Payload, weight: float, acc_N: Float32) -> None:
        """See `Codec.accumulate`."""
        require_vector(acc_N, CHUNK_VALUES)
        self._read_many([payload], acc_N, np.float32(weight), add=True)

    def decode_many(self, payloads: Sequence[Payload], out_N: Float32) -> None:
        """See `Codec.decode_many`."""
        require_frames(payloads, out_N)
        self._read_many(payloads, out_N, np.float32(1), add=False)

    def _read_many(
        self, payloads: Sequence[Payload], out_N: Float32, weight: np.float32, *, add: bool
    ) -> None:
        past_cache = _past_cache(out_N, add=add)
        for first in range(0, len(payloads), _BATCH):
            batch = payloads[first : first + _BATCH]
            data = batch[0] if len(batch) == 1 else b"".join(batch)
            stop_U = np.cumsum([len(p) for p in batch])
            start_U = stop_U - [len(p) for p in batch]
            at = first * CHUNK_VALUES
            self._decode(
                data, start_U, stop_U, out_N[at : at + _BATCH * CHUNK_VALUES], weight,
                add=add, past_cache=past_cache,
            )  # fmt: skip

    def decode_packed(
        self,
        data: Payload,
        start_U: npt.NDArray[np.int64],
        stop_U: npt.NDArray[np.int64],
        out_N: Float32,
        weight: np.float32 = np.float32(1),  # noqa: B008
        *,
        add: bool = False,
    ) -> None:
        """Frames data[start:stop], one per `CHUNK_VALUES` of `out_N`, in one go.

        Raises:
            DecodeError: one of them is not an intact frame of its chunk.
        """
        past_cache = _past_cache(out_N, add=add)
        self._decode(data, start_U, stop_U, out_N, weight, add=add, past_cache=past_cache)

    def _decode(
        self, data: Payload, start_U: npt.NDArray[np.int64], stop_U: npt.NDArray[np.int64],
        out_N: Float32, weight: np.float32, *, add: bool, past_cache: bool,
    ) -> None:  # fmt: skip
        view = memoryview(data).cast("B")
        array = np.frombuffer(view, np.uint8)
        start_U, stop_U = np.ascontiguousarray(start_U), np.ascontiguousarray(stop_U)
        compiled = kernels()
        unit = 0
        while unit < len(start_U):
            if compiled is not None:
                unit = _decode_usual(
                    compiled, array, start_U, stop_U, unit, out_N, weight, add, past_cache
                )
                if unit == len(start_U):
                    return
            at = unit * CHUNK_VALUES
            piece_N = out_N[at : at + CHUNK_VALUES]
            frame = Frame.parse(
                view[int(start_U[unit]) : int(stop_U[unit])], CODEC_ID, len(piece_N)
            )
            _decode_one(compiled, frame, piece_N, weight, add=add)
            unit += 1


def _past_cache(out_N: Float32, *, add: bool) -> bool:
    """Whether decoding should write to memory itself: nobody finds such a vector in a cache."""
    return not add and out_N.nbytes >= _PAST_CACHE_BYTES


def kind_of(bits: int) -> int:
    """Codec, mode and bits of the usual frame, as they follow each other in a header."""
    return CODEC_ID | FIXED << 8 | bits << 16


def _decode_usual(
    compiled: ModuleType,
    data: Bytes,
    start_U: npt.NDArray[np.int64],
    stop_U: npt.NDArray[np.int64],
    first: int,
    out_N: Float32,
    weight: np.float32,
    add: bool,
    past_cache: bool,
) -> int:
    """Decode frames from the `first` on, as long as they are coded with shipped tables of one
    width; the number of the first that is not.

    Raises:
        DecodeError: one of them is not what an encoder sends.
    """
    if stop_U[first] - start_U[first] < HEADER.size:
        return first
    bits = int(data[start_U[first] + _BITS_AT])
    if bits not in _TABLES:
        return first
    shipped = shipped_tables(bits)
    while True:
        found = int(compiled.decode_frames(
            data, start_U, stop_U, first, bits, kind_of(bits), shipped.ready_T, shipped.lookup_TW,
            out_N, CHUNK_VALUES, add, past_cache, weight, scratch.symbols, scratch.literals,
            scratch.escapes, scratch.bytes,
        ))  # fmt: skip
        first, fault = divmod(found, 16)
        if fault == compiled.NO_TABLE:
            shipped.build(int(data[start_U[first] + _TABLE_AT]))
        elif fault in plain.FAULTS:
            raise DecodeError(plain.FAULTS[fault])
        else:
            return first


def _decode_one(
    compiled: ModuleType | None, frame: Frame, out_N: Float32, weight: np.float32, *, add: bool
) -> None:
    """A frame of any mode and width.

    Raises:
        DecodeError: it is not what an encoder sends.
    """
    body = np.frombuffer(frame.body, np.uint8)
    if compiled is None or frame.bits not in _TABLES or frame.mode not in (FIXED, OWN):
        _read_plain(frame, out_N, weight, add=add)
        return
    if frame.mode == FIXED:
        table, start = _shipped_table(frame), 0
    else:
        table, start = _own_table(frame)
    fault = compiled.decode_frames(
        body, np.array([start]), np.array([len(body)]), 0, frame.bits, 0, np.ones(1, np.bool_),
        table.lookup_W[None], out_N, CHUNK_VALUES, add, False, weight, scratch.symbols,
        scratch.literals, scratch.escapes, scratch.bytes,
    )  # fmt: skip
    if int(fault) != 16:
        raise DecodeError(plain.FAULTS[int(fault)])


def _shipped_table(frame: Frame) -> Table:
    """
    Raises:
        DecodeError: no such table is shipped.
    """
    shipped = shipped_tables(frame.bits)
    if frame.table >= len(shipped):
        raise DecodeError(f"table {frame.table} is not known")
    return shipped.build(frame.table)


def _own_table(frame: Frame) -> tuple[Table, int]:
    """The table that the body begins with, and how many bytes that takes.

    Raises:
        DecodeError: they are not there.
    """
    size = plain.top_of(frame.bits) + 1
    if frame.table or len(frame.body) < size:
        raise DecodeError("a code table that is not complete")
    return level_table(frame.bits, shown_weights(bytes(frame.body[:size]))), size


def _read_plain(frame: Frame, out_N: Float32, weight: np.float32, *, add: bool) -> None:
    """Any mode and width, by numpy."""
    if frame.mode == ZERO:
        if len(frame.body) or frame.table:
            raise DecodeError("a zero frame with a body")
        if not add:
            out_N[:] = 0
        return
    bits, numel = frame.bits, frame.numel
    if bits not in _TABLES:
        raise DecodeError(f"levels of {bits} bits are not known")
    if frame.mode not in (RAW, ZSTD, FIXED, OWN):
        raise DecodeError(f"mode {frame.mode} is not known here")
    if frame.table >= (len(_TABLES[bits]) if frame.mode == FIXED else 1):
        raise DecodeError(f"table {frame.table} is not known")
    top, blocks = plain.top_of(bits), plain.blocks_of(numel)
    side = 2 + 2 * top + blocks
    body = frame.body
    if frame.mode == OWN:
        table, shown = _own_table(frame)
        body = body[shown:]
    if len(body) < side:
        raise DecodeError("sizes of streams that don't add up")
    (peak,) = _STEP.unpack_from(body)
    book = plain.read_book(np.frombuffer(body[2 : 2 + 2 * top], "<i2"), top)
    code_B = np.frombuffer(body[2 + 2 * top : side], np.uint8)
    scale_B = plain.read_scales(code_B, peak) * weight
    rest = body[side:]
    if frame.mode in (RAW, ZSTD):
        packed = frame.plane(rest, plain.packed_bytes(numel, bits))
        digit_N = plain.unpack_digits(packed, numel, bits)
    else:
        if frame.mode == FIXED:
            table = _shipped_table(frame)
        symbol_T = plain.read_section(rest, plain.length_of(numel, plain.planes_of(bits)), table)
        digit_N = plain.digits_of(symbol_T, numel, bits)
    value_N = plain.values_of(digit_N, book, scale_B)
    if add:
        out_N += value_N
    else:
        out_N[:] = value_N


def _round_stochastically(
    x_N: Float32, inverse_B: Float32, top: int, seed: int
) -> npt.NDArray[np.int8]:
    """floor(x / step + u), u uniform in [0, 1) from a counter-based generator (Philox)."""
    noise_N = np.random.Generator(np.random.Philox(seed)).random(len(x_N), np.float32)
    scaled_N = x_N * np.repeat(inverse_B, plain.BLOCK)[: len(x_N)]
    level_N = np.clip(np.floor(scaled_N + noise_N), -top, top)
    rounded_N: npt.NDArray[np.int8] = level_N.astype(np.int8)
    return rounded_N


def _entropy(counts: Sequence[int]) -> float:
    """Bits per level, its sign included."""
    share = np.array(counts, float) / max(1, sum(counts))
    used = share[share > 0]
    return float(-(used * np.log2(used)).sum() + 1 - share[0])
