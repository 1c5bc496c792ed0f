"""Scale: traffic per peer and round time from 10 to 10,000 peers, in virtual time.

Every peer runs the product's own driver and machine (`peer/simulate`), with cheap signatures
(`peer/simulate/signing.py`): Ed25519 would be most of the work.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Final

from peer.simulate.planning import plan
from peer.simulate.report import figures
from peer.simulate.world import simulate
from tests.bench.result import Bar, BenchError, Cell, Progress, Result
from tests.bench.storm_scenarios import round_s

SIZES: Final = (10, 100, 1_000, 10_000)
SIZES_QUICK: Final = (10, 40)
MINUTES: Final = {10: 20.0, 100: 20.0, 1_000: 12.0, 10_000: 8.0}
WARM_S: Final = 120.0
ROUND_S: Final = 60.0
GROUP: Final = 10  # in every run, or the figures would tell of the groups' size
DAY_PEERS: Final = 1_000
DAY_HOURS: Final = 24.0
DAY_ROUND_S: Final = 2280.0  # 38 minutes, as INTELLECT-1's (arXiv 2412.01152)
DAY_ROUNDS: Final = 3  # of a day that are simulated: one while all join, and two like all others


def run(quick: bool, seed: int, progress: Progress) -> Result:
    rows: list[dict[str, Cell]] = []
    for peers in SIZES_QUICK if quick else SIZES:
        minutes = 6.0 if quick else MINUTES[peers]
        progress(f"{peers} peers for {minutes:g} minutes ...")
        rows.append(_measure(seed, peers, minutes))
    first, last = rows[0], rows[-1]
    growth = math.log(_number(last["peers"])) / math.log(_number(first["peers"]))
    bars = [
        Bar.at_most(
            f"{name} at {last['peers']} peers", _number(last[name]) / _number(first[name]),
            round(growth, 3), f"x of {first['peers']} peers; log N grows so much",
        )
        for name in ("messages / peer / min", "DHT reads / peer / round")
    ]  # fmt: skip
    bars.append(
        Bar.at_most(
            f"round time at {last['peers']} peers",
            _number(last["round s"]) / _number(first["round s"]), 1.2,
            f"x of {first['peers']} peers",
        )
    )  # fmt: skip
    bars.append(Bar.at_most("promises broken", sum(_number(r["broken"]) for r in rows), 0, "all"))
    peers = 50 if quick else DAY_PEERS
    progress(f"{peers} peers for {DAY_ROUNDS} rounds of {DAY_ROUND_S / 60:g} minutes ...")
    pace = _Pace(DAY_ROUND_S)
    day = _measure(seed, peers, DAY_ROUNDS * DAY_ROUND_S / 60, DAY_ROUND_S, pace)
    rows.append(day)
    bars.append(
        Bar.at_most(
            f"{DAY_PEERS} peers x 24 h, minutes",
            pace.extrapolated_s(DAY_HOURS * 3600) / 60 * DAY_PEERS / peers,
            10,
            f"extrapolated from {peers} peers x {DAY_ROUNDS} rounds in one process",
        )
    )
    notes = [
        (
            "Groups of ten by a declared site; 1 M parameters, 100 Mbit/s, no faults, no loss."
            " Joining is in the figures: all peers start within the first minutes."
        ),
        (
            "The day's first round, in which all join, is timed as it is; the"
            f" {DAY_ROUNDS - 1} after it stand for the rest of the day. One process uses one core."
            f" Rounds take {DAY_ROUND_S / 60:g} minutes, as INTELLECT-1's did; standing chores"
            " follow their length."
        ),
    ]
    return Result(rows, bars, notes)


class _Pace:
    """Told of a simulation's progress: what its beginning costs, and what the rest."""

    def __init__(self, joining_s: float) -> None:
        self._joining_s = joining_s
        self._begun_s = time.perf_counter()
        self._joined: tuple[float, float] | None = None
        self._latest = (0.0, 0.0)
        """(simulated seconds, seconds)."""

    def __call__(self, simulated_s: float, of_s: float) -> None:
        self._latest = (simulated_s, time.perf_counter() - self._begun_s)
        if self._joined is None and simulated_s >= self._joining_s:
            self._joined = self._latest

    def extrapolated_s(self, simulated_s: float) -> float:
        """What so much would take."""
        if self._joined is None:
            raise BenchError("the simulation ended before everybody had joined")
        (joined_s, took_s), (end_s, end_took_s) = self._joined, self._latest
        return took_s + (end_took_s - took_s) * (simulated_s - joined_s) / (end_s - joined_s)


def _measure(
    seed: int,
    peers: int,
    minutes: float,
    every_s: float = ROUND_S,
    pace: _Pace | None = None,
) -> dict[str, Cell]:
    scenario = plan(
        seed,
        peers=peers,
        minutes=minutes,
        sites=max(1, peers // GROUP),
        round_s=every_s,
        parameters=1e6,
        join_s=WARM_S,
    )
    begun_s = time.process_time()
    record = simulate(dataclasses.replace(scenario, real_signatures=False), pace)
    cpu_s = time.process_time() - begun_s
    total = figures(record)
    return {
        "peers": peers,
        "minutes": minutes,
        "round s": round_s(record),
        "due to applied s": total.exchange_s,
        "messages / peer / min": total.calls_per_min,
        "DHT reads / peer / round": total.dht_reads_per_round,
        "participation": total.participation,
        "broken": total.violations,
        "wall s": record.wall_s,
        "CPU ms / peer-round": 1000 * cpu_s / max(1, total.peer_rounds),
    }


def _number(cell: Cell) -> float:
    return float(cell) if isinstance(cell, int | float) else math.nan
