"""Chunks that codecs must survive, frames built by hand to lie about themselves, numpy alone."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from tensorcodecs import CODEC_NAMES, backend, plain
from tensorcodecs.ecsq import CODEC_ID, Ecsq
from tensorcodecs.frame import (
    FIXED,
    HEADER,
    OWN,
    RAW,
    ZERO,
    ZSTD,
    assemble,
    checksum_of,
    compressed,
)
from tensorcodecs.huffman import byte_lengths, byte_table, level_table, show_weights, shown_weights
from tensorcodecs.int8 import ZERO_BELOW

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tensorcodecs.frame import Float32
    from tensorcodecs.plain import Int64

Float64 = npt.NDArray[np.float64]

INT8, BF16, FP32, ECSQ = 1, 2, 3, CODEC_ID
EVERY = (*CODEC_NAMES, "ecsq:0.7")
DENSE = tuple(name for name in CODEC_NAMES if name != "sparse")
"""Codecs that send something of every value."""
LENGTHS = (0, 1, 3, 5, 63, 64, 65, 4095, 4096, 4097, 10_001, 12_288, 65_537, 98_303, 98_304)


def bell(numel: int, seed: int = 0) -> Float32:
    """Like a pseudo-gradient: Gaussian, with another spread in each block of 4096."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.standard_normal(numel // 4096 + 1)).repeat(4096)[:numel]
    return (4e-3 * spread * rng.standard_normal(numel)).astype(np.float32)


