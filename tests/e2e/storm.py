"""Bootstrap nodes and two groups of peers as real processes, and a storm over them.

The plan (`storm_plan`) says what happens when; this does it, keeps what every incarnation of every
process said, and knows when all is well again. Nothing outlives the `with` block: every process
carries the family's mark, network daemons included. Linux only.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from tests.bench import processes
from tests.e2e.processes import Fact, Process
from tests.e2e.storm_plan import OUT_MAX, Deed, Fault, Role

ROUND_S: Final = 6.0
EXCHANGE_S: Final = 12.0

MANIFEST: Final = f"""
name = "storm"

[model.config]
model_type = "llama"
vocab_size = 264
hidden_size = 96
intermediate_size = 256
num_hidden_layers = 3
num_attention_heads = 4
max_position_embeddings = 32
tie_word_embeddings = true

[data]
source = "stdlib"
sequence_length = 32

[inner]
lr = 3e-3
batch_size = 1
warmup_steps = 5

[schedule]
round_s = {ROUND_S}
exchange_s = {EXCHANGE_S}
evaluate_every = 0
checkpoint_every = 4
"""
"""Four units of parameters, so that a group has more than one aggregator."""

NICE: Final = 5  # who is up leaves room for those that start and for whoever watches ...
NICE_WORK: Final = 15  # ... and its training leaves room for all event loops
POLL_S: Final = 0.05
START_S: Final = 180.0  # for ten processes that import torch on two busy cores
CALM_S: Final = 120.0
STUCK_S: Final = 180.0  # in which nothing of the plan could be done
LEAVE_S: Final = 60.0


@dataclass(slots=True)
class Life:
    """One incarnation of a process, from its start to its end."""

    process: Process
    fresh: bool
    """Its disk was empty."""
    returned_s: float
    """When it was started, or let go on after a freeze (seconds since the epoch)."""
    end: Deed | None = None
    """What ended it; None: it lives."""
    nice: bool = False
    """Its threads beside the event loop's give way to others."""

    @property
    def events(self) -> list[Fact]:
        return self.process.events

    @property
    def working(self) -> bool:
        """Its work was in a round since it came (back)."""
        return any(f["included"] > 0 and f["t"] > self.returned_s for f in self.process.rounds)


@dataclass(slots=True)
class Seat:
    """A place on this machine, and the lives that it has seen."""

    name: str
    group: str
    """Empty: a bootstrap node."""
    lives: list[Life] = field(default_factory=list)
    frozen: bool = False

    @property
    def life(self) -> Life:
        return self.lives[-1]

    @property
    def process(self) -> Process:
        return self.life.process

    @property
    def up(self) -> bool:
        return self.life.end is None and not self.frozen


@dataclass(frozen=True, slots=True)
class Blow:
    """A fault that was struck."""

    fault: Fault
    seat: str
    struck_s: float
    office: Role | None
    """Which one its victim held at that moment, where the fault was meant for a holder."""


