"""Whatever bytes a stranger sends: a DecodeError, nothing changed, nothing allocated."""

from __future__ import annotations

import random
import struct
import tracemalloc

import numpy as np
import pytest
import zstandard

from tensorcodecs import CODEC_NAMES, VALUE_ABS_MAX, DecodeError, get_codec
from tensorcodecs.frame import HEADER, RAW
from tests.codecs.samples import bell, forge, seal

SMALL = 130  # values; long enough for two blocks of 64 and for zstd to pay


def small_frames() -> list[tuple[str, bytes]]:
    """(codec, frame): one of each codec in each mode that it has at this size."""
    skewed = np.zeros(SMALL, np.float32)
    skewed[::9] = bell(15)
    frames = [
        (name, get_codec(name).encode(x)) for name in CODEC_NAMES for x in (skewed, bell(SMALL))
    ]
    assert {frame[5] for _, frame in frames} == {0, 1}  # both modes
    return frames


def refused(name: str, payload: bytes, match: str, numel: int = SMALL) -> None:
    """Both ways of reading must fail in the same way and leave the caller's array alone."""
    codec = get_codec(name)
    out = np.full(numel, 7, np.float32)
    with pytest.raises(DecodeError, match=match):
        codec.decode_into(payload, out)
    with pytest.raises(DecodeError, match=match):
        codec.accumulate(payload, 1.0, out)
    assert np.all(out == 7)


def test_every_truncation_is_refused() -> None:
    for name, frame in small_frames():
        for size in range(len(frame)):
            refused(name, frame[:size], "too few|announces")


def test_every_single_flipped_bit_is_refused() -> None:
    for name, frame in small_frames():
        for bit in range(8 * len(frame)):
            flipped = bytearray(frame)
            flipped[bit // 8] ^= 1 << bit % 8
            refused(name, bytes(flipped), "frame|announces|checksum")


def test_trailing_bytes_are_refused() -> None:
    for name, frame in small_frames():
        refused(name, frame + b"\0", "announces")


def test_trailing_bytes_that_the_header_admits_are_refused_too() -> None:
    for name, frame in small_frames():
        longer = bytearray(frame + b"\0")
        struct.pack_into("<I", longer, 16, len(longer) - HEADER.size)
        refused(name, seal(bytes(longer)), "raw plane|broken")


@pytest.mark.parametrize("numel", [0, 1, SMALL - 1, SMALL + 1, 65_536])
def test_another_length_than_expected_is_refused(numel: int) -> None:
    for name, frame in small_frames():
        refused(name, frame, f"a frame of {SMALL} values, expected {numel}", numel)


@pytest.mark.parametrize(
    ("offset", "value", "match"),
    [
        (0, 0x54, "not a frame"),
        (3, 2, "version 2"),
        (4, 9, "codec 9"),
        (5, 2, "mode 2"),
        (7, 1, "reserved"),
    ],
)
def test_a_header_from_elsewhere_is_refused(offset: int, value: int, match: str) -> None:
    for name, frame in small_frames():
        other = bytearray(frame)
        other[offset] = value
        refused(name, seal(bytes(other)), match)


@pytest.mark.parametrize("block", [0, 1, 63, 65, 100, 131_072, 2**31, 2**32 - 1])
def test_a_block_size_that_nobody_sends_is_refused(block: int) -> None:
    refused("int8", forge(1, SMALL, block, bytes(4 + SMALL), RAW), "blocks of")


def test_blocks_in_a_codec_without_blocks_are_refused() -> None:
    refused("bf16", forge(2, SMALL, 64, bytes(2 * SMALL), RAW), "no blocks")


@pytest.mark.parametrize(
    "scale", [np.nan, np.inf, -np.inf, -1.0, 1e-45, 2.0**-110, VALUE_ABS_MAX, 3e38]
)
def test_a_scale_that_nobody_sends_is_refused(scale: float) -> None:
    body = struct.pack("<f", scale) + bytes(SMALL)
    refused("int8", forge(1, SMALL, 4096, body, RAW), "scale of block 0")


@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF, 0x60000000])
def test_values_that_are_not_finite_are_refused(bits: int) -> None:
    planes = [bytes([bits >> shift & 0xFF]) * SMALL for shift in (0, 8, 16, 24)]
    refused("fp32", forge(3, SMALL, 0, b"".join(planes), RAW), "beyond 2")
    refused("bf16", forge(2, SMALL, 0, b"".join(planes[2:]), RAW), "beyond 2")


