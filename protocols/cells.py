"""Where a record is kept so that those who need it find it, and nobody has to read all of them.

A *tree* is a set of keys: the root holds everybody, each level below divides by one octal digit of
a member's *digits*. The leaf of a path is its first level with few members (`CELL_RECORDS_MAX`);
all of them stand there. Of a crowded cell only a sample stands at its key: each member has a fixed
*rank* in (0, 1), the hash of its id, and stays while its rank is below sample / population. So
nobody keeps count, every key stays small, a member stands at two or three keys, and the ranks at
any key tell how many there are in all (the k-th smallest of n uniform ranks is about k / n;
Bar-Yossef et al., "Counting distinct elements in a data stream", 2002). Finding the leaf is a
search for the level where crowded ends: the sample at one level foretells the ones below.

Trees of a run:

    peers    only a root: some of everybody, for who comes first
    nearG    by place: the digits are those of the coordinate's cube, eight cubes in each (Morton
             order); one tree per grid. Where cubes end, it is a hash
    site/..  all who declared one label, by hash
    groups   by the hash of a group's name: an index from which any group can be drawn; its
             deepest key is the group's own, with all its members

Prefixes are all that is needed of the curve, and the prefixes of every curve that fills cubes by
eighths are the same cubes: so Morton's, which is three shifts, and not Hilbert's, which keeps
neighbours along the *line*. A border between cubes still cuts neighbourhoods apart. Therefore the
grids are shifted against each other: who is cut apart in one of them meets in the other (T. Chan,
"Approximate nearest neighbor queries revisited", 1998). And a cell is only where neighbours find
each other; groups are made among them by distance (`grouping`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from protocols import limits
from protocols.coordinates import Coordinate
from protocols.records import PeerRecord
from protocols.types import GroupName, PeerId

PLACE_DIGITS: Final = 9  # 3.07 s / 2^9: cubes of 6 ms, where coordinates are no longer right
AXIS_CELLS: Final = 2**PLACE_DIGITS
PEERS: Final = "peers"
GROUPS: Final = "groups"


@dataclass(frozen=True, slots=True)
class Path:
    """A member's way through one tree: the cell at level n is `digits[:n]`."""

    tree: str
    digits: str

    def cell(self, level: int) -> str:
        """Names the cell among all of a run's."""
        # Whatever divides everybody by place starts with everybody: one root for all grids.
        tree = PEERS if not level and self.tree.startswith("near") else self.tree
        return f"{tree}/{self.digits[:level]}"


@lru_cache(maxsize=2**14)
def rank(peer: PeerId) -> float:
    """In (0, 1), as good as random, the same everywhere."""
    raw = hashlib.sha256(b"rank\x00" + peer.encode()).digest()
    return (int.from_bytes(raw[:6], "big") + 0.5) / 2**48


@lru_cache(maxsize=2**14)
def hash_digits(text: str, count: int = limits.CELL_LEVELS_MAX) -> str:
    raw = int.from_bytes(hashlib.sha256(b"cell\x00" + text.encode()).digest()[:8], "big")
    return f"{raw:022o}"[-count:]


@lru_cache(maxsize=2**14)
def place_digits(coordinate: Coordinate, grid: int) -> str:
    """The nested cubes around a point, from the largest: one octal digit (x, y, z bits) each.

    The grids differ by a sixth of the whole, which is a third or two thirds of a cube at every
    level below (1/6 is 0.0010101... in binary): no border of one lies near a border of the other.
    The room is half as large again as what coordinates can be, so nothing is shifted out of it,
    and the middle of the network is in nobody's corner.
    """
    size_s = 3 * limits.COORDINATE_S_MAX
    shift = (grid - (limits.CELL_GRIDS - 1) / 2) / 6
    bits: list[int] = []
    for value_s in (coordinate.x_s, coordinate.y_s, coordinate.z_s):
        along = 0.5 + value_s / size_s + shift
        bits.append(min(max(int(along * AXIS_CELLS), 0), AXIS_CELLS - 1))
    digits = ""
    for level in reversed(range(PLACE_DIGITS)):
        x, y, z = (axis >> level & 1 for axis in bits)
        digits += str(x << 2 | y << 1 | z)
    return digits


def group_path(group: GroupName) -> Path:
    return Path(GROUPS, hash_digits(group))


def digits_in(tree: str, record: PeerRecord) -> str | None:
    """A member's digits in a tree, or None if it is not in it: roots hold anybody."""
    if tree == GROUPS:
        return hash_digits(record.group) if record.group else None
    if tree == site_tree(record.site):
        return hash_digits(record.peer)
    if record.site or record.coordinate is None or not tree.startswith("near"):
        return None
    rest = hash_digits(record.peer, limits.CELL_LEVELS_MAX - PLACE_DIGITS)
    return place_digits(record.coordinate, int(tree.removeprefix("near"))) + rest


@lru_cache(maxsize=2**10)
def site_tree(site: str) -> str:
    """Where a label's peers are kept: hashed, as a label may hold anything."""
    return f"site/{hashlib.sha256(site.encode()).hexdigest()[:32]}" if site else ""


def neighbourhood(record: PeerRecord) -> list[Path]:
    """The paths on which a peer's neighbours are: its label's, its place's, or none yet."""
    trees = [f"near{grid}" for grid in range(limits.CELL_GRIDS)]
    found = [
        (t, digits_in(t, record)) for t in ([site_tree(record.site)] if record.site else trees)
    ]
    return [Path(tree, digits) for tree, digits in found if digits is not None]


