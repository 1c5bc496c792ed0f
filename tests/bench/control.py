"""Heartbeats beside our own data on lines of 10 and 1 Mbit/s, and whether rounds complete there.

Four peers, each at a line of its own in the network laboratory. What runs is what a peer runs but
for training: machine, driver, exchange, lane and libp2p. Rounds follow each other without a pause,
and each peer fetches a state from the next one, again and again, so that no line is ever idle.
Counted are the peers' own heartbeats, and when they arrived. What the bare line does to a ping
beside one flow of TCP is measured in the same laboratory just before.
"""

from __future__ import annotations

import math
import selectors
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, median
from typing import Any, Final

from tests.bench.fleet import Fleet
from tests.bench.result import Bar, BenchError, Cell, Progress, Result
from tests.netlab import Lab, LabError, missing, probe, traffic
from tests.netlab.lab import LabHost
from tests.netlab.spec import Host, Line, Route, Spec

_PEERS: Final = 4
_RTT_MS: Final = 40.0
_BUFFERS_MS: Final = (100.0, 1000.0)
_P99_S_MAX: Final = 1.0
_ERROR_MAX: Final = {"q4": 0.12, "min": 0.4}
"""Of a whole round's worst unit; what a sparse codec leaves out, feedback would bring back, which
is not here: there only who is inside is checked."""
_MEET_S: Final = 90.0
_PING_EVERY_S: Final = 0.05
_PING_LATE_S: Final = 5.0
_PORT: Final = 7000
_FLOWS: Final = ("cubic", "bbr")
_WORKER: Final = "tests.bench.control_worker"


@dataclass(frozen=True, slots=True)
class _Setting:
    mbps: float
    codec: str
    numel: int
    buffer_ms: float

    @property
    def name(self) -> str:
        return f"{self.mbps:g} Mbit/s, {self.codec}, buffers of {self.buffer_ms:g} ms"

    @property
    def ballast(self) -> int:
        """Bytes of the state: a transfer takes some 15 s of the line."""
        return int(self.mbps * 2e6)


_ROWS: Final = ((10.0, "q4", 5_000_000), (1.0, "min", 1_000_000), (1.0, "sparse:16", 5_000_000))
_SETTINGS: Final = tuple(
    _Setting(mbps, codec, numel, buffer_ms)
    for buffer_ms in _BUFFERS_MS
    for mbps, codec, numel in _ROWS
)


@dataclass(frozen=True, slots=True)
class _Scale:
    settings: Sequence[_Setting]
    warm_up_s: float
    measured_s: float
    ping_s: float


_FULL: Final = _Scale(_SETTINGS, 10.0, 90.0, 10.0)
_QUICK: Final = _Scale(_SETTINGS[:1], 5.0, 15.0, 3.0)


@dataclass(frozen=True, slots=True)
class _Measured:
    """One setting."""

    pings: dict[str, list[float]]
    """Congestion control of the flow beside them -> seconds there and back, lost ones infinite."""
    round_trips_s: list[float]
    """Of heartbeats, from the call to its answer; without one: infinite."""
    one_way_s: list[float]
    others_s: list[float]
    """Round trips of all other calls: plans, hellos."""
    rounds: list[list[dict[str, Any]]]
    """Of each peer."""
    busy: float
    """Share of their uplinks that the peers filled, on average."""
    dropped: float
    """Share of all packets that found a queue full."""
    state_mb: float
    suspected: list[str]
    streams: dict[str, int]
    late_us: float

    @property
    def errors(self) -> list[float]:
        return [r["error"] for mine in self.rounds for r in mine if r["error"] is not None]

    @property
    def coverage(self) -> float:
        return mean([float(r["coverage"]) for mine in self.rounds for r in mine] or [math.nan])

    @property
    def apart(self) -> int:
        """Rounds after which two peers had different digests."""
        seen: dict[int, set[str]] = defaultdict(set)
        for mine in self.rounds:
            for one in mine:
                seen[one["number"]].add(one["digest"])
        return sum(len(digests) > 1 for digests in seen.values())


def run(quick: bool, seed: int, progress: Progress) -> Result:
    """See `registry.Measurement`. Twelve minutes; quick: one."""
    lack = missing()
    if lack is not None:
        raise BenchError(lack)
    scale = _QUICK if quick else _FULL
    measured: dict[_Setting, _Measured] = {}
    try:
        for setting in scale.settings:
            progress(f"{setting.name}: the bare line, then {_PEERS} peers")
            one = measured[setting] = _measure(setting, scale, seed)
            progress(
                f"{setting.name}: p99 {_quantile(one.round_trips_s, 0.99):.3f} s of "
                f"{len(one.round_trips_s)} heartbeats, {_count(one)} rounds"
            )
    except LabError as error:
        raise BenchError(str(error)) from error
    return Result(
        rows=[_row(setting, one) for setting, one in measured.items()],
        bars=[bar for setting, one in measured.items() for bar in _bars(setting, one)],
        notes=_notes(measured, scale, seed),
    )