def zstd_frame(size: int, *, declared: int | None = None, window_log: int = 20) -> bytes:
    """`size` zeros, in a frame whose zstd header declares `declared` bytes, or no size at all."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        1, window_log=window_log, write_content_size=declared is not None
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    stream = compressor.compressobj(-1 if declared is None else size)
    piece = bytes(2**16)
    parts = [stream.compress(piece) for _ in range(size // len(piece))]
    frame = bytearray(b"".join([*parts, stream.compress(bytes(size % len(piece))), stream.flush()]))
    if declared is not None:
        width = zstandard.frame_header_size(bytes(frame)) - 6  # magic, descriptor, window, size
        assert width in {4, 8}
        frame[6 : 6 + width] = declared.to_bytes(width, "little")
    return bytes(frame)


@pytest.mark.parametrize("declared", [2**28, 65_536, 65_535, None])
def test_a_zstd_bomb_is_refused_without_allocating(declared: int | None) -> None:
    bomb = forge(1, 65_536, 65_536, struct.pack("<f", 1) + zstd_frame(2**28, declared=declared))
    assert len(bomb) < 2**16
    out = np.full(65_536, 7, np.float32)
    codec = get_codec("int8")
    codec.decode_into(codec.encode(out), out)  # this thread's scratch is not the bomb's doing
    before = out.copy()
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError, match="compressed plane"):
            codec.decode_into(bomb, out)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2**18
    assert np.array_equal(out, before)


def test_zstd_frames_that_hide_more_data_are_refused() -> None:
    plane = zstandard.ZstdCompressor().compress(bytes(SMALL))
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"more"
    scale = struct.pack("<f", 1)
    get_codec("int8").decode_into(forge(1, SMALL, 4096, scale + plane), np.empty(SMALL, np.float32))
    for body in (plane + plane, plane + skippable, skippable + plane, plane + b"\0", plane[:-1]):
        refused("int8", forge(1, SMALL, 4096, scale + body), "compressed plane")


def test_mutated_frames_are_refused_or_decode_to_finite_values() -> None:
    """20,000 mutations; with the checksum mended, what lies behind it is on its own."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # pytest shows it when this fails
    rng = random.Random(seed)
    frames = small_frames()
    accepted = 0
    for _ in range(20_000):
        name, frame = rng.choice(frames)
        mutant = bytearray(frame)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(mutant)) if rng.random() < 0.7 else rng.randrange(24)
            match rng.randrange(4):
                case 0:
                    mutant[place] ^= 1 << rng.randrange(8)
                case 1:
                    mutant[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
                case 2:
                    mutant[place:place] = rng.randbytes(rng.randint(1, 8))
                case _:
                    del mutant[place : place + rng.randint(1, 8)]
            mutant += bytes(max(0, HEADER.size - len(mutant)))
        if rng.random() < 0.5:
            struct.pack_into("<I", mutant, 16, len(mutant) - HEADER.size)
        payload = seal(bytes(mutant)) if rng.random() < 0.9 else bytes(mutant)
        out = np.full(SMALL, 7, np.float32)
        try:
            get_codec(name).decode_into(payload, out)
        except DecodeError:
            assert np.all(out == 7), f"seed {seed}: {payload.hex()}"
        else:
            accepted += 1
            assert np.all(np.abs(out) < 2.02 * VALUE_ABS_MAX), f"seed {seed}: {payload.hex()}"
    assert 500 < accepted < 15_000, f"seed {seed}: the mutations no longer reach both outcomes"
