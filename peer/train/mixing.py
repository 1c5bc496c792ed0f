"""The arithmetic of a mix: what is lent, the difference, and what it adds. In the codec thread.

A unit's outer state is S vectors of U values (parameters, momentum, ...), of which the first V are
mixed. The lender shows them coded for a receiver that is near (`tensorcodecs.nearby`), or exactly.
The borrower codes half the difference, d, with the run's codec. Whatever error that has, both sides
apply the same bytes, one with +, the other with -: it makes the mix a little less than half and
half, and changes no sum.

Shapes: S = vectors of the state, V = those that are mixed, U = values of a unit.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from protocols.messages import HINT_MAX
from tensorcodecs import VALUE_ABS_MAX, Codec, DecodeError, codec_of, get_codec
from tensorcodecs.frame import Float32, Frame
from tensorcodecs.nearby import CODEC_ID, TooFarError, decode_near, encode_near, steps_for

RATIO: Final = 64.0
"""How far apart two states are at most, in root mean squares of the momentum, for who has not
measured."""
HEADROOM: Final = 2.0  # groups may have moved apart since the last time
LOAN_BITS: Final = 6
"""Per value that is lent: a step of half the measured distance (16 x 2 / 2^6), an error of 0.14
of it, like q4's, in which half the difference is coded anyway. More bits would be lost there."""
GUESS_BITS: Final = 12
"""For who has not measured: `RATIO` may be far more than need be, and a second look is dearer."""
VECTORS_MAX: Final = 8
_LENGTHS: Final = struct.Struct("<B")
_LENGTH: Final = struct.Struct("<I")
_EXACT: Final = get_codec("fp32")


@dataclass(frozen=True, slots=True)
class Difference:
    """Half of what lies between two states of a unit."""

    payload: bytes
    ratios: tuple[float, ...]
    """Each vector's distance, in root mean squares of our last vector (the momentum)."""


class Mixer(Protocol):
    """What gossip needs of this arithmetic; `UnitMixer` says what each means."""

    def lend(self, state_SU: Float32, hints: Sequence[float], *, exact: bool = False) -> bytes: ...

    def difference(self, unit: int, ours_SU: Float32, lent: bytes) -> Difference: ...

    def check(self, unit: int, payload: bytes) -> None: ...


class UnitMixer:
    """Lends, subtracts and decodes the first `vectors` vectors of a state. Keeps nothing.

    The state's last vector tells what a step's typical size is, whether it is mixed or not.
    """

    def __init__(self, sizes: Sequence[int], vectors: int, codec: Codec) -> None:
        """`sizes`: values in each unit. `codec`: of differences."""
        assert 1 <= vectors <= VECTORS_MAX
        self._sizes = tuple(sizes)
        self.vectors = vectors
        self._codec = codec

    def lend(self, state_SU: Float32, hints: Sequence[float], *, exact: bool = False) -> bytes:
        """The state of a unit for somebody near; `hints`: their ratios of last time, if any."""
        typical_U = state_SU[-1] if np.any(state_SU[-1]) else state_SU[0]
        measured = len(hints) == self.vectors
        bits = LOAN_BITS if measured else GUESS_BITS
        frames = []
        for index, x_U in enumerate(state_SU[: self.vectors]):
            if exact:
                frames.append(_EXACT.encode(np.ascontiguousarray(x_U)))
                continue
            ratio = HEADROOM * hints[index] if measured else RATIO
            step_B = steps_for(typical_U, min(max(ratio, 2.0**-20), HINT_MAX), bits=bits)
            frames.append(encode_near(np.ascontiguousarray(x_U), step_B, bits=bits))
        return _joined(frames)

    def difference(self, unit: int, ours_SU: Float32, lent: bytes) -> Difference:
        """d = (theirs - ours) / 2, coded.

        Raises:
            TooFarError: they should show it exactly.
            DecodeError: what they showed is no state of this unit.
        """
        typical = math.sqrt(float(np.mean(np.square(ours_SU[-1], dtype=np.float64)))) or 1.0
        frames, ratios = [], []
        for ours_U, frame in zip(ours_SU[: self.vectors], self._split(lent), strict=True):
            theirs_U = _read_lent(frame, np.ascontiguousarray(ours_U))
            gap_U = theirs_U.astype(np.float64) - ours_U
            rms = math.sqrt(float(np.mean(np.square(gap_U)))) if len(gap_U) else 0.0
            ratios.append(min(max(rms / typical, 2.0**-20), HINT_MAX))
            half_U = np.clip(gap_U / 2, -VALUE_ABS_MAX, VALUE_ABS_MAX).astype(np.float32)
            frames.append(self._codec.encode(half_U))
        return Difference(_joined(frames), tuple(ratios))

    def check(self, unit: int, payload: bytes) -> None:
        """Whether a stranger's d can be that of this unit, by its headers and checksums.

        Raises:
            DecodeError: it can't.
        """
        for frame in self._split(payload):
            Frame.parse(frame, codec_of(frame).codec_id, self._sizes[unit])

    def decode(self, unit: int, payload: bytes) -> Float32:
        """d (V, U).

        Raises:
            DecodeError: it is none of this unit.
        """
        d_VU = np.empty((self.vectors, self._sizes[unit]), np.float32)
        for d_U, frame in zip(d_VU, self._split(payload), strict=True):
            codec_of(frame).decode_into(frame, d_U)
        return d_VU

    def _split(self, payload: bytes) -> list[bytes]:
        """The vectors' frames.

        Raises:
            DecodeError: another number of them, or lengths that don't add up.
        """
        at = _LENGTHS.size + self.vectors * _LENGTH.size
        if len(payload) < at or payload[0] != self.vectors:
            raise DecodeError(f"not the {self.vectors} vectors of a state")
        frames = []
        for index in range(self.vectors):
            (size,) = _LENGTH.unpack_from(payload, _LENGTHS.size + index * _LENGTH.size)
            if len(payload) - at < size:
                raise DecodeError("a state that is cut short")
            frames.append(payload[at : at + size])
            at += size
        if at != len(payload):
            raise DecodeError("a state that goes on after its end")
        return frames


def add_mix(state_VU: Sequence[Float32], d_VU: Float32, sign: int) -> None:
    """state += sign * d, in float32, in place: the same bits everywhere."""
    for x_U, d_U in zip(state_VU, d_VU, strict=True):
        (np.add if sign > 0 else np.subtract)(x_U, d_U, out=x_U)


def _joined(frames: Sequence[bytes]) -> bytes:
    lengths = b"".join(_LENGTH.pack(len(frame)) for frame in frames)
    return b"".join([_LENGTHS.pack(len(frames)), lengths, *frames])


def _read_lent(frame: bytes, ours_U: Float32) -> Float32:
    if len(frame) > 8 and frame[8] == CODEC_ID:
        return decode_near(frame, ours_U)
    theirs_U = np.empty_like(ours_U)
    codec = codec_of(frame)
    if codec.codec_id != _EXACT.codec_id:
        raise DecodeError("a state that is neither for near receivers nor exact")
    codec.decode_into(frame, theirs_U)
    return theirs_U


__all__ = [
    "GUESS_BITS", "LOAN_BITS", "RATIO",
    "Difference", "Mixer", "TooFarError", "UnitMixer", "add_mix",
]  # fmt: skip