def cells_of(record: PeerRecord) -> set[str]:
    """Every cell in which the record may stand, and no other."""
    found = {Path(PEERS, "").cell(0)}
    paths = neighbourhood(record)
    if record.group:
        paths.append(group_path(record.group))
    for path in paths:
        found.update(path.cell(level) for level in range(len(path.digits) + 1))
    return found


def population(ranks: Collection[float]) -> float:
    """How many a cell holds, by the ranks of those who show themselves."""
    count = len(ranks)
    if count < 2:
        return float(count)
    return max(float(count), (count - 1) / max(ranks))


def is_crowded(count: float) -> bool:
    return count > limits.CELL_RECORDS_MAX


def shows(peer: PeerId, count: float) -> bool:
    """Whether `peer` stands at the key of a cell of `count`."""
    return not is_crowded(count) or rank(peer) * count < limits.CELL_SAMPLE


@dataclass(slots=True)
class Search:
    """Looks for the leaf of a path: read the levels it asks for, tell it what was there.

    `counts` may hold what is known from earlier: then three reads usually confirm it.
    """

    path: Path
    counts: dict[int, float] = field(default_factory=dict)
    """Level -> population, by the latest read."""
    leaf: int | None = None
    """Known once the search has ended."""
    _low: int = -1
    """Deepest level read that is crowded; -1 stands for the world beyond the root."""
    _high: int = limits.CELL_LEVELS_MAX
    """Shallowest level read that is not, or the last one: there is nothing below it."""
    _guess: int = 0
    _again: int | None = None
    _read: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._high = len(self.path.digits)

    def start_at(self, leaf: int, turn: int = 0) -> None:
        """Look there first, one level above, and at one of those further up: which one is the
        `turn`'s, so that what is known of each is never older than a few turns."""
        self._guess = min(max(leaf, 0), self._high)
        if self._guess > 1:
            self._again = turn % (self._guess - 1)

    @property
    def wanted(self) -> list[int]:
        """Levels to read next, up to three; empty when the leaf is known."""
        if self.leaf is not None:
            return []
        first = {self._guess} if self._read else {self._guess, self._guess - 1}
        if not self._read and self._again is not None:
            first.add(self._again)
        return sorted(level for level in first if level >= 0 and level not in self._read)

    def found(self, level: int, records: Collection[PeerRecord]) -> None:
        """Who stands at the key of `level`."""
        count = population([rank(record.peer) for record in records])
        self.counts[level] = count
        self._read.add(level)
        if is_crowded(count) and level < len(self.path.digits):
            self._low = max(self._low, level)
        else:
            self._high = min(self._high, level)
        if level == self._low:
            own = (digits_in(self.path.tree, record) for record in records)
            self._foretell(level, count, [digits for digits in own if digits is not None])

    def _foretell(self, level: int, count: float, digits: list[str]) -> None:
        """What the sample at a crowded level says of those below that nobody has read."""
        if not digits:
            return
        guess, sample = count, len(digits)
        inside = len(digits)
        for below in range(level + 1, len(self.path.digits) + 1):
            if inside:  # whoever is in a cell was in the one above it
                cell = self.path.digits[:below]
                digits = [d for d in digits if d.startswith(cell)]
            inside = len(digits)
            # Where none of k is inside, it holds less than one part in k, and eighths of that.
            guess = count * inside / sample if inside else min(guess / 8, count / 64)
            if below not in self._read:
                self.counts[below] = guess

    def advance(self) -> None:
        """After everything in `wanted` was found: where next, or what is the leaf."""
        if self._low + 1 >= self._high:
            if self._high in self._read:
                self.leaf = self._high
                for level in [n for n in self.counts if n > self._high + 1]:
                    del self.counts[level]
            else:
                self._guess = self._high
            return
        between = range(self._low + 1, self._high)
        unread = [n for n in between if n in self.counts and not is_crowded(self.counts[n])]
        likely = unread[0] if unread else between[-1]
        self._guess = likely if self._low >= 0 else max(between[0], min(likely, self._high - 1))


def levels_to_show(peer: PeerId, search: Search) -> list[int]:
    """The levels of a path at whose keys `peer` stands, once the leaf is known.

    The leaf; one below while it is more than half full, as others may think it crowded already;
    and those above that let this peer be part of their sample.
    """
    assert search.leaf is not None
    leaf, last = search.leaf, len(search.path.digits)
    levels = [leaf]
    if leaf < last and search.counts.get(leaf, 0.0) > limits.CELL_RECORDS_MAX / 2:
        levels.append(leaf + 1)
    return levels + [n for n in range(leaf) if shows(peer, _count_at(n, search.counts, leaf))]


def _count_at(level: int, counts: Mapping[int, float], leaf: int) -> float:
    """The population of a level; between two known ones it falls by equal factors."""
    if level in counts:
        return counts[level]
    above = max((n for n in counts if n < level), default=None)
    below = min((n for n in counts if n > level), default=leaf)
    if above is None:
        # Never read: crowded for sure, as it lies above the leaf.
        return max(counts.get(below, 0.0), limits.CELL_RECORDS_MAX + 1.0)
    part = (level - above) / max(below - above, 1)
    low = max(counts.get(below, 1.0), 1.0)
    return math.exp((1 - part) * math.log(max(counts[above], 1.0)) + part * math.log(low))
