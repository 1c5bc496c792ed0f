"""A scenario is data: who takes part, over which lines, for how long, and what goes wrong when.

`draw` makes one from a seed; everything random about a simulation is in it or follows from its
seed. Numbers are rounded as they are drawn, so that no mathematics library's last bit can make two
machines disagree.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from peer.simulate.learner import Load
from peer.simulate.links import PathSpec, goodput_bps
from protocols.fragments import Fragments

PEERS_MIN: Final = 2
PEERS_MAX: Final = 64
SMALL_MAX: Final = 12  # a group or three, in which faults meet each other; ...
LARGE_SHARE: Final = 0.1  # ... the others cost a hundred times as much
SPEED_OF_GLASS_KM_S: Final = 200_000.0
CALM_S: Final = 90.0  # at a scenario's end: whatever was broken has so long to heal
LAST_MILE_S: Final = 0.002


class Kind(StrEnum):
    """What can go wrong."""

    crash = "crash"
    """The process is killed; its machine resets its streams. Back after `seconds`."""
    outage = "outage"
    """The machine goes dark: silence. Back after `seconds`."""
    wipe = "wipe"
    """As crash, and the disk is empty when it comes back."""
    freeze = "freeze"
    """The process stands still (a laptop's lid, a stopped virtual machine) and then goes on."""
    cut = "partition"
    """The peers named and all others can't reach each other."""
    flap = "flap"
    """The peers named lose everybody, several times in a row, for a few seconds each."""
    leave = "leave"
    """Says goodbye, and joins again after `seconds`."""
    entrance = "entrance"
    """The bootstrap nodes named are down."""


class Lie(StrEnum):
    """How a peer lies."""

    honest = ""
    corrupt = "corrupt"
    """Some units that it sends are damaged."""
    replay = "replay"
    """Sends old messages again, to anybody."""
    stale = "stale"
    """Says again where it stood a while ago, and contributes last round's work as this one's."""
    equivocate = "equivocate"
    """As aggregator signs one mean for some and another for others."""


@dataclass(frozen=True, kw_only=True)
class PeerSpec:
    """One peer and its machine."""

    site: str = ""
    """Declared label, or none."""
    place_km: tuple[float, float] = (0.0, 0.0)
    """Where it stands on a plane; distance makes latency."""
    up_bps: float = 1e8
    down_bps: float = 1e8
    tokens_per_s: float = 1000.0
    skew_s: float = 0.0
    """How far its calendar is ahead."""
    disk_s: float = 0.05
    """Until a round is in its journal."""
    join_s: float = 0.0
    lie: Lie = Lie.honest


@dataclass(frozen=True, kw_only=True)
class Fault:
    at_s: float
    kind: Kind
    targets: tuple[int, ...]
    """Peers, or for `entrance` bootstrap nodes."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Everything that a simulation needs. Equal scenarios have equal histories."""

    seed: int
    peers: tuple[PeerSpec, ...]
    faults: tuple[Fault, ...] = ()
    duration_s: float = 300.0
    """Of which the last `CALM_S` seconds should be free of faults."""
    round_s: float = 10.0
    round_s_max: float = 0.0
    """The most to which slow exchanges lengthen a round; less than `round_s`: never."""
    exchange_s: float = 20.0
    units: int = 8
    fragments: int = 1
    """Parts of the state that take turns; `round_s` and `gossip_every` are of a turn of all."""
    members_max: int = 16
    aggregators_max: int = 4
    quorum: float = 0.5
    collect: bool = True
    """Whether regions of a group sum up before what they have crosses to others."""
    budgets: bool = True
    """Whether owners say how fast their lines are; else peers measure it."""
    gossip_every: int = 0
    """Rounds between two mixes of the same slot with another group; 0: groups stay apart."""
    gossip_slots: int = 4
    blocks: int = 0
    """Of the run's data, in one epoch; 0: nobody keeps an account of them."""
    entrances: int = 2
    """Bootstrap nodes."""
    loss: float = 0.0
    jitter_s: float = 0.0
    burst_every_s: float = 0.0
    burst_s: float = 0.0
    dht_failure: float = 0.0
    """Share of requests to the directory that nobody answers."""
    load: Load = field(default_factory=Load)
    real_signatures: bool = True
    piece_s: float = 0.05
    """Bulk takes turns on a line after so long; longer pieces are cheaper to simulate."""

    def cut(self) -> Fragments:
        """Which units each round exchanges."""
        return Fragments.cut([1] * self.units, self.fragments)

    def path(self, one: int, other: int) -> PathSpec:
        """The path from machine `one` to machine `other`."""
        (ax, ay), (bx, by) = self.peers[one].place_km, self.peers[other].place_km
        latency_s = LAST_MILE_S + math.hypot(ax - bx, ay - by) / SPEED_OF_GLASS_KM_S
        return PathSpec(
            latency_s=round(latency_s, 6),
            jitter_s=self.jitter_s,
            loss=self.loss,
            burst_every_s=self.burst_every_s,
            burst_s=self.burst_s,
        )

    def slowest_bps(self) -> float:
        """About what one of a few transfers at a time gets on the worst of all paths."""
        places = [spec.place_km for spec in self.peers]
        wide_km = math.hypot(
            max(x for x, _ in places) - min(x for x, _ in places),
            max(y for _, y in places) - min(y for _, y in places),
        )
        rtt_s = 2 * (LAST_MILE_S + wide_km / SPEED_OF_GLASS_KM_S)
        line_bps = min(min(spec.up_bps, spec.down_bps) for spec in self.peers)
        return min(line_bps / 4, goodput_bps(rtt_s, self.loss))


def draw(
    seed: int,
    *,
    peers: int | None = None,
    duration_s: float | None = None,
    faults_per_hour: float | None = None,
    lies: bool = True,
) -> Scenario:
    """A random scenario; what is given is not drawn."""
    rng = random.Random(f"scenario {seed}")
    most = PEERS_MAX if rng.random() < LARGE_SHARE else SMALL_MAX
    count = peers if peers is not None else _log_uniform_int(rng, PEERS_MIN, most)
    sites = rng.randint(1, max(1, min(8, count // 2)))
    labelled = rng.random() < 0.5
    centres = [(rng.uniform(0, 8000), rng.uniform(0, 4000)) for _ in range(sites)]
    liars = rng.random() < 0.3 if lies else False
    spread = rng.choice((1.0, 2.0, 10.0))
    specs = []
    for index in range(count):
        site = rng.randrange(sites)
        x, y = centres[site]
        up_bps = 10 ** rng.uniform(7, 9)
        lie = Lie.honest
        # One liar in a group of at least four: a majority is honest everywhere.
        if liars and index == count - 1 and count >= 4 * sites:
            lie = rng.choice([kind for kind in Lie if kind is not Lie.honest])
        specs.append(
            PeerSpec(
                site=f"site{site}" if labelled else "",
                place_km=(round(x + rng.uniform(-30, 30), 1), round(y + rng.uniform(-30, 30), 1)),
                up_bps=round(up_bps),
                down_bps=round(up_bps * rng.choice((1, 1, 4, 10))),
                tokens_per_s=round(1000 * spread ** rng.uniform(-1, 0), 1),
                skew_s=round(rng.gauss(0, 3), 3) if rng.random() < 0.3 else 0.0,
                disk_s=rng.choice((0.01, 0.05, 0.05, 1.0)),
                join_s=0.0 if index == 0 else round(rng.uniform(0, 30), 3),
                lie=lie,
            )
        )
    length_s = duration_s if duration_s is not None else rng.choice((150.0, 180.0, 240.0))
    per_hour = faults_per_hour
    if per_hour is None:
        per_hour = rng.choice((0.0, 30.0, 120.0, 240.0)) * max(1.0, count / 16)
    lossy = rng.random() < 0.5
    bare = Scenario(
        seed=seed,
        peers=tuple(specs),
        faults=draw_faults(rng, count, 2, per_hour, 20.0, length_s - CALM_S),
        duration_s=length_s,
        round_s=rng.choice((4.0, 8.0, 15.0)),
        exchange_s=rng.choice((10.0, 20.0)),
        units=rng.choice((1, 4, 8)),
        loss=round(rng.uniform(0, 0.1), 4) if lossy else 0.0,
        jitter_s=round(rng.choice((0.0, 0.002, 0.02)), 4),
        burst_every_s=rng.choice((0.0, 60.0)) if lossy else 0.0,
        burst_s=2.0,
        dht_failure=rng.choice((0.0, 0.0, 0.1)),
    )
    # A model as large as these lines can carry in time, or a tenth of that.
    share = rng.choice((0.01, 0.1, 0.1))
    whole_bytes = share * min(bare.round_s, bare.exchange_s) * bare.slowest_bps() / 8
    unit_bytes = max(200, int(whole_bytes / bare.units))
    return replace(
        bare,
        load=Load(unit_bytes=unit_bytes, state_bytes=8 * unit_bytes * bare.units),
        gossip_every=rng.choice((0, 1, 2, 4)),
        gossip_slots=rng.choice((1, 2, 4)),
        fragments=min(bare.units, rng.choice((1, 1, 2, 4))),
        blocks=rng.choice((0, 64, 1024)),
        budgets=rng.random() < 0.5,
    )


def draw_faults(
    rng: random.Random,
    peers: int,
    entrances: int,
    per_hour: float,
    begin_s: float,
    end_s: float,
    kinds: tuple[Kind, ...] = tuple(Kind),
) -> tuple[Fault, ...]:
    """Faults as a Poisson process; each is over by `end_s`."""
    faults: list[Fault] = []
    at_s = begin_s
    while per_hour > 0:
        at_s += rng.expovariate(per_hour / 3600)
        if at_s >= end_s - 5:
            break
        kind = rng.choice(kinds)
        longest_s = end_s - at_s
        count = peers
        seconds = rng.uniform(3, 40)
        targets: tuple[int, ...] = (rng.randrange(peers),)
        if kind is Kind.entrance:
            targets = (rng.randrange(entrances),) if entrances else ()
        elif kind is Kind.cut:
            size = rng.randint(1, max(1, count // 2))
            targets = tuple(sorted(rng.sample(range(count), size)))
        elif kind is Kind.freeze:
            seconds = rng.uniform(1, 30)
        faults.append(
            Fault(
                at_s=round(at_s, 3),
                kind=kind,
                targets=targets,
                seconds=round(min(seconds, longest_s), 3),
            )
        )
    return tuple(faults)


def _log_uniform_int(rng: random.Random, low: int, high: int) -> int:
    value = math.exp(rng.uniform(math.log(low), math.log(high + 1)))
    return min(high, max(low, int(value)))
