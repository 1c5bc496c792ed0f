"""Values for a receiver that is near: exact up to the step, or it is told that it is too far."""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import xxhash

from tensorcodecs import DecodeError, EncodeError, codec_of
from tensorcodecs.frame import HEADER, ZSTD
from tensorcodecs.nearby import (
    BITS_MAX,
    BITS_MIN,
    CODEC_ID,
    TooFarError,
    bytes_max,
    decode_near,
    encode_near,
    steps_for,
)
from tests.codecs.samples import bell, chunks, forge, mended
from tests.codecs.test_golden import noise

if TYPE_CHECKING:
    from tensorcodecs.frame import Float32

GOLDEN = Path(__file__).parent.parent / "golden" / "nearby_v1.json"
LENGTHS = (0, 1, 63, 64, 65, 4095, 4097, 98_304)


def moved(x: Float32, step: Float32, share: float, seed: int, block: int) -> Float32:
    """A receiver's values: within `share` of the distance that may lie between."""
    rng = np.random.default_rng(seed)
    reach = np.repeat(step, block)[: len(x)] * share
    return (x + rng.uniform(-1, 1, len(x)) * reach).astype(np.float32)


@pytest.mark.parametrize("bits", range(BITS_MIN, BITS_MAX + 1))
@pytest.mark.parametrize("numel", LENGTHS)
def test_whoever_is_near_gets_every_value_within_half_a_step(bits: int, numel: int) -> None:
    x = bell(numel, bits)
    step = steps_for(bell(numel, 99), 1.0, bits=bits)
    frame = encode_near(x, step, bits=bits)
    assert len(frame) == bytes_max(numel, bits=bits)
    near = moved(x, step, 2 ** (bits - 1) - 1.01, bits, 4096)
    got = decode_near(frame, near)
    error = np.abs(got.astype(np.float64) - x)
    bound = np.repeat(step, 4096)[:numel] * 0.5000001 + np.abs(x) * 2.0**-23
    assert (error <= bound).all()


def test_how_large_the_values_are_does_not_matter() -> None:
    """Eight bits carry a model whose values are a thousand times what lies between the two."""
    x = (bell(98_304) * 1000).astype(np.float32)
    distance = bell(98_304, 1)
    frame = encode_near(x, steps_for(distance, 1.0), bits=8)
    got = decode_near(frame, x + distance)
    rms = float(np.sqrt(np.mean(distance.astype(np.float64) ** 2)))
    assert float(np.sqrt(np.mean((got - x) ** 2))) < 0.04 * rms
    assert len(frame) < 1.002 * len(x)


def test_whoever_is_too_far_is_told_so_and_never_gets_wrong_values() -> None:
    for seed in range(50):
        x = bell(5000, seed)
        frame = encode_near(x, steps_for(x, 0.1), bits=6)
        near = (x + np.random.default_rng(seed).normal(size=5000) * 10).astype(np.float32)
        with pytest.raises(TooFarError):
            decode_near(frame, near)


def test_one_value_too_far_is_enough() -> None:
    x = bell(4096)
    step = steps_for(x, 1.0)
    near = x.copy()
    near[17] += step[0] * 200
    with pytest.raises(TooFarError):
        decode_near(encode_near(x, step), near)


@pytest.mark.parametrize("numel", [1, 4097])
def test_all_kinds_of_values_survive(numel: int) -> None:
    for kind, x in chunks(numel, 3):
        step = steps_for(x, 1.0, bits=16)
        got = decode_near(encode_near(x, step, bits=16), x)
        assert np.isfinite(got).all(), kind
        # Where a step was widened for the sake of large values, it is still beneath their ulp.
        assert (np.abs(got - x) <= np.repeat(step, 4096)[:numel] + np.abs(x) * 2.0**-22).all(), kind


def test_a_block_that_never_moved_gets_a_step_all_the_same() -> None:
    typical = np.zeros(8192, np.float32)
    typical[4096:] = 1
    step = steps_for(typical, 1.0)
    assert step[0] == step[1] / 64
    assert (steps_for(np.zeros(4096, np.float32), 1.0) > 0).all()


def test_values_that_cant_be_sent_are_named() -> None:
    for bad in (np.nan, np.inf, -np.inf, 2.0**65):
        x = bell(5000)
        x[4321] = bad
        with pytest.raises(EncodeError) as caught:
            encode_near(x, np.ones(2, np.float32))
        assert caught.value.index == 4321


@pytest.mark.parametrize(
    ("steps", "bits", "block"),
    [
        ([1.0], 3, 4096), ([1.0], 17, 4096), ([1.0], 8, 100), ([1.0, 1.0], 8, 4096),
        ([0.0], 8, 4096), ([-1.0], 8, 4096), ([np.nan], 8, 4096), ([np.inf], 8, 4096),
    ],
)  # fmt: skip
def test_our_own_nonsense_is_refused(steps: list[float], bits: int, block: int) -> None:
    with pytest.raises(ValueError, match=r"bits|steps"):
        encode_near(bell(4096), np.array(steps, np.float32), bits=bits, block=block)


