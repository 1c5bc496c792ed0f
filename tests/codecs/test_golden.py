"""Version 1 of the wire format, byte by byte: peers of different releases train together.

MURMURATION_REWRITE_GOLDEN=1 rewrites the file; do so only with a new version number.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tensorcodecs import CODEC_NAMES, get_codec
from tensorcodecs.frame import HEADER, RAW, Frame

if TYPE_CHECKING:
    from tensorcodecs.frame import Bytes, Float32

GOLDEN = Path(__file__).parent.parent / "golden" / "codec_v1.json"
CODEC_IDS = {"int8": 1, "int8-raw": 1, "bf16": 2, "fp32": 3}


def chunks() -> dict[str, Float32]:
    """Values by integer arithmetic alone, so that no library can change them."""
    noise = np.array([(i * 2_654_435_761 >> 7) % 2**16 - 2**15 for i in range(700)], np.int64)
    ramp = (noise / 2**15).astype(np.float32)
    return {
        "empty": ramp[:0],
        "one": ramp[:1],
        "noise": ramp[:67],
        "bell": ramp[:600] * ramp[50:650] * ramp[100:700],
        "sparse": np.where(noise % 11 == 0, ramp, np.float32(0)),
        "edges": np.array([0, -0.0, 2.0**64, -(2.0**64), 1e-45, 1, -1 / 3], np.float32),
    }


def opened(name: str, frame: bytes, numel: int) -> tuple[int, Bytes, Bytes]:
    parsed = Frame.parse(frame, CODEC_IDS[name], numel)
    side_bytes = {1: 4 * -(-numel // 4096), 2: numel, 3: 3 * numel}[CODEC_IDS[name]]
    return (parsed.block, *parsed.split(side_bytes))


def write() -> None:
    cases = []
    for name in CODEC_NAMES:
        codec = get_codec(name)
        for kind, x in chunks().items():
            frame = codec.encode(x)
            out = np.empty_like(x)
            codec.decode_into(frame, out)
            values = out.astype("<f4").tobytes().hex()
            cases.append({"codec": name, "chunk": kind, "frame": frame.hex(), "values": values})
    GOLDEN.write_text(json.dumps(cases, indent=0) + "\n")


if os.environ.get("MURMURATION_REWRITE_GOLDEN") == "1":
    write()


def load() -> list[dict[str, str]]:
    cases: list[dict[str, str]] = json.loads(GOLDEN.read_text())
    return cases


def test_the_golden_file_covers_every_codec_and_mode() -> None:
    cases = load()
    assert {(case["codec"], case["chunk"]) for case in cases} == {
        (name, kind) for name in CODEC_NAMES for kind in chunks()
    }
    assert {bytes.fromhex(case["frame"])[5] for case in cases} == {0, 1}


@pytest.mark.parametrize("case", load(), ids=lambda case: f"{case['codec']}-{case['chunk']}")
def test_version_1_is_read_and_written_as_it_was(case: dict[str, str]) -> None:
    codec, x = get_codec(case["codec"]), chunks()[case["chunk"]]
    golden = bytes.fromhex(case["frame"])
    out = np.empty_like(x)
    codec.decode_into(golden, out)
    assert out.astype("<f4").tobytes().hex() == case["values"]
    frame = codec.encode(x)
    if golden[5] == RAW:
        assert frame == golden
        return
    # zstd may choose other bytes in another release; what it packs may not change.
    assert frame[:6] == golden[:6]
    assert len(golden) < HEADER.size + 4 * len(x)
    block, side, plane = opened(case["codec"], frame, len(x))
    golden_block, golden_side, golden_plane = opened(case["codec"], golden, len(x))
    assert block == golden_block
    assert np.array_equal(side, golden_side)
    assert np.array_equal(plane, golden_plane)
