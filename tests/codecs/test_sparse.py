"""What the top-k codec promises: which values, how many bytes, and nothing from a liar."""

from __future__ import annotations

import math
import random
import tracemalloc
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tensorcodecs import (
    CHUNK_VALUES,
    VALUE_ABS_MAX,
    DecodeError,
    EncodeError,
    backend,
    codec_of,
    get_codec,
    sparse,
)
from tensorcodecs.frame import FIXED, HEADER, RAW, ZERO
from tensorcodecs.sparse import CODEC_ID, MODULUS_M, NOTHING, SEGMENT, Sparse
from tests.codecs.samples import LENGTHS, bell, chunks, forge, mended

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tensorcodecs.frame import Float32

CODEC = get_codec("sparse")


@contextmanager
def numpy_alone() -> Iterator[None]:
    """As on a machine without numba."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "sparse_kernels", lambda: None)
        yield


def decode(frame: bytes, numel: int) -> Float32:
    out = np.full(numel, np.nan, np.float32)
    CODEC.decode_into(frame, out)
    return out


def limit_of(length: int, kept: int) -> int:
    """Values that a segment sends: in proportion, at least one."""
    return math.ceil(kept * length / SEGMENT)


def largest(x: Float32, kept: int) -> set[int]:
    """The places of the `kept` largest of each 4096, by sorting; of equals the first."""
    places: set[int] = set()
    for first in range(0, len(x), SEGMENT):
        size = np.abs(x[first : first + SEGMENT])
        order = np.argsort(-size, kind="stable")[: limit_of(len(size), kept)]
        places |= {first + int(i) for i in order if size[i] >= 2.0**-100}
    return places


# ── what is sent ─────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kept", [1, 7, 64, 300, 1024])
def test_the_largest_of_each_segment_are_sent_and_of_equals_the_first(kept: int) -> None:
    codec = Sparse(kept)
    for seed, numel in enumerate((1, 2, 63, 65, 4095, 4096, 4097, 30_001)):
        for kind, x in chunks(numel, seed):
            if kind in {"wide", "steep"}:  # whose small segments vanish beside the large
                continue
            coarse = np.round(x * 8) / np.float32(8) if seed % 2 else x  # many are equal
            out = decode(codec.encode(coarse), numel)
            assert set(np.flatnonzero(out).tolist()) == largest(coarse, kept), (kind, numel)
            sent = out != 0
            assert np.array_equal(np.sign(out[sent]), np.sign(coarse[sent])), (kind, numel)


def test_a_segment_has_two_magnitudes_that_stand_near_what_they_replace() -> None:
    for seed in range(20):
        x = bell(3 * SEGMENT, seed)
        out = decode(CODEC.encode(x), len(x))
        for first in range(0, len(x), SEGMENT):
            got, true = out[first : first + SEGMENT], x[first : first + SEGMENT]
            sent = got != 0
            assert len(np.unique(np.abs(got[sent]))) == 2, seed
            error = np.linalg.norm(got[sent] - true[sent]) / np.linalg.norm(true[sent])
            one = np.sign(true[sent]) * np.abs(true[sent]).mean()
            assert error < 0.10, f"seed {seed}: {error}"
            assert error < np.linalg.norm(one - true[sent]) / np.linalg.norm(true[sent]), seed


def test_what_stays_behind_is_what_the_documentation_says() -> None:
    for seed in range(5):
        x = np.random.default_rng(seed).standard_normal(CHUNK_VALUES).astype(np.float32)
        error = np.linalg.norm(decode(CODEC.encode(x), len(x)) - x) / np.linalg.norm(x)
        assert 0.93 < error < 0.96, seed


def test_magnitudes_far_apart_each_get_their_own() -> None:
    x = np.zeros(SEGMENT, np.float32)
    x[10:30], x[50] = 1.0, -100.0
    out = decode(CODEC.encode(x), len(x))
    assert np.abs(out[10:30] - 1).max() < 0.2  # so far apart, ratios are coarse
    assert abs(out[50] + 100) < 10


def test_segments_without_enough_values_send_fewer() -> None:
    for seed in range(200):
        rng = np.random.default_rng(seed)
        numel = int(rng.integers(1, 5 * SEGMENT))
        x = np.zeros(numel, np.float32)
        places = rng.integers(0, numel, int(rng.integers(0, 100)))
        x[places] = rng.choice([-2.5, 2.5], len(places))
        frame = CODEC.encode(x)
        out = decode(frame, numel)
        assert set(np.flatnonzero(out).tolist()) == largest(x, 64), seed
        assert np.abs(out[out != 0] - x[out != 0]).max(initial=0) < 0.25, seed
        assert len(frame) <= CODEC.bytes_max(numel), seed


@pytest.mark.parametrize("numel", [1, 100, SEGMENT, CHUNK_VALUES])
def test_nothing_but_zeros_is_a_header(numel: int) -> None:
    for x in (np.zeros(numel), np.full(numel, -0.0), np.full(numel, 2.0**-101)):
        frame = CODEC.encode(x.astype(np.float32))
        assert len(frame) == HEADER.size
        assert not decode(frame, numel).any()


def test_an_empty_chunk_makes_the_trip() -> None:
    empty = np.zeros(0, np.float32)
    assert len(decode(CODEC.encode(empty), 0)) == 0
    CODEC.decode_many(CODEC.encode_many(empty), empty)


def test_a_segment_far_below_its_chunks_largest_sends_nothing() -> None:
    x = np.concatenate([bell(SEGMENT), bell(SEGMENT) * np.float32(2.0**-70)])
    x[:64] = 1.0
    out = decode(CODEC.encode(x), len(x))
    assert np.count_nonzero(out[:SEGMENT]) == 64
    assert not out[SEGMENT:].any()


# ── size ─────────────────────────────────────────────────────────────────────────────────
def test_a_pseudo_gradient_becomes_200_times_smaller_and_nears_the_bound() -> None:
    places = math.lgamma(4097) - math.lgamma(65) - math.lgamma(4033)
    bound = CHUNK_VALUES / SEGMENT * (places / math.log(2) + 2 * 64) / 8
    for seed in range(20):
        size = len(CODEC.encode(bell(CHUNK_VALUES, seed)))
        assert 4 * CHUNK_VALUES / size >= 200, seed
        assert bound < size < 1.07 * bound, seed


def test_clustered_places_take_fewer_bytes_than_scattered_ones() -> None:
    scattered, clustered = bell(SEGMENT), np.sort(bell(SEGMENT))
    assert len(CODEC.encode(clustered)) < len(CODEC.encode(scattered)) - 30


def test_no_frame_is_larger_than_announced() -> None:
    rng = np.random.default_rng(5)
    for kept in (1, 2, 5, 16, 64, 65, 200, 513, 1024):
        codec = Sparse(kept)
        for numel in (1, 40, 4096, 5000, 20_000):
            worst = 0
            for _ in range(6):
                # Runs and lone values mixed: the gaps that one modulus fits badly.
                x = rng.standard_normal(numel).astype(np.float32)
                at, run = int(rng.integers(0, numel)), int(rng.integers(0, kept + 1))
                x[at : at + run] *= 100
                x[:: SEGMENT // int(rng.integers(1, 30))] *= 50
                worst = max(worst, len(codec.encode(x)))
            assert worst <= codec.bytes_max(numel), (kept, numel)
    assert CODEC.bytes_max(CHUNK_VALUES) < 1.2 * len(CODEC.encode(bell(CHUNK_VALUES)))


def test_gaps_of_more_than_24_moduli_make_the_trip() -> None:
    x = np.zeros(SEGMENT, np.float32)
    x[:60] = 1.0
    x[[1000, 2000, 4095]] = -1.0
    frame = CODEC.encode(x)
    assert MODULUS_M[frame[HEADER.size + 3] & 15] * 24 < 900  # so they are escaped
    assert np.array_equal(np.sign(decode(frame, len(x))), x)


# ── numba and numpy ──────────────────────────────────────────────────────────────────────
def test_numba_and_numpy_write_the_same_bytes_and_read_the_same_values() -> None:
    assert backend.sparse_kernels() is not None, "numba is needed to compare with"
    for seed, numel in enumerate(LENGTHS):
        for kind, x in chunks(numel, seed):
            codec = Sparse((1, 17, 64, 256, 1024)[seed % 5])
            frame, acc = codec.encode(x), bell(numel, seed)
            out = decode(frame, numel)
            summed = acc.copy()
            codec.accumulate(frame, 0.3, summed)
            with numpy_alone():
                assert codec.encode(x) == frame, (kind, numel)
                assert np.array_equal(decode(frame, numel).view(np.int32), out.view(np.int32))
                codec.accumulate(frame, 0.3, acc)
            assert np.array_equal(acc.view(np.int32), summed.view(np.int32)), (kind, numel)


def test_numba_and_numpy_agree_on_random_vectors() -> None:
    for seed in range(300):
        rng = np.random.default_rng(seed)
        numel = int(rng.integers(0, 3 * SEGMENT))
        x = rng.standard_normal(numel) ** int(rng.integers(1, 8))
        x *= rng.random(numel) < rng.choice([0.005, 0.1, 1.0])
        x *= 2.0 ** rng.integers(-90, 40)
        if seed % 3 == 0:
            x = np.sign(x) * 2.0 ** np.floor(np.log2(np.abs(x) + 1e-30))
        codec = Sparse(int(rng.integers(1, 1025)) if seed % 2 else 64)
        narrow = x.astype(np.float32)
        frame = codec.encode(narrow)
        with numpy_alone():
            assert codec.encode(narrow) == frame, f"seed {seed}"


def test_the_same_values_give_the_same_bytes_whatever_was_coded_before() -> None:
    x = bell(CHUNK_VALUES, 1)
    frame = CODEC.encode(x)
    for other in (bell(100) * 1e9, np.zeros(5000, np.float32), bell(CHUNK_VALUES, 2)):
        CODEC.encode(other.astype(np.float32))
        assert CODEC.encode(x) == frame
    assert CODEC.encode_many(np.concatenate([x, x[:10]]))[0] == frame


# ── the codec's protocol ─────────────────────────────────────────────────────────────────
def test_many_frames_are_those_of_the_chunks() -> None:
    x = bell(2 * CHUNK_VALUES + 5000)
    frames = CODEC.encode_many(x)
    assert frames == [CODEC.encode(x[a : a + CHUNK_VALUES]) for a in range(0, len(x), CHUNK_VALUES)]
    out = np.full(len(x), np.nan, np.float32)
    CODEC.decode_many(frames, out)
    assert set(np.flatnonzero(out).tolist()) == largest(x, 64)
    for wrong in (frames[:-1], [*frames, frames[-1]], []):
        with pytest.raises(DecodeError, match=f"{len(wrong)} frames for {len(x)} values"):
            CODEC.decode_many(wrong, out)


def test_accumulating_is_adding_the_weighted_values() -> None:
    for numel in (0, 1, 4097, CHUNK_VALUES):
        x, acc = bell(numel, 3), bell(numel, 4)
        frame = CODEC.encode(x)
        expected = acc + 2.5 * decode(frame, numel).astype(np.float64)
        CODEC.accumulate(frame, 2.5, acc)
        assert np.allclose(acc, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf, 2.0**64 * (1 + 2.0**-23)])
@pytest.mark.parametrize("index", [0, 4095, 4096, 70_000, CHUNK_VALUES + 17])
def test_a_value_that_cannot_be_sent_is_named(plain: bool, bad: float, index: int) -> None:
    x = bell(CHUNK_VALUES + 5000)
    x[index] = bad
    x[CHUNK_VALUES + 18] = bad
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr(sparse, "sparse_kernels", lambda: None)
        with pytest.raises(EncodeError, match=f"value {index} is") as caught:
            CODEC.encode_many(x)
    assert caught.value.index == index


def test_the_largest_value_that_can_be_sent_is() -> None:
    x = np.array([2.0**64, -(2.0**64)], np.float32)
    assert np.abs(decode(CODEC.encode(x), 2)).max() < 1.1 * 2.0**64


@pytest.mark.parametrize(
    "x",
    [np.zeros(8), np.zeros((2, 4), np.float32), np.zeros(8, np.float32)[::2]],
    ids=["float64", "matrix", "strided"],
)
def test_other_arrays_are_refused(x: Float32) -> None:
    for call in (
        lambda: CODEC.encode(x),
        lambda: CODEC.encode_many(x),
        lambda: CODEC.decode_into(b"", x),
        lambda: CODEC.accumulate(b"", 1.0, x),
    ):
        with pytest.raises(ValueError, match="float32 vector"):
            call()
    with pytest.raises(ValueError, match="at most 98304"):
        CODEC.encode(np.zeros(CHUNK_VALUES + 1, np.float32))


def test_it_is_found_by_its_name_and_by_its_frames() -> None:
    assert CODEC.name == "sparse"
    assert CODEC.codec_id == CODEC_ID == 7
    assert get_codec("sparse:16").name == "sparse:16"
    for kept in (1, 1024):
        codec = get_codec(f"sparse:{kept}")
        frame = codec.encode(bell(SEGMENT))
        assert np.count_nonzero(decode(frame, SEGMENT)) == kept
        assert codec_of(frame).codec_id == CODEC_ID
    for name in ("sparse:0", "sparse:1025", "sparse:-1", "sparse:", "sparse:1.5"):
        with pytest.raises(ValueError, match="sparse"):
            get_codec(name)


def test_frames_are_read_from_any_buffer() -> None:
    x = bell(5000)
    frame = CODEC.encode(x)
    for payload in (bytearray(frame), memoryview(frame), memoryview(b"?" + frame)[1:]):
        out = np.empty_like(x)
        CODEC.decode_into(payload, out)
        assert np.array_equal(out, decode(frame, len(x)))


# ── strangers ────────────────────────────────────────────────────────────────────────────
def refused(payload: bytes, match: str, numel: int) -> None:
    """Every way of reading fails alike and leaves the caller's sum alone."""
    for plain in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if plain:
                patch.setattr(sparse, "sparse_kernels", lambda: None)
            acc = np.full(numel, 7, np.float32)
            with pytest.raises(DecodeError, match=match):
                CODEC.accumulate(payload, 1.0, acc)
            with pytest.raises(DecodeError, match=match):
                CODEC.decode_into(payload, np.empty(numel, np.float32))
            assert np.all(acc == 7)


