"""Discovery on any table of keys: cells searched, records stored where they belong, groups drawn.

The part of a directory that `protocols.cells` describes, with the reading and writing left open.
What was learned of a path is kept, so that a peer that stays costs three reads per tree and time.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

from dht.directory import GroupNotice
from protocols import limits
from protocols.cells import (
    GROUPS,
    PEERS,
    Path,
    Search,
    group_path,
    levels_to_show,
    neighbourhood,
    population,
    rank,
    shows,
)
from protocols.records import PeerRecord
from protocols.types import GroupName, PeerId, RunId

SEARCHES_KEPT: Final = 64  # paths remembered: a peer has four per run, and moves now and then
USES_MAX: Final = 17  # one in so many uses of what is known of a path looks again; prime, so that
# a peer with two or three paths looks at each of them in turn
SEARCH_READS_MAX: Final = 24  # a search that is led astray ends here, where it stands
DRAWS_MAX: Final = 3  # cells read for one draw of groups: a cell may be empty
FEW: Final = 16  # with fewer neighbours than this a peer also looks at the cell around its own

Read = Callable[[RunId, list[str]], Awaitable[list[list[PeerRecord]]]]
"""(run, cells) -> the valid records at each."""


class Index:
    """Searches and remembers. One per directory."""

    def __init__(self, read: Read, rng: random.Random | None = None) -> None:
        self._read = read
        self._rng = rng or random.Random()
        self._known: OrderedDict[tuple[RunId, Path], Search] = OrderedDict()
        self._population: OrderedDict[RunId, float] = OrderedDict()
        self._uses = 0
        self._turn = 0
        self._group_level = 0
        """Where the last draw of groups found the leaf."""

    # ── where a record belongs ───────────────────────────────────────────────────────────
    async def cells_to_show(self, record: PeerRecord, *, contact: bool) -> list[str]:
        """The cells at whose keys the record should stand now."""
        cells: dict[str, None] = {}
        for path in neighbourhood(record):
            search = await self._searched(record.run, path)
            cells |= dict.fromkeys(map(path.cell, levels_to_show(record.peer, search)))
        if record.group:
            path = group_path(record.group)
            levels = [len(path.digits)]
            if contact:
                levels += levels_to_show(record.peer, await self._searched(record.run, path))
            cells |= dict.fromkeys(map(path.cell, levels))
        root = Path(PEERS, "").cell(0)
        if root not in cells and shows(record.peer, await self._everybody(record.run)):
            cells[root] = None
        return list(cells)

    async def _everybody(self, run: RunId) -> float:
        """How many the run has, as far as was read."""
        if run not in self._population:
            await self.some(run)
        return self._population[run]

    def announces(self, run: RunId, peer: PeerId) -> bool:
        """Whether `peer` is one of those who should announce a large run."""
        return shows(peer, self._population.get(run, 0.0))

    # ── reading ──────────────────────────────────────────────────────────────────────────
    async def some(self, run: RunId) -> list[PeerRecord]:
        """Anybody: the root of everything. One read."""
        (found,) = await self._read(run, [Path(PEERS, "").cell(0)])
        self._note_population(run, found)
        return found

    def _note_population(self, run: RunId, found: Iterable[PeerRecord]) -> None:
        self._population[run] = population([rank(r.peer) for r in found])
        self._population.move_to_end(run)
        while len(self._population) > SEARCHES_KEPT:
            self._population.popitem(last=False)

    async def nearby(self, mine: PeerRecord) -> list[PeerRecord]:
        """See `Directory.nearby`. Three reads per tree once the leaf is known, and one."""
        found: dict[PeerId, PeerRecord] = {}
        paths = neighbourhood(mine)
        read_root = False
        for path in paths:
            seen: dict[int, list[PeerRecord]] = {}
            search = await self._search(mine.run, path, seen)
            assert search.leaf is not None
            read_root = read_root or 0 in seen
            keep_latest(found, seen.get(search.leaf, ()))
            if len(seen.get(search.leaf, ())) < FEW:
                for records in seen.values():
                    keep_latest(found, records)
            if search.leaf == 0 and path.tree.startswith("near"):
                break  # a small run: one root for all grids
        if not read_root and not (paths and found):
            keep_latest(found, await self.some(mine.run))
        here = [r for r in found.values() if r.group == mine.group]
        if mine.group and len(here) < mine.company:
            path = group_path(mine.group)
            (roster,) = await self._read(mine.run, [path.cell(len(path.digits))])
            keep_latest(found, roster)
        return list(found.values())

    async def random_groups(self, run: RunId, count: int) -> list[GroupNotice]:
        """See `Directory.random_groups`. One or two reads once the level is known."""
        groups: dict[GroupName, dict[PeerId, PeerRecord]] = {}
        for _ in range(DRAWS_MAX):
            digits = "".join(self._rng.choices("01234567", k=limits.CELL_LEVELS_MAX))
            seen: dict[int, list[PeerRecord]] = {}
            path = Path(GROUPS, digits)
            search = Search(path)
            search.start_at(self._group_level)
            await self._run(run, search, seen)
            self._group_level = search.leaf or 0
            for record in seen.get(self._group_level, ()):
                keep_latest(groups.setdefault(record.group, {}), [record])
            if len(groups) >= count or not self._group_level:
                break  # enough, or all there are
        names = self._rng.sample(sorted(groups), min(count, len(groups)))
        return [
            GroupNotice(
                name, tuple(sorted(groups[name].values(), key=lambda r: (-r.issued_ms, r.peer)))
            )
            for name in names
        ]

    # ── searching ────────────────────────────────────────────────────────────────────────
    async def _searched(self, run: RunId, path: Path) -> Search:
        """What is known of a path; read only if nothing is, or it was asked for often since."""
        known = self._known.get((run, path))
        self._uses += 1
        if known is not None and self._uses % USES_MAX:
            return known
        return await self._search(run, path, {})

    async def _search(self, run: RunId, path: Path, seen: dict[int, list[PeerRecord]]) -> Search:
        """Find a path's leaf anew, from where it was before; `seen` gets what was read."""
        known = self._known.pop((run, path), None)
        search = Search(path, dict(known.counts) if known is not None else {})
        if known is not None and known.leaf is not None:
            self._turn += 1
            search.start_at(known.leaf, self._turn)
        await self._run(run, search, seen)
        self._known[run, path] = search
        while len(self._known) > SEARCHES_KEPT:
            self._known.popitem(last=False)
        return search

    async def _run(self, run: RunId, search: Search, seen: dict[int, list[PeerRecord]]) -> None:
        path = search.path
        while levels := search.wanted:
            cells = [path.cell(level) for level in levels]
            for level, records in zip(levels, await self._read(run, cells), strict=True):
                seen[level] = records
                if not level and path.tree.startswith("near"):
                    self._note_population(run, records)
                search.found(level, records)
            search.advance()
            if len(seen) >= SEARCH_READS_MAX and search.leaf is None:
                search.leaf = max(seen)


def keep_latest(found: dict[PeerId, PeerRecord], records: Iterable[PeerRecord]) -> None:
    """Of several records of a peer the one issued last counts."""
    for record in records:
        known = found.get(record.peer)
        if known is None or known.issued_ms < record.issued_ms:
            found[record.peer] = record


def latest(records: Sequence[PeerRecord]) -> list[PeerRecord]:
    found: dict[PeerId, PeerRecord] = {}
    keep_latest(found, records)
    return list(found.values())
