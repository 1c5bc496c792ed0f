"""How a peer is known and knows others: its record, the members it reads, the state it waits for.

Three standing tasks beside the driver, on any directory and any clock: the simulator runs them too.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from dht.directory import Directory
from peer import finding
from peer.capacity import Capacity
from peer.clock import SYSTEM, Clock
from peer.driver import Driver
from peer.observe import events as ev
from protocols import limits
from protocols.cells import rank
from protocols.events import RecordIssued, RecordSeen, StateReady
from protocols.records import PeerRecord, sign_record
from protocols.types import PeerId, RunId

MEMBERS_READ_S: Final = 2.0  # while there is nobody, and ...
MEMBERS_READ_S_MAX: Final = 60.0  # ... longer and longer once there is company; in long rounds
# as seldom as all standing chores (`GroupMachine.chores_s`)
RECORD_LIVES: Final = limits.RECORD_TTL_S / limits.RECORD_REFRESH_S  # refreshes; two may fail
STRANGERS_EVERY: Final = 4  # reads of our neighbourhood to one of groups anywhere: far round trips
# hold the map of coordinates together
STRANGERS: Final = 2
STATE_LOOK_S: Final = 1.0
STATE_TOLD_S: Final = 30.0


@dataclass(frozen=True, kw_only=True)
class PresenceConfig:
    """What of the manifest and the owner's wishes others get to see."""

    run: RunId
    manifest: bytes
    """Canonical; announced once we hold the run's state."""
    name: str
    """Of the run."""
    site: str
    upload_bps: float | None
    founded_ms: int
    """When this peer first joined the run."""


