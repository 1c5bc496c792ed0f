"""Goodput and processor time of streams: the bulk lane, libp2p's daemon, and plain asyncio TCP.

Two processes on this machine, over loopback, in turns: one sends frames of 256 KiB of random
bytes, the other receives them through the same framing and its checks; one stream, or four side
by side. Plain TCP is asyncio's streams, neither encrypted nor authenticated, with the same sizes:
what the machine could do. Processor time is that of both processes and their daemons.
"""

from __future__ import annotations

from statistics import median
from typing import Final

from tests.bench.fleet import Fleet, Took
from tests.bench.result import Bar, Cell, Progress, Result

CARRIERS: Final = ("lane", "libp2p", "tcp")
_STREAMS: Final = (1, 4)
_BYTES: Final = {"lane": 2 * 10**9, "libp2p": 5 * 10**8, "tcp": 2 * 10**9}  # one to three seconds
_QUICK: Final = 10  # times less
_REPEATS: Final = 5
_TIMEOUT_S: Final = 120.0
_WORKER: Final = "tests.bench.lane_worker"


def run(quick: bool, seed: int, progress: Progress) -> Result:
    """See `registry.Measurement`. About two minutes."""
    took: dict[tuple[str, int], list[Took]] = {}
    repeats = 1 if quick else _REPEATS
    with Fleet("lane", _WORKER, 2) as fleet:
        fleet.start(seed=seed)
        for turn in range(repeats + 1):  # the first one warms up
            for carrier in CARRIERS:
                for streams in _STREAMS:
                    total = _BYTES[carrier] // (_QUICK if quick else 1)
                    progress(f"{carrier}, {streams} at once, {turn} of {repeats}")
                    one = fleet.timed(
                        "move", _TIMEOUT_S, carrier=carrier, total=total, streams=streams
                    )
                    if turn:
                        took.setdefault((carrier, streams), []).append(one)
    rows: list[dict[str, Cell]] = []
    goodput: dict[tuple[str, int], float] = {}
    cost: dict[tuple[str, int], float] = {}
    for key, runs in took.items():
        moved = float(runs[0].replies[0]["bytes"])
        goodput[key] = median(moved / 2**20 / float(r.replies[0]["seconds"]) for r in runs)
        cost[key] = median(r.cpu_s / moved * 1e9 for r in runs)
        rows.append(
            {
                "carrier": key[0],
                "streams": key[1],
                "MiB/s": goodput[key],
                "CPU-s/GB": cost[key],
                "others' share of the cores": median(r.others for r in runs),
            }
        )
    against = f"libp2p's daemons in the same run, in turns, median of {repeats}"
    bars = []
    for n in _STREAMS:
        lane, daemon = ("lane", n), ("libp2p", n)
        what = "one stream" if n == 1 else f"{n} streams"
        faster, cheaper = goodput[lane] / goodput[daemon], cost[lane] / cost[daemon]
        bars += [
            Bar.at_least(f"{what}: goodput, x libp2p", faster, 2.0, against),
            Bar.at_most(f"{what}: CPU-s/GB, / libp2p", cheaper, 0.5, against),
        ]
    notes = [
        f"Seed {seed}. Every stream was opened anew; a lane's connections are kept between them.",
        "Loopback: both ends share the cores, nothing is lost, and BBR is not set there.",
        "Seconds are the sender's, from opening its streams to the last receiver's answer.",
    ]
    return Result(rows=rows, bars=bars, notes=notes)
