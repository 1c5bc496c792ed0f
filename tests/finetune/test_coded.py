"""A layer's change as bytes: what goes in comes out, and nothing else comes in."""

from __future__ import annotations

import contextlib
import struct

import numpy as np
import pytest

from peer.finetune.changes import Expanded, LowRank
from peer.finetune.coded import (
    KINDS,
    SCALAR_MAX,
    SCALARS_MAX,
    SEGMENTS_MAX,
    Layer,
    Segment,
    decode,
    direction_seed,
    drawn_rows,
    encode_dense,
    encode_lowrank,
    encode_seeds,
    tag_of_state,
)
from peer.finetune.perturb import z_of
from peer.manifest import KINDS as MANIFEST_KINDS
from tensorcodecs import DecodeError, get_codec

LAYER = Layer("blocks.0.up", 12, 20)
ALL = tuple(KINDS)
BASE = tag_of_state(np.zeros(3, np.float32))
FP32 = get_codec("fp32")


def _lowrank(rank: int = 3, scale: float = 0.5) -> LowRank:
    rng = np.random.default_rng(rank)
    A, B = rng.standard_normal((rank, LAYER.n)), rng.standard_normal((LAYER.m, rank))
    return LowRank(A.astype(np.float32), B.astype(np.float32), scale)


def _segment(count: int = 5, rank: int = 2) -> Segment:
    scalars = np.linspace(-1, 1, count, dtype=np.float32)
    return Segment(2**64 - 1, 7, rank, 4.0, scalars)


def test_the_manifest_knows_the_same_kinds() -> None:
    assert sorted(KINDS) == list(MANIFEST_KINDS)


def test_factors_come_back_to_the_last_bit_with_their_scale_and_base() -> None:
    change = _lowrank()
    read = decode(LAYER, encode_lowrank(LAYER, BASE, change, FP32), 4, ALL)
    assert (read.kind, read.base) == ("lowrank", BASE)
    assert isinstance(read.change, LowRank)
    assert (read.change.A == change.A).all()
    assert (read.change.B == change.B).all()
    assert read.change.scale == 0.5


@pytest.mark.parametrize(
    ("codec", "kind"), [("fp32", "dense"), ("q4", "dense"), ("sparse", "sparse")]
)
def test_values_come_back_as_their_codec_makes_them(codec: str, kind: str) -> None:
    layer = Layer("wide", 300, 400)  # more than one frame
    values = np.random.default_rng(0).standard_normal(layer.shape).astype(np.float32)
    read = decode(layer, encode_dense(layer, BASE, values, get_codec(codec)), 4, ALL)
    assert read.kind == kind
    assert not isinstance(read.change, Expanded)
    made = read.change.dense()
    if codec == "fp32":
        assert (made == values).all()
    else:
        assert float((made * values).sum()) > 0.0
        assert np.linalg.norm(made - values) < np.linalg.norm(values)


def test_seeds_stand_for_the_sum_that_the_text_says() -> None:
    one, other = _segment(), Segment(3, 4, 1, 0.25, np.array([0.5], np.float32))
    read = decode(LAYER, encode_seeds(LAYER, BASE, [one, other]), 4, ALL)
    assert isinstance(read.change, Expanded)
    expected = np.zeros(LAYER.shape)
    for s in (one, other):
        A = z_of("blocks.0.up.A", s.rank * LAYER.n, s.a_seed, "gaussian").numpy()
        A = A.reshape(s.rank, LAYER.n) / np.sqrt(LAYER.n)
        for j, scalar in enumerate(s.scalars):
            z = z_of("blocks.0.up.B", LAYER.m * s.rank, direction_seed(s.z_seed, j), "rademacher")
            expected += s.scale * scalar * z.numpy().reshape(LAYER.m, s.rank) @ A
    made = read.change.made()
    assert np.abs(made.dense() - expected).max() < 1e-5
    assert np.abs(drawn_rows(LAYER, 2, 1) - drawn_rows(LAYER, 2, 2)).max() > 0.1


def test_no_seeds_are_no_change() -> None:
    read = decode(LAYER, encode_seeds(LAYER, BASE, []), 4, ALL)
    assert isinstance(read.change, Expanded)
    assert not read.change.made().dense().any()


def test_seeds_are_small_whatever_the_layers_size() -> None:
    full = Segment(1, 2, 2, 1.0, np.ones(SCALARS_MAX, np.float32))
    huge = Layer("huge", 50_000, 50_000)
    assert len(encode_seeds(huge, BASE, [full] * SEGMENTS_MAX)) <= 8400


def _payloads() -> list[bytes]:
    values = np.ones(LAYER.shape, np.float32)
    return [
        encode_lowrank(LAYER, BASE, _lowrank(), FP32),
        encode_lowrank(LAYER, BASE, _lowrank(), get_codec("q4")),
        encode_dense(LAYER, BASE, values, FP32),
        encode_dense(LAYER, BASE, values, get_codec("sparse")),
        encode_seeds(LAYER, BASE, [_segment(), _segment()]),
    ]


