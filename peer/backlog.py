"""What a group did while its state was on the way to us: outcomes kept until they can be applied.

Members keep the outcomes of a few rounds. A transfer that takes longer would end at a state from
which nobody leads on, and begin again, for ever. So once members are about to forget a round that
the state on its way does not have, its outcomes are fetched and kept here, coded as they are: the
first in memory, more on disk. If they come to more than a state itself, another state is cheaper,
and nothing more is kept. They are applied like all that is caught up with, when the state is here.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from peer.clock import Clock
from peer.errors import StorageError
from peer.exchange import Exchange, Outcome, content_digest
from peer.home import complain, make_folder
from peer.net.transport import TransportError
from protocols.errors import RemoteProtocolError
from protocols.group import GroupMachine
from protocols.membership import Neighbour
from protocols.messages import OutcomeHeader, OutcomeQuery
from protocols.records import Signed
from protocols.schema import SchemaError, pack, unpack

MEMORY_BYTES_MAX: Final = 64 * 2**20  # a few rounds of 100 M parameters
LOOK_S: Final = 1.0  # between two looks at where members stand
_HEAD: Final = struct.Struct("<II")  # bytes of the proof, units


class Backlog:
    """Outcomes of our group's rounds from a state's on up to `until` - 1, whole rounds only."""

    def __init__(
        self,
        first: int,
        exchange: Exchange,
        machine: GroupMachine,
        clock: Clock,
        *,
        bytes_max: int,
        folder: Path | None,
        blame: Callable[[RemoteProtocolError], None],
        grown: Callable[[], None],
    ) -> None:
        """`first`: the state's round. `folder`: for what is too much for memory; `grown`: told
        after each round."""
        self.until = first
        self.arrived = False
        """Whether the state is here, and this is being applied."""
        self._exchange = exchange
        self._machine = machine
        self._clock = clock
        self._bytes_max = max(bytes_max, MEMORY_BYTES_MAX)
        self._folder = folder
        self._blame = blame
        self._grown = grown
        self._rounds: dict[int, list[Outcome]] = {}
        self._sizes: dict[int, int] = {}
        """Of each round that is here, in memory or on disk."""
        self._turn = 0
        self._spilled = False

    # ── collecting ───────────────────────────────────────────────────────────────────────
    async def collect(self) -> None:
        """Keep what members are about to forget, until we have caught up with all of it."""
        machine = self._machine
        while not (self.arrived and machine.round >= self.until):
            ahead = self._ahead()
            top = max((n.round for n in ahead), default=0)
            if top - self.until < max(1, machine.config.rounds_kept // 2):
                await asyncio.sleep(LOOK_S)
            elif not await self._fetch(ahead):
                return

    def _ahead(self) -> list[Neighbour]:
        """Members of our group that have applied the round that is due."""
        live = self._machine.members.live(self._machine.group, self._clock.monotonic())
        return [n for n in live if n.ready and n.round > self.until]

    async def _fetch(self, sources: list[Neighbour]) -> bool:
        """Get the next round from one of them; False if there is no room for more."""
        self._turn += 1
        source = sources[self._turn % len(sources)].record.peer
        machine, number = self._machine, self.until
        query = OutcomeQuery(machine.config.run, machine.group, number, None)
        units = machine.config.exchanged(number)
        found: list[Outcome] = []
        try:
            await self._exchange.fetch_outcomes(
                source, query, units, lambda *_: None, keep=found.append
            )
        except TransportError:
            await asyncio.sleep(LOOK_S)
            return True
        except RemoteProtocolError as error:
            self._blame(error)
            await asyncio.sleep(LOOK_S)
            return True
        found.sort(key=lambda outcome: outcome.header.start)
        edges = [units.start, *(outcome.header.stop for outcome in found)]
        starts = [*(outcome.header.start for outcome in found), units.stop]
        if edges != starts:
            await asyncio.sleep(LOOK_S)  # not all of the round: another member may have the rest
            return True
        return await self._keep(number, found)

    async def _keep(self, number: int, outcomes: list[Outcome]) -> bool:
        size = sum(outcome.header.content_bytes for outcome in outcomes)
        total = sum(self._sizes.values()) + size
        if total > self._bytes_max:
            return False
        if total <= MEMORY_BYTES_MAX:
            self._rounds[number] = outcomes
        else:
            try:
                await asyncio.to_thread(self._write, number, outcomes)
            except StorageError:
                return False  # the disk is full: whoever needs it more says so
        self._sizes[number] = size
        self.until = number + 1
        self._grown()
        return True

    # ── giving back ──────────────────────────────────────────────────────────────────────
    async def take(self, number: int) -> list[Outcome]:
        """A round's outcomes, once; none if they are not here."""
        if self._sizes.pop(number, None) is None:
            return []
        if number in self._rounds:
            return self._rounds.pop(number)
        return await asyncio.to_thread(self._read, number)

    def clear(self) -> None:
        """Drop what is left. Waits for the disk: call it from a thread."""
        self._rounds.clear()
        self._sizes.clear()
        if self._spilled:
            self._purge()

    def _purge(self) -> None:
        """Drop all that is on disk, an earlier process's too."""
        if self._folder is not None:
            with suppress(OSError):
                for path in self._folder.glob("outcomes-*"):
                    path.unlink()
                self._folder.rmdir()
                self._folder.parent.rmdir()

    # ── on disk ──────────────────────────────────────────────────────────────────────────
    def _path(self, number: int) -> Path:
        if self._folder is None:
            raise StorageError("there is no folder for outcomes")
        return self._folder / f"outcomes-{number:012d}"

    def _write(self, number: int, outcomes: list[Outcome]) -> None:
        path = self._path(number)
        if not self._spilled:
            self._purge()
            self._spilled = True
        make_folder(path.parent)
        try:
            with path.open("wb") as file:
                for outcome in outcomes:
                    proof = pack(outcome.signed)
                    lengths = [len(unit) for unit in outcome.units]
                    file.write(_HEAD.pack(len(proof), len(lengths)) + proof)
                    file.write(struct.pack(f"<{len(lengths)}I", *lengths))
                    file.writelines(outcome.units)
        except OSError as error:
            complain(error, path, "write")

    def _read(self, number: int) -> list[Outcome]:
        """What was written; nothing if the disk has lost any of it."""
        path = self._path(number)
        found: list[Outcome] = []
        try:
            data = memoryview(path.read_bytes())
            path.unlink()
            while data:
                size, count = _HEAD.unpack_from(data)
                data = data[_HEAD.size :]
                signed = unpack(Signed, bytes(data[:size]))
                header = unpack(OutcomeHeader, signed.body)
                lengths = struct.unpack_from(f"<{count}I", data, size)
                data = data[size + 4 * count :]
                units = []
                for length in lengths:
                    units.append(bytes(data[:length]))
                    data = data[length:]
                if content_digest(units) != header.content:
                    return []
                found.append(Outcome(header, signed, tuple(units)))
        except (OSError, SchemaError, struct.error):
            return []
        return found
