"""A peer, put together: seat, network, run, training, and the driver between them.

    async with open_peer(PeerConfig(via=("/ip4/...",))) as peer:
        await peer.wait_round(10)

Whatever is opened here is closed here, in reverse order. Trouble that the owner can mend comes out
as a `PeerError` (inside an ExceptionGroup, as tasks are involved: write `except* PeerError`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from dht.directory import Directory
from peer import finding
from peer.addresses import check_addresses
from peer.checkpoint import CheckpointStore
from peer.config import PeerConfig
from peer.control import ControlServer
from peer.doctor.checkup import check_up
from peer.driver import AppliedFacts, Driver
from peer.elsewhere import tell_of_others
from peer.errors import DataError, RunNotFoundError, UsageError
from peer.exchange import NO, Exchange, Outcome, refuse
from peer.home import Seat, open_seat
from peer.incoming import Incoming
from peer.learner import TrainerLearner
from peer.manifest import Manifest, default_manifest
from peer.manifest_toml import stage_assets
from peer.mixing import Mixing
from peer.net.budget import UploadBudget
from peer.net.transport import Stream, Transport
from peer.observe import events as ev
from peer.observe.blocks import blocks_told
from peer.observe.hub import Hub
from peer.observe.jsonl import JsonlLog
from peer.observe.metrics import Metrics, serve_http
from peer.past import PastFile
from peer.presence import Presence, PresenceConfig
from peer.scores import Scores
from peer.train.means import Wish
from peer.train.method import DataSource, Method, SummingReducer
from peer.train.questions import build_questions
from peer.train.shared import departed, shares_now
from peer.train.trainer import Trainer, Training
from peer.transfer import serve_asset
from protocols.events import Leaving, RecordSeen, StateReady
from protocols.gossip import GossipConfig, GossipMachine
from protocols.group import GroupConfig, GroupMachine
from protocols.identity import Signer
from protocols.messages import AssetQuery, Plan
from protocols.sharding import Shares
from protocols.types import PeerId, RunId
from tensorcodecs.backend import warm_up
from tensorcodecs.chooser import Choice

Build = Callable[[Manifest, Path], tuple[Method, DataSource]]
"""(manifest, assets folder) -> what trains and on what; called in the training thread."""

PROGRESS_S: Final = 1.0
RETURN_WAIT_S: Final = 15.0  # a peer with a past looks for the others before it goes on alone
GOODBYE_S: Final = 2.0
END_LOOK_S: Final = 5.0  # between two looks at the calendar for the end of learning
HAND_OVER_S: Final = 20.0  # the last work gets inside in this time, or goes to others
LAST_WORDS_S: Final = 30.0  # an evaluation that has begun comes first; the thread is busy anyway


class Network(Protocol):
    """What a peer stands on: how it talks, and how it finds."""

    @property
    def transport(self) -> Transport: ...

    @property
    def directory(self) -> Directory: ...

    @property
    def budget(self) -> UploadBudget: ...

    async def close(self) -> None: ...


NetworkFactory = Callable[[PeerConfig, Seat, Signer, Hub], Any]
"""(config, seat, signer, hub) -> awaitable Network; `peer.net.network.open_libp2p` by default."""


class Peer:
    """A running peer: what an embedder holds."""

    def __init__(
        self, signer: Signer, seat: Seat, hub: Hub, manifest: Manifest, network: Network,
        machine: GroupMachine, learner: TrainerLearner,
    ) -> None:  # fmt: skip
        self.id = signer.peer_id
        self.seat = seat
        self.hub = hub
        self.manifest = manifest
        self.run: RunId = manifest.run_id()
        self.network = network
        self._machine = machine
        self._learner = learner
        self._left = asyncio.Event()
        self._changed = asyncio.Event()
        self._signer = signer
        self.scores: Scores | None = None
        hub.listen(self._note)

    @property
    def addresses(self) -> list[str]:
        """Where others reach this peer; any of them serves as their `via`."""
        return self.network.transport.addresses()

    @property
    def round(self) -> int:
        """Rounds of history in the state."""
        return self._learner.round

    @property
    def digest(self) -> bytes:
        """Of the outer state; equal on all peers of a group at the same round."""
        return self._learner.digest

    @property
    def members(self) -> list[PeerId]:
        """Live members of the group, this peer included."""
        return self._machine.live_members(time.monotonic())

    def status(self) -> dict[str, Any]:
        """What `peer status` shows: plain JSON values."""
        machine = self._machine
        now_s = time.monotonic()
        others = [
            {
                "peer": n.record.peer,
                "group": n.group,
                "round": n.round or n.record.round,
                "ready": n.ready,
                "suspected": n.suspected,
                "heard_s_ago": round(now_s - n.heard_s, 1) if n.heard_s > 0 else None,
                "rtt_ms": round(n.rtt_s * 1000, 1) if n.rtt_s is not None else None,
            }
            for n in machine.members.everybody()
        ]
        return {
            **self.hub.snapshot(),
            "peer": self.id,
            "run": self.run,
            "seat": str(self.seat.folder),
            "addresses": self.addresses,
            "phase": machine.phase,
            "round": self.round,
            "epoch": machine.epoch,
            "digest": self.digest.hex(),
            "method": _facts(self._learner.method),
            "group": machine.group,
            "group_members": self.members,
            "coordinator": machine.coordinator(now_s),
            "dht_nodes": self.network.directory.size(),
            "lane": getattr(self.network.transport, "status", dict)(),
            "reach": getattr(self.network.transport, "reach_status", dict)(),
            "network": others,
        }

    async def wait_round(self, number: int) -> None:
        """Until the state holds `number` rounds."""
        while self.round < number:
            self._changed.clear()
            await self._changed.wait()

    async def save(self) -> str:
        """Write a checkpoint now; its path."""
        if self.round == 0 or not self._machine.ready:
            return ""
        await self._learner.save()
        latest = CheckpointStore(checkpoints(self.seat, self.run), read_only=True).path_of_latest()
        return str(latest) if latest is not None else ""

    def leave(self) -> None:
        """Ask the peer to leave politely; `open_peer`'s block may end then."""
        self._left.set()

    async def wait_left(self) -> None:
        """Until somebody asked the peer to leave."""
        await self._left.wait()

    def _note(self, event: ev.Event) -> None:
        if isinstance(event, ev.RoundFinished | ev.StateReceived):
            self._changed.set()