# ── hostile bytes ────────────────────────────────────────────────────────────────────────
def refused(payload: bytes, near: Float32, match: str | None = None) -> None:
    with pytest.raises(DecodeError, match=match):
        decode_near(payload, near)


def test_every_truncation_and_every_flipped_bit_is_refused() -> None:
    x = bell(130)
    frame = encode_near(x, steps_for(x, 1.0), bits=5)
    for cut in range(len(frame)):
        refused(frame[:cut], x)
    for at in range(len(frame)):
        for bit in range(8):
            broken = bytearray(frame)
            broken[at] ^= 1 << bit
            refused(bytes(broken), x)
    refused(frame + b"\0", x, "announces")


def test_lies_with_a_mended_checksum_are_refused() -> None:
    x = bell(130)
    step = steps_for(x, 1.0)
    frame = encode_near(x, step, bits=5)
    body = frame[HEADER.size :]

    def lie(bits: int = 5, block: int = 4096, numel: int = 130, content: bytes = body) -> bytes:
        return forge(CODEC_ID, numel, block, content, 0, bits=bits)

    assert decode_near(lie(), x) is not None
    for bits in (0, 3, 17, 255):
        refused(lie(bits=bits), x, "make no sense")
    for block in (0, 63, 100, 2**17, 2**32 - 1):
        refused(lie(block=block), x, "not allowed")
    refused(lie(bits=6), x, "a body of")
    refused(lie(numel=129), x, "129 values")
    refused(lie(content=body[:-1]), x, "a body of")
    refused(forge(CODEC_ID, 130, 4096, body, ZSTD, bits=5), x, "make no sense")
    refused(forge(CODEC_ID, 130, 4096, body, 0, bits=5, table=1), x, "make no sense")
    for bad in (0.0, -1.0, np.nan, np.inf, 1e-38, 2.0**70):
        content = body[:8] + np.array([bad], "<f4").tobytes() + body[12:]
        refused(lie(content=content), x, "not one we would send")
    spare = bytearray(body)
    spare[-1] |= 0x80
    refused(lie(content=bytes(spare)), x, "spare bits")
    refused(mended(frame[:30]), x, "a body of")


def test_huge_steps_cannot_make_huge_values() -> None:
    """Only a liar who knows what we hold gets so far; no sum of ours may overflow all the same."""
    near = np.full(64, 2.0**71, np.float32)
    whole = np.full(64, 2**7, "<i8")  # steps of 2**64
    body = xxhash.xxh3_64_intdigest(whole.tobytes()).to_bytes(8, "little")
    body += np.array([2.0**64], "<f4").tobytes() + whole.astype(np.uint8).tobytes()
    refused(forge(CODEC_ID, 64, 64, body, 0, bits=8), near, "beyond")


def test_random_bodies_are_refused() -> None:
    rng = random.Random(5)
    x = bell(100)
    for _ in range(3000):
        bits = rng.randrange(BITS_MIN, BITS_MAX + 1)
        size = bytes_max(100, bits=bits, block=64) - HEADER.size
        body = bytearray(rng.randbytes(size))
        body[8:16] = np.array([rng.uniform(0.01, 2), 1.0], "<f4").tobytes()
        refused(forge(CODEC_ID, 100, 64, bytes(body), 0, bits=bits), x)


def test_nobody_else_reads_it() -> None:
    with pytest.raises(DecodeError, match="codec 6 is not known"):
        codec_of(encode_near(bell(64), np.ones(1, np.float32)))


# ── golden ───────────────────────────────────────────────────────────────────────────────
def golden_case(bits: int) -> tuple[Float32, Float32, bytes]:
    x = noise(700)
    step = np.array([2.0**-6 * (1 + i) for i in range(3)], np.float32)
    return x, (x + noise(1400)[700:] / 16).astype(np.float32), encode_near(
        x, step, bits=bits, block=256
    )  # fmt: skip


def write() -> None:
    cases = []
    for bits in (4, 5, 8, 11, 16):
        _, near, frame = golden_case(bits)
        values = hashlib.sha256(decode_near(frame, near).astype("<f4").tobytes()).hexdigest()
        cases.append({"bits": bits, "frame": frame.hex(), "values": values})
    GOLDEN.write_text(json.dumps(cases, indent=0) + "\n")


if os.environ.get("MURMURATION_REWRITE_GOLDEN") == "1":
    write()


def test_version_1_is_written_and_read_as_it_was() -> None:
    cases = json.loads(GOLDEN.read_text())
    assert [case["bits"] for case in cases] == [4, 5, 8, 11, 16]
    for case in cases:
        _, near, frame = golden_case(case["bits"])
        assert frame.hex() == case["frame"]
        values = decode_near(bytes.fromhex(case["frame"]), near).astype("<f4").tobytes()
        assert hashlib.sha256(values).hexdigest() == case["values"]
