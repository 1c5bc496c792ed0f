"""Named tensors to bytes and back, small and fast, for peers that average what they learned.

    layout = Layout.of([("w", (512, 512)), ("b", (512,))])     # the same order on every peer
    codec = get_codec("high")
    frames = [codec.encode(flat[layout.unit_slice(unit)]) for unit in range(layout.units)]

    mean = WeightedMean.of_span(layout, 0, layout.units, codec)
    mean.fold(unit, weight, frame)                              # as they arrive, in any order
    coded = mean.finish()                                       # one frame per unit
    codec.decode_into(coded[unit], flat[layout.unit_slice(unit)])

A `Layout` cuts the flat float32 vector into *units* of `CHUNK_VALUES` values; each becomes one
self-contained frame with its own checksum. Codecs: `int8` (about 7.2 bits per value, error below
0.4 % of the largest value in a block of 4096), `int8-raw` (8 bits, half the encoding time), `bf16`
(about 11.2 bits) and `fp32` (exact, about 27.2 bits).

Frames come from strangers: every size is checked before memory is spent, NaN and infinity are
refused, and every failure is a `DecodeError` raised before anything changes. Needs numpy and
zstandard; knows nothing of networks or torch.
"""

from tensorcodecs.chooser import Choice, choose
from tensorcodecs.codec import CODEC_NAMES, Codec, codec_of, get_codec
from tensorcodecs.container import Container, pack_vector, unpack_vector
from tensorcodecs.ecsq import Ecsq
from tensorcodecs.errors import DecodeError, EncodeError
from tensorcodecs.feedback import DEFAULT_DECAY, decay_of, encode_with_feedback
from tensorcodecs.frame import FRAME_VALUES_MAX, VALUE_ABS_MAX
from tensorcodecs.layout import CHUNK_VALUES, Layout
from tensorcodecs.reduce import WEIGHT_MAX, WEIGHT_MIN, Reduced, WeightedMean, reduce_unit

__all__ = [
    "CHUNK_VALUES",
    "CODEC_NAMES",
    "DEFAULT_DECAY",
    "FRAME_VALUES_MAX",
    "VALUE_ABS_MAX",
    "WEIGHT_MAX",
    "WEIGHT_MIN",
    "Choice",
    "Codec",
    "Container",
    "DecodeError",
    "Ecsq",
    "EncodeError",
    "Layout",
    "Reduced",
    "WeightedMean",
    "choose",
    "codec_of",
    "decay_of",
    "encode_with_feedback",
    "get_codec",
    "pack_vector",
    "reduce_unit",
    "unpack_vector",
]