def _measure(setting: _Setting, scale: _Scale, seed: int) -> _Measured:
    line = Line(up_mbps=setting.mbps, down_mbps=setting.mbps, buffer_ms=setting.buffer_ms)
    spec = Spec(
        hosts=tuple(Host(f"h{i}", "a", line) for i in range(_PEERS)),
        routes=(Route(a="a", b="a", rtt_ms=_RTT_MS),),
    )
    with Lab(spec, seed=seed, mover_nice=-10) as lab:
        pings = {flow: _pings(lab, flow, scale.ping_s) for flow in _FLOWS}
        with Fleet(
            "control", _WORKER, _PEERS, places=[host.command([]) for host in lab.hosts]
        ) as fleet:
            fleet.start(
                [{"host": host.address} for host in lab.hosts],
                seed=seed, numel=setting.numel, codec=setting.codec, ballast=setting.ballast,
            )  # fmt: skip
            fleet.ask("prepare", _MEET_S, number=0)
            peers = [reply["peer"] for reply in fleet.ask("meet", _MEET_S)]
            fleet.ask("settle", _MEET_S)
            fleet.ask("cram", _MEET_S)
            time.sleep(scale.warm_up_s)
            fleet.ask("begin", _MEET_S)
            before, begun_s = lab.counters(), time.monotonic()
            time.sleep(scale.measured_s)
            after, seconds = lab.counters(), time.monotonic() - begun_s
            told = fleet.ask("end", _MEET_S)
    sent = sum((after[h].sent() - before[h].sent()).bytes for h in after.hosts)
    packets = sum((after[h].sent() - before[h].sent()).packets for h in after.hosts)
    dropped = sum((after[h].dropped() - before[h].dropped()).packets for h in after.hosts)
    one_way_s, round_trips_s, others_s = _calls(peers, told)
    return _Measured(
        pings, round_trips_s, one_way_s, others_s,
        rounds=[reply["rounds"] for reply in told],
        busy=sent * 8 / (setting.mbps * 1e6 * seconds * _PEERS),
        dropped=dropped / max(1, packets),
        state_mb=sum(reply["moved"] for reply in told) / 1e6,
        suspected=[text for reply in told for text in reply["suspected"]],
        streams={c: sum(reply["streams"][c] for reply in told) for c in ("lane", "libp2p")},
        late_us=after.late_us_mean,
    )  # fmt: skip


def _calls(
    peers: list[str], told: list[dict[str, Any]]
) -> tuple[list[float], list[float], list[float]]:
    """Heartbeats' one-way times and round trips, and the round trips of all other calls."""
    one_way_s, round_trips_s, others_s = [], [], []
    for peer, reply in zip(peers, told, strict=True):
        for call in reply["called"]:
            took_s = math.inf if call["took_s"] is None else call["took_s"]
            if call["kind"] != "Heartbeat":
                others_s.append(took_s)
                continue
            round_trips_s.append(took_s)
            there = told[peers.index(call["to"])]["heard"] if call["to"] in peers else []
            arrived = next(
                (h for h in there
                 if h["from"] == peer and h["crc"] == call["crc"] and h["at_s"] >= call["at_s"]),
                None,
            )  # fmt: skip
            one_way_s.append(math.inf if arrived is None else arrived["at_s"] - call["at_s"])
            if arrived is not None:
                there.remove(arrived)
    return one_way_s, round_trips_s, others_s


# ── the bare line ────────────────────────────────────────────────────────────────────────
def _pings(lab: Lab, flow: str, seconds: float) -> list[float]:
    """Round trips beside one flow of TCP from the first host to the second, once it runs."""
    near, far = lab.hosts[:2]
    with _flow(near, far, flow):
        _ping(near, far, seconds / 2)  # it finds its pace
        return _ping(near, far, seconds)


@contextmanager
def _flow(near: LabHost, far: LabHost, congestion: str) -> Iterator[None]:
    program = [sys.executable, "-I", traffic.__file__]
    with far.popen([*program, "sink", str(_PORT)], stdout=subprocess.PIPE) as sink:
        assert sink.stdout is not None
        sink.stdout.readline()
        with near.popen([*program, "source", far.address, str(_PORT), congestion]) as source:
            try:
                yield
            finally:
                source.kill()
                sink.kill()