def checkpoints(seat: Seat, run: RunId) -> Path:
    return seat.run_folder(run) / "checkpoints"


@asynccontextmanager
async def open_peer(
    config: PeerConfig,
    *,
    hub: Hub | None = None,
    build: Build | None = None,
    network: NetworkFactory | None = None,
    training: Training | None = None,
) -> AsyncIterator[Peer]:
    """Join (or start) a run and train for the block's length.

    `build`: your own method and data source; `network`: another network than libp2p; `training`:
    what makes the steps, on data that is in no ledger, where the peer does not by itself.

    Raises:
        PeerError: in an ExceptionGroup; what the owner can mend, with the next step.
    """
    hub = hub or Hub()
    async with AsyncExitStack() as stack:
        seat = stack.enter_context(open_seat(config.home, config.seat))
        stack.callback(hub.listen(stack.enter_context(JsonlLog(seat.log_path, announce=hub.emit))))
        metrics = Metrics()
        stack.callback(hub.listen(metrics))
        signer = seat.identity()
        for notice in seat.notices:
            hub.emit(ev.Notice("warning", notice))
        check_addresses(config.via)
        loop = asyncio.get_running_loop()

        def say(text: str) -> None:
            loop.call_soon_threadsafe(hub.emit, ev.Notice("info", text))

        # Beside the network's own start: no round may wait for a compiler.
        warming = asyncio.create_task(asyncio.to_thread(warm_up, say), name="codec")
        net: Network = await (network or _libp2p)(config, seat, signer, hub)
        await warming
        stack.push_async_callback(net.close)
        metrics.lanes = getattr(net.transport, "counters", metrics.lanes)
        async with asyncio.TaskGroup() as tasks:
            connector = finding.Connector(
                net.transport, net.directory, hub.emit, lambda a: _remember_via(seat, a)
            )
            via = list(dict.fromkeys((*config.via, *seat.memory.via)))
            chores = [
                tasks.create_task(connector.keep(address), name=f"via {address}")
                for address in via
                if address not in net.transport.addresses()
            ]
            manifest, first = await _choose_run(config, seat, net, connector, bool(chores), hub)
            seat.remember(run=manifest.run_id())
            peer, driver, founded_ms = await _assemble(
                config, seat, signer, hub, manifest, net, connector, first, build, training, stack
            )
            if config.metrics_port is not None:
                health = _health(peer)
                port = await stack.enter_async_context(
                    serve_http(metrics.registry, health, port=config.metrics_port)
                )
                hub.emit(ev.Notice("info", f"metrics at http://127.0.0.1:{port}/metrics"))
            await stack.enter_async_context(ControlServer(seat.control_path, _verbs(peer)))
            metrics.method = functools.partial(_facts, peer._learner.method)
            keeper = _Keeper(config, peer, driver, founded_ms)
            chores += keeper.start(tasks)
            _announce(peer, config)
            if via:
                chores.append(
                    tasks.create_task(_check_up(net.transport, connector, hub), name="check-up")
                )
            polite = False
            try:
                yield peer
                polite = True
            finally:
                reason = "asked to leave" if peer._left.is_set() else "closing"
                await keeper.stop(reason, polite=polite)
                for chore in chores:
                    chore.cancel()
                await driver.exchange.close()
                hub.emit(ev.Left(reason))


