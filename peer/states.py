"""Whole states that come and go: whom to ask for one, and what is given to others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol

from peer.backlog import Backlog
from peer.clock import Clock
from peer.donating import Donor, Source
from peer.exchange import NO, Exchange, Outcome, RefusedError, refuse
from peer.incoming import Incoming
from peer.net.transport import Stream, Transport
from peer.observe import events as ev
from peer.receiving import DONORS_MAX, Fetched, Order, Receiver
from protocols.errors import RemoteProtocolError
from protocols.events import Event, FetchState, OutcomesAtHand, StateComing
from protocols.group import GroupMachine
from protocols.healing import lot
from protocols.messages import StateQuery
from protocols.types import Digest, PeerId

OWN_BYTES_MIN: Final = 4 * 2**20  # a smaller state is not compared with ours first
TOLD_S: Final = 10.0  # between two words on how much has come


class Host(Protocol):
    """What a driver is for this."""

    machine: GroupMachine
    transport: Transport
    exchange: Exchange
    emit: ev.Listener
    clock: Clock

    def feed(self, event: Event) -> None: ...

    def start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None] | None: ...

    def refused(self, error: RemoteProtocolError) -> None: ...


class States:
    """One peer's. Touched by the event loop only."""

    def __init__(self, host: Host, source: Source, incoming: Incoming | None) -> None:
        """`incoming`: where a state on its way survives a restart."""
        self._host = host
        self._source = source
        self._incoming = incoming
        self._donor = Donor(source, host.exchange.upload, self._served)
        self._backlog: Backlog | None = None
        self._collecting: asyncio.Task[None] | None = None
        self._receiving: asyncio.Task[Fetched] | None = None

    def replaced(self) -> None:
        """The state that was fetched took the place of ours."""
        self._donor.replaced()
        if self._backlog is not None:
            self._backlog.arrived = True

    async def tidy(self) -> None:
        """The state that was fetched is ours now: its chunks on disk may go."""
        if self._incoming is not None:
            await asyncio.to_thread(self._incoming.clear)

    # ── what the group does meanwhile ────────────────────────────────────────────────────
    @property
    def until(self) -> int:
        """The outcomes of all rounds from that of the fetched state to before this one are here."""
        return self._backlog.until if self._backlog is not None else 0

    async def kept(self, number: int) -> list[Outcome]:
        """A round's outcomes, if they were kept while the state came; they are given once."""
        return await self._backlog.take(number) if self._backlog is not None else []

    def _begin_backlog(self, donor: PeerId, first: int) -> None:
        self.drop_backlog()
        host = self._host
        known = host.machine.members.get(donor)
        if known is None or known.group != host.machine.group:
            return  # another group's outcomes lead to that one's states
        self._backlog = backlog = Backlog(
            first, host.exchange, host.machine, host.clock,
            bytes_max=self._source.grid.bytes,
            folder=self._incoming.folder / "outcomes" if self._incoming is not None else None,
            blame=host.refused,
            grown=lambda: self._grown(backlog),
        )  # fmt: skip
        self._collecting = host.start(backlog.collect(), f"outcomes from round {first} on")

    def _grown(self, backlog: Backlog) -> None:
        if backlog is self._backlog and self._host.machine.ready:
            self._host.feed(OutcomesAtHand(backlog.until))

    def drop_backlog(self) -> None:
        """The state that it leads on from is not taken."""
        if self._collecting is not None:
            self._collecting.cancel()
            self._collecting = None
        if self._backlog is not None:
            # No task: this may be the end of the driver, when none can begin any more.
            asyncio.get_running_loop().run_in_executor(None, self._backlog.clear)
            self._backlog = None

    # ── given ────────────────────────────────────────────────────────────────────────────
    async def serve(self, stream: Stream, query: StateQuery) -> None:
        """Answer who asks for a state; raises like `Donor.serve` but for refusals."""
        if not self._host.machine.ready:
            await refuse(stream, NO, "we have no state of this run ourselves")
            return
        try:
            await self._donor.serve(stream, query)
        except RefusedError as error:
            await refuse(stream, error.status, str(error))

    def _served(self, to: PeerId, number: int, size: int) -> None:
        self._host.emit(ev.StateServed(to, number, size))

    # ── fetched ──────────────────────────────────────────────────────────────────────────
    async def fetch(self, effect: FetchState) -> Fetched:
        """Get the state that the machine wants; raises like `Receiver.run`."""
        host, source = self._host, self._source
        grid = source.grid
        kept = host.machine.config.rounds_kept
        order = Order(
            run=host.machine.config.run,
            donors=self._donors(effect),
            at_least=0 if effect.step_back else source.round,
            resume_from=max(0, effect.round - kept),
        )
        own = None
        if source.round > 0 and grid.bytes >= OWN_BYTES_MIN:
            own = (await source.snapshot()).arrays
        receiver = Receiver(
            host.transport,
            grid,
            order,
            stood=self._stood,
            blame=host.refused,
            begun=lambda note: self._begin_backlog(effect.donor, note.round),
            moved=self._progress(effect),
            trouble=lambda text: host.emit(ev.Notice("warning", text)),
            own=own,
            incoming=self._incoming,
            clock=host.clock,
        )
        if self._receiving is not None:
            self._receiving.cancel()  # the machine has given that one up
        self._receiving = receiving = asyncio.create_task(receiver.run(), name="state")
        try:
            return await receiving
        except BaseException:
            receiving.cancel()
            if self._receiving is receiving:
                self.drop_backlog()
            raise
        finally:
            if self._receiving is receiving:
                self._receiving = None

    def _donors(self, effect: FetchState) -> list[PeerId]:
        """The one that the machine chose, those who stand where it does, and its other fellows, who
        may come to that state."""
        machine = self._host.machine
        chosen = machine.members.get(effect.donor)
        if chosen is None:
            return [effect.donor]
        fellows = [
            n for n in machine.members.in_group(chosen.group)
            if n.ready and not n.suspected and n.heard_s > 0 and n is not chosen
        ]  # fmt: skip
        there = (effect.round, effect.digest)
        fellows.sort(key=lambda n: ((n.round, n.digest) != there, lot(machine.me, n.record.peer)))
        others = [n.record.peer for n in fellows if n.record.peer != machine.me]
        return [effect.donor, *others[: 2 * DONORS_MAX]]

    def _stood(self, donor: PeerId, number: int) -> dict[PeerId, Digest]:
        """Where members of the donor's group said that they stood at a round."""
        members = self._host.machine.members
        known = members.get(donor)
        fellows = members.in_group(known.group) if known is not None else []
        return {n.record.peer: n.stood[number] for n in fellows if number in n.stood}

    def _progress(self, effect: FetchState) -> Callable[[int], None]:
        host, total = self._host, self._source.grid.bytes
        told_s = host.clock.monotonic()

        def moved(here: int) -> None:
            nonlocal told_s
            now_s = host.clock.monotonic()
            if now_s - told_s >= TOLD_S:
                told_s = now_s
                # A log's state is as long as the donor's log.
                host.emit(ev.StateArriving(effect.donor, here, max(here, total)))
                host.feed(StateComing())

        return moved
