"""One stream across an ocean with lost packets: the bulk lane with BBR and with cubic, and libp2p.

Two hosts of the network laboratory, 100 Mbit/s up and down, 80 ms there and back, with 0, 1 and 3 %
of the packets lost at random. One stream at a time, in turns. Goodput is what the receiver has
said that it got by the time that it said so, so it includes the stream's opening and slow start.
"""

from __future__ import annotations

from statistics import median
from typing import Any, Final

from tests.bench.fleet import Fleet
from tests.bench.result import Bar, BenchError, Cell, Progress, Result
from tests.netlab import Lab, requirements, two_regions

_MBPS: Final = 100.0
_RTT_MS: Final = 80.0
_LOSSES: Final = (0.0, 0.01, 0.03)
_CARRIERS: Final = {"lane": 1, "lane, cubic": 2, "libp2p": 1}
"""Name in the table -> which worker sends."""
_HOSTS: Final = ("a1", "b1", "b1")
_BYTES: Final = 60_000_000  # five seconds of the line
_QUICK_BYTES: Final = 10_000_000
_REPEATS: Final = 3
_DEADLINE_S: Final = 20.0  # four times what the line would take
_QUICK_DEADLINE_S: Final = 10.0
_WORKER: Final = "tests.bench.lane_worker"


def run(quick: bool, seed: int, progress: Progress) -> Result:
    """See `registry.Measurement`. About four minutes."""
    lack = requirements.missing()
    if lack is not None:
        raise BenchError(lack)
    total, deadline_s = (_QUICK_BYTES, _QUICK_DEADLINE_S) if quick else (_BYTES, _DEADLINE_S)
    repeats = 1 if quick else _REPEATS
    told: dict[tuple[float, str], list[dict[str, Any]]] = {}
    spec = two_regions(1, 1, inside_ms=4, between_ms=_RTT_MS, up_mbps=_MBPS)
    with (
        Lab(spec, seed=seed, mover_nice=-10) as lab,
        Fleet("lane", _WORKER, 3, places=[lab.host(h).command([]) for h in _HOSTS]) as fleet,
    ):
        fleet.start(seed=seed, host="0.0.0.0")
        for loss in _LOSSES:
            lab.set_route("a", "b", loss=loss)
            for turn in range(repeats):
                for carrier, by in _CARRIERS.items():
                    progress(f"{carrier}, {loss:.0%} lost, {turn + 1} of {repeats}")
                    replies = fleet.ask(
                        "push", deadline_s + 60,
                        by=by, carrier=carrier, total=total, deadline_s=deadline_s,
                    )  # fmt: skip
                    told.setdefault((loss, carrier), []).append(replies[by])
    rows: list[dict[str, Cell]] = []
    mbps: dict[tuple[float, str], float] = {}
    for key, runs in told.items():
        rates = [_mbps(reply) for reply in runs]
        mbps[key] = median(rates)
        fates = sorted({str(reply["fate"]) for reply in runs})
        rows.append(
            {
                "lost": f"{key[0]:.0%}",
                "carrier": key[1],
                "Mbit/s": mbps[key],
                "least": min(rates),
                "what became of it": "; ".join(fates),
            }
        )
        strays = {str(r["over"]) for r in runs} - {key[1].partition(",")[0]}
        if strays:
            rows[-1]["what became of it"] = f"went over {strays.pop()}"
    clean = mbps[0.0, "lane"]
    bars = [
        Bar.at_least(
            "no loss: lane's goodput / the line's rate", clean / _MBPS, 0.85,
            "headers take 4 %, and the start two round trips and more",
        )
    ]  # fmt: skip
    for loss in _LOSSES[1:]:
        slower = clean / mbps[loss, "lane"] if mbps[loss, "lane"] else None
        bars.append(
            Bar.at_most(f"{loss:.0%} lost: lane's time, x without loss", slower, 1.5, "same run")
        )
    notes = [
        f"Seed {seed}; {total / 1e6:.0f} MB each, {deadline_s:g} s at most.",
        "Of a stream that did not arrive whole, what had left the sender counts: flattering.",
        "`lane` is what a peer does where the system allows it BBR; `lane, cubic` where not.",
        "libp2p's daemon has the system's own congestion control, which is cubic here.",
    ]
    return Result(rows=rows, bars=bars, notes=notes)


def _mbps(reply: dict[str, Any]) -> float:
    moved = float(reply["arrived"] or reply["sent"])
    return moved * 8 / 1e6 / float(reply["seconds"])