async def _libp2p(config: PeerConfig, seat: Seat, signer: Signer, hub: Hub) -> Network:
    from peer.net.network import open_libp2p  # imports hivemind and torch: two seconds

    return await open_libp2p(config, seat.folder, signer, hub.emit)


# ── the run ──────────────────────────────────────────────────────────────────────────────
async def _choose_run(
    config: PeerConfig, seat: Seat, net: Network, connector: finding.Connector,
    has_via: bool, hub: Hub,
) -> tuple[Manifest, bool]:  # fmt: skip
    """Start the given run, go on with the remembered one, or find one through `via`.

    The flag says whether this peer is the first of the run, for all that is known.
    """
    if config.manifest is not None:
        return config.manifest, True
    remembered = seat.memory.run
    wanted = config.run
    if wanted is None and not config.via and remembered is not None:
        wanted = remembered
    if wanted is not None and len(wanted) == 64:
        manifest = finding.saved_manifest(seat.run_folder(wanted))
        if manifest is not None:
            return manifest, not has_via
    elif wanted is not None and remembered is not None and remembered.startswith(wanted):
        manifest = finding.saved_manifest(seat.run_folder(remembered))
        if manifest is not None:
            return manifest, not has_via
    if not has_via:
        if config.run is not None:
            raise RunNotFoundError(
                f"run {config.run[:64]!r} is not on this machine; give the address of somebody who"
                " trains it: --via ADDRESS"
            )
        return default_manifest(), True
    await connector.answered.wait()
    before = None if remembered is None else finding.readable_manifest(seat, RunId(remembered))
    return await finding.find_manifest(net.directory, wanted, default_manifest, hub.emit, before)


def _remember_via(seat: Seat, address: str) -> None:
    seat.remember(via=(address, *seat.memory.via))


