"""Charts that can be read, and points that lie where they should."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from tensorcodecs import CHUNK_VALUES, get_codec
from tests.bench import plane, svg
from tests.bench.result import BenchError
from tests.bench.svg import Axis, Box, Series
from tests.bench.swarm import Plan, Swarm

LINEAR = Axis("x", 0, 10, (0, 5, 10))
LOG = Axis("y", 0.01, 1, (0.01, 0.1, 1), log=True)
SVG = "{http://www.w3.org/2000/svg}"


def elements(text: str, tag: str) -> list[ET.Element]:
    return list(ET.fromstring(text).iter(SVG + tag))


# ── charts ───────────────────────────────────────────────────────────────────────────────
def test_a_chart_is_well_formed_whatever_its_words() -> None:
    text = svg.chart("a < b", "R & D", LINEAR, LOG, [Series("'<>&\"", [(1, 0.5)], "red")])
    words = [element.text for element in elements(text, "text")]
    assert {"a < b", "R & D", "'<>&\"", "x", "y", "0.01", "5"} <= set(words)


def test_axes_go_from_low_to_high() -> None:
    assert [LINEAR.share(v) for v in (0, 5, 10)] == [0, 0.5, 1]
    assert [LOG.share(v) for v in (0.01, 0.1, 1)] == pytest.approx([0, 0.5, 1])


def test_a_point_is_drawn_where_its_values_say() -> None:
    text = svg.chart("", "", LINEAR, LOG, [Series("s", [(5, 0.1)], "red")])
    spots = {(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in elements(text, "circle")}
    middle = ((svg.FRAME.left + svg.FRAME.right) / 2, (svg.FRAME.top + svg.FRAME.bottom) / 2)
    assert middle in spots


def test_points_outside_the_axes_are_left_out() -> None:
    points = [(5.0, 0.1), (11.0, 0.1), (5.0, 0.001)]
    text = svg.chart("", "", LINEAR, LOG, [Series("s", points, "red", labels=["a", "b", "c"])])
    assert len(elements(text, "circle")) == 1 + 1  # and the legend's
    assert [e.text for e in elements(text, "text") if e.text in ("a", "b", "c")] == ["a"]


def test_labels_of_close_points_do_not_overlap() -> None:
    rng = np.random.default_rng(1)
    points = [
        (x, 0.1 * y) for x, y in zip(rng.uniform(2, 5, 12), rng.uniform(1, 3, 12), strict=True)
    ]
    names = [f"point {n}" for n in range(len(points))]
    text = svg.chart("", "", LINEAR, LOG, [Series("s", points, "red", labels=names)])
    boxes = []
    for element in elements(text, "text"):
        if element.text in names:
            at, base = float(element.attrib["x"]), float(element.attrib["y"])
            width = svg.width_of(element.text)
            shift = {"start": 0.0, "middle": -width / 2, "end": -width}
            left = at + shift[element.attrib["text-anchor"]]
            boxes.append(Box(left, base - 11, left + width, base + 3))
    assert len(boxes) == len(names)
    assert not any(a.touches(b) for a, b in itertools.combinations(boxes, 2))
    assert all(box.inside(svg.FRAME) for box in boxes)


def test_the_legend_covers_no_point_if_a_corner_is_free() -> None:
    points = [(9.5, 0.9), (0.5, 0.9), (9.5, 0.011)]
    text = svg.chart("", "", LINEAR, LOG, [Series("s", points, "red")])
    (legend,) = (r for r in elements(text, "rect") if "rx" in r.attrib)
    assert float(legend.attrib["x"]) < svg.WIDTH / 2
    assert float(legend.attrib["y"]) > svg.HEIGHT / 2


# ── points ───────────────────────────────────────────────────────────────────────────────
def test_a_points_bits_and_error_are_those_of_what_was_sent() -> None:
    vectors = [np.array([3.0, 4.0], np.float32), np.array([0.0, 2.0], np.float32)]
    point = plane.measure("half", "ours", lambda vector: (1, vector * np.float32(0.5)), vectors)
    assert (point.bits, point.error) == (4, 0.5)
    assert (point.bound, point.above) == (1, 3)


def test_an_exact_codec_has_no_bound() -> None:
    point = plane.measure("same", "ours", lambda v: (8, v), [np.ones(2, np.float32)])
    assert (point.error, point.bound, point.above) == (0, None, None)


def test_values_that_are_not_finite_are_no_measurement() -> None:
    with pytest.raises(BenchError, match="half"):
        plane.measure("half", "ours", lambda v: (1, v * np.nan), [np.ones(2, np.float32)])


def test_side_information_is_what_a_frame_has_beside_its_levels() -> None:
    normal = np.random.default_rng(4).standard_normal(CHUNK_VALUES).astype(np.float32)
    frame = get_codec("q4").encode(normal)
    side = round(plane.side_bits("q4") * CHUNK_VALUES / 8)
    *sizes, literals = np.frombuffer(frame[:side][-2 * 17 :], "<u2").tolist()
    assert side + sum(sizes) + (3 * literals + 1) // 2 == len(frame)
    assert plane.side_bits("q4") - plane.side_bits("min") == pytest.approx(8 * 12 / CHUNK_VALUES)
    assert plane.side_bits("fp32") == 0


def test_int4_errs_by_half_a_step_at_most() -> None:
    vector = np.random.default_rng(2).standard_normal(1000).astype(np.float32)
    size, arrived = plane._int4(64)(vector)
    steps = np.repeat([np.abs(vector[at : at + 64]).max() / 7 for at in range(0, 1000, 64)], 64)
    assert (np.abs(arrived - vector) <= 0.51 * steps[:1000]).all()
    assert 250 < size < 600


def test_the_picture_names_the_codecs_and_leaves_out_the_exact_one() -> None:
    points = [
        plane.Point("q4", "ours", 3.1, 0.14, 0.04), plane.Point("ecsq:1.19", "ours", 2, 0.3, 0.04),
        plane.Point("high", "ours", 7.1, 0.009), plane.Point("fp32", "ours", 26.7, 0.0),
        plane.Point("Uniform8BitQuantization", "hivemind", 8, 0.05),
    ]  # fmt: skip
    words = {element.text for element in elements(plane.picture(points, "made up"), "text")}
    assert {"q4", "high", "Uniform8Bit", "made up"} <= words
    assert not {"fp32", "ecsq:1.19"} & words


# ── the swarm ────────────────────────────────────────────────────────────────────────────
def test_a_swarm_learns_the_same_again_and_something_at_all() -> None:
    plan = Plan(hidden=32, layers=1, workers=2, warmup_steps=5, rounds=2, steps=5, batch=2,
                tokens=32, validation_samples=8)  # fmt: skip
    swarm = Swarm(3, plan)
    sent: list[plane.Float32] = []

    def keep(vector: plane.Float32) -> plane.Float32:
        sent.append(vector.copy())
        return vector

    first = swarm.learn([keep, keep], lambda mean: mean)
    assert len(sent) == 4
    assert all(len(vector) == swarm.layout.numel and vector.any() for vector in sent)
    assert not np.array_equal(sent[0], sent[1])  # samples of their own
    assert first < swarm.first_loss < math.log(264) + 0.5
    assert swarm.learn([keep, keep], lambda mean: mean) == first
    assert Swarm(3, plan).learn([keep, keep], lambda mean: mean) == first
    assert swarm.learn([keep, keep], lambda mean: 0 * mean) == swarm.first_loss
