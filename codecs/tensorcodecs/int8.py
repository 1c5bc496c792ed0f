"""Blockwise 8-bit quantisation: one float32 scale per block, then the lossless stage.

Each block of K values is divided by its largest magnitude / 127 and rounded to the nearest level
(ties to even), so its largest value is kept to rounding and nothing is clipped. Rounding is
deterministic: the same values give the same levels on every machine. (Dettmers et al., "8-bit
Optimizers via Block-wise Quantization", ICLR 2022, with uniform levels, because an entropy coder
follows.)

Shape suffixes: N = values, B = blocks, K = values in a block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from tensorcodecs.frame import (
    VALUE_ABS_MAX,
    Bytes,
    DecodeError,
    Float32,
    Frame,
    Payload,
    bytes_max,
    pack,
    refuse_values,
    require_vector,
    scratch,
)
from tensorcodecs.layout import CHUNK_VALUES

if TYPE_CHECKING:
    from collections.abc import Iterator

_CODEC_ID: Final = 1
_LEVELS: Final = np.float32(127)
BLOCK_VALUES: Final = 4096  # 0.008 bits of scale per value; error 0.9 % on pseudo-gradients
_BLOCK_MIN: Final = 64

ZERO_BELOW: Final = 2.0**-100
"""A block with no magnitude above this is sent as zeros: its scale would leave float32's range."""

_SCALE_MIN: Final = np.float32(ZERO_BELOW) / _LEVELS
_SCALE_MAX: Final = np.float32(VALUE_ABS_MAX) / _LEVELS

_Levels = npt.NDArray[np.int8]


class Int8:
    """Worst error per value: its block's largest magnitude / 254 (+ 0.01 %), or `ZERO_BELOW`.

    Size: at most 24 + N + 4 * ceil(N / block) bytes; about 0.9 N on pseudo-gradients, whose levels
    are bell-shaped. Zero blocks decode to exact zeros. `lossless=False` sends the levels as they
    are, for half the encoding time; either reads the other's frames.
    """

    def __init__(self, *, block: int = BLOCK_VALUES, lossless: bool = True) -> None:
        if not _block_ok(block):
            raise ValueError(f"block {block} is not a power of two in {_BLOCK_MIN}..{CHUNK_VALUES}")
        self.name = "int8" if lossless else "int8-raw"
        self._block = block
        self._lossless = lossless

    def bytes_max(self, numel: int) -> int:
        """The size of the largest frame of `numel` values."""
        return bytes_max(numel, 4 * _blocks(numel, self._block))

    def encode(self, x_N: Float32) -> bytes:
        """See `Codec.encode`."""
        require_vector(x_N)
        numel, block = len(x_N), self._block
        scale_B = np.empty(_blocks(numel, block), np.float32)
        plane = scratch.body(numel)
        levels_N = plane.view(np.int8)
        for values, rows, columns in _pieces(numel, block):
            x_BK = x_N[values].reshape(-1, columns)
            level_BK = levels_N[values].reshape(-1, columns)
            work_BK = scratch.floats[: x_BK.size].reshape(-1, columns)
            peak_B = np.maximum(x_BK.max(axis=1), -x_BK.min(axis=1))
            if not peak_B.max() <= VALUE_ABS_MAX:  # NaN is not
                raise refuse_values(x_N)
            live_B = peak_B >= ZERO_BELOW
            scale_B[rows] = np.where(live_B, peak_B / _LEVELS, 0)
            inverse_B = _LEVELS / np.where(live_B, peak_B, np.float32(np.inf))
            np.multiply(x_BK, inverse_B[:, None], out=work_BK)
            np.rint(work_BK, out=work_BK)
            np.copyto(level_BK, work_BK, casting="unsafe")
        side = scale_B.astype("<f4", copy=False).view(np.uint8)
        return pack(_CODEC_ID, block, side, plane, lossless=self._lossless)

    def decode_into(self, payload: Payload, out_N: Float32) -> None:
        """See `Codec.decode_into`."""
        require_vector(out_N)
        block, scale_B, level_N = _read(payload, len(out_N))
        for values, rows, columns in _pieces(len(out_N), block):
            out_BK = out_N[values].reshape(-1, columns)
            np.copyto(out_BK, level_N[values].reshape(-1, columns))
            np.multiply(out_BK, scale_B[rows, None], out=out_BK)

    def accumulate(self, payload: Payload, weight: float, acc_N: Float32) -> None:
        """See `Codec.accumulate`."""
        require_vector(acc_N)
        block, scale_B, level_N = _read(payload, len(acc_N))
        scale_B = scale_B * np.float32(weight)
        for values, rows, columns in _pieces(len(acc_N), block):
            acc_BK = acc_N[values].reshape(-1, columns)
            work_BK = scratch.floats[: acc_BK.size].reshape(-1, columns)
            np.copyto(work_BK, level_N[values].reshape(-1, columns))
            np.multiply(work_BK, scale_B[rows, None], out=work_BK)
            np.add(acc_BK, work_BK, out=acc_BK)


def _block_ok(block: int) -> bool:
    return _BLOCK_MIN <= block <= CHUNK_VALUES and block & (block - 1) == 0


def _blocks(numel: int, block: int) -> int:
    return -(-numel // block)


def _pieces(numel: int, block: int) -> Iterator[tuple[slice, slice, int]]:
    """(values, their blocks, values per block) of pieces that fit the scratch, the tail last."""
    whole = numel - numel % block
    for start in range(0, whole, CHUNK_VALUES):
        stop = min(start + CHUNK_VALUES, whole)
        yield slice(start, stop), slice(start // block, stop // block), block
    if whole < numel:
        yield slice(whole, numel), slice(whole // block, None), numel - whole


def _read(payload: Payload, numel: int) -> tuple[int, Float32, _Levels]:
    """Block size, scales and levels of a frame, all checked."""
    frame = Frame.parse(payload, _CODEC_ID, numel)
    if not _block_ok(frame.block):
        raise DecodeError(f"blocks of {frame.block} values are not allowed")
    side, plane = frame.split(4 * _blocks(numel, frame.block))
    scale_B = _scales(side)
    return frame.block, scale_B, plane.view(np.int8)


def _scales(side: Bytes) -> Float32:
    scale_B = side.view("<f4").astype(np.float32, copy=False)
    good_B = (scale_B == 0) | ((scale_B >= _SCALE_MIN) & (scale_B <= _SCALE_MAX))
    if not good_B.all():
        index = int(np.argmin(good_B))
        raise DecodeError(f"the scale of block {index} is {scale_B[index]}: not one we would send")
    return scale_B
