"""A scenario, lived through: machines, peers, faults, the judge, and what is worth remembering."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Final

from dht.memory import MemoryBoard
from peer.manifest import ScheduleSpec, default_manifest
from peer.observe import events as ev
from peer.simulate.accounts import LedgerFigures
from peer.simulate.books import Books
from peer.simulate.judge import Judge, RoundFact, Violation
from peer.simulate.learner import Load, wire_bytes
from peer.simulate.links import PathSpec
from peer.simulate.loop import VirtualLoop
from peer.simulate.mixes import MixFigures
from peer.simulate.network import SimNetwork
from peer.simulate.nodes import Node
from peer.simulate.scenario import Fault, Kind, PeerSpec, Scenario
from peer.simulate.sharing import shared_reading
from peer.simulate.signing import fast_signatures
from protocols.types import PeerId

Progress = Callable[[float, float], None]
"""(simulated seconds so far, of how many)."""

EPOCH_S: Final = 1_700_000_000.0  # what calendars say at the beginning; any fixed day will do
PHASES: Final = ("dead", "frozen", "looking", "syncing", "training", "exchanging")
COLUMNS_MAX: Final = 1200  # samples over a simulation
LOOK_S: Final = 1.0
FLAP_S: Final = 2.5


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What one peer did."""

    index: int
    rounds: int
    trained_s: float
    alive_s: float
    calls: int
    """Control messages sent."""
    bytes_up: int
    bytes_down: int
    dht_reads: int
    dht_writes: int


@dataclass(kw_only=True)
class Record:
    """A simulation's whole story."""

    scenario: Scenario
    digest: str
    """Over every event in order: equal for equal scenarios, on every machine."""
    events: int
    violations: list[Violation]
    rounds: list[RoundFact]
    mixes: MixFigures
    ledger: LedgerFigures
    exchanges: list[tuple[float, int, float]]
    """(when, peer, seconds from contributions due to round applied)."""
    tallies: list[Tally]
    sample_s: float
    lanes: list[bytes]
    """Per peer and sample the index into `PHASES`."""
    trained: list[float]
    """Per sample: seconds of training done in it, over all peers."""
    marks: list[tuple[float, int, str]] = field(default_factory=list)
    """(when, peer, what): rounds' ends, states received, and the like."""
    arguments: list[str] = field(default_factory=list)
    """Of `python -m peer simulate`, to see it again."""
    wall_s: float = 0.0
    callbacks: int = 0