def _ping(near: LabHost, far: LabHost, seconds: float) -> list[float]:
    """Small UDP packets at regular times, there and back; what does not come back is infinite."""
    left_s: list[float] = []
    took_s: dict[int, float] = {}
    with (
        probe.udp(near) as here,
        probe.udp(far) as there,
        selectors.DefaultSelector() as ready,
    ):
        ready.register(here, selectors.EVENT_READ)
        ready.register(there, selectors.EVENT_READ)
        begun_s = time.monotonic()
        while len(took_s) < len(left_s) or time.monotonic() < begun_s + seconds:
            now_s = time.monotonic()
            if now_s > begun_s + seconds + _PING_LATE_S:
                break
            due_s = begun_s + len(left_s) * _PING_EVERY_S
            if due_s <= now_s < begun_s + seconds:
                here.sendto(len(left_s).to_bytes(4), there.getsockname())
                left_s.append(now_s)
                continue
            for key, _ in ready.select(max(0.0, min(due_s - now_s, _PING_EVERY_S))):
                if key.fileobj is there:
                    there.sendto(*there.recvfrom(64))
                else:
                    number = int.from_bytes(here.recv(64))
                    took_s[number] = time.monotonic() - left_s[number]
    return [took_s.get(number, math.inf) for number in range(len(left_s))]


# ── what is told ─────────────────────────────────────────────────────────────────────────
def _quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed; NaN of none."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)] if ranked else math.nan


def _count(one: _Measured) -> int:
    """Rounds that every peer applied."""
    return min(len(mine) for mine in one.rounds)


def _round_s(one: _Measured) -> float | None:
    gaps = [b["at_s"] - a["at_s"] for mine in one.rounds for a, b in pairwise(mine)]
    return median(gaps) if gaps else None


def _ms(values: Sequence[float], share: float) -> Cell:
    found = _quantile(values, share)
    return round(found * 1e3) if math.isfinite(found) else "lost"


def _row(setting: _Setting, one: _Measured) -> dict[str, Cell]:
    return {
        "Mbit/s": setting.mbps,
        "buffer ms": setting.buffer_ms,
        "codec": setting.codec,
        "M values": setting.numel / 1e6,
        "uplinks busy": f"{one.busy:.0%}",
        "dropped": f"{one.dropped:.1%}",
        "heartbeats": len(one.round_trips_s),
        "p50 ms": _ms(one.round_trips_s, 0.5),
        "p99 ms": _ms(one.round_trips_s, 0.99),
        "most ms": _ms(one.round_trips_s, 1.0),
        "one way p99": _ms(one.one_way_s, 0.99),
        "others p99": _ms(one.others_s, 0.99),
        "suspected": len(one.suspected),
        "rounds": _count(one),
        "s each": _round_s(one),
        "inside": one.coverage,
        "state MB": one.state_mb,
        "over libp2p": f"{one.streams['libp2p']} of {sum(one.streams.values())}",
        **{f"ping {flow} p99": _ms(one.pings[flow], 0.99) for flow in _FLOWS},
    }


def _bars(setting: _Setting, one: _Measured) -> list[Bar]:
    beside = ", ".join(
        f"{flow} {_ms(one.pings[flow], 0.5)}/{_ms(one.pings[flow], 0.99)}" for flow in _FLOWS
    )
    against = f"a ping beside one flow on the bare line, p50/p99 ms: {beside}"
    whole = one.apart == 0 and not one.suspected
    error_max = _ERROR_MAX.get(setting.codec)
    if error_max is not None:
        whole = whole and max(one.errors, default=0.0) <= error_max
    return [
        Bar.at_most(
            f"{setting.name}: seconds from call to answer, p99",
            _quantile(one.round_trips_s, 0.99), _P99_S_MAX, against,
        ),
        Bar.at_most(
            f"{setting.name}: seconds one way, p99",
            _quantile(one.one_way_s, 0.99), _P99_S_MAX, against,
        ),
        Bar.at_least(
            f"{setting.name}: rounds that every peer applied with the right result",
            float(_count(one)) if whole else 0.0, 3.0,
            f"{one.apart} with digests apart, {len(one.suspected)} peers taken for dead",
        ),
        Bar.at_least(
            f"{setting.name}: share of the contributions inside", one.coverage, 0.9,
            "the rest goes into the next round",
        ),
    ]  # fmt: skip


def _notes(measured: dict[_Setting, _Measured], scale: _Scale, seed: int) -> list[str]:
    lines = (
        f"Seed {seed}; {_PEERS} peers, {_RTT_MS:g} ms apart, each line as fast up as down, cubic; "
        f"{scale.measured_s:g} s each, after {scale.warm_up_s:g} s."
    )
    columns = (
        "Heartbeats are the peers' own, about one a second and pair; call to answer, a lost one "
        "counts as infinite. others: plans and hellos. suspected: how often a peer was taken for "
        "dead. inside: share of all contributions that were in their round's mean. over libp2p: "
        "streams that the lane did not carry."
    )
    pings = (
        "ping: small UDP packets beside one endless flow of that congestion control on the same "
        "line, before the peers start; a lost one counts as infinite."
    )
    buffers = "A buffer is that of each direction of each line: what would wait longer is dropped."
    notes = [lines, columns, pings, buffers]
    for setting, one in measured.items():
        if one.suspected:
            notes.append(f"{setting.name}: {one.suspected[0]}.")
    late = max(one.late_us for one in measured.values())
    notes.append(f"The laboratory's packets were at most {late:.0f} us late on average.")
    return notes
