"""A whole vector in one piece: every value comes back, nothing wrong gets in."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from tensorcodecs import CHUNK_VALUES, DecodeError, EncodeError, Layout, get_codec
from tensorcodecs.container import Container, pack_vector, unpack_vector
from tensorcodecs.frame import checksum_of

SIZES = [0, 1, 1000, CHUNK_VALUES, CHUNK_VALUES + 1, 9 * CHUNK_VALUES + 77]


def layout_of(numel: int) -> Layout:
    return Layout.of([("b", (numel - numel // 3,)), ("a", (numel // 3,))])


def values(numel: int, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(numel, np.float32)


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("name", ["q4", "min", "high", "fp32"])
def test_a_vector_comes_back_as_its_codec_gives_it(name: str, numel: int) -> None:
    x, layout, codec = values(numel), layout_of(numel), get_codec(name)
    data = pack_vector(x, layout, codec)
    expected = np.empty_like(x)
    frames = codec.encode_many(x)
    if frames:
        codec.decode_many(frames, expected)
    assert np.array_equal(unpack_vector(data, layout), expected)


def test_a_range_of_chunks_is_read_alone() -> None:
    x = values(5 * CHUNK_VALUES + 9)
    layout = layout_of(len(x))
    container = Container(pack_vector(x, layout, get_codec("fp32")), layout)
    out = np.empty(2 * CHUNK_VALUES, np.float32)
    container.read_into(out, 3)
    assert np.array_equal(out, x[3 * CHUNK_VALUES : 5 * CHUNK_VALUES])
    tail = np.empty(9, np.float32)
    container.read_into(tail, 5)
    assert np.array_equal(tail, x[-9:])
    for count, first in ((8, 5), (CHUNK_VALUES, 5), (10, 0)):
        with pytest.raises(ValueError, match="do not hold"):
            container.read_into(np.empty(count, np.float32), first)


@pytest.mark.parametrize("name", ["low", "bf16"])
def test_adding_is_adding_the_weighted_values(name: str) -> None:
    x, acc = values(3 * CHUNK_VALUES + 5), values(3 * CHUNK_VALUES + 5, seed=1)
    layout = layout_of(len(x))
    container = Container(pack_vector(x, layout, get_codec(name)), layout)
    decoded = np.empty_like(x)
    container.read_into(decoded)
    expected = acc + 2.5 * decoded
    container.add_into(acc, 2.5)
    assert np.allclose(acc, expected, rtol=1e-6, atol=1e-6)


def test_a_bad_value_is_named_by_its_place_in_the_vector() -> None:
    x = values(2 * CHUNK_VALUES)
    layout = layout_of(len(x))
    x[CHUNK_VALUES + 5] = np.nan
    with pytest.raises(EncodeError) as caught:
        pack_vector(x, layout, get_codec("q4"))
    assert caught.value.index == CHUNK_VALUES + 5
    assert layout.name_at(caught.value.index) == "b"


def test_whatever_is_changed_cut_or_added_is_refused() -> None:
    x = values(CHUNK_VALUES + 100)
    layout = layout_of(len(x))
    good = pack_vector(x, layout, get_codec("q4"))
    rng = np.random.default_rng(1)
    places = [*range(80), *rng.integers(80, len(good), 200)]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(DecodeError):
            unpack_vector(bytes(bad), layout)
    for size in [*range(0, 100, 7), len(good) - 1]:
        with pytest.raises(DecodeError):
            unpack_vector(good[:size], layout)
    with pytest.raises(DecodeError):
        unpack_vector(good + b"\0", layout)
    with pytest.raises(DecodeError, match="another layout"):
        unpack_vector(good, Layout.of([("a", (len(x),))]))


def test_offsets_that_lie_are_refused_even_with_a_good_checksum() -> None:
    x = values(3 * CHUNK_VALUES)
    layout = layout_of(len(x))
    good = pack_vector(x, layout, get_codec("q4"))
    ends = list(struct.unpack_from("<3Q", good, 56))
    for lie in ([ends[1], ends[0], ends[2]], [0, 0, ends[2]], [2**63, ends[1], ends[2]],
                [ends[0], ends[1], ends[2] + 1], [ends[0] + 1, ends[1], ends[2]]):  # fmt: skip
        table = struct.pack("<3Q", *lie)
        head = good[:52]
        bad = head + struct.pack("<I", checksum_of(head + table)) + table + good[80:]
        with pytest.raises(DecodeError):
            unpack_vector(bad, layout)