def chunks(numel: int, seed: int) -> Iterator[tuple[str, Float32]]:
    """(what it is, chunk) of every kind, `numel` values each."""
    rng = np.random.default_rng(seed)
    sign = rng.choice(np.array([-1, 1], np.float32), numel)
    yield "bell", bell(numel, seed)
    yield "zeros", np.zeros(numel, np.float32)
    yield "minus zeros", np.full(numel, -0.0, np.float32)
    yield "constant", np.full(numel, -3.25, np.float32)
    yield "noise", rng.uniform(-1, 1, numel).astype(np.float32)
    yield "heavy tail", rng.standard_t(3, numel).astype(np.float32)
    yield "subnormal", (sign * rng.integers(0, 2**23, numel) * 2.0**-149).astype(np.float32)
    yield "wide", (sign * np.exp2(rng.uniform(-149, 63.9, numel))).astype(np.float32)
    yield "largest", (sign * 2.0**64).astype(np.float32)
    rare = np.zeros(numel, np.float32)
    rare[:: max(1, numel // 7)] = 1.5
    yield "rare", rare
    steep = np.exp2(np.arange(numel // 256 + 1) % 40 * 3.2 - 64).repeat(256)[:numel]
    yield "steep", (steep * rng.standard_normal(numel)).astype(np.float32)


def forge(
    codec: int, numel: int, parameter: int, body: bytes, mode: int = ZSTD, *, bits: int = 0,
    table: int = 0,
) -> bytes:  # fmt: skip
    """A frame with a valid checksum, whatever it says."""
    return assemble(codec, mode, numel, parameter, body, bits=bits, table=table)


def mended(frame: bytes) -> bytes:
    """The same bytes with the size and the checksum that a reader expects."""
    result = bytearray(frame)
    result[20:24] = (len(frame) - HEADER.size).to_bytes(4, "little")
    result[4:8] = checksum_of(bytes(result[8:])).to_bytes(4, "little")
    return bytes(result)


class Parts(NamedTuple):
    """What an ecsq frame is made of, to be put together in whatever mode."""

    codec: Ecsq
    numel: int
    side: bytes
    digits: bytes
    symbols: plain.Symbols
    counts: list[int]

    @classmethod
    def of(cls, codec: Ecsq, x: Float32) -> Parts:
        """`x` must not be all zero."""
        top = plain.top_of(codec.bits)
        step_B = plain.block_steps(x, codec.square, codec.reach)
        peak = int(step_B.max())
        code_B, inverse_B = plain.scale_codes(step_B, peak)
        level_N = plain.levels_of(x, inverse_B, top)
        sum_L, count_L = plain.survey(x, level_N, inverse_B, top)
        entry_L = plain.book_entries(sum_L, count_L)
        side = peak.to_bytes(2, "little", signed=True) + entry_L.tobytes() + code_B.tobytes()
        digits = plain.pack_digits((level_N + top).astype(np.uint8), codec.bits).tobytes()
        symbols = plain.symbols_of(level_N, codec.bits)
        return cls(codec, len(x), side, digits, symbols, [int(c) for c in count_L])

    def frame(self, mode: int, table: int = 0) -> bytes:
        """In this mode, even where an encoder would choose another."""
        shown = b""
        if mode == RAW:
            body = self.digits
        elif mode == ZSTD:
            body = bytes(compressed(np.frombuffer(self.digits, np.uint8)))
        elif mode == OWN:
            shown = show_weights(self.counts)
            own = level_table(self.codec.bits, shown_weights(shown))
            body = plain.encode_symbols(self.symbols, own)
        else:
            assert mode == FIXED
            body = plain.encode_symbols(self.symbols, self.codec.shipped.tables[table])
        return forge(
            ECSQ, self.numel, self.codec.parameter, shown + self.side + body, mode,
            bits=self.codec.bits, table=table,
        )  # fmt: skip

    @property
    def section(self) -> int:
        """Where a FIXED frame's coded section starts."""
        return HEADER.size + len(self.side)


def coded_int8(x: Float32, block: int = 4096) -> bytes:
    """An int8 frame of mode OWN, even where it doesn't pay."""
    numel = len(x)
    padded = np.zeros(-(-numel // block) * block, np.float32)
    padded[:numel] = x
    peak_B = np.abs(padded).reshape(-1, block).max(1, initial=0)
    scale_B = np.where(peak_B >= ZERO_BELOW, peak_B, 0) / np.float32(127)
    inverse_N = np.repeat(1 / np.where(scale_B > 0, scale_B, np.inf), block)[:numel]
    symbol_N = (np.rint(x * inverse_N) + 127).astype(np.uint16)
    return own_int8(
        scale_B.astype(np.float32), symbol_N, np.bincount(symbol_N, minlength=256), block
    )


def own_int8(scales: Float32, symbols: plain.Symbols, counts: Int64, block: int) -> bytes:
    """An int8 frame of these scales and symbols (level + 127)."""
    lengths = byte_lengths(counts.astype(np.int64))
    coded = plain.encode_symbols(symbols, byte_table(lengths))
    return forge(INT8, len(symbols), block, scales.tobytes() + lengths + coded, OWN)


def section_of(sizes: Sequence[int], literals: int, rest: bytes) -> bytes:
    """A coded section that says so."""
    return np.array([*sizes, literals], "<u2").tobytes() + rest


_LOADERS = ("kernels", "sparse_kernels")


@contextmanager
def numpy_alone() -> Iterator[None]:
    """As on a machine without numba."""
    loaders = {loader: getattr(backend, loader) for loader in _LOADERS if hasattr(backend, loader)}
    users = [
        (vars(module), loader)
        for name, module in sys.modules.items()
        if name.startswith("tensorcodecs.") and name != backend.__name__
        for loader in loaders
        if vars(module).get(loader) is loaders[loader]
    ]
    assert users
    for names, loader in users:
        names[loader] = _no_kernels
    try:
        yield
    finally:
        for names, loader in users:
            names[loader] = loaders[loader]


def _no_kernels() -> None:
    return None


def steps_of(frame: bytes, numel: int) -> tuple[Float64, Float64, float]:
    """What an ecsq frame's side data says: each value's step (0: not sent), what stands for the
    magnitudes 1.., in steps, and the largest step."""
    top = plain.top_of(frame[10])
    if frame[9] == ZERO:
        return np.zeros(numel), np.arange(1.0, top + 1), 0.0
    at = HEADER.size + (top + 1 if frame[9] == OWN else 0)
    peak = int.from_bytes(frame[at : at + 2], "little", signed=True)
    entry_L = np.frombuffer(frame, "<i2", top, at + 2)
    code_B = np.frombuffer(frame, np.uint8, -(-numel // 256), at + 2 + 2 * top).astype(float)
    step_B = np.where(code_B == 255, 0, 2 ** ((peak - code_B) / 4))
    return step_B.repeat(256)[:numel], np.arange(1, top + 1) + entry_L / 4096, 2 ** (peak / 4)
