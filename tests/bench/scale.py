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
from tests.bench.result import Bar, Cell, Progress, Result
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
    peers, hours = (50, 3 * DAY_ROUND_S / 3600) if quick else (DAY_PEERS, DAY_HOURS)
    progress(f"{peers} peers for {hours:g} hours, rounds of {DAY_ROUND_S / 60:g} minutes ...")
    day = _measure(seed, peers, 60 * hours, DAY_ROUND_S)
    rows.append(day)
    wall_s = _number(day["wall s"]) * DAY_PEERS * DAY_HOURS / (peers * hours)
    bars.append(
        Bar.at_most(f"{DAY_PEERS} peers x 24 h, minutes", wall_s / 60, 10, "one process, one core")
    )
    notes = [
        (
            "Groups of ten by a declared site; 1 M parameters, 100 Mbit/s, no faults, no loss."
            " Joining is in the figures: all peers start within the first minutes."
        ),
        (
            f"Rounds of the day take {DAY_ROUND_S / 60:g} minutes, as INTELLECT-1's did; standing"
            " chores follow their length. It is simulated whole but for --quick, which shows a"
            " twentieth of the peers for three rounds and multiplies."
        ),
    ]
    return Result(rows, bars, notes)


def _measure(
    seed: int,
    peers: int,
    minutes: float,
    every_s: float = ROUND_S,
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
    record = simulate(dataclasses.replace(scenario, real_signatures=False))
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
