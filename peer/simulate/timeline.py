"""A simulation as a picture: peers by time, what each was doing, what broke, and the throughput.

An SVG of plain rectangles; neighbouring samples of the same kind become one. Colours are told
apart also by those who see no red or green (after Okabe and Ito).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Final

from peer.simulate.report import figures
from peer.simulate.world import PHASES, Record

WIDTH: Final = 1200
LEFT: Final = 118
RIGHT: Final = 24
TOP: Final = 96
CURVE: Final = 110  # the throughput's height
GAP: Final = 34
_FAMILY: Final = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
_INK, _PALE, _GRID = "#1f2328", "#59636e", "#e4e8ec"
COLOURS: Final = {
    "dead": "#d8dce0",
    "frozen": "#8fa3b8",
    "looking": "#f0e442",
    "syncing": "#e69f00",
    "training": "#8fd3b6",
    "exchanging": "#0072b2",
}
WORDS: Final = {"syncing": "getting the state", "looking": "looking for others"}
SEVERE: Final = "#d55e00"


def draw_timeline(record: Record) -> str:
    """The whole picture as SVG text."""
    scenario, total = record.scenario, figures(record)
    lane = max(3.0, min(16.0, 640 / max(1, len(record.lanes))))
    bottom = TOP + lane * len(record.lanes)
    height = int(bottom + GAP + CURVE + 52)
    title = f"{total.peers} peers, {_span(scenario.duration_s)}, {total.faults} faults"
    promises = f"{total.violations} promises broken" if total.violations else "every promise held"
    subtitle = (
        f"throughput {total.throughput:.1%}, participation {total.participation:.1%},"
        f" {promises}; seed {scenario.seed}"
    )
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{_FAMILY}">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        _text(LEFT, 30, title, size=18, weight=600),
        _text(LEFT, 51, subtitle, colour=SEVERE if total.violations else _PALE),
        *_legend(),
        *_lanes(record, lane),
        *_faults(record, lane),
        *_curve(record, bottom + GAP),
        *_time_axis(record, TOP, bottom, bottom + GAP + CURVE),
        "</svg>",
        "",
    ]
    return "\n".join(parts)


def _x(record: Record, at_s: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * min(1.0, at_s / record.scenario.duration_s)


def _legend() -> Iterator[str]:
    x = float(LEFT)
    for phase, colour in COLOURS.items():
        word = WORDS.get(phase, phase)
        yield f'<rect x="{x:.1f}" y="66" width="14" height="12" rx="2" fill="{colour}"/>'
        yield _text(x + 20, 76.5, word, size=12)
        x += 44 + 6.6 * len(word)
    yield f'<path d="M{x + 3:.1f} 66 l5 12 l-10 0 z" fill="{SEVERE}"/>'
    yield _text(x + 14, 76.5, "fault", size=12)


def _lanes(record: Record, lane: float) -> Iterator[str]:
    every = max(1, int(14 / lane) + 1)
    for row, samples in enumerate(record.lanes):
        y = TOP + row * lane
        spec = record.scenario.peers[row]
        if row % every == 0:
            name = f"{spec.site or 'peer'} {row}" + (f" ({spec.lie})" if spec.lie else "")
            yield _text(LEFT - 8, y + lane / 2 + 4, name, size=11, anchor="end", colour=_PALE)
        tall = max(1.0, lane - 1)
        for phase, begin, end in _runs(samples):
            left, right = (_x(record, i * record.sample_s) for i in (begin, end))
            yield (
                f'<rect x="{left:.1f}" y="{y:.1f}" width="{right - left:.2f}"'
                f' height="{tall:.1f}" fill="{COLOURS[PHASES[phase]]}"/>'
            )


def _runs(samples: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(value, first index, index after the last) of each stretch of equal samples."""
    begin = 0
    for i in range(1, len(samples) + 1):
        if i == len(samples) or samples[i] != samples[begin]:
            yield samples[begin], begin, i
            begin = i


def _faults(record: Record, lane: float) -> Iterator[str]:
    size = max(3.0, min(6.0, lane / 2))
    for fault in record.scenario.faults:
        for target in fault.targets if fault.kind != "entrance" else ():
            x, y = _x(record, fault.at_s), TOP + target * lane
            yield (
                f'<path d="M{x:.1f} {y:.1f} l{size:.1f} {2 * size:.1f} l{-2 * size:.1f} 0 z"'
                f' fill="{SEVERE}"><title>{fault.kind}, {fault.seconds:g} s</title></path>'
            )
    for violation in record.violations:
        x = _x(record, violation.at_s)
        yield (
            f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}"'
            f' y2="{TOP + lane * len(record.lanes):.1f}" stroke="{SEVERE}" stroke-width="1.5">'
            f"<title>{escape(violation.promise)}: {escape(violation.what)}</title></line>"
        )


def _curve(record: Record, top: float) -> Iterator[str]:
    """Peers that train, on a scale to all there are."""
    peers = len(record.scenario.peers)
    yield _text(LEFT - 8, top + 10, f"{peers} train", size=11, anchor="end", colour=_PALE)
    yield _text(LEFT - 8, top + CURVE, "none", size=11, anchor="end", colour=_PALE)
    points = []
    for i, trained_s in enumerate(record.trained):
        share = min(1.0, max(0.0, trained_s) / record.sample_s / peers)
        points.append(f"{_x(record, i * record.sample_s):.1f},{top + CURVE * (1 - share):.1f}")
    if points:
        first, last = points[0].partition(",")[0], points[-1].partition(",")[0]
        area = " ".join([f"{first},{top + CURVE:.1f}", *points, f"{last},{top + CURVE:.1f}"])
        yield f'<polygon points="{area}" fill="{COLOURS["training"]}" opacity="0.5"/>'
        yield (
            f'<polyline points="{" ".join(points)}" fill="none" stroke="#2a9d74"'
            ' stroke-width="1.5"/>'
        )
    wide = WIDTH - LEFT - RIGHT
    frame = f'x="{LEFT}" y="{top}" width="{wide}" height="{CURVE}"'
    yield f'<rect {frame} fill="none" stroke="{_GRID}"/>'


def _time_axis(record: Record, top: float, bottom: float, low: float) -> Iterator[str]:
    duration_s = record.scenario.duration_s
    steps = (10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400)
    step_s = next((s for s in steps if duration_s / s <= 12), 43200)
    at_s = 0
    while at_s <= duration_s:
        x = _x(record, at_s)
        yield (
            f'<line x1="{x:.1f}" y1="{bottom + 4:.1f}" x2="{x:.1f}" y2="{low:.1f}"'
            f' stroke="{_GRID}"/>'
        )
        yield _text(x, low + 18, _span(at_s), size=11, anchor="middle", colour=_PALE)
        at_s += step_s


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:g} s"
    return f"{seconds / 60:g} min" if seconds < 7200 else f"{seconds / 3600:g} h"


def _text(
    x: float, y: float, text: str, *, size: float = 13, weight: int = 400,
    anchor: str = "start", colour: str = _INK,
) -> str:  # fmt: skip
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}"'
        f' text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
    )
