"""A chart as SVG text: two axes, curves and dots, each labelled where there is room.

Pixels count from the upper left corner. The legend takes the emptiest corner; then labels are
placed one after the other, each at the first spot around its point that is inside the frame and
touches no dot, curve or other label.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDTH: Final = 860
HEIGHT: Final = 580
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 24, 64, 66  # what the frame leaves free at each side
_FONT: Final = 13
_FAMILY: Final = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
_LETTER: Final = 0.58  # of the font size: the mean width of a letter, rather too much
_DOT: Final = 4.5
_INK, _PALE, _GRID = "#1f2328", "#59636e", "#e4e8ec"
_LEGEND_ROW: Final = 20


@dataclass(frozen=True, slots=True)
class Axis:
    """From `low` to `high`, which lies to the right or above."""

    title: str
    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def share(self, value: float) -> float:
        """Where `value` lies between low (0) and high (1)."""
        low, high, at = (
            (math.log(v) if self.log else v) for v in (self.low, self.high, value)
        )  # fmt: skip
        return (at - low) / (high - low)


@dataclass(frozen=True, slots=True)
class Series:
    """Points that belong together."""

    name: str
    """In the legend."""
    points: Sequence[tuple[float, float]]
    colour: str
    line: bool = False
    dashed: bool = False
    dots: bool = True
    labels: Sequence[str] = ()
    """One per point; "" has none."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def touches(self, other: Box) -> bool:
        """Whether they share any area."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def inside(self, other: Box) -> bool:
        """Whether nothing of it sticks out of `other`."""
        return (
            other.left <= self.left
            and self.right <= other.right
            and other.top <= self.top
            and self.bottom <= other.bottom
        )


FRAME: Final = Box(_LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM)
"""What the axes enclose."""


def chart(title: str, subtitle: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """The whole picture. Points outside the axes are left out."""
    placed = [_place(one, x, y) for one in series]
    taken: list[Box] = []
    for one, points in zip(series, placed, strict=True):
        if one.dots:
            taken += [_around(point, _DOT + 1) for point in points.values()]
        if one.line:
            taken += _beads(list(points.values()))
    legend = _legend_box(series, taken)
    taken.append(legend)
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{_FAMILY}">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(FRAME.left, 28, title, size=17, weight=600),
        _text(FRAME.left, 48, subtitle, colour=_PALE),
        *_axes(x, y),
    ]
    for one, points in zip(series, placed, strict=True):
        parts += _marks(one, list(points.values()))
    for one, points in zip(series, placed, strict=True):
        for index, label in enumerate(one.labels):
            if label and index in points:
                box, part = _label(label, points[index], one.colour, taken)
                taken.append(Box(box.left - 4, box.top, box.right + 4, box.bottom))
                parts.append(part)
    parts += [*_legend(series, legend), "</svg>", ""]
    return "\n".join(parts)


def width_of(text: str, size: float = _FONT) -> float:
    """About how many pixels `text` takes; rather too many."""
    return len(text) * size * _LETTER


def spots(point: tuple[float, float], width: float, height: float) -> Iterator[Box]:
    """Where a label may stand, best first: right, left, above and below, then ever further."""
    px, py = point
    for gap in (8, 12, 18, 28, 40):
        right, left = px + gap, px - gap - width
        above, below = py - gap - height, py + gap
        middle, centre = py - height / 2, px - width / 2
        for corner_x, corner_y in (
            (right, middle), (left, middle), (right, above + gap / 2), (left, below - gap / 2),
            (right, below - gap / 2), (left, above + gap / 2), (centre, above), (centre, below),
        ):  # fmt: skip
            yield Box(corner_x, corner_y, corner_x + width, corner_y + height)


def _place(one: Series, x: Axis, y: Axis) -> dict[int, tuple[float, float]]:
    """Pixels by the point's index."""
    found = {}
    for index, (px, py) in enumerate(one.points):
        across, up = x.share(px), y.share(py)
        if -1e-9 <= across <= 1 + 1e-9 and -1e-9 <= up <= 1 + 1e-9:
            found[index] = (
                FRAME.left + across * (FRAME.right - FRAME.left),
                FRAME.bottom - up * (FRAME.bottom - FRAME.top),
            )
    return found


def _label(
    label: str, point: tuple[float, float], colour: str, taken: Sequence[Box]
) -> tuple[Box, str]:
    height = _FONT + 1
    width = width_of(label)
    free = (
        box
        for box in spots(point, width, height)
        if box.inside(FRAME) and not any(box.touches(other) for other in taken)
    )
    box = next(free, None) or next(spots(point, width, height))
    to_right = box.left > point[0]
    anchor, at = ("start", box.left) if to_right else ("end", box.right)
    if box.left <= point[0] <= box.right:
        anchor, at = "middle", (box.left + box.right) / 2
    return box, _text(at, box.bottom - 3, label, colour=colour, anchor=anchor, weight=500)


