"""From what an operator knows of a network to a scenario: peers, lines, a model."""

from __future__ import annotations

import random
from typing import Final

from peer.simulate.learner import Load
from peer.simulate.scenario import CALM_S, Kind, PeerSpec, Scenario, draw_faults

STATE_BYTES: Final = 8  # per parameter: float32 weights and their outer momentum
CODED_BITS: Final = 3.13  # per parameter, q4
CODE_BYTES_PER_S: Final = 5e9  # of float32 per core, measured (docs/results/wire.md)
MEMORY_BYTES_PER_S: Final = 1e12  # where the weights lie: one GPU's, less than its peak
FREEZE_BYTES: Final = 8  # per parameter: read the weights, write their copy
APPLY_BYTES: Final = 24  # read mean, weights and momentum, write both, and the local weights
FAST_PEERS: Final = 64  # above: cheap signatures, or they would be most of the work
FAULTS: Final = (Kind.crash, Kind.outage, Kind.freeze, Kind.cut, Kind.flap, Kind.wipe)


def load_of(parameters: float, units: int, step_s: float) -> Load:
    """What training a model of so many parameters weighs and costs; q4, both ways."""
    coded_bytes = parameters * CODED_BITS / 8
    return Load(
        step_s=step_s,
        freeze_s=round(parameters * FREEZE_BYTES / MEMORY_BYTES_PER_S, 6),
        apply_s=round(parameters * APPLY_BYTES / MEMORY_BYTES_PER_S, 6),
        disk_s=0.05,
        unit_s=round(parameters / units * 4 / CODE_BYTES_PER_S, 7),
        unit_bytes=max(64, round(coded_bytes / units)),
        state_bytes=max(1024, round(parameters * STATE_BYTES)),
    )


def plan(
    seed: int,
    *,
    peers: int,
    minutes: float,
    sites: int = 0,
    rate_bps: float = 1e8,
    latency_s: float = 0.02,
    parameters: float = 1e7,
    round_s: float = 30.0,
    exchange_s: float | None = None,
    step_s: float = 1.0,
    loss: float = 0.0,
    faults_per_hour: float = 0.0,
    kinds: tuple[Kind, ...] = FAULTS,
    units: int = 16,
    join_s: float = 5.0,
) -> Scenario:
    """Equal peers at `sites` places (0: one for every eight), `latency_s` apart one way."""
    rng = random.Random(f"plan {seed}")
    count = sites or -(-peers // 8)
    width_km = latency_s * 200_000
    centres = [
        (round(rng.uniform(0, width_km), 1), round(rng.uniform(0, width_km), 1))
        for _ in range(count)
    ]
    specs = tuple(
        PeerSpec(
            site=f"site{index % count}",
            place_km=centres[index % count],
            up_bps=rate_bps,
            down_bps=rate_bps,
            join_s=0.0 if index == 0 else round(join_s * rng.random(), 3),
        )
        for index in range(peers)
    )
    duration_s = 60 * minutes
    load = load_of(parameters, units, step_s)
    exchange = exchange_s
    if exchange is None:
        # Out and back at full rate, three times over: others use the same line.
        exchange = max(10.0, 6 * 8 * load.unit_bytes * units / rate_bps)
    return Scenario(
        seed=seed,
        peers=specs,
        faults=draw_faults(rng, peers, 2, faults_per_hour, 60.0, duration_s - CALM_S, kinds),
        duration_s=duration_s,
        round_s=round_s,
        exchange_s=round(exchange, 3),
        units=units,
        loss=loss,
        load=load,
        real_signatures=peers <= FAST_PEERS,
    )