class Presence:
    """The tasks in `works`; each runs until it is cancelled."""

    def __init__(
        self,
        config: PresenceConfig,
        driver: Driver,
        directory: Directory,
        emit: ev.Listener,
        *,
        clock: Clock = SYSTEM,
        rng: random.Random | None = None,
    ) -> None:
        """`rng`: spreads reads of the directory; one of its own by default."""
        self._config = config
        self._driver = driver
        self._machine = driver.machine
        self._directory = directory
        self._emit = emit
        self._clock = clock
        self._rng = rng or random.Random()
        self._publish = asyncio.Event()
        self._record: PeerRecord | None = None
        self._is_contact = False
        self._capacity = Capacity(config.upload_bps)
        driver.publish = self._publish.set

    def works(self) -> dict[str, Callable[[], Coroutine[Any, Any, None]]]:
        """The tasks by their names."""
        return {
            "record": self.keep_record,
            "members": self.keep_members,
            "state": self.wait_for_state,
        }

    # ── the record ───────────────────────────────────────────────────────────────────────
    def issue_record(self) -> bytes:
        """Sign what we say of ourselves now, and tell the machine."""
        config, driver = self._config, self._driver
        now_ms = int(self._clock.time() * 1000)
        fellows = [record.upload_kbps for record in driver.records()]
        live = self._machine.live_members(self._clock.monotonic())
        record = PeerRecord(
            driver.signer.peer_id,
            config.run,
            self._machine.group,
            config.site,
            self._addresses,
            self._capacity.kbps(driver.exchange.upload.kbps, fellows),
            self._reachable,
            driver.learner.round,
            config.founded_ms,
            now_ms,
            now_ms + int(RECORD_LIVES * self._refresh_s * 1000),
            self._company(live),
            self._machine.coordinate,
        )
        self._record = record
        self._is_contact = driver.signer.peer_id in sorted(live, key=rank)[: limits.GROUP_CONTACTS]
        signed = sign_record(driver.signer, record)
        driver.feed(RecordIssued(signed, record))
        return signed

    async def keep_record(self) -> None:
        """Store the record again before it expires, and when our group changed."""
        config = self._config
        announced = False
        while True:
            self._publish.clear()
            signed = self.issue_record()
            stored = await self._directory.publish_record(signed, contact=self._is_contact)
            if self._machine.ready and not announced:
                announced = await self._directory.publish_manifest(
                    config.run, config.manifest, config.name
                )
            alone = not stored or not announced
            due_s = self._clock.monotonic() + (MEMBERS_READ_S if alone else self._refresh_s)
            while not self._publish.is_set() and self._clock.monotonic() < due_s:
                pause_s = min(
                    due_s - self._clock.monotonic(),
                    max(limits.RECORD_REFRESH_S, self._refresh_s / 2),
                )
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._publish.wait()
                if self._has_news():
                    break

    @property
    def _refresh_s(self) -> float:
        return max(limits.RECORD_REFRESH_S, self._machine.chores_s)

    def _has_news(self) -> bool:
        """Whether our record says something else of us than what we see: others decide by it
        whether there is room, who aggregates, and where to dial."""
        record = self._record
        live = self._machine.live_members(self._clock.monotonic())
        return (
            record is None
            or record.company != self._company(live)
            or record.group != self._machine.group
            or record.reachable != self._reachable
            or record.addresses != self._addresses
        )

    @property
    def _addresses(self) -> tuple[str, ...]:
        return tuple(self._driver.transport.addresses()[: limits.ADDRESSES_MAX])

    @property
    def _reachable(self) -> bool:
        """Transports that do not tell are those of one machine, and of simulations."""
        return bool(getattr(self._driver.transport, "reachable", True))

    def _company(self, live: list[PeerId]) -> int:
        return min(len(live), limits.COMPANY_MAX) if self._machine.group else 0

    # ── the others ───────────────────────────────────────────────────────────────────────
    async def keep_members(self) -> None:
        """Read our neighbours' records: often while there is nobody, seldom with company."""
        remember = getattr(self._driver.transport, "remember", None)
        wait_s = MEMBERS_READ_S
        stood = None
        for turn in itertools.count():
            for record in await self._neighbours(turn):
                if record.peer == self._machine.me:
                    continue
                if remember is not None:
                    remember(record.peer, record.addresses)
                self._driver.feed(RecordSeen(record))
            # A new place, or a new group, has other neighbours.
            stands = (self._machine.group, self._machine.coordinate is None)
            company = len(self._machine.members.everybody()) > 0
            wait_s = min(max(MEMBERS_READ_S_MAX, self._machine.chores_s), wait_s * 1.3)
            if not company or stands != stood:
                wait_s, stood = MEMBERS_READ_S, stands
            await asyncio.sleep(wait_s * self._rng.uniform(0.8, 1.2))

    async def _neighbours(self, turn: int) -> list[PeerRecord]:
        """Those whom a peer in our place should know, and now and then somebody far away."""
        if self._record is None:
            return await self._directory.members(self._config.run)
        found = await self._directory.nearby(self._record)
        if turn % STRANGERS_EVERY == 0:
            drawn = await self._directory.random_groups(self._config.run, STRANGERS)
            found += [notice.contacts[0] for notice in drawn]
        return found

    # ── the state ────────────────────────────────────────────────────────────────────────
    async def wait_for_state(self) -> None:
        """A newcomer waits for a donor; only where nobody has heard of the run it begins anew."""
        run, learner = self._config.run, self._driver.learner
        alone_s = 0.0
        told_s = self._clock.monotonic()
        while not self._machine.ready:
            others = [m for m in await self._directory.members(run) if m.peer != self._machine.me]
            known = any(notice.run == run for notice in await self._directory.runs())
            alone_s = 0.0 if others or known else alone_s + STATE_LOOK_S
            if alone_s > finding.EMPTY_S and self._directory.size() > 0:
                self._emit(ev.Notice("info", "nobody has this run any more: beginning anew"))
                self._driver.feed(StateReady(learner.round, learner.digest))
                return
            if self._clock.monotonic() - told_s > STATE_TOLD_S:
                told_s = self._clock.monotonic()
                self._emit(
                    ev.Notice(
                        "warning",
                        f"still waiting for a member with the run's state ({len(others)} known);"
                        " it goes on by itself when one is online",
                    )
                )
            await asyncio.sleep(STATE_LOOK_S)
