"""How a peer is known and knows others: its record, the members it reads, the state it waits for.

Three standing tasks beside the driver, on any directory and any clock: the simulator runs them too.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from dht.directory import Directory
from peer import finding
from peer.clock import SYSTEM, Clock
from peer.driver import Driver
from peer.observe import events as ev
from protocols import limits
from protocols.events import RecordIssued, RecordSeen, StateReady
from protocols.records import PeerRecord, sign_record
from protocols.types import RunId

MEMBERS_READ_S: Final = 2.0  # while there is nobody, and ...
MEMBERS_READ_S_MAX: Final = 15.0  # ... once there is company
UPLOAD_KBPS_UNKNOWN: Final = 100_000  # what an unmeasured, unlimited line counts for in elections
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
        budget_bps = config.upload_bps
        record = PeerRecord(
            driver.signer.peer_id,
            config.run,
            self._machine.group,
            config.site,
            tuple(driver.transport.addresses()[: limits.ADDRESSES_MAX]),
            int(budget_bps / 1000) if budget_bps is not None else UPLOAD_KBPS_UNKNOWN,
            True,
            driver.learner.round,
            config.founded_ms,
            now_ms,
            now_ms + int(limits.RECORD_TTL_S * 1000),
        )
        signed = sign_record(driver.signer, record)
        driver.feed(RecordIssued(signed, record))
        return signed

    async def keep_record(self) -> None:
        """Store the record again before it expires, and when our group changed."""
        config = self._config
        announced = False
        while True:
            self._publish.clear()
            stored = await self._directory.publish_record(self.issue_record())
            if self._machine.ready and not announced:
                announced = await self._directory.publish_manifest(
                    config.run, config.manifest, config.name
                )
            alone = not stored or not announced
            wait_s = MEMBERS_READ_S if alone else limits.RECORD_REFRESH_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._publish.wait()

    # ── the others ───────────────────────────────────────────────────────────────────────
    async def keep_members(self) -> None:
        """Read the members' records: often while there is nobody, seldom with company."""
        remember = getattr(self._driver.transport, "remember", None)
        wait_s = MEMBERS_READ_S
        while True:
            for record in await self._directory.members(self._config.run):
                if record.peer == self._machine.me:
                    continue
                if remember is not None:
                    remember(record.peer, record.addresses)
                self._driver.feed(RecordSeen(record))
            company = len(self._machine.members.everybody()) > 0
            wait_s = min(MEMBERS_READ_S_MAX, wait_s * 1.3) if company else MEMBERS_READ_S
            await asyncio.sleep(wait_s * self._rng.uniform(0.8, 1.2))

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
