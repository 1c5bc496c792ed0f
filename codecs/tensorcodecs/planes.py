"""bfloat16 and float32, with the bytes of all values regrouped so that the last plane compresses.

Byte k of every value goes to plane k. The top plane (sign and seven exponent bits) holds about 3.2
bits per byte on pseudo-gradients; the planes below are noise and travel as they are. Compressing
the values in place would see a mixture of both and gain a third as much.

Shape suffixes: N = values, W = bytes in a value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from tensorcodecs.errors import DecodeError
from tensorcodecs.frame import (
    VALUE_ABS_MAX,
    Bytes,
    Float32,
    Frame,
    Payload,
    bytes_max,
    decode_each,
    encode_each,
    pack,
    refuse_values,
    require_vector,
    scratch,
)
from tensorcodecs.layout import CHUNK_VALUES

if TYPE_CHECKING:
    from collections.abc import Sequence

_Bits = npt.NDArray[np.uint32]

_MAGNITUDE: Final = np.uint32(0x7FFFFFFF)  # all but the sign
_BITS_MAX: Final = int(np.float32(VALUE_ABS_MAX).view(np.uint32))
_TOP_LIMIT: Final = (_BITS_MAX >> 24) + 1  # top bytes below: magnitudes below 2 * VALUE_ABS_MAX


class Planes:
    """The upper `width` bytes of each float32.

    fp32 (width 4) is exact for every value down to subnormals and -0. bf16 (width 2) rounds to
    nearest, ties to even: worst error |x| / 256 (2**-134 for subnormals).
    Size: at most 24 + width * N bytes; about 1.4 N and 3.4 N on pseudo-gradients.
    """

    def __init__(self, name: str, codec_id: int, width: int) -> None:
        self.name = name
        self.codec_id = codec_id
        self._width = width

    def bytes_max(self, numel: int) -> int:
        """The size of the largest frame of `numel` values."""
        return bytes_max(numel, (self._width - 1) * numel)

    def encode(self, x_N: Float32) -> bytes:
        """See `Codec.encode`."""
        require_vector(x_N)
        numel, width = len(x_N), self._width
        plane_WN = scratch.body(width * numel).reshape(width, numel)
        bits_N = x_N.view(np.uint32)
        for start in range(0, numel, CHUNK_VALUES):
            values = slice(start, min(start + CHUNK_VALUES, numel))
            piece_N = bits_N[values]
            work_N = scratch.floats.view(np.uint32)[: len(piece_N)]
            np.bitwise_and(piece_N, _MAGNITUDE, out=work_N)
            if work_N.max() > _BITS_MAX:  # infinities and NaN have the largest bits of all
                raise refuse_values(x_N)
            if width == 2:
                _round_to_bf16(piece_N, work_N)
            else:
                np.copyto(work_N, piece_N)
            for plane_N in plane_WN:
                np.copyto(plane_N[values], work_N, casting="unsafe")  # keeps the low byte
                np.right_shift(work_N, 8, out=work_N)
        side = plane_WN[:-1].reshape(-1)
        return pack(self.codec_id, 0, side, plane_WN[-1], lossless=True)

    def encode_many(self, x_N: Float32) -> list[bytes]:
        """See `Codec.encode_many`."""
        return encode_each(self.encode, x_N)

    def decode_many(self, payloads: Sequence[Payload], out_N: Float32) -> None:
        """See `Codec.decode_many`."""
        decode_each(self.decode_into, payloads, out_N)

    def decode_into(self, payload: Payload, out_N: Float32) -> None:
        """See `Codec.decode_into`."""
        require_vector(out_N)
        plane_WN = self._read(payload, len(out_N))
        for start in range(0, len(out_N), CHUNK_VALUES):
            values = slice(start, min(start + CHUNK_VALUES, len(out_N)))
            _join(plane_WN, values, out_N[values].view(np.uint32))

    def accumulate(self, payload: Payload, weight: float, acc_N: Float32) -> None:
        """See `Codec.accumulate`."""
        require_vector(acc_N)
        plane_WN = self._read(payload, len(acc_N))
        for start in range(0, len(acc_N), CHUNK_VALUES):
            values = slice(start, min(start + CHUNK_VALUES, len(acc_N)))
            work_N = scratch.floats[: values.stop - start]
            _join(plane_WN, values, work_N.view(np.uint32))
            np.multiply(work_N, np.float32(weight), out=work_N)
            np.add(acc_N[values], work_N, out=acc_N[values])

    def _read(self, payload: Payload, numel: int) -> list[Bytes]:
        """The planes of a frame, low byte first, checked."""
        frame = Frame.parse(payload, self.codec_id, numel)
        frame.require()
        if frame.parameter != 0:
            raise DecodeError(f"{self.name} has no blocks, the header says {frame.parameter}")
        side, top_N = frame.split((self._width - 1) * numel)
        if numel and np.bitwise_and(top_N, 0x7F).max() >= _TOP_LIMIT:
            raise DecodeError("a value is NaN, infinite or beyond 2**65")
        return [*side.reshape(self._width - 1, numel), top_N]


def _round_to_bf16(bits_N: _Bits, out_N: _Bits) -> None:
    """The upper halves of `bits_N`, rounded to nearest with ties to even, in the lower 16 bits."""
    np.right_shift(bits_N, 16, out=out_N)
    np.bitwise_and(out_N, 1, out=out_N)
    np.add(out_N, 0x7FFF, out=out_N)
    np.add(out_N, bits_N, out=out_N)
    np.right_shift(out_N, 16, out=out_N)


def _join(plane_WN: list[Bytes], values: slice, out_N: _Bits) -> None:
    """Put the planes' bytes together again as the upper bytes of `out_N`."""
    np.copyto(out_N, plane_WN[-1][values])
    for plane_N in plane_WN[-2::-1]:
        np.left_shift(out_N, 8, out=out_N)
        np.bitwise_or(out_N, plane_N[values], out=out_N)
    np.left_shift(out_N, 32 - 8 * len(plane_WN), out=out_N)
