"""The ledger of blocks: which are trained, who holds which, and what became of the others.

It moves only by applied outcomes (each names its contributors, and what they report), so all
members of a group have the same one without a word more. Its promises:

- a block that a member's outcome counted as trained is held by nobody any more;
- a block is held by at most one member; who is not heard of for `LEASE_ROUNDS` outcomes, or said
  goodbye to most, loses what it held, and that is *re-issued*: others may take it;
- a block may be trained by a peer that does not hold it (a newcomer, or one that ran dry): what is
  thereby trained twice is counted as *repeated*;
- nothing is forgotten: a block that the group leaves behind (`_close_before`) is *lost* if somebody
  held it, and *elsewhere* (another group's to train and to account for) if nobody here ever did.

A contribution's units may get inside in different rounds, and with fragments they do. A block is
trained once every unit of a contribution with its work in it is inside (`protocols/coverage.py`):
until then it waits in the batch of the round that first told of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from protocols import limits
from protocols.blocks import BlockReport, from_wire
from protocols.coverage import Coverage
from protocols.fragments import Fragments
from protocols.messages import OutcomeHeader
from protocols.ranges import Range, Ranges
from protocols.sharding import Shares, extent_blocks, score
from protocols.types import PeerId, RunId


@dataclass(frozen=True, slots=True)
class Entry:
    """One contributor of an applied round."""

    peer: PeerId
    report: BlockReport
    cover: int
    """Bit i: its contribution is inside unit i's mean."""