async def _assemble(
    config: PeerConfig, seat: Seat, signer: Signer, hub: Hub, manifest: Manifest, net: Network,
    connector: finding.Connector, first: bool, build: Build | None,
    training: Training | None, stack: AsyncExitStack,
) -> tuple[Peer, Driver, int]:  # fmt: skip
    """Files, model, state and machine of the run."""
    run = manifest.run_id()
    folder = seat.run_folder(run)
    finding.save_manifest(folder, manifest)
    assets = folder / "assets"
    if config.files:
        await asyncio.to_thread(stage_assets, config.files, assets)
    await finding.fetch_assets(manifest, assets, net.transport, net.directory, hub.emit)
    store = CheckpointStore(folder / "checkpoints")
    learner = TrainerLearner(
        signer.peer_id,
        functools.partial(build, manifest, assets)
        if build
        else functools.partial(build_run, manifest, assets, config, signer, _saying(hub)),
        store,
        hub.emit,
        run=run,
        own_data=bool(config.data) or training is not None,
        batch_size=manifest.inner.batch_size,
        seed=manifest.model.seed,
        threads=config.threads,
        checkpoint_every=manifest.schedule.checkpoint_every * manifest.schedule.fragments,
        local_steps=manifest.outer.local_steps if manifest.outer.asynchronous else 0,
        training=training or Trainer,
        questions=functools.partial(build_questions, manifest, assets, own_data=bool(config.data)),
    )
    await learner.open()
    stack.push_async_callback(learner.close, save=False)
    reducer = learner.method.reducer()
    machine = GroupMachine(
        signer.peer_id,
        GroupConfig(
            run=run,
            units=learner.method.units,
            fragments=learner.method.fragments,
            site=config.site,
            members_max=manifest.group.members_max,
            aggregators_max=manifest.group.aggregators_max,
            round_s=manifest.schedule.round_s / manifest.schedule.fragments,
            round_s_max=manifest.schedule.longest_round_s / manifest.schedule.fragments,
            exchange_share=manifest.schedule.exchange_share,
            exchange_s=manifest.schedule.exchange_s,
            quorum=manifest.group.quorum,
            collect=isinstance(reducer, SummingReducer),
        ),
        time.monotonic(),
    )

    def codec_chosen(to: PeerId, span: int, choice: Choice) -> None:
        hub.emit(
            ev.CodecChosen(
                to, span, choice.codec, choice.bytes, choice.seconds, choice.fits, choice.reason
            )
        )

    exchange = Exchange(
        net.transport, signer, reducer, codec_chosen,
        rounds_kept=machine.config.rounds_kept,
    )  # fmt: skip
    peer = Peer(signer, seat, hub, manifest, net, machine, learner)
    founded_ms = seat.memory.founded_ms or int(time.time() * 1000)
    seat.remember(founded_ms=founded_ms)

    async def give_asset(stream: Stream, query: AssetQuery) -> None:
        if query.name not in {asset.name for asset in manifest.assets}:
            await refuse(stream, NO, "the run has no such file")
            return
        await serve_asset(stream, assets / query.name, query.offset)

    driver = Driver(
        machine, net.transport, signer, exchange, learner, hub.emit, serve_asset=give_asset,
        incoming=Incoming(folder / "incoming"),
    )  # fmt: skip
    peer.scores = Scores(machine, net.transport, signer, run, hub.emit, driver.refused)
    driver.before = peer.scores.before
    schedule, method = manifest.schedule, learner.method
    if schedule.gossip_every and method.mixes is not None:
        gossip = GossipConfig(
            run=run,
            units=method.units,
            every=schedule.gossip_every * schedule.fragments,
            fragments=schedule.fragments,
            slots=schedule.gossip_slots or manifest.group.aggregators_max,
            round_s=schedule.round_s,
            exchange_s=schedule.exchange_s,
        )
        driver.mixing = Mixing(
            GossipMachine(signer.peer_id, gossip), driver, net.directory, learner, method.mixer()
        )
        exchange.riding = driver.mixing.riding
    if learner.restored and not first:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RETURN_WAIT_S):
                await connector.answered.wait()
                await _look_around(net, driver)
    past = PastFile(folder / "past.json", lambda what: hub.emit(ev.Notice("error", what)))
    stack.push_async_callback(past.close)
    driver.remember = past.keep
    if (remembered := past.load()) is not None:
        driver.feed(remembered)
    if first or learner.restored:
        driver.feed(StateReady(learner.round, learner.digest))
    return peer, driver, founded_ms


