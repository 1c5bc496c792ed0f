"""A change of one adapted layer as bytes: the one type of contribution in a hybrid run.

    kind u8 | m u32 | n u32 | base 8 bytes | body                  all little-endian

`base` is the tag of the layer's outer state that the change was made on (`tag_of_state`). Bodies:

    lowrank   rank u16, scale f32, then r (n + m) values: A row by row, then B
    dense     m n values, by any codec but `sparse`
    sparse    m n values by the codec `sparse`
    seeds     segments u8, and of each: A's seed u64, directions' seed u64, rank u16, scale f32,
              count u16, then `count` scalars f32

Values are coded by a codec of `tensorcodecs`, in frames of `CHUNK_VALUES`: bytes of each u32, then
the frames. A segment of seeds stands for

    scale * (sum over j of scalars[j] * z_j) A        A = gaussian(A's seed) / sqrt(n), (r, n)

with z_j (m, r) of +1 and -1 drawn from the j-th seed that derives from the directions' seed, both
by `peer.finetune.perturb`, so the same on every machine. Directions may be used again, and their
scalars summed up: any number of steps fits into `SCALARS_MAX` of them.

Bytes come from strangers: every size is bounded before memory is spent, values are finite and
bounded, a rank fits the layer and the run, and each content has one spelling but for the codec.

Shapes: m x n = the layer, r = rank, K = scalars.
"""

from __future__ import annotations

import functools
import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from peer.finetune.changes import SCALE_MAX, Change, Dense, Expanded, LowRank, check_change
from peer.finetune.products import stack
from tensorcodecs import CHUNK_VALUES, VALUE_ABS_MAX, Codec, DecodeError, codec_of, get_codec

Float32 = npt.NDArray[np.float32]
Kind = Literal["lowrank", "dense", "sparse", "seeds"]

KINDS: Final[dict[str, int]] = {"lowrank": 1, "dense": 2, "sparse": 3, "seeds": 4}
"""What a payload's first byte says."""
SCALARS_MAX: Final = 512
"""Directions of a segment: 2 KiB, and some 0.1 s to expand in a layer of 1000 x 1000 at rank 4."""
SEGMENTS_MAX: Final = 4
"""A zeroth-order peer's work of so many rounds that missed their exchanges."""
SCALAR_MAX: Final = 2.0**10
"""Of a scalar: steps are far below 1. Sums of all of them stay far from float32's end."""
TAG_BYTES: Final = 8

_HEAD: Final = struct.Struct("<BII8s")
_LOWRANK: Final = struct.Struct("<Hf")
_SEGMENT: Final = struct.Struct("<QQHfH")
_LENGTH: Final = struct.Struct("<I")
_SPARSE_ID: Final = get_codec("sparse").codec_id


@dataclass(frozen=True, slots=True)
class Layer:
    """An adapted layer, as everybody in the run knows it."""

    name: str
    """Of its module; seeds are expanded by it."""
    m: int
    """Outputs."""
    n: int
    """Inputs."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.m, self.n


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A zeroth-order peer's work on one A.

    Raises (on construction):
        ValueError: no rank, a scale or scalars out of range, or too many of them.
    """

    a_seed: int
    z_seed: int
    rank: int
    scale: float
    """alpha / r; rounded to float32 on the way."""
    scalars: Float32
    """(K,): how far along each direction."""

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 0xFFFF or not 0.0 < self.scale <= SCALE_MAX:
            raise ValueError(f"seeds of rank {self.rank} and scale {self.scale}")
        if self.scalars.shape != (len(self.scalars),) or len(self.scalars) > SCALARS_MAX:
            raise ValueError(f"{self.scalars.shape} scalars, at most {SCALARS_MAX}")
        if not (np.abs(self.scalars) <= SCALAR_MAX).all():  # NaN fails
            raise ValueError(f"a scalar that is not finite or beyond {SCALAR_MAX:g}")

    def expand(self, layer: Layer) -> LowRank:
        """What it stands for in `layer`. O(K m r) time."""
        from peer.finetune.perturb import Directions, expand

        used = np.flatnonzero(self.scalars)
        seeds = np.array([direction_seed(self.z_seed, int(j)) for j in used], np.uint64)
        along = Directions(seeds, self.scalars[used])
        B_mr = expand(along, f"{layer.name}.B", (layer.m, self.rank), "rademacher")
        scale = float(np.float32(self.scale))
        return LowRank(drawn_rows(layer, self.rank, self.a_seed), B_mr, scale)


