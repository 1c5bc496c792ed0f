"""The reachability ladder: every pair of five kinds of place connects, over emulated routers.

One process, a thread, a daemon and a network namespace for each peer (`tests/net/lab_peers`), in
the laboratory's NAT zoo at 20 ms. Places: open; behind a port-restricted NAT; behind a symmetric
one; a public address with inbound refused; the same and out only to port 443. Relays are
volunteers on open hosts at port 443. A pair is measured from the moment when one side has read the
other one's record: a call answered, then a stream opened that brings back 1 MB.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import tempfile
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from tests.bench.result import Bar, BenchError, Cell, Progress, Result
from tests.net.lab_peers import LabPeer, settle, start_all
from tests.netlab import Host, Lab, LabError, missing, nat_zoo

KINDS: Final = {
    "open": "open",
    "cone": "port-restricted NAT",
    "sym": "symmetric NAT",
    "wall": "inbound refused",
    "web": "only 443 out",
}
DIRECT: Final = frozenset(
    frozenset(pair)
    for pair in (
        ("open", "open"), ("open", "cone"), ("open", "sym"), ("open", "wall"),
        ("cone", "cone"), ("cone", "wall"), ("wall", "wall"),
    )
)  # fmt: skip
"""Pairs between which a direct connection is possible; frozenset({x}): two of a kind."""
_RTT_MS: Final = 20.0
_CONNECT_S: Final = 5.0
_WAIT_S: Final = 40.0
_UPGRADE_S: Final = 60.0
_REPEATS: Final = 3
_PAYLOAD: Final = 10**6


@dataclass(frozen=True, slots=True)
class _Met:
    """One pair, one way round."""

    pair: tuple[str, str]
    lane: bool
    call_s: float
    stream_s: float
    way: str
    failure: str

    @property
    def seconds(self) -> float:
        return math.inf if self.failure else self.call_s + self.stream_s


def run(quick: bool, seed: int, progress: Progress) -> Result:
    """See `registry.Measurement`. Some six minutes; quick: one and a half."""
    lack = missing()
    if lack is not None:
        raise BenchError(lack)
    met: list[_Met] = []
    settled: list[float] = []
    died: list[float] = []
    upgraded: list[float] = []
    try:
        for lane, repeat in [(True, 0)] if quick else [(x < 2, x) for x in range(_REPEATS)]:
            one, took = _everybody(lane, seed + repeat, progress)
            met += one
            settled += took
        for repeat in range(1 if quick else _REPEATS):
            died.append(_a_relay_dies(seed + repeat, progress))
            upgraded.append(_direct_later(seed + repeat, progress))
    except LabError as error:
        raise BenchError(str(error)) from error
    return Result(
        rows=_rows(met), bars=_bars(met, settled, died, upgraded), notes=_notes(met, seed)
    )


def _everybody(
    lane: bool, seed: int, progress: Progress
) -> tuple[list[_Met], list[float]]:  # fmt: skip
    """Every pair both ways round, each pair for the first time."""
    zoo = nat_zoo(rtt_ms=_RTT_MS)
    spec = dataclasses.replace(zoo, hosts=(Host("relay", "zoo"), *zoo.hosts))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        lab = stack.enter_context(Lab(spec, seed=seed, mover_nice=-10))
        relay = LabPeer(lab.host("relay"), folder, port=443, relay=True, lane=lane)
        peers = [LabPeer(lab.host(host.name), folder, lane=lane) for host in zoo.hosts]
        progress(f"starting {len(peers)} peers and a relay, {'with' if lane else 'without'} lanes")
        start_all([relay, *peers], stack)
        took = settle([relay], peers)
        met = []
        # Each pair once: who begins is drawn, and two of a kind are a pair as well.
        pairs = list(itertools.combinations(peers, 2))
        dice = random.Random(seed)
        dice.shuffle(pairs)
        for pair in pairs:
            a, b = dice.sample(pair, 2)
            met.append(_meet(a, b, lane))
            progress(
                f"{a.name} to {b.name}: {met[-1].seconds:.2f} s, {met[-1].way}{met[-1].failure}"
            )
        return met, list(took.values())


def _meet(a: LabPeer, b: LabPeer, lane: bool) -> _Met:
    a.meets(b)
    b.meets(a)  # as members do, both read records
    talk: Future[tuple[float, float]] = a.begin(a.talk, b.id, bytes(_PAYLOAD))
    pair = (_kind(a), _kind(b))
    try:
        call_s, stream_s = talk.result(_WAIT_S)
    except Exception as error:  # whatever it was, the pair did not connect
        return _Met(pair, lane, math.inf, math.inf, "none", f" {error!r}"[:200])
    return _Met(pair, lane, call_s, stream_s, a.way_to(b), "")


def _kind(peer: LabPeer) -> str:
    return peer.name.rstrip("0123456789")


def _a_relay_dies(seed: int, progress: Progress) -> float:
    """Two behind symmetric NATs, two relays; seconds from the death of theirs to 1 MB again."""
    zoo = nat_zoo(rtt_ms=_RTT_MS)
    hosts = tuple(h for h in zoo.hosts if h.name.startswith("sym"))
    extra = tuple(Host(f"relay{i}", "zoo") for i in (1, 2))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        spec = dataclasses.replace(zoo, hosts=(*extra, *hosts))
        lab = stack.enter_context(Lab(spec, seed=seed, mover_nice=-10))
        relays = [LabPeer(lab.host(h.name), folder, port=443, relay=True) for h in extra]
        one, two = (LabPeer(lab.host(h.name), folder) for h in hosts)
        start_all([*relays, one, two], stack)
        settle(relays, [one, two])
        for peer in (one, two):
            peer.until_through({relay.id for relay in relays})
        one.meets(two)
        two.meets(one)
        one.do(one.talk, two.id, bytes(_PAYLOAD))
        ends = one.do(one.ladder.inner.connections)[two.id]
        next(relay for relay in relays if relay.id in ends[0]).kill_daemon()
        took = one.keep_talking(two, bytes(_PAYLOAD))
        progress(f"a relay killed: {took:.2f} s until 1 MB passed through the other one")
        return took


def _direct_later(seed: int, progress: Progress) -> float:
    """Two behind port-restricted NATs with nothing between them but a relay, until it heals."""
    zoo = nat_zoo(rtt_ms=_RTT_MS)
    hosts = tuple(h for h in zoo.hosts if h.name.startswith("cone"))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        spec = dataclasses.replace(zoo, hosts=(Host("relay", "zoo"), *hosts))
        lab = stack.enter_context(Lab(spec, seed=seed, mover_nice=-10))
        relay = LabPeer(lab.host("relay"), folder, port=443, relay=True)
        one, two = (LabPeer(lab.host(h.name), folder) for h in hosts)
        start_all([relay, one, two], stack)
        settle([relay], [one, two])
        lab.cut(one.name, two.name)
        one.meets(two)
        two.meets(one)
        one.do(one.talk, two.id, bytes(_PAYLOAD))
        if one.way_to(two) == "direct":
            raise BenchError(
                "a pair that was cut apart has a direct connection: a bug of the lab's"
            )
        lab.heal()
        took = one.until_direct(two)
        progress(f"the way was free: direct after {took:.2f} s")
        return took


def _rows(met: list[_Met]) -> list[dict[str, Cell]]:
    rows: list[dict[str, Cell]] = []
    for a, b in itertools.combinations_with_replacement(KINDS, 2):
        ones = [m for m in met if frozenset(m.pair) == frozenset((a, b))]
        good = [m for m in ones if not m.failure]
        rows.append(
            {
                "between": KINDS[a],
                "and": KINDS[b],
                "pairs": len(ones),
                "connected": len(good),
                "call s": median(m.call_s for m in good) if good else None,
                "call + 1 MB s": median(m.seconds for m in good) if good else None,
                "slowest": max((m.seconds for m in good), default=None),
                "direct": sum(m.way == "direct" for m in good),
            }
        )
    return rows


def _bars(
    met: list[_Met], settled: list[float], died: list[float], upgraded: list[float]
) -> list[Bar]:
    where = f"{len(met)} pairs, one open relay at port 443"
    could = [m for m in met if frozenset(m.pair) in DIRECT]
    direct = sum(m.way == "direct" for m in could) / len(could)
    bars = [
        Bar.at_least(
            "pairs that connected", sum(not m.failure for m in met) / len(met), 1.0, where
        ),
        Bar.at_most(
            "slowest pair: a call and 1 MB there and back, s",
            max(m.seconds for m in met), _CONNECT_S, where,
        ),
        Bar.at_least("of pairs that can be direct, those that are at once", direct, 0.8, where),
        Bar.at_most(
            "from a first connection to being reachable, slowest, s",
            max(settled), _CONNECT_S, f"{len(settled)} peers",
        ),
        Bar.at_most(
            "a relay killed: until 1 MB passes through another, slowest, s",
            max(died), _CONNECT_S, f"{len(died)} times, two relays",
        ),
        Bar.at_most(
            "a way becomes free: until the pair is direct, slowest, s",
            max(upgraded), _UPGRADE_S, f"{len(upgraded)} times, after one try in vain",
        ),
    ]  # fmt: skip
    without = [m for m in met if not m.lane]
    if without:
        bars.append(
            Bar.at_most(
                "the same slowest pair without lanes, s",
                max(m.seconds for m in without), _CONNECT_S, f"{len(without)} of the pairs",
            )
        )  # fmt: skip
    return bars


def _notes(met: list[_Met], seed: int) -> list[str]:
    setting = (
        f"Seed {seed}; {_RTT_MS:g} ms between any two, no rate limits, no loss. All share this "
        "machine's cores. Daemons have met through the DHT before: many calls find a relayed "
        "connection already, and the stream's time has the search for a shorter way in it."
    )
    ways = (
        "direct: without a relay when 1 MB had passed; others may become so later. A symmetric NAT "
        "towards any NAT or firewall has no direct way, nor has a peer that may only go out to 443 "
        "towards anybody who is not there."
    )
    routers = "Routers here drop what they refuse, never reset, and give out outer ports at random."
    notes = [setting, ways, routers]
    return notes + [f"{m.pair[0]} to {m.pair[1]}:{m.failure}" for m in met if m.failure]
