"""`encode_into` gives the bytes of `encode_many`, whatever the chunks are like and wherever it has
to leave its straight way: another mode, a table of their own, little room at the end."""

from __future__ import annotations

import numpy as np
import pytest

from tensorcodecs import CHUNK_VALUES, EncodeError, get_codec
from tensorcodecs.ecsq import Ecsq

NAMES = ("q4", "low", "min", "ecsq:0.7")


def room(codec: Ecsq, count: int) -> np.ndarray:
    return np.full(codec.bytes_max(CHUNK_VALUES) * -(-count // CHUNK_VALUES), 0xA5, np.uint8)


def chunks(seed: int, kinds: list[str], last: int) -> np.ndarray:
    """A vector whose chunks are of these kinds; the last one has `last` values."""
    rng = np.random.default_rng(seed)
    parts = []
    for kind in kinds:
        if kind == "zero":
            part = np.zeros(CHUNK_VALUES)
        elif kind == "sparse":
            part = rng.standard_normal(CHUNK_VALUES) * (rng.random(CHUNK_VALUES) < 0.003)
        elif kind == "wild":  # every value its own literal: larger than what may be sent
            part = rng.choice([-1.0, 1.0], CHUNK_VALUES) * 2.0 ** rng.integers(
                -40, 40, CHUNK_VALUES
            )
        elif kind == "flat":
            part = rng.uniform(-1, 1, CHUNK_VALUES)
        else:
            part = rng.standard_normal(CHUNK_VALUES) * 0.01
        parts.append(part)
    x = np.concatenate(parts).astype(np.float32)
    return x[: len(x) - CHUNK_VALUES + last]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("kinds", "last"),
    [
        (["normal"], 1),
        (["normal"] * 9, CHUNK_VALUES),
        (["normal"] * 20, 77_777),
        (["normal", "zero", "normal", "zero"] * 3, 5000),
        (["normal"] * 8 + ["sparse"] * 3 + ["normal"] * 8, 300),
        (["flat", "wild", "normal", "wild"] * 5, CHUNK_VALUES),
        (["normal"] * 17, 3),
    ],
)
def test_the_bytes_are_those_of_the_frames(name: str, kinds: list[str], last: int) -> None:
    codec = get_codec(name)
    assert isinstance(codec, Ecsq)
    x = chunks(len(kinds), kinds, last)
    frames = codec.encode_many(x)
    out = room(codec, len(x))
    ends = codec.encode_into(x, out)
    assert np.array_equal(ends, np.cumsum([len(f) for f in frames]))
    assert out[: ends[-1]].tobytes() == b"".join(frames)


def test_nothing_is_written_behind_the_room() -> None:
    codec = get_codec("q4")
    assert isinstance(codec, Ecsq)
    x = chunks(1, ["wild"] * 12, CHUNK_VALUES)
    need = codec.bytes_max(CHUNK_VALUES) * 12
    out = np.full(need + 4096, 0xA5, np.uint8)
    codec.encode_into(x, out[:need])
    assert np.all(out[need:] == 0xA5)


@pytest.mark.parametrize("index", [0, CHUNK_VALUES - 1, 5 * CHUNK_VALUES + 17, 11 * CHUNK_VALUES])
@pytest.mark.parametrize("before", ["normal", "sparse"])
def test_a_value_that_cannot_be_sent_is_named_by_its_place(index: int, before: str) -> None:
    codec = get_codec("q4")
    assert isinstance(codec, Ecsq)
    x = chunks(2, [before] * 12, CHUNK_VALUES)
    x[index] = np.nan
    with pytest.raises(EncodeError) as caught:
        codec.encode_into(x, room(codec, len(x)))
    assert caught.value.index == index
