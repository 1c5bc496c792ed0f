"""Groups by nearness: planted clusters found again, moves per hour, reads per join.

Light peers on a map: the product's own coordinates, cells, directory index and grouping, without
rounds and without a network. What a call would measure is drawn: the distance on the map, the two
access lines, and jitter.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from collections import Counter
from dataclasses import dataclass, field
from statistics import mean
from typing import Final

from dht.memory import MemoryBoard, MemoryDirectory
from dht.rules import Rules
from protocols import limits
from protocols.cells import rank
from protocols.coordinates import Coordinate
from protocols.grouping import Grouping
from protocols.membership import Membership
from protocols.moving import CELLS_READ_S, REVIEW_S
from protocols.placing import Placing, measured_s, whom_to_measure
from protocols.records import PeerRecord
from protocols.types import GroupName, PeerId, RunId
from tests.bench.result import Bar, Cell, Progress, Result

RUN: Final = RunId("ab" * 32)
STEP_S: Final = 10.0  # of virtual time; a peer calls its group and a stranger once in it
JITTER: Final = 0.15  # mean of the exponential share that a call takes longer than it must


class _Unsigned(Rules):
    """Records by name instead of signature: the bench measures no cryptography."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[bytes, PeerRecord] = {}

    def record(self, data: bytes) -> PeerRecord:
        return self.known[data]


@dataclass
class _Peer:
    name: bytes
    id: PeerId
    place: tuple[float, float]
    """On the map, in seconds of round trip."""
    access_s: float
    cluster: int
    members: Membership
    placing: Placing
    grouping: Grouping
    directory: MemoryDirectory
    founded_ms: int
    group: GroupName = GroupName("")  # noqa: RUF009
    moves: list[float] = field(default_factory=list)
    record: PeerRecord | None = None
    looked_s: float = -math.inf
    joined_s: float = 0.0


class _Map:
    """A run's peers on a map, and one clock."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_s = 1e6
        self.board = MemoryBoard(lambda: self.now_s)
        self.rules = _Unsigned()
        self.board.rules = self.rules
        self.peers: dict[PeerId, _Peer] = {}

    def add(self, place: tuple[float, float], cluster: int) -> _Peer:
        index = len(self.peers)
        name = b"%d" % index
        me = PeerId("12D3KooW" + hashlib.sha256(b"peer %d" % index).hexdigest()[:44])
        members = Membership(me)
        peer = _Peer(
            name, me, place, self.rng.uniform(0.0005, 0.003), cluster, members,
            Placing(me, members, self.now_s), Grouping(limits.GROUP_MEMBERS_MAX),
            MemoryDirectory(self.board, me, random.Random(self.rng.random())),
            int(self.now_s * 1000) + index, joined_s=self.now_s,
        )  # fmt: skip
        self.peers[me] = peer
        return peer

    def rtt_s(self, one: _Peer, other: _Peer) -> float:
        return math.dist(one.place, other.place) + one.access_s + other.access_s

    async def publish(self, peer: _Peer) -> None:
        now_ms = int(self.now_s * 1000)
        live = [p.id for p in self.peers.values() if p.group == peer.group] if peer.group else []
        peer.record = PeerRecord(
            peer.id, RUN, peer.group, "", (), 10_000, True, 1, peer.founded_ms, now_ms,
            now_ms + int(limits.RECORD_TTL_S * 1000), len(live), peer.placing.told,
        )  # fmt: skip
        self.rules.known[peer.name] = peer.record
        contact = peer.id in sorted(live, key=rank)[: limits.GROUP_CONTACTS]
        await peer.directory.publish_record(peer.name, contact=contact)

    async def read(self, peer: _Peer) -> None:
        assert peer.record is not None
        found = await peer.directory.nearby(peer.record)
        drawn = await peer.directory.random_groups(RUN, 1)
        for record in [*found, *(n.contacts[0] for n in drawn)]:
            if record.peer != peer.id:
                peer.members.saw(record, self.now_s)

    def call(self, peer: _Peer, other: PeerId) -> None:
        known = self.peers[other]
        took_s = self.rtt_s(peer, known) * (1 + self.rng.expovariate(1 / JITTER))
        peer.members.heard(other, self.now_s)
        near = peer.members.get(other)
        if near is not None:
            near.hailed_s = self.now_s
            if known.group != near.group:
                near.group = known.group
        peer.members.delivered(other, took_s)
        peer.placing.measured(other, self.now_s)

    async def step(self) -> None:
        """`STEP_S` of everybody's life."""
        self.now_s += STEP_S
        turn = round(self.now_s / STEP_S)
        for index, peer in enumerate(list(self.peers.values())):
            everybody = peer.members.everybody()
            mine = [n for n in everybody if peer.group and n.group == peer.group]
            others = [n for n in everybody if n.group != peer.group or not peer.group]
            # With company one stranger in two steps; a loner calls eight a second.
            if not mine:
                strangers = sorted(others, key=lambda n: n.hailed_s)[:80]
            elif (turn + index) % 2:
                near = (turn + index) % 4 == 1
                one = whom_to_measure(peer.placing.latest, others, self.now_s, near=near)
                strangers = [one] if one is not None else []
            else:
                strangers = []
            for n in [*mine, *strangers]:
                self.call(peer, n.record.peer)
            told = peer.placing.news(self.now_s)
            self.decide(peer, bool(mine))
            if told or peer.record is None or (turn + index) % 3 == 0:
                await self.publish(peer)
            if not mine or (turn + index) % 6 == 0:
                await self.read(peer)
            if turn % 12 == 0:
                peer.members.sweep(peer.group, self.now_s)

    def decide(self, peer: _Peer, company: bool) -> None:
        wait_s = REVIEW_S if company and not peer.grouping.undecided else 1.0
        placed = self.now_s - peer.placing.placed_s >= CELLS_READ_S
        if peer.record is None or now_before(self.now_s, peer.looked_s + wait_s):
            return
        if not peer.group and not placed:
            return
        peer.looked_s = self.now_s
        record = PeerRecord(
            peer.id, RUN, peer.group, "", (), 10_000, True, 1, peer.founded_ms, 0, 1, 0,
            peer.placing.told,
        )  # fmt: skip
        others = [
            (n.record, self.peers[n.record.peer].group if n.group == peer.group else n.group)
            for n in peer.members.everybody()
            if self.now_s - n.seen_s < limits.RECORD_TTL_S or n.group == peer.group
        ]
        rtts = measured_s(peer.members.everybody(), self.now_s)
        chosen = peer.grouping.decide(record, others, rtts, self.now_s)
        if chosen is not None and chosen != peer.group:
            if peer.group:
                peer.moves.append(self.now_s)
            peer.group = chosen