async def _look_around(net: Network, driver: Driver) -> None:
    """Read who is there: who knows its company from the start waits for it before it plans."""
    remember = getattr(net.transport, "remember", None)
    for record in await net.directory.members(driver.machine.config.run):
        if record.peer != driver.machine.me:
            if remember is not None:
                remember(record.peer, record.addresses)
            driver.feed(RecordSeen(record))


def _saying(hub: Hub) -> Callable[[str], None]:
    """Notices for people from other threads than the event loop's, whose the hub is."""
    loop = asyncio.get_running_loop()

    def say(text: str) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(hub.emit, ev.Notice("info", text))

    return say


def build_run(
    manifest: Manifest,
    assets: Path,
    config: PeerConfig,
    signer: Signer | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Method, DataSource]:
    """Method and data as the manifest says. Takes seconds: runs in the training thread.

    `signer`, `say`: see `build_method`.
    """
    from peer.train import build_data, build_method, build_tokenizer

    wish = Wish.parse(config.method)
    if manifest.method.kind != "hybrid" and wish.kind != "auto":
        raise UsageError(
            f"--method {config.method}: this run is {manifest.method.kind}, where all peers train"
            " alike; leave --method away"
        )
    tokenizer = build_tokenizer(manifest, assets)
    data = build_data(manifest, assets, tokenizer, config.data)
    method = build_method(
        manifest, assets, config.device, config.threads, wish=wish, upload_bps=config.upload_bps,
        signer=signer, say=say,
    )  # fmt: skip
    return method, data


