"""One simulated peer: the product's own parts on a simulated machine, started, stopped and broken.

A node's tasks run as one process of the loop, so a freeze holds all of them. Killing it cuts its
transport first, and then its tasks unwind in silence: nothing that they say any more is heard.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from peer.driver import Driver
from peer.exchange import NO, Exchange, Outcome, refuse
from peer.mixing import Mixing
from peer.net.transport import Stream
from peer.observe import events as ev
from peer.presence import Presence, PresenceConfig
from peer.simulate.books import History
from peer.simulate.directory import SimDirectory
from peer.simulate.learner import Disk, SimLearner, SimMixer, SimReducer, SimStream
from peer.simulate.liars import LyingTransport
from peer.simulate.loop import PROCESS, LoopClock
from peer.simulate.network import Machine, SimTransport
from peer.simulate.scenario import Lie, PeerSpec
from peer.simulate.signing import FastSigner
from peer.train.shared import departed, shares_now
from protocols.events import Leaving, Remembered, StateReady
from protocols.gossip import GossipConfig, GossipMachine
from protocols.group import GroupConfig, GroupMachine
from protocols.identity import Signer
from protocols.ledger import Counted, Ledger
from protocols.messages import AssetQuery, Plan
from protocols.sharding import Shares

if TYPE_CHECKING:
    from peer.simulate.world import World

SHARE_LOOK_S: Final = 1.0
HAND_OVER_S: Final = 20.0
READY_LOOK_S: Final = 0.2  # as the peer's own chore: training begins once there is a state
GOODBYE_S: Final = 2.0
RETURN_WAIT_S: Final = 15.0  # a peer with a past looks for the others before it goes on alone


class Node:
    """A peer of the simulation. All methods are called outside of its own process."""

    def __init__(self, world: World, index: int, spec: PeerSpec) -> None:
        self.world = world
        self.index = index
        self.spec = spec
        seed = hashlib.sha256(f"peer {index}".encode()).digest()
        key = world.fast_key
        self.signer = Signer(seed) if key is None else FastSigner(seed, key)
        self.id = self.signer.peer_id
        self.machine: Machine = world.network.machine(index, self.id, spec.up_bps, spec.down_bps)
        self.clock = LoopClock(world.loop, world.epoch_s, spec.skew_s)
        self.disk = Disk()
        self.frozen = False
        self._leaving = False
        self._again = False
        """Started while it was still leaving."""
        self.lives = 0
        """How often it was started."""
        self.driver: Driver | None = None
        self.learner: SimLearner | None = None
        self.directory: SimDirectory | None = None
        self.dht_reads = 0
        self.dht_writes = 0
        self.trained_s = 0.0
        """In all its lives."""
        self._transport: SimTransport | None = None
        self._task: asyncio.Task[None] | None = None
        self._frozen_s = 0.0
        self._frozen_trained_s = 0.0
        self._founded_ms = 0

    # ── what a judge sees ────────────────────────────────────────────────────────────────
    @property
    def alive(self) -> bool:
        return self.driver is not None

    @property
    def group(self) -> GroupMachine | None:
        """The machine of the running process."""
        return self.driver.machine if self.driver is not None else None

    @property
    def phase(self) -> str:
        """dead, frozen, looking, syncing, training or exchanging."""
        if self.driver is None:
            return "dead"
        return "frozen" if self.frozen else self.driver.machine.phase

    def training_s(self) -> float:
        """Seconds of training so far, in all its lives."""
        if self.learner is None:
            return self.trained_s
        running_s = self._frozen_trained_s if self.frozen else self.learner.trained_s()
        return self.trained_s + running_s

    # ── life ─────────────────────────────────────────────────────────────────────────────
    def start(self) -> None:
        if self._task is not None:
            self._again = self._leaving
            return
        self.lives += 1
        self._leaving = False
        context = contextvars.copy_context()
        context.run(PROCESS.set, self.index)
        loop = self.world.loop
        self._task = context.run(loop.create_task, self._live(), name=f"node {self.index}")
        self._task.add_done_callback(self._ended)

    def kill(self, *, dark: bool = False, wipe: bool = False) -> None:
        """The process is gone at once."""
        if self._task is None:
            return
        self.thaw()
        task, self._task = self._task, None
        self._retire(dark=dark)
        task.remove_done_callback(self._ended)
        task.cancel()
        if wipe:
            self.disk.state, self.disk.ledger, self.disk.past = None, b"", None

    def leave(self) -> None:
        """Hand over what is in flight, and say goodbye."""
        if self.driver is None or self.learner is None or self._transport is None or self.frozen:
            return
        work = self._go(self.driver, self.learner, self.lives)
        context = self._transport.context
        context.run(self.world.loop.create_task, work, name=f"node {self.index} leaves")

    async def _go(self, driver: Driver, learner: SimLearner, life: int) -> None:
        self._leaving = True
        current = driver.machine.current
        long = current is not None and current.training
        if (
            driver.machine.ready
            and learner.stream is not None
            and not (
                long
                and current is not None
                and current.due_s - self.clock.monotonic() > HAND_OVER_S
            )
        ):
            applied = asyncio.Event()
            driver.round_finished = lambda *_: applied.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HAND_OVER_S):
                    while await learner.finish():
                        applied.clear()
                        await applied.wait()
        if self.driver is not driver:
            return  # killed meanwhile: who is gone says nothing
        driver.feed(Leaving("asked to leave"))
        await asyncio.sleep(GOODBYE_S)
        if self.lives == life:
            self.world.loop.call_soon(self._gone, context=contextvars.Context())

    def _gone(self) -> None:
        again, self._again = self._again, False
        self.kill()
        if again:
            self.start()

    def freeze(self) -> None:
        if self.alive and not self.frozen:
            self._frozen_trained_s = self.learner.trained_s() if self.learner is not None else 0.0
            self.frozen = True
            self._frozen_s = self.world.loop.time()
            self.world.loop.freeze(self.index)

    def thaw(self) -> None:
        if self.frozen:
            self.frozen = False
            if self.learner is not None:
                self.learner.froze(self.world.loop.time() - self._frozen_s)
            self.world.loop.thaw(self.index)

    def _retire(self, *, dark: bool) -> None:
        if self.learner is not None:
            self.trained_s += self.learner.trained_s()
        if self.directory is not None:
            self.dht_reads += self.directory.reads
            self.dht_writes += self.directory.writes
            self.directory.vanish()
        if self._transport is not None:
            self._transport.kill(dark=dark)
        self.driver = self.learner = self.directory = self._transport = None

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A node ends only when it is told to: anything else is a bug."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.world.failed(error)

    # ── the process ──────────────────────────────────────────────────────────────────────
    async def _live(self) -> None:
        world, scenario, spec = self.world, self.world.scenario, self.spec
        loop, clock = world.loop, self.clock
        rng = random.Random(f"{scenario.seed} node {self.index} life {self.lives}")
        if spec.lie is Lie.honest:
            transport: SimTransport = SimTransport(world.network, self.machine)
        else:
            transport = LyingTransport(world.network, self.machine, spec.lie, self.signer, rng)
        self._transport = transport
        alive = True

        def emit(event: ev.Event) -> None:
            if alive and not transport.dead:
                world.told(self, event)

        def applied(
            number: int,
            outcomes: Sequence[Outcome],
            plan: Plan | None,
            before: History,
            after: History,
        ) -> None:
            if not transport.dead:
                world.judge.applied(self, number, outcomes, plan, before, after)

        machine = GroupMachine(
            self.id,
            GroupConfig(
                run=world.run_id,
                units=scenario.units,
                fragments=scenario.cut(),
                site=spec.site,
                members_max=scenario.members_max,
                aggregators_max=scenario.aggregators_max,
                round_s=scenario.round_s / scenario.fragments,
                round_s_max=scenario.round_s_max / scenario.fragments,
                exchange_s=scenario.exchange_s,
                quorum=scenario.quorum,
                collect=scenario.collect,
            ),
            clock.monotonic(),
        )
        load = world.load_of(spec)
        reducer = SimReducer(loop.charge, load.unit_s)
        exchange = Exchange(
            transport, self.signer, reducer, clock=clock, weigh=lambda _: load.unit_bytes,
            rounds_kept=machine.config.rounds_kept,
        )  # fmt: skip
        stream = None
        if scenario.blocks:
            stream = SimStream(world.run_id, self.id, scenario.blocks, scenario.cut())

        def counted(after: History, what: Counted, ledger: Ledger) -> None:
            if not transport.dead:
                world.judge.ledgers.counted(self, after, what, ledger)

        learner = SimLearner(
            self.index,
            self.id,
            load,
            world.books,
            self.disk,
            loop,
            applied,
            scenario.cut(),
            stream,
            counted,
        )
        learner.departed = functools.partial(departed, machine)
        directory = SimDirectory(
            world.board, self.id, lambda: world.entrances(self), rng, scenario.dht_failure
        )
        driver = Driver(
            machine, transport, self.signer, exchange, learner, emit,
            serve_asset=_no_assets, clock=clock,
        )  # fmt: skip
        if scenario.gossip_every:
            gossip = GossipConfig(
                run=world.run_id,
                units=scenario.units,
                every=scenario.gossip_every * scenario.fragments,
                fragments=scenario.fragments,
                slots=scenario.gossip_slots,
                round_s=scenario.round_s,
                exchange_s=scenario.exchange_s,
            )
            driver.mixing = Mixing(
                GossipMachine(self.id, gossip), driver, directory, learner, SimMixer()
            )
            exchange.riding = driver.mixing.riding
        self._founded_ms = self._founded_ms or int(clock.time() * 1000)
        presence = Presence(
            PresenceConfig(
                run=world.run_id,
                manifest=world.manifest,
                name="simulated",
                site=spec.site,
                upload_bps=spec.up_bps if scenario.budgets else None,
                founded_ms=self._founded_ms,
            ),
            driver,
            directory,
            emit,
            clock=clock,
            rng=rng,
        )
        self.driver, self.learner, self.directory = driver, learner, directory
        first = self.index == 0 and self.lives == 1

        def remember(past: Remembered) -> None:
            if not transport.dead:
                self.disk.past, self.disk.past_s = past, clock.time()

        driver.remember = remember
        if learner.restored:
            await self._look_around(directory)
        if self.disk.past is not None:
            gone_s = max(0.0, clock.time() - self.disk.past_s)
            driver.feed(dataclasses.replace(self.disk.past, silent_s=gone_s))
        if first or learner.restored:
            driver.feed(StateReady(learner.round, learner.digest))
        presence.issue_record()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(driver.run(), name="driver")
                for name, work in presence.works().items():
                    tasks.create_task(work(), name=name)
                tasks.create_task(self._keep_training(driver, learner), name="training")
        finally:
            alive = False
            with contextlib.suppress(asyncio.CancelledError):
                await exchange.close()

    async def _look_around(self, directory: SimDirectory) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RETURN_WAIT_S):
                while not directory.size():  # noqa: ASYNC110  (it has no event for that)
                    await asyncio.sleep(0.5)

    async def _keep_training(self, driver: Driver, learner: SimLearner) -> None:
        """As the peer's own chore: share the data out, and begin to train once there is a state."""
        machine = driver.machine
        plans: list[Plan] = []
        driver.on_plan = lambda plan: plans.__setitem__(slice(None), [plan])
        shares: Shares | None = None
        while True:
            if machine.ready and not machine.leaving:
                if learner.stream is not None:
                    now = shares_now(machine, plans[0] if plans else None)
                    if shares is None or not now.same_as(shares):
                        shares = now
                        await learner.share(shares)
                if not self._leaving:
                    learner.start()
                if learner.stream is None:
                    return
            await asyncio.sleep(SHARE_LOOK_S if machine.ready else READY_LOOK_S)


async def _no_assets(stream: Stream, query: AssetQuery) -> None:
    await refuse(stream, NO, "the run has no such file")