def now_before(now_s: float, then_s: float) -> bool:
    return now_s < then_s


def pairs_right(peers: list[_Peer]) -> tuple[float, float]:
    """(recall, precision): of the pairs that were planted together, and of those that stand so.

    A cluster larger than a group can be is cut in as few groups as it needs: the pairs that this
    must cut are not asked for.
    """
    planted = Counter(p.cluster for p in peers)
    wanted = 0
    for count in planted.values():
        parts = math.ceil(count / limits.GROUP_MEMBERS_MAX)
        sizes = [count // parts + (i < count % parts) for i in range(parts)]
        wanted += sum(math.comb(size, 2) for size in sizes)
    stand = Counter(p.group for p in peers)
    both = Counter((p.cluster, p.group) for p in peers)
    hits = sum(math.comb(n, 2) for n in both.values())
    together = sum(math.comb(n, 2) for n in stand.values())
    return min(1.0, hits / wanted), hits / max(together, 1)


def plant(net: _Map, clusters: int, spread_s: float = 0.002) -> list[tuple[float, float]]:
    """Clusters of 3 to 14 peers, a few ms wide, at least 40 ms apart on a map of 250 ms."""
    centres: list[tuple[float, float]] = []
    side_s = 0.06 * math.sqrt(clusters) + 0.1
    while len(centres) < clusters:
        centre = (net.rng.uniform(0, side_s), net.rng.uniform(0, side_s))
        if all(math.dist(centre, other) >= 0.04 for other in centres):
            centres.append(centre)
    peers = [(c, i) for i, c in enumerate(centres) for _ in range(net.rng.randint(3, 14))]
    net.rng.shuffle(peers)
    for (x_s, y_s), cluster in peers:
        net.add((x_s + net.rng.gauss(0, spread_s), y_s + net.rng.gauss(0, spread_s)), cluster)
    return centres


async def recovered(seed: int, clusters: int, hours: float) -> dict[str, Cell]:
    """Plant, let them find each other, watch for `hours`, then move one peer and watch it."""
    net = _Map(seed)
    centres = plant(net, clusters)
    for _ in range(90):
        await net.step()
    peers = list(net.peers.values())
    recall, precision = pairs_right(peers)
    settled_s = net.now_s
    for _ in range(round(hours * 3600 / STEP_S)):
        await net.step()
    moves = sum(t > settled_s for p in peers for t in p.moves)
    sizes = Counter(p.cluster for p in peers)
    mover = next(p for p in peers if sizes[p.cluster] > 3)
    target = min((c for c in sizes if c != mover.cluster), key=lambda c: sizes[c])
    mover.place, mover.cluster = centres[target], target
    moved_s = net.now_s
    home = Counter(p.group for p in peers if p.cluster == target and p is not mover)
    while mover.group not in home and net.now_s - moved_s < 3600:
        await net.step()
    back_s = net.now_s - moved_s if mover.group in home else None
    return {
        "what": f"{clusters} clusters, seed {seed}",
        "peers": len(peers),
        "pairs found": round(recall, 4),
        "pairs right": round(precision, 4),
        "moves per peer-hour": round(moves / len(peers) / hours, 4) if hours else None,
        "re-clustered after s": back_s,
        "reads to join": None,
        "reads per refresh": None,
    }


async def joined(seed: int, count: int) -> dict[str, Cell]:
    """`count` peers in clusters of ten stand in the directory; 60 newcomers look for their cell."""
    net = _Map(seed)
    rng = net.rng
    centres = [
        (rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1))
        for _ in range(max(1, count // 10))
    ]
    peers = []
    for index in range(count):
        cluster = index % len(centres)
        x_s, y_s, z_s = (v + rng.gauss(0, 0.002) for v in centres[cluster])
        peer = net.add((x_s, y_s), cluster)
        peer.group = GroupName(f"near:{cluster}")
        peer.placing.told = Coordinate(x_s, y_s, z_s, 0.001, 0.1)
        peers.append(peer)
    groups: dict[GroupName, list[PeerId]] = {}
    for p in peers:
        groups.setdefault(p.group, []).append(p.id)
    contacts = {i for g in groups.values() for i in sorted(g, key=rank)[: limits.GROUP_CONTACTS]}
    refreshes: list[int] = []
    for turn in range(5):  # those who came first learn only later how many came
        net.now_s += limits.RECORD_REFRESH_S
        for peer in peers:
            now_ms = int(net.now_s * 1000)
            peer.record = PeerRecord(
                peer.id, RUN, peer.group, "", (), 10_000, True, 1, 0, now_ms, now_ms + 90_000,
                len(groups[peer.group]), peer.placing.told,
            )  # fmt: skip
            net.rules.known[peer.name] = peer.record
            before = net.board.reads
            await peer.directory.publish_record(peer.name, contact=peer.id in contacts)
            await peer.directory.nearby(peer.record)
            if turn == 4:
                refreshes.append(net.board.reads - before)
    reads, missed = [], []
    for index in range(60):
        model = rng.choice(peers)
        assert model.record is not None
        fresh = MemoryDirectory(net.board, PeerId(f"new {index}"), random.Random(index))
        before = net.board.reads
        await fresh.members(RUN)  # the first look: somebody to measure
        await fresh.random_groups(RUN, 2)
        found = {r.peer for r in await fresh.nearby(model.record)}
        reads.append(net.board.reads - before)
        missed.append(sum(i not in found for i in groups[model.group]) / len(groups[model.group]))
    return {
        "what": f"directory of {count}",
        "peers": count,
        "pairs found": round(1 - mean(missed), 4),
        "pairs right": None,
        "moves per peer-hour": None,
        "re-clustered after s": None,
        "reads to join": round(mean(reads), 2),
        "reads per refresh": round(mean(refreshes), 2),
    }


def run(quick: bool, seed: int, progress: Progress) -> Result:
    """Measure. See the module."""
    rows: list[dict[str, Cell]] = []
    for index in range(2 if quick else 10):
        clusters = (6, 12)[index % 2]
        rows.append(asyncio.run(recovered(seed + index, clusters, 0.1 if quick else 1.0)))
        progress(" ".join(f"{k}={v}" for k, v in rows[-1].items() if v is not None))
    planted = list(rows)
    sizes = (10, 100) if quick else (10, 100, 1_000, 10_000)
    for count in sizes:
        rows.append(asyncio.run(joined(seed, count)))
        progress(" ".join(f"{k}={v}" for k, v in rows[-1].items() if v is not None))
    joins = rows[len(planted) :]

    def numbers(of: list[dict[str, Cell]], key: str) -> list[float]:
        return [float(v) if isinstance(v := r[key], int | float) else math.inf for r in of]

    refreshes = numbers(joins, "reads per refresh")

    def growth(key: str) -> float:
        """Last against first, divided by how much log N grew."""
        logs = math.log(sizes[-1]) / math.log(sizes[0])
        return numbers(joins, key)[-1] / numbers(joins, key)[0] / logs

    bars = [
        Bar.at_least("pairs found, mean", mean(numbers(planted, "pairs found")), 0.95, "planted"),
        Bar.at_least("pairs right, mean", mean(numbers(planted, "pairs right")), 0.95, "standing"),
        Bar.at_most(
            "moves per peer-hour, most", max(numbers(planted, "moves per peer-hour")), 1.0,
            "stable links with jitter",
        ),
        Bar.at_most(
            "re-clustering, longest", max(numbers(planted, "re-clustered after s")), 1800.0,
            "seconds after a link changed",
        ),
        Bar.at_most(
            f"reads to join {sizes[-1]:,}", numbers(joins, "reads to join")[-1],
            4 * math.log2(sizes[-1]), "4 log2 N",
        ),
        Bar.at_most("growth of reads to join", growth("reads to join"), 1.5, "that of log N"),
        Bar.at_most(
            "reads per refresh / log2 N, most",
            max(r / math.log2(n) for r, n in zip(refreshes, sizes, strict=True)), 1.0,
            "over all sizes",
        ),
    ]  # fmt: skip
    notes = (
        (
            "Light peers: no rounds, no network, no signatures. Coordinates, cells, index and "
            "grouping are the product's. Calls take the distance on the map plus access lines, and "
            f"an exponential share of {JITTER:.0%} longer."
        ),
        (
            "A read is one key of the DHT; what hivemind needs to find a key (another log N) comes "
            "on top."
        ),
    )
    return Result(rows, bars, notes)
