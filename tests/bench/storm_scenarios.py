"""The storm's scenarios, one function each, and what is read off them."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from peer.observe import events as ev
from peer.simulate.nodes import Node
from peer.simulate.planning import plan
from peer.simulate.scenario import CALM_S, Fault, Kind, Scenario
from peer.simulate.world import Record, World
from protocols.identity import Signer

PEERS: Final = 32
FAULTS_PER_HOUR: Final = 125
LOSS: Final = 0.05
PARAMETERS: Final = 250_000  # 2 MB of state: 20 s over one connection that loses 5 %
ROUND_S: Final = 20.0
DOWN_S: Final = (5.0, 15.0)  # what a supervisor needs to start a process again


def village(seed: int, minutes: float, **changes: object) -> Scenario:
    """Four sites of eight, 100 Mbit/s, 20 ms apart."""
    scenario = plan(
        seed, peers=PEERS, minutes=minutes, sites=4, round_s=ROUND_S, exchange_s=20.0,
        parameters=PARAMETERS, loss=LOSS,
    )  # fmt: skip
    return dataclasses.replace(scenario, **changes)  # type: ignore[arg-type]


def storm(seed: int, minutes: float) -> Scenario:
    """Every peer (so every aggregator) and every bootstrap node is killed at least once, as far as
    125 faults an hour reach; the others are freezes, outages, partitions and wiped disks."""
    quiet = village(seed, minutes)
    rng = random.Random(f"storm {seed}")
    begin_s, end_s = 60.0, quiet.duration_s - CALM_S
    count = max(8, round(FAULTS_PER_HOUR * (end_s - begin_s) / 3600))
    faults = [
        Fault(at_s=0, kind=Kind.entrance, targets=(i,), seconds=60.0)
        for i in range(quiet.entrances)
    ]
    order = rng.sample(range(PEERS), PEERS)
    for index in range(count - len(faults)):
        kind = Kind.crash if index < PEERS else rng.choice(_OTHERS)
        target = order[index] if index < PEERS else rng.randrange(PEERS)
        targets: tuple[int, ...] = (target,)
        if kind is Kind.cut:
            site = target % 4
            targets = tuple(i for i in range(PEERS) if i % 4 == site)
        seconds = round(rng.uniform(*DOWN_S), 3)
        faults.append(Fault(at_s=0, kind=kind, targets=targets, seconds=seconds))
    times = sorted(round(rng.uniform(begin_s, end_s - 20), 3) for _ in faults)
    rng.shuffle(faults)
    drawn = tuple(
        dataclasses.replace(fault, at_s=at_s) for fault, at_s in zip(faults, times, strict=True)
    )
    return dataclasses.replace(quiet, faults=drawn)


_OTHERS: Final = (Kind.crash, Kind.outage, Kind.freeze, Kind.freeze, Kind.cut, Kind.wipe)


def stragglers(seed: int, minutes: float, *, slow: bool) -> Scenario:
    """Eight peers; `slow`: speeds spread over a factor of ten, one on a twentieth of the line."""
    scenario = plan(seed, peers=8, minutes=minutes, sites=1, round_s=ROUND_S, parameters=PARAMETERS)
    if not slow:
        return scenario
    peers = [
        dataclasses.replace(spec, tokens_per_s=round(1000 * 10 ** (-i / 7), 3))
        for i, spec in enumerate(scenario.peers)
    ]
    peers[3] = dataclasses.replace(
        peers[3], up_bps=peers[3].up_bps / 20, down_bps=peers[3].down_bps / 20
    )
    return dataclasses.replace(scenario, peers=tuple(peers))


def lossy(seed: int, minutes: float, loss: float) -> Scenario:
    return plan(
        seed, peers=8, minutes=minutes, sites=1, round_s=ROUND_S, parameters=PARAMETERS, loss=loss
    )


def eight_billion(seed: int, minutes: float) -> Scenario:
    """16 peers that hold 8 B parameters each, 500 Mbit/s, inner steps of 1 s, 30 to a round."""
    scenario = plan(
        seed, peers=16, minutes=minutes, sites=1, round_s=30.0, rate_bps=5e8, parameters=8e9,
        exchange_s=400.0, step_s=1.0, units=1024,
    )  # fmt: skip
    return dataclasses.replace(scenario, aggregators_max=16, round_s_max=8 * scenario.round_s)


@dataclass
class Witness:
    """Hears a simulation and notes who went on when."""

    kills: list[tuple[float, int, str]] = field(default_factory=list)
    """(when, who, its group)."""
    planned: list[tuple[float, int, str, tuple[str, ...]]] = field(default_factory=list)
    """(when, who, group, roster) of every plan that somebody took up."""
    aggregators: set[str] = field(default_factory=set)


def observe(scenario: Scenario) -> tuple[Record, Witness]:
    """Live through it with a witness."""
    world, witness = World(scenario), Witness()
    deaths = {Kind.crash, Kind.outage, Kind.wipe}

    def listen(now_s: float, node: Node, event: ev.Event) -> None:
        if isinstance(event, ev.RoundPlanned):
            witness.planned.append((now_s, node.index, event.group, tuple(event.roster)))
            witness.aggregators.update(event.aggregators)

    world.listen(listen)
    record = world.run()
    groups: dict[int, str] = {i: f"site:{spec.site}" for i, spec in enumerate(scenario.peers)}
    for fault in scenario.faults:
        if fault.kind in deaths:
            witness.kills += [(fault.at_s + 1.0, i, groups[i]) for i in fault.targets]
    return record, witness


def held_up_s(record: Record, witness: Witness, usual_s: float) -> list[float]:
    """For every kill: by how much longer than `usual_s` the quickest survivor of its group then
    needed from contributions due to round applied, in the round that the kill fell into or the
    next one. Training goes on meanwhile: it waits for nobody.
    """
    waits = []
    peers = record.scenario.peers
    for at_s, who, _ in witness.kills:
        nexts: dict[int, float] = {}
        for when_s, index, seconds in record.exchanges:
            mate = index != who and peers[index].site == peers[who].site
            if mate and when_s > at_s and index not in nexts:
                nexts[index] = seconds
        if nexts:
            waits.append(max(0.0, min(nexts.values()) - usual_s))
        elif at_s < record.scenario.duration_s - CALM_S:
            waits.append(float("inf"))
    return waits


def rejoined_s(record: Record, witness: Witness, ids: list[str]) -> list[float]:
    """For every kill: from the process's new start to its first plan with itself in the roster."""
    waits = []
    for fault in record.scenario.faults:
        if fault.kind not in (Kind.crash, Kind.outage, Kind.wipe):
            continue
        back_s = fault.at_s + fault.seconds + 1.0
        for who in fault.targets:
            first = min(
                (
                    at_s for at_s, index, _, roster in witness.planned
                    if index == who and at_s >= back_s and ids[who] in roster
                ),
                default=None,
            )  # fmt: skip
            if first is not None:
                waits.append(first - back_s)
            elif back_s < record.scenario.duration_s - CALM_S:
                waits.append(float("inf"))
    return waits


def round_s(record: Record) -> float:
    """Median time from one applied round to the next, over all groups."""
    times: dict[str, list[float]] = {}
    for fact in record.rounds:
        times.setdefault(fact.group, []).append(fact.at_s)
    gaps = sorted(b - a for values in times.values() for a, b in pairwise(values))
    return gaps[len(gaps) // 2] if gaps else float("nan")


def peer_ids(record: Record) -> list[str]:
    """The peers' ids, in order."""
    return [
        Signer(hashlib.sha256(f"peer {index}".encode()).digest()).peer_id
        for index in range(len(record.scenario.peers))
    ]