def _axes(x: Axis, y: Axis) -> Iterator[str]:
    for tick in x.ticks:
        at = FRAME.left + x.share(tick) * (FRAME.right - FRAME.left)
        yield _line((at, FRAME.top), (at, FRAME.bottom), _GRID)
        yield _text(at, FRAME.bottom + 20, f"{tick:g}", colour=_PALE, anchor="middle")
    for tick in y.ticks:
        at = FRAME.bottom - y.share(tick) * (FRAME.bottom - FRAME.top)
        yield _line((FRAME.left, at), (FRAME.right, at), _GRID)
        yield _text(FRAME.left - 10, at + 4.5, f"{tick:g}", colour=_PALE, anchor="end")
    yield _line((FRAME.left, FRAME.bottom), (FRAME.right, FRAME.bottom), _PALE)
    yield _line((FRAME.left, FRAME.top), (FRAME.left, FRAME.bottom), _PALE)
    middle = (FRAME.left + FRAME.right) / 2
    yield _text(middle, HEIGHT - 20, x.title, anchor="middle")
    middle = (FRAME.top + FRAME.bottom) / 2
    turned = _text(22, middle, y.title, anchor="middle")
    yield turned.replace("<text ", f'<text transform="rotate(-90 22 {_n(middle)})" ', 1)


def _marks(one: Series, points: Sequence[tuple[float, float]]) -> Iterator[str]:
    if one.line and points:
        path = " ".join(f"{_n(px)},{_n(py)}" for px, py in points)
        dash = ' stroke-dasharray="6 5"' if one.dashed else ""
        stroke = f'stroke="{one.colour}" stroke-width="2"{dash}'
        yield f'<polyline points="{path}" fill="none" {stroke}/>'
    if one.dots:
        for px, py in points:
            yield _dot(px, py, one.colour)


def _legend_box(series: Sequence[Series], taken: Sequence[Box]) -> Box:
    """In the corner of the frame where it covers the least of what is taken."""
    width = 44 + max((width_of(one.name) for one in series), default=0)
    height = 12 + _LEGEND_ROW * len(series)
    corners = [
        Box(left, top, left + width, top + height)
        for top in (FRAME.top + 10, FRAME.bottom - 10 - height)
        for left in (FRAME.right - 10 - width, FRAME.left + 10)
    ]
    return min(corners, key=lambda box: sum(box.touches(other) for other in taken))


def _legend(series: Sequence[Series], box: Box) -> Iterator[str]:
    yield (
        f'<rect x="{_n(box.left)}" y="{_n(box.top)}" width="{_n(box.right - box.left)}" '
        f'height="{_n(box.bottom - box.top)}" rx="6" fill="white" stroke="{_GRID}"/>'
    )
    for row, one in enumerate(series):
        middle = box.top + 6 + _LEGEND_ROW * (row + 0.5)
        if one.line:
            dash = "6 5" if one.dashed else ""
            yield _line((box.left + 8, middle), (box.left + 30, middle), one.colour, 2, dash)
        if one.dots:
            yield _dot(box.left + 19, middle, one.colour)
        yield _text(box.left + 38, middle + 4.5, one.name)


def _beads(points: Sequence[tuple[float, float]]) -> list[Box]:
    """Small boxes along a curve, so that no label lies on it."""
    boxes = []
    for (ax, ay), (bx, by) in itertools.pairwise(points):
        steps = max(1, int(math.hypot(bx - ax, by - ay) / 4))
        boxes += [
            _around((ax + (bx - ax) * step / steps, ay + (by - ay) * step / steps), 2)
            for step in range(steps + 1)
        ]
    return boxes


def _around(point: tuple[float, float], radius: float) -> Box:
    px, py = point
    return Box(px - radius, py - radius, px + radius, py + radius)


def _dot(px: float, py: float, colour: str) -> str:
    return (
        f'<circle cx="{_n(px)}" cy="{_n(py)}" r="{_DOT}" fill="{colour}" '
        'stroke="white" stroke-width="1"/>'
    )


def _line(
    start: tuple[float, float],
    stop: tuple[float, float],
    colour: str,
    width: float = 1,
    dash: str = "",
) -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{_n(start[0])}" y1="{_n(start[1])}" x2="{_n(stop[0])}" y2="{_n(stop[1])}" '
        f'stroke="{colour}" stroke-width="{width:g}"{dashed}/>'
    )


def _text(
    px: float,
    py: float,
    text: str,
    *,
    colour: str = _INK,
    anchor: str = "start",
    size: float = _FONT,
    weight: int = 400,
) -> str:
    return (
        f'<text x="{_n(px)}" y="{_n(py)}" fill="{colour}" text-anchor="{anchor}" '
        f'font-size="{size:g}" font-weight="{weight}">{escape(text)}</text>'
    )


def _n(pixels: float) -> str:
    return f"{pixels:.1f}".removesuffix(".0")
