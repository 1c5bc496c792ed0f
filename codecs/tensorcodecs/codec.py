"""What every codec does, and the table of codecs by name.

A codec turns one chunk (a float32 vector) into a self-contained frame and back. Chunks are
independent: they can be sent, checked, folded and lost one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from tensorcodecs.int8 import Int8
from tensorcodecs.planes import Planes

if TYPE_CHECKING:
    from tensorcodecs.frame import Float32, Payload


class Codec(Protocol):
    """Lossy or exact, always deterministic. Safe to share between threads; it keeps no state."""

    @property
    def name(self) -> str:
        """What `get_codec` and a run's manifest call it."""

    def bytes_max(self, numel: int) -> int:
        """The size of the largest frame of `numel` values, to bound a read before it starts."""

    def encode(self, x_N: Float32, /) -> bytes:
        """One chunk as a frame. `x_N`: contiguous (N,), N from 0 to `FRAME_VALUES_MAX`.

        Raises:
            EncodeError: a value is NaN, infinite or beyond `VALUE_ABS_MAX`; says which.
            ValueError: not a contiguous float32 vector of a size that fits.
        """

    def decode_into(self, payload: Payload, out_N: Float32, /) -> None:
        """Overwrite `out_N` (N,) with the frame's values. On an error it is untouched.

        Raises:
            DecodeError: not an intact frame of this codec with exactly N values.
        """

    def accumulate(self, payload: Payload, weight: float, acc_N: Float32, /) -> None:
        """acc_N += weight * values, through cache-sized scratch. On an error it is untouched.

        `weight` is rounded to float32 and is the caller's to check; see `WeightedMean`.

        Raises:
            DecodeError: not an intact frame of this codec with exactly N values.
        """


_CODECS: Final[dict[str, Codec]] = {
    codec.name: codec
    for codec in (Int8(), Int8(lossless=False), Planes("bf16", 2, 2), Planes("fp32", 3, 4))
}

CODEC_NAMES: Final = tuple(_CODECS)


def get_codec(name: str) -> Codec:
    """The codec of that name, one of `CODEC_NAMES`.

    Raises:
        ValueError: there is none.
    """
    try:
        return _CODECS[name]
    except KeyError:
        raise ValueError(f"no codec {name!r}; there are {', '.join(CODEC_NAMES)}") from None