def drawn_rows(layer: Layer, rank: int, seed: int) -> Float32:
    """(rank, n): the A that a seed stands for; rows are of length 1 on average."""
    from peer.finetune.perturb import Directions, expand

    one = Directions.of([(seed, 1.0)])
    made = expand(one, f"{layer.name}.A", (rank, layer.n), "gaussian")
    return made * np.float32(1.0 / math.sqrt(layer.n))


def direction_seed(z_seed: int, index: int) -> int:
    """The seed of the `index`-th direction."""
    from peer.finetune.perturb import derive_seed

    return derive_seed("hybrid/1", z_seed, index)


def tag_of_state(values: Float32) -> bytes:
    """What names a layer's outer state in a contribution's header."""
    return hashlib.sha256(values.data).digest()[:TAG_BYTES]


# ── to bytes ─────────────────────────────────────────────────────────────────────────────
def encode_lowrank(layer: Layer, base: bytes, change: LowRank, codec: Codec) -> bytes:
    """Raises EncodeError: a value is not finite or beyond what codecs carry."""
    factors = np.concatenate([change.A.ravel(), change.B.ravel()]).astype(np.float32)
    body = _LOWRANK.pack(change.rank, change.scale) + _pack(factors, codec)
    return _head("lowrank", layer, base) + body


def encode_dense(layer: Layer, base: bytes, values: Float32, codec: Codec) -> bytes:
    """`values`: (m, n). With the codec `sparse` it is of that kind. Raises like
    `encode_lowrank`."""
    kind: Kind = "sparse" if codec.codec_id == _SPARSE_ID else "dense"
    return _head(kind, layer, base) + _pack(np.ascontiguousarray(values.reshape(-1)), codec)


def encode_seeds(layer: Layer, base: bytes, segments: Sequence[Segment]) -> bytes:
    """At most `SEGMENTS_MAX` of them; none stands for no change."""
    if len(segments) > SEGMENTS_MAX:
        raise ValueError(f"{len(segments)} segments of seeds, at most {SEGMENTS_MAX}")
    parts = [_head("seeds", layer, base), bytes([len(segments)])]
    for s in segments:
        parts.append(_SEGMENT.pack(s.a_seed, s.z_seed, s.rank, s.scale, len(s.scalars)))
        parts.append(s.scalars.astype("<f4").tobytes())
    return b"".join(parts)


def _head(kind: Kind, layer: Layer, base: bytes) -> bytes:
    if len(base) != TAG_BYTES:
        raise ValueError(f"a tag of {len(base)} bytes")
    return _HEAD.pack(KINDS[kind], layer.m, layer.n, base)


def _pack(values: Float32, codec: Codec) -> bytes:
    frames = codec.encode_many(values)
    return b"".join([*(_LENGTH.pack(len(frame)) for frame in frames), *frames])


# ── from bytes ───────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, slots=True)
class Read:
    """What came in."""

    kind: str
    base: bytes
    change: Change


def decode(layer: Layer, payload: bytes, rank_max: int, admit: Sequence[str]) -> Read:
    """A stranger's change of `layer`. Seeds are not expanded yet.

    Raises:
        DecodeError: not an intact change of this layer, of a kind that the run does not admit, of
            a rank above `rank_max` or the layer's, or with values that nobody who trains would
            send.
    """
    if len(payload) < _HEAD.size:
        raise DecodeError(f"{len(payload)} bytes are too few for a change")
    number, m, n, base = _HEAD.unpack_from(payload)
    kind = next((name for name, known in KINDS.items() if known == number), None)
    if kind is None:
        raise DecodeError(f"{layer.name}: a change of kind {number}, which is none")
    if kind not in admit:
        raise DecodeError(f"{layer.name}: a {kind} change, which this run does not admit")
    if (m, n) != layer.shape:
        raise DecodeError(f"{layer.name}: a change of {m} x {n}, not {layer.m} x {layer.n}")
    body = memoryview(payload)[_HEAD.size :]
    try:
        change: Change
        match kind:
            case "lowrank":
                change = _lowrank(layer, body, rank_max)
            case "seeds":
                change = _seeds(layer, body, rank_max)
            case _:
                change = _dense(layer, body, sparse=kind == "sparse")
        check_change(change, layer.shape)
    except ValueError as error:  # a DecodeError is one
        raise DecodeError(f"{layer.name}: {error}") from None
    return Read(kind, bytes(base), change)