# ── chores ───────────────────────────────────────────────────────────────────────────────
class _Keeper:
    """The peer's standing tasks: presence, progress, rounds' reports, training's health."""

    def __init__(self, config: PeerConfig, peer: Peer, driver: Driver, founded_ms: int) -> None:
        self._config = config
        self._peer = peer
        self._driver = driver
        self._learner = peer._learner
        self._machine = peer._machine
        self._hub = peer.hub
        self._presence = Presence(
            PresenceConfig(
                run=peer.run,
                manifest=peer.manifest.to_canonical(),
                name=peer.manifest.name,
                site=config.site,
                upload_bps=config.upload_bps,
                founded_ms=founded_ms,
            ),
            driver,
            peer.network.directory,
            peer.hub.emit,
        )
        self._finished: asyncio.Queue[
            tuple[int, AppliedFacts, list[Outcome], Plan | None, float]
        ] = asyncio.Queue(maxsize=64)
        self._bytes = (0, 0)
        self._leaving = False
        self._waited_s = 0.0
        self._shares: Shares | None = None
        self._applied = asyncio.Event()
        self._learner.departed = functools.partial(departed, self._machine)
        self._plan: Plan | None = None
        driver.on_plan = self._planned
        driver.round_finished = self._round_finished

    def start(self, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        self._presence.issue_record()
        works = {
            "driver": self._driver.run(),
            "progress": self._keep_progress(),
            "rounds": self._keep_rounds(),
            "blocks": self._keep_blocks(),
            "training": self._learner.failed(),
            **({"end": self._tell_the_end()} if self._peer.manifest.inner.ends else {}),
            **{name: work() for name, work in self._presence.works().items()},
        }
        if self._config.run is None and self._config.manifest is None:
            works["elsewhere"] = tell_of_others(
                self._peer.run, self._peer.manifest.name, self._peer.network.directory,
                self._alone, self._hub.emit,
            )  # fmt: skip
        return [tasks.create_task(work, name=name) for name, work in works.items()]

    def _alone(self) -> bool:
        return all(n.left or n.suspected for n in self._machine.members.everybody())

    async def stop(self, reason: str, *, polite: bool) -> None:
        """Hand over (if `polite`), say goodbye and save; the second Ctrl-C cuts this short."""
        self._leaving = True
        if polite and self._machine.ready:
            await self._hand_over()
        self._driver.feed(Leaving(reason))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                await self._driver.posted()
        # A round that was just applied is in the state that is saved, so it is told, too.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await self._driver.settled()
                await self._finished.join()
        if self._learner.round > 0 and self._machine.ready:
            await self._learner.save()

    # ── whose blocks ─────────────────────────────────────────────────────────────────────
    def _planned(self, plan: Plan) -> None:
        self._plan = plan

    async def _keep_blocks(self) -> None:
        """Share the data out among the plan's roster and the other groups."""
        while True:
            if self._machine.ready:
                shares = shares_now(self._machine, self._plan)
                if self._shares is None or not shares.same_as(self._shares):
                    self._shares = shares
                    await self._learner.share(shares)
                if not self._leaving:
                    self._learner.start()
            await asyncio.sleep(0.2)

    async def _hand_over(self) -> None:
        """Wait until the last of our work is inside; what isn't by then goes back to the others."""
        begun_s = time.monotonic()
        current = self._machine.current
        if current is not None and current.training and current.due_s - begun_s > HAND_OVER_S:
            return  # a long round: whoever wants to go is not kept
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HAND_OVER_S):
                while await self._learner.finish():
                    self._applied.clear()
                    await self._applied.wait()

    # ── telling ──────────────────────────────────────────────────────────────────────────
    async def _tell_the_end(self) -> None:
        """Say once that nothing is learned any more."""
        inner = self._peer.manifest.inner
        while True:
            await asyncio.sleep(END_LOOK_S)
            if inner.rate_at(time.time()) == 0:
                break
        self._hub.emit(
            ev.Notice(
                "info",
                f"this run's learning ended at {inner.ends}: groups come together from here on, "
                "and `python -m peer export` writes the model",
            )
        )
        await asyncio.Event().wait()

    def _round_finished(
        self, number: int, facts: AppliedFacts, held: list[Outcome], plan: Plan | None, s: float
    ) -> None:
        self._applied.set()
        if facts.counted is not None:
            for event in blocks_told(self._machine.group, facts.counted):
                self._hub.emit(event)
        if self._finished.full():
            self._finished.get_nowait()
            self._finished.task_done()
        self._finished.put_nowait((number, facts, held, plan, s))

    async def _keep_rounds(self) -> None:
        schedule = self._peer.manifest.schedule
        every = schedule.evaluate_every * schedule.fragments
        while True:
            number, facts, held, plan, seconds = await self._finished.get()
            validation = None
            if every and number % every == 0 and not self._leaving:
                loss = await self._learner.evaluate()
                validation = None if math.isnan(loss) else loss  # nothing is held out
            self._hub.emit(self._report(number, facts, held, plan, seconds, validation))
            self._finished.task_done()
            await self._learner.after_round()
            if every and number % every == 0 and not self._leaving:
                await self._score(number, plan)

    async def _score(self, number: int, plan: Plan | None) -> None:
        """Score our share of the run's questions, and tell the group."""
        scores, me = self._peer.scores, self._peer.id
        if not self._peer.manifest.evaluation.rows or scores is None:
            return
        roster = sorted({me, *(plan.peers if plan is not None else ())})
        try:
            score = await self._learner.score(roster.index(me), len(roster))
        except DataError as error:
            self._hub.emit(ev.Notice("error", f"{error} (nothing is scored; training goes on)"))
            return
        if score is not None:
            await scores.tell(number, score, roster)

    def _report(
        self, number: int, facts: AppliedFacts, held: list[Outcome], plan: Plan | None,
        seconds: float, validation: float | None,
    ) -> ev.RoundFinished:  # fmt: skip
        roster = plan.peers if plan is not None else []
        budget = self._peer.network.budget
        before, self._bytes = self._bytes, (budget.bytes_up, budget.bytes_down)
        stats = self._learner.stats()
        taken = self._driver.taken(number)
        waited_before_s, self._waited_s = self._waited_s, self._learner.waited_s()
        return ev.RoundFinished(
            group=self._machine.group,
            round=number,
            epoch=plan.epoch if plan is not None else 0,
            roster=list(roster),
            spans=[span_report(outcome, len(roster), plan) for outcome in held],
            included=facts.included,
            digest=facts.digest.hex(),
            loss=taken.loss if taken is not None and not math.isnan(taken.loss) else None,
            validation_loss=validation,
            tokens_per_s=stats.tokens_per_s,
            bytes_up=self._bytes[0] - before[0],
            bytes_down=self._bytes[1] - before[1],
            waited_s=self._waited_s - waited_before_s,
            seconds=seconds,
        )

    async def _keep_progress(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            stats = self._learner.stats()
            now_s = time.monotonic()
            current = self._machine.current
            plan = current.plan if current is not None else self._plan
            due_s = current.due_s - now_s if current is not None and current.training else 0.0
            budget = self._peer.network.budget
            self._hub.emit(
                ev.Progress(
                    self._learner.round,
                    self._machine.epoch,
                    stats.loss,
                    stats.tokens_per_s,
                    stats.steps,
                    max(0.0, due_s),
                    self._machine.phase,
                    self._machine.group,
                    list(self._peer.members),
                    [span.aggregator for span in plan.spans] if plan is not None else [],
                    self._machine.coordinator(now_s) or "",
                    budget.bytes_up,
                    budget.bytes_down,
                    self._learner.waited_share(),
                )
            )


def span_report(outcome: Outcome, members: int, plan: Plan | None) -> ev.SpanReport:
    """The proof of one span, for people."""
    header = outcome.header
    size = header.stop - header.start
    inside = sum(
        sum(byte.bit_count() for byte in c.mask) if c.mask else size for c in header.contributors
    )
    return ev.SpanReport(
        header.span,
        header.start,
        header.stop,
        outcome.signed.signer,
        header.epoch,
        {c.peer: c.weight for c in header.contributors},
        inside / (size * members) if members else 0.0,
        header.content_bytes,
        header.seconds,
        header.content.hex(),
    )


async def _check_up(transport: Transport, connector: finding.Connector, hub: Hub) -> None:
    """Once somebody has answered, what they say of our clock and our line; where libp2p is."""
    connected = getattr(transport, "connected", None)
    if connected is not None:
        await connector.answered.wait()
        await check_up(transport, await connected(), hub.emit)


# ── words and verbs ──────────────────────────────────────────────────────────────────────
def _announce(peer: Peer, config: PeerConfig) -> None:
    addresses = peer.addresses
    via = addresses[0] if addresses else "ADDRESS"
    method = peer._learner.method
    peer.hub.emit(
        ev.Started(
            peer.id,
            peer.run,
            peer.manifest.name,
            addresses,
            f"python -m peer join --via {via} --run {peer.run[:12]}",
            str(getattr(method, "device", "cpu")),
            int(getattr(method, "parameters", 0)),
            str(peer.seat.folder),
        )
    )
    if facts := _facts(method):
        peer.hub.emit(ev.Notice("info", f"this peer trains {facts['does']}: {facts['why']}"))


def _facts(method: Method) -> dict[str, Any]:
    """What the method tells of itself: a hybrid one what this peer does and why."""
    facts: Callable[[], dict[str, Any]] = getattr(method, "facts", dict)
    return facts()


def _health(peer: Peer) -> Callable[[], dict[str, Any]]:
    def health() -> dict[str, Any]:
        return {
            "ok": peer._machine.ready,
            "peer": peer.id,
            "run": peer.run,
            "phase": peer._machine.phase,
            "round": peer.round,
            "members": len(peer.members),
        }

    return health


def _verbs(peer: Peer) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """What other commands may ask over the control socket."""

    async def status(_: dict[str, Any]) -> dict[str, Any]:
        return peer.status()

    async def leave(_: dict[str, Any]) -> dict[str, Any]:
        peer.leave()
        return {"leaving": True, "peer": peer.id}

    async def save(_: dict[str, Any]) -> dict[str, Any]:
        return {"checkpoint": await peer.save(), "round": peer.round}

    return {"status": status, "leave": leave, "save": save}