SMALL = 300
FRAME = CODEC.encode(bell(SMALL))  # ceil(64 * 300 / 4096) = 5 values
BODY = FRAME[HEADER.size :]  # peak, scale, shape, two bytes of values, gaps


def forged(body: bytes, **header: int) -> bytes:
    fields = {"numel": SMALL, "parameter": 64, "mode": FIXED, "bits": 2, "table": 0} | header
    return forge(
        CODEC_ID, fields["numel"], fields["parameter"], body, fields["mode"],
        bits=fields["bits"], table=fields["table"],
    )  # fmt: skip


def test_every_truncation_and_every_flipped_bit_is_refused() -> None:
    for size in range(len(FRAME)):
        refused(FRAME[:size], "too few|announces", SMALL)
    for bit in range(8 * len(FRAME)):
        flipped = bytearray(FRAME)
        flipped[bit // 8] ^= 1 << bit % 8
        refused(bytes(flipped), "frame|announces|checksum", SMALL)


def test_every_truncation_that_the_header_admits_is_refused_too() -> None:
    assert forged(BODY) == FRAME
    for size in range(len(BODY)):
        refused(forged(BODY[:size]), r"bytes, but|end where", SMALL)
    refused(forged(BODY + b"\0"), "end where", SMALL)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"parameter": 0}, "0 of 4096 values of 2 bits"),
        ({"parameter": 1025}, "1025 of 4096"),
        ({"parameter": 2**32 - 1}, "make no sense"),
        ({"bits": 3}, "values of 3 bits"),
        ({"mode": RAW}, "mode 0"),
        ({"mode": 77}, "mode 77"),
        ({"table": 2}, "table 2"),
        ({"mode": ZERO}, "zero frame with a body"),
        ({"parameter": 1000}, "bytes, but"),
        ({"numel": 0}, "0 values, expected 300"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(header: dict[str, int], match: str) -> None:
    refused(forged(BODY, **header), match, SMALL)


def test_a_body_that_nobody_sends_is_refused() -> None:
    counts = (6).to_bytes(2, "little")
    for body, table, match in (
        (b"\x09\x01" + BODY[2:], 0, "a scale"),  # 265
        (b"\x47\xfe" + BODY[2:], 0, "a scale"),  # -441
        (b"\x48\xfe\x01" + BODY[3:], 0, "a scale"),  # 1 below -440
        (BODY[:2] + bytes([NOTHING]) + BODY[3:], 0, "without values"),
        (BODY[:4] + counts + BODY[4:], 1, "a count"),
        (BODY[:4] + bytes(2) + BODY[4:], 1, "a count"),
        (BODY[:2] + bytes([NOTHING, 0]) + (5).to_bytes(2, "little") + BODY[4:], 1, "a count"),
        (BODY[:5] + bytes([BODY[5] | 0x80]) + BODY[6:], 0, "padding"),
        (BODY[:6] + bytes(10), 0, "position|end where"),
        (BODY[:6] + b"\xff" * 10, 0, "end where"),
        (BODY[:6] + bytes(3) + b"\xff" * 40, 0, "position"),  # a gap of 4095
    ):
        refused(forged(body, table=table), match, SMALL)
    refused(forged(b"\0\0", numel=0), "0 segments", 0)


def test_padding_after_the_gaps_must_be_zero() -> None:
    seen = 0
    for seed in range(20):
        frame = bytearray(CODEC.encode(bell(SMALL, seed)))
        if frame[-1] < 0x80:
            frame[-1] |= 0x80
            acc = np.full(SMALL, 7, np.float32)
            try:
                CODEC.accumulate(mended(bytes(frame)), 1.0, acc)
            except DecodeError as error:
                seen += "end where" in str(error)
                assert np.all(acc == 7)
    assert seen > 5


def test_a_small_frame_cannot_make_a_reader_allocate_much() -> None:
    segments = CHUNK_VALUES // SEGMENT
    body = bytes(2) + bytes(2 * segments) + bytes(100)
    liar = forge(CODEC_ID, CHUNK_VALUES, 1024, body, FIXED, bits=2)
    acc = np.full(CHUNK_VALUES, 7, np.float32)
    CODEC.accumulate(CODEC.encode(bell(CHUNK_VALUES)), 0.0, acc)
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError, match="bytes, but 24576 values take"):
            CODEC.accumulate(liar, 1.0, acc)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2**16
    assert np.all(acc == 7)


