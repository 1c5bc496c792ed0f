"""What a codec promises: error, size, exactness, determinism, and no silent nonsense."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tensorcodecs import CODEC_NAMES, FRAME_VALUES_MAX, DecodeError, EncodeError, get_codec
from tensorcodecs.int8 import BLOCK_VALUES, ZERO_BELOW, Int8
from tests.codecs.samples import LENGTHS, bell, chunks

if TYPE_CHECKING:
    from tensorcodecs import Codec
    from tensorcodecs.frame import Float32


def decode(codec: Codec, frame: bytes, numel: int) -> Float32:
    out = np.full(numel, np.nan, np.float32)
    codec.decode_into(frame, out)
    return out


def error_bound(name: str, x: Float32) -> Float32:
    """The documented worst error of each value."""
    if name == "fp32":
        return np.zeros_like(x)
    if name == "bf16":
        return np.maximum(np.abs(x) / np.float32(256), np.float32(2.0**-134))
    bound = np.empty_like(x)
    for start in range(0, len(x), BLOCK_VALUES):
        block = np.abs(x[start : start + BLOCK_VALUES])
        bound[start : start + BLOCK_VALUES] = max(1.0001 * float(block.max()) / 254, ZERO_BELOW)
    return bound


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("numel", LENGTHS)
def test_a_round_trip_keeps_the_documented_error_and_size(name: str, numel: int) -> None:
    codec = get_codec(name)
    value_bytes = {"int8": 1, "int8-raw": 1, "bf16": 2, "fp32": 4}[name]
    scale_bytes = 4 * -(-numel // BLOCK_VALUES) if name.startswith("int8") else 0
    for kind, x in chunks(numel, seed=numel):
        frame = codec.encode(x)
        out = decode(codec, frame, numel)
        assert np.all(np.abs(out.astype(np.float64) - x) <= error_bound(name, x)), kind
        assert len(frame) <= 24 + scale_bytes + value_bytes * numel, kind
        assert len(frame) <= codec.bytes_max(numel), kind
        assert frame == codec.encode(x), kind


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_zeros_stay_exact_zeros_beside_huge_blocks(name: str) -> None:
    x = np.zeros(3 * BLOCK_VALUES + 7, np.float32)
    x[:BLOCK_VALUES] = 2.0**64
    out = decode(get_codec(name), get_codec(name).encode(x), len(x))
    assert not out[BLOCK_VALUES:].any()


def test_fp32_is_exact_to_the_last_bit() -> None:
    for kind, x in chunks(70_001, seed=1):
        out = decode(get_codec("fp32"), get_codec("fp32").encode(x), len(x))
        assert np.array_equal(out.view(np.uint32), x.view(np.uint32)), kind


def test_bf16_rounds_ties_to_even() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F80FFFF, 0xBF818000], np.uint32)
    out = decode(get_codec("bf16"), get_codec("bf16").encode(bits.view(np.float32)), len(bits))
    expected = [0x3F800000, 0x3F820000, 0x3F810000, 0x3F810000, 0xBF820000]
    assert out.view(np.uint32).tolist() == expected


def test_int8_keeps_the_largest_value_of_a_block_and_never_clips() -> None:
    x = bell(10 * BLOCK_VALUES, seed=2)
    out = decode(get_codec("int8"), get_codec("int8").encode(x), len(x))
    peak = np.abs(x).reshape(10, -1).max(axis=1)
    assert np.allclose(np.abs(out).reshape(10, -1).max(axis=1), peak, rtol=1e-6)


def test_the_lossless_stage_earns_its_time_on_pseudo_gradients() -> None:
    x = bell(65_536)
    bits = {name: 8 * len(get_codec(name).encode(x)) / len(x) for name in CODEC_NAMES}
    assert bits["int8"] < 7.4
    assert bits["int8-raw"] < 8.02
    assert bits["bf16"] < 11.5
    assert bits["fp32"] < 27.5


def test_the_raw_and_the_compressed_int8_read_each_other() -> None:
    x = bell(65_536)
    packed, raw = get_codec("int8"), get_codec("int8-raw")
    assert len(packed.encode(x)) < len(raw.encode(x))
    one, other = decode(packed, raw.encode(x), len(x)), decode(raw, packed.encode(x), len(x))
    assert np.array_equal(one, other)


@pytest.mark.parametrize("block", [64, 256, 65_536])
def test_a_reader_follows_the_block_size_of_the_frame(block: int) -> None:
    x = bell(100_001)
    frame = Int8(block=block).encode(x)
    out = decode(get_codec("int8"), frame, len(x))
    assert np.abs(out - x).max() <= 1.0001 * np.abs(x).max() / 254
    assert len(frame) <= Int8(block=block).bytes_max(len(x))


@pytest.mark.parametrize("block", [0, 1, 32, 100, 131_072, -4096])
def test_other_block_sizes_do_not_exist(block: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        Int8(block=block)


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("numel", [0, 1, 4097, 65_536, 100_003])
def test_accumulating_is_adding_the_weighted_values(name: str, numel: int) -> None:
    codec = get_codec(name)
    x = bell(numel, seed=3)
    acc = bell(numel, seed=4)
    frame = codec.encode(x)
    expected = acc.astype(np.float64) + 2.5 * decode(codec, frame, numel).astype(np.float64)
    codec.accumulate(frame, 2.5, acc)
    assert np.allclose(acc, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize(
    "bad", [np.nan, -np.nan, np.inf, -np.inf, 2.0**64 * (1 + 2.0**-23), -(2.0**127)]
)
@pytest.mark.parametrize("index", [0, 4095, 70_000])
def test_a_value_that_cannot_be_sent_is_named(name: str, bad: float, index: int) -> None:
    x = bell(70_001)
    x[index] = bad
    x[70_000] = bad
    with pytest.raises(EncodeError, match=f"value {index} is") as caught:
        get_codec(name).encode(x)
    assert caught.value.index == index


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_a_nan_of_any_bits_is_refused(name: str) -> None:
    for bits in (0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF):
        x = np.array([1, bits, 2], np.uint32).view(np.float32)
        with pytest.raises(EncodeError, match="value 1 is nan"):
            get_codec(name).encode(x)


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize(
    "x",
    [
        np.zeros(8, np.float64),
        np.zeros((2, 4), np.float32),
        np.zeros(8, np.float32)[::2],
        np.zeros(FRAME_VALUES_MAX + 1, np.float32),
    ],
    ids=["float64", "matrix", "strided", "too long"],
)
def test_other_arrays_are_refused(name: str, x: Float32) -> None:
    codec = get_codec(name)
    with pytest.raises(ValueError, match=r"float32 vector|at most"):
        codec.encode(x)
    with pytest.raises(ValueError, match=r"float32 vector|at most"):
        codec.decode_into(b"", x)
    with pytest.raises(ValueError, match=r"float32 vector|at most"):
        codec.accumulate(b"", 1.0, x)


def test_frames_are_read_from_any_buffer_and_alignment() -> None:
    x = bell(5000)
    frame = get_codec("int8").encode(x)
    expected = decode(get_codec("int8"), frame, len(x))
    shifted = memoryview(b"?" + frame)[1:]
    for payload in (bytearray(frame), memoryview(frame), shifted):
        out = np.empty_like(x)
        get_codec("int8").decode_into(payload, out)
        assert np.array_equal(out, expected)


def test_codecs_are_shared_between_threads() -> None:
    chunks_ = [bell(65_536, seed) for seed in range(16)]
    for name in CODEC_NAMES:
        codec = get_codec(name)
        alone = [codec.encode(x) for x in chunks_]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(codec.encode, chunks_)) == alone


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_the_largest_frame_makes_the_trip(name: str) -> None:
    x = np.zeros(FRAME_VALUES_MAX, np.float32)
    x[-100_000:] = bell(100_000)
    frame = get_codec(name).encode(x)
    out = decode(get_codec(name), frame, len(x))
    assert len(frame) <= get_codec(name).bytes_max(len(x))
    assert np.abs(out - x).max() <= np.abs(x).max() / 250
    assert not out[:-200_000].any()


def test_each_codec_refuses_the_others_frames() -> None:
    x = bell(100)
    for writer, reader in (("int8", "bf16"), ("bf16", "fp32"), ("fp32", "int8-raw")):
        with pytest.raises(DecodeError, match="codec"):
            decode(get_codec(reader), get_codec(writer).encode(x), 100)


def test_a_codec_is_found_by_its_own_name_only() -> None:
    assert all(get_codec(name).name == name for name in CODEC_NAMES)
    with pytest.raises(ValueError, match="no codec 'int4'; there are int8, int8-raw, bf16, fp32"):
        get_codec("int4")
