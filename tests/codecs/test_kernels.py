"""The compiled loops: by which way a frame is read, where values are written, what is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tensorcodecs import CHUNK_VALUES, DecodeError, Ecsq, ecsq, get_codec
from tensorcodecs.frame import Frame
from tests.codecs.samples import bell

if TYPE_CHECKING:
    from tensorcodecs.frame import Float32

pytest.importorskip("numba")

ROOT = Path(__file__).parents[2]
TWO_LEVEL = ("q4", "low", "min", "ecsq:0.7")


def two_level(name: str) -> Ecsq:
    codec = get_codec(name)
    assert isinstance(codec, Ecsq)
    return codec


def one_by_one(codec: Ecsq, frames: list[bytes], numel: int) -> Float32:
    out = np.empty(numel, np.float32)
    for unit, frame in enumerate(frames):
        codec.decode_into(frame, out[unit * CHUNK_VALUES : (unit + 1) * CHUNK_VALUES])
    return out


@pytest.mark.parametrize("name", TWO_LEVEL)
@pytest.mark.parametrize("numel", [300, 4096, 2 * CHUNK_VALUES + 5000])
def test_the_compiled_reader_knows_header_and_checksum_of_the_usual_frame(
    name: str, numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = two_level(name)
    x = np.random.default_rng(1).standard_normal(numel).astype(np.float32)
    frames = codec.encode_many(x)
    expected = one_by_one(codec, frames, numel)

    def asked(*_: object) -> Frame:
        raise AssertionError("a usual frame went the long way")

    if len(frames[0]) >= 8 + 241:
        monkeypatch.setattr(Frame, "parse", asked)
    out = np.empty(numel, np.float32)
    codec.decode_many(frames, out)
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("name", TWO_LEVEL)
def test_values_written_past_the_caches_are_the_same_wherever_the_vector_lies(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = two_level(name)
    numel = 4 * CHUNK_VALUES + 1000
    x = bell(numel, seed=7)
    x[CHUNK_VALUES : 2 * CHUNK_VALUES] = 0  # a frame of another mode between usual ones
    x[2 * CHUNK_VALUES :][:CHUNK_VALUES:16] = 40  # and perhaps one with a table of its own
    frames = codec.encode_many(x)
    expected = one_by_one(codec, frames, numel)
    monkeypatch.setattr(ecsq, "_PAST_CACHE_BYTES", 0)
    room = np.empty(numel + 64, np.float32)
    for shift in range(17):
        room[:] = 7
        codec.decode_many(frames, room[shift : shift + numel])
        assert np.array_equal(room[shift : shift + numel], expected), shift
        assert np.all(room[:shift] == 7), shift
        assert np.all(room[shift + numel :] == 7), shift


def test_a_frame_that_is_damaged_is_found_past_the_caches_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ecsq, "_PAST_CACHE_BYTES", 0)
    codec = two_level("q4")
    frames = codec.encode_many(bell(3 * CHUNK_VALUES, seed=3))
    out = np.empty(3 * CHUNK_VALUES, np.float32)
    for unit in range(3):
        for place in (0, 5, 9, 11, 13, 21, 30, 500, len(frames[unit]) - 1):
            bad = bytearray(frames[unit])
            bad[place] ^= 4
            with pytest.raises(DecodeError):
                codec.decode_many([*frames[:unit], bytes(bad), *frames[unit + 1 :]], out)


WITHOUT_SCIPY = """
import sys
import numpy as np
from tensorcodecs import get_codec
codec, x = get_codec("q4"), np.ones(1000, np.float32)
codec.accumulate(codec.encode(x), 1.0, x)
assert "tensorcodecs.kernels" in sys.modules
assert "scipy.linalg" not in sys.modules, "somebody asked for it"
from numba import njit
product = njit(lambda a, b: np.dot(a, b))(np.eye(2), np.ones((2, 2)))
assert "scipy.linalg" in sys.modules
assert np.array_equal(product, np.ones((2, 2)))
"""


def test_scipy_is_loaded_by_those_who_multiply_matrices_only() -> None:
    pytest.importorskip("scipy")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_SCIPY],
        env={**os.environ, "PYTHONPATH": str(ROOT / "codecs")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