class World:
    """Runs one scenario. Use `simulate`."""

    def __init__(self, scenario: Scenario, progress: Progress | None = None) -> None:
        self.scenario = scenario
        self.loop = VirtualLoop()
        self.epoch_s = EPOCH_S
        self.network = SimNetwork(
            self.loop, self._path, scenario.seed,
            wire_bytes(scenario.load, scenario.units), scenario.piece_s,
        )  # fmt: skip
        self.board = MemoryBoard(lambda: EPOCH_S + self.loop.time())
        self.books = Books(scenario.units, gossip=bool(scenario.gossip_every))
        self.fast_key: bytes | None = None
        schedule = ScheduleSpec(
            round_s=scenario.round_s,
            exchange_s=scenario.exchange_s,
            gossip_every=scenario.gossip_every,
            fragments=scenario.fragments,
        )
        manifest = replace(default_manifest(), name="simulated", schedule=schedule)
        self.manifest = manifest.to_canonical()
        self.run_id = manifest.run_id()
        self.judge = Judge(self)
        self.nodes: list[Node] = []
        self._liars: set[PeerId] = set()
        self._forgetful: set[PeerId] = set()
        self._progress = progress
        self._entrances_up = [True] * scenario.entrances
        self._met: set[int] = set()
        self._cut: dict[int, int] = {}
        """Node -> how many walls stand around it."""
        self._hash = hashlib.sha256()
        self._events = 0
        self._failures: list[BaseException] = []
        self._alive_s: dict[int, float] = {}
        self._lanes: list[bytearray] = []
        self._trained: list[float] = []
        self._marks: list[tuple[float, int, str]] = []
        self._calls: dict[int, int] = {}
        self._listeners: list[Callable[[float, Node, ev.Event], None]] = []

    # ── for nodes and the judge ──────────────────────────────────────────────────────────
    @property
    def now_s(self) -> float:
        return self.loop.time()

    def listen(self, listener: Callable[[float, Node, ev.Event], None]) -> None:
        """`listener(now_s, node, event)` hears everything that nodes announce."""
        self._listeners.append(listener)

    def told(self, node: Node, event: ev.Event) -> None:
        """A node announces something."""
        self._events += 1
        self._hash.update(f"{self.loop.time():.6f} {node.index} {event!r}\n".encode())
        self.judge.told(node, event)
        if isinstance(event, ev.StateReceived):
            self._marks.append((self.now_s, node.index, "state"))
        elif isinstance(event, ev.DigestDiffered):
            self._marks.append((self.now_s, node.index, "differs"))
        for listener in self._listeners:
            listener(self.now_s, node, event)

    def failed(self, error: BaseException) -> None:
        self._failures.append(error)

    def node_of(self, peer: PeerId) -> Node:
        return next(node for node in self.nodes if node.id == peer)

    def is_liar(self, peer: PeerId) -> bool:
        return peer in self._liars

    def is_forgetful(self, peer: PeerId) -> bool:
        """Whether it loses its disk at some moment of the scenario, and all but its key."""
        return peer in self._forgetful

    def is_cut_off(self, node: Node) -> bool:
        """Whether a wall stands between it and some others now."""
        return self._cut.get(node.index, 0) > 0

    def has_donor(self, node: Node) -> bool:
        return any(
            other.group is not None and other.group.ready and not other.frozen
            for other in self.nodes
            if other is not node and not self.is_cut_off(other)
        )

    def load_of(self, spec: PeerSpec) -> Load:
        return replace(self.scenario.load, tokens_per_s=spec.tokens_per_s, disk_s=spec.disk_s)

    def entrances(self, node: Node) -> Sequence[object]:
        """Ways into the DHT that `node` can take now."""
        walled = self.is_cut_off(node)
        up = [i for i, up in enumerate(self._entrances_up) if up and not walled]
        if up:
            self._met.add(node.index)
            return up
        if node.index not in self._met:
            return ()
        here = node.machine
        for other in self.nodes:
            if other is not node and other.alive and self.network.passes(here, other.machine):
                return (other,)
        return ()

    def _path(self, one: int, other: int) -> PathSpec:
        return self.scenario.path(one, other)

    # ── life ─────────────────────────────────────────────────────────────────────────────
    def run(self) -> Record:
        """Live through the scenario."""
        begun_s = time.perf_counter()
        scenario, loop = self.scenario, self.loop
        with ExitStack() as stack:
            if not scenario.real_signatures:
                self.fast_key = stack.enter_context(fast_signatures(scenario.seed))
            stack.enter_context(shared_reading())
            thresholds = gc.get_threshold()
            gc.set_threshold(200_000, 20, 50)  # a simulation makes few cycles and much else
            stack.callback(gc.set_threshold, *thresholds)
            stack.callback(self._close)
            loop.set_exception_handler(self._bug)
            for index, spec in enumerate(scenario.peers):
                self.nodes.append(Node(self, index, spec))
                self._lanes.append(bytearray())
                if spec.lie:
                    self._liars.add(self.nodes[-1].id)
            wiped = [f.targets for f in self.scenario.faults if f.kind is Kind.wipe]
            self._forgetful = {self.nodes[i].id for targets in wiped for i in targets}
            loop.run_until_complete(self._days())
            self.judge.final()
            record = self._record()
        record.wall_s = time.perf_counter() - begun_s
        return record

    async def _days(self) -> None:
        scenario, loop = self.scenario, self.loop
        begun_s = loop.time()
        for node in self.nodes:
            loop.call_at(begun_s + node.spec.join_s, self._start, node)
        for fault in scenario.faults:
            loop.call_at(begun_s + fault.at_s, self._break, fault)
        sample_s = self.sample_s
        look_s = max(LOOK_S, scenario.round_s / 20)
        end_s = begun_s + scenario.duration_s
        next_look_s = next_sample_s = begun_s
        trained_s = 0.0
        while (now_s := loop.time()) < end_s - 1e-9:
            if now_s >= next_look_s - 1e-9:
                self.judge.look()
                next_look_s += look_s
            if now_s >= next_sample_s - 1e-9:
                total_s = self._sample(sample_s)
                self._trained.append(total_s - trained_s)
                trained_s = total_s
                next_sample_s += sample_s
                if self._progress is not None:
                    self._progress(now_s - begun_s, scenario.duration_s)
            if self._failures:
                raise self._failures[0]
            await asyncio.sleep(min(next_look_s, next_sample_s, end_s) - now_s)

    @property
    def sample_s(self) -> float:
        return max(0.5, self.scenario.duration_s / COLUMNS_MAX)

    def _sample(self, sample_s: float) -> float:
        total_s = 0.0
        for node, lane in zip(self.nodes, self._lanes, strict=True):
            lane.append(PHASES.index(node.phase))
            total_s += node.training_s()
            if node.alive and not node.frozen:
                self._alive_s[node.index] = self._alive_s.get(node.index, 0.0) + sample_s
        return total_s

    def _start(self, node: Node) -> None:
        node.start()
        self.judge.disturbed([node])

    def _bug(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self._failures.append(error or RuntimeError(context.get("message", "?")))

    def _close(self) -> None:
        for node in self.nodes:
            node.kill(dark=True)
        loop = self.loop
        loop.set_exception_handler(lambda *_: None)
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=1.0))
        loop.close()

    # ── faults ───────────────────────────────────────────────────────────────────────────
    def _break(self, fault: Fault) -> None:
        later = self.loop.call_later
        self._hash.update(f"{self.loop.time():.6f} {fault!r}\n".encode())
        if fault.kind is Kind.entrance:
            for i in fault.targets:
                self._entrances_up[i] = False
                later(fault.seconds, self._open_entrance, i)
            return
        nodes = [self.nodes[i] for i in fault.targets]
        for node in nodes:
            self._marks.append((self.now_s, node.index, str(fault.kind)))
        self.judge.disturbed(nodes)
        match fault.kind:
            case Kind.crash | Kind.outage | Kind.wipe:
                for node in nodes:
                    node.kill(dark=fault.kind is Kind.outage, wipe=fault.kind is Kind.wipe)
                    later(fault.seconds, self._start, node)
            case Kind.leave:
                for node in nodes:
                    node.leave()
                    later(fault.seconds + 2 * FLAP_S, self._start, node)
            case Kind.freeze:
                for node in nodes:
                    node.freeze()
                    later(fault.seconds, self._thaw, node)
            case Kind.cut:
                self._wall_off(fault.targets, fault.seconds)
            case Kind.flap:
                at_s = 0.0
                while at_s < fault.seconds:
                    later(at_s, self._wall_off, fault.targets, min(FLAP_S, fault.seconds - at_s))
                    at_s += 2 * FLAP_S

    def _open_entrance(self, index: int) -> None:
        self._entrances_up[index] = True

    def _thaw(self, node: Node) -> None:
        node.thaw()
        self.judge.disturbed([node])

    def _wall_off(self, targets: tuple[int, ...], seconds: float) -> None:
        inside = frozenset(targets)
        handle = self.network.wall(lambda a, b: (a in inside) != (b in inside))
        for node in self.nodes:
            self._cut[node.index] = self._cut.get(node.index, 0) + 1

        def down() -> None:
            self.network.open_wall(handle)
            for node in self.nodes:
                self._cut[node.index] -= 1
            self.judge.disturbed(self.nodes)

        self.loop.call_later(seconds, down)

    # ── the end ──────────────────────────────────────────────────────────────────────────
    def _record(self) -> Record:
        tallies = []
        for node in self.nodes:
            directory = node.directory
            tallies.append(
                Tally(
                    index=node.index,
                    rounds=len(self.judge.watch(node).applied_s),
                    trained_s=node.training_s(),
                    alive_s=self._alive_s.get(node.index, 0.0),
                    calls=node.machine.calls,
                    bytes_up=node.machine.up.bytes,
                    bytes_down=node.machine.down.bytes,
                    dht_reads=node.dht_reads + (directory.reads if directory else 0),
                    dht_writes=node.dht_writes + (directory.writes if directory else 0),
                )
            )
        return Record(
            scenario=self.scenario,
            digest=self._hash.hexdigest(),
            events=self._events,
            violations=self.judge.violations,
            rounds=self.judge.rounds,
            mixes=self.judge.mix_figures,
            ledger=self.judge.ledger_figures,
            exchanges=self.judge.exchanges,
            tallies=tallies,
            sample_s=self.sample_s,
            lanes=[bytes(lane) for lane in self._lanes],
            trained=self._trained,
            marks=self._marks,
            arguments=["--seed", str(self.scenario.seed)],
            callbacks=self.loop.events,
        )


def simulate(scenario: Scenario, progress: Progress | None = None) -> Record:
    """Live through `scenario` in virtual time."""
    return World(scenario, progress).run()
