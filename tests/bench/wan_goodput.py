"""Goodput of a line while one peer sends a span to another on the other continent.

Two hosts, 80 ms there and back, 10, 20 and 100 Mbit/s each way. One contribution at a time goes
through the product's own exchange and codec, over the bulk lane: five seconds of the line each.
Goodput is that of the coded units, at the receiver, from the header of the stream until all of them
are there and checked.
"""

from __future__ import annotations

from statistics import median
from typing import Any, Final

from tests.bench import wan_rounds as rounds
from tests.bench.fleet import Fleet
from tests.bench.result import Bar, BenchError, Cell, Progress, Result
from tests.netlab import Lab, LabError, missing, two_regions

_RATES_MBPS: Final = (10.0, 20.0, 100.0)
_RTT_MS: Final = 80.0
_SECONDS: Final = 5.0  # of the line at its rate
_QUICK_SECONDS: Final = 2.0
_REPEATS: Final = 3
_TIMEOUT_S: Final = 60.0
_LEAST: Final = 0.9
_WORKER: Final = "tests.bench.wan_span_worker"


def run(quick: bool, seed: int, progress: Progress) -> Result:
    """See `registry.Measurement`. About a minute and a half."""
    lack = missing()
    if lack is not None:
        raise BenchError(lack)
    rates = _RATES_MBPS[1:2] if quick else _RATES_MBPS
    told: dict[float, list[dict[str, Any]]] = {}
    try:
        for mbps in rates:
            told[mbps] = _rate(mbps, quick, seed, progress)
    except LabError as error:
        raise BenchError(str(error)) from error
    return Result(
        rows=[_row(mbps, replies) for mbps, replies in told.items()],
        bars=[
            Bar.at_least(
                f"{mbps:g} Mbit/s: goodput of a span / the line's rate",
                median(_mbps(reply) for reply in replies) / mbps, _LEAST,
                f"median of {len(replies)}; packets' headers take 3.5 %",
            )
            for mbps, replies in told.items()
        ],
        notes=[_note(told, seed)],
    )  # fmt: skip


def _note(told: dict[float, list[dict[str, Any]]], seed: int) -> str:
    over = sorted({str(reply["over"]) for replies in told.values() for reply in replies})
    return (
        f"One span: seed {seed}; the coded units of one contribution between two hosts that are "
        f"{_RTT_MS:g} ms apart, over {', '.join(over)}. s: while it is sent, from its header until "
        "all of it is checked; s, all: from the word go. MB: of the units alone."
    )


def _rate(mbps: float, quick: bool, seed: int, progress: Progress) -> list[dict[str, Any]]:
    spec = two_regions(1, 1, between_ms=_RTT_MS, up_mbps=mbps)
    size = int(mbps * 1e6 / 8 * (_QUICK_SECONDS if quick else _SECONDS))
    replies = []
    with (
        Lab(spec, seed=seed, mover_nice=-10) as lab,
        Fleet("span", _WORKER, 2, places=[h.command([]) for h in lab.hosts]) as fleet,
    ):
        fleet.start([{"host": host.address} for host in lab.hosts], seed=seed, size_bytes=size)
        for turn in range(1 if quick else _REPEATS):
            receives, _ = fleet.ask("span", _TIMEOUT_S, number=turn)
            replies.append(receives)
            progress(f"{mbps:g} Mbit/s, {turn + 1}: {_mbps(receives):.2f} Mbit/s")
    return replies


def _mbps(reply: dict[str, Any]) -> float:
    return float(reply["bytes"]) * 8 / 1e6 / float(reply["seconds"])


def _row(mbps: float, replies: list[dict[str, Any]]) -> dict[str, Cell]:
    """The columns of `wan_rounds.row`, as far as they mean anything here."""
    return rounds.BLANK | {
        "line": f"{mbps:g} Mbit/s, one span",
        "system": rounds.OURS,
        "s, all": median(float(reply["opened_s"]) for reply in replies),
        "s": median(float(reply["seconds"]) for reply in replies),
        "slowest": max(float(reply["opened_s"]) for reply in replies),
        "MB sent": float(replies[0]["bytes"]) / 1e6,
        "right": f"{len(replies)} of {len(replies)}",  # units are checked as they come
    }
