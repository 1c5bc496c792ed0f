"""What every codec does, and the table of codecs by name.

A codec turns one chunk (a float32 vector) into a self-contained frame and back. Chunks are
independent: they can be sent, checked, folded and lost one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from tensorcodecs.ecsq import RATE_MAX, RATE_MIN, Ecsq
from tensorcodecs.errors import DecodeError
from tensorcodecs.frame import HEADER
from tensorcodecs.int8 import Int8
from tensorcodecs.planes import Planes
from tensorcodecs.sparse import KEPT_MAX, Sparse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensorcodecs.frame import Float32, Payload


class Codec(Protocol):
    """Lossy or exact, always deterministic. Safe to share between threads; it keeps no state."""

    @property
    def name(self) -> str:
        """What `get_codec` and a run's manifest call it."""

    def bytes_max(self, numel: int) -> int:
        """The size of the largest frame of `numel` values, to bound a read before it starts."""

    @property
    def codec_id(self) -> int:
        """What its frames' headers call it."""

    def encode(self, x_N: Float32, /) -> bytes:
        """One chunk as a frame. `x_N`: contiguous (N,), N from 0 to `CHUNK_VALUES` (bf16 and fp32:
        to `FRAME_VALUES_MAX`).

        Raises:
            EncodeError: a value is NaN, infinite or beyond `VALUE_ABS_MAX`; says which.
            ValueError: not a contiguous float32 vector of a size that fits.
        """

    def encode_many(self, x_N: Float32, /) -> list[bytes]:
        """Every `CHUNK_VALUES` of `x_N` (N,), the last may be shorter, as a frame each.

        Faster than one by one, and sometimes smaller: neighbours may share a code table.

        Raises: like `encode`.
        """

    def decode_into(self, payload: Payload, out_N: Float32, /) -> None:
        """Overwrite `out_N` (N,) with the frame's values. On an error it holds anything.

        Raises:
            DecodeError: not an intact frame of this codec with exactly N values.
        """

    def decode_many(self, payloads: Sequence[Payload], out_N: Float32, /) -> None:
        """The frames of `encode_many` into `out_N` (N,). On an error it holds anything.

        Raises:
            DecodeError: one is not an intact frame of its chunk.
        """

    def accumulate(self, payload: Payload, weight: float, acc_N: Float32, /) -> None:
        """acc_N += weight * values, through cache-sized scratch. On an error it is untouched.

        `weight` is rounded to float32 and is the caller's to check; see `WeightedMean`.

        Raises:
            DecodeError: not an intact frame of this codec with exactly N values.
        """


_CODECS: Final[dict[str, Codec]] = {
    codec.name: codec
    for codec in (
        Ecsq(0.5, "q4"),
        Ecsq(1.0, "low"),
        Ecsq(2.0, "min"),
        Int8(),
        Int8(lossless=False),
        Planes("bf16", 2, 2),
        Planes("fp32", 3, 4),
        Sparse(name="sparse"),
    )
}

CODEC_NAMES: Final = tuple(_CODECS)

_BY_ID: Final = {codec.codec_id: codec for codec in _CODECS.values()}


def get_codec(name: str) -> Codec:
    """The codec of that name: one of `CODEC_NAMES`, `ecsq:A` with a step of A rms, or
    `sparse:K` with K values of 4096.

    Raises:
        ValueError: there is none.
    """
    if name in _CODECS:
        return _CODECS[name]
    if name.startswith("ecsq:"):
        try:
            return Ecsq(float(name[5:]))
        except ValueError as error:
            raise ValueError(f"codec {name!r}: {error}") from None
    if name.startswith("sparse:"):
        try:
            return Sparse(int(name[7:]))
        except ValueError as error:
            raise ValueError(f"codec {name!r}: {error}") from None
    names = ", ".join(CODEC_NAMES)
    raise ValueError(
        f"no codec {name!r}; there are {names}, ecsq:A (A from {RATE_MIN} to {RATE_MAX:g}) "
        f"and sparse:K (K from 1 to {KEPT_MAX})"
    )


def codec_of(payload: Payload) -> Codec:
    """A codec that reads this frame, whatever it is. Only the codec's number is looked at.

    Raises:
        DecodeError: the payload is too short, or no codec has that number.
    """
    if len(payload) < HEADER.size:
        raise DecodeError(f"{len(payload)} bytes are too few for a frame's header")
    number = memoryview(payload).cast("B")[8]
    if number not in _BY_ID:
        raise DecodeError(f"codec {number} is not known")
    return _BY_ID[number]
