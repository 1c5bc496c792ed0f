"""The layout: one order for everybody, and units that tile it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tensorcodecs import CHUNK_VALUES, Layout

Tensors = list[tuple[str, tuple[int, ...]]]

TENSORS = [("model.b", (7,)), ("model.a", (3, 5)), ("scale", ()), ("empty", (0, 4))]


def test_the_order_does_not_depend_on_who_lists_the_tensors() -> None:
    layouts = {Layout.of(order).digest() for order in itertools.permutations(TENSORS)}
    assert len(layouts) == 1
    layout = Layout.of(TENSORS)
    assert layout.names == ("empty", "model.a", "model.b", "scale")
    assert layout.offsets == (0, 0, 15, 22)
    assert layout.numel == 23


def test_the_digest_tells_different_layouts_apart() -> None:
    others: list[Tensors] = [
        [("a", (6,))],
        [("b", (6,))],
        [("a", (2, 3))],
        [("a", (3, 2))],
        [("a", (6,)), ("b", (0,))],
        [("a", (2,)), ("b", (4,))],
        [],
    ]
    assert len({Layout.of(tensors).digest() for tensors in others}) == len(others)


def test_the_digest_of_version_1_never_changes() -> None:
    digest = "a64293a9ced3b4eb1d95a253d3fece08014a782a5d9f264759ee72a18a47756b"
    assert Layout.of(TENSORS).digest().hex() == digest


@pytest.mark.parametrize("numel", [0, 1, CHUNK_VALUES - 1, CHUNK_VALUES, CHUNK_VALUES + 1, 200_003])
def test_units_tile_the_vector(numel: int) -> None:
    layout = Layout.of([("w", (numel,))])
    slices = [layout.unit_slice(unit) for unit in range(layout.units)]
    assert layout.units == -(-numel // CHUNK_VALUES)
    covered = [value for piece in slices for value in (piece.start, piece.stop)]
    assert covered == sorted(covered)
    assert sum(layout.unit_sizes()) == numel
    assert all(piece.stop - piece.start == CHUNK_VALUES for piece in slices[:-1])
    assert layout.unit_sizes(1, layout.units) == layout.unit_sizes()[1:]
    for unit in (-1, layout.units):
        with pytest.raises(ValueError, match="outside"):
            layout.unit_slice(unit)


def test_levels_packed_by_threes_fours_or_sixes_fill_a_unit() -> None:
    for planes in (3, 4, 6):
        assert CHUNK_VALUES % (planes * 256) == 0


def test_every_value_has_a_tensor() -> None:
    layout = Layout.of(TENSORS)
    owners = [layout.name_at(offset) for offset in range(layout.numel)]
    assert owners == ["model.a"] * 15 + ["model.b"] * 7 + ["scale"]
    for offset in (-1, layout.numel):
        with pytest.raises(ValueError, match="outside"):
            layout.name_at(offset)


def test_views_write_through() -> None:
    layout = Layout.of(TENSORS)
    flat = np.zeros(layout.numel, np.float32)
    views = layout.views(flat)
    assert {name: view.shape for name, view in views.items()} == dict(TENSORS)
    views["model.a"][2, 4] = 1
    views["scale"][()] = 2
    assert np.flatnonzero(flat).tolist() == [14, 22]
    with pytest.raises(ValueError, match="contiguous vector of 23"):
        layout.views(flat[:-1])


@pytest.mark.parametrize(
    "tensors",
    [
        [("a", (1,)), ("a", (1,))],
        [("a", (1,)), ("b", ()), ("a", (2,))],
        [("", (1,))],
        [("a", (-1,))],
    ],
)
def test_nonsense_has_no_layout(tensors: Tensors) -> None:
    with pytest.raises(ValueError, match=r"twice|empty|negative"):
        Layout.of(tensors)