@pytest.mark.parametrize("index", range(5))
def test_every_truncation_and_every_addition_is_refused(index: int) -> None:
    payload = _payloads()[index]
    decode(LAYER, payload, 4, ALL)
    for cut in range(len(payload)):
        with pytest.raises(DecodeError):
            decode(LAYER, payload[:cut], 4, ALL)
    with pytest.raises(DecodeError):
        decode(LAYER, payload + b"\0", 4, ALL)


def _with(payload: bytes, at: int, packed: bytes) -> bytes:
    return payload[:at] + packed + payload[at + len(packed) :]


HEAD = 17


def _hostile() -> dict[str, tuple[bytes, str]]:
    lowrank, _, dense, sparse, seeds = _payloads()
    nan, inf = (struct.pack("<f", x) for x in (float("nan"), float("inf")))
    bad = np.frombuffer(struct.pack("<f", 2 * SCALAR_MAX), np.uint8).tobytes()
    return {
        "no such kind": (_with(lowrank, 0, b"\x07"), "kind 7, which is none"),
        "another layer": (_with(lowrank, 1, struct.pack("<II", 20, 12)), "change of 20 x 12"),
        "a huge layer": (_with(dense, 1, struct.pack("<II", 2**32 - 1, 2**32 - 1)), "change of"),
        "rank 0": (_with(lowrank, HEAD, struct.pack("<H", 0)), "rank of 0"),
        "rank above the run's": (encode_lowrank(LAYER, BASE, _lowrank(5), FP32), "rank of 5, not"),
        "a huge rank": (_with(lowrank, HEAD, struct.pack("<H", 65535)), "rank of 65535"),
        "scale NaN": (_with(lowrank, HEAD + 2, nan), "scale"),
        "scale 0": (_with(lowrank, HEAD + 2, struct.pack("<f", 0.0)), "scale"),
        "scale huge": (_with(lowrank, HEAD + 2, struct.pack("<f", 1e9)), "scale"),
        "sparse as dense": (_with(sparse, 0, b"\x02"), "change of another kind"),
        "dense as sparse": (_with(dense, 0, b"\x03"), "change of another kind"),
        "a frame damaged": (_with(dense, len(dense) - 3, b"\xff\x00\xff"), "blocks.0.up"),
        "a frame of 4 GiB": (_with(dense, HEAD, struct.pack("<I", 2**32 - 1)), "frames of"),
        "many segments": (_with(seeds, HEAD, b"\xff"), "255 segments"),
        "many scalars": (_with(seeds, HEAD + 23, struct.pack("<H", 65535)), "65535 scalars"),
        "seeds of a high rank": (_with(seeds, HEAD + 17, struct.pack("<H", 9)), "rank of 9"),
        "seeds of scale inf": (_with(seeds, HEAD + 19, inf), "scale"),
        "a scalar NaN": (_with(seeds, HEAD + 25, nan), "not finite"),
        "a scalar too large": (_with(seeds, HEAD + 25, bad), "beyond"),
    }


@pytest.mark.parametrize("name", list(_hostile()))
def test_what_does_not_belong_is_refused_by_the_layers_name(name: str) -> None:
    payload, words = _hostile()[name]
    with pytest.raises(DecodeError, match=words):
        decode(LAYER, payload, 4, ALL)


def test_kinds_that_the_run_does_not_admit_are_refused() -> None:
    for payload, kind in zip(
        _payloads(), ("lowrank", "lowrank", "dense", "sparse", "seeds"), strict=True
    ):
        others = tuple(other for other in KINDS if other != kind)
        with pytest.raises(DecodeError, match=f"a {kind} change, which this run does not admit"):
            decode(LAYER, payload, 4, others)


def test_values_that_are_not_finite_are_refused() -> None:
    change = _lowrank()
    good = encode_lowrank(LAYER, BASE, change, FP32)
    huge = np.full(3 * (LAYER.m + LAYER.n), 1e30, np.float32)
    frame = FP32.encode(huge * 0 + 1)
    with pytest.raises(DecodeError):
        decode(
            LAYER, good[:23] + struct.pack("<I", len(frame)) + frame[:-4] + b"\0\0\x80\x7f", 4, ALL
        )


def test_bytes_by_chance_are_never_anything_but_refused() -> None:
    rng = np.random.default_rng(5)
    for payload in _payloads():
        for _ in range(100):
            broken = bytearray(payload)
            for at in rng.integers(0, len(payload), 3):
                broken[at] = int(rng.integers(256))
            with contextlib.suppress(DecodeError):
                decode(LAYER, bytes(broken), 4, ALL)