def test_mutated_frames_are_refused_or_decode_to_finite_values_alike() -> None:
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    half = bell(SMALL)
    half[np.argsort(np.abs(half))[:-3]] = 0
    frames = [FRAME, CODEC.encode(half), CODEC.encode(bell(2 * SMALL)[SMALL:])]
    assert {frame[11] for frame in frames} == {0, 1}  # with counts and without
    accepted = refusals = 0
    for _ in range(3000):
        mutant = bytearray(rng.choice(frames))
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(HEADER.size, len(mutant)) if rng.random() < 0.9 else 11
            match rng.randrange(4):
                case 0 | 1:
                    mutant[at] ^= 1 << rng.randrange(8)
                case 2:
                    mutant[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
                case _:
                    del mutant[max(at, HEADER.size)]
        payload = mended(bytes(mutant))
        sums: list[Float32 | str] = []
        for plain in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                if plain:
                    patch.setattr(sparse, "sparse_kernels", lambda: None)
                acc = np.zeros(SMALL, np.float32)
                try:
                    CODEC.accumulate(payload, 1.0, acc)
                except DecodeError as error:
                    assert not acc.any(), f"seed {seed}: {payload.hex()}"
                    sums.append(str(error))
                else:
                    assert np.all(np.abs(acc) <= 64 * VALUE_ABS_MAX), f"seed {seed}"
                    sums.append(acc)
        fast, slow = sums
        assert isinstance(fast, str) == isinstance(slow, str), f"seed {seed}: {payload.hex()}"
        if isinstance(fast, str):
            assert fast == slow, f"seed {seed}: {payload.hex()}"
            refusals += 1
        else:
            assert np.array_equal(fast, slow), f"seed {seed}: {payload.hex()}"
            accepted += 1
    assert accepted > 200, f"seed {seed}"
    assert refusals > 200, f"seed {seed}"
