"""Version 1 of the wire format, byte by byte: peers of different releases train together.

MURMURATION_REWRITE_GOLDEN=1 rewrites the file; do so only with a new version number.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tensorcodecs import CODEC_NAMES, Ecsq, codec_of, get_codec
from tensorcodecs.frame import FIXED, HEADER, OWN, RAW, ZERO, ZSTD, Frame
from tensorcodecs.int8 import Int8
from tests.codecs.samples import (
    BF16,
    ECSQ,
    FP32,
    INT8,
    Parts,
    coded_int8,
    numpy_alone,
)

if TYPE_CHECKING:
    from tensorcodecs.frame import Bytes, Float32

GOLDEN = Path(__file__).parent.parent / "golden" / "codec_v1.json"
NAMES = CODEC_NAMES
PLANES = {BF16: 2, FP32: 4}
SMALL_VALUES = 700
SHOWN_VALUES = 100  # of more the file holds a digest


def noise(numel: int) -> Float32:
    """Values by integer arithmetic alone, so that no library can change them."""
    word = np.arange(1, numel + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        word = (word ^ word >> np.uint64(shift)) * np.uint64(factor)
    return (((word >> np.uint64(48)).astype(np.int64) - 2**15) / 2**15).astype(np.float32)


def chunks() -> dict[str, Float32]:
    """Small ones of every kind, and some that are large enough for sixteen streams."""
    ramp, long = noise(700), noise(17_000)
    large = long[:16_500] + long[50:16_550] + long[500:17_000]  # about normal
    large[::97] *= np.float32(3)  # makes rare symbols
    uneven = np.where(long[:5000] > 0.9, long[:5000], np.sign(long[:5000]) / np.float32(8))
    return {
        "empty": ramp[:0],
        "one": ramp[:1],
        "noise": ramp[:67],
        "bell": ramp[:600] * ramp[50:650] * ramp[100:700],
        "rare": np.where(np.arange(700) % 11 == 0, ramp, np.float32(0)),
        "edges": np.array([0, -0.0, 2.0**64, -(2.0**64), 1e-45, 1, -1 / 3], np.float32),
        "zeros": np.zeros(700, np.float32),
        "large": large,
        "uneven": uneven.astype(np.float32),
    }


def frames_to_read() -> dict[str, bytes]:
    """A frame in every mode of every codec, whether its encoder would choose it or not."""
    x = chunks()["bell"]
    found = {}
    for name in ("q4", "low", "min"):
        codec = get_codec(name)
        assert isinstance(codec, Ecsq)
        parts = Parts.of(codec, x)
        for mode in (RAW, ZSTD, OWN):
            found[f"{name} mode {mode}"] = parts.frame(mode)
        for table in range(len(codec.shipped.tables)):
            found[f"{name} table {table}"] = parts.frame(FIXED, table)
        found[f"{name} zero"] = codec.encode(x * 0)
        found[f"{name} seed 1"] = codec.encode(x, seed=1)
    found["high coded"] = coded_int8(x, 64)
    found["high block 256"] = Int8(block=256).encode(x)
    with numpy_alone():
        found["high zstd"] = get_codec("high").encode(chunks()["rare"])
    found["sparse:1"] = get_codec("sparse:1").encode(x)
    found["sparse:1024"] = get_codec("sparse:1024").encode(x)
    return found


def values_of(frame: bytes, numel: int) -> str:
    """What it decodes to, by a codec that its header names."""
    out = np.full(numel, np.nan, np.float32)
    codec_of(frame).decode_into(frame, out)
    raw = out.astype("<f4").tobytes()
    return raw.hex() if numel <= SHOWN_VALUES else "sha256 " + hashlib.sha256(raw).hexdigest()


def write() -> None:
    cases = []
    for name in NAMES:
        for kind, x in chunks().items():
            if len(x) <= SMALL_VALUES or name not in {"bf16", "fp32"}:
                frame = get_codec(name).encode(x)
                case = {"codec": name, "chunk": kind, "frame": frame.hex()}
                cases.append(case | {"values": values_of(frame, len(x))})
    for kind, frame in frames_to_read().items():
        numel = int.from_bytes(frame[12:16], "little")
        case = {"codec": "", "chunk": kind, "frame": frame.hex()}
        cases.append(case | {"values": values_of(frame, numel)})
    GOLDEN.write_text(json.dumps(cases, indent=0) + "\n")


if os.environ.get("MURMURATION_REWRITE_GOLDEN") == "1":
    write()


def load() -> list[dict[str, str]]:
    cases: list[dict[str, str]] = json.loads(GOLDEN.read_text())
    return cases


CASES = load()
WRITTEN = [case for case in CASES if case["codec"]]


def test_the_golden_file_covers_every_codec_and_mode() -> None:
    assert GOLDEN.stat().st_size < 500_000
    assert {(case["codec"], case["chunk"]) for case in WRITTEN} == {
        (name, kind)
        for name in NAMES
        for kind, x in chunks().items()
        if len(x) <= SMALL_VALUES or name not in {"bf16", "fp32"}
    }
    modes = {(frame[8], frame[9]) for case in CASES if (frame := bytes.fromhex(case["frame"]))}
    assert modes >= {(ECSQ, mode) for mode in (RAW, ZSTD, FIXED, OWN, ZERO)}
    assert modes >= {(INT8, mode) for mode in (RAW, ZSTD, OWN)}
    assert modes >= {(number, mode) for number in (BF16, FP32) for mode in (RAW, ZSTD)}
    written = {(case["codec"], bytes.fromhex(case["frame"])[9], case["chunk"]) for case in WRITTEN}
    assert written >= {
        ("q4", FIXED, "large"), ("q4", OWN, "uneven"), ("q4", ZERO, "zeros"), ("q4", RAW, "one"),
        ("high", OWN, "large"),
    }  # fmt: skip


def test_a_large_frame_has_sixteen_streams_and_literals() -> None:
    (frame,) = (
        bytes.fromhex(case["frame"])
        for case in WRITTEN
        if (case["codec"], case["chunk"]) == ("q4", "large")
    )
    side = HEADER.size + 2 + 14 + -(-16_500 // 256)
    *sizes, literals = np.frombuffer(frame, "<u2", 17, side).tolist()
    assert literals > 10
    assert side + 34 + sum(sizes) + (3 * literals + 1) // 2 == len(frame)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['codec']}-{case['chunk']}")
def test_version_1_is_read_as_it_was(case: dict[str, str]) -> None:
    frame = bytes.fromhex(case["frame"])
    numel = int.from_bytes(frame[12:16], "little")
    assert values_of(frame, numel) == case["values"]
    with numpy_alone():
        assert values_of(frame, numel) == case["values"]


def opened(frame: bytes) -> tuple[int, int, Bytes, Bytes]:
    """Everything in a frame with a zstd plane, unpacked."""
    parsed = Frame.read(frame)
    if parsed.codec in PLANES:
        side, plane = parsed.split((PLANES[parsed.codec] - 1) * parsed.numel)
    else:
        assert parsed.codec == ECSQ
        start = 2 + 2 * (2 ** (parsed.bits - 1) - 1) + -(-parsed.numel // 256)
        side = np.frombuffer(parsed.body[:start], np.uint8)
        size = -(-parsed.numel // (4 if parsed.bits == 2 else 2))
        plane = parsed.plane(parsed.body[start:], size)
    return parsed.codec, parsed.parameter, side, plane


@pytest.mark.parametrize("case", WRITTEN, ids=lambda case: f"{case['codec']}-{case['chunk']}")
def test_version_1_is_written_as_it_was(case: dict[str, str]) -> None:
    golden = bytes.fromhex(case["frame"])
    frame = get_codec(case["codec"]).encode(chunks()[case["chunk"]])
    if golden[9] != ZSTD:
        assert frame == golden
        return
    # zstd may choose other bytes in another release; what it packs may not change.
    assert frame[8:20] == golden[8:20]
    codec, parameter, side, plane = opened(frame)
    golden_codec, golden_parameter, golden_side, golden_plane = opened(golden)
    assert (codec, parameter) == (golden_codec, golden_parameter)
    assert np.array_equal(side, golden_side)
    assert np.array_equal(plane, golden_plane)