class Storm:
    """All processes of a storm. Made by `storm`."""

    def __init__(self, folder: Path, groups: Mapping[str, Sequence[str]], nodes: Sequence[str]):
        self.folder = folder
        self.family = f"storm-{uuid4()}"
        self.seats = {name: Seat(name, "") for name in nodes}
        self.seats |= {name: Seat(name, group) for group in groups for name in groups[group]}
        self.nodes = [self.seats[name] for name in nodes]
        self.blows: list[Blow] = []
        self.begun_s = 0.0
        self._addresses: dict[str, str] = {}
        self._manifest = folder / "run.toml"
        self._manifest.write_text(MANIFEST)

    def members(self, group: str) -> list[Seat]:
        return [seat for seat in self.seats.values() if seat.group == group and group]

    @property
    def peers(self) -> list[Seat]:
        return [seat for seat in self.seats.values() if seat.group]

    @property
    def groups(self) -> list[str]:
        return sorted({seat.group for seat in self.peers})

    # ── starting ─────────────────────────────────────────────────────────────────────────
    async def assemble(self) -> None:
        """Start all and wait until both groups average with everybody in them."""
        for node in self.nodes:
            self.start(node)
            await self._up(node)
            self._addresses[node.name] = node.process.address
        founder, *others = self.peers
        self.start(founder, founder=True)
        await self.until(lambda: founder.process.rounds)
        for seat in others:
            self.start(seat)
        await self.calm(START_S, 0.0)

    async def _up(self, seat: Seat) -> None:
        await self.until(lambda: seat.process.all("Started"))

    def _begun(self) -> list[Seat]:
        return [seat for seat in self.seats.values() if seat.lives]

    def start(self, seat: Seat, *, founder: bool = False) -> None:
        """Start a process in its seat: with the home that it left there, if any."""
        home = self.folder / seat.name
        fresh = not home.exists()
        common = ["--home", str(home), "--host", "127.0.0.1", "--log-json"]
        for name, address in self._addresses.items():
            if name != seat.name:
                common += ["--via", address]
        if seat.group:
            verb = ["run", "start", str(self._manifest)] if founder else ["join"]
            arguments = ["peer", *verb, *common, "--site", seat.group, "--threads", "1"]
        else:
            arguments = ["bootstrap", "run", *common, "--port", "0", "--metrics-port", "-1"]
        process = Process(
            f"{seat.name}.{len(seat.lives)}",
            arguments,
            self.folder / f"{seat.name}-{len(seat.lives)}.err",
            environment={processes.MARK: self.family},
        )
        seat.frozen = False
        seat.lives.append(Life(process, fresh, time.time()))

    # ── waiting ──────────────────────────────────────────────────────────────────────────
    async def until(self, condition: Callable[[], Any], within_s: float = START_S) -> None:
        """Wait until `condition` holds; nobody may end whom the plan has not ended."""
        end_s = time.monotonic() + within_s
        while True:
            self.look()
            if condition():
                return
            if time.monotonic() > end_s:
                raise AssertionError(f"not within {within_s:g} s:\n{self.story()}")
            await asyncio.sleep(POLL_S)

    def look(self) -> None:
        """Take in what all have said.

        Raises:
            AssertionError: a process ended by itself.
        """
        for seat in self._begun():
            if seat.life.end is not None and seat.process.code is not None:
                continue  # everything it said was taken in when it was reaped
            seat.process.read()
            if not seat.life.nice and seat.group and seat.process.all("Started"):
                seat.life.nice = True
                _yield_to_others(seat.process.pid)
            if seat.life.end is None and seat.process.code is not None:
                raise AssertionError(f"{seat.process.name} died by itself:\n{self.story()}")

    async def calm(self, within_s: float, since_s: float) -> None:
        """Until in every group all agree on two rounds, each planned and averaged with all of them
        since `since_s` (seconds since the epoch)."""
        await self.until(
            lambda: all(len(self.whole_rounds(g, since_s)) >= 2 for g in self.groups), within_s
        )

    def whole_rounds(self, group: str, since_s: float = 0.0) -> list[int]:
        """Rounds that hold the work of every living member, and that all finished alike."""
        seats = self.members(group)
        if not all(seat.lives and seat.up and seat.process.all("Started") for seat in seats):
            return []
        ids = {seat.process.id for seat in seats}
        told: list[dict[int, str]] = [
            {
                fact["round"]: fact["digest"]
                for fact in seat.process.rounds
                if fact["t"] > since_s
                and fact["spans"]
                and all(set(span["contributors"]) == ids for span in fact["spans"])
            }
            for seat in seats
        ]
        common = set.intersection(*(set(rounds) for rounds in told))
        return sorted(n for n in common if len({rounds[n] for rounds in told}) == 1)

    # ── the storm ────────────────────────────────────────────────────────────────────────
    async def rage(self, plan: Sequence[Fault]) -> None:
        """Strike every fault and undo it again; return when all are undone.

        A machine that is too slow for the plan's times gets more: a fault waits until `OUT_MAX`
        other members of its group are at work, so that the plan's promise holds anywhere.

        Raises:
            AssertionError: they never were, or a process ended by itself.
        """
        self.begun_s = time.time()
        origin_s = time.monotonic()
        agenda: list[tuple[float, int, Callable[[], float | None]]] = []
        order = itertools.count()

        def at(when_s: float, act: Callable[[], float | None]) -> None:
            heapq.heappush(agenda, (when_s, next(order), act))

        def strike(fault: Fault) -> float | None:
            seat = self._victim(fault)
            if seat is None:
                return POLL_S
            held = fault.role is not None and seat is self._holder(fault.target, fault.role)
            blow = Blow(fault, seat.name, time.time(), fault.role if held else None)
            self.blows.append(blow)
            self._strike(seat, fault.deed)
            at(time.monotonic() + fault.out_s, partial(self._undo, seat, blow))
            return None

        for fault in plan:
            at(origin_s + fault.at_s, partial(strike, fault))
        moved_s = origin_s
        while agenda:
            when_s, _, act = heapq.heappop(agenda)
            await self._reach(when_s)
            assert time.monotonic() - moved_s < STUCK_S, f"nobody comes back:\n{self.story()}"
            again_s = act()
            if again_s is None:
                moved_s = time.monotonic()
            else:
                at(time.monotonic() + again_s, act)

    async def _reach(self, when_s: float) -> None:
        """Until that moment of the monotonic clock."""
        wait_s = when_s - time.monotonic()
        await self.until(lambda: time.monotonic() >= when_s, max(0.0, wait_s) + START_S)

    def _victim(self, fault: Fault) -> Seat | None:
        """Whom a fault hits: who has the office; in place of another who is out, the next.

        None: nobody yet, too few of its group are at work, or who has the office is out and nobody
        has taken it.
        """
        if fault.target in self.seats and not self.seats[fault.target].group:
            return self.seats[fault.target]
        if fault.role is None:
            wanted = self.seats[fault.target]
        else:
            wanted = self._holder(fault.target, fault.role)
        row = self.members(wanted.group)
        row = row[row.index(wanted) :] + row[: row.index(wanted)]
        # Who is still starting is told to leave by nobody: there is nothing to leave.
        polite = fault.deed is Deed.leave
        seat = next((s for s in row if s.up and not (polite and not s.life.working)), None)
        if fault.role is not None and seat is not wanted:
            return None
        others = sum(s.up and s.life.working for s in row if s is not seat)
        return seat if others >= OUT_MAX else None

    def _holder(self, group: str, role: Role) -> Seat:
        """Who has the office by the latest plan that anybody of the group has told of."""
        plans = [
            plan
            for seat in self.members(group)
            if seat.up and (plan := seat.process.last("RoundPlanned"))
        ]
        latest = max(plans, key=lambda plan: (plan["round"], plan["epoch"]))
        others = [a for a in latest["aggregators"] if a != latest["coordinator"]]
        wanted = latest["coordinator"]
        if role is Role.aggregator and others:
            wanted = others[-1]
        ids = {s.process.id: s for s in self.members(group) if s.process.all("Started")}
        return ids.get(wanted, self.members(group)[0])

    def _strike(self, seat: Seat, deed: Deed) -> None:
        match deed:
            case Deed.kill | Deed.wipe:
                seat.process.signal(signal.SIGKILL)
                seat.life.end = deed
            case Deed.freeze:
                seat.process.signal(signal.SIGSTOP)
                seat.frozen = True
            case Deed.halt:
                for pid in [*seat.process.children(), seat.process.pid]:
                    _signal(pid, signal.SIGSTOP)
                seat.frozen = True
            case Deed.leave:
                seat.process.signal(signal.SIGINT)
                seat.life.end = deed

    def _undo(self, seat: Seat, blow: Blow) -> float | None:
        """Let it go on, or start it again; or say after how many seconds to ask again."""
        if blow.fault.deed in (Deed.freeze, Deed.halt):
            for pid in [seat.process.pid, *seat.process.children()]:
                _signal(pid, signal.SIGCONT)
            seat.frozen = False
            seat.life.returned_s = time.time()
        else:
            if seat.process.code is None:
                if time.time() - blow.struck_s > LEAVE_S:
                    raise AssertionError(f"{seat.process.name} stays:\n{seat.process.story()}")
                return POLL_S
            self._reap(seat)
            if blow.fault.deed is Deed.wipe:
                # Who was killed before it had made its folder has none.
                shutil.rmtree(self.folder / seat.name, ignore_errors=True)
            self.start(seat)
        return None

    def _reap(self, seat: Seat) -> None:
        """Take in a dead process's last words, and see that it died as it should have."""
        seat.process.read()
        polite = seat.life.end is Deed.leave
        expected = 0 if polite else -signal.SIGKILL
        assert seat.process.code == expected, f"exit {seat.process.code}:\n{seat.process.story()}"
        assert not polite or seat.process.all("Left"), seat.process.story()
        seat.process.end()

    async def leave(self) -> None:
        """All peers leave politely, then the bootstrap nodes; until the last process is gone."""
        await self._bid_leave(self.peers)
        await self._bid_leave(self.nodes)
        await self.until(lambda: not processes.running(self.family), LEAVE_S)

    async def _bid_leave(self, seats: Sequence[Seat]) -> None:
        for seat in seats:
            self._strike(seat, Deed.leave)
        await self.until(lambda: all(seat.process.code is not None for seat in seats))
        for seat in seats:
            self._reap(seat)

    # ── telling ──────────────────────────────────────────────────────────────────────────
    def lives(self, group: str | None = None) -> Iterator[Life]:
        """Of peers, in the order of their seats and times."""
        for seat in self.peers:
            if group is None or seat.group == group:
                yield from seat.lives

    def story(self) -> str:
        struck = [
            f"{b.struck_s - self.begun_s:6.1f} s: {b.fault.deed} {b.seat}" for b in self.blows
        ]
        said = [seat.process.story() for seat in self._begun()]
        return "\n".join(["struck:", *struck, *said])

    def end(self) -> None:
        """Kill whatever is left."""
        processes.kill_family(self.family)
        for seat in self._begun():
            seat.process.end()


def _yield_to_others(pid: int) -> None:
    """As on a machine with a GPU: training takes nothing from the event loop."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            nice = NICE if int(task.name) == pid else NICE_WORK
            os.setpriority(os.PRIO_PROCESS, int(task.name), nice)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@contextlib.asynccontextmanager
async def storm(
    folder: Path, groups: Mapping[str, Sequence[str]], nodes: Sequence[str]
) -> AsyncIterator[Storm]:
    """Processes of which nothing outlives the block."""
    it = Storm(folder, groups, nodes)
    try:
        yield it
    finally:
        it.end()
