"""A fresh few hundred random scenarios every time: the seed is printed, and shows one again."""

from __future__ import annotations

import os
import secrets
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from peer.simulate.scenario import draw
from peer.simulate.world import simulate

BUDGET_S = 60.0  # of processor time, each; a busy machine gets through fewer wall seconds of it
SCENARIOS = 150  # at most, per process
PEERS_MAX = 8


def storm(first: int) -> tuple[int, list[str]]:
    """Scenarios from seed `first` on until the budget is spent: how many, and what broke."""
    broken: list[str] = []
    count = 0
    begun_s = time.process_time()
    for seed in range(first, first + SCENARIOS):
        if time.process_time() - begun_s > BUDGET_S:
            break
        count += 1
        peers = 2 + seed % (PEERS_MAX - 1)
        record = simulate(draw(seed, peers=peers, duration_s=150.0))
        broken += [
            f"python -m peer simulate --seed {seed} --peers {peers} --minutes 2.5"
            f"  # {v.promise}: {v.what}"
            for v in record.violations[:1]
        ]
    return count, broken


def test_a_fresh_storm_breaks_no_promise() -> None:
    chosen = os.environ.get("MURMURATION_STORM_SEED")
    first = int(chosen) if chosen is not None else secrets.randbits(31)
    seeds = [first, first + SCENARIOS]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(storm, seeds))
    lived = sum(count for count, _ in results)
    broken = [line for _, lines in results for line in lines]
    print(f"{lived} scenarios from seed {first}")
    assert lived >= 20
    assert not broken, f"MURMURATION_STORM_SEED={first}\n" + "\n".join(broken)
