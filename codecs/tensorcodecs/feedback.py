"""Error feedback for any codec: what a frame leaves out is added to what the next one codes.

With e the vector to code, C a codec and beta the decay,

    e = beta * residual + x,   sent = decode(C(e)),   residual' = e - sent

so that sent + residual' = beta * residual + x in every round: nothing is lost, it only comes later,
and with beta below 1 old leftovers fade before they are stale. This is the e <- beta e + delta,
g = Q(TopK(e)), e <- e - g of SparseLoCo, and with beta = 1 the error feedback of 1-bit SGD (Seide
et al., 2014). Here it is a function of an explicit residual: who calls it keeps the state, and
keeps the old one where what was sent did not arrive.

Shape suffixes: N = values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from tensorcodecs.frame import require_vector
from tensorcodecs.layout import CHUNK_VALUES

if TYPE_CHECKING:
    from tensorcodecs.codec import Codec
    from tensorcodecs.frame import Float32

DEFAULT_DECAY: Final[dict[str, float | None]] = {
    "sparse": 0.95,
    "min": None,
    "low": None,
    "q4": None,
    "ecsq": None,
    "high": None,
    "int8-raw": None,
    "bf16": None,
    "fp32": None,
}
"""The decay to use with a codec; None: without feedback. `sparse` and `ecsq` stand for every
`sparse:K` and `ecsq:A`.

Top-k sends a tenth of the energy: without feedback the rest never arrives. From 1.2 bits per value
up, no codec trained better with feedback than without."""


def decay_of(name: str) -> float | None:
    """`DEFAULT_DECAY` of a codec's name, its number left off; None where nothing is known."""
    return DEFAULT_DECAY.get(name, DEFAULT_DECAY.get(name.partition(":")[0]))


def encode_with_feedback(
    codec: Codec, x_N: Float32, residual_N: Float32, decay: float
) -> tuple[list[bytes], Float32]:
    """The frames of decay * residual + x, and what they leave out of it: a new vector.

    Neither argument is changed. Start with zeros. Decoding the frames and adding the new residual
    gives decay * residual + x, to the rounding of one float32 subtraction. Costs a decoding more
    than encoding does; memory: one vector of N beside the result's frames.

    Raises:
        EncodeError: decay * residual + x is NaN, infinite or beyond `VALUE_ABS_MAX`; says where.
        ValueError: not two contiguous float32 vectors of one length, or a decay outside 0..1.
    """
    require_vector(x_N, 2**62)
    require_vector(residual_N, 2**62)
    if len(x_N) != len(residual_N):
        raise ValueError(f"a residual of {len(residual_N)} values for {len(x_N)} values")
    if not 0 <= decay <= 1:  # NaN is not
        raise ValueError(f"a decay of {decay} is outside 0..1")
    error_N: Float32 = np.multiply(residual_N, np.float32(decay))
    with np.errstate(over="ignore", invalid="ignore"):  # the codec names the value
        np.add(error_N, x_N, out=error_N)
    frames = codec.encode_many(error_N)
    for unit, frame in enumerate(frames):
        chunk_N = error_N[unit * CHUNK_VALUES : (unit + 1) * CHUNK_VALUES]
        codec.accumulate(frame, -1.0, chunk_N)
    return frames, error_N