@dataclass(frozen=True, slots=True)
class Reissued:
    """`peer` held these and went without accounting for them: others may take them now."""

    peer: PeerId
    blocks: tuple[Range, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Totals:
    """How many blocks since the run began, by what became of them."""

    trained: int = 0
    """In this group's state, each counted once."""
    repeated: int = 0
    """Trained once more than that."""
    unasked: int = 0
    """Of the repeated: never re-issued, so two peers took them at once."""
    reissued: int = 0
    lost: int = 0
    elsewhere: int = 0
    in_flight: int = 0
    """Held, and trained or begun, but not wholly inside yet."""
    held: int = 0
    """Held and not begun."""
    waiting: int = 0
    """Before the furthest of these, and nobody's yet."""
    floor: int = 0
    """All ordinals below are accounted for."""


@dataclass(frozen=True, slots=True)
class Counted:
    """What one applied round changed."""

    round: int
    trained: Mapping[PeerId, tuple[Range, ...]]
    """Newly trained, by whom."""
    repeated: Mapping[PeerId, tuple[Range, ...]]
    reissued: tuple[Reissued, ...]
    lost: tuple[Range, ...]
    totals: Totals


@dataclass(slots=True)
class Batch:
    """Blocks whose work is in a member's contributions from round `since` on."""

    since: int
    blocks: Ranges


@dataclass(slots=True)
class Holder:
    """What the ledger knows of one member."""

    seen: int
    """The last round whose outcome had its work."""
    leases: Ranges = field(default_factory=Ranges)
    touched: Ranges = field(default_factory=Ranges)
    """Of the leases: trained or begun by its last report."""
    batches: list[Batch] = field(default_factory=list)
    """Trained, and inside in some units, the oldest first; usually part of the touched, but what
    two peers took at once is held by one of them and inside by both."""
    coverage: Coverage = field(default_factory=lambda: Coverage(Fragments((0, 1))))


class Ledger:
    """One group's account. Touch it from one thread only; `apply` is deterministic."""

    def __init__(
        self, run: RunId, blocks: int, units: int, fragments: Fragments | None = None
    ) -> None:
        """`blocks`: in one epoch of the run's data; `units`: of its layout, whose `fragments` take
        turns; None: every round exchanges all of it."""
        if blocks < 1 or units < 1:
            raise ValueError(f"a ledger of {blocks} blocks and {units} units")
        self.run = run
        self.blocks = blocks
        self.units = units
        self.fragments = fragments or Fragments((0, units))
        self.batches_max = 2 * self.fragments.count + 2
        """Per member: those of the rounds that a full turn takes, and as many for late ones."""
        self.extent = extent_blocks(blocks)
        self.window = max(4 * blocks, limits.LEDGER_WINDOW_BLOCKS_MIN)
        self.floor = 0
        self.accounted = Ranges()
        """From the floor on: trained, lost, or another group's."""
        self.reissued = Ranges()
        """From the floor on: taken back from a holder at least once."""
        self.holders: dict[PeerId, Holder] = {}
        self.counts: dict[str, int] = dict.fromkeys(
            ("trained", "repeated", "unasked", "reissued", "lost", "elsewhere"), 0
        )
        self._taken: Ranges | None = None

    # ── looking ──────────────────────────────────────────────────────────────────────────
    def leases_of(self, peer: PeerId) -> Ranges:
        """What `peer` holds: nobody else in the group trains it."""
        holder = self.holders.get(peer)
        return holder.leases.copy() if holder is not None else Ranges()

    def taken(self) -> Ranges:
        """From the floor on: accounted for or held. Not to be changed."""
        if self._taken is None:
            pieces = [piece for holder in self.holders.values() for piece in holder.leases]
            self._taken = Ranges([*self.accounted, *pieces])
        return self._taken

    def accounts_for(self, ordinal: int) -> bool:
        return ordinal < self.floor or ordinal in self.accounted

    def totals(self) -> Totals:
        in_flight = sum(len(holder.touched) for holder in self.holders.values())
        leases = sum(len(holder.leases) for holder in self.holders.values())
        taken = self.taken()
        top = max(self.floor, taken.top)
        return Totals(
            **self.counts,
            in_flight=in_flight,
            held=leases - in_flight,
            waiting=top - self.floor - len(taken),
            floor=self.floor,
        )

    def fault(self) -> str:
        """What does not add up; empty if all does."""
        t = self.totals()
        settled = t.trained + t.lost + t.elsewhere
        if settled != self.floor + len(self.accounted):
            return f"{settled} settled, {self.floor} + {len(self.accounted)} accounted for"
        if t.unasked > t.repeated:
            return f"{t.unasked} of {t.repeated} repeated blocks were never asked for"
        held = Ranges()
        for peer, holder in self.holders.items():
            if any(held.add(*piece) < piece[1] - piece[0] for piece in holder.leases):
                return f"{peer} holds what another holds"
            if holder.touched - holder.leases:
                return f"{peer} has begun what it does not hold"
        if held & self.accounted or any(start < self.floor for start, _ in held):
            return "a block is held and accounted for"
        return ""

    # ── choosing ─────────────────────────────────────────────────────────────────────────
    def choose(self, shares: Shares, count: int, besides: Ranges) -> Ranges:
        """Up to `count` free blocks for `shares.me` to claim, not in `besides`.

        Its own extents first, lowest first; where it has none left within a quarter of the window,
        what the group's others have not begun; then its own further on.
        """
        chosen = Ranges()
        low = self._lowest_free(shares)
        near, far = low + self.window // 4, self.floor + self.window
        for first, last, own in ((low, near, True), (low, near, False), (near, far, True)):
            for start, stop in self._free(shares, first, min(last, far), besides, own=own):
                room = min(count - len(chosen), stop - start)
                if room <= 0:
                    return chosen
                chosen.add(start, start + room)
        return chosen

    def spare(self, shares: Shares, besides: Ranges) -> int | None:
        """One free block for a peer that holds none: its own, and the surest of these first, which
        stay its own whoever else may come."""
        low = self._lowest_free(shares)
        near, far = low + self.window // 4, self.floor + self.window
        for extent in shares.surest(low // self.extent, min(near, far) // self.extent + 1):
            free = self._free_in(extent, besides)
            if free:
                return free[0][0]
        return next((start for start, _ in self._free(shares, near, far, besides, own=True)), None)

    def _lowest_free(self, shares: Shares) -> int:
        """The first block of our group that nobody has."""
        extent = self.floor // self.extent
        while extent * self.extent < self.floor + self.window:
            if shares.owner(extent) is not None:
                free = self._free_in(extent, Ranges())
                if free:
                    return free[0][0]
            extent += 1
        return self.floor + self.window

    def _free(
        self, shares: Shares, first: int, last: int, besides: Ranges, *, own: bool
    ) -> Iterable[Range]:
        for extent in range(first // self.extent, -(-last // self.extent)):
            owner = shares.owner(extent)
            if owner is None or (owner == shares.me) != own:
                continue
            for start, stop in self._free_in(extent, besides):
                if max(start, first) < min(stop, last):
                    yield max(start, first), min(stop, last)

    def _free_in(self, extent: int, besides: Ranges) -> list[Range]:
        start, stop = max(extent * self.extent, self.floor), (extent + 1) * self.extent
        if start >= stop:
            return []
        free = self.taken().missing(start, stop)
        return [piece for a, b in free for piece in besides.missing(a, b)] if besides else free

    # ── moving ───────────────────────────────────────────────────────────────────────────
    def apply(self, number: int, entries: Iterable[Entry]) -> Counted:
        """Account for round `number`, whose outcome was just applied."""
        self._taken = None
        inside = sorted(entries, key=lambda e: e.peer)
        trained: dict[PeerId, Ranges] = {}
        repeated: dict[PeerId, Ranges] = {}
        for entry in inside:
            holder = self._holder(entry.peer, number)
            if holder is not None:
                new, again = self._mark(self._through(holder, number, entry))
                if new:
                    trained[entry.peer] = new
                if again:
                    repeated[entry.peer] = again
        reissued = self._share_out(inside)
        reissued += self._release(number, inside)
        lost = self._move_floor(inside)
        self._taken = None
        return Counted(
            number,
            {peer: tuple(blocks) for peer, blocks in trained.items()},
            {peer: tuple(blocks) for peer, blocks in repeated.items()},
            tuple(reissued),
            tuple(lost),
            self.totals(),
        )

    def merge(self, theirs: Iterable[Range]) -> int:
        """Another group accounts for these: nobody here need train them. How many were new.

        Like `apply` it may be called only for what the whole group learns at the same round.
        """
        new = 0
        for start, stop in theirs:
            stop = min(stop, self.floor + 2 * self.window)
            new += self.accounted.add(max(start, self.floor), stop) if stop > self.floor else 0
        self.counts["elsewhere"] += new
        for holder in self.holders.values():
            self._narrow(holder)
        self._move_floor(())
        self._taken = None
        return new

    def _holder(self, peer: PeerId, number: int) -> Holder | None:
        if peer not in self.holders and len(self.holders) >= limits.LEDGER_HOLDERS_MAX:
            return None
        fresh = Holder(number, coverage=Coverage(self.fragments))
        holder = self.holders.setdefault(peer, fresh)
        holder.seen = number
        return holder

    def _believed(self, ranges: Ranges) -> Ranges:
        """What of a stranger's ranges lies where work may be."""
        return Ranges(ranges.within(0, self.floor + 2 * self.window))

    def finishes(self, peer: PeerId, number: int, told: Ranges) -> bool:
        """Whether all of `peer`'s blocks are trained once round `number`'s outcome has all of a
        contribution that tells of these."""
        holder = self.holders.get(peer)
        coverage = Coverage(self.fragments) if holder is None else holder.coverage.copy()
        batches = [] if holder is None else _added(holder.batches, number, told)
        coverage.add(number, (1 << self.units) - 1)
        latest = max((batch.since for batch in batches), default=number if told else -1)
        return latest <= coverage.since

    def _through(self, holder: Holder, number: int, entry: Entry) -> Ranges:
        """The blocks whose work is now inside in every unit."""
        told = self._believed(from_wire(entry.report.trained))
        batches = _added(holder.batches, number, told)
        if all(batch.since == number for batch in batches):
            holder.coverage = Coverage(self.fragments)  # of earlier work: nobody waits for it
        holder.coverage.add(number, entry.cover)
        if len(batches) > self.batches_max:
            last = batches.pop()
            batches[-1] = Batch(last.since, batches[-1].blocks | last.blocks)
        done = Ranges()
        for batch in batches:
            if batch.since <= holder.coverage.since:
                done = done | batch.blocks
        holder.batches = [batch for batch in batches if batch.since > holder.coverage.since]
        return done

    def _mark(self, done: Ranges) -> tuple[Ranges, Ranges]:
        """Count blocks as trained: (new ones, repeated ones)."""
        again = Ranges(
            [
                *done.within(0, self.floor),
                *(p for a, b in done for p in self.accounted.within(a, b)),
            ]
        )
        new = done - again
        for piece in new:
            self.accounted.add(*piece)
        asked = again & self.reissued
        self.counts["trained"] += len(new)
        self.counts["repeated"] += len(again)
        self.counts["unasked"] += len(again) - len(asked)
        return new, again

    def _share_out(self, inside: list[Entry]) -> list[Reissued]:
        """Who holds what from now on, among those in this round and the absent ones."""
        reports = {e.peer: e.report for e in inside if e.peer in self.holders}
        before = {peer: holder.leases for peer, holder in self.holders.items()}
        given_up: list[Reissued] = []
        taken = self.accounted.copy()
        worked: dict[PeerId, Ranges] = {}
        for peer, report in reports.items():
            holder = self.holders[peer]
            has = self._believed(from_wire(report.trained) | from_wire(report.begun))
            dropped = holder.touched - (Ranges() if report.final else has) - self.accounted
            dropped = self._from_floor(dropped)
            if report.final:
                dropped = self._from_floor(dropped | (has - self.accounted))
            if dropped:
                why = "left" if report.final else "given up"
                given_up.append(self._reissue(peer, dropped, why))
            worked[peer] = Ranges() if report.final else has
        new: dict[PeerId, list[Range]] = {peer: [] for peer in self.holders}
        # Work that was done counts before what is only held, and that before new claims.
        for peer, wanted in worked.items():
            new[peer] += self._take(wanted, taken)
            self.holders[peer].touched = Ranges(new[peer])
        for peer, leases in before.items():
            if peer not in reports:
                new[peer] += self._take(leases, taken)
        claims: list[tuple[float, PeerId, Range]] = []
        for peer, report in reports.items():
            if report.final:
                continue
            wanted = self._believed(from_wire(report.held))
            new[peer] += self._take(wanted & before[peer], taken)
            claims += [
                (-score(self.run, piece[0] // self.extent, peer), peer, piece)
                for piece in self._by_extent(wanted - before[peer])
            ]
        for _, peer, piece in sorted(claims):
            new[peer] += self._take(Ranges([piece]), taken)
        for peer, pieces in new.items():
            holder, leases = self.holders[peer], Ranges(pieces)
            holder.leases = self._capped(leases, holder.touched & leases)
            self._narrow(holder)
        return given_up

    def _take(self, wanted: Ranges, taken: Ranges) -> list[Range]:
        got = [piece for a, b in wanted for piece in taken.missing(max(a, self.floor), b)]
        for piece in got:
            taken.add(*piece)
        return got

    def _by_extent(self, ranges: Ranges) -> Iterable[Range]:
        for start, stop in ranges:
            while start < stop:
                edge = min(stop, (start // self.extent + 1) * self.extent)
                yield start, edge
                start = edge

    def _capped(self, leases: Ranges, touched: Ranges) -> Ranges:
        """What was touched, and of the rest the lowest, up to the limit."""
        room = limits.LEASE_BLOCKS_MAX - len(touched)
        kept = touched.copy()
        for start, stop in leases - touched:
            if room <= 0:
                break
            kept.add(start, min(stop, start + room))
            room -= stop - start
        return kept

    def _narrow(self, holder: Holder) -> None:
        """Keep of a holder what is not accounted for."""
        holder.leases = self._from_floor(holder.leases - self.accounted)
        holder.touched = holder.touched & holder.leases

    def _from_floor(self, ranges: Ranges) -> Ranges:
        return Ranges(ranges.within(self.floor, ranges.top))

    def _reissue(self, peer: PeerId, blocks: Ranges, reason: str) -> Reissued:
        self.counts["reissued"] += len(blocks)
        for piece in blocks:
            self.reissued.add(*piece)
        return Reissued(peer, tuple(blocks), reason)

    def _release(self, number: int, inside: list[Entry]) -> list[Reissued]:
        """Take back what is held by those who have gone."""
        found: list[Reissued] = []
        present = {entry.peer for entry in inside}
        for peer in sorted(self.holders):
            holder = self.holders[peer]
            votes = sum(peer in entry.report.left for entry in inside)
            bye = peer not in present and 2 * votes > len(inside)
            silent = number - holder.seen >= limits.LEASE_ROUNDS
            final = any(e.peer == peer and e.report.final for e in inside)
            if not (bye or silent or final):
                continue
            if holder.leases:
                reason = "left" if bye else f"not heard of for {limits.LEASE_ROUNDS} rounds"
                found.append(self._reissue(peer, holder.leases, reason))
            del self.holders[peer]
        return found

    def _move_floor(self, inside: Iterable[Entry]) -> list[Range]:
        """Leave behind what is settled, and what the group has gone too far beyond."""
        tops = sorted(self._furthest(entry) for entry in inside)
        lost: list[Range] = []
        if tops and tops[(len(tops) - 1) // 2] > self.floor + self.window:
            # The lower median: what one member claims far away drags nobody.
            lost += self._close_before(tops[(len(tops) - 1) // 2] - self.window)
        first = next(iter(self.accounted), None)
        if first is not None and first[0] <= self.floor:
            self._raise_to(first[1])
        while self.pieces > limits.LEDGER_RANGES_MAX:
            halves = list(self.accounted)
            middle = halves[len(halves) // 2][0] if halves else self.taken().top
            lost += self._close_before(max(middle, self.floor + 1))
        return lost

    @property
    def pieces(self) -> int:
        """Of how many ranges it all consists: what it costs to keep and to send."""
        own = sum(
            h.leases.pieces + h.touched.pieces + sum(b.blocks.pieces for b in h.batches)
            for h in self.holders.values()
        )
        return own + self.accounted.pieces + self.reissued.pieces

    def _furthest(self, entry: Entry) -> int:
        report = entry.report
        tops = [r.stop for r in (*report.trained, *report.begun, *report.held)]
        return min(max(tops, default=0), self.floor + 2 * self.window)

    def _close_before(self, ordinal: int) -> list[Range]:
        """Account for everything below `ordinal`, as lost or as another group's."""
        lost: list[Range] = []
        held = Ranges(piece for holder in self.holders.values() for piece in holder.leases)
        for start, stop in self.accounted.missing(self.floor, ordinal):
            gone = held.within(start, stop)
            lost += gone
            count = sum(b - a for a, b in gone)
            self.counts["lost"] += count
            self.counts["elsewhere"] += stop - start - count
            self.accounted.add(start, stop)
        for holder in self.holders.values():
            self._narrow(holder)
        self._raise_to(ordinal)
        self._taken = None
        return lost

    def _raise_to(self, ordinal: int) -> None:
        if ordinal <= self.floor:
            return
        first = next(iter(self.accounted), (0, 0))
        self.floor = max(ordinal, first[1] if first[0] <= ordinal else ordinal)
        self.accounted.remove(0, self.floor)
        self.reissued.remove(0, self.floor)


def _added(batches: list[Batch], number: int, told: Ranges) -> list[Batch]:
    """Those that a member still speaks of, and a new one of what it tells for the first time: what
    it no longer speaks of, it has given up."""
    kept = [Batch(batch.since, batch.blocks & told) for batch in batches]
    new = told
    for batch in kept:
        new = new - batch.blocks
    return [batch for batch in (*kept, Batch(number, new)) if batch.blocks]


def entries_of(headers: Iterable[OutcomeHeader]) -> list[Entry]:
    """The contributors of a round, by the proofs of all its spans.

    Who began anew in the middle of a round may have two contributions inside, each in some spans,
    which hold the work on different blocks. They do not add up to one: that in more units counts
    (of two in equally many that in the lower span), and the other is as if it had not come.
    """
    found: dict[PeerId, dict[tuple[float, BlockReport], int]] = {}
    for header in headers:
        for c in header.contributors:
            covers = found.setdefault(c.peer, {})
            what = c.weight, c.blocks
            covers[what] = covers.get(what, 0) | cover_of(header.start, header.stop, c.mask)
    entries = []
    for peer, covers in found.items():
        most = min(covers, key=lambda what: (-covers[what].bit_count(), _lowest(covers[what])))
        entries.append(Entry(peer, most[1], covers[most]))
    return entries


def _lowest(cover: int) -> int:
    """The lowest bit that is set, by itself."""
    return cover & -cover


def cover_of(start: int, stop: int, mask: bytes) -> int:
    """An outcome's contributor mask as bits over the whole layout; no mask: all of the span."""
    every = (1 << (stop - start)) - 1
    return (int.from_bytes(mask, "little") & every if mask else every) << start