def _lowrank(layer: Layer, body: memoryview, rank_max: int) -> LowRank:
    if len(body) < _LOWRANK.size:
        raise DecodeError("low-rank factors that are cut short")
    rank, scale = _LOWRANK.unpack_from(body)
    _check_rank(layer, rank, rank_max)
    values = _unpack(body[_LOWRANK.size :], rank * (layer.m + layer.n), sparse=None)
    cut = rank * layer.n
    A_rn, B_mr = values[:cut].reshape(rank, layer.n), values[cut:].reshape(layer.m, rank)
    return LowRank(A_rn, B_mr, scale)


def _dense(layer: Layer, body: memoryview, *, sparse: bool) -> Dense:
    values = _unpack(body, layer.m * layer.n, sparse=sparse)
    return Dense(values.reshape(layer.shape))


def _seeds(layer: Layer, body: memoryview, rank_max: int) -> Change:
    if not len(body) or body[0] > SEGMENTS_MAX:
        raise DecodeError(f"{body[0] if len(body) else 'no'} segments, at most {SEGMENTS_MAX}")
    segments, at = [], 1
    for _ in range(body[0]):
        if len(body) - at < _SEGMENT.size:
            raise DecodeError("seeds that are cut short")
        a_seed, z_seed, rank, scale, count = _SEGMENT.unpack_from(body, at)
        _check_rank(layer, rank, rank_max)
        at += _SEGMENT.size
        if count > SCALARS_MAX or len(body) - at < 4 * count:
            raise DecodeError(f"{count} scalars in {len(body) - at} bytes, at most {SCALARS_MAX}")
        scalars = np.frombuffer(body, "<f4", count, at).astype(np.float32)
        segments.append(Segment(a_seed, z_seed, rank, scale, scalars))
        at += 4 * count
    if at != len(body):
        raise DecodeError(f"{len(body) - at} bytes left over after the seeds")
    return Expanded(functools.partial(expanded, layer, segments), layer.shape)


def expanded(layer: Layer, segments: Sequence[Segment]) -> LowRank:
    """The sum of what segments stand for; no segments are no change."""
    if not segments:
        return LowRank(np.zeros((1, layer.n)), np.zeros((layer.m, 1)))
    return stack([(1.0, segment.expand(layer)) for segment in segments])


def _check_rank(layer: Layer, rank: int, rank_max: int) -> None:
    top = min(rank_max, layer.m, layer.n)
    if not 1 <= rank <= top:
        raise DecodeError(f"a rank of {rank}, not 1 to {top}")


def _unpack(body: memoryview, numel: int, *, sparse: bool | None) -> Float32:
    """`numel` values. `sparse`: whether the codec must be, or must not be, the sparse one."""
    count = -(-numel // CHUNK_VALUES)
    at = count * _LENGTH.size
    if len(body) < at:
        raise DecodeError("values that are cut short")
    lengths = [_LENGTH.unpack_from(body, i * _LENGTH.size)[0] for i in range(count)]
    if at + sum(lengths) != len(body):
        raise DecodeError(f"frames of {sum(lengths)} bytes in {len(body) - at}")
    frames: list[Any] = []
    for length in lengths:
        frames.append(body[at : at + length])
        at += length
    codecs = [codec_of(frame) for frame in frames]
    if any(codec is not codecs[0] for codec in codecs):
        raise DecodeError("frames of several codecs")
    if sparse is not None and sparse != (codecs[0].codec_id == _SPARSE_ID):
        raise DecodeError(f"values by the codec {codecs[0].name} in a change of another kind")
    values = np.empty(numel, np.float32)
    codecs[0].decode_many(frames, values)
    if not (np.abs(values) <= VALUE_ABS_MAX).all():
        raise DecodeError("values that are not finite")
    return values
